# /// script
# requires-python = ">=3.10"
# dependencies = ["httpx"]
# ///
# SPDX-License-Identifier: MIT
"""Stream chat completions from any OpenAI-compatible server: one file, on httpx alone.

    from sse_chat import stream_chat

    for text in stream_chat("Why is the sky blue?", model="llama3.2").text():
        print(text, end="", flush=True)

Bytes come in at the top of this file and answers leave at its bottom:

    bytes ─ SSELineDecoder ─▶ lines ─ SSEDecoder ─▶ ServerSentEvent
          ─ ChatCompletionChunk.from_dict ─▶ chunk ─ ChatAccumulator ─▶ ChatCompletion

Every decision (what a line is, what an event is, how an answer ended, whether to try
again) is made in code that does no I/O; sync and async code stand next to each other
and differ in keywords only. The promise of it all: a broken answer is never taken for
a whole one. An answer that stops early raises an `APIError`, and what had come is on
it, in `.completion`.

As a program: `python sse_chat.py "prompt"`, or `--demo` where no server is running.
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
import time
import typing
import zlib
from base64 import b64encode
from collections import defaultdict
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
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

# Start-up counts: httpx, and what only some uses need, is imported where those begin.
if TYPE_CHECKING:
    import argparse

    from httpx import AsyncClient, Client, Response, Timeout
else:  # for whoever reads the annotations at run time
    AsyncClient = Client = Response = Timeout = Any

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound="_Model")
A = TypeVar("A", bound="_CompletionBase")

Json = dict[str, Any]

# fmt: off
__all__ = [
    "CONNECT_TIMEOUT", "DEFAULT_BASE_URL", "DEFAULT_MAX_EVENT_BYTES", "DEFAULT_TIMEOUT",
    "MAX_CHOICES", "MAX_DEPTH", "MAX_RETRY_AFTER", "MODELS_TIMEOUT",
    "APIConnectionError", "APIError", "APIResponseValidationError", "APIStatusError",
    "APITimeoutError", "AsyncChatClient", "AsyncChatStream", "ChatAccumulator",
    "ChatClient", "ChatCompletion", "ChatCompletionChunk", "ChatCompletionMessage",
    "ChatCompletionMessageToolCall", "ChatCompletionTokenLogprob", "ChatStream",
    "ChoiceDelta", "ChoiceDeltaToolCall", "ChoiceDeltaToolCallFunction",
    "ChoiceLogprobs", "CompletionTokensDetails", "CompletionUsage", "EventSource",
    "Function", "Json", "Messages", "PromptTokensDetails", "SSEDecoder", "SSEError",
    "SSELineDecoder", "ServerSentEvent", "TopLogprob", "TruncatedStreamError",
    "accumulate", "aconnect_sse", "agenerate", "aiter_chunks", "aiter_lines",
    "aiter_sse", "amodels", "astream_chat", "connect_sse", "demo_server", "generate",
    "iter_chunks", "iter_lines", "iter_sse", "main", "models", "split_thinking",
    "stream_chat",
]
# fmt: on

__version__ = "0.2.0"

# The most bytes one event may have, or one JSON body: a whole answer with its log
# probabilities or an image fits; without any bound one endless line fills the memory.
DEFAULT_MAX_EVENT_BYTES = 16 * 1024 * 1024

# The most choices of an answer, and tool calls of a choice; and how deep JSON may be in
# what is merged as it came. Without them 1.5 MB of `{},{},…` take 800 MB.
MAX_CHOICES = 1024
MAX_DEPTH = 100

# ---- Server-sent events: HTML Living Standard, section 9.2 ---------------------------


class SSEError(Exception):
    """Not an event stream, or an event over the limit; `events` came before it."""

    def __init__(self, message: str, events: Sequence[ServerSentEvent] = ()) -> None:
        super().__init__(message)
        self.events = list(events)


@dataclass(frozen=True, init=False)
class ServerSentEvent:
    """One event: its type, its data, the last event id, `retry` in milliseconds."""

    event: str = "message"
    data: str = ""
    id: str = ""
    retry: int | None = None

    def __init__(
        self,
        event: str = "message",
        data: str = "",
        id: str = "",
        retry: int | None = None,
    ) -> None:
        # What dataclass makes for a frozen class takes twice the time, for each event.
        values = self.__dict__
        values["event"] = event
        values["data"] = data
        values["id"] = id
        values["retry"] = retry

    def json(self) -> Any:
        """Return the data parsed as JSON. Raises ValueError where it is none."""
        return json.loads(self.data)

    def encode(self) -> bytes:
        """Return the event as bytes of a stream: decoding them gives it back.

        An id of "" is not written, so a stream in which an id has come before keeps
        that one. To keep a connection alive between events, send `b": ping\\n\\n"`.
        Raises ValueError for what no stream can carry: a CR, a line end in a name or
        an id, a NUL in an id, half a surrogate pair.
        """
        if "\r" in self.data or re.search("[\r\n]", self.event + self.id):
            raise ValueError("no stream carries a CR, or a line end in a name or an id")
        if not self.event or "\0" in self.id or (self.retry or 0) < 0:
            raise ValueError("an empty name, a NUL in an id, or a retry under 0")
        event = "" if self.event == "message" else f"event: {self.event}\n"
        id = f"id: {self.id}\n" if self.id else ""
        retry = "" if self.retry is None else f"retry: {self.retry}\n"
        data = self.data.replace("\n", "\ndata: ")
        return f"{id}{event}{retry}data: {data}\n\n".encode()


_BOM = b"\xef\xbb\xbf"


_CR, _LF, _COLON = b"\r\n:"  # numbers, which `in` finds seven times as fast as bytes


class SSELineDecoder:
    """Bytes in any pieces in, whole lines out: CR, LF, CRLF and nothing else ends one.

    A line comes out as soon as its end is there. Work and memory are linear in the
    bytes received, however they are cut.
    """

    def __init__(self) -> None:
        self._pending = bytearray()  # the line that has no end yet
        self._after_cr = False  # a line ended at CR: an LF that follows is part of it
        self._at_start = True  # one BOM is dropped, and only here

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that `chunk` ends, without their ends."""
        # No UTF-8 sequence spans a line end, so each line can be decoded by itself.
        return [line.decode("utf-8", "replace") for line in self._split(chunk)]

    def _split(self, chunk: bytes) -> list[bytes]:
        if self._at_start:
            chunk = bytes(self._pending) + chunk
            self._at_start = len(chunk) < 3 and _BOM.startswith(chunk)
            self._pending[:] = chunk if self._at_start else b""
            chunk = b"" if self._at_start else chunk.removeprefix(_BOM)
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if _CR in chunk:
            self._after_cr = chunk[-1] == _CR
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        pending = self._pending
        if _LF not in chunk:
            pending += chunk
            return []
        lines = chunk.split(b"\n")
        if pending:
            pending += lines[0]
            lines[0] = bytes(pending)
            pending.clear()
        pending += lines.pop()
        return lines


