"""What sse_chat promises, as tests: events, types, endings, errors, the terminal.

`pytest -m live` runs those that want a live server, whose base URL is in
SSE_CHAT_LIVE_URL, `pytest -m install` those that install the project as users do.
HYPOTHESIS_PROFILE=ci looks longer for counterexamples.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import typing
import zlib
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import anyio
import anyio.from_thread
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

import sse_chat
from sse_chat import (
    APIError,
    ChatAccumulator,
    ChatCompletion,
    ChatCompletionChunk,
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


def needs(name: str) -> Any:
    """Import what only the extra test-all installs, or skip the test."""
    return pytest.importorskip(name, reason=f"{name}: pip install -e '.[test-all]'")


def examples(factor):
    """As many examples as the profile has, times this."""
    return settings(max_examples=max(1, int(settings().max_examples * factor)))


settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

pytestmark = [
    pytest.mark.anyio,
    # trio says so of each that is not read to its end, httpx's own too
    pytest.mark.filterwarnings("ignore:Async generator:ResourceWarning"),
]

# ------------------------------------------------------------------------------------
# A server on a raw loopback socket: what it sends is what a test says, byte for byte
# ------------------------------------------------------------------------------------


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
                self.connections += 1
                threading.Thread(target=self.run, args=[new], daemon=True).start()

    def run(self, connection):
        with contextlib.suppress(OSError), connection, self.wrap(connection) as wrapped:
            reader = wrapped.makefile("rb")
            lines = iter(reader.readline, None)
            while head := b"".join(itertools.takewhile(bytes.strip, lines)):
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                body = reader.read(int(length[1]) if length else 0)
                with self.lock:
                    self.heads.append(head.decode())
                    self.bodies.append(body)
                    number = len(self.heads)
                if self.handle(wrapped, number) != KEEP:
                    break
        self.left.release()

    def __exit__(self, *exception):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # ends the accept that waits on it
        self.socket.close()


serve = Server
KEEP = "keep the connection"
GONE = "wait until the client has gone"
pause = time.sleep  # where a test counts waits, that of the module is another


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


def http(*parts, status="200 OK", headers="", kind="text/event-stream"):
    """A response whose body ends as its Content-Length says."""
    length = sum(map(len, parts))
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    return (head + headers + "\r\n").encode() + b"".join(parts)


def chunked(*parts, end=True, headers="", kind="text/event-stream"):
    """A chunked response, one chunk for each part; without its end it is cut off."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{headers}"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part)
    end = b"0\r\n\r\n" if end else b""
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + body + end


def sse(payload):
    """An event with this JSON, in raw UTF-8 as far as that can be."""
    text = f"data: {json.dumps(payload, ensure_ascii=False)}\n\n"
    return text.encode("utf-8", "backslashreplace")


def event(content=None, finish=None, index=0, **delta):
    """One chat chunk as a server sends it."""
    delta |= {} if content is None else {"content": content}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return sse(head | {"choices": [choice]})


DONE = b"data: [DONE]\n\n"
HELLO = (event("Hel", role="assistant"), event("lo"), event(finish="stop"), DONE)


# ------------------------------------------------------------------------------------
# Server-sent events against the standard, and the names of httpx-sse
# ------------------------------------------------------------------------------------


def as_event(data, event="message", id="", retry=None):
    return ServerSentEvent(event, data, id, retry)


UTF8_BOM = "\ufeff".encode()


def by_the_standard(stream, limit=10**9):
    """Lines, events, last event ID, reconnection time: slow, as the standard says it.

    And if more bytes than the limit stand between two blank lines: what came before.
    """
    events = []
    data = event_type = last_event_id = id_buffer = ""
    reconnection_time = retry_of_block = None
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
                events.append(as_event(data, kind, last_event_id, retry_of_block))
            data, event_type, retry_of_block = "", "", None
        elif field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            id_buffer = value
        elif field == "retry" and re.fullmatch("[0-9]{1,4300}", value):
            reconnection_time = retry_of_block = int(value)
    # What follows the last has no end: "any pending data must be discarded".
    size += len(pending) + 1 if pending else 0
    lines = [line.decode("utf-8", "replace") for line in lines]
    return lines, events, last_event_id, reconnection_time, size > limit


# What a stream is made of: fields, whole events as most are, ends of lines, values
PARTS = [b"data: "] * 6 + [b"data:", b"data", b"event: ", b"event", b"id: ", b"id"]
PARTS += [b"retry: ", b": ", b" data: ", b"error: ", UTF8_BOM + b"data: "]
PARTS += [b"data: x\n\n"] * 6 + [b"data: x\r\n\r\n", b"data: x\r\r"] * 2
PARTS += [b"\n"] * 12 + [b"\n\n", b"\r\n", b"\r\n", b"\r", b"\r"] * 2
TEXTS = ["x", "a: b", " ", "\0", "12", "007", "-5", "+5", "1_0", "５²", "ä", "🙂"]
TEXTS += ["\ufeff", "\u2028", "\x85", "\v\f\x1c", "\\u00e4", "\\ud83d\\ude42"]
PARTS += [text.encode() for text in TEXTS]
PARTS += [b"\xff", b"\xf0\x9f", b"\x99\x82", b"\xed\xa0\xbd", b"\xc0\x80", b"\xef"]
START = st.sampled_from([b"", b"", b"", UTF8_BOM, UTF8_BOM, UTF8_BOM * 2])
BLOCKS = st.lists(st.sampled_from(PARTS), max_size=25).map(b"".join)
STREAMS = st.tuples(START, BLOCKS).map(b"".join)
SEQUENCE = re.compile(rb"\r\n|[\xc0-\xff][\x80-\xbf]+|\\u[0-9a-f]{4}(\\u[0-9a-f]{4})?")
EACH_RULE = UTF8_BOM + b"data:  x: y \n\ndata\r\rdata\rdata\r\n\ndata: x\n\r"
EACH_RULE += b"Data: x\n data: x\ndata : x\n:data: x\n\n\xef\xbb\xbfdata: x\n\n"
EACH_RULE += "data:\ufeffx\ndata: \v\f\x1c\x85\u2028\n\nevent: e\n\ndata\n\n".encode()
EACH_RULE += b"event: e\nevent:  f\ndata\n\nevent: e\nevent:\ndata: x\n\n"
EACH_RULE += b"id: 1\n\ndata\n\nid: \0\ndata\n\nid\ndata\n\nid:  2\n"
EACH_RULE += "retry: 09\ndata\n\nretry: +5\nretry: ５\nretry: \ndata\n\n".encode()
EACH_RULE += b"retry: %b\ndata: \xff\xf0\x9f\x98\xe4\n\ndata: no event" % (b"9" * 5000)


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


async def as_async(items):
    for item in items:
        yield item


@examples(6)
@given(cuttings(STREAMS), st.integers(3, 30) | st.just(10**9))
@example([EACH_RULE], 9999)
@example(cut(EACH_RULE, range(999)), 9999)
@example([b"\n", b"data: x\ry\n\n", b"\nda", b"data: z\n\n"], 99)
@example([b"", b"data: x\n\n", UTF8_BOM + b"data: y\n\n"], 99)
@example([b"data: x\n\n", b"data: 1234\r\ndata: 1", b"23\r\n\r\n", b"", b"\n"], 19)
@example([b"data: x\n\n", b"data: 12\n\n", b"data: x\n\n"], 7)
def test_any_bytes_cut_anywhere_are_what_the_standard_says(pieces, limit):
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


async def test_async_twins():
    pieces = cut(EACH_RULE, [99])
    lines, events, *_ = by_the_standard(EACH_RULE)
    assert list(sse_chat.iter_lines(pieces)) == lines
    assert [line async for line in sse_chat.aiter_lines(as_async(pieces))] == lines
    assert [event async for event in sse_chat.aiter_sse(as_async(pieces))] == events
    limited = sse_chat.aiter_sse(as_async([b"data: x\n\ndata: 12\n\n"]), 7)
    assert await anext(limited) == as_event("x")
    with pytest.raises(SSEError):
        await anext(limited)


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1)
TEXT = st.lists(WORD | st.just("")).map("\n".join)
RETRY = st.none() | st.integers(0, 10**12)
MIB = 2**20
LARGEST = b"data: " + bytes(16 * MIB - 6)
# A stream of so many KiB; the MiB for bytes, text, lines of one event, and not of two
LARGE = {
    "one line": (lambda kib: [b"data: ", *[b"x" * 1024] * kib, b"\n\n"], 51),
    "many lines": (lambda kib: [*[b"data: " + b"x" * 1017 + b"\n"] * kib, b"\n"], 51),
    "many events": (lambda kib: [(b"data: " + b"x" * 248 + b"\n\n") * 4] * kib, 0.4),
}


def test_an_event_is_a_frozen_value_and_json():
    event = ServerSentEvent()
    assert repr(event) == "ServerSentEvent(event='message', data='', id='', retry=None)"
    assert {event, as_event(""), as_event("x")} == {event, as_event("x")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.data = "x"
    assert as_event('{"a": "\\u00e4"}').json() == {"a": "ä"}
    with pytest.raises(ValueError):
        as_event("[DONE]").json()


@given(st.builds(ServerSentEvent, WORD, TEXT, WORD | st.just(""), RETRY))
def test_an_encoded_event_decodes_to_itself(event):
    assert list(iter_sse([b": ping\n\n" + event.encode()])) == [event]


def test_encode_writes_what_says_something_and_refuses_what_would_not_come_back():
    assert as_event("").encode() == b"data: \n\n"
    assert as_event("ä\n\nb").encode() == "data: ä\ndata: \ndata: b\n\n".encode()
    whole = b"id: 1\nevent: e\nretry: 0\ndata: x\n\n"
    assert as_event("x", "e", "1", 0).encode() == whole
    refused = [{"event": name} for name in ("", "e\n", "e\r", "\ud83d")]
    refused += [{"id": id} for id in ("i\n", "i\r", "i\0", "\ud83d")]
    for values in (*refused, {"data": "x\r"}, {"data": "\ud83d"}, {"retry": -1}):
        with pytest.raises(ValueError):
            ServerSentEvent(**values).encode()


def test_the_limit():
    """It is 16 MiB unless said otherwise; what came before is given; lines have it."""
    assert len(list(iter_sse([LARGEST, b"\n\n"]))) == 1
    assert len(list(iter_sse([LARGEST, b"\0\n\n"], None))) == 1
    events = iter_sse([b"data: x\n\n" + LARGEST + b"\0"])
    assert next(events) == as_event("x")
    with pytest.raises(SSEError):
        next(events)
    decoder = SSEDecoder(20)
    assert decoder.decode("data: 12345678901") is None
    for line in ("äx", ""):
        with pytest.raises(SSEError, match="20 bytes: '12345678901'"):
            decoder.decode(line)


@pytest.mark.parametrize(("stream", "most"), LARGE.values(), ids=LARGE)
def test_time_is_linear_and_memory_that_of_one_event(stream, most):
    """Eight times the bytes take eight times as long; 32 on a noisy machine; not 64."""

    def seconds(pieces):
        start = time.thread_time()
        assert not any(event.id for event in iter_sse(pieces, None))
        return time.thread_time() - start

    few, many, pieces = map(stream, (8 * 1024, 64 * 1024, 16 * 1024))
    assert min(seconds(many) / seconds(few) for _ in range(3)) < 32
    tracemalloc.start()
    seconds(pieces)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < most * MIB


NEWS = [b"id: 1\nretry: 9\ndata: 1\n\n", "id: 2\nevent: e\ndata: \u2028\n\n".encode()]
NEWS_EVENTS = [as_event("1", "message", "1", 9), as_event("\u2028", "e", "2")]
NEWS.append(b"id: 3\nretry: 300\n\n")  # no data, no event
MINE = {"Accept": "text/plain", "X-Mine": "1", "cache-control": "max-age=1"}


async def events_of(connect, url, **options):
    """The source of a stream; each event, and the last event id when it was given."""
    if connect is connect_sse:
        with (
            httpx.Client(trust_env=False) as client,
            connect(client, "POST", url, **options) as source,
        ):
            return source, [(e, source.last_event_id) for e in source.iter_sse()]
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        connect(client, "POST", url, **options) as source,
    ):
        return source, [(e, source.last_event_id) async for e in source.aiter_sse()]


@pytest.mark.parametrize("connect", [connect_sse, sse_chat.aconnect_sse])
@pytest.mark.parametrize("make", [dict, dict.items, httpx.Headers, lambda mine: None])
async def test_programs_of_httpx_sse(make, connect):
    """The last event id is that of what was given: who connects again loses nothing."""
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
async def test_what_an_event_source_refuses(connect):
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


# ------------------------------------------------------------------------------------
# Chat types
# ------------------------------------------------------------------------------------

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
MAX_RETRY_AFTER MAX_CHOICES MAX_DEPTH MODELS_TIMEOUT Json Messages"""


def test_public_names_and_their_annotations():
    imported = {}
    exec("from sse_chat import *", imported)
    assert imported.keys() - {"__builtins__"} == {*PUBLIC, *CONSTANTS.split()}
    for value in PUBLIC.values():
        for _, member in [("", value), *inspect.getmembers(value)]:
            member = getattr(member, "fget", member)  # of a property
            if inspect.isclass(member) or hasattr(member, "__globals__"):
                typing.get_type_hints(member)


@pytest.mark.parametrize("model", CHAT_TYPES, ids=lambda model: model.__qualname__)
def test_what_was_not_sent_is_none_or_empty(model):
    hints = typing.get_type_hints(model)
    is_chunk = model is ChatCompletionChunk
    known = SET_DEFAULTS | ({"object": "chat.completion.chunk"} if is_chunk else {})
    for name, hint in hints.items():
        none = NoneType in typing.get_args(hint)
        empty = None if none else (typing.get_origin(hint) or hint)()
        assert getattr(model(), name) == (None if none else known.get(name, empty))
    nulls = dict.fromkeys(hints.keys() - {"extra", "raw"})
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
    "annotations": st.just([{"type": "url_citation", "url_citation": CITATION}]),
    "audio": st.just({"id": "a", "data": "", "expires_at": 1, "transcript": "t"}),
    # What is no field of ours; Gemini refuses the next turn without its own.
    "extra": st.just({"google": {"signature": "c2ln", "more": [{"a": 1}, {"b": []}]}}),
    "raw": st.just({"ms": 1}),
}
BY_NAME = {name: sent.map(copy.deepcopy) for name, sent in BY_NAME.items()}
NOTHING = st.nothing()


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
    hints = typing.get_type_hints(hint)
    fields = {name: sent_for(kind, wrong, name) for name, kind in hints.items()}
    if "raw" in fields:
        fields |= {"object": st.just(hint().object), "timings": fields.pop("raw")}
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
def test_a_type_holds_what_was_sent(answer):
    model, sent = answer
    made = model.from_dict(sent)
    assert made.raw is sent
    assert made.to_dict() == without(sent, "timings")
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


@given(sent_as(ANSWER_TYPES))
def test_openais_types_hold_and_print_the_same(answer):
    model, sent = answer[0], without(answer[1], "extra", "timings")
    theirs = getattr(needs("openai.types.chat"), model.__name__).model_validate(sent)
    ours = model.from_dict(sent)
    assert repr(ours) == as_openai_has_it(ours, theirs)


def test_what_is_printed_and_compared():
    assert repr(sse_chat.ChoiceDelta.from_dict({"reasoning": "r", "x": 1})) == (
        "ChoiceDelta(content=None, function_call=None, refusal=None, role=None, "
        "tool_calls=None, reasoning_content='r', extra={'x': 1})"
    )
    one, two, three = map(ChatCompletionChunk.from_dict, ({}, {"x": 1}, {"id": "1"}))
    assert one == two != three and repr(one) == repr(two) and one.raw != two.raw


OTHER_NAMES = {"reasoning", "text", "thinking", "finishReason"}
FIELD_NAMES = OTHER_NAMES.union(*(t.__dataclass_fields__ for t in CHAT_TYPES))
SCALARS = st.sampled_from([None, True, -1, 1023, 1024, 2**64, 0.5, "", "a", "\ud83d"])
KEYS = st.sampled_from(sorted(FIELD_NAMES))
ANY_JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4)
)


@examples(3)
@given(sent_as(CHAT_TYPES, wrong=ANY_JSON))
def test_from_dict_takes_any_object(answer):
    model, sent = answer
    before = copy.deepcopy(sent)
    made = model.from_dict(sent)
    assert model.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert isinstance(repr(made), str)
    if model in ANSWER_TYPES:
        assert isinstance(made.text, str) and isinstance(made.reasoning, str)
    if model is ChatCompletion:
        (made.text + made.reasoning).encode()
    assert sent == before


@given(sent_for(ChatCompletionChunk.Choice, wrong=ANY_JSON))
def test_a_chunk_is_refused_for_its_indices_alone(choice):
    chunk = ChatCompletionChunk.from_dict({"choices": [choice]})
    calls = [choice.delta.tool_calls or [] for choice in chunk.choices]
    indices = {item.index or 0 for item in itertools.chain(chunk.choices, *calls)}
    known = indices <= {*range(1024)}
    with contextlib.nullcontext() if known else pytest.raises(ValueError):
        completion = accumulate([chunk, chunk])
        (completion.text + completion.reasoning).encode()


CONTENTS = [
    ({"content": None, "reasoning_content": None}, "", ""),
    ({"content": 5, "reasoning": {}}, "", ""),
    ({"reasoning_content": "r", "reasoning": "other"}, "", "r"),
    ({"reasoning_content": "", "reasoning": "r"}, "", "r"),
    ({"reasoning_content": "r", "reasoning": None}, "", "r"),
    ({"content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]}, "abc", ""),
    ({"content": [{"type": "thinking", "thinking": [{"text": "r"}, {}, 1]}]}, "", "r"),
    ({"content": [{"thinking": "r"}, None, {"text": None}, 5]}, "", "r"),
    ({"content": {"text": "a"}, "reasoning": "r"}, "a", "r"),
]
# A choice, and its index and finish_reason: without an index it has its place
CHOICES = [
    ({"index": None, "finish_reason": "stop"}, (0, "stop")),
    ({"index": True, "finish_reason": ""}, (1, None)),
    ({"index": 7, "finishReason": ""}, (7, None)),
    ({"index": 0, "finish_reason": 1}, (0, None)),
    ({"finishReason": "STOP"}, (4, "STOP")),
    ({"finish_reason": None, "finishReason": "STOP"}, (5, "STOP")),
    ({"finish_reason": "stop", "finishReason": "STOP"}, (6, "stop")),
]


@pytest.mark.parametrize(("said", "text", "reasoning"), CONTENTS)
@pytest.mark.parametrize("name", ["delta", "message"])
def test_text_and_reasoning(name, said, text, reasoning):
    """Where servers put them; and some send a `message` where a `delta` is due."""
    whole = ChatCompletion.from_dict({"choices": [{"message": said}]})
    chunk = ChatCompletionChunk.from_dict({"choices": [{name: said}]})
    for made in (chunk, whole, accumulate([chunk])):
        assert (made.text, made.reasoning) == (text, reasoning)
    assert chunk.choices[0].delta.extra is whole.choices[0].message.extra is None


@pytest.mark.parametrize("kind", ANSWER_TYPES)
def test_choices(kind):
    """The text of an answer is that of its first choice, the one whose index is 0."""
    sent, read = zip(*CHOICES, strict=True)
    sent = [c | {"message": {"content": f"{n}"}} for n, c in enumerate(sent)]
    made = kind.from_dict({"choices": [sent[0], "no choice", *sent[1:]]})
    assert [(c.index, c.finish_reason) for c in made.choices] == [*read]
    assert made.text == "03"
    assert kind.from_dict({"choices": [sent[2]]}).text == kind().text == ""


def test_an_object_of_arguments_becomes_json():
    call = {"index": 0, "function": {"name": "f", "arguments": {"a": [1]}}}
    for kind in (sse_chat.ChoiceDelta, sse_chat.ChatCompletionMessage):
        made = kind.from_dict({"tool_calls": [call]})
        assert made.tool_calls[0].function.arguments == '{"a": [1]}'


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_the_same_and_goes_on_alone(copied):
    chunk = chunk_of({"content": "a", "tool_calls": [{"function": {}, "x": 1}]})
    values = [error("m", {"a": 1}, 400, "t", "p") for error in ERROR_TYPES]
    values += [as_event("d", "e", "i", 5), SSEError("m", [as_event("x")])]
    for value in (*values, chunk, accumulate([chunk])):
        other = copied(value)
        assert (type(other), str(other)) == (type(value), str(value))
        assert vars(other) == vars(value)
    decoder, accumulator = SSEDecoder(), ChatAccumulator()
    decoder.feed(b"id: 1\ndata: x\ndata: ")
    accumulator.add(chunk)
    others = copied(decoder), copied(accumulator)
    decoder.feed(b"z\n\n")
    accumulator.add(chunk)
    assert others[0].feed(b"y\n\n") == [as_event("x\ny", id="1")]
    assert others[1].completion == accumulate([chunk])


# ------------------------------------------------------------------------------------
# Accumulating
# ------------------------------------------------------------------------------------

ENDED_BADLY = """error abort aborted cancelled canceled failed network_error
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
        return shuffled(queues, by)
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


