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
again) is made in code that does no I/O; the sync and async classes stand next to each
other and differ in keywords only. The promise of it all: a broken answer is never taken
for a whole one. An answer that stops early raises an `APIError`, and what had arrived is
on it, in `.completion`.

As a program: `python sse_chat.py "prompt"`, or `--demo` where no server is running.
"""

from __future__ import annotations

import base64
import functools
import importlib
import io
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, fields

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is not imported at run time: it is a fifth of the start-up
    import argparse
    from collections.abc import (
        Awaitable,
        Callable,
        Collection,
        Coroutine,
        Mapping,
        Sequence,
    )
    from dataclasses import Field
    from typing import Any, NoReturn, ParamSpec, TypeVar

    import httpx
    from typing_extensions import Self

    P = ParamSpec("P")
    T = TypeVar("T")

    Json = dict[str, Any]
    Messages = str | Sequence[Mapping[str, Any] | "ChatCompletionMessage"]

__version__ = "0.1.0"

# The most bytes one event may have, or one JSON body: a whole answer with its log
# probabilities or an image fits; without any bound one endless line fills the memory.
DEFAULT_MAX_EVENT_BYTES = 16 * 1024 * 1024

# ------------------------------------------------------------------------------------
# Server-sent events: the HTML Living Standard, section 9.2, "Server-sent events"
# ------------------------------------------------------------------------------------


class SSEError(Exception):
    """Not an event stream, or an event over the limit.

    `events` holds the events of the same read that came before it.
    """

    def __init__(self, message: str, events: list[ServerSentEvent] | None = None):
        super().__init__(message)
        self.events = events or []


@dataclass
class ServerSentEvent:
    """One event: its type, its data, the last event id, `retry` in milliseconds."""

    event: str = "message"
    data: str = ""
    id: str = ""
    retry: int | None = None

    def json(self) -> Any:
        """Return the data parsed as JSON. Raises ValueError where it is none."""
        return json.loads(self.data)

    def encode(self) -> bytes:
        """Return the event as bytes of a stream: decoding them gives it back.

        The id is always written, since without it the one of an earlier event would
        stand. Raises ValueError for what a stream cannot carry: a line end in a name
        or an id, a CR in the data, a NUL in an id, half a surrogate pair.
        """
        if "\r" in self.data:
            raise ValueError("a CR in the data would come back as a line feed")
        if re.search("[\r\n]", self.event) or re.search("[\r\n\0]", self.id):
            raise ValueError("an event name or id cannot hold line ends, an id no NUL")
        lines = [f"id: {self.id}"]
        if self.event != "message":
            lines.append(f"event: {self.event}")
        if self.retry is not None:
            lines.append(f"retry: {self.retry}")
        lines += ["data: " + line for line in self.data.split("\n")]
        return ("\n".join(lines) + "\n\n").encode()


class SSELineDecoder:
    """Bytes in any pieces in, whole lines out: CR, LF, CRLF and nothing else ends one.

    Work and memory are linear in the bytes received, however they are cut.
    """

    def __init__(self) -> None:
        self._pending = bytearray()  # the line that has no end yet
        self._after_cr = False  # a line ended at CR: the LF that may follow is its own
        self._at_start = True  # nothing decoded yet: one BOM may be dropped

    @property
    def pending(self) -> int:
        """How many bytes wait for the end of their line."""
        return len(self._pending)

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that `chunk` ends, without their ends."""
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        has_cr = b"\r" in chunk
        end = max(chunk.rfind(b"\n"), chunk.rfind(b"\r") if has_cr else -1) + 1
        if not end:
            self._pending += chunk
            return []
        # No UTF-8 sequence spans a line end, so all up to the last is decoded at once.
        if self._pending:
            self._pending += chunk[:end]
            text = self._pending.decode("utf-8", "replace")
            self._pending = bytearray()
        else:
            text = chunk[:end].decode("utf-8", "replace")
        if end < len(chunk):
            self._pending += chunk[end:]
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if has_cr:
            self._after_cr = text.endswith("\r") and not self._pending
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
        lines.pop()
        return lines


class SSEDecoder:
    """Lines in, or bytes, events out: "Interpreting an event stream" of the standard.

    `max_event_bytes` bounds the data lines of one event, and any single line; None for
    no bound. Over it every call raises SSEError. `last_event_id` is the id to send as
    `Last-Event-ID` when connecting again; `retry` is the reconnection time the server
    last asked for, in milliseconds.
    """

    def __init__(self, max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._limit = sys.maxsize if max_event_bytes is None else max_event_bytes
        self._lines = SSELineDecoder()
        self._size = 0  # bytes of the data lines of this block
        self._overflowed = False  # stays: what follows a cut event is not a stream
        self._event = ""
        self._data: list[str] = []  # joined once, or many lines would cost their square
        self._id = ""  # not the last event id before the block's blank line
        self._retry: int | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Return the events that `chunk` ends. Raises SSEError over the limit."""
        events: list[ServerSentEvent] = []
        try:
            if self._overflowed:
                self._overflow()
            for line in self._lines.feed(chunk):
                # Nearly every line is data or blank: without these two branches, which
                # `decode` has too, a stream of small events takes half as long again.
                if line[:6] == "data: ":
                    self._size += len(line) if line.isascii() else _utf8_size(line)
                    if self._size > self._limit:
                        self._overflow()
                    self._data.append(line[6:])
                elif not line and self._data:
                    events.append(self._dispatch())
                else:
                    event = self.decode(line)
                    if event is not None:
                        events.append(event)
            if self._lines.pending > self._limit:
                self._overflow()
        except SSEError as error:
            error.events = events
            raise
        return events

    def decode(self, line: str) -> ServerSentEvent | None:
        """Take one line without its end; return the event that a blank one ends."""
        if self._overflowed:
            self._overflow()
        if not line:
            if self._data:
                return self._dispatch()
            # No data, no event: the id is kept all the same, the event type forgotten.
            self.last_event_id = self._id
            self._event, self._retry = "", None
            return None
        size = _utf8_size(line)
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._size += size
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            with suppress(ValueError):  # more digits than Python converts
                self.retry = self._retry = int(value)
        if max(size, self._size) > self._limit:
            self._overflow()
        return None

    def _dispatch(self) -> ServerSentEvent:
        self.last_event_id = self._id
        event = ServerSentEvent(
            self._event or "message", "\n".join(self._data), self._id, self._retry
        )
        self._data.clear()
        self._size = 0
        self._event, self._retry = "", None
        return event

    def _overflow(self) -> NoReturn:
        self._overflowed = True
        self._data.clear()
        raise SSEError(f"an event of more than {self._limit} bytes (max_event_bytes)")


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def iter_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Give the lines of a stream of bytes, cut anywhere; a last one without end is none.

    In place of httpx's `Response.iter_lines`, which also splits at U+2028, U+0085 and
    six more characters that are legal inside JSON, and drops them.
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


def iter_sse(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ServerSentEvent]:
    """Give the events of a stream of bytes. Raises SSEError for one over the limit."""
    decoder = SSEDecoder(max_event_bytes)
    try:
        for chunk in chunks:
            yield from decoder.feed(chunk)
    except SSEError as error:
        yield from error.events
        raise


async def aiter_sse(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ServerSentEvent]:
    """Async twin of `iter_sse`."""
    decoder = SSEDecoder(max_event_bytes)
    try:
        async for chunk in chunks:
            for event in decoder.feed(chunk):
                yield event
    except SSEError as error:
        for event in error.events:
            yield event
        raise


class EventSource:
    """The events of an httpx response. Both raise SSEError where it is no event stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response

    def iter_sse(self) -> Iterator[ServerSentEvent]:
        """Give the events as they come."""
        self._check_content_type()
        yield from iter_sse(self.response.iter_bytes())

    async def aiter_sse(self) -> AsyncIterator[ServerSentEvent]:
        """Give the events as they come."""
        self._check_content_type()
        async for event in aiter_sse(self.response.aiter_bytes()):
            yield event

    def _check_content_type(self) -> None:
        content_type = self.response.headers.get("content-type", "")
        if "text/event-stream" not in content_type.lower():
            raise SSEError(
                f"expected a response of type text/event-stream, got {content_type!r}"
            )


@contextmanager
def connect_sse(
    client: httpx.Client, method: str, url: str, **kwargs: Any
) -> Iterator[EventSource]:
    """Send a request for an event stream; `kwargs` are those of `client.stream`."""
    kwargs["headers"] = _event_stream_headers(kwargs.get("headers"))
    with client.stream(method, url, **kwargs) as response:
        yield EventSource(response)


@asynccontextmanager
async def aconnect_sse(
    client: httpx.AsyncClient, method: str, url: str, **kwargs: Any
) -> AsyncIterator[EventSource]:
    """Async twin of `connect_sse`."""
    kwargs["headers"] = _event_stream_headers(kwargs.get("headers"))
    async with client.stream(method, url, **kwargs) as response:
        yield EventSource(response)


def _event_stream_headers(given: Any) -> list[tuple[str, str]]:
    ours = {"accept": "text/event-stream", "cache-control": "no-store"}
    items = given.items() if hasattr(given, "items") else given or ()
    return [(k, v) for k, v in items if k.lower() not in ours] + list(ours.items())


# ------------------------------------------------------------------------------------
# Chat types: openai's names, fields and repr, as plain dataclasses
# ------------------------------------------------------------------------------------


class _Model:
    """What the chat types share: openai's repr, and the way from and to a dict."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in _fields(self)
            if f.repr and not (f.metadata.get("ours") and getattr(self, f.name) is None)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def from_dict(cls, d: Json) -> Self:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        made = cls()
        names = {f.name for f in _fields(cls)} - {"extra", "raw"}
        for f in _fields(cls):
            value = d.get(f.name)
            if value is not None and f.name in names:
                convert = f.metadata.get("convert")
                value = convert(value) if convert else value
                if value is not None:
                    made.__dict__[f.name] = value
        if hasattr(made, "extra"):
            made.__dict__["extra"] = _unknown(d, names)
        if hasattr(made, "raw"):
            made.__dict__["raw"] = d
        return made

    def to_dict(self) -> Json:
        """Return it as JSON would hold it: unset fields left out, unknown ones kept."""
        made = {
            f.name: _plain(getattr(self, f.name))
            for f in _fields(self)
            if f.name not in ("extra", "raw") and getattr(self, f.name) is not None
        }
        return made | (getattr(self, "extra", None) or {})


def _fields(model: Any) -> tuple[Field[Any], ...]:
    return fields(model)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.to_dict() if isinstance(value, _Model) else value


def _unknown(d: Json, known: Collection[str]) -> Json | None:
    return {name: d[name] for name in d if name not in known} or None


def _ours() -> Any:
    """Make a field that openai's repr lacks: it comes last and hides while unset."""
    return field(default=None, metadata={"ours": True})


def _part(convert: Callable[[Any], Any], make: Callable[[], Any] = lambda: None) -> Any:
    """Make a field whose value `from_dict` takes through `convert`."""
    return field(default_factory=make, metadata={"convert": convert})


def _one(model: type[_Model]) -> Callable[[Any], Any]:
    return lambda value: model.from_dict(value) if isinstance(value, dict) else None


def _many(model: type[_Model]) -> Callable[[Any], Any]:
    return lambda value: [model.from_dict(item) for _, item in _dicts(value)]


def _dicts(value: Any) -> Iterator[tuple[int, Json]]:
    for position, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict):
            yield position, item