class SSEDecoder:
    """Bytes in, or lines, events out: "Interpreting an event stream" of the standard.

    `max_event_bytes` bounds what stands between two blank lines; None for no bound.
    Over it, every call raises SSEError. `last_event_id` is what to send as
    `Last-Event-ID` when connecting again, `retry` how long to wait before, in
    milliseconds, None if the server did not say.
    """

    def __init__(self, max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._limit = sys.maxsize if max_event_bytes is None else max_event_bytes
        self._overflow = ""  # stays: after a lost event the rest is no stream
        self._began = b""  # that event, as far as it had come
        self._lines = SSELineDecoder()
        self._size = 0  # bytes since the last blank line
        self._data: list[bytes] = []  # joined once, or many would cost their square
        self._event = ""
        self._id = ""  # becomes last_event_id at the blank line, not before
        self._retry: int | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that `chunk` ends. Raises SSEError over the limit."""
        data = self._single_data_line(chunk)
        if data is not None:
            return [ServerSentEvent("message", data, self._id)]
        return self._interpret(self._lines._split(chunk))

    def decode(self, line: str) -> ServerSentEvent | None:
        """Take one line without its end; return the event that a blank one ends."""
        events = self._interpret([line.encode("utf-8", "surrogatepass")])
        return events[0] if events else None

    def _single_data_line(self, chunk: bytes) -> str | None:
        """Return the data of a read that is one event of one line, None for others.

        Most reads are that. Without a look at each line they take half the time.
        """
        lines = self._lines
        if chunk[:6] != b"data: " or self._size or lines._pending or lines._at_start:
            return None
        end = len(chunk.rstrip(b"\r\n"))
        data, is_whole = chunk[6:end], chunk[end:] in (b"\n\n", b"\r\n\r\n")
        if not is_whole or end > self._limit or _LF in data or _CR in data:
            return None
        lines._after_cr = False
        return data.decode("utf-8", "replace")

    def _interpret(self, lines: list[bytes]) -> list[ServerSentEvent]:
        if self._overflow:
            self._lines._pending.clear()
            raise SSEError(self._overflow)
        events: list[ServerSentEvent] = []
        size, limit, data = self._size, self._limit, self._data
        for line in lines:
            if not line:
                # No data, no event; but the id is kept, and the event type forgotten.
                if data:
                    text = b"\n".join(data).decode("utf-8", "replace")
                    name = self._event or "message"
                    events.append(ServerSentEvent(name, text, self._id, self._retry))
                    data.clear()
                self.last_event_id, self._event, self._retry = self._id, "", None
                size = 0
                continue
            size += len(line) + 1
            if size - 1 > limit:
                raise self._overflow_error(line, events)
            if line[:6] == b"data: ":  # as nearly all are
                data.append(line[6:])
            elif line[0] != _COLON:
                self._process_field(line, events)
        self._size = size
        pending = self._lines._pending
        if pending and size + len(pending) > limit:
            raise self._overflow_error(bytes(pending), events)
        return events

    def _process_field(self, line: bytes, events: list[ServerSentEvent]) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            with suppress(ValueError):  # more digits than Python converts
                self._retry = self.retry = int(value)

    def _overflow_error(self, line: bytes, events: list[ServerSentEvent]) -> SSEError:
        self._began = (self._data or [line])[0]
        began = self._began[:200].decode("utf-8", "replace")
        self._overflow = f"an event of more than {self._limit} bytes: {began!r}"
        self._limit = -1  # no read is taken by itself any more
        self._data.clear()
        return SSEError(self._overflow, events)


def iter_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Give the lines of a stream of bytes; one that has no end is none.

    httpx's `Response.iter_lines` also splits at eight characters that are legal in JSON
    (U+2028, U+0085, FF …), and drops them.
    """
    decoder = SSELineDecoder()
    for chunk in chunks:
        yield from decoder.feed(chunk)


async def aiter_lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Async twin of `iter_lines`."""
    decoder = SSELineDecoder()
    async for chunk in chunks:
        for line in decoder.feed(chunk):
            yield line


def _events_before_error(
    decoder: SSEDecoder, chunk: bytes
) -> Iterator[ServerSentEvent]:
    try:
        yield from decoder.feed(chunk)
    except SSEError as error:
        yield from error.events
        raise


def iter_sse(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ServerSentEvent]:
    """Give the events of a stream of bytes. Raises SSEError for one over the limit."""
    decoder = SSEDecoder(max_event_bytes)
    for chunk in chunks:
        yield from _events_before_error(decoder, chunk)


async def aiter_sse(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ServerSentEvent]:
    """Async twin of `iter_sse`."""
    decoder = SSEDecoder(max_event_bytes)
    async for chunk in chunks:
        for event in _events_before_error(decoder, chunk):
            yield event


class EventSource:
    """The events of an httpx response; SSEError where it is no event stream.

    `last_event_id` and `retry` (milliseconds, or None) are those of the stream so far,
    also from blocks without data: what connecting again wants to know.
    """

    def __init__(self, response: Response, max_event_bytes: int | None = None) -> None:
        self.response = response
        self.last_event_id = ""  # of what was given out; the decoder's may be ahead
        self.retry: int | None = None
        self._decoder = SSEDecoder(max_event_bytes)

    def iter_sse(self) -> Iterator[ServerSentEvent]:
        """Give the events as they come."""
        self._check_content_type()
        for chunk in self.response.iter_bytes():
            yield from self._dispatch(chunk)

    async def aiter_sse(self) -> AsyncIterator[ServerSentEvent]:
        """Give the events as they come."""
        self._check_content_type()
        async for chunk in self.response.aiter_bytes():
            for event in self._dispatch(chunk):
                yield event

    def _dispatch(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        decoder = self._decoder
        for event in _events_before_error(decoder, chunk):
            self.last_event_id, self.retry = event.id, decoder.retry
            yield event
        self.last_event_id, self.retry = decoder.last_event_id, decoder.retry

    def _check_content_type(self) -> None:
        got = self.response.headers.get("content-type", "")
        if "text/event-stream" not in got.lower():
            raise SSEError(f"the response is no text/event-stream, but {got!r}")


def _for_events(client: Client | AsyncClient, kwargs: Json) -> Json:
    headers = type(client.headers)(kwargs.get("headers"))
    headers["accept"] = "text/event-stream"
    headers["cache-control"] = "no-store"
    return kwargs | {"headers": headers}


@contextmanager
def connect_sse(
    client: Client,
    method: str,
    url: str,
    *,
    max_event_bytes: int | None = None,
    **kwargs: Any,
) -> Iterator[EventSource]:
    """Ask for an event stream; `kwargs` are those of `client.stream`."""
    with client.stream(method, url, **_for_events(client, kwargs)) as response:
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
    async with client.stream(method, url, **_for_events(client, kwargs)) as response:
        yield EventSource(response, max_event_bytes)


# ---- Chat types: openai's names, fields and repr, as plain dataclasses ---------------


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, _Model) else value


def _dicts(sent: Any) -> list[Json]:
    items = sent if isinstance(sent, list) else []
    return [item for item in items if isinstance(item, dict)]


def _string(sent: Any) -> str | None:
    return sent if type(sent) is str else None


def _converter(hint: Any) -> Callable[[Any], Any]:
    """Return what makes a value of this type, and None of what is no such value."""
    if hint in (int, float):
        return lambda sent: sent  # a usage that is no number is better than a wrong 0
    args = typing.get_args(hint)
    if type(None) in args:  # X | None
        hint, args = args[0], typing.get_args(args[0])
    kind = typing.get_origin(hint) or hint
    model: Any = args[0] if kind is list else hint
    if not hasattr(model, "from_dict"):
        return lambda sent: sent if type(sent) is kind else None
    # Of calls, one more than are allowed is enough to be refused.
    most = MAX_CHOICES + 1 if model is ChoiceDeltaToolCall else None
    if kind is list:
        return lambda sent: list(map(model.from_dict, _dicts(sent)[:most]))
    return lambda sent: model.from_dict(sent) if type(sent) is dict else None


@functools.cache
def _converters(model: Any) -> dict[str, Callable[[Any], Any]]:
    """Return what makes the value of each field of what was sent for it."""
    hints = typing.get_type_hints(model)
    builders = {k: _converter(hints[k]) for k in hints.keys() - {"extra", "raw"}}
    if "arguments" in hints:  # llama.cpp has sent an object
        builders["arguments"] = lambda d: d if type(d) is str else json.dumps(d)
    return builders


def _normalise_message(d: Json) -> Json:
    """Return a message or delta with its text and its reasoning in one place each.

    Reasoning is `reasoning_content` with most servers, `reasoning` with Ollama, vLLM
    and OpenRouter, and with Mistral one of the typed parts that content is a list of.
    """
    sent, reasoning = d.get("content"), d.get("reasoning_content") or d.get("reasoning")
    if sent is not None and type(sent) is not str:
        parts = sent if isinstance(sent, list) else [sent]
        parts = [part if isinstance(part, dict) else {"text": part} for part in parts]
        texts: list[Any] = [part.get("text") for part in parts]
        thoughts: list[Any] = [reasoning]
        for thinking in [part.get("thinking") for part in parts]:
            thoughts += [t.get("text") for t in _dicts(thinking)] or [thinking]
        sent = "".join(filter(_string, texts))
        reasoning = "".join(filter(_string, thoughts))
    elif "reasoning" not in d and "reasoning_content" not in d:
        return d
    rest = {name: value for name, value in d.items() if name != "reasoning"}
    return rest | {"content": sent, "reasoning_content": reasoning or None}


def _repair_surrogates(text: Any) -> Any:
    """Return a text with the halves of surrogate pairs joined, a lone one as U+FFFD.

    Servers that cut between bytes send an emoji as `"\\ud83d"` and then `"\\ude42"`,
    which no encoding takes.
    """
    if not isinstance(text, str) or text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _surrogate_joiner() -> Callable[..., str]:
    """Return what does so for texts that come one by one: it holds back half a pair."""
    decode = codecs.getincrementaldecoder("utf-16-le")("replace").decode
    return lambda text, final=False: decode(
        text.encode("utf-16-le", "surrogatepass"), final
    )


class _Model:
    """What the chat types share. Fields of ours come last, and hide while unset.

    `extra` holds what a server sent beyond the fields, `raw` all that it sent.
    """

    _extensions = (
        "reasoning_content",
        "extra",
    )  # fields that openai's types do not have

    @classmethod
    def from_dict(cls: type[M], d: Json) -> M:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        made = cls()
        builders = _converters(cls)  # type: ignore[arg-type] # a class can be hashed
        extra: Json = {}
        for name, sent in (
            _normalise_message(d) if "reasoning_content" in builders else d
        ).items():
            if name not in builders:
                extra[name] = sent
            elif sent is not None and (value := builders[name](sent)) is not None:
                setattr(made, name, value)
        if extra and "extra" in vars(made):
            vars(made)["extra"] = extra
        return made

    def to_dict(self) -> Json:
        """Return it as JSON has it: without unset fields, with unknown ones."""
        values = {k: v for k, v in vars(self).items() if v is not None and k != "raw"}
        values |= values.pop("extra", {})
        return {name: _plain(value) for name, value in values.items()}

    def __repr__(self) -> str:
        values = vars(self).items()
        shown = [
            (k, v) for k, v in values if v is not None or k not in self._extensions
        ]
        pairs = [f"{name}={value!r}" for name, value in shown if name != "raw"]
        return f"{type(self).__name__}({', '.join(pairs)})"


@dataclass(repr=False)
class TopLogprob(_Model):
    """A likely token at one place; `logprob` is a natural logarithm."""

    token: str = ""
    bytes: list[int] | None = None
    logprob: float = 0.0


@dataclass(repr=False)
class ChatCompletionTokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones."""

    top_logprobs: list[TopLogprob] = field(default_factory=list)


@dataclass(repr=False)
class ChoiceLogprobs(_Model):
    """Log probabilities of the tokens of a choice."""

    content: list[ChatCompletionTokenLogprob] | None = None
    refusal: list[ChatCompletionTokenLogprob] | None = None


@dataclass(repr=False)
class CompletionTokensDetails(_Model):
    """What the tokens of the answer went into."""

    accepted_prediction_tokens: int | None = None
    audio_tokens: int | None = None
    reasoning_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


@dataclass(repr=False)
class PromptTokensDetails(_Model):
    """What the tokens of the prompt were."""

    audio_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(repr=False)
class CompletionUsage(_Model):
    """How many tokens the answer and the prompt took."""

    completion_tokens: int = 0
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens_details: CompletionTokensDetails | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


@dataclass(repr=False)
class ChoiceDeltaToolCallFunction(_Model):
    """A piece of a function call; the pieces of `arguments` make up one JSON text."""

    arguments: str | None = None
    name: str | None = None


@dataclass(repr=False)
class ChoiceDeltaToolCall(_Model):
    """A piece of a tool call; some servers give no `index`, others no `id`."""

    index: int | None = None
    id: str | None = None
    function: ChoiceDeltaToolCallFunction | None = None
    type: str | None = None
    extra: Json | None = None


@dataclass(repr=False)
class ChoiceDelta(_Model):
    """What a chunk adds to the message of a choice."""

    content: str | None = None
    function_call: Json | None = None
    refusal: str | None = None
    role: str | None = None
    tool_calls: list[ChoiceDeltaToolCall] | None = None
    reasoning_content: str | None = None
    extra: Json | None = None

    @classmethod
    def from_dict(cls, d: Json) -> ChoiceDelta:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        content, role = d.get("content"), d.get("role")
        if type(content) is str and len(d) == 1 + ("role" in d):  # as most: 3 x faster
            return cls(content, None, None, role)
        return super().from_dict(d)


@dataclass(repr=False)
class Function(_Model):
    """The function to call; `arguments` is a JSON text, as the model wrote it."""

    arguments: str = ""
    name: str = ""


@dataclass(repr=False)
class ChatCompletionMessageToolCall(_Model):
    """A tool call; `extra` has Gemini's `extra_content`, which it wants back."""

    id: str = ""
    function: Function = field(default_factory=Function)
    type: str = "function"
    extra: Json | None = None


@dataclass(repr=False)
class ChatCompletionMessage(_Model):
    """The message of an answer; it can stand in the `messages` of the next turn."""

    content: str | None = None
    refusal: str | None = None
    role: str = "assistant"
    annotations: list[Json] | None = None
    audio: Json | None = None
    function_call: Json | None = None
    tool_calls: list[ChatCompletionMessageToolCall] | None = None
    reasoning_content: str | None = None
    extra: Json | None = None


@dataclass(repr=False)
class _CompletionBase(_Model):
    """What chunks and whole answers have in common."""

    id: str = ""
    choices: list[Any] = field(default_factory=list)
    created: int = 0
    model: str = ""
    object: str = ""
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    Choice = _Model

    @classmethod
    def from_dict(cls: type[A], d: Json) -> A:
        """Build it from what a server sent; by hand, as each chunk goes this way."""
        given, usage, build = d.get("choices"), d.get("usage"), cls.Choice.from_dict
        choices: list[Any] = []
        for sent in given if type(given) is list else ():
            # One more than are allowed is enough to be refused.
            if type(sent) is dict and len(choices) <= MAX_CHOICES:
                choice: Any = build(sent)
                if type(sent.get("index")) is not int:
                    choice.index = len(choices)
                # "" is none: SGLang and old Ollama send it with each chunk.
                if choice.finish_reason is not None or "finishReason" in sent:
                    reason = choice.finish_reason or sent.get("finishReason")
                    choice.finish_reason = _repair_surrogates(_string(reason)) or None
                choices.append(choice)
        return cls(
            d.get("id") or "",
            choices,
            d.get("created") or 0,
            d.get("model") or "",
            d.get("object") or cls.object,
            d.get("service_tier"),
            d.get("system_fingerprint"),
            CompletionUsage.from_dict(usage) if type(usage) is dict else None,
            d,
        )

    @property
    def text(self) -> str:
        """The text of the first answer (index 0) in it, "" for none."""
        return "".join([said.content or "" for said in self._first()])

    @property
    def reasoning(self) -> str:
        """The reasoning of the first answer (index 0) in it, "" for none."""
        return "".join([said.reasoning_content or "" for said in self._first()])

    def _first(self) -> list[Any]:
        first = [choice for choice in self.choices if choice.index == 0]
        return [getattr(c, "delta", None) or c.message for c in first]


@dataclass(repr=False)
class ChatCompletionChunk(_CompletionBase):
    """One event of a streamed answer; `raw` is all that the server sent in it."""

    @dataclass(repr=False)
    class Choice(_Model):
        """What a chunk adds to one of the answers."""

        delta: ChoiceDelta = field(default_factory=ChoiceDelta)
        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = None

        @classmethod
        def from_dict(cls, d: Json) -> ChatCompletionChunk.Choice:
            """Build it by hand; a message is there where an answer is in one piece."""
            delta, logprobs = d.get("delta"), d.get("logprobs")
            delta = delta if type(delta) is dict else d.get("message")
            return cls(
                ChoiceDelta.from_dict(delta) if type(delta) is dict else ChoiceDelta(),
                d.get("finish_reason"),
                d.get("index") or 0,
                ChoiceLogprobs.from_dict(logprobs) if type(logprobs) is dict else None,
            )

    choices: list[ChatCompletionChunk.Choice] = field(default_factory=list)
    object: str = "chat.completion.chunk"


@dataclass(repr=False)
class ChatCompletion(_CompletionBase):
    """A whole answer, or what has come of it.

    `raw` is all that the server sent; of a stream, what it would have sent at once.
    """

    @dataclass(repr=False)
    class Choice(_Model):
        """One of the answers; `finish_reason` is None where it was cut off."""

        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = None
        message: ChatCompletionMessage = field(default_factory=ChatCompletionMessage)

    choices: list[ChatCompletion.Choice] = field(default_factory=list)
    object: str = "chat.completion"


# ---- Errors: openai's names, one tree; and the shapes in which servers report them ---


class APIError(Exception):
    """Anything that a network or a server can do to an answer.

    `message` is what the server said, or what happened; `str(error)` says also where,
    and what to do. `body` is the error as the server sent it, parsed JSON or text;
    `code`, `type` and `param` are what it says there; `status_code` is None unless a
    status said it; `completion` is what had come of the answer before.
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
        self.completion = ChatCompletion()
        self.context = ""  # where it happened, and what to do

    def __str__(self) -> str:
        status = "" if self.status_code is None else f"HTTP {self.status_code}: "
        return f"{status}{self.message}{self.context}"


class APIConnectionError(APIError):
    """No answer began: there was no connection, or it broke."""


class APITimeoutError(APIConnectionError):
    """No answer began in the time allowed."""


class APIStatusError(APIError):
    """The server answered with `status_code`, which is no success.

    `response` is an httpx.Response, read, and without the request and its key;
    `retry_after` the seconds that it asks to wait, None if it does not.
    """

    status_code: int  # pyright: ignore[reportIncompatibleVariableOverride]
    response: Response
    retry_after: float | None


class TruncatedStreamError(APIError):
    """An answer began and was cut off, for whatever reason: `__cause__` tells."""


class APIResponseValidationError(APIError):
    """What came is no answer: no event stream, no JSON, no choice, or over a limit."""


_EXCERPT = 200  # characters of a body that a message shows


def _find_error(payload: Any, told: bool = False) -> Json | None:
    """Return the error in what a server sent; what is `told` to be one always is."""
    if isinstance(payload, list) and len(payload) == 1:  # Gemini
        payload = payload[0]
    if not isinstance(payload, dict):
        return {"message": payload} if told else None
    error = payload.get("error")
    if error:
        return error if isinstance(error, dict) else {"message": error}
    fastapi = payload.get("detail") and "choices" not in payload
    return payload if told or fastapi or payload.get("object") == "error" else None


def _error_text(error: Any, depth: int = 4) -> str:
    """Return what an error says, in whatever it is wrapped."""
    if isinstance(error, dict) and depth:
        for name in ("message", "msg", "detail", "details", "error"):
            if error.get(name):
                return _error_text(error[name], depth - 1)
    if isinstance(error, list) and depth:
        return "; ".join(_error_text(item, depth - 1) for item in error[:10])
    text = error if isinstance(error, str) else json.dumps(error)
    text = " ".join(text.split())
    return text if len(text) <= 5 * _EXCERPT else text[: 5 * _EXCERPT] + " …"


def _redacted(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [_redacted(item, redact) for item in value]
    if isinstance(value, dict):
        return {redact(name): _redacted(item, redact) for name, item in value.items()}
    return value


def _server_error_fields(text: str, redact: Callable[[str], str]) -> tuple[Any, ...]:
    """Return what a server said about an error, as APIError takes it."""
    error: Json = {}
    try:
        body = _redacted(json.loads(text), redact)
        error = _find_error(body, told=True) or {}
        said = _error_text(error)
    except (ValueError, RecursionError):
        body = redact(text)
        said = _error_text(body)
    code, kind, param = map(error.get, ("code", "type", "param"))
    code = code if isinstance(code, (int, str)) else None
    message = _repair_surrogates(said) or "(no message)"
    return message, body, code, _string(kind), _string(param)


# ---- Accumulating: chunks to a whole answer ------------------------------------------

# What servers call the end of a choice that failed (vLLM, DeepSeek, OpenRouter, …).
_FAILURE_REASON = re.compile(
    "(?i)error|abort(ed)?|cancell?ed|failed|network_error|insufficient_system_resource"
)


# What has a field, and padding. Of all else in a chunk the latest is kept.
_CHUNK_FIELDS = vars(ChatCompletionChunk()).keys() | {"obfuscation"}


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a pair's halves may come apart


def _add_function(into: Json, name: str, piece: ChoiceDeltaToolCallFunction) -> None:
    function = into.setdefault(name, {"arguments": bytearray(), "name": ""})
    function["name"] = function["name"] or piece.name or ""
    function["arguments"] += _to_bytes(piece.arguments or "")


def _clean_copy(value: Any, depth: int = 0) -> Any:
    """Return a copy that can be encoded. Raises ValueError if `value` is too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"JSON of more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {name: _clean_copy(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean_copy(item, depth + 1) for item in value]
    if isinstance(value, bytearray):
        value = value.decode("utf-8", "surrogatepass")
    return _repair_surrogates(value)


def _merge(into: Json, more: Json, depth: int = 1) -> None:
    """Add a copy of `more`: lists grow, dicts merge, of the rest the latest stays."""
    for name, value in more.items():
        old = into.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value, depth + 1)
        elif isinstance(value, list) and isinstance(old, list):
            old.extend(_clean_copy(value, depth))
        elif value is not None:
            into[name] = _clean_copy(value, depth)