@given(streams())
def test_chunks_accumulate_to_the_whole_answer(stream):
    """What is taken on the way shares nothing that can change with what comes later."""
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


# Each chunk's pieces of calls, joined by +, as index|id|name|arguments; then the calls
TOOL_CALLS = {
    "by index in any order": ("1|b|g|2 0|a|f|1 1|||2", "a|f|1 b|g|22"),
    "by index and not by place": ("1|b|g|2+0|a|f|1 0|||3+1|||4", "a|f|13 b|g|24"),
    "id and name are set once": ("0|a|f|1 0|a|g|2 0|||3", "a|f|123"),
    "id and name may come late": ("0|||1 0|a||2 0||f|", "a|f|12"),
    "another id is another call": ("0|a|f|1 0|b|g|2 0|||3", "a|f|1 b|g|23"),
    "without index by place": ("|a|f|1+|b|g|2 |||3+|||4", "a|f|13 b|g|24"),
    "without id and index by place": ("||f|1+||g|2 |||3+|||4", "|f|13 |g|24"),
    "a new id opens a call": ("|a|f|1 |b|g|2 |||3", "a|f|1 b|g|23"),
    "a known id continues it": ("|a|f|1 |b|g|2 |a||3", "a|f|13 b|g|2"),
    "an index then none": ("0|a|f|1 1|b|g|2 |||3 |b||4", "a|f|13 b|g|24"),
}


@pytest.mark.parametrize(("chunks", "calls"), TOOL_CALLS.values(), ids=TOOL_CALLS)
@pytest.mark.parametrize("unset", ["", None], ids=["empty", "missing"])
def test_tool_calls(chunks, calls, unset):
    def piece(text):
        index, *rest = text.split("|")
        id, name, arguments = (part or unset for part in rest)
        function = {"name": name, "arguments": arguments}
        return {"index": int(index) if index else None, "id": id, "function": function}

    deltas = [{"tool_calls": [*map(piece, c.split("+"))]} for c in chunks.split(" ")]
    made = accumulate(map(chunk_of, deltas)).choices[0].message.tool_calls
    texts = [f"{c.id}|{c.function.name}|{c.function.arguments}" for c in made]
    assert " ".join(texts) == calls
    assert {call.type for call in made} == {"function"}


def test_what_is_unknown_is_merged():
    """Dicts and lists grow, of the rest the latest stays, and null changes nothing."""
    extras = [{"a": 1, "b": {"c": [1]}}, {"a": 2, "b": {"c": [2]}}, {"a": None}]
    deltas = [extra | {"tool_calls": [{"index": 0} | extra]} for extra in extras]
    sent = [{"choices": [{"delta": delta}]} | delta for delta in deltas]
    completion = accumulate(map(ChatCompletionChunk.from_dict, sent))
    message, merged = completion.choices[0].message, {"a": 2, "b": {"c": [1, 2]}}
    assert message.extra == message.tool_calls[0].extra == merged
    assert {name: completion.raw[name] for name in "ab"} == merged


def test_of_head_and_endings_the_first_counts_and_of_usage_the_latest():
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


def test_a_choice_that_failed_has_no_finish_reason():
    for word in ENDED_BADLY.split():
        for reason, shown in ((word, None), (word.upper(), None), (f"{word}s",) * 2):
            made = accumulate([chunk_of({}, finish_reason=reason)])
            assert made.choices[0].finish_reason == shown


def levels(number):
    return functools.reduce(lambda inner, _: [inner], range(number - 1), 1)


SAME_INDEX = [{"index": 0, "id": str(number)} for number in range(1025)]
# How many there may be, and a chunk of so many
NO_MORE_THAN = [
    (1023, lambda n: {"choices": [{"index": n}]}),
    (1023, lambda n: {"choices": [{"delta": {"tool_calls": [{"index": n}]}}]}),
    (0, lambda n: {"choices": [{"index": -n}]}),
    (0, lambda n: {"choices": [{"delta": {"tool_calls": [{"index": -n}]}}]}),
    (1024, lambda n: {"choices": [{}] * n}),
    (1024, lambda n: {"choices": [{"delta": {"tool_calls": [{}] * n}}]}),
    (1024, lambda n: {"choices": [{"delta": {"tool_calls": SAME_INDEX[:n]}}]}),
    (100, lambda n: {"choices": [{"delta": {"x": levels(n)}}]}),
    (99, lambda n: {"choices": [{"delta": {"x": {"b": levels(n)}}}]}),
    (100, lambda n: {"choices": [{"delta": {"tool_calls": [{"x": levels(n)}]}}]}),
    (98, lambda n: {"choices": [{"logprobs": {"content": [{"bytes": levels(n)}]}}]}),
    (99, lambda n: {"usage": {"x": levels(n)}}),
    *((100, lambda n, k=k: {k: levels(n)}) for k in ["id", "model", "created", "x"]),
]


@pytest.mark.parametrize(("most", "sent"), NO_MORE_THAN)
def test_what_no_answer_has_is_refused(most, sent):
    accumulator = ChatAccumulator()
    for chunk in ({"choices": [{"delta": {"x": {"a": 1}}}]}, sent(most)):
        accumulator.add(ChatCompletionChunk.from_dict(chunk))
    with pytest.raises(ValueError):
        accumulator.add(ChatCompletionChunk.from_dict(sent(most + 1)))


def test_the_completion_may_be_taken_at_any_time():
    """Half a character is U+FFFD until the rest has come, and for good without it."""
    accumulator = ChatAccumulator()
    assert accumulator.completion == ChatCompletion() == accumulate([])
    taken = []
    for text in ("a", "\ud83d", "\ude42", "b\ude42"):
        call = {"index": 0, "function": {"arguments": text}}
        said = dict.fromkeys(["content", "reasoning", "refusal"], text)
        accumulator.add(chunk_of(said | {"tool_calls": [call]}))
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
    found = re.fullmatch(r"\s*<think>(.*?)(</think>\n*(.*))?", text, re.DOTALL)
    return (found[1], found[3] or "") if found else ("", text)


TAGS = st.sampled_from(["<think>", "</think>", "<", "thi", "nk>", "/", "A", " ", "\n"])


@examples(3)
@given(cuttings(st.lists(TAGS).map("".join)), st.sampled_from(["", " \n<think>"]))
@example(["<THINK> <think>a"], "")
@example(["<think></ </</think>b", "\n<thi"], "")
@example(["<think>a</thi"], "")
def test_thinking_is_the_same_however_cut(pieces, begin):
    whole = by_the_rule(begin + "".join(pieces))
    assert thought_and_said([*begin, *pieces]) == whole


def test_only_what_may_begin_a_tag_is_held_back():
    texts = iter(["<think>a", "b <", "c </thi", "x</think>", "d <", "e"])
    parts = sse_chat.split_thinking(texts)
    thought = [(True, "a"), (True, "b "), (True, "<c "), (True, "</thix")]
    assert [next(parts) for _ in range(5)] == [*thought, (False, "d <")]
    assert next(texts) == "e"


# ------------------------------------------------------------------------------------
# Asking: one test for sync code, asyncio, uvloop and trio
# ------------------------------------------------------------------------------------

Truncated = TruncatedStreamError
Invalid = sse_chat.APIResponseValidationError
Status = sse_chat.APIStatusError
Timeout = sse_chat.APITimeoutError
Unreachable = sse_chat.APIConnectionError

