"""Parts 1, 2 and 6: bytes already in memory to events, to chunks, and how it grows.

Each contender is a function from the pieces to an iterator. All run in one process,
in turns; what is measured is processor time.
"""

import codecs
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import httpx
import httpx2
import httpx_sse
import sseclient
from httpx_sse import _decoders as httpx_sse_inner
from measure import (
    Figure,
    Part,
    Samples,
    cpu_seconds,
    interleave,
    largest,
    medians,
    ratio,
    smallest,
    spread,
    table,
)
from openai import OpenAI, Stream
from openai._streaming import SSEDecoder as OpenAISSEDecoder
from openai.types.chat import ChatCompletionChunk
from workloads import (
    ASCII_WORDS,
    BLOCK,
    CHAT_WORKLOADS,
    CUT_NAMES,
    LARGE_CUTS,
    TCP_CUTS,
    TINY_CUTS,
    Event,
    Workload,
    answer_blocks,
    chunk_json,
    decode_workloads,
    one_event,
    text_payloads,
    tool_payloads,
    typed_workloads,
)

import sse_chat

Pieces: TypeAlias = Sequence[bytes]
Contender: TypeAlias = Callable[[Iterable[bytes]], Iterator[Any]]

CHECK_SECONDS = 3.0
"""A contender that takes longer over one workload is not timed on it."""


# Bytes to events, each contender through the door that it has for its users. Those
# that take only a response get one whose bytes are there already, so that no HTTP and
# as little as possible of httpx is measured.


class NoBody(httpx.SyncByteStream):
    """A body that nobody reads."""


class NoBody2(httpx2.SyncByteStream):
    """A body that nobody reads."""


HEADERS = {"content-type": "text/event-stream"}


class Prepared(httpx.Response):
    """A response of httpx whose bytes are there already."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = pieces
        super().__init__(200, headers=HEADERS, stream=NoBody())

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        return iter(self.pieces)


class Prepared2(httpx2.Response):
    """The same of httpx2."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = pieces
        request = httpx2.Request("GET", "http://127.0.0.1")
        super().__init__(200, headers=HEADERS, stream=NoBody2(), request=request)

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        return iter(self.pieces)


def decode_sse_chat(pieces: Iterable[bytes]) -> Iterator[Any]:
    return sse_chat.iter_sse(pieces)


def decode_httpx_sse(pieces: Iterable[bytes]) -> Iterator[Any]:
    return httpx_sse.EventSource(Prepared(pieces)).iter_sse()


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


def decode_httpx2(pieces: Iterable[bytes]) -> Iterator[Any]:
    return iter(httpx2.EventSource(Prepared2(pieces), max_event_size=None))


def decode_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    return OpenAISSEDecoder().iter_bytes(iter(pieces))


def decode_sseclient(pieces: Iterable[bytes]) -> Iterator[Any]:
    events: Iterator[Any] = sseclient.SSEClient(iter(pieces)).events()
    return events


DECODERS: dict[str, Contender] = {
    "sse_chat": decode_sse_chat,
    "httpx-sse": decode_httpx_sse,
    "httpx-sse inner": decode_httpx_sse_inner,
    "httpx2": decode_httpx2,
    "openai": decode_openai,
    "sseclient-py": decode_sseclient,
}


def as_event(event: Any) -> Event:
    """Any contender's event; some write None for what was not sent."""
    return (event.event or "message", event.data, event.id or "")


# Bytes to chunk objects.


OPENAI = OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")


def typed_sse_chat(pieces: Iterable[bytes]) -> Iterator[Any]:
    return sse_chat.iter_chunks(pieces)


def typed_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    return iter(
        Stream(cast_to=ChatCompletionChunk, response=Prepared2(pieces), client=OPENAI)
    )


def typed_recipe(pieces: Iterable[bytes]) -> Iterator[Any]:
    for event in decode_httpx_sse(pieces):
        if event.data == "[DONE]":
            break
        yield ChatCompletionChunk(**json.loads(event.data))


