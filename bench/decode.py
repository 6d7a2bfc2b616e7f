"""Bytes already in memory to events, and to chunks.

Each contender is a function from the pieces to an iterator. All run in one process,
in turns; what is measured is processor time.
"""

import codecs
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    Event,
    Workload,
    decode_workloads,
    typed_workloads,
)

import sse_chat

Pieces: TypeAlias = Sequence[bytes]
Contender: TypeAlias = Callable[[Iterable[bytes]], Iterator[Any]]
Contenders: TypeAlias = Mapping[str, Contender]
Floors: TypeAlias = dict[str, Callable[[], object]]
Same: TypeAlias = Callable[[Any, Event], bool]

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
    "sse_chat": sse_chat.iter_sse,
    "httpx-sse": lambda pieces: httpx_sse.EventSource(prepared(pieces)).iter_sse(),
    "httpx-sse inner": decode_httpx_sse_inner,
    "httpx2": lambda pieces: iter(
        httpx2.EventSource(prepared2(pieces), max_event_size=None)
    ),
    "openai": lambda pieces: OpenAISSEDecoder().iter_bytes(iter(pieces)),
    "sseclient-py": lambda pieces: sseclient.SSEClient(iter(pieces)).events(),
}


def is_event(event: Any, sent: Event) -> bool:
    """Whether it is the event that was sent; some write None for what was not."""
    return (event.event or "message", event.data, event.id or "") == sent


# Bytes to chunk objects.


OPENAI = OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")


def typed_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    response = prepared2(pieces)
    return iter(Stream(cast_to=ChatCompletionChunk, response=response, client=OPENAI))


def typed_recipe(pieces: Iterable[bytes]) -> Iterator[Any]:
    for event in DECODERS["httpx-sse"](pieces):
        if event.data == "[DONE]":
            break
        yield ChatCompletionChunk(**json.loads(event.data))


READERS: Contenders = {
    "sse_chat": sse_chat.iter_chunks,
    "openai": typed_openai,
    "recipe": typed_recipe,
}


def is_chunk(chunk: Any, sent: Event) -> bool:
    """Whether the chunk says all that the event's JSON does."""
    return _says(chunk, json.loads(sent[1]))


def _says(found: Any, sent: Any) -> bool:
    if isinstance(sent, dict):
        return all(_says(getattr(found, name), value) for name, value in sent.items())
    if isinstance(sent, list):
        return len(found) == len(sent) and all(map(_says, found, sent))
    return bool(found == sent)


# What it costs to do less: by name, made for a workload.


def decode_floors(workload: Workload) -> Floors:
    body = workload.body
    payloads = [data for _, data, _ in workload.events if data.startswith("{")]
    return {
        "split": lambda: body.split(b"\n\n"),
        "json.loads": lambda: exhaust(map(json.loads, payloads)),
    }


def typed_floors(workload: Workload) -> Floors:
    def dicts() -> Iterator[Any]:
        for piece in workload.blocks:
            for block in piece.split(b"\n\n"):
                if block and block != b"data: [DONE]":
                    yield json.loads(block[6:].decode())

    return {"floor": lambda: exhaust(dicts())}


# Checking and timing.


def _until(deadline: float, pieces: Pieces) -> Iterator[bytes]:
    for piece in pieces:
        if time.monotonic() > deadline:
            raise TimeoutError
        yield piece


def verdict(contender: Contender, same: Same, pieces: Pieces, sent: list[Any]) -> str:
    """ "" if the contender reads what was sent, else why it is not timed."""
    deadline = time.monotonic() + CHECK_SECONDS
    try:
        found = list(contender(_until(deadline, pieces)))
        right = len(found) == len(sent) and all(map(same, found, sent))
    except TimeoutError:
        return f"> {CHECK_SECONDS:g} s"
    except Exception as error:
        return type(error).__name__
    return "" if right else "wrong"


def exhaust(items: Iterable[object]) -> None:
    """Runs through everything and keeps nothing, at C speed."""
    deque(items, maxlen=0)