ENVIRONMENT = re.compile("(?i)OPENAI_.*|OLLAMA_HOST|(HTTPS?|ALL|NO)_PROXY")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, caplog):
    for name in filter(ENVIRONMENT.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    yield
    assert [r for r in caplog.get_records("call") if r.name == "asyncio"] == []


class Sync:
    """Anything of sync code with the face of its async twin."""

    def __init__(self, twin):
        self.twin = twin

    def __getattr__(self, name):
        value = getattr(self.twin, {"aclose": "close"}.get(name, name))
        if name in ("client", "stream", "text"):
            return lambda *args, **options: Sync(value(*args, **options))
        if name in ("aclose", "generate", "models"):
            return functools.partial(call, value)
        return value

    def __aiter__(self):
        return Sync(iter(self.twin))

    async def __anext__(self):
        try:
            return next(self.twin)
        except StopIteration:
            raise StopAsyncIteration from None

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
MODES = ["sync", "asyncio", "uvloop", "trio"]


def pytest_generate_tests(metafunc):
    """What takes `chat` runs sync as well, all else that is async under each loop."""
    if "anyio_backend" in metafunc.fixturenames:
        modes = MODES["chat" not in metafunc.fixturenames :]
        metafunc.parametrize("anyio_backend", modes, indirect=True)


@pytest.fixture
def anyio_backend(request):
    if request.param in ("uvloop", "trio"):
        needs(request.param)
    loop = "trio" if request.param == "trio" else "asyncio"
    return loop, {"use_uvloop": True} if request.param == "uvloop" else {}


@pytest.fixture
def chat(request, anyio_backend):
    return SYNC if request.node.callspec.params["anyio_backend"] == "sync" else ASYNC


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@contextlib.asynccontextmanager
async def own_client(chat, module=httpx, **options):
    """The caller's own client, of the kind that this way to ask takes."""
    options = {"verify": NO_TLS} | options  # certificates take their time
    if chat is SYNC:
        with module.Client(**options) as client:
            yield client
    else:
        async with module.AsyncClient(**options) as client:
            yield client


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, which take no time."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    monkeypatch.setattr(anyio, "sleep", functools.partial(call, noted.append))
    return noted


def finished(coroutine):
    """Run what has nothing to wait for; an event loop for each would take too long."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


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
    answer.text = "".join(getattr(chunk, "text", "") for chunk in answer.chunks)
    return answer


async def ask(chat, base_url=None, how="stream", **options):
    options = {"messages": "hi", "base_url": base_url, "timeout": 10} | options
    return await take(getattr(chat, how)(**options))


def ask_sync(base_url=None, **options):
    return finished(ask(SYNC, base_url, **options))


def chunks_in(*pieces, **options):
    return finished(take(Sync(sse_chat.iter_chunks(pieces, **options))))


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def framed(framing, *parts, broken=False, kind="text/event-stream"):
    """Answer with these parts as the body; if `broken`, break off after them."""
    answer = chunked(*parts, end=not broken, kind=kind)
    if framing == "length":
        answer = http(*parts, b"?" * broken, kind=kind)[: -1 if broken else None]
    elif framing == "close":
        answer = HEAD.replace(b"text/event-stream", kind.encode()) + b"".join(parts)
    elif framing == "gzip":
        packer = zlib.compressobj(wbits=31)
        end = zlib.Z_SYNC_FLUSH if broken else zlib.Z_FINISH
        packed = packer.compress(b"".join(parts)) + packer.flush(end)
        gzipped = "Content-Encoding: gzip\r\n"
        answer = chunked(packed, end=not broken, headers=gzipped, kind=kind)
    return play(answer, (0.02, reset) if broken and framing == "close" else ())


def reset(connection):
    """Have it reset when it is closed."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


# ------------------------------------------------------------------------------------
# How a stream ends: bodies, and what their reader gets
# ------------------------------------------------------------------------------------


class Body(NamedTuple):
    """The body of an answer, and what its reader gets."""

    data: bytes
    error: type[APIError] | None  # of this very type
    text: str = "Hello"
    finish: str | None = None
    says: str = ""  # in the error, as a pattern
    kind: str = "text/event-stream"
    options: Any = {}  # noqa: RUF012
    if_broken: type[APIError] | None = None  # the error if the connection broke as well


def ends(error, *parts, **more):
    """A whole answer says "stop" unless told otherwise; an error says CANARY."""
    usual = {None: {"finish": "stop"}, APIError: {"says": CANARY}}
    return Body(b"".join(parts), error, **usual.get(error, {}) | more)


def choices(*fields, **more):
    return sse({"choices": fields} | more)


def calls(indices):
    return event(tool_calls=[{"index": index} | CALL for index in indices])


def with_text(text):
    """A chunk whose text is written so in its JSON."""
    return event("?").replace(b"?", text)


CANARY = "sk-canary/7f3a"  # what the errors say, and where it is the key do not say
CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
SAID = HELLO[:2]  # of an answer that does not end
END = HELLO[2:]
ONE_ENDS = event(finish="stop", index=1)
PING, BOM = b": ping\n\n", b"\xef\xbb\xbf"
USAGE_ALONE = choices(usage={"prompt_tokens": 1, "total_tokens": 2})
FAILED = sse({"error": {"message": CANARY, "type": "server_error", "code": 500}})
BESIDE = {"error": {"code": 502, "message": CANARY}}  # OpenRouter, beside the choices
FAILURE = {"finish_reason": "error"}
OF_999 = {"max_event_bytes": 999}
STRANGE = [event("Wörld "), event("🙂\u2028"), event("\ufeff你")]
ESCAPED = [b"data: %b\n\n" % json.dumps(json.loads(e[6:])).encode() for e in STRANGE]
STRANGE_TEXT = "Wörld 🙂\u2028\ufeff你"
MESSAGE = {"role": "assistant", "content": "Hello"}
WHOLE = {"id": "c", "object": "chat.completion", "model": "m", "created": 2}
WHOLE["choices"] = [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]
JSON = json.dumps(WHOLE).encode()
PAGE = b"<!doctype html><title>Sign in</title>"
NEITHER = {"text": "", "if_broken": Truncated}  # no event stream and no JSON

# An error as servers send it, its code, type and param, and its message if not @ alone
SHAPES = (
    r"""
{"error": {"message": "@", "type": "t", "param": "p", "code": "c"}} = ["c", "t", "p"]
{"error": {"message": "@", "code": 400, "type": null}} = [400, null, null]
{"error": "@"} = [null, null, null]
[{"error": {"code": 400, "message": "@"}}] = [400, null, null]
{"object": "error", "message": "@", "type": "B", "code": 400} = [400, "B", null]
{"object": "error", "message": {"detail": [{"msg": "@"}]}} = [null, null, null]
{"detail": "@"} = [null, null, null]
{"detail": [{"loc": ["body"], "msg": "@"}]} = [null, null, null]
{"error": {"message": "@"}, "message": "x"} = [null, null, null]
{"error": {"code": 402, "message": "@", "metadata": {"raw": "x"}}} = [402, null, null]
{"error": {"message": ["@", "x"]}} = [null, null, null, "@; x"]
{"error": {"message": {"text": "@"}}} = [null, null, null, "{\"text\": \"@\"}"]
{"error": {"code": 400, "message": "@", "type": "e", "n_ctx": 8}} = [400, "e", null]
{"error": {"message": "@", "code": [], "type": 5}} = [null, null, null]
""".replace("@", CANARY)
    .strip()
    .splitlines()
)
ERROR_EVENTS = [  # that only an event stream can hold; | for an end of line
    *('event: error|data: {"code":400,"details":"@"}||', "event: error|data: @||"),
    *('event: error|data: {"message":"@"}||', 'event: error|data: "@"||'),
    *(
        'event:error|data:{"error":{"message":"@","code":400}}||',
        "event: error|data: @",
    ),
    *('error: {"code":400,"message":"@"}||', 'error: {"message":"@"}|', "error: @||"),
    *('error: {"code":400,"message":"@"}', "error: @", 'error:{"error":"@"}||'),
]
REASONS = ["stop", "length", "tool_calls", "content_filter", "eos", "STOP", "errors"]

BODIES = {
    "complete": ends(None, *HELLO),
    "finish without [DONE]": ends(None, *HELLO[:3]),
    "[DONE] without finish": ends(None, *SAID, DONE, finish=None),
    "[DONE] without blank line": ends(None, *SAID, DONE.rstrip(), finish=None),
    "[DONE] in one line end": ends(None, *SAID, b"data: [DONE]\n", finish=None),
    "[DONE] without space": ends(None, *SAID, b"data:[DONE]\n\n", finish=None),
    "[DONE] alone": ends(Invalid, DONE, text="", says="no answer"),
    "[DONE] after usage": ends(Invalid, USAGE_ALONE, DONE, text="", says="no answer"),
    "finish without blank line": ends(None, *SAID, HELLO[2].rstrip()),
    "no text": ends(None, event(role="assistant"), DONE, text="", finish=None),
    "white space": ends(None, *(p.replace(b" {", b"  \t{", 1) for p in HELLO)),
    "data in lines": ends(None, *(p.replace(b" {", b"\ndata:{", 1) for p in HELLO)),
    "comments and usage at the end": ends(None, *HELLO[:3], PING, USAGE_ALONE, DONE),
    "Azure's filter at the end": ends(None, *HELLO[:3], choices({"filter": {}}), DONE),
    "OpenRouter": ends(None, b": OPENROUTER PROCESSING\n\n", *HELLO),
    "UTF-8": ends(None, *STRANGE, *END, text=STRANGE_TEXT),
    "escapes": ends(None, *ESCAPED, *END, text=STRANGE_TEXT),
    "CRLF": ends(None, *(p.replace(b"\n", b"\r\n") for p in (*SAID, ONE_ENDS, *END))),
    "CR": ends(None, *(p.replace(b"\n", b"\r") for p in (*SAID, ONE_ENDS, *END))),
    "BOM": ends(None, BOM, *HELLO),
    "tools": ends(None, event("Hello", reasoning="hm"), calls([0, 0, 1]), *END),
    "message for delta": ends(None, choices({"message": MESSAGE}), *END),
    "two choices": ends(None, *SAID, event("x", index=1), ONE_ENDS, *END),
    "two choices, one ended": ends(Truncated, *SAID, event("x", index=1), ONE_ENDS),
    "two choices, [DONE]": ends(None, *SAID, ONE_ENDS, DONE, finish=None),
    "n=2": ends(None, *SAID, ONE_ENDS, HELLO[2], options={"n": 2}),
    "n=2, one begun": ends(Truncated, *HELLO[:3], finish="stop", options={"n": 2}),
    "n=2, one begun, [DONE]": ends(None, *SAID, DONE, finish=None, options={"n": 2}),
    "cut": ends(Truncated, *SAID),
    "cut in an event": ends(Truncated, *SAID, HELLO[2][:-40]),
    "cut in [DONE]": ends(Truncated, *SAID, b"data: [DON"),
    "cut before a token": ends(Truncated, PING, text=""),
    "cut in a character": ends(Truncated, *SAID, 'data: {"é'.encode()[:-1]),
    'finish_reason ""': ends(Truncated, *SAID, event(finish="")),
    "Ollama's erased error": ends(Truncated, *SAID, choices({"index": 0}, model="")),
    "error null": ends(None, *SAID, choices(error=None), *END),
    "error": ends(APIError, *SAID, FAILED),
    "error, finish, [DONE]": ends(APIError, *SAID, FAILED, *END),
    "finish, error, [DONE]": ends(APIError, *HELLO[:3], FAILED, DONE, finish="stop"),
    "error without blank line": ends(APIError, *SAID, FAILED.rstrip()),
    "error in escapes": ends(APIError, *SAID, FAILED.replace(b"/", rb"\/"), DONE),
    "half a character": ends(APIError, FAILED.replace(b"500", rb'"\ud83d"'), text=""),
    "error beside a choice": ends(APIError, *SAID, choices({}, **BESIDE)),
    "error beside a failure": ends(APIError, *SAID, choices(FAILURE, **BESIDE), DONE),
    "not JSON": ends(Invalid, *SAID, b"data: oops \xff\n\n", says="oops \ufffd"),
    "not JSON, long": ends(Invalid, *SAID, b"data:", b"x" * 999, b"\n\n", says="x{99}"),
    "no object": ends(Invalid, *SAID, b"data: 17\n\n", DONE, says="17"),
    "NUL": ends(Invalid, *SAID, b"data: \0\n\n", DONE, says="x00"),
    "too large": ends(Invalid, *SAID, event("x" * 999), says="999", options=OF_999),
    "JSON by header": ends(None, JSON, kind="application/json"),
    "JSON by first byte": ends(None, JSON),
    "JSON after blank lines": ends(None, b"\n", b"\r\n  \n", JSON, b"\n"),
    "JSON after a BOM": ends(None, BOM + JSON),
    "JSON as text": ends(None, JSON, kind="text/plain"),
    "JSON, [DONE]": ends(None, JSON, b"\n", DONE),
    "JSON, data:[DONE]": ends(None, JSON, b"\n\ndata:[DONE]\n\n"),
    "JSON without reason": ends(None, JSON.replace(b'"stop"', b"null"), finish=None),
    "JSON of a failure": ends(Truncated, JSON.replace(b"stop", b"failed"), says="fail"),
    "JSON of an error": ends(APIError, json.dumps(WHOLE | BESIDE).encode(), text=""),
    "JSON cut": ends(Truncated, JSON[:-9], text=""),
    "JSON, large": ends(Invalid, JSON, b" " * 999, text="", says="999", options=OF_999),
    "JSON of something else": ends(Invalid, b'{"ok": true}', text="", says="true"),
    "JSON of no choice": ends(Invalid, b'{"choices": []}', text="", says="choices"),
    "stream as application/json": ends(None, *HELLO, kind="application/json"),
    "stream as octet-stream": ends(None, *HELLO, kind="application/octet-stream"),
    "HTML": ends(Invalid, PAGE, says="Sign in", kind="text/html", **NEITHER),
    "text": ends(Invalid, b"gone", says="gone", kind="text/plain", **NEITHER),
    "long text": ends(Invalid, b"word " * 999, text="", says="word", kind="text/plain"),
    "empty": ends(Invalid, says="empty", kind="text/x-empty", **NEITHER),
    "blank": ends(Invalid, b"\n\n", says="empty", **NEITHER),
    "choice 1023": ends(None, *SAID, event(finish="x", index=1023), *END),
    "choice 1024": ends(Invalid, *SAID, event(index=1024), DONE, says="1024"),
    "choice -1": ends(Invalid, *SAID, event(index=-1), DONE, says="-1"),
    "tool call 1023": ends(None, calls([1023]), *HELLO),
    "tool call 1024": ends(Invalid, *SAID, calls([1024]), DONE, says="1024"),
    "tool call -1": ends(Invalid, *SAID, calls([-1]), DONE, says="-1"),
    "odd tool calls": ends(None, calls(["x", None, 0.5, [], {}, True]), *HELLO),
    "a key twice": ends(None, with_text(b'a", "content": "b'), *HELLO, text="bHello"),
    "NUL in text": ends(None, with_text(rb"\u0000"), *HELLO, text="\0Hello"),
    "bad UTF-8": ends(None, with_text(b"\xff\xc3"), *HELLO, text="\ufffd\ufffdHello"),
    "keys of ours": ends(None, event(extra=1, __class__=3), choices(raw=4), *HELLO),
}  # fmt: skip
for reason in [*ENDED_BADLY.split(), "ERROR", "Network_Error"]:
    BODIES[reason] = ends(Truncated, *SAID, event(finish=reason), DONE, says=reason)
for reason in REASONS:
    BODIES[reason] = ends(None, *SAID, event(finish=reason), DONE, finish=reason)
for sent in ERROR_EVENTS:
    data = sent.replace("|", "\n").replace("@", CANARY).encode()
    BODIES[sent] = ends(APIError, *SAID, data)
for sent, _, _ in (line.partition(" = ") for line in SHAPES):
    BODIES[sent] = ends(APIError, *SAID, f"data: {sent}\n\n".encode(), DONE)
    BODIES[f"JSON: {sent}"] = ends(APIError, sent.encode(), text="")

FRAMINGS = ("chunked", "close", "length", "gzip")
all_bodies = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


def check(answer, body, broken=False):
    error = body.if_broken if broken and body.if_broken else body.error
    assert type(answer.error) is (error or NoneType), answer.error
    got = answer.completion
    assert got.text == body.text
    assert (got.choices[0].finish_reason if got.choices else None) == body.finish
    if error and not broken:
        assert re.search(body.says, str(answer.error))
        assert not re.search("x{201}", str(answer.error))
        assert answer.error.status_code is None


async def check_end(answer):
    """What a stream says at its end it says as often as it is asked."""
    stream = answer.stream
    assert (stream.complete, stream.completion) == (not answer.error, answer.completion)
    for _ in range(2):
        with pytest.raises((APIError, StopAsyncIteration)) as end:
            await anext(stream)
        assert end.value is answer.error or not answer.error
        await stream.aclose()


@all_bodies
async def test_how_an_answer_ends(chat, body):
    """As a stream, as one in single bytes, and in answer to `generate`."""
    at_once = framed("chunked", body.data, kind=body.kind)
    single = cut(body.data, range(len(body.data)))
    bytewise = framed("chunked", *single, kind=body.kind)
    with serve(in_turn(bytewise, at_once)) as server:
        for how in ("stream", "stream", "generate"):
            answer = await ask(chat, server.url, how, **body.options)
            check(answer, body)
            assert json.loads(server.bodies[-1])["stream"] is (how == "stream")
            if answer.error:
                assert server.url in str(answer.error)
                assert server.url not in answer.error.message
                assert body.kind in str(answer.error) or not body.if_broken
            if how == "stream":
                assert answer.text == body.text
                await check_end(answer)
        assert len(server.heads) == 3  # an answer that has begun is not asked for again


@all_bodies
def test_an_answer_ends_the_same_in_any_framing(body):
    for framing, broken in itertools.product(FRAMINGS, (False, True)):
        with serve(framed(framing, body.data, broken=broken, kind=body.kind)) as server:
            answer = ask_sync(server.url, **body.options)
        check(answer, body, broken)
        assert answer.text == body.text
        if broken and type(answer.error) is Truncated and not body.says:
            assert answer.error.__cause__ is not None


PLAIN = {name: body for name, body in BODIES.items() if "n" not in body.options}
GOOD_ONES = {name: body for name, body in BODIES.items() if not body.error}
GOOD_STREAMS = sorted(n for n in GOOD_ONES if "JSON" not in n and "n=" not in n)


@given(st.data(), st.sampled_from(sorted(PLAIN)))
def test_an_answer_ends_the_same_however_cut(data, name):
    body = PLAIN[name]
    expected = chunks_in(body.data, **body.options)
    check(expected, body)
    pieces = data.draw(cuttings(st.just(body.data)))
    chunks = sse_chat.aiter_chunks(as_async(pieces), **body.options)
    for answer in (chunks_in(*pieces, **body.options), finished(take(chunks))):
        assert answer.chunks == expected.chunks
        assert answer.completion == expected.completion
        assert repr(answer.error) == repr(expected.error)


def end_of(body):
    """Where a good answer is whole: behind the line of its last reason or [DONE]."""
    last = body.data.rfind(b'_reason": "' if body.finish else b"[DONE]")
    return re.compile(rb"[\r\n]|$").search(body.data, max(last, 0)).start()


@pytest.mark.parametrize("body", GOOD_ONES.values(), ids=GOOD_ONES)
def test_no_answer_is_whole_before_its_end(body):
    for at in range(len(body.data)):
        begun = body.data[:at].strip(b" \r\n" + BOM)
        error = NoneType if at >= end_of(body) else Truncated if begun else Invalid
        if body.options:  # that a call alone has
            with serve(framed("close", body.data[:at])) as server:
                answer = ask_sync(server.url, **body.options)
        else:
            answer = chunks_in(body.data[:at])
        assert type(answer.error) is error, at
        assert body.text.startswith(answer.completion.text)


JUNK_LINES = [b":", b": ping", b"id: 7", b"id", b"retry: 1", b"retry: x", b"x: {", b"x"]
JUNK = st.lists(st.sampled_from(JUNK_LINES), max_size=2)


@given(st.data(), st.sampled_from(GOOD_STREAMS))
def test_junk_does_not_matter(data, name):
    """Comments, unknown fields, ids, blank lines, a BOM, any line ends, any cutting."""
    made = data.draw(st.sampled_from([b":\n", BOM + b":\n"]))
    body = GOOD_ONES[name]
    for part in re.split(rb"\n\n|\r\r|\r\n\r\n", body.data.removeprefix(BOM)):
        line_end = data.draw(st.sampled_from([b"\r", b"\n", b"\r\n"]))
        blank = [b""] * data.draw(st.integers(1, 3))
        lines = [*data.draw(JUNK), *part.splitlines(), *data.draw(JUNK), *blank]
        made += b"".join(line + line_end for line in lines)
    check(chunks_in(*data.draw(cuttings(st.just(made)))), body)


def judged(body):
    """The table of endings once more, for a stream that holds nothing but choices."""
    text, reasons = "", {}
    events = list(iter_sse([body]))
    last = list(iter_sse([body, b"\n\n"]))[len(events) :]  # no blank line ended it
    for event in events + last:
        if event.data.startswith("[DONE]"):
            return text, NoneType if reasons else Invalid
        try:
            choices = json.loads(event.data or "{}").get("choices", [])
        except ValueError:
            if event in last:
                break
            return text, Invalid
        for place, choice in enumerate(choices):
            index = choice.get("index", place)
            if not 0 <= index <= 1023:
                return text, Invalid
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
            text += choice.get("delta", {}).get("content", "") if index == 0 else ""
    return text, NoneType if reasons and all(reasons.values()) else Truncated


SMALL = [
    choices({"index": 0, "delta": {"content": "🙂"}}),
    choices({"index": 1, "delta": {"content": "b"}}),
    choices({"index": 0, "finish_reason": "stop"}),
    choices({"index": 1, "finish_reason": "length"}, {"index": 0, "delta": {}}),
    *(choices(), PING, DONE),
]
PUT = st.sampled_from([b"", b"\n\n", b'"', b"\0", b"{", b"\xff", b"9", b"\r", b" "])
HARM = st.tuples(st.integers(0, 400), st.integers(0, 2), PUT)


@given(st.lists(st.sampled_from(SMALL), max_size=8), st.lists(HARM, max_size=2))
def test_a_damaged_stream_ends_as_the_table_says(parts, harm):
    first, rest = SMALL[0], bytearray(b"".join(parts))
    for at, length, put in harm:
        at %= len(rest) + 1
        rest[at : at + length] = put
    answer = chunks_in(first + rest)
    assert (answer.completion.text, type(answer.error)) == judged(first + rest)


OUT_OF_RANGE = ("-1", f"1{'0' * 30}")
DEEP = ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000)
ODD_JSON = [*OUT_OF_RANGE, *DEEP, "9" * 5000, f'"{"x" * 100_000}"', '""', '"x"', "[]"]
ODD_JSON += ["{}", "[null]", "[[]]", "null", "true", "0", "1.5", "NaN", "1e999"]
FULL_ERROR = {"error": {"message": "m", "type": "t", "param": "p", "code": "c"}}
FULL_DELTA = {"role": "assistant", "content": "c", "reasoning": "r", "refusal": "no"}
FULL_DELTA |= {"tool_calls": [CALL | {"index": 0, "type": "function", "x": {"y": []}}]}
FULL_DELTA |= {"function_call": {"name": "f", "arguments": "{}"}, "audio": {"id": "a"}}
TOKEN = {"token": "t", "bytes": [116], "logprob": -2, "top_logprobs": [{"token": "t"}]}
ENDED = {"index": 0, "finish_reason": "stop", "logprobs": {"content": [TOKEN]}}
USAGE = {"total_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}
HEAD_OF = {"id": "i", "object": "o", "created": 1, "model": "m", "usage": USAGE}
FULL_CHUNK = HEAD_OF | {"choices": [ENDED | {"delta": FULL_DELTA}], "error": None}
FULL_WHOLE = HEAD_OF | {"choices": [ENDED | {"message": FULL_DELTA}], "error": None}


def with_odd_fields(value, odd, whole=None):
    """Give a payload with `odd` JSON in each of its fields in turn, and which it is."""
    for key, was in list(
        value.items() if isinstance(value, dict) else enumerate(value)
    ):
        if isinstance(was, (dict, list)):
            yield from with_odd_fields(was, odd, whole or value)
        value[key] = "@"
        yield key, json.dumps(whole or value).replace('"@"', odd).encode()
        value[key] = was


def due(sent, key, odd):
    try:
        error = json.loads(sent).get("error")
    except (ValueError, RecursionError):
        return Invalid  # too deep, or more digits than Python converts
    out_of_range = key == "index" and odd in OUT_OF_RANGE
    return APIError if error else Invalid if out_of_range else NoneType


@pytest.mark.parametrize("odd", ODD_JSON, ids=lambda odd: odd[:6])
@pytest.mark.parametrize("payload", [FULL_CHUNK, FULL_ERROR, FULL_WHOLE], ids=len)
def test_anything_may_stand_in_any_field(payload, odd):
    in_json = payload is FULL_WHOLE
    for key, sent in with_odd_fields(copy.deepcopy(payload), odd):
        answer = chunks_in(*[sent] if in_json else [b"data: %s\n\n" % sent, *HELLO])
        error = answer.error
        no_message = in_json and key in ("choices", "message", 0)
        expected = {due(sent, key, odd)} | ({Invalid} if no_message else set())
        assert type(error) in expected, (key, error)
        assert error or in_json or answer.text.endswith("Hello")
        answer.completion.text.encode()
        if error:
            texts = (error.message, error.type or "", error.param or "")
            assert all(isinstance(text, str) for text in texts)
            assert isinstance(error.code, (int, str, NoneType))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("body", PLAIN.values(), ids=PLAIN)
def test_a_copy_of_an_answer_or_error_is_the_same(body, copied):
    answer = chunks_in(body.data, **body.options)
    made = answer.error or answer.completion
    twin = copied(made)
    assert (type(twin), str(twin), vars(twin)) == (type(made), str(made), vars(made))


# ------------------------------------------------------------------------------------
# Before the first byte
# ------------------------------------------------------------------------------------

GOOD = chunked(*HELLO)
GOOD_KEPT = play(GOOD, KEEP)
MUCH, HEADERS = (itertools.repeat(b * 9999) for b in (b"x", b"X: y\r\n"))


def refuse(status, *headers, body=b'{"error": "boom"}'):
    more = "".join(f"{header}\r\n" for header in ("Connection: close", *headers))
    return http(body, status=f"{status} No", headers=more, kind="text/html")


def after(time, *headers):
    return refuse(429, f"Retry-After: {time}", *headers)


def until(seconds):
    """Ask to wait until a date in so many seconds."""
    date = functools.partial(formatdate, usegmt=True)
    return lambda it, number: it.sendall(after(date(time.time() + seconds)))


@pytest.mark.parametrize("shape", SHAPES)
async def test_an_error_of_any_shape_is_told(chat, shape):
    sent, _, found = shape.partition(" = ")
    code, kind, param, *message = json.loads(found)
    data = sent.encode()
    events = (b"data: %s\n\n" % data, b"event: error\ndata: %s" % data)
    answers = [chunked(*SAID, event) for event in events]
    with serve(in_turn(*answers, http(data), refuse(400, body=data))) as server:
        for status in (None, None, None, 400):
            error = (await ask(chat, server.url)).error
            assert type(error) is (Status if status else APIError)
            assert (error.code, error.type, error.param) == (code, kind, param)
            assert (error.body, error.status_code) == (json.loads(sent), status)
            assert [error.message] == (message or [CANARY])
            assert all(word in str(error) for word in (error.message, server.url))
    assert "400" in str(error)
    assert (error.response.status_code, error.response.text) == (400, sent)


NO_TIME = ("soon", "-5", "nan", "inf", "-inf", "1e999", "9" * 400, "Mon, 99 Foo 2026")
AGAIN = (408, 409, 429, 500, 502, 503, 504, 529)
BACKOFF = (0.375, 0.5)
TRIED = [  # answers, options; the error, the requests, bounds of the first wait
    *(([refuse(status), GOOD], {}, None, 2, BACKOFF) for status in AGAIN),
    *(([refuse(status)], {}, Status, 1, None) for status in (304, 400, 402, 404, 422)),
    ([refuse(201)], {}, APIError, 1, None),
    ([refuse(204)], {}, Invalid, 1, None),
    ([refuse(503)], {"how": "generate"}, Status, 3, BACKOFF),
    *(([refuse(503)], {"max_retries": n}, Status, n + 1, BACKOFF) for n in (0, 1, 7)),
    # A connection that breaks may have been a dead one: once it is asked again at once.
    ([b"", b"", GOOD], {}, None, 3, (0, 0)),
    ([b"HTTP/1.1 200 OK\r\nCont", b"gibberish\r\n\r\n"], {}, Unreachable, 4, (0, 0)),
    ([play(HEAD[:-2], b"X: ", MUCH)], {"max_retries": 0}, Unreachable, 2, (0, 0)),
    ([play(HEAD[:-2], HEADERS)], {"max_retries": 0}, Unreachable, 2, (0, 0)),
    *(([after(n), GOOD], {}, None, 2, (n, n)) for n in (0, 0.5, 60)),
    *(([after(n), GOOD], {}, None, 2, BACKOFF) for n in NO_TIME),
    ([until(30), GOOD], {}, None, 2, (20, 30)),
    ([until(-900), GOOD], {}, None, 2, (0, 0)),
    # What is to be waited for longer than a minute is told.
    ([after(61)], {}, Status, 1, (61, 61)),
    ([until(3600)], {}, Status, 1, (3500, 3600)),
]  # fmt: skip


@pytest.mark.parametrize("tried", TRIED)
async def test_what_is_tried_again(chat, waits, tried):
    answers, options, error, requests, first = tried
    with serve(in_turn(*answers)) as server:
        answer = await ask(chat, server.url, **options)
    assert type(answer.error) is (error or NoneType)
    assert len(server.heads) == requests
    assert len(waits) == requests - 1
    if first is BACKOFF:
        units = [wait / min(8.0, 0.5 * 2**n) for n, wait in enumerate(waits)]
        assert all(0.75 <= unit <= 1 for unit in units)
        assert len(set(units)) == len(units)  # with jitter
    elif first:
        assert first[0] <= (waits or [answer.error.retry_after])[0] <= first[1]


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}/v1"


