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
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from hypothesis import example, given, settings
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
    SSELineDecoder,
    TruncatedStreamError,
    accumulate,
    aconnect_sse,
    aiter_lines,
    aiter_sse,
    connect_sse,
    iter_lines,
    iter_sse,
    split_thinking,
)

try:
    import httpx
except ModuleNotFoundError:  # the core of this file runs under either
    import httpx2 as httpx


def needs(name: str) -> Any:
    """Import what only the extra test-all installs, or skip the test."""
    return pytest.importorskip(name, reason=f"{name}: pip install -e '.[test-all]'")


# ------------------------------------------------------------------------------------
# A server on a raw loopback socket: what it sends is what a test says, byte for byte
# ------------------------------------------------------------------------------------


class Server:
    """Calls `handle(connection, number of the request)` for each request.

    The connection is closed after it, unless `handle` returns KEEP. It may also be
    bytes, to send them each time.
    """

    def __init__(self, handle: Callable[[socket.socket, int], Any] | bytes) -> None:
        self.handle = handle
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.connections = 0
        self.lock = threading.Lock()
        self.heads: list[str] = []  # of each request: its line and headers
        self.bodies: list[bytes] = []
        self.left = threading.Semaphore(0)  # released each time a client has gone
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.connections += 1
                threading.Thread(
                    target=self.talk, args=(connection,), daemon=True
                ).start()

    def talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            reader = connection.makefile("rb")
            while head := head_of(reader):
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                body = reader.read(int(length[1]) if length else 0)
                with self.lock:
                    self.heads.append(head.decode())
                    self.bodies.append(body)
                    number = len(self.heads)
                if callable(self.handle):
                    if self.handle(connection, number) != KEEP:
                        return
                else:
                    connection.sendall(self.handle)
                    return
        self.left.release()


KEEP = "keep the connection"


def head_of(reader: Any) -> bytes:
    """Read a request up to its blank line; nothing at the end of the connection."""
    lines = []
    while (line := reader.readline()).strip():
        lines.append(line)
    return b"".join(lines)


@contextlib.contextmanager
def serve(handle: Callable[[socket.socket, int], Any] | bytes) -> Iterator[Server]:
    server = Server(handle)
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)  # ends the accept that waits on it
        server.socket.close()


def http(
    *parts: bytes,
    status: str = "200 OK",
    headers: str = "",
    kind: str = "text/event-stream",
) -> bytes:
    """A response whose body ends as its Content-Length says."""
    body = b"".join(parts)
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    )
    return (head + headers + "\r\n").encode() + body


def chunked(*parts: bytes, end: bool = True, headers: str = "") -> bytes:
    """A chunked response, one chunk for each part; without its end it is cut off."""
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    head += f"Transfer-Encoding: chunked\r\n{headers}\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head.encode() + body + (b"0\r\n\r\n" if end else b"")


def event(
    content: str | None = None, finish: str | None = None, index: int = 0, **delta: Any
) -> bytes:
    """One chat chunk as a server sends it."""
    if content is not None:
        delta["content"] = content
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
    }
    return b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
HELLO = (event("Hel", role="assistant"), event("lo"), event(finish="stop"), DONE)


# ------------------------------------------------------------------------------------
# Server-sent events against the standard
# ------------------------------------------------------------------------------------

Decoded = tuple[list[ServerSentEvent], str, int | None]


def by_the_standard(stream: bytes) -> Decoded:
    """Events, last event ID, reconnection time: slow, as the standard says it."""
    # "Streams must be decoded using the UTF-8 decode algorithm", which strips one BOM.
    text = stream.decode("utf-8", "replace")
    if text[:1] == "\ufeff":
        text = text[1:]
    # "Lines must be separated by either a CRLF pair, a single LF, or a single CR."
    lines, line, at = [], "", 0
    while at < len(text):
        if text[at] in "\r\n":
            lines.append(line)
            line = ""
            at += 1 if text[at : at + 2] == "\r\n" else 0
        else:
            line += text[at]
        at += 1
    # (The last `line` has no end: "any pending data must be discarded".)
    events: list[ServerSentEvent] = []
    data = event_type = last_event_id = id_buffer = ""
    reconnection_time = retry_of_block = None
    for line in lines:
        if line == "":
            # "Set the last event ID string to the value of the last event ID buffer."
            last_event_id = id_buffer
            # "If the data buffer is an empty string, set the data buffer and the event
            # type buffer to the empty string and return."
            if data != "":
                # "If the data buffer's last character is LF, then remove" it.
                data = data.removesuffix("\n")
                kind = event_type if event_type != "" else "message"
                events.append(
                    ServerSentEvent(kind, data, last_event_id, retry_of_block)
                )
            data, event_type, retry_of_block = "", "", None
            continue
        if line[0] == ":":  # "Ignore the line."
            continue
        field, value = line, ""
        if ":" in line:
            colon = line.index(":")
            field, value = line[:colon], line[colon + 1 :]
            if value[:1] == " ":
                value = value[1:]
        if field == "event":
            event_type = value
        elif field == "data":
            data += value + "\n"
        elif field == "id" and "\0" not in value:
            id_buffer = value
        elif field == "retry" and value and all(c in "0123456789" for c in value):
            reconnection_time = retry_of_block = int(value)
        # "Otherwise: the field is ignored."
    return events, last_event_id, reconnection_time


