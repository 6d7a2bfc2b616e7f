"""The end-to-end contenders; each runs in a process of its own.

    python bench/clients.py NAME BASE_URL [STREAMS]

makes its client, prints "ready", and then for each line on standard input reads one
answer to its end (or STREAMS answers at once) and prints what that took, as JSON. A
contender imports only what it needs, so that its memory is its own.
"""

import asyncio
import http.client
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from measure import allow_many_sockets
from peak import peak_bytes

Stream: TypeAlias = Callable[[], Iterator[Any]]
AsyncStream: TypeAlias = Callable[[], AsyncIterator[Any]]

MESSAGES: Any = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stream": True}
ROUTE = "/chat/completions"
TIMEOUT = 600.0
"""Seconds; what sse_chat and openai take by default."""

IDLE_CONNECTIONS = 20
"""What sse_chat's pool keeps; httpx alone gets the same limits."""


def httpx_limits() -> Any:
    import httpx

    return httpx.Limits(
        max_connections=None, max_keepalive_connections=IDLE_CONNECTIONS
    )


# Sync. Each makes its client and gives back the function that starts a stream.


def sse_chat_sync(base_url: str) -> Stream:
    from sse_chat import ChatClient

    client = ChatClient(base_url=base_url, model="m")
    return lambda: iter(client.stream(MESSAGES))


def openai_sync(base_url: str) -> Stream:
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none")

    def stream() -> Iterator[Any]:
        return iter(
            client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        )

    return stream


def recipe_sync(base_url: str) -> Stream:
    from openai.types.chat import ChatCompletionChunk

    dicts = dicts_sync(base_url)
    return lambda: (ChatCompletionChunk(**item) for item in dicts())


def dicts_sync(base_url: str) -> Stream:
    import httpx
    from httpx_sse import connect_sse

    client = httpx.Client(timeout=TIMEOUT)

    def stream() -> Iterator[Any]:
        with connect_sse(client, "POST", base_url + ROUTE, json=BODY) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return stream


def httpx_sync(base_url: str) -> Stream:
    import httpx

    client = httpx.Client(timeout=TIMEOUT)

    def stream() -> Iterator[Any]:
        with client.stream("POST", base_url + ROUTE, json=BODY) as response:
            yield from response.iter_raw()

    return stream


def http_client(base_url: str) -> Stream:
    url = urlsplit(base_url)
    connection = http.client.HTTPConnection(url.netloc, timeout=TIMEOUT)
    body = json.dumps(BODY)

    def stream() -> Iterator[Any]:
        connection.request("POST", url.path + ROUTE, body)
        response = connection.getresponse()
        while line := response.readline():
            if line != b"\n":
                yield line

    return stream


SYNC: dict[str, Callable[[str], Stream]] = {
    "sse_chat": sse_chat_sync,
    "openai": openai_sync,
    "recipe": recipe_sync,
    "dicts": dicts_sync,
    "httpx": httpx_sync,
    "http.client": http_client,
}


# Async.


def sse_chat_async(base_url: str) -> AsyncStream:
    from sse_chat import AsyncChatClient

    client = AsyncChatClient(base_url=base_url, model="m")
    return lambda: aiter(client.stream(MESSAGES))


def openai_async(base_url: str) -> AsyncStream:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=base_url, api_key="none")

    async def stream() -> AsyncIterator[Any]:
        chunks = await client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True
        )
        async for chunk in chunks:
            yield chunk

    return stream


def recipe_async(base_url: str) -> AsyncStream:
    from openai.types.chat import ChatCompletionChunk

    dicts = dicts_async(base_url)
    return lambda: (ChatCompletionChunk(**item) async for item in dicts())


def dicts_async(base_url: str) -> AsyncStream:
    import httpx
    from httpx_sse import aconnect_sse

    client = httpx.AsyncClient(timeout=TIMEOUT)

    async def stream() -> AsyncIterator[Any]:
        async with aconnect_sse(client, "POST", base_url + ROUTE, json=BODY) as source:
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return stream


def httpx_async(base_url: str) -> AsyncStream:
    return _httpx_async(base_url, unlimited=True)


def httpx_async_default(base_url: str) -> AsyncStream:
    return _httpx_async(base_url, unlimited=False)


def _httpx_async(base_url: str, unlimited: bool) -> AsyncStream:
    import httpx

    if unlimited:
        client = httpx.AsyncClient(timeout=TIMEOUT, limits=httpx_limits())
    else:
        client = httpx.AsyncClient()

    async def stream() -> AsyncIterator[Any]:
        async with client.stream("POST", base_url + ROUTE, json=BODY) as response:
            async for piece in response.aiter_raw():
                yield piece

    return stream


ASYNC: dict[str, Callable[[str], AsyncStream]] = {
    "sse_chat async": sse_chat_async,
    "openai async": openai_async,
    "recipe async": recipe_async,
    "dicts async": dicts_async,
    "httpx async": httpx_async,
    "httpx async, default limits": httpx_async_default,
}


