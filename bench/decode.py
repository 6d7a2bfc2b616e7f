"""Parts 1 and 2: bytes already in memory to events, and to chunks.

Each contender is a function from the pieces to an iterator. All run in one process,
in turns; what is measured is processor time.
"""

import codecs
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import httpx
import httpx2
import httpx_sse
import sseclient
from httpx_sse import _decoders as httpx_sse_inner
from measure import Figure, Part, Samples, cpu_seconds, interleave, table
from openai import OpenAI, Stream
from openai._streaming import SSEDecoder as OpenAISSEDecoder
from openai.types.chat import ChatCompletionChunk
from workloads import (
    BLOCK,
    CHAT_WORKLOADS,
    CUT_NAMES,
    LARGE_CUTS,
    TCP_CUTS,
    TINY_CUTS,
    Workload,
    decode_workloads,
    typed_workloads,
)

import sse_chat

Pieces: TypeAlias = Sequence[bytes]
Contender: TypeAlias = Callable[[Iterable[bytes]], Iterator[Any]]
Contenders: TypeAlias = Mapping[str, Contender]

CHECK_SECONDS = 3.0
"""A contender that takes longer over one workload is not timed on it."""


# Bytes to events, each contender through the door that it has for its users. Those
# that take only a response get one whose bytes are there already, so that no HTTP and
# as little as possible of httpx is measured.


def prepared_response(library: Any) -> Callable[[Iterable[bytes]], Any]:
    """A response class, of httpx or of httpx2, whose bytes are there already."""

    class NoBody(library.SyncByteStream):  # type: ignore[misc]
        """A body that nobody reads."""

    class Prepared(library.Response):  # type: ignore[misc]
        def __init__(self, pieces: Iterable[bytes]) -> None:
            self.pieces = pieces
            headers = {"content-type": "text/event-stream"}
            request = library.Request("GET", "http://127.0.0.1")
            super().__init__(200, headers=headers, stream=NoBody(), request=request)

        def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
            return iter(self.pieces)

    return Prepared


prepared = prepared_response(httpx)
prepared2 = prepared_response(httpx2)


def decode_httpx_sse_inner(pieces: Iterable[bytes]) -> Iterator[Any]:
    """Its private decoders, without the response that its users cannot avoid."""
    text_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    lines = httpx_sse_inner.SSELineDecoder()
    events = httpx_sse_inner.SSEDecoder()
    for piece in pieces:
        text = text_decoder.decode(piece)
        if text:
            for line in lines.decode(text):
                event = events.decode(line.rstrip("\n"))
                if event is not None:
                    yield event


DECODERS: Contenders = {
    "sse_chat": lambda pieces: sse_chat.iter_sse(pieces),
    "httpx-sse": lambda pieces: httpx_sse.EventSource(prepared(pieces)).iter_sse(),
    "httpx-sse inner": decode_httpx_sse_inner,
    "httpx2": lambda pieces: iter(
        httpx2.EventSource(prepared2(pieces), max_event_size=None)
    ),
    "openai": lambda pieces: OpenAISSEDecoder().iter_bytes(iter(pieces)),
    "sseclient-py": lambda pieces: sseclient.SSEClient(iter(pieces)).events(),
}


def is_event(event: Any, sent: Any) -> bool:
    """Whether it is the event that was sent; some write None for what was not."""
    return (event.event or "message", event.data, event.id or "") == sent


# Bytes to chunk objects.


OPENAI = OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")


def typed_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    return iter(
        Stream(cast_to=ChatCompletionChunk, response=prepared2(pieces), client=OPENAI)
    )


def typed_recipe(pieces: Iterable[bytes]) -> Iterator[Any]:
    for event in DECODERS["httpx-sse"](pieces):
        if event.data == "[DONE]":
            break
        yield ChatCompletionChunk(**json.loads(event.data))


def typed_floor(pieces: Iterable[bytes]) -> Iterator[Any]:
    for piece in pieces:
        for block in piece.split(b"\n\n"):
            if block and block != b"data: [DONE]":
                yield json.loads(block[6:].decode())


