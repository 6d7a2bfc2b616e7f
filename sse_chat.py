# /// script
# requires-python = ">=3.11"
# dependencies = ["httpx>=0.26"]
# ///
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The sse_chat authors
"""Stream chat completions from any OpenAI-compatible server: one file, on httpx alone.

    from sse_chat import stream_chat

    for text in stream_chat("Why is the sky blue?", model="llama3.2").text():
        print(text, end="", flush=True)

Bytes enter at the top of this file and answers leave at its bottom:

    bytes ─ SSELineDecoder ─▶ lines ─ SSEDecoder ─▶ ServerSentEvent
          ─ ChatCompletionChunk.from_dict ─▶ chunk ─ ChatAccumulator ─▶ ChatCompletion

The promise: a broken answer is never taken for a whole one. An answer that stops early
raises an `APIError`, and the part that arrived is in its `.completion`.

Every decision (what a line is, what an event is, how an answer ended, whether to send
the request again) is made by code that does no I/O. Each async function stands next to
its sync twin, and its docstring names any difference. The sections, in reading order:

    Server-sent events     the decoder of the HTML standard; in place of httpx-sse
    Chat types             openai's types as plain dataclasses that keep what came
    Errors                 the tree of errors, and the shapes in which servers send them
    Accumulating           chunks to a whole answer; tool calls; <think> tags
    The request            its options, checked; its secrets; when it is sent again
    Reading an answer      bytes to chunks, and the verdict on how the answer ended
    Sending and streaming  the two streams, and what moves bytes for them
    Listening              the event source that connects again
    The ways to ask        stream_chat, generate, models and the two clients
    Demo server            the wire format of a real server, without a model
    Command line           python sse_chat.py "prompt"; --demo needs no server

Public names are in `__all__`; private ones begin with `_`. Version 0.3.0, MIT licence:
keep the copyright line at the top in copies.
"""

from __future__ import annotations

import codecs
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import typing
import weakref
import zlib
from base64 import b64encode
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypedDict, TypeVar, Unpack

# Micro-optimization: httpx, and modules that few uses need, are imported where those
# uses begin. Importing this file then takes a third of the time.
if TYPE_CHECKING:
    import argparse
    from urllib.parse import SplitResult

    from httpx import AsyncClient, Client, Request, Response, Timeout
else:  # for programs that read the annotations at run time
    AsyncClient = Client = Request = Response = Timeout = Any

Json = dict[str, Any]

# fmt: off
__all__ = [
    "CONNECT_TIMEOUT", "DEFAULT_BASE_URL", "DEFAULT_MAX_EVENT_BYTES", "DEFAULT_TIMEOUT",
    "ENDING_TIMEOUT", "MAX_CHOICES", "MAX_DEPTH", "MAX_OBJECTS", "MAX_RETRY_AFTER",
    "MODELS_TIMEOUT",
    "APIConnectionError", "APIError", "APIResponseValidationError", "APIStatusError",
    "APITimeoutError", "AsyncChatClient", "AsyncChatStream", "AsyncEventStream",
    "ChatAccumulator", "ChatClient", "ChatCompletion", "ChatCompletionChunk",
    "ChatCompletionMessage", "ChatCompletionMessageToolCall",
    "ChatCompletionTokenLogprob", "ChatOptions", "ChatStream", "ChoiceDelta",
    "ChoiceDeltaToolCall", "ChoiceDeltaToolCallFunction", "ChoiceLogprobs",
    "CompletionTokensDetails", "CompletionUsage", "EventSource", "EventStream",
    "Function", "Json", "Messages", "PromptTokensDetails", "SSEDecoder", "SSEError",
    "SSELineDecoder", "ServerSentEvent", "TopLogprob", "TruncatedStreamError",
    "accumulate", "aconnect_sse", "agenerate", "aiter_chunks", "aiter_lines",
    "aiter_sse", "alisten", "amodels", "astream_chat", "connect_sse", "demo_server",
    "generate", "iter_chunks", "iter_lines", "iter_sse", "listen", "main", "models",
    "split_thinking", "stream_chat",
]
# fmt: on

__version__ = "0.3.0"

# Limits on the memory that an answer can take.
DEFAULT_MAX_EVENT_BYTES = 16 * 1024 * 1024  # bytes of an event, or of a JSON answer
MAX_CHOICES = 1024  # choices of an answer, and tool calls of a choice
MAX_DEPTH = 100  # levels of lists and objects in a payload
# An answer of 4,000 tokens with 20 alternatives each has 84,000 objects.
MAX_OBJECTS = 100_000  # in one payload

# ---- Server-sent events --------------------------------------------------------------
#
# The rules are those of the HTML Living Standard, sections 9.2.5 "Parsing an event
# stream" and 9.2.6 "Interpreting an event stream". This section needs no HTTP library.