async def test_advice(chat):
    """What to do stands beside what the server said."""
    with serve(in_turn(refuse(404), refuse(404), refuse(401))) as server:
        elsewhere = server.url.replace("/v1", "/api")
        hint = "base_url that ends in /v1"
        assert hint in str((await ask(chat, elsewhere)).error)
        assert hint not in str((await ask(chat, server.url)).error)
        error = (await ask(chat, server.url, api_key="sk-1234567")).error
        assert "OPENAI_API_KEY" not in str(error)


async def test_nobody_listens(chat, waits):
    error = (await ask(chat, url := closed_port())).error
    assert type(error) is Unreachable
    assert all(word in str(error) for word in (url, "ollama serve", "base_url"))
    assert type(error.__cause__).__name__ == "ConnectError"
    assert len(waits) == 2


async def test_kept_connections_that_are_dead_do_not_show(chat):
    """The server promises to keep them, and closes each 1 ms after its answer."""
    with serve(play(GOOD, 0.001)) as server:
        async with chat.client(base_url=server.url, max_retries=0) as client:
            for number in range(400):
                how = client.generate if number % 3 == 0 else client.stream
                answer = await take(how("hi"))
                assert (answer.error, answer.completion.text) == (None, "Hello")
    assert server.connections == 400


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(chat, status):
    with serve(GOOD) as other:
        location = f"Location: {other.url.replace('//', '//u:hush@')}/x?key=hush"
        with serve(refuse(status, location)) as server:
            async with own_client(chat, follow_redirects=True) as own:
                for options in ({"api_key": "sk-secret"}, {"client": own}):
                    error = (await ask(chat, server.url, **options)).error
                    assert (type(error), error.status_code) == (Status, status)
                    assert f"{other.url}/x" in str(error)
                    assert "hush" not in str(error)
        assert other.connections == 0


MODELS = b'{"data": [{"id": "b"}, {"id": "a"}, {"id": 5}, null]}'
NO_MODELS = (b"{]", b'{"dat": []}', PAGE, b"", DONE, b'{"data": []}' + b" " * 3000)


async def test_the_models_of_a_server(chat, waits):
    with serve(in_turn(http(MODELS), refuse(503), http(MODELS))) as server:
        options = {"base_url": f"{server.url}/chat/completions?v=1", "api_key": "sk-a"}
        assert await chat.models(**options) == ["b", "a"]
        async with chat.client(**options) as client:
            assert await client.models() == ["b", "a"]
    assert len(waits) == 1
    for head in server.heads:
        assert head.startswith("GET /v1/models?v=1 HTTP/1.1\r\n")
        assert "Bearer sk-a\r\n" in head


NOT_TOLD = [
    *((http(body), Invalid) for body in NO_MODELS),
    *((refuse(401), Status), (http(b'{"error": "boom"}'), APIError)),
    *((play(GONE), Timeout), (play(HEAD, itertools.repeat((b" ", 0.05))), Timeout)),
    (http(MODELS)[:-5], Truncated),
]


@pytest.mark.parametrize(("answer", "error"), NOT_TOLD)
async def test_models_that_are_not_told(chat, answer, error):
    options = {"max_event_bytes": 2000, "first_token_timeout": 0.5}
    with serve(answer) as server:
        told = await take(chat.models(base_url=server.url, **options))
        assert type(told.error) is error
        assert server.left.acquire(timeout=5)


# ------------------------------------------------------------------------------------
# Time and size
# ------------------------------------------------------------------------------------

ONE = httpx.Limits(max_connections=1)
READ, FIRST = {"timeout": 0.3}, {"first_token_timeout": 0.3}
TIMEOUT = httpx.Timeout(0.3)
LATE, NO_TOKEN = "first_token_timeout", "waiting for the first token"
LIMITED = {"max_event_bytes": 65536}
EMPTY = event("", role="assistant")
THOUGHT, OTHER_THOUGHT = event(reasoning_content="hm"), event(reasoning="hm")
TOKENS = (THOUGHT, OTHER_THOUGHT, calls([0]), event(refusal="no"))
ALIVE = itertools.repeat((PING, 0.05))
PINGS, BLANKS, LINES = (itertools.repeat(b * 9999) for b in (PING, b"\n", b"data: x\n"))
ERROR_HEAD = b"HTTP/1.1 500 No\r\n\r\n"
ODD_HEADERS = ("X-Cafe: né", "Retry-After: ½", "Content-Encoding: br")
HELLO_BYTES = b"".join(HELLO)
BOOM = gzip.compress(b'{"error": "boom"}')


def encoded(name, body):
    return http(body, headers=f"Content-Encoding: {name}\r\n")


ENCODED = [encoded(name, HELLO_BYTES) for name in ("", "identity", "br")]
ENCODED += [encoded(name, gzip.compress(HELLO_BYTES)) for name in ("gzip", "X-GZIP")]
ENCODED += [encoded("deflate", zlib.compress(HELLO_BYTES))]
ENDS = [  # what a server does, options; the error, its words, text before it
    # Silence: before the first token nothing is lost; after it, the answer is cut.
    ([(GONE,), (HEAD[:20], GONE)], READ, Timeout, "waiting for the answer", ""),
    ([(HEAD, more, GONE) for more in (b"", PING, EMPTY)], READ, Timeout, NO_TOKEN, ""),
    ([(HEAD, token, GONE) for token in TOKENS], READ, Truncated, "0.3 s", ""),
    ([(HEAD, SAID, GONE)], READ, Truncated, "0.3 s", "Hello"),
    ([(HEAD, SAID, GONE)], {"timeout": TIMEOUT}, Truncated, "0.3 s", "Hello"),
    ([(HEAD, HELLO[:3], GONE)], READ, None, "", "Hello"),
    ([(HEAD, SAID, (PING, 0.2) * 4, END)], {"timeout": 0.7}, None, "", "Hello"),
    # The first token has a time of its own; what comes in its place does not count.
    ([(GONE,), (HEAD, GONE), (HEAD, ALIVE), (HEAD, PINGS)], FIRST, Timeout, LATE, ""),
    ([(HEAD, EMPTY, ALIVE)], FIRST, Timeout, LATE, ""),
    ([(HEAD, token, 0.7, END) for token in TOKENS], {LATE: 0.5}, None, "", ""),
    # What follows [DONE] is waited for a moment; an error's body for 5 s, or 64 KiB.
    ([(HEAD, HELLO, more) for more in (GONE, ALIVE, MUCH)], {}, None, "", "Hello"),
    ([(ERROR_HEAD, b"boom", more) for more in (ALIVE, MUCH)], {}, Status, "boom", ""),
    # What has no end is bounded.
    ([(HEAD, b, MUCH) for b in (b"data:", b":", b'{"')], LIMITED, Invalid, "65536", ""),
    ([(HEAD, LINES), (HEAD, BLANKS)], LIMITED, Invalid, "65536", ""),
    ([(HEAD, b"<p>", MUCH)], {}, Invalid, "<p>", ""),
    # Ends at which the server may not close.
    ([(HEAD, SAID, FAILED, GONE)], {}, APIError, CANARY, "Hello"),
    ([(HEAD, SAID, b"data: {\n\n", GONE)], {}, Invalid, "{", "Hello"),
    ([(HEAD, SAID)], {}, Truncated, "", "Hello"),
    ([(GOOD, KEEP), (http(JSON), KEEP)], {}, None, "", "Hello"),
    # Statuses, with advice; headers and bodies that hide nothing.
    ([(refuse(500), KEEP), (refuse(404), KEEP)], {}, Status, "boom", ""),
    ([(refuse(401),), (refuse(403),)], {}, Status, "OPENAI_API_KEY", ""),
    ([(refuse(400, body=PAGE * 999),)], {}, Status, "Sign in", ""),
    ([(refuse(400, body=b""),)], {}, Status, "No", ""),
    ([(refuse(400, body=b"[" * 100_000),)], {}, Status, "[[[", ""),
    ([(refuse(400, "Content-Encoding: gzip", body=BOOM),)], {}, Status, "boom", ""),
    ([(refuse(400, header),) for header in ODD_HEADERS], {}, Status, "boom", ""),
    ([(answer,) for answer in ENCODED], {}, None, "", "Hello"),
    ([(encoded("gzip", HELLO_BYTES),)], {}, Invalid, "unpack", ""),
]  # fmt: skip


@pytest.mark.parametrize("end", [(s, *rest) for steps, *rest in ENDS for s in steps])
async def test_a_stream_ends_and_leaves_its_connection(chat, end):
    """The client has one connection, and the stream is kept."""
    steps, options, error, says, text = end
    with memory(80e6), serve(in_turn(play(*steps), GOOD)) as server:
        async with own_client(chat, limits=ONE) as own:
            options = {"client": own, "max_retries": 0} | options
            answer = await ask(chat, server.url, **options)
            assert type(answer.error) is (error or NoneType)
            assert says in str(answer.error)
            assert len(str(answer.error)) < 1500
            assert answer.text == answer.completion.text == text
            await check_end(answer)
            assert (await ask(chat, server.url, client=own)).text == "Hello"
            assert len(server.heads) == 2
    if options.get("timeout") and error:
        assert type(answer.error.__cause__).__name__ == "ReadTimeout"


@contextlib.contextmanager
def memory(most):
    """No more than so many bytes are in use at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def full_server():
    """An address where no connection comes about: nobody accepts those that wait."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield SimpleNamespace(url=f"http://127.0.0.1:{full.getsockname()[1]}")
        for one in waiting:
            one.close()


@pytest.mark.skipif(sys.platform != "linux", reason="others accept more than asked")
async def test_connecting_takes_its_own_time(chat, waits):
    timeout = httpx.Timeout(5, connect=0.2)
    with full_server() as server:
        error = (await ask(chat, server.url, timeout=timeout, max_retries=1)).error
    assert (type(error), len(waits)) == (Timeout, 1)
    assert "connecting" in str(error)


BOUNDED = {
    "headers": (play(HEAD[:20], itertools.repeat((b"x", 0.05))), Timeout),
    "1xx": (play(itertools.repeat((b"HTTP/1.1 102 No\r\n\r\n", 0.05))), Timeout),
    "an error": (play(ERROR_HEAD, ALIVE), Timeout),
    "retries": (play(after(0.05), KEEP), (Status, Timeout)),
    "a wait": (play(after(50)), Status),
    "connecting": (None, Timeout),
}


@pytest.mark.parametrize("name", BOUNDED)
async def test_first_token_timeout_bounds_all_async_code(anyio_backend, name):
    answer, error = BOUNDED[name]
    options = {"first_token_timeout": 0.3, "max_retries": 10**6}
    with serve(answer) if answer else full_server() as server, anyio.fail_after(20):
        told = (await ask(ASYNC, server.url, **options)).error
    assert isinstance(told, error)
    assert type(told) is Status or LATE in str(told)


LATE_END = play(chunked(*HELLO, end=False), 0.05, b"5\r\n: end\r\n0\r\n\r\n", KEEP)


@pytest.mark.parametrize("first", [GOOD_KEPT, play(http(JSON), KEEP), LATE_END])
async def test_after_the_end_the_connection_is_used_again(chat, first):
    """And the time for the first token of one is not that of the next."""
    slow = play(HEAD, SAID, (PING, 0.1) * 8, END)
    with serve(in_turn(first, first, first, slow)) as server:
        async with chat.client(base_url=server.url, first_token_timeout=0.4) as client:
            assert "".join([t async for t in client.stream("hi").text()]) == "Hello"
            answers = [await take(client.stream("hi")) for _ in range(3)]
        assert [(a.text, a.error) for a in answers] == [("Hello", None)] * 3
        assert server.connections == 1


LIMITS = [(3, 3), (600, 5), (1e10, 5), (math.inf, 5), (None, None)]


@pytest.mark.parametrize(("timeout", "connect"), [*LIMITS, (httpx.Timeout(7), 7)])
async def test_limits_may_be_long_but_that_to_connect(chat, timeout, connect):
    with serve(in_turn(refuse(503, "Retry-After: 0"), GOOD)) as server:
        for first in (math.inf, 1e10, None):
            options = {"timeout": timeout, "first_token_timeout": first}
            answer = await ask(chat, server.url, **options)
            assert (answer.error, answer.text) == (None, "Hello")
        sent = answer.stream.response.request
        assert sent.extensions["timeout"]["connect"] == connect


MANY = 30_000
LARGE = [  # the parts of a large answer, and what becomes of it
    ([calls(range(1024))], None),
    ([calls(range(1025))], Invalid),
    ([event(tool_calls=[CALL] * MANY)], Invalid),
    ([event(tool_calls=[CALL | {"id": f"{i}"}]) for i in range(MANY)], Invalid),
    ([calls([i * (2**61 - 1)]) for i in range(2000)], Invalid),
    ([event("x", index=i) for i in range(MANY)], Invalid),
    ([choices(*[{"index": 0, "delta": {"content": "x"}}] * MANY)], Invalid),
    ([choices(*[{}] * 500_000)], Invalid),
    ([with_text(b'", "x": 1.%s, "y": "' % (b"9" * 10_000_000))], None),
    ([b"retry: %s\n" % (b"9" * 10_000_000)], None),
]


@pytest.mark.parametrize(("parts", "error"), LARGE)
def test_a_large_answer_takes_what_its_size_does(parts, error):
    body = b"".join([*parts, *HELLO])
    with memory(50e6 + 20 * len(body)):
        answer = chunks_in(body)
    assert type(answer.error) is (error or NoneType)
    assert len(answer.completion.choices) <= 1024
    assert error or answer.text == "Hello"