def typed_floor(pieces: Iterable[bytes]) -> Iterator[Any]:
    for piece in pieces:
        for block in piece.split(b"\n\n"):
            if block and block != b"data: [DONE]":
                yield json.loads(block[6:].decode())


READERS: dict[str, Contender] = {
    "sse_chat": typed_sse_chat,
    "openai": typed_openai,
    "recipe": typed_recipe,
}


def as_payload(chunk: Any) -> dict[str, Any]:
    """What a chunk object says, in the layout of the JSON that it was made from."""
    choice = chunk.choices[0]
    delta = choice.delta
    said: dict[str, Any] = {}
    if delta.role is not None:
        said["role"] = delta.role
    if delta.content is not None:
        said["content"] = delta.content
    if delta.tool_calls is not None:
        said["tool_calls"] = [_as_call(call) for call in delta.tool_calls]
    return {
        "id": chunk.id,
        "object": chunk.object,
        "created": chunk.created,
        "model": chunk.model,
        "system_fingerprint": chunk.system_fingerprint,
        "choices": [
            {
                "index": choice.index,
                "delta": said,
                "finish_reason": choice.finish_reason,
            }
        ],
    }


def _as_call(call: Any) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    said = {
        "index": call.index,
        "id": call.id,
        "type": call.type,
        "function": {
            key: value for key, value in function.items() if value is not None
        },
    }
    return {key: value for key, value in said.items() if value is not None}


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
    read: Callable[[Any], object],
    pieces: Pieces,
    expected: Sequence[object],
) -> str:
    """ "" if the contender reads what was sent, else why it is not timed."""
    deadline = time.monotonic() + CHECK_SECONDS
    try:
        found = [read(item) for item in contender(_until(deadline, pieces))]
    except TooSlow:
        return f"> {CHECK_SECONDS:g} s"
    except Exception as error:
        return type(error).__name__
    return "" if found == expected else "wrong"


def exhaust(contender: Contender, pieces: Pieces) -> None:
    """Runs through everything and keeps nothing, at C speed."""
    deque(contender(pieces), maxlen=0)