def _encodable(value: Any) -> Any:
    """Return a text with surrogate halves joined to characters, or as U+FFFD if alone.

    Servers that cut their text between bytes send an emoji as two halves, `"\\ud83d"`
    and `"\\ude42"`, which no encoding takes: printing one of them would raise.
    """
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _arguments(value: Any) -> Any:
    """Return the arguments of a call as text: llama.cpp has sent them as an object."""
    if value is None or isinstance(value, str):
        return _encodable(value)
    return json.dumps(value)


def _content(d: Json) -> tuple[str | None, str | None]:
    """Return text and reasoning of a message or delta, wherever a server puts them.

    Reasoning is `reasoning_content` with most, `reasoning` with Ollama, vLLM and
    OpenRouter, and with Mistral a part of a list of typed parts.
    """
    content = d.get("content")
    reasoning = d.get("reasoning_content") or d.get("reasoning")
    if not isinstance(reasoning, str):
        reasoning = None
    if content is None or isinstance(content, str):
        return content, reasoning
    text: list[Any] = []
    thinking: list[Any] = [reasoning or ""]
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict):
            text.append(part)
        elif isinstance(part.get("thinking"), list):
            thinking += [p.get("text") for p in part["thinking"] if isinstance(p, dict)]
        else:
            thinking.append(part.get("thinking"))
            text.append(part.get("text"))
    return _joined(text), _joined(thinking) or None


def _joined(parts: list[Any]) -> str:
    return "".join(part for part in parts if isinstance(part, str))


def _index(d: Json, position: int) -> int:
    index = d.get("index")
    return index if index.__class__ is int else position


def _finish_reason(d: Json) -> str | None:
    """Return why a choice ended; "" is not an end: SGLang and old Ollama send it."""
    reason = d.get("finish_reason") or d.get("finishReason")
    return reason if isinstance(reason, str) and reason else None


@dataclass(repr=False)
class TopLogprob(_Model):
    """One of the likeliest tokens at a place; `logprob` is its natural logarithm."""

    token: str = ""
    bytes: list[int] | None = None
    logprob: float = 0.0


@dataclass(repr=False)
class ChatCompletionTokenLogprob(_Model):
    """The token that was chosen, with the likeliest ones beside it."""

    token: str = ""
    bytes: list[int] | None = None
    logprob: float = 0.0
    top_logprobs: list[TopLogprob] = _part(_many(TopLogprob), list)


@dataclass(repr=False)
class ChoiceLogprobs(_Model):
    """Log probabilities of the tokens of a choice."""

    content: list[ChatCompletionTokenLogprob] | None = _part(
        _many(ChatCompletionTokenLogprob)
    )
    refusal: list[ChatCompletionTokenLogprob] | None = _part(
        _many(ChatCompletionTokenLogprob)
    )


@dataclass(repr=False)
class CompletionTokensDetails(_Model):
    """What the tokens of the answer were spent on."""

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
    completion_tokens_details: CompletionTokensDetails | None = _part(
        _one(CompletionTokensDetails)
    )
    prompt_tokens_details: PromptTokensDetails | None = _part(_one(PromptTokensDetails))


@dataclass(repr=False)
class ChoiceDeltaFunctionCall(_Model):
    """A piece of a call in the form that tool calls replaced."""

    arguments: str | None = _part(_arguments)
    name: str | None = None


@dataclass(repr=False)
class ChoiceDeltaToolCallFunction(_Model):
    """A piece of a function call; the pieces of `arguments` make up one JSON text."""

    arguments: str | None = _part(_arguments)
    name: str | None = None


@dataclass(repr=False)
class ChoiceDeltaToolCall(_Model):
    """A piece of a tool call; some servers give no `index`, others no `id`."""

    index: int | None = None
    id: str | None = None
    function: ChoiceDeltaToolCallFunction | None = None
    type: str | None = None
    extra: Json | None = _ours()

    @classmethod
    def from_dict(cls, d: Json) -> ChoiceDeltaToolCall:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        get = d.get
        index, id = get("index"), get("id")
        function = get("function")
        if isinstance(function, dict):
            arguments = function.get("arguments")
            if arguments.__class__ is not str:
                arguments = _arguments(arguments)
            function = ChoiceDeltaToolCallFunction(arguments, function.get("name"))
        else:
            function = None
        return cls(
            index if index.__class__ is int else None,
            id if id.__class__ is str else None,
            function,
            get("type"),
            None if _TOOL_CALL.issuperset(d) else _unknown(d, _TOOL_CALL),
        )


@dataclass(repr=False)
class ChoiceDelta(_Model):
    """What a chunk adds to the message of a choice."""

    content: str | None = None
    function_call: ChoiceDeltaFunctionCall | None = None
    refusal: str | None = None
    role: str | None = None
    tool_calls: list[ChoiceDeltaToolCall] | None = None
    reasoning_content: str | None = _ours()
    extra: Json | None = _ours()

    @classmethod
    def from_dict(cls, d: Json) -> ChoiceDelta:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        get = d.get
        content = get("content")
        if len(d) == 1 and content.__class__ is str:  # four in five chunks, 4 x faster
            return cls(content)
        content, reasoning = _content(d)
        refusal = get("refusal")
        function_call = get("function_call")
        calls = get("tool_calls")
        return cls(
            content,
            ChoiceDeltaFunctionCall.from_dict(function_call)
            if isinstance(function_call, dict)
            else None,
            refusal if isinstance(refusal, str) else None,
            get("role"),
            [
                ChoiceDeltaToolCall.from_dict(call)
                for call in calls
                if isinstance(call, dict)
            ]
            if isinstance(calls, list)
            else None,
            reasoning,
            None if _DELTA.issuperset(d) else _unknown(d, _DELTA),
        )


_TOOL_CALL = frozenset(("index", "id", "function", "type"))
_DELTA = frozenset(
    ("content", "function_call", "refusal", "role", "tool_calls", "reasoning_content")
    + ("reasoning",)
)


@dataclass(repr=False)
class ChatCompletionChunk(_Model):
    """One event of a streamed answer; `raw` is all that the server sent in it."""

    @dataclass(repr=False)
    class Choice(_Model):
        """What a chunk adds to one of the answers."""

        delta: ChoiceDelta = field(default_factory=ChoiceDelta)
        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = None

        @classmethod
        def from_dict(cls, d: Json, position: int = 0) -> ChatCompletionChunk.Choice:
            """Build it; without an index it is the one of its position in the list."""
            delta = d.get("delta")
            index = d.get("index")
            logprobs = d.get("logprobs")
            return cls(
                ChoiceDelta.from_dict(delta)
                if isinstance(delta, dict)
                else ChoiceDelta(),
                _finish_reason(d),
                index if index.__class__ is int else position,
                ChoiceLogprobs.from_dict(logprobs)
                if isinstance(logprobs, dict)
                else None,
            )

    id: str = ""
    choices: list[Choice] = field(default_factory=list)
    created: int = 0
    model: str = ""
    object: str = "chat.completion.chunk"
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = None
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, d: Json) -> ChatCompletionChunk:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        get = d.get
        choices = get("choices")
        usage = get("usage")
        return cls(
            get("id") or "",
            [
                cls.Choice.from_dict(choice, position)
                for position, choice in enumerate(choices)
                if isinstance(choice, dict)
            ]
            if isinstance(choices, list)
            else [],
            get("created") or 0,
            get("model") or "",
            get("object") or "chat.completion.chunk",
            get("service_tier"),
            get("system_fingerprint"),
            CompletionUsage.from_dict(usage) if isinstance(usage, dict) else None,
            d,
        )

    @property
    def text(self) -> str:
        """The text it adds to the first answer (index 0), "" if none."""
        for choice in self.choices:
            if choice.index == 0:
                return choice.delta.content or ""
        return ""

    @property
    def reasoning(self) -> str:
        """The reasoning it adds to the first answer (index 0), "" if none."""
        for choice in self.choices:
            if choice.index == 0:
                return choice.delta.reasoning_content or ""
        return ""


@dataclass(repr=False)
class Function(_Model):
    """The function to call; `arguments` is a JSON text, as the model wrote it."""

    arguments: str = _part(_arguments, str)
    name: str = _part(_encodable, str)


@dataclass(repr=False)
class FunctionCall(Function):
    """A call in the form that tool calls replaced."""


@dataclass(repr=False)
class ChatCompletionMessageToolCall(_Model):
    """A tool call. `extra` holds what a server sent beyond openai's fields.

    Gemini's `extra_content` is one, without which it refuses the next turn: `to_dict`
    has it in its place.
    """

    id: str = _part(_encodable, str)
    function: Function = _part(_one(Function), Function)
    type: str = "function"
    extra: Json | None = _ours()


@dataclass(repr=False)
class ChatCompletionMessage(_Model):
    """An answer's message; it can stand as it is in the `messages` of the next turn."""

    content: str | None = None
    refusal: str | None = _part(_encodable)
    role: str = "assistant"
    annotations: list[Json] | None = None
    audio: Json | None = None
    function_call: FunctionCall | None = _part(_one(FunctionCall))
    tool_calls: list[ChatCompletionMessageToolCall] | None = _part(
        _many(ChatCompletionMessageToolCall)
    )
    reasoning_content: str | None = _ours()
    extra: Json | None = _ours()

    @classmethod
    def from_dict(cls, d: Json) -> ChatCompletionMessage:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        content, reasoning = map(_encodable, _content(d))
        rest = {name: d[name] for name in d if name != "reasoning"}
        return super().from_dict(
            rest | {"content": content, "reasoning_content": reasoning}
        )


@dataclass(repr=False)
class ChatCompletion(_Model):
    """A whole answer, or what has come of it; `raw` is all that the server sent.

    Of a streamed answer `raw` is what the server would have sent in one piece.
    """

    @dataclass(repr=False)
    class Choice(_Model):
        """One of the answers; `finish_reason` is None where it was cut off."""

        finish_reason: str | None = None
        index: int = 0
        logprobs: ChoiceLogprobs | None = _part(_one(ChoiceLogprobs))
        message: ChatCompletionMessage = _part(
            _one(ChatCompletionMessage), ChatCompletionMessage
        )

    id: str = _part(_encodable, str)
    choices: list[Choice] = field(default_factory=list)
    created: int = 0
    model: str = _part(_encodable, str)
    object: str = "chat.completion"
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: CompletionUsage | None = _part(_one(CompletionUsage))
    raw: Json = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, d: Json) -> ChatCompletion:
        """Build it from what a server sent, whatever is missing, null or unknown."""
        made = super().from_dict(d)
        made.choices = []
        for position, sent in _dicts(d.get("choices")):
            choice = cls.Choice.from_dict(sent)
            choice.index = _index(sent, position)
            choice.finish_reason = _finish_reason(sent)
            made.choices.append(choice)
        return made

    @property
    def text(self) -> str:
        """The text of the first answer (index 0), "" if there is none."""
        return next((c.message.content or "" for c in self.choices if c.index == 0), "")

    @property
    def reasoning(self) -> str:
        """The reasoning of the first answer (index 0), "" if there is none."""
        messages = (c.message for c in self.choices if c.index == 0)
        return next((m.reasoning_content or "" for m in messages), "")