class SSEError(Exception):
    """The response is not an event stream, or an event is over the limit.

    `events` are the complete events of the same read, where `SSEDecoder.feed` raised.
    `status_code` is the HTTP status with which `listen` stopped connecting, else None.
    """

    def __init__(
        self,
        message: str,
        events: Sequence[ServerSentEvent] = (),
        status_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.events = list(events)
        self.status_code = status_code


class ServerSentEvent(NamedTuple):
    """One event: its type, its data, the last event id, `retry` in milliseconds."""

    event: str = "message"
    data: str = ""
    id: str = ""
    retry: int | None = None

    def json(self) -> Any:
        """Return the data parsed as JSON. Raises ValueError if it is not JSON."""
        return json.loads(self.data)

    def encode(self) -> bytes:
        """Return the event as bytes of a stream: decoding them gives it back.

        An empty id is not written, so a stream that had an id before keeps that one.
        Between events, `b": ping\\n\\n"` keeps a connection alive. Raises ValueError
        for values that no stream can carry: a CR, a line end in the type or the id, a
        NUL in the id, half a surrogate pair.
        """
        if "\r" in self.data or re.search("[\r\n]", self.event + self.id):
            raise ValueError("an event cannot hold a CR, or a line end in type or id")
        if not self.event or "\0" in self.id or (self.retry or 0) < 0:
            raise ValueError(
                "expected a type, an id without NUL, and a retry from 0 on"
            )
        lines = []
        if self.id:
            lines.append(f"id: {self.id}")
        if self.event != "message":
            lines.append(f"event: {self.event}")
        if self.retry is not None:
            lines.append(f"retry: {self.retry}")
        lines += [f"data: {line}" for line in self.data.split("\n")]
        return "\n".join([*lines, "\n"]).encode()


# Micro-optimization: this is what ServerSentEvent(…) does, without a Python function on
# the way. It takes a third of the time for each event.
_new_event = functools.partial(tuple.__new__, ServerSentEvent)

_BOM = b"\xef\xbb\xbf"
_CR, _LF, _COLON = b"\r\n:"  # as numbers, `in` finds them seven times as fast


class SSELineDecoder:
    """Turns bytes, cut anywhere, into lines. CR, LF and CRLF end a line, nothing else.

    A line is returned as soon as its end has arrived. Work and memory are linear in the
    bytes received, however they are cut.
    """

    def __init__(self) -> None:
        # The beginning of the line whose end has not arrived.
        self._pending = bytearray()
        # Bytes that belong to no line if they are next: a BOM at the start of the
        # stream, and LF after a CR, which ended its line without waiting for the LF.
        self._skip = _BOM

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that the bytes complete, without their ends."""
        # No UTF-8 sequence contains a line end: each line can be decoded by itself.
        return [line.decode("utf-8", "replace") for line in self._split(chunk)]

    def _split(self, data: bytes) -> list[bytes]:
        pending = self._pending
        if self._skip:
            # Three bytes of BOM may arrive in three reads; until then they are pending.
            data = bytes(pending) + data
            pending.clear()
            if len(data) < len(self._skip) and self._skip.startswith(data):
                pending += data
                return []
            data = data.removeprefix(self._skip)
            self._skip = b""

        if _CR in data:
            lines = data.splitlines()  # of bytes: at CR, LF and CRLF
            if data[-1] == _CR:
                self._skip = b"\n"
            if data[-1] == _CR or data[-1] == _LF:
                lines.append(b"")  # splitlines() leaves out what split() returns
        elif _LF in data:
            lines = data.split(b"\n")
        else:
            pending += data
            return []

        if pending:
            pending += lines[0]
            lines[0] = bytes(pending)
            pending.clear()
        pending += lines.pop()
        return lines


def _whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return an option that must be an int. Raises TypeError, ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value!r}")
    return value


def _byte_limit(max_event_bytes: Any) -> int:
    """Return a limit in bytes; None means that there is none."""
    if max_event_bytes is None:
        return sys.maxsize
    return _whole_number("max_event_bytes", max_event_bytes)


class SSEDecoder:
    """Turns bytes, or lines, into events.

    `max_event_bytes` limits the bytes between two blank lines; None is no limit. Once
    it is exceeded, that call and every later one raises SSEError. `last_event_id` is
    the value for a `Last-Event-ID` header when connecting again, and `retry` the
    milliseconds to wait before that, None if the server did not say.
    """

    def __init__(self, max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._max_bytes = _byte_limit(max_event_bytes)
        self._lines = SSELineDecoder()

        # The block that has begun: its bytes, and the buffers of the standard. The data
        # is joined once: adding to a string would cost the square of its lines.
        self._size = 0
        self._data: list[bytes] = []
        self._event = ""
        self._id = ""  # becomes last_event_id at the blank line, not before
        # Not of one block alone: a block without data leaves it to the next event.
        self._retry: int | None = None

        # Set at the limit, for good: after a lost event the rest is not the stream.
        self._overflow = ""
        self._overflow_data = b""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that the bytes complete. Raises SSEError at the limit."""
        events = self._feed(chunk)
        self._check_overflow(events)
        return events

    def decode(self, line: str) -> ServerSentEvent | None:
        """Process a line without its end; return the event if it completes one."""
        events = self._interpret([line.encode("utf-8", "surrogatepass")])
        self._check_overflow()
        return events[0] if events else None

    def _check_overflow(self, events: Sequence[ServerSentEvent] = ()) -> None:
        if self._overflow:
            raise SSEError(self._overflow, events)

    def _feed(self, data: bytes) -> list[ServerSentEvent]:
        single = self._single_data_line(data)
        if single is not None:
            event = _new_event(("message", single, self._id, self._retry))
            self._retry = None
            return [event]
        lines = self._lines._split(data)
        if not lines and self._size + len(self._lines._pending) <= self._max_bytes:
            return []
        return self._interpret(lines)

    def _single_data_line(self, data: bytes) -> str | None:
        """Return the data if a read is exactly one event of one line, else None.

        Micro-optimization: most reads of a chat are that, and take half the time here.
        """
        end = len(data) - 2
        if data[:6] != b"data: " or data.find(b"\n") != end or data[-1] != _LF:
            return None
        if self._size or self._lines._pending or self._lines._skip:
            return None
        if end > self._max_bytes or _CR in data:
            return None
        return data[6:end].decode("utf-8", "replace")

    def _interpret(self, lines: list[bytes]) -> list[ServerSentEvent]:
        """Process whole lines. Nothing is raised at the limit: `_overflow` is set."""
        events: list[ServerSentEvent] = []
        if self._overflow:
            self._lines._pending.clear()
            return events
        # The end of the last line does not count.
        data, size, max_size = self._data, self._size, self._max_bytes + 1
        event, id = self._event, self._id
        for line in lines:
            if not line:  # dispatch the event
                if data:
                    text = b"\n".join(data).decode("utf-8", "replace")
                    name = event or "message"
                    events.append(_new_event((name, text, id, self._retry)))
                    data.clear()
                    self._retry = None
                # Without data there is no event; but id and retry count all the same.
                self.last_event_id = id
                event = ""
                size = 0
                continue
            size += len(line) + 1
            if size > max_size:
                self._set_overflow(line)
                return events
            if line[:6] == b"data: ":  # nearly all lines
                data.append(line[6:])
            elif line[0] != _COLON:
                field, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if field == b"data":
                    data.append(value)
                elif field == b"event":
                    event = value.decode("utf-8", "replace")
                elif field == b"id":
                    if b"\0" not in value:
                        id = value.decode("utf-8", "replace")
                elif field == b"retry":
                    self._set_retry(value)
                else:
                    self._process_unknown(line, events)
        self._size, self._event, self._id = size, event, id
        pending = self._lines._pending
        if pending and size + len(pending) >= max_size:
            self._set_overflow(bytes(pending))
        return events

    def _set_retry(self, value: bytes) -> None:
        if value.isdigit():
            with suppress(ValueError):  # more digits than Python converts
                self._retry = self.retry = int(value)

    def _process_unknown(self, line: bytes, events: list[ServerSentEvent]) -> None:
        """Ignore the line, as the standard says. The chat reader finds errors here."""

    def _set_overflow(self, line: bytes) -> None:
        """Give up, and hold nothing more of the stream."""
        # The beginning of the event: the message here has 200 bytes of it, the error of
        # the chat reader more.
        self._overflow_data = (self._data or [line])[0][:1000]
        start = self._overflow_data[:200].decode("utf-8", "replace")
        limit = self._max_bytes
        self._overflow = f"an event of more than {limit} bytes: {start!r}"
        self._max_bytes = -1  # nothing takes the shortcuts of _feed any more
        self._data.clear()
        self._lines._pending.clear()


def iter_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream of bytes. A last line without an end is not one.

    httpx's `Response.iter_lines` also splits at U+2028, U+2029 and U+0085, which JSON
    strings may contain, and drops them.
    """
    decoder = SSELineDecoder()
    for data in chunks:
        yield from decoder.feed(data)


async def aiter_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Async twin of `iter_lines`."""
    decoder = SSELineDecoder()
    async for data in chunks:
        for line in decoder.feed(data):
            yield line


def iter_sse(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ServerSentEvent]:
    """Yield the events of a stream of bytes. Raises SSEError for one over the limit."""
    decoder = SSEDecoder(max_event_bytes)
    for data in chunks:
        yield from decoder._feed(data)
        decoder._check_overflow()


async def aiter_sse(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ServerSentEvent]:
    """Async twin of `iter_sse`."""
    decoder = SSEDecoder(max_event_bytes)
    async for data in chunks:
        for event in decoder._feed(data):
            yield event
        decoder._check_overflow()


class EventSource:
    """The events of an httpx response: iterate over it with `for` or `async for`.

    `last_event_id` starts as the argument and follows the events that were given out;
    `retry` is in milliseconds, or None. Blocks without data update both as well. Raises
    SSEError where the response is not an event stream, or an event is over
    `max_event_bytes` (None, as in httpx-sse, is no limit).
    """

    def __init__(
        self,
        response: Response,
        max_event_bytes: int | None = None,
        last_event_id: str = "",
    ) -> None:
        self.response = response
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self._decoder = SSEDecoder(max_event_bytes)
        self._decoder.last_event_id = self._decoder._id = last_event_id

    def iter_sse(self) -> Iterator[ServerSentEvent]:
        """Yield the events as they arrive."""
        self._check_content_type()
        for data in self.response.iter_bytes():
            yield from self._events(data)

    async def aiter_sse(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the events as they arrive."""
        self._check_content_type()
        async for data in self.response.aiter_bytes():
            for event in self._events(data):
                yield event

    __iter__ = iter_sse
    __aiter__ = aiter_sse

    def _events(self, data: bytes) -> Iterator[ServerSentEvent]:
        decoder = self._decoder
        for event in decoder._feed(data):
            # The decoder has processed the whole read; the caller is at this event.
            self.last_event_id = event.id
            if event.retry is not None:
                self.retry = event.retry
            yield event
        self.last_event_id = decoder.last_event_id
        self.retry = decoder.retry
        decoder._check_overflow()

    def _check_content_type(self) -> None:
        content_type = self.response.headers.get("content-type", "")
        if "text/event-stream" not in content_type.lower():
            raise SSEError(f"expected text/event-stream, got {content_type!r}")


def _event_stream_options(client: Client | AsyncClient, options: Json) -> Json:
    """Return the options of a request, with the headers that httpx-sse sends."""
    headers = type(client.headers)(options.get("headers"))  # of httpx, or of httpx2
    headers["accept"] = "text/event-stream"
    headers["cache-control"] = "no-store"
    return options | {"headers": headers}


@contextmanager
def connect_sse(
    client: Client,
    method: str,
    url: str,
    *,
    max_event_bytes: int | None = None,
    **kwargs: Any,
) -> Iterator[EventSource]:
    """Request an event stream; `kwargs` are those of `client.stream`."""
    options = _event_stream_options(client, kwargs)
    with client.stream(method, url, **options) as response:
        yield EventSource(response, max_event_bytes)


@asynccontextmanager
async def aconnect_sse(
    client: AsyncClient,
    method: str,
    url: str,
    *,
    max_event_bytes: int | None = None,
    **kwargs: Any,
) -> AsyncIterator[EventSource]:
    """Async twin of `connect_sse`."""
    options = _event_stream_options(client, kwargs)
    async with client.stream(method, url, **options) as response:
        yield EventSource(response, max_event_bytes)


# ---- Chat types ----------------------------------------------------------------------
#
# openai's names, fields, order and repr. Whatever a server sends can be read into them:
# nothing is validated, and nothing is lost.


def _dicts(value: Any) -> list[Json]:
    """Return the dicts in a value that should be a list of them."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict)]


def _string(value: Any) -> str | None:
    return value if type(value) is str else None


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _repair_surrogates(text: str) -> str:
    """Return the text with surrogate pairs joined, and a lone half as U+FFFD.

    Some servers send an emoji as two escapes, `"\\ud83d"` and `"\\ude42"`, in two
    chunks. Python keeps them as two characters, which no encoding takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _repair_strings(value: Any) -> Any:
    """Return a copy of a JSON value with surrogate pairs repaired."""
    if isinstance(value, dict):
        return {
            _repair_surrogates(name): _repair_strings(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_repair_strings(item) for item in value]
    return _repair_surrogates(value) if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    """Return an object that stands in place of a list of one as such a list.

    {} stands for an empty list: gateways in Lua know no difference.
    """
    return [value] if value and isinstance(value, dict) else value


def _converter(hint: Any) -> Callable[[Any], Any]:
    """Return the function that converts a JSON value; it returns None if it cannot."""
    if hint in (int, float):
        # Whatever came is kept: the default, 0, would be a wrong number.
        return lambda sent: sent
    args = typing.get_args(hint)
    if type(None) in args:  # X | None
        hint, args = args[0], typing.get_args(args[0])
    expected = typing.get_origin(hint) or hint
    model: Any = args[0] if expected is list else hint
    if not hasattr(model, "from_dict"):
        return lambda sent: sent if type(sent) is expected else None
    if expected is list:
        return lambda sent: [model.from_dict(d) for d in _dicts(_as_list(sent))]
    return lambda sent: model.from_dict(sent) if type(sent) is dict else None


@functools.cache
def _converters(model: Any) -> dict[str, Callable[[Any], Any]]:
    """Map each field name to the function that converts its JSON value."""
    hints = typing.get_type_hints(model)
    return {name: _converter(hints[name]) for name in model.__dataclass_fields__}


def _plain(value: Any) -> Any:
    """Return the value of a field as JSON, with our types turned into dicts."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value._to_json() if isinstance(value, _Model) else value


def _holds_models(value: Any, sent: Any) -> bool:
    """Tell whether a value is one of our types, or a list of them.

    A list that lacks an item, since that was no object, stays as the server sent it.
    So does a value that was found in another place (Kimi's usage): null was `sent` in
    this one, or nothing, or an empty object.
    """
    if isinstance(value, list):
        is_complete = isinstance(sent, list) and len(sent) == len(value)
        return is_complete and any(isinstance(item, _Model) for item in value)
    return isinstance(value, _Model) and bool(sent)


class _Model:
    """The base of the chat types.

    `raw` is the JSON object that the server sent. It is None for a value made by hand,
    and can be where the fields are all of it: in a delta of nothing but text and a
    role, and in a piece of a function that is nothing but arguments. `extra` is the
    part of it that has no field here, None if there is none. Neither is a dataclass
    field: values are compared without them.
    """

    # Micro-optimization: the base is not a dataclass, so that constructors do not set
    # these two. Building a chunk takes a fifth less time.
    extra: Json | None = None
    raw: Any = None

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON. Never raises.

        A field that is missing, null or of a wrong type has its default. But a number
        whose default is 0 is whatever came, and so are `id`, `model` and the other
        texts that stand beside the `choices`.
        """
        model = cls()
        model.raw = d
        converters = _converters(cls)  # type: ignore[arg-type]
        extra: Json = {}
        for name, sent in d.items():
            if name not in converters:
                extra[name] = sent
            elif sent is not None:
                value = converters[name](sent)
                if value is not None:
                    setattr(model, name, value)
        if extra:
            model.extra = extra
        return model

    def to_dict(self) -> Json:
        """Return the JSON object that was sent, with the attributes changed since.

        An attribute that was set to None is left out. Arguments that were sent as an
        object are a text. A value made by hand has all attributes that are not None.
        """
        return _repair_strings(self._to_json())  # type: ignore[no-any-return]

    def _to_json(self) -> Json:
        before: Json = {}
        sent: Json = {}
        if self.raw is not None:
            sent = self.raw
            original = type(self).from_dict(sent)
            before = {**vars(original), "extra": original.extra}
        result = dict(sent)
        for name in _converters(type(self)):  # type: ignore[arg-type]
            value = getattr(self, name)
            if name in before and before[name] == value:
                # Unchanged: it stands in `sent` as it came. Nested types are written
                # again, since arguments sent as an object become text.
                if _holds_models(value, sent.get(name)):
                    result[name] = _plain(value)
                continue
            names = self._sent_names(name)
            for sent_name in names:
                result.pop(sent_name, None)
            # Servers refuse an empty list of tool calls.
            if value is not None and (value or name != "tool_calls"):
                result[names[0]] = _plain(value)
        if self.extra != before.get("extra"):
            for name in before.get("extra") or ():
                result.pop(name, None)
            result |= self.extra or {}
        return result

    def _sent_names(self, name: str) -> list[str]:
        """Return the names under which the server sent a field."""
        return [name]

    def __repr__(self) -> str:
        # Fields that openai's types do not have are shown at the end, if they are set.
        names = [*_converters(type(self))]  # type: ignore[arg-type]
        if getattr(self, "reasoning_content", "") is None:
            names.remove("reasoning_content")
        if self.extra is not None:
            names.append("extra")
        pairs = [f"{name}={getattr(self, name)!r}" for name in names]
        return f"{type(self).__name__}({', '.join(pairs)})"


_REASONING_NAMES = (
    "reasoning_content",  # most servers
    "reasoning",  # Ollama, vLLM, Groq, Cerebras, OpenRouter
    "reasoning_text",  # Copilot
)


def _text(content: Any) -> str:
    """Return the text of a content: a str, a list of parts, or one part.

    Cloudflare sends a token that looks like a number as one.
    """
    if type(content) in (int, float):
        return str(content)
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if type(text) is str)


def _find_reasoning(d: Json) -> str | None:
    """Return the reasoning of a message or a delta, None if there is none."""
    for name in _REASONING_NAMES:  # a str; Envoy's gateway: {"text": …, "signature": …}
        if text := _text(d.get(name)):
            return text
    # Mistral: {"type": "thinking", "thinking": [{"type": "text", "text": …}]}
    # Databricks: {"type": "reasoning", "summary": [{"type": …, "text": …}]}
    parts = _dicts(d.get("content"))
    texts = [_text(part.get("thinking") or part.get("summary")) for part in parts]
    # MiniMax, OpenRouter: [{"type": "reasoning.text", "text": …}], or with a "summary"
    if not any(texts):
        details = _dicts(d.get("reasoning_details"))
        texts = [_text(item.get("text") or item.get("summary")) for item in details]
    return "".join(texts) or None


class _Message(_Model):
    """The base of messages and deltas: text and reasoning come in many shapes."""

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        message: Any = super().from_dict(d)
        content = d.get("content")
        if content is not None and type(content) is not str:
            message.content = _text(content)
        message.reasoning_content = _find_reasoning(d)
        # The text of reasoning is in its field now; an object that has it stays in
        # `extra`, with its signature.
        extra = {
            k: v for k, v in (message.extra or {}).items() if k not in _REASONING_NAMES
        }
        for name in _REASONING_NAMES:
            if d.get(name) and _is_container(d[name]):
                extra[name] = d[name]
        message.extra = extra or None
        return message  # type: ignore[no-any-return]

    def _sent_names(self, name: str) -> list[str]:
        if name != "reasoning_content" or self.raw is None:
            return [name]
        # Groq and Cerebras send `reasoning`, and refuse any other name with 400.
        return [sent for sent in _REASONING_NAMES if self.raw.get(sent)] or [name]


@dataclass(repr=False)
class TopLogprob(_Model):
    """A likely token at one place; `logprob` is a natural logarithm."""

    token: str = ""
    bytes: list[int] | None = None
    logprob: float = 0.0


@dataclass(repr=False)
class ChatCompletionTokenLogprob(TopLogprob):
    """The token that was chosen, and the most likely ones."""

    top_logprobs: list[TopLogprob] = field(default_factory=list)


@dataclass(repr=False)
class ChoiceLogprobs(_Model):
    """Log probabilities of the tokens of a choice."""

    content: list[ChatCompletionTokenLogprob] | None = None
    refusal: list[ChatCompletionTokenLogprob] | None = None


@dataclass(repr=False)
class CompletionTokensDetails(_Model):
    """The tokens of the answer by their use."""

    accepted_prediction_tokens: int | None = None
    audio_tokens: int | None = None
    reasoning_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


@dataclass(repr=False)
class PromptTokensDetails(_Model):
    """The tokens of the prompt by their kind."""

    audio_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(repr=False)
class CompletionUsage(_Model):
    """The numbers of tokens of the answer and of the prompt."""

    completion_tokens: int = 0
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens_details: CompletionTokensDetails | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


def _with_text_arguments(d: Json) -> Json:
    """Return a function with its arguments as text; llama.cpp has sent an object."""
    arguments = d.get("arguments")
    if arguments is None or type(arguments) is str:
        return d
    return {**d, "arguments": json.dumps(arguments)}


@dataclass(repr=False)
class ChoiceDeltaToolCallFunction(_Model):
    """A piece of a function call; the pieces of `arguments` make up one JSON text."""

    arguments: str | None = None
    name: str | None = None

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        return super().from_dict(_with_text_arguments(d))


@dataclass(repr=False)
class ChoiceDeltaToolCall(_Model):
    """A piece of a tool call. Some servers send no `index`, others no `id`."""

    index: int | None = None
    id: str | None = None
    function: ChoiceDeltaToolCallFunction | None = None
    type: str | None = None

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        # Micro-optimization: nearly all pieces hold an index and text arguments, and
        # are built three times as fast by hand.
        function = d.get("function")
        if type(function) is dict and len(function) == 1:
            arguments = function.get("arguments")
            if type(arguments) is str and len(d) == 2 and type(d.get("index")) is int:
                piece = cls(d["index"], None, ChoiceDeltaToolCallFunction(arguments))
                piece.raw = d
                return piece
        return super().from_dict(d)


@dataclass(repr=False)
class ChoiceDelta(_Message):
    """The part of a message that a chunk adds."""

    content: str | None = None
    function_call: Json | None = None
    refusal: str | None = None
    role: str | None = None
    tool_calls: list[ChoiceDeltaToolCall] | None = None
    reasoning_content: str | None = None

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        # Micro-optimization: nearly all deltas hold a text, or pieces of tool calls,
        # and nothing else. They are built three times as fast by hand.
        content = d.get("content")
        if type(content) is str:
            if len(d) == 1:
                return cls(content)
            if len(d) == 2 and type(d.get("role")) is str:
                return cls(content, None, None, d["role"])
        calls = d.get("tool_calls")
        if len(d) == 1 and type(calls) is list:
            delta = cls()
            delta.tool_calls = [ChoiceDeltaToolCall.from_dict(c) for c in _dicts(calls)]
            delta.raw = d
            return delta
        return super().from_dict(d)


@dataclass(repr=False)
class Function(_Model):
    """The function to call; `arguments` is a JSON text, as the model wrote it."""

    arguments: str = ""
    name: str = ""

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        return super().from_dict(_with_text_arguments(d))


@dataclass(repr=False)
class ChatCompletionMessageToolCall(_Model):
    """A tool call; a custom tool's name and input are in `extra["custom"]`."""

    id: str = ""
    function: Function = field(default_factory=Function)
    type: str = "function"


@dataclass(repr=False)
class ChatCompletionMessage(_Message):
    """The message of an answer; it can stand in the `messages` of the next turn."""

    content: str | None = None
    refusal: str | None = None
    role: str = "assistant"
    annotations: list[Json] | None = None
    audio: Json | None = None
    function_call: Json | None = None
    tool_calls: list[ChatCompletionMessageToolCall] | None = None
    reasoning_content: str | None = None

    def to_dict(self) -> Json:
        """Return it as the server sent it, and with a role, since servers want one."""
        # The role comes first, and replaces one that is null.
        role = {"role": _repair_surrogates(self.role or "assistant")}
        return role | super().to_dict() | role


@dataclass(repr=False)
class _CompletionBase(_Model):
    """The base of chunks and of whole answers."""

    id: str = ""
    choices: list[Any] = field(default_factory=list)
    created: int = 0
    model: str = ""
    object: str = ""
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None

    Choice = _Model

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build the object from JSON, as every type does."""
        # Micro-optimization: built by hand, since each chunk is built here.
        choices: list[Any] = []
        usage = d.get("usage")
        sent = d.get("choices")
        for item in sent if type(sent) is list else ():
            if type(item) is dict:
                choice: Any = cls.Choice.from_dict(item)
                index = item.get("index")
                if type(index) is not int or index < 0:
                    choice.index = choice.place = len(choices)
                if choice.extra is not None:
                    usage = usage or choice.extra.get("usage")  # Kimi
                choices.append(choice)
        extra = None
        if not _COMPLETION_FIELDS.issuperset(d):
            extra = {k: v for k, v in d.items() if k not in _COMPLETION_FIELDS}
        completion = cls(
            d.get("id") or "",
            choices,
            d.get("created") or 0,
            d.get("model") or "",
            d.get("object") or cls.object,
            d.get("service_tier"),
            d.get("system_fingerprint"),
        )
        completion.raw = d
        if extra is not None:
            completion.extra = extra
            if not usage and type(extra.get("x_groq")) is dict:
                usage = extra["x_groq"].get("usage")
        if usage and type(usage) is dict:
            completion.usage = CompletionUsage.from_dict(usage)
        return completion

    @property
    def text(self) -> str:
        """The text of the choice with index 0, "" for none, without lone surrogates."""
        return _repair_surrogates(self._first_text())

    @property
    def reasoning(self) -> str:
        """The reasoning of the choice with index 0, likewise."""
        texts = [m.reasoning_content or "" for m in self._first()]
        return _repair_surrogates("".join(texts))

    def _first_text(self) -> str:
        """Return the text as it came, perhaps with one half of a surrogate pair."""
        return "".join(message.content or "" for message in self._first())

    def _first(self) -> list[Any]:
        """Return the messages or deltas of the choice with index 0."""
        first = [choice for choice in self.choices if choice.index == 0]
        return [getattr(c, "delta", None) or c.message for c in first]


# OpenAI hides the length of chunks by an "obfuscation", which is not worth an `extra`.
_COMPLETION_FIELDS = _converters(_CompletionBase).keys() | {"obfuscation"}


class _Choice(_Model):
    """The base of the choices of chunks and of whole answers."""

    # The position in the list, of a choice that has no index, or a negative one.
    place: int | None = None

    def _to_json(self) -> Json:
        choice = super()._to_json()
        if self.place is not None and getattr(self, "index", None) == self.place:
            # The index is ours; write the one that was sent, if any.
            choice.pop("index", None)
            if "index" in self.raw:
                choice["index"] = self.raw["index"]
        return choice

    def _sent_names(self, name: str) -> list[str]:
        if name == "finish_reason":
            return ["finish_reason", "finishReason"]
        return [name]


def _find_finish_reason(d: Json) -> str | None:
    """Return the reason in a choice; None for "" (SGLang) and "null" (KoboldCpp)."""
    reason = d.get("finish_reason") or d.get("finishReason")  # Gemini sent the latter
    if type(reason) is dict:  # SGLang: {"type": "abort", "message": …}
        reason = reason.get("type")
    if type(reason) is not str or reason.strip().lower() in ("", "null", "none"):
        return None
    return _repair_surrogates(reason)


@dataclass(repr=False)
class ChatCompletionChunk(_CompletionBase):
    """One event of a streamed answer; `raw` is all that the server sent in it."""

    @dataclass(repr=False)
    class Choice(_Choice):
        """The part of one choice that a chunk adds."""

        delta: ChoiceDelta = field(default_factory=ChoiceDelta)
        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = None

        @classmethod
        def from_dict(cls, d: Json) -> Self:
            """Build the object from JSON; a `message` may stand for the delta."""
            # Micro-optimization: built by hand, since each chunk is built here.
            delta = d.get("delta")
            if type(delta) is not dict:
                delta = d.get("message")
            reason = d.get("finish_reason")
            if reason is not None or "finishReason" in d:
                reason = _find_finish_reason(d)
            logprobs = d.get("logprobs")
            choice = cls(
                ChoiceDelta.from_dict(delta if type(delta) is dict else {}),
                reason,
                d.get("index") or 0,
                ChoiceLogprobs.from_dict(logprobs) if type(logprobs) is dict else None,
            )
            choice.raw = d
            if not _CHOICE_FIELDS.issuperset(d):
                extra = {k: v for k, v in d.items() if k not in _CHOICE_FIELDS}
                choice.extra = extra
            return choice

    choices: list[ChatCompletionChunk.Choice] = field(default_factory=list)
    object: str = "chat.completion.chunk"


_CHOICE_FIELDS = frozenset(
    ["delta", "finish_reason", "finishReason", "index", "logprobs", "message"]
)


class _HeadersMixin:
    # No dataclass field: `asdict` and FastAPI would publish the headers of a provider.
    response_headers: Mapping[str, str] = MappingProxyType({})


@dataclass(repr=False)
class ChatCompletion(_CompletionBase, _HeadersMixin):
    """A whole answer, or the part of it that arrived.

    `raw` is all that the server sent; for a stream, what it would have sent at once.
    `response_headers` are those of the HTTP response, with names in lower case. Only
    what `generate` returns and the `completion` of an error have them.
    """

    @dataclass(repr=False)
    class Choice(_Choice):
        """One of the answers; `finish_reason` is None where it was cut off."""

        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = None
        message: ChatCompletionMessage = field(default_factory=ChatCompletionMessage)

        @classmethod
        def from_dict(cls, d: Json) -> Self:
            """Build the object from JSON, as every type does."""
            choice = super().from_dict(d)
            choice.finish_reason = _find_finish_reason(d)
            if choice.extra is not None:
                choice.extra.pop("finishReason", None)
                choice.extra = choice.extra or None
            return choice

    choices: list[ChatCompletion.Choice] = field(default_factory=list)
    object: str = "chat.completion"

    @property
    def limit(self) -> str:
        """The limit that stopped it: "length" or "content_filter", "" for none."""
        limits = [_reason_limit(choice.finish_reason) for choice in self.choices]
        return next(filter(None, limits), "")


# The meaning of a finish_reason, by the words that it contains: servers make up new
# ones from them (ERROR_LIMIT, network-error, model_context_window_exceeded …).
# Failures: vLLM, TensorRT-LLM, OpenRouter, DeepSeek, Cohere, Gemini, gateways.
_FAILURE = re.compile(
    "error|fail|abort|cancel|time_?d?_?out|malformed|interrupt|network|unavailable"
    "|overload|insufficient|rate_?limit|quota|unexpected|exception|incomplete"
    "|disconnect|connection|killed|preempt|too_many"
)
_UNFINISHED = ("not_finished", "unfinished")  # watsonx, in every chunk but the last
# Limits: OpenAI, Gemini, z.ai, gateways. Filters: OpenAI, Azure, Gemini, z.ai.
_LENGTH_LIMIT = re.compile("length|max_|context_window|limit")
_CONTENT_LIMIT = re.compile(
    "filter|safety|recitation|sensitive|blocklist|blocked|prohibited|spii|moderation"
    "|guardrail"
)


def _normalise_reason(reason: str) -> str:
    return re.sub(r"[\s-]+", "_", reason.strip().lower())


def _is_failure(reason: str) -> bool:
    return _FAILURE.search(_normalise_reason(reason)) is not None


def _reason_limit(reason: str | None) -> str:
    """Return the kind of limit that a finish_reason names, "" for none."""
    word = _normalise_reason(reason or "")
    if _FAILURE.search(word):
        return ""
    if _CONTENT_LIMIT.search(word):
        return "content_filter"
    return "length" if _LENGTH_LIMIT.search(word) else ""


# ---- Errors --------------------------------------------------------------------------
#
#     APIError                            any of these, or an error inside an answer
#      ├─ APIConnectionError              no answer began: no connection, or it broke
#      │   └─ APITimeoutError             no answer began in the time allowed
#      ├─ APIStatusError                  the HTTP status is not a success
#      ├─ TruncatedStreamError            an answer began and was cut off
#      └─ APIResponseValidationError      the body is not an answer


class APIError(Exception):
    """A request failed, or its answer is broken or reports an error.

    `str(error)` is the status, `message`, `place` and `advice`. The attributes:

    message: the server's own text, or ours where the server sent none.
    body: the error as the server sent it, parsed JSON or text; None if it sent none.
    code, type, param: the fields of these names in the body.
    status_code: that of the HTTP response, None if it was a success or there is none.
    retry_after: the seconds that the server asks to wait, None if it does not.
    is_retryable: whether sending the request again may help, as `max_retries` does.
    completion: the part of the answer that arrived before.
    place: the URL, and where there is no response, the time and number of attempts.
    advice: a remedy, "" for none.
    """

    def __init__(
        self,
        message: str,
        body: Any = None,
        code: int | str | None = None,
        type: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.body = body
        self.code = code
        self.type = type
        self.param = param
        self.status_code: int | None = None
        self.retry_after: float | None = None
        self.is_retryable = False
        self.completion = ChatCompletion()
        self.place = ""  # the URL, and how long it took
        self.advice = ""

    def __str__(self) -> str:
        text = self.message
        if self.status_code is not None:
            text = f"HTTP {self.status_code}: {text}"
        if self.place:
            text += f" ({self.place})"
        if self.advice:
            text += f"; {self.advice}"
        return text


class APIConnectionError(APIError):
    """No answer began: there was no connection, or it broke.

    `is_broken` tells whether a connection that had been open broke.
    """

    is_broken = False


class APITimeoutError(APIConnectionError):
    """No answer began in the time allowed."""


class APIStatusError(APIError):
    """The server answered with `status_code`, which is not a success.

    `response` is an httpx.Response, read, and without the request and its key.
    """

    status_code: int  # pyright: ignore[reportIncompatibleVariableOverride]
    response: Response


class TruncatedStreamError(APIError):
    """An answer began and was cut off, for whatever reason: `__cause__` has it."""


class APIResponseValidationError(APIError):
    """The body is not an answer: neither stream nor JSON, empty, or over a limit."""


# The shapes in which servers report an error, and one server that sends each.
#
#     {"error": {"message": …, "type": …, "param": …, "code": …}}     OpenAI, most
#     {"error": "text"}                                               Ollama
#     [{"error": {…}}]                                                Gemini
#     {"choices": [{"error": {…}, …}]}                                OpenRouter
#     {"x_groq": {"error": …}, "choices": […]}                        Groq
#     {"object": "error", "message": …, "type": …, "code": …}         vLLM, Mistral
#     {"base_resp": {"status_code": 1027, "status_msg": …}}           MiniMax
#
# These count only without choices: other servers use the names in healthy chunks.
#
#     {"errors": [{"code": …, "message": …}], "success": false}       Cloudflare
#     {"detail": "text"}, {"detail": [{"msg": …}]}                    FastAPI
#     {"text": …, "error_code": 50002}                                FastChat
#     {"error_type": …, "error_message": …}                           Venice
#     {"code": …, "message": …}, also msg, status, statusCode         Spark, gateways
#     {"type": "…error…", "message": …}, {"event": "error", …}        Cerebras, Coze
#     {"status": "failed", …}, {"success": false, …}                  gateways
#
# They come as an event, on a line of its own without `data:` (Vertex, gateways), in a
# field named `error` (llama.cpp before September 2025), in an event of type `error`
# (Groq), and as the whole body. null, [], 0, 2xx, "ok" and "success" report no error:
# Spark sends code 0 with each chunk, and MiniMax status 0.

_ERROR_EXCERPT = 1000  # characters of an error's text in a message
_EXCERPT = 200  # characters of a body in a message


def _reports_error(value: Any) -> bool:
    """Tell whether the value of a name such as `error` or `code` means an error."""
    if isinstance(value, str):
        value = value.strip().lower()
        if re.fullmatch("2[0-9][0-9]|0*", value):  # "" as well
            return False
        return value not in ("ok", "success", "null", "none", "false")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value != 0 and not 200 <= value < 300
    return bool(value)


def _is_empty_error(error: Any) -> bool:
    """Tell whether all fields of an error are empty, as in each chunk of Apertis."""
    fields = error.values() if isinstance(error, dict) else [error]
    return not any(_is_container(field) or _reports_error(field) for field in fields)


def _find_error_without_choices(payload: Json) -> Any:
    """Return the error in a payload that has no choices."""
    for name, value in payload.items():
        is_error_name = name == "detail" or "error" in name.lower()
        if is_error_name and _reports_error(value):
            return value if _is_container(value) else payload
    if payload.get("success") is False or _is_failure(str(payload.get("status"))):
        return payload
    kinds = str(payload.get("type")), str(payload.get("event"))
    if any("error" in kind.lower() for kind in kinds):
        return payload
    codes = [payload.get(name) for name in ("code", "status_code", "statusCode")]
    if type(payload.get("status")) is int:  # as a text it may be "in_progress"
        codes.append(payload["status"])
    has_message = payload.get("message") or payload.get("msg")
    return payload if has_message and any(map(_reports_error, codes)) else None


# Micro-optimization: one test for these three, since few payloads have any of them.
_ERROR_NAMES = frozenset(["error", "x_groq", "base_resp"])


def _find_error(payload: Any) -> Any:
    """Return the part of a payload that reports an error, None if it reports none."""
    if type(payload) is list and len(payload) == 1:
        payload = payload[0]
    if type(payload) is not dict:
        return None

    if payload.get("object") == "error":
        return payload
    choices = payload.get("choices")
    if not _ERROR_NAMES.isdisjoint(payload):
        error = payload.get("error")
        if _reports_error(error) and not (choices and _is_empty_error(error)):
            # Beside a text or a number stands the message, if there is one (Spring).
            return error if _is_container(error) else payload
        groq = payload.get("x_groq")
        if isinstance(groq, dict) and _reports_error(groq.get("error")):
            return groq["error"]
        minimax = payload.get("base_resp")
        if isinstance(minimax, dict) and _reports_error(minimax.get("status_code")):
            return minimax
    if not choices or type(choices) is not list:
        return _find_error_without_choices(payload)
    for choice in choices:
        has_error = type(choice) is dict and "error" in choice
        if has_error and _reports_error(choice["error"]):
            return choice["error"]
    return None


# Where an error keeps its text, the most telling name first.
# fmt: off
_TEXT_NAMES = (
    "message", "msg", "detail", "details", "error_description", "error_message",
    "error_msg", "errorMessage", "error", "errors", "status_msg", "text", "reason",
    "title", "data",
)
# fmt: on


_json_decoder: Any = json.JSONDecoder()
_scan_json = _json_decoder.scan_once


def _parse_json(text: str) -> tuple[Any, Exception | None]:
    """Return the value of a JSON text and None, or None and why it is not JSON."""
    # Micro-optimization: json.loads also searches for white space around the value.
    # Events have none, and without that search this takes half the time.
    try:
        value, end = _scan_json(text, 0)
        if end == len(text):
            return value, None
    except (ValueError, RecursionError, StopIteration):
        pass  # json.loads finds the same, and says where
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        return None, error


def _excerpt(text: str, length: int) -> str:
    """Return the beginning of a text, on one line."""
    # What stands between the words may be any amount of white space.
    text = " ".join(text.lstrip()[: 4 * length].split())
    return text if len(text) <= length else text[: length - 2] + " …"


def _page_title(page: str) -> str:
    """Return the title of a page of HTML, else the beginning of its text."""
    found = re.search(r"(?is)<title[^>]{0,200}>(.{1,400}?)</title", page[:20_000])
    if found and found[1].strip():
        return found[1]
    return re.sub(r"(?s)<[^>]{0,1000}>", " ", page[:2000])


def _error_text(error: Any, depth: int = 4) -> str:
    """Return the most telling text in an error, in whatever it is wrapped."""
    if isinstance(error, dict) and depth:
        # OpenRouter says only "Provider returned error", and has the reason here.
        metadata = error.get("metadata")
        if isinstance(metadata, dict) and metadata.get("raw"):
            return _error_text(metadata["raw"], depth - 1)
        for name in _TEXT_NAMES:
            if error.get(name):
                return _error_text(error[name], depth - 1)
    if isinstance(error, list) and depth:
        texts = [_error_text(item, depth - 1) for item in error[:10]]
        return _excerpt("; ".join(texts), _ERROR_EXCERPT)
    if not isinstance(error, str):
        return _excerpt(json.dumps(error, ensure_ascii=False), _ERROR_EXCERPT)
    text = error.strip()
    if text[:1] in ("{", "[") and depth:
        payload, problem = _parse_json(text)  # JSON in a text
        if not problem:
            return _error_text(payload, depth - 1)
    if text[:1] == "<":  # a page of a gateway
        return _excerpt(_page_title(text), _EXCERPT)
    return _excerpt(text, _ERROR_EXCERPT)


def _error_details(error: Any) -> list[Json]:
    """Return the nested objects of an error, innermost first: each may have a code."""
    found: list[Json] = []
    for _ in range(5):
        if isinstance(error, list) and error:
            error = error[0]
        if not isinstance(error, dict):
            break
        found.insert(0, error)
        names = [
            n for n in ("error", "errors") if isinstance(error.get(n), (dict, list))
        ]
        error = error.get(names[0]) if names else None
    return found


def _first_field(objects: list[Json], names: Sequence[str], types: Any) -> Any:
    for each in objects:
        for name in names:
            value = each.get(name)
            if isinstance(value, types) and not isinstance(value, bool) and value != "":
                return value
    return None


def _server_error_fields(text: str) -> tuple[Any, ...]:
    """Return the fields of a server's error, in the order of APIError's arguments.

    The text is known to be an error. If its shape is unknown, all of it is used.
    """
    payload, problem = _parse_json(text)
    if problem:
        payload = text
    error = _find_error(payload)
    if error is None:
        error = payload
    try:
        message = _repair_surrogates(_error_text(error))
    except RecursionError:  # of json.dumps, over a deep value
        message = _excerpt(text, _ERROR_EXCERPT)
    details = _error_details(error) + _error_details(payload)
    return (
        message or "(no message)",
        payload,
        _first_field(details, ("code", "error_code", "status_code"), (int, str)),
        _first_field(details, ("type", "error_type"), str),
        _first_field(details, ("param",), str),
    )


# ---- Accumulating --------------------------------------------------------------------

# Texts that arrive in pieces, in a message and in its parts. Any other text is replaced
# by the latest one.
_GROWING_NAMES = {"arguments", "content", "data", "input", "refusal", "summary", "text"}
_GROWING_NAMES |= {"signature", "thinking", "thought_signature", "transcript"}
_GROWING_NAMES |= {*_REASONING_NAMES}
# Some servers send a signature in pieces, others send it complete, twice.
_SIGNATURE_NAMES = ("signature", "thought_signature")
# Parts of these types that follow each other are one part that was cut.
_TEXT_PARTS = ("text", "thinking", "reasoning", "summary_text")


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # halves of a pair come one by one


# Micro-optimization: other items are not copied one by one. The `bytes` of log
# probabilities are long lists of numbers.
_NEED_COPYING = (str, dict, list, bytearray)


def _clean_copy(value: Any, depth: int = 0) -> Any:
    """Return a copy that can be encoded; `depth` is that of the value in its payload.

    Raises ValueError beyond MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"JSON of more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {
            _repair_surrogates(name): _clean_copy(item, depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [
            _clean_copy(item, depth + 1) if isinstance(item, _NEED_COPYING) else item
            for item in value
        ]
    if isinstance(value, bytearray):
        value = value.decode("utf-8", "surrogatepass")
    return _repair_surrogates(value) if isinstance(value, str) else value


def _add_text(target: Json, name: str, text: str) -> None:
    """Add to a text, which is kept as a bytearray of UTF-8 while it grows.

    A list of its pieces would take ten times the memory, and adding strings the square
    of the time.
    """
    old, data = target.get(name), _to_bytes(text)
    if not isinstance(old, bytearray):
        target[name] = bytearray(data)
    elif name not in _SIGNATURE_NAMES or old != data:
        old += data


def _merge(target: Json, addition: Json, depth: int = 1) -> None:
    """Add to a dict: the growing texts and lists grow, dicts are merged.

    Other values are replaced; null and "" replace nothing. `depth` is that of the
    values of the dict in their payload. Raises ValueError beyond MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"JSON of more than {MAX_DEPTH} levels")
    for name, value in addition.items():
        old = target.get(name)
        if value is None or (value == "" and old is not None):
            continue
        if isinstance(value, str) and name in _GROWING_NAMES:
            if isinstance(old, dict):
                _merge(old, {"text": value}, depth + 1)
            elif not isinstance(old, _GrowingList):
                _add_text(target, name, value)
            elif value:
                old.add([{"type": "text", "text": value}], depth)
        elif isinstance(value, list):
            if not isinstance(old, _GrowingList):
                target[name] = _GrowingList.after(old, depth)
            target[name].add(value, depth)
        elif isinstance(value, dict):
            if isinstance(old, dict):
                _merge(old, value, depth + 1)
            else:
                text = old if isinstance(old, bytearray) else None
                new: Json = {"text": text} if text else {}
                _merge(new, value, depth + 1)  # before it is kept: it may be too deep
                target[name] = new
        else:
            target[name] = _clean_copy(value)


class _GrowingList(list[Any]):
    """A list that arrives in pieces: items of the same index and type are one item.

    Parts with text and without an index continue the last item, if it has their type.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_key: dict[tuple[int | None, str | None], Json] = {}

    @classmethod
    def after(cls, old: Any, depth: int) -> _GrowingList:
        """Return an empty list, or one with the text that was in its place before."""
        items = cls()
        if isinstance(old, bytearray) and old:
            text = old.decode("utf-8", "surrogatepass")
            items.add([{"type": "text", "text": text}], depth)
        return items

    def add(self, items: list[Any], depth: int) -> None:
        """Add items; `depth` is that of the list, as in `_merge`."""
        for item in items:
            if isinstance(item, (int, float)):
                self.append(item)  # Micro-optimization: numbers need no copy.
                continue
            index = kind = None
            if isinstance(item, dict):
                index, kind = item.get("index"), _string(item.get("type"))
            if type(index) is not int:
                index = None
                if kind not in _TEXT_PARTS:
                    self.append(_clean_copy(item, depth + 1))
                    continue
            old = self._by_key.get((index, kind))
            if old is not None and (index is not None or old is self[-1]):
                _merge(old, item, depth + 2)
                continue
            new: Json = {}
            _merge(new, item, depth + 2)  # before it is kept: it may be too deep
            self._by_key[index, kind] = new
            self.append(new)


def _name_and_text(piece: ChoiceDeltaToolCall) -> tuple[str | None, str | None]:
    """Return the name in a piece, and its arguments or the input of a custom tool."""
    if piece.function is not None:
        return piece.function.name, piece.function.arguments
    custom = (piece.extra or {}).get("custom")
    if isinstance(custom, dict):
        return _string(custom.get("name")), _string(custom.get("input"))
    return None, None


def _parse_object(data: bytes | bytearray) -> Json | None:
    """Return the JSON object in a text, None if it is none."""
    # Micro-optimization: this refuses most incomplete texts without parsing them.
    if data.lstrip()[:1] != b"{" or data.rstrip()[-1:] != b"}":
        return None
    value, _ = _parse_json(data.decode("utf-8", "surrogatepass"))
    return value if isinstance(value, dict) else None


def _is_json_object(data: bytearray) -> bool:
    return _parse_object(data) is not None


class _ToolCallBuilder:
    """A tool call while its pieces arrive: of a function, or of a custom tool."""

    def __init__(self, key: int, order: int) -> None:
        self.key = key  # its index, else its place in a list of pieces, else its number
        self.order = order  # its index, else its number among the calls
        self.id = ""
        self.json: Json = {"id": "", "type": "function"}
        self.name = bytearray()
        # The arguments of a function, or the input of a custom tool.
        self.text = bytearray()
        self._is_custom = False
        self._last_start = 0  # where the last piece of the text begins
        self._is_cumulative = True  # each piece begins with the one before it
        # Each check parses the whole text: a limit keeps the total linear.
        self._checks_left = 100

    def add(self, piece: ChoiceDeltaToolCall) -> None:
        name, text = _name_and_text(piece)
        if piece.id and not self.id:
            self.id = self.json["id"] = _repair_surrogates(piece.id)
        if piece.type:
            self.json["type"] = _repair_surrogates(piece.type)
        if name:
            name_bytes = _to_bytes(name)
            if name_bytes != self.name:  # MiniMax repeats it in every piece
                self.name += name_bytes
        if text:
            self._add_text(_to_bytes(text))
        if piece.function is not None and piece.function.extra is not None:
            _merge(self.json, {"function": piece.function.extra})
        if piece.extra is not None:
            extra = dict(piece.extra)
            custom = extra.pop("custom", None)
            if isinstance(custom, dict):
                self._is_custom = True
                read = ("name", "input")
                extra["custom"] = {k: v for k, v in custom.items() if k not in read}
            _merge(self.json, extra)

    def _add_text(self, data: bytes) -> None:
        if self._is_cumulative:
            last_piece = self.text[self._last_start :]
            self._is_cumulative = data.startswith(bytes(last_piece))
        self._last_start = len(self.text)
        self.text += data

    def is_continued_by(self, piece: ChoiceDeltaToolCall) -> bool:
        """Tell whether a piece continues the call, or opens the next one.

        Only a piece with a name can open a call, and only where this one has a name. It
        does with another id; without an id, if the arguments here are complete; with
        the same id, if those of the piece are complete as well, and others.
        """
        name, text = _name_and_text(piece)
        if not name or not self.name:
            # An id alone never opens a call: LM Studio sends a new one in each piece.
            return True
        data = _to_bytes(text or "")
        if piece.id:
            if self.id and piece.id != self.id:
                return False
            # Gemini's adapters give two calls one id: the name of the function.
            arguments = _parse_object(data)
            if self.text == b"{}" or arguments is None:
                return True
            if _to_bytes(name) == self.name and arguments == _parse_object(self.text):
                return True
        if len(data) >= len(self.text) and data.startswith(bytes(self.text)):
            # Two functions may be called with the same arguments.
            return _to_bytes(name) == self.name or not _is_json_object(self.text)
        if not self._checks_left:
            return True
        self._checks_left -= 1
        return not _is_json_object(self.text)

    def to_dict(self, mend: bool) -> Json:
        """Return the call; with `mend`, arguments that are not an object are mended."""
        call: Json = _clean_copy(self.json)
        if self._is_custom:
            kind, texts = "custom", {"input": self.text, "name": self.name}
        else:
            arguments = self._mended_arguments() if mend else self.text
            kind, texts = "function", {"arguments": arguments, "name": self.name}
        call[kind] = {**call.get(kind, {}), **_clean_copy(texts)}
        return call

    def _mended_arguments(self) -> bytearray:
        """Return the arguments, mended where the joined pieces are not one object.

        | the pieces                          | the arguments  | a server that does so |
        |-------------------------------------|----------------|-----------------------|
        | are an object when joined           | that           | most                  |
        | each begin with the one before      | the last piece | Qianfan               |
        | are all, and then the whole again   | the last piece | gateways              |
        | begin with {}                       | the rest       | LiteLLM               |
        | are nothing                         | {}             | OpenAI                |
        | are anything else                   | as joined      |                       |
        """
        if not self.text:
            return bytearray(b"{}")
        if _is_json_object(self.text):
            return self.text
        before, last = self.text[: self._last_start], self.text[self._last_start :]
        whole = _parse_object(last)
        if whole is not None and (
            self._is_cumulative or _parse_object(before) == whole
        ):
            return last
        if self.text.startswith(b"{}") and _is_json_object(self.text[2:]):
            return self.text[2:]
        return self.text


class _ToolCalls:
    """The tool calls of a choice: finds the call that a piece belongs to.

    | a piece                                             | belongs to                |
    |-----------------------------------------------------|---------------------------|
    | has an index (a negative one counts as none)        | the call of its id there, |
    |                                                     | else the latest there     |
    | has no index, but the id of a call                  | that call                 |
    | has neither, and is one of several in a list        | the latest at its place   |
    | has neither, and is alone                           | the latest call           |
    |-----------------------------------------------------|---------------------------|
    | has a name and another id, and that call has a name | a new call                |
    | has a name and no id, and that call has a name and  | a new call                |
    |   complete arguments, unless the piece has the same |                           |
    |   name and begins with these arguments              |                           |
    | has a name and that call's id, and both have other  | a new call                |
    |   complete arguments                                |                           |
    """

    def __init__(self) -> None:
        self._calls: list[_ToolCallBuilder] = []
        self._by_key: dict[int, _ToolCallBuilder] = {}  # the latest of each
        self._by_key_and_id: dict[tuple[int, str], _ToolCallBuilder] = {}
        self._by_id: dict[str, _ToolCallBuilder] = {}
        self._latest: _ToolCallBuilder | None = None

    def add(self, pieces: list[ChoiceDeltaToolCall]) -> None:
        if len(pieces) > MAX_CHOICES:
            raise ValueError(f"more than {MAX_CHOICES} tool calls")
        for place, piece in enumerate(pieces):
            self._add_piece(piece, place if len(pieces) > 1 else None)

    def _add_piece(self, piece: ChoiceDeltaToolCall, place: int | None) -> None:
        index = piece.index
        if type(index) is not int or index < 0:
            index = None
        call = self._find(piece, index, place)
        if call is None or not call.is_continued_by(piece):
            call = self._open(index, place)
        call.add(piece)
        self._latest = self._by_key[call.key] = call
        if piece.id:
            self._by_id[piece.id] = call
            self._by_key_and_id[call.key, piece.id] = call

    def _find(
        self, piece: ChoiceDeltaToolCall, index: int | None, place: int | None
    ) -> _ToolCallBuilder | None:
        if index is not None:
            known = self._by_key_and_id.get((index, piece.id or ""))
            return known or self._by_key.get(index)
        if piece.id and piece.id in self._by_id:
            return self._by_id[piece.id]
        if place is not None:
            return self._by_key.get(place)
        return self._latest

    def _open(self, index: int | None, place: int | None) -> _ToolCallBuilder:
        number = len(self._calls)
        if (index or 0) >= MAX_CHOICES or number == MAX_CHOICES:
            raise ValueError(f"a tool call beyond the {MAX_CHOICES}th")
        key = order = number
        if index is not None:
            key = order = index
        elif place is not None:
            key = place
        call = _ToolCallBuilder(key, order)
        self._calls.append(call)
        return call

    def to_list(self, mend: bool) -> list[Json]:
        calls = sorted(self._calls, key=lambda call: call.order)
        return [call.to_dict(mend) for call in calls]


def _message_text(message: Json) -> bytes:
    return _to_bytes(_repair_surrogates(_text(message.get("content"))))


class _ChoiceBuilder:
    """One choice while its deltas arrive."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.last_reason = ""  # also one that does not end the choice
        self._other_fields: Json = {}  # logprobs, and what Choice has no field for
        # Some servers send messages in place of deltas: each is then a delta.
        self._has_message_deltas = False
        self._message: Json = {"role": None, "content": None}
        self._tool_calls: _ToolCalls | None = None
        self._has_begun = False  # text, reasoning, a refusal or a call has arrived

    def add(self, choice: ChatCompletionChunk.Choice) -> None:
        raw = choice.raw
        if raw is not None and "message" in raw and type(raw.get("delta")) is not dict:
            self._add_message(choice, raw["message"])
        else:
            self._add_delta(choice.delta)
        if choice.extra is not None:
            _merge(self._other_fields, choice.extra)
        if choice.logprobs is not None:
            logprobs = choice.logprobs.raw or choice.logprobs.to_dict()
            _merge(self._other_fields, {"logprobs": logprobs})
        if choice.finish_reason:
            self._finish(choice.finish_reason, choice.extra or {})

    def _finish(self, reason: str, extra: Json) -> None:
        # OpenRouter's reason is "stop" for all that it does not know.
        native = _string(extra.get("native_finish_reason"))
        if native and _is_failure(native):
            reason = native
        self.last_reason = reason
        if _normalise_reason(reason) not in _UNFINISHED and not _is_failure(reason):
            self.finish_reason = reason

    def _add_message(self, choice: ChatCompletionChunk.Choice, message: Any) -> None:
        """Add a message that stands where a delta was due.

        A whole message that follows its deltas replaces the fields that it repeats; the
        delta of the chunk then becomes the part of the text that is new.
        """
        if self._is_whole(message):
            length = len(self._text_so_far())
            for name, value in message.items():
                if value and name != "role":
                    self._message[name] = None
            if message.get("tool_calls"):
                self._tool_calls = None
            reason = self.finish_reason
            self._add_delta(ChoiceDelta.from_dict(message))
            rest = _message_text(message)[length:]
            if not rest:  # a repetition is no output that could be cut off
                self.finish_reason = reason
            choice.delta = ChoiceDelta(rest.decode() or None)
        else:
            self._has_message_deltas = True
            self._add_delta(choice.delta)

    def _is_whole(self, message: Any) -> bool:
        """Tell whether a message is the whole of what its deltas have brought."""
        if not isinstance(message, dict) or self._has_message_deltas:
            return False
        is_continued = _message_text(message).startswith(self._text_so_far())
        return self._has_begun and is_continued

    def _text_so_far(self) -> bytes:
        """Return the text of the deltas, also where they sent it in parts."""
        return _to_bytes(_text(_clean_copy(self._message["content"])))

    def _add_delta(self, delta: ChoiceDelta) -> None:
        message, raw = self._message, delta.raw
        content = delta.content
        if content is not None:
            self._note_output(content)
            text = message["content"]
            if raw is None and type(text) is bytearray:
                # Micro-optimization: most deltas come here.
                text += content.encode("utf-8", "surrogatepass")
            elif raw is not None and type(raw.get("content")) is list:
                _merge(message, {"content": raw["content"]})
            else:
                _merge(message, {"content": content})
        if delta.role and not message["role"]:
            message["role"] = _clean_copy(delta.role)
        if delta.tool_calls:
            self._note_output(any(any(_name_and_text(p)) for p in delta.tool_calls))
            if self._tool_calls is None:
                self._tool_calls = _ToolCalls()
            self._tool_calls.add(delta.tool_calls)
        if delta.reasoning_content is not None:
            self._note_output(delta.reasoning_content)
            self._add_reasoning(delta.reasoning_content, raw)
        if delta.refusal is not None:
            self._note_output(delta.refusal)
            _merge(message, {"refusal": delta.refusal})
        if delta.function_call is not None:
            self._note_output(delta.function_call)
            _merge(message, {"function_call": delta.function_call})
        if delta.extra is not None:
            _merge(message, delta.extra)

    def _note_output(self, output: object) -> None:
        """Open the choice again if there is output: that can be cut off, too."""
        if output:
            self._has_begun = True
            self.finish_reason = None

    def _add_reasoning(self, text: str, raw: Json | None) -> None:
        """Add a text under the names that the server sent it with.

        Reasoning in parts of the content, or in details, is added with those.
        """
        if raw is None:
            _add_text(self._message, "reasoning_content", text)
            return
        for name in _REASONING_NAMES:
            if not _is_container(raw.get(name)):  # those are in `extra`
                _merge(self._message, {name: _text(raw.get(name)) or None})

    @property
    def has_content(self) -> bool:
        """Whether text, a refusal, a call or another part has come, or a limit."""
        no_content = ("role", "reasoning_details", *_REASONING_NAMES)
        has_part = any(v for k, v in self._message.items() if k not in no_content)
        has_limit = bool(_reason_limit(self.finish_reason))
        return has_part or has_limit or self._tool_calls is not None

    @property
    def failure(self) -> str:
        """The last finish_reason if it is a failure or "not finished", else ""."""
        reason = self.last_reason
        if _is_failure(reason) or _normalise_reason(reason) in _UNFINISHED:
            return reason
        return ""

    def to_dict(self) -> Json:
        message: Json = _clean_copy(self._message)
        message["role"] = message["role"] or "assistant"
        is_ended = self.finish_reason is not None
        if self._tool_calls is not None:
            # At a limit the arguments are incomplete: mending could only garble them.
            mend = is_ended and not _reason_limit(self.finish_reason)
            message["tool_calls"] = self._tool_calls.to_list(mend)
        ending = {"finish_reason": self.finish_reason, "message": message}
        return {"logprobs": None, **_clean_copy(self._other_fields), **ending}


class ChatAccumulator:
    """Adds up chunks; `completion` is the answer so far. Memory grows with its text."""

    def __init__(self) -> None:
        # The latest finish_reason that is a failure, whatever follows it.
        self._failure = ""
        self._identity: Json = {}  # id, model and created, where they first came
        self._latest: Json = {}  # of all else beside the choices, the latest value
        self._choices: dict[int, _ChoiceBuilder] = {}

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Add the next chunk. Raises ValueError beyond MAX_CHOICES and MAX_DEPTH.

        Where the whole message follows its deltas in place of a delta, the delta of the
        chunk is set to the part of the text that is new.
        """
        if len(self._identity) < 3:  # Azure's first chunk has none of them
            identity = {"id": chunk.id, "model": chunk.model, "created": chunk.created}
            identity = {k: _clean_copy(v, 1) for k, v in identity.items() if v}
            self._identity = identity | self._identity
        if chunk.usage is not None:
            usage = chunk.usage.raw or chunk.usage.to_dict()
            if any(usage.values()) or "usage" not in self._latest:
                self._latest["usage"] = _clean_copy(usage, 1)
        if type(chunk.system_fingerprint) is str:
            self._latest["system_fingerprint"] = chunk.system_fingerprint
        if type(chunk.service_tier) is str:
            self._latest["service_tier"] = chunk.service_tier
        if chunk.extra is not None:
            for name, value in chunk.extra.items():  # Perplexity: citations in each
                if value is not None:
                    self._latest[name] = _clean_copy(value, 1)
        if len(chunk.choices) > MAX_CHOICES:
            raise ValueError(f"more than {MAX_CHOICES} choices")
        for choice in chunk.choices:
            builder = self._choices.get(choice.index)
            if builder is None:
                builder = self._open(choice.index)
            builder.add(choice)
            if choice.finish_reason and _is_failure(builder.last_reason):
                self._failure = builder.last_reason

    def _open(self, index: int) -> _ChoiceBuilder:
        if not 0 <= index < MAX_CHOICES:
            raise ValueError(f"expected an index from 0 to {MAX_CHOICES - 1}")
        builder = self._choices[index] = _ChoiceBuilder()
        return builder

    @property
    def failure(self) -> str:
        """The finish_reason of a choice that failed or is not finished, else ""."""
        reasons = [choice.failure for choice in self._choices.values()]
        return self._failure or next(filter(None, reasons), "")

    @property
    def has_content(self) -> bool:
        """Whether a choice has more than reasoning, or has come to a limit."""
        return any(choice.has_content for choice in self._choices.values())

    @property
    def has_begun(self) -> bool:
        """Whether a chunk has brought anything."""
        return bool(self._choices or self._latest or self._identity)

    def has_ended(self, n_choices: int) -> bool:
        """Tell whether at least `n_choices` have come, and every one has ended."""
        choices = self._choices.values()
        return len(choices) >= n_choices and all(c.finish_reason for c in choices)

    def is_complete(self, n_choices: int, is_done: bool) -> bool:
        """Tell whether the answer to a request for `n_choices` is whole.

        No choice failed, and either every one has ended, or `is_done` (the server sent
        [DONE]) and at least one has begun.
        """
        if self.failure:
            return False
        return self.has_ended(n_choices) or (is_done and bool(self._choices))

    @property
    def completion(self) -> ChatCompletion:
        """The answer so far, as a copy; a `finish_reason` that did not come is None."""
        choices = [
            {"index": i, **c.to_dict()} for i, c in sorted(self._choices.items())
        ]
        latest: Json = _clean_copy(self._latest)
        whole = {"object": "chat.completion", "choices": choices}
        return ChatCompletion.from_dict({**latest, **self._identity, **whole})


def accumulate(chunks: Iterable[ChatCompletionChunk]) -> ChatCompletion:
    """Add up the chunks. The answer may be incomplete: only a stream judges that.

    Raises ValueError as `ChatAccumulator.add` does.
    """
    accumulator = ChatAccumulator()
    for chunk in chunks:
        accumulator.add(chunk)
    return accumulator.completion


def split_thinking(texts: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Split off the `<think>…</think>` that a stream of strings may begin with.

    Yields pairs of (whether this is thinking, text), however the tags are cut. The tags
    are left out, and so are white space before the first and line ends after the
    second. Tags further on are text. Holds back only what may be part of a tag, or
    white space before it.
    """
    texts = iter(texts)

    # 1. Read until it is clear whether the stream begins with the tag.
    pieces: list[str] = []
    start = ""
    for text in texts:
        pieces.append(text)
        start = (start + text).lstrip()
        if not "<think>".startswith(start):
            break
    if not start.startswith("<think>"):
        yield from ((False, text) for text in itertools.chain(pieces, texts) if text)
        return

    # 2. Thinking, up to the end tag. A piece that may be its beginning is held back.
    held = rest = ""
    for text in itertools.chain([start.removeprefix("<think>")], texts):
        thought, end_tag, rest = (held + text).partition("</think>")
        held = ""
        start_of_tag = thought.rfind("<")
        if start_of_tag >= 0 and "</think>".startswith(thought[start_of_tag:]):
            thought, held = thought[:start_of_tag], thought[start_of_tag:]
        if thought:
            yield True, thought
        if end_tag:
            break
    if held:
        yield True, held

    # 3. The answer, without the line ends between it and the tag.
    for text in itertools.chain([rest], texts):
        if text := text.lstrip("\r\n"):
            yield False, text
            break
    yield from ((False, text) for text in texts if text)


# ---- The request ---------------------------------------------------------------------

Messages = str | Sequence[Mapping[str, Any] | ChatCompletionMessage]

DEFAULT_BASE_URL = "http://localhost:11434/v1"  # Ollama
DEFAULT_TIMEOUT = 600.0  # seconds between two reads: a big model loads for minutes
CONNECT_TIMEOUT = 5.0  # seconds
ENDING_TIMEOUT = 5.0  # seconds after the last finish_reason without an event
MODELS_TIMEOUT = 30.0  # seconds for the whole list of models
MAX_RETRY_AFTER = 60.0  # seconds; chats give up on more, `listen` waits only so long
_MAX_SECONDS = 1e6  # any longer limit is cut to that: sockets and locks refuse 1e10


class _CallOptions(TypedDict, total=False):
    """The model, and the options that are no fields of the request.

    `stream_chat` describes them.
    """

    model: str | None
    base_url: str | None
    api_key: str | None
    system: str | None
    timeout: float | Timeout | None
    first_token_timeout: float | None
    max_retries: int
    max_event_bytes: int | None
    headers: Mapping[str, str] | None
    client: Any
    extra_body: Mapping[str, Any] | None


class ChatOptions(_CallOptions, total=False):
    """The options of a call, all keywords: those above, and fields of the request.

    The fields are as OpenAI defines them; None leaves one out. At run time any other
    keyword is a field, too; for type checkers it goes into `extra_body`.
    """

    # How the model chooses its tokens, and how many.
    temperature: float | None
    top_p: float | None
    seed: int | None
    max_tokens: int | None  # of the answer; the older name, which Ollama knows
    max_completion_tokens: int | None  # of the answer and its reasoning; OpenAI's name
    stop: str | Sequence[str] | None  # texts that end the answer
    n: int | None  # how many answers; Ollama and others send one all the same
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[str, float] | None  # by token number
    reasoning_effort: str | None  # "low", "medium" or "high"
    verbosity: str | None  # "low", "medium" or "high"

    # Tools, and the form of the answer.
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: Mapping[str, Any] | None
    logprobs: bool | None
    top_logprobs: int | None  # alternatives of each token
    modalities: Sequence[str] | None
    audio: Mapping[str, Any] | None
    prediction: Mapping[str, Any] | None
    stream_options: Mapping[str, Any] | None  # {"include_usage": True}
    web_search_options: Mapping[str, Any] | None

    # Bookkeeping of the provider.
    metadata: Mapping[str, str] | None
    service_tier: str | None
    store: bool | None
    user: str | None


# Keywords of openai's SDK that are no options here, and what to write instead.
_OPENAI_KEYWORDS = {
    "stream": "call stream_chat() or generate()",
    "extra_headers": "write headers=…",
    "default_headers": "write headers=…",
    "organization": 'write headers={"OpenAI-Organization": …}',
    "project": 'write headers={"OpenAI-Project": …}',
    "extra_query": "write it into base_url, after a ?",
    "default_query": "write it into base_url, after a ?",
    "azure_endpoint": "write the URL of the deployment as base_url",
    "azure_deployment": "write the URL of the deployment as base_url",
    "api_version": "write ?api-version=… at the end of base_url",
    "http_client": "write client=…",
}


def _causes(
    error: BaseException | None, outer: BaseException | None = None
) -> list[BaseException]:
    """Return an exception and those behind it, also in groups; without `outer`."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo and len(found) < 50:
        each = todo.pop(0)
        if each is not None and each is not outer and each not in found:
            found.append(each)
            todo += [each.__cause__ or each.__context__]
            todo += getattr(each, "exceptions", ())
    return found


class _Secrets:
    """The secrets that a request carries, to be taken out of what the server says.

    Texts of less than 8 characters are not replaced, since they may be common words.
    """

    _NAME = re.compile(
        r"auth|cookie|credential|jwt|key|passw|secret|token|signature|\bsig\b",
        re.IGNORECASE,
    )

    def __init__(self, login: str) -> None:
        user, _, password = login.partition(":")
        self._texts: set[str] = set()
        self._patterns: list[re.Pattern[str]] | None = None
        self._add(password or user)  # a key may be the user: https://sk-…@host

    def _add(self, text: str) -> None:
        if len(text) >= 8 and text not in self._texts:
            self._texts.add(text)
            self._patterns = None

    def add(self, headers: Mapping[str, str], url: str) -> None:
        """Add those of a request: headers and query parameters with telling names."""
        from urllib.parse import parse_qsl, urlsplit

        for name, value in headers.items():
            if self.is_secret_name(name):
                parts = [
                    part for part in re.split(r"[\s;,=]+", value) if len(part) >= 8
                ]
                for part in parts or [value]:
                    self._add(part)
        for parameter in urlsplit(url).query.split("&"):
            # The server may quote it decoded, or as it stands in the URL.
            for name, value in parse_qsl(parameter):
                if self.is_secret_name(name):
                    self._add(value)
                    self._add(parameter.partition("=")[2])

    @staticmethod
    @functools.lru_cache  # nearly all requests have the same few names
    def is_secret_name(name: str) -> bool:
        """Tell whether a header or a query parameter of this name holds a secret."""
        return _Secrets._NAME.search(name) is not None

    def redact(self, text: str) -> str:
        """Return the text without the secrets, also where JSON escapes them."""
        longest_first = sorted(self._texts, key=len, reverse=True)
        for secret in longest_first:
            text = text.replace(secret, "[secret]")
        if "\\" in text:
            if self._patterns is None:
                self._patterns = [_escaped_pattern(secret) for secret in longest_first]
            for pattern in self._patterns:
                text = pattern.sub("[secret]", text)
        return text

    def is_in(self, cause: BaseException | None) -> bool:
        """Tell whether the text of an exception, or of a cause, contains a secret."""
        texts = [str(each) for each in _causes(cause)]
        return any(self.redact(text) != text for text in texts)


def _escaped_pattern(secret: str) -> re.Pattern[str]:
    """Return a pattern of a secret in JSON, each of whose characters may be escaped.

    Up to three backslashes: JSON in a text of JSON. Each way to begin has a fixed first
    character, not a repetition: the search then skips all other places, and is linear
    but for secrets with many backslashes in a row.
    """
    ways = [rf"(?:\\{{0,3}}{re.escape(c)}|\\{{1,3}}u{_code(c)})" for c in secret[1:]]
    first = secret[0]
    letter = re.escape(first)
    begin = rf"(?:{letter}|\\\\{{0,2}}(?:{letter}|u{_code(first)}))"
    return re.compile(begin + "".join(ways))


def _code(character: str) -> str:
    """Return a pattern of a character's code, which has two parts beyond U+FFFF."""
    codes = re.findall("....", character.encode("utf-16-be", "surrogatepass").hex())
    return r"\\{1,3}u".join(f"(?i:{code})" for code in codes)


class _Retries:
    """Decides whether a request that failed is sent again, and when."""

    def __init__(self, max_retries: int) -> None:
        self.attempts = 0  # made so far
        self._max_retries = max_retries
        self._retries = 0
        self._started = 0.0
        self._has_repeated = False

    def begin_attempt(self) -> None:
        """Count an attempt, and the time from the first one on."""
        if not self.attempts:
            self._started = time.monotonic()
        self.attempts += 1

    def elapsed(self) -> str:
        """Return the time since the first attempt, and the number of attempts."""
        text = f"after {time.monotonic() - self._started:.1f} s"
        if self.attempts > 1:
            text += f" and {self.attempts} attempts"
        return text

    def wait_after(
        self, error: APIError, time_left: float | None, connection_was_kept: bool
    ) -> float | None:
        """Return the seconds to wait before the next attempt, None to give up.

        It gives up rather than wait longer than `time_left` or MAX_RETRY_AFTER. The
        first time that a kept connection breaks costs no wait and no retry: servers
        close idle connections whenever they like.
        """
        from random import uniform  # importing it takes 2 ms

        is_broken = isinstance(error, APIConnectionError) and error.is_broken
        if is_broken and connection_was_kept and not self._has_repeated:
            self._has_repeated = True
            return 0.0
        if not error.is_retryable or self._retries >= self._max_retries:
            return None
        wait = 0.5 * 2.0 ** min(self._retries, 4) * uniform(0.75, 1.0)  # at most 8 s
        if error.retry_after is not None:
            wait = error.retry_after
        limit = MAX_RETRY_AFTER
        if time_left is not None:
            limit = min(limit, time_left)
        if wait > limit:
            return None
        self._retries += 1
        self._log(error, wait)
        return wait

    def _log(self, error: APIError, wait: float) -> None:
        import logging  # httpx has imported it

        logging.getLogger("sse_chat").info(
            "asking again in %.1f s (retry %d of %d): %s",
            wait,
            self._retries,
            self._max_retries,
            error,
        )


def _parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds of a `Retry-After` header, which is a number or a date."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(text)
        return seconds if 0 <= seconds < math.inf else None
    with suppress(ValueError, TypeError, OverflowError):
        from calendar import timegm
        from email.utils import parsedate_to_datetime

        # A date without a zone is GMT (RFC 9110, section 5.6.7), not local time.
        return max(0.0, timegm(parsedate_to_datetime(text).utctimetuple()) - now)
    return None


def _is_local(url: str) -> bool:
    """Tell whether a URL's host is a private address, or a name without a dot."""
    from ipaddress import ip_address
    from urllib.parse import urlsplit

    host = ""
    with suppress(ValueError):
        host = urlsplit(url).hostname or ""
        return ip_address(host).is_private
    return "." not in host


def _split_url(name: str, url: str) -> SplitResult:
    """Return the parts of an http or https URL with a host. Raises ValueError."""
    from urllib.parse import urlsplit

    with suppress(ValueError):  # whose message may quote a piece of a password
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    raise ValueError(f"{name}: expected a URL such as {DEFAULT_BASE_URL}")


def _parse_base_url(text: str, path: str) -> tuple[str, str]:
    """Return the URL of a path under a base URL, and its user:password.

    The login does not stay in the URL, since httpx logs that. A bare host gets the path
    /v1, which nearly every server has. Raises ValueError if it is not a URL.
    """
    from urllib.parse import unquote

    if "://" not in text:
        # A key must not go unencrypted to a host on the internet.
        scheme = "http" if _is_local("//" + text) else "https"
        text = f"{scheme}://{text}"
    parts = _split_url("base_url", text)
    login, at, host = parts.netloc.rpartition("@")
    if at and ":" not in login:
        login += ":"
    root = parts.path.rstrip("/").removesuffix("/chat/completions")
    if not parts.path.rstrip("/"):
        root = "/v1"
    url = parts._replace(netloc=host, path=root + path, fragment="").geturl()
    return url, unquote(login)


def _public_url(url: str) -> str:
    """Return a URL without the parts that may be secret: its login and its query."""
    return re.sub(r"//[^/?#\s]*@", "//", url.partition("?")[0])


# The characters of a token, RFC 9110, section 5.6.2.
_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")


def _check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers with names in lower case. Raises TypeError, ValueError."""
    checked: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"header {name!r}: expected a str for name and value")
        checked[name.strip().lower()] = value.strip()
    for name, value in checked.items():
        shown = "the API key" if name == "authorization" else f"header {name!r}"
        if not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{shown}: expected letters, digits, - and _ in its name")
        if not re.fullmatch("[ -~\t]*", value):
            raise ValueError(f"{shown}: expected ASCII without control characters")
    return checked


def _request_headers(accept: str, api_key: str, login: str) -> dict[str, str]:
    headers = {
        "accept": accept,
        "accept-encoding": "identity",  # see _Unpacker; small events pack badly anyway
        "content-type": "application/json",
        "user-agent": f"sse_chat/{__version__}",
    }
    if login:  # it stands in the URL itself, so it is meant for this server
        headers["authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    elif api_key:
        headers["authorization"] = f"Bearer {api_key}"
    return headers


def _check_seconds(name: str, value: Any) -> float | None:
    """Return a time limit. Raises TypeError, ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number of seconds, or None for no limit")
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0 seconds, or None for no limit")
    return float(min(value, _MAX_SECONDS))


def _check_timeout(timeout: Any) -> tuple[float | None, ...]:
    """Return the seconds to connect, to read, to write and to wait for the pool."""
    if hasattr(timeout, "as_dict"):  # an httpx.Timeout, or httpx2's
        phases = timeout.as_dict().values()
        return tuple(_check_seconds("timeout", seconds) for seconds in phases)
    seconds = _check_seconds("timeout", timeout)
    connect = None
    if seconds is not None:
        connect = min(seconds, CONNECT_TIMEOUT)
    return connect, seconds, seconds, seconds


def _check_messages(messages: Messages, system: str | None) -> list[Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, bytes) or not isinstance(messages, Sequence):
        kind = type(messages).__name__
        raise TypeError(f"messages: expected a str or a list of dicts, got {kind}")
    for place, message in enumerate(messages):
        if not isinstance(message, (Mapping, _Message)):
            kind = f"{type(message).__module__}.{type(message).__qualname__}"
            raise TypeError(
                f"messages[{place}]: expected a dict, or the message of an answer of"
                f" this module, got {kind}"
            )
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages]


def _message_to_json(value: Any) -> Any:
    """Return a message of an earlier answer as a server takes it."""
    if isinstance(value, _Model):
        message = value.to_dict()
        if message.get("tool_calls") == []:  # OpenAI refuses an empty list
            del message["tool_calls"]
        return message
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot go into a request")


@dataclass
class _Expected:
    """The limits and secrets of a request, for the reader of its answer.

    The defaults are those of a body that was not requested here (`iter_chunks`).
    """

    max_bytes: int = sys.maxsize
    n_choices: int = 1
    first_token_timeout: float | None = None
    read_timeout: float | None = None
    ending_timeout: float | None = None
    url: str = ""
    redact: Callable[[str], str] = str
    holds_secret: Callable[[BaseException | None], bool] = lambda cause: False


def _without_login(proxy: str) -> str:
    """Return a proxy's URL without its login, which may hold any character."""
    return re.sub(r"(?s)\A(\w+://)?.*@", r"\1", proxy)


def _proxy_advice(url: str) -> str:
    """Name the variable that sets a proxy for a URL, "" if there is none."""
    from urllib.parse import urlsplit
    from urllib.request import proxy_bypass

    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return ""
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if os.environ.get(variable):
                return f"{variable} is {_without_login(os.environ[variable])}"
    return ""


def _connect_advice(url: str, causes: list[BaseException]) -> str:
    from urllib.parse import urlsplit

    advice = _proxy_advice(url)
    if advice:
        return advice
    host = urlsplit(url).hostname or ""
    is_loopback = host in ("localhost", "::1") or host.startswith("127.")
    if is_loopback and any(isinstance(each, ConnectionRefusedError) for each in causes):
        return "start a server there (`ollama serve`), or set base_url"
    return "check base_url"


# The exceptions of httpx for an open connection that breaks.
_BROKEN = ("CloseError", "ReadError", "RemoteProtocolError", "WriteError")


def _exception_text(cause: BaseException, outer: BaseException | None = None) -> str:
    """Return the text of an exception, or of its cause where it is empty (trio)."""
    texts = [str(each) for each in _causes(cause, outer)]
    return next(filter(None, texts), type(cause).__name__)


def _is_file_error(cause: BaseException) -> bool:
    """Tell whether an exception is an OSError of a file, not of a connection."""
    return isinstance(cause, OSError) and cause.filename is not None


def _is_timeout(cause: BaseException | None) -> bool:
    return "Timeout" in type(cause).__name__  # of httpx, httpx2, asyncio or a socket


def _connection_error(
    cause: Exception, words: str, url: str, outer: BaseException | None
) -> APIConnectionError:
    """Return the error of an attempt that got no answer, by its kind."""
    kind = type(cause).__name__
    causes = _causes(cause, outer)

    # A server that was silent may be at work on the answer, so it is not asked again.
    if _is_timeout(cause):
        phases = {
            "ReadTimeout": "waiting for the answer",
            "WriteTimeout": "sending",
            "PoolTimeout": "waiting for a free connection of the client",
        }
        timeout = APITimeoutError(f"timed out {phases.get(kind, 'connecting')}")
        timeout.is_retryable = kind not in ("ReadTimeout", "WriteTimeout")
        return timeout

    # A handshake that the server cuts off (SSLEOFError) is a connection that fails.
    names = [type(each).__name__ for each in causes]
    if any("SSL" in name and name != "SSLEOFError" for name in names):
        error = APIConnectionError(f"no secure connection: {words}")
        error.advice = (
            "for a certificate of your own set SSL_CERT_FILE, or pass"
            " client=httpx.Client(verify=…)"
        )
    elif "Proxy" in kind:
        error = APIConnectionError(f"the proxy refused: {words}")
        error.advice = _proxy_advice(url)
    elif kind == "ConnectError" or isinstance(cause, ConnectionRefusedError):
        error = APIConnectionError(f"cannot connect: {words}")
        error.is_retryable = True
        error.advice = _connect_advice(url, causes)
    elif kind != "LocalProtocolError" and any(
        type(each).__module__.startswith("h11") for each in causes
    ):
        error = APIConnectionError(f"the server broke the rules of HTTP: {words}")
    elif kind in _BROKEN or (isinstance(cause, OSError) and not _is_file_error(cause)):
        error = APIConnectionError(f"the connection broke before an answer: {words}")
        error.is_retryable = error.is_broken = True
    else:
        error = APIConnectionError(f"the request could not be sent: {words}")
    return error


def _environment_error(cause: Exception) -> APIConnectionError:
    """Return the error of a client that httpx could not make, and its variables."""
    from urllib.request import getproxies_environment

    # httpx quotes a piece of the URL, which may be a piece of the password.
    may_hold_login = any("@" in proxy for proxy in getproxies_environment().values())
    words = type(cause).__name__ if may_hold_login else _exception_text(cause)
    if isinstance(cause, OSError):  # certificates that cannot be read
        names = ["SSL_CERT_FILE", "SSL_CERT_DIR"]
        error = APIConnectionError(f"cannot read the certificates: {words}")
    elif isinstance(cause, ImportError):
        names = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"]
        error = APIConnectionError("a SOCKS proxy needs `pip install httpx[socks]`")
    else:
        names = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"]
        error = APIConnectionError(
            f"httpx refuses the proxy of the environment: {words}"
        )
    found = []
    for name in [*names, *map(str.lower, names)]:
        if os.environ.get(name):
            found.append(f"{name} is {_without_login(os.environ[name])}")
    error.advice = ", ".join(found)
    if not may_hold_login:
        error.__cause__ = cause
    return error


def _load_httpx() -> Any:
    """Return httpx, or its fork httpx2 where that is installed in its place."""
    for name in ("httpx", "httpx2"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError("sse_chat needs httpx: pip install httpx")


@functools.cache
def _tls_context(may_need_tls: bool) -> Any:
    """Return the TLS context of our clients, cached: loading it takes 25 ms."""
    import ssl

    if may_need_tls:
        return _load_httpx().create_ssl_context()
    # An empty one will do, since a chat follows no redirects.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _new_client(kind: str, may_need_tls: bool) -> Any:
    """Return a client that opens as many connections as needed, and keeps few.

    At httpx's default of 100, the next streams would wait until they fail. Raises
    APIConnectionError if the environment is wrong.
    """
    httpx = _load_httpx()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    try:
        return getattr(httpx, kind)(verify=_tls_context(may_need_tls), limits=limits)
    except Exception as error:
        problem = _environment_error(error)
    # Raised here, so that an exception that may hold a password is not its context.
    raise problem


def _check_client(kind: str, client: Any) -> None:
    """Refuse what cannot be used as the caller's client, such as openai's."""
    if client is None:
        return
    can_send = hasattr(client, "build_request") and hasattr(client, "send")
    is_async = hasattr(client, "aclose")
    if not can_send or isinstance(client, type) or is_async != (kind == "AsyncClient"):
        got = type(client).__name__
        raise TypeError(f"client: expected an httpx.{kind}, got an object of {got}")


class _ClientSource:
    """The client to send with: the caller's, one that is kept, or one for this call."""

    def __init__(self, kind: str, client: Any = None, is_kept: bool = False) -> None:
        _check_client(kind, client)
        self.headers: Mapping[str, str] = getattr(client, "headers", {})
        # Read once: later changes do not affect a client that is kept.
        self.environment = {
            name: os.environ.get(f"OPENAI_{name}", "").strip()
            for name in ("API_KEY", "BASE_URL", "MODEL")
        }
        # Whether a connection may have been kept from an earlier answer: it may be dead
        # when it is used again. Of a caller's client we must assume so.
        self.keeps_connections = client is not None
        self._is_kept = is_kept
        self._is_closed = False
        self._kind = kind
        self._given = client
        # Our clients by their home: the process and the event loop. A child process
        # must not use its parent's connections, since the answers would go to the first
        # that reads; nor can an event loop use those of another. None: not used yet.
        self._clients: dict[Any, Any] = {}

    def open(self, request: _Request, loop: Any = None) -> Any:
        """Return a context manager for the client; one made for this call is closed.

        Raises APIError if the client has been closed, or none can be made.
        """
        if self._is_closed:  # also in another process or event loop
            raise APIConnectionError("the request could not be sent: closed client")
        if self._given is not None:
            return nullcontext(self._given)
        if not self._is_kept:
            return self._new(request)
        home = (os.getpid(), loop)
        if home not in self._clients:
            self._forget_closed_loops()
            client = self._clients.pop(None, None)
            if client is None:
                client = self._new(request)
                self.keeps_connections = False
            self._clients.setdefault(home, client)  # unless another thread has just
        return nullcontext(self._clients[home])

    def make_kept(self, request: _Request) -> None:
        """Make the client that is kept. Raises APIError if the environment is wrong."""
        if self._given is not None:
            return
        try:
            self._clients[None] = self._new(request)
        except APIConnectionError as error:
            error.place = request.expected.url
            raise

    def _new(self, request: _Request) -> Any:
        return _new_client(self._kind, request.url.startswith("https:"))

    def _forget_closed_loops(self) -> None:
        """Drop the clients of event loops that are closed.

        Only garbage collection can close their connections. asyncio alone tells whether
        a loop is closed.
        """
        for home in list(self._clients):
            is_closed = getattr(home and home[1], "is_closed", None)
            if is_closed is not None and is_closed():
                self._clients.pop(home, None)

    def begin_close(self, loop: Any = None) -> list[Any]:
        """Refuse all later calls; return the clients that can be closed here."""
        self._is_closed = True
        homes = (None, (os.getpid(), loop))
        return [self._clients[home] for home in homes if home in self._clients]


def _mapping(options: Json, name: str) -> Json:
    """Return an option that must be a dict, {} for None. Raises TypeError."""
    value = options.get(name)
    if not isinstance(value, Mapping | None):
        raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
    return dict(value or {})


def _find_base_url(options: Json, source: _ClientSource) -> str:
    """Return the base URL of the options, else of the environment, else Ollama's."""
    base_url = str(options.get("base_url") or "").strip()  # an httpx.URL will do, too
    return base_url or source.environment["BASE_URL"] or DEFAULT_BASE_URL


def _holds_key(header: Any) -> bool:
    """Tell whether a header of this name has a key, as OpenAI, Azure or Google want."""
    name = str(header).lower()
    return name == "authorization" or name.endswith("api-key")


def _find_api_key(options: Json, source: _ClientSource) -> str:
    """Return the key; that of the environment is not sent beside one in a header."""
    api_key = options.get("api_key")
    if not isinstance(api_key, str | None):
        kind = type(api_key).__name__
        raise TypeError(f"api_key: expected a str, got an object of {kind}")
    headers = (*source.headers, *_mapping(options, "headers"))
    if api_key is None and not any(map(_holds_key, headers)):
        api_key = source.environment["API_KEY"]
    return (api_key or "").strip()


def _find_model(options: Json, source: _ClientSource) -> str | None:
    return options.get("model") or source.environment["MODEL"] or None


def _safe_response(response: Response, content: bytes, secrets: _Secrets) -> Response:
    """Return a copy without the request, which holds the key."""
    framing = (b"content-encoding", b"content-length", b"transfer-encoding")
    headers = [
        (name, secrets.redact(value.decode("latin-1")).encode("latin-1"))
        for name, value in response.headers.raw
        if name.lower() not in framing
    ]
    copy = type(response)(response.status_code, headers=headers, content=content)
    copy.encoding = "utf-8"  # that of the content now, whatever the headers say
    return copy


def _raised_response(cause: BaseException) -> Response | None:
    """Return the response of an exception that `raise_for_status()` raised in a hook.

    The name is that of httpx and httpx2. Other libraries keep other things under
    `response`: botocore a dict, for one.
    """
    names = [base.__name__ for base in type(cause).__mro__]
    response: Response | None = getattr(cause, "response", None)
    return response if "HTTPStatusError" in names else None


class _Request:
    """A request, checked: its bytes are made here, not when it is sent."""

    def __init__(
        self, method: str, path: str, accept: str, options: Json, source: _ClientSource
    ) -> None:
        max_retries = _whole_number("max_retries", options.get("max_retries", 2), 0)
        max_bytes = options.get("max_event_bytes", DEFAULT_MAX_EVENT_BYTES)

        self.method = method
        self.url, login = _parse_base_url(_find_base_url(options, source), path)
        headers = _request_headers(accept, _find_api_key(options, source), login)
        self.headers = _check_headers({**headers, **_mapping(options, "headers")})
        self.timeout = _check_timeout(options.get("timeout", DEFAULT_TIMEOUT))
        read_timeout = self.timeout[1]
        self.content: bytes | None = None
        self.source = source
        self.retries = _Retries(max_retries)
        self.secrets = _Secrets(login)
        self.secrets.add(self.headers, self.url)
        self.has_secret = False
        limit = options.get("first_token_timeout")
        self.expected = _Expected(
            max_bytes=_byte_limit(max_bytes),
            first_token_timeout=_check_seconds("first_token_timeout", limit),
            read_timeout=read_timeout,
            ending_timeout=min(ENDING_TIMEOUT, read_timeout or ENDING_TIMEOUT),
            url=_public_url(self.url),
            redact=self.secrets.redact,
            holds_secret=self.secrets.is_in,
        )

    def build(self, client: Any, time_left: float | None) -> Request:
        """Return the request of the next attempt; `time_left` limits its phases."""
        timeout = self.timeout
        if time_left is not None:
            timeout = tuple(min(time_left, each or time_left) for each in timeout)
        request: Request = client.build_request(
            self.method,
            self.url,
            headers=self.headers,
            content=self.content,
            timeout=timeout,
        )
        return request

    def add_secrets(self, request: Request) -> None:
        """Add the secrets that a caller's client has put in, and note if there are any.

        Called once it was sent, or failed to be: only then has its `auth` put a key in.
        """
        self.secrets.add(request.headers, str(request.url))
        names = [*request.headers, *request.url.params]
        self.has_secret = any(map(_Secrets.is_secret_name, names))

    def wait_after(self, error: APIError, time_left: float | None) -> float | None:
        """Return the seconds to wait before sending it again, None for not at all."""
        return self.retries.wait_after(error, time_left, self.source.keeps_connections)

    def error(self, cause: Exception, outer: BaseException | None) -> APIError:
        """Return the error of an attempt that raised `cause`.

        `outer` is the exception that the caller is handling, as when it asks a second
        server: it is one of the contexts, and says nothing about this attempt.
        """
        response = _raised_response(cause)
        if response is not None:
            body = b""
            with suppress(RuntimeError):  # httpx.ResponseNotRead
                body = response.content
            return self.status_error(response, body)
        httpx_error: Any = cause
        with suppress(Exception):  # it has the request that was sent
            self.add_secrets(httpx_error.request)
        words = self.secrets.redact(_exception_text(cause, outer))
        error = _connection_error(cause, words, self.url, outer)
        error.place = f"{_public_url(self.url)}, {self.retries.elapsed()}"
        if not self.secrets.is_in(cause):
            error.__cause__ = cause
        return error

    def status_error(self, response: Response, body: bytes) -> APIStatusError:
        """Return the error of a status that is not a success."""
        text = self.secrets.redact(body.decode("utf-8", "replace").strip())
        status = response.status_code
        if text:
            error = APIStatusError(*_server_error_fields(text))
        else:
            reason = self.secrets.redact(response.reason_phrase)
            error = APIStatusError(reason or "(no message)")
        error.status_code = status
        error.retry_after = _parse_retry_after(response.headers, time.time())
        # 409: OpenAI reports a lock so, and its SDK asks again, too.
        error.is_retryable = status in (408, 409, 429) or status >= 500
        error.place = _public_url(self.url)
        error.advice = self._status_advice(response)
        error.response = _safe_response(response, text.encode(), self.secrets)
        return error

    def _status_advice(self, response: Response) -> str:
        status = response.status_code
        if response.has_redirect_location:
            from urllib.parse import urljoin

            target = response.headers["location"]
            with suppress(ValueError):
                target = urljoin(self.url, target)
            target = self.secrets.redact(_public_url(target))
            if target.rstrip("/") == _public_url(self.url):
                return "the server wants a / at the end, which no base_url gives"
            if self.method == "GET":  # a base_url may end in the path of a chat alone
                target = target.removesuffix("/models")
            return f"redirects are not followed with the key: set base_url to {target}"
        if status in (401, 403) and not self.has_secret:
            return "no key was sent: give api_key, or set OPENAI_API_KEY"
        if status == 404 and "/v1" not in _public_url(self.url):
            return "most servers want a base_url that ends in /v1"
        return ""


def _chat_request(
    messages: Messages, options: Json, source: _ClientSource, is_stream: bool
) -> _Request:
    """Return the request of a chat. Raises TypeError and ValueError."""
    for name, advice in _OPENAI_KEYWORDS.items():
        if name in options:
            raise TypeError(f"unexpected keyword {name}: {advice}")
    accept = "text/event-stream" if is_stream else "application/json"
    request = _Request("POST", "/chat/completions", accept, options, source)
    body: Json = {
        "model": _find_model(options, source),
        "messages": _check_messages(messages, options.get("system")),
        "stream": is_stream,
    }
    body |= {k: v for k, v in options.items() if k not in _CallOptions.__annotations__}
    body |= _mapping(options, "extra_body")
    if not body["stream"]:
        # A client may have them for its streams; servers refuse them elsewhere.
        body.pop("stream_options", None)
    body = {name: value for name, value in body.items() if value is not None}
    text = json.dumps(body, default=_message_to_json, allow_nan=False)
    request.content = text.encode()
    # What is no number is left to the server to refuse.
    with suppress(TypeError, ValueError):
        request.expected.n_choices = max(1, int(body.get("n", 1)))
    return request


def _models_request(options: Json, source: _ClientSource) -> _Request:
    """Return the request of a list of models. Raises TypeError and ValueError."""
    request = _Request("GET", "/models", "application/json", options, source)
    limit = request.expected.first_token_timeout
    # A list has no tokens: this limit is on the whole of it.
    request.expected.first_token_timeout = limit or MODELS_TIMEOUT
    return request


# ---- Reading an answer ---------------------------------------------------------------


class _Deadline:
    """A time limit on a stream, which counts only the time inside `with deadline:`.

    The time that the caller takes between two waits does not count, so data that has
    arrived meanwhile is never late.
    """

    def __init__(self, seconds: float | None) -> None:
        self.is_unlimited = seconds is None
        self._seconds = seconds  # that are left, at the start of a wait
        self._started = 0.0

    @property
    def left(self) -> float | None:
        """The seconds that are left, None if there is no limit."""
        if self._seconds is None:
            return None
        waited = time.monotonic() - self._started if self._started else 0.0
        # Never 0: to a socket that is not to wait at all.
        return max(0.001, self._seconds - waited)

    @property
    def has_passed(self) -> bool:
        left = self.left
        return left is not None and left < 0.01  # timers may fire a little early

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._seconds, self._started = self.left, 0.0

    def count(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield the items, and count the time that making them takes as well.

        Under a flood of comments nearly all the time goes into decoding them.
        """
        remaining = iter(items)
        while True:
            with self:
                item = next(remaining, None)
            if item is None:
                return
            yield item


class _Control:
    """The state that a stream shares with the generator behind it.

    The generator must not refer to the stream: dropping the stream then closes the
    connection at once.
    """

    def __init__(self) -> None:
        self.is_closed = False  # by the caller
        self.response: Response | None = None
        self.is_http2 = False
        self._scope: Any = None  # of anyio, around a wait of async code
        self._closed = threading.Event()

    @property
    def response_headers(self) -> dict[str, str]:
        """The headers of the latest response, names in lower case."""
        return dict(self.response.headers) if self.response is not None else {}

    def begin(self, response: Response) -> None:
        """Take the response of an attempt."""
        self.response = response
        self.is_http2 = not response.http_version.startswith("HTTP/1")

    def close(self) -> None:
        self.is_closed = True
        self._closed.set()

    def wait(self, seconds: float) -> None:
        """Wait, or return early when the stream is closed."""
        self._closed.wait(seconds)

    @contextmanager
    def interruptible(self, seconds: float | None = None) -> Iterator[None]:
        """Let `interrupt` end a wait of async code, and end it after `seconds`."""
        import anyio

        with anyio.move_on_after(seconds) as self._scope:
            try:
                yield
            finally:
                self._scope = None

    async def interrupt(self) -> None:
        """Wake the task that waits in the generator."""
        if self._scope is not None:
            self._scope.cancel()
        elif self.response is not None:
            with suppress(Exception):
                await self.response.aclose()


_BLANK = b" \t\r\n\xef\xbb\xbf"  # white space and a byte order mark
_SSE_FIELDS = (b"data:", b"event:", b"retry:", b"error:", b"id:", b":")


class _Body:
    """Finds out from its first bytes what a body is: an event stream, JSON or neither.

    The bytes count more than the content type: servers send JSON labelled as
    text/event-stream, and event streams without a label.
    """

    def __init__(self, content_type: str = "") -> None:
        self.content_type = content_type
        self.kind = ""  # "stream", "json" or "other"; "" until it is known
        self.start = b""  # 8 bytes from the first that is not blank: a field name fits
        self.held = bytearray()  # the whole body, unless it is a stream

    def feed(self, data: bytes) -> bytes:
        """Hold the bytes back; return them all once they are known as an event stream.

        What follows of a stream goes past it.
        """
        self.held += data
        if len(self.start) < 8:
            self.start = (self.start + data).lstrip(_BLANK)[:8]
            self.kind = self._find_kind()
        if self.kind != "stream":
            return b""
        # White space before the first field would make it another field.
        data = bytes(self.held.lstrip(_BLANK))
        self.held.clear()
        return data

    def _find_kind(self) -> str:
        start = self.start
        if start.startswith((b"{", b"[")):
            return "json"
        if start.startswith(b"<"):  # a page, whatever its label says
            return "other"
        if start.startswith(_SSE_FIELDS):
            return "stream"
        if start and "text/event-stream" in self.content_type.lower():
            return "stream"
        may_be_field = any(name.startswith(start) for name in _SSE_FIELDS)
        return "" if may_be_field else "other"

    @property
    def text(self) -> str:
        return self.held.decode("utf-8-sig", "replace")


class _Unpacker:
    """Unpacks gzip or deflate, several members too, in pieces of bounded size.

    httpx's own decoders have no bound: 300 KB of gzip become 331 MB in one piece, and
    304 bytes of brotli 385 MB. So requests ask for identity, other encodings are
    refused, and these two are unpacked here.
    """

    _PIECE = 64 * 1024  # bytes

    def __init__(self, encoding: str) -> None:
        self._is_deflate = encoding == "deflate"
        self._start = b""  # of the body, until its first two bytes are there
        self._member: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` unpacks to. Raises zlib.error."""
        if self._member is None:
            data = self._start = self._start + data
            if len(data) < 2:
                return
            self._start = data[:2]
            self._member = zlib.decompressobj(self._window_bits())
        while data:
            if self._member.eof:
                data = data.lstrip(b"\0")  # padding, which gzip skips, too
                if not data:
                    return
                self._member = zlib.decompressobj(self._window_bits())
            piece = self._member.decompress(data, self._PIECE)
            yield piece
            while len(piece) == self._PIECE and not self._member.eof:
                rest = self._member.unconsumed_tail
                piece = self._member.decompress(rest, self._PIECE)
                yield piece
            data = self._member.unused_data

    def _window_bits(self) -> int:
        """Return zlib's number of the format; some servers send deflate without it."""
        # RFC 1950: method 8, and a check that makes the header a multiple of 31.
        header = int.from_bytes(self._start[:2], "big")
        is_zlib = header >> 8 & 15 == 8 and header % 31 == 0
        if self._is_deflate and not is_zlib:
            return -zlib.MAX_WBITS
        return zlib.MAX_WBITS | 32  # zlib or gzip


def _content_encoding(response: Response) -> str:
    """Return the encoding that a body has yet, "" for none."""
    if response.is_stream_consumed:  # it has been read: by a mock, or an event hook
        return ""
    encoding: str = response.headers.get("content-encoding", "").strip().lower()
    return {"identity": "", "x-gzip": "gzip"}.get(encoding, encoding)


class _Reader:
    """The base of the readers: takes the bytes of a body, and makes its errors."""

    def __init__(self, expected: _Expected, control: _Control) -> None:
        self.control = control
        self.deadline = _Deadline(expected.first_token_timeout)
        self.cause: BaseException | None = None  # what broke the connection
        self.error: APIError | None = None  # what was raised
        self.is_done = False  # the server sent [DONE]
        self.is_finished = False  # [DONE], or the end of the body: read no further
        self._expected = expected
        self._body = _Body()
        self._unpacker: _Unpacker | None = None

    def begin(self, response: Response) -> None:
        """Take the response. Raises APIError if its body cannot be unpacked."""
        self._body.content_type = response.headers.get("content-type", "")
        encoding = _content_encoding(response)
        if encoding in ("gzip", "deflate"):
            self._unpacker = _Unpacker(encoding)
        elif encoding:
            raise self._invalid(f"a body in the encoding {encoding!r}")

    def feed(self, data: bytes) -> Iterable[Any]:
        """Return what `data` completes. Raises APIError."""
        if self._unpacker is None:
            items = self._read(data)
        else:
            items = self._read_packed(self._unpacker, data)
        if self.deadline.is_unlimited:
            return items
        return self.deadline.count(items)

    def _read_packed(self, unpacker: _Unpacker, data: bytes) -> Iterator[Any]:
        try:
            for piece in unpacker.feed(data):
                yield from self._read(piece)
                if self.is_finished:
                    break
        except zlib.error as error:
            problem = f"a body that does not unpack ({error})"
            raise self._invalid(problem) from None

    def _read(self, data: bytes) -> Iterable[Any]:
        """Return what the bytes of the body complete. Raises APIError."""
        raise NotImplementedError

    @property
    def completion(self) -> ChatCompletion:
        """The answer so far."""
        return ChatCompletion()

    def _content_type(self) -> str:
        return self._body.content_type or "no content type"

    def _invalid(self, problem: str, text: str = "") -> APIError:
        """Return the error of a body that is not an answer."""
        redact = self._expected.redact
        text = redact(text)
        excerpt = f": {text[:_EXCERPT]!r}" if text else ""
        message = redact(f"the server sent {problem}{excerpt}")
        return self.fail(APIResponseValidationError(message, text or None))

    def _server_error(self, text: str) -> APIError:
        """Return the error that the server reports in a text."""
        text = self._expected.redact(text)
        return self.fail(APIError(*_server_error_fields(text)))

    def fail(self, error: APIError) -> APIError:
        """Keep the error, and put the part of the answer that arrived on it."""
        error.place = error.place or self._expected.url
        error.completion = self.completion
        if type(error) is not APIConnectionError:  # where there is no response
            redact = self._expected.redact
            headers = self.control.response_headers.items()
            error.completion.response_headers = {k: redact(v) for k, v in headers}
        self.error = error
        return error

    def attempt_error(self, error: APIError) -> APIError:
        """Return `error`, or the verdict if the caller or a time limit ended it."""
        if self.control.is_closed or self.deadline.has_passed:
            verdict = self.verdict()
            verdict.status_code = error.status_code  # it came, but not all of its body
            return verdict
        return self.fail(error)

    def verdict(self) -> APIError:
        """Return the error of an answer that is not complete."""
        raise NotImplementedError


class _ChatEvents(SSEDecoder):
    """Also takes lines that are not fields of the standard for events.

    Before September 2025, llama.cpp sent errors in a field named `error`. Vertex and
    gateways send them as JSON on lines without a field name, also pretty-printed.
    """

    _MAX_LINES_BYTES = 64 * 1024

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._json_lines = bytearray()
        self.first_unknown_line = ""

    def _process_unknown(self, line: bytes, events: list[ServerSentEvent]) -> None:
        if not self.first_unknown_line:
            self.first_unknown_line = line[: 4 * _EXCERPT].decode("utf-8", "replace")
        name, _, value = line.partition(b":")
        if name == b"error":
            self._add_event("error", value, events)
            return
        if line.strip() == b"[DONE]":  # Anyscale
            self._add_event("message", line, events)
            return
        lines = self._json_lines
        if lines or line[:1] in (b"{", b"["):
            lines += line + b"\n"
            # Pretty-printed JSON ends with the next line that is not indented, and
            # closes what the first one opened: Gemini sends "[{", …, "}" and "]".
            end = b"]" if lines[:1] == b"[" else b"}"
            is_last = line[:1] in (b"{", b"[", b"}", b"]") and line[-1:] == end
            if is_last or len(lines) > self._MAX_LINES_BYTES:
                data = bytes(lines.strip())
                lines.clear()
                payload, _ = _parse_json(data.decode("utf-8", "replace"))
                if _find_error(payload) is not None:
                    self._add_event("error", data, events)

    def _add_event(self, kind: str, data: bytes, events: list[ServerSentEvent]) -> None:
        """Add an event of one line, after the data that came before it in its block."""
        if self._data:
            text = b"\n".join(self._data).decode("utf-8", "replace")
            events.append(ServerSentEvent(data=text))
            self._data.clear()
        events.append(ServerSentEvent(kind, data.decode("utf-8", "replace")))


def _looks_truncated(text: str, problem: Exception) -> bool:
    """Tell whether a JSON text may lack only its end."""
    at_end = getattr(problem, "pos", -1) >= len(text.rstrip())
    in_string = str(problem).startswith("Unterminated string")
    return at_end or in_string or not text.rstrip().endswith(("}", "]"))


def _is_plain(chunk: ChatCompletionChunk) -> bool:
    """Tell whether a chunk only continues its choices.

    It ends none of them then, and reports no error: that has no field in a chunk.
    """
    if chunk.extra is not None or not chunk.choices or chunk.object == "error":
        return False
    for choice in chunk.choices:
        if choice.extra is not None or choice.finish_reason is not None:
            return False
    return True


def _check_size(payload: Any) -> None:
    """Raise ValueError if a payload has too many levels, objects or lists.

    It may have twice as many lists: log probabilities have one for the bytes of each
    token.
    """
    objects_left, lists_left = MAX_OBJECTS, 2 * MAX_OBJECTS
    containers = [payload]
    for _ in range(MAX_DEPTH):
        items: list[Any] = []
        for container in containers:
            if isinstance(container, dict):
                objects_left -= 1
                items += container.values()
            else:
                lists_left -= 1
                items += container
        containers = [
            item for item in items if type(item) is dict or type(item) is list
        ]
        is_over = objects_left < 0 or lists_left < 0
        if is_over or len(containers) > objects_left + lists_left:
            raise ValueError(f"JSON of more than {MAX_OBJECTS} objects")
        if not containers:
            return
    raise ValueError(f"JSON of more than {MAX_DEPTH} levels")


def _is_completion(payload: Any) -> bool:
    """Tell whether JSON is an answer; Gemini leaves out the message of an empty one."""
    if type(payload) is not dict:
        return False
    choices = _dicts(payload.get("choices"))
    return bool(choices) and all(
        type(choice.get("message")) is dict
        or (_find_finish_reason(choice) and not choice.get("delta"))
        for choice in choices
    )


def _without_deltas(payload: Any) -> Any:
    """Return a whole answer without deltas beside its messages (Perplexity)."""
    if type(payload) is not dict:
        return payload
    choices = [
        {name: value for name, value in choice.items() if name != "delta"}
        for choice in _dicts(payload.get("choices"))
    ]
    return {**payload, "choices": choices} if "choices" in payload else payload


def _brings_output(delta: ChoiceDelta) -> bool:
    """Tell whether a delta has more than a role: a text, audio or a call."""
    texts = delta.content or delta.reasoning_content or delta.refusal
    calls = delta.tool_calls or delta.function_call
    audio = delta.extra is not None and delta.extra.get("audio")
    return bool(texts or calls or audio)


class _AnswerReader(_Reader):
    """Takes the bytes of one body, returns its chunks, and judges how the answer ended.

    | the body                                          | the verdict                |
    |---------------------------------------------------|----------------------------|
    | a finish_reason for every choice, or [DONE]       | complete                   |
    | a JSON completion in place of a stream            | complete, one chunk        |
    | reports an error, in any shape                    | APIError                   |
    | is not read to its end: the caller closed it      | TruncatedStreamError       |
    | a finish_reason that is a word for a failure      | TruncatedStreamError       |
    | brings no token within a time limit               | APITimeoutError            |
    | breaks at any time, or is silent after a token    | TruncatedStreamError       |
    | [DONE] without a choice                           | APIResponseValidationError |
    | an event that is not JSON, or over a limit        | APIResponseValidationError |
    | not an event stream and not JSON, or nothing      | APIResponseValidationError |
    | ends without a finish_reason for every choice     | TruncatedStreamError       |

    Nothing that follows `[DONE]` changes the verdict, nor does a cut after the last
    finish_reason; and no `[DONE]` makes up for an error.
    """

    def __init__(self, expected: _Expected, control: _Control) -> None:
        super().__init__(expected, control)
        self._events = _ChatEvents(expected.max_bytes)
        self._accumulator = ChatAccumulator()
        self._json: Json | None = None  # the answer, if it came as JSON
        self._has_token = False
        self._is_ending = False  # every choice has ended, and [DONE] may follow

    @property
    def completion(self) -> ChatCompletion:
        if self._json is not None:
            return ChatCompletion.from_dict(_clean_copy(self._json))
        return self._accumulator.completion

    @property
    def complete(self) -> bool:
        if self.error is not None:
            return False
        n_choices = self._expected.n_choices
        is_complete = self._accumulator.is_complete(n_choices, self.is_done)
        return is_complete or self._json is not None

    # Bytes to chunks.

    def _read(self, data: bytes) -> Iterable[ChatCompletionChunk]:
        """Return the chunks that the bytes complete. Raises APIError."""
        if self._body.kind == "stream":
            # Micro-optimization: nearly every read is one event of one line. Reading it
            # here saves making an event and a generator.
            single = self._events._single_data_line(data)
            if single is not None:
                return self._read_data(single)
            return self._read_events(data)
        return self._recognise(data)

    def finish(self) -> Iterator[ChatCompletionChunk]:
        """Take the end of the body; yield its last chunks. Raises unless complete."""
        self.is_finished = True
        if not (self.is_done or self.control.is_closed):
            if self._body.kind == "stream":
                # llama.cpp has left out the blank line after the last event.
                yield from self._read_events(b"\n\n")
            elif self._body.kind == "json":
                yield self._read_body()
        self.check()

    def _recognise(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        body = self._body
        events = body.feed(data)
        if body.kind == "stream":
            yield from self._read_events(events)
        elif len(body.held) > self._expected.max_bytes:
            limit = self._expected.max_bytes
            raise self._invalid(f"a body of more than {limit} bytes", body.text)
        elif body.kind == "other" and len(body.held) > 4 * _EXCERPT:
            raise self.verdict()

    def _read_events(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        events = self._events
        for event in events._feed(data):
            if event.event == "error":
                raise self._server_error(event.data)
            yield from self._read_data(event.data)
            if self.is_done or self.control.is_closed:
                return
        if events._overflow:
            text = events._overflow_data.decode("utf-8", "replace")
            limit = self._expected.max_bytes
            raise self._invalid(f"an event of more than {limit} bytes", text)

    def _read_data(self, data: str) -> Iterable[ChatCompletionChunk]:
        payload, problem = _parse_json(data)
        if not problem:
            if payload is None or payload == {}:
                return ()  # sent by gateways to keep the connection alive
            return (self._read_payload(payload, data),)
        text = data.strip()
        if text.startswith("[DONE]"):
            self.is_done = self.is_finished = True
        elif "\n" in text:
            return self._read_lines(text)
        elif text and text[0] != ":" and not self.is_finished:
            # A text that begins with ":" is a comment that a gateway sent as data, and
            # at the end of the body an event may have been cut.
            raise self._invalid(f"an event that is not JSON ({problem})", data)
        return ()

    def _read_lines(self, text: str) -> Iterator[ChatCompletionChunk]:
        """Read the lines as events: some servers send no blank line between them."""
        for line in text.split("\n"):
            # At the end of the body they may be the lines of one event that was cut.
            if self.is_finished and line.strip()[:1] not in ("{", "["):
                continue
            yield from self._read_data(line)
            if self.is_done:
                return

    def _read_body(self) -> ChatCompletionChunk:
        """Return the answer that a JSON body is, with or without `[DONE]` after it."""
        text = self._body.text
        payload, problem = _parse_json(text)
        # Some servers send `data: [DONE]`, whole or cut, after the JSON.
        end = getattr(problem, "pos", 0)
        first, first_problem = _parse_json(text[:end])
        rest = "".join(text[end:].split())
        is_rest_done = "data:[DONE]".startswith(rest)
        if not first_problem and (is_rest_done or _find_error(first) is not None):
            payload, problem, text = first, None, text[:end]
        if problem:
            if self.cause or _looks_truncated(text, problem):
                raise self.verdict()
            raise self._invalid(f"a body that is not JSON ({problem})", text)
        if _find_error(payload) is None and not _is_completion(payload):
            raise self._invalid("JSON that is not an answer", text)
        chunk = self._read_payload(_without_deltas(payload), text)
        if not self._accumulator.failure:
            try:
                self._json = _clean_copy(payload)
            except ValueError as error:  # too deep in a field that no chunk keeps
                words = f"JSON that is not an answer ({error})"
                raise self._invalid(words, text) from None
        return chunk

    def _read_payload(self, payload: Any, text: str) -> ChatCompletionChunk:
        # Micro-optimization: this takes a tenth less than to check every payload.
        try:
            is_checked = type(payload) is not dict or len(text) > MAX_OBJECTS
            if is_checked:
                self._check_payload(payload, text)
            chunk = ChatCompletionChunk.from_dict(payload)
            is_plain = _is_plain(chunk)
            if not (is_plain or is_checked):
                self._check_payload(payload, text)
            self._accumulator.add(chunk)
        except (ValueError, RecursionError) as error:
            problem = f"JSON that is not an answer ({error})"
            raise self._invalid(problem, text) from None
        if self._is_ending or not (is_plain and self._has_token):
            self._set_deadline(chunk)
        return chunk

    def _check_payload(self, payload: Any, text: str) -> None:
        """Raise APIError for an error or no object, ValueError for one too large."""
        if _find_error(payload) is not None:
            raise self._server_error(text)
        if type(payload) is not dict:
            raise self._invalid("JSON that is not an answer", text)
        if len(text) > MAX_OBJECTS:  # a shorter text cannot hold so many
            _check_size(payload)

    def _set_deadline(self, chunk: ChatCompletionChunk) -> None:
        """Limit the waits: for the first token, and after the last finish_reason."""
        if not self._has_token and any(_brings_output(c.delta) for c in chunk.choices):
            self._has_token = True
            self.deadline = _Deadline(None)
        # Only a finish_reason can end the answer, and only a choice can open it again.
        is_ending = self._is_ending
        has_reason = any(c.finish_reason is not None for c in chunk.choices)
        if has_reason or (is_ending and chunk.choices):
            is_ending = self._accumulator.has_ended(self._expected.n_choices)
        if is_ending:
            seconds = self._expected.ending_timeout
            if not self._accumulator.has_content:
                # Servers send "stop" with the role, or with each piece of reasoning.
                seconds = self._expected.read_timeout
            self.deadline = _Deadline(seconds)
        elif self._is_ending:
            self.deadline = _Deadline(None)  # a choice was opened again
        self._is_ending = is_ending

    # The verdict.

    def check(self) -> None:
        """Raise APIError unless the answer is complete."""
        if not self.complete:
            raise self.error or self.verdict()

    def verdict(self) -> APIError:
        """Return the error of an answer that is not complete, in the table's order."""
        cause = self.cause
        if self.control.is_closed:
            problem = "the stream was closed here before the answer was whole"
            return self._truncated(problem)
        if self._accumulator.failure:
            reason = self._accumulator.failure
            return self._truncated(
                f"the server ended the answer with {reason!r}", cause
            )
        if not self._has_token and self.deadline.has_passed:
            limit = self._expected.first_token_timeout
            return self._late(f"no token within {limit:g} s (first_token_timeout)")
        if _is_timeout(cause):
            silence = "a read timed out"
            if self._expected.read_timeout is not None:
                silence = f"no data for {self._expected.read_timeout:g} s"
            if not self._has_token:
                return self._late(f"{silence}, waiting for the first token", cause)
            return self._truncated(self._cut_off(silence), cause)
        if cause is not None:
            words = f"the connection broke ({_exception_text(cause)})"
            return self._truncated(self._cut_off(words), cause)
        if self.is_done:
            return self._invalid("[DONE] and no answer")
        if not self._body.start:
            return self._invalid(f"an empty body ({self._content_type()})")
        if self._body.kind == "other":
            problem = f"neither an event stream nor JSON ({self._content_type()})"
            return self._invalid(problem, self._body.text)
        unknown = self._events.first_unknown_line
        is_cut_json = unknown[:1] in ("{", "[")
        if unknown and not (is_cut_json or self._accumulator.has_begun):
            return self._invalid(f"no events ({self._content_type()})", unknown)
        return self._truncated(self._cut_off("it ended"))

    def _cut_off(self, how: str) -> str:
        return f"the answer was cut off: {how} before a finish_reason or [DONE]"

    def _truncated(self, message: str, cause: BaseException | None = None) -> APIError:
        return self._caused(TruncatedStreamError(self._expected.redact(message)), cause)

    def _late(self, message: str, cause: BaseException | None = None) -> APIError:
        return self._caused(APITimeoutError(message), cause)

    def _caused(self, error: APIError, cause: BaseException | None) -> APIError:
        if not self._expected.holds_secret(cause):
            error.__cause__ = cause
        return self.fail(error)


class _ModelsReader(_Reader):
    """Takes the bytes of a list of models, and returns their names."""

    def _read(self, data: bytes) -> Iterable[list[str]]:
        """Hold the bytes back. Raises APIError above the limit."""
        held, limit = self._body.held, self._expected.max_bytes
        held += data
        if len(held) > limit:
            raise self._invalid(f"a body of more than {limit} bytes", self._body.text)
        return ()

    def finish(self) -> Iterable[list[str]]:
        """Return the names, as the only item. Raises APIError."""
        self.is_finished = True
        text = self._body.text
        payload, problem = _parse_json(text)
        if problem and (self.cause is not None or self.deadline.has_passed):
            raise self.verdict()
        if _find_error(payload) is not None:
            raise self._server_error(text)
        # Together and GitHub Models send a bare list.
        models = payload
        if isinstance(payload, dict):
            models = payload.get("data", payload)
            if models is None:  # Ollama without a model
                models = []
        if not text.strip():
            raise self._invalid(f"an empty body ({self._content_type()})")
        if problem or not isinstance(models, list):
            found = f"a body that is not a list of models ({self._content_type()})"
            raise self._invalid(found, text)
        names = [_string(model.get("id")) for model in _dicts(models)]
        return ([name for name in names if name],)

    def verdict(self) -> APIError:
        limit = self._expected.first_token_timeout
        if self.deadline.has_passed or _is_timeout(self.cause):
            problem = f"no list of models within {limit:g} s"
            if not self.deadline.has_passed:  # `timeout` is the shorter limit
                problem = "the list of models was cut off: a read timed out"
            return self.fail(APITimeoutError(problem))
        words = "it ended"
        if self.cause is not None:
            words = self._expected.redact(_exception_text(self.cause))
        return self.fail(TruncatedStreamError(f"the list was cut off: {words}"))


# ---- Sending and streaming -----------------------------------------------------------
#
# The same twice, with `for` and with `async for`. What has to be closed is closed by
# `with` in a generator; the stream objects around it are thin.

_DRAIN_BYTES = 64 * 1024  # of an error's body, and of what follows [DONE]
_ERROR_BODY_TIMEOUT = 5.0  # seconds for an error's body
_DRAIN_TIMEOUT = 0.5  # seconds to read the body to its end, to reuse the connection


def _response_reads(response: Any) -> Any:
    """Return the bytes of a response: as httpx unpacked them, if it has been read."""
    if response.is_stream_consumed:
        return response.iter_bytes()
    return response.iter_raw()


def _aresponse_reads(response: Any) -> Any:
    """Async twin of `_response_reads`."""
    if response.is_stream_consumed:
        return response.aiter_bytes()
    return response.aiter_raw()


def _unpack_error_body(encoding: str, body: bytes) -> bytes:
    """Return the beginning of an error's body, as far as it can be unpacked."""
    if not encoding:
        return body
    unpacked = bytearray()
    if encoding not in ("gzip", "deflate"):
        return b""
    with suppress(zlib.error):
        for piece in _Unpacker(encoding).feed(body):
            unpacked += piece
            if len(unpacked) >= _DRAIN_BYTES:
                break
    return bytes(unpacked)


def _interrupt_read(response: Any) -> None:
    """End the read of a response in another thread: shut its socket down.

    Over HTTP/2 other streams share the socket, so there nothing is done. If the body
    ends at this very moment, the connection may have gone to the next request: that one
    finds a dead connection, and is sent again.
    """
    import socket

    # There may be no response yet, and the response of a mock may be anything.
    with suppress(Exception):
        if not response.is_closed and response.http_version.startswith("HTTP/1"):
            stream = response.extensions["network_stream"]
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


class _Timer:
    """Interrupts reads of sync code that take too long: one thread for the process.

    httpx limits each read. A limit on several reads together needs another thread.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        # The time at which to interrupt each read, and its response.
        self._due: dict[object, tuple[float, Any]] = {}
        self._wakes_at = math.inf
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Start the thread. Returns whether it runs: some places have no threads."""
        with self._condition:
            if self._thread is None:
                thread = threading.Thread(target=self._run, daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # limits, Pyodide, the end of the program
                    return False
                self._thread = thread
        return True

    @contextmanager
    def limit(self, response: Any, seconds: float | None) -> Iterator[None]:
        """Interrupt the reads inside this block if it takes more than `seconds`."""
        if seconds is None or not self.start():
            yield
            return
        key = object()
        at = time.monotonic() + seconds
        with self._condition:
            self._due[key] = at, response
            if at < self._wakes_at:
                self._condition.notify()
        try:
            yield
        finally:
            # From here on another request may use the connection: do not interrupt it.
            with self._condition:
                self._due.pop(key, None)

    def _run(self) -> None:
        with self._condition:
            while True:
                now = time.monotonic()
                for key, (at, response) in list(self._due.items()):
                    if at <= now:
                        del self._due[key]
                        _interrupt_read(response)
                times = [at for at, _ in self._due.values()]
                self._wakes_at = min(times, default=math.inf)
                seconds = None
                if times:
                    seconds = self._wakes_at - now
                self._condition.wait(seconds)


@functools.lru_cache(maxsize=1)  # a forked child needs only its own
def _timer_of(process: int) -> _Timer:
    return _Timer()


def _timer() -> _Timer:
    """Return the timer of this process; a forked child has no threads of its parent."""
    return _timer_of(os.getpid())


def _drain(reads: Iterator[bytes], response: Any, seconds: float) -> bytes:
    """Read the rest of a body within the limits, and return it."""
    rest = bytearray()
    with suppress(Exception), _timer().limit(response, seconds):
        for data in reads:
            rest += data
            if len(rest) >= _DRAIN_BYTES:
                break
    return bytes(rest)


async def _adrain(reads: AsyncIterator[bytes], response: Any, seconds: float) -> bytes:
    """Async twin of `_drain`."""
    import anyio

    rest = bytearray()
    with suppress(Exception), anyio.move_on_after(seconds):
        async for data in reads:
            rest += data
            if len(rest) >= _DRAIN_BYTES:
                break
    return bytes(rest)


def _set_read_timeout(request: Any, seconds: float | None) -> None:
    """Set the limit of each read of the body; the headers may have had another."""
    request.extensions.setdefault("timeout", {})["read"] = seconds


def _error_body_seconds(deadline: _Deadline) -> float:
    left = deadline.left
    return _ERROR_BODY_TIMEOUT if left is None else min(left, _ERROR_BODY_TIMEOUT)


def _sent_request(response: Any, built: Any) -> Any:
    """Return the request that was sent: an auth flow may have made one of its own."""
    with suppress(RuntimeError):  # the response of a mock may have none
        return response.request
    return built


def _attempt(request: _Request, reader: _Reader, client: Any) -> Response | APIError:
    """Send a request once. Return the response, or the error of the attempt.

    The error is returned, since one that is raised here would have the exception, and
    with it the request and its key, as its context.
    """
    outer = sys.exception()
    try:
        built = request.build(client, reader.deadline.left)
        try:
            response: Response = client.send(built, stream=True, follow_redirects=False)
            built = _sent_request(response, built)
        finally:
            request.add_secrets(built)
        reader.control.begin(response)
        if response.is_success:
            _set_read_timeout(built, request.timeout[1])
            return response
        seconds = _error_body_seconds(reader.deadline)
        _set_read_timeout(built, seconds)
        encoding = _content_encoding(response)
        with closing(response):
            body = _drain(_response_reads(response), response, seconds)
        return request.status_error(response, _unpack_error_body(encoding, body))
    # Transports and event hooks may raise anything: the attempt has failed.
    except Exception as error:
        return request.error(error, outer)


async def _aattempt(
    request: _Request, reader: _Reader, client: Any
) -> Response | APIError | None:
    """Async twin of `_attempt`; None if it was closed, or the time for it is up."""
    control, deadline = reader.control, reader.deadline
    outer = sys.exception()
    try:
        built = request.build(client, None)
        response: Response | None = None
        try:
            with control.interruptible(deadline.left):
                sent = await client.send(built, stream=True, follow_redirects=False)
                response, built = sent, _sent_request(sent, built)
        finally:
            request.add_secrets(built)
        if response is None:
            return None
        control.begin(response)
        if response.is_success:
            # An auth flow's own request has no time limits.
            _set_read_timeout(built, request.timeout[1])
            return response
        seconds = _error_body_seconds(deadline)
        encoding = _content_encoding(response)
        body = b""
        async with aclosing(response):
            with control.interruptible():
                body = await _adrain(_aresponse_reads(response), response, seconds)
        return request.status_error(response, _unpack_error_body(encoding, body))
    except Exception as error:
        return request.error(error, outer)


def _send(request: _Request, reader: _Reader, client: Any) -> Response:
    """Send a request, again where the rules say so, until an answer begins."""
    deadline, control = reader.deadline, reader.control
    while not control.is_closed:
        request.retries.begin_attempt()
        result = _attempt(request, reader, client)
        if not isinstance(result, APIError):
            request.source.keeps_connections = True
            return result
        wait = request.wait_after(result, deadline.left)
        if wait is None:
            raise reader.attempt_error(result)
        control.wait(wait)
    raise reader.verdict()


async def _asend(request: _Request, reader: _Reader, client: Any) -> Response:
    """Async twin of `_send`."""
    import anyio

    deadline, control = reader.deadline, reader.control
    while not control.is_closed:
        request.retries.begin_attempt()
        result = await _aattempt(request, reader, client)
        if result is None:
            break
        if not isinstance(result, APIError):
            request.source.keeps_connections = True
            return result
        wait = request.wait_after(result, deadline.left)
        if wait is None or control.is_closed:
            raise reader.attempt_error(result)
        with control.interruptible():
            await anyio.sleep(wait)
    raise reader.verdict()


def _is_transport_error(error: Exception) -> bool:
    """Tell whether an exception is one of a network or of an HTTP library."""
    root = type(error).__module__.partition(".")[0]
    libraries = ("aiohttp", "h11", "http", "httpcore", "httpx", "httpx2", "urllib3")
    return isinstance(error, OSError) or root in libraries


def _next_bytes(reads: Iterator[bytes], reader: _Reader) -> bytes | None:
    """Return the bytes of the next read.

    None if the body has ended, the stream was closed, the time is up, or the read
    failed: then `reader.cause` is the exception.
    """
    control, deadline = reader.control, reader.deadline
    if control.is_closed:
        return None
    try:
        if deadline.is_unlimited:
            return next(reads, None)
        if deadline.has_passed:
            return None
        with deadline, _timer().limit(control.response, deadline.left):
            return next(reads, None)
    except Exception as error:
        # Without a response these are the caller's own bytes, and other errors too.
        if control.response is None and not _is_transport_error(error):
            raise
        reader.cause = error
    return None


async def _anext_bytes(reads: AsyncIterator[bytes], reader: _Reader) -> bytes | None:
    """Async twin of `_next_bytes`.

    Closing an HTTP/1 response wakes the task that reads it. Over HTTP/2 it does not, so
    there the read runs in a cancel scope.
    """
    control, deadline = reader.control, reader.deadline
    if control.is_closed:
        return None
    try:
        if deadline.is_unlimited and not control.is_http2:
            async for data in reads:  # takes less time than anext() with a default
                return data
            return None
        if deadline.has_passed:
            return None
        with deadline, control.interruptible(deadline.left):
            return await anext(reads, None)
    except Exception as error:
        # Without a response these are the caller's own bytes, and other errors too.
        if control.response is None and not _is_transport_error(error):
            raise
        reader.cause = error
    return None


def _current_loop() -> Any:
    """Return asyncio's event loop, or what stands for trio's."""
    import anyio.lowlevel  # httpx brings it

    token = anyio.lowlevel.current_token()
    return getattr(token, "native_token", token)


def _open_client(request: _Request, reader: _Reader, loop: Any = None) -> Any:
    """Return the client, to be entered. Raises APIError; the reader keeps it."""
    try:
        return request.source.open(request, loop)
    except APIError as error:
        reader.fail(error)  # a stream that is asked once more raises it again
        raise


def _stream_answer(request: _Request, reader: Any) -> Generator[Any]:
    """Send the request, and yield the items that the reader returns.

    Closing this generator closes the response, and a client made for this request.
    """
    with _open_client(request, reader) as client:
        with reader.deadline:
            response = _send(request, reader, client)
        with closing(response):
            reader.begin(response)
            reads = _response_reads(response)
            while not reader.is_finished:
                data = _next_bytes(reads, reader)
                if data is None:
                    break
                yield from reader.feed(data)
            yield from reader.finish()
            # A connection is used again only if its body has been read to the end. That
            # read has no time limit over HTTP/2, or without threads: then close it.
            if reader.is_done and not reader.control.is_http2 and _timer().start():
                _drain(reads, response, _DRAIN_TIMEOUT)


async def _astream_answer(request: _Request, reader: Any) -> AsyncGenerator[Any]:
    """Async twin of `_stream_answer`; it also reads the end over HTTP/2."""
    _load_httpx()
    async with _open_client(request, reader, _current_loop()) as client:
        with reader.deadline:
            response = await _asend(request, reader, client)
        async with aclosing(response):
            reader.begin(response)
            reads = _aresponse_reads(response)
            while not reader.is_finished:
                data = await _anext_bytes(reads, reader)
                if data is None:
                    break
                for chunk in reader.feed(data):
                    yield chunk
            for chunk in reader.finish():
                yield chunk
            if reader.is_done:
                await _adrain(reads, response, _DRAIN_TIMEOUT)


# Generators of a parent process. They are kept, not closed: a thread of the parent may
# have held a lock at the fork, and closing them here would wait for it forever.
_left_to_parent: list[Any] = []


def _close_quietly(items: Generator[Any]) -> None:
    with suppress(Exception):
        items.close()


def _close_elsewhere(items: Any, process: int) -> None:
    """Close the generator of a stream that was dropped before its end."""
    if items.gi_frame is None:  # it has ended
        return
    if os.getpid() != process:
        _left_to_parent.append(items)
        return
    try:
        threading.Thread(target=_close_quietly, args=[items], daemon=True).start()
    except RuntimeError:  # no thread can be started
        _close_quietly(items)


_Item = TypeVar("_Item")


class _SyncStream(Iterator[_Item]):
    """The base of the sync streams: takes from a generator that does the work."""

    def _set_source(self, items: Generator[_Item], control: _Control) -> None:
        """Set the generator that yields the items, and what is shared with it."""
        self._items = items
        self._control = control
        # Garbage collection may drop the stream anywhere, also inside the lock of
        # httpcore's pool. Closing the connection there would wait for that lock
        # forever, so the finalizer keeps the generator, and closes it in a thread.
        finalizer = weakref.finalize(self, _close_elsewhere, items, os.getpid())
        finalizer.atexit = False

    def __next__(self) -> _Item:
        try:
            for item in self._items:
                return item
        except ValueError:  # another thread is closing the generator
            if not self._control.is_closed:
                raise
        self._check_end()
        raise StopIteration

    def _check_end(self) -> None:
        """Raise what a stream that has ended raises whenever it is asked again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, so that the server stops.

        A thread that waits for the next item is woken; over HTTP/2, and before the
        headers have arrived, only by the next bytes or at its timeout.
        """
        self._control.close()
        try:
            self._items.close()
        except ValueError:  # another thread runs it, and closes it when it is woken
            _interrupt_read(self._control.response)


class _AsyncStream(AsyncIterator[_Item]):
    """Async twin of `_SyncStream`; the event loop looks after dropped generators."""

    def _set_source(self, items: AsyncGenerator[_Item], control: _Control) -> None:
        """Set the generator that yields the items, and what is shared with it."""
        self._items = items
        self._control = control

    async def __anext__(self) -> _Item:
        try:
            async for item in self._items:
                return item
        except RuntimeError:  # another task is closing the generator
            if not self._control.is_closed:
                raise
        self._check_end()
        raise StopAsyncIteration

    def _check_end(self) -> None:
        """Raise what a stream that has ended raises whenever it is asked again."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection, so that the server stops; a waiting task is woken."""
        self._control.close()
        try:
            await self._items.aclose()
        except RuntimeError:  # another task runs it, and closes it when it is woken
            await self._control.interrupt()


class _AnswerMixin:
    """What ChatStream and AsyncChatStream have in common."""

    _reader: _AnswerReader

    def _check_end(self) -> None:
        # The generator has ended. If anything but an APIError ended it (Ctrl-C), the
        # answer was stopped here: the verdict must not say that the server cut it off.
        self._reader.control.close()
        self._reader.check()

    @property
    def completion(self) -> ChatCompletion:
        """The part of the answer that has arrived, at any time, as a copy."""
        return self._reader.completion

    @property
    def complete(self) -> bool:
        """Whether the answer is whole: ended as it should, and without an error."""
        return self._reader.complete

    @property
    def response(self) -> Response | None:
        """The latest httpx.Response, also of an attempt that failed; else None."""
        return self._reader.control.response

    def _completion_with_headers(self) -> ChatCompletion:
        completion = self.completion
        completion.response_headers = self._reader.control.response_headers
        return completion


class _SurrogateJoiner:
    """Joins surrogate pairs that were cut between two texts.

    Some servers send an emoji as two escapes in two chunks; neither half can be encoded
    alone.
    """

    def __init__(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-16-le")
        self._decode = decoder("replace").decode

    def join(self, text: str, final: bool = False) -> str:
        """Return the text, after a half held back before, without a half at its end.

        A half that finds no other becomes U+FFFD.
        """
        return self._decode(text.encode("utf-16-le", "surrogatepass"), final)


class ChatStream(_AnswerMixin, _SyncStream[ChatCompletionChunk]):
    """A streamed answer: an iterator of ChatCompletionChunk, and a context manager.

    The request is sent at the first `next()`. Iteration stops only after a complete
    answer; any other end raises an APIError. `with`, `close` and dropping it close the
    connection, so that the server stops. After a `break`, a stream that something still
    refers to can be iterated further.
    """

    def __init__(self, request: _Request) -> None:
        self._reader = _AnswerReader(request.expected, _Control())
        self._set_source(_stream_answer(request, self._reader), self._reader.control)

    def text(self) -> Iterator[str]:
        """Yield the text of the choice with index 0, without lone surrogates."""
        joiner = _SurrogateJoiner()
        for chunk in self:
            if text := joiner.join(chunk._first_text()):
                yield text
        if text := joiner.join("", final=True):
            yield text


class AsyncChatStream(_AnswerMixin, _AsyncStream[ChatCompletionChunk]):
    """Async twin of `ChatStream`, for asyncio and trio."""

    def __init__(self, request: _Request) -> None:
        self._reader = _AnswerReader(request.expected, _Control())
        self._set_source(_astream_answer(request, self._reader), self._reader.control)

    async def text(self) -> AsyncIterator[str]:
        """Yield the text of the choice with index 0, without lone surrogates."""
        joiner = _SurrogateJoiner()
        async for chunk in self:
            if text := joiner.join(chunk._first_text()):
                yield text
        if text := joiner.join("", final=True):
            yield text


def iter_chunks(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ChatCompletionChunk]:
    """Yield the chunks in the body of an answer, for other HTTP libraries and tests.

    Raises as `ChatStream` does where the body is not a whole answer. If the iterable
    raises an OSError, or an exception of an HTTP library, the body counts as cut off.
    """
    reader = _AnswerReader(_Expected(_byte_limit(max_event_bytes)), _Control())
    reads = iter(chunks)
    while not reader.is_finished:
        data = _next_bytes(reads, reader)
        if data is None:
            break
        yield from reader.feed(data)
    yield from reader.finish()


async def aiter_chunks(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ChatCompletionChunk]:
    """Async twin of `iter_chunks`."""
    reader = _AnswerReader(_Expected(_byte_limit(max_event_bytes)), _Control())
    reads = aiter(chunks)
    while not reader.is_finished:
        data = await _anext_bytes(reads, reader)
        if data is None:
            break
        for chunk in reader.feed(data):
            yield chunk
    for chunk in reader.finish():
        yield chunk


# ---- Listening -----------------------------------------------------------------------
#
# The rules of connecting again are those of the HTML Living Standard, section 9.2.3
# "Processing model", and of practice where it is silent:
#
#     204, or closed by the caller                         the stream ends
#     another status below 500, except 408 and 429         SSEError
#     another content type, an event over the limit        SSEError
#     408, 429, 5xx, a network error, silence              on_error, then again
#     the end of the body                                  again

_MIN_FAILURE_WAIT = 0.1  # seconds from the second failure on, whatever the server says


def _check_wait(name: str, value: Any) -> float:
    """Return a number of seconds to wait. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number of seconds, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected seconds from 0 on, got {value!r}")
    return float(min(value, _MAX_SECONDS))


# The exceptions of httpx for a request that it cannot send at all.
_OWN_FAULTS = ("InvalidURL", "LocalProtocolError", "UnsupportedProtocol")


def _is_temporary_status(status: int | None) -> bool:
    """Tell whether a server is asked again after a status."""
    return status is not None and (status in (408, 429) or status >= 500)


class _Reconnection:
    """Decides what to send, what a response means, how long to wait; without I/O."""

    def __init__(
        self,
        headers: Mapping[str, str] | None,
        last_event_id: str,
        retry: float,
        max_retry: float,
        max_event_bytes: int | None,
        on_error: Callable[[Exception], Any] | None,
    ) -> None:
        if not isinstance(last_event_id, str):
            raise TypeError(f"last_event_id: expected a str, got {last_event_id!r}")
        if re.search("[\r\n\0\ud800-\udfff]", last_event_id):
            raise ValueError("last_event_id: expected no line end, NUL or surrogate")
        if on_error is not None and not callable(on_error):
            raise TypeError(f"on_error: expected a function, got {on_error!r}")
        if inspect.iscoroutinefunction(on_error):  # nothing would await it
            raise TypeError("on_error: expected a plain function, got an async one")
        self._own_headers = _check_headers(dict(headers or {}))
        self._last_event_id = last_event_id
        self._retry = _check_wait("retry", retry)
        self._max_retry = _check_wait("max_retry", max_retry)
        self._max_event_bytes = max_event_bytes
        self._on_error = on_error
        self.must_wait = False  # whether a connection has ended since the last wait
        self._due: float | None = None  # the end of a wait that has begun, monotonic
        self._failures = 0  # waits since the last event, or since the start
        self._retry_after = 0.0
        self._source: EventSource | None = None
        _byte_limit(max_event_bytes)  # raises if it is not a limit

    @property
    def last_event_id(self) -> str:
        return self._source.last_event_id if self._source else self._last_event_id

    def headers(self) -> dict[str, str | bytes]:
        """Return the headers of the next request.

        Reports a last event id that no header can hold, and leaves it out.
        """
        headers: dict[str, str | bytes] = {
            "accept-encoding": "identity",
            "cache-control": "no-cache",
        }
        headers |= self._own_headers
        headers["accept"] = "text/event-stream"
        # The standard wants UTF-8, and httpx refuses a str that is not ASCII. RFC 9110,
        # section 5.5: no control characters, no white space at either end.
        value = self.last_event_id.encode("utf-8", "replace")
        if re.fullmatch(rb"[!-~\x80-\xff]([\t -~\x80-\xff]*[!-~\x80-\xff])?", value):
            headers["last-event-id"] = value
        elif value:
            problem = f"a header cannot hold the last event id {self.last_event_id!r}"
            self.report(SSEError(problem))
        return headers

    def begin(self, response: Response) -> EventSource | None:
        """Return the events of a response; None if it says not to connect again.

        Raises SSEError for any other status than 200, and for another content type.
        """
        status = response.status_code
        if status == 204:
            return None
        if status != 200:
            raise self._status_error(response)
        place = _public_url(str(response.url))
        content_type = response.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "text/event-stream":
            problem = f"expected text/event-stream, got {content_type!r} ({place})"
            raise SSEError(problem, status_code=status)
        encoding = _content_encoding(response)
        if encoding:  # we asked for none, and httpx unpacks without a bound
            problem = f"expected no content encoding, got {encoding!r} ({place})"
            raise SSEError(problem, status_code=status)
        source = EventSource(response, self._max_event_bytes, self.last_event_id)
        self._source = source
        return source

    def _status_error(self, response: Response) -> SSEError:
        wait = _parse_retry_after(response.headers, time.time()) or 0.0
        self._retry_after = min(wait, MAX_RETRY_AFTER)
        status, place = response.status_code, _public_url(str(response.url))
        return SSEError(f"HTTP {status} ({place})", status_code=status)

    def had_event(self) -> None:
        self._failures = 0

    def report(self, error: Exception) -> None:
        """Tell the caller of a fault; what `on_error` raises ends the stream."""
        if self._on_error is not None:
            self._on_error(error)

    def end(self, fault: Exception | None) -> None:
        """Take the end of a connection. Raises the fault if it ends the stream."""
        self.must_wait = True
        if fault is None:
            return
        response = _raised_response(fault)
        if response is not None:
            fault = self._status_error(response)
        if isinstance(fault, SSEError):
            is_temporary = _is_temporary_status(fault.status_code)
        else:
            # Of hooks: a response that was not read, a file that cannot be opened.
            is_mistake = isinstance(fault, RuntimeError) or _is_file_error(fault)
            is_temporary = _is_transport_error(fault) and not is_mistake
        if not is_temporary or type(fault).__name__ in _OWN_FAULTS:
            raise fault
        self.report(fault)

    def wait(self) -> float:
        """Return the seconds until the next attempt.

        After a wait that was cancelled these are what is left of it.
        """
        from random import uniform

        if self._due is not None:
            return max(0.0, self._due - time.monotonic())
        if self._source is not None and self._source.retry is not None:
            self._retry = min(self._source.retry, 1000 * int(_MAX_SECONDS)) / 1000
        wait = self._retry
        if self._failures:
            first = max(wait, _MIN_FAILURE_WAIT)
            limit = max(self._max_retry, wait)
            longest = min(first * 2.0 ** min(self._failures, 30), limit)
            wait = max(wait, uniform(longest / 2, longest))
        self._failures += 1
        wait, self._retry_after = max(wait, self._retry_after), 0.0
        self._due = time.monotonic() + wait
        return wait

    def end_wait(self) -> None:
        self.must_wait = False
        self._due = None


def _same_origin(request: Request, other: Request) -> bool:
    def origin(url: Any) -> tuple[Any, ...]:
        # httpx leaves the scheme's own port out, but not after HTTP in capitals.
        default = {"http": 80, "https": 443}.get(url.scheme)
        return url.scheme, url.host, url.port or default

    return origin(request.url) == origin(other.url)


def _redirect_request(request: Request, response: Response) -> Request | None:
    """Return the request that a response redirects to, None if it does not.

    Headers that are secret do not go to another origin.
    """
    following: Request | None = response.next_request
    if following is not None and not _same_origin(request, following):
        for name in list(following.headers):
            if _Secrets.is_secret_name(name):
                del following.headers[name]
    return following


_REQUEST_KEYWORDS = frozenset(
    ["content", "cookies", "data", "extensions", "files", "json", "params", "timeout"]
)


def _check_request(request: Json) -> Json:
    """Return the keywords of a request that can be sent again. Raises TypeError."""
    for name, value in request.items():
        if name not in _REQUEST_KEYWORDS:
            raise TypeError(f"unexpected keyword {name}")
        if hasattr(value, "__next__") or hasattr(value, "__anext__"):
            raise TypeError(f"{name}: expected a value that can be sent again")
    body = {name: value for name, value in request.items() if name != "timeout"}
    _load_httpx().Request("POST", DEFAULT_BASE_URL, **body)  # raises what is wrong
    return request


class _Listener:
    """The parts of both twins: the plan, the client and the request."""

    def __init__(
        self,
        kind: str,
        client: Any,
        method: str,
        url: str,
        plan: _Reconnection,
        request: Json,
    ) -> None:
        _check_client(kind, client)
        if not re.fullmatch("[A-Za-z]+", method):
            raise ValueError(f"method: expected a name such as GET, got {method!r}")
        self.plan = plan
        self.control = _Control()
        self._kind = kind
        self._client = client
        self._method = method
        self._url = str(url)  # an httpx.URL will do, too
        self._request = _check_request(request)
        if client is None:  # one may have a base_url, and take a path
            _split_url("url", self._url)

    def open(self) -> Any:
        """Return a context manager for the client; it closes only one made here."""
        if self._client is not None:
            return nullcontext(self._client)
        try:
            # A redirect may lead to an https URL.
            return _new_client(self._kind, may_need_tls=True)
        except APIConnectionError as error:
            raise SSEError(str(error)) from error.__cause__

    def build(self, client: Any) -> Any:
        """Return the request of the next attempt."""
        return client.build_request(
            self._method, self._url, headers=self.plan.headers(), **self._request
        )


_MAX_REDIRECTS = 20


def _follow(client: Any, request: Any, control: _Control) -> Any:
    """Return the response to a request, at the end of its redirects."""
    options: Json = {}
    for _ in range(_MAX_REDIRECTS + 1):
        response = client.send(request, stream=True, follow_redirects=False, **options)
        control.begin(response)
        following = _redirect_request(request, response)
        if following is None or control.is_closed:
            return response
        response.close()
        if not _same_origin(request, following):
            options = {"auth": None}  # send() would add the client's login again
        request = following
    raise SSEError(f"more than {_MAX_REDIRECTS} redirects")


async def _afollow(client: Any, request: Any, control: _Control) -> Any:
    """Async twin of `_follow`."""
    options: Json = {}
    for _ in range(_MAX_REDIRECTS + 1):
        response = await client.send(
            request, stream=True, follow_redirects=False, **options
        )
        control.begin(response)
        following = _redirect_request(request, response)
        if following is None or control.is_closed:
            return response
        await response.aclose()
        if not _same_origin(request, following):
            options = {"auth": None}  # send() would add the client's login again
        request = following
    raise SSEError(f"more than {_MAX_REDIRECTS} redirects")


def _listen(listener: _Listener) -> Generator[ServerSentEvent]:
    """Yield the events of one connection after the other."""
    plan, control = listener.plan, listener.control
    with listener.open() as client:
        while True:
            if plan.must_wait:
                control.wait(plan.wait())
                plan.end_wait()
            if control.is_closed:
                return
            request = listener.build(client)
            fault: Exception | None = None
            try:
                with closing(_follow(client, request, control)) as response:
                    source = plan.begin(response)
                    if source is None or control.is_closed:
                        return
                    for event in source:
                        if control.is_closed:  # by another thread, during the read
                            return
                        plan.had_event()
                        yield event
            except Exception as error:
                fault = error
            if not control.is_closed:
                plan.end(fault)


async def _anext_event(events: Any, control: _Control) -> ServerSentEvent | None:
    """Return the next event, None at the end of the body or when closed."""
    with control.interruptible():
        return await anext(events, None)
    return None  # the wait was interrupted


async def _alisten(listener: _Listener) -> AsyncGenerator[ServerSentEvent]:
    """Async twin of `_listen`."""
    import anyio

    plan, control = listener.plan, listener.control
    async with listener.open() as client:
        while True:
            if plan.must_wait:
                with control.interruptible():
                    await anyio.sleep(plan.wait())
                plan.end_wait()
            if control.is_closed:
                return
            request = listener.build(client)
            fault: Exception | None = None
            try:
                response: Any = None
                with control.interruptible():
                    response = await _afollow(client, request, control)
                if response is None:  # closed meanwhile
                    return
                async with aclosing(response):
                    source = plan.begin(response)
                    # An interrupt is lost where the wait ends at the same moment.
                    if source is None or control.is_closed:
                        return
                    events = aiter(source)
                    while event := await _anext_event(events, control):
                        if control.is_closed:
                            return
                        plan.had_event()
                        yield event
            except Exception as error:
                fault = error
            if not control.is_closed:
                plan.end(fault)


class _EventsMixin:
    """What EventStream and AsyncEventStream have in common."""

    _listener: _Listener
    # Set where Ctrl-C or a cancelled task has ended the generator; the stream goes on.
    _is_interrupted = False

    @property
    def last_event_id(self) -> str:
        """The id to give back to `listen` when the program starts again."""
        return self._listener.plan.last_event_id

    def _note_interruption(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            self._is_interrupted = True
            self._listener.plan.end(None)  # as after any connection, it waits


class EventStream(_EventsMixin, _SyncStream[ServerSentEvent]):
    """The events of a URL over any number of connections; see `listen`.

    Where Ctrl-C or the cancelling of a task ended a wait for an event, the connection
    is closed, and the next wait connects again.
    """

    def __init__(self, listener: _Listener) -> None:
        self._listener = listener
        self._set_source(_listen(listener), listener.control)

    def __next__(self) -> ServerSentEvent:
        if self._is_interrupted:
            self._is_interrupted = False
            self._items.close()
            self._set_source(_listen(self._listener), self._control)
        try:
            return super().__next__()
        except BaseException as error:
            self._note_interruption(error)
            raise


class AsyncEventStream(_EventsMixin, _AsyncStream[ServerSentEvent]):
    """Async twin of `EventStream`, for asyncio and trio."""

    def __init__(self, listener: _Listener) -> None:
        self._listener = listener
        self._set_source(_alisten(listener), listener.control)

    async def __anext__(self) -> ServerSentEvent:
        if self._is_interrupted:
            self._is_interrupted = False
            await self._items.aclose()
            self._set_source(_alisten(self._listener), self._control)
        try:
            return await super().__anext__()
        except BaseException as error:
            self._note_interruption(error)
            raise


def listen(
    url: str,
    *,
    method: str = "GET",
    client: Client | None = None,
    headers: Mapping[str, str] | None = None,
    last_event_id: str = "",
    retry: float = 3.0,
    max_retry: float = 30.0,
    timeout: float | Timeout | None = DEFAULT_TIMEOUT,
    max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
    on_error: Callable[[Exception], Any] | None = None,
    **request: Any,
) -> EventStream:
    """Return the events of a URL as a stream, which connects again when it breaks.

    method, headers, client: of the request; a client that is given is not closed.
    last_event_id: the id of the last event that was handled, so that the server goes on
        after it. Store the stream's `.last_event_id` to have it after a restart.
    retry: seconds until it connects again, unless the server says otherwise. In a row
        of failures they are doubled, less up to half by chance, up to `max_retry`; the
        first event ends the row.
    timeout: seconds without a byte after which a connection counts as broken, or an
        httpx.Timeout; None is no limit.
    max_event_bytes: the limit of one event, None is no limit.
    on_error: called with each fault before the wait; it may raise to end the stream.
    request: params, json, data, content, files, cookies, extensions: as httpx takes
        them, for servers that are asked by POST. They are sent anew each time.

    The stream ends where the server answers 204, and when it is closed. It raises
    SSEError for other statuses below 500 except 408 and 429, for another content type
    and for an event over the limit. It goes on after network errors, the end of a body,
    silence, 408, 429 and 5xx. Redirects are followed, without secret headers to another
    origin. Closing the stream wakes a thread that waits: between two attempts, and in a
    body over HTTP/1, at once; otherwise with the next bytes or at the timeout.
    """
    plan = _Reconnection(
        headers, last_event_id, retry, max_retry, max_event_bytes, on_error
    )
    request["timeout"] = _check_timeout(timeout)
    return EventStream(_Listener("Client", client, method, url, plan, request))


def alisten(
    url: str,
    *,
    method: str = "GET",
    client: AsyncClient | None = None,
    headers: Mapping[str, str] | None = None,
    last_event_id: str = "",
    retry: float = 3.0,
    max_retry: float = 30.0,
    timeout: float | Timeout | None = DEFAULT_TIMEOUT,
    max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
    on_error: Callable[[Exception], Any] | None = None,
    **request: Any,
) -> AsyncEventStream:
    """Async twin of `listen`; closing it wakes a task that waits, wherever it is."""
    plan = _Reconnection(
        headers, last_event_id, retry, max_retry, max_event_bytes, on_error
    )
    request["timeout"] = _check_timeout(timeout)
    listener = _Listener("AsyncClient", client, method, url, plan, request)
    return AsyncEventStream(listener)


# ---- The ways to ask -----------------------------------------------------------------


def stream_chat(messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream:
    """Ask a model and return its answer as a stream: iterate over it.

    messages: a str is a user's message; else a list of dicts, and messages of answers.
    model: its name. Default: OPENAI_MODEL; some servers need none.
    base_url: default OPENAI_BASE_URL, else Ollama on this machine. It may be `…/v1`, a
        bare host, a deployment with a query, or the whole `…/chat/completions`.
    api_key: default OPENAI_API_KEY; without it no key is sent.
    system: the text of a system message, put before the others.
    timeout: seconds between two reads (to connect at most 5), or an httpx.Timeout;
        None is no limit. Default 600.
    first_token_timeout: seconds until the first token, however much else arrives. Sync
        code checks this limit only after the headers if the server sends those byte by
        byte, and only between two reads over HTTP/2, with custom transports, and
        without threads.
    max_retries: how often to ask again after a failed connection, and after the
        statuses 408, 409, 429 and 5xx: after 0.5 s doubling to 8 s, or `Retry-After`.
        Default 2. Besides, where a connection that was kept turns out to be dead, the
        request is sent again once, at once.
    max_event_bytes: the limit of one event, or of an answer as JSON. Default 16 MiB.
    headers: sent besides ours, or in their place (Azure: `{"api-key": …}`).
    client: your own httpx.Client, or httpx2's; it is used, and not closed.
    extra_body: more fields of the request; they win over keywords.

    The other keywords are fields of the request; None leaves one out. Those that type
    checkers know: temperature, top_p, seed, max_tokens, max_completion_tokens, stop, n
    (Ollama ignores it: an answer with fewer choices is whole if it ends with [DONE] or
    comes as JSON), frequency_penalty, presence_penalty, logit_bias, reasoning_effort,
    verbosity, tools, tool_choice, parallel_tool_calls, response_format, logprobs,
    top_logprobs, modalities, audio, prediction, stream_options, web_search_options,
    metadata, service_tier, store, user.

    Raises ValueError or TypeError for options that cannot be used; the stream raises
    APIError.
    """
    source = _ClientSource("Client", options.get("client"))
    return ChatStream(_chat_request(messages, dict(options), source, is_stream=True))


def astream_chat(messages: Messages, **options: Unpack[ChatOptions]) -> AsyncChatStream:
    """Async twin of `stream_chat`: `async for chunk in astream_chat("hi")`."""
    source = _ClientSource("AsyncClient", options.get("client"))
    return AsyncChatStream(
        _chat_request(messages, dict(options), source, is_stream=True)
    )


def _generate(request: _Request) -> ChatCompletion:
    with ChatStream(request) as stream:
        for _ in stream:
            pass
        return stream._completion_with_headers()


async def _agenerate(request: _Request) -> ChatCompletion:
    async with AsyncChatStream(request) as stream:
        async for _ in stream:
            pass
        return stream._completion_with_headers()


def generate(messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
    """Ask as `stream_chat` does, and return the whole answer. Raises APIError."""
    source = _ClientSource("Client", options.get("client"))
    return _generate(_chat_request(messages, dict(options), source, is_stream=False))


async def agenerate(
    messages: Messages, **options: Unpack[ChatOptions]
) -> ChatCompletion:
    """Async twin of `generate`."""
    source = _ClientSource("AsyncClient", options.get("client"))
    request = _chat_request(messages, dict(options), source, is_stream=False)
    return await _agenerate(request)


def _models(request: _Request) -> list[str]:
    reader = _ModelsReader(request.expected, _Control())
    with closing(_stream_answer(request, reader)) as items:
        names: list[str] = next(items)  # the only item
        return names


async def _amodels(request: _Request) -> list[str]:
    reader = _ModelsReader(request.expected, _Control())
    async with aclosing(_astream_answer(request, reader)) as items:
        names: list[str] = await anext(items)  # the only item
        return names


def models(**options: Unpack[ChatOptions]) -> list[str]:
    """Return the names of the models that a server lists. Raises APIError.

    It takes the options of `stream_chat`; those of the request's fields do nothing. The
    limit for the whole list is 30 seconds, or `first_token_timeout`.
    """
    source = _ClientSource("Client", options.get("client"))
    return _models(_models_request(dict(options), source))


async def amodels(**options: Unpack[ChatOptions]) -> list[str]:
    """Async twin of `models`."""
    source = _ClientSource("AsyncClient", options.get("client"))
    return await _amodels(_models_request(dict(options), source))


class _Client:
    """The parts of both clients: a pool of connections, and options."""

    def __init__(self, kind: str, options: Json) -> None:
        self._source = _ClientSource(kind, options.get("client"), is_kept=True)
        self._options = options
        # This request is never sent. It raises here if an option cannot be used.
        request = _chat_request("", self._options, self._source, is_stream=True)
        self._source.make_kept(request)

    def _merged_with(self, options: Any) -> Json:
        """Return the options of the client, overridden by those of a call."""
        for name in ("base_url", "api_key", "client"):
            if name in options:
                raise TypeError(f"{name} is an option of the client, not of a call")
        merged = {**self._options, **options}
        for name in ("headers", "extra_body"):
            merged[name] = _mapping(self._options, name) | _mapping(options, name)
        return merged

    def _new_chat_request(
        self, messages: Messages, options: Any, is_stream: bool
    ) -> _Request:
        merged = self._merged_with(options)
        return _chat_request(messages, merged, self._source, is_stream)

    def _new_models_request(self, options: Any) -> _Request:
        return _models_request(self._merged_with(options), self._source)


class ChatClient(_Client, AbstractContextManager["ChatClient"]):
    """`stream_chat` and `generate` over one pool of connections; a context manager.

    Its options hold for every call that does not give its own; `base_url`, `api_key`
    and `client` are the client's alone. Any number of threads may use it at once, and a
    forked process opens connections of its own. Once closed, it refuses every call.
    """

    def __init__(self, **options: Unpack[ChatOptions]) -> None:
        super().__init__("Client", dict(options))

    def stream(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream:
        """Do as `stream_chat` does, over the client's connections."""
        return ChatStream(self._new_chat_request(messages, options, is_stream=True))

    def generate(
        self, messages: Messages, **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Do as `generate` does, over the client's connections."""
        return _generate(self._new_chat_request(messages, options, is_stream=False))

    def models(self, **options: Unpack[ChatOptions]) -> list[str]:
        """Do as `models` does, over the client's connections."""
        return _models(self._new_models_request(options))

    def close(self) -> None:
        """Close the connections."""
        for client in self._source.begin_close():
            client.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncChatClient(_Client, AbstractAsyncContextManager["AsyncChatClient"]):
    """Async twin of `ChatClient`; an event loop after the first has its own pool.

    A client that was closed in one loop is closed in all.
    """

    def __init__(self, **options: Unpack[ChatOptions]) -> None:
        super().__init__("AsyncClient", dict(options))

    def stream(
        self, messages: Messages, **options: Unpack[ChatOptions]
    ) -> AsyncChatStream:
        """Do as `astream_chat` does, over the client's connections."""
        return AsyncChatStream(
            self._new_chat_request(messages, options, is_stream=True)
        )

    async def generate(
        self, messages: Messages, **options: Unpack[ChatOptions]
    ) -> ChatCompletion:
        """Do as `agenerate` does, over the client's connections."""
        return await _agenerate(
            self._new_chat_request(messages, options, is_stream=False)
        )

    async def models(self, **options: Unpack[ChatOptions]) -> list[str]:
        """Do as `amodels` does, over the client's connections."""
        return await _amodels(self._new_models_request(options))

    async def aclose(self) -> None:
        """Close the connections."""
        for client in self._source.begin_close(_current_loop()):
            await client.aclose()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


# ---- Demo server ---------------------------------------------------------------------
#
# The wire format of a real server without a model: to try the program, and for tests.


def _demo_tokens(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+", text)


def _demo_text(prompt: str, stop: str | list[str] | None) -> list[Json]:
    """Return the deltas of the reasoning, then of the answer, one a token."""
    thoughts = f"The prompt has {len(prompt)} characters."
    answer = (
        f"You wrote: {prompt[:200]}\n\n"
        "No model has read it: this is the demo server."
        " For a real answer start another, such as `ollama serve`."
    )
    for word in [stop] if isinstance(stop, str) else stop or ():
        answer = answer.partition(word)[0]
    deltas = [{"content": "", "reasoning": token} for token in _demo_tokens(thoughts)]
    return deltas + [{"content": token} for token in _demo_tokens(answer)]


def _demo_tool(request: Json) -> Json | None:
    """Return the function that `tool_choice` demands, None if it demands none."""
    choice = request.get("tool_choice")
    functions: list[Json] = [tool["function"] for tool in request.get("tools") or ()]
    if choice == "required":
        return functions[0]
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        return next(each for each in functions if each["name"] == name)
    return None


def _demo_call(function: Json, call_id: str) -> list[Json]:
    """Return the deltas of a call, one a token, with arguments for its schema."""
    schema = function.get("parameters") or {}
    values = {"string": "demo", "integer": 1, "number": 1, "boolean": True, "array": []}
    arguments = {
        name: values.get(str(schema["properties"][name].get("type")))
        for name in schema.get("required") or ()
    }
    call = {"id": call_id, "type": "function", "function": {"name": function["name"]}}
    pieces: list[Json] = [call]
    for token in _demo_tokens(json.dumps(arguments)):
        pieces.append({"function": {"arguments": token}})
    return [{"tool_calls": [{"index": 0, **piece}]} for piece in pieces]


def _demo_completion(request: Json, number: int) -> Json | list[Json]:
    """Return the answer to a request, in one piece or as chunks."""
    # from_dict joins content that comes in parts.
    message = ChatCompletionMessage.from_dict(request["messages"][-1])
    prompt = message.content or ""
    function = _demo_tool(request)
    if function is None:
        deltas, finish = _demo_text(prompt, request.get("stop")), "stop"
    else:
        deltas, finish = _demo_call(function, f"call_{number}"), "tool_calls"
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    if limit and limit < len(deltas):
        deltas, finish = deltas[:limit], "length"
    n = request.get("n") or 1
    usage = {
        "prompt_tokens": len(prompt.split()),
        "completion_tokens": n * len(deltas),
    }
    usage["total_tokens"] = sum(usage.values())
    head = {
        "id": f"chatcmpl-demo-{number}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": "demo",
    }
    chunks: list[Json] = []
    for delta in ({"role": "assistant"}, *deltas, {}):
        reason = None if delta else finish
        for index in range(n):
            choice = {"index": index, "delta": delta, "finish_reason": reason}
            chunks.append({**head, "choices": [choice]})
    last = {**head, "choices": [], "usage": usage}
    if not request.get("stream"):
        return accumulate(map(ChatCompletionChunk.from_dict, [*chunks, last])).to_dict()
    options = request.get("stream_options") or {}
    return [*chunks, last] if options.get("include_usage") else chunks


def _demo_answer(
    path: str, body: bytes, is_allowed: bool, number: int
) -> tuple[int, Json | list[Json]]:
    """Return a status and its body: JSON, or the chunks of a stream."""
    if not is_allowed:
        status, problem = 401, "no API key, or a wrong one"
    elif path.endswith("/models"):
        return 200, {"object": "list", "data": [{"id": "demo", "object": "model"}]}
    elif path.endswith("/chat/completions"):
        try:
            return 200, _demo_completion(json.loads(body), number)
        except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as e:
            status, problem = 400, f"this is not a chat request: {e!r}"
    else:
        status, problem = 404, f"there is no {path}"
    return status, {"error": {"message": problem, "type": "invalid_request_error"}}


@contextmanager
def demo_server(delay: float = 0.0, api_key: str | None = None) -> Iterator[str]:
    """Serve the chat API on a loopback port, and give its base URL; also for tests.

    It answers about the prompt that it gets, with `delay` seconds before each token,
    and refuses requests without `api_key`, if one is given. It heeds `stream`, `n`,
    `stop`, `stream_options`, `max_tokens` and `max_completion_tokens` (reasoning counts
    in both), and `tool_choice`: "required" calls the first of `tools`, a named function
    calls that one.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    numbers = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.partition("?")[0]
            key = self.headers["authorization"]
            is_allowed = not api_key or key == f"Bearer {api_key}"
            status, answer = _demo_answer(path, body, is_allowed, next(numbers))
            kind, pieces = "application/json", [json.dumps(answer).encode()]
            if isinstance(answer, list):
                kind, data = "text/event-stream", [*map(json.dumps, answer), "[DONE]"]
                pieces = [ServerSentEvent(data=each).encode() for each in data]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")  # so that none outlives the server
            self.end_headers()
            for piece in pieces:
                time.sleep(delay)
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


# ---- Command line --------------------------------------------------------------------

_DESCRIPTION = """\
Ask a model at an OpenAI-compatible server. Without a prompt this is a conversation.

Standard input that is not a terminal goes before the prompt, or in place of a - in it.
In a loop over lines write `</dev/null`, or the first prompt reads them all.

exit codes: 0 whole; 1 an error of the server, the network or a file; 2 wrong usage;
3 printed, but not whole (cut off, at a limit, filtered, empty); 130 Ctrl-C;
141 the reader of the output has left

environment: OPENAI_BASE_URL, OPENAI_API_KEY (no option takes the key: all users of a
machine see options), OPENAI_MODEL, OLLAMA_HOST (no key goes there), NO_COLOR"""

_EXAMPLES = """\
options of a call, beside the fields of the request:
  -o temperature=0  -o timeout=5  -o max_retries=0  -o headers='{"x": "y"}'

a conversation that goes on where the answer was cut off:
  sse_chat -c s.json "a story"; [ $? -eq 3 ] && sse_chat -c s.json "go on"
"""


def _utf8(word: str) -> str:
    """Return an argument as text, in a locale without UTF-8, too."""
    try:
        word.encode()
        return word
    except UnicodeEncodeError:  # bytes that Python could not decode (PEP 383)
        return os.fsencode(word).decode()


_utf8.__name__ = "UTF-8"  # argparse then says: invalid UTF-8 value


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    flag = functools.partial(add, action="store_true")
    add("prompt", nargs="*", type=_utf8, help="the question; - is standard input")
    about = "a file of JSON messages to go on with; it keeps each answer"
    add("-c", "--conversation", metavar="FILE", help=about)
    about = "default: OPENAI_MODEL, else the first the server lists"
    add("-m", "--model", type=_utf8, help=about)
    add("-s", "--system", type=_utf8, metavar="TEXT", help="a system message")
    about = "default: OPENAI_BASE_URL, else OLLAMA_HOST, else Ollama on this machine"
    add("-u", "--base-url", metavar="URL", help=about)
    about = "goes into the request; VALUE as JSON, else as text; repeatable"
    repeat: Json = {"action": "append", "default": [], "type": _utf8}
    add("-o", "--option", metavar="KEY=VALUE", help=about, **repeat)
    flag("--json", help="print the server's chunks, one a line")
    flag("--no-stream", help="ask for the answer in one piece")
    flag("--usage", help="tell model, tokens and times on standard error")
    flag("--hide-reasoning", help="do not show it on standard error")
    about = "the longest silence of the server in seconds, default 600"
    add("--timeout", type=float, default=DEFAULT_TIMEOUT, help=about)
    flag("--list-models", help="print the server's models")
    about = "print a curl command in place of asking; with -m it needs no server"
    flag("--dry-run", help=about)
    flag("--demo", help="ask a demo server inside this program")
    add("--version", action="version", version=f"sse_chat {__version__}")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; the prompt is all that is no option, or follows --."""
    options = list(itertools.takewhile("--".__ne__, argv))
    args = _parser().parse_intermixed_args(options)
    args.prompt += map(_utf8, argv[len(options) + 1 :])
    return args


_CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and bidi characters escaped."""
    text = text.replace("\r\n", "\n")
    return re.sub(_CONTROLS, lambda found: ascii(found[0])[1:-1], text)


def _leave_to_null_device(stream: Any) -> None:
    """Have the rest of a broken output go nowhere, also what Python writes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Screen:
    """Writes answers, thinking and notes, so that no two of them share a line.

    Answers go to standard output, the rest to standard error; on a terminal both are
    the same screen. Into a pipe an answer goes as it came, and its last line is ended.
    """

    def __init__(self) -> None:
        self.in_answer = False  # the cursor is in a line of the answer
        self.in_thinking = False  # the cursor is in a line of the thinking
        self.has_dots = False  # "..." is shown, to be overwritten

    def answer(self, text: str) -> None:
        """Write a piece of an answer."""
        if not text:
            return
        self.end_thinking()
        if sys.stdout.isatty():
            text = _printable(text)
        self.in_answer = not text.endswith("\n")
        print(text, end="", flush=True)

    def think(self, text: str) -> None:
        """Write a piece of a model's thinking, dim on a terminal."""
        if not text:
            return
        if not self.in_thinking:
            self.begin_error_line()
        self.in_thinking = not text.endswith("\n")
        if sys.stderr.isatty():
            text = _printable(text)
            if not os.environ.get("NO_COLOR"):
                text = f"\x1b[2m{text}\x1b[0m"
        self.write_error(text)

    def note(self, text: str) -> None:
        """Write what the program itself has to say, as lines of their own."""
        self.begin_error_line()
        self.write_error(f"sse_chat: {_printable(text)}\n")

    def wait(self) -> None:
        """Show dots on a terminal until something else is written."""
        if sys.stderr.isatty():
            self.write_error("...\r")
            self.has_dots = True

    def write_error(self, text: str) -> None:
        """Write to standard error. Where that fails, the answer still goes on."""
        try:
            print(text, end="", file=sys.stderr, flush=True)
        except OSError:
            _leave_to_null_device(sys.stderr)

    def end_lines(self) -> None:
        """End the line of an answer and that of its thinking."""
        self.end_thinking()
        self.end_answer()

    def begin_error_line(self) -> None:
        self.end_thinking()
        if sys.stdout.isatty() and sys.stderr.isatty():
            self.end_answer()

    def end_thinking(self) -> None:
        """Remove the dots, and end the line of the thinking."""
        if self.has_dots:
            self.has_dots = False
            self.write_error("   \r")
        if self.in_thinking:
            self.in_thinking = False
            self.write_error("\n")

    def end_answer(self) -> None:
        if self.in_answer:
            self.in_answer = False
            print(flush=True)


class _FileError(Exception):
    """The file of a conversation cannot be read or written."""


class _Conversation:
    """Messages, and the file that keeps them if it has a name."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.messages: list[Json] = []
        self.data = b""  # what the file held when we last read or wrote it
        if name:
            self.data = self.read()
            self.messages = self.parse(self.data)

    def read(self) -> bytes:
        """Return what the file holds, b"" where there is none."""
        path = os.path.realpath(self.name)
        try:
            if os.path.isfile(path):
                with open(path, "r+b") as file:  # it has to be writable, too
                    return file.read()
        except OSError as error:
            raise _FileError(f"{self.name}: {error.strerror}") from None
        if os.path.exists(path):
            raise _FileError(f"{self.name} is not a regular file")
        if not os.path.isdir(os.path.dirname(path)):
            raise _FileError(f"{self.name} is in a directory that does not exist")
        return b""

    def parse(self, data: bytes) -> list[Json]:
        """Return the messages in `data`, if they can be sent."""
        try:
            messages = json.loads(data.strip() or b"[]")
            json.dumps(messages, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise _FileError(f"{self.name} is not JSON: {error}") from None
        if _dicts(messages) != messages or not all(m.get("role") for m in messages):
            raise _FileError(f"{self.name} is not a list of messages")
        return _dicts(messages)

    def save(self) -> None:
        """Write the messages to the file, unless another program has changed it.

        The new file is written beside the old one, then renamed, so the file is never
        half written. Making it fails if it exists: that is the lock against other
        programs.
        """
        if not self.name:
            return
        text = json.dumps(self.messages, ensure_ascii=False, indent=1)
        data = f"{text}\n".encode("utf-8", "replace")
        path = os.path.realpath(self.name)
        new = f"{path}.new"
        try:
            open(new, "xb").close()
            try:
                if self.read() != self.data:
                    raise _FileError(f"{self.name} is not saved: it has changed")
                with suppress(FileNotFoundError):
                    os.chmod(new, os.stat(path).st_mode & 0o7777)
                with open(new, "wb") as file:
                    file.write(data)
                os.replace(new, path)
            except BaseException:
                os.unlink(new)
                raise
        except FileExistsError:
            problem = f"{new} exists: is another program writing it? If not, remove it"
            raise _FileError(f"{self.name} is not saved: {problem}") from None
        except OSError as error:
            raise _FileError(f"{self.name} is not saved: {error.strerror}") from None
        self.data = data

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def set_system(self, text: str) -> None:
        """Put a system message in the place of the one before, "" for none."""
        first = [{"role": "system", "content": text}] if text else []
        self.messages = first + [m for m in self.messages if m["role"] != "system"]


_INSTEAD_OF_OPTION = {
    "api_key": "set OPENAI_API_KEY",
    "base_url": "write -u URL",
    "client": "the program makes its own",
    "messages": "write -c FILE to go on with messages",
    "model": "write -m NAME",
    "stream": "write --no-stream",
    "system": "write -s TEXT",
}


def _option(text: str) -> tuple[str, Any]:
    """Return name and value of `-o name=value`. Raises ValueError."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError("-o wants KEY=VALUE")
    if name in _INSTEAD_OF_OPTION:
        raise ValueError(f"-o cannot set {name}: {_INSTEAD_OF_OPTION[name]}")
    parsed: Any = value
    with suppress(ValueError, RecursionError):
        parsed = json.loads(value)
    if name == "headers":  # _check_headers has other words, for programs
        values = parsed.values() if isinstance(parsed, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise ValueError('-o headers wants an object of texts: \'{"x": "y"}\'')
    return name, parsed


def _standard_input() -> str:
    """Return standard input as text, without a BOM, and empty lines around it.

    Raises ValueError if it is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None
    return text.replace("\r\n", "\n").strip("\n")


def _prompt(words: list[str]) -> str:
    """Return words and standard input as one text, "" for a conversation."""
    if "-" not in words and not sys.stdin.isatty():
        words = ["-", *words]
    parts: list[str] = []
    for is_dash, group in itertools.groupby(words, "-".__eq__):
        parts.append(_standard_input() if is_dash else " ".join(group))
    text = "\n\n".join(filter(None, parts))
    if words and not text.strip():
        raise ValueError("no prompt, neither as words nor on standard input")
    return text


def _drop_cut_calls(completion: ChatCompletion, is_whole: bool) -> None:
    """Drop the tool calls of each choice in which one may be cut off.

    That is one without a finish_reason, unless the answer is whole; and at a limit.
    """
    for choice in completion.choices:
        has_ended = is_whole or choice.finish_reason is not None
        if not has_ended or _reason_limit(choice.finish_reason):
            choice.message.tool_calls = None


def _call_line(call: Json) -> str:
    """Return a tool call as a line of JSON."""
    function = call.get("custom") or call.get("function") or {}
    arguments: Any = function.get("arguments", function.get("input"))
    with suppress(ValueError, TypeError, RecursionError):
        arguments = json.loads(arguments)
    line = {"name": function.get("name"), "arguments": arguments}
    text: str = _repair_surrogates(json.dumps(line, ensure_ascii=False))
    return f"{text}\n"


def _refusal(part: ChatCompletionChunk | ChatCompletion) -> str:
    """Return the refusal in the first answer."""
    return "".join(message.refusal or "" for message in part._first())


def _spent(usage: CompletionUsage | None, times: list[float]) -> str:
    """Tell tokens and times, as far as they are known and mean something.

    `times` has the time of the question, of each piece of text, and of the end.
    """
    start, *arrivals, end = times
    spent = f"all after {end - start:.2f} s"
    generating = 0.0
    if arrivals:
        spent = f"first token after {arrivals[0] - start:.2f} s, {spent}"
        generating = arrivals[-1] - arrivals[0]
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else ()
    if not counts or any(type(n) is not int or not 0 <= n < 10**9 for n in counts):
        return spent
    if counts[1] > 1 and generating > 0.05:  # less is the time of a few reads
        spent += f", {(counts[1] - 1) / generating:.1f} tokens/s"
    return f"{counts[0]} + {counts[1]} tokens, {spent}"


def _shell_text(text: str, name: str = "") -> str:
    """Return text as it stands in double quotes; a secret becomes a variable."""
    if text == f"Bearer {os.environ.get('OPENAI_API_KEY', '').strip()}":
        return "Bearer $OPENAI_API_KEY"
    if _Secrets.is_secret_name(name):
        variable = re.sub(r"\W|^(?=\d)", "_", name.upper())
        return f"${{{variable}}}"
    return re.sub(r'([$`"\\])', r"\\\1", text)


def _curl(request: Any) -> str:
    """Return a shell command that sends a request; secrets are variables in it."""
    url, mark, query = str(request.url).partition("?")
    fields = []
    for pair in query.split("&"):
        name, equals, value = pair.partition("=")
        fields.append(f"{_shell_text(name)}{equals}{_shell_text(value, name)}")
    url = _shell_text(url) + mark + "&".join(fields)
    lines = ["curl -gN"]  # -g: brackets and braces in a URL are no patterns
    for name, value in request.headers.items():
        if name not in ("connection", "content-length", "host"):  # which curl makes
            # curl's way to send a header without a value ends in a semicolon.
            header = f"{name}: {_shell_text(value, name)}" if value else f"{name};"
            lines.append(f'-H "{header}"')
    lines.append(f"-d @- \"{url}\" <<'END'")
    return " \\\n  ".join(lines) + f"\n{request.content.decode()}\nEND\n"


def _prepare_readline() -> None:
    """Let `input` edit lines, have a history and take a pasted text as one line."""
    with suppress(ImportError):
        import readline

        # Python's readline module turns bracketed paste off.
        if os.environ.get("TERM") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")


def _read_line() -> tuple[str, str]:
    """Read a command and its argument, or "" and a question."""
    text = input(">>> ").rstrip()
    is_open = text.startswith('"""') and text.count('"""') < 2
    if "\n" in text and not is_open:  # a pasted text is one question as it is
        return "", text.strip("\n")
    if text.startswith("/"):
        command, _, argument = text.partition(" ")
        return command, argument.strip()
    if is_open or (text.startswith('"""') and text.endswith('"""')):
        while text.count('"""') < 2:
            text += "\n" + input("... ")
        text = text[3:].rstrip().removesuffix('"""')
    return "", text.strip()


_COMMANDS = '''\
/clear         forget the conversation    /file FILE  keep it there from now on,
/system TEXT   set the system message                 and go on with what is there
/model NAME    ask another; alone: list   /bye        leave, as Ctrl-D does
"""            begins and ends a text of several lines; a pasted text is one question
Ctrl-C         stops an answer'''

_LIMITS = {"length": "the token limit", "content_filter": "a content filter"}


class _Program:
    """Asks, shows and keeps answers, and obeys the commands between them."""

    def __init__(
        self, args: argparse.Namespace, client: ChatClient, screen: _Screen
    ) -> None:
        self.args = args
        self.client = client
        self.screen = screen
        self.model = args.model or os.environ.get("OPENAI_MODEL", "").strip()
        self.options = dict(map(_option, args.option))
        if args.conversation == "":
            raise ValueError("-c wants the name of a file")
        self.conversation = _Conversation(args.conversation or "")
        self.has_more_turns = args.conversation is not None
        if args.system is not None:
            self.conversation.set_system(args.system)
        # The state of the latest turn.
        self.answer_texts: list[str] = []  # the text that has arrived
        self.times: list[float] = []  # of the question, and of each piece of text
        self.exit_code = 0

    def run(self) -> int:
        """Do what the arguments say; return the exit code."""
        if self.args.list_models:
            for name in self.client.models():
                self.screen.answer(f"{name}\n")
            return 0
        prompt = _prompt(self.args.prompt)
        if self.args.dry_run and not prompt:
            raise ValueError("--dry-run wants a prompt")
        if not self.model:
            # Without a list: the server may need no name.
            with suppress(APIStatusError, APIResponseValidationError):
                self.model = next(iter(self.client.models()), "")
            if self.model and sys.stderr.isatty():
                self.screen.note(f"asking {self.model}")
        if self.args.dry_run:
            self.screen.answer(_curl(self.request(prompt)))
            return 0
        return self.turn(prompt) if prompt else self.converse()

    def request(self, prompt: str) -> Any:
        """Return the request of a prompt, caught on its way to the network.

        The client that catches it stays the program's: nothing is asked after this.
        """
        httpx = _load_httpx()
        caught: list[Any] = []

        def refuse(request: Any) -> Any:
            caught.append(request)
            return httpx.Response(400)

        transport = httpx.MockTransport(refuse)
        with (
            httpx.Client(transport=transport) as catcher,
            ChatClient(
                base_url=self.args.base_url, api_key=self.args.api_key, client=catcher
            ) as self.client,
            suppress(APIStatusError),
        ):
            self.ask(prompt)
        return caught[0]

    def turn(self, prompt: str) -> int:
        """Ask, show the answer as it comes and keep it; return the exit code."""
        self.answer_texts, self.times, self.exit_code = [], [time.monotonic()], 0
        self.screen.wait()
        try:
            completion = self.ask(prompt)
        except BaseException as error:
            is_kept = self.keep(prompt)
            self.screen.end_lines()
            if isinstance(error, APIError):
                _drop_cut_calls(error.completion, is_whole=False)
                self.show_rest(error.completion)
            is_partial = isinstance(error, (KeyboardInterrupt, TruncatedStreamError))
            if is_partial and not is_kept:
                self.tell_it_is_not_kept()
            if isinstance(error, TruncatedStreamError) and self.exit_code:
                self.screen.note(error.message)
                return self.exit_code  # of the file, which could not be written
            raise
        self.screen.end_lines()
        _drop_cut_calls(completion, is_whole=True)
        self.show_rest(completion)
        is_kept = self.keep(prompt, completion)
        if self.args.usage:
            self.times.append(time.monotonic())
            name = completion.model or self.model
            spent = _spent(completion.usage, self.times)
            self.screen.note(": ".join(filter(None, [name, spent])))
        if completion.limit:
            limit = _LIMITS[completion.limit]
            self.screen.note(f"the answer is not whole: it stopped at {limit}")
        elif not is_kept:
            self.screen.note("the answer is empty")
        if not is_kept:
            self.tell_it_is_not_kept()
        is_whole = is_kept and not completion.limit
        return self.exit_code or (0 if is_whole else 3)

    def tell_it_is_not_kept(self) -> None:
        if self.has_more_turns:
            self.screen.note("the question was not kept")

    def ask(self, prompt: str) -> ChatCompletion:
        """Ask, show what comes and return the whole. Raises APIError."""
        question = {"role": "user", "content": prompt}
        messages = [*self.conversation.messages, question]
        options: Json = {"model": self.model or None} | self.options
        if self.args.no_stream:
            try:
                completion = self.client.generate(messages, **options)
            except APIError as error:
                if error.completion.choices:
                    self.show([error.completion])
                raise
            self.show([completion])
            return completion
        if self.args.usage:
            options = {"stream_options": {"include_usage": True}} | options
        with self.client.stream(messages, **options) as stream:
            self.show(stream)
            return stream.completion

    def show(self, parts: Iterable[ChatCompletionChunk | ChatCompletion]) -> None:
        """Show an answer that comes in parts, and keep its text. Raises APIError."""
        errors: list[APIError] = []
        for is_thinking, text in split_thinking(self.texts(parts, errors)):
            if not is_thinking:
                self.answer_texts.append(text)
            self.show_text(text, is_thinking)
        if errors:
            raise errors[0]

    def texts(
        self,
        parts: Iterable[ChatCompletionChunk | ChatCompletion],
        errors: list[APIError],
    ) -> Iterator[str]:
        """Yield the text of each part. Shows its reasoning, or with --json its JSON.

        An APIError is put into `errors`, not raised: `split_thinking` would lose the
        text that it holds back. `show` raises it after that text.
        """
        joiner = _SurrogateJoiner()
        try:
            for part in parts:
                if part.text or part.reasoning:
                    self.times.append(time.monotonic())
                if self.args.json and part.raw:
                    self.screen.answer(json.dumps(part.raw) + "\n")
                self.show_text(_repair_surrogates(part.reasoning), True)
                yield joiner.join(part._first_text() + _refusal(part))
        except APIError as error:
            errors.append(error)
        yield joiner.join("", final=True)

    def show_text(self, text: str, is_thinking: bool) -> None:
        if self.args.json:
            return
        if not is_thinking:
            self.screen.answer(text)
        elif not self.args.hide_reasoning:
            self.screen.think(text)

    def show_rest(self, completion: ChatCompletion) -> None:
        """Show tool calls, and the other answers where there are several."""
        if self.args.json:
            return
        for choice in completion.choices:
            if choice.index > 0:
                text = choice.message.content or choice.message.refusal or ""
                self.screen.answer("---\n")
                for is_thinking, piece in split_thinking([text]):
                    self.show_text(piece, is_thinking)
                self.screen.end_lines()
            for call in _dicts(choice.message.to_dict().get("tool_calls")):
                self.screen.answer(_call_line(call))

    def keep(self, prompt: str, completion: ChatCompletion | None = None) -> bool:
        """Keep a turn if an answer has come; tell whether one has."""
        message: Json = {"role": "assistant", "content": "".join(self.answer_texts)}
        if completion and completion.choices[0].message.tool_calls:
            message = completion.choices[0].message.to_dict()
        elif not message["content"].strip():
            return False
        self.conversation.messages += [{"role": "user", "content": prompt}, message]
        try:
            self.conversation.save()
        except _FileError as error:
            self.screen.note(str(error))
            self.exit_code = 1
        return True

    def converse(self) -> int:
        """Ask what is typed, until the end of standard input."""
        _prepare_readline()
        self.has_more_turns = True
        self.screen.answer("/? for help, Ctrl-D to leave\n")
        while True:
            try:
                command, text = _read_line()
                if command:
                    self.screen.answer(self.obey(command, text) + "\n")
                elif text:
                    with suppress(KeyboardInterrupt):  # which stops the answer alone
                        self.turn(text)
            except EOFError:
                self.screen.answer("\n")
                return 0
            except KeyboardInterrupt:
                self.screen.answer("\n/bye or Ctrl-D to leave\n")
            except (APIError, _FileError, ValueError, TypeError) as error:
                _complain(self.screen, error, self.args.base_url)

    def obey(self, command: str, text: str) -> str:
        """Carry out a command and return what to say then."""
        conversation = self.conversation
        match command:
            case "/bye" | "/exit" | "/quit":
                raise EOFError
            case "/?" | "/help":
                return _COMMANDS
            case "/model":
                if not text:
                    return "\n".join(self.client.models())
                self.model = text
                return f"asking {text}"
            case "/clear":
                conversation.clear()
                conversation.save()
                return "the conversation is forgotten"
            case "/system":
                conversation.set_system(text)
                conversation.save()
                return "the system message is set" if text else "no system message"
            case "/file":
                return self.open_file(text)
        raise ValueError(
            f'{command} is not a command: /? lists them, """ begins a text'
        )

    def open_file(self, name: str) -> str:
        """Go on with the conversation in a file; into an empty file, save this one."""
        if not name:
            raise ValueError("/file wants the name of a file")
        conversation = _Conversation(os.path.expanduser(name))
        if not conversation.messages:
            conversation.messages = self.conversation.messages
            conversation.save()
        self.conversation = conversation
        return f"{name} holds {len(conversation.messages)} messages"


def _find_server_and_key(given: str | None) -> tuple[str, str | None]:
    """Return where to ask: `given`, OPENAI_BASE_URL, OLLAMA_HOST, or the default.

    Beside the URL stands the key: None for that of OPENAI_API_KEY, "" for none. Ollama
    needs none, and OLLAMA_HOST may name a machine that nobody meant to show that key.
    """
    url = given or os.environ.get("OPENAI_BASE_URL", "").strip()
    host = os.environ.get("OLLAMA_HOST", "").strip(" \t\r\n\"'")
    if url or not host:
        return url or DEFAULT_BASE_URL, None
    # OLLAMA_HOST is scheme://host:port/path, any part of which may be missing.
    forms = r"(?s)\A(\w+://)?(\[.*\]|[^/:]*|[^/]*)(:\d+)?:?(/.*)?\Z"
    scheme, host, port, path = re.findall(forms, host)[0]
    if not (scheme or port):
        port = ":11434"
    if ":" in host and "[" not in host:
        host = f"[{host}]"
    # Ollama listens on 0.0.0.0 or [::], all addresses, to which no client can connect.
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{scheme or 'http://'}{host}{port}{path.rstrip('/')}/v1", ""


def _prepare_streams() -> None:
    """Replace what `<&-` and `2>&-` closed. Raises OSError without an output."""
    has_output = sys.stdout is not None
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if not has_output:
        raise OSError("standard output is closed")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What is no terminal has UTF-8, whatever characters the locale has.
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def _show_retries(screen: _Screen) -> None:
    """Have each retry shown, which the library logs before it waits."""
    import logging

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            screen.note(record.getMessage())
            screen.wait()

    logger = logging.getLogger("sse_chat")
    logger.setLevel(logging.INFO)
    logger.addHandler(Handler())


def _complain(screen: _Screen, error: Exception, url: str) -> int:
    """Tell what happened, then where and what to do; return the exit code."""
    if not isinstance(error, APIError):
        screen.note(str(error).replace("base_url", "--base-url"))
        return 1 if isinstance(error, (OSError, _FileError)) else 2
    if isinstance(error, TruncatedStreamError):
        screen.note(error.message)
        return 3
    where = f"at {_public_url(url)}"
    if error.status_code is not None:
        where = f"HTTP {error.status_code} {where}"
    advice = error.advice.replace("base_url", "--base-url")
    if error.status_code in (401, 403):
        advice = "is OPENAI_API_KEY set to the right key?"
        if os.environ.get("OLLAMA_HOST"):
            advice += " (none goes to OLLAMA_HOST: write -u URL)"
    elif type(error) is APIConnectionError and error.is_retryable:
        advice += "; --demo needs no server"
    screen.note(": ".join(filter(None, [f"{error.message}\n{where}", advice])))
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    screen, url = _Screen(), ""
    try:
        with ExitStack() as stack:
            _prepare_streams()
            stack.callback(sys.stdout.flush)
            args = _parse(sys.argv[1:] if argv is None else argv)
            url, args.api_key = _find_server_and_key(args.base_url)
            if args.demo:
                os.environ["no_proxy"] = "*"  # no proxy leads to this process
                url = stack.enter_context(demo_server(delay=0.02))
            args.base_url = url
            client = ChatClient(
                base_url=url, api_key=args.api_key, timeout=args.timeout
            )
            stack.enter_context(client)
            if sys.stderr.isatty():
                _show_retries(screen)
            return _Program(args, client, screen).run()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        _leave_to_null_device(sys.stdout)  # it is full or closed, as a rule
        if isinstance(error, BrokenPipeError):
            return 141  # the reader of our output has left: so do we, quietly
        return _complain(screen, error, url)
    except (APIError, _FileError, ValueError, TypeError, ModuleNotFoundError) as error:
        return _complain(screen, error, url)


if __name__ == "__main__":
    sys.exit(main())
