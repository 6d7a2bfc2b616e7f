"""What sse_chat promises, as tests: events, types, endings, errors, the terminal.

    Vocabulary                   the bytes that servers send, and builders for them
    Machinery                    servers that send them, sync and async code as one
    Server-sent events           against the standard
    Chat types, Accumulating
    How an answer can end        a section for each row of the README's table
    What servers mean            errors, ends, tool calls, messages, by kind
    Many streams; HTTP/2, TLS
    The request                  and the secrets in it
    The life of a stream         nothing hangs, nothing is another's, nothing is lost
    Listening                    the event source that connects again
    Threads, memory, packages
    The program                  in pipes and at a terminal; the demo server
    The README                   its snippets, its names; types, pydantic, FastAPI, Dask

`pytest -m live` runs the tests of a real server, whose base URL is in
SSE_CHAT_LIVE_URL, `-m install` those that install the project as users do, `-m httpx2`
those of the core under httpx2 alone. HYPOTHESIS_PROFILE=ci tries more examples.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import pickle
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import tracemalloc
import types
import typing
import unicodedata
import urllib.parse
import zlib
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import anyio
import anyio.from_thread
import pytest
from hypothesis import Phase, example, given, settings, stateful
from hypothesis import strategies as st

import sse_chat
from sse_chat import (
    APIError,
    ChatAccumulator,
    ChatCompletion,
    ChatCompletionChunk,
    EventSource,
    ServerSentEvent,
    SSEDecoder,
    SSEError,
    TruncatedStreamError,
    accumulate,
    connect_sse,
    iter_sse,
)

try:
    import httpx
except ModuleNotFoundError:  # the core of this file runs under either
    import httpx2 as httpx
try:
    import sniffio  # noqa: F401
except ModuleNotFoundError:
    sys.modules["sniffio"] = None  # else httpcore searches for it at each of its locks


def needs(name: str) -> Any:
    """Import what only the extra test-all installs, or skip the test."""
    return pytest.importorskip(name, reason=f"{name}: pip install -e '.[test-all]'")


UNSEEN = {" ": "space", "\n": "newline", "\r": "return", "\t": "tab", "\0": "NUL"}


def as_words(value):
    """The words of a value, as an id of a test: `error code 5` for JSON, for one."""
    if callable(value):
        return value.__name__
    if isinstance(value, dict):
        parts = itertools.chain(*value.items()) if value else ["empty object"]
        return " ".join(map(as_words, parts))[:60].strip()
    if isinstance(value, list):
        return " ".join(map(as_words, value or ["empty list"]))[:60].strip()
    if not isinstance(value, (str, bytes)):
        return re.sub("^-", "minus ", json.dumps(value, default=repr).strip('"'))
    text = value if isinstance(value, str) else value.decode("utf-8", "replace")
    words = re.findall(r"(?a)[\w.]+", text)
    if not any(map(str.isalpha, "".join(words))):
        words = ["text", *map(name_of, text)]
    return " ".join(words)[:60].strip()


def name_of(character):
    return UNSEEN.get(character) or unicodedata.name(character, "surrogate").lower()


def examples(factor):
    """As many examples as the profile has, times this."""
    return settings(max_examples=max(1, int(settings().max_examples * factor)))


settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

pytestmark = [
    pytest.mark.anyio,
    # trio says so of each that is not read to its end, httpx's own too
    pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning"),
]

# ---- Vocabulary: the bytes that servers send -----------------------------------------


def sse(payload):
    """`data: {"error": "x"}` and a blank line, for {"error": "x"}; as raw UTF-8."""
    text = f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"
    return text.encode("utf-8", "backslashreplace")


def choices(*fields, **more):
    """`data: {"choices": [{}], "id": "1"}`, for {} and id="1"."""
    return sse({"choices": fields} | more)


def event(content=None, finish=None, index=0, **delta):
    """A chunk as most servers send it, for "lo":

    data: {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
    "choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": null}]}
    """
    delta |= {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return sse(head | {"choices": [choice]})


def with_text(json_text):
    r"""The same with a content that JSON spells so, as in b"\ud83d" or b"\xff"."""
    return event("?").replace(b"?", json_text)


def calls(indices):
    """The same with tool calls, `{"index": 0, "id": "c", "function": …}` for 0."""
    return event(tool_calls=[{"index": index} | CALL for index in indices])


def http(*parts, status="200 OK", headers="", kind="text/event-stream", missing=0):
    """A response with a Content-Length, which may promise more than there is:

    HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 2\r\n\r\nhi
    """
    length = sum(map(len, parts)) + missing
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    return (head + headers + "\r\n").encode() + b"".join(parts)


def chunked(*parts, end=True, headers="", kind="text/event-stream"):
    r"""A chunked response, `2\r\nhi\r\n` for each part; cut off without `0\r\n\r\n`."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{headers}"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)
    end = b"0\r\n\r\n" if end else b""
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + body + end


def refuse(status, *headers, body=b'{"error": "boom"}'):
    """`HTTP/1.1 404 No`, with `{"error": "boom"}` as text/html."""
    more = "".join(f"{header}\r\n" for header in ("Connection: close", *headers))
    return http(body, status=f"{status} No", headers=more, kind="text/html")


def after(time, *headers):
    """`HTTP/1.1 429 No` with `Retry-After: 5`, for 5."""
    return refuse(429, f"Retry-After: {time}", *headers)


def encoded(name, body):
    """`Content-Encoding: gzip`, for "gzip"."""
    return http(body, headers=f"Content-Encoding: {name}\r\n")


CANARY = "sk-canary/7f3a"  # a word of servers; no error shows it where it is the key
CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
UTF8_BOM = b"\xef\xbb\xbf"

# An answer in four chunks: its text, which has begun and does not end, and its end.
HEL = event("Hel", role="assistant")
LO = event("lo")
STOPPED = event(finish="stop")
BEGUN = (HEL, LO)
ENDING = (STOPPED, DONE)
HELLO = (HEL, LO, STOPPED, DONE)
HELLO_BYTES = b"".join(HELLO)
OTHER_STOPPED = event(finish="stop", index=1)

# The same in one piece; and cut off in its text
MESSAGE = {"role": "assistant", "content": "Hello"}
WHOLE = {"id": "c", "object": "chat.completion", "model": "m", "created": 2}
WHOLE |= {"choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}
JSON = json.dumps(WHOLE).encode()
HALF_JSON = (
    b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hel'
)

USAGE_ALONE = choices(usage={"prompt_tokens": 1, "total_tokens": 2})
FILTER_ALONE = choices({"filter": {}})  # Azure sends it after the end
FAILED = sse({"error": {"message": CANARY, "type": "server_error", "code": 500}})
BESIDE = {"error": {"code": 502, "message": CANARY}}  # OpenRouter, beside the choices
PAGE = b"<!doctype html><title>Sign in</title>\n"
MODELS = b'{"data": [{"id": "b"}, {"id": "a"}, {"id": 5}, null]}'

HALF_HEAD = b"HTTP/1.1 200 OK\r\nContent-"
OPEN_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
HTML_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
ERROR_HEAD = b"HTTP/1.1 500 No\r\n\r\n"
GOOD = chunked(*HELLO)

# Bodies without an end, as far as a test may wait: all at once, or bit by bit
MUCH = [b"x" * 9999] * 20_000
PINGS = [(PING * 999, 0.001)] * 20_000
BLANKS = [b"\n" * 9999] * 2_000
LINES = [b"data: x\n" * 9999] * 2_000
ALIVE = [(PING, 0.05)] * 600
ENDLESS = [(event("x"), 0.002)] * 15_000


# ---- Machinery: a server on a raw loopback socket; sync and async code as one --------

KEEP = "keep the connection"
GONE = "wait until the client has gone"
PATIENCE = 20  # seconds, for a slow machine
SERVER_PATIENCE = 30  # seconds, after which a server closes what nobody reads or writes
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens there
pause = time.sleep  # where a test counts waits, that of the module is another


class Server(contextlib.AbstractContextManager):
    """Calls `handle(connection, number of the request)`, or sends it if it is bytes.

    The connection is closed after each request, unless `handle` returns KEEP.
    """

    def __init__(self, handle, wrap=contextlib.nullcontext):
        self.handle = play(handle) if isinstance(handle, bytes) else handle
        self.wrap = wrap  # what is spoken over a connection, as TLS
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.connections = 0
        self.lock = threading.Lock()
        self.heads = []  # of each request: its line and headers
        self.bodies = []
        self.left = threading.Semaphore(0)  # released each time a connection ends
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                new, _ = self.socket.accept()
                new.settimeout(SERVER_PATIENCE)
                new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                threading.Thread(target=self.run, args=[new], daemon=True).start()

    def run(self, connection):
        with contextlib.suppress(OSError), connection, self.wrap(connection) as wrapped:
            self.talk(wrapped)
        self.left.release()

    def talk(self, connection):
        reader = connection.makefile("rb")
        lines = iter(reader.readline, None)
        while head := b"".join(itertools.takewhile(bytes.strip, lines)):
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            body = reader.read(int(length[1]) if length else 0)
            with self.lock:
                self.heads.append(head.decode())
                self.bodies.append(body)
                number = len(self.heads)
            if self.handle(connection, number) != KEEP:
                return

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # ends the accept that waits on it
        self.socket.close()


serve = Server


def play(*steps):
    """Answer in steps: bytes, seconds to wait, functions of the connection, GONE, KEEP.

    A step may also be an iterable of them.
    """

    def perform(connection, number):
        for step in steps:
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, (int, float)):
                pause(step)
            elif callable(step):
                step(connection)
            elif step is GONE:
                while connection.recv(65536):
                    pass
            elif step is not KEEP:
                for inner in step:
                    play(inner)(connection, number)
        return KEEP if KEEP in steps else None

    return perform


def in_turn(*answers):
    """Give the first request the first answer, and so on; the last again and again."""
    plays = [answer if callable(answer) else play(answer) for answer in answers]
    return lambda *request: plays[min(request[1], len(plays)) - 1](*request)


def framed(framing, body, broken):
    """Answer with this body; if `broken`, break off after it."""
    data, headers = body.data, ""
    if framing == "gzip":
        packer = zlib.compressobj(wbits=31)
        data = packer.compress(data)
        data += packer.flush(zlib.Z_SYNC_FLUSH if broken else zlib.Z_FINISH)
        headers = "Content-Encoding: gzip\r\n"
    answer = chunked(data, end=not broken, headers=headers, kind=body.kind)
    if framing == "length":
        answer = http(data, kind=body.kind, missing=int(broken))
    elif framing == "close":
        answer = HEAD.replace(b"text/event-stream", body.kind.encode()) + data
    linger = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset = (0.005, lambda connection: connection.setsockopt(*linger))
    return play(answer, reset if broken and framing == "close" else ())


async def has_left(server, seconds=20):
    return await anyio.to_thread.run_sync(server.left.acquire, True, seconds)


GOOD_KEPT = play(GOOD, KEEP)

Truncated = TruncatedStreamError
Invalid = sse_chat.APIResponseValidationError
Status = sse_chat.APIStatusError
Timeout = sse_chat.APITimeoutError
Unreachable = sse_chat.APIConnectionError

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@functools.cache
def authority():
    """Who has issued the certificate of the servers that speak TLS."""
    return needs("trustme").CA()


@functools.cache
def tls_of_server():
    """What a server wraps its connections in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("127.0.0.1").configure_cert(context)
    return functools.partial(context.wrap_socket, server_side=True)


def tls_of_client():
    """The context of a client that trusts these servers."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


ONE = httpx.Limits(max_connections=1)
ENVIRONMENT = re.compile("(?i)OPENAI_.*|OLLAMA_HOST|(HTTPS?|ALL|NO)_PROXY")
TIME_LIMITS = {"install": 1800, "httpx2": 600, "live": 600}  # seconds, by marker


class Summary:
    """Says at the end what it takes to run the tests that were skipped."""

    def pytest_terminal_summary(self, terminalreporter):
        skipped = terminalreporter.stats.get("skipped", ())
        if any("test-all" in str(report.longrepr) for report in skipped):
            terminalreporter.write_line("For the rest: pip install -e '.[test-all]'")


@pytest.fixture(scope="session", autouse=True)
def summary(pytestconfig):
    pytestconfig.pluginmanager.register(Summary())


@pytest.fixture(autouse=True)
def time_limit(request):
    """Fail a test that hangs; and again, if what it has left open hangs, too."""

    def hangs(*_):
        pytest.fail(f"not done within {limit} s")

    limit = max(60, 0.6 * settings().max_examples)
    for name in TIME_LIMITS.keys() & request.keywords.keys():
        limit = TIME_LIMITS[name]
    signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, limit, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(scope="session", autouse=True)
def clean_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(ENVIRONMENT.fullmatch, list(os.environ)):
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def no_word_of_asyncio(caplog):
    yield
    logged = [r.getMessage() for r in caplog.get_records("call") if r.name == "asyncio"]
    # "Executing … took 0.2 seconds" is no fault.
    assert [text for text in logged if not text.startswith("Executing ")] == []


@pytest.fixture
def waits(monkeypatch):
    """The seconds that retries wait: noted here, in place of waiting.

    Sync code waits for an event, so that closing a stream ends the wait.
    """
    noted, wait = [], threading.Event.wait

    def note(event, timeout=None):
        if sys._getframe(1).f_globals is not vars(sse_chat):
            return wait(event, timeout)
        noted.append(timeout)
        return event.is_set()

    monkeypatch.setattr(threading.Event, "wait", note)
    monkeypatch.setattr(anyio, "sleep", functools.partial(call, noted.append))
    return noted


@contextlib.contextmanager
def memory(most):
    """No more than so many bytes are in use at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def pickled(value):
    return pickle.loads(pickle.dumps(value))


async def as_async(items):
    for item in items:
        yield item


class Sync:
    """Anything of sync code with the face of its async twin."""

    def __init__(self, twin):
        self.twin = twin

    def __getattr__(self, name):
        value = getattr(self.twin, "close" if name == "aclose" else name)
        if name in ("aclose", "generate", "models"):
            return functools.partial(call, value)
        if callable(value):
            return lambda *args, **options: Sync(value(*args, **options))
        return value

    def __aiter__(self):
        return Sync(iter(self.twin))

    async def __anext__(self):
        for item in self.twin:
            return item
        raise StopAsyncIteration

    async def __aenter__(self):
        self.twin.__enter__()
        return self

    async def __aexit__(self, *exception):
        self.twin.__exit__(*exception)


async def call(function, *args, **options):
    return function(*args, **options)


Way = namedtuple("Way", "client stream generate models")
SYNC = Way("ChatClient", "stream_chat", "generate", "models")
SYNC = Sync(Way(*(getattr(sse_chat, name) for name in SYNC)))
ASYNC = Way("AsyncChatClient", "astream_chat", "agenerate", "amodels")
ASYNC = Way(*(getattr(sse_chat, name) for name in ASYNC))


def pytest_generate_tests(metafunc):
    """Run async tests under each loop; those that take `chat` for sync code as well.

    uvloop differs in how connections live and end, and runs the tests of that alone. A
    loop that is not installed runs none.
    """
    if "anyio_backend" in metafunc.fixturenames:
        modes = ["sync"] if "chat" in metafunc.fixturenames else []
        modes += ["asyncio", "trio"]
        modes += ["uvloop"] if metafunc.definition.get_closest_marker("life") else []
        modes = list(filter(is_there, modes))
        metafunc.parametrize("anyio_backend", modes, indirect=True)


@functools.cache
def is_there(mode):
    return mode in ("sync", "asyncio") or importlib.util.find_spec(mode) is not None


@pytest.fixture
def anyio_backend(request):
    loop = "trio" if request.param == "trio" else "asyncio"
    return loop, {"use_uvloop": True} if request.param == "uvloop" else {}


@pytest.fixture
def chat(request, anyio_backend):
    return SYNC if request.node.callspec.params["anyio_backend"] == "sync" else ASYNC


@contextlib.asynccontextmanager
async def own_client(chat, module=httpx, **options):
    """The caller's own client, of the kind that this way to ask takes."""
    options = {"verify": NO_TLS} | options  # certificates take their time
    client = (module.Client if chat is SYNC else module.AsyncClient)(**options)
    async with Sync(client) if chat is SYNC else client:
        yield client


def finished(coroutine):
    """Run what has nothing to wait for; an event loop for each would take too long."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


def in_every_mode(check, rows=None):
    """Run a check with each row, as sync code and under each loop.

    All run at the same time, since each waits a lot.
    """
    rows = rows or {"it": ()}
    modes = filter(is_there, ("sync", "asyncio", "trio"))
    ways = [*itertools.product(rows, modes)]

    def run(name, mode):
        if mode == "sync":
            return finished(check(SYNC, *rows[name]))
        return anyio.run(check, ASYNC, *rows[name], backend=mode)

    with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
        running = {way: pool.submit(run, *way) for way in ways}
    failures = []
    for way, each in running.items():
        if error := each.exception():
            error.add_note(", ".join(way))
            failures.append(error)
    if failures:
        raise BaseExceptionGroup("some rows fail", failures)


async def take(source):
    """Take a stream, chunks, or what `generate` gives; other errors fail the test."""
    answer = SimpleNamespace(stream=source, chunks=[], error=None)
    try:
        if inspect.isawaitable(source):
            answer.completion = await source
        else:
            async for chunk in source:
                answer.chunks.append(chunk)
            whole = accumulate(answer.chunks)
            answer.completion = getattr(source, "completion", whole)
    except APIError as error:
        answer.error, answer.completion = error, error.completion
    answer.text = "".join(chunk.text for chunk in answer.chunks)
    return answer


async def ask(chat, base_url=None, how="stream", **options):
    usual = {"base_url": base_url, "timeout": 20}
    usual |= {} if how == "models" else {"messages": "hi"}
    return await take(getattr(chat, how)(**usual | options))


async def ask_mock(chat, answer, **options):
    """Ask a function of the request in place of a server."""
    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        return await ask(chat, client=own, **options)


def ask_sync(base_url=None, **options):
    return finished(ask(SYNC, base_url, **options))


def chunks_in(*pieces, **options):
    return finished(take(Sync(sse_chat.iter_chunks(pieces, **options))))


async def until(true, seconds=9):
    """Wait until it is true, for so many seconds at most."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        await anyio.sleep(0.005)
    return found


# ---- Server-sent events against the standard, and the names of httpx-sse -------------


def as_event(data, event="message", id="", retry=None):
    return ServerSentEvent(event, data, id, retry)


def by_the_standard(stream, limit=10**9):
    """Lines, events, last event ID, reconnection time: slow, as the standard says it.

    And if more bytes than the limit stand between two blank lines: what came before.
    """
    events = []
    data = event_type = last_event_id = id_buffer = ""
    reconnection_time = retry_of_event = None
    size = -1
    # "Streams must be decoded using the UTF-8 decode algorithm", which strips one BOM.
    # "Lines must be separated by either a CRLF pair, a single LF, or a single CR."
    *lines, pending = re.split(b"\r\n|\n|\r", stream.removeprefix(UTF8_BOM))
    for line in lines:
        size = size + len(line) + 1 if line else -1
        if size > limit:
            break
        field, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if line == b"":
            # "Set the last event ID string to the value of the last event ID buffer."
            last_event_id = id_buffer
            # "If the data buffer is an empty string, set the data buffer and the event
            # type buffer to the empty string and return."
            if data != "":
                # "If the data buffer's last character is LF, then remove" it.
                data, kind = data.removesuffix("\n"), event_type or "message"
                events.append(as_event(data, kind, last_event_id, retry_of_event))
                retry_of_event = None  # beside the standard: the event tells its retry
            data, event_type = "", ""
        elif field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            id_buffer = value
        elif field == "retry" and re.fullmatch("[0-9]{1,4300}", value):
            reconnection_time = retry_of_event = int(value)
    # What follows the last has no end: "any pending data must be discarded".
    size += len(pending) + 1 if pending else 0
    lines = [line.decode("utf-8", "replace") for line in lines]
    return lines, events, last_event_id, reconnection_time, size > limit


# What a stream is made of: pieces of fields, whole events as most are, ends of lines,
# values; and whole lines
PARTS = [b"data: "] * 6 + [b"data:", b"data", b"event: ", b"event", b"id: ", b"id"]
PARTS += [b"retry: ", b": ", b" data: ", b"error: ", UTF8_BOM + b"data: "]
PARTS += [b"data: x\n\n"] * 6 + [b"data: x\r\n\r\n", b"data: x\r\r"] * 2
PARTS += [b"\n"] * 12 + [b"\n\n", b"\r\n", b"\r\n", b"\r", b"\r"] * 2
TEXTS = ["x", "a: b", " ", "\0", "12", "007", "-5", "+5", "1_0", "５²", "ä", "🙂"]
TEXTS += ["\ufeff", "\u2028", "\x85", "\v\f\x1c", "\\u00e4", "\\ud83d\\ude42"]
PARTS += [text.encode() for text in TEXTS]
PARTS += [b"\xff", b"\xf0\x9f", b"\x99\x82", b"\xed\xa0\xbd", b"\xc0\x80", b"\xef"]
FIELDS = [f"{name}: {text}".encode() for name in ("id", "event") for text in TEXTS]
FIELDS += [b"retry: 12", b"retry: 007", b"retry: -5", b"retry: x", b"data: x"]
WHOLE_LINES = st.tuples(st.sampled_from(FIELDS), st.sampled_from([b"\n", b"\r\n"]))
WHOLE_LINES |= st.sampled_from([(b"id: 1\ndata: x\n\n",), (b"retry: 5\ndata: x\n",)])
START = st.sampled_from([b"", b"", b"", UTF8_BOM, UTF8_BOM, UTF8_BOM * 2])
BLOCKS = st.sampled_from(PARTS) | WHOLE_LINES.map(b"".join)
BLOCKS = st.lists(BLOCKS, max_size=25).map(b"".join)
STREAMS = st.tuples(START, BLOCKS).map(b"".join)
SEQUENCE = re.compile(rb"\r\n|[\xc0-\xff][\x80-\xbf]+|\\u[0-9a-f]{4}(\\u[0-9a-f]{4})?")
# Lines that each rule of the standard is about
EACH_RULE = UTF8_BOM + b"data:  x: y \n\ndata\r\rdata\rdata\r\n\ndata: x\n\r"
EACH_RULE += b"Data: x\n data: x\ndata : x\n:data: x\n\n\xef\xbb\xbfdata: x\n\n"
EACH_RULE += "data:\ufeffx\ndata: \v\f\x1c\x85\u2028\n\nevent: e\n\ndata\n\n".encode()
EACH_RULE += b"event: e\nevent:  f\ndata\n\nevent: e\nevent:\ndata: x\n\n"
EACH_RULE += b"event: \xff\nid: \xfe\ndata\n\n"
EACH_RULE += b"id: 1\n\ndata\n\nid: \0\ndata\n\nid\ndata\n\nid:  2\n"
EACH_RULE += "retry: 09\ndata\n\nretry: +5\nretry: ５\nretry: \ndata\n\n".encode()
EACH_RULE += b"retry: %b\ndata: \xff\xf0\x9f\x98\xe4\n\ndata: no event" % (b"9" * 5000)


def shares(strategy, *conditions):
    """Return the share of a strategy's examples that each condition holds for."""
    drawn = []

    @settings(max_examples=100, phases=[Phase.generate], derandomize=True)
    @given(strategy)
    def draw(example):
        drawn.append(example)

    draw()
    return [sum(map(bool, map(holds, drawn))) / len(drawn) for holds in conditions]


def cut(data, cuts):
    places = [0, *sorted(at for at in cuts if at <= len(data)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


@st.composite
def cuttings(draw, streams):
    """A stream as the list of its pieces: cut anywhere, and where it matters.

    That is around events, and in CRLF, UTF-8 sequences (a BOM is one), JSON escapes.
    """
    stream = draw(streams)
    places = [range(1, len(stream))]
    if isinstance(stream, bytes):
        inside = [range(s.start() + 1, s.end()) for s in SEQUENCE.finditer(stream)]
        places.append([*itertools.chain(*inside)])
        around = re.finditer(rb"data: |(?<=\n\n)|(?<=\n\r\n)", stream)
        places.append([found.start() for found in around])
    at = draw(st.sampled_from([place for place in places if place] or [[0]]))
    return cut(stream, draw(st.just(at) | st.lists(st.sampled_from(at), max_size=8)))


@examples(3)
@given(cuttings(STREAMS), st.integers(3, 30) | st.just(10**9))
@example([EACH_RULE], 9999)
@example(cut(EACH_RULE, range(999)), 9999)
@example([b"\n", b"data: x\ry\n\n", b"\nda", b"data: z\n\n"], 99)
@example([b"", b"data: x\n\n", UTF8_BOM + b"data: y\n\n"], 99)
@example([b"data: x\n\n", b"data: 1234\r\ndata: 1", b"23\r\n\r\n", b"", b"\n"], 19)
@example([b"data: x\n\n", b"data: 12\n\n", b"data: x\n\n"], 7)
@example([b"data: x\n\ndata: 12\n\n"], 7)
@example([b"id: 1\ndata: x", b"\n", b"\n"], 5)
@example([b"data: x\n\n", b"data: y\ni", b"d: 1\n\n"], 99)
def test_decoders_follow_the_standard_however_bytes_are_cut(pieces, limit):
    """And at once: nothing is held back for what may come. Over the limit all ends."""
    line_decoder, decoder = sse_chat.SSELineDecoder(), SSEDecoder(limit)
    lines, events, stream = [], [], b""
    for piece in pieces:
        stream += piece
        lines += line_decoder.feed(piece)
        over = False
        try:
            events += decoder.feed(piece)
        except SSEError as error:
            events, over = events + error.events, True
        read = (lines, events, decoder.last_event_id, decoder.retry, over)
        assert read == by_the_standard(stream, limit)
    assert over or list(iter_sse(pieces, limit)) == events
    by_lines = SSEDecoder(None)
    events = [event for line in lines if (event := by_lines.decode(line))]
    read = (lines, events, by_lines.last_event_id, by_lines.retry, False)
    assert read == by_the_standard(stream)


def test_the_streams_of_the_test_above_hold_every_field():

    def some(wanted):
        return lambda stream: any(map(wanted, by_the_standard(stream)[1]))

    with_field = [
        some(lambda event: event.id),
        some(lambda event: event.event != "message"),
        some(lambda event: event.retry is not None),
        some(lambda event: "\n" in event.data),
        lambda stream: not by_the_standard(stream)[1],
    ]
    assert min(shares(STREAMS, *with_field)) > 0.05


async def test_async_iterators_give_what_their_sync_twins_give():
    pieces = cut(EACH_RULE, [99])
    lines, events, *_ = by_the_standard(EACH_RULE)
    assert list(sse_chat.iter_lines(pieces)) == lines
    assert [line async for line in sse_chat.aiter_lines(as_async(pieces))] == lines
    assert [event async for event in sse_chat.aiter_sse(as_async(pieces))] == events
    limited = sse_chat.aiter_sse(as_async([b"data: x\n\ndata: 12\n\n"]), 7)
    assert await anext(limited) == as_event("x")
    with pytest.raises(SSEError):
        await anext(limited)


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r\n\0")
WORD = st.text(CHARACTERS, min_size=1, max_size=9)
TEXT = st.lists(WORD | st.just(""), max_size=5).map("\n".join)
RETRY = st.none() | st.integers(0, 10**12)
MIB = 2**20
LARGEST = b"data: " + bytes(16 * MIB - 6)
# A stream of so many KiB, in reads; and how many MiB decoding it may take, which is
# enough for the bytes, the text and the lines of one event, and not of two
LARGE = {
    "one line": (lambda kib: [b"data: ", *[b"x" * 1024] * kib, b"\n\n"], 26),
    "many lines": (lambda kib: [*[b"data: " + b"x" * 1017 + b"\n"] * kib, b"\n"], 26),
    "many events": (lambda kib: [(b"data: " + b"x" * 248 + b"\n\n") * 4] * kib, 0.4),
}


def test_an_event_is_immutable_and_hashable_and_parses_json():
    event = ServerSentEvent()
    assert repr(event) == "ServerSentEvent(event='message', data='', id='', retry=None)"
    assert {event, as_event(""), as_event("x")} == {event, as_event("x")}
    with pytest.raises(AttributeError):
        event.data = "x"
    assert as_event('{"a": "\\u00e4"}').json() == {"a": "ä"}
    with pytest.raises(ValueError):
        as_event("[DONE]").json()


@given(st.builds(ServerSentEvent, WORD, TEXT, WORD | st.just(""), RETRY))
def test_an_encoded_event_decodes_to_itself(event):
    assert list(iter_sse([b": ping\n\n" + event.encode()])) == [event]


def test_encode_omits_defaults_and_refuses_what_cannot_be_decoded():
    assert as_event("").encode() == b"data: \n\n"
    assert as_event("ä\n\nb").encode() == "data: ä\ndata: \ndata: b\n\n".encode()
    whole = b"id: 1\nevent: e\nretry: 0\ndata: x\n\n"
    assert as_event("x", "e", "1", 0).encode() == whole
    line_end = "^an event cannot hold a CR, or a line end in type or id$"
    unfit = "^expected a type, an id without NUL, and a retry from 0 on$"
    for words, values in (
        *((line_end, {name: f"x{end}"}) for name in ("event", "id") for end in "\n\r"),
        (line_end, {"data": "x\r"}),
        *((unfit, values) for values in ({"event": ""}, {"id": "i\0"}, {"retry": -1})),
        *(("surrogates", {name: "\ud83d"}) for name in ("event", "id", "data")),
    ):
        with pytest.raises(ValueError, match=words):
            ServerSentEvent(**values).encode()


def test_an_event_over_the_limit_raises_after_those_before_it():
    """It is 16 MiB by default, and holds for `decode`, which takes lines, too."""
    assert len(list(iter_sse([LARGEST, b"\n\n"]))) == 1
    assert len(list(iter_sse([LARGEST, b"\0\n\n"], None))) == 1
    events = iter_sse([b"data: x\n\n" + LARGEST + b"\0"])
    assert next(events) == as_event("x")
    with pytest.raises(SSEError, match=r"bytes: 'data: (\\x00){194}'"):
        next(events)
    decoder = SSEDecoder(20)
    assert decoder.decode("data: 12345678901") is None
    for line in ("äx", ""):
        with pytest.raises(SSEError, match="20 bytes: '12345678901'"):
            decoder.decode(line)


def test_half_a_surrogate_pair_in_a_line_is_replaced():
    decoder = SSEDecoder()
    assert decoder.decode("data: a\ud83d") is None
    assert re.fullmatch("a\ufffd+", decoder.decode("").data)


@pytest.mark.parametrize(("stream", "most"), LARGE.values(), ids=LARGE)
def test_decoding_takes_linear_time_and_the_memory_of_one_event(stream, most):
    """Eight times the bytes take eight times as long; 32 on a noisy machine; not 64."""

    def seconds(pieces):
        start = time.thread_time()
        assert not any(event.id for event in iter_sse(pieces, None))
        return time.thread_time() - start

    few, many, pieces = map(stream, (1024, 8 * 1024, 8 * 1024))
    assert min(seconds(many) / seconds(few) for _ in range(3)) < 32
    tracemalloc.start()
    seconds(pieces)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < most * MIB


def test_a_decoder_keeps_nothing_once_an_event_was_over_the_limit():
    decoder = SSEDecoder(5)
    with memory(8e6):
        for _ in range(64):
            with pytest.raises(SSEError):
                decoder.feed(b"x" * MIB)


# Two events, and an id and a retry without data, which are no event
NEWS = [b"id: 1\nretry: 9\ndata: 1\n\n", "id: 2\nevent: e\ndata: \u2028\n\n".encode()]
NEWS += [b"id: 3\nretry: 300\n\n"]
NEWS_EVENTS = [as_event("1", "message", "1", 9), as_event("\u2028", "e", "2")]
MINE = {"Accept": "text/plain", "X-Mine": "1", "cache-control": "max-age=1"}
MAKERS = {"dict": dict, "pairs": dict.items, "httpx.Headers": httpx.Headers}
MAKERS |= {"none": lambda mine: None}


async def events_of(connect, url, **options):
    """The source of a stream; each event, and the source's last event id then."""
    if connect is connect_sse:
        with (
            httpx.Client(trust_env=False, verify=NO_TLS) as client,
            connect(client, "POST", url, **options) as source,
        ):
            return source, [(e, source.last_event_id) for e in source.iter_sse()]
    async with (
        httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client,
        connect(client, "POST", url, **options) as source,
    ):
        return source, [(e, source.last_event_id) async for e in source.aiter_sse()]


@pytest.mark.parametrize("connect", [connect_sse, sse_chat.aconnect_sse])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_connect_sse_asks_and_gives_as_httpx_sse_does(make, connect):
    """Its last event id is that of the event given out: connecting again loses none."""
    headers, untouched = make(dict(MINE)), make(dict(MINE))
    with serve(http(*NEWS, kind="Text/Event-Stream; charset=utf-8")) as server:
        source, events = await events_of(connect, server.url, json=[1], headers=headers)
    assert events == [(event, event.id) for event in NEWS_EVENTS]
    assert isinstance(source, sse_chat.EventSource) and source.response.is_closed
    assert (source.last_event_id, source.retry) == ("3", 300)
    assert headers == untouched
    [head], [body] = server.heads, server.bodies
    assert head.startswith("POST ") and body == b"[1]"
    assert re.findall("(?im)^accept: (.*)\r$", head) == ["text/event-stream"]
    assert re.findall("(?im)^cache-control: (.*)\r$", head) == ["no-store"]
    assert ("x-mine: 1" in head.lower()) == (headers is not None)


@pytest.mark.parametrize("connect", [connect_sse, sse_chat.aconnect_sse])
async def test_an_event_source_refuses_other_types_and_large_events(connect):
    """What is no event stream; and what is over a limit, which it has if asked for."""
    with serve(http(LARGEST, b"\0\n\n")) as server:
        assert len((await events_of(connect, server.url))[1]) == 1
        with pytest.raises(SSEError):
            await events_of(connect, server.url, max_event_bytes=16 * MIB)
    for kind in ("application/json", "text/event", ""):
        refused = pytest.raises(SSEError, match=repr(kind))
        with serve(http(kind=kind)) as server, refused:
            await events_of(connect, server.url)
    source = sse_chat.EventSource(httpx.Response(200))
    assert (source.last_event_id, source.retry) == ("", None)
    with pytest.raises(SSEError, match="''"):
        next(source.iter_sse())


# ---- Chat types ----------------------------------------------------------------------

PUBLIC = {
    name: value
    for name, value in vars(sse_chat).items()
    if (inspect.isclass(value) or inspect.isfunction(value))
    and (name[0] != "_" and value.__module__ == "sse_chat")
}
ANSWER_TYPES = [ChatCompletionChunk, ChatCompletion]
CHAT_TYPES = [value for value in PUBLIC.values() if hasattr(value, "from_dict")]
CHAT_TYPES += [answer.Choice for answer in ANSWER_TYPES]
ERROR_TYPES = [APIError, *APIError.__subclasses__(), sse_chat.APITimeoutError]
SET_DEFAULTS = {"role": "assistant", "type": "function", "object": "chat.completion"}
CONSTANTS = """DEFAULT_BASE_URL DEFAULT_TIMEOUT DEFAULT_MAX_EVENT_BYTES CONNECT_TIMEOUT
MAX_RETRY_AFTER MAX_CHOICES MAX_DEPTH MAX_OBJECTS MODELS_TIMEOUT ENDING_TIMEOUT Json
Messages ChatOptions"""


def test_all_lists_the_public_names_and_annotations_resolve():
    imported = {}
    exec("from sse_chat import *", imported)
    assert imported.keys() - {"__builtins__"} == {*PUBLIC, *CONSTANTS.split()}
    for value in PUBLIC.values():
        for _, member in [("", value), *inspect.getmembers(value)]:
            member = getattr(member, "fget", member)  # of a property
            if inspect.isclass(member) or hasattr(member, "__globals__"):
                typing.get_type_hints(member)
    assert typing.get_type_hints(sse_chat.ChatOptions)
    assert inspect.iscoroutinefunction(sse_chat.AsyncChatClient.generate)


def test_help_names_every_option_and_no_other():
    """Those of ours begin a line; the fields of the request stand in one list."""
    text = inspect.getdoc(sse_chat.stream_chat)
    ours = re.findall(r"(?m)^(\w+): ", text)
    [fields] = re.findall(r"checkers know: ([^.]*)\.\n", text.replace("[DONE]", ""))
    fields = re.findall(r"\w+", re.sub(r"\([^)]*\)", "", fields))
    options = typing.get_type_hints(sse_chat.ChatOptions)
    assert sorted(ours + fields) == sorted(["messages", *options])


@pytest.mark.parametrize("model", CHAT_TYPES, ids=lambda model: model.__qualname__)
def test_from_dict_leaves_defaults_where_nothing_was_sent(model):
    hints = field_types(model)
    is_chunk = model is ChatCompletionChunk
    known = SET_DEFAULTS | ({"object": "chat.completion.chunk"} if is_chunk else {})
    for name, hint in hints.items():
        none = NoneType in typing.get_args(hint)
        empty = None if none else (typing.get_origin(hint) or hint)()
        assert getattr(model(), name) == (None if none else known.get(name, empty))
    nulls = dict.fromkeys(hints)
    assert model.from_dict({}) == model.from_dict(nulls) == model()


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
BY_TYPE = {str: WORDS, int: st.integers(0, 10**9), float: st.floats(-99, 0)}
CITATION = {"end_index": 2, "start_index": 1, "title": "t", "url": "u"}
BY_NAME = {
    "role": st.just("assistant"),
    "type": st.just("function"),
    "index": st.integers(0, 2),
    "finish_reason": st.sampled_from(["stop", "length", "tool_calls"]),
    "service_tier": st.just("default"),
    "reasoning_content": st.text("r", min_size=1),
    "function_call": st.fixed_dictionaries({"arguments": WORDS, "name": WORDS}),
    # A JSON object, as an accumulator mends arguments that are none.
    "arguments": st.sampled_from(["{}", '{"a": [1, 2]}', '{"ü": "🙂"}']),
    "annotations": st.just([{"type": "url_citation", "url_citation": CITATION}]),
    "audio": st.just({"id": "a", "data": "", "expires_at": 1, "transcript": "t"}),
    # What is no field of ours; Gemini refuses the next turn without its own.
    "extra": st.just({"google": {"signature": "c2ln", "more": [{"a": 1}, {"b": []}]}}),
    "raw": st.just({"ms": 1}),
}
BY_NAME = {name: sent.map(copy.deepcopy) for name, sent in BY_NAME.items()}
NOTHING = st.nothing()


def field_types(model):
    """The type of each field that a server sends."""
    hints = typing.get_type_hints(model)
    names = [field.name for field in dataclasses.fields(model)]
    return {name: hints[name] for name in names if name != "response_headers"}


def sent_for(hint, wrong=NOTHING, name=""):
    """What a server sends for a type, at times with `wrong` in place of a part."""
    args = typing.get_args(hint)
    right = BY_NAME.get(name, BY_TYPE.get(hint))
    if typing.get_origin(hint) is list and right is None:
        right = st.lists(sent_for(args[0], wrong), min_size=1, max_size=2)
    if right is not None:
        return right | right | right | right | right | wrong
    if args:  # it or None
        return sent_for(args[0], wrong)
    hints = field_types(hint)
    fields = {name: sent_for(kind, wrong, name) for name, kind in hints.items()}
    if "choices" in fields:
        fields |= {"object": st.just(hint().object), "timings": st.just({"ms": 1})}
    if hint in CHAT_TYPES:
        fields["extra_content"] = BY_NAME["extra"]
    optional = {k for k, v in hints.items() if NoneType in typing.get_args(v)}
    required = fields.keys() - optional | {"index", "finish_reason"} & fields.keys()
    always = {name: fields.pop(name) for name in required}
    return st.fixed_dictionaries(always, optional=fields)


def sent_as(models, wrong=NOTHING):
    """Pairs of a type and what a server sends for it."""
    return st.one_of([st.tuples(st.just(m), sent_for(m, wrong)) for m in models])


def without(value, *names):
    """Leave out what is null, or has one of the names."""

    def kept(d):
        return {k: v for k, v in d.items() if v is not None and k not in names}

    return json.loads(json.dumps(value), object_hook=kept)


@given(sent_as(ANSWER_TYPES))
def test_from_dict_keeps_every_field(answer):
    model, sent = answer
    made = model.from_dict(sent)
    assert made.raw is sent
    assert made.to_dict() == sent
    assert model.from_dict(made.to_dict()) == made


def as_openai_has_it(ours, theirs):
    """The repr of `ours` with openai's values in place of ours."""
    if isinstance(ours, list):
        return f"[{', '.join(map(as_openai_has_it, ours, theirs))}]"
    if isinstance(ours, dict):
        assert theirs.model_dump() == ours
        return repr(ours)
    if not dataclasses.is_dataclass(ours):
        return repr(theirs)
    names = [f.name for f in dataclasses.fields(ours) if hasattr(theirs, f.name)]
    pairs = [(k, as_openai_has_it(getattr(ours, k), getattr(theirs, k))) for k in names]
    kind = type(theirs).__name__.replace("FunctionToolCall", "ToolCall")
    return f"{kind}({', '.join(map('='.join, pairs))})"


def test_all_types_print_in_one_way():
    types = [value for value in vars(sse_chat).values() if isinstance(value, type)]
    ours = [each for each in types if issubclass(each, sse_chat._Model)]
    assert ChatCompletion in ours
    assert {each.__repr__ for each in ours} == {sse_chat._Model.__repr__}


@given(sent_as(ANSWER_TYPES))
def test_types_hold_and_print_the_same_as_openais(answer):
    model, sent = answer[0], without(answer[1], "extra", "extra_content", "timings")
    theirs = getattr(needs("openai.types.chat"), model.__name__).model_validate(sent)
    ours = model.from_dict(sent)
    assert repr(ours) == as_openai_has_it(ours, theirs)


def test_repr_hides_our_unset_fields_and_raw_is_not_compared():
    assert repr(sse_chat.ChoiceDelta.from_dict({"reasoning": "r", "x": 1})) == (
        "ChoiceDelta(content=None, function_call=None, refusal=None, role=None, "
        "tool_calls=None, reasoning_content='r', extra={'x': 1})"
    )
    sent = ({}, {"id": None}, {"id": "1"})
    one, two, three = map(ChatCompletionChunk.from_dict, sent)
    assert one == two != three and repr(one) == repr(two) and one.raw != two.raw


OTHER_NAMES = {"reasoning", "text", "thinking", "finishReason"}
FIELD_NAMES = OTHER_NAMES.union(*(t.__dataclass_fields__ for t in CHAT_TYPES))
SCALARS = st.sampled_from([None, True, -1, 1023, 1024, 2**64, 0.5, "", "a", "\ud83d"])
KEYS = st.sampled_from(sorted(FIELD_NAMES))
ANY_JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4)
)


def repaired(value):
    """The same with U+FFFD for each lone half of a character."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
    return json.loads(text.decode("utf-16", "replace"))


@examples(2)
@given(sent_as(CHAT_TYPES, wrong=ANY_JSON))
def test_from_dict_never_raises(answer):
    model, sent = answer
    before = copy.deepcopy(sent)
    made = model.from_dict(sent)
    back = made.to_dict()
    assert model.from_dict(back).to_dict() == repaired(back) == back
    assert isinstance(repr(made), str)
    if model in ANSWER_TYPES:
        assert isinstance(made.text, str) and isinstance(made.reasoning, str)
    if model is ChatCompletion:
        (made.text + made.reasoning).encode()
    assert sent == before


LARGE_INDICES = st.sampled_from([1024, 2**64])
ODD_CHOICES = sent_for(ChatCompletionChunk.Choice, wrong=ANY_JSON | LARGE_INDICES)


def indices_of(choice):
    """The chunk of a choice, and the indices of that and of its tool calls."""
    chunk = ChatCompletionChunk.from_dict({"choices": [choice]})
    calls = [choice.delta.tool_calls or [] for choice in chunk.choices]
    items = itertools.chain(chunk.choices, *calls)
    return chunk, {item.index or 0 for item in items}


@given(ODD_CHOICES)
def test_only_indices_make_a_chunk_invalid(choice):
    chunk, indices = indices_of(choice)
    known = max(indices) < 1024
    with contextlib.nullcontext() if known else pytest.raises(ValueError):
        completion = accumulate([chunk, chunk])
        (completion.text + completion.reasoning).encode()


def test_the_choices_of_the_test_above_hold_large_indices():
    [share] = shares(ODD_CHOICES, lambda choice: max(indices_of(choice)[1]) >= 1024)
    assert 0.05 < share < 0.8


# A delta or message; its text and its reasoning
CONTENTS = {
    "null": ({"content": None, "reasoning_content": None}, "", ""),
    "other types": ({"content": True, "reasoning": {}}, "", ""),
    "numbers": ({"content": 0.5, "reasoning": 5}, "0.5", "5"),
    "reasoning under two names": (
        {"reasoning_content": "r", "reasoning": "other"},
        "",
        "r",
    ),
    "reasoning under an empty name": (
        {"reasoning_content": "", "reasoning": "r"},
        "",
        "r",
    ),
    "reasoning under a null name": (
        {"reasoning_content": "r", "reasoning": None},
        "",
        "r",
    ),
    "empty reasoning": ({"reasoning_content": ""}, "", ""),
    "parts with text": (
        {"content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        "abc",
        "",
    ),
    "parts with a list of thoughts": (
        {"content": [{"type": "thinking", "thinking": [{"text": "r"}, {}, 1]}]},
        "",
        "r",
    ),
    "parts with a thought": (
        {"content": [{"thinking": "r"}, None, {"text": None}, 5]},
        "",
        "r",
    ),
    "text in an object": ({"content": {"text": "a"}, "reasoning": "r"}, "a", "r"),
}
# A choice, and its index and finish_reason: without an index it has its place
CHOICES = [
    ({"index": None, "finish_reason": "stop"}, (0, "stop")),
    ({"index": True, "finish_reason": ""}, (1, None)),
    ({"index": 7, "finishReason": ""}, (7, None)),
    ({"index": 0, "finish_reason": 1}, (0, None)),
    ({"finishReason": "STOP"}, (4, "STOP")),
    ({"finish_reason": None, "finishReason": "STOP"}, (5, "STOP")),
    ({"finish_reason": "stop", "finishReason": "STOP"}, (6, "stop")),
    ({"finish_reason": "\ud83d"}, (7, "\ufffd")),
    ({"index": -1, "finish_reason": "stop"}, (8, "stop")),
]


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("name", ["delta", "message"])
def test_text_and_reasoning_are_found_where_servers_put_them(name, content):
    """Some send a `message` where a `delta` is due."""
    sent, text, reasoning = content
    whole = ChatCompletion.from_dict({"choices": [{"message": sent}]})
    chunk = ChatCompletionChunk.from_dict({"choices": [{name: sent}]})
    for made in (chunk, whole, accumulate([chunk])):
        assert (made.text, made.reasoning) == (text, reasoning)
    assert chunk.choices[0].extra is whole.choices[0].extra is None
    for holder in (chunk.choices[0].delta, whole.choices[0].message):
        assert (holder.reasoning_content, holder.extra) == (reasoning or None, None)


@pytest.mark.parametrize("kind", ANSWER_TYPES)
def test_a_choice_without_index_has_that_of_its_place(kind):
    """The text of an answer is that of its first choice, the one whose index is 0."""
    sent, read = zip(*CHOICES, strict=True)
    sent = [c | {"message": {"content": f"{n}"}} for n, c in enumerate(sent)]
    made = kind.from_dict({"choices": [sent[0], "no choice", *sent[1:]]})
    assert [(c.index, c.finish_reason) for c in made.choices] == [*read]
    assert made.text == "03"
    assert kind.from_dict({"choices": [sent[2]]}).text == kind().text == ""


def test_arguments_sent_as_an_object_become_json():
    call = {"index": 0, "function": {"name": "f", "arguments": {"a": [1]}}}
    for kind in (sse_chat.ChoiceDelta, sse_chat.ChatCompletionMessage):
        made = kind.from_dict({"tool_calls": [call]})
        assert made.tool_calls[0].function.arguments == '{"a": [1]}'


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_equal_and_independent(copied):
    chunk = chunk_of({"content": "a", "tool_calls": [{"function": {}, "x": 1}]})
    values = [error("m", {"a": 1}, 400, "t", "p") for error in ERROR_TYPES]
    assert {(str(error), error.args) for error in values} == {("m", ("m",))}
    values += [as_event("d", "e", "i", 5), SSEError("m", [as_event("x")], 204)]
    assert (str(values[-1]), values[-1].args) == ("m", ("m",))
    for value in (*values, chunk, accumulate([chunk])):
        other = copied(value)
        assert (type(other), str(other)) == (type(value), str(value))
        assert getattr(other, "__dict__", other) == getattr(value, "__dict__", value)
    for value in (chunk, accumulate([chunk])):
        copied(value).choices.clear()
        assert len(value.choices) == 1
    decoder, accumulator = SSEDecoder(), ChatAccumulator()
    decoder.feed(b"id: 1\ndata: x\ndata: ")
    accumulator.add(chunk)
    others = copied(decoder), copied(accumulator)
    decoder.feed(b"z\n\n")
    accumulator.add(chunk)
    assert others[0].feed(b"y\n\n") == [as_event("x\ny", id="1")]
    assert others[1].completion == accumulate([chunk])


# ---- Accumulating --------------------------------------------------------------------

FAILURE_WORDS = """error abort aborted cancelled canceled failed network_error
insufficient_system_resource"""
CUT_ANYWHERE = {"content", "reasoning_content", "refusal", "arguments"}
IN_CHUNKS = {"message": "delta"}


def chunk_of(delta, **choice):
    return ChatCompletionChunk.from_dict({"choices": [choice | {"delta": delta}]})


def shuffled(queues, by):
    """Put lists into one, each in its own order."""
    turns = [turn for queue in queues for turn in [iter(queue)] * len(queue)]
    by.shuffle(turns)
    return [next(turn) for turn in turns]


def pieces_of(value, by, name=""):
    """Cut a part of an answer into what a server sends of it, one after another."""
    if name in ("choices", "tool_calls"):
        pieces = enumerate(pieces_of(part, by) for part in value)
        queues = [[[{"index": i} | p] for p in queue] for i, queue in pieces]
        return shuffled(queues, by)
    if isinstance(value, dict):
        pieces = [(IN_CHUNKS.get(k, k), pieces_of(v, by, k)) for k, v in value.items()]
        queues = [[{k: piece} for piece in queue] for k, queue in pieces]
        # What follows the end of a choice would open it again.
        return sorted(shuffled(queues, by), key=lambda piece: "finish_reason" in piece)
    if isinstance(value, list):
        return [[item] for item in value]
    if name not in CUT_ANYWHERE:
        return [value]
    # Between UTF-16 units: a character may come in two halves.
    pieces = cut(value.encode("utf-16-le"), {2 * by.randint(0, 8) for _ in "123"})
    return [piece.decode("utf-16-le", "surrogatepass") for piece in pieces]


@st.composite
def streams(draw):
    """An answer, and chunks that make it up: of one choice each, or of several."""
    by, whole = draw(st.randoms(use_true_random=False)), draw(sent_for(ChatCompletion))
    for index, choice in enumerate(whole["choices"]):
        choice["index"] = index
        if not choice.get("logprobs"):
            choice.pop("logprobs", None)
    pieces = pieces_of(whole["choices"], by, "choices")
    groups = cut(pieces, {by.randint(0, len(pieces)) for _ in pieces})
    head = whole | {"object": "chat.completion.chunk"}
    return whole, [head | {"choices": [*itertools.chain(*group)]} for group in groups]


def parts_of(value):
    """All that can be changed in it, by id."""
    copy.deepcopy(value, parts := {})
    return parts


@examples(0.4)
@given(streams())
def test_chunks_accumulate_to_the_whole_answer(stream):
    """A completion taken on the way shares no part that can change with later ones."""
    whole, sent = stream
    before = copy.deepcopy(sent)
    accumulator = ChatAccumulator()
    for chunk in map(ChatCompletionChunk.from_dict, sent):
        accumulator.add(chunk)
        parts = [*map(parts_of, (chunk, accumulator, accumulator.completion))]
        assert len({*itertools.chain(*parts)}) == sum(map(len, parts))
    completion = accumulator.completion
    assert completion == ChatCompletion.from_dict(whole)
    assert completion == ChatCompletion.from_dict(completion.raw)
    assert sent == before


def test_an_empty_text_replaces_nothing():
    """As Gemini's adapters send the name of a function again."""
    sent = [{"name": "f", "arguments": ""}, {"name": "", "arguments": "{}"}]
    message = accumulate(chunk_of({"function_call": call}) for call in sent)
    assert message.choices[0].message.function_call == sent[0] | sent[1] | {"name": "f"}


def test_the_kind_of_an_object_stays_as_it_came():
    for kind in ANSWER_TYPES:
        assert kind.from_dict({"object": "text_completion"}).object == "text_completion"
        assert kind.from_dict({"object": None}).object == kind().object


def test_one_tool_call_needs_no_list():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    whole = ChatCompletion.from_dict({"choices": [{"message": {"tool_calls": call}}]})
    for completion in (whole, accumulate([chunk_of({"tool_calls": call})])):
        assert shown(completion) == "a|f|{}"
    assert whole.choices[0].message.to_dict()["tool_calls"] == call
    assert (
        accumulate([chunk_of({"tool_calls": {}})]).choices[0].message.tool_calls is None
    )


def test_unknown_fields_are_merged():
    """In a message dicts and lists grow; of all else the latest stays, but null."""
    extras = [{"a": 1, "b": {"c": [1]}}, {"a": 2, "b": {"c": [2]}}, {"a": None}]
    deltas = [extra | {"tool_calls": [{"index": 0} | extra]} for extra in extras]
    sent = [{"choices": [{"delta": delta}]} | delta for delta in deltas]
    completion = accumulate(map(ChatCompletionChunk.from_dict, sent))
    message, merged = completion.choices[0].message, {"a": 2, "b": {"c": [1, 2]}}
    assert message.extra == message.tool_calls[0].extra == merged
    assert {name: completion.raw[name] for name in "ab"} == {"a": 2, "b": {"c": [2]}}


def test_the_first_id_and_ending_and_the_latest_usage_count():
    """Azure's first chunk has no head; LiteLLM gives each chunk another id.

    What follows the end of a choice, usage or a filter's verdict, has no reason.
    """
    empty = {"id": "", "created": 0, "model": "", "object": "", "choices": []}
    more = {"system_fingerprint": "f", "service_tier": "default", "obfuscation": "x"}
    sent = [empty | more, empty | {"id": "2"}, empty | {"id": "3", "created": 5}]
    for tokens, reason in enumerate(("stop", None, None)):
        choice = {"finish_reason": reason}
        sent.append({"choices": [choice], "usage": {"total_tokens": tokens}})
    sent.append({"id": "4", "created": 6, "model": "m"})
    made = accumulate(map(ChatCompletionChunk.from_dict, sent))
    head = {"id": "2", "created": 5, "model": "m", "object": "chat.completion"}
    more |= {"usage": {"total_tokens": 2}}
    assert without(made.raw, "choices") == head | without(more, "obfuscation")
    assert made.choices[0].finish_reason == "stop"


def test_an_index_that_is_set_is_written_where_none_was_sent():
    chunk = ChatCompletionChunk.from_dict({"choices": [{"delta": {}}, {"delta": {}}]})
    assert not any("index" in choice for choice in chunk.to_dict()["choices"])
    chunk.choices[1].index = 5
    assert [choice.get("index") for choice in chunk.to_dict()["choices"]] == [None, 5]


def test_the_first_role_counts():
    roles = [event(role=role) for role in ("", None, "model", "assistant")]
    [choice] = chunks_in(*roles, *HELLO).completion.choices
    assert choice.message.role == "model"


def levels(number, level=lambda inner: [inner], innermost=1):
    return functools.reduce(lambda inner, _: level(inner), range(number), innermost)


def levels_of_text(number):
    return levels(number, lambda inner: {"text": inner}, "x")


def with_calls(*calls):
    return {"choices": [{"delta": {"tool_calls": [*calls]}}]}


# How much there may be of something, and a chunk that holds so much of it
LIMITS = {
    "index of a choice": (1023, lambda n: {"choices": [{"index": n}]}),
    "index of a call": (1023, lambda n: with_calls({"index": n})),
    "choices": (1024, lambda n: {"choices": [{}] * n}),
    "calls": (1024, lambda n: with_calls(*[{}] * n)),
    "calls at an index": (
        1024,
        lambda n: with_calls(*[{"index": 0, "id": f"{i}"} for i in range(n)]),
    ),
    "levels in a delta": (100, lambda n: {"choices": [{"delta": {"x": levels(n)}}]}),
    "levels in an object": (
        99,
        lambda n: {"choices": [{"delta": {"x": {"b": levels(n)}}}]},
    ),
    "levels in an item": (
        98,
        lambda n: {"choices": [{"delta": {"x": [{"b": levels(n)}]}}]},
    ),
    "levels in an item with an index": (
        98,
        lambda n: {"choices": [{"delta": {"x": [{"index": 0, "b": levels(n)}]}}]},
    ),
    "levels in a part": (
        98,
        lambda n: {"choices": [{"delta": {"x": [{"type": "text", "b": levels(n)}]}}]},
    ),
    "levels in a text": (
        99,
        lambda n: {"choices": [{"delta": {"x": levels_of_text(n)}}]},
    ),
    "levels in a call": (100, lambda n: with_calls({"x": levels(n)})),
    "levels in logprobs": (
        97,
        lambda n: {"choices": [{"logprobs": {"content": [{"bytes": levels(n)}]}}]},
    ),
    "levels in usage": (99, lambda n: {"usage": {"x": levels(n)}}),
}
for name in ("id", "model", "created", "x"):
    LIMITS[f"levels in {name}"] = (100, lambda n, name=name: {name: levels(n)})


@pytest.mark.parametrize(("most", "sent"), LIMITS.values(), ids=LIMITS)
def test_accumulating_refuses_more_than_the_limits(most, sent):
    accumulator = ChatAccumulator()
    for chunk in ({"choices": [{"delta": {"x": {"a": 1}}}]}, sent(most)):
        accumulator.add(ChatCompletionChunk.from_dict(chunk))
    with pytest.raises(ValueError):
        accumulator.add(ChatCompletionChunk.from_dict(sent(most + 1)))
    assert accumulator.completion.to_dict()


NESTINGS = [
    lambda inner: {"a": inner},
    lambda inner: {"text": inner},
    lambda inner: [inner],
    lambda inner: [{"index": 0, "a": inner}],
    lambda inner: [{"type": "text", "text": inner}],
]


@st.composite
def nested(draw):
    """A value of some 100 levels, of one kind or of several."""
    shapes = draw(st.lists(st.sampled_from(NESTINGS), min_size=1, max_size=3))
    value = draw(st.sampled_from(["x", "", 1, None, [], {}]))
    for shape in itertools.islice(itertools.cycle(shapes), draw(st.integers(0, 110))):
        value = shape(value)
    return value


@given(st.lists(nested(), max_size=3))
def test_a_completion_can_be_taken_of_whatever_was_added(values):
    """A stream that brings too much of it ends with an error of ours."""
    accumulator, chunks = ChatAccumulator(), []
    for value in values:
        call = {"index": 0, "function": {"arguments": "", "x": value}, "x": value}
        delta = {"content": value, "reasoning": value, "x": value}
        for sent in (delta, {"tool_calls": [call]}, {"function_call": {"x": value}}):
            choice = {"index": 0, "delta": sent, "x": value, "logprobs": {"x": value}}
            chunks.append({"choices": [choice]})
    for chunk in chunks:
        with contextlib.suppress(ValueError):
            accumulator.add(ChatCompletionChunk.from_dict(chunk))
    accumulator.completion.to_dict()
    error = chunks_in(*map(sse, chunks), event(finish="stop")).error
    assert type(error) in (NoneType, Invalid)


def test_the_completion_may_be_taken_at_any_time():
    """Half a character is U+FFFD until the rest has come, and for good without it."""
    accumulator = ChatAccumulator()
    assert accumulator.completion == ChatCompletion() == accumulate([])
    taken = []
    for text in ("a", "\ud83d", "\ude42", "b\ude42"):
        call = {"index": 0, "function": {"arguments": text}}
        delta = dict.fromkeys(["content", "reasoning", "refusal"], text)
        accumulator.add(chunk_of(delta | {"tool_calls": [call]}))
        message = accumulator.completion.choices[0].message
        texts = {message.content, message.reasoning_content, message.refusal}
        taken.append(texts | {message.tool_calls[0].function.arguments})
    assert message.role == "assistant"  # which no chunk said
    assert taken == [{"a"}, {"a\ufffd"}, {"a\U0001f642"}, {"a\U0001f642b\ufffd"}]


def thought_and_said(texts):
    """What is thinking, and what is text, which comes after; no part is empty."""
    parts = list(sse_chat.split_thinking(texts))
    assert all(text for _, text in parts)
    assert parts == sorted(parts, key=lambda part: not part[0])
    return tuple("".join(t for k, t in parts if k is kind) for kind in (True, False))


def by_the_rule(text):
    """The same as one expression, for a text that is whole."""
    found = re.fullmatch(r"\s*<think>(.*?)(</think>[\r\n]*(.*))?", text, re.DOTALL)
    return (found[1], found[3] or "") if found else ("", text)


TAGS = ["<think>", "</think>", "<", "thi", "nk>", "/", "A", " ", "\n", "\r\n"]
TAGS = st.sampled_from(TAGS)


@examples(3)
@given(cuttings(st.lists(TAGS).map("".join)), st.sampled_from(["", " \n<think>"]))
@example(["<THINK> <think>a"], "")
@example(["<thinking>a</think>b"], "")
@example(["<think></ </</think>b", "\n<thi"], "")
@example(["<think>a</thi"], "")
def test_thinking_is_split_off_however_texts_are_cut(pieces, begin):
    whole = by_the_rule(begin + "".join(pieces))
    assert thought_and_said([*begin, *pieces]) == whole


def test_only_what_may_begin_a_tag_is_held_back():
    pieces = ["<think>a", "b <", "c </thi", "x <i", " </thi", "x</think>", "d <", "e"]
    texts = iter(pieces)
    parts = sse_chat.split_thinking(texts)
    thought = ["a", "b ", "<c ", "</thix <i", " ", "</thix"]
    assert [next(parts) for _ in range(6)] == [(True, text) for text in thought]
    assert next(parts) == (False, "d <")
    assert next(texts) == "e"


# ---- How an answer can end: a section for each row of the README's table -------------
#
# BODIES are bodies of answers and what their reader gets, SERVERS what a server does,
# SLOW_SERVERS what one does that takes its time. The tests of all of them, in every way
# to ask, stand after the last row.

BODIES, SERVERS, SLOW_SERVERS = {}, {}, {}


def body(error, *parts, **more):
    """The body of an answer, and what its reader gets."""
    usual = {"text": "Hello", "finish": None if error else "stop", "options": {}}
    usual["says"] = CANARY if error is APIError else ""  # as a pattern
    usual["kind"] = "text/event-stream"
    usual["if_broken"] = error  # if the connection broke as well
    made = SimpleNamespace(data=b"".join(parts), error=error, **usual | more)
    assert bool(made.says) == bool(error)
    return made


def each(form, values, row):
    """A row for each value, under a name of this form."""
    return {form.format(value): row(value) for value in values}


# What a server is asked with. Limits are short where nothing comes in time, long where
# something has to come first.
SHORT, LONG = {"timeout": 0.4}, {"timeout": 1.5}
FIRST, FIRST_LONG = {"first_token_timeout": 0.4}, {"first_token_timeout": 1.5}
ASYNC_ALONE = {"only": ASYNC}  # in sync code nothing bounds it
GENERATE, LIST = {"how": "generate"}, {"how": "models"}
EMPTY = event("", role="assistant")  # is no token; each of the following is one
TOKENS = {
    "text": event("hm"),
    "reasoning_content": event(reasoning_content="hm"),
    "reasoning": event(reasoning="hm"),
    "refusal": event(refusal="no"),
    "tool call": calls([0]),
    "function call": event(function_call={"name": "f"}),
}


# ---- every choice (all `n` of them) had a `finish_reason`, or `[DONE]` came after a
#      choice: the loop ends, `stream.complete` is True

FOREIGN = "Wörld 🙂\u2028\ufeff你"
UNICODE = [*map(event, FOREIGN)]
ESCAPED = [with_text(json.dumps(letter).strip('"').encode()) for letter in FOREIGN]
BODIES |= {
    "complete": body(None, *HELLO),
    "finish without [DONE]": body(None, *BEGUN, STOPPED),
    "[DONE] without finish": body(None, *BEGUN, DONE, finish=None),
    "[DONE] without space": body(None, *BEGUN, b"data:[DONE]\n\n", finish=None),
    "no text": body(None, event(role="assistant"), DONE, text="", finish=None),
    "white space": body(None, *(p.replace(b" {", b"  \t{", 1) for p in HELLO)),
    "data in lines": body(None, *(p.replace(b" {", b"\ndata:{", 1) for p in HELLO)),
    "half an error after [DONE]": body(None, *HELLO, b"event: error\ndata: no\n"),
    "more at the end": body(
        None, *BEGUN, STOPPED, PING, FILTER_ALONE, USAGE_ALONE, DONE
    ),
    "OpenRouter's comment": body(None, b": OPENROUTER PROCESSING\n\n", *HELLO),
    "UTF-8": body(None, *UNICODE, *ENDING, text=FOREIGN),
    "escapes": body(None, *ESCAPED, *ENDING, text=FOREIGN),
    "BOM, CRLF": body(None, UTF8_BOM, *(p.replace(b"\n", b"\r\n") for p in HELLO)),
    "tools": body(None, event("Hello", reasoning="hm"), calls([0, 0, 1]), *ENDING),
    "n=2": body(None, *BEGUN, OTHER_STOPPED, STOPPED, options={"n": 2}),
    "n=2, one begun, [DONE]": body(None, *BEGUN, DONE, finish=None, options={"n": 2}),
    "error null": body(None, *BEGUN, choices(error=None), *ENDING),
    "choice -1": body(None, *BEGUN, event(finish="stop", index=-1)),
    "choice 1023": body(None, *BEGUN, event(finish="x", index=1023), *ENDING),
    "tool call 1023": body(None, calls([1023]), *HELLO),
    "odd tool calls": body(None, calls(["x", None, 0.5, [], {}, True]), *HELLO),
    "a key twice": body(None, with_text(b'a", "content": "b'), *HELLO, text="bHello"),
    "bad UTF-8": body(None, with_text(b"\xff\xc3"), *HELLO, text="\ufffd\ufffdHello"),
    "keys of ours": body(None, event(extra=1, __class__=3), choices(raw=4), *HELLO),
}
for reason in ("stop", "length", "tool_calls", "content_filter", "STOP"):
    ending = event(finish=reason), DONE
    BODIES[f"finish_reason {reason}"] = body(None, *BEGUN, *ending, finish=reason)

GZIPPED = gzip.compress(HELLO_BYTES)
SERVERS |= {
    "a cut after [DONE]": ([chunked(*HELLO, end=False)], {}, None, "", "Hello"),
    "identity": ([encoded("identity", HELLO_BYTES)], {}, None, "", "Hello"),
    "an empty encoding": ([encoded("", HELLO_BYTES)], {}, None, "", "Hello"),
    "x-gzip": ([encoded("X-GZIP", GZIPPED)], {}, None, "", "Hello"),
}  # fmt: skip
SLOW_SERVERS |= {
    "no end after the last finish_reason": (
        [HEAD, BEGUN, STOPPED, GONE], LONG, None, "", "Hello",
    ),
    "a long answer without long silence": (
        [HEAD, BEGUN, (PING, 0.3) * 6, ENDING], LONG, None, "", "Hello",
    ),
    "the first token in time": (
        [HEAD, event(reasoning="hm"), 1.8, ENDING], FIRST_LONG, None, "", "",
    ),
}  # fmt: skip


# ---- the stream ended or broke before that, or fell silent for `timeout` once the
#      answer had begun: all that came, then `TruncatedStreamError`

HALF_STOPPED = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "st'
ERASED_ERROR = choices({"index": 0}, model="")  # Ollama's, as its /v1 shows it
CUT_OFF = {"says": "before a finish_reason"}
BODIES |= {
    "cut": body(Truncated, *BEGUN, **CUT_OFF),
    "cut in an event": body(Truncated, *BEGUN, HALF_STOPPED, **CUT_OFF),
    "two choices, one ended": body(
        Truncated, *BEGUN, event("x", index=1), OTHER_STOPPED, **CUT_OFF
    ),
    "n=2, one begun": body(
        Truncated, *BEGUN, STOPPED, finish="stop", options={"n": 2}, **CUT_OFF
    ),
    'finish_reason ""': body(Truncated, *BEGUN, event(finish=""), **CUT_OFF),
    "Ollama's erased error": body(Truncated, *BEGUN, ERASED_ERROR, **CUT_OFF),
    "JSON cut": body(Truncated, HALF_JSON, text="", **CUT_OFF),
    "JSON cut after a comment": body(Truncated, PING, HALF_JSON, text="", **CUT_OFF),
}
MANY_PINGS = gzip.compress(PING * 2**15)
READ_ALONE = httpx.Timeout(9, read=1.5)
HALF_MODELS = http(b'{"data": [{"id": "b"}, {"id', missing=5)
SERVERS |= {
    "only pings": ([encoded("gzip", MANY_PINGS)], {}, Truncated, "finish_reason", ""),
    "half a list of models": ([HALF_MODELS], LIST, Truncated, "cut off: peer", ""),
}
SLOW_SERVERS |= {
    "silence after text": ([HEAD, BEGUN, GONE], LONG, Truncated, "1.5 s", "Hello"),
    "silence after text, generate": (
        [HEAD, LO, GONE], LONG | GENERATE, Truncated, "1.5 s", "lo",
    ),
    "silence after text, httpx.Timeout": (
        [HEAD, LO, GONE], {"timeout": READ_ALONE}, Truncated, "1.5 s", "lo",
    ),
}  # fmt: skip


def raising(pieces, error):
    yield from pieces
    raise error


async def araising(pieces, error):
    for piece in pieces:
        yield piece
    raise error


async def chunks_before(pieces, error):
    """What iter_chunks and its twin make of an iterable that raises."""
    answer = await take(Sync(sse_chat.iter_chunks(raising(pieces, error))))
    twin = await take(sse_chat.aiter_chunks(araising(pieces, error)))
    assert (repr(twin.error), twin.chunks) == (repr(answer.error), answer.chunks)
    return answer


RAISED = {
    "reset": (BEGUN, ConnectionResetError("gone"), Truncated),
    "reset at once": ((), ConnectionResetError("gone"), Truncated),
    "reset after the end": ((*BEGUN, STOPPED), ConnectionResetError("gone"), NoneType),
    "timeout at once": ((), TimeoutError(), Timeout),
    "timeout after a comment": ([PING], TimeoutError(), Timeout),
    "timeout before a token": ([EMPTY], TimeoutError(), Timeout),
    "timeout after the end": ((*BEGUN, STOPPED), TimeoutError(), NoneType),
}
for name, token in TOKENS.items():
    RAISED[f"timeout after {name}"] = ([EMPTY, token], TimeoutError(), Truncated)


@pytest.mark.parametrize(("pieces", "error", "due"), RAISED.values(), ids=RAISED)
async def test_an_oserror_of_the_iterable_is_how_the_body_ended(pieces, error, due):
    answer = await chunks_before(pieces, error)
    assert type(answer.error) is due
    assert answer.completion.text == accumulate(map(chunk_in, pieces)).text
    assert due is NoneType or answer.error.__cause__ is error


def chunk_in(piece):
    [event] = iter_sse([piece]) if piece != PING else [as_event("{}")]
    return ChatCompletionChunk.from_dict(event.json())


async def test_other_errors_of_the_iterable_are_not_caught():
    async def araising():
        yield BEGUN[0]
        raise KeyError("k")

    def raising():
        yield BEGUN[0]
        raise KeyError("k")

    with pytest.raises(KeyError):
        list(sse_chat.iter_chunks(raising()))
    with pytest.raises(KeyError):
        async for _ in sse_chat.aiter_chunks(araising()):
            pass


# ---- a `finish_reason` that means failure (`error`, `abort`, `cancelled`,
#      `network_error`, …): the same; with an error beside it, `APIError`

FAILURE = {"finish_reason": "error"}
BODIES |= {
    "error beside a failure": body(APIError, *BEGUN, choices(FAILURE, **BESIDE), DONE),
    "JSON of a failure": body(
        Truncated, JSON.replace(b"stop", b"failed"), says="'failed'"
    ),
}
for reason in [*FAILURE_WORDS.split(), "ERROR", "Network_Error"]:
    failed = event(finish=reason), DONE
    BODIES[f"finish_reason {reason}"] = body(
        Truncated, *BEGUN, *failed, says=f"'{reason}'"
    )


# ---- the server reported an error in the stream, in any of their dozen shapes: all
#      that came, then `APIError`

# What servers send; the code, type, param and message in it
SHAPES = {
    "openai": (
        {"error": {"message": CANARY, "type": "t", "param": "p", "code": "c"}},
        ("c", "t", "p", CANARY),
    ),
    "object error": (
        {"object": "error", "message": CANARY, "type": "B", "code": 400},
        (400, "B", None, CANARY),
    ),
    "a message beside it": (
        {"error": {"message": CANARY}, "message": "x"},
        (None, None, None, CANARY),
    ),
    "messages": (
        {"error": {"message": [CANARY, "x"]}},
        (None, None, None, f"{CANARY}; x"),
    ),
    "a text in the message": (
        {"error": {"message": {"text": CANARY}}},
        (None, None, None, CANARY),
    ),
    "odd code and type": (
        {"error": {"message": CANARY, "code": [], "type": 5}},
        (None, None, None, CANARY),
    ),
    "a message beside a text": (
        {"status": 500, "error": "Internal Server Error", "message": CANARY},
        (None, None, None, CANARY),
    ),
    "a description beside a text": (
        {"error": "invalid_token", "error_description": CANARY},
        (None, None, None, CANARY),
    ),
    "an error in an error": (
        {"error": {"error": {"message": CANARY, "code": "c", "type": "t"}}},
        ("c", "t", None, CANARY),
    ),
    "in no known name": (
        {"error": {"info": f"模型 {CANARY}"}},
        (None, None, None, f'{{"info": "模型 {CANARY}"}}'),
    ),
}
# What only an event stream can hold
ERROR_EVENTS = {
    "event: error, details": 'event: error\ndata: {"code":400,"details":"@"}\n\n',
    "event: error, message": 'event: error\ndata: {"message":"@"}\n\n',
    "event: error, JSON string": 'event: error\ndata: "@"\n\n',
    "event: error, text": "event: error\ndata: @\n\n",
    "event: error, no spaces": 'event:error\ndata:{"error":{"message":"@"}}\n\n',
    "event: error, no blank line": "event: error\ndata: @",
    "field error, JSON": 'error: {"code":400,"message":"@"}\n\n',
    "field error, JSON string": 'error:{"error":"@"}\n\n',
    "field error, text": "error: @\n\n",
    "field error, no blank line": 'error: {"message":"@"}\n',
    "field error, no line end": 'error: {"code":400,"message":"@"}',
    "field error, text, no line end": "error: @",
}
BODIES |= {
    "error": body(APIError, *BEGUN, FAILED),
    "error, finish, [DONE]": body(APIError, *BEGUN, FAILED, *ENDING),
    "finish, error, [DONE]": body(
        APIError, *BEGUN, STOPPED, FAILED, DONE, finish="stop"
    ),
    "error without blank line": body(APIError, *BEGUN, FAILED.rstrip()),
    "error in escapes": body(APIError, *BEGUN, FAILED.replace(b"/", rb"\/"), DONE),
    "half a character": body(APIError, FAILED.replace(b"500", rb'"\ud83d"'), text=""),
    "error beside a choice": body(APIError, *BEGUN, choices({}, **BESIDE)),
    "JSON of an error": body(APIError, json.dumps(WHOLE | BESIDE).encode(), text=""),
}
for name, text in ERROR_EVENTS.items():
    BODIES[name] = body(APIError, *BEGUN, text.replace("@", CANARY).encode())
for name, (payload, _) in SHAPES.items():
    BODIES[f"error: {name}"] = body(APIError, *BEGUN, sse(payload), DONE)
    as_json = json.dumps(payload).encode()
    BODIES[f"JSON of an error: {name}"] = body(APIError, as_json, text="")
LONG_ERROR = {"error": {"details": ["x" * 80] * 99, "message": CANARY}}
BODIES |= {
    "field error, no UTF-8": body(
        APIError, *BEGUN, b"error: \xff %s\n\n" % CANARY.encode()
    ),
    "error on a line, no UTF-8": body(
        APIError, *BEGUN, b'{"error": "\xff %s"}\n\n' % CANARY.encode()
    ),
    "field error in the block of an event": body(
        APIError,
        HEL,
        LO.strip().replace(b"c-1", b"\xff"),
        b"\nerror: %s\n\n" % CANARY.encode(),
    ),
    "a long error on many lines": body(
        APIError, *BEGUN, json.dumps(LONG_ERROR, indent=1).encode(), b"\n"
    ),
}
SERVERS |= {
    "an error, kept open": ([HEAD, BEGUN, FAILED, GONE], {}, APIError, CANARY, "Hello"),
    "an error for models": ([http(b'{"error": "boom"}')], LIST, APIError, "boom", ""),
}


@pytest.mark.parametrize(("payload", "found"), SHAPES.values(), ids=SHAPES)
def test_an_error_of_any_shape_has_its_message_and_code(payload, found):
    text = json.dumps(payload)
    bodies = (text, f"data: {text}\n\n", f"event: error\ndata: {text}")
    with serve(refuse(400, body=text.encode())) as server:
        refused = ask_sync(server.url).error
    in_bodies = [chunks_in(each.encode()).error for each in bodies]
    for error in (refused, pickled(refused), *in_bodies):
        assert (error.code, error.type, error.param, error.message) == found
        assert error.body == payload
        assert error.message in str(error)
    response = pickled(refused).response
    assert (refused.status_code, response.status_code) == (400, 400)
    assert response.text == text
    assert all(word in str(refused) for word in ("400", server.url))
    assert pickled(sse_chat.generate) is sse_chat.generate  # for a pool of processes


def test_the_message_of_an_error_is_looked_for_in_few_texts():
    """Each holds the next as JSON."""
    for times in (1, 8):
        in_text = levels(times, lambda i: {"message": json.dumps(i)}, {"message": "x"})
        message = chunks_in(sse({"error": in_text})).error.message
        assert (message == "x") == (times == 1)
        assert message == "x" or message.startswith('{"message": "')


def test_the_message_of_an_error_is_looked_for_in_few_lists():
    for times, begin in ((2, "x"), (8, "[")):
        errors = levels(times, innermost={"message": "x"})
        assert chunks_in(sse({"errors": errors})).error.message.startswith(begin)


@pytest.mark.parametrize("times", [1, 3, 5, 400], ids="{} times".format)
def test_the_message_of_an_error_is_looked_for_in_few_wrappings(times):
    """What is wrapped oftener is shown as the JSON that it is, up to a length."""
    wrapped = levels(times, lambda inner: {"error": inner}, {"message": "x"})
    message = chunks_in(sse(wrapped)).error.message
    if times <= 3:
        assert message == "x"
    else:
        assert message.startswith("{") and len(message) < 1100
        assert times > 5 or json.loads(message)["message"] == "x"


# ---- silence for `timeout` before the answer began, or no token within
#      `first_token_timeout`: `APITimeoutError`

LATE, NO_TOKEN = "first_token_timeout", "waiting for the first token"
ASYNC_FIRST = FIRST | ASYNC_ALONE
SLOW_HEAD = [HALF_HEAD, [(b"x", 0.05)] * 600]
SLOW_102 = [[(b"HTTP/1.1 102\n\n", 0.05)] * 600]
SLOW_BODY = [HEAD, [(b" ", 0.05)] * 600]
SERVERS |= {
    "no token: many comments": ([HEAD, PINGS], FIRST, Timeout, LATE, ""),
}  # fmt: skip
SLOW_SERVERS |= {
    "silence": ([GONE], SHORT, Timeout, "waiting for the answer", ""),
    "silence in the head": (
        [HALF_HEAD, GONE], SHORT, Timeout, "waiting for the answer", "",
    ),
    "silence after the head": ([HEAD, GONE], LONG, Timeout, NO_TOKEN, ""),
    "silence after a comment": ([HEAD, PING, GONE], LONG, Timeout, NO_TOKEN, ""),
    "silence after no token": ([HEAD, EMPTY, GONE], LONG, Timeout, NO_TOKEN, ""),
    "silence in JSON": ([JSON_HEAD, HALF_JSON, GONE], LONG, Timeout, NO_TOKEN, ""),
    "silence at once, generate": ([HEAD, GONE], LONG | GENERATE, Timeout, NO_TOKEN, ""),
    "silence in JSON, generate": (
        [JSON_HEAD, HALF_JSON, GONE], LONG | GENERATE, Timeout, NO_TOKEN, "",
    ),
    "no token: silence": ([GONE], FIRST, Timeout, LATE, ""),
    "no token: silence after the head": ([HEAD, GONE], FIRST, Timeout, LATE, ""),
    "no token: comments": ([HEAD, ALIVE], FIRST, Timeout, LATE, ""),
    "no token: an empty one": ([HEAD, EMPTY, ALIVE], FIRST, Timeout, LATE, ""),
    "no token: a slow head": (SLOW_HEAD, ASYNC_FIRST, Timeout, LATE, ""),
    "no token: heads before the head": (SLOW_102, ASYNC_FIRST, Timeout, LATE, ""),
    "no token: a slow error": (
        [ERROR_HEAD, ALIVE], FIRST, Timeout, f"HTTP 500: .*{LATE}", "",
    ),
    "no models: silence": ([GONE], LIST | FIRST, Timeout, "0.4 s", ""),
    "no models: a slow body": (SLOW_BODY, LIST | FIRST, Timeout, "0.4 s", ""),
}  # fmt: skip


def test_the_first_stream_of_a_process_is_timed(monkeypatch):
    """And not only those after one that was read to its end."""
    timer = sse_chat._Timer()
    monkeypatch.setattr(sse_chat, "_timer_of", lambda process: timer)
    head_of_chunk = b"5;", [(b"x", 0.05)] * 160  # many reads for httpx, one for us
    with serve(play(chunked(EMPTY, end=False), head_of_chunk)) as server:
        began = time.monotonic()
        error = ask_sync(server.url, first_token_timeout=0.2).error
        assert time.monotonic() - began < 5
    assert (type(error), "0.2 s" in str(error)) == (Timeout, True)


def test_first_token_timeout_ends_retries():
    async def check(chat):
        with serve(play(after(0.05), KEEP)) as server:
            error = (await ask(chat, server.url, max_retries=10**6, **FIRST)).error
        assert type(error) in (Status, Timeout)

    in_every_mode(check)


CLOCKED = """
import threading
options = {"base_url": url, "first_token_timeout": 60}
answer = "".join(sse_chat.stream_chat("hi", **options).text())
names = [thread.daemon for thread in threading.enumerate()]
print(answer, names)
"""


def test_the_clock_of_the_first_token_keeps_no_program_alive():
    """Of its own thread: it has ended long before its minute is over."""
    with serve(play(HEAD, 0.1, *HELLO)) as server:
        assert run_program(CLOCKED, server.url) == "Hello [False, True]\n"


# ---- an event that is not JSON, or larger than `max_event_bytes` (16 MiB); `[DONE]`
#      and not one choice: all that came, then `APIResponseValidationError`

OF_999, OF_65536 = {"max_event_bytes": 999}, {"max_event_bytes": 65536}
NO_JSON = b"data: oops\0\xff\n\n"


@functools.cache
def zeros():
    """100 MB of NUL in gzip, made when it is sent first, since that takes its time."""
    packer = zlib.compressobj(1, wbits=31)
    return b"".join(packer.compress(bytes(10**6)) for _ in range(100)) + packer.flush()


def bomb(connection):
    connection.sendall(encoded("gzip", zeros()))


def bomb_of_error(connection):
    connection.sendall(refuse(400, GZIP, body=zeros()))


BODIES |= {
    "not JSON": body(Invalid, *BEGUN, NO_JSON, says=r"oops\\x00\ufffd"),
    "a long line": body(Invalid, *BEGUN, b"data:", b"x" * 999, b"\n\n", says="x{99}"),
    "no object": body(
        Invalid, *BEGUN, b"data: 17\n\n", DONE, says="JSON that is not an answer.*17"
    ),
    "too large": body(
        Invalid,
        *BEGUN,
        event("x" * 999).replace(b"c-1", b"\xff"),
        says="999.*\ufffd.*xx",
        options=OF_999,
    ),
    "JSON, large": body(
        Invalid, JSON, b" " * 999, text="", says="999.*choices", options=OF_999
    ),
    "[DONE] alone": body(Invalid, DONE, text="", says=r"\[DONE\]"),
    "[DONE] after usage": body(Invalid, USAGE_ALONE, DONE, text="", says=r"\[DONE\]"),
    "choice 1024": body(Invalid, *BEGUN, event(index=1024), DONE, says="1024"),
    "tool call 1024": body(Invalid, *BEGUN, calls([1024]), DONE, says="1024"),
}
SERVERS |= {
    "no JSON, kept open": (
        [HEAD, BEGUN, b"data: {\n\n", GONE], {}, Invalid, r"\{", "Hello",
    ),
    "data without end": ([HEAD, b"data:", MUCH], OF_65536, Invalid, "65536", ""),
    "a comment without end": ([HEAD, b":", MUCH], OF_65536, Invalid, "65536", ""),
    "JSON without end": ([HEAD, b'{"', MUCH], OF_65536, Invalid, "65536", ""),
    "an event without end": ([HEAD, LINES], OF_65536, Invalid, "65536", ""),
    "blank lines without end": ([HEAD, BLANKS], OF_65536, Invalid, "65536", ""),
    "100 MB of NUL in gzip": (
        [bomb], {}, Invalid, "16777216", "",
    ),
}  # fmt: skip


# ---- HTML, plain text or nothing, with status 200: `APIResponseValidationError`

NEITHER = {"text": "", "if_broken": Truncated}  # no event stream and no JSON
LONG_PAGE = PAGE + b"<p> </p>\n" * 80
MODEL_ALONE = sse({"id": "c", "model": "m", "choices": []})
USED_ALONE = sse({"choices": [], "usage": {"total_tokens": 5}})
BODIES |= {
    "a model, then a line": body(Truncated, MODEL_ALONE, b"hm\n", says="cut", text=""),
    "usage, then a line": body(Truncated, USED_ALONE, b"hm\n", says="cut", text=""),
    "HTML": body(Invalid, PAGE, says="Sign in", kind="text/html", **NEITHER),
    "a long page": body(
        Invalid, LONG_PAGE, says="Sign in", kind="text/html", **NEITHER
    ),
    "HTML as a stream": body(Invalid, PAGE, says="Sign in", **NEITHER),
    "text as a stream": body(Invalid, b"error code: 524\n", says="524", **NEITHER),
    "a line as a stream": body(Invalid, b"Bad Gateway", says="Bad Gat", **NEITHER),
    "text that begins as a field": body(
        Invalid, b"database is locked", says="neither", kind="text/plain", **NEITHER
    ),
    "empty": body(Invalid, says="empty", kind="text/x-empty", **NEITHER),
    "blank": body(Invalid, b"\n\n", says="empty", **NEITHER),
}
NEWLINES = gzip.compress(b"\n" * 2**22)
SERVERS |= {
    "4 MB of newlines in gzip": ([encoded("gzip", NEWLINES)], {}, Invalid, "empty", ""),
    "nothing of no kind": (
        [b"HTTP/1.1 200 OK\r\n\r\n"],
        {},
        Invalid,
        r"empty.*\(no content type\)",
        "",
    ),
    "text of no type": (
        [b"HTTP/1.1 200 OK\r\n\r\noops"],
        {},
        Invalid,
        "neither.*no content type.*oops",
        "",
    ),
    "what is no gzip": ([encoded("gzip", HELLO_BYTES)], {}, Invalid, "unpack", ""),
    "no models: HTML": ([http(PAGE)], LIST, Invalid, "Sign in", ""),
    "no models: nothing": ([http()], LIST, Invalid, "empty", ""),
    "no models: [DONE]": ([http(DONE)], LIST, Invalid, r"\[DONE\]", ""),
    "no models: a stream": ([http(*HELLO)], LIST, Invalid, "data: ", ""),
}


def test_a_whole_list_of_models_whose_connection_breaks_then_is_one(waits):
    with serve(chunked(MODELS, end=False)) as server:
        assert sse_chat.models(base_url=server.url) == ["b", "a"]


def test_a_page_without_end_is_left_soon():
    """Most of its 40 MB is never sent, but for what the buffers of sockets take."""
    sent = []

    def much(connection):
        for _ in range(4000):
            connection.sendall(b"x" * 9999)
            sent.append(1)

    with serve(play(HTML_HEAD, b"<p>", much)) as server:
        error = ask_sync(server.url).error
        assert (type(error), "<p>" in error.message) == (Invalid, True)
        assert server.left.acquire(timeout=20)
    assert len(sent) < 1500


# ---- JSON where a stream was asked, or a stream where JSON was; `message` in place of
#      `delta`: the answer

BODIES |= {
    "JSON by header": body(None, JSON, kind="application/json"),
    "JSON by first byte": body(None, JSON),
    "JSON after blank lines": body(None, b"\n", b"\r\n  \n", JSON, b"\n"),
    "JSON after a BOM": body(None, UTF8_BOM + JSON),
    "JSON, [DONE]": body(None, JSON, b"\n", DONE),
    "JSON, data:[DONE]": body(None, JSON, b"\n\ndata:[DONE]\n\n"),
    "JSON without reason": body(None, JSON.replace(b'"stop"', b"null"), finish=None),
    "JSON of one choice for n=2": body(None, JSON, options={"n": 2}),  # Ollama's
    "JSON of something else": body(Invalid, b'{"ok": true}', text="", says="true"),
    "JSON of no choice": body(
        Invalid, b'{"choices": []}', text="", says="JSON that is not an answer.*choices"
    ),
    "stream as application/json": body(None, *HELLO, kind="application/json"),
    "message for delta": body(None, choices({"message": MESSAGE}), *ENDING),
    **{
        f"a stream that begins with {line.decode()}": body(
            None,
            line,
            b"\n",
            *HELLO,
            kind="text/plain",
        )
        for line in (b": ping", b"id: 1", b"event: message", b"retry: 5")
    },
}
SERVERS |= {
    "no models: no JSON": ([http(b"{]")], LIST, Invalid, r"\{\]", ""),
    "no models: JSON without them": ([http(b'{"dat": []}')], LIST, Invalid, "dat", ""),
    "no models: large JSON": (
        [http(b'{"data": []}' + b" " * 999)], LIST | OF_999, Invalid, "999.*data", "",
    ),
}  # fmt: skip


def test_200_characters_of_a_line_that_is_no_field_are_shown():
    error = chunks_in(PING, "ä".encode() * 300).error
    assert type(error) is Invalid
    assert str(error).endswith(f"{'ä' * 200}'")


def test_json_with_a_mistake_is_shown_with_it():
    error = chunks_in(JSON.replace(b"0", b"oops")).error
    assert type(error) is Invalid
    assert re.search("not JSON.*Expecting.*oops", str(error))


def test_json_as_deep_as_python_takes_is_an_answer_or_invalid():
    for depth in range(900, 1000):
        arguments = b"[" * depth + b"]" * depth
        sent = calls([0]).replace(b'"{}"', arguments)
        assert type(chunks_in(sent, DONE).error) in (NoneType, Invalid)


async def test_models_lists_the_names(chat, waits):
    with serve(in_turn(http(MODELS), refuse(503), http(MODELS))) as server:
        options = {"base_url": f"{server.url}/chat/completions?v=1", "api_key": "sk-a"}
        assert await chat.models(**options) == ["b", "a"]
        async with chat.client(**options) as client:
            assert await client.models() == ["b", "a"]
    assert len(waits) == 1
    for head in server.heads:
        assert re.match(r"GET /v1/models\?v=1 HTTP(?s:.*)Bearer sk-a\r\n", head)
        assert re.search("(?im)^accept: application/json\r$", head)


# ---- a status from 400 up: `APIStatusError`; 408, 409, 429, 5xx and failed connections
#      are tried again first

MOVED = "Location: http://u:hush@127.0.0.1:9/x?key=hush"
AWAY = "; redirects are not followed with the key: set base_url to http://127.0.0.1:9/x"
BOOM = gzip.compress(b'{"error": "boom"}')
GZIP = "Content-Encoding: gzip"
NO_RETRY = {"max_retries": 0}
OWN = {"client": "the caller's own, which may have kept connections"}

SERVERS |= {
    "a status, kept open": ([refuse(500), KEEP], {}, Status, "boom", ""),
    "another, kept open": ([refuse(404), KEEP], {}, Status, "boom", ""),
    "an error body without end": ([ERROR_HEAD, b"boom", MUCH], {}, Status, "boom", ""),
    "an error body that is cut": (
        [http(b"boom", status="500 No", missing=1)], {}, Status, "boom", "",
    ),
    "an error page": ([refuse(400, body=PAGE * 999)], {}, Status, "Sign in", ""),
    "an empty error body": ([refuse(400, body=b"")], {}, Status, "No", ""),
    "a deep error body": ([refuse(400, body=b"[" * 10**5)], {}, Status, r"\[\[\[", ""),
    "an error body in gzip": ([refuse(400, GZIP, body=BOOM)], {}, Status, "boom", ""),
    "100 MB of error in gzip": ([bomb_of_error], {}, Status, "HTTP 400", ""),
    "an odd header": ([refuse(400, "X-Cafe: né")], {}, Status, "boom", ""),
    "an odd Retry-After": ([refuse(400, "Retry-After: ½")], {}, Status, "boom", ""),
    "401 for models": ([refuse(401)], LIST, Status, "boom", ""),
    **each("status {}", (401, 403), lambda n: (
        [refuse(n)], {}, Status, "OPENAI_API_KEY", "",
    )),
    **each("status {}", (301, 302, 303, 307, 308), lambda n: (
        [refuse(n, MOVED)], {}, Status, AWAY, "",
    )),
}  # fmt: skip
SLOW_SERVERS |= {
    "an error body that pings on": (  # which is left after _ERROR_BODY_TIMEOUT
        [ERROR_HEAD, b"boom", ALIVE], {}, Status, "boom", "",
    ),
}  # fmt: skip

NO_TIME = ("soon", "-5", "nan", "inf", "-inf", "1e999", "9" * 400)
NO_TIME += ("Mon, 99 Foo 2026", f"Mon, 01 Jan {'9' * 11} 00:00:00 GMT")
AGAIN = (408, 409, 429, 500, 502, 503, 504, 529)
BACKOFF, AT_ONCE = (0.375, 0.5), 0
TODAY, http_date = 1_700_000_000, functools.partial(formatdate, usegmt=True)
# Answers and options; the error, the requests, the first wait
ATTEMPTS = {
    **each("status {}", AGAIN, lambda n: ([refuse(n), GOOD], {}, None, 2, BACKOFF)),
    **each("status {}", (304, 307, 400, 404, 422, 499), lambda n: (
        [refuse(n, MOVED)], {}, Status, 1, None,
    )),
    "status 201": ([refuse(201)], {}, APIError, 1, None),
    "status 204": ([refuse(204)], {}, Invalid, 1, None),
    "generate": ([refuse(503)], GENERATE, Status, 3, BACKOFF),
    "no retries": ([refuse(503)], NO_RETRY, Status, 1, None),
    "one retry": ([refuse(503)], {"max_retries": 1}, Status, 2, BACKOFF),
    "seven retries": ([refuse(503)], {"max_retries": 7}, Status, 8, BACKOFF),
    # A kept connection that breaks may have been dead: the client asks again at once.
    "half a head": ([HALF_HEAD], OWN, Unreachable, 4, AT_ONCE),
    # What breaks the rules of HTTP does so again.
    "no HTTP": ([b"gibberish\r\n\r\n"], OWN, Unreachable, 1, None),
    "a head without end": (
        [play(OPEN_HEAD, b"X: ", MUCH)], OWN, Unreachable, 1, None,
    ),
    **each("Retry-After {}", (0, 0.5, 60), lambda n: (
        [after(n), GOOD], {}, None, 2, n,
    )),
    **each("Retry-After {:.16}", NO_TIME, lambda text: (
        [after(text), GOOD], {}, None, 2, BACKOFF,
    )),
    "a date": ([after(http_date(TODAY + 30)), GOOD], {}, None, 2, 30),
    "a date that is over": ([after(http_date(TODAY - 900)), GOOD], {}, None, 2, 0),
    # A wait for longer than a minute, or than there is time, is an error at once.
    "over a minute": ([after(61)], {}, Status, 1, 61),
    "a date in an hour": ([after(http_date(TODAY + 3600))], {}, Status, 1, 3600),
    "after the first token": (
        [after(50)], {"first_token_timeout": 40}, Status, 1, 50,
    ),
    "models in 30 s": ([after(50)], LIST, Status, 1, 50),
}  # fmt: skip


def good_in_the_end(answers):
    """The last comes ten times, then a whole one: asking on and on is no hang."""
    return in_turn(*answers, *[answers[-1]] * 9, GOOD)


@pytest.mark.parametrize("attempts", ATTEMPTS.values(), ids=ATTEMPTS)
async def test_failed_attempts_are_retried_after_their_waits(
    chat, waits, monkeypatch, attempts
):
    monkeypatch.setattr(time, "time", lambda: TODAY)
    answers, options, error, requests, first = attempts
    async with own_client(chat) as own:
        options = options | ({"client": own} if "client" in options else {})
        with serve(good_in_the_end(answers)) as server:
            answer = await ask(chat, server.url, **options)
    assert type(answer.error) is (error or NoneType)
    assert len(server.heads) == requests
    waited = [*filter(None, waits)]
    assert len(waited) == requests - (2 if first == AT_ONCE else 1)
    if first is BACKOFF:
        units = [wait / min(8.0, 0.5 * 2**n) for n, wait in enumerate(waited)]
        assert all(0.75 <= unit <= 1 for unit in units)
        assert len(set(units)) == len(units)  # with jitter
    elif first:
        assert (waited or [answer.error.retry_after])[0] == first


async def test_errors_say_what_to_do(chat, waits):
    """Beside the server's own message."""
    with serve(in_turn(refuse(404), refuse(404), refuse(401))) as server:
        hint = "base_url that ends in /v1"
        assert hint in str((await ask(chat, server.url.replace("/v1", "/api"))).error)
        assert hint not in str((await ask(chat, server.url)).error)
        error = (await ask(chat, server.url, api_key="sk-1234567")).error
        assert "OPENAI_API_KEY" not in str(error)
    nobody = "http://127.0.0.1:9/v1"  # the discard port
    error = (await ask(chat, nobody)).error
    assert (type(error), len(waits)) == (Unreachable, 2)
    assert all(word in str(error) for word in (nobody, "ollama serve", "base_url"))
    assert type(error.__cause__).__name__ == "ConnectError"


async def test_a_connect_timeout_is_retried(chat, waits):
    def answer(request):
        raise httpx.ConnectTimeout("")

    error = (await ask_mock(chat, answer, max_retries=1)).error
    assert (type(error), len(waits)) == (Timeout, 1)
    assert "connecting" in str(error)


# ---- you leave `with` or the loop over a stream without a name, close, cancel, or drop
#      it: the connection is closed at once, and the server stops
#
# The streams are kept: garbage collection would close those that nothing else closes.

LEAVING = ("break", "break text", "raise", "cancel", "task", "cycle")
WAITING = {"for the head": (), "for chunks": (HEAD,), "for more": (HEAD, BEGUN)}


async def leave(how, make):
    """Take the first chunk of a new stream and go; return the stream if it is kept."""
    if "break" in how:
        async for _ in make().text() if how == "break text" else make():
            return None
    stream = make()
    if how == "cycle":
        cycle = [stream, await anext(stream)]
        cycle.append(cycle)
        del stream, cycle
        return gc.collect() and None
    if how == "task":
        task = asyncio.ensure_future(take(stream))
        while not stream.completion.text:
            await anyio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with contextlib.suppress(KeyError), anyio.CancelScope() as scope:
            async with stream:
                async for _ in stream:
                    if how == "raise":
                        raise KeyError
                    scope.cancel()
    return stream


@pytest.mark.life
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of what is in a cycle
@pytest.mark.parametrize("shared", [False, True], ids=["own pool", "shared pool"])
@pytest.mark.parametrize("how", LEAVING)
async def test_leaving_a_stream_closes_its_connection(chat, anyio_backend, how, shared):
    """Over a pool of one connection, the next stream can only begin then."""
    if how in LEAVING[3 if chat is SYNC else 4 if anyio_backend[0] == "trio" else 6 :]:
        pytest.skip("sync code has no cancelling, trio no tasks, nor help for cycles")
    kept = []
    with serve(play(HEAD, ENDLESS)) as server:
        async with own_client(chat, limits=ONE) as own:
            options = {"base_url": server.url, "timeout": 20}
            options |= {"client": own} if shared else {}
            for _ in range(5):
                kept.append(await leave(how, lambda: chat.stream("hi", **options)))
                assert await has_left(server)
        assert server.connections == 5
        for stream in filter(None, kept):
            assert (set(stream.completion.text), stream.complete) == ({"x"}, False)
            with pytest.raises(Truncated):
                await anext(stream)


@pytest.mark.life
@pytest.mark.parametrize("steps", WAITING.values(), ids=WAITING)
async def test_cancelling_agenerate_closes_its_connection(steps):
    """The client has one connection, which the next call can have."""
    with serve(in_turn(play(*steps, GONE), http(JSON))) as server:
        async with own_client(ASYNC, limits=ONE) as own:
            options, answers = {"base_url": server.url, "client": own}, []

            async def one():
                answers.append(await take(sse_chat.agenerate("hi", **options)))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one)
                while not server.heads:
                    await anyio.sleep(0.01)
                await anyio.sleep(0.1)  # until what follows is waited for
                tasks.cancel_scope.cancel()
            assert await has_left(server)
            assert answers == []
            await one()
            assert answers[0].completion.text == "Hello"


@pytest.mark.life
async def test_a_stream_is_read_only_as_far_as_it_is_iterated(chat):
    with serve(GOOD) as server:
        options = {"base_url": server.url}
        unread, closed, stream = (chat.stream("hi", **options) for _ in range(3))
        async with unread:
            assert (unread.response, unread.complete) == (None, False)
            assert unread.completion.choices == []
        await closed.aclose()
        for ended in (unread, closed):
            with pytest.raises(Truncated, match="closed here"):
                await anext(ended)
        assert server.connections == 0
        async for chunk in stream:
            assert chunk.text == "Hel"
            break
        early = stream.completion  # a snapshot
        early.choices[0].message.content += "p"
        async for text in stream.text():
            assert text == "lo"
            break
        assert (await anext(stream)).choices[0].finish_reason == "stop"
        answer = await take(stream)
        assert (answer.chunks, answer.error) == ([], None)
        assert (early.text, stream.completion.text) == ("Help", "Hello")
        assert stream.response.status_code == 200
        await check_end(answer)


@pytest.mark.life
async def test_a_client_closes_only_its_own_pool(chat, waits):
    with serve(in_turn(GOOD_KEPT, GOOD_KEPT, b"")) as server:
        async with own_client(chat) as own:
            for client in (own, None):
                async with chat.client(base_url=server.url, client=client) as ours:
                    assert (await take(ours.stream("hi"))).text == "Hello"
            assert not own.is_closed
            assert await has_left(server)
            async with chat.client(base_url=server.url, client=own) as ours:
                assert type((await take(ours.stream("hi"))).error) is Unreachable
        # The connection that was kept is dead: once more at once, and two retries.
        assert len(server.heads) == 2 + 4


# ---- you close it while another thread or task waits for it: that one gets
#      `TruncatedStreamError`


@pytest.mark.life
@pytest.mark.parametrize("how", ["close", "cancel"])
@pytest.mark.parametrize("steps", WAITING.values(), ids=WAITING)
async def test_closing_and_cancelling_wake_the_reader(chat, steps, how):
    """Another thread or task closes the stream; the task is cancelled, or Ctrl-C."""
    if (chat, steps, how) == (SYNC, (), "close"):
        pytest.skip("httpx has no response yet that could be closed")
    main, scope = threading.main_thread().ident, anyio.CancelScope()
    with serve(play(*steps, 0.05, lambda _: wake(), GONE)) as server:
        stream, answer = chat.stream("hi", base_url=server.url), None
        async with anyio.from_thread.BlockingPortal() as portal:
            wake = functools.partial(signal.pthread_kill, main, signal.SIGINT)
            if how == "close" and chat is SYNC:
                wake = stream.twin.close
            elif chat is ASYNC:
                act = stream.aclose if how == "close" else scope.cancel
                wake = functools.partial(portal.call, act)
            with scope, contextlib.suppress(KeyboardInterrupt):
                answer = await take(stream)
        assert await has_left(server)
        with pytest.raises(Truncated, match="closed here before the answer was whole"):
            await anext(stream)
        assert how == "cancel" or "closed here" in str(answer.error)
        assert how == "close" or answer is None
        assert stream.completion.text == "Hello" * (BEGUN in steps)


# ---- `[DONE]` came: the connection is kept, for the next call over the same client

LATE_END = play(chunked(*HELLO, end=False), 0.05, b"5\r\n: end\r\n0\r\n\r\n", KEEP)
KEPT = {"stream": GOOD_KEPT, "JSON": play(http(JSON), KEEP), "a late end": LATE_END}
# What follows [DONE] is waited for a moment.
SERVERS |= {
    "much after [DONE]": ([HEAD, HELLO, MUCH], {}, None, "", "Hello"),
}
SLOW_SERVERS |= {
    "silence after [DONE]": ([HEAD, HELLO, GONE], {}, None, "", "Hello"),
    "comments after [DONE]": ([HEAD, HELLO, ALIVE], {}, None, "", "Hello"),
}  # fmt: skip


@pytest.mark.life
@pytest.mark.parametrize("answer", KEPT.values(), ids=KEPT)
async def test_a_connection_is_used_again_after_the_end(chat, answer):
    with serve(answer) as server:
        async with chat.client(base_url=server.url) as client:
            assert "".join([t async for t in client.stream("hi").text()]) == "Hello"
            answers = [await take(client.stream("hi")) for _ in range(3)]
        assert [(a.text, a.error) for a in answers] == [("Hello", None)] * 3
        assert server.connections == 1


def test_the_clock_of_the_first_token_stops_with_its_call():
    """Over the same connection, the next call may take longer."""

    async def check(chat):
        slow = play(HEAD, BEGUN, (PING, 0.1) * 9, ENDING)
        with serve(in_turn(GOOD_KEPT, slow)) as server:
            options = {"base_url": server.url, "first_token_timeout": 0.7}
            async with chat.client(**options) as client:
                answers = [await take(client.stream("hi")) for _ in range(2)]
            assert [(a.text, a.error) for a in answers] == [("Hello", None)] * 2
            assert server.connections == 1

    in_every_mode(check)


@pytest.mark.life
async def test_a_dead_kept_connection_is_replaced_unnoticed(chat):
    """The server promises to keep them, and closes each 1 ms after its answer."""
    with serve(play(GOOD, 0.001)) as server:
        async with chat.client(base_url=server.url, max_retries=0) as client:
            for number in range(50):
                how = client.generate if number % 3 == 0 else client.stream
                answer = await take(how("hi"))
                assert (answer.error, answer.completion.text) == (None, "Hello")
    assert server.connections == 50


# ---- all of these bodies and servers, in every way to ask ----------------------------

GOOD_ONES = {name: body for name, body in BODIES.items() if not body.error}
all_bodies = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


def check(answer, body, broken=False):
    error = body.if_broken if broken else body.error
    assert type(answer.error) is (error or NoneType), answer.error
    got = answer.completion
    assert got.text == body.text
    assert (got.choices[0].finish_reason if got.choices else None) == body.finish


async def check_end(answer):
    """A stream that has ended ends the same again, as often as it is asked."""
    stream = answer.stream
    assert (stream.complete, stream.completion) == (not answer.error, answer.completion)
    for _ in range(2):
        with pytest.raises((APIError, StopAsyncIteration)) as end:
            await anext(stream)
        assert end.value is answer.error or not answer.error
        await stream.aclose()


@all_bodies
async def test_every_body_ends_as_its_row_says(chat, body):
    """As a stream, as one in pieces, and in answer to `generate`.

    Sync code gets single bytes; its twin, whose every chunk takes longer, gets a few.
    """
    at_once = chunked(body.data, kind=body.kind)
    step = 1 if chat is SYNC else 7
    pieces = chunked(*cut(body.data, range(0, len(body.data), step)), kind=body.kind)
    with serve(in_turn(pieces, at_once)) as server:
        for how in ("stream", "stream", "generate"):
            answer = await ask(chat, server.url, how, **body.options)
            check(answer, body)
            assert json.loads(server.bodies[-1])["stream"] is (how == "stream")
            if error := answer.error:
                assert re.search(body.says, str(error))
                assert error.completion == answer.completion
                assert not re.search("x{201}", str(error))
                assert error.status_code is None
                is_page = body.data in (PAGE, LONG_PAGE)
                assert not is_page or error.body == body.data.decode()
                assert server.url in str(error)
                assert server.url not in error.message
                assert body.kind in str(error) or body.if_broken is body.error
            if how == "stream":
                assert answer.text == body.text
                await check_end(answer)
        assert len(server.heads) == 3  # an answer that has begun is not asked for again


@all_bodies
def test_every_body_ends_the_same_in_any_framing(body):
    """And without HTTP. It can be copied, and an error does not hold the key."""
    if "n" not in body.options:
        check(chunks_in(body.data, **body.options), body)
        chunks = sse_chat.aiter_chunks(as_async([body.data]), **body.options)
        check(finished(take(chunks)), body)
    framings = ("chunked", "close", "length", "gzip")
    ways = [*itertools.product(framings, (False, True))]
    with serve(in_turn(*[framed(way[0], body, way[1]) for way in ways])) as server:
        options = {"api_key": CANARY} | body.options
        answers = [ask_sync(server.url, **options) for _ in ways]
    assert len(server.heads) == len(ways)
    for answer, (_, broken) in zip(answers, ways, strict=True):
        check(answer, body, broken)
        assert answer.text == body.text
        if answer.error:
            assert CANARY not in everything(answer.error)
        made = answer.error or answer.completion
        for twin in (copy.deepcopy(made), pickled(made)):
            assert (type(twin), str(twin)) == (type(made), str(made))
            assert vars(twin) == vars(made)
        if broken and type(answer.error) is Truncated and DONE not in body.data:
            assert answer.error.__cause__ is not None


@pytest.mark.parametrize("body", GOOD_ONES.values(), ids=GOOD_ONES)
def test_an_answer_is_not_whole_before_its_end(body):
    """That is the line of its last reason, or of [DONE]."""
    last = body.data.rfind(b'_reason": "' if body.finish else b"[DONE]")
    end = re.compile(rb"[\r\n]|$").search(body.data, max(last, 0)).start()
    places = {*range(0, len(body.data), 19), *range(max(end - 40, 0), end + 9)}
    for at in sorted(places):
        begun = body.data[:at].strip(b" \r\n" + UTF8_BOM)
        error = NoneType if at >= end else Truncated if begun else Invalid
        if body.options:  # that a call alone has
            with serve(HEAD + body.data[:at]) as server:
                answer = ask_sync(server.url, **body.options)
        else:
            answer = chunks_in(body.data[:at])
        assert type(answer.error) is error, at
        assert body.text.startswith(answer.completion.text)


def datas_in(event):
    """The data of an event; its lines one by one, where it is no JSON as a whole."""
    try:
        json.loads(event.data)
    except ValueError:
        return event.data.split("\n")
    return [event.data]


def judged(body):
    """The table of endings once more, for a stream that holds nothing but choices."""
    text, reasons = "", {}
    # Beside the standard: space before all, and a line of nothing but [DONE].
    body = re.sub(rb"\A(\xef\xbb\xbf)?\s+", b"", body)
    body = re.sub(rb"(?<![^\r\n])[ \t]*(\[DONE\][ \t]*)(?![^\r\n])", rb"data: \1", body)
    ended = len(list(iter_sse([body])))  # the rest, no blank line ended
    events = enumerate(iter_sse([body, b"\n\n"]), 1)
    for number, data in ((n, data.strip()) for n, e in events for data in datas_in(e)):
        if data.startswith("[DONE]"):
            return text, NoneType if reasons else Invalid
        try:
            payload = json.loads(data or "{}")
        except ValueError:
            if number > ended:
                continue
            return text, Invalid
        if not isinstance(payload, dict):
            return text, Invalid
        choices = payload.get("choices") or []
        choices = choices if isinstance(choices, list) else []
        for place, choice in enumerate(c for c in choices if isinstance(c, dict)):
            index, delta = choice.get("index", place), choice.get("delta")
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
            if isinstance(delta, dict) and delta.get("content"):
                text += delta["content"] * (index == 0)
                reasons[index] = choice.get("finish_reason")  # text opens it again
    return text, NoneType if reasons and all(reasons.values()) else Truncated


DUE = (NoneType, Truncated, Invalid)
SENT = [choices({"index": i, "delta": {"content": "🙂"}}) for i in (0, 0, 1)]
SENT += [choices({"index": i, "finish_reason": "stop"}) for i in (0, 0, 1)]
SENT += [choices({"index": 1, "finish_reason": "x"}, {}), choices(), PING, DONE]
SENT = [*(line.strip() for line in SENT), b"id: 7", b"retry: x", b"x: {", b"x", b""]
LINE_ENDS = [b"\n\n", b"\r\n\r\n", b"\r\r"] * 3 + [b"\n", b"\r\n", b"\r"]
LINES_SENT = st.lists(st.tuples(st.sampled_from(SENT), st.sampled_from(LINE_ENDS)))
PUT = st.sampled_from([b"", b"\n\n", b'"', b"\0", b"{", b"\xff", b"9", b"\r", b" "])
HARM = st.tuples(st.integers(0, 400), st.integers(0, 2), PUT)


@st.composite
def damaged_streams(draw):
    """With comments, unknown fields, blank lines, any line ends; and damaged."""
    rest = bytearray(b"".join(map(b"".join, draw(LINES_SENT))))
    for at, length, put in draw(st.lists(HARM, max_size=2)):
        at %= len(rest) + 1
        rest[at : at + length] = put
    start = draw(st.sampled_from([b"", UTF8_BOM]))
    return start + SENT[0] + b"\n\n" + rest


@examples(2)
@given(cuttings(damaged_streams()))
@example([*BEGUN, b'data: "DON"\n\n', STOPPED])
@example([*BEGUN, b'data: "DON"'])
def test_any_stream_of_choices_ends_as_the_table_says(pieces):
    """However it is cut into pieces, too."""
    stream = b"".join(pieces)
    chunks = sse_chat.aiter_chunks(as_async(pieces))
    at_once = chunks_in(stream)
    assert (at_once.completion.text, type(at_once.error)) == judged(stream)
    for answer in (chunks_in(*pieces), finished(take(chunks))):
        assert answer.chunks == at_once.chunks
        assert repr(answer.error) == repr(at_once.error)


def test_the_streams_of_the_test_above_reach_each_end():
    def some(due):
        return lambda stream: judged(stream)[1] is due

    assert min(shares(damaged_streams(), *map(some, DUE))) > 0.02


TOO_LARGE = f"1{'0' * 30}"
ODD_JSON = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "31 digits": TOO_LARGE,
    "5000 digits": "9" * 5000,
    "long string": f'"{"x" * 100_000}"',
}
for odd in ('""', '"x"', "{}", "[]", "[null]", "[[]]", "null", "true", "0", "1.5"):
    ODD_JSON[odd] = odd
ODD_JSON |= {"NaN": "NaN", "1e999": "1e999"}
FULL_ERROR = {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}
FULL_DELTA = {"role": "assistant", "content": "c", "reasoning": "r", "refusal": "no"}
FULL_DELTA |= {"tool_calls": [CALL | {"index": 0, "type": "function", "x": {"y": []}}]}
FULL_DELTA |= {"function_call": {"name": "f", "arguments": "{}"}, "audio": {"id": "a"}}
TOKEN = {"token": "t", "bytes": [116], "logprob": -2, "top_logprobs": [{"token": "t"}]}
ENDED = {"index": 0, "finish_reason": "stop", "logprobs": {"content": [TOKEN]}}
USAGE = {"total_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}
FULL_CHUNK = WHOLE | {"usage": USAGE, "error": None}
FULL_WHOLE = FULL_CHUNK | {"choices": [ENDED | {"message": FULL_DELTA}]}
FULL_CHUNK["choices"] = [ENDED | {"delta": FULL_DELTA}]
PAYLOADS = {"chunk": FULL_CHUNK, "error": FULL_ERROR, "whole": FULL_WHOLE}


@pytest.mark.parametrize("odd", ODD_JSON.values(), ids=ODD_JSON)
@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_any_json_in_any_field_raises_nothing_unexpected(payload, odd):
    in_json, text = payload is FULL_WHOLE, json.dumps(payload)
    for found in re.finditer(r'"(\w+)": |\[(?!\])', text):  # each field and item
        _, end = json.JSONDecoder().raw_decode(text, found.end())
        sent = f"{text[: found.end()]}{odd}{text[end:]}".encode()
        answer = chunks_in(*[sent] if in_json else [b"data: %s\n\n" % sent, *HELLO])
        error = answer.error
        try:
            due = APIError if json.loads(sent).get("error") else NoneType
        except (ValueError, RecursionError):
            due = Invalid  # too deep, or more digits than Python converts
        if found[1] == "index" and odd == TOO_LARGE:
            due = Invalid
        no_message = in_json and found[1] in ("choices", "message", None)
        assert type(error) in (due, Invalid if no_message else due), (sent, error)
        assert error or in_json or answer.text.endswith("Hello")
        answer.completion.text.encode()
        if error:
            assert "".join([error.message, error.type or "", error.param or ""])
            assert isinstance(error.code, (int, str, NoneType))


async def check_server(chat, steps, options, error, says, text):
    """The client has one connection, which is free afterwards; the stream is kept."""

    def answer(*request):
        is_second = b'"second"' in server.bodies[-1]
        return (play(GOOD) if is_second else play(*steps))(*request)

    with serve(answer) as server:
        async with own_client(chat, limits=ONE, follow_redirects=True) as own:
            began = time.monotonic()
            options = {"client": own, "max_retries": 0} | options
            answer = await ask(chat, server.url, **options)
            assert time.monotonic() - began < SERVER_PATIENCE - 5
            assert type(answer.error) is (error or NoneType)
            assert bool(says) == bool(error)
            assert re.search(says, str(answer.error))
            assert len(str(answer.error)) < 1500
            assert answer.completion.text == text
            if "how" not in options:
                assert answer.text == text
                await check_end(answer)
            again = await ask(chat, server.url, client=own, model="second")
            assert (again.error, again.text) == (None, "Hello")
            # Under load a short limit may have ended the first before it was sent.
            assert len(server.heads) <= 2
    if options.get("timeout") and error:
        assert type(answer.error.__cause__).__name__ == "ReadTimeout"


@pytest.mark.parametrize("row", SERVERS.values(), ids=SERVERS)
async def test_every_end_leaves_the_connection_free(chat, row):
    with memory(80e6):
        await check_server(chat, *row)


def test_every_slow_end_leaves_the_connection_free(monkeypatch):
    assert sse_chat._ERROR_BODY_TIMEOUT == 5
    monkeypatch.setattr(sse_chat, "_ERROR_BODY_TIMEOUT", 1.5)

    async def check(chat, steps, options, *due):
        options = dict(options)
        if options.pop("only", chat) is chat:
            await check_server(chat, steps, options, *due)

    in_every_mode(check, SLOW_SERVERS)


DEFAULT = object()
PHASES = ("connect", "read", "write", "pool")
FOUR = httpx.Timeout(connect=1, read=2, write=3, pool=4)
# What `timeout` is, and the seconds to connect, to read, to write, to wait for a pool
TIMEOUTS = {
    "default": (DEFAULT, (5, 600, 600, 600)),
    "short": (3, (3, 3, 3, 3)),
    "long": (900, (5, 900, 900, 900)),
    "none": (None, (None, None, None, None)),
    "httpx.Timeout": (FOUR, (1, 2, 3, 4)),
}


@pytest.mark.parametrize(("timeout", "seconds"), TIMEOUTS.values(), ids=TIMEOUTS)
async def test_timeouts_reach_httpx(chat, timeout, seconds):
    options = {} if timeout is DEFAULT else {"timeout": timeout}
    with serve(GOOD) as server:
        answer = await take(chat.stream("hi", base_url=server.url, **options))
    sent = answer.stream.response.request.extensions["timeout"]
    assert tuple(map(sent.get, PHASES)) == seconds


async def test_any_number_of_seconds_is_a_limit(chat):
    """Also where sockets and threads would not take so many."""
    long = (math.inf, 1e10, None)
    with serve(in_turn(refuse(503, "Retry-After: 0"), GOOD)) as server:
        for timeout, first in itertools.product(long, long):
            options = {"timeout": timeout, "first_token_timeout": first}
            answer = await ask(chat, server.url, **options)
            assert (answer.error, answer.text) == (None, "Hello")


def test_the_public_limits():
    assert (sse_chat.DEFAULT_TIMEOUT, sse_chat.CONNECT_TIMEOUT) == (600, 5)
    assert (sse_chat.MODELS_TIMEOUT, sse_chat.MAX_RETRY_AFTER) == (30, 60)
    assert sse_chat.DEFAULT_MAX_EVENT_BYTES == 16 * MIB
    assert (sse_chat.MAX_CHOICES, sse_chat.MAX_DEPTH) == (1024, 100)


MANY = 3000
HUGE = range(0, 2000 * (2**61 - 1), 2**61 - 1)
ALL_AT_0 = [{"index": 0, "delta": {"content": "x"}}] * MANY
DIGITS = b"9" * 10_000_000
# The parts of a large answer, and its error
LARGE_ANSWERS = {
    "calls in a chunk": (lambda: [event(tool_calls=[CALL] * MANY)], Invalid),
    "calls in chunks": (
        lambda: [event(tool_calls=[CALL | {"id": f"{i}"}]) for i in range(MANY)],
        Invalid,
    ),
    "huge indices": (lambda: [calls([index]) for index in HUGE], Invalid),
    "indices": (lambda: [event("x", index=i) for i in range(MANY)], Invalid),
    "choices at an index": (lambda: [choices(*ALL_AT_0)], Invalid),
    "empty choices": (lambda: [choices(*[{}] * 100_000)], Invalid),
    "digits": (lambda: [with_text(b'", "x": 1.%s, "y": "' % DIGITS)], None),
    "digits of retry": (lambda: [b"retry: %s\n" % DIGITS], None),
}


@pytest.mark.parametrize(("parts", "error"), LARGE_ANSWERS.values(), ids=LARGE_ANSWERS)
def test_a_large_answer_takes_memory_as_its_size(parts, error):
    body = b"".join([*parts(), *HELLO])
    with memory(50e6 + 20 * len(body)):
        answer = chunks_in(body)
    assert type(answer.error) is (error or NoneType)
    assert len(answer.completion.choices) <= 1024
    assert error or answer.text == "Hello"


# ---- Answers of healthy servers ------------------------------------------------------

TOKENS_USED = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ONE_CALL = {"id": "a", "type": "function"}
ONE_CALL["function"] = {"name": "f", "arguments": '{"x": 1}'}


def said(delta=None, finish=None, **choice):
    """The payload of a chunk with one choice."""
    one = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"choices": [one | choice]}


def hello(**more):
    """The text that all of these answers have, in two chunks."""
    return [said({"content": text} | more) for text in ("Hel", "lo")]


def think(name):
    return [said({name: "H", "content": ""}), said({name: "m", "content": ""})]


def usage(**more):
    return {"choices": [], "usage": TOKENS_USED | more}


def sent_by(*payloads, **head):
    """The events of a server whose chunks all have this head; bytes stay as they are.

    Other values than bytes and dicts are lists of payloads.
    """
    head = {"id": "c", "created": 1, "model": "m"} | head
    head = {"object": "chat.completion.chunk"} | head
    listed = [[p] if isinstance(p, (bytes, dict)) else p for p in payloads]
    flat = itertools.chain(*listed)
    return [p if isinstance(p, bytes) else sse(head | p) for p in flat]


ROLE = {"role": "assistant"}
FILTER = {"content_filter_results": {"hate": {"filtered": False, "severity": "safe"}}}
FAILED_FILTER = {"error": {"code": "content_filter_error", "message": "not filtered"}}
SIGNED = {"extra_content": {"google": {"thought_signature": "Et8B"}}}
DETAIL = {"type": "reasoning.text", "index": 0, "format": "anthropic-claude-v1"}
TIMINGS = {"timings": {"prompt_n": 3, "predicted_per_second": 9.5}}
PROGRESS = {"prompt_progress": {"total": 9, "cache": 0, "processed": 5, "time_ms": 7}}
THINKING_PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]
SUMMARY = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm"}]}]

HEALTHY = {  # name: events; those whose name has a + think "Hm", with a ! call f
    "OpenAI": sent_by(
        said(ROLE | {"content": "", "refusal": None}, logprobs=None) | {"usage": None},
        [payload | {"obfuscation": "aB3"} for payload in hello()],
        said({}, "stop", logprobs=None) | {"service_tier": "default"},
        usage(),
    ),
    "OpenAI!": sent_by(
        said(ROLE | {"content": None, "tool_calls": [{"index": 0} | ONE_CALL]}),
        said({}, "tool_calls"),
    ),
    "Azure": sent_by(
        {"choices": [], "created": 0, "id": "", "model": "", "object": ""}
        | {"prompt_filter_results": [{"prompt_index": 0} | FILTER]},
        said(ROLE | {"content": ""}, content_filter_results={}),
        hello(),
        said({"content": ""}, content_filter_result=FAILED_FILTER),
        said({}, "stop", **FILTER),
        {"id": "", "object": "", "created": 0, "model": ""}
        | {"choices": [{"finish_reason": None, "index": 0} | FILTER]},
        usage(),
    ),
    "Ollama+": sent_by(
        think("reasoning"),
        hello(role="assistant"),
        said({}, "stop"),
        usage(),
        system_fingerprint="fp_ollama",
    ),
    "Ollama!": sent_by(
        said({"content": "", "tool_calls": [{"index": 0} | ONE_CALL]}),
        said({}, "tool_calls"),
    ),
    "vLLM+": sent_by(
        said(ROLE | {"content": ""}) | {"prompt_token_ids": None},
        think("reasoning"),
        hello(),
        said({"content": ""}, "stop", stop_reason=128009, token_ids=None),
        usage(prompt_tokens_details=None),
    ),
    "SGLang": sent_by(
        [p | {"usage": None} for p in hello(role=None, tool_calls=None)],
        said({"content": "", "tool_calls": None}, "", matched_stop=None),
        said({}, "stop", matched_stop=2),
    ),
    "llama.cpp+": sent_by(
        [said(ROLE | {"content": None}) | PROGRESS] * 2,
        b":\n\n",
        [said({"reasoning_content": text}) for text in "Hm"],
        hello(),
        said({}, "stop") | TIMINGS,
    ),
    "OpenRouter+": sent_by(
        [b": OPENROUTER PROCESSING\n\n"] * 2,
        [
            said({"reasoning": text, "reasoning_details": [DETAIL | {"text": text}]})
            for text in "Hm"
        ],
        hello(),
        said({"content": ""}, "stop", native_finish_reason="end_turn"),
        said({"content": "", "role": "assistant"}, native_finish_reason=None)
        | {"usage": TOKENS_USED | {"cost": 0.1}},
        provider="P",
    ),
    "Gemini": sent_by(
        said(ROLE | {"content": "Hel"}),
        said(ROLE | {"content": "lo"}, "stop") | {"usage": TOKENS_USED},
    ),
    "Gemini!": sent_by(
        said(ROLE | {"tool_calls": [ONE_CALL | SIGNED]}, "stop"),
        said(ROLE | SIGNED),
    ),
    "Gemini, another name": sent_by(
        hello(), {"choices": [{"index": 0, "delta": {}, "finishReason": "STOP"}]}
    ),
    "Mistral+": sent_by(
        said(ROLE | {"content": ""}),
        said({"content": THINKING_PARTS}),
        [payload | {"p": "abc"} for payload in hello()],
        said({"content": ""}, "stop") | {"usage": TOKENS_USED},
    ),
    "DeepSeek+": sent_by(
        b": keep-alive\n\n",
        said({"content": "", "reasoning_content": None}),
        said({"content": None, "reasoning_content": "Hm"}),
        hello(reasoning_content=None),
        said({"content": "", "reasoning_content": None}, "stop")
        | {"usage": TOKENS_USED | {"prompt_cache_hit_tokens": 0}},
    ),
    "DeepSeek!": sent_by(
        said({"tool_calls": [ONE_CALL | {"index": 0, "function": {"name": "f"}}]}),
        [
            said({"tool_calls": [{"index": 0, "id": "a", "function": function}]})
            for function in ({"arguments": '{"x": '}, {"arguments": "1}"})
        ],
        said({"content": ""}, "tool_calls"),
    ),
    "Groq": sent_by(
        said(ROLE | {"content": ""}) | {"x_groq": {"id": "r"}},
        hello(),
        said({}, "stop") | {"x_groq": {"id": "r", "usage": TOKENS_USED}},
    ),
    "LiteLLM": sent_by(hello(), said({}, "stop") | {"id": "another"}),
    "Kimi": sent_by(hello(), said({}, "stop", usage=TOKENS_USED)),
    "Spark": sent_by(hello(), said({}, "stop"), code=0, message="Success"),
    "MiniMax": sent_by(
        hello(), said({}, "stop"), base_resp={"status_code": 0, "status_msg": ""}
    ),
    "MiniMax+": sent_by(
        [said({"reasoning_details": [{"text": text, "index": 0}]}) for text in "Hm"],
        hello(),
        said({}, "stop"),
    ),
    "Copilot+": sent_by(
        [said({"reasoning_text": text}) for text in "Hm"],
        said({"reasoning_opaque": "c2ln"}),
        hello(),
        said({}, "stop"),
    ),
    "Databricks+": sent_by(
        said({"content": SUMMARY}),
        [said({"content": [{"type": "text", "text": t}]}) for t in ("Hel", "lo")],
        said({}, "stop"),
    ),
    "Foundry": sent_by(
        [p | {"error": None, "Successful": True} for p in hello(tool_calls=[])],
        said({}, "stop") | {"error": None},
    ),
    "watsonx": sent_by(
        said({"content": "Hel"}, "not_finished"),
        said({"content": "lo"}, "not_finished"),
        said({}, "stop"),
    ),
    "KoboldCpp": sent_by([said(ROLE | {"content": "Hello"}, "null")], said({}, "stop")),
}
ONE_ENDS = event(finish="stop", index=1)
LAST_REASON = re.compile(rb'finish_?[rR]eason": "(?!null|not_finished)[a-zA-Z_]+"')
GOOD_STREAMS = [[*events, DONE] for events in HEALTHY.values()]
GOOD_STREAMS.append([event("x", index=1), *BEGUN, ONE_ENDS, HELLO[2], DONE])


def calls_of(completion):
    """Names and parsed arguments; arguments that are no JSON stay a text."""
    made = []
    for call in completion.choices[0].message.tool_calls or []:
        arguments = call.function.arguments
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
        made.append((call.function.name, arguments))
    return made


@pytest.mark.parametrize("name", HEALTHY)
def test_answers_of_healthy_servers_stay_whole(name):
    """With [DONE] and without; and what ends before the last reason is cut off."""
    events = HEALTHY[name]
    for end in ([], [DONE], [DONE.strip()]):
        answer = chunks_in(*events, *end)
        assert answer.error is None
        got = answer.completion
        assert (got.text, answer.text) == ("" if "!" in name else "Hello",) * 2
        assert got.reasoning == ("Hm" if "+" in name else "")
        assert calls_of(got) == ([("f", {"x": 1})] if "!" in name else [])
        assert (got.id, got.model) == ("c", "m")
        has_usage = any(b"total_tokens" in event for event in events)
        assert (got.usage.total_tokens if got.usage else None) == (
            5 if has_usage else None
        )
    last = max(at for at, e in enumerate(events) if LAST_REASON.search(e))
    for at in range(1, last + 1):
        assert type(chunks_in(*events[:at]).error) is Truncated


# ---- Errors --------------------------------------------------------------------------

TOLD = "the engine is on fire"
INNER = json.dumps({"error": {"message": TOLD, "code": 5}})
PROVIDER = {"message": "Provider returned error", "code": 429}
ERROR_OBJECTS = {  # name: the object, its code
    "error": ({"error": {"message": TOLD, "type": "t", "code": "c"}}, "c"),
    "a text": ({"error": TOLD}, None),
    "in a list": ([{"error": {"code": 400, "message": TOLD}}], 400),
    "nested": ({"error": {"error": {"message": TOLD, "code": 3}}}, ...),
    "beside a choice": (said({"content": ""}) | {"error": {"message": TOLD}}, None),
    "beside no choices": ({"choices": [], "error": {"message": TOLD}}, None),
    "in a choice": (said(None, "error", error={"code": 502, "message": TOLD}), 502),
    "in a choice that goes on": (said(None, None, error={"message": TOLD}), None),
    "in a choice that stopped": (said(None, "stop", error={"message": TOLD}), None),
    "in a second choice": (
        {"choices": [{"index": 0, "delta": {}}, {"index": 1, "error": TOLD}]},
        None,
    ),
    "in x_groq": (said() | {"x_groq": {"id": "r", "error": TOLD}}, None),
    "object": ({"object": "error", "message": TOLD, "code": 400}, 400),
    "object with a detail": (
        {"object": "error", "message": {"detail": [{"msg": TOLD}]}},
        None,
    ),
    "base_resp": (
        {"choices": None, "base_resp": {"status_code": 1027, "status_msg": TOLD}},
        1027,
    ),
    "base_resp beside a choice": (
        said({"content": ""})
        | {"base_resp": {"status_code": 1039, "status_msg": TOLD}},
        1039,
    ),
    "errors": (
        {"result": None, "success": False, "errors": [{"code": 7003, "message": TOLD}]},
        7003,
    ),
    "detail": ({"detail": TOLD}, None),
    "detail as a list": ({"detail": [{"loc": ["body", 0], "msg": TOLD}]}, None),
    "error_code": ({"text": TOLD, "error_code": 50002}, 50002),
    "code": ({"code": "daily_limit", "message": TOLD}, "daily_limit"),
    "code and msg": ({"code": 500, "msg": TOLD}, 500),
    "code 300": ({"code": 300, "msg": TOLD}, 300),
    "error_type": ({"error_type": "too_long", "error_message": TOLD}, None),
    "errorMessage": ({"errorMessage": TOLD, "errorCode": "E"}, None),
    "type": ({"type": "api_error", "data": TOLD}, None),
    "event": ({"event": "error", "text": TOLD}, None),
    "status": ({"status": "failed", "message": TOLD}, None),
    "success": ({"success": False, "message": TOLD}, None),
    "status_code": ({"status_code": 429, "message": TOLD}, 429),
    "a status as a number": ({"status": 500, "message": TOLD}, None),
    "statusCode": ({"statusCode": 429, "message": TOLD}, None),
    "code and null choices": (
        {"code": 10013, "message": TOLD, "sid": "s", "choices": None},
        10013,
    ),
    "metadata": ({"error": PROVIDER | {"metadata": {"raw": TOLD}}}, 429),
    "metadata in JSON": ({"error": PROVIDER | {"metadata": {"raw": INNER}}}, 429),
}
error_objects = pytest.mark.parametrize(
    ("sent", "code"), ERROR_OBJECTS.values(), ids=ERROR_OBJECTS
)


def in_lines(payload, prefix=""):
    lines = json.dumps(payload, indent=2).splitlines()
    return "".join(f"{prefix}{line}\n" for line in lines).encode() + b"\n"


ERROR_FRAMINGS = {
    "data": sse,
    "data of several lines": lambda sent: in_lines(sent, "data: "),
    "event: error": lambda sent: b"event: error\n" + sse(sent),
    "a line": lambda sent: json.dumps(sent).encode() + b"\n\n",
    "a line, no blank one": lambda sent: json.dumps(sent).encode() + b"\n",
    "lines": in_lines,
}


@examples(2)
@given(
    st.data(),
    st.sampled_from([sent for sent, _ in ERROR_OBJECTS.values()]),
    st.sampled_from([*ERROR_FRAMINGS]),
    st.sampled_from(GOOD_STREAMS),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_an_error_anywhere_in_a_good_stream_is_told(
    data, sent, framing, events, line_end
):
    """[DONE] or what else follows never makes the answer whole."""
    at = data.draw(st.integers(0, len(events) - 1))  # [DONE] is the last
    before, rest = events[:at], events[at:]
    if data.draw(st.booleans()):
        rest = []
    stream = b"".join([*before, ERROR_FRAMINGS[framing](sent), *rest])
    stream = stream.replace(b"\n", line_end)
    answer = chunks_in(*data.draw(cuttings(st.just(stream))))
    assert type(answer.error) is APIError
    assert TOLD in answer.error.message
    assert answer.text == answer.error.completion.text == chunks_in(*before).text


@error_objects
def test_what_is_on_an_error_of_any_shape(sent, code):
    """As an event, on a line of its own, as the whole body."""
    data = json.dumps(sent).encode()
    for parts in (
        [*BEGUN, sse(sent), DONE],
        [*BEGUN, data],
        [data],
        [data, b"\n", DONE],
    ):
        error = chunks_in(*parts).error
        assert type(error) is APIError
        assert error.message == TOLD
        assert error.body == sent
        assert code is ... or error.code == code


async def test_an_error_of_any_shape_is_told_however_asked(chat):
    """With a status, as JSON in place of an answer, in a stream."""
    for sent, code in ERROR_OBJECTS.values():
        data = json.dumps(sent).encode()
        good = [http(data, kind="application/json"), http(*BEGUN, data, b"\n\n", DONE)]
        with serve(in_turn(refuse(400, body=data), *good)) as server:
            refused = (await ask(chat, server.url)).error
            whole = (await ask(chat, server.url, "generate")).error
            cut_off = (await ask(chat, server.url)).error
        assert [*map(type, (refused, whole, cut_off))] == [Status, APIError, APIError]
        for error in (refused, whole, cut_off):
            assert (error.message, error.code) == (
                TOLD,
                error.code if code is ... else code,
            )


TEXT_NAMES = """message msg detail details error_description error_message error_msg
errorMessage error errors status_msg text reason title data"""


@pytest.mark.parametrize("name", TEXT_NAMES.split())
def test_the_text_of_an_error_may_have_many_names(name):
    error = chunks_in(sse({"error": {"number": 5, name: TOLD}})).error
    assert (type(error), error.message) == (APIError, TOLD)


def test_the_innermost_code_is_that_of_the_error():
    for inner in ("error", "errors"):
        for value in ({"code": 9, "type": "t"}, [{"code": 9, "type": "t"}]):
            sent = {"error": {"message": TOLD, "code": 1, "type": "s", inner: value}}
            error = chunks_in(sse(sent)).error
            assert (error.code, error.type) == (9, "t")
    deep = {"code": 1, "error": {"code": 2, "error": {"code": 3}}}
    assert chunks_in(sse({"error": deep})).error.code == 3


def test_an_error_without_a_word_is_one():
    """Beside no choices: the server had an exception whose text is empty."""
    for empty in ({"message": ""}, {"message": None, "code": 0}, {"message": "null"}):
        answer = chunks_in(*BEGUN, sse({"error": empty}), DONE)
        assert (type(answer.error), answer.error.body) == (APIError, {"error": empty})


def test_an_error_in_a_whole_answer_is_told():
    [choice] = WHOLE["choices"]
    for more, inner in (({"error": TOLD}, {}), ({}, {"error": {"message": TOLD}})):
        whole = WHOLE | more | {"choices": [choice | inner]}
        answer = chunks_in(json.dumps(whole).encode())
        assert (type(answer.error), answer.error.message) == (APIError, TOLD)


EMPTY_ERROR = {"message": "", "type": "", "param": None, "code": 0}  # Apertis
NO_ERROR_BESIDE_A_CHOICE = [
    *({"error": none} for none in (None, "", [], {}, 0, False, EMPTY_ERROR)),
    {"error": {"code": 200, "message": "OK"}},
    {"code": 5, "message": "m"},
    {"detail": "d"},
    {"errors": ["e"]},
    {"error_code": 7, "text": "t"},
    {"x_groq": {"id": "r", "error": None}},
]
NO_CODES = (None, [], 0, "0", 200, "200", 201, "204", "ok", "OK", "success", "Success")
NO_CODES += ("none", "null", "false")
NO_ERROR = [
    *({"code": code, "message": "m"} for code in NO_CODES),
    *({"error_code": code, "text": "t"} for code in NO_CODES),
    *({"base_resp": {"status_code": code, "status_msg": "m"}} for code in NO_CODES),
    *({name: none} for name in ("errors", "detail") for none in (None, [], "")),
    *(
        {name: "m"}
        for name in ("message", "msg", "status", "type", "event", "erroneous")
    ),
    {"success": True, "status": "in_progress", "message": "m"},
    {"status": 200, "message": "m"},
]


@pytest.mark.parametrize("more", NO_ERROR_BESIDE_A_CHOICE + NO_ERROR, ids=as_words)
def test_what_is_no_error(more):
    """Beside a choice; on an event of its own, if it has no choice beside it."""
    chunks = [json.loads(event[6:]) | more for event in HELLO[:3]]
    streams = [[*map(sse, chunks), DONE]]
    if more in NO_ERROR:
        streams += [[*HELLO[:at], sse(more), *HELLO[at:]] for at in range(4)]
    for stream in streams:
        answer = chunks_in(*stream)
        assert (answer.error, answer.text) == (None, "Hello")


@pytest.mark.parametrize(
    "choice",
    [
        {"error": None},
        {"error": {}},
        {"content_filter_result": FAILED_FILTER},
        {"delta": {"content": '{"error": "x"}'}},
        {"delta": {"content": "", "x": {"error": "x"}}},
        {"delta": {"tool_calls": [{"function": {"arguments": {"error": "x"}}}]}},
    ],
    ids=as_words,
)
def test_what_is_no_error_in_a_choice(choice):
    answer = chunks_in(sse(said(**choice)), *HELLO)
    assert answer.error is None
    assert answer.text.endswith("Hello")


def page(title):
    head = f"<!DOCTYPE html>\n<html><head><title>{title}</title></head>\n"
    return f"{head}<body>{'<p>x</p>' * 99}</body></html>"


TITLE = "example.com | 520: unknown error"
MESSAGES = {  # what a server sent, and what tells most in it
    "raw": ({"error": PROVIDER | {"metadata": {"raw": TOLD}}}, TOLD),
    "a list in a text": ({"error": {"message": json.dumps([{"msg": TOLD}])}}, TOLD),
    "a number in a text": ({"error": {"message": "1e5"}}, "1e5"),
    "raw JSON": (
        {"error": PROVIDER | {"metadata": {"raw": INNER, "provider_name": "P"}}},
        TOLD,
    ),
    "empty raw": (
        {"error": PROVIDER | {"metadata": {"raw": ""}}},
        PROVIDER["message"],
    ),
    "no metadata": ({"error": PROVIDER | {"metadata": None}}, PROVIDER["message"]),
    "twice": ({"error": {"message": TOLD}, "message": TOLD}, TOLD),
    "beside success": (
        {"success": False, "error": {"code": "E", "message": TOLD}},
        TOLD,
    ),
    "a page in JSON": ({"error": {"message": page(TITLE)}}, TITLE),
    "a page": (page(TITLE), TITLE),
    "a page with a long title": (page("x" * 300), re.compile("x{100,199}.{0,3}")),
    "blanks": ({"error": {"message": " "}}, "(no message)"),
    "no UTF-8": ("\udcff oh", "\ufffd oh"),
    "a page as long as can be": ("<p>" + "x" * 200, "x" * 200),
    "a longer page": ("<p>" + "x" * 201, "x" * 198 + " …"),
    "a page spaced out": ("<p>" + "x   " * 190, "x " * 99 + " …"),
}


@pytest.mark.parametrize(("sent", "due"), MESSAGES.values(), ids=MESSAGES)
def test_the_most_telling_text_is_the_message(sent, due):
    text = sent if isinstance(sent, str) else json.dumps(sent)
    data = text.encode("utf-8", "surrogateescape")
    with serve(refuse(520, body=data)) as server:
        error = ask_sync(server.url, max_retries=0).error
    assert type(error) is Status
    assert len(error.message) <= 200
    assert re.fullmatch(re.escape(due) if isinstance(due, str) else due, error.message)


@pytest.mark.parametrize("indent", [0, 150], ids="{} indented lines".format)
def test_a_page_without_a_title_is_told_by_its_text(indent):
    start = b"<html>" + b"\n        " * indent
    page = start + b"<body><h1>Bad</h1> <b>gateway</b></body></html>"
    with serve(http(page, status="404 No", kind="text/html")) as server:
        assert ask_sync(server.url).error.message == "Bad gateway"


def test_the_text_of_many_errors_has_a_limit():
    many = [[{"message": "word " * 300}] * 10] * 10
    assert len(chunks_in(sse({"errors": many})).error.message) <= 1000
    short = [{"message": f"fault {number}"} for number in range(30)]
    assert chunks_in(sse({"errors": short})).error.message.count("fault") == 10


@pytest.mark.parametrize("path", ["/v1", "/api", "/api/v1"])
def test_a_404_says_what_most_base_urls_end_in(path):
    with serve(refuse(404)) as server:
        error = ask_sync(server.url.replace("/v1", path)).error
    advice = "most servers want a base_url that ends in /v1"
    assert error.advice == ("" if "/v1" in path else advice)


def test_the_body_of_an_error_is_kept_up_to_some_64_kib():
    for size in (65_000, 999_000):
        with serve(refuse(400, body=b"x" * size)) as server:
            error = ask_sync(server.url).error
        assert min(size, 65_536) <= len(error.body) < 200_000


def test_an_error_without_a_body_has_none():
    with serve(http(status="404 Not Here")) as server:
        error = ask_sync(server.url).error
    assert (error.message, error.body, error.response.content) == (
        "Not Here",
        None,
        b"",
    )


def test_the_response_of_an_error_has_no_header_of_its_framing():
    """Its body is there, unpacked and in one piece."""
    packed = gzip.compress(BOOM_JSON)
    headers = "X-Request-Id: r-1\r\nContent-Encoding: gzip\r\n"
    answer = http(packed, status="400 No", headers=headers)
    in_chunks = b"HTTP/1.1 400 No\r\nX-Request-Id: r-1\r\n"
    in_chunks += b"Transfer-Encoding: chunked\r\n\r\n"
    in_chunks += b"%x\r\n%b\r\n0\r\n\r\n" % (len(BOOM_JSON), BOOM_JSON)
    for sent in (answer, in_chunks):
        with serve(sent) as server:
            response = ask_sync(server.url).error.response
        assert response.json() == json.loads(BOOM_JSON)
        assert not {"content-encoding", "transfer-encoding"} & set(response.headers)
        assert response.headers["content-length"] == str(len(BOOM_JSON))
        assert response.headers["x-request-id"] == "r-1"


def test_the_body_of_an_error_is_utf8_whatever_its_charset():
    kind = "text/plain; charset=iso-8859-1"
    with serve(http("é".encode(), status="400 No", kind=kind)) as server:
        assert ask_sync(server.url).error.response.text == "é"


@pytest.mark.parametrize("indent", [None, 1, 2])
@pytest.mark.parametrize("end", ["}]", "}\n]"], ids=["on one line", "on two"])
def test_a_list_of_an_error_on_lines_of_its_own_is_an_error(indent, end):
    text = f"[{json.dumps({'error': {'message': TOLD}}, indent=indent)[:-1]}{end}\n"
    for before in (BEGUN, [*BEGUN, STOPPED]):
        error = chunks_in(*before, text.encode()).error
        assert (type(error), error.message) == (APIError, TOLD)


# ---- Ends ----------------------------------------------------------------------------

FAILURE_STEMS = """error fail abort cancel timeout malformed interrupt network
unavailable overload insufficient unexpected exception incomplete disconnect connection
killed preempt"""
FAILURES = """error ERROR abort aborted cancelled canceled failed network_error
network-error connection_error timeout Timeout ERROR_LIMIT ERROR_TOXIC USER_CANCEL
MALFORMED_FUNCTION_CALL insufficient_system_resource engine_overloaded interrupted
service-unavailable errors UNEXPECTED_TOOL_CALL TOO_MANY_TOOL_CALLS incomplete
connection_lost engine_killed"""
LENGTHS = """length LENGTH max_tokens MAX_TOKENS max-tokens max_output_tokens
model_context_window_exceeded context_window"""
FILTER_ENDS = """content_filter CONTENT_FILTER content-filter SAFETY RECITATION
sensitive blocklist BLOCKLIST PROHIBITED_CONTENT"""
LIMIT_ENDS = dict.fromkeys(["max tokens", *LENGTHS.split()], "length")
LIMIT_ENDS |= dict.fromkeys(["Content Filter", *FILTER_ENDS.split()], "content_filter")
GOOD_ENDS = "stop STOP tool_calls function_call eos end_turn stop_sequence completed"
NO_ENDS = ["", "null", "NULL", "none", None]


def ended_with(reason):
    """A stream that ends so, the same with [DONE], a JSON answer that ends so."""
    [choice] = WHOLE["choices"]
    whole = WHOLE | {"choices": [choice | {"finish_reason": reason}]}
    stream = [*BEGUN, event(finish=reason)]
    bodies = (stream, [*stream, DONE], [json.dumps(whole).encode()])
    return [chunks_in(*body) for body in bodies]


def check_failure(reason):
    for answer in ended_with(reason):
        assert type(answer.error) is Truncated
        assert reason in str(answer.error)
        assert answer.completion.text == "Hello"
        assert answer.completion.choices[0].finish_reason is None


@pytest.mark.parametrize(
    "reason", ["network error", "Request timeout", *FAILURES.split()]
)
def test_words_for_a_failure(reason):
    check_failure(reason)


@pytest.mark.parametrize("done", [[], [DONE]], ids=["no end", "[DONE]"])
def test_a_failure_beside_a_good_reason_is_one(done):
    """OpenRouter has the model's own word there, and "stop" for all that it knows."""
    for reason, error in (("MALFORMED_FUNCTION_CALL", Truncated), ("STOP", NoneType)):
        end = said({}, "stop", native_finish_reason=reason)
        answer = chunks_in(*BEGUN, sse(end), *done)
        assert (type(answer.error), answer.text) == (error, "Hello")
        assert error is NoneType or reason in str(answer.error)
        ended = None if error is Truncated else "stop"
        assert answer.completion.choices[0].finish_reason == ended


def test_a_reason_may_be_an_object():
    """As SGLang has it inside."""
    for kind, error in (("abort", Truncated), ("length", NoneType)):
        answer = chunks_in(*BEGUN, sse(said({}, {"type": kind, "length": 9})))
        assert (type(answer.error), answer.text) == (error, "Hello")
        assert error is Truncated or answer.completion.limit == "length"


AROUND = st.sampled_from(["", "x", "stop", "length", "content_filter", "max-tokens"])
WORD_BREAKS = st.sampled_from(["", "_", "-", " "])


@given(
    st.sampled_from(FAILURE_STEMS.split()),
    AROUND,
    WORD_BREAKS,
    AROUND,
    st.integers(0, 2**12),
)
def test_a_word_that_contains_one_for_a_failure_is_one(stem, before, by, after, case):
    """Failure words win over limits; case and what parts the words do not matter."""
    word = f"{before}{by}{stem}{by}{after}"
    letters = [c.upper() if case >> n % 12 & 1 else c for n, c in enumerate(word)]
    check_failure("".join(letters))


@pytest.mark.parametrize("reason", [*LIMIT_ENDS, *GOOD_ENDS.split()])
def test_words_for_a_good_end_and_for_limits(reason):
    """The word stays as it came; `limit` says what stopped the answer, if a limit."""
    for answer in ended_with(reason):
        assert (answer.error, answer.completion.text) == (None, "Hello")
        assert answer.completion.choices[0].finish_reason == reason
        assert answer.completion.limit == LIMIT_ENDS.get(reason, "")


def test_the_limit_is_that_of_the_first_choice_with_one():
    assert ChatCompletion().limit == ""
    for reasons in (("stop", "length"), ("length", "stop"), ("ERROR_LIMIT", "length")):
        sent = [{"index": n, "finish_reason": r} for n, r in enumerate(reasons)]
        assert ChatCompletion.from_dict({"choices": sent}).limit == "length"
    failed = {"choices": [{"finish_reason": "ERROR_MAX_TOKENS"}]}
    assert ChatCompletion.from_dict(failed).limit == ""


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_each_token_opens_an_ended_choice_again(token):
    answer = chunks_in(*BEGUN, STOPPED, token)
    assert type(answer.error) is Truncated
    assert chunks_in(*BEGUN, STOPPED, EMPTY).error is None


@pytest.mark.parametrize("reason", NO_ENDS)
def test_words_that_are_no_end(reason):
    cut_off, done, _ = ended_with(reason)
    assert (type(cut_off.error), done.error) == (Truncated, None)
    for answer in (cut_off, done):
        assert answer.completion.choices[0].finish_reason is None
    each = [event("Hel", reason), event("lo", reason), *HELLO[2:]]
    answer = chunks_in(*each)
    assert (answer.error, answer.text) == (None, "Hello")
    assert answer.completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("reason", ["not_finished", "NOT-FINISHED", "unfinished"])
def test_not_finished_is_no_end_while_more_comes_and_a_failure_as_the_last_word(reason):
    each = [event("Hel", reason), event("lo", reason)]
    for end in ([event(finish="stop")], [event(finish="stop"), DONE]):
        answer = chunks_in(*each, *end)
        assert (answer.error, answer.text) == (None, "Hello")
        assert answer.completion.choices[0].finish_reason == "stop"
    for end in ([], [DONE], [USAGE_ALONE, DONE]):
        answer = chunks_in(*each, *end)
        assert (type(answer.error), answer.text) == (Truncated, "Hello")
        assert answer.completion.choices[0].finish_reason is None


AT_0 = {"index": 0}
REOPENING = [
    {"content": "!"},
    {"content": [{"type": "text", "text": "!"}]},
    {"reasoning": "!"},
    {"reasoning_content": "!"},
    {"reasoning_text": "!"},
    {"refusal": "!"},
    {"tool_calls": [AT_0 | {"function": {"name": "f"}}]},
    {"tool_calls": [AT_0 | {"function": {"arguments": "{"}}]},
]
NOT_REOPENING = [
    {},
    None,
    {"content": ""},
    {"content": None, "role": "assistant"},
    {"content": []},
    {"reasoning": "", "reasoning_content": None, "refusal": ""},
    {"tool_calls": []},
    {"tool_calls": [AT_0 | {"id": "", "function": {"name": "", "arguments": ""}}]},
    {"tool_calls": [AT_0 | {"function": None}]},
    SIGNED,
    {"annotations": [{"type": "url_citation"}]},
]


@pytest.mark.parametrize("delta", REOPENING, ids=as_words)
@pytest.mark.parametrize("index", [0, 1])
def test_what_a_choice_says_after_its_end_opens_it_again(delta, index):
    """A cut after it is a cut; another finish_reason or [DONE] ends it."""
    ended = [event("Hi", "stop", n) for n in range(index + 1)]
    again = sse({"choices": [{"index": index, "delta": delta}]})
    assert chunks_in(*ended).error is None
    cut_off = chunks_in(*ended, again)
    assert type(cut_off.error) is Truncated
    assert cut_off.completion.choices[index].finish_reason is None
    for end in ([event(finish="length", index=index)], [DONE]):
        assert chunks_in(*ended, again, *end).error is None
    ended_again = chunks_in(*ended, again, event(finish="length", index=index))
    assert ended_again.completion.choices[index].finish_reason == "length"


@pytest.mark.parametrize("delta", NOT_REOPENING, ids=as_words)
def test_what_says_nothing_opens_no_choice_again(delta):
    token = {"token": "t", "bytes": [116], "logprob": -1, "top_logprobs": []}
    others = [{}, {"logprobs": {"content": [token]}}, FILTER, {"usage": TOKENS_USED}]
    for other in others:
        more = [said(delta, None, **other), said(delta, "", **other) | usage()]
        more[0]["choices"][0]["delta"] = delta  # null, too
        for payload in (*more, {"choices": []}, usage()):
            answer = chunks_in(*HELLO[:3], sse(payload))
            assert answer.error is None
            assert answer.completion.choices[0].finish_reason == "stop"


def test_a_whole_message_after_the_end_does_not_open_the_choice_again():
    repeated = [
        *BEGUN,
        STOPPED,
        message_event({"role": "assistant", "content": "Hello"}),
    ]
    for end in ([], [DONE]):
        answer = chunks_in(*repeated, *end)
        assert (answer.error, answer.text) == (None, "Hello")
        assert answer.completion.choices[0].finish_reason == "stop"
    more = chunks_in(*BEGUN, STOPPED, message_event({"content": "Hello!"}))
    assert (type(more.error), more.text) == (Truncated, "Hello!")


# ---- After the last finish_reason ----------------------------------------------------


BEATING = (PING, 0.05) * 120
ALL_ENDED = (HEAD, HELLO[:3])
IN_TIME, LATER = ((0.3, FILTER_ALONE) * 3, USAGE_ALONE), (0.1, PING, USAGE_ALONE)
ENDED_AGAIN = (event("!"), (PING, 0.05) * 20, event(finish="stop"), DONE)
ONE_LATER = ((PING, 0.05) * 20, ONE_ENDS, DONE)
BRIEF_WAIT, LONG_WAIT = {"timeout": 0.8}, {"timeout": 20}
THINKING = event(reasoning="hm", finish="stop")
NO_ANSWER = event(role="assistant", finish="stop")
THINKING_IN_DETAILS = event(reasoning_details=[{"text": "hm"}], finish="stop")
AT_A_LIMIT = (event(reasoning="hm"), event(finish="length"))
# What a server does, options; the text, its tokens, the least and most seconds.
WAITS = {
    "heartbeats": ((*ALL_ENDED, BEATING), BRIEF_WAIT, "Hello", None, 0.8, 5),
    "silence": ((*ALL_ENDED, GONE), BRIEF_WAIT, "Hello", None, 0.8, 5),
    "usage, silence": ((*ALL_ENDED, LATER, GONE), BRIEF_WAIT, "Hello", 2, 0.8, 5),
    "each event renews it": (
        (*ALL_ENDED, IN_TIME, BEATING), BRIEF_WAIT, "Hello", 2, 1.6, 5,
    ),
    "generate": (
        (*ALL_ENDED, BEATING), BRIEF_WAIT | GENERATE, "Hello", None, 0.8, 5,
    ),
    "a long timeout": ((*ALL_ENDED, BEATING), LONG_WAIT, "Hello", None, 1.2, 5),
    # "stop" may come with a role or with reasoning: before the answer it ends nothing.
    "no answer yet": ((HEAD, THINKING, 1.5, HELLO), LONG_WAIT, "Hello", None, 1.5, 5),
    "details and no answer yet": (
        (HEAD, THINKING_IN_DETAILS, 1.5, HELLO), LONG_WAIT, "Hello", None, 1.5, 5,
    ),
    "a role and no answer yet": (
        (HEAD, NO_ANSWER, 1.5, HELLO), LONG_WAIT, "Hello", None, 1.5, 5,
    ),
    "no answer comes": ((HEAD, THINKING, BEATING), BRIEF_WAIT, "", None, 0.8, 5),
    "thinking at a limit": (
        (HEAD, *AT_A_LIMIT, BEATING), LONG_WAIT, "", None, 1.2, 5,
    ),
    # While a choice goes on, heartbeats are waited for.
    "opened again": ((*ALL_ENDED, ENDED_AGAIN), BRIEF_WAIT, "Hello!", None, 1, 5),
    "one of two ended": (
        (*ALL_ENDED, *ONE_LATER), BRIEF_WAIT | {"n": 2}, "Hello", None, 1, 5,
    ),
}  # fmt: skip


def test_the_wait_after_the_last_end_is_bounded(monkeypatch):
    """By 5 s or `timeout`, from the last event on: heartbeats are none."""
    assert sse_chat.ENDING_TIMEOUT == 5
    monkeypatch.setattr(sse_chat, "ENDING_TIMEOUT", 1.2)

    async def check(chat, steps, options, text, tokens, least, most):
        with serve(play(*steps)) as server:
            began = time.monotonic()
            answer = await ask(chat, server.url, **options)
            seconds = time.monotonic() - began
        assert (answer.error, answer.completion.text) == (None, text)
        usage = answer.completion.usage
        assert (usage.total_tokens if usage else None) == tokens
        assert least - 0.05 <= seconds < most

    in_every_mode(check, WAITS)


# ---- Tool calls ----------------------------------------------------------------------


def piece(index=None, id=None, name=None, arguments=None, unset=...):
    """A piece of a call; a field that is None is left out, or set to `unset`."""

    def with_unset(fields):
        fields = {k: unset if v is None else v for k, v in fields.items()}
        return {k: v for k, v in fields.items() if v is not ...}

    function = with_unset({"name": name, "arguments": arguments})
    return with_unset({"index": index, "id": id, "function": function})


def pieces_in(text, unset=...):
    """The chunks of a stream; in each pieces joined by +: index|id|name|arguments."""
    for chunk in text.split(" "):
        parts = [part.split("|") for part in chunk.split("+")]
        yield [
            piece(int(index) if index else None, *[t or None for t in rest], unset)
            for index, *rest in parts
        ]


# Row by row of the table in which a piece is joined to its call
TOOL_CALL_ROWS = {
    "the call of its id at its index": (
        '0|a|f|{"x": 0|b|g|{"y": 0|a||1} 0|b||2}',
        'a|f|{"x":1} b|g|{"y":2}',
    ),
    "the latest call at its index": (
        '0|a|f|{} 0|b|g|{"y": 1|c|h|{} 0|||2}',
        'a|f|{} b|g|{"y":2} c|h|{}',
    ),
    "calls in the order of their indices": ("1|b|g|{} 0|a|f|{}", "a|f|{} b|g|{}"),
    "a negative index is none": ('-1|a|f| -1|||{"x": -1|||1}', 'a|f|{"x":1}'),
    "a negative index after another": (
        '0|a|f|{"x":0} 1|b|g|{"y": -1|||1 -2|||}',
        'a|f|{"x":0} b|g|{"y":1}',
    ),
    "two calls at -1": (
        '-1|a|f|{"x": -1|||1} -1|b|g|{"y": -1|||2}',
        'a|f|{"x":1} b|g|{"y":2}',
    ),
    "without index the call of its id": (
        '|a|f|{"x": |b|g|{"y": |a||1} |b||2}',
        'a|f|{"x":1} b|g|{"y":2}',
    ),
    "without index and id the call at its place": (
        '||f|{"x":+||g|{"y": |||1}+|||2}',
        '|f|{"x":1} |g|{"y":2}',
    ),
    "without index and id the call at its place, after another": (
        '||f|{} ||g|{"x":+||h|{"y": |||1}+|||2}',
        '|f|{} |g|{"x":1} |h|{"y":2}',
    ),
    "the only call so far, first of two": (
        '|a|f|{"x": |||1}+|b|g|{}',
        'a|f|{"x":1} b|g|{}',
    ),
    "alone in its list the latest": (
        '0|a|f|{"x":0} 1|b|g|{"y": |||1}',
        'a|f|{"x":0} b|g|{"y":1}',
    ),
    "index 7, then none": ('7|a|f|{"x": |||1}', 'a|f|{"x":1}'),
    "a name and another id": ('0|a|f|{"x":0} 0|b|f|{"x":1}', 'a|f|{"x":0} b|f|{"x":1}'),
    "a name and another id before the arguments are whole": (
        '0|a|f|{"x": 0|b|g|{"y":1}',
        'a|f|{"x": b|g|{"y":1}',
    ),
    "a name and no id after a whole object": (
        '0||f|{"x":0} 0||g|{"y":1} 0||g|{"y":2}',
        '|f|{"x":0} |g|{"y":1} |g|{"y":2}',
    ),
    "a name and no id before the object is whole": ('0||f|{"x": 0||f|1}', '|f|{"x":1}'),
    "a name, no id, cumulative": ('0||f|{"x" 0||f|{"x":1}', '|f|{"x":1}'),
    "the same id, and both are whole": (
        '0|f|f|{"x":0} 0|f|f|{"x":1} 0|f|f|{"x":1}',
        'f|f|{"x":0} f|f|{"x":1}',
    ),
    "the same id for two names": (
        '|a|f|{"x":0}+|a|g|{"x":0}',
        'a|f|{"x":0} a|g|{"x":0}',
    ),
    "the same call again with other white space": (
        '0|f|f|{"x": 0|f||0} 0|f|f|{"x":\t0}',
        'f|f|{"x":\t0}',
    ),
    "the same id, name and {}": ('0|a|f|{} 0|a|f|{"x":1}', 'a|f|{"x":1}'),
    "another id in each piece": ('0|1|f| 0|2||{"x": 0|3||1}', '1|f|{"x":1}'),
    "another id in each piece without index": ('|1|f|{"x": |2||1}', '1|f|{"x":1}'),
    "another id for each of two": (
        '0|1|f|{"x": 1|2|g|{"y": 0|3||1} 1|4||2}',
        '1|f|{"x":1} 2|g|{"y":2}',
    ),
    "a name in pieces": ('0|a|get_ 0||wea| 0||ther|{"x":1}', 'a|get_weather|{"x":1}'),
    "a name in each piece": ('0|a|f|{"x": 0|a|f|1 0|a|f|}', 'a|f|{"x":1}'),
    "a name late": ('0|a|| 0|a|f|{"x": 0|||1}', 'a|f|{"x":1}'),
    "an id and a name late": ('0|||{"x": 0|a|| 0||f|1}', 'a|f|{"x":1}'),
    "without index the call at its place": (
        '|a|f|{"x":+|b|g|{"y": |||1}+|||2}',
        'a|f|{"x":1} b|g|{"y":2}',
    ),
    "an id late": ('0||f|{"x": 0|a||1}', 'a|f|{"x":1}'),
    "cumulative arguments": ('0|a|f| 0|||{ 0|||{"x": 0|||{"x":1}', 'a|f|{"x":1}'),
    "cumulative from the first piece": ('0|a|f|{"x" 0|||{"x":1}', 'a|f|{"x":1}'),
    "again whole at the end": ('0|a|f|{"x": 0|||1} 0|||{"x":1}', 'a|f|{"x":1}'),
    "a leading {}": ('0|a|f|{} 0|||{"x": 0|||1}', 'a|f|{"x":1}'),
    "half a character": ('0|a|f|{} 0|||{"x":"\ud83d"}', 'a|f|{"x":"\ufffd"}'),
    "{} alone": ("0|a|f|{}", "a|f|{}"),
    "a leading {} of no object": ("0|a|f|{} 0|||oops", "a|f|{}oops"),
    "an object after two letters": ('0|a|f|ok 0|||{"x":1}', 'a|f|ok{"x":1}'),
    "{} twice": ("0|a|f|{} 0|||{}", "a|f|{}"),
    "nothing at all": ("0|a|f|", "a|f|{}"),
    "no object stays as joined": ('0|a|f|{"x": 0|||oops', 'a|f|{"x":oops'),
    "an object that looks cumulative": (
        '0|a|f|{"x": 0|||{"x":1}}',
        'a|f|{"x":{"x":1}}',
    ),
}


def joined(chunks, finish):
    made = [chunk_of({"tool_calls": pieces}) for pieces in chunks]
    if finish is not None:
        made.append(chunk_of({}, finish_reason=finish))
    return accumulate(made)


def shown(completion):
    calls = completion.choices[0].message.tool_calls
    return " ".join(f"{c.id}|{c.function.name}|{c.function.arguments}" for c in calls)


@pytest.mark.parametrize(
    ("chunks", "calls"), TOOL_CALL_ROWS.values(), ids=TOOL_CALL_ROWS
)
def test_the_call_a_piece_belongs_to(chunks, calls):
    """Whether what a piece lacks is missing, null or empty."""
    for unset, finish in itertools.product((..., None, ""), ("tool_calls", "STOP")):
        made = joined(pieces_in(chunks, unset), finish)
        assert shown(made) == calls
        calls_made = made.choices[0].message.tool_calls
        assert {call.type for call in calls_made} == {"function"}


@pytest.mark.parametrize(
    "chunks",
    ['0|a|f|{"x" 0|||{"x":1', '0|a|f|{} 0|||{"x"', "0|a|f|", "0|a|f|{} 0|||{}"],
    ids=["begun and begun again", "whole and begun", "none", "whole twice"],
)
@pytest.mark.parametrize("finish", [None, "", "length", "MAX_TOKENS"])
def test_arguments_stay_as_joined_while_they_stream_and_after_a_limit(chunks, finish):
    [[call], *rest] = [*pieces_in(chunks)]
    pieces = [call, *itertools.chain(*rest)]
    texts = [piece["function"].get("arguments", "") for piece in pieces]
    assert shown(joined(pieces_in(chunks), finish)) == f"a|f|{''.join(texts)}"


def test_from_dict_changes_no_arguments():
    for arguments in ("", '{}{"x":1}', '{"x"{"x":1}'):
        call = {"id": "a", "function": {"name": "f", "arguments": arguments}}
        sent = {
            "choices": [{"message": {"tool_calls": [call]}, "finish_reason": "stop"}]
        }
        assert shown(ChatCompletion.from_dict(sent)) == f"a|f|{arguments}"


def test_the_input_of_a_custom_tool_is_joined():
    call = {"index": 0, "id": "a", "type": "custom"}
    sent = [call | {"custom": {"name": "run", "input": ""}}]
    sent += [{"index": 0, "custom": {"input": text}} for text in ("echo ", "hi")]
    message = joined([[piece] for piece in sent], "tool_calls").choices[0].message
    assert message.to_dict()["tool_calls"] == [
        {"id": "a", "type": "custom", "custom": {"name": "run", "input": "echo hi"}}
    ]


@pytest.mark.parametrize("arguments", ["{}", '{"city": "Oslo"}'])
def test_two_functions_may_be_called_with_the_same_arguments(arguments):
    """Without an id; the same name again is the same call again."""
    sent = [{"function": {"name": n, "arguments": arguments}} for n in ("f", "g", "g")]
    message = joined([[piece] for piece in sent], "tool_calls").choices[0].message
    names = [call.function.name for call in message.tool_calls]
    assert names == ["f", "g"]


def test_a_custom_tool_keeps_what_else_its_server_sends():
    sent = [{"index": 0, "custom": {"name": "run", "input": "hi", "format": "text"}}]
    message = joined([sent], "tool_calls").choices[0].message
    [call] = message.to_dict()["tool_calls"]
    assert call["custom"] == {"name": "run", "input": "hi", "format": "text"}


def test_a_function_keeps_what_else_its_server_sends():
    sent = [{"name": "f", "arguments": "{}", "x": {"y": [1]}}, {"x": {"z": 2}}]
    pieces = [[{"index": 0, "function": function}] for function in sent]
    message = joined(pieces, "tool_calls").choices[0].message
    [call] = message.to_dict()["tool_calls"]
    assert call["function"] == sent[0] | {"x": {"y": [1], "z": 2}}


def test_a_name_in_each_of_many_pieces_takes_little_time():
    """Each may open a call, which complete arguments before it would tell."""
    pieces = ['{"x": "', *["}" * 50] * 20_000, '"}']
    sent = [[{"function": {"name": "f", "arguments": text}}] for text in pieces]
    with cpu(3):
        made = joined(sent, "tool_calls")
    assert calls_of(made) == [("f", {"x": "}" * 10**6})]


def opened(index, call, *, id=True):
    return piece(index, call.id if id else None, call.name)


def cumulative(pieces):
    return itertools.accumulate(pieces)


# How servers send a call, the nth: all pieces of it. Those of the first table may come
# in turns with those of other calls, those of the second one call after another.
IN_TURNS = {
    "index": lambda c, n: [opened(n, c), *(piece(n, arguments=p) for p in c.pieces)],
    "index and id": lambda c, n: [
        opened(n, c),
        *(piece(n, c.id, arguments=p) for p in c.pieces),
    ],
    "id": lambda c, n: [
        opened(None, c),
        *(piece(None, c.id, arguments=p) for p in c.pieces),
    ],
    "id at index 0": lambda c, n: [
        opened(0, c),
        *(piece(0, c.id, arguments=p) for p in c.pieces),
    ],
    "another id in each piece": lambda c, n: [
        opened(n, c),
        *(piece(n, f"{c.id}.{m}", "", p) for m, p in enumerate(c.pieces)),
    ],
    "name in each piece": lambda c, n: [piece(n, c.id, c.name, p) for p in c.pieces],
    "name in pieces": lambda c, n: [
        piece(n, c.id, c.name[:1]),
        piece(n, None, c.name[1:]),
        *(piece(n, arguments=p) for p in c.pieces),
    ],
    "cumulative": lambda c, n: [
        opened(n, c),
        *(piece(n, arguments=p) for p in cumulative(c.pieces)),
    ],
    "cumulative with the name": lambda c, n: [
        piece(n, c.id, c.name, p) for p in cumulative(c.pieces)
    ],
    "whole again": lambda c, n: [
        opened(n, c),
        *(piece(n, arguments=p) for p in [*c.pieces, c.arguments]),
    ],
    "{} first": lambda c, n: [
        piece(n, c.id, c.name, "{}"),
        *(piece(n, arguments=p) for p in c.pieces),
    ],
    "an object": lambda c, n: [piece(n, c.id, c.name, json.loads(c.arguments))],
}
ONE_BY_ONE = {
    "nothing after the first": lambda c, n: [
        opened(None, c),
        *(piece(arguments=p) for p in c.pieces),
    ],
    "index 0": lambda c, n: [opened(0, c), *(piece(0, arguments=p) for p in c.pieces)],
    "index -1": lambda c, n: [
        opened(-1, c),
        *(piece(-1, arguments=p) for p in c.pieces),
    ],
    "index 7, then none": lambda c, n: [
        opened(7 + n, c),
        *(piece(arguments=p) for p in c.pieces),
    ],
    "name and no id in each piece": lambda c, n: [
        piece(n, None, c.name, p) for p in filter(None, c.pieces)
    ],
    "whole at index 0 without id": lambda c, n: [piece(0, None, c.name, c.arguments)],
    "whole without index and id": lambda c, n: [piece(None, None, c.name, c.arguments)],
}
IN_ORDER = {"id", "id at index 0"}  # of the first pieces, whatever index there is


@st.composite
def cut_calls(draw):
    """One to three calls, whose arguments are in pieces."""
    values = st.sampled_from([1, "", "x", "{}", '"', {"a": [{}]}, "\U0001f642"])
    made = []
    for number in range(draw(st.integers(1, 3))):
        more = draw(st.dictionaries(st.sampled_from(["a", "b{", '"']), values))
        arguments = json.dumps({"n": number} | more, ensure_ascii=draw(st.booleans()))
        places = st.sets(st.integers(0, len(arguments)), max_size=4)
        name = draw(st.sampled_from(["get_weather", "read", "write_file"]))
        call = SimpleNamespace(id=f"call-{number}", name=name, arguments=arguments)
        call.pieces = cut(arguments, draw(places))
        made.append(call)
    return made


@examples(2)
@given(
    cut_calls(),
    st.sampled_from([*IN_TURNS, *ONE_BY_ONE]),
    st.randoms(use_true_random=False),
    st.sampled_from(["tool_calls", "stop"]),
    st.booleans(),
)
def test_a_call_is_the_same_however_cut_and_framed(calls, framing, by, finish, nulls):
    frame = (IN_TURNS | ONE_BY_ONE)[framing]
    queues = [[*frame(call, number)] for number, call in enumerate(calls)]
    pieces = [*itertools.chain(*queues)]
    if framing in IN_TURNS:
        pieces = shuffled(queues, by)
    if nulls:
        pieces = [dict.fromkeys(("index", "id", "type")) | each for each in pieces]
    got = joined([[each] for each in pieces], finish)
    assert sorted(calls_of(got), key=repr) == sorted(
        [(call.name, json.loads(call.arguments)) for call in calls], key=repr
    )
    if framing != "an object":
        made = [call.function.arguments for call in got.choices[0].message.tool_calls]
        assert sorted(made) == sorted(call.arguments for call in calls)
    if framing not in IN_ORDER:
        made = [n["n"] for _, n in calls_of(got)]
        assert made == sorted(made)
    if "no id" not in framing and "without" not in framing:
        ids = {call.id for call in got.choices[0].message.tool_calls}
        assert ids == {call.id for call in calls}


@given(cut_calls(), st.booleans())
def test_calls_in_one_list_are_told_by_their_places(calls, with_index):
    longest = max(len(call.pieces) for call in calls)
    chunks = [[opened(n if with_index else None, c) for n, c in enumerate(calls)]]
    for at in range(longest):
        texts = [[*call.pieces, *[""] * longest][at] for call in calls]
        numbered = [(n if with_index else None, text) for n, text in enumerate(texts)]
        chunks.append([piece(n, arguments=text) for n, text in numbered])
    due = [(call.name, json.loads(call.arguments)) for call in calls]
    assert calls_of(joined(chunks, "tool_calls")) == due


def test_an_index_that_is_no_number_is_none_however_the_piece_is_built():
    piece = {"index": "0", "function": {"arguments": "x"}}
    for more in ({}, {"id": "a"}):
        made = sse_chat.ChoiceDeltaToolCall.from_dict(piece | more)
        assert (made.index, made.function.arguments) == (None, "x")


# ---- Messages go back as they came ---------------------------------------------------

REASONING = ["reasoning_content", "reasoning", "reasoning_text"]
CITED = {"type": "url_citation", "url_citation": {"url": "u", "title": "t"}}
LOGGED_TOKEN = {
    "token": "t",
    "bytes": [116],
    "logprob": -1.5,
    "top_logprobs": [],
    "x": 1,
}
CALLING = {"role": "assistant", "content": None, "tool_calls": [ONE_CALL]}
DETAILS = [DETAIL | {"text": "Hm", "signature": "Et8B"}]
DETAILS += [{"type": "reasoning.encrypted", "index": 1, "data": "QUJD", "id": "r-1"}]
DETAILS.append(DETAIL | {"index": 2, "text": "so"})


def whole(message, finish="stop", **more):
    """An answer in one piece; `choice` adds to its choice."""
    choice = {"index": 0, "message": message, "finish_reason": finish}
    choice |= more.pop("choice", {})
    return WHOLE | {"choices": [choice], "usage": TOKENS_USED} | more


WHOLE_ANSWERS = {
    "OpenAI": whole(
        {"role": "assistant", "content": "Hello", "refusal": None, "annotations": []},
        choice={"logprobs": {"content": [LOGGED_TOKEN], "refusal": None}},
        service_tier="default",
        system_fingerprint=None,
        usage=TOKENS_USED | {"prompt_tokens_details": {"cached_tokens": 0, "x": 1}},
    ),
    "OpenAI, calls": whole(CALLING | {"refusal": None}, "tool_calls"),
    "OpenAI, custom tool": whole(
        {"role": "assistant", "content": None}
        | {"tool_calls": [{"id": "a", "type": "custom", "custom": {"input": "i"}}]},
        "tool_calls",
    ),
    "OpenAI, audio": whole(
        {"role": "assistant", "content": None, "refusal": None}
        | {"audio": {"id": "a", "data": "AAAA", "transcript": "t", "expires_at": 9}}
    ),
    "Azure": whole(
        {"role": "assistant", "content": "Hello"},
        choice=FILTER,
        prompt_filter_results=[{"prompt_index": 0} | FILTER],
    ),
    "Ollama": whole({"role": "assistant", "content": "Hello", "reasoning": "Hm"}),
    "vLLM": whole(
        {"role": "assistant", "content": "Hello", "reasoning": None, "tool_calls": []},
        choice={"stop_reason": None, "token_ids": None, "logprobs": None},
        kv_transfer_params=None,
        prompt_logprobs=None,
    ),
    "llama.cpp": whole(
        {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}, **TIMINGS
    ),
    "OpenRouter": whole(
        {"role": "assistant", "content": "Hello", "refusal": None}
        | {"reasoning": "Hm", "reasoning_details": DETAILS},
        choice={"native_finish_reason": "end_turn", "logprobs": None},
        provider="P",
        usage=TOKENS_USED | {"cost": 0.1, "cost_details": {"upstream": None}},
    ),
    "Gemini": whole(
        {"role": "assistant", "tool_calls": [ONE_CALL | SIGNED]}, "tool_calls"
    ),
    "Gemini, filtered": WHOLE
    | {"choices": [{"index": 0, "finish_reason": "content_filter", "message": None}]},
    "Gemini, no message": WHOLE | {"choices": [{"index": 0, "finishReason": "SAFETY"}]},
    "Mistral": whole(
        {
            "role": "assistant",
            "content": [*THINKING_PARTS, {"type": "text", "text": "Hello"}],
        }
        | {"tool_calls": None, "prefix": False}
    ),
    "DeepSeek": whole(
        {"role": "assistant", "content": "Hello", "reasoning_content": ""},
        usage=TOKENS_USED | {"prompt_cache_hit_tokens": 0},
    ),
    "Groq": whole({"role": "assistant", "content": "Hello"}, x_groq={"id": "r"}),
    "Kimi": whole(
        {"role": "assistant", "content": "Hello"}, choice={"usage": TOKENS_USED}
    ),
    "Copilot": whole(
        {"content": "Hello", "reasoning_text": "Hm", "reasoning_opaque": "c2ln"}
    ),
    "StepFun": whole(
        {"content": "Hello", "reasoning": "Hm", "reasoning_content": "Hm"}
    ),
    "MiniMax": whole(
        {"role": "assistant", "name": "M", "audio_content": "", "content": "Hello"},
        base_resp={"status_code": 0, "status_msg": ""},
        input_sensitive=False,
    ),
    "Perplexity": whole(
        {"role": "assistant", "content": "Hello"},
        choice={"delta": {"role": "assistant", "content": ""}},
        citations=["u"],
        search_results=[{"title": "t", "url": "u", "date": None}],
    ),
    "SGLang": whole({"content": "Hello"}, "", choice={"matched_stop": 2}),
    "odd": {
        "id": None,
        "choices": [{"finish_reason": "null"}, {"index": None}],
        "x": 1,
    },
}
RECORDED = [(ChatCompletion, answer) for answer in WHOLE_ANSWERS.values()]
RECORDED += [
    (ChatCompletionChunk, json.loads(event[6:]))
    for events in HEALTHY.values()
    for event in events
    if event.startswith(b"data: {")
]


def test_what_servers_sent_goes_back_as_it_came():
    for kind, sent in RECORDED:
        before = copy.deepcopy(sent)
        made = kind.from_dict(sent)
        assert made.to_dict() == sent == before
        assert kind.from_dict(made.to_dict()) == made
        for choice, given_choice in zip(made.choices, sent["choices"], strict=True):
            assert choice.to_dict() == given_choice


@pytest.mark.parametrize("at_the_top", [{}, {"usage": None}, {"usage": {}}], ids=str)
def test_usage_of_a_choice_goes_back_where_it_was(at_the_top):
    sent = whole({"content": "Hello"}, choice={"usage": TOKENS_USED})
    del sent["usage"]
    made = ChatCompletion.from_dict(sent | at_the_top)
    assert made.usage.total_tokens == 5
    assert made.to_dict() == sent | at_the_top


@pytest.mark.parametrize("name", [name for name in WHOLE_ANSWERS if name != "odd"])
def test_answers_of_healthy_servers_in_one_piece_are_whole(name):
    sent = WHOLE_ANSWERS[name]
    answer = chunks_in(json.dumps(sent).encode())
    assert answer.error is None
    assert answer.text == ChatCompletion.from_dict(sent).text
    assert answer.text == ("Hello" if "Hello" in json.dumps(sent) else "")


UNKNOWN = [1, 0.5, "s", "", False, None, [], {}, {"a": [None, {"b": {}}]}, [[1], {}]]


def varied(value, by):
    """The same with less in it, with nulls and unknown fields anywhere."""
    if isinstance(value, list):
        return [varied(item, by) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {k: varied(v, by) for k, v in value.items() if by.randint(0, 5)}
    kept = {k: v if by.randint(0, 7) else None for k, v in kept.items()}
    unknown = {f"x_{n}": by.choice(UNKNOWN) for n in range(by.randint(0, 2))}
    return kept | unknown


@examples(3)
@given(st.sampled_from(RECORDED), st.randoms(use_true_random=False))
def test_to_dict_gives_back_what_from_dict_took(recorded, by):
    kind, sent = recorded
    sent = {"id": "c"} | varied(sent, by)
    assert kind.from_dict(copy.deepcopy(sent)).to_dict() == sent


def test_what_is_no_text_goes_back_as_the_text_that_it_must_be():
    """Arguments as an object; halves of characters, which cannot be encoded."""
    function = {"name": "f", "arguments": {"x": "\ud83d"}}
    sent = whole({"content": "a\ud83d", "tool_calls": [{"function": function}]})
    [choice] = json.loads(json.dumps(ChatCompletion.from_dict(sent).to_dict()))[
        "choices"
    ]
    [call] = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "a\ufffd"
    assert json.loads(call["function"]["arguments"]).keys() == {"x"}


CHANGES = {  # of an attribute, by code; where it shows, and what
    "choices[0].message.content = 'new'": ("content", "new"),
    "choices[0].message.refusal = 'new'": ("refusal", "new"),
    "choices[0].message.reasoning_content = 'new'": ("reasoning", "new"),
    "choices[0].message.tool_calls[0].function.arguments = '{}'": (
        "tool_calls",
        [ONE_CALL | SIGNED | {"function": {"name": "f", "arguments": "{}"}}],
    ),
    "choices[0].message.tool_calls.pop()": ("tool_calls", []),
    "choices[0].message.tool_calls = None": ("tool_calls", None),
    "choices[0].message.extra = {'x': 2}": ("x", 2),
    "choices[0].message.extra = {}": ("x", None),
    "choices[0].message.extra = None": ("x", None),
}


@pytest.mark.parametrize(("change", "due"), CHANGES.items(), ids=CHANGES)
def test_an_attribute_that_was_changed_wins(change, due):
    """All else stays as it came; an attribute of None may be null or left out."""
    message = {"role": "assistant", "content": None, "reasoning": "Hm", "x": 1}
    sent = whole(message | {"tool_calls": [ONE_CALL | SIGNED]}, "stop", x={"y": None})
    made, before = ChatCompletion.from_dict(sent), copy.deepcopy(sent)
    exec(f"made.{change}", {"made": made})
    name, value = due
    changed = made.to_dict()
    got = changed["choices"][0]["message"]
    assert made.choices[0].message.to_dict() == got
    assert (got.pop(name, None) or None) == (value or None)
    before["choices"][0]["message"].pop(name, None)
    assert changed == before


def test_changes_beside_the_message_win_too():
    sent = whole({"content": "Hello"}, "stop", usage=TOKENS_USED | {"cost": 1})
    made = ChatCompletion.from_dict(sent)
    made.model, made.usage.total_tokens = "other", 9
    made.choices[0].finish_reason = "length"
    got, due = made.to_dict(), copy.deepcopy(sent)
    due |= {"model": "other", "usage": sent["usage"] | {"total_tokens": 9}}
    due["choices"][0]["finish_reason"] = "length"
    assert got == due


def test_what_was_made_by_hand_has_what_is_set():
    made = sse_chat.ChatCompletionMessage(content="Hello", reasoning_content="Hm")
    due = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}
    assert without(made.to_dict()) == due
    for role, sent in (("tool", "tool"), ("", "assistant"), (None, "assistant")):
        made.role = role
        assert without(made.to_dict()) == due | {"role": sent}


def test_a_chunk_made_by_hand_can_be_added():
    chunk = ChatCompletionChunk(
        choices=[
            ChatCompletionChunk.Choice(
                logprobs=sse_chat.ChoiceLogprobs(
                    content=[sse_chat.ChatCompletionTokenLogprob(token="t", logprob=-1)]
                )
            )
        ],
        usage=sse_chat.CompletionUsage(total_tokens=8),
    )
    made = accumulate([chunk])
    assert made.usage.total_tokens == 8
    assert made.choices[0].logprobs.content[0].token == "t"


def test_unknown_fields_are_in_extra():
    """Of choices, usage and the top level: of chunks, and of streamed answers, too."""
    more = {"native_finish_reason": "x", "stop_reason": 7} | FILTER
    sent = said({"content": "Hello"}, "stop", **more)
    sent |= {"usage": TOKENS_USED | {"cost": 0.1}, "citations": ["u"]} | TIMINGS
    answer = whole({"content": "Hello"}, choice=more, citations=["u"], **TIMINGS)
    answer["usage"] = sent["usage"]
    chunk = ChatCompletionChunk.from_dict(sent)
    for made in (chunk, accumulate([chunk]), ChatCompletion.from_dict(answer)):
        assert made.extra == {"citations": ["u"]} | TIMINGS
        assert made.choices[0].extra == more
        assert made.usage.extra == {"cost": 0.1}
        got = made.to_dict()
        assert (got["citations"], got["usage"]["cost"]) == (["u"], 0.1)
        assert more.items() <= got["choices"][0].items()


@pytest.mark.parametrize("names", [*REASONING, REASONING[:2]], ids=as_words)
def test_reasoning_goes_back_under_the_name_that_the_server_has_for_it(names):
    names = [names] if isinstance(names, str) else names
    chunks = [chunk_of(dict.fromkeys(names, text)) for text in "Hm"]
    message = {"role": "assistant", "content": "Hi"} | dict.fromkeys(names, "Hm")
    whole_one = ChatCompletion.from_dict({"choices": [{"message": message}]})
    streamed = accumulate([*chunks, chunk_of({"content": "Hi"})])
    for made in (whole_one, streamed):
        assert made.reasoning == made.choices[0].message.reasoning_content == "Hm"
        assert made.choices[0].message.to_dict() == message


GROWING = """content refusal text summary thinking data transcript arguments input
signature thought_signature reasoning reasoning_content reasoning_text"""


@pytest.mark.parametrize("name", GROWING.split())
def test_texts_of_these_names_grow_anywhere(name):
    sent = [{"x": {"y": [{"index": 0, name: text, "other": text}]}} for text in "Hm"]
    message = accumulate(map(chunk_of, sent)).choices[0].message
    assert message.extra["x"]["y"] == [{"index": 0, name: "Hm", "other": "m"}]


def test_a_message_beside_its_deltas_says_nothing_new():
    """As in each chunk of Perplexity, where it grows."""
    sent = [
        {
            "choices": [
                {"index": 0, "delta": {"content": t}, "message": {"content": so_far}}
            ]
        }
        for t, so_far in (("Hel", "Hel"), ("lo", "Hello"))
    ]
    answer = chunks_in(*map(sse, sent), DONE)
    assert (answer.error, answer.text, answer.completion.text) == (
        None,
        "Hello",
        "Hello",
    )


def test_a_whole_answer_is_its_message_whatever_delta_stands_beside_it():
    sent = whole({"content": "Hello"}, choice={"delta": {"content": "lo"}})
    answer = chunks_in(json.dumps(sent).encode())
    assert (answer.error, answer.text) == (None, "Hello")
    assert answer.completion.text == "Hello"


def test_a_text_after_parts_is_a_part_and_parts_after_a_text_keep_it():
    part = {"type": "text", "text": "Hel"}
    for pieces in (([part], "lo"), ("Hel", [part | {"text": "lo"}])):
        message = accumulate(chunk_of({"content": piece}) for piece in pieces)
        due = [{"type": "text", "text": "Hello"}]
        assert message.choices[0].message.to_dict()["content"] == due


@pytest.mark.parametrize("kind", ["text", "thinking", "reasoning", "summary_text"])
def test_parts_of_text_that_follow_each_other_are_one(kind):
    pieces = [{"type": kind, "text": text} for text in ("H", "m")]
    message = accumulate(chunk_of({"content": [piece]}) for piece in pieces)
    due = [{"type": kind, "text": "Hm"}]
    assert message.choices[0].message.to_dict()["content"] == due


def test_reasoning_in_pieces_of_several_types_is_one():
    """Numbers are tokens, and an object after a text keeps both."""
    for pieces, text in (
        ((1, 0, "%"), "10%"),
        (("H", {"text": "m"}, {"signature": "s"}), "Hm"),
        (({"text": "H"}, "m"), "Hm"),
    ):
        made = accumulate(chunk_of({"reasoning_content": piece}) for piece in pieces)
        assert made.reasoning == text


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_may_be_an_object_with_a_signature(name):
    """As Envoy's gateway sends it: a model takes its thoughts back only with that."""
    pieces = [{"text": "H"}, {"text": "m"}, {"signature": "c2ln"}]
    streamed = accumulate(chunk_of({name: piece}) for piece in pieces)
    message = {"role": "assistant", name: {"text": "Hm", "signature": "c2ln"}}
    whole_one = ChatCompletion.from_dict({"choices": [{"message": message}]})
    for made in (whole_one, streamed):
        assert made.reasoning == made.choices[0].message.reasoning_content == "Hm"
        got = made.choices[0].message.to_dict()
        assert {k: v for k, v in got.items() if v is not None} == message


@pytest.mark.parametrize(
    "parts",
    [
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "Hm"}]},
        {"content": THINKING_PARTS},
        {"content": SUMMARY},
        {"reasoning": "Hm", "reasoning_details": [{"text": "Hm"}]},
        {"reasoning": "Hm", "reasoning_content": "Hm"},
    ],
    ids=as_words,
)
def test_reasoning_in_parts_is_shown_once(parts):
    chunk = chunk_of(parts)
    message = ChatCompletion.from_dict({"choices": [{"message": parts}]})
    for made in (chunk, message, accumulate([chunk])):
        assert (made.reasoning, made.text) == ("Hm", "")


WHOLE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
SOME = st.text("abc{}\U0001f642", min_size=1, max_size=9)
MESSAGES_SENT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | SOME},
    optional={
        "refusal": SOME,
        "reasoning": SOME,
        "reasoning_content": SOME,
        "reasoning_text": SOME,
        "reasoning_opaque": st.just("c2ln"),
        "reasoning_details": st.lists(
            st.sampled_from(DETAILS), min_size=1, max_size=3, unique_by=id
        ),
        "audio": st.fixed_dictionaries(
            {"id": st.just("a"), "data": SOME},
            optional={"transcript": SOME, "expires_at": st.just(9)},
        ),
        "function_call": st.just({"name": "f", "arguments": '{"x": 1}'}),
        "tool_calls": st.lists(
            st.sampled_from([ONE_CALL, ONE_CALL | SIGNED]).map(dict),
            min_size=1,
            max_size=2,
        ),
        "annotations": st.just([CITED]),
        "x_object": st.just({"a": {"b": "c"}, "d": [1, {"e": 2}]}),
        "x_text": st.just("unknown"),
    },
)
GROWING = {"content", "refusal", *REASONING, "text", "summary", "thinking", "data"}
GROWING |= {"transcript", "arguments", "input"}
SIGNATURES = {"signature", "thought_signature"}


def deltas_of(value, by, name=""):
    """Cut a part of a message as servers do: a list of what adds up to it."""
    if name in GROWING:
        return cut(value, {by.randint(0, len(value)) for _ in "12"})
    if name in SIGNATURES:  # in pieces, or again and again
        return [value] * 2 if by.randint(0, 1) else [value[:2], value[2:]]
    if name in ("tool_calls", "reasoning_details"):
        numbered = [(item.get("index", n), item) for n, item in enumerate(value)]
        keep = {"tool_calls": (), "reasoning_details": ("type", "index")}[name]
        pieces = [
            {"index": n} | {k: item[k] for k in keep} | part
            for n, item in numbered
            for part in deltas_of(item, by)
        ]
        return [[piece] for piece in pieces]
    if isinstance(value, dict) and not name.startswith("x_"):
        pieces = [(k, deltas_of(v, by, k)) for k, v in value.items()]
        return [{k: part} for k, parts in pieces for part in parts]
    return [value]


@given(MESSAGES_SENT.map(copy.deepcopy), st.randoms(use_true_random=False))
def test_a_streamed_message_equals_the_one_sent_at_once(message, by):
    """Nulls add nothing, wherever they come."""
    for number, call in enumerate(message.get("tool_calls", ())):
        call["id"] = f"c-{number}"
    sent = [k for k in message if message[k] is not None]
    queues = [
        [{name: part} for part in deltas_of(message[name], by, name)] for name in sent
    ]
    deltas = shuffled(queues, by)
    for delta in deltas:
        nulls = sorted(message.keys() - delta.keys())
        delta |= dict.fromkeys(by.sample(nulls, min(len(nulls), by.randint(0, 2))))
    ended = [*map(chunk_of, deltas), chunk_of({}, finish_reason="stop")]
    got = accumulate(ended).choices[0].message
    assert got.to_dict() == message
    assert ChatCompletion.from_dict(whole(message)).choices[0].message == got


def test_details_of_one_index_are_joined_by_their_type():
    """A signature that comes last, in pieces or again, stays valid."""
    text, data = DETAIL | {"index": 0}, {"type": "reasoning.encrypted", "index": 0}
    sent = [
        [text | {"text": "Let"}, data | {"data": "AA"}],
        [text | {"text": " me."}],
        [text | {"signature": "Et"}, data | {"data": "BB"}],
        [text | {"signature": "8B"}],
        [text | {"text": "", "signature": "Et8B"}],
    ]
    chunks = [chunk_of({"reasoning_details": details}) for details in sent]
    message = accumulate(chunks).choices[0].message
    assert message.to_dict()["reasoning_details"] == [
        text | {"text": "Let me.", "signature": "Et8B"},
        data | {"data": "AABB"},
    ]
    assert message.reasoning_content == "Let me."


@pytest.mark.parametrize("name", ["OpenAI", "Azure", "Ollama", "vLLM", "llama.cpp"])
def test_a_streamed_answer_equals_the_one_sent_at_once(name):
    """With what is beside its messages; nulls apart."""
    answer = WHOLE_ANSWERS[name]
    [choice] = answer["choices"]
    beside = {k: v for k, v in answer.items() if k not in ("choices", "usage")}
    beside["object"] = "chat.completion.chunk"
    more = {k: v for k, v in choice.items() if k not in ("message", "finish_reason")}
    message = {k: v for k, v in choice["message"].items() if v != []}
    sent = [
        {"index": 0, "delta": {k: v}, "finish_reason": None} for k, v in message.items()
    ]
    sent.append(more | {"delta": {}, "finish_reason": choice["finish_reason"]})
    sent = [beside | {"choices": [each]} for each in sent]
    sent.append(beside | {"choices": [], "usage": answer["usage"]})
    got = accumulate(map(ChatCompletionChunk.from_dict, sent)).to_dict()
    due = copy.deepcopy(answer)
    due["choices"][0]["message"] = message
    assert without(got) == without(due)


async def test_a_message_goes_back_in_the_next_request(chat):
    """What stands there is what the server sent, also where it was streamed."""
    message = CALLING | {"reasoning": "Hm", "reasoning_details": DETAILS, "x": {"y": 1}}
    message |= {"tool_calls": [ONE_CALL | SIGNED]}
    delta = message | {"tool_calls": [{"index": 0} | ONE_CALL | SIGNED]}
    streamed = http(event(**delta), event(finish="tool_calls"), DONE)
    json_answer = http(json.dumps(whole(message)).encode(), kind="application/json")
    for how, first in (("stream", streamed), ("generate", json_answer)):
        with serve(in_turn(first, http(*HELLO))) as server:
            answer = await ask(chat, server.url, how)
            turns = [answer.completion.choices[0].message]
            await ask(chat, server.url, messages=turns)
            assert json.loads(server.bodies[-1])["messages"] == [message]


def test_halves_of_a_pair_are_joined_in_keys_and_parts_too():
    """And the end of a text that began in parts adds no empty part."""
    half, other = "\ud83d", "\ude42"
    deltas = [{"content": half}, {"content": [{"type": "text", "text": other}]}]
    deltas += [{"content": "", half + other: 1}]
    message = accumulate(map(chunk_of, deltas)).choices[0].message
    assert message.content == "🙂"
    sent_back = message.to_dict()
    assert sent_back["content"] == [{"type": "text", "text": "🙂"}]
    assert sent_back["🙂"] == 1
    assert ChatCompletion.from_dict({half: 1}).to_dict() == {"\ufffd": 1}


def test_a_whole_message_may_follow_a_text_in_parts():
    parts = {"content": [{"type": "text", "text": "Hel"}]}
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        answer = chunks_in(
            sse(said(parts)), message_event({"content": content}, "stop")
        )
        assert (answer.error, answer.text) == (None, "Hello")
        assert answer.completion.text == "Hello"


def test_a_changed_finish_reason_replaces_the_one_under_another_name():
    choice = ChatCompletion.Choice.from_dict({"finishReason": "STOP", "message": {}})
    assert (choice.finish_reason, choice.extra) == ("STOP", None)
    choice.finish_reason, choice.extra = "length", None
    assert choice.to_dict()["finish_reason"] == "length"
    assert "finishReason" not in choice.to_dict()


def test_a_whole_message_replaces_halves_of_a_pair():
    halves = [with_text(rb"hi \ud83d"), with_text(rb"\ude42")]
    answer = chunks_in(*halves, message_event({"content": "hi 🙂"}, "stop"))
    assert (answer.error, answer.completion.text) == (None, "hi 🙂")


def test_reasoning_that_is_no_text_is_not_lost():
    chunk = chunk_of({"content": "hi", "reasoning": {"text": "hm"}})
    assert chunk.choices[0].delta.extra == {"reasoning": {"text": "hm"}}
    assert accumulate([chunk]).choices[0].message.extra["reasoning"]["text"] == "hm"


def test_an_index_that_is_none_goes_back_as_it_came():
    for index in ({}, {"index": None}, {"index": -1}, {"index": "0"}):
        choice = index | {"message": {"role": "assistant", "content": "x"}}
        made = ChatCompletion.from_dict({"choices": [choice]})
        assert made.choices[0].index == 0
        assert made.to_dict() == {"choices": [choice]}


def test_an_empty_list_of_tool_calls_does_not_go_back():
    sent = {"role": "assistant", "content": "x", "tool_calls": []}
    message = sse_chat.ChatCompletionMessage.from_dict(sent)
    with serve(http(JSON, kind="application/json")) as server:
        sse_chat.generate([message], base_url=server.url)
    [sent_back] = json.loads(server.bodies[0])["messages"]
    assert sent_back == {"role": "assistant", "content": "x"}
    message = sse_chat.ChatCompletionMessage.from_dict({"tool_calls": [ONE_CALL]})
    message.tool_calls = []
    assert message.to_dict() == {"role": "assistant"}


# ---- Odd events in streams that are whole --------------------------------------------

EMPTY_EVENTS = {
    "null": b"data: null\n\n",
    "an empty object": b"data: {}\n\n",
    "no data": b"data:\n\n",
    "space": b"data:  \t \n\n",
    "a comment as data": b"data: : OPENROUTER PROCESSING\n\n",
    "a ping": b"event: ping\ndata: {}\n\n",
}
NO_CHOICE = {
    "choices null": sse({"choices": None}),
    "no choices": sse({"choices": []}),
    "a choice null": sse({"choices": [None]}),
}
HARMLESS = EMPTY_EVENTS | NO_CHOICE
HARMLESS["a call null"] = sse(said({"tool_calls": [None]}))
for n in (None, "x", 0.5, True):
    HARMLESS[f"a call at {n}"] = sse(said({"tool_calls": [{"index": n}]}))


@pytest.mark.parametrize("odd", HARMLESS.values(), ids=HARMLESS)
def test_odd_events_harm_no_answer(odd):
    for at in range(len(HELLO)):
        answer = chunks_in(*HELLO[:at], odd, *HELLO[at:])
        assert (answer.error, answer.text) == (None, "Hello")
        assert answer.completion.choices[0].finish_reason == "stop"
        if odd in EMPTY_EVENTS.values():
            assert len(answer.chunks) == 3
    cut_off = chunks_in(odd, *BEGUN, odd)
    assert (type(cut_off.error), cut_off.text) == (Truncated, "Hello")
    if odd in (EMPTY_EVENTS | NO_CHOICE).values():
        assert type(chunks_in(odd, DONE).error) is Invalid


@pytest.mark.parametrize("value", [0, False, "", []], ids=as_words)
def test_other_values_that_are_empty_are_no_part_of_an_answer(value):
    answer = chunks_in(*BEGUN, sse(value), STOPPED, DONE)
    assert (type(answer.error), answer.text) == (Invalid, "Hello")


def test_what_cannot_be_placed_is_in_raw():
    sent = {"choices": [None, 5, {"delta": {"content": "a", "tool_calls": [None, 1]}}]}
    chunk = ChatCompletionChunk.from_dict(sent)
    assert (chunk.text, chunk.raw) == ("a", sent)
    assert accumulate([chunk]).text == "a"


DONE_AS_SENT = {
    "two spaces": b"data:  [DONE]\n\n",
    "a space after it": b"data: [DONE] \n\n",
    "a tab": b"data:\t[DONE]\n\n",
    "no field": b"[DONE]\n\n",
    "no field in a line": b"[DONE]\n",
    "no field and no line end": b"[DONE]",
    "a space and no field": b" [DONE]\n\n",
    "no line end": b"data: [DONE]",
}


@pytest.mark.parametrize("done", DONE_AS_SENT.values(), ids=DONE_AS_SENT)
def test_done_may_have_space_around_it_or_no_framing(done):
    answer = chunks_in(*BEGUN, done)
    assert (answer.error, answer.text) == (None, "Hello")
    ended = chunks_in(*HELLO[:3], done)
    assert (ended.error, len(ended.chunks)) == (None, 3)


def test_half_of_done_ends_no_answer():
    assert type(chunks_in(*BEGUN, b"data: [DONE\n\n").error) is Invalid


def test_lines_of_json_in_one_event_are_a_chunk_each():
    """Where the data is no JSON as a whole: some part their events by one newline."""
    lines = [line.rstrip() + b"\n" for line in HELLO]
    comment_between = [*lines[:2], b"data: : ping\n", lines[2]]
    for parts in (
        [*lines, b"\n"],
        [*lines[:3], b"\n", DONE],
        [HELLO[0], *lines[1:]],
        comment_between,
        [*comment_between, b"\n"],
    ):
        answer = chunks_in(*parts)
        assert (answer.error, answer.text, len(answer.chunks)) == (None, "Hello", 3)
    cut_off = chunks_in(*lines[:2], b"\n")
    assert (type(cut_off.error), cut_off.text) == (Truncated, "Hello")
    failed = chunks_in(*lines[:2], sse({"error": TOLD}), DONE)
    assert (type(failed.error), failed.text) == (APIError, "Hello")
    assert failed.error.message == TOLD
    broken = chunks_in(*lines[:2], b"data: {oops\n\n")
    assert type(broken.error) is Invalid
    more = chunks_in(*lines, lines[0], b"data: {oops\n\n")  # [DONE] is the last
    assert (more.error, more.text, len(more.chunks)) == (None, "Hello", 3)


@pytest.mark.parametrize(
    "space", [b" ", b"\t", b"\n ", b"\r\n  ", b" \n\n\t"], ids=as_words
)
def test_white_space_before_the_first_field_loses_no_event(space):
    answer = chunks_in(space, *HELLO)
    assert (answer.error, answer.text, len(answer.chunks)) == (None, "Hello", 3)


def message_event(message, finish=None, **more):
    return choices({"index": 0, "message": message, "finish_reason": finish} | more)


@given(cuttings(WHOLE_TEXT), st.data(), st.sampled_from([{}, {"delta": None}]))
def test_a_whole_message_after_deltas_replaces_them(pieces, data, beside):
    """Only the rest is given out; and what the message alone has is kept."""
    text = "".join(pieces)
    begun = pieces[: data.draw(st.integers(0, len(pieces)))]
    message = {"role": "assistant", "content": text, "annotations": [CITED]}
    deltas = [event(piece) for piece in begun] or [event("", role="assistant")]
    answer = chunks_in(*deltas, message_event(message, "stop", **beside), DONE)
    assert answer.error is None
    assert answer.text == answer.completion.text == text
    assert answer.completion.choices[0].message.to_dict() == message


def test_half_a_character_may_end_a_whole_message():
    answer = chunks_in(HEL, message_event({"content": "Hel\ud83d"}, "stop"), DONE)
    assert (answer.error, answer.completion.text) == (None, "Hel\ufffd")


def test_a_whole_message_replaces_reasoning_and_calls_too():
    message = {"role": "assistant", "content": "", "reasoning": "Hm"}
    deltas = [event("", reasoning="H"), event("", reasoning="m")]
    deltas.append(event(tool_calls=[{"index": 0} | ONE_CALL]))
    for call in (ONE_CALL, ONE_CALL | {"id": "another"}):
        message["tool_calls"] = [call]
        answer = chunks_in(*deltas, message_event(message, "tool_calls"), DONE)
        assert answer.error is None
        assert "".join(chunk.reasoning for chunk in answer.chunks) == "Hm"
        assert answer.completion.choices[0].message.to_dict() == message
    emptied = message | {"reasoning": ""}  # which says nothing against the deltas
    answer = chunks_in(*deltas, message_event(emptied, "tool_calls"), DONE)
    assert answer.completion.choices[0].message.to_dict() == message
    del message["tool_calls"]
    answer = chunks_in(*deltas, message_event(message, "tool_calls"), DONE)
    [call] = answer.completion.choices[0].message.tool_calls
    assert call.id == ONE_CALL["id"]


MESSAGES_FOR_DELTAS = [  # what stands in each chunk, and the text of all
    ([{"message": {"content": "Hello"}}], "Hello"),
    ([{"message": {"content": text}} for text in ("Hel", "lo")], "Hello"),
    ([{"message": {"content": text}} for text in ("a", "ab")], "aab"),
    ([{"delta": {"content": "Hel"}}, {"message": {"content": "lo"}}], "Hello"),
    (
        [
            {"delta": {"content": "Hel"}, "message": {"content": "Hel"}},
            {"delta": {"content": "lo"}, "message": {"content": "Hello"}},
        ],
        "Hello",
    ),
]


@pytest.mark.parametrize(("sent", "text"), MESSAGES_FOR_DELTAS, ids=as_words)
def test_other_messages_are_deltas(sent, text):
    answer = chunks_in(*(choices(choice) for choice in sent), *HELLO[2:])
    assert answer.error is None
    assert answer.text == answer.completion.text == text


def test_a_json_choice_that_ended_needs_no_message():
    for message in ({}, {"message": None}):
        choice = {"index": 0, "finish_reason": "content_filter"} | message
        sent = WHOLE | {"choices": [choice]}
        answer = chunks_in(json.dumps(sent).encode())
        assert (answer.error, answer.text) == (None, "")
        assert answer.completion.choices[0].finish_reason == "content_filter"
        assert answer.completion.limit == "content_filter"


def test_a_chunk_as_json_is_no_whole_answer():
    """An answer as JSON has messages: a delta beside one (Perplexity's) is left out."""
    answer = chunks_in(json.dumps(said({"content": "Hello"}, "stop")).encode())
    assert (type(answer.error), "Hello" in answer.error.body) == (Invalid, True)


def test_an_event_in_lines_that_is_cut_is_a_cut():
    lines = b'data: {\ndata:  "choices": [\ndata:   72'
    answer = chunks_in(*BEGUN, lines)
    assert (type(answer.error), answer.text) == (Truncated, "Hello")


# ---- Usage, models -------------------------------------------------------------------

ZERO = dict.fromkeys(TOKENS_USED, 0)
USAGES = [  # in each chunk; each `usage` has the same place
    [{}, TOKENS_USED],
    [None, TOKENS_USED],
    [ZERO, TOKENS_USED],
    [TOKENS_USED | {"total_tokens": 4}, TOKENS_USED],
    [TOKENS_USED, {}],
    [TOKENS_USED, None],
    [{}, TOKENS_USED, {}, None],
    [TOKENS_USED, ZERO],
]
USAGE_PLACES = {
    "top": lambda usage: said({"content": "x"}) | {"usage": usage},
    "choice": lambda usage: said({"content": "x"}, usage=usage),
    "x_groq": lambda usage: said({"content": "x"}) | {"x_groq": {"usage": usage}},
}


@pytest.mark.parametrize("place", USAGE_PLACES.values(), ids=USAGE_PLACES)
@pytest.mark.parametrize("usages", USAGES, ids=as_words)
def test_usage_is_found_and_never_replaced_by_nothing(place, usages):
    chunks = [ChatCompletionChunk.from_dict(place(usage)) for usage in usages]
    got = accumulate(chunks)
    assert got.usage.total_tokens == 5
    assert got.to_dict()["usage"] == TOKENS_USED


@pytest.mark.parametrize("place", USAGE_PLACES.values(), ids=USAGE_PLACES)
@pytest.mark.parametrize("none", [None, {}], ids=["null", "empty"])
def test_an_empty_usage_is_none(place, none):
    chunk = ChatCompletionChunk.from_dict(place(none))
    assert (chunk.usage, accumulate([chunk, chunk]).usage) == (None, None)


async def test_models_are_asked_for_over_the_callers_client(chat):
    answer = httpx.Response(200, json=json.loads(MODELS))
    got = await ask_mock(chat, lambda _: answer, how="models")
    assert got.completion == ["b", "a"]


async def test_models_as_a_bare_list(chat):
    listed = [{"id": "b", "object": "model"}, {"id": "a"}, {"object": "model"}, None]
    failed = json.dumps([{"error": {"message": TOLD}}]).encode()
    one = json.dumps(listed[:1]).encode()
    answers = [json.dumps(listed).encode(), one, failed]
    with serve(
        in_turn(*(http(body, kind="application/json") for body in answers))
    ) as s:
        assert await chat.models(base_url=s.url) == ["b", "a"]
        assert await chat.models(base_url=s.url) == ["b"]
        with pytest.raises(APIError, match=TOLD):
            await chat.models(base_url=s.url)


async def test_a_body_may_be_as_large_as_the_limit(chat):
    for how, sent in (("generate", JSON), ("models", MODELS)):
        with serve(http(sent.ljust(999), kind="application/json")) as server:
            answer = await ask(chat, server.url, how=how, max_event_bytes=999)
        assert answer.error is None and answer.completion


def test_a_silent_list_of_models_names_the_limit_that_ended_it():
    with serve(play(JSON_HEAD, b'{"data": [', GONE)) as server:
        for option, words in (
            ("timeout", "timed out"),
            ("first_token_timeout", "0.2 s"),
        ):
            limit = {"max_retries": 0, option: 0.2}
            error = ask_sync(server.url, how="models", **limit).error
            assert (type(error), words in error.message) == (Timeout, True)


# ---- Halves of characters, sizes -----------------------------------------------------

HALF_CHARACTERS = st.text(st.sampled_from("a\ud83d\ude42\udc00\U0001f642"), max_size=4)
HALVES_SAID = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("content", *REASONING), HALF_CHARACTERS)
    | {"reasoning_details": st.lists(st.fixed_dictionaries({"text": HALF_CHARACTERS}))},
) | st.fixed_dictionaries(
    {"content": st.lists(st.fixed_dictionaries({"text": HALF_CHARACTERS}))}
)


@given(HALVES_SAID)
def test_text_and_reasoning_can_always_be_encoded(message):
    for kind, name in ((ChatCompletion, "message"), (ChatCompletionChunk, "delta")):
        made = kind.from_dict({"choices": [{name: message}]})
        (made.text + made.reasoning).encode()


@given(st.lists(HALF_CHARACTERS))
def test_halves_in_chunks_become_whole_again(texts):
    halves = "".join(texts).encode("utf-16-le", "surrogatepass")
    due = halves.decode("utf-16-le", "replace")
    got = accumulate([chunk_of({"content": text}) for text in texts]).text
    assert len(got) == len(due) and got.replace("\ufffd", "") == due.replace(
        "\ufffd", ""
    )


@contextlib.contextmanager
def cpu(most):
    """At most so many seconds of CPU in this thread."""
    began = time.thread_time()
    yield
    assert time.thread_time() - began < most


def peak_of(function, *args):
    """The most bytes that a call has in use."""
    gc.disable()  # it takes most of the time
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()


MB = 10**6
PLACES = {  # @ stands for the list
    "top": '{"choices": [], "x": @}',
    "choices": '{"choices": @}',
    "details": '{"choices": [{"delta": {"reasoning_details": @}}]}',
    "tool calls": '{"choices": [{"delta": {"tool_calls": @}}]}',
    "logprobs": '{"choices": [{"logprobs": {"content": @}}]}',
    "error": '{"error": {"message": @}}',
}


def repeated(value):
    return "[" + ",".join([value] * (MB // (len(value) + 1))) + "]"


@functools.cache
def json_takes(value):
    return peak_of(json.loads, repeated(value))


@pytest.mark.parametrize("place", PLACES)
def test_a_megabyte_of_small_values_takes_little(place):
    """At most 40 MB more than json.loads takes."""
    sent = PLACES[place].replace("@", repeated("{}")).encode()
    taken = peak_of(chunks_in, b"data: ", sent, b"\n\n")
    assert taken < json_takes("{}") + 40 * MB


@pytest.mark.parametrize("place", ["logprobs", "details", "choices", "top"])
def test_a_megabyte_of_small_values_takes_a_second(place):
    sent = PLACES[place].replace("@", repeated("{}")).encode()
    with cpu(3 if sys.gettrace() else 1):  # coverage traces each line
        chunks_in(b"data: ", sent, b"\n\n")


def test_objects_and_lists_have_a_limit_each():
    assert sse_chat.MAX_OBJECTS == 100_000
    others = json.dumps(said({"content": "x", "y": []}))
    for objects, lists, error in (
        (100_000, 200_000, Truncated),
        (100_001, 9, Invalid),
        (9, 200_001, Invalid),
    ):
        values = [{}] * (objects - others.count("{"))
        values += [[]] * (lists - others.count("["))
        answer = chunks_in(sse(said({"content": "x", "y": values})))
        assert type(answer.error) is error


def test_the_limit_lets_a_long_answer_with_alternatives_pass():
    """4,000 tokens with 20 alternatives each, and the bytes of them all."""
    one = {"token": "the", "bytes": [116, 104, 101], "logprob": -1.5}
    token = one | {"top_logprobs": [one] * 20}
    logprobs = {"content": [token] * 4000}
    answer = whole({"content": "Hello"}, choice={"logprobs": logprobs})
    [chunk] = sse_chat.iter_chunks([json.dumps(answer).encode()])
    made = chunk.choices[0].logprobs.content
    assert (len(made), len(made[-1].top_logprobs)) == (4000, 20)
    assert made[-1].top_logprobs[-1].bytes == [116, 104, 101]


def test_16_mib_of_error_text_take_little_time():
    """The secrets of the request are looked for in all of it."""
    text, most = r'"abcd","\u0061\\\/","",', 16 * 2**20 - 100
    said_so = '{"error": {"message": "m", "x": [%s ""]}}' % (text * (most // len(text)))
    data = b"data: %s\n\n" % said_so.encode()
    options = {"api_key": SECRET_KEY, "headers": {"x-token": SECRET_KEY[::-1]}}

    def answer(request):
        return httpx.Response(200, stream=httpx.ByteStream(data))

    with cpu(3):
        told = finished(ask_mock(SYNC, answer, **options))
    assert (type(told.error), told.error.message) == (APIError, "m")


def test_json_that_is_too_deep_anywhere_is_no_answer():
    deep = levels(150)
    for name in ("system_fingerprint", "service_tier", "object", "id", "x"):
        answer = json.dumps(json.loads(JSON) | {name: deep}).encode()
        error = chunks_in(answer).error
        assert type(error) is Invalid and '{"id"' in str(error)


def test_fields_may_be_any_mapping():
    bias = types.MappingProxyType({"5": 1.0})
    with serve(http(JSON, kind="application/json")) as server:
        sse_chat.generate("hi", base_url=server.url, logit_bias=bias)
    assert json.loads(server.bodies[0])["logit_bias"] == {"5": 1.0}


# ---- Secrets -------------------------------------------------------------------------

SECRET_KEY = "sk-secret/9f8e7d6c"


def escaped(text, by):
    """A JSON string of this text, each character escaped in one of the ways of JSON."""
    ways = [lambda c: c, lambda c: f"\\u{ord(c):04x}", lambda c: f"\\u{ord(c):04X}"]
    ways.append(lambda c: "\\/" if c == "/" else c)
    return f'"{"".join(by.choice(ways)(c) for c in text)}"'.encode()


@given(st.randoms(use_true_random=False), st.sampled_from(["message", "x", "type"]))
def test_a_secret_is_taken_out_however_json_escapes_it(by, name):
    says = escaped(f"no key {SECRET_KEY} here", by)
    data = b'data: {"error": {"message": "m", "%b": %b}}\n\n' % (name.encode(), says)
    stream = httpx.ByteStream(b"".join(BEGUN) + data)

    def answer(request):
        return httpx.Response(200, stream=stream)

    told = finished(ask_mock(SYNC, answer, api_key=SECRET_KEY))
    assert type(told.error) is APIError
    shown_words = everything(told.error)
    assert (
        SECRET_KEY not in shown_words and SECRET_KEY.replace("/", "") not in shown_words
    )
    assert told.error.body["error"][name] == "no key [secret] here"


@pytest.mark.parametrize(
    ("parameter", "is_secret"),
    [
        ("api-version", False),
        ("deployment", False),
        ("key", True),
        ("api-key", True),
        ("API_KEY", True),
        ("access_token", True),
        ("client_secret", True),
    ],
)
def test_a_query_parameter_is_a_secret_if_its_name_says_so(parameter, is_secret):
    value = "2026-11-28-preview"
    failed = sse({"error": {"message": f"{value} is unknown"}})
    with serve(http(*BEGUN, failed)) as server:
        error = ask_sync(f"{server.url}?{parameter}={value}").error
    assert type(error) is APIError
    assert error.message == f"{'[secret]' if is_secret else value} is unknown"


# ---- Options that cannot be ----------------------------------------------------------

WRONG_OPTIONS = [
    {"max_retries": None},
    {"max_retries": "2"},
    {"max_event_bytes": "1000"},
]


@pytest.mark.parametrize("options", WRONG_OPTIONS, ids=as_words)
def test_options_of_a_wrong_type_raise_at_the_call(options):
    options = options | {"base_url": "http://127.0.0.1:9/v1"}
    wrong = pytest.raises((TypeError, ValueError), match=next(iter(options)))
    for ask_so in (sse_chat.stream_chat, sse_chat.astream_chat, sse_chat.generate):
        with wrong:
            ask_so("hi", **options)
    with wrong:
        finished(sse_chat.agenerate("hi", **options))
    with wrong:
        finished(sse_chat.amodels(**options))
    with wrong:
        sse_chat.ChatClient(**options).stream("hi")


# ---- openai's own accumulator --------------------------------------------------------

OPENAI_DIFFERS = {  # where it is not right, and why
    "Azure": "cannot take a choice without delta, and keeps the first id, though ''",
    "OpenRouter+": "appends the format that each piece of a detail repeats",
    "Gemini!": "cannot take a call without index",
    "Gemini, another name": "does not know finishReason",
    "Mistral+": "drops the thinking when texts follow a list of parts",
    "DeepSeek!": "appends the id that each piece of a call repeats",
    "Groq": "does not look for usage in x_groq",
    "Kimi": "does not look for usage in the choice",
    "Databricks+": "cannot join lists of parts without index",
}


def payloads_of(events):
    data = [event.data for event in iter_sse(events)]
    return [json.loads(text) for text in data if text.startswith("{")]


def by_openai(payloads):
    """The answer that openai's accumulator makes of them, as JSON."""
    streaming, types = needs("openai.lib.streaming.chat"), needs("openai.types.chat")
    state = streaming.ChatCompletionStreamState()
    for payload in payloads:
        state.handle_chunk(types.ChatCompletionChunk.construct(**payload))
    return state.current_completion_snapshot.to_dict()


def compared(answer):
    """What both have; nulls, "" and [] are none.

    openai leaves the index in a call, and appends a role that each chunk repeats.
    """
    [choice] = answer["choices"]
    message = {k: v for k, v in choice["message"].items() if v not in (None, [], "")}
    message.pop("role", None)
    for call in message.get("tool_calls", ()):
        call.pop("index", None)
    kept = {k: answer.get(k) for k in ("id", "model", "created", "usage")}
    return without(kept | {"message": message, "reason": choice.get("finish_reason")})


@pytest.mark.filterwarnings("ignore")  # pydantic's, of odd values
@pytest.mark.parametrize("name", HEALTHY)
def test_accumulate_agrees_with_openai(name):
    payloads = payloads_of(HEALTHY[name])
    ours = accumulate(map(ChatCompletionChunk.from_dict, payloads)).to_dict()
    try:
        theirs = compared(by_openai(payloads))
    except (AttributeError, RuntimeError, TypeError, IndexError):
        theirs = None  # it cannot take the stream
    assert (compared(ours) == theirs) == (name not in OPENAI_DIFFERS)


# ---- Many streams; HTTP/2 and TLS ----------------------------------------------------

# What a server does, and how the stream ends
OUTCOMES = {"good": (GOOD_KEPT, None), "JSON": (play(http(JSON), KEEP), None)}
OUTCOMES |= {"slow": (play(HEAD, event("x") * 99, GONE), Truncated)}
OUTCOMES |= {"failing": (play(HEAD, BEGUN, FAILED, GONE), APIError)}
OUTCOMES |= {"refusing": (play(refuse(400), KEEP), Status)}
OUTCOMES |= {"cut": (chunked(*BEGUN, end=False), Truncated), "gone": (b"", Unreachable)}


@pytest.mark.life
async def test_over_a_hundred_streams_are_open_at_once(chat):
    """A client of ours has no limit of connections, as httpx's own has."""
    with serve(play(HEAD, BEGUN, GONE)) as server:
        options = {"base_url": server.url, "timeout": 10, "max_retries": 0}
        async with chat.client(**options) as client:
            kept = [client.stream("hi") for _ in range(120)]
            for stream in kept:
                assert (await anext(stream)).text == "Hel"
            assert server.connections == 120
            for stream in kept:
                await stream.aclose()


@pytest.mark.life
async def test_twenty_connections_are_kept(chat):
    go, body = threading.Event(), chunked(*HELLO)
    begun, blank, rest = body.partition(b"\n\n")
    steps = play(begun + blank, lambda connection: go.wait(PATIENCE), rest, KEEP)
    with serve(steps) as server:
        async with chat.client(base_url=server.url) as client:
            kept = [client.stream("hi") for _ in range(22)]
            for stream in kept:
                await anext(stream)
            go.set()
            for stream in kept:
                assert len([chunk async for chunk in stream]) == 2
            assert await has_left(server) and await has_left(server)
            assert not await has_left(server, 0.1)


async def test_text_holds_back_half_a_character_and_no_more(chat):
    half, other = rb"\ud83d", rb"\ude42"
    texts = (b"a" + half, other + b"b", half, b"c" + half, half)
    with serve(chunked(*map(with_text, texts), *ENDING)) as server:
        text = chat.stream("hi", base_url=server.url).text()
        assert [t async for t in text] == ["a", "🙂b", "\ufffdc", "\ufffd", "\ufffd"]


MOSTLY_WHOLE = [*OUTCOMES, *["good", "JSON"] * 3]


class Streams(stateful.RuleBasedStateMachine):
    """Streams over one client of three connections, kept until a rule drops them.

    `seen` counts what the rules have reached, over all runs.
    """

    streams = stateful.Bundle("streams")

    def __init__(self, chat, loop, module, seen):
        super().__init__()
        self.chat, self.kept, self.seen = chat, [], seen
        self.exit = contextlib.ExitStack()
        enter, portal = self.exit.enter_context, anyio.from_thread.start_blocking_portal
        self.server = enter(serve(lambda *request: self.answer(*request)))
        self.portal = enter(portal(*loop))
        self.elsewhere = enter(portal()) if chat is SYNC else self.portal
        own = own_client(chat, module, limits=module.Limits(max_connections=3))
        own = enter(self.portal.wrap_async_context_manager(own))
        self.options = {"base_url": self.server.url, "client": own, "max_retries": 0}

    @stateful.rule(target=streams, kind=st.sampled_from(MOSTLY_WHOLE))
    def open(self, kind):
        it = SimpleNamespace(kind=kind, ends={OUTCOMES[kind][1]}, open=False)
        it.stream = self.chat.stream("hi", timeout=5, **self.options)
        self.kept.append(it)
        return it

    @stateful.rule(it=streams, how=st.sampled_from(["next", "text", "with", "all"]))
    def take(self, it, how):
        if not it.open and sum(other.open for other in self.kept) == 3:
            return  # it would wait for a connection
        self.answer, it.open = in_turn(OUTCOMES[it.kind][0]), False
        within = it.stream if how == "with" else contextlib.nullcontext()
        chunks = it.stream.text() if how == "text" else it.stream
        try:
            with self.portal.wrap_async_context_manager(within):
                taken = self.portal.call(anext, chunks, None)
                while taken and how == "all" and it.kind != "slow":
                    taken = self.portal.call(anext, chunks, None)
            assert taken or it.stream.complete
            self.seen["whole"] += taken is None
            it.open = taken is not None and how != "with"
        except APIError as error:
            assert type(error) in it.ends
            self.seen["cut off" if type(error) is Truncated else "error"] += 1
        it.ends |= {Truncated} if how == "with" else set()

    @stateful.rule(it=streams)
    def close_from_elsewhere(self, it):
        if waits := it.open and it.kind == "slow":
            reader = self.portal.start_task_soon(take, it.stream)
            self.seen["close while it is read"] += 1
            pause(0.005)  # until the next chunk is waited for
        self.elsewhere.call(it.stream.aclose)
        assert not waits or type(reader.result(4).error) is Truncated
        it.open, it.ends = False, it.ends | {Truncated}

    @stateful.rule(it=stateful.consumes(streams), is_read=st.booleans())
    def drop(self, it, is_read):
        if is_read:
            self.take(it, "next")
        self.kept.remove(it)
        self.seen["drop while open"] += it.open
        it.stream = None

    @stateful.invariant()
    def none_is_left_open_or_complete_that_is_not(self):
        for it in self.kept:
            assert it.open or getattr(it.stream.response, "is_closed", True)
            whole = None in it.ends and it.stream.completion.text == "Hello"
            assert whole or not it.stream.complete

    def teardown(self):
        """Nothing is left open: three new streams have their connections at once."""
        with self.exit:
            for it in [it for it in self.kept if it.open]:
                self.close_from_elsewhere(it)
            for _ in range(3):
                self.take(self.open("slow"), "next")
            for it in self.kept[-3:]:
                assert it.open
                self.close_from_elsewhere(it)
        for _ in range(self.server.connections):
            assert self.server.left.acquire(timeout=20)


@pytest.mark.life
@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_streams_over_few_connections(chat, anyio_backend, name):
    """The rules reach each kind of end."""
    seen = collections.Counter()
    machine = functools.partial(Streams, chat, anyio_backend, needs(name), seen)
    runs = max(15, examples(0.15).max_examples)
    unshrunk = settings(max_examples=runs, phases=[Phase.generate])
    ends = {"whole", "cut off", "error", "close while it is read", "drop while open"}
    for _ in range(5):  # few runs do not always reach all
        stateful.run_state_machine_as_test(machine, settings=unshrunk)
        if ends <= (+seen).keys():
            break
    assert ends <= (+seen).keys()


class Http2Server(Server):
    """Calls `handle(h2, number of the stream)` for each request."""

    def talk(self, connection):
        server_side = needs("h2.config").H2Configuration(client_side=False)
        h2 = needs("h2.connection").H2Connection(server_side)
        h2.initiate_connection()
        connection.sendall(h2.data_to_send())
        while data := connection.recv(65536):
            for happened in h2.receive_data(data):
                if type(happened).__name__ == "StreamEnded":
                    self.heads.append("")
                    self.handle(h2, happened.stream_id)
            connection.sendall(h2.data_to_send())


@contextlib.asynccontextmanager
async def http2(chat, *parts, end=True):
    """A server that sends these parts, or resets the stream; options to ask it."""

    def handle(h2, stream):
        if not parts:
            return h2.reset_stream(stream)
        h2.send_headers(stream, [(":status", "200"), ("content-type", "x/y")])
        return h2.send_data(stream, b"".join(parts), end_stream=end)

    needs("h2")
    with Http2Server(handle) as server:
        async with own_client(chat, http1=False, http2=True) as own:
            yield server, {"base_url": server.url, "client": own}


@pytest.mark.life
async def test_http2_streams_share_a_connection(chat):
    async with http2(chat, *HELLO) as (server, options):
        left, other = (chat.stream("hi", **options) for _ in range(2))
        assert (await anext(left)).text == (await anext(other)).text == "Hel"
        await left.aclose()
        assert (await take(other)).text == "lo"
        assert (await ask(chat, **options)).text == "Hello"
        assert server.connections == 1


@pytest.mark.life
async def test_closing_wakes_a_reader_over_http2():
    async with http2(ASYNC, *BEGUN, end=False) as (_, options):
        stream = sse_chat.astream_chat("hi", **options)

        async def close():
            await anyio.sleep(0.2)  # until the next chunk is waited for
            await stream.aclose()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(close)
            answer = await take(stream)
        assert "closed here" in str(answer.error)


@pytest.mark.life
def test_a_sync_stream_closed_elsewhere_over_http2_ends_at_the_next_data():
    """Here that comes with another call over the same connection."""
    first_stream = []

    def handle(h2, stream):
        first_stream.append(stream)
        h2.send_headers(stream, [(":status", "200"), ("content-type", "x/y")])
        h2.send_data(stream, b"".join(BEGUN))
        if len(first_stream) == 2:
            h2.send_data(first_stream[0], LO)
            h2.send_data(stream, b"".join(ENDING), end_stream=True)

    needs("h2")
    http2_alone = {"http1": False, "http2": True, "verify": NO_TLS}
    with (
        Http2Server(handle) as server,
        httpx.Client(**http2_alone) as own,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        options = {"base_url": server.url, "client": own, "timeout": 20}
        stream = sse_chat.stream_chat("hi", **options)
        assert [next(stream).text for _ in BEGUN] == ["Hel", "lo"]
        waiting = pool.submit(next, stream)
        pause(0.2)  # until the next chunk is waited for
        stream.close()
        assert not waiting.done()
        assert ask_sync(**options).text == "Hello"
        with pytest.raises(Truncated, match="closed here"):
            assert waiting.result(20).text == "lo"  # which may still come
            next(stream)


@pytest.mark.life
async def test_http2_streams_that_are_reset_are_asked_for_again(chat, waits):
    """Once at once, as where a kept connection is dead; then as often as allowed."""
    for retries in (0, 2):
        async with http2(chat) as (server, options):
            error = (await ask(chat, **options, max_retries=retries)).error
            assert type(error) is Unreachable
            assert len(server.heads) == retries + 2


@pytest.mark.life
async def test_a_hundred_http2_streams_do_not_make_the_next_spin(chat):
    """Sync code closes them first: there httpx would wait for ever until one ends."""
    async with http2(chat, *BEGUN, end=False) as (server, options):
        kept = [chat.stream("hi", **options) for _ in range(100)]
        for stream in kept:
            assert (await anext(stream)).text == "Hel"
            if chat is SYNC:
                await stream.aclose()
        spent = time.process_time()
        answer = await ask(chat, **options, timeout=1, first_token_timeout=1)
        assert time.process_time() - spent < 1
        assert type(answer.error) in (Truncated, Timeout, Unreachable)
        assert len(server.heads) <= 100 + 4


@pytest.mark.life
async def test_streams_over_tls(chat):
    with serve(in_turn(GOOD, play(HEAD, ALIVE)), tls_of_server()) as server:
        options = {"base_url": server.url.replace("http:", "https:")}
        async with own_client(chat, verify=tls_of_client(), limits=ONE) as own:
            options["client"] = own
            assert (await ask(chat, **options)).text == "Hello"
            error = (await ask(chat, **options, **FIRST_LONG)).error
            assert (type(error), len(server.heads)) == (Timeout, 2)


# ---- The request, and what is secret in it -------------------------------------------

KEY = CANARY.encode()
ECHO = json.dumps({"error": {"message": f"bad key {CANARY}", "code": CANARY}}).encode()
SPELT = b"".join(b"\\u%04x" % byte for byte in KEY)
ECHOES = {  # what may hold the secret
    "status": refuse(401, body=ECHO),
    "status in text": refuse(401, body=b"bad key " + KEY),
    "reason": http(status=f"401 bad {CANARY}"),
    "redirect": refuse(307, f"Location: http://127.0.0.1:9/{CANARY}?k={CANARY}"),
    "header": refuse(401, f"X-Key: {CANARY}"),
    "spelt": refuse(401, body=ECHO.replace(KEY, SPELT)),
    "content type": http(b"<p>", kind=f"text/html; {CANARY}"),
    "no HTTP": KEY + b"\r\n\r\n",
    "no chunk": OPEN_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + KEY + b"\r\n",
    "cut": chunked(*BEGUN, end=False),
    "timeout": play(HEAD, GONE),
    "too large": chunked(b"data: " + KEY * 1000),
    **{f"{n} before": chunked(b"data: " + b"x" * n + KEY + b"\n\n")
       for n in range(184, 200, 4)},
}  # fmt: skip


class FreshKey(httpx.Auth):
    """Puts a key into each request, or into a request of its own."""

    def __init__(self, key=CANARY, *, copies=False):
        self.key, self.copies = key, copies

    def auth_flow(self, request):
        if self.copies:
            more = {"headers": request.headers, "content": request.content}
            request = httpx.Request(request.method, request.url, **more)
        request.headers["Authorization"] = f"Bearer {self.key}"
        yield request


SECRETS = {  # of the URL, of the call, of the caller's own client
    "key": ("{}", {"api_key": f" {CANARY}\n"}, {}),
    "header": ("{}", {"headers": {"X-API-Key": CANARY}}, {}),
    "cookie": ("{}", {"headers": {"Cookie": f"session={CANARY}"}}, {}),
    "client's": ("{}", {}, {"headers": {"x-secret": CANARY}}),
    "client's key": ("{}", {}, {"headers": {"Authorization": f"Bearer {CANARY}"}}),
    "client's auth": ("{}", {}, {"auth": FreshKey()}),
    "request of an auth": ("{}", {}, {"auth": FreshKey(copies=True)}),
    "query": (f"{{}}?key={CANARY}", {}, {}),
    "password": (f"user:{CANARY.replace('/', '%2F')}@{{}}", {}, {}),
}  # fmt: skip


def everything(error):
    """All that a log may show of an error."""
    shown = [str(error), repr(vars(error)), repr(vars(pickled(error)))]
    # Not the error itself: where Dask has been imported, its cause goes along.
    shown += [*traceback.format_exception(error), repr(pickle.dumps(vars(error)))]
    return "".join(shown).replace("\\", "")


@pytest.mark.parametrize("answer", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
async def test_no_secret_is_in_any_error(chat, caplog, secret, answer):
    caplog.set_level("INFO")  # at which httpx logs the URL
    url, options, own = secret
    timeout = httpx.Timeout(20, read=0.05 if answer is ECHOES["timeout"] else 20)
    options = options | {"max_retries": 0, "max_event_bytes": 9000, "timeout": timeout}
    with serve(answer) as server:
        options["base_url"] = url.format(server.url.removeprefix("http://"))
        async with own_client(chat, **own) as client:
            options |= {"client": client} if own else {}
            async with chat.client(**options) as ours:
                asked = await take(ours.stream("hi"))
            both = [getattr(each, "twin", each) for each in (ours, asked.stream)]
            shown = everything(asked.error) + repr(both)
            assert CANARY[:4] not in shown
            assert "user:" not in shown + caplog.text
    assert await until(lambda: server.heads)  # a read may time out before it is there
    login = base64.b64encode(f"user:{CANARY}".encode()).decode()
    assert CANARY in server.heads[0] or login in server.heads[0]


SECRET_HEADERS = """X-Auth Cookie X-Credentials X-JWT X-Key X-Passwd X-Password X-Secret
X-Token X-Signature X-Sig"""


@pytest.mark.parametrize("name", SECRET_HEADERS.split())
def test_what_names_a_secret(name):
    with serve(refuse(400, body=KEY)) as server:
        error = ask_sync(server.url, headers={name: CANARY}).error
    assert CANARY[:4] not in everything(error)


def test_a_secret_that_begins_with_another_is_left_out_whole():
    both = {"X-Key": CANARY, "X-Other-Key": f"{CANARY}-and-more"}
    told = refuse(400, body=both["X-Other-Key"].encode())
    for headers in (both, dict(reversed(both.items()))):
        with serve(told) as server:
            error = ask_sync(server.url, headers=headers).error
        assert CANARY[:4] not in everything(error) and "more" not in everything(error)


def test_the_request_of_an_auth_flow_is_read_within_the_timeout():
    """It comes without the time limits that httpx puts on a request."""

    async def check(chat):
        with serve(play(HEAD, BEGUN, GONE)) as server:
            async with own_client(chat, auth=FreshKey(copies=True)) as own:
                answer = await ask(chat, server.url, client=own, timeout=0.3)
        assert (type(answer.error), answer.text) == (Truncated, "Hello")
        assert "no data for 0.3 s" in str(answer.error)

    in_every_mode(check)


async def test_a_key_that_no_header_can_hold_is_not_shown(chat):
    """An auth flow reads it from a file, with the end of its line."""
    with serve(GOOD) as server:
        async with own_client(chat, auth=FreshKey(f"{CANARY}\n")) as own:
            error = (await ask(chat, server.url, client=own)).error
    assert type(error) is Unreachable
    assert re.match("the request could not be sent: .*header", str(error))
    assert CANARY[:9] not in everything(error)


async def test_redacting_keys_changes_nothing_else(chat):
    for key, message, shown in (
        ('sk-"canary"\\/7', 'bad sk-"canary"\\/7!', r"bad [^7]+!"),  # escaped in JSON
        ("null", "null", "null"),  # what is short is no secret
        ("message", "the message", "the message"),
    ):
        body = json.dumps({"error": {"message": message, "code": None, "type": "null"}})
        with serve(refuse(401, body=body.encode())) as server:
            error = (await ask(chat, server.url, api_key=key)).error
        assert re.fullmatch(shown, error.message)
        assert (error.code, error.type) == (None, "null")
        assert "canary" not in everything(error)


def test_the_most_specific_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-env\n")
    basic = "Basic " + base64.b64encode(b"us@er:p:w").decode()
    no_password = "Basic " + base64.b64encode(b"user:").decode()
    headers = {"Authorization": "Bearer sk-own"}
    with serve(GOOD) as server, httpx.Client(headers=headers, verify=NO_TLS) as own:
        for options, sent in (
            ({}, ["Bearer sk-env"]),
            ({"api_key": "sk-arg"}, ["Bearer sk-arg"]),
            ({"api_key": ""}, []),
            ({"base_url": server.url.replace("//", "//us%40er:p%3Aw@")}, [basic]),
            ({"base_url": server.url.replace("//", "//user@")}, [no_password]),
            ({"headers": {"Authorization": " Bearer sk-head\n"}}, ["Bearer sk-head"]),
            ({"client": own}, ["Bearer sk-own"]),
        ):
            ask_sync(**{"base_url": server.url} | options)
            assert re.findall("(?i)authorization: (.*)\r", server.heads[-1]) == sent


SYSTEM, ASKING = {"role": "system", "content": "S"}, {"role": "user", "content": "hi"}
OLLAMA = "http://localhost:11434/v1/"
ASKED = {  # base URL: where "chat/completions" is put
    None: OLLAMA, " ": OLLAMA, "http://h:8": "http://h:8/v1/", "http://h/": "http://h/v1/",
    "h/v1": "http://h/v1/", "localhost:8080": "http://localhost:8080/v1/",
    "192.168.1.5/v1/": "http://192.168.1.5/v1/", "[::1]:81/v1": "http://[::1]:81/v1/",
    "api.x.com": "https://api.x.com/v1/", "a.b/@acme/v1": "https://a.b/@acme/v1/",
    "a.b:8/v1?a=b.c/d@e": "https://a.b:8/v1/?a=b.c/d@e", "http://h/v1//": "http://h/v1/",
    "http://h/v1/chat/completions/": "http://h/v1/", "http://h?a=b": "http://h/v1/?a=b",
    "HTTP://h/api/v3#top": "http://h/api/v3/", "  http://h/v1 \t\r\n": "http://h/v1/",
    "https://h/x?v=1&x=%20": "https://h/x/?v=1&x=%20",
    "https://h/d/chat/completions?v=1": "https://h/d/?v=1",
}  # fmt: skip


@pytest.mark.parametrize("base_url", ASKED, ids=lambda url: (url or "none").strip())
async def test_base_urls_in_every_form(chat, monkeypatch, base_url):
    def answer(request):
        assert (request.method, str(request.url)) == ("POST", url)
        return httpx.Response(200, stream=httpx.ByteStream(HELLO_BYTES))

    url = re.sub(r"/(?=\?|$)", "/chat/completions", ASKED[base_url], count=1)
    assert (await ask_mock(chat, answer, base_url=base_url)).text == "Hello"
    monkeypatch.setenv("OPENAI_BASE_URL", base_url or "")
    assert (await ask_mock(chat, answer)).text == "Hello"


async def test_a_request_has_the_options_of_call_and_client(chat, monkeypatch):
    """The options of a call come before those of its client."""
    odd = ASKING | {"content": "你好 \ud83d"}
    talk = (odd, ChatCompletion.from_dict(WHOLE).choices[0].message)
    options = {"api_key": "sk-a", "model": "m", "system": "T", "temperature": 0}
    headers = {"User-Agent": "mine", "X-A": "b", "X-C": "d"}
    own = {"model": "other", "system": "S", "temperature": None, "stop": ["x"]}
    with serve(GOOD_KEPT) as server:
        url = server.url
        async with chat.client(base_url=url, headers=headers, **options) as client:
            await take(client.stream("hi"))
            await client.generate(talk, headers={"x-c": "e"}, **own)
            for option in ("base_url", "api_key", "client"):
                with pytest.raises(TypeError, match=option):
                    client.stream("hi", **{option: None})
        await ask(chat, server.url, messages=[*talk])
        monkeypatch.setenv("OPENAI_MODEL", "env")
        await ask(chat, server.url, top_p=None)
    first, second = [SYSTEM | {"content": "T"}, ASKING], [SYSTEM, odd, MESSAGE]
    assert [json.loads(body) for body in server.bodies] == [
        {"model": "m", "messages": first, "stream": True, "temperature": 0},
        {"model": "other", "messages": second, "stream": False, "stop": ["x"]},
        {"messages": [odd, MESSAGE], "stream": True},
        {"model": "env", "messages": [ASKING], "stream": True},
    ]
    accepted = ("text/event-stream", "application/json")
    for head, accept, value in zip(server.heads, accepted, "de", strict=False):
        assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
        sent = {"Authorization": "Bearer sk-a", "Accept": accept, "X-C": value}
        sent |= {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        for name, value in (headers | sent).items():
            assert re.findall(f"(?i)\n{name}: (.*)\r", head) == [value]


URLS = [
    "ftp://h/v1",
    "http://",
    "http://[::1",
    "http://h:99999",
    "http://h:0",
    "http://h:x",
    "://",
]
BAD_KEYS = {
    "a newline": "sk\n-canary",
    "an umlaut": "sk-cänary",
    "NUL": "sk-canary\0",
    "a line separator": "sk-c\u2028nary",
}
UNFIT = (math.nan, 0, -1, -math.inf)
OPENAI = {"http_client": "client", "extra_query": "base_url"}
OPENAI |= dict.fromkeys(("extra_headers", "default_headers", "organization"), "headers")
# Options, the error, and what it says
INVALID_OPTIONS = {
    **each("base_url {}", URLS, lambda url: (
        {"base_url": url}, ValueError, "http://localhost:11434/v1",
    )),
    **each("api_key with {}", BAD_KEYS, lambda name: (
        {"api_key": BAD_KEYS[name]}, ValueError, "key",
    )),
    **each("Authorization with {}", BAD_KEYS, lambda name: (
        {"headers": {"Authorization": BAD_KEYS[name]}}, ValueError, "key",
    )),
    "NUL in a header": ({"headers": {"X": "\0"}}, ValueError, "header"),
    "NUL in a name": ({"headers": {"X\0": ""}}, ValueError, "header"),
    "a header of int": ({"headers": {"X": 5}}, TypeError, "X"),
    "an int as a header": ({"headers": {5: "X"}}, TypeError, "5"),
    "max_retries -1": ({"max_retries": -1}, ValueError, "max_retries"),
    **each("timeout {}", UNFIT, lambda n: ({"timeout": n}, ValueError, "timeout")),
    **each("first_token_timeout {}", UNFIT, lambda n: (
        {"first_token_timeout": n}, ValueError, "first_token",
    )),
    "timeout of str": ({"timeout": "5"}, TypeError, "timeout"),
    "stream": ({"stream": False}, TypeError, "stream_chat"),
    "NaN": ({"temperature": math.nan}, ValueError, "JSON"),
    "a set": ({"tools": [{1, 2}]}, TypeError, "set"),
    "a function as api_key": ({"api_key": lambda: "sk"}, TypeError, "api_key"),
    "bytes as api_key": ({"api_key": b"sk-canary"}, TypeError, "api_key.*bytes"),
    "a str as headers": ({"headers": "X"}, TypeError, "headers.*str"),
    "an int as extra_body": ({"extra_body": 1}, TypeError, "extra_body.*int"),
    "a class as client": ({"client": httpx.Client}, TypeError, "client.*type"),
    "half a client": ({"client": SimpleNamespace(send=1)}, TypeError, "client.*Names"),
    "another client": ({"client": ServerSentEvent()}, TypeError, "client.*Event"),
    **each("{}", ("azure_endpoint", "azure_deployment"), lambda n: (
        {n: "x"}, TypeError, f"{n}.*the URL of the deployment as base_url",
    )),
    "default_query": ({"default_query": {}}, TypeError, "default_query.*base_url"),
    "project": ({"project": "p"}, TypeError, "project.*headers"),
    "api_version": ({"api_version": "1"}, TypeError, "api_version.*base_url"),
    **{name: ({name: "x"}, TypeError, f"{name}.*{ours}")
       for name, ours in OPENAI.items()},
}  # fmt: skip


@pytest.mark.parametrize("row", INVALID_OPTIONS.values(), ids=INVALID_OPTIONS)
async def test_invalid_options_raise_at_once(chat, row):
    """No message of such an error shows a key."""
    options, error, says = row
    for make in (functools.partial(chat.stream, "hi"), chat.client):
        with pytest.raises(error, match=says) as caught:
            make(**options)
        assert "nary" not in str(caught.value)


async def test_a_client_of_the_other_kind_is_refused(chat):
    async with own_client(ASYNC if chat is SYNC else SYNC) as other:
        for make in (functools.partial(chat.stream, "hi"), chat.client):
            with pytest.raises(TypeError, match="Client"):
                make(client=other)


@pytest.mark.parametrize("wrong", [None, 5, {"role": "user"}, b"hi"], ids=as_words)
async def test_messages_of_other_types_are_refused(chat, wrong):
    with pytest.raises(TypeError, match="messages"):
        chat.stream(wrong)


@pytest.mark.parametrize(
    "wrong",
    ["hi", None, ChatCompletion(), ChatCompletion.Choice()],
    ids=lambda wrong: type(wrong).__name__,
)
async def test_a_message_of_another_type_is_refused(chat, wrong):
    kind = f"messages.1.: .*{type(wrong).__qualname__}"
    with pytest.raises(TypeError, match=kind):
        chat.stream([ASKING, wrong])


async def test_messages_may_be_any_sequence(chat):
    with serve(GOOD) as server:
        await ask(chat, server.url, messages=collections.deque([ASKING], maxlen=9))
    assert json.loads(server.bodies[0])["messages"] == [ASKING]


async def test_a_url_may_be_an_object(chat):
    with serve(GOOD) as server:
        assert (await ask(chat, httpx.URL(server.url))).text == "Hello"


async def test_stream_options_are_for_streams(chat):
    """A client has them for all its calls, and servers refuse them elsewhere."""
    options = {"stream_options": {"include_usage": True}}
    with serve(GOOD) as server:
        async with chat.client(base_url=server.url, **options) as client:
            await take(client.stream("hi"))
            await client.generate("hi")
            await client.generate("hi", extra_body={"stream": True})
    streamed, whole, asked_to_stream = map(json.loads, server.bodies)
    for body in (streamed, asked_to_stream):
        assert body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in whole


@pytest.mark.parametrize("n", [2, 2.0, "2"], ids=repr)
async def test_n_counts_however_it_is_written(chat, n):
    with serve(http(*BEGUN, STOPPED)) as server:
        error = (await ask(chat, server.url, n=n)).error
    assert type(error) is Truncated


async def test_the_headers_are_on_what_generate_gives_and_on_its_error(chat):
    """They are no field, which asdict or a web framework would publish."""
    for body, error in ((GOOD, NoneType), (chunked(*BEGUN, end=False), Truncated)):
        answer = body.replace(b"\r\n", b"\r\nX-Request-Id: req_1\r\n", 1)
        with serve(answer) as server:
            got = await ask(chat, server.url, "generate")
        assert type(got.error) is error
        assert got.completion.response_headers["x-request-id"] == "req_1"
        assert "response_headers" not in dataclasses.asdict(got.completion)
    assert dict(ChatCompletion().response_headers) == {}


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTPS_PROXY", "http_proxy"])
async def test_a_socks_proxy_without_its_package_is_one_line(chat, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, "socks5://user:pw@127.0.0.1:9")
    error = (await ask(chat, "http://localhost:9", max_retries=0)).error
    assert type(error) is Unreachable
    advice = r"pip install httpx\[socks\]"
    assert re.fullmatch(f".*{advice}.*{name} is socks5://127.0.0.1:9", str(error))


@pytest.fixture
def threads(monkeypatch):
    """The threads that the code under test starts in the thread of the test."""
    noted, start = [], threading.Thread.start

    def note(thread):
        if threading.current_thread() is threading.main_thread():
            noted.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", note)
    return noted


# ---- Programs in processes of their own: collected garbage, forks, no threads --------


@functools.cache
def program_file():
    """The bytecode of the module, for all processes; under coverage its source."""
    source = Path(sse_chat.__file__)
    if "coverage" in sys.modules:
        return source
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return Path(py_compile.compile(source, folder / "sse_chat.pyc", doraise=True))


# Errors kept in the frames of their loops, and streams dropped unfinished, while the
# garbage collector looks at everything after another number of allocations each time:
# so it comes inside httpcore's locks, too.
CYCLES = """
import gc, threading, time

def one(client, number):
    stream = client.stream(prompts[number % 4])
    try:
        for chunk in stream:
            if number % 4 == 0:
                raise KeyError(number)
            if number % 4 == 1:
                break
    except Exception as error:
        kept = error

def work():
    for number in numbers:
        gc.set_threshold(1 + number * 37 % 700, 1, 1)
        one(client, number)
        done.append(number)

client = sse_chat.ChatClient(base_url=url, timeout=10, max_retries=0)
prompts = ("endless", "endless", "cut", "whole")
numbers, done = iter(range(500)), []
workers = [threading.Thread(target=work, daemon=True) for _ in range(8)]
gc.collect()
gc.freeze()
for worker in workers:
    worker.start()
end = time.monotonic() + 9
for worker in workers:
    worker.join(max(0, end - time.monotonic()))
gc.set_threshold(700)
gc.collect()
print(len(done))
if len(done) == 500:
    client.close()
sys.stdout.flush()
os._exit(0)
"""

# A client that has a connection when its process forks; each process counts the answers
# to what another asked.
FORKS = """
def foreign(client, name):
    wrong = 0
    for number in range(10):
        try:
            wrong += client.generate(f"{name}-{number}").text != f"{name}-{number}"
        except sse_chat.APIError:
            wrong += 1
    return wrong

client = sse_chat.ChatClient(base_url=url, timeout=5, max_retries=0)
wrong = foreign(client, "first")
children = []
for name in range(3):
    if (child := os.fork()) == 0:
        signal.alarm(15)
        os._exit(foreign(client, name))
    children.append(child)
wrong += foreign(client, "parent")
print(wrong, *(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children))
"""

ASYNC_FORKS = """
import asyncio

async def foreign(client, name):
    wrong = 0
    for number in range(10):
        try:
            answer = await client.generate(f"{name}-{number}")
            wrong += answer.text != f"{name}-{number}"
        except sse_chat.APIError:
            wrong += 1
    return wrong

async def main():
    client = sse_chat.AsyncChatClient(base_url=url, timeout=5, max_retries=0)
    print(await foreign(client, "first"), flush=True)
    if (child := os.fork()) == 0:
        signal.alarm(15)
        asyncio._set_running_loop(None)
        os._exit(asyncio.run(foreign(client, "child")))
    print(await foreign(client, "parent"))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

asyncio.run(main())
"""

# No thread can be started: a limit is reached, or the platform has none.
NO_THREADS = """
import threading, time

def refuse(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = refuse
for options in ({}, {"first_token_timeout": 9}):
    client = sse_chat.ChatClient(base_url=url, max_retries=0, **options)
    print("".join(client.stream("whole").text()), client.generate("whole").text)
    try:
        client.generate("refused")
    except sse_chat.APIStatusError as error:
        print(error.status_code, error.message)
    for chunk in client.stream("endless"):
        print(chunk.text)
        break
    began = time.monotonic()
    print(client.generate("silent", timeout=9).text, time.monotonic() - began < 6)
    text = "".join(client.stream("silent", timeout=9).text())
    print(text, time.monotonic() - began < 6)
    client.close()
"""

# A stream that nobody closes neither holds up the end of the program nor says a word.
LEFT_OPEN = """
stream = sse_chat.stream_chat("endless", base_url=url, first_token_timeout=99)
cycle = [stream]
cycle.append(cycle)
print(next(stream).text)
"""

WITHOUT_THREADS = "Hello Hello\n401 boom\nx\nHello True\nHello True\n"
PROGRAMS = {  # and what they print
    "cycles": (CYCLES, "500\n"),
    "forks": (FORKS, "0 0 0 0\n"),
    "async forks": (ASYNC_FORKS, "0\n0\n0\n"),
    "no threads": (NO_THREADS, WITHOUT_THREADS * 2),
    "left open": (LEFT_OPEN, "x\n"),
}
BLOCKED = {"httpx": "httpx2", "httpx2": "httpx"}  # so that the other is the one used


def run_program(text, url, module="httpx", **env):
    """Run it in a process of its own; give what it prints."""
    needs(module)
    begin = f"""import os, signal, sys
sys.modules["{BLOCKED[module]}"] = None
url = sys.argv[1]
import sse_chat
"""
    command = [sys.executable, "-W", "ignore", "-c", begin + text, url]
    options = {"capture_output": True, "text": True, "timeout": PATIENCE}
    options |= {"cwd": program_file().parent, "env": os.environ | env}
    done = subprocess.run(command, **options)
    assert done.stderr == ""
    return done.stdout


def by_prompt(server):
    """Answer as the prompt says; give back any other, in two pieces."""
    known = {"whole": LATE_END, "refused": play(refuse(401), KEEP)}
    known["endless"] = play(HEAD, itertools.repeat((chunk("x"), 0.01)))
    known["cut"] = play(chunked(*BEGUN, end=False))
    known["silent"] = play(chunked(*HELLO, end=False), GONE)  # after [DONE]

    def answer(connection, number):
        prompt = json.loads(server().bodies[number - 1])["messages"][-1]["content"]
        body = chunked(chunk(prompt), *HELLO[2:])
        echo = play(body[:200], 0.001, body[200:], KEEP)
        return known.get(prompt, echo)(connection, number)

    return answer


def chunk(text):
    choice = {"index": 0, "delta": {"content": text}}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def check_program(name, module):
    program, printed = PROGRAMS[name]
    with serve(by_prompt(lambda: server)) as server:
        assert run_program(program, server.url, module) == printed
        for _ in range(server.connections):
            assert server.left.acquire(timeout=PATIENCE)


@functools.cache
def ends_of_programs():
    """Start all programs at the same time, since they wait a lot; give their ends."""
    program_file()  # made here, not by each of them
    cases = [(name, "httpx") for name in PROGRAMS] + [("cycles", "httpx2")]
    with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        return {case: pool.submit(check_program, *case) for case in cases}


@pytest.mark.parametrize("module", ["httpx", "httpx2"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_end_and_get_their_own_answers(name, module):
    """Each connection is closed in the end, and nothing is on standard error."""
    if module == "httpx2" and name != "cycles":
        pytest.skip("it is the same code")
    needs(module)
    ends_of_programs()[name, module].result()


# ---- Threads: one for the process, and none for each stream that is read to its end --

MANY_READS = [
    (b"%x\r\n%s\r\n" % (len(part), part), 0.001) for part in (PING, PING, *HELLO)
]
READ_TO_THE_END = {  # an answer, how many of them, options
    "at once": (GOOD_KEPT, 50, {}),
    "the end comes late": (LATE_END, 5, {}),
    "many reads": (
        play(chunked(end=False), MANY_READS, b"0\r\n\r\n", KEEP),
        20,
        {"first_token_timeout": 9},
    ),
}


@pytest.mark.parametrize("case", READ_TO_THE_END.values(), ids=READ_TO_THE_END)
def test_one_thread_times_all_streams(threads, case):
    """It is started when it is first needed."""
    answer, number, options = case
    with serve(answer) as server:
        threads.clear()  # that of the server
        with sse_chat.ChatClient(base_url=server.url, **options) as client:
            for _ in range(number):
                assert "".join(client.stream("hi").text()) == "Hello"
        assert server.connections == 1
        assert len(threads) <= 1


# ---- What users write in their tests: mocks, and hooks of the client -----------------

SLOW_DOWN = b'{"error": {"message": "slow down"}}'
Answer = namedtuple("Answer", "status data kind error says text")
MOCKED = [
    Answer(200, HELLO_BYTES, "text/event-stream", None, "", "Hello"),
    Answer(200, b"".join(BEGUN), "text/event-stream", Truncated, "cut off", "Hello"),
    Answer(200, b"".join([*BEGUN, FAILED]), "x/y", APIError, CANARY, "Hello"),
    Answer(200, JSON, "application/json", None, "", "Hello"),
    Answer(200, b"<p>", "text/html", Invalid, "text/html", ""),
    Answer(429, SLOW_DOWN, "application/json", Status, "slow down", ""),
    Answer(401, SLOW_DOWN, "application/json", Status, "slow down", ""),
]
AT = "http://models.example/v1"
POSTED = f"{AT}/chat/completions"


def mocked(module, answer, how):
    """The response to give, as users make it."""
    headers, data = {"Content-Type": answer.kind}, answer.data
    as_json = {} if how != "json" or data[:1] != b"{" else {"json": json.loads(data)}
    body = (
        as_json
        or {
            "json": {"content": data},
            "content": {"content": data},
            "text": {"text": data.decode()},
            "stream": {"stream": module.ByteStream(data)},
            "gzip": {"content": gzip.compress(data)},
        }[how]
    )
    headers |= {"Content-Encoding": "gzip"} if how == "gzip" else {}
    return module.Response(answer.status, headers=headers, **body)


@contextlib.asynccontextmanager
async def mock_transport(chat, module, how, answer):
    def respond(request):
        return mocked(module, answer, how)

    async with own_client(chat, module, transport=module.MockTransport(respond)) as own:
        yield {"client": own}


@contextlib.asynccontextmanager
async def async_mock_transport(chat, module, how, answer):
    async def respond(request):
        await anyio.sleep(0)
        return mocked(module, answer, how)

    if chat is SYNC:
        pytest.skip("an httpx.Client does not take it")
    async with own_client(chat, module, transport=module.MockTransport(respond)) as own:
        yield {"client": own}


@contextlib.asynccontextmanager
async def own_transport(chat, module, how, answer):
    """A transport of the user's, which gives the body in pieces, or a read response."""

    class Pieces(module.SyncByteStream, module.AsyncByteStream):
        def __iter__(self):
            yield from cut(answer.data, [5, 100])

        async def __aiter__(self):
            for piece in cut(answer.data, [5, 100]):
                yield piece

    class Transport(module.BaseTransport, module.AsyncBaseTransport):
        def handle_request(self, request):
            if how == "content":
                return mocked(module, answer, how)
            headers = {"Content-Type": answer.kind}
            return module.Response(answer.status, headers=headers, stream=Pieces())

        async def handle_async_request(self, request):
            await request.aread()
            return self.handle_request(request)

    async with own_client(chat, module, transport=Transport()) as own:
        yield {"client": own}


@contextlib.asynccontextmanager
async def hooks(chat, module, how, answer):
    """Event hooks, as loggers and those who want to see the body write them."""
    told = []

    def see(response):
        told.append(f"{response.request.method} {response.url} {response.status_code}")
        if how == "read":
            told.append((response.read(), response.text)[1])

    async def asee(response):
        if how == "read":
            await response.aread()
        see(response) if how == "log" else told.append(response.text)

    headers = {"status": f"{answer.status} Oh", "kind": answer.kind}
    with serve(http(answer.data, **headers)) as server:
        hook = {"response": [see if chat is SYNC else asee]}
        async with own_client(chat, module, event_hooks=hook) as own:
            yield {"client": own, "base_url": server.url}
    assert told[-1] == (
        answer.data.decode()
        if how == "read"
        else f"POST {server.url}/chat/completions {answer.status}"
    )


@contextlib.asynccontextmanager
async def respx(chat, module, how, answer):
    """It stands in for the connections of each client, that of a call, too."""
    with needs("respx").mock() as router:
        router.post(POSTED).mock(side_effect=lambda _: mocked(module, answer, how))
        yield {}


@contextlib.asynccontextmanager
async def pytest_httpx(chat, module, how, answer, fixture):
    mock = fixture("httpx_mock")
    options = {"content": answer.data, "headers": {"Content-Type": answer.kind}}
    if how == "stream":
        body = options.pop("content")
        options["stream"] = needs("pytest_httpx").IteratorStream(cut(body, [5, 100]))
    mock.add_response(url=POSTED, method="POST", status_code=answer.status, **options)
    yield {}


MOCKS = {
    **{f"MockTransport {how}=": (mock_transport, how) for how in ("content", "text")},
    **{f"MockTransport {how}=": (mock_transport, how) for how in ("json", "stream")},
    "MockTransport packed": (mock_transport, "gzip"),
    "async MockTransport": (async_mock_transport, "content"),
    "async MockTransport stream=": (async_mock_transport, "stream"),
    "own transport": (own_transport, "content"),
    "own transport in pieces": (own_transport, "stream"),
    "hook that logs": (hooks, "log"),
    "hook that reads": (hooks, "read"),
    "respx": (respx, "text"),
    "respx stream=": (respx, "stream"),
    "pytest-httpx": (pytest_httpx, "content"),
    "pytest-httpx stream=": (pytest_httpx, "stream"),
}


@pytest.mark.parametrize("module", ["httpx", "httpx2"])
@pytest.mark.parametrize("name", MOCKS)
async def test_a_mocked_answer_is_as_good_as_another(chat, request, name, module):
    mock, how = MOCKS[name]
    options = {}
    if mock in (respx, pytest_httpx):
        needs(mock.__name__)
        if module == "httpx2":
            pytest.skip(f"{mock.__name__} knows httpx alone")
    if mock is pytest_httpx:
        options = {"fixture": request.getfixturevalue}
    for answer, asked in itertools.product(MOCKED, ("stream", "generate")):
        async with mock(chat, needs(module), how, answer, **options) as where:
            usual = {"base_url": AT, "max_retries": 0}
            got = await ask(chat, how=asked, **usual | where)
        assert type(got.error) is (answer.error or NoneType), (answer, got.error)
        assert answer.says in str(got.error)
        assert got.completion.text == answer.text
        if answer.status != 200:
            assert got.error.status_code == answer.status
            assert got.error.message == answer.says
            assert got.error.response.json() == json.loads(answer.data)


RAISERS = [  # a status, whether the hook reads; the requests, what the error says
    (401, True, 1, "slow down"),
    (401, False, 1, "401"),
    (404, True, 1, "slow down"),
    (503, True, 3, "slow down"),
    (503, False, 3, "503"),
]


@pytest.mark.parametrize("module", ["httpx", "httpx2"])
@pytest.mark.parametrize(("status", "reads", "requests", "says"), RAISERS, ids=as_words)
async def test_a_hook_that_raises_for_a_status_tells_the_status(
    chat, waits, module, status, reads, requests, says
):
    def check(response):
        if reads:
            response.read()
        response.raise_for_status()

    async def acheck(response):
        if reads:
            await response.aread()
        response.raise_for_status()

    hook = {"response": [check if chat is SYNC else acheck]}
    with serve(refuse(status, body=SLOW_DOWN)) as server:
        async with own_client(chat, needs(module), event_hooks=hook) as own:
            error = (await ask(chat, server.url, client=own)).error
    assert (type(error), error.status_code) == (Status, status)
    assert says in str(error)
    assert len(server.heads) == requests


async def test_a_response_without_a_request_is_as_good_as_another(chat, monkeypatch):
    """As a test gives that puts its own `send` into httpx."""

    def send(self, request, **options):
        return httpx.Response(200, content=HELLO_BYTES)

    async def asend(self, request, **options):
        return httpx.Response(200, content=HELLO_BYTES)

    monkeypatch.setattr(httpx.Client, "send", send)
    monkeypatch.setattr(httpx.AsyncClient, "send", asend)
    answer = await ask(chat, NOBODY)
    assert (answer.error, answer.text) == (None, "Hello")


class Odd(Exception):
    """What no library raises."""


OF_ANY_KIND = [Odd("odd"), RuntimeError("odd"), KeyError("odd"), ValueError("odd")]
OF_ANY_KIND += [httpx.ConnectError("odd"), OSError("odd"), httpx.InvalidURL("odd")]


@pytest.mark.life
@pytest.mark.parametrize(
    "raised", OF_ANY_KIND, ids=lambda raised: type(raised).__name__
)
async def test_what_a_transport_or_hook_raises_is_how_the_attempt_ended(
    chat, waits, raised
):
    def at_once(request):
        raise raised

    class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self):
            yield BEGUN[0]
            raise raised

        async def __aiter__(self):
            yield BEGUN[0]
            raise raised

    def later(request):
        return httpx.Response(200, stream=Broken())

    for respond, error, text in ((at_once, Unreachable, ""), (later, Truncated, "Hel")):
        answer = await ask_mock(chat, respond, max_retries=0)
        assert (type(answer.error), answer.text) == (error, text)
        assert answer.error.__cause__ is raised
        assert "odd" in str(answer.error)


@pytest.mark.parametrize(
    "kind", ["CloseError", "ReadError", "RemoteProtocolError", "WriteError"]
)
async def test_a_connection_that_breaks_in_any_way_is_asked_past(chat, waits, kind):
    """Once at once, as it may have been a kept one; then as retries are allowed."""
    asked = []

    def answer(request):
        asked.append(request)
        raise getattr(httpx, kind)("odd")

    error = (await ask_mock(chat, answer, max_retries=1)).error
    assert (type(error), error.is_retryable, len(asked)) == (Unreachable, True, 3)


TIMED_OUT = {  # what httpx raises; what is said, and whether it is asked again
    "ConnectTimeout": ("timed out connecting", True),
    "PoolTimeout": ("timed out waiting for a free connection of the client", True),
    "ReadTimeout": ("timed out waiting for the answer", False),
    "WriteTimeout": ("timed out sending", False),
}


@pytest.mark.parametrize("kind", TIMED_OUT)
async def test_a_timeout_says_what_took_too_long(chat, waits, kind):
    def answer(request):
        raise getattr(httpx, kind)("odd")

    error = (await ask_mock(chat, answer, max_retries=1)).error
    assert (error.message, error.is_retryable) == TIMED_OUT[kind]
    assert (type(error), len(waits)) == (Timeout, int(error.is_retryable))


class Foreign(Exception):
    """Like botocore's, which keeps a dict under this name."""

    response: typing.ClassVar = {"Error": {"Code": "ExpiredToken"}}


NO_FILE = FileNotFoundError(2, "No such file", "key.txt")


@pytest.mark.parametrize(
    "raised", [Foreign("odd"), NO_FILE], ids=lambda e: type(e).__name__
)
async def test_what_an_auth_flow_raises_of_its_own_is_told_and_not_tried_again(
    chat, waits, raised
):
    class Failing(httpx.Auth):
        def auth_flow(self, request):
            raise raised
            yield

    async with own_client(chat, auth=Failing()) as own:
        error = (await ask(chat, NOBODY, client=own)).error
        assert type(error) is Unreachable
        assert (error.__cause__, error.is_retryable, waits) == (raised, False, [])
        assert str(error).startswith(f"the request could not be sent: {raised}")
        with pytest.raises(type(raised)):
            await listen_to_end(chat, NOBODY, client=own)


async def test_who_interrupts_a_transport_is_not_held_up(chat):
    def interrupt(request):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with own_client(chat, transport=httpx.MockTransport(interrupt)) as own:
            await anext(chat.stream("hi", base_url=AT, client=own))


async def test_a_hook_that_takes_the_body_of_an_error_leaves_its_status(chat):
    async def atake(response):
        async for _ in response.aiter_bytes():
            pass
        response.raise_for_status()

    def take_all(response):
        for _ in response.iter_bytes():
            pass
        response.raise_for_status()

    hooks = {"response": [take_all if chat is SYNC else atake]}
    with serve(refuse(400)) as server:
        async with own_client(chat, event_hooks=hooks) as own:
            error = (await ask(chat, server.url, client=own)).error
    assert (type(error), error.status_code) == (Status, 400)


# ---- Closing while another asks, waits, or is between two attempts -------------------


class Slow(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is slow to close."""

    def __init__(self):
        self.closing, self.resume = threading.Event(), threading.Event()

    def __iter__(self):
        yield from (BEGUN[0], BEGUN[1])

    async def __aiter__(self):
        for part in BEGUN:
            yield part

    def close(self):
        self.closing.set()
        self.resume.wait(0.5)

    async def aclose(self):
        self.closing.set()
        with anyio.move_on_after(0.5):
            while not self.resume.is_set():
                await anyio.sleep(0.001)


async def close_beside(tasks, chat, stream):
    """Close it in another thread or task."""
    if chat is SYNC:
        threading.Thread(target=stream.twin.close).start()
    else:
        tasks.start_soon(stream.aclose)


@pytest.mark.life
async def test_who_asks_while_another_closes_is_told_so(chat):
    body = Slow()
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
    async with own_client(chat, transport=transport) as own:
        stream = chat.stream("hi", base_url=AT, client=own)
        assert (await anext(stream)).text == "Hel"
        asked = []
        async with anyio.create_task_group() as tasks:
            await close_beside(tasks, chat, stream)
            await until(body.closing.is_set)
            for _ in range(2):
                try:
                    asked.append(await anext(stream))
                except Exception as error:
                    asked.append(error)
            body.resume.set()
        await stream.aclose()  # once more
        assert [type(error) for error in asked] == [Truncated] * 2
        assert all("closed here" in str(error) for error in asked)
        assert (stream.complete, stream.completion.text) == (False, "Hel")


def test_who_is_closed_before_the_headers_is_told_once_they_are_there():
    """In sync code: httpx has no response yet that could be closed."""
    asked, closed = threading.Event(), threading.Event()
    steps = (lambda _: asked.set(), lambda _: closed.wait(9), GOOD)
    with serve(play(*steps)) as server:
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        got = []
        reader = threading.Thread(
            target=lambda: got.append(run_sync(take, Sync(stream)))
        )
        reader.start()
        assert asked.wait(9)
        stream.close()
        closed.set()
        reader.join(9)
        assert (type(got[0].error), got[0].chunks) == (Truncated, [])
        assert "closed here" in str(got[0].error)
        assert server.left.acquire(timeout=9)
        assert len(server.heads) == 1


def run_sync(function, *args):
    """Run a coroutine that has nothing to wait for."""
    with pytest.raises(StopIteration) as end:
        function(*args).send(None)
    return end.value.value


async def read_beside(tasks, chat, stream):
    """Read it in another thread or task; give a list, into which the answer comes."""
    got = []

    async def read():
        try:
            got.append(await take(stream))
        except Exception as error:  # no error of ours: the test will say so
            got.append(SimpleNamespace(error=error))

    if chat is SYNC:
        threading.Thread(target=run_sync, args=[read], daemon=True).start()
    else:
        tasks.start_soon(read)
    return got


@pytest.mark.life
async def test_close_in_the_wait_for_a_retry_sends_no_request(chat):
    """And wakes who waits."""
    again = refuse(503, "Retry-After: 30")
    with serve(in_turn(again, GOOD)) as server:
        stream = chat.stream("hi", base_url=server.url)
        async with anyio.create_task_group() as tasks:
            got = await read_beside(tasks, chat, stream)
            await until(lambda: server.left.acquire(blocking=False))
            await anyio.sleep(0.05)  # until it waits
            await stream.aclose()
            assert await until(lambda: got)
        assert len(server.heads) == 1
        assert type(got[0].error) is Truncated
        assert "closed here" in str(got[0].error)


@pytest.mark.life
async def test_close_in_the_body_of_an_error_waits_for_no_retry(chat):
    head = b"HTTP/1.1 503 No\r\nRetry-After: 30\r\nContent-Length: 9\r\n\r\n"
    with serve(play(head, GONE)) as server:
        stream = chat.stream("hi", base_url=server.url)
        async with anyio.create_task_group() as tasks:
            got = await read_beside(tasks, chat, stream)
            await until(lambda: server.heads)
            await anyio.sleep(0.05)  # until it reads the body
            await stream.aclose()
            assert await until(lambda: got)
        assert len(server.heads) == 1
        assert "closed here" in str(got[0].error)


@pytest.mark.life
async def test_a_client_that_is_closed_sends_no_request(chat):
    """Before a call, or in its wait for a retry: that is an error of ours."""
    again = refuse(503, "Retry-After: 0.3")
    with serve(in_turn(again, GOOD)) as server:
        client = chat.client(base_url=server.url, max_retries=1)
        stream = client.stream("hi")
        async with anyio.create_task_group() as tasks:
            got = await read_beside(tasks, chat, stream)
            await until(lambda: server.left.acquire(blocking=False))
            await anyio.sleep(0.05)  # until it waits
            await client.aclose()
            assert await until(lambda: got)
        late = await take(client.stream("hi", max_retries=0))
        for answer in (*got, late):
            assert isinstance(answer.error, APIError)
            assert "closed" in str(answer.error)
        assert server.url in str(late.error)
        assert len(server.heads) == 1


async def test_a_client_that_is_closed_stays_so_elsewhere(chat, monkeypatch):
    """In another event loop, and in a forked process, which has another id."""
    with serve(GOOD) as server:
        async with chat.client(base_url=server.url) as client:
            assert (await take(client.stream("hi"))).error is None
        asking = functools.partial(take, client.stream("hi"))
        if chat is SYNC:
            monkeypatch.setattr(os, "getpid", lambda: -1)
            error = (await asking()).error
        else:
            error = (await anyio.to_thread.run_sync(anyio.run, asking)).error
        assert "closed" in str(error)
        assert len(server.heads) == 1


# ---- What is asked once, what again, and what is said of it --------------------------

BROKEN = b""  # the server closes the connection without an answer
GOOD_THEN = functools.partial(in_turn, GOOD_KEPT)
REPEATS = {  # whose client, the answers; max_retries, the requests, the waits
    "new, broken": ("call", [BROKEN], 0, 1, 0),
    "new, broken, two retries": ("call", [BROKEN], 2, 3, 2),
    "new, broken once": ("call", [BROKEN, GOOD], 2, 2, 1),
    "client without an answer": ("client", [BROKEN], 0, 1, 0),
    "kept, broken": ("client", [GOOD_KEPT, BROKEN], 0, 3, 0),
    "kept, broken once": ("client", [GOOD_KEPT, BROKEN, GOOD], 0, 3, 0),
    "kept, broken, two retries": ("client", [GOOD_KEPT, BROKEN], 2, 5, 2),
    "caller's, broken": ("caller", [BROKEN], 0, 2, 0),
    "caller's, broken once": ("caller", [BROKEN, GOOD], 0, 2, 0),
}


@pytest.mark.life
@pytest.mark.parametrize("case", REPEATS.values(), ids=REPEATS)
async def test_only_a_kept_connection_that_broke_is_asked_past_at_once(
    chat, waits, case
):
    whose, answers, retries, requests, waited = case
    with serve(good_in_the_end(answers)) as server:
        options = {"base_url": server.url, "max_retries": retries}
        async with contextlib.AsyncExitStack() as exits:
            if whose == "call":
                answer = await ask(chat, **options)
            else:
                if whose == "caller":
                    own = await exits.enter_async_context(own_client(chat))
                    options["client"] = own
                client = await exits.enter_async_context(chat.client(**options))
                if answers[0] is GOOD_KEPT:
                    assert (await take(client.stream("hi"))).error is None
                answer = await take(client.stream("hi"))
    good = answers[-1] is GOOD
    assert type(answer.error) is (NoneType if good else Unreachable)
    assert len(server.heads) == requests
    assert len([wait for wait in waits if wait]) == waited


async def test_the_request_is_that_of_the_call(chat):
    """One list, one dict, changed between calls and before the first chunk."""
    message = {"role": "user", "content": [{"type": "text", "text": ""}]}
    stop, headers = [], {"X-A": "0"}
    with serve(GOOD_KEPT) as server:
        async with chat.client(base_url=server.url) as client:
            streams = []
            for name in "123":
                message["content"][0]["text"] = name
                stop[:] = headers["X-A"] = name
                options = {"stop": stop, "headers": headers}
                streams.append(client.stream([message], **options))
                own = {"base_url": server.url} | options
                streams.append(chat.stream([message], **own))
            message["content"] = stop[:] = headers["X-A"] = "later"
            for stream in streams:
                assert (await take(stream)).text == "Hello"
    sent = [json.loads(body) for body in server.bodies]
    parts = [[{"type": "text", "text": name}] for name in "112233"]
    assert [body["messages"][0]["content"] for body in sent] == parts
    assert [body["stop"] for body in sent] == [[name] for name in "112233"]
    values = [re.search("(?i)\nx-a: (.*)\r", head)[1] for head in server.heads]
    assert values == [*"112233"]


def test_a_dropped_stream_is_closed_in_a_thread_that_ends_with_the_program():
    """Since it may be dropped where this thread holds a lock of its connections."""

    class Watched(Body):
        def close(self):
            closers.append(threading.current_thread())
            is_closed.set()

    def answer(request):
        return httpx.Response(200, stream=Watched(HELLO, breaks=False))

    closers, is_closed = [], threading.Event()
    with httpx.Client(transport=httpx.MockTransport(answer)) as own:
        stream = sse_chat.stream_chat("hi", base_url=AT, client=own)
        assert next(stream).text == "Hel"
        del stream
        assert is_closed.wait(PATIENCE)
    assert closers[0] is not threading.current_thread() and closers[0].daemon


@pytest.mark.life
@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")  # of the loop that is gone
def test_a_client_outlives_its_event_loop(anyio_backend):
    """Connections of a loop that has ended are of no use to the next."""
    name, options = anyio_backend

    async def two():
        answers = [await take(client.stream("hi")) for _ in range(2)]
        return [(answer.text, answer.error) for answer in answers]

    with serve(GOOD_KEPT) as server:
        client = sse_chat.AsyncChatClient(base_url=server.url)
        for _ in range(3):
            got = anyio.run(two, backend=name, backend_options=options)
            assert got == [("Hello", None)] * 2
            gc.collect()  # here, where its warnings are expected
        client = None
        gc.collect()


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")  # of the loops that are gone
def test_a_client_keeps_no_connection_of_an_event_loop_that_is_closed():
    """As where each task of a queue calls `asyncio.run`."""
    with serve(GOOD_KEPT) as server:
        client = sse_chat.AsyncChatClient(base_url=server.url)
        for number in range(5):
            assert asyncio.run(client.generate("hi")).text == "Hello"
            gc.collect()  # here, where its warnings are expected
            if number:
                assert server.left.acquire(timeout=PATIENCE)
        assert server.connections == 5
        client = None
        gc.collect()


async def test_a_host_that_cannot_be_is_an_error_of_ours(chat, waits):
    error = (await ask(chat, "http://a..b/v1")).error
    assert isinstance(error, Unreachable)
    assert "a..b" in str(error)
    assert "ollama" not in str(error).lower()


async def test_a_broken_status_over_http2_is_an_error_of_ours(chat, waits):
    def handle(h2, stream):
        h2.config.validate_outbound_headers = False
        h2.send_headers(stream, [(":status", "fine")], end_stream=True)

    needs("h2")
    with Http2Server(handle) as server:
        async with own_client(chat, http1=False, http2=True) as own:
            options = {"client": own, "max_retries": 0}
            error = (await ask(chat, server.url, **options)).error
    assert isinstance(error, Unreachable)
    assert type(error.__cause__) is not NoneType


BOOM_JSON = b'{"error": "boom"}'


@contextlib.contextmanager
def http2_answers(status, data, end):
    def handle(h2, stream):
        h2.send_headers(stream, [(":status", status)])
        h2.send_data(stream, data, end_stream=end)

    needs("h2")
    with Http2Server(handle) as server:
        yield server


OVER_HTTP2 = {  # a status, a body, whether it ends; what is on the error
    "answer": ("200", HELLO_BYTES, True, ""),
    "answer without end": ("200", HELLO_BYTES, False, ""),
    "error": ("500", BOOM_JSON, True, "boom"),
    "error without end": ("500", BOOM_JSON, False, "500"),
}


@pytest.mark.life
@pytest.mark.parametrize("case", OVER_HTTP2.values(), ids=OVER_HTTP2)
async def test_what_has_no_end_over_http2_is_bounded(chat, monkeypatch, case):
    """The rest after [DONE], and the body of an error."""
    monkeypatch.setattr(sse_chat, "_ERROR_BODY_TIMEOUT", 1.0)
    status, data, end, says = case
    if chat is ASYNC and status == "500" and not end:
        pytest.skip("bounded as over HTTP/1, and slow")
    with http2_answers(status, data, end) as server:
        async with own_client(chat, http1=False, http2=True) as own:
            options = {"client": own, "max_retries": 0, "timeout": 9}
            began = time.monotonic()
            answer = await ask(chat, server.url, **options)
            assert time.monotonic() - began < 8
    assert type(answer.error) is (Status if says else NoneType)
    assert answer.error or answer.text == "Hello"
    assert says in f"{answer.error} {getattr(answer.error, 'status_code', '')}"


# ---- Errors before HTTP: told as what they are, and asked once -----------------------

MISSING_CERTIFICATES = """
import asyncio

async def ask():
    return await sse_chat.agenerate("hi", base_url="https://127.0.0.1:9/v1")

def with_client():
    with sse_chat.ChatClient(base_url="https://127.0.0.1:9/v1") as client:
        return client.generate("hi")

ways = (lambda: sse_chat.generate("hi", base_url="https://127.0.0.1:9/v1"))
for way in (ways, lambda: asyncio.run(ask()), with_client):
    try:
        way()
    except sse_chat.APIConnectionError as error:
        print(error.is_retryable, " ".join(str(error).split()))
"""


def test_certificates_that_are_not_there_are_told():
    if httpx.__version__.startswith(("0.26.", "0.27.")):
        pytest.skip("before 0.28 httpx takes no notice of a file that is not there")
    missing = "/nowhere/certificates.pem"
    lines = run_program(MISSING_CERTIFICATES, "", SSL_CERT_FILE=missing).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("False ")
        assert "SSL_CERT_FILE" in line and missing in line
        assert "ollama" not in line.lower()


def test_a_certificate_is_trusted_by_the_environment(tmp_path):
    file = tmp_path / "certificates.pem"
    file.write_bytes(authority().cert_pem.bytes())
    ask = "print(sse_chat.generate('hi', base_url=url).text)\n"
    listen = (
        "with sse_chat.listen(url) as source:\n    print(next(source).json()['id'])\n"
    )
    with serve(GOOD, tls_of_server()) as server:
        url = server.url.replace("http:", "https:")
        printed = run_program(ask + listen, url, SSL_CERT_FILE=str(file))
    assert printed == "Hello\nc-1\n"


async def test_a_certificate_that_is_not_trusted_is_told(chat, waits):
    with serve(GOOD, tls_of_server()) as server:
        error = (await ask(chat, server.url.replace("http:", "https:"))).error
    assert (type(error), error.is_retryable) == (Unreachable, False)
    for word in ("certificate", "verify=", "SSL_CERT_FILE"):
        assert word in str(error)
    assert "ollama" not in str(error).lower()
    assert (server.connections, waits) == (1, [])


VARIABLES = {  # that httpx refuses, a value; what is shown of it
    "NO_PROXY of a network": ("NO_PROXY", "::1/128", "::1/128"),
    "NO_PROXY in brackets": ("NO_PROXY", "[::1]", "[::1]"),
    "ALL_PROXY of GNOME": ("ALL_PROXY", "socks://127.0.0.1:9/", "socks://127.0.0.1:9"),
    "ALL_PROXY with a login": (
        "ALL_PROXY",
        f"socks://user:{CANARY.replace('/', '%2F')}@127.0.0.1:9/",
        "socks://127.0.0.1:9",
    ),
    "HTTP_PROXY": ("HTTP_PROXY", "ftp://127.0.0.1:9", "ftp://127.0.0.1:9"),
    "a password with a slash": (
        "HTTP_PROXY", f"http://user:{CANARY}@127.0.0.1:9", "http://127.0.0.1:9",
    ),
    "lower case": ("http_proxy", "ftp://127.0.0.1:9", "ftp://127.0.0.1:9"),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIABLES.values(), ids=VARIABLES)
async def test_a_proxy_variable_that_is_refused_is_named(
    chat, waits, monkeypatch, case
):
    name, value, shown = case
    monkeypatch.setenv(name, value)
    error = (await ask(chat, NOBODY)).error
    assert (type(error), error.is_retryable) == (Unreachable, False)
    assert name in str(error) and shown in str(error)
    assert NOBODY in str(error)
    assert "ollama" not in str(error).lower()
    assert "canary" not in whole_chain(error)
    assert waits == []
    with pytest.raises(Unreachable, match=f"{NOBODY}.*{name}"):
        chat.client(base_url=NOBODY)
    with pytest.raises(SSEError) as told:
        await listen_to_end(chat, NOBODY)
    assert name in str(told.value) and shown in str(told.value)
    assert "canary" not in whole_chain(told.value)


async def test_a_proxy_that_wants_a_login_is_told(chat, waits, monkeypatch):
    head = "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with serve(head.encode()) as server:
        at = server.url.removeprefix("http://").removesuffix("/v1")
        proxy = f"http://user:{CANARY.replace('/', '%2F')}@{at}"
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        error = (await ask(chat, "https://models.example/v1")).error
    assert (type(error), error.is_retryable) == (Unreachable, False)
    for word in ("407", "HTTPS_PROXY", at):
        assert word in str(error)
    assert "ollama" not in str(error).lower()
    assert "canary" not in whole_chain(error)
    assert (len(server.heads), waits) == (1, [])


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
async def test_a_proxy_that_is_not_there_is_named(chat, waits, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    error = (await ask(chat, "http://models.example/v1")).error
    assert type(error) is Unreachable
    assert error.advice == f"{name} is http://127.0.0.1:9"


async def test_the_login_of_a_proxy_without_a_scheme_is_not_told(
    chat, waits, monkeypatch
):
    monkeypatch.setenv("http_proxy", "user:canary-12345@127.0.0.1:9")
    error = (await ask(chat, "http://models.example/v1")).error
    assert "http_proxy is 127.0.0.1:9" in str(error)
    assert "canary" not in whole_chain(error)


async def test_a_second_server_is_asked_as_the_first_was(chat, waits):
    """What the caller is handling meanwhile is no cause of what fails now."""
    try:
        raise ssl.SSLError("of the first server")
    except ssl.SSLError:
        error = (await ask(chat, NOBODY)).error
    assert (type(error), error.is_retryable, len(waits)) == (Unreachable, True, 2)
    assert "ollama serve" in error.advice and "SSL" not in str(error)


async def test_a_handshake_that_is_cut_off_is_tried_again(chat, waits):
    def cut_off(listener):
        for _ in range(3):
            with listener.accept()[0] as connection:
                connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=cut_off, args=[listener])
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        error = (await ask(chat, url)).error
        thread.join(PATIENCE)
    assert (type(error), error.is_retryable, len(waits)) == (Unreachable, True, 2)
    assert "certificate" not in str(error)


async def test_a_client_that_has_no_connection_free_is_told(chat, waits):
    def refuse_it(request):
        raise httpx.PoolTimeout("")

    error = (await ask_mock(chat, refuse_it)).error
    assert (type(error), error.is_retryable) == (Timeout, True)
    assert "a free connection" in error.message


@pytest.mark.parametrize("after", [1, 2])
async def test_a_client_that_cannot_be_made_is_told_each_time(chat, monkeypatch, after):
    monkeypatch.setenv("ALL_PROXY", "nonsense://127.0.0.1:9")
    stream = chat.stream("hi", base_url=NOBODY)
    for _ in range(after):
        with pytest.raises(Unreachable, match="nonsense"):
            await anext(stream)


def test_a_date_without_a_zone_is_gmt(waits, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: TODAY)
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    with serve(in_turn(after(time.asctime(time.gmtime(TODAY + 30))), GOOD)) as server:
        assert ask_sync(server.url).error is None
    monkeypatch.undo()
    time.tzset()
    assert waits == [30]


def test_waits_stay_within_8_seconds_however_often_it_is_asked(waits):
    transport = httpx.MockTransport(lambda request: httpx.Response(503))
    with httpx.Client(transport=transport) as own:
        error = ask_sync(AT, client=own, max_retries=1030).error
    assert type(error) is Status
    assert (len(waits), max(waits) <= 8, min(waits[4:]) >= 6) == (1030, True, True)


async def test_two_transfer_encodings_are_told(chat, waits):
    twice = "Transfer-Encoding: chunked\r\n"
    with serve(chunked(*HELLO, headers=twice)) as server:
        async with own_client(chat) as own:
            for options in ({}, {"client": own}):
                error = (await ask(chat, server.url, **options)).error
                assert isinstance(error, APIError) and not error.is_retryable
                assert "Transfer-Encoding" in str(error)
                assert "ollama" not in str(error).lower()
    assert (len(server.heads), waits) == (2, [])


async def test_only_a_refused_port_of_this_machine_speaks_of_ollama(chat, waits):
    def refuse_it(request):
        raise httpx.ConnectError("refused") from ConnectionRefusedError()

    def lose_it(request):
        raise httpx.ConnectError("unreachable")

    for near in (NOBODY, NOBODY.replace("127.0.0.1", "localhost")):
        assert "ollama serve" in str((await ask(chat, near)).error)
    near = NOBODY.replace("127.0.0.1", "[::1]")
    assert "ollama serve" in str((await ask_mock(chat, refuse_it, base_url=near)).error)
    for other, fail in ((AT, refuse_it), (NOBODY, lose_it)):
        error = (await ask_mock(chat, fail, base_url=other)).error
        assert type(error) is Unreachable
        assert "ollama" not in str(error).lower()
        assert error.advice == "check base_url"


# ---- What an error says of its attempts, and what of secrets -------------------------


def test_the_time_of_an_error_is_that_of_all_attempts(waits):
    async def check(chat):
        with serve(play(0.1)) as server:
            for options, times in (({}, 3), ({"max_retries": 1}, 2)):
                error = (await ask(chat, server.url, **options)).error
                seconds = float(re.search(r"after (\d+\.\d) s", str(error))[1])
                assert times / 10 <= seconds < 9
                assert re.search(rf"\b{times} (attempts|tries|requests)", str(error))
            error = (await ask(chat, server.url, max_retries=0)).error
            assert 0.1 <= float(re.search(r"after (\d+\.\d) s", str(error))[1]) < 9
            assert not re.search("attempts|tries|requests", str(error))
        assert len(server.heads) == 6

    in_every_mode(check)


async def test_a_logger_tells_of_each_retry(chat, waits, caplog):
    caplog.set_level("INFO")
    again = refuse(503, "Retry-After: 7", body=f"who is {CANARY}?".encode())
    with serve(in_turn(again, BROKEN, GOOD)) as server:
        answer = await ask(chat, server.url, api_key=CANARY)
        assert answer.text == "Hello"
        await ask(chat, server.url)
    told = [record for record in caplog.records if record.name == "sse_chat"]
    assert [record.levelname for record in told] == ["INFO", "INFO"]
    first, second = (record.getMessage() for record in told)
    assert "503" in first and re.search(r"\b7(\.0)? s", first)
    assert re.search("1 of 2|2 of 3", first)
    assert "broke" in second and f"{waits[1]:.1f} s" in second
    assert re.search("2 of 2|3 of 3", second)
    assert "who is" in first and CANARY not in first + second


SILENCE_BEGUN = play(HEAD, GONE)
RETRYABLE = {  # an answer; whether the error says that we would ask again
    **each("status {}", (408, 409, 429, 500, 503, 529), lambda n: (refuse(n), True)),
    **each("status {}", (400, 401, 404, 422), lambda n: (refuse(n), False)),
    "no answer": (BROKEN, True),
    "silence": (SILENCE_BEGUN, False),  # the server may be at work
    "a cut": (http(*BEGUN), False),  # it had begun
    "an error in the stream": (http(FAILED), False),
    "HTML": (http(b"<p>", kind="text/html"), False),
}


@pytest.mark.parametrize(("answer", "again"), RETRYABLE.values(), ids=RETRYABLE)
async def test_an_error_says_whether_we_would_ask_again(chat, answer, again):
    timeout = 0.2 if answer is SILENCE_BEGUN else 20
    with serve(answer) as server:
        error = (await ask(chat, server.url, max_retries=0, timeout=timeout)).error
    for made in (error, pickled(error), copy.deepcopy(error)):
        assert made.is_retryable is again


async def test_a_port_that_is_refused_is_asked_again(chat, waits):
    error = (await ask(chat, NOBODY)).error
    assert (error.is_retryable, len(waits)) == (True, 2)
    assert APIError("m").is_retryable is False


def whole_chain(error):
    """All that an error, its causes and its contexts say, tracebacks aside."""
    shown, left, seen = [], [error], []
    while left:
        each = left.pop()
        if each is None or any(each is other for other in seen):
            continue
        seen.append(each)
        shown += [str(each), repr(each), repr(each.args), repr(vars(each))]
        left += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return "".join(shown).replace("\\", "")


QUICK = {name: echo for name, echo in ECHOES.items() if name != "timeout"}


async def test_a_transport_of_the_caller_shows_no_secret(chat):
    """Not even by an exception that does not have the request."""

    def answer(request):
        raise OSError(f"bad key {request.headers['x-api-key']}")

    options = {
        "transport": httpx.MockTransport(answer),
        "headers": {"x-api-key": CANARY},
    }
    async with own_client(chat, **options) as own:
        error = (await ask(chat, "http://h", client=own, max_retries=0)).error
    assert (type(error), "bad key" in str(error)) == (Unreachable, True)
    assert CANARY[:9] not in everything(error)


@pytest.mark.parametrize("answer", QUICK.values(), ids=QUICK)
async def test_no_secret_is_behind_an_error(chat, answer):
    """What servers echo is in no exception that led to it, either."""
    options = {"max_retries": 0, "max_event_bytes": 9000}
    with serve(answer) as server:
        for secret in ("key", "password"):
            url, more, _ = SECRETS[secret]
            url = url.format(server.url.removeprefix("http://"))
            error = (await ask(chat, url, **options | more)).error
            assert CANARY[:9] not in whole_chain(error)


def test_what_has_eight_characters_is_a_secret():
    def answer(request):
        return httpx.Response(400, json={"error": "neither abcdefgh nor ABCDEFG"})

    options = {"headers": {"Cookie": "a=abcdefgh; b=ABCDEFG"}}
    error = finished(ask_mock(SYNC, answer, **options)).error
    assert re.fullmatch("neither .* nor ABCDEFG", error.message)
    assert "abcdefgh" not in str(error)


async def test_half_a_character_in_a_secret_is_an_error_of_ours(chat):
    error = (await ask_mock(chat, None, base_url=f"{AT}?key=\ud83dabcdefg")).error
    assert isinstance(error, APIError)
    assert "abcdefg" not in str(error)


BAD_URLS = [
    "http://user:{}@[::1",
    "http://user:{}@h:x/v1",
    "http://user:{}/7@h/v1",  # a password that should have been quoted
    "http://user:{}@h\u2100/v1",
    "ftp://user:{}@h/v1",
    "http://user:{}@:80/v1",
    "http://user:{}@h:99999/v1",
]


@pytest.mark.parametrize(
    "key",
    ["sk-canary", "sk-can\u00e4ry", "sk-canary\n"],
    ids=["good", "umlaut", "newline"],
)
def test_no_secret_is_behind_an_error_about_options(key):
    """A password in a base URL that is none; a key that no header can carry."""
    wrong = [{"base_url": url.format(key.strip())} for url in BAD_URLS]
    if key != "sk-canary":
        wrong += [{"api_key": f"x{key}x"}, {"headers": {"Authorization": f"x{key}x"}}]
    for way, options in itertools.product((SYNC, ASYNC), wrong):
        for make in (functools.partial(way.stream, "hi"), way.client):
            with pytest.raises(ValueError) as told:
                make(**options)
            assert not re.search("can.?ry", whole_chain(told.value))


@pytest.mark.parametrize("how", ["stream", "generate", "models"])
def test_a_header_of_the_caller_stands_in_place_of_ours(how):
    with serve(http(MODELS if how == "models" else JSON)) as server:
        ask_sync(server.url, how=how, headers={"Accept": "text/mine"})
    assert header(server.heads[0], "accept") == ["text/mine"]


def test_a_header_of_a_clients_call_replaces_the_key_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with (
        serve(GOOD) as server,
        sse_chat.ChatClient(base_url=server.url) as client,
    ):
        client.generate("hi")
        client.generate("hi", headers={"x-goog-api-key": "mine"})
    assert [CANARY in head for head in server.heads] == [True, False]


ESCAPED_SECRETS = {
    "emoji": "pass🙂🙂word",
    "letters": "pässwörd",
    "quotes": 'pass"word\\',
}


@pytest.mark.parametrize("secret", ESCAPED_SECRETS.values(), ids=ESCAPED_SECRETS)
def test_secrets_are_found_in_any_escapes(secret):
    """Of JSON, and of JSON in a text of JSON."""
    told = json.dumps({"error": {"message": f"no {secret}, no"}})
    for text in (told, json.dumps({"error": told})):
        with serve(refuse(401, body=text.encode())) as server:
            url = server.url.replace("//", f"//u:{urllib.parse.quote(secret)}@")
            error = ask_sync(url).error
        assert "no [secret], no" in error.message
        assert secret not in everything(error)


def test_a_slash_that_a_redirect_adds_is_told_as_such():
    for how, path in (("generate", "/v1/chat/completions/"), ("models", "/v1/models/")):
        with serve(refuse(307, f"Location: {path}")) as server:
            advice = ask_sync(server.url, how=how).error.advice
            assert advice == "the server wants a / at the end, which no base_url gives"


@pytest.mark.parametrize("status", [200, 401], ids="status {}".format)
async def test_the_login_of_a_client_is_a_secret(chat, status):
    basic = base64.b64encode(b"user:canary-12345").decode()

    def answer(request):
        told = json.dumps({"error": {"message": request.headers["authorization"]}})
        if status == 200:
            return httpx.Response(200, text=f"data: {told}\n\n")
        return httpx.Response(status, text=told)

    transport, login = httpx.MockTransport(answer), ("user", "canary-12345")
    async with own_client(chat, transport=transport, auth=login) as own:
        error = (await ask(chat, AT, client=own, max_retries=0)).error
    assert basic not in everything(error)
    assert "no key" not in str(error)


@pytest.mark.parametrize("name", ["api-key", "X-API-Key", "Authorization"])
@pytest.mark.parametrize("place", ["client", "call"])
async def test_the_key_of_the_environment_goes_beside_no_other(
    chat, monkeypatch, name, place
):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    sent = []

    def answer(request):
        sent.append(request.headers)
        return httpx.Response(200, json=json.loads(JSON))

    of_client = {"headers": {name: "mine"}} if place == "client" else {}
    of_call = {"headers": {name: "mine"}} if place == "call" else {}
    transport = httpx.MockTransport(answer)
    async with own_client(chat, transport=transport, **of_client) as own:
        await ask(chat, AT, client=own, **of_call)
    assert sent[0][name] == "mine"
    assert CANARY not in str(sent[0].raw)


@pytest.mark.parametrize("how", ["generate", "models"])
@pytest.mark.parametrize("host", ["http://other.example", ""], ids=["away", "here"])
def test_the_advice_of_a_redirect_can_be_followed(how, host):
    path = {"generate": "/v1/chat/completions", "models": "/v1/models"}[how]
    away = {"location": f"{host}{path}"}
    transport = httpx.MockTransport(lambda request: httpx.Response(301, headers=away))
    with httpx.Client(transport=transport) as own:
        error = ask_sync("http://h/old", client=own, how=how).error
    base_url = error.advice.rpartition(" ")[2]
    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(
            200, json=json.loads(JSON if how == "generate" else MODELS)
        )

    with httpx.Client(transport=httpx.MockTransport(answer)) as own:
        ask_sync(base_url, client=own, how=how)
    assert asked == [f"{host or 'http://h'}{path}"]


def test_a_client_reads_the_environment_once(monkeypatch):
    asked = []

    def answer(request):
        asked.append(json.loads(request.content)["model"])
        return httpx.Response(200, json=json.loads(JSON))

    monkeypatch.setenv("OPENAI_MODEL", "first")
    with httpx.Client(transport=httpx.MockTransport(answer)) as own:
        client = sse_chat.ChatClient(client=own)
        client.generate("hi")
        monkeypatch.setenv("OPENAI_MODEL", "second")
        client.generate("hi")
        client.generate("hi", model="third")
    assert asked == ["first", "first", "third"]


# ---- The time for the first token ----------------------------------------------------


@pytest.mark.life
async def test_the_callers_own_time_is_not_the_servers(chat):
    """What came meanwhile is taken; what has not come has what was left of its time."""

    async def check(pause, error):
        with serve(play(HEAD, EMPTY, pause, *HELLO)) as server:
            stream = chat.stream("hi", base_url=server.url, first_token_timeout=0.4)
            assert (await anext(stream)).text == ""
            time.sleep(0.5)
            began = time.monotonic()
            answer = await take(stream)
            assert type(answer.error) is (error or NoneType)
            assert error or answer.text == "Hello"
            assert 0.1 < time.monotonic() - began < 5 or not error

    if chat is ASYNC:
        return await check(0.6, None)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        rows = [(0.6, None), (0.05, None), (GONE, Timeout)]
        checks = [pool.submit(finished, check(*row)) for row in rows]
    return [check.result() for check in checks]


class Flood(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Comments that are there at once, so that reading them takes all the time."""

    def __iter__(self):
        return itertools.repeat(b": x\n" * 9999, 20_000)

    async def __aiter__(self):
        for data in self:
            yield data


async def test_the_time_that_reading_takes_counts(chat):
    options = {"first_token_timeout": 0.2, "max_retries": 0}
    answer = await ask_mock(
        chat, lambda _: httpx.Response(200, stream=Flood()), **options
    )
    assert type(answer.error) is Timeout


def test_audio_is_a_token():
    """So what breaks after it has been cut off."""

    def pieces():
        yield sse(said({"audio": {"data": "AAAA"}}))
        raise TimeoutError

    answer = finished(take(Sync(sse_chat.iter_chunks(pieces()))))
    assert type(answer.error) is Truncated
    assert "a read timed out" in answer.error.message


# ---- Unpacking -----------------------------------------------------------------------


def raw_deflate(data, strategy=zlib.Z_DEFAULT_STRATEGY):
    packer = zlib.compressobj(1, wbits=-15, strategy=strategy)
    return packer.compress(data) + packer.flush()


def members(*parts):
    return b"".join(map(gzip.compress, parts))


# Raw deflate whose first two bytes have one of the two marks of zlib's header alone:
# the method (before an empty block, with a bit set that says nothing), or the check.
METHOD_ALONE = b"\x08\x00\x00\xff\xff" + raw_deflate(HELLO_BYTES)
CHECK_ALONE = raw_deflate(b":H\n" + HELLO_BYTES, zlib.Z_FIXED)
assert int.from_bytes(CHECK_ALONE[:2]) % 31 == 0


PACKED = {  # a Content-Encoding, the body of HELLO in it
    "members": ("gzip", members(*HELLO)),
    "members, some empty": ("gzip", members(b"", *HELLO[:2], b"", b"", *HELLO[2:])),
    "deflate of zlib": ("deflate", zlib.compress(HELLO_BYTES)),
    "raw deflate": ("deflate", raw_deflate(HELLO_BYTES)),
    "raw deflate with zlib's method": ("deflate", METHOD_ALONE),
    "raw deflate with zlib's check": ("deflate", CHECK_ALONE),
    "x-gzip": ("x-gzip", gzip.compress(HELLO_BYTES)),
    "identity": ("identity", HELLO_BYTES),
    "zeros between members": ("gzip", members(*BEGUN) + bytes(9) + members(*ENDING)),
    "zeros at the end": ("gzip", members(*BEGUN, STOPPED) + bytes(9)),
}


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_packed_answers(case):
    encoding, data = case
    header = f"Content-Encoding: {encoding}\r\n"
    ways = [chunked(data, headers=header)]
    ways.append(chunked(*cut(data, range(len(data))), headers=header))
    ways.append(http(data, headers=header))
    with serve(in_turn(*ways)) as server:
        for _ in ways:
            answer = ask_sync(server.url)
            assert (answer.error, answer.text) == (None, "Hello")


PACKED_ERRORS = {
    "members": ("gzip", members(BOOM_JSON[:5], BOOM_JSON[5:])),
    "deflate of zlib": ("deflate", zlib.compress(BOOM_JSON)),
    "raw deflate": ("deflate", raw_deflate(BOOM_JSON)),
}


@pytest.mark.parametrize("case", PACKED_ERRORS.values(), ids=PACKED_ERRORS)
def test_packed_errors(case):
    encoding, data = case
    with serve(refuse(400, f"Content-Encoding: {encoding}", body=data)) as server:
        error = ask_sync(server.url).error
    assert (type(error), error.message) == (Status, "boom")


BAD_PACKED = {  # a Content-Encoding, a body; the error
    "rubbish after a member": ("gzip", members(*BEGUN) + b"rubbish", Invalid),
    "cut in a member": (
        "gzip",
        members(*HELLO[:2]) + members(*HELLO[2:])[:9],
        APIError,
    ),
    "no deflate": ("deflate", b"\xff" * 99, Invalid),
}


@pytest.mark.parametrize("case", BAD_PACKED.values(), ids=BAD_PACKED)
def test_what_does_not_unpack_is_no_whole_answer(case):
    encoding, data, kind = case
    with serve(in_turn(encoded(encoding, data))) as server:
        error = ask_sync(server.url).error
    assert isinstance(error, kind)


BOMBS = {  # a Content-Encoding, what makes a body
    "members of blanks": ("gzip", lambda: members(b"\n" * 4 * MIB) * 9),
    "members of comments": ("gzip", lambda: members(PING * (MIB // 64)) * 9),
    "members of nothing": ("gzip", lambda: members(b"") * 20_000),
    "raw deflate": ("deflate", lambda: raw_deflate(bytes(10**8))),
    "deflate of zlib": ("deflate", lambda: zlib.compress(bytes(10**8), 1)),
}


@pytest.mark.parametrize("case", BOMBS.values(), ids=BOMBS)
def test_bombs_are_bounded(case):
    encoding, make = case
    header, data = f"Content-Encoding: {encoding}", make()
    answers = (encoded(encoding, data), refuse(400, header, body=data))
    for answer in answers:
        began = time.monotonic()
        with serve(answer) as server, memory(50e6):
            error = ask_sync(server.url, max_retries=0).error
        assert isinstance(error, APIError)
        assert time.monotonic() - began < 10


UNKNOWN_ENCODINGS = ["br", "zstd", "compress", "gzip, br", "x-other"]


@pytest.mark.parametrize("encoding", UNKNOWN_ENCODINGS)
def test_an_encoding_that_we_do_not_unpack_is_named(encoding):
    name = re.escape(encoding.split(", ")[-1])
    with serve(encoded(encoding, HELLO_BYTES)) as server:
        answer = ask_sync(server.url)
        assert isinstance(answer.error, APIError)
        assert not isinstance(answer.error, Truncated)
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", str(answer.error))
        assert (answer.text, len(server.heads)) == ("", 1)
    with serve(refuse(400, f"Content-Encoding: {encoding}", body=BOOM_JSON)) as server:
        error = ask_sync(server.url).error
        assert (type(error), error.status_code) == (Status, 400)


async def test_what_httpx_has_unpacked_is_not_unpacked_again(chat):
    """httpx leaves an encoding that it does not know as it is, and so do we."""

    async def aread(response):
        await response.aread()

    hook = {"response": [aread if chat is ASYNC else httpx.Response.read]}
    # Of several members httpx unpacks the first alone.
    one_member = ("gzip", gzip.compress(HELLO_BYTES))
    cases = [case for case in PACKED.values() if case[0] == "deflate"]
    cases += [one_member, ("x-other", HELLO_BYTES)]
    with serve(in_turn(*itertools.starmap(encoded, cases))) as server:
        async with own_client(chat, event_hooks=hook) as own:
            for _ in cases:
                answer = await ask(chat, server.url, client=own)
                assert (answer.error, answer.text) == (None, "Hello")


# ---- The headers of an answer in one piece -------------------------------------------


async def test_an_answer_in_one_piece_has_its_response_headers(chat):
    more = "X-Request-Id: r-1\r\nX-RateLimit-Remaining: 5\r\n"
    plain = http(JSON, kind="application/json")
    with serve(in_turn(http(JSON, headers=more), plain)) as server:
        async with chat.client(base_url=server.url) as client:
            first, second = [await client.generate("hi") for _ in "12"]
    headers = first.response_headers
    assert type(headers) is dict
    assert (headers["x-request-id"], headers["x-ratelimit-remaining"]) == ("r-1", "5")
    assert second.response_headers["content-type"] == "application/json"
    assert first == second == ChatCompletion.from_dict(json.loads(JSON))
    assert repr(first) == repr(second)
    assert first.to_dict() == json.loads(JSON)
    assert "r-1" not in repr(first)
    for twin in (pickled(first), copy.deepcopy(first)):
        assert (twin, twin.response_headers) == (first, headers)
    assert ChatCompletion().response_headers == {}


# ---- Listening: the rules of HTML 9.2.3, and of practice -----------------------------

CLOSE = "Connection: close\r\n"


def answer_of(*parts, headers="", **more):
    """A response, after which the connection is closed, as it says."""
    return http(*parts, headers=headers + CLOSE, **more)


EVENT = b"data: x\n\n"
X = answer_of(EVENT)
X_OF_MOCK = httpx.Response(
    200, headers={"content-type": "text/event-stream"}, content=EVENT
)
END = answer_of(status="204 No Content")


def listening(chat, url, *, on_error=lambda error: None, most=200, **options):
    """An event source that connects again, for this way to ask; not without end."""
    faults = itertools.count()

    def heard(error):
        assert next(faults) < most
        on_error(error)

    options = {"timeout": 20, "on_error": heard} | options
    if chat is SYNC:
        return Sync(sse_chat.listen(url, **options))
    return sse_chat.alisten(url, **options)


async def listen_to_end(chat, url, **options):
    """Give all events up to the end; another end than 204 raises."""
    async with listening(chat, url, **options) as source:
        return [event async for event in source]


@contextlib.contextmanager
def noted_delays(lasting=0.002):
    """Note the waits between two tries, each of which takes this time at most."""
    noted = []
    wait, sleep = threading.Event.wait, anyio.sleep

    def waited(event, timeout=None):
        if not timeout:
            return wait(event, timeout)
        noted.append(timeout)
        return wait(event, min(timeout, lasting))

    async def slept(seconds):
        noted.append(seconds)
        await sleep(min(seconds, lasting))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Event, "wait", waited)
        patch.setattr(anyio, "sleep", slept)
        yield noted


@pytest.fixture
def delays():
    with noted_delays() as noted:
        yield noted


def ids_sent(server):
    """Give the Last-Event-ID of each request, None where there was none."""
    found = [re.findall("(?im)^last-event-id: ?(.*)\r$", head) for head in server.heads]
    assert all(len(ids) < 2 for ids in found)
    return [ids[0] if ids else None for ids in found]


# ---- What the event source rests on: an EventSource, and its `retry` -----------------

RETRIES = {  # a stream; the retry of each of its events
    "of its own block": (b"retry: 5\ndata: x\n\n", [5]),
    "of a block without data": (b"retry: 5\n\ndata: x\n\n", [5]),
    "for one event alone": (b"retry: 5\n\ndata: x\n\ndata: y\n\n", [5, None]),
    "over several blocks": (b"retry: 5\n\nid: 1\n\n: hi\n\ndata: x\n\n", [5]),
    "its own wins": (b"retry: 5\n\nretry: 6\ndata: x\n\n", [6]),
    "the latest wins": (b"retry: 5\n\nretry: 6\n\ndata: x\n\n", [6]),
    "one that is no number": (b"retry: 5\n\nretry: x\n\ndata: x\n\n", [5]),
    "none": (b"data: x\n\nretry: 5\n\n", [None]),
}


@pytest.mark.parametrize(("stream", "retries"), RETRIES.values(), ids=RETRIES)
def test_a_retry_without_data_is_that_of_the_next_event(stream, retries):
    blocks = [block + b"\n\n" for block in stream.split(b"\n\n")[:-1]]
    for pieces in ([stream], blocks, cut(stream, range(999))):
        assert [event.retry for event in iter_sse(pieces)] == retries
    decoder = SSEDecoder()
    events = map(decoder.decode, stream.decode().split("\n"))
    assert [event.retry for event in events if event] == retries


async def test_an_event_source_is_iterable_and_takes_the_last_event_id(chat):
    def source(body, kind="text/event-stream", **options):
        response = httpx.Response(200, headers={"content-type": kind}, content=body)
        source = EventSource(response, **options)
        return source, Sync(source) if chat is SYNC else source

    body = b"data: a\n\nid: 6\ndata: b\n\ndata: c\n\nid\ndata: d\n\n"
    direct, iterable = source(body, last_event_id="5")
    assert direct.last_event_id == "5"
    events = [(event.data, event.id) async for event in iterable]
    assert events == [("a", "5"), ("b", "6"), ("c", "6"), ("d", "")]
    assert direct.last_event_id == ""
    direct, iterable = source(b": hi\n\n", last_event_id="5")
    assert [event async for event in iterable] == []
    assert direct.last_event_id == "5"
    _, iterable = source(body, "text/html")
    with pytest.raises(SSEError, match="text/html"):
        await anext(aiter(iterable))


def test_the_retry_of_a_source_is_that_of_the_events_given_out():
    """Not that of a later event, which came in the same read."""
    sent = b"retry: 5\ndata: a\n\ndata: b\n\nretry: 6\ndata: c\n\nretry: 7\n\n"
    head = {"content-type": "text/event-stream"}
    source = EventSource(httpx.Response(200, headers=head, content=sent))
    assert [source.retry for _ in source] == [5, 5, 6]
    assert source.retry == 7


# ---- Connecting again: what goes over from one connection to the next ----------------

CONNECTIONS = {  # the body of each connection; "data|id" of each event; the ids sent
    "without ids": ([b"data: a\n\n", b"data: b\n\n"], ["a|", "b|"], [None] * 3),
    "an id survives connections that bring none": (
        [b"id: 1\ndata: a\n\n", b"", PING, b"data: b\n\n", b"data: c\n\n"],
        ["a|1", "b|1", "c|1"],
        [None, "1", "1", "1", "1", "1"],
    ),
    "the latest id counts": (
        [b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"id: 3\ndata: c\n\n"],
        ["a|1", "b|2", "c|3"],
        [None, "2", "3"],
    ),
    "a field id alone takes it back": (
        [b"id: 1\ndata: a\n\n", b"id\ndata: b\n\n", b"data: c\n\n"],
        ["a|1", "b|", "c|"],
        [None, "1", None, None],
    ),
    "an empty id takes it back": (
        [b"id: 1\ndata: a\n\n", b"id: \n\n", b"data: b\n\n"],
        ["a|1", "b|"],
        [None, "1", None, None],
    ),
    "it counts from a block without data": (
        [b"data: a\n\nid: 2\n\n", b"data: b\n\n"],
        ["a|", "b|2"],
        [None, "2", "2"],
    ),
    "an event that no blank line ended counts for nothing": (
        [b"id: 1\ndata: a\n\nid: 2\nevent: e\ndata: b\n", b"data: c\n\n"],
        ["a|1", "c|1"],
        [None, "1", "1"],
    ),
    "nor does a line without an end": (
        [b"id: 1\ndata: a\n\nid: 2", b": \ndata: b\n\ndata: c"],
        ["a|1", "b|1"],
        [None, "1", "1"],
    ),
    "a lone CR ends a block": ([b"id: 1\rdata: a\r\r"], ["a|1"], [None, "1"]),
    "an LF that begins a connection belongs to no CR": (
        [b"id: 1\ndata: a\r\n\r", b"\ndata: b\n\n"],
        ["a|1", "b|1"],
        [None, "1", "1"],
    ),
    "one BOM a connection": (
        [UTF8_BOM + b"data: a\n\n", UTF8_BOM + b"data: b\n\n", UTF8_BOM * 2 + EVENT],
        ["a|", "b|"],
        [None] * 4,
    ),
    "half a character is not finished by the next": (
        ["data: ä".encode()[:-1], "data: ä\n\n".encode()],
        ["ä|"],
        [None] * 3,
    ),
    "an id with a NUL is none": (
        [b"id: 1\ndata: a\n\n", b"id: 2\0\ndata: b\n\n"],
        ["a|1", "b|1"],
        [None, "1", "1"],
    ),
    "ids are UTF-8": (
        ["id: ä 🙂\u2028…\ndata: a\n\n".encode(), b"data: b\n\n"],
        ["a|ä 🙂\u2028…", "b|ä 🙂\u2028…"],
        [None, *["ä 🙂\u2028…"] * 2],
    ),
    "ids are no numbers": (
        [b"id: 007\ndata: a\n\n", b"id: %b\ndata: b\n\n" % (b"9" * 4000)],
        ["a|007", f"b|{'9' * 4000}"],
        [None, "007", "9" * 4000],
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", CONNECTIONS.values(), ids=CONNECTIONS)
async def test_what_one_connection_leaves_to_the_next(chat, delays, row):
    """Whether it broke or its body ended; a stored last_event_id goes on the same."""
    bodies, events, ids = row
    answers = [
        chunked(body, end=n % 2 == 0, headers=CLOSE) for n, body in enumerate(bodies)
    ]
    with serve(in_turn(*answers, END)) as server:
        async with listening(chat, server.url) as source:
            found = [event async for event in source]
        assert [f"{event.data}|{event.id}" for event in found] == events
        assert {event.event for event in found} == {"message"}
        assert ids_sent(server) == ids
        assert source.last_event_id == (ids[-1] or "")
    with serve(in_turn(X, END)) as server:
        stored = source.last_event_id
        [event] = await listen_to_end(chat, server.url, last_event_id=stored)
        assert event.id == stored
        assert ids_sent(server) == [ids[-1]] * 2


async def test_the_last_event_id_is_that_of_the_event_given(chat):
    """An event of the same read that was not given yet comes again after a restart."""
    body = b"id: 1\ndata: a\n\nid: 2\ndata: b\n\nid: 3\n\n"
    with serve(play(HEAD, body, GONE)) as server:
        source = listening(chat, server.url, last_event_id="0")
        assert source.last_event_id == "0"
        for id in ("1", "2"):
            assert (await anext(source)).id == source.last_event_id == id
        await source.aclose()
        assert source.last_event_id == "2"


UNSENDABLE = {  # as the id stands in a stream
    "leading space": "id:  7",
    "trailing space": "id: 7 ",
    "one space": "id:  ",
    "leading tab": "id: \t7",
    "form feed": "id: \f7",
    "vertical tab inside": "id: 7\v8",
}


@pytest.mark.parametrize("field", UNSENDABLE.values(), ids=UNSENDABLE)
async def test_an_id_that_no_header_can_carry_is_left_out(chat, delays, field):
    """Events have it, on_error hears of it, and the next id is sent as ever."""
    id, errors = field[4:], []
    first = f"{field}\ndata: a\n\n".encode()
    with serve(
        in_turn(answer_of(first), X, answer_of(b"id: 8\ndata: b\n\n"), END)
    ) as server:
        events = await listen_to_end(chat, server.url, on_error=errors.append)
        assert [event.id for event in events] == [id, id, "8"]
        assert ids_sent(server) == [None, None, None, "8"]
    assert errors
    assert all(type(e) is SSEError and repr(id) in str(e) for e in errors)


# ---- What a response means -----------------------------------------------------------

STATUSES = (201, 202, 205, 206, 301, 304, 400, 401, 403, 404, 407, 409, 410, 451, 499)
KINDS = {
    "text/event-stream": True,
    "Text/Event-Stream": True,
    "text/event-stream;": True,
    "text/event-stream;charset=windows-1251": True,  # and is read as UTF-8
    "TEXT/EVENT-STREAM ; x=bogus": True,
    "text/event-streams": False,
    "text/event-stream+json": False,
    "application/x-text/event-stream": False,
    "text/html; x=text/event-stream": False,
    "text/x-bogus": False,
    "application/json": False,
    "": False,
}


@pytest.mark.parametrize("status", STATUSES, ids="status {}".format)
async def test_another_status_ends_it(chat, delays, status):
    """With the status on the error; and it asks no more, whoever iterates on."""
    with serve(in_turn(answer_of(EVENT, status=f"{status} No"), END)) as server:
        async with listening(chat, server.url) as source:
            with pytest.raises(SSEError, match=str(status)) as told:
                await anext(source)
            assert told.value.status_code == status
            assert [event async for event in source] == []
        assert len(server.heads) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_the_content_type_is_compared_as_a_mime_type(chat, delays, kind):
    with serve(in_turn(answer_of("data: ä\n\n".encode(), kind=kind), END)) as server:
        if KINDS[kind]:
            assert await listen_to_end(chat, server.url) == [as_event("ä")]
        else:
            with pytest.raises(SSEError, match=re.escape(repr(kind))) as told:
                await listen_to_end(chat, server.url)
            assert told.value.status_code == 200
            assert len(server.heads) == 1


async def test_no_content_type_ends_it(chat, delays):
    with serve(b"HTTP/1.1 200 OK\r\n\r\ndata: x\n\n") as server:
        with pytest.raises(SSEError) as told:
            await listen_to_end(chat, server.url)
        assert (told.value.status_code, len(server.heads)) == (200, 1)


async def test_204_ends_it(chat, delays):
    with serve(END) as server:
        async with listening(chat, server.url) as source:
            for _ in range(2):
                assert [event async for event in source] == []
        assert len(server.heads) == 1


async def test_an_event_over_the_limit_ends_it(chat, delays):
    body = b"id: 1\ndata: x\n\nid: 2\ndata: 0123456789\n\ndata: y\n\n"
    with serve(answer_of(body)) as server:
        source = listening(chat, server.url, max_event_bytes=16)
        assert (await anext(source)).data == "x"
        with pytest.raises(SSEError, match="16 bytes"):
            await anext(source)
        assert [event async for event in source] == []
        assert (source.last_event_id, len(server.heads)) == ("1", 1)
        assert await has_left(server)


LINGER = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset(connection):
    """Have the connection end with a reset."""
    connection.setsockopt(*LINGER)


NETWORK = httpx.TransportError
OWN_TIMEOUT = {"timeout": httpx.Timeout(9, read=0.2)}
GOES_ON = {  # what a server does, options; the error that on_error gets, if any
    "the end of a body": (answer_of(b": hi\n\n"), {}, None),
    "an empty body": (answer_of(), {}, None),
    "a body that is cut": (chunked(b"data: y\n", end=False), {}, NETWORK),
    "a body shorter than its length": (answer_of(b"data: y\n\n")[:-1], {}, NETWORK),
    "a body that is reset": (play(HEAD, PING, 0.02, reset), {}, NETWORK),
    "chunks that are none": (chunked(end=False) + b"zz\r\n", {}, NETWORK),
    "no answer": (b"", {}, NETWORK),
    "a reset for an answer": (play(reset), {}, NETWORK),
    "a head that is cut": (HEAD[:-9], {}, NETWORK),
    "no HTTP": (b"nonsense\r\n\r\n", {}, NETWORK),
    "no head for the timeout": (play(GONE), {"timeout": 0.2}, httpx.ReadTimeout),
    "silence in the body": (play(HEAD, PING, GONE), OWN_TIMEOUT, httpx.ReadTimeout),
    **{f"status {n}": (refuse(n), {}, n) for n in (408, 429, *range(500, 505), 599)},
    "an error that never ends": (play(ERROR_HEAD, PING, GONE), {}, 500),
}  # fmt: skip


@pytest.mark.parametrize("row", GOES_ON.values(), ids=GOES_ON)
async def test_what_does_not_end_it(chat, delays, row):
    """Each try leaves its connection before the next, even where there may be one."""
    answer, options, expected = row
    errors = []
    with serve(in_turn(answer, X, END)) as server:
        async with own_client(chat, limits=ONE) as own:
            options = {"client": own, "on_error": errors.append} | options
            events = await listen_to_end(chat, server.url, **options)
    assert [event.data for event in events] == ["x"]
    assert len(server.heads) == 3
    if expected is None:
        assert errors == []
    elif isinstance(expected, int):
        assert [(type(e), e.status_code) for e in errors] == [(SSEError, expected)]
        assert str(expected) in str(errors[0])
    else:
        [error] = errors
        assert isinstance(error, expected)


OWN_FAULTS = [httpx.InvalidURL("odd"), httpx.LocalProtocolError("odd")]
OWN_FAULTS += [httpx.UnsupportedProtocol("odd")]


@pytest.mark.parametrize("raised", OWN_FAULTS, ids=lambda e: type(e).__name__)
async def test_what_cannot_be_sent_at_all_is_not_tried_again(chat, delays, raised):
    asked = []

    def answer(request):
        asked.append(request)
        raise raised

    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        with pytest.raises(type(raised)):
            await listen_to_end(chat, "http://h/", client=own)
    assert len(asked) == 1


LIBRARIES = ["aiohttp", "h11", "http", "httpcore", "httpx", "httpx2", "urllib3"]


@pytest.mark.parametrize("library", LIBRARIES)
async def test_an_exception_of_any_http_library_is_a_broken_connection(
    chat, delays, library
):
    """Here it connects again, and for `iter_chunks` a body was cut off."""
    broken = type("Broken", (Exception,), {"__module__": f"{library}.exceptions"})

    def raising():
        yield BEGUN[0]
        raise broken

    with pytest.raises(Truncated):
        list(sse_chat.iter_chunks(raising()))
    answers = iter([broken(), httpx.Response(204)])

    def answer(request):
        if isinstance(result := next(answers), Exception):
            raise result
        return result

    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        assert await listen_to_end(chat, "http://h/", client=own) == []
    assert len(delays) == 1


async def test_a_mistake_in_a_hook_is_no_network_error(chat, delays):
    def log(response):
        return response.text  # which has not been read

    async def alog(response):
        return response.text

    with serve(X) as server:
        hooks = {"response": [log if chat is SYNC else alog]}
        async with own_client(chat, event_hooks=hooks) as own:
            with pytest.raises(httpx.ResponseNotRead):
                await listen_to_end(chat, server.url, client=own)
        assert len(server.heads) == 1


def test_comments_are_no_silence(delays):
    """They may come for much longer than the timeout; what follows them may not."""

    async def check(chat):
        errors = []
        alive = play(HEAD, [(PING, 0.05)] * 6, b"data: x\n\n", 5)
        with serve(in_turn(alive, END)) as server:
            options = {"timeout": 0.2, "on_error": errors.append}
            events = await listen_to_end(chat, server.url, **options)
        assert events == [as_event("x")]
        assert [type(error) for error in errors] == [httpx.ReadTimeout]

    in_every_mode(check)


async def test_a_hook_that_raises_for_the_status_changes_nothing(chat, delays):
    async def ahook(response):
        response.raise_for_status()

    hook = httpx.Response.raise_for_status if chat is SYNC else ahook
    hooks = {"event_hooks": {"response": [hook]}}
    with serve(in_turn(refuse(503), X, refuse(404))) as server:
        async with own_client(chat, **hooks) as own:
            source = listening(chat, server.url, client=own)
            assert await anext(source) == as_event("x")
            with pytest.raises(SSEError) as told:
                await anext(source)
    assert (told.value.status_code, len(server.heads)) == (404, 3)


# ---- on_error ------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [refuse(503), b""], ids=["status", "network"])
async def test_what_on_error_raises_ends_it(chat, delays, answer):
    def on_error(error):
        raise KeyError("enough") from error

    with serve(in_turn(answer, END)) as server:
        source = listening(chat, server.url, on_error=on_error)
        with pytest.raises(KeyError, match="enough"):
            await anext(source)
        assert [event async for event in source] == []
        assert len(server.heads) == 1


async def test_on_error_may_keep_to_the_letter_of_the_standard(chat, delays):
    """There every status but 200 is the end, and network errors are none."""

    def on_error(error):
        if isinstance(error, SSEError):
            raise error

    with serve(in_turn(b"", X, refuse(503), END)) as server:
        source = listening(chat, server.url, on_error=on_error)
        assert await anext(source) == as_event("x")
        with pytest.raises(SSEError) as told:
            await anext(source)
        assert (told.value.status_code, len(server.heads)) == (503, 3)


async def test_on_error_hears_of_each_fault_before_the_wait(chat, delays):
    heard = []

    def on_error(error):
        heard.append(len(delays))

    with serve(in_turn(b"", refuse(503), chunked(end=False), X, END)) as server:
        await listen_to_end(chat, server.url, on_error=on_error)
    assert heard == [0, 1, 2]
    assert len(delays) == 4


def test_on_error_may_close():
    with serve(refuse(503)) as server:
        source = sse_chat.listen(server.url, on_error=lambda _: source.close())
        assert list(source) == []
        assert len(server.heads) == 1


# ---- How long it waits ---------------------------------------------------------------

NO_RETRIES = ("retry: 2000x", "retry: -2", "retry: 2e3", "retry:", "retry", "retry: ５")
HUGE_RETRY = b"retry: %b\n\n" % (b"9" * 400)
ROW = [(1, 1), (1, 2), (2, 4), (4, 8)]  # seconds, at least and at most
ONCE, TWICE = ROW[:2]
LESS = (0.7, 0.7)
HALF_TO_ALL = [(3, 3), (3, 6), (6, 12), (12, 24), (15, 30), (15, 30)]
BY_ONE = {"retry": 1}


def in_9_s():
    return formatdate(time.time() + 9, usegmt=True)


# Options; of each connection what comes (a body, a status, a status and its
# Retry-After, an error of the network); the wait after each
DELAYS = {
    "3 s, doubled up to 30 s": ({}, [503] * 6, HALF_TO_ALL),
    "doubled up to max_retry": (
        {"retry": 1, "max_retry": 5}, [503] * 1100, [*ROW[:3], *[(2.5, 5)] * 1097]
    ),
    "all failures are one row": (BY_ONE, [503, b"", OSError, 429], ROW),
    "a comment or an id is no event": (BY_ONE, [PING, b"id: 1\n\n", PING], ROW[:3]),
    "an event ends the row": (
        BY_ONE, [503, 503, EVENT, EVENT, 503], [ONCE, TWICE, ONCE, ONCE, TWICE]
    ),
    "the server's retry, at once and for good": (
        {}, [b"retry: 700\ndata: x\n\n", EVENT, 503], [LESS, LESS, (0.7, 1.4)]
    ),
    "of a block without data": ({}, [b"retry: 700\n\n", b""], [LESS, (0.7, 1.4)]),
    "of a block without an end": ({}, [b"data: x\n\nretry: 700\n"], [LESS]),
    "not of a line without an end": (BY_ONE, [b"data: x\n\nretry: 700"], [ONCE]),
    "the latest": (
        {}, [b"retry: 9\nretry: 700\n\n", b"retry: 800\n\n"], [LESS, (0.8, 1.6)]
    ),
    "leading zeros mean nothing": ({}, [b"retry: 0700\n\n"], [LESS]),
    "what is not a number means nothing": (
        BY_ONE, [f"{retry}\ndata: x\n\n".encode() for retry in NO_RETRIES], [ONCE] * 6
    ),
    "over max_retry, if the server says so": (
        {}, [b"retry: 60000\ndata: x\n\n", 503, 503], [(60, 60)] * 3
    ),
    "over max_retry, if the caller says so": (
        {"retry": 50}, [EVENT, 503], [(50, 50)] * 2
    ),
    "a retry beyond all clocks": ({}, [HUGE_RETRY], [(3600, threading.TIMEOUT_MAX)]),
    "0 is obeyed once": (
        {"retry": 0},
        [EVENT, EVENT, 503, 503, 503],
        [(0, 0), (0, 0), (0.1, 0.2), (0.1, 0.4), (0.2, 0.8)],
    ),
    "the server's 0 too": ({}, [b"retry: 0\ndata: x\n\n", 503], [(0, 0), (0.1, 0.2)]),
    "1 ms hammers no more than 0": (
        {}, [b"retry: 1\n\n", 503, 503], [(0.001, 0.001), (0.1, 0.2), (0.1, 0.4)]
    ),
    "Retry-After, which does not stay": (BY_ONE, [(503, "7"), 503], [(7, 7), TWICE]),
    "Retry-After with each status that goes on": (
        BY_ONE, [(status, "9") for status in (408, 429, 500, 503)], [(9, 9)] * 4
    ),
    "a date as Retry-After": (BY_ONE, [(503, in_9_s)], [(7, 9)]),
    "a Retry-After over max_retry": (BY_ONE, [(503, "45")], [(45, 45)]),
    "a sooner Retry-After": ({}, [(503, "1"), (503, "0")], [(3, 3), (3, 6)]),
    "a Retry-After that says nothing": (
        BY_ONE, [(503, "soon"), (503, "-7")], [ONCE, TWICE]
    ),
    "a Retry-After of a year": (BY_ONE, [(503, "31536000")], [(60, 31536000)]),
    "the Retry-After of an event stream": (BY_ONE, [(200, "7")], [ONCE]),
}  # fmt: skip


async def waits_between(chat, comes, options):
    """Give the time that passes, or would, between each request and the next."""
    told = iter([*comes, 204])
    between = []
    stream = {"content-type": "text/event-stream"}

    def answer(request):
        between.append(sum(noted))
        noted.clear()
        next_one = next(told)
        if next_one is OSError:
            raise httpx.ConnectError("refused")
        if isinstance(next_one, bytes):
            return httpx.Response(200, headers=stream, content=next_one)
        status, wish = next_one if isinstance(next_one, tuple) else (next_one, None)
        wish = {"retry-after": wish() if callable(wish) else wish} if wish else {}
        return httpx.Response(status, headers=stream | wish, content=EVENT)

    with noted_delays(0) as noted:
        async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
            await listen_to_end(chat, "http://h/", client=own, most=2000, **options)
    return between[1:]


@pytest.mark.parametrize("row", DELAYS.values(), ids=DELAYS)
async def test_how_long_it_waits(chat, row):
    """The reconnection time; doubled in a row of failures, less up to half by chance.

    Never less than the reconnection time, which the standard says is the least.
    """
    options, comes, expected = row
    waited = await waits_between(chat, comes, options)
    assert len(waited) == len(expected)
    for wait, (least, most) in zip(waited, expected, strict=True):
        assert least - 1e-9 <= wait <= most + 1e-9


async def test_waits_differ_by_chance(chat):
    """Or all who lost a server would come back to it at once."""
    one, other = [await waits_between(chat, [503] * 9, {}) for _ in range(2)]
    assert one[0] == other[0] == 3
    assert len({*one[1:], *other[1:]}) == 16


async def test_a_wait_that_is_cancelled_is_not_the_end(chat, delays):
    """Nor is Ctrl-C in one: for the next event it connects again, as after any end."""
    delays.clear()
    first = play(HEAD, b"id: 1\ndata: a\n\n", GONE)
    with serve(in_turn(first, answer_of(b"data: b\n\n"), END)) as server:
        source = listening(chat, server.url)
        assert (await anext(source)).data == "a"
        if chat is SYNC:
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                await anext(source)
        else:
            with anyio.move_on_after(0.1) as scope:
                await anext(source)
            assert scope.cancelled_caught
        assert [(event.data, event.id) async for event in source] == [("b", "1")]
        assert ids_sent(server) == [None, "1", "1"]
        assert delays[-2:] == [3, 3]
        assert server.left.acquire(timeout=PATIENCE)


KEYWORDS = {"content": b"x", "cookies": {"a": "b"}, "data": {"a": "b"}, "json": {}}
KEYWORDS |= {"extensions": {}, "files": {"f": b"x"}, "params": {"a": "b"}}


@pytest.mark.parametrize("name", KEYWORDS)
async def test_keywords_of_a_request_are_those_of_httpx(chat, name):
    listening(chat, NOBODY, method="POST", **{name: KEYWORDS[name]})
    with pytest.raises(TypeError, match=f"{name}s"):
        listening(chat, NOBODY, method="POST", **{f"{name}s": KEYWORDS[name]})


@pytest.mark.parametrize("port", ["", ":443", ":444"])
async def test_a_port_that_is_the_default_is_the_same_origin(chat, delays, port):
    """A redirect to it takes the secrets along."""

    def answer(request):
        if request.url.path == "/":
            target = f"https://h{port}/there"
            return httpx.Response(307, headers={"location": target})
        sent.append(request.headers.get("x-api-key"))
        return httpx.Response(204)

    sent = []
    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        headers = {"x-api-key": "sk-a"}
        await listen_to_end(chat, "https://h/", client=own, headers=headers)
    assert sent == [None if port == ":444" else "sk-a"]


async def test_a_wait_goes_on_however_often_it_is_cancelled(anyio_backend):
    """And the server is not asked before its time."""
    asked = []

    def note_time(_):
        asked.append(time.monotonic())

    handle = in_turn(play(note_time, refuse(503)), play(note_time, X))
    with serve(handle) as server:
        async with sse_chat.alisten(server.url, retry=0.2) as source:
            events = []
            with anyio.fail_after(20):
                while not events:
                    with anyio.move_on_after(0.04):
                        events.append(await anext(source))
    assert [event.data for event in events] == ["x"]
    assert asked[1] - asked[0] >= 0.18


async def test_it_does_wait(chat):
    with serve(in_turn(answer_of(b"retry: 100\ndata: x\n\n"), END)) as server:
        source = listening(chat, server.url, retry=60)
        await anext(source)
        start = time.monotonic()
        assert [event async for event in source] == []
        assert 0.1 <= time.monotonic() - start < 5


# ---- The request, sent anew each time ------------------------------------------------

SENT_ANEW = {  # options; the line of the request, its content-type, its body
    "GET": ({}, "GET /v1", None, b""),
    "params": ({"params": {"q": "ä b"}}, "GET /v1?q=%C3%A4(?:%20|\\+)b", None, b""),
    "json": (
        {"method": "POST", "json": {"a": "ä"}},
        "POST /v1",
        "application/json",
        httpx.Request("POST", "http://a", json={"a": "ä"}).content,
    ),
    "bytes": ({"method": "PUT", "content": b"\0\xff"}, "PUT /v1", None, b"\0\xff"),
    "text": ({"method": "POST", "content": "ä"}, "POST /v1", None, "ä".encode()),
    "a form": (
        {"method": "POST", "data": {"a": "1"}},
        "POST /v1",
        "application/x-www-form-urlencoded",
        b"a=1",
    ),
    "cookies": ({"cookies": {"a": "1"}}, "GET /v1", None, b""),
    "extensions": ({"extensions": {"trace": None}}, "GET /v1", None, b""),
}


def header(head, name):
    return re.findall(f"(?im)^{name}: *(.*)\r$", head)


@pytest.mark.parametrize("row", SENT_ANEW.values(), ids=SENT_ANEW)
async def test_each_request_is_the_first_again(chat, delays, row):
    options, line, kind, body = row
    with serve(in_turn(X, b"", refuse(503), END)) as server:
        await listen_to_end(chat, server.url, **options)
        assert server.bodies == [body] * 4
        for head in server.heads:
            assert re.match(rf"{line} HTTP/1.1\r\n".replace("/v1?", r"/v1\?"), head)
            assert header(head, "accept") == ["text/event-stream"]
            assert header(head, "accept-encoding") == ["identity"]
            assert header(head, "cache-control") == ["no-cache"]
            assert not kind or header(head, "content-type") == [kind]


OWN_HEADERS = {"X-Mine": "1", "accept": "text/plain", "LAST-EVENT-ID": "own"}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_headers_of_the_caller(chat, delays, make):
    """They go with each request, in place of ours, but Accept and Last-Event-ID.

    The object that holds them stays as it is.
    """
    own, untouched = make(OWN_HEADERS), make(OWN_HEADERS)
    with serve(in_turn(answer_of(b"id: 1\ndata: x\n\n"), END)) as server:
        await listen_to_end(chat, server.url, headers=own, last_event_id="0")
        assert ids_sent(server) == ["0", "1"]
        for head in server.heads:
            assert header(head, "accept") == ["text/event-stream"]
            assert header(head, "x-mine") == (["1"] if own else [])
    assert own == untouched


async def test_a_client_of_the_caller(chat, delays):
    """Its base URL and headers are used; it stays open."""
    with serve(in_turn(X, END, X, END)) as server:
        base = {"base_url": server.url, "headers": {"X-Mine": "1"}}
        async with own_client(chat, **base) as own:
            for _ in range(2):
                events = await listen_to_end(chat, "/events?a=1", client=own)
                assert events == [as_event("x")]
            assert not own.is_closed
        for head in server.heads:
            assert head.startswith("GET /v1/events?a=1 HTTP/1.1")
            assert header(head, "x-mine") == ["1"]


HUSHED = ["Authorization", "Proxy-Authorization", "Cookie", "X-API-Key", "Api-Key"]
HUSHED += ["X-Auth-Token", "X-Goog-Api-Key", "X-Client-Secret", "X-Password"]
HUSHED = dict.fromkeys(HUSHED, "hush")


def redirect(status, url):
    return answer_of(status=f"{status} Away", headers=f"Location: {url}\r\n")


async def test_secrets_stay_at_the_origin_of_the_url(chat, delays):
    """Another port is another origin. All else goes along, and each try begins anew."""
    first, second = answer_of(b"id: 1\ndata: a\n\n"), answer_of(b"data: b\n\n")
    with (
        serve(in_turn(first, second, END)) as other,
        serve(redirect(307, other.url)) as server,
    ):
        mine = {"X-Mine": "1", **dict(itertools.islice(HUSHED.items(), 5))}
        theirs = {"headers": dict(itertools.islice(HUSHED.items(), 5, 99))}
        async with own_client(chat, **theirs) as own:
            events = await listen_to_end(chat, server.url, client=own, headers=mine)
        assert [event.data for event in events] == ["a", "b"]
        assert [head.count("hush") for head in server.heads] == [len(HUSHED)] * 3
        assert ids_sent(server) == ids_sent(other) == [None, "1", "1"]
        for head in other.heads:
            assert "hush" not in head
            assert header(head, "x-mine") == ["1"]
            assert header(head, "accept") == ["text/event-stream"]
            assert header(head, "cache-control") == ["no-cache"]


class SignedPath(httpx.Auth):
    def auth_flow(self, request):
        request.headers["X-Auth-Token"] = f"hush {request.url.path}"
        yield request


async def test_the_login_of_a_client_stays_at_the_origin_of_the_url(chat, delays):
    """There it is put into each request, also after a redirect."""
    with serve(in_turn(X, END)) as other:
        away = redirect(307, other.url)
        with serve(in_turn(redirect(307, "/v1/there"), away)) as server:
            async with own_client(chat, auth=SignedPath()) as own:
                events = await listen_to_end(chat, server.url, client=own)
            assert events == [as_event("x")]
            tokens = [header(head, "x-auth-token") for head in server.heads]
            assert tokens == [["hush /v1"], ["hush /v1/there"], ["hush /v1"]]
            assert [header(head, "x-auth-token") for head in other.heads] == [[], []]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308], ids="status {}".format)
async def test_redirects_at_one_origin_are_followed(chat, delays, status):
    """With secrets; of the cookies, httpx sends those that its client has stored."""
    secrets = {k: v for k, v in HUSHED.items() if k != "Cookie"}
    answers = [redirect(status, "/v1/there"), X] * 2
    with serve(in_turn(*answers, redirect(status, "/v1/there"), END)) as server:
        events = await listen_to_end(chat, server.url, headers=secrets)
        assert events == [as_event("x")] * 2
        paths = [head.split()[1] for head in server.heads]
        assert paths == ["/v1", "/v1/there"] * 3
        assert {head.count("hush") for head in server.heads} == {len(secrets)}


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
async def test_the_port_of_the_scheme_is_the_same_origin(chat, scheme):
    def answer(request):
        tokens.append(request.headers.get("x-auth-token"))
        if request.url.path == "/":
            return httpx.Response(302, headers={"location": f"{scheme}://h:80/there"})
        return httpx.Response(204)

    tokens, headers = [], {"X-Auth-Token": "hush"}
    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        source = listening(chat, "http://h/", client=own, headers=headers)
        assert [event async for event in source] == []
    assert tokens == ["hush", "hush"]


async def test_a_body_is_redirected_too(chat, delays):
    options = {"method": "POST", "json": {"a": 1}}
    with serve(in_turn(redirect(307, "/v1/there"), X, END)) as server:
        assert await listen_to_end(chat, server.url, **options) == [as_event("x")]
        assert [json.loads(body) for body in server.bodies] == [{"a": 1}] * 3


NUMBERS = ("retry", "max_retry", "timeout")
UNFIT_SECONDS = (-1, math.nan, -math.inf)
ODD_URLS = (
    "ftp://h/",
    "http://",
    "http://[::1",
    "http://h:99999",
    "://",
    "/events",
    "",
)
REFUSED = [  # options, the error, and what it says
    *(({"url": url}, ValueError, "(?i)url") for url in ODD_URLS),
    *(({name: odd}, ValueError, name) for name in NUMBERS for odd in UNFIT_SECONDS),
    *(({name: "3"}, TypeError, name) for name in NUMBERS),
    *(({name: math.inf}, ValueError, name) for name in ("retry", "max_retry")),
    ({"timeout": 0}, ValueError, "timeout"),
    ({"max_event_bytes": -1}, ValueError, "max_event_bytes"),
    *(
        ({"last_event_id": id}, ValueError, ".")
        for id in ("a\nb", "a\r", "\0", "\ud83d")
    ),
    *(({"last_event_id": id}, TypeError, "last_event_id") for id in (7, b"7")),
    ({"bogus": 1}, TypeError, "^unexpected keyword bogus$"),
    ({"on_error": "print"}, TypeError, "on_error"),
    ({"on_error": call}, TypeError, "on_error.*async"),
    ({"method": "GET /"}, ValueError, "method"),
    ({"headers": {"X": "a\nb"}}, ValueError, "header"),
    ({"headers": {"X\0": "a"}}, ValueError, "header"),
    *(({"headers": {odd: "a"}}, ValueError, "its name") for odd in ("x y", "x(y", "")),
    *(({"headers": {odd: "a"}}, TypeError, "header") for odd in (1, None)),
    *(({name: True}, TypeError, name) for name in NUMBERS),
    ({"headers": {"X": "ä"}}, ValueError, "."),
    ({"json": {1j}}, TypeError, "."),
    ({"jsno": {}}, TypeError, "jsno"),
]
ONE_SHOT = {
    "iterator": lambda: iter([b"a"]),
    "generator": lambda: (part for part in [b"a"]),
    "async generator": lambda: as_parts(),
    "file": lambda: io.BytesIO(b"a"),
}


async def as_parts():
    yield b"a"


@pytest.fixture(params=[sse_chat.listen, sse_chat.alisten])
def listen(request):
    return request.param


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: as_words(row[0]))
def test_what_cannot_be_asked_is_refused_at_the_call(listen, row):
    options, error, says = row
    with pytest.raises(error, match=says):
        listen(**{"url": "http://h/"} | options)


@pytest.mark.parametrize("make", ONE_SHOT.values(), ids=ONE_SHOT)
def test_a_body_that_can_be_sent_once_is_refused_at_the_call(listen, make):
    content = make()
    with pytest.raises(TypeError, match="content"):
        listen("http://h/", method="POST", content=content)
    getattr(content, "close", lambda: None)()


def test_the_wrong_kind_of_client_is_refused_at_the_call(listen):
    is_sync = listen is sse_chat.listen
    wrong = (httpx.AsyncClient if is_sync else httpx.Client)(verify=NO_TLS)
    with pytest.raises(TypeError, match="Client"):
        listen("http://h/", client=wrong)


def test_the_types_of_what_it_gives():
    assert type(sse_chat.listen("http://h/")) is sse_chat.EventStream
    assert type(sse_chat.alisten("http://h/")) is sse_chat.AsyncEventStream


# ---- Nothing lost, nothing twice -----------------------------------------------------

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
NOISE = st.sampled_from([b": hi", b"retry: 1", b"foo: bar", b"data", b"event: e"])


@st.composite
def logs(draw):
    """What a server keeps: blocks, each with an id of its own, and most with data."""
    log = []
    for number in range(draw(st.integers(1, 6))):
        id = f"{number}{draw(st.sampled_from(['', 'ä', ' 🙂', '-b']))}"
        lines = [b"id: " + id.encode(), *draw(st.lists(NOISE, max_size=3))]
        if draw(st.integers(0, 4)):
            lines.append(f"data: ä{number}".encode())
        lines = [*draw(st.permutations(lines)), b""]
        end_of_line = draw(ENDS)
        log.append((id, b"".join(line + end_of_line for line in lines)))
    return log


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in these pieces, which then ends, or breaks."""

    def __init__(self, pieces, breaks):
        self.pieces, self.breaks = pieces, breaks

    def __iter__(self):
        yield from self.pieces
        if self.breaks:
            raise httpx.ReadError("cut")

    async def __aiter__(self):
        for piece in self:
            yield piece


CUT_AT = st.integers(0, 150)  # bytes; a log has some 150
WAYS_TO_END = st.sampled_from(["end", "break", "no connection", "status 503"])
CONNECTIONS_MADE = st.lists(
    st.tuples(CUT_AT, WAYS_TO_END, st.lists(CUT_AT, max_size=5)), max_size=8
)


def by_the_log(log):
    """Give each event once, in order, with its id: those of each block by itself."""
    events = (event for _, block in log for event in by_the_standard(block)[1])
    return [(event.event, event.data, event.id) for event in events]


def a_server_of(log, connections):
    """Answer from after the Last-Event-ID on; each connection is cut as these say."""
    ids = [id for id, _ in log]
    cuts = iter(connections)

    def answer(request):
        raw = {name.lower(): value for name, value in request.headers.raw}
        last = raw.get(b"last-event-id")
        rest = log[ids.index(last.decode()) + 1 :] if last else log
        # Between two blocks stands a comment, or a CR would meet an LF.
        body = UTF8_BOM + b"".join(block + b":\n" for _, block in rest)
        size, end, pieces = next(cuts, (len(body), "end", []))
        if end == "no connection":
            raise httpx.ConnectError("refused")
        status = 503 if end == "status 503" else 200 if rest else 204
        stream = Body(cut(body[:size], pieces), end == "break")
        kind = {"content-type": "text/event-stream"}
        return httpx.Response(status, headers=kind, stream=stream)

    return httpx.MockTransport(answer)


@given(logs(), CONNECTIONS_MADE)
def test_every_event_comes_once_and_in_order_however_often_it_breaks(log, connections):
    async def events_of(chat):
        transport = a_server_of(log, connections)
        async with own_client(chat, transport=transport) as own:
            events = await listen_to_end(chat, "http://h/", client=own)
        return [(event.event, event.data, event.id) for event in events]

    with noted_delays(0):
        assert finished(events_of(SYNC)) == by_the_log(log)
        assert asyncio.run(events_of(ASYNC)) == by_the_log(log)


class Mortal(Server):
    """Counts, from after the Last-Event-ID on; may be killed, and started again.

    Each of its `lives` is a number of events, after which it dies. After the last life
    it sends one more event, and then answers 204.
    """

    def __init__(self, lives):
        self.lives = iter(lives)
        self.last = 0  # number that was sent
        super().__init__(self.count)

    def count(self, connection, number):
        [*_, id] = ids_sent(self)
        following = itertools.count(int(id or 0) + 1)
        life = next(self.lives, None)
        if life is None and id == str(self.last):
            return connection.sendall(END)
        connection.sendall(HEAD)
        for self.last in itertools.islice(following, 1 if life is None else life):
            connection.sendall(b"id: %d\ndata: %d\n\n" % (self.last, self.last))
        if life is not None:
            connection.sendall(b"id: 999\ndata: half an ev")
            self.kill(connection)
        return None

    def kill(self, connection):
        Server.__exit__(self)
        reset(connection)

    def start_again(self):
        address = self.url.split("/")[2].split(":")
        self.socket = socket.create_server((address[0], int(address[1])), backlog=1024)
        threading.Thread(target=self.accept, daemon=True).start()


async def test_a_server_that_is_killed_fifty_times_loses_no_event(chat, delays):
    refused = []

    def on_error(error):
        if isinstance(error, httpx.ConnectError):
            refused.append(error)
            server.start_again()

    lives = random.Random(1).choices(range(6), k=50)
    with Mortal(lives) as server:
        events = await listen_to_end(chat, server.url, on_error=on_error)
        assert len(refused) == 50
        numbers = [str(number) for number in range(1, server.last + 1)]
        assert [(e.id, e.data) for e in events] == [(n, n) for n in numbers]


# ---- Its life ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def waiting(phase, chat):
    """Give a server, options, and a semaphore that says that the event source waits.

    In the phases of a body the test releases it, once the one event has come.
    """
    waits = threading.Semaphore(0)
    client, options = {}, {}

    def reached(*_):
        waits.release()

    def over_http2(h2, stream):
        kind = ("content-type", "text/event-stream")
        h2.send_headers(stream, [(":status", "200"), kind])
        h2.send_data(stream, EVENT)

    async def connecting(request):
        reached()
        await anyio.sleep_forever()

    @contextlib.contextmanager
    def without_an_answer(connection):
        play(reached, GONE)(connection, 0)
        yield connection

    body = play(HEAD, EVENT, GONE)
    if phase == "wait":
        server = serve(refuse(503))
        options |= {"on_error": reached, "retry": 5}
    elif phase == "TLS handshake":
        server = serve(b"", without_an_answer)
    elif phase == "TLS body":
        wrap, client["verify"] = tls_of_server(), tls_of_client()
        server = serve(body, wrap)
    elif phase == "HTTP/2 body":
        needs("h2")
        server = Http2Server(over_http2)
        client |= {"http1": False, "http2": True}
    else:
        server = serve(play(reached, GONE) if phase == "head" else body)
    if phase == "connecting":
        client["transport"] = httpx.MockTransport(connecting)
    with server:
        options["url"] = server.url.replace(
            "http", "https" if "TLS" in phase else "http"
        )
        async with own_client(chat, **client) as own:
            yield server, {"client": own, **options}, waits


WOKEN_AT_ONCE = ("body", "TLS body", "wait")
WAITED_FOR = (*WOKEN_AT_ONCE, "connecting", "TLS handshake", "head", "HTTP/2 body")


# httpcore leaves the socket of a handshake that is cancelled to garbage collection
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("phase", WAITED_FOR)
async def test_closing_wakes_who_waits(chat, phase):
    """Within 50 ms; in sync code in some phases only at the timeout."""
    at_once = chat is ASYNC or phase in WOKEN_AT_ONCE
    if (chat, phase) == (SYNC, "connecting"):
        pytest.skip("a function in place of a server has no timeout")
    took = []
    async with (
        waiting(phase, chat) as (server, options, waits),
        anyio.from_thread.BlockingPortal() as portal,
    ):
        while not took or (at_once and 0.05 < took[-1] < 1 and len(took) < 5):
            source = listening(chat, timeout=5 if at_once else 0.2, **options)
            if "body" in phase:
                assert await anext(source) == as_event("x")
                waits.release()
            took.append(await closed_from_a_thread(chat, source, waits, portal))
            assert [event async for event in source] == []
        if phase == "TLS handshake":
            gc.collect()
        assert took[-1] < (0.05 if at_once else 3)
        assert len(server.heads) <= len(took)


@pytest.mark.parametrize("redirects", [False, True], ids=["stream", "redirects"])
def test_closing_before_the_headers_ends_the_stream_once_they_are_there(redirects):
    asked, closed = threading.Semaphore(0), threading.Event()
    head = [b"HTTP/1.1 307 Away\r\nLocation: /v1\r\nContent-Length: 0\r\n\r\n"]
    answer = [*head, KEEP] if redirects else [HEAD, [(EVENT, 0.05)] * 600]
    waits = (lambda _: asked.release(), lambda _: closed.wait(PATIENCE))
    slow = play(*waits, *answer)
    with serve(slow) as server, sse_chat.listen(server.url) as source:
        got = []
        reader = threading.Thread(target=lambda: got.extend(source))
        reader.start()
        assert asked.acquire(timeout=PATIENCE)
        source.close()
        closed.set()
        reader.join(PATIENCE)
        assert (reader.is_alive(), got, len(server.heads)) == (False, [], 1)


class Gate(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """Answers, or sends the first event, when it is opened; then nothing."""

    def __init__(self, where):
        self.where = where
        self.reached, self.opened = anyio.Event(), anyio.Event()

    async def wait(self, where):
        if where == self.where:
            self.reached.set()
            await self.opened.wait()

    async def handle_async_request(self, request):
        await self.wait("headers")
        head = {"content-type": "text/event-stream"}
        return httpx.Response(200, headers=head, stream=self)

    async def __aiter__(self):
        await self.wait("event")
        yield EVENT
        await anyio.sleep_forever()


@pytest.mark.parametrize("where", ["headers", "event"])
async def test_closing_at_the_moment_of_an_event_ends_the_stream(anyio_backend, where):
    gate, got = Gate(where), []
    async with httpx.AsyncClient(transport=gate, verify=NO_TLS) as own:
        source = sse_chat.alisten("http://h/", client=own)

        async def read():
            got.extend([event async for event in source])

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await gate.reached.wait()
                gate.opened.set()
                await source.aclose()
    assert got == []


def test_long_waits_are_cut_to_what_clocks_take():
    plan = functools.partial(sse_chat.listen, "http://h/", max_retry=1e10)
    with (
        httpx.Client(transport=httpx.MockTransport(lambda r: X_OF_MOCK)) as own,
        plan(client=own, retry=1e10) as source,
    ):
        assert next(source) == as_event("x")
        threading.Timer(0.1, source.close).start()
        assert list(source) == []


async def closed_from_a_thread(chat, source, waits, portal):
    """Close a source that waits for an event; give the seconds until its end."""
    close = source.twin.close if chat is SYNC else source.aclose

    def wait_and_close():
        assert waits.acquire(timeout=20)
        pause(0.02)
        start = time.monotonic()
        (close if chat is SYNC else functools.partial(portal.call, close))()
        return start

    with concurrent.futures.ThreadPoolExecutor() as threads:
        start = threads.submit(wait_and_close)
        assert [event async for event in source] == []
        took = time.monotonic()
        # The loop must go on, or `portal.call` would not come back.
        return took - await anyio.to_thread.run_sync(start.result)


async def test_it_asks_at_the_first_next_and_never_once_closed(chat):
    with serve(X) as server:
        unread, closed, read = (listening(chat, server.url) for _ in range(3))
        for _ in range(2):
            await closed.aclose()
        assert [event async for event in closed] == []
        async with unread:
            pass
        assert [event async for event in unread] == []
        async with read:
            assert server.connections == 0
            assert (await anext(read)).data == "x"
            assert server.connections == 1


def is_socket(descriptor):
    try:
        return stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode)
    except OSError:
        return False  # that was of the listing itself


OF_THE_LOOP = re.compile("Trio thread|AnyIO worker|asyncio_")  # they resolve names


def left_open():
    """Count what may be left open: threads, sockets, tasks."""
    names = [thread.name for thread in threading.enumerate()]
    sockets = sum(map(is_socket, os.listdir("/dev/fd")))
    threads = len(names) - len([*filter(OF_THE_LOOP.match, names)])
    return threads, sockets, len(anyio.get_running_tasks())


async def leave_events(how, make):
    """Have an event source and go; give it, so that it is not garbage."""
    if how == "break":
        async for _ in make():
            return None
    source = make()
    if how == "unread":
        await source.aclose()
    elif how in ("close", "close after more"):
        for _ in range(1 + (how != "close")):
            await anext(source)
        await source.aclose()
    elif how == "cancel":
        with anyio.CancelScope() as scope:
            async for _ in source:
                scope.cancel()
        await source.aclose()
    else:
        with contextlib.suppress(SSEError, KeyError):
            async with source:
                async for _ in source:
                    if how == "raise":
                        raise KeyError
                    if how == "with":
                        break
    return source


ENDLESSLY = play(HEAD, itertools.repeat((EVENT, 0.002), 10_000))
LEFT = {  # what the server does; how the event source is left
    "204": in_turn(X, END),
    "404": in_turn(X, refuse(404)),
    "over the limit": in_turn(X, play(HEAD, b"data: " + b"x" * 99, GONE)),
    "on_error": in_turn(X, refuse(503)),
    "close after more": in_turn(X, ENDLESSLY),
    **dict.fromkeys(("unread", "close", "with", "raise", "break", "cancel"), ENDLESSLY),
}


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="nothing lists open files")
@pytest.mark.parametrize("shared", [False, True], ids=["own client", "caller's client"])
@pytest.mark.parametrize("how", LEFT)
async def test_nothing_is_left_open(chat, how, shared):
    def on_error(error):
        raise KeyError from error

    if (chat, how) == (SYNC, "cancel"):
        pytest.skip("sync code has no cancelling")
    kept = []
    with serve(LEFT[how]) as server:
        async with own_client(chat, limits=ONE) as own:
            before = left_open()
            options = {"client": own} if shared else {}
            options |= {"retry": 0, "on_error": on_error, "max_event_bytes": 20}
            kept.append(
                await leave_events(how, lambda: listening(chat, server.url, **options))
            )
            assert await until(lambda: all(map(operator.le, left_open(), before)))
            for source in filter(None, kept):
                assert [event async for event in source] == []


async def test_memory_does_not_grow_with_reconnections(chat):
    """Of 600, once 200 have filled what is cached."""
    blocks = []
    kind = {"content-type": "text/event-stream"}

    def answer(request):
        made = next(numbers)
        if made in (200, 800):
            gc.collect()
            blocks.append(sys.getallocatedblocks())
        if made == 800:
            return httpx.Response(204)
        body = b"id: %d\nretry: 0\ndata: %d\n\n" % (made, made)
        return httpx.Response(200, headers=kind, content=body)

    numbers = itertools.count()
    async with (
        own_client(chat, transport=httpx.MockTransport(answer)) as own,
        listening(chat, "http://h/", client=own) as source,
    ):
        async for event in source:
            assert event.id == source.last_event_id
    first, last = blocks
    assert last - first < 600  # blocks of memory: less than one for each connection


@pytest.mark.parametrize("times", [20, 21], ids="{} times".format)
async def test_twenty_redirects_are_followed(chat, times):
    def answer(request):
        number = int(request.url.path[1:])
        if number < times:
            return httpx.Response(302, headers={"location": f"/{number + 1}"})
        return httpx.Response(204)

    transport = httpx.MockTransport(answer)
    for follows in (False, True):  # which is its own affair
        async with own_client(
            chat, transport=transport, follow_redirects=follows
        ) as own:
            source = listening(chat, "http://h/0", client=own)
            with pytest.raises(StopAsyncIteration if times == 20 else SSEError):
                await anext(source)


def test_listening_refuses_packed_bodies_and_endless_redirects():
    head = {"content-type": "text/event-stream", "content-encoding": "br"}
    packed = httpx.Response(200, headers=head, stream=httpx.ByteStream(b""))
    around = httpx.Response(302, headers={"location": "/again"})
    for response, words, status in (
        (packed, "content encoding", 200),
        (around, "redirects", None),
    ):
        transport = httpx.MockTransport(lambda request, response=response: response)
        with httpx.Client(transport=transport) as own:
            source = sse_chat.listen("http://h/", client=own)
            with pytest.raises(SSEError, match=words) as told:
                next(source)
            assert told.value.status_code == status


# ---- Threads and memory; httpx2 alone; a real server ---------------------------------

LIVE = os.environ.get("SSE_CHAT_LIVE_URL", sse_chat.DEFAULT_BASE_URL)


def test_threads_over_one_client_do_not_mix():
    def handle(connection, number):
        name = json.loads(server.bodies[number - 1])["messages"][0]["content"]
        body = chunked(*[event(name)] * 40, *ENDING)
        return play(body[:3000], 0.001, body[3000:], KEEP)(connection, number)

    def one(name):
        next(client.stream(name))
        return client.generate(name).text

    names = [f"<{number}>" for number in range(64)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool, serve(handle) as server:
        client = sse_chat.ChatClient(base_url=server.url)
        assert list(pool.map(one, names)) == [name * 40 for name in names]
        client.close()


def test_a_long_stream_takes_the_memory_of_its_text():
    block = event("four") * 500
    steps = (HEAD, [block] * 10, HELLO)
    with serve(play(*steps)) as server, memory(2e6):
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        for _ in stream:
            pass
        assert len(stream.completion.text) == 4 * 500 * 10 + 5


NO_HTTPX = """
import sys
sys.modules["httpx"] = sys.modules["httpx2"] = None
from sse_chat import generate, iter_chunks, iter_sse
stream = [b'data: {"choices": [{"delta": {"content": "x"}}]}\\n\\ndata: [DONE]\\n\\n']
print(len([*iter_sse(stream)]), *[chunk.text for chunk in iter_chunks(stream)])
generate("hi")
"""


def test_only_asking_needs_httpx():
    command = [sys.executable, "-c", NO_HTTPX]
    options = {"capture_output": True, "text": True, "cwd": program_file().parent}
    done = subprocess.run(command, **options)
    assert done.stdout == "2 x\n"
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert re.fullmatch("ModuleNotFoundError: .*needs httpx.*pip install httpx", last)


@pytest.mark.httpx2
def test_the_core_passes_under_httpx2_alone():
    """Every body, and the life of streams, where httpx cannot be imported."""
    needs("httpx2")
    blocked = 'import pytest, sys; sys.modules["httpx"] = None; sys.exit(pytest.main())'
    command = [sys.executable, "-c", blocked, "-vx", "-m", "not live"]
    command += ["-p", "no:pytest_httpx", "-p", "no:respx"]  # which import httpx
    command += ["-k", "(life or every_body) and not trio and not uvloop", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d\d passed", done.stdout)


@pytest.mark.live
async def test_live_answers(chat):
    async with chat.client(base_url=LIVE, max_retries=0, max_tokens=24) as client:
        usage = {"stream_options": {"include_usage": True}}
        answer = await take(client.stream("Say hello. 你好", **usage))
        assert (answer.error, len(answer.chunks) > 2) == (None, True)
        for made in (answer.completion, await client.generate("Say hello. 你好")):
            tokens = made.usage.prompt_tokens + made.usage.completion_tokens
            assert made.usage.total_tokens == tokens > 0
            assert made.choices[0].finish_reason in ("stop", "length")
            assert made.text
        for _ in range(5):
            await leave("raise", lambda: client.stream("Count.", max_tokens=400))
            assert (await take(client.stream("hi", logprobs=True))).error is None
        answer = await take(client.stream("hi", n=2, max_tokens=1))
        assert len(answer.completion.choices) == 2
        assert await client.models()
        error = (await take(client.stream([{"role": "user"}], max_tokens="many"))).error
        assert 400 <= error.status_code < 600
        error = (await ask(chat, LIVE.rstrip("/") + "/nope")).error
        assert error.status_code == 404


# ---- The program in pipes ------------------------------------------------------------

# A shell that runs the tests in the background has SIGINT ignored, in children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def started(*args: Any, wrap: Any = (), **env: str) -> Iterator[Any]:
    """The program while it runs, in pipes; `wrap` is what to run it with."""
    command = [*wrap, sys.executable, program_file(), *args]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = os.environ | {"NO_COLOR": "", "PYTHONUNBUFFERED": ""} | env
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()  # coverage saves its data then, if it can
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()


def until_it_waits(process: Any) -> None:
    """Until a program sleeps, as it does when it waits for a person or a server."""
    state = Path(f"/proc/{process.pid}/stat")
    if not state.exists():  # as on macOS
        return pause(0.3)
    asleep = 0
    while asleep < 5 and process.poll() is None:
        pause(0.005)
        is_asleep = state.read_text().rpartition(")")[2].split()[0] == "S"
        asleep = asleep + 1 if is_asleep else 0
    return None


def run(*args: Any, stdin: bytes = b"", **options: Any) -> tuple[int, bytes, bytes]:
    """Run it; give the exit code, stdout and stderr."""
    with started(*args, **options) as process:
        out, err = process.communicate(stdin, timeout=PATIENCE)
        return process.returncode, out, err


@pytest.fixture
def cli(waits, monkeypatch, capsys):
    """`run` inside this process, which is quicker; its outputs are str."""
    usual = dict(os.environ)

    def call(*args: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        monkeypatch.setattr("os.environ", usual | env)
        try:
            code = sse_chat.main(list(args))
        except SystemExit as leaving:
            code = leaving.code
        return code, *capsys.readouterr()

    return call


def to(server: Server, *args: str) -> list[str]:
    return ["-m", "m", "-u", server.url, "--timeout", str(PATIENCE), *args]


def json_response(value: Any, status: str = "200 OK") -> bytes:
    return http(json.dumps(value).encode(), status=status, kind="application/json")


def listed(*ids: str) -> bytes:
    """A list of models, and an answer for who asks for that."""
    return json_response(PIECE | {"data": [{"id": id} for id in ids]})


def refused(message: str) -> bytes:
    return json_response({"error": {"message": message}}, "400 Bad Request")


def asked(server: Server, number: int = -1) -> list[tuple[str, str]]:
    """The messages of a request, as (role, content)."""
    messages = json.loads(server.bodies[number])["messages"]
    return [(message["role"], message["content"]) for message in messages]


CUT, STOP = HELLO[:2], HELLO[2:]
THOUGHTS = (event(reasoning="Let me "), event(reasoning="see."), event("<thi"))
THOUGHTFUL = (*THOUGHTS, event("nk>and think</think>Hel"), event("lo"), *STOP)
BETWEEN = http(CUT[0], THOUGHTS[1], CUT[1], DONE)
SILENT_ANSWER = play(chunked(*CUT, end=False), GONE)
REPLY = {"role": "assistant", "content": "<think>hm</think>Hello"}
PIECE: Any = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
PIECE["choices"] = [{"index": 0, "message": REPLY, "finish_reason": "stop"}]
PIECE["usage"] = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
IN_ONE_PIECE = json_response(PIECE)
FULL_ANSWER = http(*CUT, event(finish="length"), DONE)
FULL_OF_THINKING = http(event(reasoning="hm"), event(finish="length"), DONE)
FILTERED = http(*CUT, event(finish="content_filter"), DONE)
LINES_KEPT = http(event("\n\n"), event(" Hi"), event("\n\n"), *STOP)
HALVES = http(event("\ud83d"), event("\ude42 \ud83d"), *STOP)
ENDED_BY_ERROR = http(*CUT, event(finish="error"), DONE)
SILENT_FROM_THE_START = play(HEAD, GONE)
NO_EVENT = http(*CUT, b"data: oops\n\n")
LIMIT_WORDS = ("MAX_TOKENS", "max_output_tokens", "model_context_window_exceeded")
FILTER_WORDS = ("SAFETY", "content-filter")
AT_LIMIT = ".*stopped at the token limit\n"
FULL_NOTE = "sse_chat: the answer is not whole: it stopped at the token limit\n"
AT_FILTER = ".*stopped at a content filter\n"
IS_EMPTY = "the answer is empty\n"
TAG = "strip <think> tags, then return. Done."
SPACED = " \n<think>\nhm\n</think>\n\n  Hello\n"

# The answer; exit code and standard output; the reasoning and the words of ours that
# are on standard error, the last of those as a regular expression.
SHOWN = {
    "whole": (http(*HELLO), 0, "Hello\n", "", ""),
    "in one piece": (IN_ONE_PIECE, 0, "Hello\n", "hm\n", ""),
    "thinking": (http(*THOUGHTFUL), 0, "Hello\n", "Let me see.and think\n", ""),
    "thinking alone": (http(event(reasoning="hm"), *STOP), 3, "", "hm\n", IS_EMPTY),
    "empty": (http(*STOP), 3, "", "", IS_EMPTY),
    "blank": (http(event(" \n"), *STOP), 3, " \n", "", IS_EMPTY),
    "thinking between": (BETWEEN, 0, "Hello\n", "see.\n", ""),
    "white space": (http(event(SPACED), *STOP), 0, "  Hello\n", "\nhm\n", ""),
    "a tag in the text": (http(event(TAG), *STOP), 0, TAG + "\n", "", ""),
    "lines kept": (LINES_KEPT, 0, "\n\n Hi\n\n", "", ""),
    "half characters": (HALVES, 0, "🙂 �\n", "", ""),
    "a refusal": (http(event(refusal="No."), *STOP), 0, "No.\n", "", ""),
    "refused": (refused("no \x07such thing"), 1, "", "", r"no \\x07such thing\n"),
    "broke": (http(*CUT, b'data: {"error": "oh"}\n\n'), 1, "Hello\n", "", "oh\n"),
    "hung up": (b"", 1, "", "", ".*broke[^\\n]*\\n.*127.0.0.1"),
    "HTML": (http(b"<html>", kind="text/html"), 1, "", "", ".*text/html"),
    "torn": (chunked(*CUT, end=False), 3, "Hello\n", "", ".*cut off"),
    "torn JSON": (IN_ONE_PIECE[:-20], 3, "", "", ".*cut off"),
    "torn in a tag": (http(event("<thi")), 3, "<thi\n", "", ".*cut off"),
    "silent": (SILENT_ANSWER, 3, "Hello\n", "", ".*no data for 0.2 s"),
    "silent from the start": (SILENT_FROM_THE_START, 1, "", "", ".*first token"),
    "failed": (ENDED_BY_ERROR, 3, "Hello\n", "", ".*'error'"),
    "a bad event": (NO_EVENT, 1, "Hello\n", "", ".*oops"),
    "[DONE] alone": (http(DONE), 1, "", "", ".*no answer"),
    "nothing": (http(), 1, "", "", ".*empty"),
    "full": (FULL_ANSWER, 3, "Hello\n", "", AT_LIMIT),
    "filtered": (FILTERED, 3, "Hello\n", "", AT_FILTER),
    "full of thinking": (FULL_OF_THINKING, 3, "", "hm\n", AT_LIMIT),
}
for words, told in ((LIMIT_WORDS, AT_LIMIT), (FILTER_WORDS, AT_FILTER)):
    for word in words:
        answer = http(*CUT, event(finish=word), DONE)
        SHOWN[f"finish_reason {word}"] = answer, 3, "Hello\n", "", told


@pytest.mark.parametrize("how", ["", "--no-stream", "--hide-reasoning", "--json"])
@pytest.mark.parametrize("name", SHOWN)
def test_answer(cli, name, how):
    answer, code, text, reasoning, told = SHOWN[name]
    is_silent = answer in (SILENT_ANSWER, SILENT_FROM_THE_START)
    timeout = "--timeout=0.2" if is_silent else f"--timeout={PATIENCE}"
    with serve(answer) as server:
        got, out, err = cli(*to(server), timeout, *how.split(), "hi")
    if how == "--json":  # what came stays printed, as it came
        chunks = map(ChatCompletionChunk.from_dict, map(json.loads, out.splitlines()))
        out = shown_of(accumulate(chunks))
    assert (got, out) == (code, text)
    # What was said comes first, what to do may come in a second line.
    told = rf"sse_chat: {told}[^\n]*\n?([^\n]+\n)?" if told else ""
    shown = how in ("", "--no-stream")
    assert re.fullmatch(re.escape(reasoning * shown) + told, err)


def shown_of(completion: ChatCompletion) -> str:
    """What the program writes of an answer on standard output."""
    said = completion.text
    for choice in completion.choices:
        said += choice.message.refusal or ""
    pairs = sse_chat.split_thinking([said])
    said = "".join(text for is_thinking, text in pairs if not is_thinking)
    return said if said.endswith("\n") or not said else f"{said}\n"


def tool_call(arguments: str, index: int = 0) -> bytes:
    """A chunk with a tool call, all of it at once."""
    function = {"name": "weather", "arguments": arguments}
    piece = {"index": index, "id": f"c{index}", "type": "function"}
    return event(tool_calls=[piece | {"function": function}])


CALLED = (event(finish="tool_calls"), DONE)
PARIS = '{"name": "weather", "arguments": {"city": "Paris 你"}}\n'
NOWHERE = '{"name": "weather", "arguments": "{oops"}\n'
CUSTOM_CALL = {"id": "c", "type": "custom", "custom": {"name": "sh", "input": "ls -l"}}
CUSTOM = {"role": "assistant", "content": None, "tool_calls": [CUSTOM_CALL]}
MALFORMED = said({}, "tool_calls", native_finish_reason="MALFORMED_FUNCTION_CALL")
BYE, LIMITED = event("Bye", index=1), event("Bye", "length", index=1)
TOOL_CALLS_SHOWN = {
    "a call": ([tool_call('{"city": "Paris 你"}'), *CALLED], 0, PARIS),
    "text and two calls": (
        [*CUT, tool_call('{"city": "Paris 你"}'), tool_call("{oops", 1), *CALLED],
        0,
        f"Hello\n{PARIS}{NOWHERE}",
    ),
    "a call and [DONE] alone": ([tool_call('{"city": "Paris 你"}'), DONE], 0, PARIS),
    "a call too deep to be parsed": (
        [tool_call("[" * 9999), *CALLED],
        0,
        json.dumps({"name": "weather", "arguments": "[" * 9999}) + "\n",
    ),
    "a call at the limit": ([tool_call('{"ci'), event(finish="length"), DONE], 3, ""),
    "a call that is cut off": ([tool_call('{"ci')], 3, ""),
    "a call beside an answer at the limit": (
        [tool_call('{"city": "Paris 你"}'), event(finish="tool_calls"), LIMITED],
        3,
        f"{PARIS}---\nBye\n",
    ),
    "a call of an answer that failed": (
        [tool_call('{"city": "Paris 你"}'), sse(MALFORMED), DONE],
        3,
        "",
    ),
    "a call beside an answer that is cut off": (
        [tool_call('{"city": "Paris 你"}'), event(finish="tool_calls"), BYE],
        3,
        f"{PARIS}---\nBye\n",
    ),
}


@pytest.mark.parametrize("name", TOOL_CALLS_SHOWN)
def test_a_whole_tool_call_is_a_line_of_json(cli, name):
    answer, code, out = TOOL_CALLS_SHOWN[name]
    with serve(http(*answer)) as server:
        assert cli(*to(server), "hi")[:2] == (code, out)


def test_a_custom_tool_call_shows_its_input(cli):
    choice = {"index": 0, "message": CUSTOM, "finish_reason": "tool_calls"}
    with serve(json_response(PIECE | {"choices": [choice]})) as server:
        got = cli(*to(server), "--no-stream", "hi")
    assert got == (0, '{"name": "sh", "arguments": "ls -l"}\n', "")


@pytest.mark.parametrize("how", ["", "--no-stream"])
def test_several_answers_are_parted_by_a_line(cli, how):
    others = [event("<think>hm</think>Bye", index=1), event("", index=2, refusal="No")]
    others += [event(finish="stop", index=index) for index in (1, 2)]
    answer = http(CUT[0], *others, CUT[1], tool_call("{}"), *CALLED)
    with serve(answer) as server:
        code, out, err = cli(*to(server), *how.split(), "-o", "n=3", "hi")
    called = '{"name": "weather", "arguments": {}}\n'
    assert (code, out, err) == (0, f"Hello\n{called}---\nBye\n---\nNo\n", "hm\n")


@pytest.mark.parametrize("how", ["", "--no-stream"])
@pytest.mark.parametrize("end", ["cut off", "error"])
def test_what_came_of_several_answers_is_shown_when_one_breaks(cli, how, end):
    more = [] if end == "cut off" else [b'data: {"error": "oh"}\n\n']
    with serve(http(CUT[0], event("Bye", index=1), CUT[1], *more)) as server:
        code, out, _ = cli(*to(server), *how.split(), "-o", "n=2", "hi")
    assert (code, out) == (3 if end == "cut off" else 1, "Hello\n---\nBye\n")


def using(prompt: Any, completion: Any) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return sse({"choices": [], "usage": usage})


NO_TOKENS = http(*CUT, using(0, 10**9 - 1), *STOP)
HI = http(*HELLO)
KEYLESS = json_response({"error": {"message": "who?"}}, "401 Unauthorized")
BUSY = json_response({"error": {"message": "later"}}, "503 Service Unavailable")
NO_ONE = (
    f"cannot connect.*\n.*{NOBODY}.*ollama serve.*--base-url.*--demo needs no server\n"
)
TIMES = r"first token after \d+\.\d\d s, all after \d+\.\d\d s\n\Z"
BURST = http(event("x") * 5, using(7, 5), *STOP)
NAMELESS = http(sse({"choices": [{"delta": {"content": "Hello"}}]}), DONE)
NO_NUMBERS = {
    "an escape": "\x1b[31m",
    "a text": "abc",
    "true": True,
    "a fraction": 1.5,
    "a billion": 10**9,
    "a list": [],
    "an object": {},
    "below zero": -1,
    "without end": 10**400,
}
ODD = sse({"choices": [], "timings": {"n": "\u2028🙂"}})
LINES_OUT = "".join(json.dumps(json.loads(e[6:])) + "\n" for e in (ODD, *HELLO[:3]))

# Arguments and standard input, the answer; the exit code, standard output, what is
# found on standard error.
RUNS = [
    ("hi --nothing", HI, 2, "", "--nothing"),
    ("hi --api-key sk", HI, 2, "", "--api-key"),
    ("hi -o temperature", HI, 2, "", "-o wants KEY=VALUE"),
    ("hi -o =1", HI, 2, "", "-o wants KEY=VALUE"),
    ("hi -o api_key=sk", HI, 2, "", "api_key: set OPENAI_API_KEY"),
    ("hi -o base_url=x", HI, 2, "", ": write -u URL"),
    ("hi -o client=x", HI, 2, "", "client: the program makes its own"),
    ("hi -o messages=[]", HI, 2, "", "messages: write -c FILE"),
    ("hi -o model=x", HI, 2, "", "model: write -m NAME"),
    ("hi -o stream=false", HI, 2, "", "stream: write --no-stream"),
    ("hi -o system=x", HI, 2, "", "system: write -s TEXT"),
    (
        "hi -o headers=1",
        HI,
        2,
        "",
        r"headers wants an object of texts: '{\"x\": \"y\"}'$",
    ),
    ('hi -o headers={"x":1}', HI, 2, "", "headers wants an object of texts"),
    ("hi -o timeout=0", HI, 2, "", r"\Asse_chat: timeout: .*0 seconds"),
    ("hi -o extra_body=1", HI, 2, "", "extra_body: expected a dict"),
    ("hi --conversation=", HI, 2, "", "-c wants the name of a file"),
    ("hi -u ftp://x", HI, 2, "", r"\Asse_chat: --base-url: "),
    ("hi -o max_retries=0", BUSY, 1, "", r"\Asse_chat: later\nHTTP 503 at [^;]+\Z"),
    (
        "hi -c /nowhere/s.json",
        HI,
        1,
        "",
        "/nowhere/s.json is in a directory that does not exist",
    ),
    ("hi -c /", HI, 1, "", "/ is not a regular file"),
    ("hi --timeout soon", HI, 2, "", "--timeout: invalid float value: 'soon'"),
    ("hi --timeout 0", HI, 2, "", "timeout"),
    ("hi -u http://host:port/v1", HI, 2, "", "http://"),
    ("-", HI, 2, "", "no prompt"),
    ("- < \n \n", HI, 2, "", "no prompt"),
    ("- < a\xe9", HI, 2, "", "standard input is not UTF-8"),
    (
        "hi",
        KEYLESS,
        1,
        "",
        r"\Asse_chat: who\?\nHTTP 401 at http:.*/v1: is OPENAI_API_KEY set to",
    ),
    ("-- hi", json_response({}, "403 No"), 1, "", "HTTP 403.*: is OPENAI_API_KEY set"),
    (f"hi -u {NOBODY}", HI, 1, "", NO_ONE),
    ("hi --json", http(ODD, *HELLO), 0, LINES_OUT, r"\A\Z"),
    ("hi --json --no-stream", IN_ONE_PIECE, 0, json.dumps(PIECE) + "\n", r"\A\Z"),
    ("hi --usage --no-stream", IN_ONE_PIECE, 0, "Hello\n", rf"3 \+ 5 tokens, {TIMES}"),
    ("hi --usage", BURST, 0, "xxxxx\n", rf"\Asse_chat: m: 7 \+ 5 tokens, {TIMES}"),
    ("hi --usage -m o", NAMELESS, 0, "Hello\n", rf"\Asse_chat: o: {TIMES}"),
    ("--usage hi", NO_TOKENS, 0, "Hello\n", rf"m: 0 \+ 999999999 tokens, {TIMES}"),
    ("hi -m o --usage", HI, 0, "Hello\n", rf"\Asse_chat: m: .*{TIMES}"),
]


LISTED = {
    "two": (listed("first", "second"), 0, "first\nsecond\n", r"\A\Z"),
    "an error": (SHOWN["refused"][0], 1, "", "no .*such thing"),
    "HTML": (SHOWN["HTML"][0], 1, "", "models|127.0.0.1"),
    "an answer": (IN_ONE_PIECE, 1, "", "models|127.0.0.1"),
}
NAMED_RUNS = {row[0]: row for row in RUNS}
assert len(NAMED_RUNS) == len(RUNS)
for name, row in LISTED.items():
    NAMED_RUNS[f"--list-models of {name}"] = ("--list-models", *row)


def spelt(args: str) -> str:
    """As an id of a test, without what is not ASCII or not to be seen."""
    kept = (c if " " <= c <= "~" else f" {name_of(c)} " for c in args)
    return " ".join("".join(kept).split())


@pytest.mark.parametrize("row", NAMED_RUNS.values(), ids=map(spelt, NAMED_RUNS))
def test_what_comes_of_the_arguments(cli, row):
    asking, answer, code, out, told = row
    words, _, stdin = asking.partition("< ")
    with serve(answer) as server:
        *got, err = cli(*to(server), *words.split(), stdin=stdin.encode("latin-1"))
    assert got == [code, out]
    assert re.search(told, err)


@pytest.mark.parametrize("option", ["--model", "--system", "--option", ""])
def test_an_argument_that_is_not_utf8_is_refused(cli, option):
    code, _, err = cli(*option.split(), "\udce2\udc80")
    assert (code, "invalid UTF-8" in err) == (2, True)


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_usage_that_is_no_number_of_tokens_is_left_out(cli, name):
    for usage in (using(NO_NUMBERS[name], 5), using(5, NO_NUMBERS[name])):
        with serve(http(*CUT, usage, *STOP)) as server:
            code, out, err = cli(*to(server), "--usage", "hi")
        assert (code, out) == (0, "Hello\n")
        assert re.search(rf"\Asse_chat: m: {TIMES}", err)


@pytest.mark.parametrize("how", ["", "--no-stream"], ids=["stream", "at once"])
def test_json_shows_nothing_that_no_server_has_sent(cli, how):
    with serve(refuse(400)) as server:
        assert cli(*to(server), "--json", *how.split(), "hi")[:2] == (1, "")


def test_usage_names_no_first_token_where_none_came(cli):
    with serve(http(calls([0]), *STOP)) as server:
        err = cli(*to(server), "--usage", "hi")[2]
    assert re.fullmatch(r"sse_chat: m: all after \d+\.\d\d s\n", err)


def test_a_page_in_place_of_the_list_of_models_does_not_stop_the_program(cli):
    """Then the model has no name, also where its usage is told."""
    for no_models in (http(PAGE, kind="text/html"), listed()):
        with serve(in_turn(no_models, NAMELESS)) as server:
            code, out, err = cli("-u", server.url, "--usage", "hi")
        assert (code, out) == (0, "Hello\n")
        assert re.fullmatch(f"sse_chat: {TIMES}", err)


def test_each_chunk_is_flushed_and_a_closed_pipe_is_quiet():
    both = threading.Barrier(2, timeout=PATIENCE)
    more = b"%x\r\n%s\r\n" % (len(CUT[0]), CUT[0])
    answer = chunked(event("one\n"), end=False)
    handle = play(answer, lambda connection: both.wait(), 5000 * [more])
    with serve(handle) as server, started(*to(server), "hi") as process:
        process.stdin.close()
        assert process.stdout.readline() == b"one\n"  # before more was sent
        process.stdout.close()
        both.wait()
        assert process.stderr.read() == b""


WROTE = "You wrote: 好\n\n你 end\n\nNo model has .*"
DISK_FULL = r"sse_chat: \[Errno 28\] No space left on device\n"
LIGHT = r"(?!.*\| +(httpx2?|httpcore2?|ssl|asyncio)\s).*\| +json\n.*"
PROXIES = f"HTTP_PROXY={NOBODY} ALL_PROXY=socks5://127.0.0.1:9"

AS_MODULE = 'cd "${2%/*}"; python=$1; shift 2; exec "$python" -m sse_chat "$@"'
AS_SCRIPT = f'python=$1; shift 2; exec "$python" "{sse_chat.__file__}" "$@"'
INTO_TRUE = '{ "$@"; echo $? >&2; } | true'
BAD_UTF8 = '"$@" "$(printf "say \\\\342\\\\200")"'

# What a shell does with it, an option; the exit code, and both outputs.
PROCESSES = {
    # The demo takes its time, and so comes first.
    "ASCII by PYTHONIOENCODING": (
        'PYTHONIOENCODING=ascii "$@"', "--demo", 0, WROTE, ".+",
    ),
    "the locale C": ('PYTHONCOERCECLOCALE=0 LC_ALL=C "$@"', "--demo", 0, WROTE, ".+"),
    "the locale C without UTF-8": (
        'PYTHONCOERCECLOCALE=0 LC_ALL=C PYTHONUTF8=0 "$@"', "--demo", 0, WROTE, ".+",
    ),
    "proxies": (f'{PROXIES} "$@"', "--demo", 0, WROTE, ".+"),
    "no standard error": ('"$@" 2>&-', "--no-stream", 0, "Hello\n", ""),
    "no standard input": ('"$@" <&-', "--no-stream", 0, "Hello\n", "hm\n"),
    "no standard output": (
        '"$@" >&-', "--no-stream", 1, "", "sse_chat: standard output is closed\n",
    ),
    "a full disk": ('"$@" >/dev/full', "--hide-reasoning", 1, "", DISK_FULL),
    "help on a full disk": ('"$@" >/dev/full', "--help", 1, "", DISK_FULL),
    # The pipe is closed before there is output.
    "a request into a closed pipe": (INTO_TRUE, "--dry-run", 0, "", "141\n"),
    "models into a closed pipe": (INTO_TRUE, "--list-models", 0, "", "141\n"),
    "a full disk for the thinking": (
        '"$@" 2>/dev/full', "--no-stream", 0, "Hello\n", "",
    ),
    "imports of the version": (
        'PYTHONPROFILEIMPORTTIME=1 "$@"', "--version", 0, "sse_chat [0-9.]+\n", LIGHT,
    ),
    "imports of help": (
        'PYTHONPROFILEIMPORTTIME=1 "$@"', "--help", 0, r"(?!.*--\S*key).*--demo.*",
        LIGHT,
    ),
    "bad UTF-8": (BAD_UTF8, "--demo", 2, "", ".*prompt: invalid UTF-8.*"),
    "as a module": (AS_MODULE, "--version", 0, "sse_chat [0-9.]+\n", ""),
    "as a script": (AS_SCRIPT, "--version", 0, "sse_chat [0-9.]+\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
def test_what_comes_of_streams_and_environment(name):
    _, _, code, out, err = PROCESSES[name]
    done = ends_of_processes()[name]
    assert done[0] == code
    for pattern, shown in zip((out, err), done[1:], strict=True):
        assert re.fullmatch(f"(?s){pattern}", shown.decode())


@functools.cache
def ends_of_processes():
    """What `run` gives for each row: at the same time, since the demo waits a lot."""

    def end(name):
        script, option, *_ = PROCESSES[name]
        options = {"stdin": "好".encode(), "wrap": ["sh", "-c", script, "sh"]}
        return run(*to(server), option, "你 end", **options)

    program_file()  # made here, not by each of them
    with serve(listed("m")) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(PROCESSES, pool.map(end, PROCESSES), strict=True))


@pytest.mark.parametrize("how", ["", "--json", "--no-stream"])
def test_ctrl_c_is_130(how):
    begun = threading.Event()
    answer = b"" if how == "--no-stream" else chunked(event("Hel\n"), end=False)
    handle = play(answer, lambda connection: begun.set(), GONE)
    with serve(handle) as server, started(*to(server), *how.split(), "hi") as process:
        process.stdin.close()
        assert begun.wait(PATIENCE)
        assert not answer or b"Hel" in process.stdout.readline()
        until_it_waits(process)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(PATIENCE) == 130
        assert server.left.acquire(timeout=PATIENCE)


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


BRIEF = {"messages": [{"role": "system", "content": "brief"}, *user("hi")["messages"]]}
BOTH = {"OPENAI_BASE_URL": "http://b:2/v1", "OLLAMA_HOST": "c:3"}

# Arguments, standard input, environment; what the request has, and has not.
REQUESTS = [
    ("sum up", "a\nb 你好\n", {}, user("a\nb 你好\n\nsum up")),
    ("sum up", "-\n", {}, user("-\n\nsum up")),
    ("-", "from the pipe\n", {}, user("from the pipe")),
    ("", "from the pipe\n", {}, user("from the pipe")),
    ("why - so", "in\nhere", {}, user("why\n\nin\nhere\n\nso")),
    ("why --json is it - so", "", {}, user("why is it\n\nso")),
    ("why -- -x --json", "", {}, user("why -x --json")),
    ("-- -5+3=", "", {}, user("-5+3=")),
    ("", "\ufeffa\r\nb\r\n", {}, user("a\nb")),
    ("hi --model m --system brief", "", {}, {"model": "m"} | BRIEF),
    ("hi", "", {}, {"model": "of-env", "stream": True, "stream_options": None}),
    ('hi -o top_p=0.2 -o stop=["\\n"]', "", {}, {"top_p": 0.2, "stop": ["\n"]}),
    ("hi -o user=a=b -o x=" + 9999 * "[", "", {}, {"user": "a=b", "x": 9999 * "["}),
    ("hi --usage", "", {}, {"stream_options": {"include_usage": True}}),
    ("hi --usage --no-stream", "", {}, {"stream": False, "stream_options": None}),
    ("hi", "", {"OLLAMA_HOST": ""}, {"url": sse_chat.DEFAULT_BASE_URL}),
    ("hi", "", BOTH, {"url": "http://b:2/v1"}),
    ("hi --base-url http://a:1/v1", "", BOTH, {"url": "http://a:1/v1"}),
    ("hi -u http://a:1/v1", "", {"OLLAMA_HOST": "c:3"}, {"url": "http://a:1/v1"}),
]
HOSTS = """
gpu-box:8080           http://gpu-box:8080
:8080                  http://127.0.0.1:8080
0.0.0.0:8080           http://127.0.0.1:8080
http://gpu-box         http://gpu-box:80
http://gpu-box:8080/   http://gpu-box:8080
https://gpu-box/ollama https://gpu-box:443/ollama
gpu-box:8080/ollama/   http://gpu-box:8080/ollama
gpu-box:8080/box/      http://gpu-box:8080/box
[::1]:8080             http://[::1]:8080
[::]                   http://[::1]:11434
::1                    http://[::1]:11434
"127.0.0.1:8080"       http://127.0.0.1:8080
'gpu-box'              http://gpu-box:11434
"""
for host, base in map(str.split, HOSTS.strip().split("\n")):
    REQUESTS.append(("hi", "", {"OLLAMA_HOST": f" {host} "}, {"url": base + "/v1"}))


def in_words(row: tuple[str, str, dict[str, str], Any]) -> str:
    args, stdin, env, _ = row
    words = [args[:30].replace("\\", ""), *(f"{k} {v.strip()}" for k, v in env.items())]
    return spelt(" ".join(filter(None, [*words, stdin and f"< {stdin}"])))[:70]


def test_ollama_host_gets_no_key(cli):
    """It needs none, and OPENAI_API_KEY is for another server."""
    key = {"OPENAI_API_KEY": "sk-secret"}
    with serve(HI) as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        assert cli("-m", "m", "hi", OLLAMA_HOST=host, **key) == (0, "Hello\n", "")
        assert cli("-m", "m", "-u", server.url, "hi", OLLAMA_HOST="h", **key)[0] == 0
        without, with_key = server.heads
    assert "secret" not in without
    assert "sk-secret" in with_key
    with serve(KEYLESS) as server:
        host = server.url.removeprefix("http://").removesuffix("/v1")
        assert "write -u" in cli("-m", "m", "hi", OLLAMA_HOST=host)[2]


@pytest.mark.parametrize("row", REQUESTS, ids=map(in_words, REQUESTS))
def test_what_is_asked_and_where(cli, row):
    args, stdin, env, expected = row
    env = {"OPENAI_MODEL": "of-env"} | env
    code, out, err = cli("--dry-run", *args.split(), stdin=stdin.encode(), **env)
    assert (code, err) == (0, "")
    [(url, body)] = re.findall(
        r'(?s)"(http\S*)/chat/completions" <<.END.\n(.*)\nEND', out
    )
    sent = json.loads(body) | {"url": httpx.URL(url)}
    assert {name: sent.get(name) for name in expected} == expected


# The login, the query, arguments, and the variables that the command wants.
HIDDEN = {"COOKIE": "sid=hidden; b=2", "API_KEY": "sk-hidden"}
OF_A_CALL = {
    "cookie": HIDDEN["COOKIE"],
    "Api-Key": HIDDEN["API_KEY"],
    "x-mine": 'a"$b`\\',
}
DRY = {
    "key": ("", "", ["-o", "stop='", "--usage"], {"OPENAI_API_KEY": "sk-secret"}),
    "no key": ("", "", ["--no-stream", "-s", "brief"], {}),
    "login": ("me:hush%20hush@", "", [], {"AUTHORIZATION": "Basic bWU6aHVzaCBodXNo"}),
    "query": ("", "?v=1&sub-key=sk-hidden&w=$x", [], {"SUB_KEY": "sk-hidden"}),
    "signature": ("", "?v=1&sig=sk-hidden", [], {"SIG": "sk-hidden"}),
    "a command in a name": ("", "?a$(id)=1", [], {}),
    "headers": ("", "", ["-o", f"headers={json.dumps(OF_A_CALL)}"], HIDDEN),
    "large": ("", "", ["-s", 100_000 * "好"], {}),
    "a pattern of curl": ("", "?x={a,b}[1-3]", [], {}),
    "an empty header": ("", "", ["-o", 'headers={"x-mine": ""}'], {}),
}
OURS = "post /|accept|api-key|authorization|content-type|cookie|user-agent|x-mine"


@pytest.mark.parametrize("name", DRY)
def test_dry_run_is_a_command_that_sends_the_very_request(cli, name):
    login, query, options, variables = DRY[name]
    key = {k: v for k, v in variables.items() if k == "OPENAI_API_KEY"}
    with serve(listed("first", "second")) as server:
        url = server.url.replace("//", f"//{login}") + query
        args = ["-u", url, *options, "it's $KEY `你好` \\ \nEND\n"]
        code, command, err = cli("--dry-run", *args, **key)
        assert (code, err, len(server.bodies)) == (0, "", 1)  # which models there are
        assert not any(secret in command for secret in (*variables.values(), "hush"))
        assert not re.search("(?m)^  -H .(connection|content-length|host):", command)
        assert cli(*args, **key)[0] == 0
        body = json.loads(server.bodies[-1])
        assert body["model"] == "first"
        if not shutil.which("curl"):
            pytest.skip("there is no curl here")
        env = os.environ | variables
        subprocess.run(["sh"], input=command.encode(), env=env, check=True)
        assert json.loads(server.bodies[-1]) == body
        sent, curled = (head.lower().split("\r\n") for head in server.heads[-2:])
    ours = [line.strip() for line in sent if re.match(OURS, line)]
    assert (len(ours) > 3, set(ours) - set(curled)) == (True, set())


# ---- The program's conversations in a file -------------------------------------------


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages, the first of them the user's."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture
def kept(tmp_path):
    """A file that is not there, where a conversation can be kept."""
    return tmp_path / "kept.json"


def beside(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir())


def test_a_conversation_goes_on_where_its_answer_was_cut_off(cli, kept):
    with serve(in_turn(http(*CUT), HI)) as server:
        args = to(server, "-c", str(kept))
        assert cli(*args, "-s", "brief", "a 你 story")[:2] == (3, "Hello\n")
        brief = [{"role": "system", "content": "brief"}]
        first = [*brief, *turns("a 你 story", "Hello")]
        assert json.loads(kept.read_bytes()) == first
        assert "你" in kept.read_text(encoding="utf-8")
        assert cli(*args, stdin=b"go on") == (0, "Hello\n", "")
        assert json.loads(server.bodies[-1])["messages"] == [*first, *turns("go on")]
        assert json.loads(kept.read_bytes()) == [*first, *turns("go on", "Hello")]
        assert cli(*args, "-s", "", "more")[0] == 0  # without a system message
        assert asked(server)[0] == ("user", "a 你 story")
    assert beside(kept) == ["kept.json"]


def test_half_a_character_in_a_conversation_is_kept_as_a_question_mark(cli, kept):
    kept.write_text(json.dumps(turns("a", "\ud83d")))
    with serve(HI) as server:
        assert cli(*to(server), "-c", str(kept), "hi") == (0, "Hello\n", "")
    assert json.loads(kept.read_bytes()) == turns("a", "?", "hi", "Hello")


THOUGHT_CALL = http(event(reasoning_details=[{"type": "x"}]), tool_call("{}"), *CALLED)
KEPT_MESSAGES = {  # the answer, and the message that is kept of it
    "thinking is not": (http(*THOUGHTFUL), assistant("Hello")),
    "a refusal is": (http(event(refusal="No."), *STOP), assistant("No.")),
    "at a limit": (
        http(*CUT, tool_call("{"), event(finish="length"), DONE),
        assistant("Hello"),
    ),
    "an error": (refused("no"), None),
    "nothing": (http(*STOP), None),
    "thinking alone": (http(event(reasoning="hm"), *STOP), None),
    "a call that is cut off": (http(tool_call("{")), None),
}


@pytest.mark.parametrize("how", ["", "--no-stream", "--json"])
@pytest.mark.parametrize("name", KEPT_MESSAGES)
def test_what_is_kept_of_an_answer(cli, kept, name, how):
    answer, message = KEPT_MESSAGES[name]
    with serve(answer) as server:
        cli(*to(server), "-c", str(kept), *how.split(), "hi")
    if message:
        assert json.loads(kept.read_bytes()) == [*turns("hi"), message]
    else:
        assert beside(kept) == []


def test_a_tool_call_is_kept_with_all_that_the_server_wants_back(cli, kept):
    with serve(in_turn(THOUGHT_CALL, HI)) as server:
        args = to(server, "-c", str(kept))
        cli(*args, "hi")
        assert kept.read_bytes().startswith(b"[\n {\n")  # to be read by people, too
        [_, message] = json.loads(kept.read_bytes())
        assert message["reasoning_details"] == [{"type": "x"}]
        assert message["tool_calls"][0]["function"]["name"] == "weather"
        cli(*args, "go on")
        assert json.loads(server.bodies[-1])["messages"][1] == message


def test_of_several_answers_the_first_is_kept(cli, kept):
    """Also if it calls a tool, and another does not."""
    called = event(tool_calls=[{"id": "a", "function": {"name": "f"}}])
    with serve(http(called, event("no", index=1), OTHER_STOPPED, *CALLED)) as server:
        assert cli(*to(server), "-c", str(kept), "-o", "n=2", "hi")[0] == 0
    assert json.loads(kept.read_bytes())[-1]["tool_calls"][0]["id"] == "a"


def test_the_file_of_a_conversation_keeps_its_mode_and_its_links(cli, kept):
    target = kept.with_name("target.json")
    target.write_bytes(b"")  # as mktemp makes it
    kept.symlink_to(target)
    with serve(HI) as server:
        for mode in (0o600, 0o664):
            target.chmod(mode)
            assert cli(*to(server), "-c", str(kept), "hi")[0] == 0
            assert target.stat().st_mode & 0o7777 == mode
    assert kept.is_symlink()
    assert len(json.loads(target.read_bytes())) == 4
    assert beside(kept) == ["kept.json", "target.json"]


ENDS_THAT_ARE_KEPT = {  # and what is said then
    "whole": (HI, ""),
    "cut off": (http(*CUT), "sse_chat: the answer was cut off: .*\n"),
    "at a limit": (FULL_ANSWER, FULL_NOTE),
}


@pytest.mark.parametrize("name", ENDS_THAT_ARE_KEPT)
def test_a_file_that_has_changed_is_not_overwritten(cli, kept, name):
    """The exit code is 1 then: no other turn can go on with this one."""
    answer, note = ENDS_THAT_ARE_KEPT[name]
    with serve(play(lambda _: kept.write_text("[] "), answer)) as server:
        code, out, err = cli(*to(server), "-c", str(kept), "hi")
    assert (code, out) == (1, "Hello\n")  # it is shown all the same
    changed = f"sse_chat: {kept} is not saved: it has changed\n"
    assert re.fullmatch(f"{changed}{note}", err)
    assert (kept.read_text(), beside(kept)) == ("[] ", ["kept.json"])


NOT_KEPT = "sse_chat: the question was not kept\n"
ENDS_WITHOUT_TEXT = {  # and what is said beside that
    "cut off": (http(event(reasoning="hm")), ".*cut off.*\n"),
    "a call": (http(tool_call("{")), ".*cut off.*\n"),
    "at a limit": (FULL_OF_THINKING, AT_LIMIT),
    "empty": (http(*STOP), f".*{IS_EMPTY}"),
}


@pytest.mark.parametrize("name", ENDS_WITHOUT_TEXT)
def test_a_question_without_an_answer_is_not_kept_and_that_is_said(cli, kept, name):
    answer, said = ENDS_WITHOUT_TEXT[name]
    with serve(answer) as server:
        args = to(server, "-c", str(kept), "--hide-reasoning", "hi")
        code, out, err = cli(*args)
    assert (code, out, beside(kept)) == (3, "", [])
    assert NOT_KEPT in err
    assert re.fullmatch(said, err.replace(NOT_KEPT, ""))


def test_a_file_that_another_program_writes_is_not_overwritten(cli, kept):
    lock = Path(f"{kept}.new")
    lock.touch()
    with serve(HI) as server:
        code, out, err = cli(*to(server), "-c", str(kept), "hi")
    assert (code, out) == (1, "Hello\n")
    assert re.fullmatch(f"sse_chat: {kept} is not saved: {lock} exists: .*\n", err)
    assert beside(kept) == [lock.name]


def test_of_two_programs_on_one_file_one_says_that_its_turn_is_lost(kept):
    both = threading.Barrier(2, timeout=PATIENCE)
    with serve(play(lambda _: both.wait(), HI)) as server:
        args = to(server, "-c", str(kept))
        with started(*args, "one") as one, started(*args, "two") as two:
            for program in (one, two):
                program.stdin.close()
            ends = [(each.stdout.read(), each.stderr.read()) for each in (one, two)]
            codes = [one.wait(PATIENCE), two.wait(PATIENCE)]
    assert sorted(codes) == [0, 1]
    assert [out for out, _ in ends] == [b"Hello\n"] * 2
    assert b"is not saved" in ends[codes.index(1)][1]
    winner = ("one", "two")[codes.index(0)]
    assert json.loads(kept.read_bytes()) == turns(winner, "Hello")
    assert beside(kept) == ["kept.json"]


def test_a_file_that_cannot_be_written_costs_no_answer(kept, monkeypatch):
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)  # its data could not be written, either
    kept.write_text("[]")
    wrap = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]
    with serve(HI) as server:
        code, out, err = run(*to(server), "-c", kept, "hi", wrap=wrap)
    assert (code, out) == (1, b"Hello\n")
    assert re.fullmatch(rf"sse_chat: {kept} is not saved: .*large\n", err.decode())
    assert (kept.read_text(), beside(kept)) == ("[]", ["kept.json"])


# What is no list of messages, or none that can be sent.
NO_CONVERSATION = {
    "null": "null",
    "an object": "{}",
    "a text": '""',
    "numbers": "[1]",
    "texts": '["role"]',
    "no role": "[{}]",
    "half a list": "[",
    "half a character": "[\ud800]",
    "NaN": '[{"role": "user", "content": NaN}]',
    "without end": '[{"role": "user", "content": 1e999}]',
    "too deep": "[" * 100_000 + "]" * 100_000,
}


@pytest.mark.parametrize("name", NO_CONVERSATION)
def test_a_file_that_is_no_conversation_is_left_alone(cli, kept, name):
    text = NO_CONVERSATION[name].encode(errors="surrogatepass")
    kept.write_bytes(text)
    with serve(HI) as server:
        code, out, err = cli(*to(server), "-c", str(kept), "hi")
        assert (code, out, server.bodies) == (1, "", [])
    assert re.fullmatch(f"sse_chat: {kept} is not .*\n", err)
    assert kept.read_bytes() == text


def test_ctrl_c_keeps_what_has_come(kept):
    handle = in_turn(play(chunked(*CUT, end=False), GONE), play(HEAD, GONE))
    with serve(handle) as server:
        for out, told in ((b"Hello\n", b""), (b"", b"the question was not kept\n")):
            begun = len(server.heads)
            with started(*to(server), "-c", kept, "hi") as process:
                process.stdin.close()
                while len(server.heads) == begun:
                    pause(0.01)
                assert not out or process.stdout.read(5) == b"Hello"
                until_it_waits(process)
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE) == 130
                assert process.stdout.read() == out[5:]
                assert process.stderr.read() == (told and b"sse_chat: " + told)
            assert json.loads(kept.read_bytes()) == turns("hi", "Hello")


def test_the_speed_is_that_between_the_first_and_the_last_token(cli):
    """And not the time before and after them, which is long here."""
    three = [event("x"), 0.03, event("x"), 0.03, event("x")]
    for tokens, wait in ((3, 0.24), (2, 0.24), (1, 0)):  # of one there is none
        steps = (wait, HEAD, *three, wait, using(7, tokens), *STOP)
        with serve(play(*steps)) as server:
            err = cli(*to(server), "--usage", "hi")[2]
        speed = re.search(r"([\d.]+) tokens/s\n\Z", err)
        intervals = tokens - 1
        assert not speed or 3.7 * intervals < float(speed[1]) < 20 * intervals
        assert bool(speed) == (intervals > 0)


# ---- Demo server ---------------------------------------------------------------------


def demo(**params: Any) -> tuple[Any, list[Any]]:
    """Ask a demo server; give the answer in one piece, and the tokens of a choice.

    What it streams is the same, in the form that a real server has.
    """
    ask, n = user("blue whales") | params, params.get("n", 1)
    with sse_chat.demo_server() as url, httpx.Client(verify=NO_TLS) as client:
        assert url.endswith("/v1")
        listed_models = client.get(f"{url}/models").json()
        url += "/chat/completions"
        answered = client.post(url, json=ask)
        assert answered.status_code == 200
        whole = answered.json()
        with client.stream("POST", url, json=ask | {"stream": True}) as response:
            *events, done = iter_sse(response.iter_raw())
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["transfer-encoding"] == "chunked"
    assert done.data == "[DONE]"
    chunks = [event.json() for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert whole["object"] == "chat.completion"
    assert {whole["model"], *(chunk["model"] for chunk in chunks)} == {"demo"}
    assert answered.headers["content-type"] == "application/json"
    models = {"object": "list", "data": [{"id": "demo", "object": "model"}]}
    assert listed_models == models
    tokens = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    called = [call for token in tokens for call in token.get("tool_calls", ())]
    assert all(type(call["index"]) is int for call in called)
    assert {*whole["usage"]} == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert min(whole["usage"].values()) > 0
    streamed = accumulate(map(ChatCompletionChunk.from_dict, chunks))
    made = [streamed.choices, ChatCompletion.from_dict(whole).choices]
    made = [without([choice.to_dict() for choice in each], "id") for each in made]
    assert made[0] == made[1]  # but for the ids of calls
    assert [choice["index"] for choice in whole["choices"]] == [*range(n)]
    if params.get("stream_options") == {"include_usage": True}:
        usage = chunks.pop()
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert not any("usage" in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks)
    first, *tokens, _ = (choice for choice in choices if choice["index"] == 0)
    assert (first["delta"]["role"], first["finish_reason"]) == ("assistant", None)
    assert whole["usage"]["completion_tokens"] == n * len(tokens)
    assert whole["usage"]["total_tokens"] > n * len(tokens)
    return whole, [token["delta"] for token in tokens]


def schema(**kinds: Any) -> dict[str, Any]:
    """What an object has to have, and may have."""
    properties = {n: k if type(k) is dict else {"type": k} for n, k in kinds.items()}
    properties |= {"optional": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": [*kinds]}


SIMPLE = {"city": "string", "day": "integer", "rain": "boolean", "tags": "array"}
SIMPLE |= {"cost": "number"}
SCHEMA = schema(**SIMPLE, unit={"enum": ["C", "F"]}, near=schema(km="number"))
FITS = {"city": "demo", "day": 1, "rain": True, "tags": []}
FITS |= {"cost": 1, "unit": None, "near": None}  # of simple types alone
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "description": "the time"}}
ECHOED = "You wrote: blue whales\n\nNo model .*"
DEMO = {  # what is asked for, and what is answered
    "nothing": ({}, ECHOED),
    "no usage": ({"stream_options": {"include_usage": False}}, ECHOED),
    "usage of three": ({"stream_options": {"include_usage": True}, "n": 3}, ECHOED),
    "stop": ({"stop": "whales"}, "You wrote: blue "),
    "stops": ({"stop": ["model", "whales", "nowhere"]}, "You wrote: blue "),
    "tools if need be": ({"tools": [WEATHER], "tool_choice": "auto"}, ECHOED),
    "no tool": ({"tools": [WEATHER], "tool_choice": "none"}, ECHOED),
}


@pytest.mark.parametrize(("params", "text"), DEMO.values(), ids=DEMO)
def test_demo_server_answers(params, text):
    whole, tokens = demo(**params)
    for choice in whole["choices"]:
        assert re.fullmatch(text, choice["message"]["content"], re.DOTALL)
        assert choice["finish_reason"] == "stop"
    # Token by token, and all of the reasoning first.
    assert all(token["content"] or token.get("reasoning") for token in tokens)
    thinking = [bool(token.get("reasoning")) for token in tokens]
    assert thinking == sorted(thinking, reverse=True)
    assert 3 < sum(thinking) < len(thinking) - 3 or "stop" in params


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_demo_server_stops_at_the_token_limit(name):
    _, tokens = demo()
    for limit in (1, len(tokens) - 2, len(tokens)):
        whole, some = demo(**{name: limit})
        assert some == tokens[:limit]
        finish = "stop" if some == tokens else "length"
        assert whole["choices"][0]["finish_reason"] == finish


def test_demo_server_calls_a_tool_that_must_be_called():
    for tools, name, fits in (([WEATHER, NOW], "weather", FITS), ([NOW], "now", {})):
        whole, tokens = demo(tools=tools, tool_choice="required")
        [choice] = whole["choices"]
        pieces = [piece for token in tokens for piece in token["tool_calls"]]
        assert {piece["index"] for piece in pieces} == {0}
        [call] = choice["message"]["tool_calls"]
        assert (bool(call["id"]), call["type"]) == (True, "function")
        assert call["function"] == {"name": name, "arguments": json.dumps(fits)}
        assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("tool", [WEATHER, NOW], ids=["weather", "now"])
def test_demo_server_calls_the_tool_that_is_named(tool):
    name = tool["function"]["name"]
    named = {"type": "function", "function": {"name": name}}
    [choice] = demo(tools=[WEATHER, NOW], tool_choice=named)[0]["choices"]
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["name"] == name


RIGHT = "Bearer sk-right"
CHAT = "/chat/completions"
ASK = '{"messages": [{"role": "user", "content": "hi"}], %s}'
BAD = {
    "no JSON": "{",
    "a list": "[]",
    "no messages": "{}",
    "empty messages": '{"messages": []}',
    "a text for a message": '{"messages": ["hi"]}',
    "many answers": ASK % '"n": "many"',
    "no tool": ASK % '"tool_choice": "required"',
}
KEYS_REFUSED = {"no": "", "a wrong": "Bearer sk-wrong", "a longer": f"{RIGHT}-and-more"}
# The path, what is posted there, the key; the status.
REFUSALS = {name: (CHAT, body, RIGHT, 400) for name, body in BAD.items()}
REFUSALS["another path"] = ("/nothing", "{}", RIGHT, 404)
REFUSALS["another path to get"] = ("/nothing", "", RIGHT, 404)
for name, key in KEYS_REFUSED.items():
    REFUSALS[f"{name} key to ask"] = (CHAT, ASK % '"n": 1', key, 401)
    REFUSALS[f"{name} key for models"] = ("/models", "", key, 401)


@pytest.fixture(scope="module")
def url_with_key():
    """A demo server that wants a key, for many requests."""
    with sse_chat.demo_server(api_key="sk-right") as url:
        yield url


@pytest.mark.parametrize("row", REFUSALS.values(), ids=REFUSALS)
def test_demo_server_refuses_as_openai_does(url_with_key, row):
    path, body, key, status = row
    options = {"content": body, "headers": {"Authorization": key} if key else {}}
    options["verify"] = NO_TLS
    method = "POST" if body else "GET"
    response = httpx.request(method, url_with_key + path, **options)
    error = response.json()["error"]
    assert response.status_code == status
    assert (bool(error["message"]), error["type"]) == (True, "invalid_request_error")


def test_demo_server_takes_its_key_and_ends_with_its_context():
    with serve(http(MODELS)) as server:
        sse_chat.models(base_url=server.url)  # the thread that times all reads stays
    before = set(threading.enumerate())
    with httpx.Client(verify=NO_TLS) as client:
        options = {"api_key": "sk-right", "client": client}
        with sse_chat.demo_server(delay=0.01, api_key="sk-right") as url:
            unread = sse_chat.stream_chat("hi", base_url=url, **options)
            assert next(unread)
            assert sse_chat.models(base_url=url, **options) == ["demo"]
            threads = set(threading.enumerate()) - before
        assert len(threads) >= 2
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert list(unread)  # what was under way has come to its end
        with pytest.raises(httpx.ConnectError):  # no connection was kept
            client.get(url)


# ---- The program at a terminal -------------------------------------------------------

ON_IT = 'exec "$@" <$0 >$0 2>$0'


class Terminal:
    """A program on a pseudo-terminal, as a person has it."""

    def __init__(self, process: Any, master: int) -> None:
        self.process = process
        self.master = master
        self.output = b""
        self.at = 0  # where the next `expect` begins to look
        self.deadline = time.monotonic() + 2 * PATIENCE  # before that of the test

    def read(self) -> bool:
        """Take what is shown; tell whether there may be more."""
        assert time.monotonic() < self.deadline, self.output[self.at :]
        alive = self.process.poll() is None
        ready, _, _ = select.select([self.master], [], [], 0.01)
        self.output += os.read(self.master, 65536) if ready else b""
        return bool(ready) or alive

    def expect(self, text: str) -> str:
        """Wait until `text` is shown; give what was shown before it."""
        while (end := self.output.find(text.encode(), self.at)) < 0:
            assert self.read(), f"no {text!r} in {self.output[self.at :]!r}"
        before, self.at = self.output[self.at : end], end + len(text.encode())
        return before.decode()

    def send(self, text: str) -> None:
        if text < " ":
            until_it_waits(self.process)
        os.write(self.master, text.encode())

    def say(self, text: str, prompt: str = ">>> ") -> str:
        """Type a line; give what is shown from its end to the next prompt."""
        self.send(text + "\r")
        self.expect("\r\n")
        return self.expect(prompt)

    def end(self) -> tuple[int, str]:
        """Wait for the end; give the exit code and all that the terminal showed."""
        while self.read():
            pass
        return self.process.returncode, self.output.decode()


@contextlib.contextmanager
def at_terminal(*args: str, script: str = ON_IT, **env: str) -> Iterator[Terminal]:
    """The program on a terminal of its own; `script` starts it, $0 is the tty."""
    master, slave = os.openpty()
    # The shell leads a session: the terminal that it opens is its own, with Ctrl-C.
    options = {"wrap": ["sh", "-c", script, os.ttyname(slave)], "INPUTRC": os.devnull}
    with started(*args, **options, **{"TERM": "dumb"} | env) as process:
        yield Terminal(process, master)
    os.close(master)
    os.close(slave)


def screen(output: str) -> str:
    """What is on the screen, without colours and dots that left no trace."""
    return re.sub(r"\.\.\.\r   \r|\x1b\[\d+m|\r(?=\n)", "", output)


EVIL = "a\x1b[31mred\x1b]0;t\x07 \x00\x08\x7f\x9b2J\r\u202eback\u2066\u200f\tb\nc"
TAME = r"a\x1b[31mred\x1b]0;t\x07 \x00\x08\x7f\x9b2J\r\u202eback\u2066\u200f" + "\tb\nc"


def test_control_characters_reach_a_pipe_but_no_terminal():
    with serve(http(event(reasoning=EVIL), event(EVIL), *STOP)) as server:
        args = to(server, "hi")
        with at_terminal(*args, NO_COLOR="1") as tty:
            code, shown = tty.end()
        assert (code, screen(shown)) == (0, f"{TAME}\n{TAME}\n")
        with at_terminal(*args, script='exec "$@" <$0 2>$0') as tty:
            assert tty.process.stdout.read().decode() == EVIL + "\n"
            assert screen(tty.end()[1]) == TAME + "\n"
        evil = EVIL.encode() + b"\n"
        assert run(*args) == (0, evil, evil)


def test_thinking_between_its_words_does_not_cut_an_answer_in_a_pipe():
    answer = http(event("Hel"), event(reasoning="hm"), event("lo"), *STOP)
    script = 'exec "$@" <$0 2>$0'
    with serve(answer) as server, at_terminal(*to(server, "hi"), script=script) as tty:
        assert tty.process.stdout.read() == b"Hello\n"
        assert screen(tty.end()[1]) == "hm\n"


def test_whatever_a_server_sends_is_tame_at_a_terminal():
    def shown_of(answer, option):
        with serve(answer) as server, at_terminal(*to(server), option, "hi") as tty:
            return screen(tty.end()[1])

    answers = (
        (refused(EVIL), "--usage"),
        (listed(EVIL), "--list-models"),
        (json_response(PIECE | {"model": EVIL}), "--usage"),
    )
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for shown in pool.map(shown_of, *zip(*answers, strict=True)):
            assert TAME[:8] in shown
            assert not set("\x1b\x07\x00\x08\x7f\x9b\u202e") & set(shown)


def test_line_ends_of_any_kind_end_lines():
    answer = http(event("a\r\nb"), *STOP)
    with serve(answer) as server, at_terminal(*to(server), "hi") as tty:
        assert screen(tty.end()[1]) == "a\nb\n"


def test_a_dry_run_wants_a_prompt():
    with at_terminal("-m", "m", "-u", NOBODY, "--dry-run") as tty:
        assert tty.end() == (2, "sse_chat: --dry-run wants a prompt\r\n")


def test_a_prompt_is_typed_where_standard_input_is_asked_for():
    with serve(HI) as server, at_terminal(*to(server), "-") as tty:
        tty.send("typed\r\x04")
        assert screen(tty.end()[1]) == "typed\nHello\n"
        assert asked(server) == [("user", "typed")]


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=as_words)
def test_reasoning_is_dim_and_the_dots_leave_no_trace(env):
    waited = threading.Event()
    handle = play(lambda connection: waited.wait(PATIENCE), chunked(*THOUGHTFUL))
    with serve(handle) as server, at_terminal(*to(server), "hi", **env) as tty:
        tty.expect("...\r")
        waited.set()
        code, shown = tty.end()
    assert (code, screen(shown)) == (0, "Let me see.and think\nHello\n")
    dim = re.findall(r"\x1b\[2m([^\x1b]*)\x1b\[2?[02]?m", shown)
    assert "".join(dim) == ("" if env else "Let me see.and think")
    assert not env or "\x1b" not in shown


def test_text_thinking_and_notes_have_lines_of_their_own():
    with serve(in_turn(BETWEEN, FULL_ANSWER)) as server:
        for shown in ("Hel\nsee.\nlo\n", f"Hello\n{FULL_NOTE}"):
            with at_terminal(*to(server), "hi") as tty:
                assert screen(tty.end()[1]) == shown


TOLD_RETRY = r"sse_chat: asking again in 0\.\d s \(retry 1 of 2\): .*Busy.*\n"


def test_a_retry_is_told_at_a_terminal_and_nowhere_else():
    head = {"status": "503 Busy", "headers": "Retry-After: 0.1\r\n"}
    busy = http(b"Busy", kind="text/plain", **head)
    with serve(in_turn(busy, HI, busy, HI)) as server:
        with at_terminal(*to(server), "hi") as tty:
            code, shown = tty.end()
        assert code == 0
        assert re.fullmatch(f"{TOLD_RETRY}Hello\n", screen(shown))
        assert run(*to(server), "hi") == (0, b"Hello\n", b"")


def test_a_pasted_text_is_one_question():
    with serve(HI) as server, at_terminal(*to(server), TERM="xterm") as tty:
        assert "\x1b[?2004h" in tty.expect(">>> ")  # else a terminal marks no pastes
        code = '"""Module."""\nimport os\nWhat is this?'
        quotes = '"""doc"""\nx = """y"""'
        texts = ("one\ntwo\n\nthree", "/etc: a path\nand more\n", code, quotes)
        for text in (*texts, "    def f():\n        return 1"):
            tty.send(f"\x1b[200~{text}\x1b[201~")
            tty.say("")
            assert asked(server)[-1] == ("user", text.rstrip())
        tty.say('"""typed"""')
        assert asked(server)[-1] == ("user", "typed")
        tty.say('"""typed on\rtwo lines"""')
        assert asked(server)[-1] == ("user", "typed on\ntwo lines")
        assert len(server.bodies) == 7


def test_ctrl_c_before_the_first_token_says_that_the_question_was_not_kept():
    handle = in_turn(play(HEAD, event(reasoning="hm"), GONE), HI)
    with serve(handle) as server, at_terminal(*to(server), NO_COLOR="1") as tty:
        tty.expect(">>> ")
        tty.send("one\r")
        tty.expect("hm")
        tty.send("\x03")
        assert "sse_chat: the question was not kept\r\n" in tty.expect(">>> ")
        assert screen(tty.say("two")) == "Hello\n"
        assert asked(server) == [("user", "two")]


def test_a_conversation_goes_on_with_its_file(kept):
    kept.write_text(json.dumps(turns("before", "Hello")))
    with serve(HI) as server, at_terminal(*to(server), "-c", str(kept)) as tty:
        tty.expect(">>> ")
        tty.say("one")
        assert json.loads(kept.read_text()) == turns("before", "Hello", "one", "Hello")
        tty.say("/clear")
        assert json.loads(kept.read_text()) == []
        tty.say("/system brief")
        tty.say("two")
        kept.write_text("[]")
        told = tty.say("three")
        assert re.search(
            f"Hello\r\nsse_chat: {kept} is not saved: it has changed", told
        )
        assert asked(server)[0] == ("system", "brief")
        assert kept.read_text() == "[]"


@pytest.mark.parametrize("leave", ["/exit", "/quit"])  # others have /bye and Ctrl-D
def test_a_conversation_is_left(leave):
    with at_terminal("-m", "m", "-u", NOBODY) as tty:
        tty.expect(">>> ")
        assert "/clear" in tty.say("/help")
        tty.send(f"{leave}\r")
        code, shown = tty.end()
    assert (code, "Traceback" in shown) == (0, False)


def test_ctrl_c_stops_an_answer_and_never_the_conversation():
    hello = chunked(*THOUGHTFUL)
    begun = play(chunked(event("Parti"), event("al"), end=False), GONE)
    handle = in_turn(hello, begun, hello)
    with serve(handle) as server, at_terminal(*to(server)) as tty:
        tty.expect(">>> ")
        assert "Hello" in tty.say("one 你好")
        assert server.left.acquire(timeout=PATIENCE)
        tty.send("two\r")
        tty.expect("Partial")
        tty.send("\x03")
        assert server.left.acquire(timeout=PATIENCE)  # it stopped the server, too
        assert "/bye" not in tty.expect(">>> ")
        for unfinished in ("", "", "begun"):
            tty.send(unfinished)
            tty.expect(unfinished)
            tty.send("\x03")
            assert "/bye or Ctrl-D" in tty.expect(">>> ")
        tty.say('"""begun', "... ")
        tty.send("\x03")  # and here all of the lines
        tty.expect(">>> ")
        tty.say("three")
        tty.send("\x04")  # Ctrl-D
        code, shown = tty.end()
        first, second, third = (asked(server, number) for number in range(3))
    assert (code, "Traceback" in shown) == (0, False)
    assert first == [("user", "one 你好")]
    assert second == [*first, ("assistant", "Hello"), ("user", "two")]
    assert third == [*second, ("assistant", "Partial"), ("user", "three")]


def test_conversation_goes_on_after_errors():
    at_once = "Retry-After: 0\r\n"
    broken = [http(status="500 Oh", headers=at_once)] * 3  # it is tried three times
    handle = in_turn(refused("no such \x1bthing"), *broken, http(*CUT), HI)
    with serve(handle) as server, at_terminal(*to(server)) as tty:
        tty.expect(">>> ")
        assert r"no such \x1bthing" in tty.say("one")
        assert "500" in tty.say("two")
        assert re.search(r"\bHello\r\n.+", tty.say("three"))  # why, too
        assert screen(tty.say("four")) == "Hello\n"
        tty.send("/bye\r")
        assert tty.end()[0] == 0
        assert [text for _, text in asked(server)] == ["three", "Hello", "four"]


def test_commands_of_a_conversation(kept):
    wrong = {"OPENAI_BASE_URL": "ftp://x"}
    both = listed("fir\x07st", "second")
    with serve(both) as server, at_terminal("-u", server.url, **wrong) as tty:
        begin = tty.expect(">>> ")
        assert "asking fir\\x07st\r\n" in begin
        assert "/? for help" in begin
        assert "/clear" in tty.say("/?")
        tty.say('"""/first', "... ")
        tty.say("", "... ")
        assert "Hello" in tty.say('second"""')
        for line, answer in (
            ("/system be long", "set"),
            ("/model", "fir\\x07st\r\nsecond"),
            ("/model big", "big"),
            (f"/file {kept}", f"{kept} holds 3 messages"),
            ("more", "Hello"),
            (f"/file {kept}.2", f"{kept}.2 holds 5 messages"),
            ("/clear", "forgotten"),
            ("fresh", "Hello"),
            (f"/file {kept}", f"{kept} holds 5 messages"),
            ("again", "Hello"),
            ("/foo bar", "sse_chat: /foo is not a command"),
            ("/clear", "forgotten"),
            ("/system", "no system message"),
            ('plain """q"""', "Hello"),
            ("\x10", "Hello"),  # Ctrl-P: the one before
        ):
            assert answer in tty.say(line)
        posted = [number for number, body in enumerate(server.bodies) if body]
        turns = [asked(server, number) for number in posted]
        models = [json.loads(server.bodies[number])["model"] for number in posted]
    long, multi = ("system", "be long"), ("user", "/first\n\nsecond")
    hello, plain = ("assistant", "Hello"), ("user", 'plain """q"""')
    more = [long, multi, hello, ("user", "more")]
    assert turns[0] == [multi]
    assert turns[1] == more
    assert turns[2] == [long, ("user", "fresh")]
    assert turns[3] == [*more, hello, ("user", "again")]
    assert turns[4:] == [[plain], [plain, hello, plain]]
    assert models == ["fir\x07st"] + ["big"] * 5
    assert len(json.loads(kept.read_text())) == 4  # what was asked last
    assert len(json.loads(Path(f"{kept}.2").read_text())) == 3


@pytest.fixture
def fifo(tmp_path):
    """No regular file, and no device: a mistake would replace that of the machine."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_only_a_regular_file_keeps_a_conversation(cli, fifo):
    with serve(HI) as server:
        code, out, err = cli(*to(server), "-c", str(fifo), "hi")
    assert (code, out) == (1, "")
    assert f"{fifo} is not a regular file" in err
    assert fifo.is_fifo()


def test_files_that_fail_change_nothing(kept, tmp_path, fifo):
    kept.write_text("old")
    with serve(HI) as server, at_terminal(*to(server)) as tty:
        tty.expect(">>> ")
        tty.say("one")
        for name in ("", tmp_path, kept, tmp_path / "no" / "kept.json", fifo):
            told = tty.say(f"/file {name}")
            assert re.fullmatch(rf"sse_chat: {name or '/file'} \w.*\r\n", told)
        tty.say("two")
        assert asked(server) == [
            ("user", "one"),
            ("assistant", "Hello"),
            ("user", "two"),
        ]
    assert (kept.read_text(), beside(kept)) == ("old", ["fifo", "kept.json"])
    assert fifo.is_fifo()


def test_a_file_may_be_named_from_the_home_directory(kept):
    with serve(HI) as server, at_terminal(*to(server), HOME=str(kept.parent)) as tty:
        tty.expect(">>> ")
        tty.say("one")
        tty.say("/file ~/kept.json")
        assert json.loads(kept.read_text()) == turns("one", "Hello")


def test_a_terminal_that_cannot_be_read_ends_the_conversation():
    # In the background, where reading is an error unless a signal stops who tries.
    script = """exec <$0; ulimit -t 9; trap "" TTIN; set -m; "$@" & wait $!"""
    with at_terminal("-m", "m", "-u", NOBODY, script=script) as tty:
        assert tty.process.stderr.read() == b"sse_chat: [Errno 5] Input/output error\n"
        assert tty.process.wait(PATIENCE) == 1


# ---- The README, types for everybody, pydantic, FastAPI and Dask ---------------------

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_help_tells_what_each_option_takes_and_does(cli):
    _, _, options = cli("--help", COLUMNS="99")[1].rpartition("\noptions:\n")
    options = re.split(r"\n(?=  -)", options.partition("\n\n")[0])
    rows = [re.fullmatch(r"(?s).*(--[\w-]+) ?(\S*)\s{2,}\w.*", row) for row in options]
    assert all(rows)
    assert '\n  sse_chat -c s.json "a story"; [' in cli("--help")[1]  # the examples
    takes = {row[1]: row[2] for row in rows if row[2]}
    assert takes == {
        "--conversation": "FILE",
        "--model": "MODEL",
        "--system": "TEXT",
        "--base-url": "URL",
        "--option": "KEY=VALUE",
        "--timeout": "TIMEOUT",
    }


def test_readme_and_help_tell_the_same_exit_codes(cli):
    helped = re.search(r"exit codes: (.*?)\n\n", cli("--help")[1], re.DOTALL)[1]
    in_help = dict(re.findall(r"(\d+) ([^;]+)", " ".join(helped.split())))
    told = README[README.index("The exit code is") :].partition("Only `")[0]
    in_readme = dict(re.findall(r"\*\*(\d+)\*\* ([^*]+)", " ".join(told.split())))
    del in_help["141"]  # which only a pipe sees
    assert in_help.keys() == in_readme.keys()
    for code, words in in_help.items():
        words = set(re.findall(r"[\w-]+", words))
        assert words <= set(re.findall(r"[\w-]+", in_readme[code]))


def snippets(language: str, word: str = "") -> list[str]:
    """Return the README's code in a language, with a word in it."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    return [block for block in blocks if word in block]


def snippet(word: str, **instead: str) -> str:
    """Return the one piece of Python with this word, some text replaced in it."""
    [code] = snippets("python", word)
    for old, new in instead.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    return code


def perform(code: str, **names: Any) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"} | names)


# The README's own fixture `base_url`, and its test, which run here with the others
exec(
    snippet("@pytest.fixture", **{"import httpx": f"import {httpx.__name__} as httpx"})
)


@pytest.fixture
def demo_url(monkeypatch, base_url):
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    return base_url


@pytest.fixture
def serve_readme(monkeypatch, tmp_path):
    """A server for code of the README, which runs in an empty folder."""
    monkeypatch.chdir(tmp_path)

    @contextlib.contextmanager
    def serving(handle):
        with serve(handle) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            yield server

    return serving


def shell(*command: Any, cwd: Path) -> str:
    """Run a command, which must succeed; give its output."""
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_shows_what_a_cut_answer_prints(serve_readme, capsys):
    with serve_readme(http(event("The sky is"), event(" blue because"))):
        perform(snippets("python")[0])
    assert [capsys.readouterr().out] == snippets("text")


BLUE = r"You wrote: Why is the sky blue\?(.*)You wrote: And the sea\?(.*)"
DEMO_ANSWERS = {  # what the demo server makes of the questions, by a word of the code
    "Semaphore": BLUE,
    "tool_choice": r"You wrote: rain in demo(.*)",
    "Timer": r"You wrote: Why\?(.*)",
}


@pytest.mark.parametrize(("word", "out"), DEMO_ANSWERS.items(), ids=DEMO_ANSWERS)
def test_readme_snippet_prints_the_answers(word, out, demo_url, capsys):
    perform(snippet(word))
    answers = re.fullmatch(out, capsys.readouterr().out, re.DOTALL)
    assert answers and all("`ollama serve`." in rest for rest in answers.groups())


@pytest.mark.parametrize(
    ("word", "limit", "steps", "error"),
    [
        ("Semaphore", "timeout(60", (HEAD, HEL, GONE), TimeoutError),
        ("Timer", "Timer(60", (HEAD, HEL, GONE), Truncated),
        ("Timer", "first_token_timeout=60", (GONE,), Timeout),
    ],
    ids=["async", "sync", "sync, before the headers"],
)
def test_readme_deadline_ends_an_answer(word, limit, steps, error, serve_readme):
    with serve_readme(play(*steps)) as server:
        with pytest.raises(error):
            perform(snippet(word, **{limit: limit.replace("60", "0.3")}))
        assert server.left.acquire(timeout=20)


def test_readme_client_of_ones_own(serve_readme, monkeypatch, tmp_path, capsys):
    shutil.copy(needs("certifi").where(), tmp_path / "my-ca.pem")
    keys = iter(["k1", "k2"])
    answer = http(JSON, headers="X-Request-Id: r1\r\n", kind="application/json")
    with serve_readme(answer) as proxy:
        origin = proxy.url.removesuffix("/v1")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://model.example/v1")
        code = snippet("FreshKey", **{"http://proxy.example:3128": origin})
        for _ in "12":
            perform(code, fetch_key=lambda: next(keys))
        assert capsys.readouterr().out == "Hello r1\n" * 2
        for head, key in zip(proxy.heads, ["k1", "k2"], strict=True):
            assert head.startswith("POST http://model.example/v1/chat/completions ")
            assert f"Authorization: Bearer {key}\r\n" in head


RELAYED = {
    "a whole answer": (GOOD, 200, ["Hel", "lo", "done"]),
    "a cut answer": (chunked(*BEGUN, end=False), 200, ["Hel", "lo", "error"]),
    "lines of Windows": (http(event("a\r\nb"), *STOP), 200, ["a\r\nb", "done"]),
    "an answer of JSON": (http(JSON, kind="application/json"), 200, ["Hello", "done"]),
    "a status": (refuse(401), 401, ["boom"]),
    "an error in place of chunks": (http(FAILED), 502, [CANARY]),
}


@pytest.mark.parametrize(
    ("answer", "status", "seen"), RELAYED.values(), ids=RELAYED.keys()
)
def test_readme_relay_tells_the_browser(answer, status, seen, serve_readme):
    needs("fastapi")
    exec(snippet("FastAPI"), names := {})
    with serve_readme(answer), client_of(names["app"]) as client:
        response = client.get("/chat", params={"question": "hi"})
    assert response.status_code == status
    if status == 200:
        events = iter_sse([response.content])
        told = [e.json() if e.event == "message" else e.event for e in events]
        assert told == seen
    else:
        assert [response.json()["error"]] == seen


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_readme_json_of_an_image(finish, serve_readme, tmp_path, capsys):
    needs("jiter")
    (tmp_path / "photo.png").write_bytes(b"PNG")
    parts = map(event, ["\n", '{"ci', 'ty": "Pa', 'ris"}'])
    with serve_readme(http(*parts, event(finish=finish), DONE)) as server:
        perform(snippet("jiter"))
    asked = json.loads(server.bodies[0])
    image = asked["messages"][0]["content"][1]["image_url"]["url"]
    assert image == f"data:image/png;base64,{base64.b64encode(b'PNG').decode()}"
    assert asked["response_format"]["type"] == "json_schema"
    *parts, last = capsys.readouterr().out.splitlines()
    whole = "{'city': 'Paris'}"
    assert [*parts, last][:3] == ["{}", "{'city': 'Pa'}", whole]
    assert (last == "city: Paris") == (finish == "stop")


@pytest.mark.parametrize(
    ("tokens", "is_cut"), [(4096, True), (25_000, False)], ids=["cut", "whole"]
)
def test_readme_notices_that_a_prompt_was_cut(tokens, is_cut, serve_readme, tmp_path):
    (tmp_path / "report.txt").write_text("word " * 20_000)
    usage = {
        "prompt_tokens": tokens,
        "completion_tokens": 1,
        "total_tokens": tokens + 1,
    }
    answer = json.dumps(WHOLE | {"usage": usage}).encode()
    with serve_readme(http(answer, kind="application/json")):
        raised = pytest.raises(ValueError, match="4096 tokens")
        with raised if is_cut else contextlib.nullcontext():
            perform(snippet("report.txt"))


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "cut"])
def test_readme_responses_api(is_complete, serve_readme, capsys):
    names = ["response.output_text.delta"] * 2 + ["response.completed"] * is_complete
    parts = [ServerSentEvent(name, '{"delta": "hm"}').encode() for name in names]
    with serve_readme(http(*parts)) as server:
        code = snippet("connect_sse", **{"http://localhost:11434/v1": server.url})
        raised = pytest.raises(RuntimeError, match="not complete")
        with contextlib.nullcontext() if is_complete else raised:
            perform(code)
    assert capsys.readouterr().out == "hmhm"
    assert json.loads(server.bodies[0])["stream"] is True


def test_readme_listens_to_a_server_that_cuts_is_away_and_comes_back(
    serve_readme, monkeypatch, tmp_path, capsys
):
    """The program is started twice, and goes on where it was."""
    one = b"retry: 50\n\n", b"id: 1\ndata: a\n\n", b"id: 2\ndata: b\n\n"
    first = play(chunked(*one, b"id: 9\ndata: lost", end=False))
    gone = refuse(204, body=b"")
    c = chunked(b"retry: 50\n\n", b"data: c\n\n")
    then = in_turn(c, refuse(503), chunked(b"id: 3\n\n"), gone)
    create = socket.create_server

    def come_back():
        assert server.left.acquire(timeout=20)
        server.__exit__()
        pause(0.1)  # connections are refused
        with monkeypatch.context() as patch:
            patch.setattr(socket, "create_server", lambda _, **o: create(address, **o))
            return serve(then)

    with serve_readme(first) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        address = server.socket.getsockname()
        later = pool.submit(come_back)
        origin = server.url.removesuffix("/v1")
        code = snippet("listen", **{"http://localhost:8000": origin})
        perform(code)
        with later.result(timeout=20) as again:
            assert capsys.readouterr().out == "message a\nmessage b\nmessage c\n"
            ids = [re.findall("(?i)last-event-id: (.*)\r", h) for h in again.heads]
            assert ids == [["2"], ["2"], ["2"], ["3"]]
            again.heads.clear()
            perform(code)
            assert "last-event-id: 2\r" in again.heads[0].lower()


def test_readme_shell(tmp_path, demo_url):
    if not all(map(shutil.which, ("bash", "git", "jq"))):
        pytest.skip("bash, git or jq is not installed")
    bash = functools.partial(shell, "bash", "-euo", "pipefail", "-c", cwd=tmp_path)
    shutil.copy(sse_chat.__file__, tmp_path)
    (tmp_path / "question.txt").write_text("Why is the sea blue?")
    bash("git init -q; git add -N .")
    diff, to_file, text, colour = map(bash, readme_commands()[:4])
    assert "You wrote: diff --git" in diff
    assert to_file == ""
    assert "the sea blue?" in (tmp_path / "answer.txt").read_text()
    assert text.startswith("You wrote: hi\n\nNo model")
    assert colour.rstrip() == "YOU WROTE: NAME A COLOUR:"


def readme_commands() -> list[str]:
    """Return the lines of shell that use the program, with this Python in them."""
    [block] = snippets("sh", "question.txt")
    python = f'python() {{ "{sys.executable}" "$@"; }}; '
    return [python + line for line in block.splitlines()]


def test_readme_shell_goes_on_with_a_cut_answer(serve_readme, tmp_path):
    shutil.copy(sse_chat.__file__, tmp_path)
    with serve_readme(in_turn(http(*BEGUN), GOOD)) as server:
        command = readme_commands()[4].replace("sse_chat.py", "sse_chat.py -m m")
        assert shell("bash", "-c", command, cwd=tmp_path) == "Hello\nHello\n"
    questions = [
        {"role": "user", "content": text} for text in ("a long story", "go on")
    ]
    talk = json.loads((tmp_path / "story.json").read_text())
    assert talk == [questions[0], MESSAGE, questions[1], MESSAGE]
    assert json.loads(server.bodies[1])["messages"] == talk[:3]


@pytest.mark.parametrize("diff", snippets("diff"), ids=["openai", "httpx-sse"])
def test_readme_coming_from(diff, demo_url):
    needs("httpx_sse")
    needs("openai")
    messages = [{"role": "user", "content": "blue whales"}]
    answers = []
    for other in "+-":  # the lines before, and those after
        lines = [line[1:] for line in diff.splitlines() if line[:1] != other]
        exec("\n".join(lines), names := {"URL": demo_url + "/chat/completions"})
        texts = names["answer"](messages)
        if inspect.isasyncgen(texts):
            texts = asyncio.run(list_of(texts))
        answers.append("".join(texts))
    assert "blue whales" in answers[0]
    assert answers[0] == answers[1]


async def list_of(items: AsyncIterator[str]) -> list[str]:
    return [item async for item in items]


def test_readme_fixture(base_url):
    assert sse_chat.models(base_url=base_url) == ["demo"]


def test_the_demo_shows_its_tokens_one_after_the_other(cli):
    began = time.monotonic()
    assert cli("--demo", "-o", "max_tokens=9", "hi")[1]
    assert 9 * 0.02 <= time.monotonic() - began < 9 * 0.5


def test_the_demo_server_is_gone_at_once():
    took, others = [], {*threading.enumerate()}
    for _ in range(3):
        with sse_chat.demo_server():
            began = time.monotonic()
            assert all(thread.daemon for thread in {*threading.enumerate()} - others)
        took.append(time.monotonic() - began)
    assert min(took) < 0.3


def test_the_demo_server_waits_before_each_token():
    with sse_chat.demo_server(delay=0.05) as url:
        began = time.monotonic()
        stream = sse_chat.stream_chat("a b", base_url=url, max_tokens=5)
        tokens = [chunk for chunk in stream if chunk.text or chunk.reasoning]
        assert len(tokens) == 5
        assert time.monotonic() - began >= 5 * 0.05


def table_under(heading: str) -> list[str]:
    """Return the lines of the table in a section of the README, without its rule."""
    [table] = re.findall(rf"(?ms)^## {heading}\n.*?(^\|.*?)\n\n", README)
    head, _, *rows = table.splitlines()
    return [head, *rows]


def test_readme_takes_its_figures_from_the_benchmark():
    page = ROOT / "bench/endings.md"
    if not page.exists():
        pytest.skip("there are no results of the benchmarks here")
    results = page.read_text(encoding="utf-8").splitlines()
    assert set(table_under("Who notices a broken answer")) <= set(results)


NAMED = set(re.findall(r"`(?:await )?(\w+)`", README))
PUBLIC_VALUES = [getattr(sse_chat, name) for name in sse_chat.__all__]


def test_readme_names_all_that_is_public():
    assert set(sse_chat.__all__) <= NAMED


def test_readme_names_no_class_or_constant_that_there_is_not():
    there_are = {"Choice", "NOT_GIVEN", "None", "OLLAMA_CONTEXT_LENGTH"}
    there_are |= {
        *sse_chat.__all__,
        "OPENAI_MODEL",
        "OPENAI_BASE_URL",
        "OPENAI_API_KEY",
    }
    assert {name for name in NAMED if not name.islower()} - there_are == set()


def test_readme_names_no_attribute_that_there_is_not():
    named = set(re.findall(r"`\.(\w+)", "\n".join(table_under("All names"))))
    assert len(named) > 10
    there_are = {*dir(ChatCompletion()), *(n for p in PUBLIC_VALUES for n in dir(p))}
    assert named - there_are == set()


def test_each_row_of_the_table_of_endings_has_a_section_here():
    source = Path(__file__).read_text(encoding="utf-8")
    comments = " ".join(re.findall(r"(?m)^# (?:---- |     )(.*)$", source))
    for row in table_under("How an answer can end")[1:]:
        _, ending, *_ = re.split(r" *\| *", row)
        assert ending in comments


def test_the_file_as_a_script_needs_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    source = Path(__file__).with_name("sse_chat.py").read_text(encoding="utf-8")
    [head] = re.findall(r"(?ms)^# /// script\n(.*?)^# ///$", source)
    script = tomllib.loads(re.sub("(?m)^# ", "", head))
    for name in ("requires-python", "dependencies"):
        assert script[name] == project["project"][name]


@pytest.mark.install
def test_first_command_of_the_readme(tmp_path):
    shutil.copy(sse_chat.__file__, tmp_path)
    [command] = snippets("sh", "--demo")
    assert "Hello, who are you?" in shell("bash", "-c", command, cwd=tmp_path)


MORE_TYPES = """
from collections.abc import Mapping
from sse_chat import APIError, ChatClient, ChatCompletionMessage, generate

talk: list[Mapping[str, Any] | ChatCompletionMessage] = [*messages]
with ChatClient(model="demo") as client:
    try:
        streamed = client.stream(talk, temperature=0, stop=["."])
        for chunk in streamed:
            for choice in chunk.choices:
                print(choice.index, choice.delta.content or "", chunk.reasoning)
        talk.append(streamed.completion.choices[0].message)
        usage, response = client.generate(talk).usage, streamed.response
        print(usage.total_tokens if usage else 0, response and response.status_code)
        generate(talk, base_url="http://127.0.0.1:9", max_retries=0)
    except APIError as error:
        print(error.status_code, error.message, error.completion.text)
"""
TYPED = map(
    snippet,
    ("except TruncatedStreamError", "Semaphore", "tool_choice", "Timer"),
)
TYPED_PROGRAM = "\n".join(["# pyright: strict", *TYPED, MORE_TYPES])
# A line, and what both checkers say of it
WRONG = {
    'stream_chat("hi", modle="x")\n': '"modle"',
    'client.stream("hi", model=3)\n': 'type.*"str',
    'generate("hi", modle="x")\n': '"modle"',
}


@pytest.mark.install
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_what_pip_installs(how, tmp_path, demo_url):
    here = functools.partial(shell, cwd=tmp_path)
    here(sys.executable, "-m", "venv", "venv")
    python = tmp_path / "venv/bin/python"
    pip = functools.partial(here, python, "-m", "pip", "install", "-q")
    pip("build", "mypy", "pyright", "twine")
    if how == "wheel":  # of the sdist
        here(python, "-m", "build", "-o", tmp_path, ROOT)
        packages = *tmp_path.glob("*.whl"), *tmp_path.glob("*.tar.gz")
        assert len(packages) == 2
        here(python, "-m", "twine", "check", "--strict", *packages)
        pip(*tmp_path.glob("*.whl"))
    else:
        pip("-e", ROOT)
    here("venv/bin/sse-chat", "--version")
    here(python, "-m", "sse_chat", "hi")
    at = here(python, "-c", "import sse_chat; print(sse_chat.__file__)")
    assert at.startswith(str(tmp_path if how == "wheel" else ROOT))

    (tmp_path / "good.py").write_text(TYPED_PROGRAM)
    (tmp_path / "bad.py").write_text(TYPED_PROGRAM + "".join(WRONG))
    (tmp_path / "listens.py").write_text(f"# pyright: strict\n{snippet('listen')}")
    here(python, "good.py")
    mypy = "venv/bin/mypy", "--strict"
    pyright = "venv/bin/pyright", "--pythonpath", python
    for checker in (mypy, pyright):
        here(*checker, "good.py", "listens.py")
        done = subprocess.run([*checker, "bad.py"], cwd=tmp_path, capture_output=True)
        errors = re.findall(r"(?m)bad.py:(\d+):.*error: (.*)", done.stdout.decode())
        first = TYPED_PROGRAM.count("\n") + 1
        assert {int(line) - first for line, _ in errors} == {*range(len(WRONG))}
        for line, words in errors:
            assert re.search([*WRONG.values()][int(line) - first], words)


def test_pydantic_knows_the_types():
    pydantic = needs("pydantic")
    adapter = pydantic.TypeAdapter(ChatCompletion)
    schema = adapter.json_schema()
    assert {"id", "choices", "created", "model", "usage"} <= set(schema["properties"])
    assert schema["properties"]["choices"]["type"] == "array"
    answer = ChatCompletion.from_dict(WHOLE | {"usage": USAGE})
    assert adapter.validate_json(adapter.dump_json(answer)) == answer
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python(answer.to_dict() | {"choices": 3})


@contextlib.contextmanager
def client_of(app: Any) -> Iterator[httpx.Client]:
    """Serve an app over HTTP; give a client of it."""
    uvicorn = needs("uvicorn")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pool.submit(server.run, [listener])
        try:
            with httpx.Client(base_url=url) as client:
                yield client
        finally:
            server.should_exit = True


def test_fastapi_gives_an_answer_and_relays_a_stream_until_its_client_leaves():
    fastapi = needs("fastapi")
    app = fastapi.FastAPI()
    kept = []

    @app.get("/answer", response_model=ChatCompletion)
    async def answer():
        return await sse_chat.agenerate("hi", base_url=upstream.url)

    @app.get("/stream")
    async def relay():
        async def events() -> AsyncIterator[bytes]:
            async with sse_chat.astream_chat("hi", base_url=upstream.url) as stream:
                kept.append(stream)
                async for chunk in stream:
                    yield ServerSentEvent(data=json.dumps(chunk.raw)).encode()

        kind = "text/event-stream"
        return fastapi.responses.StreamingResponse(events(), media_type=kind)

    silent = play(chunked(event("one "), event("two "), end=False), GONE)
    handle = in_turn(http(JSON, kind="application/json"), silent)
    with serve(handle) as upstream, client_of(app) as client:
        whole = client.get("/answer").json()
        assert ChatCompletion.from_dict(whole).text == "Hello"
        assert "/schemas/ChatCompletion" in client.get("/openapi.json").text
        assert upstream.left.acquire(timeout=20)
        with connect_sse(client, "GET", "/stream") as source:
            events = source.iter_sse()
            chunks = [ChatCompletionChunk.from_dict(next(events).json()) for _ in "12"]
            assert [chunk.text for chunk in chunks] == ["one ", "two "]
            assert not upstream.left.acquire(timeout=0.1)
        assert upstream.left.acquire(timeout=20)


@pytest.mark.filterwarnings("ignore")  # of Dask's own
def test_dask_maps_generate_over_processes(demo_url):
    """Options, answers and errors are pickled on their way."""
    dask = needs("distributed")
    prompts = [f"What is {number} + {number}?" for number in range(20)]
    ask = functools.partial(sse_chat.generate, model="demo", base_url=demo_url)
    processes = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with dask.LocalCluster(**processes) as cluster, dask.Client(cluster) as client:
        answers = client.gather(client.map(ask, prompts))
        assert [answer.text for answer in answers] == [ask(p).text for p in prompts]
        error = client.submit(ask, "hi", n="many").exception()
        assert (type(error), error.status_code) == (Status, 400)


def test_the_ids_of_tests_are_words_of_a_line(request):
    ids = [item.name.partition("[")[2] for item in request.session.items]
    assert [id for id in ids if len(id) > 71 or "\\" in id] == []


# The collector of garbage need not look through all that this file has made and kept,
# nor as often: what a test keeps, it holds itself.
gc.collect()
gc.freeze()
gc.set_threshold(50_000)