# ------------------------------------------------------------------------------------
# Errors: openai's names, one tree
# ------------------------------------------------------------------------------------


class APIError(Exception):
    """Anything that a network or a server can do to an answer.

    `body` is the error as the server sent it (parsed JSON or text), `message`, `code`,
    `type` and `param` what it says; `completion` is what had arrived before.
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
        self.completion = ChatCompletion()


class APIConnectionError(APIError):
    """No answer began: no connection, or it broke before the first line."""


class APITimeoutError(APIConnectionError):
    """The server was silent for longer than was allowed, before or in the answer."""


class APIStatusError(APIError):
    """The server answered with a status that is no success.

    `response` is an httpx.Response with the body read and without its request;
    `retry_after` the seconds that the server asked to wait, None if it did not.
    """

    status_code: int = 0
    response: httpx.Response
    retry_after: float | None = None


class TruncatedStreamError(APIError):
    """The answer was cut off: it ended before every finish_reason and before [DONE]."""


class APIResponseValidationError(APIError):
    """What came is no answer: not JSON, not an event stream, or over the limit."""


# ------------------------------------------------------------------------------------
# Accumulating: chunks to a whole answer
# ------------------------------------------------------------------------------------


class ChatAccumulator:
    """Chunks in, `completion` out: the answer as far as it has come, at any time.

    Memory is that of the text and does not grow with the number of chunks.
    """

    def __init__(self) -> None:
        self._unfinished = 0  # choices without a finish_reason
        self._head: Json = {"id": "", "created": 0, "model": ""}
        self._rest: Json = {}
        self._answers: dict[int, _Answer] = {}

    def add(self, chunk: ChatCompletionChunk) -> None:
        """Add the next chunk."""
        head = self._head
        if not (head["id"] and head["model"] and head["created"]):
            # Azure's first chunk is nameless, so each comes from the first that has it.
            head["id"] = head["id"] or chunk.id
            head["model"] = head["model"] or chunk.model
            head["created"] = head["created"] or chunk.created
        if not _CHUNK.issuperset(chunk.raw):
            _merge(self._rest, _unknown(chunk.raw, _CHUNK) or {})
        if chunk.usage is not None:
            head["usage"] = chunk.raw.get("usage") or chunk.usage.to_dict()
        if chunk.system_fingerprint is not None:
            head["system_fingerprint"] = chunk.system_fingerprint
        if chunk.service_tier is not None:
            head["service_tier"] = chunk.service_tier
        for choice in chunk.choices:
            answer = self._answers.get(choice.index)
            if answer is None:
                answer = self._answers[choice.index] = _Answer()
                self._unfinished += 1
            if choice.finish_reason and not answer.finish_reason:
                self._unfinished -= 1
            answer.add(choice)

    @property
    def finished(self) -> bool:
        """True once every choice seen has a finish_reason, and one was seen."""
        return bool(self._answers) and not self._unfinished

    @property
    def completion(self) -> ChatCompletion:
        """The answer so far; `finish_reason` is None where no end has come."""
        answers = sorted(self._answers.items())
        choices = [{"index": index} | answer.to_dict() for index, answer in answers]
        head = self._head | {"object": "chat.completion", "choices": choices}
        return ChatCompletion.from_dict(head | self._rest)


def accumulate(chunks: Iterable[ChatCompletionChunk]) -> ChatCompletion:
    """Return the whole that the chunks make up."""
    accumulator = ChatAccumulator()
    for chunk in chunks:
        accumulator.add(chunk)
    return accumulator.completion


_CHUNK = frozenset(
    ("id", "choices", "created", "model", "object", "service_tier", "usage")
    + ("system_fingerprint", "obfuscation")
)


class _Answer:
    """One choice while its deltas come.

    Text grows in StringIO: a list of its pieces would take ten times the memory of the
    text, and adding strings the square of the time.
    """

    def __init__(self) -> None:
        self.role: str | None = None
        self.texts: dict[str, io.StringIO] = {}
        self.calls: list[_ToolCall] = []
        self.call_at: dict[int | str, _ToolCall] = {}  # the latest of each index or id
        self.function_call: _ToolCall | None = None
        self.logprobs: Json = {}
        self.finish_reason: str | None = None
        self.extra: Json = {}

    def add(self, choice: ChatCompletionChunk.Choice) -> None:
        delta = choice.delta
        if delta.content is not None:
            self.write("content", delta.content)
        if delta.reasoning_content is not None:
            self.write("reasoning_content", delta.reasoning_content)
        if delta.refusal is not None:
            self.write("refusal", delta.refusal)
        if delta.role:
            self.role = self.role or delta.role
        for piece in delta.tool_calls or ():
            self.tool_call(piece).add(piece)
        if delta.function_call is not None:
            self.function_call = self.function_call or _ToolCall(0)
            self.function_call.add_function(delta.function_call)
        if delta.extra:
            _merge(self.extra, delta.extra)
        if choice.logprobs is not None:
            _merge(self.logprobs, vars(choice.logprobs))
        if choice.finish_reason:  # stays: a chunk without one may follow
            self.finish_reason = choice.finish_reason

    def write(self, name: str, text: str) -> None:
        if name not in self.texts:
            self.texts[name] = io.StringIO()
        self.texts[name].write(text)

    def tool_call(self, piece: ChoiceDeltaToolCall) -> _ToolCall:
        """Find the call that a piece continues, or open one.

        It is found by its index; without one by its id, and with neither it is the last.
        Another id at the same index is another call: some servers number all of them 0.
        """
        key = piece.id or None if piece.index is None else piece.index
        if key is None:
            call = self.calls[-1] if self.calls else None
        else:
            call = self.call_at.get(key)
        if call is None or (piece.id and call.id and piece.id != call.id):
            index = len(self.calls) if piece.index is None else piece.index
            call = _ToolCall(index)
            self.calls.append(call)
        for name in (piece.index, piece.id or None):
            if name is not None:
                self.call_at[name] = call
        return call

    def to_dict(self) -> Json:
        message: Json = {"role": self.role or "assistant"}
        message |= {name: text.getvalue() for name, text in self.texts.items()}
        if self.calls:
            calls = sorted(self.calls, key=lambda call: call.index)
            message["tool_calls"] = [call.to_dict() for call in calls]
        if self.function_call is not None:
            message["function_call"] = self.function_call.function()
        return {
            "message": message | self.extra,
            "finish_reason": self.finish_reason,
            "logprobs": {k: _plain(v) for k, v in self.logprobs.items()} or None,
        }


class _ToolCall:
    """One tool call while its pieces come: id and name are set once, the rest grows."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = ""
        self.name = ""
        self.type = "function"
        self.arguments = io.StringIO()
        self.extra: Json = {}

    def add(self, piece: ChoiceDeltaToolCall) -> None:
        self.id = self.id or piece.id or ""
        self.type = piece.type or self.type
        if piece.function is not None:
            self.add_function(piece.function)
        if piece.extra:
            _merge(self.extra, piece.extra)

    def add_function(
        self, piece: ChoiceDeltaToolCallFunction | ChoiceDeltaFunctionCall
    ) -> None:
        self.name = self.name or piece.name or ""
        self.arguments.write(piece.arguments or "")

    def function(self) -> Json:
        return {"arguments": self.arguments.getvalue(), "name": self.name}

    def to_dict(self) -> Json:
        return {
            "id": self.id,
            "function": self.function(),
            "type": self.type,
        } | self.extra