@pytest.mark.parametrize(
    ("filling", "error"),
    [(b"\0", Invalid), (b"\n", Invalid), (b" ", Invalid), (PING, Truncated)],
)
@pytest.mark.parametrize("status", ["200 OK", "400 No"])
def test_a_gzip_bomb(filling, error, status):
    packer = zlib.compressobj(wbits=31)
    block = filling * (2**20 // len(filling))
    many = 100 if filling == b"\0" else 4  # MiB; lines take their time
    bomb = b"".join(packer.compress(block) for _ in range(many)) + packer.flush()
    answer = http(bomb, status=status, headers="Content-Encoding: gzip\r\n")
    with memory(80e6), serve(answer) as server:
        told = ask_sync(server.url).error
    assert type(told) is (error if status == "200 OK" else Status)
    assert "accept-encoding: identity" in server.heads[0].lower()


# ------------------------------------------------------------------------------------
# The life of a stream, and of a client: kept, or garbage collection would close them
# ------------------------------------------------------------------------------------

ENDLESS = itertools.repeat((event("x"), 0.01))
WAYS = ("break", "break text", "raise", "drop", "close", "break with", "raise with")
CANCELS = ("cancel", "cancel with", "task", "cycle")


async def leave(how, make):
    """Take the first chunk of a new stream and go; return the stream if it is kept."""
    if how == "drop":
        return await anext(make()) and None
    if how == "cycle":
        cycle = [make()]
        cycle.append(cycle)
        await anext(cycle[0])
        del cycle
        return gc.collect() and None
    if how == "task":
        return await cancel_task(make())
    kept = None if how in ("break", "break text", "raise") else make()
    inside = kept if "with" in how else contextlib.nullcontext()
    with contextlib.suppress(KeyError), anyio.CancelScope() as scope:
        async with inside:
            async for _ in kept or (make() if how != "break text" else make().text()):
                if "raise" in how:
                    raise KeyError
                if "cancel" not in how:
                    break
                scope.cancel()
    if how == "close":
        await kept.aclose()
    return kept


async def cancel_task(stream):
    task = asyncio.ensure_future(take(stream))
    assert await eventually(lambda: stream.completion.text)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return stream


async def eventually(check, seconds=5):
    until = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < until:
        await anyio.sleep(0.01)
    return bool(done)


async def has_left(server):
    return await eventually(lambda: server.left.acquire(blocking=False))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of what is in a cycle
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", [*WAYS, *CANCELS])
async def test_who_leaves_ends_the_answer(chat, anyio_backend, how, shared):
    """Over one connection each stream begins only when the one before is closed."""
    on_trio = anyio_backend[0] == "trio"
    if how in CANCELS if chat is SYNC else on_trio and how in ("cycle", "task"):
        pytest.skip("sync code has no cancelling, trio no tasks, nor help for cycles")
    kept = []
    with serve(in_turn(GOOD, play(HEAD, ENDLESS))) as server:
        async with own_client(chat, limits=ONE) as own:
            await ask(chat, server.url)  # what is loaded once has open files, too
            assert await has_left(server)
            before = len(os.listdir("/dev/fd"))
            options = {"base_url": server.url, "timeout": 5}
            options |= {"client": own} if shared else {}
            for _ in range(10):
                kept.append(await leave(how, lambda: chat.stream("hi", **options)))
                assert await has_left(server)
            assert await eventually(lambda: len(os.listdir("/dev/fd")) <= before)
        assert server.connections == 11
        for stream in filter(None, kept):
            assert (set(stream.completion.text), stream.complete) == ({"x"}, False)
            with pytest.raises(Truncated):
                await anext(stream)


@pytest.mark.parametrize("steps", [(), (HEAD,), (HEAD, SAID)])
def test_ctrl_c_while_waiting(steps):
    main = threading.main_thread().ident
    with serve(play(*steps, GONE)) as server:
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            finished(take(Sync(stream)))
        timer.join()
        assert server.left.acquire(timeout=5)


@pytest.mark.parametrize("steps", [(), (HEAD,), (HEAD, SAID)])
async def test_cancelled_while_waiting(anyio_backend, steps):
    with serve(play(*steps, GONE)) as server:
        stream = ASYNC.stream("hi", base_url=server.url)
        with anyio.move_on_after(0.3) as scope:
            await take(stream)
        assert scope.cancelled_caught
        assert await has_left(server)


async def taken_until_closed(chat, stream):
    """Take the stream, while another thread or task closes it in a moment."""

    async def close_soon():
        await anyio.sleep(0.3)
        await stream.aclose()

    async with anyio.create_task_group() as group:
        if chat is SYNC:
            threading.Timer(0.3, stream.twin.close).start()
        else:
            group.start_soon(close_soon)
        return await take(stream)


@pytest.mark.parametrize("steps", [(HEAD,), (HEAD, SAID)])
async def test_close_from_elsewhere_wakes_the_reader(chat, steps):
    with serve(play(*steps, GONE)) as server:
        stream = chat.stream("hi", base_url=server.url, timeout=30)
        answer = await taken_until_closed(chat, stream)
        assert type(answer.error) is Truncated
        assert "closed here" in str(answer.error)
        assert answer.completion.text == "Hello" * (SAID in steps)
        assert await has_left(server)
        await check_end(answer)


async def test_a_stream_connects_at_its_first_chunk(chat):
    with serve(GOOD) as server:
        unread, closed = (chat.stream("hi", base_url=server.url) for _ in range(2))
        async with unread:
            assert (unread.response, unread.complete) == (None, False)
            assert unread.completion.choices == []
        await closed.aclose()
        for stream in (unread, closed):
            with pytest.raises(Truncated, match="closed here"):
                await anext(stream)
        assert server.connections == 0


async def test_a_loop_that_is_left_may_be_gone_on_with(chat):
    with serve(GOOD) as server:
        stream = chat.stream("hi", base_url=server.url)
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


async def test_text_holds_back_half_a_character_and_no_more(chat):
    half, other = rb"\ud83d", rb"\ude42"
    texts = (b"a" + half, other + b"b", half, b"c" + half, half)
    with serve(chunked(*map(with_text, texts), *END)) as server:
        text = chat.stream("hi", base_url=server.url).text()
        assert [t async for t in text] == ["a", "🙂b", "\ufffdc", "\ufffd", "\ufffd"]


async def test_a_client_closes_what_is_its_own(chat):
    with serve(in_turn(GOOD_KEPT, GOOD_KEPT, b"")) as server:
        async with own_client(chat) as own:
            for client in (own, None):
                async with chat.client(base_url=server.url, client=client) as ours:
                    assert (await take(ours.stream("hi"))).text == "Hello"
            assert not own.is_closed
            assert await has_left(server)
            async with chat.client(base_url=server.url, client=own) as ours:  # is dead:
                assert type((await take(ours.stream("hi"))).error) is Unreachable
        assert len(server.heads) == 2 + 4  # it is asked past once, and then retried


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_forked_child_does_not_end_its_parents_stream(chat):
    child_has_ended = threading.Event()
    with serve(play(HEAD, SAID, lambda _: child_has_ended.wait(30), END)) as server:
        stream = chat.stream("hi", base_url=server.url)
        assert (await anext(stream)).text == "Hel"
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                del stream
                gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        child_has_ended.set()
        answer = await take(stream)
        assert (answer.error, answer.text) == (None, "lo")


PLACES = st.integers(0, 99)


class Streams(RuleBasedStateMachine):
    """Streams over one client of three connections, all kept until the end."""

    KINDS: ClassVar = {  # what the server does, and how the stream ends
        "good": (GOOD_KEPT, None),
        "JSON": (play(http(JSON), KEEP), None),
        "slow": (play(HEAD, ENDLESS), Truncated),
        "cut": (play(HEAD, SAID), Truncated),
        "failed": (play(HEAD, SAID, FAILED, GONE), APIError),
        "refused": (play(refuse(400), KEEP), Status),
        "gone": (play(b""), Unreachable),
    }

    def __init__(self, chat, loop):
        super().__init__()
        self.chat = chat
        self.streams = []  # each with its end
        self.open = set()  # the places of those that have a connection
        self.over = set()
        self.exit = contextlib.ExitStack()
        enter = self.exit.enter_context
        self.portal = enter(anyio.from_thread.start_blocking_portal(*loop))
        self.server = enter(serve(self.answer))
        own = own_client(self.chat, limits=httpx.Limits(max_connections=3))
        self.own = enter(self.portal.wrap_async_context_manager(own))

    def answer(self, connection, number):
        body = json.loads(self.server.bodies[number - 1])
        return self.KINDS[body["messages"][0]["content"]][0](connection, number)

    @rule(kind=st.sampled_from(sorted(KINDS)))
    def ask(self, kind):
        options = {"base_url": self.server.url, "client": self.own, "max_retries": 0}
        stream = self.chat.stream(kind, timeout=20, **options)
        self.streams.append([stream, self.KINDS[kind][1]])

    @precondition(lambda self: self.streams)
    @rule(number=PLACES, how=st.sampled_from(["next", "text", "loop", "with", "close"]))
    def use(self, number, how):
        at = number % len(self.streams)
        stream, end = self.streams[at]
        if stream is None or (at not in self.open and len(self.open) == 3):
            return
        chunk = None
        try:
            chunk = self.portal.call(self.act, stream, how)
            assert chunk or how == "close" or (end, stream.complete) == (None, True)
        except APIError as error:
            assert type(error) is end
        if chunk is None and how != "close":
            self.over.add(at)
        elif how in ("with", "close") and not stream.complete and at not in self.over:
            self.streams[at][1] = Truncated
        self.open.discard(at)
        self.open |= {at} if chunk and how != "with" else set()
        assert not stream.complete or (end, stream.completion.text) == (None, "Hello")

    async def act(self, stream, how):
        if how == "close":
            return await stream.aclose()
        async with stream if how == "with" else contextlib.nullcontext():
            if how == "loop":
                async for chunk in stream:
                    return chunk
            return await anext(stream.text() if how == "text" else stream, None)

    @precondition(lambda self: self.streams)
    @rule(number=PLACES)
    def drop(self, number):
        at = number % len(self.streams)
        self.portal.call(self.streams[at].__setitem__, 0, None)
        self.open.discard(at)

    def teardown(self):
        """Nothing is left open: three new streams have their connections at once."""
        for at in range(len(self.streams)):
            self.use(at, "close")
        for _ in range(3):
            self.ask("slow")
            self.use(-1, "next")
        assert len(self.open) == 3
        self.exit.close()
        for _ in range(self.server.connections):
            assert self.server.left.acquire(timeout=5)


def test_streams_over_few_connections(chat, anyio_backend):
    machine = functools.partial(Streams, chat, anyio_backend)
    run_state_machine_as_test(machine, settings=examples(0.2))


# ------------------------------------------------------------------------------------
# HTTP/2 and TLS
# ------------------------------------------------------------------------------------


class Http2Server(Server):
    """Calls `handle(connection, stream)` of h2 for each request."""

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


def over_http2(*parts, end):
    def handle(h2, stream):
        h2.send_headers(stream, [(":status", "200"), ("content-type", "x/y")])
        h2.send_data(stream, b"".join(parts), end_stream=end)

    return handle


@pytest.fixture
def http2():
    needs("h2")
    return {"http1": False, "http2": True}


async def test_http2_streams_share_a_connection(chat, http2):
    with Http2Server(over_http2(*HELLO, end=True)) as server:
        async with own_client(chat, **http2) as own:
            options = {"base_url": server.url, "client": own}
            left, other = (chat.stream("hi", **options) for _ in range(2))
            assert (await anext(left)).text == (await anext(other)).text == "Hel"
            await left.aclose()
            assert (await take(other)).text == "lo"
            assert (await ask(chat, **options)).text == "Hello"
        assert server.connections == 1


@pytest.mark.parametrize("retries", [0, 2])
async def test_http2_streams_that_are_reset_are_asked_for_boundedly(
    chat, http2, waits, retries
):
    with Http2Server(lambda h2, stream: h2.reset_stream(stream)) as server:
        async with own_client(chat, **http2) as own:
            options = {"client": own, "max_retries": retries}
            assert type((await ask(chat, server.url, **options)).error) is Unreachable
            assert len(server.heads) <= retries + 2


@pytest.mark.parametrize("left", [True, False], ids=["left", "open"])
async def test_a_hundred_http2_streams_do_not_make_the_next_spin(chat, http2, left):
    if chat is SYNC and not left:
        pytest.skip("httpx waits for a place without end")
    with Http2Server(over_http2(*SAID, end=False)) as server:
        async with own_client(chat, **http2) as own:
            options = {"base_url": server.url, "client": own}
            kept = [chat.stream("hi", **options) for _ in range(100)]
            for stream in kept:
                assert (await anext(stream)).text == "Hel"
                if left:
                    await stream.aclose()
            spent = time.process_time()
            answer = await ask(chat, **options, timeout=1, first_token_timeout=1)
            assert time.process_time() - spent < 1
            assert type(answer.error) in (Truncated, Timeout, Unreachable)
            assert len(server.heads) <= 100 + 4
            for stream in kept:
                await stream.aclose()


@pytest.fixture
def tls():
    """What a server speaks over, and what a client trusts that trusts it."""
    authority = needs("trustme").CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return functools.partial(server.wrap_socket, server_side=True), client


async def test_tls(chat, tls):
    """The life of a stream is the same; who is not trusted is not asked."""
    wrap, trusting = tls
    said = play(HEAD, SAID, GONE)
    with serve(in_turn(GOOD, said, said, play(HEAD, ALIVE)), wrap) as server:
        options = {"base_url": server.url.replace("http:", "https:")}
        error = (await ask(chat, **options, max_retries=0)).error
        assert type(error) is Unreachable
        assert "certificate" in str(error).lower()
        async with own_client(chat, verify=trusting, limits=ONE) as own:
            options["client"] = own
            assert (await ask(chat, **options)).text == "Hello"
            kept = await leave("close", lambda: chat.stream("hi", **options))
            answer = await taken_until_closed(chat, chat.stream("hi", **options))
            assert (type(answer.error), answer.text) == (Truncated, "Hello")
            answer = await ask(chat, **options, first_token_timeout=0.3)
            assert type(answer.error) is Timeout
            assert (kept.completion.text, len(server.heads)) == ("Hel", 4)


# ------------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------------

KEY = CANARY.encode()
ECHO = json.dumps({"error": {"message": f"bad key {CANARY}", "code": CANARY}}).encode()
SPELT = b"".join(b"\\u%04x" % byte for byte in KEY)
ANSWERS = {
    "status": refuse(401, body=ECHO),
    "status in text": refuse(401, body=ECHO[15:]),
    "reason": http(status=f"401 bad {CANARY}"),
    "redirect": refuse(307, f"Location: http://127.0.0.1:9/{CANARY}?k={CANARY}"),
    "header": refuse(401, f"X-Key: {CANARY}"),
    "escaped": refuse(401, body=ECHO.replace(b"/", rb"\/")),
    "spelt": refuse(401, body=ECHO.replace(KEY, SPELT)),
    "content type": http(b"<p>", kind=f"text/html; {CANARY}"),
    "no HTTP": KEY + b"\r\n\r\n",
    "no header": HEAD[:-2] + KEY + b"\r\n\r\n",
    "no length": HEAD[:-2] + b"Content-Length: " + KEY + b"\r\n\r\n",
    "no chunk": HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + KEY,
    "cut": chunked(*SAID, end=False),
    "timeout": play(HEAD, GONE),
    "too large": chunked(b"data: " + KEY * 1000),
    **{f"{n} before": chunked(b"data: " + b"x" * n + KEY) for n in range(184, 200, 4)},
}  # fmt: skip
SECRETS = {  # of the URL, of the call, of the caller's own client
    "key": ("{}", {"api_key": f" {CANARY}\n"}, {}),
    "header": ("{}", {"headers": {"X-API-Key": CANARY}}, {}),
    "cookie": ("{}", {"headers": {"Cookie": f"session={CANARY}"}}, {}),
    "client's": ("{}", {}, {"headers": {"x-secret": CANARY}}),
    "client's key": ("{}", {}, {"headers": {"Authorization": f"Bearer {CANARY}"}}),
    "query": (f"{{}}?key={CANARY}", {}, {}),
    "password": (f"user:{CANARY.replace('/', '%2F')}@{{}}", {}, {}),
}  # fmt: skip


def everything(error):
    """All that a log may show of an error."""
    shown = [str(error), repr(vars(error)), repr(vars(pickled(error)))]
    shown += [*traceback.format_exception(error), repr(pickle.dumps(error))]
    return "".join(shown).replace("\\", "")


@all_bodies
def test_the_key_is_in_no_error(body):
    with serve(framed("chunked", body.data, kind=body.kind)) as server:
        error = ask_sync(server.url, api_key=CANARY, **body.options).error
    assert type(error) is (body.error or NoneType)
    assert error is None or CANARY not in everything(error)


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
async def test_no_secret_is_in_any_error(chat, secret, answer):
    url, options, own = secret
    options = options | {"max_retries": 0, "max_event_bytes": 9000, "timeout": 0.3}
    with serve(answer) as server:
        url = "http://" + url.format(server.url.removeprefix("http://"))
        async with own_client(chat, **own) as client:
            options |= {"client": client} if own else {}
            error = (await ask(chat, url, **options)).error
            assert CANARY[:9] not in everything(error)
            assert "user:" not in everything(error)
    login = base64.b64encode(f"user:{CANARY}".encode()).decode()
    assert CANARY in server.heads[0] or login in server.heads[0]


@pytest.mark.parametrize(
    ("key", "said", "shown"),
    [
        ('sk-"canary"\\/7', 'bad sk-"canary"\\/7!', r"bad [^7]+!"),  # parsed, then cut
        ("null", "null", "null"),  # what is short is no secret
        ("message", "the message", "the message"),
    ],
)
async def test_taking_keys_out_garbles_no_error(chat, key, said, shown):
    body = json.dumps({"error": {"message": said, "code": None, "type": "null"}})
    with serve(refuse(401, body=body.encode())) as server:
        error = (await ask(chat, server.url, api_key=key)).error
    assert re.fullmatch(shown, error.message)
    assert (error.code, error.type) == (None, "null")
    assert "canary" not in everything(error)


async def test_no_secret_is_in_a_repr(chat):
    url = closed_port().replace("//", "//user:pass-canary@")
    async with chat.client(base_url=url, api_key=CANARY, max_retries=0) as client:
        stream = client.stream("hi")
        error = (await take(stream)).error
        assert "canary" not in everything(error) + repr(client) + repr(stream)


def test_which_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-env\n")
    basic = "Basic " + base64.b64encode(b"us@er:p:w").decode()
    headers = {"Authorization": "Bearer sk-own"}
    with serve(GOOD) as server, httpx.Client(headers=headers) as own:
        for options, sent in (
            ({}, ["Bearer sk-env"]),
            ({"api_key": "sk-arg"}, ["Bearer sk-arg"]),
            ({"api_key": ""}, []),
            ({"base_url": server.url.replace("//", "//us%40er:p%3Aw@")}, [basic]),
            ({"headers": {"Authorization": " Bearer sk-head\n"}}, ["Bearer sk-head"]),
            ({"client": own}, ["Bearer sk-own"]),
        ):
            ask_sync(**{"base_url": server.url} | options)
            assert re.findall("(?i)authorization: (.*)\r", server.heads[-1]) == sent


# ------------------------------------------------------------------------------------
# The request
# ------------------------------------------------------------------------------------


async def request_of(chat, **options):
    """Return the request that httpx would send."""
    seen = []

    def answer(request):
        seen.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b"".join(HELLO)))

    async with own_client(chat, transport=httpx.MockTransport(answer)) as own:
        assert (await ask(chat, client=own, **options)).text == "Hello"
    return seen[0]


OLLAMA = "http://localhost:11434/v1/"
ASKED = {  # base URL: where "chat/completions" is put
    None: OLLAMA, " ": OLLAMA, "http://h:8": "http://h:8/v1/", "http://h/": "http://h/v1/",
    "h/v1": "http://h/v1/", "localhost:8080": "http://localhost:8080/v1/",
    "192.168.1.5/v1/": "http://192.168.1.5/v1/", "[::1]:81/v1": "http://[::1]:81/v1/",
    "api.x.com": "https://api.x.com/v1/", "a.b/@acme/v1": "https://a.b/@acme/v1/",
    "a.b:8/v1?a=b.c/d@e": "https://a.b:8/v1/?a=b.c/d@e", "http://h/v1//": "http://h/v1/",
    "http://h/v1/chat/completions/": "http://h/v1/", "http://h?a=b": "http://h/v1/?a=b",
    "HTTP://h/api/v3#top": "http://h/api/v3/", "  http://h/v1 \t\r\n": "http://h/v1/",
    "https://h/d?v=1&x=%20": "https://h/d/?v=1&x=%20",
    "https://h/d/chat/completions?v=1": "https://h/d/?v=1",
}  # fmt: skip


@pytest.mark.parametrize("base_url", ASKED)
async def test_base_urls(chat, monkeypatch, base_url):
    url = re.sub(r"/(?=\?|$)", "/chat/completions", ASKED[base_url], count=1)
    request = await request_of(chat, base_url=base_url)
    assert (request.method, str(request.url)) == ("POST", url)
    monkeypatch.setenv("OPENAI_BASE_URL", base_url or "")
    assert str((await request_of(chat)).url) == url


async def test_what_is_sent(chat, monkeypatch):
    said = ChatCompletion.from_dict(WHOLE).choices[0].message
    hi, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "S"}
    talk = [{"role": "user", "content": "你好"}, said, hi | {"content": "\ud83d"}]
    sent = [talk[0], MESSAGE, talk[2]]
    params = {"temperature": 0.5, "top_p": None, "stop": ["x"]}
    with serve(GOOD) as server:
        await ask(chat, server.url, model="m", system="S", **params)
        await ask(chat, server.url, messages=talk)
        monkeypatch.setenv("OPENAI_MODEL", "of-env")
        await ask(chat, server.url, "generate", messages=tuple(talk), system="S")
        await ask(chat, server.url, headers={"User-Agent": "mine", "X-A": "b"})
    bodies = [json.loads(body) for body in server.bodies]
    named, sampling = (
        {"model": "m", "stream": True},
        {"temperature": 0.5, "stop": ["x"]},
    )
    assert bodies[0] == {"messages": [system, hi]} | named | sampling
    assert bodies[1] == {"messages": sent, "stream": True}
    assert bodies[2]["messages"] == [system, *sent]
    assert (bodies[2]["model"], bodies[2]["stream"]) == ("of-env", False)
    assert server.heads[0].startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    head = server.heads[-1].lower()
    for header in ("user-agent: mine", "x-a: b", "content-type: application/json"):
        assert head.count(f"{header}\r\n") == 1
    accepted = [re.findall("(?im)^accept: (.*)\r$", head) for head in server.heads]
    assert accepted[1:3] == [["text/event-stream"], ["application/json"]]


URLS = ["ftp://h/v1", "http://", "http://[::1", "http://h:99999", "http://h:x", "://"]
KEYS = ("sk\n-canary", "sk-cänary", "sk-canary\0", "sk-c\u2028nary")
ODD = (math.nan, 0, -1, -math.inf)
OPENAI = {"http_client": "client", "extra_body": "keyword", "extra_query": "base_url"}
OPENAI |= dict.fromkeys(("extra_headers", "default_headers", "organization"), "headers")
WRONG = [  # options, the error, and what it says
    *(({"base_url": url}, ValueError, "http://localhost:11434/v1") for url in URLS),
    *(({"api_key": key}, ValueError, "key") for key in KEYS),
    *(({"headers": {"Authorization": key}}, ValueError, "key") for key in KEYS),
    *(({"headers": odd}, ValueError, "header") for odd in ({"X": "\0"}, {"X\0": ""})),
    ({"headers": {"X": 5}}, TypeError, "X"),
    *(({"timeout": seconds}, ValueError, "timeout") for seconds in ODD),
    *(({"first_token_timeout": seconds}, ValueError, "first_token") for seconds in ODD),
    ({"timeout": "5"}, TypeError, "timeout"),
    ({"stream": False}, TypeError, "stream_chat"),
    ({"temperature": math.nan}, ValueError, "JSON"),
    ({"tools": [{1, 2}]}, TypeError, "set"),
    *(({name: "x"}, TypeError, f"{name}.*{ours}") for name, ours in OPENAI.items()),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "says"), WRONG)
async def test_what_cannot_be_asked(chat, options, error, says):
    wrong_kind = httpx.AsyncClient() if chat is SYNC else httpx.Client()
    for make in (functools.partial(chat.stream, "hi"), chat.client):
        with pytest.raises(error, match=says) as told:
            make(**options)
        assert "nary" not in str(told.value)
        with pytest.raises(TypeError, match="Client"):
            make(client=wrong_kind)
    for wrong in (None, 5, {"role": "user"}, b"hi"):
        with pytest.raises(TypeError, match="messages"):
            chat.stream(wrong)


