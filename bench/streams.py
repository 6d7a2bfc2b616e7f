"""Event streams made here, each with its right answer, and a server that sends them.

    python bench/streams.py

prints its port, serves on the loopback interface, and stops when its standard input is
closed. A path begins with `/EVENTS/RATE/`: it streams that many events, that many a
second, or as fast as the client reads where RATE is 0. One event is one HTTP chunk and
one write, rendered beforehand, so that the server costs as little as it can.
"""

import asyncio
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from measure import allow_many_sockets

BLOCK = 0  # the cut that gives one event per read, as httpx does of chunked bodies
CUT_NAMES = {65_536: "64 KiB", 1_460: "1,460 B", BLOCK: "one event", 16: "16 B"}

LAYOUT = "data: {}\n\n"
DONE = b"data: [DONE]\n\n"
ASCII_WORDS = re.findall(r"\W*\w+", 'The quick fox isn\'t "real", but\nso lazy!')
CJK_WORDS = re.findall("..?", "你好，世界流式输出很快。日本語한국")
CHATS = ("chat, ASCII", "chat, CJK")


@dataclass(frozen=True)
class Workload:
    """An event stream as a list of blocks, and the event in each: name, data and id."""

    name: str
    blocks: list[bytes]
    events: list[tuple[str, str, str]]

    def pieces(self, cut: int) -> list[bytes]:
        """Return the stream as it is read: slices of `cut` bytes, or block by block."""
        if cut == BLOCK:
            return self.blocks
        body = b"".join(self.blocks)
        return [body[i : i + cut] for i in range(0, len(body), cut)]


def chunk_json(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    """Write one chat.completion.chunk in the layout of Ollama's /v1 route."""
    choice: Any = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk: Any = {"id": "chatcmpl-476", "object": "chat.completion.chunk"}
    chunk |= {"created": 1752575345, "model": "deepseek-r1:1.5b"}
    chunk |= {"system_fingerprint": "fp_ollama", "choices": [choice]}
    # As OpenAI, Ollama and vLLM write it: no blanks, no ASCII escapes.
    return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))


def text_payloads(count: int, words: Sequence[str] = ASCII_WORDS) -> list[str]:
    return [
        chunk_json({"role": "assistant", "content": words[i % len(words)]})
        for i in range(count)
    ]


def tool_payloads(count: int) -> list[str]:
    """Make `count` chunks of tool calls: an opening, then 15 pieces of arguments."""
    payloads = []
    for i in range(count):
        call: Any = {"index": i // 16}
        if i % 16 == 0:
            function = {"name": "get_weather", "arguments": ""}
            call |= {"id": f"call_{i:08d}", "type": "function", "function": function}
        else:
            call["function"] = {"arguments": f'"k{i % 16}": {i}, '}
        payloads.append(chunk_json({"tool_calls": [call]}))
    return payloads


def plain(name: str, payloads: Sequence[str], layout: str = LAYOUT) -> Workload:
    blocks = [layout.format(payload).encode() for payload in payloads]
    return Workload(name, blocks, [("message", payload, "") for payload in payloads])


def decode_workloads(chats: int, others: int, large: int) -> list[Workload]:
    """Make every kind of stream, with so many events, and bytes in the large one."""
    payloads = text_payloads(chats)
    named = [(f"chat.{i % 3}", payloads[i], str(i)) for i in range(others)]
    layout = "event: {}\ndata: {}\nid: {}\n\n"
    lines = b"data: the quick brown fox\n" * 20 + b"\n"
    event = ("message", "\n".join(["the quick brown fox"] * 20), "")
    return [
        plain(CHATS[0], payloads),
        plain(CHATS[1], text_payloads(chats, CJK_WORDS)),
        plain("tool calls", tool_payloads(others)),
        Workload("names, ids", [layout.format(*e).encode() for e in named], named),
        plain("CRLF", payloads[:others], "data: {}\r\n\r\n"),
        plain("comments", payloads[:others], ": keep-alive\n\n" + LAYOUT),
        Workload("many data lines", [lines] * others, [event] * others),
        plain("one large event", ["x" * large]),
    ]


def answer(name: str, payloads: Sequence[str], finish_reason: str = "stop") -> Workload:
    """Make a whole answer: the payloads, the finish chunk, and [DONE], no event."""
    chunks = plain(name, [*payloads, chunk_json({}, finish_reason)])
    return Workload(name, [*chunks.blocks, DONE], chunks.events)


def large_event(size: int) -> Iterator[bytes]:
    """Yield one event of `size` bytes in pieces of 64 KiB, never whole in memory."""
    yield b"data: "
    for start in range(0, size, 65_536):
        yield b"x" * min(65_536, size - start)
    yield b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
HEAD += b"Transfer-Encoding: chunked\r\n\r\n"


@cache
def http_chunks(count: int) -> list[bytes]:
    """Render every event as an HTTP chunk, [DONE] being the last, and the end."""
    blocks = answer("", text_payloads(count - 2)).blocks
    chunks = [b"%x\r\n%b\r\n" % (len(block), block) for block in blocks]
    return [*chunks, b"0\r\n\r\n"]


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    # Where the kernel takes no more, writing waits: no two events share a write.
    writer.transport.set_write_buffer_limits(high=0)
    # A client that has read enough closes the connection, wherever the answer is.
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            _, count, rate, *_ = head.split(b" ", 2)[1].split(b"/")
            writer.write(HEAD)
            started = loop.time()
            for i, chunk in enumerate(http_chunks(int(count))):
                if rate != b"0":
                    await asyncio.sleep(started + i / int(rate) - loop.time())
                writer.write(chunk)
                await writer.drain()
    writer.close()


async def serve() -> None:
    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=2_048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    allow_many_sockets()
    asyncio.run(serve())