def _merge(into: Json, more: Json) -> None:
    """Add `more` to `into`: lists grow, dicts merge, of the rest the latest stays."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(into.setdefault(name, {}), dict):
            _merge(into[name], value)
        elif isinstance(value, list) and isinstance(into.setdefault(name, []), list):
            into[name].extend(value)
        elif value is not None:
            into[name] = value


def split_thinking(texts: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """Split inline `<think>…</think>` out of a stream of strings, cut anywhere.

    Gives pairs of (is it thinking, text) without the tags, as soon as it is certain that
    no tag begins in the text.
    """
    thinking = False
    held = ""  # the end of the last text, where it may be the beginning of a tag
    for text in texts:
        text = held + text
        at = 0
        while (end := text.find(_THINK[thinking], at)) >= 0:
            if end > at:
                yield thinking, text[at:end]
            at = end + len(_THINK[thinking])
            thinking = not thinking
        tag = _THINK[thinking]
        most = min(len(tag) - 1, len(text) - at)
        keep = next(n for n in range(most, -1, -1) if text.endswith(tag[:n]))
        held = text[len(text) - keep :]
        if at < len(text) - keep:
            yield thinking, text[at : len(text) - keep]
    if held:
        yield thinking, held


_THINK = {False: "<think>", True: "</think>"}  # the tag that ends each state


# ------------------------------------------------------------------------------------
# How an answer ends: bytes to chunks, and the verdict, without I/O
# ------------------------------------------------------------------------------------


def iter_chunks(
    chunks: Iterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> Iterator[ChatCompletionChunk]:
    """Give the chunks of an answer's body, for other HTTP libraries, files and tests.

    Raises what `ChatStream` raises for a body that is no whole answer. An OSError of
    the iterable counts as the end of the body.
    """
    decoder = _AnswerDecoder(max_event_bytes)
    cause = None
    try:
        for chunk in chunks:
            yield from decoder.feed(chunk)
            if decoder.done:
                return
    except _network_errors() as error:
        cause = error
    yield from decoder.finish(cause)


async def aiter_chunks(
    chunks: AsyncIterable[bytes], max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES
) -> AsyncIterator[ChatCompletionChunk]:
    """Async twin of `iter_chunks`."""
    decoder = _AnswerDecoder(max_event_bytes)
    cause = None
    try:
        async for chunk in chunks:
            for made in decoder.feed(chunk):
                yield made
            if decoder.done:
                return
    except _network_errors() as error:
        cause = error
    for made in decoder.finish(cause):
        yield made


def _network_errors() -> tuple[type[Exception], ...]:
    """Return what httpx or httpx2, as far as they are loaded, raise for a network."""
    loaded = [
        sys.modules[name] for name in ("httpx", "httpx2") if sys.modules.get(name)
    ]
    named = [(m.HTTPError, m.StreamError, m.InvalidURL) for m in loaded]
    return (OSError, *itertools.chain.from_iterable(named))


class _SSEDecoder(SSEDecoder):
    """Takes a field named `error` for an event: old llama.cpp reports errors so."""

    def decode(self, line: str) -> ServerSentEvent | None:
        if line.startswith("error:"):
            return ServerSentEvent("error", line[6:].strip())
        return super().decode(line)


class _AnswerDecoder:
    """The bytes of one body in, chunks out, and the verdict on how it ended.

    | the body                                      | the verdict                 |
    |-----------------------------------------------|-----------------------------|
    | `[DONE]`, or a finish_reason for every choice | complete                    |
    | a JSON completion in place of a stream        | complete, one chunk         |
    | ends before that, cleanly or not              | TruncatedStreamError        |
    | says that an error happened, in any shape     | APIError                    |
    | silent for longer than allowed                | APITimeoutError             |
    | an event that is not JSON, or too large       | APIResponseValidationError  |
    | no event stream and no JSON, or nothing       | APIResponseValidationError  |

    An error after `[DONE]` or a cut after the last finish_reason changes nothing: the
    answer is whole. `[DONE]` after an error changes nothing either.
    """

    def __init__(
        self,
        max_event_bytes: int | None,
        where: str = "",
        redact: Callable[[str], str] = str,
    ) -> None:
        self.done = False  # the answer has ended as it should: what follows is not read
        self.failure: APIError | None = None
        self.has_token = False
        self._late = False  # the time for the first token is over, and none has come
        self._limit = sys.maxsize if max_event_bytes is None else max_event_bytes
        self._events = _SSEDecoder(max_event_bytes)
        self._content_type = ""
        self._read_timeout: float | None = None
        self._inflate: _Inflater | None = None
        self._where = where
        self._redact = redact
        self._kind = ""  # "stream", "json" or "other", once that is known
        self._mark = b""  # the first bytes that are not blank
        self._head = bytearray()  # all bytes, until it is known to be a stream
        self._answer = ChatAccumulator()
        self._whole: ChatCompletion | None = None

    def begin(self, headers: Mapping[str, str], read_timeout: float | None) -> None:
        """Take what is known before the first byte; without, the bytes alone tell."""
        self._content_type = headers.get("content-type", "")
        self._read_timeout = read_timeout
        encoding = headers.get("content-encoding", "identity")
        self._inflate = None if encoding == "identity" else _Inflater(encoding)

    def is_late(self) -> bool:
        """The time for the first token is over: return whether none has come."""
        self._late = not self.has_token
        return self._late

    def check_done(self) -> None:
        """Raise if a closed stream is asked for more, and was not at its end."""
        if not self.done:
            text = f"the stream was closed before the answer was whole{self._where}"
            raise self.failure or self._fail(TruncatedStreamError(text))

    @property
    def completion(self) -> ChatCompletion:
        return self._whole or self._answer.completion

    @property
    def complete(self) -> bool:
        ended = self.done or self._whole is not None or self._answer.finished
        return ended and self.failure is None

    def feed(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        """Give the chunks that `data` ends; raise where the body goes wrong."""
        if self._inflate is not None:
            return itertools.chain.from_iterable(map(self._feed, self._inflated(data)))
        return self._feed(data)

    def _feed(self, data: bytes) -> Iterator[ChatCompletionChunk]:
        if self._late:
            raise self._timed_out()
        if self._kind != "stream":
            data = self._recognise(data)
        overflow = None
        try:
            events = self._events.feed(data)
        except SSEError as error:
            events, overflow = error.events, error
        for event in events:
            chunk = self._chunk(event)
            if chunk is not None:
                yield chunk
            elif self.done:
                return
        if overflow is not None:
            raise self._invalid(str(overflow)) from overflow

    def finish(self, cause: Exception | None = None) -> Iterator[ChatCompletionChunk]:
        """Give what the end of the body makes of its last bytes; raise if it is cut.

        `cause` is how the connection broke, None if the server ended the body.
        """
        if self._kind == "stream":
            yield from self._last_event()
        elif self._kind == "json":
            yield self._chunk_of_json(cause)
        if not self.complete:
            raise self._verdict(cause) from cause
        self.done = True

    def _recognise(self, data: bytes) -> bytes:
        """Hold the body back until its first bytes tell what it is; give a stream's."""
        self._head += data
        if len(self._mark) < 8:
            self._mark = (self._mark + data).lstrip(_BLANK)[:8]
            self._kind = _kind_of(self._mark, self._content_type)
        if self._kind == "stream":
            data, self._head = bytes(self._head), bytearray()
            return data
        if len(self._head) > self._limit:
            raise self._invalid(f"a body of more than {self._limit} bytes")
        if self._kind == "other" and len(self._head) > 4 * _EXCERPT:
            raise self._no_answer()
        return b""

    def _chunk(self, event: ServerSentEvent) -> ChatCompletionChunk | None:
        """Return the chunk in an event; None for [DONE] and for events without data."""
        data = event.data
        if data.startswith("[DONE]"):
            self.done = True
            return None
        told = event.event == "error"
        try:
            payload = _parse_json(data)
            if told or payload.__class__ is not dict or not payload.get("choices"):
                self._check(payload, told, data)
            elif payload.get("error"):  # OpenRouter sends choices beside it
                raise self._reported(data)
            chunk = ChatCompletionChunk.from_dict(payload)
            for choice in chunk.choices:
                if choice.finish_reason == "error":
                    raise self._reported(data)
            self._answer.add(chunk)
        except (ValueError, RecursionError) as error:
            if not data or data.isspace():
                return None
            if told:
                raise self._reported(data) from None
            raise self._invalid("an event that is not JSON", data) from error
        if not self.has_token:
            self.has_token = _has_token(chunk)
        return chunk

    def _check(self, payload: Any, told: bool, text: str) -> None:
        """Raise if the payload is an error, or no object."""
        if told or _find_error(payload):
            raise self._reported(text)
        if not isinstance(payload, dict):
            raise self._invalid("JSON that is no object", text)

    def _last_event(self) -> Iterator[ChatCompletionChunk]:
        """Give the event that no blank line ended, if it is whole all the same.

        llama.cpp has sent `[DONE]` so. No part of a JSON object is one, so what parses
        was not cut.
        """
        for event in self._events.feed(b"\n\n"):
            try:
                whole = event.data.startswith("[DONE]") or _parse_json(event.data)
            except (ValueError, RecursionError):
                continue
            chunk = self._chunk(event) if whole else None
            if chunk is not None:
                yield chunk

    def _chunk_of_json(self, cause: Exception | None) -> ChatCompletionChunk:
        """Return a completion that came in one piece as a chunk."""
        text = self._head.decode("utf-8-sig", "replace")
        try:
            payload = json.loads(text)
            self._check(payload, False, text)
            choices = [choice for _, choice in _dicts(payload.get("choices"))]
            if not all(isinstance(c.get("message"), dict) for c in choices or [{}]):
                raise self._invalid("JSON that is no chat completion", text)
            if any(_finish_reason(choice) == "error" for choice in choices):
                raise self._reported(text)
            chunk = ChatCompletionChunk.from_dict(_with_deltas(payload, choices))
            self._whole = ChatCompletion.from_dict(payload)
        except (ValueError, RecursionError) as error:
            if cause is None and text.rstrip().endswith(("}", "]")):
                raise self._invalid("a body that is not JSON", text) from error
            raise self._verdict(cause) from (cause or error)
        chunk.raw = payload
        return chunk

    def _inflated(self, data: bytes) -> Iterator[bytes]:
        assert self._inflate is not None
        try:
            yield from self._inflate.feed(data)
        except zlib.error as error:
            raise self._invalid(f"a body that does not unpack ({error})") from error

    def _verdict(self, cause: Exception | None) -> APIError:
        """Say why an answer that is not complete ended."""
        if self._late:
            return self._timed_out()
        if _is_timeout(cause):
            phase = (
                "between chunks" if self.has_token else "waiting for the first token"
            )
            waited = f"for {self._read_timeout:g} s " if self._read_timeout else ""
            return self._fail(APITimeoutError(f"no data {waited}{phase}{self._where}"))
        if cause is None and self._kind == "other":
            return self._no_answer()
        if cause is None and not self._mark:
            return self._invalid("an empty body")
        how = f"the connection broke ({cause})" if cause else "the server ended it"
        return self._fail(
            TruncatedStreamError(
                f"the answer was cut off: {how} before a finish_reason or [DONE]"
                f"{self._where}; what had come is in .completion"
            )
        )

    def _timed_out(self) -> APIError:
        message = f"no token within first_token_timeout{self._where}"
        return self._fail(APITimeoutError(message))

    def _reported(self, text: str) -> APIError:
        what = "the server reports an error"
        return self._fail(_reported(APIError, what, self._redact(text), self._where))

    def _no_answer(self) -> APIError:
        got = self._content_type or "no content type"
        text = self._head.decode("utf-8", "replace")
        return self._invalid(f"neither an event stream nor JSON, but {got}", text)

    def _invalid(self, what: str, text: str = "") -> APIError:
        text = self._redact(text)
        began = f": {text[:_EXCERPT]!r}" if text else ""
        message = f"the server sent {what}{self._where}{began}"
        return self._fail(APIResponseValidationError(self._redact(message), text))

    def _fail(self, error: APIError) -> APIError:
        error.completion = self.completion
        self.failure = error
        return error


_BLANK = b" \t\r\n\xef\xbb\xbf"  # with the three bytes of a BOM
_EXCERPT = 200  # characters of a body that an error message shows
_FIELDS = (b"data:", b"event:", b"retry:", b"error:", b"id:", b":")


def _kind_of(mark: bytes, content_type: str) -> str:
    """Tell from the first bytes that are not blank what a body is, "" for not yet.

    The bytes go before the content type: servers send JSON under text/event-stream, and
    streams under none.
    """
    if mark[:1] in (b"{", b"["):
        return "json"
    if mark.startswith(_FIELDS) or (
        mark and "text/event-stream" in content_type.lower()
    ):
        return "stream"
    return "" if any(name.startswith(mark) for name in _FIELDS) else "other"


def _parse_json(text: str) -> Any:
    # Nothing stands around the JSON of an event: without json.loads's search for white
    # space this takes half its time. What does not fit is left to it, and to its errors.
    try:
        value, end = _scan(text)
    except ValueError:
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


_scan = json.JSONDecoder().raw_decode


def _has_token(chunk: ChatCompletionChunk) -> bool:
    return any(
        delta.content
        or delta.reasoning_content
        or delta.tool_calls
        or delta.refusal
        or delta.function_call
        for delta in [choice.delta for choice in chunk.choices]
    )


def _with_deltas(completion: Json, choices: list[Json]) -> Json:
    """Return a completion as one chunk: each message is a delta, calls are numbered."""
    deltas = []
    for choice in choices:
        message = choice["message"]
        calls = [call | {"index": i} for i, call in _dicts(message.get("tool_calls"))]
        deltas.append(choice | {"delta": message | {"tool_calls": calls or None}})
    return completion | {"choices": deltas, "object": "chat.completion.chunk"}


def _is_timeout(cause: Exception | None) -> bool:
    names = {kind.__name__ for kind in type(cause).__mro__}
    return not names.isdisjoint({"TimeoutException", "TimeoutError"})