async def test_a_client_passes_its_options_on(chat):
    options = {"api_key": "sk-a", "model": "m", "system": "S", "temperature": 0}
    options["headers"] = {"X-A": "b", "X-C": "d"}
    with serve(GOOD_KEPT) as server:
        async with chat.client(base_url=server.url, **options) as client:
            await take(client.stream("hi"))
            own = {"model": "other", "system": "T", "seed": 1, "temperature": None}
            await client.generate("hi", headers={"x-c": "e"}, **own)
            for option in ("base_url", "api_key", "client"):
                with pytest.raises(TypeError, match=option):
                    client.stream("hi", **{option: None})
    first, second = map(json.loads, server.bodies)
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert first == {"model": "m", "messages": system, "stream": True, "temperature": 0}
    assert (second["model"], second["messages"][0]["content"]) == ("other", "T")
    assert (second["seed"], "temperature" in second) == (1, False)
    heads = [head.lower() for head in server.heads]
    assert [head.count("x-a: b\r\n") for head in heads] == [1, 1]
    assert [re.findall("x-c: (.)\r", head) for head in heads] == [["d"], ["e"]]
    assert all("bearer sk-a\r\n" in head for head in heads)


async def test_a_socks_proxy_without_its_package(chat, monkeypatch):
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    error = (await ask(chat, "http://localhost:9", max_retries=0)).error
    assert type(error) is Unreachable
    assert "socks" in str(error)
    assert "\n" not in str(error)


# ------------------------------------------------------------------------------------
# Threads, processes, memory; httpx and httpx2
# ------------------------------------------------------------------------------------