@dataclass(frozen=True)
class Race:
    """Contenders, whether an item is the event that was sent, and floors."""

    contenders: Contenders
    same: Same
    floors: Callable[[Workload], Floors]
    rounds: int

    def time(self, workload: Workload, cut: int) -> tuple[Samples, dict[str, str]]:
        """Seconds by contender and round, and why the others were not timed."""
        pieces, sent = workload.pieces(cut), workload.events
        verdicts = {
            name: verdict(contender, self.same, pieces, sent)
            for name, contender in self.contenders.items()
        }
        if verdicts["sse_chat"]:
            raise RuntimeError(f"sse_chat, {workload.name}: {verdicts['sse_chat']}")
        floors = self.floors(workload)

        def run(name: str) -> float:
            if name in floors:
                return cpu_seconds(floors[name])
            return cpu_seconds(lambda: exhaust(self.contenders[name](pieces)))

        right = [name for name, why in verdicts.items() if not why]
        samples = interleave(run, [*right, *floors], self.rounds)
        return samples, {name: why for name, why in verdicts.items() if why}

    def run(
        self, part: Part, title: str, workloads: list[Workload], cuts: Sequence[int]
    ) -> dict[tuple[str, int], Samples]:
        """Adds every workload in every cut to the part; gives what was found."""
        others = [*list(self.contenders)[1:], *self.floors(workloads[0])]
        found, rows = {}, []
        for workload in workloads:
            for cut in cuts:
                samples, verdicts = self.time(workload, cut)
                found[workload.name, cut] = samples
                key = f"{workload.name}, {CUT_NAMES[cut]}"
                per_event = samples.times(1e6 / len(workload.events)).summary()
                part.data[key] = {
                    "microseconds per event": per_event,
                    "not timed": verdicts,
                }
                rows.append([key, *_cells(samples, verdicts, others)])
        part.tables.append(table(title, ["", "sse_chat", *others], rows))
        return found


def _cells(samples: Samples, verdicts: dict[str, str], names: list[str]) -> list[str]:
    """Our time in ms, and of each other how many times ours it takes."""
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
    sizes = {LARGE_CUTS: (20_000, 5_000, 16_000_000), TINY_CUTS: (200, 200, 50_000)}
    if quick:
        sizes = {LARGE_CUTS: (50, 50, 100_000), TINY_CUTS: (20, 20, 5_000)}
    race = Race(DECODERS, is_event, decode_floors, 1 if quick else 9)
    found: dict[tuple[str, int], Samples] = {}
    for cuts, (chats, other, large) in sizes.items():
        size = f"{chats:,} chat chunks, {other:,} other events, {large:,} bytes in one"
        title = f"decode: our time, and the others' over ours ({size})"
        workloads = decode_workloads(chats, other, large)
        found |= race.run(part, title, workloads, cuts)

    def over(peer: str, cuts: Sequence[int], names: Sequence[str]) -> list[Figure]:
        return [
            samples.ratio(peer, "sse_chat")
            for (name, cut), samples in found.items()
            if peer in samples and cut in cuts and name in names
        ]

    names = [name for name, _ in found]
    every = over("httpx-sse", TCP_CUTS, names)
    mean = math.exp(sum(math.log(figure.value) for figure in every) / len(every))
    part.figures = {
        "decode chat / httpx-sse": min(over("httpx-sse", TCP_CUTS, CHAT_WORKLOADS)),
        "decode chat / openai": min(over("openai", TCP_CUTS, CHAT_WORKLOADS)),
        "decode all / httpx-sse": min(every),
        "decode mean / httpx-sse": Figure(mean, min(every).value, max(every).value),
        "decode tiny / httpx-sse": min(over("httpx-sse", TINY_CUTS, names)),
    }
    return part


def typed(quick: bool) -> Part:
    """Bytes to chunk objects."""
    part = Part()
    count, rounds = (50, 1) if quick else (1_000, 21)
    title = f"typed: our time for {count:,} chunks, and the others' over ours"
    workloads, cuts = typed_workloads(count), (BLOCK, TCP_CUTS[0])
    race = Race(READERS, is_chunk, typed_floors, rounds)
    found = race.run(part, title, workloads, cuts)
    *chats, tools = (found[workload.name, BLOCK] for workload in workloads)
    part.figures = {
        "typed chat / openai": min(chat.ratio("openai", "sse_chat") for chat in chats),
        "typed tools / openai": tools.ratio("openai", "sse_chat"),
        "typed / recipe": min(
            one.ratio("recipe", "sse_chat") for one in (*chats, tools)
        ),
        "typed chat / floor": max(chat.ratio("sse_chat", "floor") for chat in chats),
        "typed tools / floor": tools.ratio("sse_chat", "floor"),
    }
    return part
