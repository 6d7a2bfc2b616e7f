"""Peak memory, each time of a fresh process.

    python bench/memory.py READER KIND SIZE

is the child: it reads a stream that it makes while it reads, and prints how many
bytes its peak grew by.
"""

import sys
from collections.abc import Iterator
from typing import Any

from measure import Figure, Part, Samples, interleave
from peak import peak_bytes
from processes import BENCH, output, server
from programs import program, python
from workloads import ASCII_WORDS, DONE, LAYOUT, chunk_json

EVENTS = 2_000
LARGE_EVENT = 16_000_000
SHORT, LONG = 10_000, 80_000
PIECE = 65_536

STREAMING = ("sse_chat", "sse_chat async", "openai", "openai async", "dicts")
PRINT_PEAK = f"""
import sys
sys.path.append({str(BENCH)!r})
from peak import peak_bytes
print(peak_bytes())
"""


# The child.


def large_event(size: int) -> Iterator[bytes]:
    """One event of `size` bytes in pieces of 64 KiB, never whole in memory here."""
    yield b"data: "
    for _ in range(size // PIECE):
        yield b"x" * PIECE
    yield b"x" * (size % PIECE) + b"\n\n"


def long_stream(count: int) -> Iterator[bytes]:
    """`count` chunks, one at a time, and the end of the answer."""
    words = [LAYOUT.format(chunk_json({"content": w})).encode() for w in ASCII_WORDS]
    for i in range(count):
        yield words[i % len(words)]
    yield LAYOUT.format(chunk_json({}, "stop")).encode() + DONE


KINDS = {"large": large_event, "long": long_stream}


def read(reader: str, pieces: Iterator[bytes]) -> Iterator[Any]:
    """What a reader makes of the bytes; it imports what it needs alone."""
    if reader.startswith("sse_chat"):
        import sse_chat

        chunks = reader == "sse_chat chunks"
        return sse_chat.iter_chunks(pieces) if chunks else sse_chat.iter_sse(pieces)
    from decode import DECODERS

    return DECODERS[reader](pieces)


def growth(reader: str, kind: str, size: int) -> int:
    """By how many bytes the peak grew while the stream was read."""
    # A first short stream, so that what is imported is not counted.
    for _ in read(reader, long_stream(10)):
        pass
    before = peak_bytes()
    for _ in read(reader, KINDS[kind](size)):
        pass
    return peak_bytes() - before


# The part.


def memory(quick: bool) -> Part:
    """Of a whole process that streams, of one large event, of long streams."""
    events, rounds = (50, 1) if quick else (EVENTS, 2)
    large = 1_000_000 if quick else LARGE_EVENT
    long = SHORT * 2 if quick else LONG

    def streamed(name: str) -> float:
        code = program(name, f"{address}/{events}/0/v1", "pass", PRINT_PEAK)
        return int(output(python(code))) / 1e6

    def grown(reader: str, kind: str, size: int) -> list[float]:
        command = [sys.executable, __file__, reader, kind, str(size)]
        return [int(output(command)) / 1e6 for _ in range(rounds)]

    with server() as address:
        peaks = interleave(streamed, STREAMING, rounds, warm_up=0 if quick else 1)
    readers = ("sse_chat", "httpx-sse", "openai")
    one_event = Samples({reader: grown(reader, "large", large) for reader in readers})
    streams = Samples(
        {
            f"{reader}, {count:,}": grown(reader, "long", count)
            for reader in ("sse_chat", "sse_chat chunks")
            for count in (SHORT, long)
        }
    )
    # Chunks leave their text behind, and Python may take 4 bytes for a character.
    text = 4 * (long - SHORT) * len("".join(ASCII_WORDS)) / len(ASCII_WORDS)
    kept = {"sse_chat": 0.0, "sse_chat chunks": text / 1e6}

    def longer(reader: str) -> Figure:
        more, less = (streams[f"{reader}, {count:,}"] for count in (long, SHORT))
        rounds = zip(more, less, strict=True)
        return Figure.of([a - b - kept[reader] for a, b in rounds])

    return Part(
        [
            peaks.table(f"memory: process that streamed {events:,} events", "MB"),
            one_event.table(f"memory: growth over one event of {large:,} bytes", "MB"),
            streams.table("memory: growth over a stream of so many events", "MB"),
        ],
        {
            "peak MB of the process": peaks.summary(),
            "growth in MB over one large event": one_event.summary(),
            "growth in MB over a stream": streams.summary(),
        },
        {
            "memory / openai": max(peaks.both("sse_chat", "openai")),
            "memory of one event": one_event.times(1e6 / large).figure("sse_chat"),
            "memory of a long stream": max(map(longer, kept)),
        },
    )


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2], int(sys.argv[3])))