class _ChoiceBuilder:
    """One choice while its deltas come: JSON, with bytearrays for texts that grow.

    They hold UTF-8: a list of their pieces takes ten times the memory (StringIO is one
    before Python 3.12), adding strings the square of the time.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.logprobs: Json = {}
        self.message: Json = defaultdict(bytearray)
        self.calls: list[tuple[int, Json]] = []  # with the index of each
        self.latest: dict[int | str, Json] = {}  # of each index, of each id

    def add(self, delta: ChoiceDelta) -> None:
        if (content := delta.content) is not None:  # in most; a call takes longer
            self.message["content"] += content.encode("utf-8", "surrogatepass")
        if delta.role and "role" not in self.message:
            self.message["role"] = _clean_copy(delta.role, 1)
        if delta.tool_calls is not None:
            if len(delta.tool_calls) > MAX_CHOICES:
                raise ValueError(f"more than {MAX_CHOICES} tool calls")
            for place, piece in enumerate(delta.tool_calls):
                self.add_call(piece, place)
        if delta.reasoning_content is not None:
            self.message["reasoning_content"] += _to_bytes(delta.reasoning_content)
        if delta.refusal is not None:
            self.message["refusal"] += _to_bytes(delta.refusal)
        if delta.function_call is not None:
            function = ChoiceDeltaToolCallFunction.from_dict(delta.function_call)
            _add_function(self.message, "function_call", function)
        if delta.extra is not None:
            _merge(self.message, delta.extra)

    def add_call(self, piece: ChoiceDeltaToolCall, place: int) -> None:
        """Add to the call that a piece goes on with, or open one.

        It has its index; else its id; else that of its place in the list. Another id
        at an index is another call: some servers give each the index 0.
        """
        place = place if piece.index is None else piece.index
        call = self.latest.get(piece.id if piece.id and piece.index is None else place)
        if call is None or (piece.id and call["id"] and piece.id != call["id"]):
            if not 0 <= place < MAX_CHOICES or len(self.calls) == MAX_CHOICES:
                raise ValueError(f"a tool call beyond the {MAX_CHOICES}th")
            call = {"id": "", "type": "function"}
            self.calls.append((place, call))
        self.latest[place] = call
        if piece.id:
            self.latest[piece.id] = call
            call["id"] = call["id"] or piece.id
        call["type"] = piece.type or call["type"]
        if piece.function is not None:
            _add_function(call, "function", piece.function)
        if piece.extra is not None:
            _merge(call, piece.extra)

    def to_dict(self) -> Json:
        message = {"role": "assistant", "content": None} | _clean_copy(self.message)
        if self.calls:
            calls = sorted(self.calls, key=lambda call: call[0])
            message["tool_calls"] = [_clean_copy(call) for _, call in calls]
        logprobs = _clean_copy(self.logprobs) or None
        ending = {"finish_reason": self.finish_reason, "logprobs": logprobs}
        return ending | {"message": message}


class ChatAccumulator:
    """Chunks in, the answer so far out; memory grows with the text alone."""

    def __init__(self) -> None:
        self.failure = ""  # the finish_reason, if a choice ended with a failure
        self._identity: Json = {}  # each from the first that has it
        self._latest: Json = {}  # usage and such from the last, and what is unknown
        self._choices: dict[int, _ChoiceBuilder] = {}

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Add the next chunk. Raises ValueError beyond MAX_CHOICES and MAX_DEPTH."""
        if len(self._identity) < 3:  # Azure's first chunk has none of them
            names = {"id": chunk.id, "model": chunk.model, "created": chunk.created}
            self._identity = {
                k: _clean_copy(v, 1) for k, v in names.items() if v
            } | self._identity
        if chunk.usage is not None:
            usage = chunk.raw.get("usage") or chunk.usage.to_dict()
            self._latest["usage"] = _clean_copy(usage, 1)
        if type(chunk.system_fingerprint) is str:
            self._latest["system_fingerprint"] = chunk.system_fingerprint
        if type(chunk.service_tier) is str:
            self._latest["service_tier"] = chunk.service_tier
        if not _CHUNK_FIELDS.issuperset(chunk.raw):
            for name, value in chunk.raw.items():  # Perplexity: citations in each chunk
                if name not in _CHUNK_FIELDS and value is not None:
                    self._latest[name] = _clean_copy(value, 1)
        if len(chunk.choices) > MAX_CHOICES:
            raise ValueError(f"more than {MAX_CHOICES} choices")
        for piece in chunk.choices:
            choice = self._choices.get(piece.index)
            if choice is None:
                if not 0 <= piece.index < MAX_CHOICES:
                    raise ValueError(f"an index that is not 0 to {MAX_CHOICES - 1}")
                choice = self._choices[piece.index] = _ChoiceBuilder()
            choice.add(piece.delta)
            if piece.logprobs is not None:
                _merge(choice.logprobs, piece.logprobs.to_dict())
            if (reason := piece.finish_reason) and _FAILURE_REASON.fullmatch(reason):
                self.failure = reason
            elif reason:  # what follows the end, a filter's, has none
                choice.finish_reason = reason

    def is_complete(self, choices: int, done: bool) -> bool:
        """Tell whether the answer is whole, of which so many `choices` were asked for.

        All of them, and all that were seen, have a finish_reason; or the server says
        that it is `done`, and one was seen; and none of them failed.
        """
        seen = self._choices.values()
        finished = len(seen) >= choices and all(c.finish_reason for c in seen)
        return (finished or (done and bool(seen))) and not self.failure

    @property
    def completion(self) -> ChatCompletion:
        """The answer so far, for good; a `finish_reason` that did not come is None."""
        choices = [{"index": i} | c.to_dict() for i, c in sorted(self._choices.items())]
        known: Json = _clean_copy(self._latest | self._identity)
        whole = {"object": "chat.completion", "choices": choices}
        return ChatCompletion.from_dict(known | whole)


def accumulate(chunks: Iterable[ChatCompletionChunk]) -> ChatCompletion:
    """Return the whole that the chunks make up. Raises ValueError as `add` does."""
    accumulator = ChatAccumulator()
    for chunk in chunks:
        accumulator.add(chunk)
    return accumulator.completion