def test_threads_over_one_client_do_not_mix():
    def handle(connection, number):
        name = json.loads(server.bodies[number - 1])["messages"][0]["content"]
        body = chunked(*[event(name)] * 40, event(finish="stop"), DONE)
        return play(body[:3000], 0.001, body[3000:], KEEP)(connection, number)

    def one(name):
        next(client.stream(name))
        return finished(take(Sync(client.stream(name)))).text

    with (
        serve(handle) as server,
        sse_chat.ChatClient(base_url=server.url) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        names = [f"<{number}>" for number in range(64)]
        assert list(pool.map(one, names)) == [name * 40 for name in names]


def test_answers_and_errors_cross_a_process_pool():
    answers = (http(JSON), refuse(429, "Retry-After: 90"), chunked(*SAID, end=False))
    spawn = multiprocessing.get_context("spawn")
    with (
        serve(in_turn(*answers)) as server,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        whole, refused, cut_off = (
            pool.submit(sse_chat.generate, "hi", base_url=server.url) for _ in range(3)
        )
        assert whole.result() == ChatCompletion.from_dict(WHOLE)
        error = refused.exception()
        assert (type(error), error.status_code, error.retry_after) == (Status, 429, 90)
        assert error.response.json() == {"error": "boom"}
        assert type(cut_off.exception()) is Truncated
        assert cut_off.exception().completion.text == "Hello"


def test_a_long_stream_takes_the_memory_of_its_text():
    block = event("four") * 500
    steps = (HEAD, itertools.repeat(block, 100), HELLO)
    with serve(play(*steps)) as server, memory(3e6):
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        for _ in stream:
            pass
        assert len(stream.completion.text) == 4 * 500 * 100 + 5


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
async def test_a_client_of_ones_own(chat, name, monkeypatch):
    module = needs(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")  # the client has its own
    broken, slow = chunked(*SAID, end=False), play(HEAD, ENDLESS)
    headers = {"Authorization": "Bearer sk-own"}
    async with own_client(chat, module, headers=headers) as own:
        with serve(in_turn(GOOD, broken, refuse(400), slow, b"")) as server:
            options = {"base_url": server.url, "client": own, "max_retries": 0}
            options["timeout"] = module.Timeout(5)
            assert (await ask(chat, **options)).text == "Hello"
            error = (await ask(chat, **options)).error
            assert type(error) is Truncated
            assert type(error.__cause__).__module__.startswith(name)
            error = (await ask(chat, **options)).error
            assert (type(error), type(error.response)) == (Status, module.Response)
            kept = await leave("close", lambda: chat.stream("hi", **options))
            assert set(kept.completion.text) == {"x"}
            assert type((await ask(chat, **options)).error) is Unreachable
            assert all("Bearer sk-own" in head for head in server.heads)


BLOCKED = (
    'import sys; sys.modules["httpx"] = None; import pytest; sys.exit(pytest.main())'
)


def test_the_core_under_httpx2_alone():
    needs("httpx2")
    names = "how_an_answer_ends or any_shape or own or who or dead or leaves"
    options = ["-qx", "-o", "addopts=", "-o", "markers=live: x\ninstall: x"]
    options += ["-k", names, __file__]
    command = [sys.executable, "-c", BLOCKED, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d\d passed", done.stdout)


# ------------------------------------------------------------------------------------
# A real server
# ------------------------------------------------------------------------------------

LIVE = os.environ.get("SSE_CHAT_LIVE_URL", "")


@pytest.fixture
async def live(chat):
    if not LIVE:
        pytest.skip("SSE_CHAT_LIVE_URL is not set")
    async with chat.client(base_url=LIVE, max_retries=0) as client:
        yield client


@pytest.mark.live
async def test_live_answers(live):
    options = {"max_tokens": 24, "stream_options": {"include_usage": True}}
    answer = await take(live.stream("Say hello. 你好", **options))
    assert (answer.error, len(answer.chunks) > 2) == (None, True)
    whole = await live.generate("Say hello. 你好", max_tokens=24)
    for completion in (answer.completion, whole):
        usage = completion.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0
        assert completion.choices[0].finish_reason in ("stop", "length")
        assert completion.text
    for _ in range(5):
        async for _ in live.stream("Count to 500.", max_tokens=400):
            break
        assert (
            await take(live.stream("hi", max_tokens=4, logprobs=True))
        ).error is None
    assert await live.models()
    error = (await take(live.stream([{"role": "user"}], max_tokens="many"))).error
    assert 400 <= error.status_code < 600
    assert ask_sync(LIVE.rstrip("/") + "/nope").error.status_code == 404


@pytest.mark.live
def test_two_live_choices_cut_anywhere():
    """Recorded, and cut after each byte: never whole before both have finished."""
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 1}
    url = f"{LIVE.rstrip('/')}/chat/completions"
    recorded = httpx.post(url, json=body | {"stream": True}, timeout=60).content
    ends = [m.end() for m in re.finditer(rb'"finish_reason": *"\w+"', recorded)]
    for at in range(ends[1]):
        with serve(http(recorded[:at])) as server:
            assert ask_sync(server.url, n=2).error is not None


# ------------------------------------------------------------------------------------
# The program in pipes
# ------------------------------------------------------------------------------------

PROGRAM = str(Path(sse_chat.__file__))
STEERING = re.compile("OPENAI_.*|OLLAMA_HOST|NO_COLOR|PYTHONUNBUFFERED")
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens there
PATIENCE = 20  # seconds, for a slow machine

# A shell that runs the tests in the background has SIGINT ignored, in children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(**given: str) -> dict[str, str]:
    """Our own, without what would steer the program."""
    return {k: v for k, v in os.environ.items() if not STEERING.fullmatch(k)} | given


@contextlib.contextmanager
def started(*args: Any, wrap: Any = (), **options: Any) -> Iterator[Any]:
    """The program while it runs, in pipes; `wrap` is what to run it with."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = pipes | {"env": environment()} | options
    command = [*wrap, sys.executable, PROGRAM, *args]
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def run(*args: Any, stdin: bytes = b"", **options: Any) -> tuple[int, bytes, bytes]:
    """Run it; give the exit code, stdout and stderr."""
    with started(*args, **options) as process:
        out, err = process.communicate(stdin, timeout=PATIENCE)
        return process.returncode, out, err


@pytest.fixture
def cli(monkeypatch, capsys):
    """`run` inside this process, which is quicker; its outputs are str."""
    for name in filter(STEERING.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between retries

    def call(*args: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            for name, value in env.items():
                patch.setenv(name, value)
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
    return json_response({"object": "list", "data": [{"id": id} for id in ids]})


def refused(message: str) -> bytes:
    return json_response({"error": {"message": message}}, "400 Bad Request")


def asked(server: Server, number: int = -1) -> list[tuple[str, str]]:
    """The messages of a request, as (role, content)."""
    messages = json.loads(server.bodies[number])["messages"]
    return [(message["role"], message["content"]) for message in messages]


END = (event(finish="stop"), DONE)
THOUGHTS = (event(reasoning="Let me "), event(reasoning="see."), event("<thi"))
THOUGHTFUL = (*THOUGHTS, event("nk>and think</think>Hel"), event("lo"), *END)
CUT = (event("Hel"), event("lo"))
FULL = http(*CUT, event(finish="length"), DONE)
FILTERED = http(*CUT, event(finish="content_filter"), DONE)
REPLY = {"role": "assistant", "content": "<think>hm</think>Hello"}
SPENT = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
PIECE = {"id": "c", "object": "chat.completion", "created": 1, "model": "m"}
PIECE["choices"] = [{"index": 0, "message": REPLY, "finish_reason": "stop"}]
PIECE["usage"] = SPENT


def said(*pieces: str | None, **delta: Any) -> bytes:
    return http(*(event(piece, **delta) for piece in pieces), *END)


def silent(connection: socket.socket, number: int) -> None:
    connection.sendall(chunked(*CUT, end=False))
    connection.recv(1)


BETWEEN = http(CUT[0], THOUGHTS[1], CUT[1], DONE)
TAG = "strip <think> tags, then return. Done."
SPACED = " \n<think>\nhm\n</think>\n\n  Hello\n"

# The answer; exit code and standard output; the reasoning and the words of ours that
# are on standard error, the first of those as a regular expression.
ANSWERS = {
    "whole": (http(*HELLO), 0, "Hello\n", "", ""),
    "in one piece": (json_response(PIECE), 0, "Hello\n", "hm\n", ""),
    "thinking": (http(*THOUGHTFUL), 0, "Hello\n", "Let me see.and think\n", ""),
    "thinking alone": (said(None, reasoning="hm"), 0, "", "hm\n", ""),
    "thinking between": (BETWEEN, 0, "Hello\n", "see.\n", ""),
    "white space": (said(SPACED), 0, "  Hello\n", "\nhm\n", ""),
    "a tag in the text": (said(TAG), 0, TAG + "\n", "", ""),
    "lines kept": (said("\n\n", " Hi", "\n\n"), 0, "\n\n Hi\n\n", "", ""),
    "half characters": (said("\ud83d", "\ude42 \ud83d"), 0, "🙂 �\n", "", ""),
    "a refusal": (said(None, refusal="No."), 0, "No.\n", "", ""),
    "refused": (refused("no \x07such thing"), 1, "", "", r"no \\x07such thing\n"),
    "broke": (http(*CUT, b'data: {"error": "oh"}\n\n'), 1, "Hello\n", "", "oh\n"),
    "hung up": (b"", 1, "", "", ".*broke[^\\n]*\\n.*127.0.0.1"),
    "HTML": (http(b"<html>", kind="text/html"), 1, "", "", ".*text/html"),
    "torn": (chunked(*CUT, end=False), 3, "Hello\n", "", ".*cut off"),
    "unfinished": (http(*CUT), 3, "Hello\n", "", ".*cut off"),
    "torn JSON": (json_response(PIECE)[:-20], 3, "", "", ".*cut off"),
    "torn in a tag": (http(event("<thi")), 3, "<thi\n", "", ".*cut off"),
    "silent": (silent, 3, "Hello\n", "", "."),
    "full": (FULL, 3, "Hello\n", "", ".*stopped at the token limit\n"),
    "filtered": (FILTERED, 3, "Hello\n", "", ".*stopped at a content filter\n"),
}


@pytest.mark.parametrize("how", ["", "--no-stream", "--hide-reasoning", "--json"])
@pytest.mark.parametrize("name", ANSWERS)
def test_answer(cli, name, how):
    answer, code, text, reasoning, told = ANSWERS[name]
    timeout = ["--timeout", "0.3"] if answer is silent else []
    with serve(answer) as server:
        got, out, err = cli(*to(server), *timeout, *how.split(), "hi")
    if how == "--json":  # what came stays printed, as it came
        chunks = map(ChatCompletionChunk.from_dict, map(json.loads, out.splitlines()))
        assert text.strip() in accumulate(chunks).text or name == "a refusal"
    else:
        assert out == text
    assert got == code
    # What was said comes first, what to do may come in a second line.
    told = rf"sse_chat: {told}[^\n]*\n?([^\n]+\n)?" if told else ""
    shown = how in ("", "--no-stream")
    assert re.fullmatch(re.escape(reasoning * shown) + told, err)


# Arguments and standard input; the exit code, and what standard error says.
UNASKED = [
    ("hi --nothing", b"", 2, "--nothing"),
    ("hi --api-key sk", b"", 2, "--api-key"),
    ("hi -o temperature", b"", 2, "-o wants KEY=VALUE"),
    ("hi -o =1", b"", 2, "-o wants KEY=VALUE"),
    ("hi -o api_key=sk", b"", 2, "api_key"),
    ("hi --timeout soon", b"", 2, "--timeout"),
    ("hi --timeout 0", b"", 2, "timeout"),
    ("hi -u http://host:port/v1", b"", 2, "http://"),
    ("-", b"\xff\xfe\x00", 2, "UTF-8"),
    ("-", b"a\xe9", 2, "UTF-8"),
    ("-", b"", 2, "no prompt"),
    ("hi", b"", 1, f"cannot connect.*\n.*{NOBODY}.*ollama serve.*--base-url.*--demo"),
]


@pytest.mark.parametrize(("args", "stdin", "code", "told"), UNASKED)
def test_what_cannot_be_asked_is_told(cli, args, stdin, code, told):
    got, out, err = cli("-m", "m", "-u", NOBODY, *args.split(), stdin=stdin)
    assert (got, out) == (code, "")
    assert re.search(told, err)


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        ("sum up", "a\nb 你好\n", "a\nb 你好\n\nsum up"),
        ("-", "from the pipe\n", "from the pipe"),
        ("", "from the pipe\n", "from the pipe"),
        ("why --usage is it - so", "", "why is it - so"),
        ("sum up", "-\n", "-\n\nsum up"),
    ],
)
def test_stdin_before_the_words(cli, words, stdin, prompt):
    with serve(http(*HELLO)) as server:
        code, out, _ = cli(*to(server), *words.split(), stdin=stdin.encode())
        assert (code, out, asked(server)) == (0, "Hello\n", [("user", prompt)])


def test_each_chunk_is_flushed_and_a_closed_pipe_is_quiet():
    seen = threading.Event()

    def handle(connection, number):
        connection.sendall(chunked(event("one\n"), end=False))
        assert seen.wait(PATIENCE)
        for _ in range(5000):
            connection.sendall(b"%x\r\n%s\r\n" % (len(CUT[0]), CUT[0]))

    with serve(handle) as server, started(*to(server), "-") as process:
        process.stdin.write(b"hi")
        process.stdin.close()
        assert process.stdout.readline() == b"one\n"  # before more was sent
        process.stdout.close()
        seen.set()
        assert process.stderr.read() == b""


DISK_FULL = b"sse_chat: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("redirect", "option", "expected"),
    [
        ("", "--no-stream", (0, b"Hello\n", b"hm\n")),
        ("2>&-", "--no-stream", (0, b"Hello\n", b"")),
        ("<&-", "--no-stream", (0, b"Hello\n", b"hm\n")),
        (">&-", "--no-stream", (1, b"", b"sse_chat: standard output is closed\n")),
        (">/dev/full", "--hide-reasoning", (1, b"", DISK_FULL)),
        (">/dev/full", "--help", (1, b"", DISK_FULL)),
        ("| true", "--dry-run", (0, b"", b"")),  # closed before there is output
        ("| true", "--list-models", (0, b"", b"")),
    ],
)
def test_closed_and_full_outputs(redirect, option, expected):
    wrap = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    with serve(json_response(PIECE | {"data": [{"id": "m"}]})) as server:
        assert run(*to(server), option, "hi", wrap=wrap) == expected


ASCII = ("PYTHONIOENCODING=ascii", "LC_ALL=C", "LC_ALL=C PYTHONUTF8=0")


@pytest.mark.parametrize("env", ASCII)
def test_output_that_is_not_utf_8_never_crashes(env):
    env = environment(PYTHONCOERCECLOCALE="0", **dict(re.findall(r"(\S+)=(\S+)", env)))
    strange = (event(reasoning="嗯"), event("你好 🙂 end"), *END)
    with serve(http(*strange)) as server:
        args = to(server, "呢")  # the argument, too
        code, out, err = run(*args, stdin="吗".encode(), env=env)
        assert asked(server)[0][1].startswith("吗")
    assert (code, out[-5:], b"Traceback" in err) == (0, b" end\n", False)


@pytest.mark.parametrize("how", ["", "--json", "--no-stream"])
def test_ctrl_c_is_130(how):
    came, left = threading.Event(), threading.Event()

    def handle(connection, number):
        if how != "--no-stream":
            connection.sendall(chunked(event("Hel\n"), end=False))
        came.set()
        if not connection.recv(1):  # the client hangs up
            left.set()

    with serve(handle) as server:
        args = to(server, *how.split(), "hi")
        with started(*args, stdin=subprocess.DEVNULL) as process:
            assert came.wait(PATIENCE)
            assert how == "--no-stream" or b"Hel" in process.stdout.readline()
            time.sleep(0.2)  # until it waits
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=PATIENCE)[1]
        assert (process.returncode, b"Traceback" in err) == (130, False)
        assert left.wait(PATIENCE)


# ------------------------------------------------------------------------------------
# Options, environment, start-up
# ------------------------------------------------------------------------------------


def test_options_are_in_the_request(cli):
    options = ["-o", "temperature=0.2", "-o", 'stop=["\\n"]', "-o", "user=a b=c"]
    options += ["-o", "deep=" + 9999 * "["]  # what is no JSON is text
    with serve(http(*HELLO)) as server:
        cli(*to(server), "-s", "be brief", *options, "hi")
        cli("--model", "m", "--system", "s", "--base-url", server.url, "hi")
        body = json.loads(server.bodies[0])
        assert asked(server, 0) == [("system", "be brief"), ("user", "hi")]
        assert asked(server, 1) == [("system", "s"), ("user", "hi")]
    assert (body["model"], body["stream"], body["deep"][-1]) == ("m", True, "[")
    assert (body["temperature"], body["stop"], body["user"]) == (0.2, ["\n"], "a b=c")


def test_json_is_what_the_server_sent(cli):
    strange = json.loads(event("\u2028🙂")[6:]) | {"timings": {"n": 1}}
    answer = http(b"data: %s\n\n" % json.dumps(strange).encode(), *HELLO)
    with serve(answer) as server:
        lines = cli(*to(server), "--json", "hi")[1].rstrip("\n").split("\n")
    sent = [strange, *(json.loads(data[6:]) for data in HELLO[:-1])]
    assert [json.loads(line) for line in lines] == sent
    with serve(json_response(PIECE)) as server:
        assert json.loads(cli(*to(server), "--no-stream", "--json", "hi")[1]) == PIECE
        told = cli(*to(server), "--no-stream", "--usage", "hi")[2]
        assert "stream_options" not in json.loads(server.bodies[-1])
    assert re.fullmatch(r"hm\nsse_chat: m: 3 \+ 5 tokens, .* s\n", told)


def using(prompt: Any, completion: Any) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return b'data: {"choices": [], "usage": %s}\n\n' % json.dumps(usage).encode()


@pytest.mark.parametrize(("tokens", "pause"), [(1, 0.2), (2, 0.2), (3, 0.2), (5, 0)])
def test_usage(cli, tokens, pause):
    def handle(connection, number):
        pieces = [*[event("x")] * tokens, using(7, tokens), *END]
        connection.sendall(http(*pieces)[: -sum(map(len, pieces))])
        for piece in pieces if pause else [b"".join(pieces)]:
            connection.sendall(piece)
            threading.Event().wait(pause)

    with serve(handle) as server:
        code, out, err = cli(*to(server), "--usage", "hi")
        assert json.loads(server.bodies[0])["stream_options"]["include_usage"] is True
    times = r"first token after \d+\.\d\d s, all after \d+\.\d\d s(, (.*) tokens/s)?"
    told = re.fullmatch(rf"sse_chat: m: 7 \+ {tokens} tokens, {times}\n", err)
    assert (code, out) == (0, tokens * "x" + "\n")
    # Between the first and the last: a lone token has no speed, nor has a burst.
    assert bool(told[1]) == (tokens > 1 and pause > 0)
    assert not told[1] or 2 < float(told[2]) < 10


STRANGE = ["\x1b[31m", "abc", True, 1.5, [], {}, -1, 10**400]


@pytest.mark.parametrize("sent", STRANGE, ids=ascii)
def test_usage_that_is_no_number_is_left_out(cli, sent):
    for usage in (using(sent, 5), using(5, sent)):
        with serve(http(*HELLO[:-1], usage, DONE)) as server:
            code, out, err = cli(*to(server), "--usage", "hi")
        assert (code, out) == (0, "Hello\n")
        assert re.fullmatch(r"sse_chat: m: first token after .* s, all .* s\n", err)


@contextlib.contextmanager
def serve_models(*ids: str) -> Iterator[Server]:
    """A server that lists its models, too."""

    def handle(connection, number):
        listing = server.heads[number - 1].startswith("GET /v1/models")
        connection.sendall(listed(*ids) if listing else http(*HELLO))

    with serve(handle) as server:
        yield server


def test_which_model_is_asked(cli):
    with serve_models("first", "second") as server:
        cli(*to(server), "hi", OPENAI_MODEL="of the environment")
        cli("-u", server.url, "hi", OPENAI_MODEL="of the environment")
        assert cli("-u", server.url, "hi") == (0, "Hello\n", "")
        models = [json.loads(body)["model"] for body in server.bodies if body]
        assert models == ["m", "of the environment", "first"]
        assert cli("-u", server.url, "--list-models") == (0, "first\nsecond\n", "")


@pytest.mark.parametrize("name", ["refused", "HTML", "hung up", "in one piece"])
def test_no_list_of_models(cli, name):
    with serve(ANSWERS[name][0]) as server:
        code, out, err = cli("-u", server.url, "--list-models")
        assert (code, out, "models" in err or server.url in err) == (1, "", True)


def asked_url(cli, *args: str, **env: str) -> httpx.URL:
    code, out, err = cli("-m", "m", "--dry-run", *args, "hi", **env)
    assert (code, err) == (0, "")
    return httpx.URL(json.JSONDecoder().raw_decode(out)[0]["url"])


HOSTS = """
127.0.0.1              http://127.0.0.1:11434
gpu-box                http://gpu-box:11434
gpu-box:8080           http://gpu-box:8080
:8080                  http://127.0.0.1:8080
0.0.0.0                http://127.0.0.1:11434
0.0.0.0:8080           http://127.0.0.1:8080
http://gpu-box         http://gpu-box:80
http://gpu-box:8080/   http://gpu-box:8080
https://gpu-box        https://gpu-box:443
https://gpu-box/ollama https://gpu-box:443/ollama
gpu-box:8080/ollama/   http://gpu-box:8080/ollama
[::1]:8080             http://[::1]:8080
[::1]                  http://[::1]:11434
::1                    http://[::1]:11434
"127.0.0.1:8080"       http://127.0.0.1:8080
'gpu-box'              http://gpu-box:11434
"""


@pytest.mark.parametrize("row", HOSTS.split("\n")[1:-1])
def test_ollama_host(cli, row):
    host, base = row.split()
    assert asked_url(cli, OLLAMA_HOST=f" {host} ") == base + "/v1/chat/completions"


def test_which_address_wins(cli):
    default = sse_chat.DEFAULT_BASE_URL + "/chat/completions"
    assert asked_url(cli, OLLAMA_HOST="") == default
    env = {"OLLAMA_HOST": "c:3", "OPENAI_BASE_URL": "http://b:2/v1"}
    assert asked_url(cli, **env).host == "b"
    assert asked_url(cli, "-u", "http://a:1/v1", **env).host == "a"


# A login, options, and the variables that the curl line wants.
DRY = [
    ("", "-o stop=' --usage", {"OPENAI_API_KEY": "sk-secret"}),
    ("", "--no-stream -s brief", {}),
    ("me:hush%20hush@", "", {"LOGIN_BASE64": "bWU6aHVzaCBodXNo"}),
]
OURS = "post /|accept|authorization|content-type|user-agent"


@pytest.mark.parametrize(("login", "options", "variables"), DRY)
def test_dry_run_is_the_very_request(cli, login, options, variables):
    key = {k: v for k, v in variables.items() if k == "OPENAI_API_KEY"}
    with serve_models("first") as server:
        url = server.url.replace("//", f"//{login}") + "?v=1&api-key=sk-hidden"
        args = ["-u", url, *options.split(), "it's $KEY `你好`"]
        code, out, err = cli("--dry-run", *args, **key)
        assert (code, err, len(server.bodies)) == (0, "", 1)  # which models there are
        assert not re.search("sk-secret|sk-hidden|hush", out)
        assert ("$OPENAI_API_KEY" in out) == bool(key)
        assert cli(*args, **key)[0] == 0
        shown, end = json.JSONDecoder().raw_decode(out)
        assert shown["url"] == server.url + "/chat/completions"
        assert shown["body"] == json.loads(server.bodies[-1])
        if not shutil.which("curl"):
            pytest.skip("there is no curl here")
        env = environment(QUERY="v=1&api-key=sk-hidden", **variables)
        subprocess.run(out[end:], shell=True, env=env, capture_output=True, check=True)
        assert json.loads(server.bodies[-1]) == shown["body"]
        sent, curled = (head.lower().split("\r\n") for head in server.heads[-2:])
    ours = [line for line in sent if re.match(OURS, line)]
    assert (len(ours) > 3, set(ours) - set(curled)) == (True, set())


def test_the_key_comes_from_the_environment_alone(cli):
    with serve(http(*HELLO)) as server:
        cli(*to(server), "hi", OPENAI_API_KEY="sk-secret")
        assert "Bearer sk-secret" in server.heads[0]
    options = re.findall(r"--[\w-]+", cli("--help")[1])
    assert "--model" in options
    assert not [option for option in options if "key" in option]


STARTS = [
    ([PROGRAM, "--version"], f"sse_chat {sse_chat.__version__}"),
    ([PROGRAM, "--help"], "--demo"),
    (["-c", "import sse_chat"], ""),
]


@pytest.mark.parametrize(("args", "out"), STARTS)
def test_start_up_without_httpx(args, out):
    command = [sys.executable, "-X", "importtime", *args]
    options = {"cwd": Path(PROGRAM).parent, "capture_output": True, "text": True}
    done = subprocess.run(command, check=True, **options)
    assert out in done.stdout
    assert re.search(r"\|\s+json\s", done.stderr)
    assert not re.search(r"\|\s+(httpx2?|httpcore2?|ssl|asyncio)\s", done.stderr)


# ------------------------------------------------------------------------------------
# Demo server
# ------------------------------------------------------------------------------------


def demo(params: dict, key: str | None = None, **options: Any) -> tuple[list, dict]:
    """Ask a demo server; return the chunks of a streamed answer, and a whole one."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "blue whales"}]}
    body |= params
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with (
        sse_chat.demo_server(**options) as url,
        httpx.Client(headers=headers) as client,
    ):
        streamed = {"json": body | {"stream": True}}
        with client.stream("POST", url + "/chat/completions", **streamed) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream"
            assert response.headers["transfer-encoding"] == "chunked"
            *events, done = iter_sse(response.iter_raw())
        whole = client.post(url + "/chat/completions", json=body).json()
    assert done.data == "[DONE]"
    return [json.loads(event.data) for event in events], whole


WITH_USAGE = {"stream_options": {"include_usage": True}}


def test_demo_server_speaks_the_wire_format():
    chunks, whole = demo(WITH_USAGE)
    assert whole["object"] == "chat.completion"
    assert "blue whales" in whole["choices"][0]["message"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}

    usage = chunks.pop()
    assert (usage["choices"], usage["usage"] == whole["usage"]) == ([], True)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0}
    first, *middle, last = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"]["role"] == "assistant"
    assert (first["finish_reason"], last["finish_reason"]) == (None, "stop")
    thinking = [bool(choice["delta"].get("reasoning")) for choice in middle]
    assert thinking == sorted(thinking, reverse=True)  # all of the reasoning first
    assert all(c["delta"].get("reasoning") or c["delta"]["content"] for c in middle)
    assert 3 < sum(thinking) < len(middle) - 3  # token by token
    assert whole["usage"]["completion_tokens"] == len(middle)


def test_demo_server_sends_usage_where_it_was_asked_for():
    for params in ({}, {"stream_options": {"include_usage": False}}):
        chunks, whole = demo(params)
        assert not any("usage" in chunk for chunk in chunks)
        assert all(len(chunk["choices"]) == 1 for chunk in chunks)
        assert whole["usage"]["total_tokens"] > 0


def answers(chunks: list[dict], whole: dict) -> list[tuple[str, str]]:
    """Return content and finish_reason of each choice, streamed as in one piece."""
    streamed = accumulate(map(ChatCompletionChunk.from_dict, chunks))
    assert streamed.choices == ChatCompletion.from_dict(whole).choices
    return [(c["message"].get("content"), c["finish_reason"]) for c in whole["choices"]]


def test_demo_server_gives_n_choices():
    chunks, whole = demo({"n": 3} | WITH_USAGE)
    first, *others = answers(chunks, whole)
    assert others == [first, first]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    one = demo({})[1]["usage"]["completion_tokens"]
    assert chunks[-1]["usage"]["completion_tokens"] == one * 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_demo_server_stops_at_the_token_limit(name):
    spent = demo({})[1]["usage"]["completion_tokens"]
    [(text, _)] = answers(*demo({}))
    [(shorter, finish)] = answers(*demo({name: spent - 2}))
    assert text.startswith(shorter)
    assert (len(shorter.split()), finish) == (len(text.split()) - 2, "length")
    assert answers(*demo({name: spent})) == [(text, "stop")]
    assert demo({name: 1})[1]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("stop", ["whales", ["model", "whales", "nowhere"]])
def test_demo_server_stops_at_a_stop_word(stop):
    assert answers(*demo({"stop": stop})) == [("You wrote: blue ", "stop")]


SCHEMA = {
    "type": "object",
    "required": ["city", "days", "exact", "tags", "limit"],
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "limit": {"type": ["integer", "null"]},
        "optional": {"type": "string"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]


def test_demo_server_calls_a_tool_that_must_be_called():
    chunks, whole = demo({"tools": TOOLS, "tool_choice": "required"})
    assert answers(chunks, whole) == [(None, "tool_calls")]
    [call] = whole["choices"][0]["message"]["tool_calls"]
    assert (bool(call["id"]), call["type"]) == (True, "function")
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "weather"
    assert list(arguments) == SCHEMA["required"]
    kinds = [str, int, bool, list, type(None)]  # of more than one type none is chosen
    assert [type(value) for value in arguments.values()] == kinds
    chunks, whole = demo({"tools": TOOLS[1:], "tool_choice": "required"})
    [call] = whole["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_demo_server_answers_in_words_where_no_tool_must_be_called(choice):
    [(text, finish)] = answers(*demo({"tools": TOOLS, "tool_choice": choice}))
    assert ("blue whales" in text, finish) == (True, "stop")


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": ["hi"]}',
        '{"messages": [{"role": "user", "content": "hi"}], "n": "many"}',
        '{"messages": [{"role": "user", "content": "hi"}], "tool_choice": "required"}',
    ],
)
def test_demo_server_refuses_as_openai_does(body):
    with sse_chat.demo_server() as url:
        bad = httpx.post(url + "/chat/completions", content=body)
        lost = httpx.post(url + "/nothing", content=body), httpx.get(url + "/nothing")
    assert [r.status_code for r in (bad, *lost)] == [400, 404, 404]
    for response in (bad, *lost):
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"


def test_demo_server_demands_its_key():
    with sse_chat.demo_server(api_key="sk-right") as url:
        options = {"base_url": url, "model": "demo"}
        for key in (None, "sk-wrong", "sk-right-and-more"):
            with pytest.raises(sse_chat.APIStatusError) as failure:
                sse_chat.generate("hi", api_key=key, **options)
            assert failure.value.status_code == 401
            assert failure.value.type == "invalid_request_error"
        assert httpx.get(url + "/models").status_code == 401
        assert sse_chat.generate("hi", api_key="sk-right", **options).text
    assert demo({}, key="sk-right", api_key="sk-right")[0]


def test_demo_server_with_openai():
    openai = needs("openai")
    with (
        sse_chat.demo_server(api_key="sk-right") as url,
        openai.OpenAI(base_url=url, api_key="sk-right") as client,
    ):
        create = client.chat.completions.create
        ask = {"model": "demo", "messages": [{"role": "user", "content": "whales"}]}
        text = ""
        for chunk in create(stream=True, **ask):  # the commonest loop of all
            text += chunk.choices[0].delta.content or ""
        whole = create(n=2, **ask)
        assert [choice.message.content for choice in whole.choices] == [text, text]
        *_, last = create(stream=True, stream_options={"include_usage": True}, **ask)
        assert last.usage.completion_tokens * 2 == whole.usage.completion_tokens
        called = create(tools=TOOLS, tool_choice="required", **ask).choices[0]
        assert called.message.tool_calls[0].function.name == "weather"
        assert [model.id for model in client.models.list()] == ["demo"]
        with pytest.raises(openai.AuthenticationError, match="key"):
            openai.OpenAI(base_url=url, api_key="sk-wrong").models.list()


def test_demo_server_ends_with_its_context():
    before = set(threading.enumerate())
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.Client() as client:
        with sse_chat.demo_server(delay=0.05) as url:
            client.get(url + "/models")
            asked = client.build_request("POST", url + "/chat/completions", json=body)
            unread = client.send(asked, stream=True)
            started = set(threading.enumerate()) - before
        assert len(started) >= 2
        for thread in started:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert unread.read().endswith(b"data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError):  # no connection was kept
            client.get(url + "/models")


def test_demo_server_for_our_own_calls():
    with sse_chat.demo_server() as url:
        options = {"model": "demo", "base_url": url}
        stream = sse_chat.stream_chat("blue whales", **options)
        text = "".join(stream.text())
        whole = sse_chat.generate("blue whales", **options)
    assert stream.complete
    assert "blue whales" in text
    assert re.search("(?i)no model", text)
    assert whole.choices[0].message.content == text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/models")


def test_demo_option():
    code, out, err = run("--demo", "blue whales", env=environment(OLLAMA_HOST=NOBODY))
    assert (code, b"blue whales" in out, b"o model" in out) == (0, True, True)
    assert err  # its reasoning


def test_demo_goes_through_no_proxy():
    proxies = {"HTTP_PROXY": NOBODY, "ALL_PROXY": "socks5://127.0.0.1:9"}
    code, out, _ = run("--demo", "blue whales", env=environment(**proxies))
    assert (code, b"blue whales" in out) == (0, True)


# ------------------------------------------------------------------------------------
# The program at a terminal
# ------------------------------------------------------------------------------------


class Terminal:
    """The program on a pseudo-terminal of its own, as a person has it.

    `redirect` is the shell's; $0 is the terminal: "<$0 2>$0" leaves stdout a pipe.
    `first` is what the shell does first.
    """

    def __init__(
        self, *args: str, redirect: str = "<$0 >$0 2>$0", first: str = ":", **env: str
    ) -> None:
        self.master, self.slave = os.openpty()
        # The shell leads a session: the first terminal that it opens becomes its own,
        # and Ctrl-C on it a signal.
        command = f'{first}; exec "$@" {redirect}'
        wrap = ["sh", "-c", command, os.ttyname(self.slave)]
        env = environment(TERM="dumb", INPUTRC=os.devnull, **env)
        self.program = started(*args, wrap=wrap, env=env, start_new_session=True)
        self.output = b""
        self.at = 0  # where the next `expect` begins to look

    def __enter__(self) -> Terminal:
        self.process = self.program.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.program.__exit__(*exception)
        os.close(self.master)
        os.close(self.slave)

    def read(self, wait: float = 0.05) -> bytes:
        ready, _, _ = select.select([self.master], [], [], wait)
        got = os.read(self.master, 65536) if ready else b""
        self.output += got
        return got

    def expect(self, text: str) -> str:
        """Wait until `text` is shown; give what was shown before it."""
        wanted, deadline = text.encode(), time.monotonic() + PATIENCE
        while (end := self.output.find(wanted, self.at)) < 0:
            over = self.process.poll() is not None or time.monotonic() > deadline
            assert self.read() or not over, f"no {text!r} in {self.output[self.at :]!r}"
        before, self.at = self.output[self.at : end], end + len(wanted)
        return before.decode()

    def say(self, text: str, prompt: str = ">>> ") -> str:
        """Type a line, wait for the next prompt, give what was shown between them."""
        self.send(text + "\r")
        self.expect("\r\n")
        self.at -= 2
        return self.expect("\r\n" + prompt)

    def send(self, text: str) -> None:
        while text < " " and self.read(0.1):  # a signal while it works could be missed
            pass
        os.write(self.master, text.encode())

    def end(self) -> tuple[int, str]:
        """Wait for the end; give the exit code and all that the terminal showed."""
        deadline = time.monotonic() + PATIENCE
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
        return self.process.returncode, self.output.decode()


def screen(output: str) -> str:
    """What the output leaves on the screen, without colours."""
    lines = []
    for line in re.sub(r"\x1b\[\d+m", "", output).split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines)


EVIL = "a\x1b[31mred\x1b]0;t\x07 \x00\x08\x7f\x9b2J\r\u202eback\u2066\u200f\tb\nc"
TAME = r"a\x1b[31mred\x1b]0;t\x07 \x00\x08\x7f\x9b2J\r\u202eback\u2066\u200f" + "\tb\nc"


def test_control_characters_reach_a_pipe_but_no_terminal():
    with serve(http(event(reasoning=EVIL), event(EVIL), *END)) as server:
        args = to(server, "hi")
        with Terminal(*args, NO_COLOR="1") as terminal:
            code, shown = terminal.end()
        assert (code, screen(shown)) == (0, f"{TAME}\n{TAME}\n")
        with Terminal(*args, redirect="<$0 2>$0") as terminal:
            assert terminal.process.stdout.read().decode() == EVIL + "\n"
            assert screen(terminal.end()[1]) == TAME + "\n"
        evil = EVIL.encode() + b"\n"
        assert run(*args) == (0, evil, evil)


TOLD = [
    (refused(EVIL), "--usage"),
    (listed(EVIL), "--list-models"),
    (json_response(PIECE | {"model": EVIL}), "--usage"),
]


@pytest.mark.parametrize(("answer", "option"), TOLD)
def test_what_else_a_server_sends_is_tame_too(answer, option):
    with serve(answer) as server, Terminal(*to(server), option, "hi") as terminal:
        shown = terminal.end()[1]
    assert TAME[:8] in shown
    assert not set("\x1b\x07\x00\x08\x7f\x9b\u202e") & set(screen(shown))


def test_a_prompt_is_typed_where_standard_input_is_asked_for():
    with serve(http(*HELLO)) as server, Terminal(*to(server), "-") as terminal:
        terminal.send("typed\r")
        terminal.send("\x04")
        assert screen(terminal.end()[1]) == "typed\nHello\n"
        assert asked(server) == [("user", "typed")]


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}])
def test_reasoning_is_dim_and_the_dots_leave_no_trace(env):
    turning = threading.Event()

    def handle(connection, number):
        assert turning.wait(PATIENCE)
        connection.sendall(chunked(*THOUGHTFUL))

    with serve(handle) as server, Terminal(*to(server), "hi", **env) as terminal:
        deadline = time.monotonic() + PATIENCE
        while terminal.output != b"...\r":
            terminal.read()
            assert time.monotonic() < deadline
        turning.set()
        code, shown = terminal.end()
    assert (code, screen(shown)) == (0, "Let me see.and think\nHello\n")
    dim = re.findall(r"\x1b\[2m([^\x1b]*)\x1b\[2?[02]?m", shown)
    assert "".join(dim) == ("" if env else "Let me see.and think")
    assert not env or "\x1b" not in shown