def _find_error(payload: Any, told: bool = False) -> Json | None:
    """Return the error in what a server sent, in any of their shapes, None if there is
    none. What is `told` to be an error by a status or an event's name is always one."""
    if isinstance(payload, list) and len(payload) == 1:  # Gemini
        payload = payload[0]
    if isinstance(payload, dict):
        error = payload.get("error")
        if error:
            return error if isinstance(error, dict) else {"message": error}
        if told or payload.get("object") == "error":
            return payload
        if payload.get("detail") and "choices" not in payload:  # FastAPI
            return payload
    return {"message": payload} if told else None


def _error_text(error: Any, depth: int = 4) -> str:
    """Return what an error says: servers put text, objects and lists into each other."""
    if isinstance(error, dict) and depth:
        for name in ("message", "msg", "detail", "details", "error"):
            if error.get(name):
                return _error_text(error[name], depth - 1)
    if isinstance(error, list) and depth:
        return "; ".join(_error_text(item, depth - 1) for item in error[:10])
    text = error if isinstance(error, str) else json.dumps(error)
    text = " ".join(text.split())
    return text if len(text) <= 5 * _EXCERPT else text[: 5 * _EXCERPT] + " …"


def _reported(kind: type[APIError], what: str, text: str, where: str) -> APIError:
    """Make an error of what a server said about it, in JSON or in plain text."""
    try:
        body = json.loads(text)
        error = _find_error(body, told=True) or {}
        said = _error_text(error) if body else "(no message)"
    except (ValueError, RecursionError):
        body, error, said = text, {}, _error_text(text) or "(no message)"
    code, name, param = error.get("code"), error.get("type"), error.get("param")
    return kind(
        f"{what}: {said}{where}",
        body,
        code if isinstance(code, (int, str)) else None,
        name if isinstance(name, str) else None,
        param if isinstance(param, str) else None,
    )


class _Inflater:
    """Unpacks a body piece by piece, so that a small one cannot fill the memory."""

    PIECE = 64 * 1024

    def __init__(self, encoding: str) -> None:
        self._known = encoding in ("gzip", "x-gzip", "deflate")
        self._encoding = encoding
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib by header

    def feed(self, data: bytes) -> Iterator[bytes]:
        if not self._known:
            raise zlib.error(f"{self._encoding}, though identity was asked for")
        while not self._stream.eof:
            piece = self._stream.decompress(data, self.PIECE)
            yield piece
            data = self._stream.unconsumed_tail
            if not data and len(piece) < self.PIECE:
                break


# ------------------------------------------------------------------------------------
# Asking: the request, and what is decided before an answer begins, without I/O
# ------------------------------------------------------------------------------------

DEFAULT_BASE_URL = "http://localhost:11434/v1"  # Ollama
DEFAULT_TIMEOUT = 600.0  # seconds between two reads: a big model loads for minutes
CONNECT_TIMEOUT = 5.0  # seconds
MAX_RETRY_AFTER = 60.0  # seconds; a server that asks for more is not waited for

# What is read of an error's body, and of what follows [DONE]: the one for its message,
# the other for its end, without which the connection cannot be used again.
_REST_BYTES = 64 * 1024
_ERROR_BODY_SECONDS = 5.0
_DRAIN_SECONDS = 0.5


class _Request:
    """What one call asks for, checked; and what to do with what comes before an answer."""

    def __init__(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        first_token_timeout: float | None = None,
        max_retries: int = 2,
        max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
        headers: Mapping[str, str] | None = None,
        client: Any = None,
        **params: Any,
    ) -> None:
        if "stream" in params:
            raise TypeError("no parameter stream: call stream_chat() or generate()")
        self.url, self.shown_url, login = _endpoint(base_url)
        if api_key is None and "authorization" in getattr(client, "headers", {}):
            api_key = (
                ""  # the client has its own: the one of the environment is not meant
            )
        self.headers, self._secrets = _headers(api_key, login, headers)
        self.timeouts = _timeouts(timeout)
        self.first_token_timeout = first_token_timeout
        self.max_retries = max_retries
        self.max_event_bytes = max_event_bytes
        self.client = client
        named: Json = {"model": model or os.environ.get("OPENAI_MODEL") or None}
        named |= {"messages": _messages(messages, system), "stream": True} | params
        self.body = {name: value for name, value in named.items() if value is not None}
        json.dumps(
            self.body, default=_to_json, allow_nan=False
        )  # raises here, not later

    def in_one_piece(self) -> Self:
        """Ask for a whole answer in place of a stream."""
        self.body["stream"] = False
        self.headers["accept"] = "application/json"
        return self

    def options(self, trace: Callable[[str, Any], Any]) -> Json:
        """Return what httpx wants to know of one attempt, and who sees its phases."""
        timeouts = dict(self.timeouts)
        if self.first_token_timeout is not None:  # holds for the wait for headers too
            limits = (timeouts["read"], self.first_token_timeout)
            timeouts["read"] = min(limit for limit in limits if limit is not None)
        extensions = {"timeout": timeouts, "trace": trace}
        return {
            "content": json.dumps(self.body, default=_to_json),
            "headers": self.headers,
            "extensions": extensions,
        }

    def redact(self, text: str) -> str:
        """Return the text without the key: a server may send it back in an error."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    def failure(self, cause: Exception, waited: float) -> APIConnectionError:
        """Make the error of an attempt that no answer came to, after `waited` seconds."""
        at = f"{self.shown_url}, after {waited:.1f} s"
        if _is_timeout(cause):
            phase = _PHASES.get(type(cause).__name__, "connecting")
            error: APIConnectionError = APITimeoutError(f"timed out {phase} ({at})")
        elif "Connect" in type(cause).__name__:
            error = APIConnectionError(
                f"cannot connect to {at}: {self.redact(str(cause))}; is a server running "
                "there? start one (`ollama serve`), or set base_url or OPENAI_BASE_URL"
            )
        else:
            error = APIConnectionError(
                f"no answer ({at}): {self.redact(str(cause)) or type(cause).__name__}"
            )
        error.__cause__ = cause
        return error

    def refusal(self, response: httpx.Response, body: bytes) -> APIStatusError:
        """Make the error of a status that is no success."""
        status = response.status_code
        packed = response.headers.get("content-encoding")
        if packed:
            with suppress(zlib.error):
                body = next(_Inflater(packed).feed(body), b"")
        text = self.redact(body.decode("utf-8", "replace")) or response.reason_phrase
        where = f" ({self.shown_url})"
        if response.is_redirect:
            target = self.redact(_shown(response.headers["location"]))
            where += (
                f"; it redirects to {target}, where the key is not sent: set base_url"
            )
        elif status == 404 and "/v1" not in self.shown_url:
            where += "; most servers want a base_url that ends in /v1"
        error = _reported(APIStatusError, f"HTTP {status}", text, where)
        assert isinstance(error, APIStatusError)
        error.status_code = status
        error.retry_after = _retry_after(response.headers, time.time())
        framing = {"content-encoding", "content-length", "transfer-encoding"}
        kept = [
            h for h in response.headers.multi_items() if h[0].lower() not in framing
        ]
        # A copy: the response itself holds the request, and with it the key.
        error.response = type(response)(status, headers=kept, text=text)
        return error

    def wait_before_retry(self, error: APIError, attempt: int) -> float:
        """Return the seconds to wait before another attempt; raise `error` if none is due.

        A server that was silent is not asked again: it may be at work on the answer.
        """
        connecting = isinstance(error, APIConnectionError) and not (
            isinstance(error, APITimeoutError)
            and "timed out connecting" not in str(error)
        )
        status = error.status_code if isinstance(error, APIStatusError) else 0
        again = connecting or status in _RETRIED or status >= 500
        asked = error.retry_after if isinstance(error, APIStatusError) else None
        if not again or attempt >= self.max_retries or (asked or 0) > MAX_RETRY_AFTER:
            raise error
        return _backoff(attempt, random.random()) if asked is None else asked


_RETRIED = (408, 409, 429)  # and 5xx
_PHASES = {
    "ReadTimeout": "waiting for the answer",
    "WriteTimeout": "sending the request",
}


def _backoff(attempt: int, chance: float) -> float:
    """Return 0.5 s doubling to 8 s, up to a quarter less by `chance` (0 to 1)."""
    return min(8.0, 0.5 * 2.0**attempt) * (1 - chance / 4)


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that `Retry-After` (seconds or a date) or its twin asks for."""
    with suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    asked = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(asked))
    with suppress(ValueError, TypeError):
        from email.utils import parsedate_to_datetime

        return max(0.0, parsedate_to_datetime(asked).timestamp() - now)
    return None


def _endpoint(base_url: str | None) -> tuple[str, str, str]:
    """Return the URL to ask, the same for people to read, and its user:password.

    A bare host gets the path /v1 that nearly every server has. Raises ValueError.
    """
    from urllib.parse import unquote, urlsplit

    text = (base_url or os.environ.get("OPENAI_BASE_URL") or "").strip()
    text = text or DEFAULT_BASE_URL
    if "://" not in text:  # a key must not go unencrypted to a host on the internet
        host = re.split("[:/?]", text.rpartition("@")[2])[0]
        local = "." not in host or host.replace(".", "").isdigit()
        text = ("http://" if local else "https://") + text
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("base_url is no URL; it looks like http://localhost:11434/v1")
    login, _, host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/") or "/v1"
    path = path.removesuffix("/chat/completions") + "/chat/completions"
    url = parts._replace(netloc=host, path=path, fragment="").geturl()
    return url, _shown(url), unquote(login)


def _shown(url: str) -> str:
    """Return a URL without what may be secret in it: its login and its query."""
    return re.sub(r"//[^/?#]*@", "//", url.partition("?")[0])