def split_thinking(texts: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Split off the `<think>…</think>` that a stream of strings begins with.

    Gives pairs of (whether it is thinking, text), however the tags are cut, without the
    two, the white space before them and the line ends after. Tags further on are text.
    Holds back only what may be the beginning of a tag.
    """
    texts = iter(texts)
    head: list[str] = []
    begin = ""
    for text in texts:
        head.append(text)
        begin = (begin + text).lstrip()
        if not "<think>".startswith(begin):
            break
    thinking = begin.startswith("<think>")
    if thinking:
        head = [begin.removeprefix("<think>")]
    ends = "\n" if thinking else ""  # what the text does not begin with
    held = ""
    for text in itertools.chain(head, texts):
        if thinking:
            thought, end, text = (held + text).partition("</think>")
            thinking = not end
            held = "".join(thought.rpartition("<")[1:])
            if end or not "</think>".startswith(held):
                held = ""
            if thought != held:
                yield True, thought.removesuffix(held)
        if text := text.lstrip(ends):
            ends = ""
            yield False, text
    if held:
        yield True, held


# ---- The request, and what is decided before an answer begins, without I/O -----------

Messages = str | Sequence[Mapping[str, Any] | ChatCompletionMessage]


DEFAULT_BASE_URL = "http://localhost:11434/v1"  # Ollama


DEFAULT_TIMEOUT = 600.0  # seconds between two reads: a big model loads for minutes


CONNECT_TIMEOUT = 5.0  # seconds


MODELS_TIMEOUT = 30.0  # seconds, for all of the list of models


MAX_RETRY_AFTER = 60.0  # seconds; a server that asks for more is not waited for


_LONGEST_SECONDS = (
    1e6  # seconds; sockets and threads take some thousand times that, no more
)


_DRAIN_BYTES = 64 * 1024  # of an error's body, and of what follows [DONE]


_ERROR_BODY_SECONDS = 5.0  # for its message


_DRAIN_SECONDS = 0.5  # for its end, without which the connection cannot be used again


_PIECE = 64 * 1024  # bytes that are unpacked at once


# Keywords of openai's SDK that are not fields of a request, and what to write for them.
_OPENAI_KEYWORDS = {
    "stream": "call stream_chat() or generate()",
    "extra_headers": "write headers=…",
    "default_headers": "write headers=…",
    "organization": 'write headers={"OpenAI-Organization": …}',
    "extra_body": "write its fields as keywords",
    "extra_query": "write it into base_url, after a ?",
    "http_client": "write client=…",
}


_PHASES = {"ReadTimeout": "waiting for the answer", "WriteTimeout": "sending"}


_BROKEN = "the connection broke before an answer"


_SECRET = re.compile("auth|cookie|key|password|secret|token", re.IGNORECASE)


_FRAMING = (b"content-encoding", b"content-length", b"transfer-encoding")


def _is_timeout(cause: BaseException | None) -> bool:
    return "Timeout" in type(cause).__name__  # of httpx, httpx2, asyncio or a socket


def _reason(cause: BaseException) -> str:
    """Return what an exception says, or the one behind it: trio's have no words."""
    told: BaseException | None = cause
    while told is not None and not str(told):
        told = told.__cause__ or told.__context__
    return str(told or type(cause).__name__)


def _unpacker(response: Response) -> Any:
    """Return what unpacks a body, if it says that it is packed as we know it."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    packed = encoding in ("gzip", "x-gzip", "deflate")
    return zlib.decompressobj(zlib.MAX_WBITS | 32) if packed else None


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that `Retry-After` asks for, as a number or as a date."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(text)
        return seconds if 0 <= seconds < math.inf else None
    with suppress(ValueError, TypeError, OverflowError):
        from email.utils import parsedate_to_datetime

        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    return None


def _endpoint(text: str) -> tuple[str, str]:
    """Return the URL to ask for a base URL, and its user:password. Raises ValueError.

    The login does not stay in the URL, since httpx logs that. A bare host gets the path
    /v1 that nearly every server has.
    """
    from urllib.parse import unquote, urlsplit

    if "://" not in text:  # a key must not go unencrypted to a host on the internet
        host = re.split("[/?#]", text)[0].rpartition("@")[2].partition(":")[0]
        local = "." not in host or host.replace(".", "").isdigit()
        text = ("http://" if local else "https://") + text
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https")
        if not (known and parts.hostname) or parts.port == 0:
            raise ValueError
    except ValueError:  # its words may hold a piece of a password
        example = "http://localhost:11434/v1"
        raise ValueError(f"base_url is no URL; one looks like {example}") from None
    login, at, host = parts.netloc.rpartition("@")
    login += ":" if at and ":" not in login else ""
    path = parts.path.rstrip("/") or "/v1"
    path = path.removesuffix("/chat/completions") + "/chat/completions"
    url = parts._replace(netloc=host, path=path, fragment="").geturl()
    return url, unquote(login)


def _public_url(url: str) -> str:
    """Return a URL without what may be secret in it: its login and its query."""
    return re.sub(r"//[^/?#]*@", "//", url.partition("?")[0])


def _headers(api_key: str, login: str, more: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a request. Raises ValueError for what cannot be one."""
    made = {
        "accept": "text/event-stream",
        "accept-encoding": "identity",  # what is unpacked as it comes saves no time
        "content-type": "application/json",
        "user-agent": f"sse_chat/{__version__}",
    }
    if login:
        made["authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    elif api_key:
        made["authorization"] = f"Bearer {api_key}"
    for name, value in more.items():
        if not isinstance(value, str):
            raise TypeError(f"the header {name!r} is no str")
        made[name.strip().lower()] = value.strip()
    for name, value in made.items():
        shown = "the API key" if name == "authorization" else f"the header {name!r}"
        if not re.fullmatch("[!-9;-~]+", name) or not re.fullmatch("[ -~\t]*", value):
            raise ValueError(f"{shown} holds a control or non-ASCII character")
    return made


def _secrets(headers: Mapping[str, str], url: str, login: str) -> list[str]:
    """Return what is secret in a request, the longest first.

    What has less than 8 characters is none: to replace it would garble what is said.
    """
    from urllib.parse import parse_qsl, urlsplit

    user, _, password = login.partition(":")
    query = urlsplit(url).query
    found = [query, *(value for _, value in parse_qsl(query)), password or user]
    for name, value in headers.items():
        if _SECRET.search(name):
            found += [value, *re.split(r"[\s;,=]+", value)]
    return sorted({s for s in found if len(s) >= 8}, key=len, reverse=True)


def _seconds(name: str, value: float | None) -> float | None:
    """Return a limit that sockets and threads take. Raises ValueError, TypeError."""
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number of seconds, or None for no limit")
    if not value > 0:
        raise ValueError(f"{name} must be over 0 seconds, or None for no limit")
    return float(min(value, _LONGEST_SECONDS))


def _timeouts(timeout: Any) -> tuple[float | None, ...]:
    """Return the seconds to connect, read, write and wait for the pool."""
    if hasattr(timeout, "as_dict"):  # an httpx.Timeout, or httpx2's
        return tuple(_seconds("timeout", each) for each in timeout.as_dict().values())
    seconds = _seconds("timeout", timeout)
    connect = None if seconds is None else min(seconds, CONNECT_TIMEOUT)
    return connect, seconds, seconds, seconds


def _messages(messages: Messages, system: str | None) -> list[Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise TypeError("messages is a str or a list of message dicts")
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages]


def _to_json(value: Any) -> Any:
    if isinstance(value, _Model):  # a message of an earlier answer
        return value.to_dict()
    raise TypeError(f"{type(value).__name__} cannot go into a request")


class _Request:
    """One call: what it asks for, checked; and what becomes of attempts that fail."""

    def __init__(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        timeout: float | Timeout | None = DEFAULT_TIMEOUT,
        first_token_timeout: float | None = None,
        max_retries: int = 2,
        max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
        headers: Mapping[str, str] | None = None,
        client: Any = None,
        **params: Any,
    ) -> None:
        for name in params.keys() & _OPENAI_KEYWORDS.keys():
            raise TypeError(f"no parameter {name}: {_OPENAI_KEYWORDS[name]}")
        if api_key is None:  # a client that has its own does not want the environment's
            own = "authorization" in getattr(client, "headers", {})
            api_key = "" if own else os.environ.get("OPENAI_API_KEY", "")
        self.api_key = api_key.strip()
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or "").strip()
        self.url, self.login = _endpoint(self.base_url or DEFAULT_BASE_URL)
        self.headers = _headers(self.api_key, self.login, headers or {})
        self.timeout = _timeouts(timeout)
        self.first_token_timeout = _seconds("first_token_timeout", first_token_timeout)
        self.max_retries = max_retries
        self.max_event_bytes = max_event_bytes
        self.client = client
        model = model or os.environ.get("OPENAI_MODEL", "").strip() or None
        named: Json = {"model": model}
        named |= {"messages": _messages(messages, system), "stream": True} | params
        self.body = {name: value for name, value in named.items() if value is not None}
        self.content()  # what cannot be sent raises here, not at the first chunk
        n = self.body.get("n")
        self.choices = max(1, n) if isinstance(n, int) else 1
        self.method = "POST"
        self.request: Any = None  # the latest, with all that httpx has added
        self.retries = 0
        self.started = 0.0  # when the latest attempt began
        self.died = False  # a kept connection did; no failure of ours, the first time

    def content(self) -> bytes:
        return json.dumps(self.body, default=_to_json, allow_nan=False).encode()

    def in_one_piece(self) -> _Request:
        """Ask for a whole answer in place of a stream."""
        self.body["stream"] = False
        self.headers["accept"] = "application/json"
        return self

    def for_models(self) -> _Request:
        """Ask for the names of the models in place of an answer."""
        self.method = "GET"
        self.url = re.sub(r"/chat/completions(?=\?|$)", "/models", self.url)
        self.headers["accept"] = "application/json"
        self.first_token_timeout = self.first_token_timeout or MODELS_TIMEOUT
        return self

    def build(self, client: Any, most: float | None = None) -> Any:
        """Make the request of an attempt; no phase of it takes over `most` seconds."""
        self.started = time.monotonic()
        timeout = self.timeout
        if most is not None:
            timeout = tuple(min(most, seconds or most) for seconds in timeout)
        options: Json = {"headers": self.headers, "timeout": timeout}
        if self.method == "POST":
            options["content"] = self.content()
        self.request = client.build_request(self.method, self.url, **options)
        return self.request

    def redact(self, text: str) -> str:
        """Return a text of the server's without the secrets that it got from us."""
        headers, url = self.headers, self.url
        if self.request is not None:  # has those of the caller's own client, too
            headers, url = {**headers, **self.request.headers}, str(self.request.url)
        for secret in _secrets(headers, url, self.login):
            text = text.replace(secret, "[secret]")
            if "\\" in text:  # where JSON escapes it
                ways = (rf"(?:\\?{re.escape(c)}|\\u{ord(c):04x})" for c in secret)
                text = re.sub("".join(ways), "[secret]", text, flags=re.IGNORECASE)
        return text

    def connection_error(self, cause: Exception) -> APIConnectionError:
        """Make the error of an attempt that got no answer."""
        words, advice = self.redact(_reason(cause)), ""
        if _is_timeout(cause):
            phase = _PHASES.get(type(cause).__name__, "connecting")
            error: APIConnectionError = APITimeoutError(f"timed out {phase}")
        elif "Connect" in type(cause).__name__:
            error = APIConnectionError(f"cannot connect: {words}")
            advice = "; start a server there (`ollama serve`), or set base_url"
        else:
            error = APIConnectionError(f"{_BROKEN}: {words}")
        waited = time.monotonic() - self.started
        error.context = f" ({_public_url(self.url)}, after {waited:.1f} s){advice}"
        error.__cause__ = cause if self.redact(str(cause)) == str(cause) else None
        return error

    def status_error(self, response: Response, body: bytes) -> APIStatusError:
        """Make the error of a status that is no success."""
        unzip = _unpacker(response)
        if unzip is not None:
            with suppress(zlib.error):
                body = unzip.decompress(body, _PIECE)
        text = body.decode("utf-8", "replace") or response.reason_phrase
        error = APIStatusError(*_server_error_fields(text, self.redact))
        error.status_code = response.status_code
        error.context = f" ({_public_url(self.url)}){self.advice(response)}"
        error.retry_after = _retry_after(response.headers, time.time())
        # A copy: the response itself holds the request, and with it the key.
        headers = [
            (name, self.redact(value.decode("latin-1")).encode("latin-1"))
            for name, value in response.headers.raw
            if name.lower() not in _FRAMING
        ]
        content = self.redact(text).encode()
        make: type[Response] = type(response)
        error.response = make(response.status_code, headers=headers, content=content)
        return error

    def advice(self, response: Response) -> str:
        """Say what to do about a status."""
        status = response.status_code
        if response.has_redirect_location:
            target = self.redact(_public_url(response.headers["location"]))
            return f"; not following to {target} with the key: set base_url to it"
        if status in (401, 403) and not any(map(_SECRET.search, self.request.headers)):
            return "; no key was sent: give api_key, or set OPENAI_API_KEY"
        if status == 404 and "/v1" not in _public_url(self.url):
            return "; most servers want a base_url that ends in /v1"
        return ""

    def wait_before_retry(self, error: APIError, left: float | None) -> float | None:
        """Return the seconds to wait for another attempt, None if none is due.

        A server that was silent is not asked again: it may be at work on the answer.
        One that broke a connection is, the first time at once: servers close those that
        were kept when they like. With `left` seconds for it all, none may be due.
        """
        from random import uniform  # importing it takes 2 ms

        wait = min(8.0, 0.5 * 2.0**self.retries) * uniform(0.75, 1.0)
        if isinstance(error, APIStatusError):
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            wait = wait if error.retry_after is None else error.retry_after
        else:
            broke = error.message.startswith(_BROKEN)
            again = broke or "connect" in error.message
            if broke and not self.died:
                self.died = True
                return 0.0
        most = MAX_RETRY_AFTER if left is None else min(left, MAX_RETRY_AFTER)
        if not again or self.retries >= self.max_retries or wait > most:
            return None
        self.retries += 1
        return wait


# ---- Reading an answer: bytes to chunks, and the verdict -----------------------------


class _ChatEvents(SSEDecoder):
    """Takes a field named `error` for an event: old llama.cpp reports errors so."""

    def _process_field(self, line: bytes, events: list[ServerSentEvent]) -> None:
        name, _, value = line.partition(b":")
        if name == b"error":
            events.append(ServerSentEvent("error", value.decode("utf-8", "replace")))
        else:
            super()._process_field(line, events)


_BLANK = b" \t\r\n\xef\xbb\xbf"  # the last three are a BOM


_SSE_FIELDS = (b"data:", b"event:", b"retry:", b"error:", b"id:", b":")


def _body_kind(mark: bytes, content_type: str) -> str:
    """Tell from the first bytes that are not blank what a body is, "" for not yet.

    They go before the content type: JSON comes as text/event-stream, too, and streams
    without any.
    """
    if mark.startswith((b"{", b"[")):
        return "json"
    told = mark and "text/event-stream" in content_type.lower()
    if told or mark.startswith(_SSE_FIELDS):
        return "stream"
    return "" if any(name.startswith(mark) for name in _SSE_FIELDS) else "other"


_scan = json.JSONDecoder().raw_decode


def _parse_json(text: str) -> tuple[Any, Exception | None]:
    """Return what a JSON text holds, and what is wrong with it."""
    try:
        # An event holds JSON and nothing around it: without the search for white space
        # that json.loads makes, this takes two thirds of the time.
        value, end = _scan(text) if text[:1] == "{" else (None, -1)
        return (value if end == len(text) else json.loads(text)), None
    except (ValueError, RecursionError) as error:
        return None, error


def _looks_truncated(text: str, problem: Exception) -> bool:
    """Tell whether what is wrong with a JSON text may be that its end is missing."""
    at_end = getattr(problem, "pos", -1) >= len(text.rstrip())
    in_string = str(problem).startswith("Unterminated string")
    return at_end or in_string or not text.rstrip().endswith(("}", "]"))


def _has_token(delta: ChoiceDelta) -> bool:
    texts = delta.content or delta.reasoning_content or delta.refusal
    return bool(texts or delta.tool_calls or delta.function_call)


class _AnswerReader:
    """The bytes of one body in, chunks out, and the verdict on how it ended.

    | the body                                          | the verdict                |
    |---------------------------------------------------|----------------------------|
    | a finish_reason for every choice, or [DONE]       | complete                   |
    | a JSON completion in place of a stream            | complete, one chunk        |
    | ends before that, or is silent, or is closed      | TruncatedStreamError       |
    | a finish_reason that is a word for a failure      | TruncatedStreamError       |
    | says that an error happened, in any shape         | APIError                   |
    | silent before the answer began                    | APITimeoutError            |
    | [DONE] without a choice                           | APIResponseValidationError |
    | an event that is not JSON, or over a limit        | APIResponseValidationError |
    | no event stream and no JSON, or nothing           | APIResponseValidationError |

    What follows `[DONE]` changes nothing, nor does a cut after the last finish_reason;
    and no `[DONE]` makes up for an error.
    """

    def __init__(
        self, max_event_bytes: int | None, call: _Request | None = None
    ) -> None:
        self.over = ""  # why no more is to be read: "done" or "closed"
        self.is_finished = False  # the end was fed
        self.cause: BaseException | None = None  # how the connection broke
        self.deadline: float | None = None  # for the first token, until it is there
        self.failure: APIError | None = None
        self.response: Response | None = None
        self.over_http2 = False
        self.scope: Any = None  # an anyio.CancelScope around what async code waits for
        self.has_token = False
        self._call = call
        self._lists_models = call is not None and call.method == "GET"
        self._limit = sys.maxsize if max_event_bytes is None else max_event_bytes
        self._events = _ChatEvents(max_event_bytes)
        self._accumulator = ChatAccumulator()
        self._content_type = ""
        self._unpacker: Any = None
        self._kind = ""  # "stream", "json" or "other", once that is known
        self._start = b""  # the first bytes that are not blank
        self._held = bytearray()  # all bytes, unless it is known to be a stream
        self._json: Json | None = None  # the completion, where it came in one piece

    def start(self) -> None:
        """Begin to count the time for the first token."""
        limit = self._call.first_token_timeout if self._call else None
        self.deadline = None if limit is None else time.monotonic() + limit

    def time_left(self) -> float | None:
        """Return the seconds left for the first token, None if it needs no bound."""
        if self.deadline is None:
            return None
        return max(0.001, self.deadline - time.monotonic())

    def is_late(self) -> bool:
        """Tell whether the time for the first token is up."""
        left = self.time_left()
        return left is not None and left < 0.01  # clocks differ a little

    def begin(self, response: Response) -> Response:
        """Take the response; without one, the bytes alone tell what they are."""
        self.response = response
        self.over_http2 = response.http_version == "HTTP/2"
        self._content_type = response.headers.get("content-type", "")
        self._unpacker = _unpacker(response)
        return response

    def end(self, why: str) -> None:
        """Read no more: [DONE] came, or it was closed here."""
        self.over = self.over or why

    @property
    def completion(self) -> ChatCompletion:
        if self._json is not None:
            return ChatCompletion.from_dict(_clean_copy(self._json))
        return self._accumulator.completion

    @property
    def complete(self) -> bool:
        asked = self._call.choices if self._call else 1
        whole = self._json is not None or self._accumulator.is_complete(
            asked, self.over == "done"
        )
        return whole and self.failure is None

    def feed(self, data: bytes | None) -> Iterable[ChatCompletionChunk]:
        """Give the chunks that `data` ends, or None, the end; raise what is wrong."""
        if data is None:
            self.is_finished = True
            return self._finish()
        if self._unpacker is not None:
            return self._read_events(self._unpacked(data))
        only = self._events._single_data_line(data) if self._kind == "stream" else None
        if only is None:
            return self._read_events((data,))
        chunk = self._read_data(only)  # as a rule; saves an event and a generator
        return () if chunk is None else (chunk,)

    def _unpacked(self, data: bytes) -> Iterator[bytes]:
        """Unpack piece by piece: a small body could fill the memory."""
        piece = data
        while (data or len(piece) == _PIECE) and not self._unpacker.eof:
            try:
                piece = self._unpacker.decompress(data, _PIECE)
            except zlib.error as error:
                raise self._invalid(f"a body that does not unpack ({error})") from error
            yield piece
            data = self._unpacker.unconsumed_tail

    def _read_events(self, pieces: Iterable[bytes]) -> Iterator[ChatCompletionChunk]:
        try:
            for piece in pieces:
                for event in _events_before_error(self._events, self._recognise(piece)):
                    chunk = self._read_data(event.data, event.event == "error")
                    if chunk is not None:
                        yield chunk
                    if self.over:
                        return
        except SSEError:
            text = self._events._began.decode("utf-8", "replace")
            what = f"an event of more than {self._limit} bytes"
            raise self._invalid(what, text) from None

    def _recognise(self, data: bytes) -> bytes:
        """Hold the body back until its first bytes tell what it is; give a stream's."""
        if self._kind == "stream":
            return data
        self._held += data
        if len(self._start) < 8:
            self._start = (self._start + data).lstrip(_BLANK)[:8]
            self._kind = _body_kind(self._start, self._content_type)
            if self._kind == "stream" and self._lists_models:
                self._kind = "other"
        if self._kind == "stream":
            data, self._held = bytes(self._held), bytearray()
            return data
        if len(self._held) > self._limit:
            text = self._held.decode("utf-8", "replace")
            raise self._invalid(f"a body of more than {self._limit} bytes", text)
        if self._kind == "other" and len(self._held) > 4 * _EXCERPT:
            raise self.verdict()
        return b""

    def _read_data(self, data: str, told: bool = False) -> ChatCompletionChunk | None:
        """Return the chunk in an event's data; raise if it is `told` to be an error."""
        if told:
            raise self._failed(APIError(*_server_error_fields(data, self._redact)))
        payload, problem = _parse_json(data)
        if not problem:
            return self._read_json(payload, data)
        if data.startswith("[DONE]"):
            self.end("done")
        # At the end of the body it has been cut: no part of a JSON object is one.
        elif data and not data.isspace() and not self.is_finished:
            raise self._invalid(f"an event that is not JSON ({problem})", data)
        return None

    def _read_json(
        self, payload: Any, text: str, whole: bool = False
    ) -> ChatCompletionChunk:
        """Return the chunk that a JSON text is, the only one if that is the `whole`."""
        if _find_error(payload):
            raise self._failed(APIError(*_server_error_fields(text, self._redact)))
        if type(payload) is not dict or (whole and not self._is_whole(payload)):
            raise self._invalid("JSON that is no answer", text)
        try:
            chunk = ChatCompletionChunk.from_dict(payload)
            self._accumulator.add(chunk)
            if whole and not self._accumulator.failure:
                self._json = _clean_copy(payload)
        except (ValueError, RecursionError) as error:
            what = f"JSON that is no answer ({error})"
            raise self._invalid(what, text) from error
        if not self.has_token and any(_has_token(c.delta) for c in chunk.choices):
            self.has_token, self.deadline = True, None
        return chunk

    def _is_whole(self, payload: Json) -> bool:
        """Tell whether a JSON body is what was asked for."""
        if self._lists_models:
            return isinstance(payload.get("data", ""), list | None)
        choices = _dicts(payload.get("choices"))
        return bool(choices) and all(type(c.get("message")) is dict for c in choices)

    def _finish(self) -> Iterator[ChatCompletionChunk]:
        """Give what the last bytes hold, then raise if the answer is not complete."""
        if self._kind == "stream" and not self.over:
            yield from self._read_events((b"\n\n",))  # llama.cpp has left them out
        elif self._kind == "json" and not self.over:
            yield self._read_body()
        self.check()

    def check(self) -> None:
        """Raise if what has come is no whole answer."""
        if not self.complete:
            raise self.failure or self.verdict()

    def _read_body(self) -> ChatCompletionChunk:
        """Return the answer that a JSON body is, with `[DONE]` after it or not."""
        text = self._held.decode("utf-8-sig", "replace")
        payload, problem = _parse_json(text)
        end = getattr(problem, "pos", 0)
        if end and "data:[DONE]".startswith("".join(text[end:].split())):
            payload, problem = _parse_json(text[:end])
        if problem and (self.cause or _looks_truncated(text, problem)):
            raise self.verdict()
        if problem:
            raise self._invalid(f"a body that is not JSON ({problem})", text)
        return self._read_json(payload, text, whole=True)

    def ended_by(self, error: APIError) -> APIError:
        """Return why no answer began: `error`, unless it was ended from here."""
        self.cause = error.__cause__
        self.failure = self.verdict() if self.over or self.is_late() else error
        return self.failure

    def verdict(self) -> APIError:
        """Say why an answer that is not complete ended."""
        cause = self.cause
        how = f"the connection broke ({_reason(cause)})" if cause else "it ended"
        if _is_timeout(cause):
            how = f"no data for {self._call.timeout[1]} s" if self._call else "silence"
        kind: type[APIError] = TruncatedStreamError
        what = f"the answer was cut off: {how} before a finish_reason or [DONE]"
        if self.over == "closed":
            what = "the stream was closed here before the answer was whole"
            cause = None  # what that did to the connection
        elif self.is_late() and self._call:
            kind = APITimeoutError
            limit = self._call.first_token_timeout
            what = f"no token within {limit} s (first_token_timeout)"
        elif self._accumulator.failure:
            what = f"the server ended the answer with {self._accumulator.failure!r}"
        elif not cause and (self.over or not self._start or self._kind == "other"):
            return self._no_answer()
        elif _is_timeout(cause) and not self.has_token:
            kind = APITimeoutError
            what = f"{how}, waiting for the first token"
        return self._failed(kind(self._redact(what)), cause)

    def _no_answer(self) -> APIError:
        if self.over:
            return self._invalid("[DONE] and no answer")
        got = self._content_type or "no content type"
        what = "neither an event stream nor JSON" if self._start else "an empty body"
        text = self._held.decode("utf-8", "replace") if self._start else ""
        return self._invalid(f"{what} ({got})", text)

    def _invalid(self, what: str, text: str = "") -> APIError:
        text = self._redact(text)
        began = f": {text[:_EXCERPT]!r}" if text else ""
        message = self._redact(f"the server sent {what}{began}")
        return self._failed(APIResponseValidationError(message, text))

    def _failed(self, error: APIError, cause: BaseException | None = None) -> APIError:
        """Keep why there is no whole answer; what has come of it is on the error."""
        error.context = f" ({_public_url(self._call.url)})" if self._call else ""
        error.completion = self.completion
        # A cause whose words hold a secret is left out.
        error.__cause__ = cause if self._redact(str(cause)) == str(cause) else None
        self.failure = error
        return error

    def _redact(self, text: str) -> str:
        return self._call.redact(text) if self._call else text


# ---- Sending and streaming: the same twice, with `for` and with `async for` ----------


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what httpx, httpx2 (as far as they are loaded) and sockets raise."""
    loaded = filter(None, map(sys.modules.get, ("httpx", "httpx2")))
    kinds = ("HTTPError", "StreamError", "InvalidURL")
    return (OSError, *(getattr(module, kind) for module in loaded for kind in kinds))


def _load_httpx() -> Any:
    """Return httpx, or its fork httpx2 where that is installed in its place."""
    for name in ("httpx", "httpx2"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError("sse_chat needs httpx: pip install httpx")


@functools.cache
def _tls(https: bool) -> Any:
    """Make the context of a client, once: to load the certificates takes 25 ms."""
    import ssl

    if https:
        return _load_httpx().create_ssl_context()
    # An empty one will do; should anything lead to https, it trusts nobody.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _client(call: _Request, kind: str) -> Any:
    """Return the client to ask, in a context that closes it if it is our own.

    That keeps few connections, but has as many as it is asked for: at httpx's default
    of 100 the next streams wait until they fail, and its pool is quadratic.
    """
    if call.client is not None:
        return nullcontext(call.client)
    httpx = _load_httpx()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    verify = _tls(call.url.startswith("https:"))
    try:
        return getattr(httpx, kind)(verify=verify, limits=limits)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        socks = "SOCKS" in str(error)
    why = "needs `pip install httpx[socks]`" if socks else "is no URL"
    raise APIConnectionError(f"the proxy that the environment names {why}")


def _interrupt_read(response: Any) -> None:
    """End the read of a response that another thread waits in: shut its socket down.

    Not with HTTP/2, where other streams share it; and not once the response is closed,
    since another may have the connection by then.
    """
    import socket

    stream = response.extensions.get("network_stream")
    if stream is None or not response.http_version.startswith("HTTP/1"):
        return
    with suppress(OSError):
        if not response.is_closed:
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


@contextmanager
def _interrupt_after(seconds: float, response: Any) -> Iterator[None]:
    """Wake a read that has not come back after `seconds`."""
    import threading

    timer = threading.Timer(seconds, _interrupt_read, [response])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _drain(reads: Iterator[bytes], response: Any, seconds: float) -> bytes:
    """Read the rest of a body, as far as it comes within the bounds."""
    rest = bytearray()
    if not response.is_closed:
        with suppress(*_network_errors()), _interrupt_after(seconds, response):
            for data in reads:
                rest += data
                if len(rest) >= _DRAIN_BYTES:
                    break
    return bytes(rest)


async def _adrain(reads: AsyncIterator[bytes], response: Any, seconds: float) -> bytes:
    """Async twin of `_drain`."""
    import anyio

    rest = bytearray()
    if not response.is_closed:
        with suppress(*_network_errors()), anyio.move_on_after(seconds):
            async for data in reads:
                rest += data
                if len(rest) >= _DRAIN_BYTES:
                    break
    return bytes(rest)


def _next_bytes(reads: Iterator[bytes], answer: _AnswerReader) -> bytes | None:
    """Return what comes next, None where no more does; httpx bounds the wait for it.

    The time for the first token spans several reads, so a thread looks after it.
    """
    if answer.over:
        return None
    try:
        if answer.deadline is None:
            return next(reads, None)
        if not answer.is_late():
            with _interrupt_after(answer.time_left() or 0.0, answer.response):
                return next(reads, None)
    except _network_errors() as error:
        answer.cause = error
    return None


async def _anext_bytes(
    reads: AsyncIterator[bytes], answer: _AnswerReader
) -> bytes | None:
    """Async twin of `_next_bytes`. Closing a response wakes it, but over HTTP/2."""
    if answer.over:
        return None
    try:
        if answer.deadline is None and not answer.over_http2:
            async for data in reads:  # takes less than anext with a default
                return data
        elif not answer.is_late():
            import anyio

            with anyio.move_on_after(answer.time_left()) as answer.scope:
                return await anext(reads, None)
    except _network_errors() as error:
        answer.cause = error
    return None


def _send(call: _Request, answer: _AnswerReader, client: Any) -> Response:
    """Ask, again where the rules say so, until an answer begins."""
    answer.start()
    while True:
        try:
            request = call.build(client, answer.time_left())
            response = client.send(request, stream=True, follow_redirects=False)
            if response.is_success:
                request.extensions["timeout"]["read"] = call.timeout[1]  # all of it
                return answer.begin(response)
            with closing(response):
                body = _drain(response.iter_raw(), response, _ERROR_BODY_SECONDS)
            error: APIError = call.status_error(response, body)
        except _network_errors() as cause:
            error = call.connection_error(cause)
        wait = call.wait_before_retry(error, answer.time_left())
        if wait is None or answer.over:
            raise answer.ended_by(error)
        time.sleep(wait)


async def _asend(call: _Request, answer: _AnswerReader, client: Any) -> Response:
    """Async twin of `_send`; here the time for the first token bounds all of it."""
    import anyio

    answer.start()
    with anyio.move_on_after(answer.time_left()) as answer.scope:
        while True:
            try:
                request = call.build(client)
                response = await client.send(
                    request, stream=True, follow_redirects=False
                )
                if response.is_success:
                    return answer.begin(response)
                async with aclosing(response):
                    reads = response.aiter_raw()
                    body = await _adrain(reads, response, _ERROR_BODY_SECONDS)
                error: APIError = call.status_error(response, body)
            except _network_errors() as cause:
                error = call.connection_error(cause)
            wait = call.wait_before_retry(error, answer.time_left())
            if wait is None or answer.over:
                raise answer.ended_by(error)
            await anyio.sleep(wait)
    raise answer.verdict()


def _stream_answer(
    call: _Request, answer: _AnswerReader
) -> Generator[ChatCompletionChunk]:
    """Ask, and give the chunks of the answer; to close this closes all that it opened.

    It knows the answer and not the stream, so that who drops the stream drops this.
    """
    with (
        _client(call, "Client") as client,
        closing(_send(call, answer, client)) as response,
    ):
        reads = response.iter_raw()
        while not answer.is_finished:
            yield from answer.feed(_next_bytes(reads, answer))
        _drain(reads, response, _DRAIN_SECONDS)


async def _astream_answer(
    call: _Request, answer: _AnswerReader
) -> AsyncGenerator[ChatCompletionChunk]:
    """Async twin of `_stream_answer`."""
    async with (
        _client(call, "AsyncClient") as client,
        aclosing(await _asend(call, answer, client)) as response,
    ):
        reads = response.aiter_raw()
        while not answer.is_finished:
            for chunk in answer.feed(await _anext_bytes(reads, answer)):
                yield chunk
        await _adrain(reads, response, _DRAIN_SECONDS)


def _check_client(client: Any, kind: str) -> None:
    if client is not None and hasattr(client, "aclose") != (kind == "AsyncClient"):
        raise TypeError(f"client must be an httpx.{kind} here")


class _Stream:
    """What both streams are made of."""

    def __init__(self, call: _Request, kind: str) -> None:
        _check_client(call.client, kind)
        self._answer = _AnswerReader(call.max_event_bytes, call)

    @property
    def completion(self) -> ChatCompletion:
        """What has come so far, at any time; it does not change any more."""
        return self._answer.completion

    @property
    def complete(self) -> bool:
        """Whether the answer is whole: ended as it should, and without an error."""
        return self._answer.complete

    @property
    def response(self) -> Response | None:
        """The httpx.Response, None before the first chunk."""
        return self._answer.response


class ChatStream(
    _Stream, Iterator[ChatCompletionChunk], AbstractContextManager["ChatStream"]
):
    """A streamed answer: an iterator of ChatCompletionChunk, and a context manager.

    It connects at the first `next`, and raises an APIError wherever it ends but at its
    end. `with`, `close` and letting go of it close the connection, so that the server
    stops; a loop that is left can be gone on with while the stream has a name.
    """

    def __init__(self, call: _Request) -> None:
        super().__init__(call, "Client")
        self._chunks = _stream_answer(call, self._answer)

    def __next__(self) -> ChatCompletionChunk:
        for chunk in self._chunks:
            return chunk
        self._answer.end("closed")  # or who asks for more would take it for whole
        self._answer.check()
        raise StopIteration

    def text(self) -> Iterator[str]:
        """Iterate over the text of the first answer alone; it can always be encoded."""
        join = _surrogate_joiner()
        for chunk in self:
            if text := join(chunk.text):
                yield text
        if text := join("", final=True):
            yield text

    def close(self) -> None:
        """Close the connection, so that the server stops; what has come stays.

        A thread that waits for the next chunk gets TruncatedStreamError; over HTTP/2,
        and before the headers have come, only when something does.
        """
        self._answer.end("closed")
        try:
            self._chunks.close()
        except ValueError:  # another thread is in it, and closes it
            if self.response is not None:
                _interrupt_read(self.response)

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncChatStream(
    _Stream,
    AsyncIterator[ChatCompletionChunk],
    AbstractAsyncContextManager["AsyncChatStream"],
):
    """Async twin of `ChatStream`, under asyncio and trio."""

    def __init__(self, call: _Request) -> None:
        super().__init__(call, "AsyncClient")
        self._chunks = _astream_answer(call, self._answer)

    async def __anext__(self) -> ChatCompletionChunk:
        async for chunk in self._chunks:
            return chunk
        self._answer.end("closed")  # or who asks for more would take it for whole
        self._answer.check()
        raise StopAsyncIteration

    async def text(self) -> AsyncIterator[str]:
        """Iterate over the text of the first answer alone; it can always be encoded."""
        join = _surrogate_joiner()
        async for chunk in self:
            if text := join(chunk.text):
                yield text
        if text := join("", final=True):
            yield text

    async def aclose(self) -> None:
        """Async twin of `ChatStream.close`; whoever waits is woken over HTTP/2, too."""
        self._answer.end("closed")
        try:
            await self._chunks.aclose()
        except RuntimeError:  # another task is in it, and closes it
            if self.response is None or self._answer.over_http2:
                self._answer.scope.cancel()
            else:
                await self.response.aclose()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def iter_chunks(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ChatCompletionChunk]:
    """Give the chunks of an answer's body, for other HTTP libraries, files and tests.

    Raises as `ChatStream` does where the body is no whole answer. An OSError that the
    iterable raises is how the body ended.
    """
    answer = _AnswerReader(max_event_bytes)
    reads = iter(chunks)
    while not answer.is_finished:
        yield from answer.feed(_next_bytes(reads, answer))


async def aiter_chunks(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ChatCompletionChunk]:
    """Async twin of `iter_chunks`."""
    answer = _AnswerReader(max_event_bytes)
    reads = aiter(chunks)
    while not answer.is_finished:
        for chunk in answer.feed(await _anext_bytes(reads, answer)):
            yield chunk


# ---- The ways to ask -----------------------------------------------------------------


def _options_of(call: Callable[Concatenate[Messages, P], T]) -> Callable[P, T]:
    """Tell type checkers what a call takes beside its messages."""
    return call  # type: ignore[return-value]


def _signed(function: Any, call: Any = _Request, without: Any = ("messages",)) -> Any:
    own = inspect.signature(function, follow_wrapped=False)
    first = [p for p in own.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = inspect.signature(call).parameters.values()
    parameters = first + [option for option in options if option.name not in without]
    function.__signature__ = own.replace(parameters=parameters)
    return function


def _function(call: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function the arguments of a call, for type checkers, editors and help."""
    return _signed


def _constructor(
    call: Callable[P, Any],
) -> Callable[[Callable[..., T]], Callable[Concatenate[Any, P], T]]:
    """Give the constructor of a client the arguments of a call."""
    return _signed


def _method(call: Callable[P, T]) -> Callable[Concatenate[Any, P], T]:
    """Make a function the method of a client, which gives it the client's options."""
    function: Any = call

    @functools.wraps(call, updated=())
    def method(self: Any, *messages: Any, **options: Any) -> Any:
        return function(*messages, **self._merged_with(options))

    @functools.wraps(call, updated=())
    async def amethod(self: Any, *messages: Any, **options: Any) -> Any:
        return await function(*messages, **self._merged_with(options))

    made: Any = amethod if inspect.iscoroutinefunction(call) else method
    return _signed(made, call, _CLIENT_OPTIONS)  # type: ignore[no-any-return]


_OPTIONS = _options_of(_Request)  # type: ignore[arg-type] # as if messages had no name


def _read_all(call: _Request) -> ChatCompletion:
    stream = ChatStream(call)
    for _ in stream:
        pass
    return stream.completion


async def _aread_all(call: _Request) -> ChatCompletion:
    stream = AsyncChatStream(call)
    async for _ in stream:
        pass
    return stream.completion


def _model_names(listed: ChatCompletion) -> list[str]:
    return [m["id"] for m in _dicts(listed.raw["data"]) if _string(m.get("id"))]


@_function(_Request)
def stream_chat(messages: Messages, **options: Any) -> ChatStream:
    """Ask a model, and give its answer as it comes: iterate over what this returns.

    messages: a str, the user's; or a list of message dicts, and messages of answers.
    model: its name; default OPENAI_MODEL, else none is named, which some servers allow.
    base_url: default OPENAI_BASE_URL, else Ollama on this machine. `…/v1`, a bare host,
        a deployment with a query, and the whole `…/chat/completions` will do.
    api_key: default OPENAI_API_KEY, else none is sent.
    system: a system message, put before the others.
    timeout: seconds between two reads (to connect at most 5), or an httpx.Timeout.
    first_token_timeout: seconds until a token has come, whatever else does; in sync
        code it cannot bound a server that sends its headers byte by byte, nor HTTP/2.
    max_retries: how often to ask again where no connection came about, and at the
        statuses 408, 409, 429 and 5xx; after 0.5 s doubling to 8 s, or `Retry-After`.
        Once a call is asked again at once, where a kept connection turns out dead.
    max_event_bytes: the most that one event, or an answer in one piece, may take.
    headers: sent beside ours, or in their place (Azure: `{"api-key": …}`).
    client: your own httpx.Client, or httpx2's; it is used, and not closed.
    params: all else goes into the request, `temperature=0.2`, `tools=[…]`, but None.

    Raises ValueError or TypeError for what cannot be asked; the stream raises APIError.
    """
    return ChatStream(_Request(messages, **options))


@_function(_Request)
def astream_chat(messages: Messages, **options: Any) -> AsyncChatStream:
    """Async twin of `stream_chat`: `async for chunk in astream_chat("hi")`."""
    return AsyncChatStream(_Request(messages, **options))


@_function(_Request)
def generate(messages: Messages, **options: Any) -> ChatCompletion:
    """Ask as `stream_chat` does, for the answer in one piece. Raises APIError."""
    return _read_all(_Request(messages, **options).in_one_piece())


@_function(_Request)
async def agenerate(messages: Messages, **options: Any) -> ChatCompletion:
    """Async twin of `generate`."""
    return await _aread_all(_Request(messages, **options).in_one_piece())


@_function(_OPTIONS)
def models(**options: Any) -> list[str]:
    """Return the names of the models that a server lists. Raises APIError.

    Of the options of `stream_chat` those count that say where and how to ask; for all
    of it there are 30 seconds, or `first_token_timeout`.
    """
    return _model_names(_read_all(_Request("", **options).for_models()))


@_function(_OPTIONS)
async def amodels(**options: Any) -> list[str]:
    """Async twin of `models`."""
    return _model_names(await _aread_all(_Request("", **options).for_models()))


_CLIENT_OPTIONS = (
    "base_url",
    "api_key",
    "client",
)  # by a ChatClient: its calls have none


_generate, _models = generate, models  # in the class these names are the methods'


class _Client:
    """What both clients are made of: a pool of connections, the options of a call."""

    _kind = "Client"

    @_constructor(_OPTIONS)
    def __init__(self, **options: Any) -> None:
        call = _Request("", **options)
        _check_client(call.client, self._kind)
        self._own = None if call.client else _client(call, self._kind)
        owned = {"base_url": call.base_url, "api_key": call.api_key}
        self._options: Json = options | owned | {"client": call.client or self._own}

    def _merged_with(self, options: Json) -> Json:
        """Return the options of a call: its own before the client's."""
        for name in options.keys() & set(_CLIENT_OPTIONS):
            raise TypeError(f"{name} is the client's, and not of a call: make another")
        ours, theirs = self._options.get("headers"), options.get("headers")
        headers = {**(ours or {}), **(theirs or {})}
        return {**self._options, **options, "headers": headers}


class ChatClient(_Client, AbstractContextManager["ChatClient"]):
    """`stream_chat` and `generate` over one pool of connections; a context manager.

    Its arguments are theirs, and hold for every call that does not give its own; but
    `base_url`, `api_key` and `client` are the client's alone. Any number of threads may
    use it at once.
    """

    stream = _method(stream_chat)
    generate = _method(_generate)
    models = _method(_models)

    def close(self) -> None:
        """Close the connections."""
        if self._own is not None:
            self._own.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncChatClient(_Client, AbstractAsyncContextManager["AsyncChatClient"]):
    """Async twin of `ChatClient`."""

    _kind = "AsyncClient"

    stream = _method(astream_chat)
    generate = _method(agenerate)
    models = _method(amodels)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._own is not None:
            await self._own.aclose()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


# ---- Demo server: the wire format of a real one, and no model ------------------------


def _demo_tokens(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+", text)


def _demo_text(prompt: str, stop: str | list[str] | None) -> list[Json]:
    """Return what each token adds to the reasoning, then to the answer."""
    thoughts = f"The prompt has {len(prompt)} characters."
    answer = f"You wrote: {prompt[:200]}\n\nNo model has read it: this is the demo "
    answer += "server. For a real answer start another, such as `ollama serve`."
    for word in [stop] if isinstance(stop, str) else stop or ():
        answer = answer.partition(word)[0]
    deltas = [{"content": "", "reasoning": token} for token in _demo_tokens(thoughts)]
    return deltas + [{"content": token} for token in _demo_tokens(answer)]


def _demo_call(asked: Json) -> list[Json]:
    """Return what each token adds to a call of the first tool; simple types fit it."""
    function = asked["tools"][0]["function"]
    schema = function.get("parameters") or {}
    fits = {"string": "demo", "integer": 1, "number": 1, "boolean": True, "array": []}
    arguments = {
        name: fits.get(str(schema["properties"][name].get("type")))
        for name in schema.get("required") or ()
    }
    call = {"id": f"call_{len(asked['messages'])}", "type": "function"}
    pieces: list[Json] = [{**call, "function": {"name": function["name"]}}]
    for token in _demo_tokens(json.dumps(arguments)):
        pieces.append({"function": {"arguments": token}})
    return [{"tool_calls": [{"index": 0, **piece}]} for piece in pieces]


def _demo_completion(asked: Json) -> Json | list[Json]:
    """Return the answer to a request, in one piece or as chunks."""
    prompt = _normalise_message(asked["messages"][-1])["content"] or ""
    called = asked.get("tool_choice") == "required"
    deltas = _demo_call(asked) if called else _demo_text(prompt, asked.get("stop"))
    finish = "tool_calls" if called else "stop"
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if limit and limit < len(deltas):
        deltas, finish = deltas[:limit], "length"
    n = asked.get("n") or 1
    spent = {"prompt_tokens": len(prompt.split()), "completion_tokens": n * len(deltas)}
    usage = {**spent, "total_tokens": sum(spent.values())}
    choices = [
        {"index": index, "delta": delta, "finish_reason": None if delta else finish}
        for delta in ({"role": "assistant"}, *deltas, {})
        for index in range(n)
    ]
    head = {"id": "chatcmpl-demo", "created": int(time.time()), "model": "demo"}
    head |= {"object": "chat.completion.chunk"}
    chunks: list[Json] = [{**head, "choices": [choice]} for choice in choices]
    last = {**head, "choices": [], "usage": usage}
    if not asked.get("stream"):
        return accumulate(map(ChatCompletionChunk.from_dict, [*chunks, last])).to_dict()
    options = asked.get("stream_options") or {}
    return [*chunks, last] if options.get("include_usage") else chunks


def _demo_answer(path: str, body: bytes, known: bool) -> tuple[int, Json | list[Json]]:
    """Return a status and what goes with it: JSON, or the chunks of a stream."""
    if not known:
        status, problem = 401, "no API key, or a wrong one"
    elif path.endswith("/models"):
        return 200, {"object": "list", "data": [{"id": "demo", "object": "model"}]}
    elif path.endswith("/chat/completions"):
        try:
            return 200, _demo_completion(json.loads(body))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            status, problem = 400, f"this is no chat request: {error!r}"
    else:
        status, problem = 404, f"there is no {path}"
    return status, {"error": {"message": problem, "type": "invalid_request_error"}}


@contextmanager
def demo_server(delay: float = 0.0, api_key: str | None = None) -> Iterator[str]:
    """Serve the chat API on a loopback port, and give its base URL; also for tests.

    It answers about the prompt that it gets, with `delay` seconds before each token,
    and refuses requests without `api_key`, if given. It heeds `stream`, `n`, `stop`,
    `stream_options`, `max_tokens` (reasoning counts, too), and calls the first of
    `tools` where `tool_choice` is "required".
    """
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            known = not api_key or self.headers["authorization"] == f"Bearer {api_key}"
            status, answer = _demo_answer(self.path.partition("?")[0], body, known)
            kind, pieces = "application/json", [json.dumps(answer).encode()]
            if isinstance(answer, list):
                kind, data = "text/event-stream", [*map(json.dumps, answer), "[DONE]"]
                pieces = [ServerSentEvent(data=each).encode() for each in data]
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Connection", "close")  # none outlives the server
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

_ABOUT = """\
Ask a model at an OpenAI-compatible server. Standard input that is no terminal goes
before the prompt; without either this is a conversation.

exit codes: 0 whole; 1 an error of the server, the network or a file; 2 wrong usage;
3 printed, but not whole (cut off, at the token limit, filtered); 130 Ctrl-C

environment: OPENAI_BASE_URL, OPENAI_API_KEY (no option takes the key: all users of a
machine see options), OPENAI_MODEL, OLLAMA_HOST, NO_COLOR"""


_CHAT_HELP = '''\
/clear         forget the conversation    /save FILE  write it as JSON messages
/system TEXT   set the system message     /load FILE  read it back
/model NAME    ask another; alone: list   /bye        leave, as Ctrl-D does
"""            begins and ends a text of several lines; Ctrl-C stops an answer'''


_CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"


_NOT_WHOLE = {"length": "the token limit", "content_filter": "a content filter"}


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and bidi characters escaped."""
    return re.sub(_CONTROLS, lambda found: ascii(found[0])[1:-1], text)


def _print_note(text: str) -> None:
    """Print words of ours about the answer, or in its place, on standard error."""
    print(f"sse_chat: {_printable(text)}", file=sys.stderr)


def _print_error(error: Exception) -> int:
    """Tell what was said, and in a second line what to do; return the exit code."""
    said = getattr(error, "message", str(error))
    advice = " ".join(str(error).replace(said, "", 1).split()).strip(" :;")
    if type(error) is APIConnectionError:
        advice = f"{advice}; --demo needs no server"
    _print_note(f"{said}\n{advice.replace('base_url', '--base-url')}".strip())
    if isinstance(error, TruncatedStreamError):
        return 3
    return 1 if isinstance(error, (APIError, OSError)) else 2


def _prepare_streams() -> None:
    """Replace what `<&-` and `2>&-` closed. Raises OSError without an output."""
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError("standard output is closed")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    flag = functools.partial(add, action="store_true")
    add("prompt", nargs="*", help="what to ask; - for standard input alone")
    add("-m", "--model", help="default: OPENAI_MODEL, else the first the server lists")
    add("-s", "--system", metavar="TEXT", help="a system message")
    add("-u", "--base-url", metavar="URL", help=f"default: {DEFAULT_BASE_URL}")
    what = "goes into the request; VALUE as JSON, else as text; repeatable"
    add("-o", "--option", metavar="KEY=VALUE", action="append", default=[], help=what)
    flag("--json", help="print the server's chunks, one a line")
    flag("--no-stream", help="ask for the answer in one piece")
    flag("--usage", help="tell model, tokens and times on standard error")
    flag("--hide-reasoning", help="do not show it on standard error")
    what = "the longest silence of the server in seconds, default 600"
    add("--timeout", type=float, default=DEFAULT_TIMEOUT, help=what)
    flag("--list-models", help="print the server's models")
    flag("--dry-run", help="print the request in place of sending it")
    flag("--demo", help="ask a demo server inside this program")
    add("--version", action="version", version=f"sse_chat {__version__}")
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError("-o wants KEY=VALUE")
    with suppress(ValueError, RecursionError):
        return name, json.loads(value)
    return name, value


def _base_url(given: str | None) -> str | None:
    """Return where to ask: as given, else OPENAI_BASE_URL, else OLLAMA_HOST."""
    text = os.environ.get("OLLAMA_HOST", "").strip(" \t\r\n\"'")
    if given or os.environ.get("OPENAI_BASE_URL", "").strip() or not text:
        return given
    # Any part of it may be missing, and 0.0.0.0 is where Ollama listens.
    forms = r"(?s)\A(\w+://)?(\[.*\]|[^/:]*|[^/]*)(:\d+)?:?(/.*)?\Z"
    scheme, host, port, path = re.findall(forms, text)[0]
    port = port or ("" if scheme else ":11434")
    host = f"[{host}]" if ":" in host and "[" not in host else host
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host) or host
    return f"{scheme or 'http://'}{host}{port}{path.rstrip('/')}/v1"


def _usage_line(usage: CompletionUsage | None, times: list[float]) -> str:
    """Tell tokens and times, as far as they are known and mean something."""
    start, first, last, end = (times[at] for at in (0, 1, -2, -1))
    told = f"first token after {first - start:.2f} s, all after {end - start:.2f} s"
    counts = (usage.prompt_tokens, usage.completion_tokens) if usage else ()
    if not counts or any(type(n) is not int or not 0 <= n < 10**9 for n in counts):
        return told
    if counts[1] > 1 and last - first > 0.05:  # less is the time of a few reads
        told += f", {(counts[1] - 1) / (last - first):.1f} tokens/s"
    return f"{counts[0]} + {counts[1]} tokens, {told}"


class _Terminal:
    """One run of the program: what it asks, and how it shows the answers."""

    def __init__(self, args: argparse.Namespace, client: ChatClient) -> None:
        self.args = args
        self.client = client
        self.model = args.model or os.environ.get("OPENAI_MODEL") or None
        self.messages = _messages([], args.system)
        self.ends: dict[Any, str] = {}  # what ends the line that an output is in

    def run(self) -> int:
        if self.args.list_models:
            self.show("".join(f"{name}\n" for name in self.client.models()))
            return 0
        prompt = self.prompt()
        if self.model is None:
            with suppress(APIStatusError):  # no list: perhaps it needs no name
                self.model = next(iter(self.client.models()), None)
            if self.model and sys.stderr.isatty():
                _print_note(f"asking {self.model}")
        call = self.request(prompt)
        if self.args.dry_run:
            return self.dry_run(call)
        return self.answer(call) if prompt else self.converse()

    def prompt(self) -> str:
        """Return standard input and the words as one text, "" for a conversation."""
        words = " ".join(self.args.prompt)
        if sys.stdin.isatty() and words != "-":
            return words
        try:
            piped = sys.stdin.buffer.read().decode().strip("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error}") from None
        text = "\n\n".join(filter(None, (piped, words if words != "-" else "")))
        if not text:
            raise ValueError("no prompt, neither as words nor on standard input")
        return text

    def request(self, prompt: str) -> _Request:
        options: Json = {"model": self.model}
        if self.args.usage and not self.args.no_stream:
            options["stream_options"] = {"include_usage": True}
        options |= dict(map(_option, self.args.option))
        messages = [*self.messages, {"role": "user", "content": prompt}]
        call = _Request(messages, **self.client._merged_with(options))
        return call.in_one_piece() if self.args.no_stream else call

    def dry_run(self, call: _Request) -> int:
        """Show the request, and a curl command that sends it, without secrets."""
        from shlex import quote

        if "authorization" in call.headers:  # variables of the shell, for curl
            secret = "Basic $LOGIN_BASE64" if call.login else "Bearer $OPENAI_API_KEY"
            call.headers["authorization"] = secret
        shown = {
            "url": _public_url(call.url),
            "headers": call.headers,
            "body": call.body,
        }
        curl = [f'-H "{name}: {value}"' for name, value in call.headers.items()]
        curl += ["-d", quote(json.dumps(call.body)), quote(_public_url(call.url))]
        query = '"?$QUERY"' if "?" in call.url else ""
        self.show(json.dumps(shown, indent=2, ensure_ascii=False))
        self.show(f"\n\ncurl -N {' '.join(curl)}{query}\n")
        return 0

    def answer(self, call: _Request) -> int:
        """Ask, show the answer as it comes, and keep it; return the exit code."""
        said, times = "", [time.monotonic()]
        if sys.stderr.isatty():
            self.put(sys.stderr, "...\r", "   \r")  # until something comes
        with ChatStream(call) as stream:
            try:
                for thinking, text in split_thinking(self.texts(stream, times)):
                    said += "" if thinking else text
                    if not self.args.json:
                        self.show(text, thinking)
            finally:
                self.end_line(sys.stdout)
                self.end_line(sys.stderr)
                if said.strip():
                    reply = {"role": "assistant", "content": said}
                    self.messages = [*call.body["messages"], reply]
            next(stream, None)  # raises what has ended the answer before its time
        if self.args.usage:
            times.append(time.monotonic())
            name = stream.completion.model or self.model
            _print_note(f"{name}: {_usage_line(stream.completion.usage, times)}")
        for choice in stream.completion.choices:
            if limit := _NOT_WHOLE.get(choice.finish_reason or ""):
                _print_note(f"the answer is not whole: it stopped at {limit}")
                return 3
        return 0

    def texts(self, stream: ChatStream, times: list[float]) -> Iterator[str]:
        """Give the answer's text piece by piece, and show what else comes."""
        join = _surrogate_joiner()
        with suppress(APIError):  # what was held back of the text comes before it
            for chunk in stream:
                if chunk.text or chunk.reasoning:
                    times.append(time.monotonic())
                if self.args.json:
                    self.show(json.dumps(chunk.raw) + "\n")
                else:
                    self.show(_repair_surrogates(chunk.reasoning), thinking=True)
                refusals = (c.delta.refusal for c in chunk.choices if c.index == 0)
                yield join(chunk.text + "".join(filter(None, refusals)))
        yield join("", final=True)

    def show(self, text: str, thinking: bool = False) -> None:
        """Print text on standard output, thinking on standard error, at once."""
        if not text or (thinking and self.args.hide_reasoning):
            return
        to = sys.stderr if thinking else sys.stdout
        if not thinking or self.ends.get(to) != "\n":  # it goes on with its own line
            self.end_line(sys.stderr)
        shown = _printable(text) if to.isatty() else text
        if thinking and to.isatty() and not os.environ.get("NO_COLOR"):
            shown = f"\x1b[2m{shown}\x1b[0m"  # dim
        self.put(to, shown, "" if text.endswith("\n") else "\n")

    def put(self, to: Any, text: str, end: str) -> None:
        print(text, end="", file=to, flush=True)
        self.ends[to] = end

    def end_line(self, to: Any) -> None:
        self.put(to, self.ends.get(to, ""), "")

    def converse(self) -> int:
        with suppress(ImportError):
            import readline  # noqa: F401 - `input` then edits lines and has a history
        self.show("/? for help, Ctrl-D to leave\n")
        while True:
            try:
                text = input(">>> ")
                quoted = text.startswith('"""')
                while quoted and text.count('"""') < 2:
                    text += "\n" + input("... ")
                if text.startswith("/"):
                    name, _, value = text.partition(" ")
                    self.show(self.command(name, value.strip()) + "\n")
                elif text := (text[3:].removesuffix('"""') if quoted else text).strip():
                    with suppress(KeyboardInterrupt):  # which stops the answer alone
                        self.answer(self.request(text))
            except EOFError:
                self.show("\n")
                return 0
            except KeyboardInterrupt:
                self.show("\n/bye or Ctrl-D to leave\n")
            except (APIError, ValueError, TypeError) as error:
                _print_error(error)

    def command(self, name: str, value: str) -> str:
        """Obey; return what to say then. Raises ValueError if it cannot be done."""
        if name == "/bye":
            raise EOFError
        if name == "/?":
            return _CHAT_HELP
        if name == "/clear":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            return "the conversation is forgotten"
        if name == "/system":
            said = [m for m in self.messages if m["role"] != "system"]
            self.messages = _messages(said, value)
            return "the system message is set" if value else "no system message"
        if name == "/model":
            self.model = value or self.model
            return f"asking {value}" if value else "\n".join(self.client.models())
        if name not in ("/save", "/load"):
            raise ValueError(f'{name} is no command: /? tells them, """ begins a text')
        try:
            return self.save(value) if name == "/save" else self.load(value)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} failed: {error}") from error

    def save(self, name: str) -> str:
        """Write the messages beside the file, then in its place: it is never half."""
        from tempfile import TemporaryDirectory

        path = os.path.realpath(name)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{name!r} is no file")
        with TemporaryDirectory(dir=os.path.dirname(path)) as beside:
            with open(f"{beside}/new", "w", encoding="utf-8", errors="replace") as file:
                json.dump(self.messages, file, ensure_ascii=False, indent=1)
            os.replace(file.name, path)
        return f"saved {len(self.messages)} messages to {name}"

    def load(self, name: str) -> str:
        with open(name, encoding="utf-8") as file:
            messages = json.load(file)
        if _dicts(messages) != messages or not all(m.get("role") for m in messages):
            raise ValueError(f"{name!r} holds no list of messages")
        _Request(
            messages, **self.client._merged_with({})
        )  # raises where they cannot be sent
        self.messages = messages
        return f"loaded {len(messages)} messages from {name}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    try:
        with ExitStack() as stack:
            _prepare_streams()
            stack.callback(sys.stdout.flush)
            args = _parser().parse_intermixed_args(argv)
            url = _base_url(args.base_url)
            if args.demo:
                os.environ["no_proxy"] = "*"  # none leads to this process
                url = stack.enter_context(demo_server(delay=0.02))
            client = ChatClient(base_url=url, timeout=args.timeout)
            return _Terminal(args, stack.enter_context(client)).run()
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if sys.stdout is not None:  # what it did not take is written again at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Who reads us may have left: so do we, without a word.
        return 141 if isinstance(error, BrokenPipeError) else _print_error(error)
    except (APIError, ValueError, TypeError, ModuleNotFoundError) as error:
        return _print_error(error)


if __name__ == "__main__":
    sys.exit(main())