# ------------------------------------------------------------------------------------
# The conversation
# ------------------------------------------------------------------------------------


def test_ctrl_c_stops_an_answer_and_never_the_conversation():
    left = threading.Event()

    def handle(connection, number):
        if number != 2:
            return connection.sendall(chunked(*THOUGHTFUL))
        connection.sendall(chunked(event("Parti"), event("al"), end=False))
        return connection.recv(1) or left.set()

    with serve(handle) as server, Terminal(*to(server)) as terminal:
        terminal.expect(">>> ")
        assert "Hello" in terminal.say("one 你好")
        terminal.send("two\r")
        terminal.expect("Partial")
        terminal.send("\x03")
        assert left.wait(PATIENCE)  # it stopped the server, too
        assert "/bye" not in terminal.expect("\r\n>>> ")
        for unfinished in ("", "", "begun"):
            terminal.send(unfinished)
            terminal.expect(unfinished)
            terminal.send("\x03")
            assert "/bye or Ctrl-D" in terminal.expect("\r\n>>> ")
        terminal.say('"""begun', "... ")
        terminal.send("\x03")  # and here all of the lines
        terminal.expect("\r\n>>> ")
        terminal.say("three")
        terminal.send("\x04")  # Ctrl-D
        code, shown = terminal.end()
        first, second, third = (asked(server, number) for number in range(3))
    assert (code, "Traceback" in shown) == (0, False)
    assert first == [("user", "one 你好")]
    assert second == [*first, ("assistant", "Hello"), ("user", "two")]
    assert third == [*second, ("assistant", "Partial"), ("user", "three")]


def test_conversation_goes_on_after_errors():
    broken = [http(status="500 Oh")] * 3  # it is tried three times
    answers = [refused("no such \x1bthing"), *broken, http(*CUT), http(*HELLO)]
    with (
        serve(lambda link, number: link.sendall(answers[number - 1])) as server,
        Terminal(*to(server)) as terminal,
    ):
        terminal.expect(">>> ")
        assert r"no such \x1bthing" in terminal.say("one")
        assert "500" in terminal.say("two")
        assert re.search(r"\nHello\n.+", screen(terminal.say("three")))  # why, too
        assert screen(terminal.say("four")).endswith("\nHello")
        terminal.send("/bye\r")
        assert terminal.end()[0] == 0
        said = asked(server)
    assert said == [("user", "three"), ("assistant", "Hello"), ("user", "four")]


def test_commands_of_a_conversation(tmp_path):
    saved = tmp_path / "saved.json"
    with serve_models("fir\x07st", "second") as server:
        with Terminal("-u", server.url, "-s", "be brief") as terminal:
            assert "asking fir\\x07st\r\n" in terminal.expect(">>> ")
            assert "/clear" in terminal.say("/?")
            terminal.say('"""/first', "... ")
            terminal.say("", "... ")
            assert "Hello" in terminal.say('second"""')
            for line, answer in (
                ("/system be long", "set"),
                ("/model", "fir\\x07st\r\nsecond"),
                ("/model big", "big"),
                (f"/save {saved}", f"saved 3 messages to {saved}"),
                ("more", "Hello"),
                ("/clear", "forgotten"),
                ("fresh", "Hello"),
                (f"/load {saved}", f"loaded 3 messages from {saved}"),
                ("again", "Hello"),
                ("/foo bar", "sse_chat: /foo is no command"),
                ("/clear", "forgotten"),
                ("/system", "no system message"),
                ("plain", "Hello"),
                ("\x10", "Hello"),  # Ctrl-P: the one before
            ):
                assert answer in terminal.say(line)
            terminal.send("/bye\r")
            assert terminal.end()[0] == 0
        posted = [n for n, head in enumerate(server.heads) if head.startswith("POST")]
        turns = [asked(server, number) for number in posted]
        models = [json.loads(server.bodies[number])["model"] for number in posted]
    long, multi = ("system", "be long"), ("user", "/first\n\nsecond")
    hello, plain = ("assistant", "Hello"), ("user", "plain")
    assert turns[0] == [("system", "be brief"), multi]
    assert turns[1] == [long, multi, hello, ("user", "more")]
    assert turns[2] == [long, ("user", "fresh")]
    assert turns[3] == [long, multi, hello, ("user", "again")]
    assert turns[4:] == [[plain], [plain, hello, plain]]
    assert models == ["fir\x07st"] + ["big"] * 5
    assert {"role": "assistant", "content": "Hello"} in json.loads(saved.read_text())


# What is no list of messages, or none that can be sent.
UNLOADABLE = ["null", "{}", '""', "[1]", '["role"]', "[{}]", "[", "[\ud800]"]
UNLOADABLE += [f'[{{"role": "user", "content": {n}}}]' for n in ("NaN", "1e999")]
UNLOADABLE += ["[" * 100_000 + "]" * 100_000]


def test_files_that_fail_change_nothing(tmp_path):
    saved, bad = tmp_path / "saved.json", tmp_path / "bad.json"
    saved.write_text("old")
    with serve(http(*HELLO)) as server:
        with Terminal(*to(server), first="ulimit -f 0") as terminal:
            terminal.expect(">>> ")
            terminal.say("one")
            for text in UNLOADABLE:
                bad.write_text(text, errors="surrogatepass")
                told = terminal.say(f"/load {bad}")
                assert re.fullmatch("\r\nsse_chat: /load failed: .*", told)
            for name in ("", tmp_path, tmp_path / "nothing"):
                assert re.fullmatch("\r\nsse_chat: .*", terminal.say(f"/load {name}"))
            for name in ("", tmp_path, saved, os.devnull):
                assert re.fullmatch("\r\nsse_chat: .*", terminal.say(f"/save {name}"))
            terminal.say("two")
        assert asked(server) == [
            ("user", "one"),
            ("assistant", "Hello"),
            ("user", "two"),
        ]
    assert (saved.read_text(), Path(os.devnull).is_file()) == ("old", False)
    assert {path.name for path in tmp_path.iterdir()} == {"saved.json", "bad.json"}


def test_a_terminal_that_cannot_be_read_ends_the_conversation():
    master, slave = os.openpty()
    # In the background, where reading is an error unless a signal stops who tries.
    script = """exec <$0; ulimit -t 9; trap "" TTIN; set -m; "$@" & wait $!"""
    wrap = ["sh", "-c", script, os.ttyname(slave)]
    args = ["-m", "m", "-u", NOBODY]
    with started(*args, wrap=wrap, start_new_session=True) as process:
        err = process.communicate(timeout=PATIENCE)[1]
        told = b"sse_chat: [Errno 5] Input/output error\n"
        assert (process.returncode, err) == (1, told)
    os.close(master)
    os.close(slave)


# ------------------------------------------------------------------------------------
# The README, types for everybody, pydantic and FastAPI
# ------------------------------------------------------------------------------------

ROOT = Path(__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
URL = "http://localhost:11434/v1"


def snippets(language: str, word: str = "") -> list[str]:
    """Return the README's code in a language, with a word in it."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
    return [block for block in blocks if word in block]


@pytest.fixture
def demo_url(monkeypatch):
    for name in filter(STEERING.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    with sse_chat.demo_server() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        yield url


@pytest.mark.parametrize("code", snippets("python"))
def test_readme_python(code, demo_url, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert bool(out) == ("print(" in code)
    assert not out or ("demo server" in out and out.endswith("\n"))
    assert ("rain in demo" in out) == ("def weather" in code)  # the tool has run


def test_readme_goes_on_from_a_cut_answer(monkeypatch, capsys):
    [code] = snippets("python", "TruncatedStreamError")
    answers = [http(event("Hel"), event("lo")), http(*HELLO)]
    with serve(lambda link, number: link.sendall(answers[number - 1])) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        exec(code, {})
        first, second = (json.loads(body)["messages"] for body in server.bodies)
    assert capsys.readouterr().out == "HelloHello\n"
    assert second == [*first, {"role": "assistant", "content": "Hello"}, second[-1]]
    assert second[-1]["role"] == "user"


def breaks_off(connection: socket.socket, number: int) -> None:
    """Send three events over four connections, and ids and a retry without data."""
    parts = [
        (b"retry: 50\n\n", b"id: 1\ndata: a\n\n", b"id: 2\n\n"),
        (b"data: b\n\n",),
        (b"id: 3\n\n",),
        (b"data: c\n\n",),
    ]
    connection.sendall(chunked(*parts[number - 1], end=number == 2))
    if number == 4:
        connection.recv(1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_readme_connects_again(asynchronous):
    [code] = snippets("python", "Last-Event-ID")
    names: dict[str, Any] = {}
    exec(code, names)
    seen: list[str] = []

    def sync() -> None:
        with (
            httpx.Client() as client,
            contextlib.closing(names["events"](client, server.url)) as events,
        ):
            seen.extend(event.data for event in itertools.islice(events, 3))

    async def using_async() -> None:
        async with (
            httpx.AsyncClient() as client,
            contextlib.aclosing(names["events_async"](client, server.url)) as events,
        ):
            while len(seen) < 3:
                seen.append((await anext(events)).data)

    with serve(breaks_off) as server:
        start = time.monotonic()
        asyncio.run(using_async()) if asynchronous else sync()
        seconds = time.monotonic() - start
        ids = [re.findall("(?i)last-event-id: (.*)\r", head) for head in server.heads]
    assert seen == ["a", "b", "c"]
    assert ids == [[], ["2"], ["2"], ["3"]]
    assert 3 * 0.05 <= seconds < 3


def test_readme_shell(tmp_path):
    [block] = snippets("sh", "question.txt")
    for tool in ("bash", "git", "jq"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "question.txt").write_text("Why is the sky blue?")
    shell("git", "init", "-q", cwd=tmp_path)
    shell("git", "add", ".", cwd=tmp_path)
    (tmp_path / "question.txt").write_text("Why is the sea blue?")
    python = f'set -euo pipefail; python() {{ "{sys.executable}" "$@"; }}; '
    lines = [python + line for line in block.splitlines()]
    diff, to_file, text, colour, story = (
        shell("bash", "-c", line, cwd=tmp_path) for line in lines
    )
    assert "You wrote: diff --git" in diff
    assert (to_file, story) == ("", "")
    assert "the sea blue?" in (tmp_path / "answer.txt").read_text()
    assert "a long story" in (tmp_path / "story.txt").read_text()
    assert text.startswith("You wrote: hi\n\nNo model")
    assert colour.rstrip() == "YOU WROTE: NAME A COLOUR:"


@pytest.mark.parametrize("diff", snippets("diff"))
def test_readme_coming_from(diff, demo_url):
    needs("httpx_sse")
    needs("openai")
    messages = [{"role": "user", "content": "blue whales"}]

    async def collect(answer: Any) -> str:
        return "".join([text async for text in answer])

    answers = []
    for other in "+-":  # the lines before, and those after
        lines = [line[1:] for line in diff.splitlines() if line[:1] != other]
        names: dict[str, Any] = {"URL": demo_url + "/chat/completions"}
        exec("\n".join(lines), names)
        answers.append("".join(names["answer"](messages)))
        answers.append(asyncio.run(collect(names["answer_async"](messages))))
    assert "blue whales" in answers[0]
    assert answers == answers[:1] * 4


def test_readme_fixture(tmp_path):
    [code] = snippets("python", "@pytest.fixture")
    test = """
from sse_chat import generate

def test_it(base_url):
    assert "whales" in generate("whales", base_url=base_url, model="demo").text
"""
    (tmp_path / "test_it.py").write_text(code + test)
    shell(sys.executable, "-m", "pytest", cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_readme_names_all_that_is_public():
    named = set(re.findall(r"`(?:await )?(\w+)`", README))
    assert set(sse_chat.__all__) <= named


def shell(*command: Any, cwd: Path, **env: str) -> str:
    """Run a command, which must succeed, beside a demo server; give its output."""
    with sse_chat.demo_server() as url:
        env = environment(OPENAI_BASE_URL=url, PYTHONDONTWRITEBYTECODE="1", **env)
        done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TYPED_PROGRAM = """\
# pyright: strict
import asyncio
import json
from collections.abc import Mapping
from typing import Any

from sse_chat import APIError, AsyncChatClient, ChatClient, generate
from sse_chat import ChatCompletionMessage

TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def words(client: ChatClient) -> str:
    stream = client.stream("whales", temperature=0, stop=["."])
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.index, choice.delta.content or "", chunk.reasoning)
    usage, response = stream.completion.usage, stream.response
    status = response.status_code if response else 0
    return f"{status}, {usage.total_tokens if usage else 0} tokens"


def calls(client: ChatClient) -> str:
    messages: list[Mapping[str, Any] | ChatCompletionMessage] = []
    messages.append({"role": "user", "content": "Is it raining?"})
    first = client.generate(messages, tools=TOOLS, tool_choice="required").choices[0]
    messages.append(first.message)
    for call in first.message.tool_calls or []:
        result = str(json.loads(call.function.arguments))
        answer = {"role": "tool", "tool_call_id": call.id, "content": result}
        messages.append(answer)
    return client.generate(messages).text


async def several(prompts: list[str]) -> list[str]:
    async with AsyncChatClient(model="demo") as client:
        async for text in client.stream(prompts[0]).text():
            print(text)
        answers = await asyncio.gather(*map(client.generate, prompts))
    return [answer.text for answer in answers]


with ChatClient(model="demo") as client:
    try:
        print(words(client), calls(client), asyncio.run(several(["a", "b"])))
        generate("hi", base_url="http://127.0.0.1:9", max_retries=0)
    except APIError as error:
        print(error.status_code, error.message, error.completion.text)
"""
ILL_TYPED = 'client.stream("hi", model=3)\n'


@pytest.mark.install
def test_first_command_of_the_readme(tmp_path):
    shutil.copy(PROGRAM, tmp_path)
    [command] = snippets("sh", "--demo")
    assert "Hello, who are you?" in shell("bash", "-c", command, cwd=tmp_path)


@pytest.mark.install
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_what_pip_installs(how, tmp_path):
    shell(sys.executable, "-m", "venv", "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    pip = functools.partial(shell, python, "-m", "pip", "install", "-q", cwd=tmp_path)
    pip("build", "mypy", "pyright")
    if how == "wheel":  # of the sdist
        shell(python, "-m", "build", "-o", tmp_path, ROOT, cwd=tmp_path)
        pip(*tmp_path.glob("*.whl"))
    else:
        pip("-e", ROOT)

    shell("venv/bin/sse-chat", "--version", cwd=tmp_path)
    shell(python, "-m", "sse_chat", "hi", cwd=tmp_path)
    at = shell(python, "-c", "import sse_chat; print(sse_chat.__file__)", cwd=tmp_path)
    assert at.startswith(str(tmp_path if how == "wheel" else ROOT))

    (tmp_path / "good.py").write_text(TYPED_PROGRAM)
    (tmp_path / "bad.py").write_text(TYPED_PROGRAM + ILL_TYPED)
    mypy = "venv/bin/mypy", "--strict"
    pyright = "venv/bin/pyright", "--pythonpath", python
    shell(python, "good.py", cwd=tmp_path)
    for checker in (mypy, pyright):
        shell(*checker, "good.py", cwd=tmp_path)
        done = subprocess.run([*checker, "bad.py"], cwd=tmp_path, capture_output=True)
        lines = done.stdout.decode().splitlines()
        last = TYPED_PROGRAM.count("\n") + 1
        errors = [line for line in lines if "error:" in line]
        assert errors and all(f"bad.py:{last}:" in line for line in errors), lines


def test_pydantic_knows_the_types():
    pydantic = needs("pydantic")
    with sse_chat.demo_server() as url:
        answer = sse_chat.generate("hi", base_url=url, model="demo")
    adapter = pydantic.TypeAdapter(ChatCompletion)
    schema = adapter.json_schema()
    assert {"id", "choices", "created", "model", "usage"} <= set(schema["properties"])
    assert schema["properties"]["choices"]["type"] == "array"
    assert adapter.validate_json(adapter.dump_json(answer)) == answer
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python(answer.to_dict() | {"choices": 3})


@contextlib.contextmanager
def served_by_uvicorn(app: Any) -> Iterator[str]:
    uvicorn = needs("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_fastapi_answers_with_a_completion():
    app = needs("fastapi").FastAPI()

    @app.get("/", response_model=ChatCompletion)
    async def ask():
        return await sse_chat.agenerate("hi", base_url=url, model="demo")

    with sse_chat.demo_server() as url, served_by_uvicorn(app) as ours:
        answer = httpx.get(ours)
        whole = sse_chat.generate("hi", base_url=url, model="demo")
        schema = httpx.get(ours + "/openapi.json").json()
    assert answer.status_code == 200
    assert ChatCompletion.from_dict(answer.json()).text == whole.text
    assert "ChatCompletion" in schema["components"]["schemas"]


def test_fastapi_relays_a_stream_until_its_client_leaves():
    fastapi = needs("fastapi")
    app = fastapi.FastAPI()
    kept: list[Any] = []

    @app.get("/")
    async def relay():
        async def events() -> AsyncIterator[bytes]:
            options = {"base_url": upstream.url, "model": "m"}
            async with sse_chat.astream_chat("hi", **options) as stream:
                kept.append(stream)
                async for chunk in stream:
                    yield ServerSentEvent(data=json.dumps(chunk.raw)).encode()

        kind = "text/event-stream"
        return fastapi.responses.StreamingResponse(events(), media_type=kind)

    def goes_silent(connection: socket.socket, number: int) -> str:
        connection.sendall(chunked(event("one "), event("two "), end=False))
        return KEEP

    with (
        serve(goes_silent) as upstream,
        served_by_uvicorn(app) as ours,
        httpx.Client() as client,
    ):
        with connect_sse(client, "GET", ours) as source:
            events = source.iter_sse()
            first, second = next(events).json(), next(events).json()
            assert not upstream.left.acquire(timeout=0.1)
        assert upstream.left.acquire(timeout=1)
    texts = [ChatCompletionChunk.from_dict(chunk).text for chunk in (first, second)]
    assert texts == ["one ", "two "]