READERS: Contenders = {
    "sse_chat": lambda pieces: sse_chat.iter_chunks(pieces),
    "openai": typed_openai,
    "recipe": typed_recipe,
}


def says(found: Any, sent: Any) -> bool:
    """Whether objects have all that was sent as their attributes."""
    if isinstance(sent, dict):
        return all(says(getattr(found, name), value) for name, value in sent.items())
    if isinstance(sent, list):
        return len(found) == len(sent) and all(map(says, found, sent))
    return bool(found == sent)


# Checking and timing.


class TooSlow(Exception):
    """A contender did not get through a workload within CHECK_SECONDS."""


class WrongAnswer(Exception):
    """A contender read something else than what was sent."""


def _until(deadline: float, pieces: Pieces) -> Iterator[bytes]:
    for piece in pieces:
        if time.monotonic() > deadline:
            raise TooSlow
        yield piece


def verdict(
    contender: Contender,
    same: Callable[[Any, Any], bool],
    pieces: Pieces,
    sent: Sequence[object],
) -> str:
    """ "" if the contender reads what was sent, else why it is not timed."""
    deadline = time.monotonic() + CHECK_SECONDS
    try:
        found = list(contender(_until(deadline, pieces)))
        right = len(found) == len(sent) and all(map(same, found, sent))
    except TooSlow:
        return f"> {CHECK_SECONDS:g} s"
    except Exception as error:
        return type(error).__name__
    return "" if right else "wrong"


def exhaust(items: Iterable[object]) -> None:
    """Runs through everything and keeps nothing, at C speed."""
    deque(items, maxlen=0)


def time_contenders(
    contenders: Contenders,
    floors: Mapping[str, Callable[[], object]],
    same: Callable[[Any, Any], bool],
    pieces: Pieces,
    sent: Sequence[object],
    rounds: int,
) -> tuple[Samples, dict[str, str]]:
    """Seconds by contender and round, and why the others were not timed.

    Ours is the one that has to be right.
    """
    verdicts = {
        name: verdict(contender, same, pieces, sent)
        for name, contender in contenders.items()
    }
    if verdicts["sse_chat"]:
        raise WrongAnswer(f"sse_chat: {verdicts['sse_chat']}")

    def run(name: str) -> float:
        if name in floors:
            return cpu_seconds(floors[name])
        return cpu_seconds(lambda: exhaust(contenders[name](pieces)))

    right = [name for name, why in verdicts.items() if not why]
    samples = interleave(run, [*right, *floors], rounds)
    return samples, {name: why for name, why in verdicts.items() if why}


def cells(
    samples: Samples, verdicts: dict[str, str], names: Iterable[str]
) -> list[str]:
    """For a table: our time in ms, of each other the time over ours."""
    ours = samples.figure("sse_chat").value
    others = [
        verdicts.get(name) or f"{samples.ratio(name, 'sse_chat').value:.2f} ×"
        for name in names
    ]
    return [f"{ours * 1e3:.2f} ms", *others]


# The parts.


def decode(quick: bool) -> Part:
    """Bytes to events, every workload in every cut."""
    part = Part()
    sizes = {
        LARGE_CUTS: (20_000, 5_000, 16_000_000),
        TINY_CUTS: (200, 200, 50_000),
    }
    if quick:
        sizes = {LARGE_CUTS: (50, 50, 100_000), TINY_CUTS: (20, 20, 5_000)}
    others = (*list(DECODERS)[1:], "split", "json.loads")
    ratios: dict[tuple[str, int, str], Figure] = {}
    for cuts, (chats, other, large) in sizes.items():
        rows = []
        for workload in decode_workloads(chats, other, large):
            for cut in cuts:
                samples, verdicts = time_decode(workload, cut, 1 if quick else 9)
                key = f"{workload.name}, {CUT_NAMES[cut]}"
                rows.append([key, *cells(samples, verdicts, others)])
                per_event = samples.times(1e6 / len(workload.events))
                part.data[key] = {
                    "microseconds per event": per_event.summary(),
                    "not timed": verdicts,
                }
                for peer in samples.keys() & DECODERS.keys():
                    ratios[workload.name, cut, peer] = samples.ratio(peer, "sse_chat")
        size = f"{chats:,} chat chunks, {other:,} other events, {large:,} bytes in one"
        title = f"decode: our time, and the others' over ours ({size})"
        part.tables.append(table(title, ["", "sse_chat", *others], rows))
    part.figures = decode_figures(ratios)
    return part


