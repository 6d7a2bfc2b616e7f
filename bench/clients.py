"""The contenders that read a chat answer over HTTP, and the child that runs one.

    python bench/clients.py NAME BASE_URL [STREAMS]

prints the text of an answer, and then for each line on standard input reads one to
its end (or STREAMS at once) and prints what that took, as JSON.

A contender makes its client and returns the function that starts a stream. It imports
only what it needs, inside, so that its start is its own. `options` are more fields of
the request.
"""

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TIMEOUT = 600.0  # seconds, the default of sse_chat and of openai


def sse_chat(url: str, is_async: bool, timeout: float = TIMEOUT, **options: Any) -> Any:
    from sse_chat import AsyncChatClient, ChatClient

    make: Any = AsyncChatClient if is_async else ChatClient
    client = make(base_url=url, model="m", timeout=timeout)
    return lambda: client.stream(MESSAGES, **options)


def openai(url: str, is_async: bool, timeout: float = TIMEOUT, **options: Any) -> Any:
    from openai import AsyncOpenAI, OpenAI

    make: Any = AsyncOpenAI if is_async else OpenAI
    create = make(base_url=url, api_key="none", timeout=timeout).chat.completions.create
    return lambda: create(model="m", messages=MESSAGES, stream=True, **options)


def dicts(url: str, is_async: bool, timeout: float = TIMEOUT, **options: Any) -> Any:
    import json

    from httpx_sse import aconnect_sse, connect_sse

    client, request = _httpx(url, is_async, timeout, options)

    def stream() -> Iterator[Any]:
        with connect_sse(client, **request) as source:
            for event in source.iter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    async def stream_async() -> AsyncIterator[Any]:
        async with aconnect_sse(client, **request) as source:
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    yield json.loads(event.data)

    return stream_async if is_async else stream


def recipe(url: str, is_async: bool) -> Any:
    from openai.types.chat import ChatCompletionChunk

    stream = dicts(url, is_async)
    if is_async:
        return lambda: (ChatCompletionChunk(**item) async for item in stream())
    return lambda: (ChatCompletionChunk(**item) for item in stream())


def httpx(url: str, is_async: bool) -> Any:
    client, request = _httpx(url, is_async, TIMEOUT, {})

    def stream() -> Iterator[bytes]:
        with client.stream(**request) as response:
            yield from response.iter_raw()

    async def stream_async() -> AsyncIterator[bytes]:
        async with client.stream(**request) as response:
            async for piece in response.aiter_raw():
                yield piece

    return stream_async if is_async else stream


def _httpx(url: str, is_async: bool, timeout: float, options: Any) -> tuple[Any, Any]:
    import httpx

    # The pool's limits are those of sse_chat: else it would be limits that compete.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    make: Any = httpx.AsyncClient if is_async else httpx.Client
    body = {"model": "m", "messages": MESSAGES, "stream": True, **options}
    request = {"method": "POST", "url": f"{url}/chat/completions", "json": body}
    return make(timeout=timeout, limits=limits), request


CONTENDERS = {each.__name__: each for each in (sse_chat, openai, recipe, dicts, httpx)}


def make(name: str, url: str) -> tuple[Callable[[], Any], bool]:
    """Make the contender; returns what starts a stream, and whether that is async."""
    is_async = name.endswith(" async")
    return CONTENDERS[name.removesuffix(" async")](url, is_async), is_async


async def opened(stream: Callable[[], Any]) -> Any:
    items = stream()
    return await items if hasattr(items, "__await__") else items


def text_of(item: Any) -> str:
    """Return the text of a chunk object or of a dict; bytes are shown as they are."""
    if isinstance(item, bytes):
        return repr(item)
    if isinstance(item, dict):
        return item["choices"][0]["delta"].get("content", "")
    return item.choices[0].delta.content or ""


def start(name: str, url: str) -> None:
    """Print each text of an answer as it comes: the program whose start is timed."""
    stream, is_async = make(name, url)

    async def run() -> None:
        async for item in await opened(stream):
            print(text_of(item), flush=True)

    if is_async:
        import asyncio

        asyncio.run(run())
    else:
        for item in stream():
            print(text_of(item), flush=True)


def main(name: str, url: str, streams: int = 1) -> None:
    import asyncio
    import json

    from measure import allow_many_sockets

    allow_many_sockets()
    loop = asyncio.new_event_loop()
    stream, is_async = make(name, url)

    async def collect() -> list[Any]:
        return [item async for item in await opened(stream)]

    async def read_async() -> int:
        items = 0
        async for _ in await opened(stream):
            items += 1
        return items

    async def read_at_once() -> int:
        reads = [read_async() for _ in range(streams)]
        counts = await asyncio.gather(*reads, return_exceptions=streams > 1)
        return sum(count for count in counts if isinstance(count, int))

    def read() -> int:
        if is_async:
            return loop.run_until_complete(read_at_once())
        items = 0
        for _ in stream():
            items += 1
        return items

    whole = loop.run_until_complete(collect()) if is_async else list(stream())
    print(json.dumps("".join(map(text_of, whole))), flush=True)
    for _ in sys.stdin:
        if streams > 1:  # Each run has a new client.
            stream, _ = make(name, url)
        cpu = time.process_time()
        items = read()
        cpu = time.process_time() - cpu
        print(json.dumps({"cpu": cpu, "items": items}), flush=True)
    loop.run_until_complete(loop.shutdown_asyncgens())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
