"""Peak memory, each time of a fresh process.

    python bench/memory.py READER KIND SIZE

is the child: it reads a stream that it makes while it reads, and prints how many
bytes its peak grew by.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measure import Figure, Part, interleave, largest, medians, ratio, spread, table
from peak import peak_bytes
from processes import output, server
from startup import program
from workloads import ASCII_WORDS, DONE, chunk_json

EVENTS = 2_000
LARGE_EVENT = 16_000_000
SHORT, LONG = 10_000, 80_000
PIECE = 65_536

SSE_CHAT = """
from sse_chat import stream_chat
for chunk in stream_chat(MESSAGES, model="m", base_url=URL):
    pass
"""
SSE_CHAT_ASYNC = """
import asyncio
from sse_chat import astream_chat
async def main():
    async for chunk in astream_chat(MESSAGES, model="m", base_url=URL):
        pass
asyncio.run(main())
"""
OPENAI = """
from openai import OpenAI
client = OpenAI(base_url=URL, api_key="none")
stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
for chunk in stream:
    pass
"""
OPENAI_ASYNC = """
import asyncio
from openai import AsyncOpenAI
async def main():
    client = AsyncOpenAI(base_url=URL, api_key="none")
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True
    )
    async for chunk in stream:
        pass
asyncio.run(main())
"""
DICTS = """
import json
import httpx
from httpx_sse import connect_sse
body = {"model": "m", "messages": MESSAGES, "stream": True}
with httpx.Client() as client:
    with connect_sse(client, "POST", URL + "/chat/completions", json=body) as source:
        for event in source.iter_sse():
            if event.data != "[DONE]":
                chunk = json.loads(event.data)
"""
PROGRAMS = {
    "sse_chat": SSE_CHAT,
    "sse_chat async": SSE_CHAT_ASYNC,
    "openai": OPENAI,
    "openai async": OPENAI_ASYNC,
    "dicts": DICTS,
}
THEN_PEAK = """
import sys
sys.path.append(BENCH)
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
    words = [
        f"data: {chunk_json({'content': word})}\n\n".encode() for word in ASCII_WORDS
    ]
    for i in range(count):
        yield words[i % len(words)]
    yield f"data: {chunk_json({}, 'stop')}\n\n".encode() + DONE


def read_events(pieces: Iterator[bytes]) -> Iterator[Any]:
    from sse_chat import iter_sse

    return iter_sse(pieces)


def read_chunks(pieces: Iterator[bytes]) -> Iterator[Any]:
    from sse_chat import iter_chunks

    return iter_chunks(pieces)


def read_httpx_sse(pieces: Iterator[bytes]) -> Iterator[Any]:
    from decode import decode_httpx_sse

    return decode_httpx_sse(pieces)


def read_openai(pieces: Iterator[bytes]) -> Iterator[Any]:
    from decode import decode_openai

    return decode_openai(pieces)


READERS: dict[str, Callable[[Iterator[bytes]], Iterator[Any]]] = {
    "sse_chat": read_events,
    "sse_chat chunks": read_chunks,
    "httpx-sse": read_httpx_sse,
    "openai": read_openai,
}
KINDS = {"large": large_event, "long": long_stream}


def growth(reader: str, kind: str, size: int) -> int:
    """By how many bytes the peak grew while the stream was read."""
    # A first short stream, so that what is imported is not counted.
    for _ in READERS[reader](long_stream(10)):
        pass
    before = peak_bytes()
    for _ in READERS[reader](KINDS[kind](size)):
        pass
    return peak_bytes() - before


# The part.


def memory(quick: bool) -> Part:
    """Of a whole process that streams, of one large event, of long streams."""
    part = Part()
    events, rounds = (50, 1) if quick else (EVENTS, 2)
    with server() as address:
        url = f"{address}/{events}/0/v1"
        peaks = interleave(
            {name: partial(streamed, code, url) for name, code in PROGRAMS.items()},
            rounds,
            warm_up=0 if quick else 1,
        )
    large = 1_000_000 if quick else LARGE_EVENT
    long = SHORT * 2 if quick else LONG
    large_growths = {
        name: [grown(name, "large", large) for _ in range(rounds)]
        for name in ("sse_chat", "httpx-sse", "openai")
    }
    long_growths = {
        f"{reader}, {count:,}": [grown(reader, "long", count) for _ in range(rounds)]
        for reader in ("sse_chat", "sse_chat chunks")
        for count in (SHORT, long)
    }
    part.tables = [
        _table(f"memory: process that streamed {events:,} events", peaks),
        _table(f"memory: growth over one event of {large:,} bytes", large_growths),
        _table("memory: growth over a stream of so many events", long_growths),
    ]
    part.data = {
        "peak MB of the process": medians(peaks),
        "growth in MB over one large event": medians(large_growths),
        "growth in MB over a stream": medians(long_growths),
    }
    times = [growth * 1e6 / large for growth in large_growths["sse_chat"]]
    part.figures = {
        "memory / openai": largest(
            ratio(peaks[f"sse_chat{kind}"], peaks[f"openai{kind}"])
            for kind in ("", " async")
        ),
        "memory of one event": spread(times),
        "memory of a long stream": largest(
            _longer(long_growths, reader, long)
            for reader in ("sse_chat", "sse_chat chunks")
        ),
    }
    return part


def _longer(growths: dict[str, list[float]], reader: str, long: int) -> Figure:
    """By how many MB the long stream's peak is over the short one's."""
    values = zip(
        growths[f"{reader}, {long:,}"], growths[f"{reader}, {SHORT:,}"], strict=True
    )
    # Chunks leave their text behind, and Python may take 4 bytes for a character.
    kept = 4 * characters(long - SHORT) if reader == "sse_chat chunks" else 0
    return spread([more - less - kept / 1e6 for more, less in values])


def characters(count: int) -> int:
    """How long the text of `count` chunks of a long stream is, about."""
    return count * len("".join(ASCII_WORDS)) // len(ASCII_WORDS)


def streamed(code: str, url: str) -> float:
    """The peak of a whole program that streams one answer, in MB."""
    then = THEN_PEAK.replace("BENCH", repr(str(Path(__file__).parent)))
    return int(output(program(code + then, url))) / 1e6


def grown(reader: str, kind: str, size: int) -> float:
    """The growth in a fresh process, in MB."""
    command = [sys.executable, str(Path(__file__)), reader, kind, str(size)]
    return int(output(command)) / 1e6


def _table(title: str, samples: dict[str, list[float]]) -> str:
    rows = [[name, str(spread(values))] for name, values in samples.items()]
    return table(title, ["", "MB"], rows)


if __name__ == "__main__":
    print(growth(sys.argv[1], sys.argv[2], int(sys.argv[3])))
