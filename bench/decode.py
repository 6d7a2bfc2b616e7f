"""Bytes already in memory to events, and to chunks; how time and memory grow.

Each contender is a function from the pieces to an iterator. All run in one process,
in turns; what is measured is processor time.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import httpx2
import httpx_sse
from measure import Figure, Part, Samples, cpu_seconds, interleave, output, table
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk
from streams import (
    BLOCK,
    CHATS,
    CJK_WORDS,
    CUT_NAMES,
    answer,
    decode_workloads,
    plain,
    text_payloads,
    tool_payloads,
)

import sse_chat

Contender = Callable[[Iterable[bytes]], Iterator[Any]]

# ---- The contenders, through the doors that they have for their users ----------------


def prepared_response(library: Any) -> Callable[[Iterable[bytes]], Any]:
    """Make a response class, of httpx or of httpx2, whose bytes are there already.

    Those who take nothing else get it, so that as little as possible of httpx and no
    HTTP is measured.
    """

    class Prepared(library.Response):  # type: ignore[misc]
        def __init__(self, pieces: Iterable[bytes]) -> None:
            self.pieces = pieces
            headers = {"content-type": "text/event-stream"}
            request = library.Request("GET", "http://127.0.0.1")
            body = library.SyncByteStream()  # Nobody reads it.
            super().__init__(200, headers=headers, stream=body, request=request)

        def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
            return iter(self.pieces)

    return Prepared


prepared, prepared2 = prepared_response(httpx), prepared_response(httpx2)
OPENAI = OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")


def decode_httpx_sse(pieces: Iterable[bytes]) -> Iterator[Any]:
    return httpx_sse.EventSource(prepared(pieces)).iter_sse()


def typed_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    response = prepared2(pieces)
    return iter(Stream(cast_to=ChatCompletionChunk, response=response, client=OPENAI))


def typed_recipe(pieces: Iterable[bytes]) -> Iterator[Any]:
    for event in decode_httpx_sse(pieces):
        if event.data == "[DONE]":
            break
        yield ChatCompletionChunk(**json.loads(event.data))


DECODERS = {"sse_chat": sse_chat.iter_sse, "httpx-sse": decode_httpx_sse}
READERS = {
    "sse_chat": sse_chat.iter_chunks,
    "recipe": typed_recipe,
    "openai": typed_openai,
}


def exhaust(items: Iterable[object]) -> None:
    """Run through everything and keep nothing, at C speed."""
    deque(items, maxlen=0)


def race(contenders: Mapping[str, Contender], pieces: Any, rounds: int) -> Samples:
    """Time all contenders in turns; returns seconds."""

    def run(name: str) -> float:
        return cpu_seconds(lambda: exhaust(contenders[name](pieces)))

    return interleave(run, contenders, rounds)


# ---- The parts -----------------------------------------------------------------------


def decode(quick: bool) -> Part:
    """Bytes to events: every kind of stream in every cut."""
    sizes, tiny = (20_000, 5_000, 16_000_000), (1_000, 1_000, 50_000)
    if quick:
        sizes, tiny = (50, 50, 100_000), (20, 20, 5_000)
    found: dict[tuple[str, int], Figure] = {}
    for cut in CUT_NAMES:
        for workload in decode_workloads(*(tiny if cut == 16 else sizes)):
            pieces = workload.pieces(cut)
            for name, contender in DECODERS.items():
                events = [(e.event, e.data, e.id) for e in contender(pieces)]
                if events != workload.events:
                    raise RuntimeError(f"{name} reads {workload.name} wrong")
            samples = race(DECODERS, pieces, 1 if quick else 9)
            found[workload.name, cut] = samples.ratio("httpx-sse", "sse_chat")

    def least(*cuts: int) -> Figure:
        return min(found[name, cut] for name in CHATS for cut in cuts)

    cells = {
        name: [round(found[name, cut].value, 2) for cut in CUT_NAMES]
        for name in dict.fromkeys(name for name, _ in found)
    }
    head, rows = CUT_NAMES.values(), [[name, *cells[name]] for name in cells]
    title = "decode: how many times our processor time httpx-sse takes, by read"
    return Part(
        [table(title, ["", *head], rows)],
        {"reads": list(head), "httpx-sse over ours": cells},
        {
            "decode, segments": least(65_536, 1_460),
            "decode, events": least(BLOCK),
            "decode, 16 B": least(16),
            "decode, all": min(found.values()),
        },
    )


def without_nulls(text: str) -> Any:
    """Parse JSON; whether a null is left out or not says the same."""
    return json.loads(
        text,
        object_hook=lambda found: {k: v for k, v in found.items() if v is not None},
    )


def typed(quick: bool) -> Part:
    """Bytes to chunk objects, one event per read."""
    count, rounds = (50, 1) if quick else (1_000, 21)
    part, found = Part(), []
    for workload in (
        answer(CHATS[0], text_payloads(count)),
        answer(CHATS[1], text_payloads(count, CJK_WORDS)),
        answer("tool calls", tool_payloads(count), "tool_calls"),
    ):
        sent = [without_nulls(data) for _, data, _ in workload.events]
        for name, reader in READERS.items():
            chunks = [json.dumps(c.to_dict()) for c in reader(workload.blocks)]
            if list(map(without_nulls, chunks)) != sent:
                raise RuntimeError(f"{name} reads {workload.name} wrong")
        samples = race(READERS, workload.blocks, rounds).times(1e6 / len(sent))
        found.append(samples)
        part.tables.append(samples.table(f"typed: {workload.name}", "CPU µs/event"))
        part.data[workload.name] = samples.medians()
    *chats, tools = found
    for peer in ("recipe", "openai"):
        chat = min(samples.ratio(peer, "sse_chat") for samples in chats)
        part.figures[f"typed chat / {peer}"] = chat
        part.figures[f"typed tools / {peer}"] = tools.ratio(peer, "sse_chat")
    return part


def _events(pieces: Sequence[bytes]) -> None:
    exhaust(sse_chat.iter_sse(pieces))


def _completion(pieces: Sequence[bytes]) -> None:
    sse_chat.accumulate(sse_chat.iter_chunks(pieces))


# What grows, and from which size: what reads it, and what makes a stream of a size.
GROWING: dict[tuple[str, int], tuple[Any, Callable[[int], Sequence[bytes]]]] = {
    ("bytes of an event", 2**18): (
        _events,
        lambda n: plain("", ["x" * n]).pieces(1460),
    ),
    ("lines of an event", 2**13): (_events, lambda n: [b"data: x\n" * n, b"\n"]),
    ("chunks", 2**9): (_completion, lambda n: answer("", text_payloads(n)).blocks),
    ("pieces of a tool call", 2**9): (
        _completion,
        lambda n: answer("", tool_payloads(n, n), "tool_calls").blocks,
    ),
}
PEAK = """
from measure import peak_bytes
from streams import large_event
from sse_chat import iter_sse
for size in (1_000, {}):
    before = peak_bytes()
    for _ in iter_sse(large_event(size)):
        pass
print(peak_bytes() - before)
"""


def growth(quick: bool) -> Part:
    """Measure our time for 16 times the size, and our memory for one large event."""
    factors = {}
    for (name, size), (read, make) in GROWING.items():
        size = size >> 6 if quick else size
        pieces = [make(size), make(16 * size)]

        def seconds(index: str, read: Any = read, pieces: Any = pieces) -> float:
            return cpu_seconds(lambda: read(pieces[int(index)]))

        # The best of the rounds: growth is about the algorithm, not the machine.
        samples = interleave(seconds, "01", 1 if quick else 5)
        factors[name] = min(samples["1"]) / min(samples["0"])
    large = 1_000_000 if quick else 16_000_000
    peak = int(output([sys.executable, "-c", PEAK.format(large)])) / large
    rows = [*factors.items(), (f"memory for {large:,} bytes", peak)]
    cells = [[name, f"{factor:.2f} ×"] for name, factor in rows]
    return Part(
        [table("growth: time for 16 times as much; memory", ["", ""], cells)],
        {"time for 16 times as much": factors},
        {
            "growth": Figure.of([max(factors.values())]),
            "memory of one event": Figure.of([peak]),
        },
    )
