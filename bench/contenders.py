"""Everybody who reads a chat answer over HTTP, each said once.

A contender makes what it needs and gives the function that starts a stream. It imports
only what it needs, so that its memory and its start are its own. They stand here in
async; `programs.without_async` makes the sync twins from this very text. What there
is in sync alone has no such words, and stays as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

Stream: TypeAlias = Callable[[], AsyncIterator[Any]]

MESSAGES: Any = [{"role": "user", "content": "hi"}]
BODY: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stream": True}
CONTENT = json.dumps(BODY).encode()
ROUTE = "/chat/completions"
TIMEOUT = 600.0
"""Seconds; what sse_chat and openai take by default."""


async def read(stream: Stream) -> tuple[int, float, float]:
    """Reads an answer and keeps nothing: how many items, when the first, when all."""
    items, first = 0, 0.0
    async for _ in stream():
        if not items:
            first = time.perf_counter()
        items += 1
    return items, first, time.perf_counter()


async def collect(stream: Stream) -> list[Any]:
    """All items of an answer."""
    return [item async for item in stream()]


def sse_chat(url: str) -> Stream:
    from sse_chat import AsyncChatClient

    client = AsyncChatClient(base_url=url, model="m")
    return lambda: client.stream(MESSAGES)


def sse_chat_one_shot(url: str) -> Stream:
    from sse_chat import astream_chat

    return lambda: astream_chat(MESSAGES, model="m", base_url=url)


def openai(url: str) -> Stream:
    from openai import AsyncOpenAI

    create = AsyncOpenAI(base_url=url, api_key="none").chat.completions.create

    async def stream() -> AsyncIterator[Any]:
        async for chunk in await create(model="m", messages=MESSAGES, stream=True):
            yield chunk

    return stream


def openai_one_shot(url: str) -> Stream:
    from openai import AsyncOpenAI

    async def stream() -> AsyncIterator[Any]:
        async with AsyncOpenAI(base_url=url, api_key="none") as client:
            create = client.chat.completions.create
            async for chunk in await create(model="m", messages=MESSAGES, stream=True):
                yield chunk

    return stream


def dicts(url: str) -> Stream:
    import json

    import httpx
    from httpx_sse import aconnect_sse

    client = httpx.AsyncClient(timeout=TIMEOUT)

    async def stream() -> AsyncIterator[Any]:
        async with aconnect_sse(client, "POST", url + ROUTE, json=BODY) as source:
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return stream


def recipe(url: str) -> Stream:
    from openai.types.chat import ChatCompletionChunk

    stream = dicts(url)
    return lambda: (ChatCompletionChunk(**item) async for item in stream())


def httpx_alone(url: str) -> Stream:
    import httpx

    # What sse_chat's pool keeps: else it would be httpx's limits that are measured.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    client = httpx.AsyncClient(timeout=TIMEOUT, limits=limits)
    return lambda: _raw(client, url)


def httpx_as_it_comes(url: str) -> Stream:
    import httpx

    client = httpx.AsyncClient()
    return lambda: _raw(client, url)


async def _raw(client: Any, url: str) -> AsyncIterator[Any]:
    async with client.stream("POST", url + ROUTE, json=BODY) as response:
        async for piece in response.aiter_raw():
            yield piece


def http_client(url: str) -> Any:
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT)

    def stream() -> Any:
        connection.request("POST", parts.path + ROUTE, CONTENT)
        response = connection.getresponse()
        while line := response.readline():
            if line != b"\n":
                yield line

    return stream


def ollama(url: str) -> Any:
    from ollama import Client

    client = Client(host=url)
    return lambda: client.chat(model="m", messages=MESSAGES, stream=True)


def litellm(url: str) -> Any:
    from litellm import completion  # type: ignore[import-not-found]

    options = {"model": "openai/m", "api_base": url, "api_key": "none"}
    return lambda: completion(messages=MESSAGES, stream=True, **options)


# The layers under sse_chat, one more at each step, for the split of where time goes.


def layer_socket(url: str) -> Any:
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    head = f"POST {parts.path}{ROUTE} HTTP/1.1\r\nHost: localhost\r\n"
    length = f"Content-Length: {len(CONTENT)}\r\n\r\n"
    request = (head + length).encode() + CONTENT

    def stream() -> Any:
        connection.sendall(request)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received = connection.recv(65_536)
            yield received

    return stream


def layer_h11(url: str) -> Any:
    import h11

    received: Any = layer_socket(url)

    def stream() -> Any:
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="POST", target="/", headers=[("Host", "h")]))
        parser.send(h11.EndOfMessage())
        for data in received():
            parser.receive_data(data)
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return

    return stream


def layer_httpcore(url: str) -> Any:
    import httpcore

    pool = httpcore.ConnectionPool()

    def stream() -> Any:
        with pool.stream("POST", url + ROUTE, content=CONTENT) as response:
            yield from response.iter_stream()

    return stream


def layer_sse(url: str) -> Any:
    from sse_chat import iter_sse

    raw: Any = httpx_alone(url)
    return lambda: iter_sse(raw())


def layer_json(url: str) -> Any:
    events: Any = layer_sse(url)
    decode = json.JSONDecoder().raw_decode

    def stream() -> Any:
        for event in events():
            if event.data != "[DONE]":
                yield decode(event.data)

    return stream


CONTENDERS: dict[str, Callable[[str], Any]] = {
    "sse_chat": sse_chat,
    "sse_chat, one-shot": sse_chat_one_shot,
    "openai": openai,
    "openai, one-shot": openai_one_shot,
    "recipe": recipe,
    "dicts": dicts,
    "httpx": httpx_alone,
    "httpx, default limits": httpx_as_it_comes,
    "http.client": http_client,
    "ollama": ollama,
    "litellm": litellm,
    "socket": layer_socket,
    "h11": layer_h11,
    "httpcore": layer_httpcore,
    "SSE": layer_sse,
    "JSON": layer_json,
}