def time_decode(
    workload: Workload, cut: int, rounds: int
) -> tuple[Samples, dict[str, str]]:
    """One workload in one cut: the contenders, and what splitting and JSON cost."""
    body = workload.body
    payloads = [data for _, data, _ in workload.events if data.startswith("{")]
    floors: dict[str, Callable[[], object]] = {
        "split": lambda: body.split(b"\n\n"),
        "json.loads": lambda: exhaust(map(json.loads, payloads)),
    }
    pieces, events = workload.pieces(cut), workload.events
    return time_contenders(DECODERS, floors, is_event, pieces, events, rounds)


def decode_figures(ratios: dict[tuple[str, int, str], Figure]) -> dict[str, Figure]:
    """The worst ratio of each group that a row asks about."""

    def group(peer: str, cuts: Sequence[int], only: Sequence[str] = ()) -> list[Figure]:
        return [
            figure
            for (workload, cut, name), figure in ratios.items()
            if name == peer and cut in cuts and (not only or workload in only)
        ]

    every = group("httpx-sse", TCP_CUTS)
    mean = math.exp(sum(math.log(figure.value) for figure in every) / len(every))
    return {
        "decode chat / httpx-sse": min(group("httpx-sse", TCP_CUTS, CHAT_WORKLOADS)),
        "decode chat / openai": min(group("openai", TCP_CUTS, CHAT_WORKLOADS)),
        "decode all / httpx-sse": min(every),
        "decode mean / httpx-sse": Figure(mean, min(every).value, max(every).value),
        "decode tiny / httpx-sse": min(group("httpx-sse", TINY_CUTS)),
    }


def typed(quick: bool) -> Part:
    """Bytes to chunk objects."""
    part = Part()
    count, rounds = (50, 1) if quick else (1_000, 21)
    others = ("openai", "recipe", "floor")
    found: dict[str, Samples] = {}
    rows = []
    for workload in typed_workloads(count):
        sent = [json.loads(data) for _, data, _ in workload.events]
        blocks = workload.blocks
        floors = {"floor": lambda blocks=blocks: exhaust(typed_floor(blocks))}
        for cut in (TCP_CUTS[0], BLOCK):
            pieces = workload.pieces(cut)
            samples, verdicts = time_contenders(
                READERS, floors, says, pieces, sent, rounds
            )
            found[workload.name] = samples  # in the end those of BLOCK
            key = f"{workload.name}, {CUT_NAMES[cut]}"
            rows.append([key, *cells(samples, verdicts, others)])
            per_chunk = samples.times(1e6 / len(sent))
            part.data[key] = {"microseconds per chunk": per_chunk.summary()}
    title = f"typed: our time for {count:,} chunks, and the others' over ours"
    part.tables.append(table(title, ["", "sse_chat", *others], rows))
    chats = [found[name] for name in CHAT_WORKLOADS]
    tools = found["tool calls"]
    part.figures = {
        "typed chat / openai": min(chat.ratio("openai", "sse_chat") for chat in chats),
        "typed tools / openai": tools.ratio("openai", "sse_chat"),
        "typed / recipe": min(
            samples.ratio("recipe", "sse_chat") for samples in found.values()
        ),
        "typed chat / floor": max(chat.ratio("sse_chat", "floor") for chat in chats),
        "typed tools / floor": tools.ratio("sse_chat", "floor"),
    }
    return part