def time_contenders(
    contenders: dict[str, Contender],
    floors: Mapping[str, Callable[[], object]],
    read: Callable[[Any], object],
    pieces: Pieces,
    expected: Sequence[object],
    rounds: int,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds by contender and round, and why the others were not timed.

    Ours is the one that has to be right.
    """
    verdicts = {
        name: verdict(contender, read, pieces, expected)
        for name, contender in contenders.items()
    }
    if verdicts["sse_chat"]:
        raise WrongAnswer(f"sse_chat: {verdicts['sse_chat']}")
    runs = {
        name: partial(cpu_seconds, partial(exhaust, contender, pieces))
        for name, contender in contenders.items()
        if not verdicts[name]
    }
    runs |= {name: partial(cpu_seconds, floor) for name, floor in floors.items()}
    samples = interleave(runs, rounds)
    return samples, {name: why for name, why in verdicts.items() if why}


def cells(
    samples: Samples, verdicts: dict[str, str], names: Iterable[str]
) -> list[str]:
    """For a table: our time in ms, of each other the time over ours."""
    ours = samples["sse_chat"]
    found = [f"{spread(ours).value * 1e3:.2f} ms"]
    for name in names:
        if name in samples:
            found.append(f"{ratio(samples[name], ours).value:.2f} ×")
        else:
            found.append(verdicts[name])
    return found


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
                part.data[key] = {
                    "milliseconds": medians(samples, 1e3),
                    "events": len(workload.events),
                    "not timed": verdicts,
                }
                for peer in verdicts.keys() ^ DECODERS.keys():
                    ours = samples["sse_chat"]
                    ratios[workload.name, cut, peer] = ratio(samples[peer], ours)
        size = f"{chats:,} chat chunks, {other:,} other events, {large:,} bytes in one"
        title = f"decode: our time, and the others' over ours ({size})"
        part.tables.append(table(title, ["", "sse_chat", *others], rows))
    part.figures = decode_figures(ratios)
    return part


def time_decode(
    workload: Workload, cut: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """One workload in one cut: the contenders, and what splitting and JSON cost."""
    body = workload.body
    payloads = [data for _, data, _ in workload.events if data.startswith("{")]
    floors: dict[str, Callable[[], object]] = {
        "split": lambda: body.split(b"\n\n"),
        "json.loads": lambda: deque(map(json.loads, payloads), maxlen=0),
    }
    pieces, events = workload.pieces(cut), workload.events
    return time_contenders(DECODERS, floors, as_event, pieces, events, rounds)


def decode_figures(ratios: dict[tuple[str, int, str], Figure]) -> dict[str, Figure]:
    """The worst ratio of each group that a row asks about."""

    def worst(peer: str, cuts: Sequence[int], only: Sequence[str] = ()) -> Figure:
        return smallest(
            figure
            for (workload, cut, name), figure in ratios.items()
            if name == peer and cut in cuts and (not only or workload in only)
        )

    all_httpx_sse = [
        figure.value
        for (_, cut, name), figure in ratios.items()
        if name == "httpx-sse" and cut in TCP_CUTS
    ]
    mean = math.exp(sum(map(math.log, all_httpx_sse)) / len(all_httpx_sse))
    return {
        "decode chat / httpx-sse": worst("httpx-sse", TCP_CUTS, CHAT_WORKLOADS),
        "decode chat / openai": worst("openai", TCP_CUTS, CHAT_WORKLOADS),
        "decode all / httpx-sse": worst("httpx-sse", TCP_CUTS),
        "decode mean / httpx-sse": Figure(mean, min(all_httpx_sse), max(all_httpx_sse)),
        "decode tiny / httpx-sse": worst("httpx-sse", TINY_CUTS),
    }


def typed(quick: bool) -> Part:
    """Bytes to chunk objects."""
    part = Part()
    count = 50 if quick else 1_000
    others = ("openai", "recipe", "floor")
    found: dict[tuple[str, str], Figure] = {}
    rows = []
    for workload in typed_workloads(count):
        for cut in (BLOCK, TCP_CUTS[0]):
            pieces = workload.pieces(cut)
            floors = {"floor": partial(exhaust, typed_floor, workload.blocks)}
            expected = [json.loads(data) for _, data, _ in workload.events]
            samples, verdicts = time_contenders(
                READERS, floors, as_payload, pieces, expected, 1 if quick else 21
            )
            key = f"{workload.name}, {CUT_NAMES[cut]}"
            rows.append([key, *cells(samples, verdicts, others)])
            per_chunk = 1e6 / len(expected)
            part.data[key] = {"microseconds per chunk": medians(samples, per_chunk)}
            if cut == BLOCK:
                ours = samples["sse_chat"]
                for peer in ("openai", "recipe"):
                    found[workload.name, peer] = ratio(samples[peer], ours)
                found[workload.name, "floor"] = ratio(ours, samples["floor"])
    title = f"typed: our time for {count:,} chunks, and the others' over ours"
    part.tables.append(table(title, ["", "sse_chat", *others], rows))
    chat, tools = CHAT_WORKLOADS, "tool calls"
    part.figures = {
        "typed chat / openai": smallest(found[name, "openai"] for name in chat),
        "typed tools / openai": found[tools, "openai"],
        "typed / recipe": smallest(found[name, "recipe"] for name in (*chat, tools)),
        "typed / floor": largest(found[name, "floor"] for name in (*chat, tools)),
    }
    return part


# Growth: each kind of size in each way to cut it, doubled five times.


def _events(pieces: Pieces) -> None:
    deque(sse_chat.iter_sse(pieces, max_event_bytes=None), maxlen=0)


def _chunks(pieces: Pieces) -> None:
    deque(sse_chat.iter_chunks(pieces), maxlen=0)


def _answer(pieces: Pieces) -> None:
    accumulator = sse_chat.ChatAccumulator()
    for chunk in sse_chat.iter_chunks(pieces):
        accumulator.add(chunk)
    if accumulator.completion.choices[0].finish_reason is None:
        raise WrongAnswer("accumulate")


def _sliced(blocks: list[bytes], cut: int) -> Pieces:
    return Workload("", blocks, []).pieces(cut)


def _text(count: int) -> list[bytes]:
    return answer_blocks(text_payloads(count, ASCII_WORDS), "stop")


def _one_call(count: int) -> list[bytes]:
    function = {"name": "f", "arguments": ""}
    opening = {"index": 0, "id": "call_0", "type": "function", "function": function}
    more = {"index": 0, "function": {"arguments": '"key": 1234, '}}
    calls = [opening, *[more] * count]
    payloads = [chunk_json({"tool_calls": [call]}) for call in calls]
    return answer_blocks(payloads, "tool_calls")


Size: TypeAlias = Callable[[int], list[bytes]]
SIZES: dict[str, tuple[Callable[[Pieces], None], Size, dict[int, int]]] = {
    "bytes of one event": (
        _events,
        lambda size: one_event(size).blocks,
        {65_536: 2**18, 1_460: 2**18, 16: 2**16, 1: 2**12},
    ),
    "data lines of one event": (
        _events,
        lambda count: [b"data: line\n" * count, b"\n"],
        {65_536: 2**13, 1_460: 2**13, 16: 2**12, 1: 2**9},
    ),
    "bytes of one comment": (
        _events,
        lambda size: [b":", b"x" * size, b"\n\n"],
        {65_536: 2**18, 1_460: 2**18, 16: 2**16, 1: 2**12},
    ),
    "blank lines": (
        _events,
        lambda count: [b"\r\n" * count],
        {65_536: 2**14, 1_460: 2**14, 16: 2**12, 1: 2**11},
    ),
    "events": (
        _events,
        _text,
        {65_536: 2**10, 1_460: 2**10, BLOCK: 2**10, 16: 2**7, 1: 2**4},
    ),
    "chunks": (
        _chunks,
        _text,
        {65_536: 2**9, 1_460: 2**9, BLOCK: 2**9, 16: 2**7, 1: 2**4},
    ),
    "chunks accumulated": (_answer, _text, {BLOCK: 2**9}),
    "tool calls accumulated": (
        _answer,
        lambda count: answer_blocks(tool_payloads(count), "tool_calls"),
        {BLOCK: 2**9},
    ),
    "pieces of one call's arguments": (_answer, _one_call, {BLOCK: 2**9}),
}
DOUBLINGS = 5


def scaling(quick: bool) -> Part:
    """How our time grows with the size: the factor of each doubling."""
    part = Part()
    rows, growths = [], []
    for kind, (run, make, starts) in SIZES.items():
        for cut, start in starts.items():
            first = max(1, start >> 8) if quick else start
            times = _grow(run, make, cut, first, rounds=1 if quick else 3)
            key = f"{kind}, {CUT_NAMES[cut]}"
            factors = [b / a for a, b in pairwise(times)]
            sixteen = max(b / a for a, b in zip(times, times[4:], strict=False))
            growths.append(Figure(sixteen, sixteen, sixteen))
            last = first << DOUBLINGS
            cells = [f"{factor:.2f}" for factor in (*factors, sixteen)]
            rows.append([key, f"{first:,}", f"{last:,}", *cells])
            part.data[key] = {
                "sizes": [first, last],
                "milliseconds": [t * 1e3 for t in times],
            }
    numbers = [f"×{2**i}" for i in range(1, DOUBLINGS + 1)]
    head = ["", "from", "to", *numbers, "16 × the size"]
    title = "scaling: the factor in time of each doubling in size"
    part.tables.append(table(title, head, rows))
    part.figures["growth"] = largest(growths)
    return part


def _grow(
    run: Callable[[Pieces], None], make: Size, cut: int, first: int, rounds: int
) -> list[float]:
    """The best time of each size: growth is about the algorithm, not the machine."""
    streams = [_sliced(make(first << i), cut) for i in range(DOUBLINGS + 1)]
    runs = {
        str(i): partial(cpu_seconds, partial(run, pieces))
        for i, pieces in enumerate(streams)
    }
    return [min(times) for times in interleave(runs, rounds).values()]
