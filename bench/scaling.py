"""How our time grows with each kind of size, in each way to cut it."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

from measure import Figure, Part, cpu_seconds, interleave, table
from workloads import (
    ASCII_WORDS,
    BLOCK,
    CUT_NAMES,
    Workload,
    answer,
    chunk_json,
    one_event,
    text_payloads,
    tool_payloads,
)

import sse_chat

Pieces: TypeAlias = Sequence[bytes]
Size: TypeAlias = Callable[[int], list[bytes]]

DOUBLINGS = 5


def _events(pieces: Pieces) -> None:
    deque(sse_chat.iter_sse(pieces, max_event_bytes=None), maxlen=0)


def _chunks(pieces: Pieces) -> None:
    deque(sse_chat.iter_chunks(pieces), maxlen=0)


def _answer(pieces: Pieces) -> None:
    completion = sse_chat.accumulate(sse_chat.iter_chunks(pieces))
    assert completion.choices[0].finish_reason is not None


def _text(count: int) -> list[bytes]:
    return answer(text_payloads(count, ASCII_WORDS), "stop").blocks


def _calls(count: int) -> list[bytes]:
    return answer(tool_payloads(count), "tool_calls").blocks


def _one_call(count: int) -> list[bytes]:
    function = {"name": "f", "arguments": ""}
    opening = {"index": 0, "id": "call_0", "type": "function", "function": function}
    more = {"index": 0, "function": {"arguments": '"key": 1234, '}}
    calls = [opening, *[more] * count]
    payloads = [chunk_json({"tool_calls": [call]}) for call in calls]
    return answer(payloads, "tool_calls").blocks


# By cut, the size to begin with.
BYTES = {65_536: 2**18, 1_460: 2**18, 16: 2**16, 1: 2**12}
LINES = {65_536: 2**13, 1_460: 2**13, 16: 2**12, 1: 2**9}
BLANK_LINES = {65_536: 2**14, 1_460: 2**14, 16: 2**12, 1: 2**11}
EVENTS = {65_536: 2**10, 1_460: 2**10, BLOCK: 2**10, 16: 2**7, 1: 2**4}
CHUNKS = {65_536: 2**9, 1_460: 2**9, BLOCK: 2**9, 16: 2**7, 1: 2**4}
ANSWERS = {BLOCK: 2**9}

# What reads, and what makes a stream of a size.
SIZES: dict[str, tuple[Callable[[Pieces], None], Size, dict[int, int]]] = {
    "bytes of one event": (_events, lambda n: one_event(n).blocks, BYTES),
    "data lines of one event": (_events, lambda n: [b"data: line\n" * n, b"\n"], LINES),
    "bytes of one comment": (_events, lambda n: [b":", b"x" * n, b"\n\n"], BYTES),
    "blank lines": (_events, lambda n: [b"\r\n" * n], BLANK_LINES),
    "events": (_events, _text, EVENTS),
    "chunks": (_chunks, _text, CHUNKS),
    "chunks accumulated": (_answer, _text, ANSWERS),
    "tool calls accumulated": (_answer, _calls, ANSWERS),
    "pieces of one call's arguments": (_answer, _one_call, ANSWERS),
}


def scaling(quick: bool) -> Part:
    """How our time grows with the size: the factor of each doubling."""
    part = Part()
    rows, growths = [], []
    for kind, (read, make, starts) in SIZES.items():
        for cut, start in starts.items():
            first = max(1, start >> 8) if quick else start
            times = _grow(read, make, cut, first, rounds=1 if quick else 3)
            key = f"{kind}, {CUT_NAMES[cut]}"
            factors = [b / a for a, b in pairwise(times)]
            sixteen = max(b / a for a, b in zip(times, times[4:], strict=False))
            growths.append(sixteen)
            last = first << DOUBLINGS
            cells = [f"{factor:.2f}" for factor in (*factors, sixteen)]
            rows.append([key, f"{first:,}", f"{last:,}", *cells])
            milliseconds = [t * 1e3 for t in times]
            part.data[key] = {"sizes": [first, last], "milliseconds": milliseconds}
    numbers = [f"×{2**i}" for i in range(1, DOUBLINGS + 1)]
    head = ["", "from", "to", *numbers, "16 × the size"]
    title = "scaling: the factor in time of each doubling in size"
    part.tables.append(table(title, head, rows))
    part.figures["growth"] = Figure.of([max(growths)])
    return part


def _grow(
    read: Callable[[Pieces], None], make: Size, cut: int, first: int, rounds: int
) -> list[float]:
    """The best time of each size: growth is about the algorithm, not the machine."""
    streams = {
        str(i): Workload("", make(first << i), []).pieces(cut)
        for i in range(DOUBLINGS + 1)
    }

    def run(size: str) -> float:
        return cpu_seconds(lambda: read(streams[size]))

    return [min(times) for times in interleave(run, streams, rounds).values()]