# The layers under sse_chat, one more at each step, for the split of where time goes.


def layer_socket(base_url: str) -> Stream:
    url = urlsplit(base_url)
    connection = socket.create_connection((url.hostname, url.port or 80))
    request = _request(url.path + ROUTE)

    def stream() -> Iterator[Any]:
        connection.sendall(request)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received = connection.recv(65_536)
            yield received

    return stream


def _request(path: str) -> bytes:
    body = json.dumps(BODY).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def layer_h11(base_url: str) -> Stream:
    import h11

    url = urlsplit(base_url)
    connection = socket.create_connection((url.hostname, url.port or 80))
    request = _request(url.path + ROUTE)

    def stream() -> Iterator[Any]:
        connection.sendall(request)
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="POST", target="/", headers=[("Host", "h")]))
        parser.send(h11.EndOfMessage())
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                parser.receive_data(connection.recv(65_536))
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break

    return stream


def layer_httpcore(base_url: str) -> Stream:
    import httpcore

    pool = httpcore.ConnectionPool()
    body = json.dumps(BODY).encode()

    def stream() -> Iterator[Any]:
        with pool.stream("POST", base_url + ROUTE, content=body) as response:
            yield from response.iter_stream()

    return stream


def layer_sse(base_url: str) -> Stream:
    from sse_chat import iter_sse

    raw = httpx_sync(base_url)
    return lambda: iter_sse(raw())


def layer_json(base_url: str) -> Stream:
    events = layer_sse(base_url)
    decode = json.JSONDecoder().raw_decode

    def stream() -> Iterator[Any]:
        for event in events():
            if event.data != "[DONE]":
                yield decode(event.data)

    return stream


LAYERS: dict[str, Callable[[str], Stream]] = {
    "socket": layer_socket,
    "h11": layer_h11,
    "httpcore": layer_httpcore,
    "httpx layer": httpx_sync,
    "SSE": layer_sse,
    "JSON": layer_json,
    "sse_chat layer": sse_chat_sync,
}


# Running them.


def text_of(items: list[Any]) -> str:
    """What the items of one answer say: chunks, dicts, or bytes cut anywhere."""
    if isinstance(items[0], bytes):
        lines = b"".join(items).split(b"\n")
        items = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(map(_text_of_item, items))


def _text_of_item(item: Any) -> str:
    if isinstance(item, dict):
        return item["choices"][0]["delta"].get("content") or ""
    return item.choices[0].delta.content or ""


def report(items: int, start: tuple[float, float], first: float) -> dict[str, float]:
    """What a run took since `start`: processor and wall-clock time, in seconds."""
    wall, cpu = start
    return {
        "items": items,
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "first": first - wall,
        "peak": peak_bytes(),
    }


def run_sync(stream: Stream) -> dict[str, float]:
    """Reads one answer to its end, and keeps nothing of it."""
    start = time.perf_counter(), time.process_time()
    items = 0
    first = 0.0
    for _ in stream():
        if not items:
            first = time.perf_counter()
        items += 1
    return report(items, start, first)


async def run_async(stream: AsyncStream, streams: int) -> dict[str, float]:
    """Reads so many answers at once to their ends."""
    failed = items = 0
    first = 0.0

    async def read() -> None:
        nonlocal failed, items, first
        seen = 0
        try:
            async for _ in stream():
                if not seen:
                    first = time.perf_counter()
                seen += 1
        except Exception:
            failed += 1
        items += seen

    start = time.perf_counter(), time.process_time()
    await asyncio.gather(*(read() for _ in range(streams)))
    return {**report(items, start, first), "failed": failed}


def check_sync(stream: Stream) -> dict[str, str]:
    """The text of one answer, to be compared with what was sent."""
    return {"text": text_of(list(stream()))}


async def check_async(stream: AsyncStream) -> dict[str, str]:
    """As `check_sync`."""
    return {"text": text_of([item async for item in stream()])}


def answer_sync(stream: Stream) -> None:
    """Answers each line on standard input: "check", or "run"."""
    print("ready", flush=True)
    for line in sys.stdin:
        done = check_sync(stream) if line == "check\n" else run_sync(stream)
        print(json.dumps(done), flush=True)


async def answer_async(make: Callable[[], AsyncStream], streams: int) -> None:
    """As `answer_sync`; where there are many streams, each run has a new client."""
    stream = make()
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "check\n":
            print(json.dumps(await check_async(stream)), flush=True)
            continue
        if streams > 1:
            stream = make()
        print(json.dumps(await run_async(stream, streams)), flush=True)


def main(name: str, base_url: str, streams: int = 1) -> None:
    """Runs the contender `name` against the server at `base_url`."""
    allow_many_sockets()
    if name in ASYNC:
        asyncio.run(answer_async(lambda: ASYNC[name](base_url), streams))
    else:
        answer_sync((SYNC | LAYERS)[name](base_url))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
