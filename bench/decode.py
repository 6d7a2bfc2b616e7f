"""Bytes already in memory to events, and to chunks; memory for one large event.

Each contender is a function from the pieces to an iterator, the one that it has for its
users. All run in one process, in turns; what is measured is processor time.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import httpx
import httpx_sse
from measure import Part, Samples, cpu_seconds, interleave, output, table
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk
from streams import (
    BLOCK,
    CHATS,
    CJK_WORDS,
    CUT_NAMES,
    answer,
    decode_workloads,
    text_payloads,
    tool_payloads,
)

import sse_chat

Contender = Callable[[Iterable[bytes]], Iterator[Any]]


class Prepared(httpx.Response):
    """A response whose bytes are there already, so that no HTTP is measured."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        headers, body = {"content-type": "text/event-stream"}, httpx.SyncByteStream()
        super().__init__(200, headers=headers, stream=body)
        self.pieces = pieces

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        return iter(self.pieces)


OPENAI = OpenAI(api_key="none", base_url="http://127.0.0.1:9/v1")


def decode_httpx_sse(pieces: Iterable[bytes]) -> Iterator[Any]:
    return httpx_sse.EventSource(Prepared(pieces)).iter_sse()


def typed_openai(pieces: Iterable[bytes]) -> Iterator[Any]:
    response: Any = Prepared(pieces)
    return iter(Stream(cast_to=ChatCompletionChunk, response=response, client=OPENAI))


def typed_recipe(pieces: Iterable[bytes]) -> Iterator[Any]:
    for event in decode_httpx_sse(pieces):
        if event.data == "[DONE]":
            break
        yield ChatCompletionChunk(**json.loads(event.data))


DECODERS = {"sse_chat": sse_chat.iter_sse, "httpx-sse": decode_httpx_sse}
READERS: dict[str, Contender] = {"sse_chat": sse_chat.iter_chunks}
READERS |= {"recipe": typed_recipe, "openai": typed_openai}


def race(contenders: Mapping[str, Contender], pieces: Any, rounds: int) -> Samples:
    def run(name: str) -> float:
        # The deque runs through everything and keeps nothing, at C speed.
        return cpu_seconds(lambda: deque(contenders[name](pieces), maxlen=0))

    return interleave(run, contenders, rounds)


def decode(quick: bool) -> Part:
    """Bytes to events: every kind of stream in every cut."""
    sizes, tiny = (20_000, 5_000, 16_000_000), (1_000, 1_000, 50_000)
    if quick:
        sizes, tiny = (50, 50, 100_000), (20, 20, 5_000)
    found: dict[tuple[str, int], float] = {}
    for cut in CUT_NAMES:
        for workload in decode_workloads(*(tiny if cut == 16 else sizes)):
            pieces = workload.pieces(cut)
            for name, contender in DECODERS.items():
                events = [(e.event, e.data, e.id) for e in contender(pieces)]
                if events != workload.events:
                    raise RuntimeError(f"{name} reads {workload.name} wrong")
            samples = race(DECODERS, pieces, 1 if quick else 9)
            found[workload.name, cut] = samples.ratio("httpx-sse", "sse_chat")

    def least(*cuts: int) -> float:
        return min(found[name, cut] for name in CHATS for cut in cuts)

    names = dict.fromkeys(name for name, _ in found)
    cells = {n: [round(found[n, cut], 2) for cut in CUT_NAMES] for n in names}
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

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if value is not None}

    return json.loads(text, object_hook=keep)


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


def memory(quick: bool) -> Part:
    """Measure by how much one large event makes the peak of a fresh process grow."""
    size = 1_000_000 if quick else 16_000_000
    grown = int(output([sys.executable, "-c", PEAK.format(size)]))
    cells = [[f"{size:,} bytes", f"{grown / 1e6:.1f} MB", f"{grown / size:.2f} ×"]]
    return Part(
        [table("memory: growth over one event", ["", "peak", "over its bytes"], cells)],
        {"bytes of one event": size, "growth": grown},
        {"memory of one event": grown / size},
    )