def cut(data: Any, cuts: Iterable[int]) -> list[Any]:
    places = [0, *sorted(at for at in cuts if at <= len(data)), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


def one_by_one(data: Any) -> list[Any]:
    return cut(data, range(1, len(data)))


def cuttings(streams: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Streams, each as a list of its pieces."""
    cuts = st.lists(st.integers(0, 60), max_size=12)
    return st.one_of(st.builds(cut, streams, cuts), streams.map(one_by_one))


FIELDS = [
    b"data: ",
    b"data:",
    b"data",
    b"event: ",
    b"event",
    b"id: ",
    b"id",
    b"retry: ",
]
LINE_ENDS = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\n\r",
    b"\r\r",
    b"data: x\n\n",
    b"data\r\r",
]
VALUES = [b":", b"  ", b"\0", b"x", b"12", b"007", b"-5", b"+5", b"1_0", "５²".encode()]
ODD_BYTES = [
    b"\xff",
    b"\xf0\x9f",
    b"\x99\x82",
    b"\xed\xa0\xbd",
    b"\xc0\x80",
    b"\xef\xbb",
]
ODD_TEXT = [
    "\ufeff",
    "\ufeff\ufeff",
    "\u2028",
    "\u2029",
    "\x85",
    "\v\f\x1c",
    "\U0001f642",
]
TOKENS = [
    *FIELDS,
    *LINE_ENDS,
    *VALUES,
    *ODD_BYTES,
    *(text.encode() for text in ODD_TEXT),
]
SSE_STREAMS = st.lists(
    st.sampled_from(FIELDS) | st.sampled_from(TOKENS) | st.binary(max_size=3)
).map(b"".join)

# Reads that are one event or some, or nearly: most are, and they are taken faster.
PLAIN = st.tuples(
    st.sampled_from(
        [b"data: ", b"data: ", b"data: ", b"id: 1\ndata: ", b": c\n\n", b""]
    ),
    st.lists(
        st.sampled_from([b"x", b"\r", b"\n", b"\ndata: ", b"\xff"]), max_size=3
    ).map(b"".join),
    st.sampled_from([b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\r\n\n", b""]),
).map(b"".join)
READS = st.lists(st.lists(PLAIN, min_size=1, max_size=3).map(b"".join))


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what has nothing to wait for; an event loop for each would take too long."""
    with pytest.raises(StopIteration) as end:
        coroutine.send(None)
    return end.value.value


async def as_async(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


async def alist(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def through_feed(pieces: list[bytes]) -> Decoded:
    decoder = SSEDecoder()
    events = [event for piece in pieces for event in decoder.feed(piece)]
    return events, decoder.last_event_id, decoder.retry


def through_lines(lines: Iterable[str]) -> Decoded:
    decoder = SSEDecoder()
    events = [event for line in lines if (event := decoder.decode(line)) is not None]
    return events, decoder.last_event_id, decoder.retry


@settings(max_examples=300, deadline=None)
@given(cuttings(SSE_STREAMS) | READS)
@example([b"\xef", b"\xbb", b"\xbf\r", b"\ndata: x\r", b"\n\r", b"\ndata: y\n\r"])
@example([b"data: x\n\ndata: y\n", b"data: z\n\n"])
def test_any_bytes_cut_anywhere_decode_as_the_standard_says(
    pieces: list[bytes],
) -> None:
    expected = by_the_standard(b"".join(pieces))
    assert through_feed([b"".join(pieces)]) == expected
    assert through_feed(pieces) == expected
    assert through_lines(iter_lines(pieces)) == expected
    assert through_lines(finished(alist(aiter_lines(as_async(pieces))))) == expected
    assert list(iter_sse(pieces)) == expected[0]
    assert finished(alist(aiter_sse(as_async(pieces)))) == expected[0]


# The name of a rule, a stream, and its events: (data, event, id, retry) or data alone
RULES = [
    ("a line feed ends a line", "data: x\n\n", ["x"]),
    ("a carriage return ends a line", "data: x\r\r", ["x"]),
    ("both together end one", "data: x\r\ndata: y\r\n\r\n", ["x\ny"]),
    ("the other way round they end two", "data: x\n\rdata: y\n\n", ["x", "y"]),
    ("a carriage return ends its line at once", "data: x\n\r", ["x"]),
    ("one carriage return is no blank line", "data: x\r", []),
    ("nothing else does", "data: \v\f\x1c\x1d\x1e\n\n", ["\v\f\x1c\x1d\x1e"]),
    ("nor does Unicode", "data: \x85\u2028\u2029\n\n", ["\x85\u2028\u2029"]),
    ("without a blank line no event", "data: x\n", []),
    ("a BOM before a field is dropped", "\ufeffdata: x\n\n", ["x"]),
    ("a BOM before a comment is dropped", "\ufeff: c\ndata: x\n\n", ["x"]),
    ("a BOM before a blank line is dropped", "\ufeff\ndata: x\n\n", ["x"]),
    ("one BOM is dropped", "\ufeff\ufeffdata: x\n\ndata: y\n\n", ["y"]),
    ("a BOM is dropped at the start only", "\n\ufeffdata: x\n\n", []),
    ("a BOM that begins data stays", "data:\ufeffx\n\n", ["\ufeffx"]),
    ("one space after the colon is dropped", "data:  x \n\n", [" x "]),
    ("one in any field", "event:  e\ndata: x\n\n", [("x", " e")]),
    ("a tab after the colon stays", "data:\tx\n\n", ["\tx"]),
    ("the space may be missing", "data:x\n\n", ["x"]),
    ("the first colon ends the name", "data: a: b\n\n", ["a: b"]),
    ("without a colon the value is empty", "data\n\n", [""]),
    ("names are case-sensitive", "Data: x\nDATA: x\n\n", []),
    ("names are not stripped", " data: x\ndata : x\n\n", []),
    ("unknown fields are ignored", "error: 5\ndata: x\nfoo\n\n", ["x"]),
    ("comments are ignored", ": c\ndata: x\n:\n:data: y\n\n", ["x"]),
    ("an event has its name", "event: e\ndata: x\n\n", [("x", "e")]),
    ("its last name counts", "event: e\nevent: f\ndata: x\n\n", [("x", "f")]),
    ("the next has another", "event: e\ndata: x\n\ndata: y\n\n", [("x", "e"), "y"]),
    ("an empty name clears an earlier one", "event: e\nevent:\ndata: x\n\n", ["x"]),
    ("without data no event", "event: e\nid: 1\nretry: 5\n\n", []),
    ("without data the name is forgotten", "event: e\n\ndata: x\n\n", ["x"]),
    ("without data the id counts", "id: 1\n\ndata: x\n\n", [("x", "message", "1")]),
    ("an id stays", "id: 1\n\ndata: x\n\ndata: x\n\n", [("x", "message", "1")] * 2),
    ("an empty id resets it", "id: 1\n\nid\ndata: x\n\n", ["x"]),
    ("an id with NUL is ignored", "id: 1\nid: \0\ndata\n\n", [("", "message", "1")]),
    ("NUL may stand elsewhere", "event: \0e\ndata: \0\n\n", [("\0", "\0e")]),
    ("an event has its retry", "retry: 9\ndata\n\n", [("", "message", "", 9)]),
    ("retry is not of the next event", "retry: 9\n\ndata: x\n\n", ["x"]),
    ("invalid UTF-8 is replaced", b"data: \xff\xf0\x9f\x98\xe4\n\n", ["\ufffd" * 3]),
    ("each part of it", b"data: \xc0\x80\xed\xa0\x80\n\n", ["\ufffd" * 5]),
    # The examples of the standard
    ("one message", "data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    ("two names", "event: a\ndata: 7\n\nevent: b\ndata\n\n", [("7", "a"), ("", "b")]),
    (
        "four blocks",
        ": test stream\n\ndata: first event\nid: 1\n\n"
        "data:second event\nid\n\ndata:  third event\n\n",
        [("first event", "message", "1"), "second event", " third event"],
    ),
    ("empty data", "data\n\ndata\ndata\n\ndata:", ["", "\n"]),
    ("an optional space", "data:test\n\ndata: test\n\n", ["test", "test"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("stream", "events"), [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_rule(stream: str | bytes, events: list[Any]) -> None:
    stream = stream.encode() if isinstance(stream, str) else stream
    expected = [as_event(*[e] if isinstance(e, str) else e) for e in events]
    assert list(iter_sse([stream])) == expected
    assert list(iter_sse(one_by_one(stream))) == expected
    assert by_the_standard(stream)[0] == expected


def as_event(
    data: str, event: str = "message", id: str = "", retry: int | None = None
) -> ServerSentEvent:
    return ServerSentEvent(event, data, id, retry)


def test_a_line_comes_out_as_soon_as_its_end_is_there() -> None:
    decoder = SSELineDecoder()
    pieces = [b"a\r", b"\n", b"", b"b", b"\r", b"", b"\nc\n", b"\n", b"d"]
    lines = [["a"], [], [], [], ["b"], [], ["c"], [""], []]
    assert [decoder.feed(piece) for piece in pieces] == lines


def test_lines_and_bytes_may_come_in_turns() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: x\n\n") == [as_event("x")]
    assert decoder.decode("data: y") is None
    assert decoder.feed(b"data: z\n\n") == [as_event("y\nz")]


def test_an_id_counts_from_the_blank_line_on() -> None:
    decoder = SSEDecoder()
    decoder.feed(b"id: 1\n")
    assert decoder.last_event_id == ""
    decoder.feed(b"\nid: 2\n")
    assert decoder.last_event_id == "1"


@pytest.mark.parametrize(
    "value", ["-5", "+5", "1_000", "５", "²", "5.0", "5 ", "0x5", ""]
)
def test_retry_takes_ascii_digits_only(value: str) -> None:
    decoder = SSEDecoder()
    decoder.feed(f"retry: 7\nretry: {value}\n".encode())
    assert decoder.retry == 7


def test_retry_counts_at_its_own_line_and_stays() -> None:
    decoder = SSEDecoder()
    assert decoder.retry is None
    decoder.feed(b"retry: 0030\n")
    assert decoder.retry == 30
    decoder.feed(b"data: x\n\n\n")
    assert decoder.retry == 30


def test_a_retry_of_more_digits_than_python_converts_is_ignored() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"retry: " + b"9" * 5000 + b"\ndata: x\n\n") == [as_event("x")]
    assert decoder.retry is None


# ------------------------------------------------------------------------------------
# Server-sent events: encode, limit, cost
# ------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters() | st.sampled_from("\r\n\0\ufeff :\u2028"))
ANY_NAME = ANY_TEXT | st.just("message")
INTEGERS = st.none() | st.integers()
ANY_EVENT = st.builds(ServerSentEvent, ANY_NAME, ANY_TEXT, ANY_TEXT, INTEGERS)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))
LINE = TEXT.map(lambda text: re.sub("[\n\0]", "", text))
NAME = LINE.map(lambda name: name or "message")
RETRY = st.none() | st.integers(0, 10**12)


@given(st.lists(st.builds(ServerSentEvent, NAME, TEXT, LINE, RETRY)), st.data())
def test_encoded_events_decode_to_themselves(
    events: list[ServerSentEvent], data: st.DataObject
) -> None:
    encoded = [event.encode() for event in events]
    assert list(iter_sse(encoded)) == events
    pieces = data.draw(cuttings(st.just(b"".join(encoded))))
    assert list(iter_sse(pieces)) == events


@given(ANY_EVENT)
def test_encode_refuses_what_would_not_come_back(event: ServerSentEvent) -> None:
    try:
        stream = event.encode()
    except ValueError:
        return
    assert list(iter_sse([stream])) == [event]


BAD_DATA = [{"data": text} for text in ("a\rb", "\r\n", "\r", "\ud83d")]
BAD_NAMES = [{"event": text} for text in ("a\nb", "a\r", "\ude42")]
BAD_IDS = [{"id": text} for text in ("\n", "a\rb", "a\0", "\ud83d")]


@pytest.mark.parametrize(
    "wrong", [*BAD_DATA, *BAD_NAMES, *BAD_IDS, {"retry": -1}], ids=str
)
def test_encode_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ServerSentEvent(**wrong).encode()


def test_the_data_of_an_event_as_json() -> None:
    assert ServerSentEvent(data='{"a": "\\u00e4"}').json() == {"a": "ä"}
    with pytest.raises(ValueError):
        ServerSentEvent(data="[DONE]").json()


def test_an_event_has_the_defaults_of_the_standard() -> None:
    assert ServerSentEvent() == ServerSentEvent("message", "", "", None)


Ended = tuple[list[ServerSentEvent], bool]


def until_the_limit(pieces: list[bytes], limit: int | None) -> Ended:
    """The events, and whether they ended with SSEError."""
    decoder = SSEDecoder(limit)
    events: list[ServerSentEvent] = []
    try:
        for piece in pieces:
            events += decoder.feed(piece)
    except SSEError as error:
        return events + error.events, True
    return events, False


def iterated(pieces: list[bytes], limit: int) -> Ended:
    events: list[ServerSentEvent] = []
    try:
        for event in iter_sse(pieces, limit):
            events.append(event)
    except SSEError:
        return events, True
    return events, False


async def aiterated(pieces: list[bytes], limit: int) -> Ended:
    events: list[ServerSentEvent] = []
    try:
        async for event in aiter_sse(as_async(pieces), limit):
            events.append(event)
    except SSEError:
        return events, True
    return events, False


OVER_20_BYTES = {
    "one line": "data: 123456789012345\n\n",
    "several lines": "data: 12345678901\ndata: 12345678901\n\n",
    "many empty lines": "data\n" * 21,
    "no end": "data: 123456789012345",
    "a comment": ": 1234567890123456789\n",
    "a name": "event: 12345678901234\n",
    "not ASCII": "data: ääääääää\n\n",
}


@pytest.mark.parametrize("text", OVER_20_BYTES.values(), ids=OVER_20_BYTES)
def test_over_the_limit(text: str) -> None:
    stream = b"data: x\n\n" + text.encode()
    assert until_the_limit([stream], 20) == ([as_event("x")], True)
    assert until_the_limit(one_by_one(stream), 20) == ([as_event("x")], True)
    assert until_the_limit([stream], None)[1] is False


UNDER_20_BYTES = [
    b"data: 12345678901234\n\n",
    b"data: 123456789\ndata: 123456789\n\n",
    b"data\n" * 20,
]


@pytest.mark.parametrize("event", UNDER_20_BYTES, ids=str)
def test_the_limit_is_of_one_event(event: bytes) -> None:
    pieces = [event + b"\n: comment\n\n"] * 50
    assert until_the_limit(pieces, 20) == until_the_limit(pieces, None)
    assert len(until_the_limit(pieces, 20)[0]) == 50


@settings(max_examples=300, deadline=None)
@given(cuttings(SSE_STREAMS) | READS, st.integers(3, 30))
@example([b"\xef\xbb\xbfdata: x", b"\n\n"], 8)
@example([b"data: x\n", *[b":\n"] * 20, b"\n"], 10)
def test_the_limit_is_met_at_the_same_event_however_cut(
    pieces: list[bytes], limit: int
) -> None:
    events, over = until_the_limit([b"".join(pieces)], limit)
    assert until_the_limit(pieces, limit) == (events, over)
    assert iterated(pieces, limit) == (events, over)
    assert finished(aiterated(pieces, limit)) == (events, over)
    unbounded = by_the_standard(b"".join(pieces))[0]
    assert events == (unbounded[: len(events)] if over else unbounded)


def test_after_the_limit_a_decoder_stays_dead() -> None:
    decoder = SSEDecoder(10)
    with pytest.raises(SSEError, match="10"):
        decoder.feed(b"data: too long\n\n")
    for more in (b"", b"\n\n", b"data: x\n\n"):
        with pytest.raises(SSEError) as caught:
            decoder.feed(more)
        assert caught.value.events == []
    for line in ("", "data: x"):
        with pytest.raises(SSEError):
            decoder.decode(line)


def test_decode_keeps_the_limit_too() -> None:
    decoder = SSEDecoder(20)
    assert decoder.decode("data: 12345678901") is None
    with pytest.raises(SSEError):
        decoder.decode("data: 12345678901")


def test_an_endless_line_ends_at_the_limit() -> None:
    decoder = SSEDecoder(100_000)
    for _ in range(100):
        decoder.feed(b"x" * 1000)
    with pytest.raises(SSEError):
        decoder.feed(b"x")


def test_the_limit_is_16_mib_unless_said_otherwise() -> None:
    stream = b"data: " + bytes(16 * 2**20 - 6)
    assert len(list(iter_sse([stream, b"\n\n"]))) == 1
    assert until_the_limit([stream, b"\0\n\n"], None)[1] is False
    with pytest.raises(SSEError):
        list(iter_sse([stream, b"\0\n\n"]))


MIB = 2**20


def one_large_event(size: int) -> Iterable[bytes]:
    yield b"data: "
    yield from (b"x" * 1024 for _ in range(size // 1024))
    yield b"\n\n"


def one_event_of_many_lines(size: int) -> Iterable[bytes]:
    yield from (b"data: " + b"x" * 1017 + b"\n" for _ in range(size // 1024))
    yield b"\n"


def many_small_events(size: int) -> Iterable[bytes]:
    yield from ((b"data: %s\n\n" % (b"x" * 248)) * 4 for _ in range(size // 1024))


def seconds_to_decode(pieces: Iterable[bytes]) -> float:
    start = time.process_time()
    for _ in iter_sse(pieces, None):
        pass
    return time.process_time() - start


@pytest.mark.parametrize("stream", [one_large_event, many_small_events])
def test_time_is_linear_in_the_bytes(stream: Any) -> None:
    """Eight times the bytes take eight times as long; 32 on a noisy machine; not 64."""

    def factor() -> float:
        eighth = seconds_to_decode(stream(8 * MIB))
        return seconds_to_decode(stream(64 * MIB)) / eighth

    assert min(factor() for _ in range(3)) < 32


LARGE = [(one_large_event, 32, 3 * 32), (one_event_of_many_lines, 16, 3 * 16)]


@pytest.mark.parametrize(
    ("stream", "size", "bound"), [*LARGE, (many_small_events, 4, 0.1)]
)
def test_memory_is_that_of_one_event(stream: Any, size: int, bound: float) -> None:
    """Bytes, text and lines of one event, for a moment, and never of two."""
    tracemalloc.start()
    try:
        for _ in iter_sse(stream(size * MIB), None):
            pass
        assert tracemalloc.get_traced_memory()[1] < bound * MIB + MIB / 4
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------
# The names of httpx-sse, over a real connection
# ------------------------------------------------------------------------------------

NEWS = [b"id: 1\nretry: 9\ndata: 1\n\n", "event: e\ndata: \u2028\n\n".encode()]
NEWS_EVENTS = [as_event("1", "message", "1", 9), as_event("\u2028", "e", "1")]


def test_a_program_of_httpx_sse() -> None:
    with serve(http(*NEWS)) as server, httpx.Client(trust_env=False) as client:
        with connect_sse(client, "POST", server.url, json={"a": 1}) as source:
            assert isinstance(source, EventSource)
            assert source.response.status_code == 200
            assert list(source.iter_sse()) == NEWS_EVENTS
        assert source.response.is_closed
    assert [json.loads(body) for body in server.bodies] == [{"a": 1}]


@pytest.mark.anyio
async def test_an_async_program_of_httpx_sse() -> None:
    with serve(chunked(*NEWS)) as server:
        async with httpx.AsyncClient(trust_env=False) as client:
            async with aconnect_sse(
                client, "POST", server.url, json={"a": 1}
            ) as source:
                assert isinstance(source, EventSource)
                assert source.response.status_code == 200
                assert await alist(source.aiter_sse()) == NEWS_EVENTS
            assert source.response.is_closed
    assert [json.loads(body) for body in server.bodies] == [{"a": 1}]


def check_head(head: str, mine: bool) -> None:
    assert re.findall("(?im)^accept: (.*)\r$", head) == ["text/event-stream"]
    assert re.findall("(?im)^cache-control: (.*)\r$", head) == ["no-store"]
    assert ("x-mine: 1" in head.lower()) == mine


MINE = {"Accept": "text/plain", "X-Mine": "1", "cache-control": "max-age=1"}


@pytest.mark.parametrize("make", [dict, dict.items, httpx.Headers, lambda mine: None])
def test_the_callers_headers_are_sent_and_stay(make: Any) -> None:
    headers, untouched = make(dict(MINE)), make(dict(MINE))
    with (
        serve(http(*NEWS)) as server,
        httpx.Client(trust_env=False) as client,
        connect_sse(client, "GET", server.url, headers=headers),
    ):
        pass
    check_head(server.heads[0], headers is not None)
    assert headers == untouched


@pytest.mark.anyio
async def test_the_callers_headers_are_sent_and_stay_async() -> None:
    headers = dict(MINE)
    with serve(http(*NEWS)) as server:
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            aconnect_sse(client, "GET", server.url, headers=headers),
        ):
            pass
    check_head(server.heads[0], True)
    assert headers == MINE


@pytest.mark.parametrize("kind", ["application/json", "text/html", "", "text/event"])
def test_another_content_type_is_an_sse_error(kind: str) -> None:
    response = httpx.Response(200, headers={"Content-Type": kind}, content=NEWS[0])
    with pytest.raises(SSEError, match=re.escape(repr(kind))):
        list(EventSource(response).iter_sse())
    with pytest.raises(SSEError, match=re.escape(repr(kind))):
        finished(alist(EventSource(response).aiter_sse()))


@pytest.mark.parametrize(
    "kind", ["text/event-stream; charset=utf-8", "Text/Event-Stream"]
)
def test_an_event_stream_by_any_spelling(kind: str) -> None:
    response = httpx.Response(200, headers={"Content-Type": kind}, content=NEWS[0])
    assert list(EventSource(response).iter_sse()) == NEWS_EVENTS[:1]


# ------------------------------------------------------------------------------------
# Chat types
# ------------------------------------------------------------------------------------

# From Ollama, and how openai's types print it
SENT = r"""
{"id": "chatcmpl-476", "object": "chat.completion.chunk", "created": 1752575345, "model": "deepseek-r1:1.5b", "system_fingerprint": "fp_ollama", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "\u5417"}, "finish_reason": null}]}
{"id": "chatcmpl-476", "object": "chat.completion.chunk", "created": 1752575345, "model": "deepseek-r1:1.5b", "system_fingerprint": "fp_ollama", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"}]}
{"id": "chatcmpl-485", "object": "chat.completion", "created": 1752575233, "model": "deepseek-r1:1.5b", "system_fingerprint": "fp_ollama", "choices": [{"index": 0, "message": {"role": "assistant", "content": "<think>\n\u55ef\n</think>\n\n\u4f60\u597d\uff01"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 27, "completion_tokens": 78, "total_tokens": 105}}
""".strip().splitlines()  # noqa: E501
PRINTED = r"""
ChatCompletionChunk(id='chatcmpl-476', choices=[Choice(delta=ChoiceDelta(content='吗', function_call=None, refusal=None, role='assistant', tool_calls=None), finish_reason=None, index=0, logprobs=None)], created=1752575345, model='deepseek-r1:1.5b', object='chat.completion.chunk', service_tier=None, system_fingerprint='fp_ollama', usage=None)
ChatCompletionChunk(id='chatcmpl-476', choices=[Choice(delta=ChoiceDelta(content='', function_call=None, refusal=None, role='assistant', tool_calls=None), finish_reason='stop', index=0, logprobs=None)], created=1752575345, model='deepseek-r1:1.5b', object='chat.completion.chunk', service_tier=None, system_fingerprint='fp_ollama', usage=None)
ChatCompletion(id='chatcmpl-485', choices=[Choice(finish_reason='stop', index=0, logprobs=None, message=ChatCompletionMessage(content='<think>\n嗯\n</think>\n\n你好！', refusal=None, role='assistant', annotations=None, audio=None, function_call=None, tool_calls=None))], created=1752575233, model='deepseek-r1:1.5b', object='chat.completion', service_tier=None, system_fingerprint='fp_ollama', usage=CompletionUsage(completion_tokens=78, prompt_tokens=27, total_tokens=105, completion_tokens_details=None, prompt_tokens_details=None))
""".strip().splitlines()  # noqa: E501


@pytest.mark.parametrize(("sent", "printed"), list(zip(SENT, PRINTED, strict=True)))
def test_the_types_print_as_openais(sent: str, printed: str) -> None:
    kind = getattr(sse_chat, printed.partition("(")[0])
    assert repr(kind.from_dict(json.loads(sent))) == printed


def chunk_dict(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    head = {"id": "1", "object": "chat.completion.chunk", "created": 5, "model": "m"}
    return head | {"choices": list(choices)} | more


def chunk_of(delta: Any = None, **more: Any) -> ChatCompletionChunk:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": None} | more
    return ChatCompletionChunk.from_dict(chunk_dict(choice))


def chunks_of(*deltas: Any) -> list[ChatCompletionChunk]:
    return [chunk_of(delta) for delta in deltas]


USAGE = json.loads(
    """{"completion_tokens": 3, "prompt_tokens": 2, "total_tokens": 5,
    "completion_tokens_details": {"reasoning_tokens": 1, "audio_tokens": 0},
    "prompt_tokens_details": {"cached_tokens": 1, "audio_tokens": null}}"""
)
LOGPROBS = json.loads(
    """{"content": [{"token": "\u00e9", "bytes": [195, 169], "logprob": -0.5,
    "top_logprobs": [{"token": "e", "bytes": null,
    "logprob": -2}]}], "refusal": null}"""
)
DELTA = json.loads(
    """{"content": "c", "function_call": {"arguments": "{}", "name": "f"},
    "refusal": "no", "role": "assistant", "tool_calls": [{"index": 0, "id": "call_1",
    "function": {"arguments": "{}", "name": "f"}, "type": "function", "extra_content":
    {"google": {"thought_signature": "c2ln"}}}], "reasoning_content": "r",
    "reasoning_details": [{"type": "t"}]}"""
)
WHOLE_MESSAGE = DELTA | {
    "annotations": [{"type": "url_citation"}],
    "audio": {"id": "a"},
}
ENDED = {"index": 0, "finish_reason": "tool_calls", "logprobs": LOGPROBS}
FULL_CHUNK = chunk_dict(ENDED | {"delta": DELTA}, usage=USAGE, service_tier="default")
FULL_WHOLE = chunk_dict(
    ENDED | {"message": WHOLE_MESSAGE}, usage=USAGE, system_fingerprint="f"
)


def models_in(model: Any) -> list[Any]:
    """The model and all in it."""
    if isinstance(model, list):
        return [part for item in model for part in models_in(item)]
    if not dataclasses.is_dataclass(model):
        return []
    values = [getattr(model, field.name) for field in dataclasses.fields(model)]
    return [model, *models_in(values)]


FULL = [ChatCompletionChunk.from_dict(FULL_CHUNK), ChatCompletion.from_dict(FULL_WHOLE)]
FULL_MODELS = {type(model): model for model in models_in(FULL)}
each_model = pytest.mark.parametrize("model", FULL_MODELS, ids=lambda m: m.__qualname__)


def test_every_chat_type_is_there() -> None:
    names = """ChatCompletionChunk ChoiceDelta ChoiceDeltaToolCall ChatCompletion
    ChoiceDeltaToolCallFunction ChoiceDeltaFunctionCall ChatCompletionMessage Function
    ChatCompletionMessageToolCall ChoiceLogprobs ChatCompletionTokenLogprob TopLogprob
    FunctionCall CompletionUsage CompletionTokensDetails PromptTokensDetails Choice"""
    assert {model.__name__ for model in FULL_MODELS} == set(names.split())
    assert ChatCompletionChunk.Choice is not ChatCompletion.Choice


@each_model
def test_a_type_has_openais_fields_and_then_ours(model: Any) -> None:
    chat = pytest.importorskip("openai.types.chat")
    from openai.types import completion_usage

    name = model.__name__.replace("MessageToolCall", "MessageFunctionToolCall")
    modules = [getattr(chat, module) for module in dir(chat)] + [completion_usage]
    if model is ChatCompletion.Choice:
        modules = [chat.chat_completion]
    theirs = [getattr(module, name, None) for module in modules]
    known = {field for kind in theirs for field in getattr(kind, "model_fields", ())}
    fields = [field.name for field in dataclasses.fields(model)]
    ours = [name for name in fields if name not in known]
    assert set(ours) <= {"reasoning_content", "extra", "raw"}
    assert fields[len(fields) - len(ours) :] == ours


FIELD_NAMES = """id choices created model object usage index delta message content role
tool_calls function arguments name type logprobs token top_logprobs text thinking raw
refusal reasoning reasoning_content extra finish_reason finishReason function_call"""
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELD_NAMES.split()) | st.text(), parts, max_size=4
        )
    ),
    max_leaves=15,
)
OBJECTS = ANY_JSON.filter(lambda value: isinstance(value, dict))


@st.composite
def spoiled(draw: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with random parts replaced or missing."""

    def walk(value: Any) -> Any:
        if draw(st.integers(0, 9)) == 0:
            return draw(ANY_JSON)
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items() if draw(st.integers(0, 9))}
        return [walk(item) for item in value] if isinstance(value, list) else value

    return {name: walk(value) for name, value in whole.items()}


@each_model
@settings(max_examples=25, deadline=None)
@given(payload=OBJECTS)
def test_from_dict_takes_any_object(model: Any, payload: dict[str, Any]) -> None:
    made = model.from_dict(payload)
    assert isinstance(repr(made), str)
    json.dumps(made.to_dict())


@settings(max_examples=100, deadline=None)
@given(OBJECTS | spoiled(FULL_CHUNK))
def test_any_object_is_a_chunk(payload: dict[str, Any]) -> None:
    before = copy.deepcopy(payload)
    chunk = ChatCompletionChunk.from_dict(payload)
    assert chunk.raw is payload
    assert isinstance(chunk.text, str) and isinstance(chunk.reasoning, str)
    assert ChatCompletionChunk.from_dict(chunk.to_dict()) == chunk
    completion = accumulate([chunk, chunk])
    (completion.text + completion.reasoning).encode()
    assert payload == before


@settings(max_examples=100, deadline=None)
@given(OBJECTS | spoiled(FULL_WHOLE))
def test_any_object_is_a_completion(payload: dict[str, Any]) -> None:
    before = copy.deepcopy(payload)
    completion = ChatCompletion.from_dict(payload)
    assert completion.raw is payload
    (completion.text + completion.reasoning).encode()
    assert ChatCompletion.from_dict(completion.to_dict()) == completion
    assert payload == before


CONTENTS = [
    ({}, "", ""),
    ({"content": None, "reasoning_content": None}, "", ""),
    ({"content": "a"}, "a", ""),
    ({"content": 5, "reasoning": {}}, "", ""),
    ({"content": "", "reasoning_content": "r"}, "", "r"),
    ({"content": "", "reasoning": "r"}, "", "r"),
    ({"reasoning_content": "r", "reasoning": "r"}, "", "r"),
    ({"reasoning_content": "", "reasoning": "r"}, "", "r"),
    ({"reasoning_content": "r", "reasoning": None}, "", "r"),
    ({"content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]}, "abc", ""),
    ({"content": [{"type": "thinking", "thinking": [{"text": "r"}, {}, 1]}]}, "", "r"),
    ({"content": [{"thinking": "r"}, None, {"text": None}, 5]}, "", "r"),
]


@pytest.mark.parametrize(("delta", "text", "reasoning"), CONTENTS)
def test_where_servers_put_text_and_reasoning(
    delta: dict[str, Any], text: str, reasoning: str
) -> None:
    whole = ChatCompletion.from_dict({"choices": [{"message": delta}]})
    for made in (chunk_of(delta), whole, accumulate([chunk_of(delta)])):
        assert (made.text, made.reasoning) == (text, reasoning)


def test_text_is_that_of_the_first_answer() -> None:
    b, a = ({"index": i, "delta": {"content": c}} for i, c in ((1, "b"), (0, "a")))
    texts = [
        ChatCompletionChunk.from_dict({"choices": c}).text for c in ([b, a], [b], [])
    ]
    assert texts == ["a", "", ""]


def test_a_choice_without_delta() -> None:
    """Azure's asynchronous content filter sends one."""
    chunk = ChatCompletionChunk.from_dict({"choices": [{"finish_reason": None}]})
    assert chunk.choices == [ChatCompletionChunk.Choice()]
    assert chunk.choices[0].delta == sse_chat.ChoiceDelta()


def test_a_choice_without_index_has_its_place() -> None:
    for kind in (ChatCompletionChunk, ChatCompletion):
        made = kind.from_dict({"choices": [{}, {"index": None}, {}]})
        assert [choice.index for choice in made.choices] == [0, 1, 2]


ENDINGS = [("finish_reason", "stop", "stop"), ("finish_reason", "", None)]
ENDINGS += [("finishReason", "STOP", "STOP"), ("other", "stop", None)]


@pytest.mark.parametrize(("name", "sent", "reason"), ENDINGS)
@pytest.mark.parametrize("kind", [ChatCompletionChunk, ChatCompletion])
def test_finish_reason(kind: Any, name: str, sent: str, reason: str | None) -> None:
    assert (
        kind.from_dict({"choices": [{name: sent}]}).choices[0].finish_reason == reason
    )


def test_an_object_of_arguments_becomes_json() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": {"a": [1]}}}
    for kind in (sse_chat.ChoiceDelta, sse_chat.ChatCompletionMessage):
        made: Any = kind.from_dict({"tool_calls": [call]})
        assert made.tool_calls[0].function.arguments == '{"a": [1]}'


def test_our_fields_show_when_set() -> None:
    assert repr(sse_chat.ChoiceDelta.from_dict({"reasoning": "r", "x": 1})) == (
        "ChoiceDelta(content=None, function_call=None, refusal=None, role=None, "
        "tool_calls=None, reasoning_content='r', extra={'x': 1})"
    )


def test_raw_is_out_of_repr_and_comparison() -> None:
    one, two = chunk_of({"content": "a"}), chunk_of({"content": "a"}, x=1)
    assert one == two and repr(one) == repr(two) and one.raw != two.raw


def test_to_dict_leaves_out_the_unset_and_keeps_the_unknown() -> None:
    delta = {"content": "a", "x": {"y": None}}
    assert sse_chat.ChoiceDelta.from_dict(delta | {"refusal": None}).to_dict() == delta
    chunk = ChatCompletionChunk.from_dict(FULL_CHUNK).to_dict()
    assert chunk["choices"][0]["delta"] == DELTA


@each_model
def test_a_dict_gives_the_model_back(model: Any) -> None:
    full = FULL_MODELS[model]
    assert model.from_dict(json.loads(json.dumps(full.to_dict()))) == full


ERROR_NAMES = """APIError APIConnectionError APITimeoutError APIStatusError
TruncatedStreamError APIResponseValidationError"""


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_model(copied: Any, model: Any) -> None:
    other = copied(FULL_MODELS[model])
    assert other is not FULL_MODELS[model]
    assert vars(other) == vars(FULL_MODELS[model])


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_an_event_or_error(copied: Any) -> None:
    errors = [
        getattr(sse_chat, name)("m", {}, 400, "t", "p") for name in ERROR_NAMES.split()
    ]
    for value in (as_event("d", "e", "i", 5), SSEError("m", [as_event("x")]), *errors):
        other = copied(value)
        assert (type(other), str(other)) == (type(value), str(value))
        assert vars(other) == vars(value)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_goes_on_alone(copied: Any) -> None:
    decoder, accumulator = SSEDecoder(), ChatAccumulator()
    decoder.feed(b"id: 1\ndata: x\ndata: ")
    accumulator.add(chunk_of({"content": "a"}))
    others = copied(decoder), copied(accumulator)
    decoder.feed(b"z\n\n")
    accumulator.add(chunk_of({"content": "z"}))
    assert others[0].feed(b"y\n\n") == [as_event("x\ny", id="1")]
    others[1].add(chunk_of({"content": "b"}))
    assert others[1].completion.text == "ab"


# ------------------------------------------------------------------------------------
# Accumulating
# ------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CALL_NAME = st.text("abc", min_size=1)
FUNCTION = st.fixed_dictionaries({"name": CALL_NAME, "arguments": WORDS})
WHOLE_CALL = {"id": CALL_NAME, "type": st.just("function"), "function": FUNCTION}
CALLS = st.lists(st.fixed_dictionaries(WHOLE_CALL), min_size=1, max_size=3)
TEXTS = {"content": WORDS, "reasoning_content": WORDS.filter(bool), "refusal": WORDS}
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant")}, optional=TEXTS | {"tool_calls": CALLS}
)


def utf16_pieces(text: str, by: random.Random) -> list[str]:
    """Cut a text between UTF-16 units, so that a character may come in two halves."""
    pieces = cut(
        text.encode("utf-16-le"), {2 * by.randint(0, len(text)) for _ in "123"}
    )
    return [piece.decode("utf-16-le", "surrogatepass") for piece in pieces]


def shuffled(queues: list[list[Any]], by: random.Random) -> list[Any]:
    """Put lists into one, each in its own order."""
    turns = [number for number, queue in enumerate(queues) for _ in queue]
    by.shuffle(turns)
    waiting = [iter(queue) for queue in queues]
    return [next(waiting[turn]) for turn in turns]


def deltas_of(message: dict[str, Any], by: random.Random) -> list[dict[str, Any]]:
    queues: list[list[dict[str, Any]]] = [[{"role": "assistant", "content": None}]]
    for name in TEXTS.keys() & message.keys():
        queues.append([{name: piece} for piece in utf16_pieces(message[name], by)])
    for index, call in enumerate(message.get("tool_calls", ())):
        begin, *rest = utf16_pieces(call["function"]["arguments"], by)
        function = call["function"] | {"arguments": begin}
        pieces = [{"index": index, **call, "function": function}]
        pieces += [{"index": index, "function": {"arguments": piece}} for piece in rest]
        queues.append([{"tool_calls": [piece]} for piece in pieces])
    return shuffled(queues, by)


@settings(max_examples=150, deadline=None)
@given(st.lists(MESSAGES, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_message_cut_into_deltas_gives_the_message(
    messages: list[dict[str, Any]], by: random.Random
) -> None:
    """Also where the choices come in any order, alone or several in one chunk."""
    queues, whole = [], []
    for index, message in enumerate(messages):
        queue = [{"index": index, "delta": delta} for delta in deltas_of(message, by)]
        queues.append([*queue, {"index": index, "finish_reason": "stop"}])
        whole.append({"index": index, "message": message, "finish_reason": "stop"})
    choices = shuffled(queues, by)
    groups = cut(choices, {by.randint(0, len(choices)) for _ in choices})
    sent = [chunk_dict(*group) for group in groups]
    completion = accumulate(map(ChatCompletionChunk.from_dict, sent))
    assert completion.to_dict() == chunk_dict(*whole, object="chat.completion")
    assert completion == ChatCompletion.from_dict(completion.to_dict())


def test_openais_accumulator_gives_the_same() -> None:
    chat = pytest.importorskip("openai.lib.streaming.chat")
    from openai.types.chat import ChatCompletionChunk as Theirs

    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": "Hel"}, {"content": "lo"}, {"refusal": "no"}]
    for index, name in enumerate("ab"):
        function = {"name": name, "arguments": ""}
        call = {"index": index, "id": name, "type": "function", "function": function}
        more = [
            {"index": index, "function": {"arguments": p}} for p in ('{"x"', ": 1}")
        ]
        deltas += [{"tool_calls": [call]} for call in (call, *more)]
    sent = [chunk_dict({"index": 0, "delta": d, "finish_reason": None}) for d in deltas]
    sent[1]["choices"][0]["logprobs"] = sent[2]["choices"][0]["logprobs"] = LOGPROBS
    sent.append(chunk_dict({"index": 0, "delta": {}, "finish_reason": "tool_calls"}))
    sent.append(chunk_dict(usage=USAGE))
    state = chat.ChatCompletionStreamState()
    for d in sent:
        state.handle_chunk(Theirs.model_validate(d))
    theirs = state.current_completion_snapshot.model_dump(exclude_none=True)
    for call in theirs["choices"][0]["message"]["tool_calls"]:
        call.pop("index", None)
        call["function"].pop("parsed_arguments", None)
    assert accumulate(map(ChatCompletionChunk.from_dict, sent)).to_dict() == theirs


# Pieces as index|id|name|arguments, calls as id|name|arguments
TOOL_CALLS = [
    ("by index", "0|a|f| 1|b|g|2 0|||1", "a|f|1 b|g|2"),
    ("by index in any order", "1|b|g|2 0|a|f|1 1|||2", "a|f|1 b|g|22"),
    ("id and name are set once", "0|a|f|1 0|a|f|2 0|||3", "a|f|123"),
    ("id and name may come late", "0|||1 0|a||2 0||f|", "a|f|12"),
    ("another id is another call", "0|a|f|1 0|b|g|2 0|||3", "a|f|1 b|g|23"),
    ("a new id opens a call", "|a|f|1 |b|g|2", "a|f|1 b|g|2"),
    ("a known id continues it", "|a|f|1 |b|g|2 |a||3", "a|f|13 b|g|2"),
    ("the last continues", "|a|f|1 |b|g|2 |||3", "a|f|1 b|g|23"),
    ("with nothing one opens", "||f|1 |||2", "|f|12"),
    ("an index then none", "0|a|f|1 1|b|g|2 |||3 |a||4", "a|f|14 b|g|23"),
]


def tool_call_piece(index: str, id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": id, "function": function} | ({"index": int(index)} if index else {})


@pytest.mark.parametrize(
    ("pieces", "calls"), [t[1:] for t in TOOL_CALLS], ids=[t[0] for t in TOOL_CALLS]
)
@pytest.mark.parametrize("unset", ["", None], ids=["empty", "missing"])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one chunk"])
def test_tool_calls(pieces: str, calls: str, unset: str | None, together: bool) -> None:
    sent = [tool_call_piece(*piece.split("|")) for piece in pieces.split(" ")]
    if unset is None:
        for piece in sent:
            piece["function"] = {
                k: v for k, v in piece["function"].items() if v
            } or None
            piece["id"] = piece["id"] or None
    groups = [sent] if together else [[piece] for piece in sent]
    completion = accumulate(chunks_of(*({"tool_calls": group} for group in groups)))
    made = completion.choices[0].message.tool_calls or []
    texts = [f"{c.id}|{c.function.name}|{c.function.arguments}" for c in made]
    assert " ".join(texts) == calls
    assert {call.type for call in made} == {"function"}


def test_what_is_unknown_in_a_tool_call_is_kept() -> None:
    """Gemini refuses the next turn without its `extra_content`, which comes alone."""
    call = {"id": "a", "type": "function", "function": {"arguments": "{}", "name": "f"}}
    pieces = [call | {"index": 0, "extra_content": {"google": {"x": 1}}}]
    pieces.append({"index": 0, "extra_content": {"google": {"y": 2}}})
    completion = accumulate(chunks_of(*({"tool_calls": [piece]} for piece in pieces)))
    message = completion.choices[0].message
    extra = {"extra_content": {"google": {"x": 1, "y": 2}}}
    assert message.tool_calls is not None
    assert message.tool_calls[0].extra == extra
    assert message.to_dict()["tool_calls"] == [call | extra]


def test_what_is_unknown_in_a_delta_is_kept() -> None:
    extra = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
    message = accumulate(chunks_of(extra, {"content": "a"})).choices[0].message
    assert message.extra == extra
    assert message.to_dict() == {"role": "assistant", "content": "a"} | extra


def test_what_is_unknown_in_a_chunk_is_in_raw() -> None:
    sent = [chunk_dict(timings={"n": 1}), chunk_dict(timings={"ms": 2.5}, usage=None)]
    completion = accumulate(map(ChatCompletionChunk.from_dict, sent))
    assert completion.raw["timings"] == {"n": 1, "ms": 2.5}


VALUES_OF_A = st.sampled_from([1, [1], [[2]], {"b": 1}, {"b": [1]}, {"b": {}}, None])


@given(st.lists(st.fixed_dictionaries({"a": VALUES_OF_A}), max_size=4))
@example([{"a": 1}, {"a": {"b": 1}}, {"a": {"b": 2}}])
def test_accumulating_leaves_the_chunks_as_they_are(
    extras: list[dict[str, Any]],
) -> None:
    sent = [
        chunk_dict({"delta": extra | {"tool_calls": [{"index": 0} | extra]}}, **extra)
        for extra in copy.deepcopy(extras)
    ]
    before = copy.deepcopy(sent)
    accumulate(map(ChatCompletionChunk.from_dict, sent))
    assert sent == before


STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
NO_END = {"index": 0, "delta": {"content": ""}, "finish_reason": None}
LESS = {"completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}
USAGES = {
    "after the end": [chunk_dict(STOP), chunk_dict(usage=USAGE)],
    "after the end with a choice": [chunk_dict(STOP), chunk_dict(NO_END, usage=USAGE)],
    "with the end": [chunk_dict(STOP, usage=USAGE), chunk_dict({"index": 0})],
    "before": [chunk_dict(NO_END, usage=USAGE), chunk_dict(STOP, usage=None)],
    "in each": [chunk_dict(NO_END, usage=LESS), chunk_dict(STOP, usage=USAGE)],
}


@pytest.mark.parametrize("sent", USAGES.values(), ids=USAGES)
def test_usage_may_come_anywhere_and_the_end_stays(sent: list[Any]) -> None:
    completion = accumulate(map(ChatCompletionChunk.from_dict, sent))
    assert completion.usage == sse_chat.CompletionUsage.from_dict(USAGE)
    assert [choice.finish_reason for choice in completion.choices] == ["stop"]


def test_the_head_is_of_the_first_chunks_that_have_it() -> None:
    """Azure's first chunk has none; LiteLLM gives each chunk another id."""
    empty = {"id": "", "created": 0, "model": "", "object": "", "choices": []}
    more = {"system_fingerprint": "f", "service_tier": "default", "usage": USAGE}
    sent = [empty | more, empty | {"id": "2"}, empty | {"id": "3", "created": 5}]
    made = accumulate(map(ChatCompletionChunk.from_dict, [*sent, chunk_dict()]))
    assert (made.id, made.created, made.model) == ("2", 5, "m")
    assert (made.object, made.service_tier) == ("chat.completion", "default")
    assert made.system_fingerprint == "f"


def test_logprobs_are_appended() -> None:
    chunks = [chunk_of({"content": "é"}, logprobs=LOGPROBS) for _ in "123"]
    logprobs = accumulate([*chunks, chunk_of()]).choices[0].logprobs
    tokens = sse_chat.ChoiceLogprobs.from_dict(LOGPROBS).content or []
    assert logprobs == sse_chat.ChoiceLogprobs(tokens * 3, None)


def test_a_function_call_is_put_together() -> None:
    calls = [
        {"name": "f", "arguments": '"\ud83d'},
        {"arguments": '\ude42"', "name": "f"},
    ]
    completion = accumulate(chunks_of(*({"function_call": call} for call in calls)))
    function_call = completion.choices[0].message.function_call
    assert function_call == sse_chat.FunctionCall('"\U0001f642"', "f")


def test_the_completion_may_be_taken_at_any_time() -> None:
    accumulator = ChatAccumulator()
    assert accumulator.completion == ChatCompletion() == accumulate([])
    texts = []
    for chunk in chunks_of(
        *({"content": text} for text in ("a", "\ud83d", "\ude42", "b"))
    ):
        accumulator.add(chunk)
        texts.append(accumulator.completion.text)
        assert accumulator.completion.choices[0].finish_reason is None
    assert texts == ["a", "a\ufffd", "a\U0001f642", "a\U0001f642b"]


@given(st.lists(st.text(st.sampled_from("a\U0001f642\ud83d\ude42") | st.characters())))
def test_what_comes_out_can_always_be_encoded(texts: list[str]) -> None:
    def joined(pair: re.Match[str]) -> str:
        high, low = map(ord, pair[0])
        return chr(0x10000 + (high - 0xD800) * 0x400 + low - 0xDC00)

    expected = re.sub("[\ud800-\udbff][\udc00-\udfff]", joined, "".join(texts))
    expected = re.sub("[\ud800-\udfff]", "\ufffd", expected)
    calls = [[{"index": 0, "function": {"arguments": text}}] for text in ["", *texts]]
    completion = accumulate(
        chunk_of({"content": t, "reasoning": t, "refusal": t, "tool_calls": c})
        for t, c in zip(["", *texts], calls, strict=True)
    )
    message: Any = completion.choices[0].message
    assert (completion.text, completion.reasoning) == (expected, expected)
    assert (message.refusal, message.tool_calls[0].function.arguments) == (
        expected,
    ) * 2
    json.dumps(completion.to_dict(), ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------
# Thinking inside the text
# ------------------------------------------------------------------------------------


def runs(parts: Iterable[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """Join neighbours of one kind; no part is empty."""
    made: list[tuple[bool, str]] = []
    for thinking, text in parts:
        assert text
        before = made.pop()[1] if made and made[-1][0] == thinking else ""
        made.append((thinking, before + text))
    return made


def thinking_and_text(text: str) -> list[tuple[bool, str]]:
    """The rule as one expression, for a text that is whole."""
    found = re.fullmatch(r"\s*<think>(.*?)(</think>\n*(.*))?", text, re.DOTALL)
    parts = [(True, found[1]), (False, found[3])] if found else [(False, text)]
    return [(thinking, part) for thinking, part in parts if part]


THINKING = [
    ("<think>a</think>b", [(True, "a"), (False, "b")]),
    (" \n<think>\na\n</think>\n\n b\n", [(True, "\na\n"), (False, " b\n")]),
    ("\n\n  a", [(False, "\n\n  a")]),
    ("strip <think> tags. Done.", [(False, "strip <think> tags. Done.")]),
    ("a<think>b</think>c", [(False, "a<think>b</think>c")]),
    ("<think>a</think>b<think>c", [(True, "a"), (False, "b<think>c")]),
    ("<think>a</think></think>b", [(True, "a"), (False, "</think>b")]),
    ("<think><think></think>b</think>", [(True, "<think>"), (False, "b</think>")]),
    ("<think></ </</think>b", [(True, "</ </"), (False, "b")]),
    ("<think>a</thi", [(True, "a</thi")]),
    ("<think></think>\n", []),
    (" <thi", [(False, " <thi")]),
    ("<<think>a", [(False, "<<think>a")]),
    ("<THINK>a", [(False, "<THINK>a")]),
    ("", []),
]


@pytest.mark.parametrize(("text", "expected"), THINKING)
def test_thinking(text: str, expected: list[tuple[bool, str]]) -> None:
    assert thinking_and_text(text) == expected
    for at in range(len(text) + 1):
        assert runs(split_thinking([text[:at], "", text[at:]])) == expected


TAGS = st.sampled_from(["<think>", "</think>", "<", "thi", "nk>", "/", "a", " ", "\n"])


@given(cuttings(st.lists(TAGS).map("".join)), st.sampled_from(["", " \n<think>"]))
def test_thinking_is_the_same_however_cut(pieces: list[str], begin: str) -> None:
    whole = thinking_and_text(begin + "".join(pieces))
    assert runs(split_thinking([*begin, *pieces])) == whole


def test_only_what_may_begin_a_tag_is_held_back() -> None:
    texts = iter(["<think>a", "b <", "c </thi", "x</think>", "d <", "e"])
    parts = split_thinking(texts)
    thought = [(True, "a"), (True, "b "), (True, "<c "), (True, "</thix")]
    assert [next(parts) for _ in range(5)] == [*thought, (False, "d <")]
    assert next(texts) == "e"


# ------------------------------------------------------------------------------------
# Asking: the same test sync, under asyncio and under trio
# ------------------------------------------------------------------------------------

Truncated = TruncatedStreamError
Invalid = sse_chat.APIResponseValidationError
Status = sse_chat.APIStatusError
Timeout = sse_chat.APITimeoutError
Unreachable = sse_chat.APIConnectionError

ENVIRONMENT = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "OLLAMA_HOST")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: Any) -> None:
    for name in (*ENVIRONMENT, *PROXIES, *map(str.lower, PROXIES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: Any) -> str:
    if request.param == "trio":
        pytest.importorskip("trio", reason="trio is not installed")
    return request.param


class Ask:
    """Asks, takes all there is, keeps the error; a wait before a retry takes no time.

    Any other exception than an APIError fails the test.
    """

    def __init__(self, mode: str, monkeypatch: Any) -> None:
        self.mode = mode
        self.waits: list[float] = []

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        wait = staticmethod(self.waits.append)
        monkeypatch.setattr(sse_chat.ChatStream, "sleep", wait)
        monkeypatch.setattr(sse_chat.AsyncChatStream, "sleep", staticmethod(sleep))

    def __call__(
        self, base_url: str | None, whole: bool = False, **options: Any
    ) -> Any:
        options = {"messages": "hi", "base_url": base_url, "timeout": 10} | options
        if self.mode == "sync":
            return (take_whole if whole else take)(**options)
        return anyio.run(
            lambda: (atake_whole if whole else atake)(**options), backend=self.mode
        )


class Answer:
    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.error: Any = None
        self.stream: Any = None
        self.completion: Any = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)


def take(stream: Any = None, **options: Any) -> Answer:
    answer = Answer()
    answer.stream = stream = stream or sse_chat.stream_chat(**options)
    try:
        for chunk in stream:
            answer.chunks.append(chunk)
    except APIError as error:
        answer.error = error
    answer.completion = stream.completion
    return answer


async def atake(stream: Any = None, **options: Any) -> Answer:
    answer = Answer()
    answer.stream = stream = stream or sse_chat.astream_chat(**options)
    try:
        async for chunk in stream:
            answer.chunks.append(chunk)
    except APIError as error:
        answer.error = error
    answer.completion = stream.completion
    return answer


def take_whole(**options: Any) -> Answer:
    answer = Answer()
    try:
        answer.completion = sse_chat.generate(**options)
    except APIError as error:
        answer.error = error
        answer.completion = error.completion
    return answer


async def atake_whole(**options: Any) -> Answer:
    answer = Answer()
    try:
        answer.completion = await sse_chat.agenerate(**options)
    except APIError as error:
        answer.error = error
        answer.completion = error.completion
    return answer


@pytest.fixture(params=["sync", "asyncio", "trio"])
def ask(request: Any, monkeypatch: Any) -> Ask:
    if request.param == "trio":
        pytest.importorskip("trio", reason="trio is not installed")
    return Ask(request.param, monkeypatch)


@pytest.fixture
def ask_sync(monkeypatch: Any) -> Ask:
    return Ask("sync", monkeypatch)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
GONE = object()  # a step of `play`: wait until the client has gone


def play(*steps: Any) -> Callable[[socket.socket, int], None]:
    """Answer in steps: bytes to send, seconds to wait, GONE, or an iterator of them."""

    def perform(connection: socket.socket, steps: Any) -> None:
        for step in steps:
            if step is GONE:
                while connection.recv(65536):
                    pass
                raise ConnectionError
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, (int, float)):
                time.sleep(step)
            else:
                perform(connection, step)

    return lambda connection, number: perform(connection, steps)


def each(*answers: bytes) -> Callable[[socket.socket, int], None]:
    """Give the first request the first answer, and so on; the last again and again."""
    return lambda connection, number: connection.sendall(
        answers[min(number, len(answers)) - 1]
    )


FRAMINGS = ("chunked", "close", "length", "gzip")


def framed(
    framing: str, *parts: bytes, dirty: bool = False, kind: str = "text/event-stream"
) -> Callable[[socket.socket, int], None]:
    """Answer with these parts as the body; if dirty, break off after them."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n"
    if framing == "gzip":
        head += "Content-Encoding: gzip\r\n"
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(b"".join(parts))
        parts = (packed + packer.flush(zlib.Z_SYNC_FLUSH if dirty else zlib.Z_FINISH),)
    body = b"".join(parts)
    if framing == "length":
        head += f"Content-Length: {len(body) + dirty}\r\n"
    elif framing == "close":
        head += "Connection: close\r\n"
    else:
        head += "Transfer-Encoding: chunked\r\n"
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts if p)
        body += b"" if dirty else b"0\r\n\r\n"

    def handle(connection: socket.socket, number: int) -> None:
        connection.sendall(head.encode() + b"\r\n" + body)
        if dirty and framing == "close":
            time.sleep(0.02)  # then closing it resets it
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    return handle


def sse(payload: Any, **fields: str) -> bytes:
    head = "".join(f"{name}: {value}\n" for name, value in fields.items())
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


MESSAGE = {"role": "assistant", "content": "Hello"}
WHOLE = {
    "id": "chatcmpl-2",
    "object": "chat.completion",
    "model": "m",
    "created": 2,
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
}
JSON = json.dumps(WHOLE).encode()
SAID = HELLO[:2]  # of an answer that does not end

# ------------------------------------------------------------------------------------
# How a stream ends
# ------------------------------------------------------------------------------------


class End(NamedTuple):
    """A body, and what the caller gets: an error of this very type, or none."""

    parts: tuple[bytes, ...]
    error: type[APIError] | None
    text: str = "Hello"
    finish: str | None = None
    says: str = ""  # in the message
    kind: str = "text/event-stream"
    options: dict[str, Any] = {}  # noqa: RUF012
    if_cut: type[APIError] | None = None  # the error if the connection broke as well


PAGE = b"<!doctype html><title>Sign in</title>"
ERASED = sse(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "",
        "system_fingerprint": "fp_ollama",
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": None}],
    }
)
FAILED = sse({"error": {"message": "boom", "type": "server_error", "code": 500}})
NO_ERROR = json.loads(HELLO[0][6:]) | {"error": None}
OPENROUTER = json.loads(event("", finish="error")[6:])
OPENROUTER |= {"error": {"code": 502, "message": "boom"}}
BOTH = {"finish": "stop", "error": None}

ENDS = {
    "complete": End(HELLO, None, finish="stop"),
    "finish without [DONE]": End(HELLO[:3], None, finish="stop"),
    "[DONE] without finish": End((*SAID, DONE), None),
    "[DONE] without blank line": End((*SAID, b"data: [DONE]"), None),
    "[DONE] in one line end": End((*SAID, b"data: [DONE]\n"), None),
    "finish without blank line": End((*SAID, HELLO[2].rstrip()), None, finish="stop"),
    "comments and usage after the finish": End(
        (*HELLO[:3], b": ping\n\n", sse({"choices": [], "usage": {}}), DONE),
        None,
        finish="stop",
    ),
    "cut": End(SAID, Truncated),
    "cut in an event": End((*SAID, HELLO[2][:-40]), Truncated),
    "cut in [DONE]": End((*SAID, b"data: [DON"), Truncated),
    "cut before a token": End((b": ping\n\n",), Truncated, text=""),
    "cut in a code point": End((*SAID, 'data: {"é'.encode()[:-1]), Truncated),
    "one of two choices finished": End(
        (event("Hello"), event("x", index=1), event(finish="stop")),
        Truncated,
        finish="stop",
    ),
    'finish_reason ""': End((*SAID, event(finish="")), Truncated),
    "Ollama's erased error": End((*SAID, ERASED), Truncated),
    "error null": End((sse(NO_ERROR), *HELLO[1:]), None, finish="stop"),
    "error": End((*SAID, FAILED), APIError, says="boom"),
    "error and [DONE]": End((*SAID, FAILED, DONE), APIError, says="boom"),
    "error, finish and [DONE]": End((*SAID, FAILED, *HELLO[2:]), APIError, says="boom"),
    "error after the finish": End(
        (*HELLO[:3], FAILED, DONE), APIError, says="boom", finish="stop"
    ),
    "error without blank line": End((*SAID, FAILED.rstrip()), APIError, says="boom"),
    "error with choices": End((*SAID, sse(OPENROUTER)), APIError, says="boom"),
    "finish_reason error": End((*SAID, event(finish="error"), DONE), APIError),
    "not JSON": End((*SAID, b"data: oops, {\n\n", DONE), Invalid, says="oops, {"),
    "no object": End((*SAID, b"data: 17\n\n", DONE), Invalid, says="17"),
    "too large": End(
        (*SAID, event("x" * 3000), DONE),
        Invalid,
        says="2000",
        options={"max_event_bytes": 2000},
    ),
    "JSON by header": End((JSON,), None, finish="stop", kind="application/json"),
    "JSON by first byte": End((JSON,), None, finish="stop"),
    "JSON after blank lines": End((b"\n", b"\r\n  \n", JSON), None, finish="stop"),
    "JSON as text": End((JSON,), None, finish="stop", kind="text/plain"),
    "JSON cut": End((JSON[:-9],), Truncated, text=""),
    "JSON too large": End(
        (JSON,), Invalid, text="", says="100", options={"max_event_bytes": 100}
    ),
    "other JSON": End((b'{"ok": true}',), Invalid, text="", says="true"),
    "stream under application/json": End(
        HELLO, None, finish="stop", kind="application/json"
    ),
    "stream under octet-stream": End(
        HELLO, None, finish="stop", kind="application/octet-stream"
    ),
    "HTML": End(
        (PAGE,), Invalid, "", says="Sign in", kind="text/html", if_cut=Truncated
    ),
    "plain text": End(
        (b"upstream gone",),
        Invalid,
        "",
        says="gone",
        kind="text/plain",
        if_cut=Truncated,
    ),
    "long text": End(
        (b"word " * 5000,),
        Invalid,
        "",
        says="word word",
        kind="text/plain",
        if_cut=Invalid,
    ),
    "empty": End((), Invalid, "", kind="text/x-empty", says="empty", if_cut=Truncated),
    "blank": End((b"\n\n",), Invalid, "", if_cut=Truncated),
}


def check_end(answer: Answer, end: End, dirty: bool = False) -> None:
    """Compare all but `.chunks`, which `generate` does not give."""
    expected = end.if_cut if dirty and end.if_cut else end.error
    assert type(answer.error) is (expected or type(None)), answer.error
    got = answer.completion.choices
    assert answer.completion.text == end.text
    assert (got[0].finish_reason if got else None) == end.finish
    if expected and not dirty:
        assert end.says in str(answer.error)
        assert end.kind in str(answer.error) or not end.if_cut
        assert len(str(answer.error)) < 1000


@pytest.mark.parametrize("dirty", [False, True], ids=["", "then cut"])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_how_a_stream_ends(ask: Ask, end: End, framing: str, dirty: bool) -> None:
    with serve(framed(framing, *end.parts, dirty=dirty, kind=end.kind)) as server:
        answer = ask(server.url, **end.options)
    check_end(answer, end, dirty)
    assert answer.text == end.text
    assert answer.stream.complete is (answer.error is None)
    assert len(server.heads) == 1  # an answer that has begun is not asked for again
    if answer.error:
        assert answer.error.completion == answer.stream.completion
        assert server.url in str(answer.error)
        if dirty and isinstance(answer.error, Truncated):
            assert answer.error.__cause__ is not None


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_generate_ends_as_a_stream_does(ask: Ask, end: End) -> None:
    with serve(framed("chunked", *end.parts, kind=end.kind)) as server:
        answer = ask(server.url, whole=True, **end.options)
    check_end(answer, end)
    assert json.loads(server.bodies[0])["stream"] is False


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_iter_chunks_is_a_stream_without_http(ask_sync: Ask, end: End) -> None:
    with serve(framed("close", *end.parts, kind=end.kind)) as server:
        expected = ask_sync(server.url, **end.options)
    body = b"".join(end.parts)
    for size in (1, 7, len(body) or 1):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        for chunks, error in (
            gather(pieces, **end.options),
            anyio.run(lambda p=pieces: agather(p, **end.options)),
        ):
            assert chunks == expected.chunks
            assert type(error) is type(expected.error)
            if error:
                assert error.completion == expected.completion


def gather(pieces: Any, **options: Any) -> tuple[list[Any], Exception | None]:
    chunks: list[Any] = []
    try:
        for chunk in sse_chat.iter_chunks(pieces, **options):
            chunks.append(chunk)
    except APIError as error:
        return chunks, error
    return chunks, None


async def agather(pieces: Any, **options: Any) -> tuple[list[Any], Exception | None]:
    async def give() -> Any:
        for piece in pieces:
            yield piece

    chunks: list[Any] = []
    try:
        async for chunk in sse_chat.aiter_chunks(give(), **options):
            chunks.append(chunk)
    except APIError as error:
        return chunks, error
    return chunks, None


@pytest.mark.parametrize(
    "around", ["data: %s", "data:  %s ", "data: \t%s", "data:\ndata: %s"]
)
def test_white_space_around_the_json_of_an_event(around: str) -> None:
    first, last = (
        json.dumps(chunk_dict({"index": 0, "delta": {"content": text}} | end))
        for text, end in (("a", {}), ("b", {"finish_reason": "stop"}))
    )
    reads = [f"{around % data}\n\n".encode() for data in (first, last)]
    for pieces in (reads, [b"".join(reads)]):
        chunks, error = gather(pieces)
        assert ([chunk.text for chunk in chunks], error) == (["a", "b"], None)


def test_iter_chunks_takes_an_os_error_for_the_end() -> None:
    def broken() -> Any:
        yield b"".join(SAID)
        raise ConnectionResetError("gone")

    chunks, error = gather(broken())
    assert [chunk.text for chunk in chunks] == ["Hel", "lo"]
    assert isinstance(error, Truncated)
    assert isinstance(error.__cause__, ConnectionResetError)


@pytest.mark.parametrize("framing", ["close", "length"])
@pytest.mark.parametrize("body", [b"".join(HELLO), JSON], ids=["stream", "JSON"])
def test_a_body_cut_after_any_byte_is_never_whole(
    ask_sync: Ask, body: bytes, framing: str
) -> None:
    finished = body.find(b'"stop"}]}') + len(b'"stop"}]}')
    finished = finished if body is not JSON else len(JSON)
    dirty = framing == "length"

    def handle(connection: socket.socket, number: int) -> None:
        framed(framing, body[: number - 1], dirty=dirty)(connection, number)

    with serve(handle) as server, sse_chat.ChatClient(base_url=server.url) as client:
        for cut in range(len(body)):
            answer = take(client.stream("hi"))
            ended = body[:cut].count(b"\n\n")  # the event after them may be whole, too
            assert answer.text in {"Hello"[: 3 * n] for n in (ended, ended + 1)}
            assert answer.completion.text == answer.text
            if cut < finished:
                assert isinstance(answer.error, (Truncated, Invalid)), cut
                assert not answer.stream.complete
            else:
                assert answer.error is None
                assert answer.text == "Hello"
        assert len(server.heads) == len(body)


# ------------------------------------------------------------------------------------
# Errors in every shape
# ------------------------------------------------------------------------------------

# what is sent; the code, type and param that are found in it, beside the word "boom"
SHAPES: dict[str, tuple[Any, Any, Any, Any]] = {
    "OpenAI": (
        {"error": {"message": "boom", "type": "t", "param": "p", "code": "c"}},
        *("c", "t", "p"),
    ),
    "a code that is an int": (
        {"error": {"message": "boom", "code": 400, "type": None, "param": None}},
        *(400, None, None),
    ),
    "text": ({"error": "boom"}, None, None, None),
    "Gemini": ([{"error": {"code": 400, "message": "boom"}}], 400, None, None),
    "old vLLM": (
        {"object": "error", "message": "boom", "type": "B", "param": None, "code": 400},
        *(400, "B", None),
    ),
    "Mistral": (
        {"object": "error", "message": {"detail": [{"msg": "boom"}]}, "type": "t"},
        *(None, "t", None),
    ),
    "FastAPI text": ({"detail": "boom"}, None, None, None),
    "FastAPI list": ({"detail": [{"loc": ["body"], "msg": "boom"}]}, None, None, None),
    "LM Studio": ({"error": {"message": "boom"}, "message": "boom"}, None, None, None),
    "OpenRouter": (
        {"error": {"code": 402, "message": "boom", "metadata": {"raw": "x"}}},
        *(402, None, None),
    ),
    "message is a list": ({"error": {"message": ["boom", "x"]}}, None, None, None),
    "message is a dict": ({"error": {"message": {"text": "boom"}}}, None, None, None),
    "llama.cpp": (
        {"error": {"code": 400, "message": "boom", "type": "e", "n_ctx": 8}},
        *(400, "e", None),
    ),
    "a strange code": ({"error": {"message": "boom", "code": []}}, None, None, None),
}


def check_error(error: Any, shape: Any, url: str) -> None:
    body, code, kind, param = shape
    assert "boom" in str(error) == error.message
    assert url in error.message
    assert (error.body, error.code, error.type, error.param) == (
        body,
        code,
        kind,
        param,
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_error_of_any_shape_is_told(ask: Ask, shape: Any) -> None:
    body = json.dumps(shape[0]).encode()
    status = http(body, status="400 Bad Request", kind="application/json")
    with serve(
        each(
            chunked(*SAID, sse(shape[0])),
            chunked(*SAID, sse(shape[0]), DONE),
            chunked(*SAID, sse(shape[0], event="error"), DONE),
            http(body, kind="application/json"),
            status,
        )
    ) as server:
        for _ in range(3):
            answer = ask(server.url)
            check_error(answer.error, shape, server.url)
            assert type(answer.error) is APIError
            assert answer.text == answer.error.completion.text == "Hello"
            assert answer.stream.complete is False
            assert answer.completion.choices[0].finish_reason is None
        answer = ask(server.url)
        check_error(answer.error, shape, server.url)
        assert type(answer.error) is APIError
        answer = ask(server.url, whole=True)
        check_error(answer.error, shape, server.url)
        assert type(answer.error) is Status
        assert "400" in answer.error.message
        assert answer.error.status_code == answer.error.response.status_code == 400
        assert answer.error.response.json() == shape[0]


@pytest.mark.parametrize(
    ("sent", "says", "code"),
    [
        (b'event: error\ndata: {"code":400,"details":"boom"}\n\n', "boom", 400),
        (b"event: error\ndata: boom\n\n", "boom", None),
        (b'event: error\ndata: "boom"\n\n', "boom", None),
        (b'event: error\ndata: {"message":"boom"}\n\n', "boom", None),
        (b'event:error\ndata:{"error":{"message":"boom","code":1}}\n\n', "boom", 1),
        (b'error: {"code":400,"message":"boom","type":"t"}\n\n', "boom", 400),
        (b'error: {"code":400,"message":"boom"}\r\n', "boom", 400),
        (b"error: boom\n\n", "boom", None),
        (b'error:{"error":"boom"}\n\n', "boom", None),
    ],
)
def test_errors_that_only_a_stream_can_hold(
    ask: Ask, sent: bytes, says: str, code: Any
) -> None:
    with serve(chunked(*SAID, sent, DONE)) as server:
        answer = ask(server.url)
    assert type(answer.error) is APIError
    assert says in answer.error.message
    assert answer.error.code == code
    assert answer.text == answer.error.completion.text == "Hello"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (PAGE * 1000, "Sign in"),
        (b"no such thing", "no such thing"),
        (b"", "Gone Fishing"),
    ],
    ids=["HTML", "text", "empty"],
)
def test_a_status_without_json(ask: Ask, body: bytes, says: str) -> None:
    with serve(http(body, status="418 Gone Fishing", kind="text/html")) as server:
        error = ask(server.url).error
    assert type(error) is Status
    assert says in error.message
    assert "418" in error.message
    assert len(error.message) < 1500
    assert error.body == (body.decode() or "Gone Fishing")[: len(str(error.body))]


def test_a_packed_error_and_one_that_does_not_end(ask: Ask) -> None:
    packed = gzip.compress(b'{"error": "boom"}')
    endless = b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 100_000, GONE
    with serve(
        http(packed, status="400 No", headers="Content-Encoding: gzip\r\n")
    ) as server:
        assert "boom" in ask(server.url).error.message
    with serve(play(*endless)) as server:
        error = ask(server.url, max_retries=0).error
    assert error.status_code == 500
    assert len(error.message) < 1500


# ------------------------------------------------------------------------------------
# Any cutting, any damage
# ------------------------------------------------------------------------------------

REAL = {
    "OpenAI": (
        event("", role="assistant"),
        event("Wörld 🙂"),
        event(reasoning_content="hm"),
        event(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f"}}]),
        event(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
        event(finish="tool_calls"),
        sse({"choices": [], "usage": {"prompt_tokens": 1, "total_tokens": 2}}),
        DONE,
    ),
    "OpenRouter": (b": OPENROUTER PROCESSING\n\n", *SAID, *HELLO[2:]),
    "two choices, CRLF": tuple(
        part.replace(b"\n", b"\r\n")
        for part in (
            event("a"),
            event("b", index=1),
            event(finish="stop", index=1),
            event(finish="length"),
            DONE,
        )
    ),
    "error": (*SAID, FAILED, DONE),
    "JSON": (b"\n\n", JSON),
}


@given(st.sampled_from(sorted(REAL)), st.lists(st.integers(0, 1500), max_size=20))
@settings(deadline=None)
def test_any_cutting_gives_the_same(name: str, cuts: list[int]) -> None:
    body = b"".join(REAL[name])
    at = [0, *sorted(cuts), len(body)]
    pieces = [body[a:b] for a, b in itertools.pairwise(at)]
    chunks, error = gather(pieces)
    expected, expected_error = gather([body])
    assert chunks == expected
    assert repr(error) == repr(expected_error)


CI = os.environ.get("HYPOTHESIS_PROFILE") == "ci"
EDITS = st.lists(
    st.tuples(
        st.integers(0, 1500),
        st.integers(0, 3),
        st.one_of(st.binary(max_size=4), st.sampled_from([b"\n\n", b'"', b"\0", b"{"])),
    ),
    min_size=1,
    max_size=8,
)


@given(st.sampled_from(sorted(REAL)), EDITS, st.booleans())
@settings(max_examples=10_000 if CI else 200, deadline=None)
def test_damaged_streams_raise_only_api_errors(
    name: str, edits: list[tuple[int, int, bytes]], cut: bool
) -> None:
    """And where the finish was cut off, none of them ends as if it were whole."""
    parts = REAL[name]
    if cut:
        ends = (b'"finish_reason": "', b"[DONE]")
        parts = tuple(
            itertools.takewhile(lambda p: not any(e in p for e in ends), parts)
        )
    body = bytearray(b"".join(parts))
    for at, length, put in edits:
        at %= len(body) + 1
        body[at : at + length] = put
    _, error = gather([bytes(body)])
    if cut and not any(e in body for e in ends):
        assert error is not None
    if error:
        pickle.dumps(error)
        str(error).encode()


# ------------------------------------------------------------------------------------
# Before the first byte: retries, redirects, hints
# ------------------------------------------------------------------------------------

GOOD = chunked(*HELLO)


def refuse(status: int, headers: str = "") -> bytes:
    return http(b'{"error": "boom"}', status=f"{status} No", headers=headers)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_statuses_that_are_tried_again(ask: Ask, status: int) -> None:
    with serve(each(refuse(status), GOOD)) as server:
        assert ask(server.url).text == "Hello"
        assert len(server.heads) == 2
    assert 0.375 <= ask.waits[0] <= 0.5
    with serve(refuse(status)) as server:
        error = ask(server.url, whole=True).error
        assert (error.status_code, len(server.heads)) == (status, 3)


@pytest.mark.parametrize("status", [201, 204, 304, 400, 401, 402, 403, 404, 413, 422])
def test_statuses_that_are_not(ask_sync: Ask, status: int) -> None:
    with serve(refuse(status)) as server:
        error = ask_sync(server.url).error
        assert len(server.heads) == 1
    assert ask_sync.waits == []
    assert type(error) is (
        Status if status >= 300 else APIError if status == 201 else Invalid
    )


@pytest.mark.parametrize("retries", [0, 1, 2, 7])
def test_max_retries_and_backoff(ask: Ask, retries: int) -> None:
    with serve(refuse(503)) as server:
        assert ask(server.url, max_retries=retries).error.status_code == 503
        assert len(server.heads) == 1 + retries
    for attempt, wait in enumerate(ask.waits):
        most = min(8.0, 0.5 * 2**attempt)
        assert most / 2 <= wait <= most
    assert len(ask.waits) == retries


def test_the_wait_has_jitter(ask_sync: Ask) -> None:
    with serve(refuse(503)) as server:
        for _ in range(5):
            ask_sync(server.url, max_retries=1)
    assert len(set(ask_sync.waits)) > 1


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ("Retry-After: 7", 7, 7),
        ("Retry-After: 0", 0, 0),
        ("Retry-After: 0.25", 0.25, 0.25),
        ("Retry-After: 60", 60, 60),
        ("retry-after-ms: 1500\r\nRetry-After: 9", 1.5, 1.5),
        ("Retry-After: {date:20}", 18, 20),
        ("Retry-After: {date:-900}", 0, 0),
        ("Retry-After: soon", 0.25, 0.5),
        ("Retry-After: -5", 0, 0.5),
        ("Retry-After: nan", 0, 0.5),
        ("Retry-After: Mon, 99 Foo 2026 00:00:00 GMT", 0.25, 0.5),
        ("Retry-After: 61", None, 61),
        ("Retry-After: inf", None, math.inf),
        ("Retry-After: {date:3600}", None, 3600),
        ("retry-after-ms: 60001", None, 60.001),
    ],
)
def test_retry_after(ask: Ask, headers: str, least: Any, most: float) -> None:
    class Date:
        def __format__(self, seconds: str) -> str:
            return formatdate(time.time() + int(seconds), usegmt=True)

    headers = headers.format(date=Date()) + "\r\n"
    with serve(each(refuse(429, headers), GOOD)) as server:
        answer = ask(server.url)
    if least is None:  # longer than is waited
        assert answer.error.status_code == 429
        assert ask.waits == []
        assert answer.error.retry_after == pytest.approx(most, abs=2)
    else:
        assert answer.text == "Hello"
        assert least <= ask.waits[0] <= most


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}/v1"


def test_nobody_listens(ask: Ask) -> None:
    url = closed_port()
    error = ask(url).error
    assert type(error) is Unreachable
    assert all(word in str(error) for word in (url, "ollama serve", "base_url"))
    assert len(ask.waits) == 2
    assert type(ask(url, whole=True, max_retries=0).error) is Unreachable
    assert type(error.__cause__).__name__ == "ConnectError"


def test_a_connection_that_ends_before_an_answer(ask: Ask) -> None:
    with serve(each(b"", b"", GOOD)) as server:
        assert ask(server.url).text == "Hello"
    assert len(ask.waits) == 2
    with serve(each(b"HTTP/1.1 200 OK\r\nContent-", b"gibberish\r\n\r\n")) as server:
        assert type(ask(server.url).error) is Unreachable
        assert len(server.heads) == 3


@pytest.mark.parametrize("backend", ["sync", "asyncio", "trio"])
def test_dead_connections_of_the_pool_do_not_show(
    backend: str, monkeypatch: Any
) -> None:
    """The server promises to keep the connection, and closes it after each answer."""
    if backend == "trio":
        pytest.importorskip("trio", reason="trio is not installed")
    ask = Ask(backend, monkeypatch)

    async def many(client: Any) -> None:
        async with client:
            for number in range(20):
                if number % 3:
                    assert (await atake(client.stream("hi"))).text == "Hello"
                else:
                    assert (await client.generate("hi")).text == "Hello"

    with serve(GOOD) as server:
        options = {"base_url": server.url, "max_retries": 0}
        if backend == "sync":
            with sse_chat.ChatClient(**options) as client:
                for number in range(20):
                    if number % 3:
                        assert take(client.stream("hi")).text == "Hello"
                    else:
                        assert client.generate("hi").text == "Hello"
        else:
            anyio.run(many, sse_chat.AsyncChatClient(**options), backend=backend)
        assert len(server.heads) == server.connections == 20
    assert ask.waits == []


@pytest.mark.parametrize("backend", ["sync", "asyncio", "trio"])
@pytest.mark.parametrize("late", [False, True], ids=["", "with a late end"])
def test_after_done_the_connection_is_used_again(backend: str, late: bool) -> None:
    if backend == "trio":
        pytest.importorskip("trio", reason="trio is not installed")

    def handle(connection: socket.socket, number: int) -> str:
        connection.sendall(chunked(*HELLO, end=not late))
        if late:
            time.sleep(0.05)
            connection.sendall(b"5\r\n: end\r\n0\r\n\r\n")
        return KEEP

    async def five(client: Any) -> None:
        async with client:
            for _ in range(5):
                assert (await atake(client.stream("hi"))).text == "Hello"
                assert "".join([t async for t in client.stream("hi").text()]) == "Hello"

    with serve(handle) as server:
        if backend == "sync":
            with sse_chat.ChatClient(base_url=server.url) as client:
                for _ in range(5):
                    assert take(client.stream("hi")).text == "Hello"
                    assert "".join(client.stream("hi").text()) == "Hello"
        else:
            client = sse_chat.AsyncChatClient(base_url=server.url)
            anyio.run(five, client, backend=backend)
        assert (server.connections, len(server.heads)) == (1, 10)


@pytest.mark.parametrize("more", [GONE, itertools.repeat(b": x\n" * 4096)])
def test_what_follows_done_is_bounded(ask: Ask, more: Any) -> None:
    started = time.monotonic()
    with serve(play(HEAD, *HELLO, more)) as server:
        answer = ask(server.url)
        assert answer.text == "Hello"
        assert answer.stream.complete
        assert server.left.acquire(timeout=1)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(ask: Ask, status: int) -> None:
    with serve(GOOD) as other:
        location = f"Location: {other.url.replace('//', '//u:hush@')}/x?key=hush\r\n"
        with serve(refuse(status, location)) as server:
            error = ask(server.url, api_key="sk-secret").error
        assert type(error) is Status
        assert error.status_code == status
        assert f"{other.url}/x" in str(error)
        assert "hush" not in str(error)
        assert other.connections == 0
        own = httpx.Client(follow_redirects=True)
        with own, serve(refuse(status, location)) as server:
            assert type(
                take(sse_chat.stream_chat("", base_url=server.url, client=own)).error
            )
        assert other.connections == 0


def test_not_found_hints_at_v1(ask: Ask) -> None:
    with serve(refuse(404)) as server:
        assert "/v1;" not in str(ask(server.url).error)
        error = ask(server.url.replace("/v1", "/api")).error
    assert "404" in str(error)
    assert "base_url that ends in /v1" in str(error)


# ------------------------------------------------------------------------------------
# Time
# ------------------------------------------------------------------------------------

SHORT = 0.15
PINGS = itertools.cycle((b": ping\n\n", 0.05))


def timed(seconds: float, form: str) -> Any:
    return seconds if form == "number" else httpx.Timeout(5, read=seconds)


@pytest.mark.parametrize("form", ["number", "httpx.Timeout"])
@pytest.mark.parametrize(
    ("steps", "text", "phase"),
    [
        ((), "", "waiting for the answer"),
        ((HEAD[:20],), "", "waiting for the answer"),
        ((HEAD,), "", "waiting for the first token"),
        ((HEAD, b": ping\n\n"), "", "waiting for the first token"),
        ((HEAD, event("", role="assistant")), "", "waiting for the first token"),
        ((HEAD, *SAID), "Hello", "between chunks"),
        ((HEAD, event(reasoning_content="hm")), "", "between chunks"),
    ],
)
def test_silence(ask: Ask, steps: Any, text: str, phase: str, form: str) -> None:
    started = time.monotonic()
    with serve(play(*steps, GONE)) as server:
        answer = ask(server.url, timeout=timed(SHORT, form))
        assert server.left.acquire(timeout=1)
        assert len(server.heads) == 1  # it may be at work: it is not asked again
    assert SHORT <= time.monotonic() - started < SHORT + 2
    assert type(answer.error) is Timeout
    assert phase in str(answer.error)
    assert re.search(r"\b0\.[12]\d* s", str(answer.error))
    assert answer.text == answer.error.completion.text == text
    assert answer.stream.complete is False


def test_silence_after_the_finish_is_no_error(ask: Ask) -> None:
    with serve(play(HEAD, *HELLO[:3], GONE)) as server:
        answer = ask(server.url, timeout=SHORT)
    assert answer.error is None
    assert answer.stream.complete


def test_comments_are_signs_of_life(ask: Ask) -> None:
    pings = (b": ping\n\n", 0.1) * 4
    with serve(play(HEAD, pings, SAID, pings, HELLO[2:])) as server:
        assert ask(server.url, timeout=0.25).text == "Hello"


def test_connecting_takes_its_own_time(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        timeout = httpx.Timeout(5, connect=SHORT)
        url = f"http://127.0.0.1:{port}"
        error = ask(url, timeout=timeout, max_retries=1).error
        for one in waiting:
            one.close()
    if sys.platform == "linux":
        assert type(error) is Timeout
        assert "connecting" in str(error)
        assert len(ask.waits) == 1


@pytest.mark.parametrize(
    "steps",
    [(), (HEAD, GONE), (HEAD, PINGS), (HEAD, event("", role="assistant"), PINGS)],
    ids=["no headers", "silence", "comments", "an empty delta and comments"],
)
def test_first_token_timeout(ask: Ask, steps: Any) -> None:
    started = time.monotonic()
    with serve(play(*steps, GONE)) as server:
        answer = ask(server.url, first_token_timeout=0.25)
        assert server.left.acquire(timeout=1)
    assert 0.25 <= time.monotonic() - started < 2
    assert type(answer.error) is Timeout
    assert "0.2" in str(answer.error) or "0.3" in str(answer.error)
    if steps:
        assert "first_token_timeout" in str(answer.error)


@pytest.mark.parametrize(
    "token",
    [
        event("Hello"),
        event(reasoning_content="hm"),
        event(reasoning="hm"),
        event(tool_calls=[{"index": 0, "function": {"name": "f"}}]),
        event(refusal="no"),
    ],
)
def test_first_token_timeout_ends_with_the_first(ask: Ask, token: bytes) -> None:
    with serve(play(HEAD, token, (b": ping\n\n", 0.06) * 5, *HELLO[2:])) as server:
        assert ask(server.url, first_token_timeout=0.2).error is None


def test_first_token_timeout_is_over_with_the_answer(ask_sync: Ask) -> None:
    with serve(lambda c, n: c.sendall(GOOD) or KEEP) as server:
        with sse_chat.ChatClient(
            base_url=server.url, first_token_timeout=0.1
        ) as client:
            for _ in range(4):
                assert take(client.stream("hi")).text == "Hello"
                time.sleep(0.05)
        assert server.connections == 1


# ------------------------------------------------------------------------------------
# Letting go
# ------------------------------------------------------------------------------------

ENDLESS = itertools.cycle((event("x"), 0.02))


def abandon(how: str, stream: Any) -> None:
    if how == "break":
        for _ in stream:
            break
    elif how == "break text":
        for _ in stream.text():
            break
    elif how == "with":
        with stream:
            next(stream)
    elif how == "Ctrl-C":
        with contextlib.suppress(KeyboardInterrupt):
            for _ in stream:
                raise KeyboardInterrupt
    else:
        next(stream)
    if how == "close":
        stream.close()
        stream.close()


async def aabandon(how: str, stream: Any) -> None:
    if how == "break":
        async for _ in stream:
            break
    elif how == "break text":
        async for _ in stream.text():
            break
    elif how == "with":
        async with stream:
            await stream.__anext__()
    elif how == "Ctrl-C":
        with contextlib.suppress(KeyboardInterrupt):
            async for _ in stream:
                raise KeyboardInterrupt
    elif how in ("cancel", "cancel in with"):
        started = anyio.Event()

        async def run() -> None:
            async with stream if how == "cancel in with" else contextlib.nullcontext():
                async for _ in stream:
                    started.set()

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await started.wait()
            group.cancel_scope.cancel()
    elif how == "cancel task":
        tasks: list[Any] = []

        async def run() -> None:
            async for _ in stream:
                tasks[0].cancel()

        tasks.append(asyncio.ensure_future(run()))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
    else:
        await stream.__anext__()
    if how == "close":
        await stream.aclose()
        await stream.aclose()


WAYS = ("break", "break text", "with", "Ctrl-C", "close", "del")
AWAYS = (*WAYS, "cancel", "cancel in with", "cancel task")


async def eventually(check: Any, seconds: float = 1) -> bool:
    until = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < until:
        await anyio.sleep(0.01)
    return bool(done)


@pytest.mark.parametrize("how", WAYS)
def test_who_lets_go_ends_the_answer(how: str) -> None:
    with serve(play(HEAD, ENDLESS)) as server:
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        abandon(how, stream)
        if how == "del":
            del stream
        assert server.left.acquire(timeout=1)  # although `stream` is still there
        if how != "del":
            assert stream.completion.text == "x"
            assert not stream.complete
            with pytest.raises(Truncated):
                next(stream)


@pytest.mark.anyio
@pytest.mark.parametrize("how", AWAYS)
async def test_who_lets_go_ends_the_answer_async(how: str, anyio_backend: str) -> None:
    if how == "cancel task" and anyio_backend == "trio":
        pytest.skip("trio cancels scopes, which is another case")
    with serve(play(HEAD, ENDLESS)) as server:
        stream = sse_chat.astream_chat("hi", base_url=server.url)
        await aabandon(how, stream)
        if how == "del":
            del stream
            gc.collect()
        assert await eventually(lambda: server.left.acquire(blocking=False))
        if how != "del":
            assert set(stream.completion.text) == {"x"}
            assert not stream.complete
            with pytest.raises(Truncated):
                await stream.__anext__()


@pytest.mark.parametrize("steps", [(), (HEAD,), (HEAD, SAID)])
def test_ctrl_c_while_waiting(steps: Any) -> None:
    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with serve(play(*steps, GONE)) as server:
        stream = sse_chat.stream_chat("hi", base_url=server.url)
        timer = threading.Timer(0.2, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
        timer.join()
        assert server.left.acquire(timeout=1)


@pytest.mark.anyio
@pytest.mark.parametrize("steps", [(), (HEAD,), (HEAD, SAID)])
async def test_cancelled_while_waiting(steps: Any, anyio_backend: str) -> None:
    with serve(play(*steps, GONE)) as server:
        stream = sse_chat.astream_chat("hi", base_url=server.url)
        with anyio.move_on_after(0.2) as scope:
            async for _ in stream:
                pass
        assert scope.cancel_called
        assert await eventually(lambda: server.left.acquire(blocking=False))


def test_close_from_another_thread_wakes_the_reader() -> None:
    with serve(play(HEAD, SAID, GONE)) as server:
        stream = sse_chat.stream_chat("hi", base_url=server.url, timeout=3)
        threading.Timer(0.2, stream.close).start()
        with pytest.raises(Truncated):
            for _ in stream:
                pass
        assert server.left.acquire(timeout=1)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def nothing_said(monkeypatch: Any, caplog: Any) -> Iterator[None]:
    """No warning, nothing unraisable, nothing that asyncio logs."""
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
        gc.collect()
    assert [str(u.exc_value) for u in unraisable] == []
    assert [r.getMessage() for r in caplog.records if r.levelname != "DEBUG"] == []


@pytest.mark.parametrize("how", WAYS)
def test_200_streams_leave_nothing(how: str, monkeypatch: Any, caplog: Any) -> None:
    with serve(play(HEAD, event("x"), GONE)) as server:
        with nothing_said(monkeypatch, caplog):
            before = open_files()
            for _ in range(200):
                abandon(how, sse_chat.stream_chat("hi", base_url=server.url))
        assert all(server.left.acquire(timeout=1) for _ in range(200))
        until = time.monotonic() + 1
        while open_files() > before and time.monotonic() < until:
            time.sleep(0.01)  # the server closes its end
        assert open_files() <= before


@pytest.mark.anyio
@pytest.mark.parametrize("how", [*AWAYS, "gc"])
async def test_200_streams_leave_nothing_async(
    how: str, anyio_backend: str, monkeypatch: Any, caplog: Any
) -> None:
    if how == "cancel task" and anyio_backend == "trio":
        pytest.skip("trio cancels scopes, which is another case")

    def tasks() -> int:
        if anyio_backend == "asyncio":
            return len(asyncio.all_tasks())
        import trio

        return trio.lowlevel.current_statistics().tasks_living

    with serve(play(HEAD, event("x"), GONE)) as server:
        with nothing_said(monkeypatch, caplog):
            before, running = open_files(), tasks()
            for _ in range(200):
                stream = sse_chat.astream_chat("hi", base_url=server.url)
                await aabandon(how, stream)
                if how == "gc":  # found by the collector alone
                    stream.itself = stream
                del stream
            gc.collect()
            assert await eventually(
                lambda: open_files() <= before and tasks() <= running, 2
            )
        assert all(server.left.acquire(timeout=1) for _ in range(200))


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_with_a_stream_says_nothing(
    backend: str, monkeypatch: Any, caplog: Any
) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    kept: list[Any] = []

    async def leave() -> None:
        kept.append(sse_chat.astream_chat("hi", base_url=server.url))
        async for _ in kept[-1]:
            break

    with serve(play(HEAD, ENDLESS)) as server:
        with nothing_said(monkeypatch, caplog):
            anyio.run(leave, backend=backend)
            kept.clear()
        assert server.left.acquire(timeout=1)


# ------------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------------

CANARY = "sk-canary/7f3a"
ECHO = json.dumps({"error": {"message": f"bad key {CANARY}", "code": CANARY}}).encode()

FAILURES: dict[str, Any] = {
    "status": http(ECHO, status="401 No", kind="application/json"),
    "status in text": http(ECHO[15:], status="401 No", kind="text/plain"),
    "reason": http(status=f"401 bad {CANARY}"),
    "escaped": http(ECHO.replace(b"/", b"\\/"), status="401 No"),
    "redirect": refuse(307, f"Location: http://127.0.0.1:9/{CANARY}?k={CANARY}\r\n"),
    "in the stream": chunked(*SAID, b"data: " + ECHO + b"\n\n"),
    "error event": chunked(b"event: error\ndata: bad " + CANARY.encode() + b"\n\n"),
    "JSON in a 200": http(ECHO),
    "not JSON": chunked(b"data: {" + CANARY.encode() + b"\n\n"),
    "no answer": http(b"<p>" + CANARY.encode(), kind=f"text/html; {CANARY}"),
    "cut": chunked(*SAID, end=False),
    "gibberish": b"gibberish\r\n\r\n",
    "timeout": play(HEAD, GONE),
    "too large": chunked(b"data: " + CANARY.encode() * 1000),
}


def everything(error: Any) -> str:
    return " ".join(
        [
            str(error),
            repr(error),
            repr(vars(error)),
            "".join(traceback.format_exception(error)),
            repr(pickle.dumps(error)),
            repr(vars(pickle.loads(pickle.dumps(error)))),
        ]
    ).replace("\\\\/", "/")


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_the_key_is_nowhere(ask: Ask, failure: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    with serve(failure) as server:
        url = server.url.replace("//", "//user:pass-canary@")
        for whole in (False, True):
            answer = ask(
                server.url,
                whole=whole,
                api_key=f" {CANARY}\n",
                timeout=0.2,
                max_event_bytes=9000,
            )
            assert CANARY not in everything(answer.error)
            assert CANARY not in repr(vars(answer))
        error = ask(url, timeout=0.2).error
        assert "canary@" not in everything(error) + caplog.text
        assert "pass-canary" not in everything(error) + caplog.text
    assert f"authorization: bearer {CANARY}\r\n" in server.heads[0].lower()
    login = base64.b64encode(b"user:pass-canary").decode()
    assert f"authorization: Basic {login}\r\n" in server.heads[-1]
    logged = [r.getMessage() for r in caplog.records]
    ours = [text.partition('"HTTP/')[0] for text in logged if "receive_r" not in text]
    assert CANARY not in " ".join(ours)  # the rest is what the server said


def test_the_key_is_nowhere_without_a_server(ask: Ask, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    url = closed_port().replace("//", "//user:pass-canary@")
    for error in (
        ask(closed_port(), api_key=CANARY).error,
        ask(url).error,
    ):
        assert "canary" not in everything(error) + caplog.text


def test_other_secret_headers_are_not_shown(ask_sync: Ask) -> None:
    with serve(FAILURES["status"]) as server:
        for name in ("api-key", "Authorization", "X-API-Key"):
            error = ask_sync(server.url, headers={name: CANARY}).error
            assert CANARY not in everything(error), name
            assert f"{name.lower()}: {CANARY}" in server.heads[-1].lower()


@pytest.mark.parametrize(
    "key", ["sk\n-canary", "sk-cänary", "sk-canary\0", "sk-canary\u2028x"]
)
def test_keys_that_no_header_can_hold(key: str, monkeypatch: Any) -> None:
    if "\0" not in key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    for options in ({"api_key": key}, {"headers": {"Authorization": key}}):
        for call in (sse_chat.stream_chat, sse_chat.astream_chat, sse_chat.generate):
            with pytest.raises(ValueError, match="key") as caught:
                call("hi", base_url="http://127.0.0.1:9", **options)
            told = "".join(traceback.format_exception(caught.value)[-1:])
            assert "nary" not in told
        with pytest.raises(ValueError, match="key"):
            sse_chat.ChatClient(base_url="http://127.0.0.1:9", **options)


def test_reprs_show_no_key() -> None:
    options = {"base_url": "http://user:pass-canary@localhost", "api_key": CANARY}
    client = sse_chat.ChatClient(**options)
    for thing in (client, client.stream("hi"), sse_chat.astream_chat("hi", **options)):
        assert "canary" not in repr(thing) + str(thing)
    client.close()


def test_the_key_of_the_environment(ask_sync: Ask, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-env\n")
    with serve(GOOD) as server:
        ask_sync(server.url)
        ask_sync(server.url, api_key="sk-own")
        ask_sync(server.url, api_key="")
        ask_sync(server.url.replace("//", "//us%40er:p%3Aw@"))
        ask_sync(server.url, headers={"Authorization": "Bearer sk-header", "X-A": "b"})
    keys = [re.findall("(?i)authorization: (.*)\r", head) for head in server.heads]
    login = "Basic " + base64.b64encode(b"us@er:p:w").decode()
    assert keys == [
        ["Bearer sk-env"],
        ["Bearer sk-own"],
        [],
        [login],
        ["Bearer sk-header"],
    ]
    assert "x-a: b\r\n" in server.heads[-1].lower()


# ------------------------------------------------------------------------------------
# Hostile servers
# ------------------------------------------------------------------------------------

JUNK = b"x" * 65536
CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
DEEP = 100_000


def calls(indices: Any) -> bytes:
    return event(tool_calls=[{"index": index} | CALL for index in indices])


def with_delta(delta: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":' + delta.encode() + b"}]}\n\n"


def with_index(index: Any) -> bytes:
    return sse({"choices": [{"index": index, "delta": {"content": "x"}}]})


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


HOSTILE: dict[str, Any] = {
    "an endless line": lambda: play(HEAD, b"data: ", itertools.repeat(JUNK)),
    "an endless comment": lambda: play(HEAD, b": ", itertools.repeat(JUNK)),
    "an endless event": lambda: play(HEAD, itertools.repeat(b"data: x\n" * 8192)),
    "endless JSON": lambda: play(HEAD, b'{"a": "', itertools.repeat(JUNK)),
    "endless text": lambda: play(HEAD, b"<p>", itertools.repeat(JUNK)),
    "endless blanks": lambda: play(HEAD, itertools.repeat(b"\n" * 65536)),
    "endless comments": lambda: play(HEAD, itertools.repeat(b": x\n\n" * 8192)),
    "endless headers": lambda: play(HEAD[:-2], b"X: ", itertools.repeat(JUNK)),
    "endless many headers": lambda: play(
        HEAD[:-2], itertools.repeat(b"X: y\r\n" * 8192)
    ),
    "an endless error": lambda: play(
        b"HTTP/1.1 400 No\r\n\r\n", itertools.repeat(JUNK)
    ),
    "100,000 tool calls": lambda: chunked(
        *(calls(range(i, i + 100)) for i in range(0, 100_000, 100)), *HELLO
    ),
    "30,000 tool calls in one": lambda: chunked(
        event(tool_calls=[CALL] * 30_000), *HELLO
    ),
    "30,000 tool ids": lambda: chunked(
        *(event(tool_calls=[CALL | {"id": f"{i}"}]) for i in range(30_000)), *HELLO
    ),
    "30,000 choices": lambda: chunked(
        *(event("x", index=i) for i in range(30_000)), DONE
    ),
    "a huge index": lambda: chunked(with_index(10**9), *HELLO),
    "a larger index": lambda: chunked(with_index(10**300), *HELLO),
    "a negative index": lambda: chunked(with_index(-1), *HELLO),
    "a str index": lambda: chunked(with_index("0"), *HELLO),
    "an odd index": lambda: chunked(
        with_index([{}]), with_index(1.5), with_index(True), *HELLO
    ),
    "tool indices": lambda: chunked(
        *(
            event(tool_calls=[{"index": i} | CALL])
            for i in (10**9, -1, "x", None, 0.5, [])
        ),
        *HELLO,
    ),
    "NaN": lambda: chunked(with_delta('{"content": NaN, "x": -Infinity}'), *HELLO),
    "duplicate keys": lambda: chunked(
        with_delta('{"content": "a", "content": "b"}'), *HELLO
    ),
    "10 MB number": lambda: chunked(
        with_delta('{"x": ' + "9" * 10_000_000 + "}"), *HELLO
    ),
    "10 MB float": lambda: chunked(
        with_delta('{"x": 1.' + "9" * 10_000_000 + "}"), *HELLO
    ),
    "10 MB retry": lambda: chunked(b"retry: " + b"9" * 10_000_000 + b"\n", *HELLO),
    "a lone surrogate": lambda: chunked(
        with_delta(r'{"content": "\ud83d", "role": "\udc00"}'), *HELLO
    ),
    "a surrogate error": lambda: chunked(
        b'data: {"error": {"message": "\\ud83d", "type": "\\ud83d"}}\n\n'
    ),
    "NUL": lambda: chunked(
        b"data: \0\n\n", with_delta(r'{"content": "\u0000"}'), *HELLO
    ),
    "bad UTF-8": lambda: chunked(b"data: \xff\xfe\n\n", *HELLO),
    "bad UTF-8 in text": lambda: chunked(
        HELLO[0].replace(b"Hel", b"\xff\xc3"), *HELLO[1:]
    ),
    "deep JSON body": lambda: http(nested(DEEP).encode()),
    "deep object": lambda: http(nested(DEEP, '{"a":', "}").encode()),
    "deep error status": lambda: http(nested(DEEP).encode(), status="400 No"),
    "wrong types": lambda: chunked(
        sse({"choices": {"a": 1}, "id": 3, "model": [], "created": "x", "usage": "y"}),
        sse({"choices": [None, 1, "x", [], {"delta": 5, "logprobs": 7}]}),
        sse(
            {"choices": [{"delta": {"tool_calls": [None, {"function": "f", "id": 5}]}}]}
        ),
        sse({"choices": [{"delta": {"content": [1, {"text": {}}], "role": {}}}]}),
        sse({"choices": [{"finish_reason": {"a": 1}, "logprobs": {"content": 5}}]}),
        *HELLO,
    ),
    "keys of ours": lambda: chunked(
        sse({"choices": [{"delta": {"extra": 1, "raw": 2, "__class__": 3}}], "raw": 4}),
        *HELLO,
    ),
    "unknown encoding": lambda: http(*HELLO, headers="Content-Encoding: br\r\n"),
    "not gzip": lambda: http(*HELLO, headers="Content-Encoding: gzip\r\n"),
}
for depth in (150, 300, 600, 900, 990, 3000, DEEP):
    lists, objects = nested(depth), nested(depth, '{"a":', "}")
    error = nested(depth, '{"message":', "}")
    for name, body in {
        "lists": with_delta('{"x": ' + lists + "}"),
        "objects": with_delta('{"x": ' + objects + "}") * 2,
        "error": sse({"error": 0}).replace(b"0", error.encode()),
        "extra": b'data: {"choices": [], "x": ' + objects.encode() + b"}\n\n",
        "usage": b'data: {"choices": [], "usage": ' + objects.encode() + b"}\n\n",
    }.items():
        HOSTILE[f"{name} {depth} deep"] = functools.partial(chunked, body, *HELLO)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers(ask_sync: Ask, name: str) -> None:
    """Each ends in a result or in an APIError (or `take` would raise), in bounds."""
    measured = "endless" in name
    if measured:
        tracemalloc.start()
    try:
        with serve(HOSTILE[name]()) as server:
            started = time.monotonic()
            answer = ask_sync(server.url, max_retries=0, first_token_timeout=2)
            assert time.monotonic() - started < 60
        if measured:
            assert tracemalloc.get_traced_memory()[1] < 100e6
            assert answer.error is not None
    finally:
        tracemalloc.stop()
    if answer.error is None:
        assert answer.text.endswith("Hello") or answer.stream.complete
    answer.completion.text.encode()
    if answer.error:
        str(answer.error).encode()
        assert len(str(answer.error)) < 2000


@pytest.mark.anyio
async def test_endless_comments_end_with_first_token_timeout_async(
    anyio_backend: str,
) -> None:
    with serve(HOSTILE["endless comments"]()) as server:
        answer = await atake(
            messages="hi", base_url=server.url, first_token_timeout=0.3
        )
    assert type(answer.error) is Timeout


@pytest.mark.parametrize("filling", [b"\0", b": x\n\n", b"\n", b" "])
@pytest.mark.parametrize("status", ["200 OK", "400 No"])
def test_a_gzip_bomb(ask_sync: Ask, filling: bytes, status: str) -> None:
    packer = zlib.compressobj(wbits=31)
    block = filling * (2**20 // len(filling))
    many = 100 if filling == b"\0" else 4  # MiB; lines take their time
    bomb = b"".join(packer.compress(block) for _ in range(many)) + packer.flush()
    headers = "Content-Encoding: gzip\r\n"
    with serve(http(bomb, status=status, headers=headers)) as server:
        tracemalloc.start()
        error = ask_sync(server.url).error
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert error is not None
    assert peak < 80e6
    assert "accept-encoding: identity" in server.heads[0].lower()


# ------------------------------------------------------------------------------------
# The request
# ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "path"),
    [
        ("http://{}", "/v1/chat/completions"),
        ("http://{}/", "/v1/chat/completions"),
        ("{}", "/v1/chat/completions"),
        ("{}/v1", "/v1/chat/completions"),
        ("http://{}/v1", "/v1/chat/completions"),
        ("http://{}/v1/", "/v1/chat/completions"),
        ("http://{}/v1//", "/v1/chat/completions"),
        ("http://{}/v1/chat/completions", "/v1/chat/completions"),
        ("http://{}/v1/chat/completions/", "/v1/chat/completions"),
        ("HTTP://{}/api/v3#top", "/api/v3/chat/completions"),
        ("  http://{}/v1 \t\r\n", "/v1/chat/completions"),
        ("http://{}?a=b", "/v1/chat/completions?a=b"),
        (
            "http://{}/openai/deployments/d?api-version=1",
            "/openai/deployments/d/chat/completions?api-version=1",
        ),
        (
            "http://{}/openai/deployments/d/chat/completions?api-version=1&x=%20",
            "/openai/deployments/d/chat/completions?api-version=1&x=%20",
        ),
    ],
)
def test_base_urls(ask_sync: Ask, monkeypatch: Any, form: str, path: str) -> None:
    with serve(GOOD) as server:
        url = form.format(server.url[7:-3])
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert ask_sync(url).text == ask_sync(None).text == "Hello"
        with sse_chat.ChatClient() as client:
            assert take(client.stream("hi")).text == "Hello"
    assert {head.split()[1] for head in server.heads} == {path}
    host = f"host: {server.url[7:-3]}\r\n"
    assert all(host in head.lower() for head in server.heads)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "http://",
        "http://[::1",
        "http://h:99999",
        "http://h:x/v1",
        "://",
    ],
)
def test_wrong_base_urls(url: str) -> None:
    for call in (sse_chat.stream_chat, sse_chat.generate, sse_chat.astream_chat):
        with pytest.raises(ValueError, match="http://localhost:11434/v1"):
            call("hi", base_url=url)


def test_no_base_url_is_ollamas(ask_sync: Ask, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "  ")
    assert "http://localhost:11434/v1" in repr(sse_chat.DEFAULT_BASE_URL)
    with httpx.Client(
        transport=httpx.MockTransport(lambda r: seen.append(r))
    ) as client:
        seen: list[Any] = []
        with pytest.raises((TypeError, AttributeError)):
            next(sse_chat.stream_chat("hi", client=client))
    assert str(seen[0].url) == "http://localhost:11434/v1/chat/completions"


def test_what_is_sent(ask: Ask, monkeypatch: Any) -> None:
    said = sse_chat.ChatCompletion.from_dict(WHOLE).choices[0].message
    talk = [
        {"role": "user", "content": "你好"},
        said,
        {"role": "user", "content": "\ud83d"},
    ]
    with serve(GOOD) as server:
        ask(server.url, model="m", temperature=0.5, top_p=None, stop=["x"], system="S")
        ask(server.url, messages=talk, n=2)
        monkeypatch.setenv("OPENAI_MODEL", "of-env")
        ask(server.url, messages=tuple(talk), whole=True, system="S")
        ask(server.url, model="m", headers={"User-Agent": "mine", "X-A": "b"})
    bodies = [json.loads(body) for body in server.bodies]
    hi = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "S"}
    assert bodies[0] == {
        "model": "m",
        "messages": [system, hi],
        "stream": True,
        "temperature": 0.5,
        "stop": ["x"],
    }
    sent = [talk[0], MESSAGE, talk[2]]
    assert bodies[1] == {"messages": sent, "stream": True, "n": 2}
    assert bodies[2] == {
        "model": "of-env",
        "messages": [system, *sent],
        "stream": False,
    }
    head = server.heads[-1].lower()
    assert "user-agent: mine\r\n" in head
    assert "x-a: b\r\n" in head
    assert "content-type: application/json\r\n" in head
    assert server.heads[0].startswith("POST /v1/chat/completions HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (None, {}),
        (5, {}),
        ({"role": "user"}, {}),
        (b"hi", {}),
        ("hi", {"stream": False}),
        ("hi", {"temperature": math.nan}),
        ("hi", {"tools": [{1, 2}]}),
        ("hi", {"timeout": 0}),
        ("hi", {"timeout": -1}),
        ("hi", {"timeout": "5"}),
        ("hi", {"headers": {"X": "a\r\nb"}}),
        ("hi", {"headers": {"X\r\nY": "a"}}),
        ("hi", {"headers": {"X": 5}}),
    ],
)
def test_what_cannot_be_asked(messages: Any, options: Any) -> None:
    options = {"base_url": "http://127.0.0.1:9"} | options
    for call in (sse_chat.stream_chat, sse_chat.astream_chat, sse_chat.generate):
        with pytest.raises((TypeError, ValueError)):
            call(messages, **options)


def test_a_client_passes_its_options_on(ask_sync: Ask) -> None:
    with (
        serve(GOOD) as server,
        sse_chat.ChatClient(
            base_url=server.url,
            api_key="sk-a",
            model="m",
            system="S",
            headers={"X-A": "b"},
        ) as client,
    ):
        take(client.stream("hi"))
        client.generate("hi", model="other", system="T", seed=1)
    first, second = map(json.loads, server.bodies)
    assert (first["model"], first["messages"][0]["content"]) == ("m", "S")
    assert (second["model"], second["messages"][0]["content"]) == ("other", "T")
    assert second["seed"] == 1
    assert all("x-a: b\r\n" in head.lower() for head in server.heads)
    assert all("Bearer sk-a" in head for head in server.heads)


def test_a_socks_proxy_without_its_package(ask: Ask, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    error = ask("http://localhost:9", max_retries=0).error
    assert type(error) is Unreachable
    assert "socks" in str(error)
    assert "\n" not in str(error)


# ------------------------------------------------------------------------------------
# Threads, processes, memory
# ------------------------------------------------------------------------------------


def test_threads_over_one_client_do_not_mix() -> None:
    def handle(connection: socket.socket, number: int) -> str:
        name = json.loads(server.bodies[number - 1])["messages"][0]["content"]
        whole = chunked(*[event(name)] * 40, event(finish="stop"), DONE)
        connection.sendall(whole[:3000])
        time.sleep(0.001)
        connection.sendall(whole[3000:])
        return KEEP

    def one(name: str) -> str:
        for _ in client.stream(name):
            break
        answer = take(client.stream(name))
        assert answer.error is None
        assert answer.text == answer.completion.text
        return answer.text

    with (
        serve(handle) as server,
        sse_chat.ChatClient(base_url=server.url) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        names = [f"<{number}>" for number in range(64)]
        assert list(pool.map(one, names)) == [name * 40 for name in names]


ERRORS = [
    sse_chat.APIError("m", {"a": 1}, 5, "t", "p"),
    sse_chat.APIConnectionError("m"),
    Timeout("m"),
    Truncated("m"),
    Invalid("m", "text"),
]


def same(one: Any, other: Any) -> bool:
    a, b = vars(one), vars(other)
    return (
        type(one) is type(other)
        and str(one) == str(other)
        and {k: v for k, v in a.items() if k != "response"}
        == {k: v for k, v in b.items() if k != "response"}
    )


def test_errors_and_answers_pickle_and_copy(ask_sync: Ask) -> None:
    errors = list(ERRORS)
    with serve(refuse(429, "Retry-After: 90\r\n")) as server:
        errors.append(ask_sync(server.url).error)
    with serve(chunked(*SAID, FAILED)) as server:
        errors.append(ask_sync(server.url).error)
    with serve(chunked(*SAID, end=False)) as server:
        errors.append(ask_sync(server.url).error)
    for error in errors:
        for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
            assert same(twin, error)
            if isinstance(error, Status):
                assert twin.response.json() == {"error": "boom"}
                assert twin.retry_after == 90
    assert errors[-1].completion.text == "Hello"
    whole = sse_chat.ChatCompletion.from_dict(WHOLE)
    for made in (whole, *sse_chat.iter_chunks(REAL["OpenAI"])):
        for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert twin == made
            assert twin.raw == made.raw


def test_answers_and_errors_cross_a_process_pool() -> None:
    spawn = multiprocessing.get_context("spawn")
    with (
        serve(http(JSON)) as good,
        serve(chunked(*SAID, end=False)) as cut,
        serve(refuse(400)) as refusing,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        answers = [
            pool.submit(sse_chat.generate, "hi", base_url=server.url)
            for server in (good, cut, refusing)
        ]
        assert answers[0].result() == sse_chat.ChatCompletion.from_dict(WHOLE)
        with pytest.raises(Truncated) as caught:
            answers[1].result()
        assert caught.value.completion.text == "Hello"
        with pytest.raises(Status) as refused:
            answers[2].result()
        assert refused.value.response.json() == {"error": "boom"}


MEASURE = """
import resource, sys
from sse_chat import stream_chat
def memory():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most
stream = stream_chat("hi", base_url=sys.argv[1])
next(stream)
before = memory()
for chunk in stream:
    pass
print(memory() - before, len(stream.completion.text))
"""


def test_a_long_stream_takes_the_memory_of_its_text() -> None:
    size = 2**30 if os.environ.get("SSE_CHAT_SLOW") else 2**25
    block = event("four") * 512
    blocks = itertools.chain(itertools.repeat(block, size // len(block)), HELLO)

    with serve(play(HEAD, blocks)) as server:
        command = [sys.executable, "-c", MEASURE, server.url]
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, env=PATHS
        )
    grown, text = map(int, out.stdout.split())  # the one in KiB, the other in bytes
    assert text == size // len(block) * 512 * 4 + 5
    assert grown * 1024 < 20e6 + text


PATHS = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


# ------------------------------------------------------------------------------------
# httpx and httpx2
# ------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["httpx", "httpx2"])
async def test_a_client_of_ones_own(name: str, anyio_backend: str) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    headers = {"Authorization": "Bearer sk-own"}
    async with module.AsyncClient(headers=headers) as own:
        with serve(each(GOOD, chunked(*SAID, end=False), refuse(400), GOOD)) as server:
            options = {"messages": "hi", "base_url": server.url, "client": own}
            assert (await atake(**options)).text == "Hello"
            answer = await atake(**options)
            assert type(answer.error) is Truncated
            assert type(answer.error.__cause__).__module__.startswith(name)
            error = (await atake(**options)).error
            assert type(error) is Status
            assert type(error.response) is module.Response
            async for _ in sse_chat.astream_chat(**options):
                break
            assert not own.is_closed
            assert all("Bearer sk-own" in head for head in server.heads)
        options |= {"base_url": closed_port(), "max_retries": 0}
        assert type((await atake(**options)).error) is Unreachable
        async with sse_chat.AsyncChatClient(client=own):
            pass
        assert not own.is_closed


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_a_client_of_ones_own_sync(name: str, monkeypatch: Any) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")  # the client has its own
    with module.Client(headers={"Authorization": "Bearer sk-own"}) as own:
        with serve(each(GOOD, http(JSON), b"", refuse(400))) as server:
            options = {"base_url": server.url, "client": own, "max_retries": 0}
            assert take(messages="hi", **options).text == "Hello"
            assert sse_chat.generate("hi", **options).text == "Hello"
            assert type(take(messages="hi", **options).error) is Unreachable
            assert type(take(messages="hi", **options).error) is Status
            assert all("Bearer sk-own" in head for head in server.heads)
        with serve(play(HEAD, SAID, GONE)) as server:
            options = {"messages": "hi", "base_url": server.url, "client": own}
            answer = take(timeout=module.Timeout(5, read=0.1), **options)
            assert type(answer.error) is Timeout
            for _ in sse_chat.stream_chat(**options):
                break
            assert server.left.acquire(timeout=1)
            assert server.left.acquire(timeout=1)
        sse_chat.ChatClient(client=own).close()
        assert not own.is_closed


BLOCKED = """
import sys
sys.modules["httpx"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_core_under_httpx2_alone() -> None:
    pytest.importorskip("httpx2", reason="httpx2 is not installed")
    names = "how_a_stream_ends and close or any_shape or own or lets_go or dead"
    options = [
        "-q",
        "-x",
        "-o",
        "addopts=",
        "-o",
        "markers=live: x",
        "-p",
        "no:cacheprovider",
        "-W",
        "error",
    ]
    command = [sys.executable, "-c", BLOCKED, *options, "-k", names, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=PATHS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d\d passed", done.stdout)


# ------------------------------------------------------------------------------------
# A real server
# ------------------------------------------------------------------------------------

LIVE = os.environ.get("SSE_CHAT_LIVE_URL")


@pytest.fixture
def live() -> Iterator[Any]:
    if not LIVE:
        pytest.skip("SSE_CHAT_LIVE_URL is not set")
    with sse_chat.ChatClient(
        base_url=LIVE, max_retries=0, system="Be brief."
    ) as client:
        yield client


SHORTLY: dict[str, Any] = {"max_tokens": 24, "temperature": 0}


@pytest.mark.live
def test_live_streaming_says_what_generate_says(live: Any) -> None:
    answer = take(live.stream("Say hello.", **SHORTLY))
    assert answer.error is None
    assert len(answer.chunks) > 2
    assert answer.text == answer.completion.text != ""
    assert answer.completion.choices[0].finish_reason in ("stop", "length")
    whole = live.generate("Say hello.", **SHORTLY)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.text


@pytest.mark.live
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_live_async(live: Any, backend: str) -> None:
    if backend == "trio":
        pytest.importorskip("trio", reason="trio is not installed")

    async def ask() -> Any:
        return await atake(messages="你好", base_url=LIVE, **SHORTLY)

    answer = anyio.run(ask, backend=backend)
    assert answer.error is None
    assert answer.text


@pytest.mark.live
def test_live_usage(live: Any) -> None:
    answer = take(live.stream("hi", stream_options={"include_usage": True}, **SHORTLY))
    usage = answer.completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 0


@pytest.mark.live
def test_live_two_choices(live: Any) -> None:
    answer = take(live.stream("hi", n=2, **SHORTLY))
    if isinstance(answer.error, Status):
        pytest.skip(f"this server has no n: {answer.error}")
    assert all(choice.finish_reason for choice in answer.completion.choices)


@pytest.mark.live
def test_live_logprobs(live: Any) -> None:
    answer = take(live.stream("hi", logprobs=True, top_logprobs=2, **SHORTLY))
    if answer.error or not answer.completion.choices[0].logprobs:
        pytest.skip("this server has no logprobs")
    tokens = answer.completion.choices[0].logprobs.content
    assert all(token.logprob <= 0 and token.token is not None for token in tokens)


@pytest.mark.live
def test_live_errors(live: Any) -> None:
    error = take(live.stream([{"role": "user"}], max_tokens="many")).error
    assert isinstance(error, Status)
    assert 400 <= error.status_code < 600
    assert LIVE is not None
    error = take(messages="hi", base_url=LIVE.rstrip("/") + "/nope").error
    assert error.status_code == 404


@pytest.mark.live
def test_live_ten_calls_on_one_client(live: Any) -> None:
    for number in range(10):
        if number % 2:
            assert live.generate("hi", max_tokens=4).choices[0].finish_reason
        else:
            assert take(live.stream("hi", max_tokens=4)).error is None


@pytest.mark.live
def test_live_closing_in_the_middle(live: Any) -> None:
    for chunk in (stream := live.stream("Count to 500.", max_tokens=400)):
        if chunk.text:
            break
    assert not stream.complete
    assert take(live.stream("hi", max_tokens=4)).error is None


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
    "hung up": (b"", 1, "", "", ".*127.0.0.1"),
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
def test_usage_that_is_no_number_is_not_shown(cli, sent):
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
    ("me:hush%20hush@", "", {"USER_AND_PASSWORD": "me:hush hush"}),
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
    "required": ["city", "days", "unit", "exact", "near", "tags", "limit"],
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "near": {
            "type": "object",
            "properties": {"km": {"type": "number"}, "mark": {"type": "string"}},
            "required": ["km"],
        },
        "tags": {"type": "array", "items": {"type": "string"}},
        "limit": {"anyOf": [{"type": ["integer", "null"]}, {"type": "null"}]},
        "optional": {"type": "string"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "the time"}},
]
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("choice", ["required", NOW])
def test_demo_server_calls_a_tool_that_must_be_called(choice):
    chunks, whole = demo({"tools": TOOLS, "tool_choice": choice})
    assert answers(chunks, whole) == [(None, "tool_calls")]
    [call] = whole["choices"][0]["message"]["tool_calls"]
    assert (bool(call["id"]), call["type"]) == (True, "function")
    arguments = json.loads(call["function"]["arguments"])
    if choice == NOW:
        assert (call["function"]["name"], arguments) == ("now", {})
        return
    assert call["function"]["name"] == "weather"
    assert list(arguments) == SCHEMA["required"]
    kinds = [str, int, str, bool, dict, list, int]
    assert [type(value) for value in arguments.values()] == kinds
    assert arguments["unit"] == "C"
    assert {name: type(value) for name, value in arguments["near"].items()} == {
        "km": int
    }


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
            error = failure.value
            assert (error.status_code, error.code) == (401, "invalid_api_key")
            assert error.type == "invalid_request_error"
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
    with httpx.Client() as client:  # it keeps its connections beyond the server's end
        with sse_chat.demo_server(delay=0.05) as url:
            client.get(url + "/models")
            asked = client.build_request("POST", url + "/chat/completions", json=body)
            unread = client.send(asked, stream=True)
            started = set(threading.enumerate()) - before
        assert len(started) >= 2
        for thread in started:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        with pytest.raises(httpx.RemoteProtocolError):
            unread.read()  # cut off, not ended


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
def test_reasoning_is_dim_and_the_spinner_leaves_no_trace(env):
    turning = threading.Event()

    def handle(connection, number):
        assert turning.wait(PATIENCE)
        connection.sendall(chunked(*THOUGHTFUL))

    with serve(handle) as server, Terminal(*to(server), "hi", **env) as terminal:
        deadline = time.monotonic() + PATIENCE
        while len(set(terminal.output)) < 3:  # a return and two frames
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
                assert told == f"\r\nsse_chat: {bad} holds no list of messages"
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