def _headers(
    api_key: str | None, login: str, more: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """Return the headers of a request, and the secrets among them. Raises ValueError."""
    if api_key is None:
        api_key = os.environ.get("OPENAI_API_KEY", "")
    key = api_key.strip()
    made = {
        "accept": "text/event-stream",
        "accept-encoding": "identity",  # what is unpacked as it comes saves no time
        "content-type": "application/json",
        "user-agent": f"sse_chat/{__version__}",
    }
    if login:
        made["authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    elif key:
        made["authorization"] = f"Bearer {key}"
    made |= {name.lower(): value for name, value in (more or {}).items()}
    for name, value in made.items():
        if not re.fullmatch("[\x20-\x7e\t]*", value):
            shown = "the API key" if name == "authorization" else f"the header {name!r}"
            raise ValueError(f"{shown} holds a control or non-ASCII character")
    return made, [secret for secret in (key, login.partition(":")[2]) if secret]


def _timeouts(timeout: float | httpx.Timeout | None) -> dict[str, float | None]:
    if timeout is None:
        return dict.fromkeys(("connect", "read", "write", "pool"))
    if isinstance(timeout, (int, float)):
        if not timeout > 0:
            raise ValueError(
                "timeout is a number of seconds over 0, or None for no limit"
            )
        each: dict[str, float | None] = dict.fromkeys(
            ("read", "write", "pool"), timeout
        )
        return each | {"connect": min(timeout, CONNECT_TIMEOUT)}
    return timeout.as_dict()


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


# ------------------------------------------------------------------------------------
# Streaming: the same twice, with `for` and with `async for`
# ------------------------------------------------------------------------------------


def _load_httpx() -> Any:
    """Return httpx, or its fork httpx2 where that is installed in its place."""
    for name in ("httpx", "httpx2"):
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError("sse_chat needs httpx: pip install httpx")


@functools.cache
def _tls(url_is_https: bool) -> Any:
    """Return the context of a client, made once: loading certificates takes 25 ms.

    For http:// an empty one is enough; should anything lead to https, it trusts nobody.
    """
    import ssl

    if url_is_https:
        return _load_httpx().create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _new_client(kind: str, url: str) -> Any:
    """Make a client without a limit of connections, of which few are kept idle.

    At httpx's default of 100 all other streams wait until they fail; and its pool takes
    the square of the time in what it keeps.
    """
    module = _load_httpx()
    limits = module.Limits(max_connections=None, max_keepalive_connections=20)
    try:
        return getattr(module, kind)(
            verify=_tls(url.startswith("https:")), limits=limits
        )
    except (ImportError, ValueError, module.InvalidURL) as error:
        why = (
            "it needs `pip install httpx[socks]`"
            if "SOCKS" in str(error)
            else "is wrong"
        )
        raise APIConnectionError(f"the proxy of the environment: {why}") from None


def _shut(response: httpx.Response) -> bool:
    """End the connection of a response at once; a read that waits for it ends, too.

    Not with HTTP/2, where other streams share it.
    """
    stream = response.extensions.get("network_stream")
    if stream is None or not response.http_version.startswith("HTTP/1"):
        return False
    with suppress(OSError):
        stream.get_extra_info("socket").shutdown(2)  # SHUT_RDWR
    return True


def _alarm(
    seconds: float, response: httpx.Response, ring: Callable[[], bool] = lambda: True
) -> threading.Timer:
    """Shut the connection after `seconds`, if `ring` then says so.

    httpx bounds single reads, not a time with many of them. A thread does so for sync
    code, asyncio and trio alike.
    """
    timer = threading.Timer(max(0.0, seconds), lambda: ring() and _shut(response))
    timer.daemon = True
    timer.start()
    return timer


def _running_trio() -> Any:
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_run() else None


def _spawner() -> Callable[[Callable[[], Coroutine[Any, Any, None]]], Any]:
    """Return how to start a task in this event loop, even from another thread."""
    trio = _running_trio()
    if trio:
        token = trio.lowlevel.current_trio_token()
        return lambda job: token.run_sync_soon(trio.lowlevel.spawn_system_task, job)

    import asyncio

    loop = asyncio.get_running_loop()

    def spawn(job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if asyncio._get_running_loop() is loop:  # at once: the loop may be about to end
            loop.create_task(job())
        else:
            loop.call_soon_threadsafe(lambda: loop.create_task(job()))

    return spawn


def _tracer(phases: list[str]) -> Callable[[str, Any], None]:
    return lambda phase, info: phases.append(phase)


def _async_tracer(phases: list[str]) -> Callable[[str, Any], Awaitable[None]]:
    async def trace(phase: str, info: Any) -> None:
        phases.append(phase)

    return trace


def _was_idle(error: APIError, phases: list[str]) -> bool:
    """Tell whether an idle connection of the pool turned out to be dead.

    Servers close them when they like, some (llama.cpp) after each answer: that is no
    failure of this request, and the next connection will do.
    """
    sent = any("send_request_headers" in phase for phase in phases)
    made = any(".connect_" in phase for phase in phases)
    broke = isinstance(error, APIConnectionError) and not isinstance(
        error, APITimeoutError
    )
    return sent and not made and broke


class _Stream:
    """What both streams are made of: the request, and the answer as far as it has come."""

    def __init__(self, request: _Request) -> None:
        self.response: Any = None
        self._request = request
        self._client = request.client
        self._owns_client = request.client is None
        self._decoder = _AnswerDecoder(
            request.max_event_bytes, f" ({request.shown_url})", request.redact
        )
        self._ready: Iterator[ChatCompletionChunk] = iter(())  # decoded, not given out
        self._reads: Any = None
        self._timer: threading.Timer | None = None
        self._closed = False
        self._half = ""  # the first half of a surrogate pair, held back by `text`

    @property
    def completion(self) -> ChatCompletion:
        """What has come so far, at any time."""
        return self._decoder.completion

    @property
    def complete(self) -> bool:
        """Whether the answer is whole: ended as it should, and without an error."""
        return self._decoder.complete

    def _take(self, response: Any, reads: Any) -> None:
        self.response = response
        self._reads = reads

    def _begin(self, started: float) -> None:
        request = self._request
        response = self.response
        timeouts = response.request.extensions["timeout"]
        timeouts["read"] = request.timeouts["read"]  # it may have been less for headers
        self._decoder.begin(response.headers, timeouts["read"])
        if request.first_token_timeout is not None:
            left = started + request.first_token_timeout - time.monotonic()
            self._timer = _alarm(left, response, self._decoder.is_late)

    def _stop(self) -> bool:
        """Mark the stream as closed; return whether it was closed before."""
        closed, self._closed = self._closed, True
        if self._timer is not None:
            self._timer.cancel()
        return closed

    def _characters(self, text: str) -> str:
        """Return what of `text` is whole, and hold back a half that may yet be joined."""
        text = self._half + text
        self._half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return _encodable(text.removesuffix(self._half))

    def _last_character(self) -> str:
        half, self._half = self._half, ""
        return _encodable(half)


class _Iteration:
    """A loop over a stream. Who leaves the loop lets go of this, and so ends the stream."""

    def __init__(self, stream: ChatStream, step: Callable[[], Any]) -> None:
        self._stream = stream
        self._step = step

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self._step()

    def __del__(self) -> None:
        self._stream.close()


class ChatStream(_Stream):
    """A streamed answer: an iterator of ChatCompletionChunk, and a context manager.

    It connects at the first `next` or at `with`, and raises an APIError wherever it ends
    but at its end. To leave a loop over it, to `close` it and to let go of it closes the
    connection, so that the server stops. `response` is the httpx.Response, None before.
    """

    @staticmethod
    def sleep(seconds: float) -> None:
        """Wait between two attempts; replace it where a test should not."""
        time.sleep(seconds)

    def __iter__(self) -> Iterator[ChatCompletionChunk]:
        return _Iteration(self, self.__next__)

    def text(self) -> Iterator[str]:
        """Iterate over the text of the first answer alone; it can always be encoded."""
        return _Iteration(self, self._next_text)

    def __next__(self) -> ChatCompletionChunk:
        try:
            if self.response is None or self._closed:
                self._open()
            while (chunk := next(self._ready, None)) is None:
                if self._decoder.done:
                    if not (self._closed or self.response.is_closed):
                        self._rest(_DRAIN_SECONDS)
                    raise StopIteration
                self._ready = self._read()
            return chunk
        except BaseException:
            self.close()
            raise

    def _next_text(self) -> str:
        try:
            while not (text := self._characters(self.__next__().text)):
                pass
        except StopIteration:
            text = self._last_character()
            if not text:
                raise
        return text

    def _open(self) -> None:
        """Send the request, again where the rules say so, until an answer begins."""
        if self._closed:
            return self._decoder.check_done()
        request = self._request
        client = self._client = self._client or _new_client("Client", request.url)
        attempt = 0
        while True:
            phases: list[str] = []
            trace = _tracer(phases)
            started = time.monotonic()
            try:
                asked = client.build_request(
                    "POST", request.url, **request.options(trace)
                )
                response = client.send(asked, stream=True, follow_redirects=False)
                self._take(response, response.iter_raw())
                if response.is_success:
                    return self._begin(started)
                error: APIError = request.refusal(response, self._rest(_ERROR_BODY_SECONDS))
                self._release()
            except _network_errors() as cause:
                error = request.failure(cause, time.monotonic() - started)
            if not _was_idle(error, phases):
                self.sleep(request.wait_before_retry(error, attempt))
                attempt += 1

    def _read(self) -> Iterator[ChatCompletionChunk]:
        try:
            return self._decoder.feed(next(self._reads))
        except StopIteration:
            return self._decoder.finish()
        except _network_errors() as cause:
            return self._decoder.finish(cause)

    def _rest(self, seconds: float) -> bytes:
        """Read the rest of the body, or what of it comes within the bounds."""
        timer = _alarm(seconds, self.response)
        rest = bytearray()
        try:
            while len(rest) < _REST_BYTES:
                rest += next(self._reads)
        except StopIteration:
            pass
        except _network_errors():
            pass
        finally:
            timer.cancel()
        return bytes(rest)

    def close(self) -> None:
        """Close the connection, so that the server stops; what has come stays."""
        if self._stop():
            return
        try:
            self._release()
        finally:
            if self._owns_client and self._client is not None:
                self._client.close()

    def _release(self) -> None:
        if self.response is not None and not self.response.is_closed:
            _shut(self.response)  # wakes a read in another thread
            self.response.close()

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class _AsyncIteration:
    """Async twin of `_Iteration`."""

    def __init__(self, stream: AsyncChatStream, step: Callable[[], Any]) -> None:
        self._stream = stream
        self._step = step

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Any:
        return self._step()

    def __del__(self) -> None:
        self._stream._close_soon()


class AsyncChatStream(_Stream):
    """Async twin of `ChatStream`, under asyncio and trio."""

    @staticmethod
    async def sleep(seconds: float) -> None:
        """Wait between two attempts; replace it where a test should not."""
        import asyncio

        await (_running_trio() or asyncio).sleep(seconds)

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        return _AsyncIteration(self, self.__anext__)

    def text(self) -> AsyncIterator[str]:
        """Iterate over the text of the first answer alone; it can always be encoded."""
        return _AsyncIteration(self, self._next_text)

    async def __anext__(self) -> ChatCompletionChunk:
        try:
            if self.response is None or self._closed:
                await self._open()
            while (chunk := next(self._ready, None)) is None:
                if self._decoder.done:
                    if not (self._closed or self.response.is_closed):
                        await self._rest(_DRAIN_SECONDS)
                    raise StopAsyncIteration
                self._ready = await self._read()
            return chunk
        except BaseException:
            await self.aclose()
            raise

    async def _next_text(self) -> str:
        try:
            while not (text := self._characters((await self.__anext__()).text)):
                pass
        except StopAsyncIteration:
            text = self._last_character()
            if not text:
                raise
        return text

    async def _open(self) -> None:
        """Send the request, again where the rules say so, until an answer begins."""
        if self._closed:
            return self._decoder.check_done()
        request = self._request
        self._spawn = _spawner()
        client = self._client = self._client or _new_client("AsyncClient", request.url)
        attempt = 0
        while True:
            phases: list[str] = []
            trace = _async_tracer(phases)
            started = time.monotonic()
            try:
                asked = client.build_request(
                    "POST", request.url, **request.options(trace)
                )
                response = await client.send(asked, stream=True, follow_redirects=False)
                self._take(response, response.aiter_raw())
                if response.is_success:
                    return self._begin(started)
                error: APIError = request.refusal(response, await self._rest(_ERROR_BODY_SECONDS))
                await self._release()
            except _network_errors() as cause:
                error = request.failure(cause, time.monotonic() - started)
            if not _was_idle(error, phases):
                await self.sleep(request.wait_before_retry(error, attempt))
                attempt += 1

    async def _read(self) -> Iterator[ChatCompletionChunk]:
        try:
            return self._decoder.feed(await self._reads.__anext__())
        except StopAsyncIteration:
            return self._decoder.finish()
        except _network_errors() as cause:
            return self._decoder.finish(cause)

    async def _rest(self, seconds: float) -> bytes:
        """Read the rest of the body, or what of it comes within the bounds."""
        timer = _alarm(seconds, self.response)
        rest = bytearray()
        try:
            while len(rest) < _REST_BYTES:
                rest += await self._reads.__anext__()
        except StopAsyncIteration:
            pass
        except _network_errors():
            pass
        finally:
            timer.cancel()
        return bytes(rest)

    async def aclose(self) -> None:
        """Close the connection, so that the server stops; what has come stays."""
        if self._stop():
            return
        try:
            await self._release()
        finally:
            if self._owns_client and self._client is not None:
                await self._client.aclose()

    async def _release(self) -> None:
        if self.response is not None and not self.response.is_closed:
            if _shut(self.response):
                # httpx reads through generators, and trio warns of any that is dropped
                # before its end: now that the connection is shut, it comes at once.
                with suppress(Exception):
                    while True:
                        await self._reads.__anext__()
            await self.response.aclose()

    def _close_soon(self) -> None:
        """Close from where nothing can be awaited: a loop was left, or the last reference."""
        if not self._closed and self.response is not None:
            with suppress(RuntimeError):  # the event loop is gone, and all with it
                self._spawn(self._close_quietly)

    async def _close_quietly(self) -> None:
        with suppress(Exception):
            await self.aclose()

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._close_soon()


# ------------------------------------------------------------------------------------
# The ways to ask
# ------------------------------------------------------------------------------------


def _arguments_of(
    model: Callable[P, Any],
) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Give a function the signature of `model`, for type checkers and for `help`."""

    def give(function: Callable[..., T]) -> Callable[P, T]:
        function.__wrapped__ = model  # type: ignore[attr-defined]
        return function

    return give


@_arguments_of(_Request)
def stream_chat(messages: Messages, **options: Any) -> ChatStream:
    """Ask a model, and give the answer as it comes: iterate over what this returns.

    messages: a str, the user's; or a list of message dicts, and messages of answers.
    model: its name at the server; default OPENAI_MODEL, else the server's choice.
    base_url: default OPENAI_BASE_URL, else Ollama on this machine. `…/v1`, a bare host,
        a deployment's path with a query, and the whole `…/chat/completions` will do.
    api_key: default OPENAI_API_KEY, else none is sent.
    system: a system message to put before the others.
    timeout: seconds between two reads (connecting takes 5 at most), or an httpx.Timeout.
    first_token_timeout: seconds until there is a token, whatever else comes.
    max_retries: how often to ask again where no connection was made, or at the statuses
        408, 409, 429 and 5xx, after 0.5 s doubling to 8 s or after `Retry-After`.
    max_event_bytes: the most that one event, or an answer in one piece, may take.
    headers: sent beside ours, or in their place (Azure: `{"api-key": …}`).
    client: your own httpx.Client, or httpx2's; it is used, and not closed.
    params: all else goes into the request, `temperature=0.2`, `tools=[…]`; None does not.

    Raises ValueError or TypeError for what cannot be asked; the stream raises APIError.
    """
    return ChatStream(_Request(messages, **options))


@_arguments_of(_Request)
def astream_chat(messages: Messages, **options: Any) -> AsyncChatStream:
    """Async twin of `stream_chat`: `async for chunk in astream_chat("hi")`."""
    return AsyncChatStream(_Request(messages, **options))


@_arguments_of(_Request)
def generate(messages: Messages, **options: Any) -> ChatCompletion:
    """Ask as `stream_chat` does, for the answer in one piece. Raises APIError."""
    return _whole(_Request(messages, **options))


@_arguments_of(_Request)
async def agenerate(messages: Messages, **options: Any) -> ChatCompletion:
    """Async twin of `generate`."""
    return await _awhole(_Request(messages, **options))


def _whole(request: _Request) -> ChatCompletion:
    with ChatStream(request.in_one_piece()) as stream:
        for _ in stream:
            pass
        return stream.completion


async def _awhole(request: _Request) -> ChatCompletion:
    async with AsyncChatStream(request.in_one_piece()) as stream:
        async for _ in stream:
            pass
        return stream.completion


class _Client:
    """What both clients are made of: the options of every call."""

    _kind = ""

    def __init__(
        self,
        *,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        timeout: float | httpx.Timeout | None = DEFAULT_TIMEOUT,
        first_token_timeout: float | None = None,
        max_retries: int = 2,
        max_event_bytes: int | None = DEFAULT_MAX_EVENT_BYTES,
        headers: Mapping[str, str] | None = None,
        client: Any = None,
    ) -> None:
        options = dict(locals())
        self._options = {
            k: v for k, v in options.items() if k not in ("self", "client")
        }
        self._owns_client = client is None
        url = _Request("", **self._options).url
        self._client = _new_client(self._kind, url) if client is None else client

    def _request(self, messages: Messages, given: Json) -> _Request:
        given = {name: value for name, value in given.items() if value is not None}
        return _Request(messages, client=self._client, **self._options | given)


class ChatClient(_Client):
    """`stream_chat` and `generate` over one pool of connections; a context manager.

    The arguments are those of `stream_chat`, for every call. It may be used by many
    threads at once.
    """

    _kind = "Client"

    def stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        **params: Any,
    ) -> ChatStream:
        """Ask as `stream_chat` does."""
        given = {"model": model, "system": system} | params
        return ChatStream(self._request(messages, given))

    def generate(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        **params: Any,
    ) -> ChatCompletion:
        """Ask as `generate` does."""
        given = {"model": model, "system": system} | params
        return _whole(self._request(messages, given))

    def close(self) -> None:
        """Close the connections."""
        if self._owns_client:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncChatClient(_Client):
    """Async twin of `ChatClient`."""

    _kind = "AsyncClient"

    def stream(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        **params: Any,
    ) -> AsyncChatStream:
        """Ask as `astream_chat` does."""
        given = {"model": model, "system": system} | params
        return AsyncChatStream(self._request(messages, given))

    async def generate(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        system: str | None = None,
        **params: Any,
    ) -> ChatCompletion:
        """Ask as `agenerate` does."""
        given = {"model": model, "system": system} | params
        return await _awhole(self._request(messages, given))

    async def aclose(self) -> None:
        """Close the connections."""
        if self._owns_client:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


# ------------------------------------------------------------------------------------
# Demo server: a real server's wire format, and no model
# ------------------------------------------------------------------------------------


@contextmanager
def demo_server(delay: float = 0.0) -> Iterator[str]:
    """Serve the chat API on a loopback port, give its base URL; for demos and tests.

    It answers about the prompt it got, `delay` seconds between tokens; no model is
    behind it. Streams carry a role chunk, reasoning, content, usage and `[DONE]`.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if self.path.endswith("/models"):
                self.send_json(200, {"object": "list", "data": [{"id": "demo"}]})
            else:
                self.send_error_json(404, f"no such path: {self.path}")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if not self.path.partition("?")[0].endswith("/chat/completions"):
                return self.send_error_json(404, f"no such path: {self.path}")
            try:
                asked = json.loads(body)
                answer = _demo_answer(asked["messages"])
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                return self.send_error_json(400, f"no chat request: {error!r}")
            if asked.get("stream"):
                self.send_stream(_demo_chunks(*answer))
            else:
                chunks = map(ChatCompletionChunk.from_dict, _demo_chunks(*answer))
                self.send_json(200, accumulate(chunks).to_dict())

        def send_error_json(self, status: int, message: str) -> None:
            error = {
                "message": message,
                "type": "invalid_request_error",
                "code": status,
            }
            self.send_json(status, {"error": error})

        def send_json(self, status: int, value: Json) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_stream(self, chunks: Iterable[Json]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for data in itertools.chain(map(json.dumps, chunks), ["[DONE]"]):
                time.sleep(delay)
                event = b"data: %s\n\n" % data.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *args: Any) -> None:
            pass  # a client that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def _demo_answer(messages: list[Json]) -> tuple[int, str, str]:
    prompt = str(messages[-1]["content"])
    words = len(prompt.split())
    turns = sum(message["role"] == "user" for message in messages)
    return (
        words,
        f"The prompt has {words} words, and this is turn {turns}.",
        f"You wrote: {prompt[:200]}\n\nNo model has read that: this is the demo server of "
        "sse_chat, which speaks the chat API and knows nothing. For a real answer start a "
        "server, such as `ollama serve`, and leave out --demo.",
    )


def _demo_chunks(words: int, reasoning: str, content: str) -> Iterator[Json]:
    head: Json = {"id": "chatcmpl-demo", "object": "chat.completion.chunk", "model": "demo"}
    head |= {"created": int(time.time()), "system_fingerprint": "fp_demo"}
    thoughts, tokens = (re.findall(r"\s*\S+", text) for text in (reasoning, content))
    deltas: list[Json] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": "", "reasoning": token} for token in thoughts]
    deltas += [{"content": token} for token in tokens]
    for delta in deltas:
        yield head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    took = {"prompt_tokens": words, "completion_tokens": len(thoughts) + len(tokens)}
    yield head | {"choices": [], "usage": took | {"total_tokens": sum(took.values())}}


# ------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------

_EXIT_CODES = """\
exit codes: 0 the answer is whole; 1 an error of server or network; 2 wrong usage;
3 the answer was cut off (what came is printed); 130 Ctrl-C

environment: OPENAI_BASE_URL, OPENAI_API_KEY (there is no option for a key: it would
stand in the list of processes), OPENAI_MODEL, OLLAMA_HOST, NO_COLOR
"""

_CHAT_HELP = '''\
/clear       forget the conversation      /save FILE  write it as JSON messages
/system TEXT set the system message       /load FILE  read it back
/model NAME  ask another model            /bye        leave (or Ctrl-D)
"""          begin and end several lines  Ctrl-C      stop the answer\
'''


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if not args.demo:
            return _Terminal(args, _base_url(args.base_url)).run()
        with demo_server(delay=0.02) as base_url:
            return _Terminal(args, base_url).run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read our output has left: so do we, without a word
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except TruncatedStreamError as error:
        return _complain(error, 3)
    except APIError as error:
        return _complain(error, 1)
    except (ValueError, TypeError, OSError) as error:
        return _complain(error, 2)


def _complain(error: Exception, code: int) -> int:
    text = _printable(" ".join(str(error).split()))
    if isinstance(error, APIConnectionError) and "cannot connect" in text:
        text += " (here: --base-url URL, or --demo)"
    print(f"sse_chat: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="sse_chat.py",
        description="Stream an answer from any OpenAI-compatible server. Standard input, "
        "where it is no terminal, is put before the prompt; without both you chat.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what to ask; - for standard input alone")
    add("-m", "--model", help="default: OPENAI_MODEL, else the first the server lists")
    add("-s", "--system", metavar="TEXT", help="a system message")
    add("-u", "--base-url", metavar="URL", help=f"default: {DEFAULT_BASE_URL}")
    add(
        "-o",
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_option,
        help="send it with the request, VALUE as JSON or else as text; repeatable",
    )
    add("--json", action="store_true", help="print the server's chunks, one a line")
    add("--no-stream", action="store_true", help="ask for the answer in one piece")
    add("--usage", action="store_true", help="tell tokens and times on standard error")
    add(
        "--hide-reasoning", action="store_true", help="do not show it on standard error"
    )
    add(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="the longest silence of the server, default 600",
    )
    add("--list-models", action="store_true", help="print the server's models")
    add("--dry-run", action="store_true", help="print the request; send nothing")
    add("--demo", action="store_true", help="ask a demo server inside this program")
    add("--version", action="version", version=f"sse_chat {__version__}")
    return parser


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _base_url(given: str | None) -> str | None:
    """Return where to ask: as given, of OPENAI_BASE_URL, or of OLLAMA_HOST.

    The last in the forms that Ollama takes: host, host:port, :port, with a scheme or not.
    """
    host = os.environ.get("OLLAMA_HOST", "").strip().strip("'\"")
    if given or os.environ.get("OPENAI_BASE_URL", "").strip() or not host:
        return given
    scheme, _, rest = host.rpartition("://")
    port = {"http": 80, "https": 443}.get(scheme, 11434)
    name, slash, path = rest.partition("/")
    if not re.search(r":\d+$", name):
        name = f"{name.rstrip(':')}:{port}"
    name = re.sub(r"^(0\.0\.0\.0|\[::\])?(?=:\d+$)", "127.0.0.1", name)
    return f"{scheme or 'http'}://{name}{(slash + path).rstrip('/')}/v1"


_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def _printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and bidi characters escaped."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Terminal:
    """One run of the program: where it reads, what it asks, how it shows the answer."""

    def __init__(self, args: argparse.Namespace, base_url: str | None) -> None:
        self.args = args
        self.base_url = base_url
        self.out_is_terminal = sys.stdout.isatty()
        self.err_is_terminal = sys.stderr.isatty()
        colour = self.err_is_terminal and not os.environ.get("NO_COLOR")
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
        self.model = args.model or os.environ.get("OPENAI_MODEL") or None
        self.params = dict(args.option)
        if args.usage and not args.no_stream:
            self.params.setdefault("stream_options", {"include_usage": True})

    def run(self) -> int:
        args = self.args
        if args.list_models:
            print("\n".join(self.models()))
            return 0
        prompt = self.prompt()
        if args.dry_run:
            return self.dry_run(prompt or "")
        if self.model is None:
            self.model = next(iter(self.models()), None)
        with self.client() as client:
            if prompt is None:
                return _Conversation(self, client).run()
            self.answer(client, [{"role": "user", "content": prompt}])
        return 0

    def prompt(self) -> str | None:
        """Return standard input and the argument as one text, None for a conversation."""
        argument = None if self.args.prompt == "-" else self.args.prompt
        if sys.stdin is None or sys.stdin.isatty():
            if self.args.prompt == "-" or argument is None:
                return sys.stdin.read() if self.args.prompt == "-" else None
            return str(argument)
        try:
            piped = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8: {error}") from None
        text = "\n\n".join(part for part in (piped.strip("\n"), argument) if part)
        if not text:
            raise ValueError("no prompt: give one as an argument or on standard input")
        return text

    def client(self) -> ChatClient:
        args = self.args
        return ChatClient(
            base_url=self.base_url, system=args.system, timeout=args.timeout
        )

    def request(self, client: ChatClient, messages: Messages, **given: Any) -> _Request:
        request = client._request(messages, {"model": self.model} | self.params | given)
        return request.in_one_piece() if self.args.no_stream else request

    def models(self) -> list[str]:
        """Ask the server for the names of its models."""
        with self.client() as client:
            request = self.request(client, "")
            url = re.sub(r"/chat/completions(?=\?|$)", "/models", request.url)
            options = request.options(lambda phase, info: None)
            del options["content"]
            started = time.monotonic()
            try:
                response = client._client.get(url, **options, follow_redirects=False)
            except _network_errors() as cause:
                raise request.failure(cause, time.monotonic() - started) from cause
            if not response.is_success:
                raise request.refusal(response, response.content)
            try:
                return [str(model["id"]) for model in response.json()["data"] or []]
            except (ValueError, LookupError, TypeError, RecursionError):
                text = f"no list of models came from {_shown(url)}"
                raise APIResponseValidationError(text, response.text) from None

    def dry_run(self, prompt: str) -> int:
        """Print the request, and a curl command that sends it; neither shows the key."""
        import shlex

        with self.client() as client:
            request = self.request(client, prompt)
        headers = {k: v for k, v in request.headers.items() if k != "authorization"}
        curl = ["curl", "-N", request.url, "-d", json.dumps(request.body)]
        curl += [word for k, v in headers.items() for word in ("-H", f"{k}: {v}")]
        command = shlex.join(curl)
        if len(headers) < len(request.headers):
            headers["authorization"] = "[key]"
            command += ' -H "Authorization: Bearer $OPENAI_API_KEY"'
        shown = {"url": request.url, "headers": headers, "body": request.body}
        print(json.dumps(shown, indent=2, ensure_ascii=False), command, sep="\n\n")
        return 0

    def answer(
        self, client: ChatClient, messages: Messages, **given: Any
    ) -> ChatStream:
        """Ask and show the answer as it comes."""
        self.stream = stream = ChatStream(self.request(client, messages, **given))
        started = time.monotonic()
        self.first_token: float | None = None
        self.last = {sys.stdout: "\n", sys.stderr: "\n"}  # what each stream ended with
        self.spinner = _Spinner(self.err_is_terminal)
        try:
            for chunk in stream if self.args.json else ():
                self.show(json.dumps(chunk.raw) + "\n")
            for thinking, text in split_thinking(self.texts(stream)):
                self.show(text, thinking)
        finally:
            self.spinner.stop()
            if self.out_is_terminal:
                self.end_line(sys.stdout)
            self.end_line(sys.stderr)
        if self.args.usage:
            self.tell_usage(stream.completion.usage, started)
        return stream

    def texts(self, stream: ChatStream) -> Iterator[str]:
        for chunk in stream:
            if chunk.reasoning:
                self.show(_encodable(chunk.reasoning), thinking=True)
            yield stream._characters(chunk.text)
        yield stream._last_character()

    def show(self, text: str, thinking: bool = False) -> None:
        if thinking and self.args.hide_reasoning:
            return
        self.first_token = self.first_token or time.monotonic()
        self.spinner.stop()
        if thinking:
            self.write(sys.stderr, text, self.err_is_terminal, self.dim, self.plain)
        else:
            self.end_line(sys.stderr)
            self.write(sys.stdout, text, self.out_is_terminal)

    def write(self, to: Any, text: str, is_terminal: bool, *around: str) -> None:
        before, after = around or ("", "")
        to.write(before + (_printable(text) if is_terminal else text) + after)
        to.flush()
        self.last[to] = text[-1:] or self.last[to]

    def end_line(self, stream: Any) -> None:
        if self.last[stream] != "\n":
            self.write(stream, "\n", False)

    def tell_usage(self, usage: CompletionUsage | None, started: float) -> None:
        now = time.monotonic()
        first = self.first_token or now
        parts = [
            f"first token after {first - started:.2f} s, all after {now - started:.2f} s"
        ]
        if usage is not None:
            spent = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"
            parts.insert(0, spent)
            if now > first:
                parts.append(f"{usage.completion_tokens / (now - first):.1f} tokens/s")
        print(", ".join(parts), file=sys.stderr)


class _Spinner:
    """Turns on standard error until the first token, and leaves no trace."""

    def __init__(self, shown: bool) -> None:
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.turn, daemon=True)
        if shown:
            self.thread.start()

    def turn(self) -> None:
        for frame in itertools.cycle("|/-\\"):
            if self.over.wait(0.1):
                break
            sys.stderr.write(f"\r{frame}")
            sys.stderr.flush()
        sys.stderr.write("\r \r")
        sys.stderr.flush()

    def stop(self) -> None:
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()


class _Conversation:
    """Turns of a chat at a terminal."""

    def __init__(self, terminal: _Terminal, client: ChatClient) -> None:
        self.terminal = terminal
        self.client = client
        self.system = terminal.args.system
        self.messages: list[Json] = []

    def run(self) -> int:
        try:
            import readline  # line editing and history, in `input`
        except ImportError:
            readline = None  # type: ignore[assignment]
        print(f"{self.terminal.model or 'chat'}: /? for help, Ctrl-D to leave")
        while True:
            try:
                text = self.read()
                if text in ("/bye", "/exit"):
                    return 0
                if text.startswith("/"):
                    self.command(*text.partition(" ")[::2])
                elif text.strip():
                    self.turn(text)
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print()
                if readline is None or not readline.get_line_buffer():
                    return 130
            except (OSError, ValueError) as error:
                print(f"sse_chat: {error}", file=sys.stderr)

    def read(self) -> str:
        text = input(">>> ")
        if text.startswith('"""'):
            while text.count('"""') < 2:
                text += "\n" + input("... ")
            text = text.replace('"""', "").strip("\n")
        return text

    def command(self, name: str, value: str) -> None:
        value = value.strip()
        if name == "/clear":
            self.messages.clear()
        elif name == "/system":
            self.system = value or None
        elif name == "/model" and value:
            self.terminal.model = value
        elif name == "/save" and value:
            system = [{"role": "system", "content": self.system}] if self.system else []
            with open(value, "w", encoding="utf-8") as file:
                json.dump(system + self.messages, file, ensure_ascii=False, indent=1)
        elif name == "/load" and value:
            with open(value, encoding="utf-8") as file:
                loaded = json.load(file)
            if not all(isinstance(m, dict) and "role" in m for m in loaded):
                raise ValueError(f"{value} holds no list of messages")
            self.messages = [m for m in loaded if m["role"] != "system"]
            self.system = next(
                (m["content"] for m in loaded if m not in self.messages), None
            )
        else:
            print(_CHAT_HELP)

    def turn(self, text: str) -> None:
        """Ask, and keep what was said: a partial answer, too, with a mark on it."""
        self.messages.append({"role": "user", "content": text})
        mark = ""
        try:
            self.terminal.answer(self.client, self.messages, system=self.system)
        except KeyboardInterrupt:
            mark = " [stopped here]"
        except APIError as error:
            _complain(error, 1)
            mark = " [cut off here]"
        said = self.terminal.stream.completion.text
        said = "".join(
            part for thinking, part in split_thinking([said]) if not thinking
        )
        if said:
            self.messages.append({"role": "assistant", "content": said.strip() + mark})
        else:
            self.messages.pop()


if __name__ == "__main__":
    sys.exit(main())
