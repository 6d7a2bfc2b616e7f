"""A server that costs as little as it can: it sends answers rendered beforehand.

    python bench/server.py

prints its port, serves on the loopback interface, and stops when its standard input
is closed, so that it cannot outlive the program that started it. A path begins with
what is asked for: `/EVENTS/RATE/…` streams so many events, so many a second, or flat
out where RATE is 0; `/EVENTS/RATE/close/…` closes the connection afterwards. One
event is one HTTP chunk and one write. Paths that end in `/api/chat` get Ollama's own
format.
"""

import asyncio
import re
import sys
from functools import cache

from measure import allow_many_sockets
from workloads import ASCII_WORDS, answer, text_payloads, to_json

CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
BACKLOG = 2_048


def ollama_lines(count: int) -> list[bytes]:
    """An answer of `count` lines in the format of Ollama's /api/chat."""
    lines = []
    for i in range(count):
        message = {"role": "assistant", "content": ASCII_WORDS[i % len(ASCII_WORDS)]}
        line = {"model": "m", "created_at": "2026-11-23T00:00:00Z", "message": message}
        lines.append(to_json({**line, "done": i == count - 1}).encode() + b"\n")
    return lines


@cache
def http_chunks(count: int, ollama: bool) -> list[bytes]:
    """What is written, one item each: every event as an HTTP chunk, and the end.

    The last event of `count` is [DONE].
    """
    events = answer(text_payloads(count - 2, ASCII_WORDS), "stop").blocks
    blocks = ollama_lines(count) if ollama else events
    chunks = [b"%x\r\n%b\r\n" % (len(block), block) for block in blocks]
    return [*chunks, b"0\r\n\r\n"]


def head(content_type: str, close: bool) -> bytes:
    """The status line and header fields of a streamed answer."""
    connection = "Connection: close\r\n" if close else ""
    return (
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{connection}"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()


class Connection(asyncio.Protocol):
    """One client's connection: requests come in one after another, answers go out."""

    transport: asyncio.Transport

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.received = b""
        self.writable = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # Writing stops as soon as the kernel takes no more, so that no two events
        # are ever put together into one write.
        transport.set_write_buffer_limits(high=0)
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()  # for an answer that is not out yet, to find this out

    def data_received(self, data: bytes) -> None:
        self.received += data
        header, blank, body = self.received.partition(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(header)
        if blank and len(body) >= int(length[1] if length else 0):
            self.received = b""
            self._answer(header.split(b" ", 2)[1].decode())

    def _answer(self, path: str) -> None:
        _, count, rate, *rest = path.split("/")
        ollama = path.endswith("/api/chat")
        close = "close" in rest
        kind = "application/x-ndjson" if ollama else "text/event-stream"
        self.transport.write(head(kind, close))
        chunks = http_chunks(int(count), ollama)
        self.answer = self.loop.create_task(self._stream(chunks, float(rate), close))

    async def _stream(self, chunks: list[bytes], rate: float, close: bool) -> None:
        started = self.loop.time()
        for i, chunk in enumerate(chunks):
            if rate:
                await asyncio.sleep(started + i / rate - self.loop.time())
            elif not self.writable.is_set():
                await self.writable.wait()
            if self.transport.is_closing():  # The client is gone.
                return
            self.transport.write(chunk)
        if close:
            self.transport.close()


async def serve() -> None:
    """Serves until standard input is closed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(loop), "127.0.0.1", 0, backlog=BACKLOG
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    allow_many_sockets()
    asyncio.run(serve())
