"""Which clients notice a broken answer: each kind of ending, over a real socket.

    python bench/endings.py            prints two tables and writes them to endings.md
    python bench/endings.py --quick    only prints, and makes no environment for litellm

A server sends answers, most of which break in some way. Every client reads every one
of them, sync and async, in the plain loop that its documents show. A client notices a
broken answer if the loop ends with an exception; what the loop has then collected of
the text and of the tool calls is compared with what was sent.
"""

import asyncio
import contextlib
import json
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import clients
from clients import MESSAGES
from measure import BENCH, Figure, Part, markdown, output, versions

LITELLM_ENVIRONMENT = BENCH / ".venv-litellm"

TIMEOUT = 2.0
"""Seconds of silence that each client is told to bear, where it can be told."""

HOLD = 6.0
"""Seconds of silence after which the server gives up: the client then was stuck."""

PAUSE = 0.2
"""Seconds between the last byte and a reset, so that the client has read that byte."""

CLIENT_SECONDS = 240
"""A client that takes longer than this for all answers ends the run."""

SILENT = "silent"
STUCK = f"waits over {HOLD - 1:g} s"
INVENTED = "invented"
NOT_SENT = "–"
IN_THE_LOOP = "in the loop"


# ---- The answers ---------------------------------------------------------------------


def event(payload: Any, before: str = "") -> bytes:
    """Render a server-sent event; its data is the payload as JSON, or a text."""
    data = payload if isinstance(payload, str) else json.dumps(payload)
    return f"{before}data: {data}\n\n".encode()


def chunk(delta: Any, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    """Render an event with one chunk of a chat completion."""
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event({**head, "choices": [choice], **more})


def say(text: str, index: int = 0) -> bytes:
    """Render a chunk with a piece of text."""
    return chunk({"role": "assistant", "content": text}, index=index)


def call(arguments: str, **opening: Any) -> bytes:
    """Render a chunk with a piece of a tool call."""
    function = {"arguments": arguments} | ({"name": "weather"} if opening else {})
    return chunk({"tool_calls": [{"index": 0, **opening, "function": function}]})


def line(text: str, **more: Any) -> bytes:
    """Render a line of Ollama's own format."""
    message = {"role": "assistant", "content": text}
    head = {"model": "m", "created_at": "2026-11-01T00:00:00Z", "message": message}
    return json.dumps({**head, "done": False, **more}).encode() + b"\n"


DONE = event("[DONE]")
STOP = chunk({}, "stop")

PART_TEXT, WHOLE_TEXT = "The sky is", "The sky is blue."
PART, PART_LINES = say("The sky") + say(" is"), line("The sky") + line(" is")
ALL, LAST_LINE = PART + say(" blue."), line(" blue.", done=True, done_reason="stop")
CUT_EVENT, CUT_LINE = say(" blue.")[:-20], PART_LINES + LAST_LINE[:-20]

PART_CALL, WHOLE_CALL = 'weather {"city": ', 'weather {"city": "Paris"}'
CALL = call('{"city": ', id="call_1", type="function")
CALLED = CALL + call('"Paris"}') + chunk({}, "tool_calls") + DONE

FAULT = {"message": "out of memory", "type": "server_error", "code": 500}
ERROR: dict[str, Any] = {"error": FAULT}
FAULT_LINE = b'{"error": "out of memory"}\n'
CODE = {"code": 500, "details": "out of memory"}
CHOICE = {"choices": [{"index": 0, "delta": {"content": ""}, **ERROR}]}
STATUS = {"base_resp": {"status_code": 1001, "status_msg": "timeout"}}
HTML = b"<!doctype html><title>502 Bad Gateway</title><h1>502 Bad Gateway</h1>"
MESSAGE = {"role": "assistant", "content": WHOLE_TEXT}
COMPLETION = {
    **{"id": "c1", "object": "chat.completion", "created": 1, "model": "m"},
    "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}],
}

ERRORS = {
    "`error`, an object; `[DONE]`": event(ERROR) + DONE,
    "`error`, a text": event({"error": "out of memory"}),
    "`error` after `event: error`": event(ERROR, "event: error\n"),
    "`details` after `event: error`; `[DONE]`": event(CODE, "event: error\n") + DONE,
    "`error` beside a choice": chunk({"content": ""}, **ERROR),
    "`error` in a choice": event(CHOICE),
    '`"object": "error"`': event({"object": "error", **FAULT}),
    "a field `error:`; `[DONE]`": b"error" + event(FAULT).removeprefix(b"data") + DONE,
    "JSON without `data:`": json.dumps(ERROR).encode() + b"\n",
    "`code` and `message`": event({"code": 500, "message": "busy"}),
    "`error_code`; `[DONE]`": event({"text": "busy", "error_code": 50002}) + DONE,
    "`detail`": event({"detail": "out of memory"}),
    "`errors`": event({"success": False, "errors": [FAULT]}),
    "`base_resp`; `[DONE]`": event(STATUS) + DONE,
}
FAILURES = ("error", "network_error", "cancelled", "timeout", "ERROR_TOXIC")
FAILURES += ("MALFORMED_FUNCTION_CALL",)


@dataclass(frozen=True)
class Case:
    """An answer that the server sends, and what a caller should have of it.

    `end` says how: "clean" sends all of the HTTP body, "unsized" a body that ends with
    the connection, "cut" closes the connection before the body's end, "reset" resets
    it, "silence" keeps it open. `lines` is the same answer in Ollama's own format, or
    None where that has no such answer.
    """

    name: str
    body: bytes
    lines: bytes | None = None
    end: str = "clean"
    kind: str = "text/event-stream"
    text: str = ""
    call: str = ""
    finish: str = ""
    choices: int = 1


def part(
    name: str, more: bytes = b"", lines: bytes | None = None, end: str = "clean"
) -> Case:
    """Make an answer of which only a part is sent, and then `more`."""
    return Case(name, PART + more, lines, end, text=PART_TEXT)


def call_part(name: str, end: str = "clean") -> Case:
    """Make an answer of which only a part of a tool call is sent."""
    return Case(name, CALL, None, end, call=PART_CALL)


def failure(word: str) -> Case:
    """Make an answer whose finish_reason says that it failed."""
    body = PART + chunk({}, word) + DONE
    return Case(f"`{word}`", body, text=PART_TEXT, finish=word)


def whole(
    name: str, body: bytes, lines: bytes, kind: str = "text/event-stream"
) -> Case:
    """Make a whole answer."""
    return Case(name, body, lines, kind=kind, text=WHOLE_TEXT, finish="stop")


JSON = "application/json"
WHOLE = "whole answers, taken as they are"
ERASED = "after a chunk without a model (Ollama's `/v1` after an error)"
HALF = f"{WHOLE_TEXT}|It is"
GROUPS: dict[str, list[Case]] = {
    WHOLE: [
        whole("a text", ALL + STOP + DONE, PART_LINES + LAST_LINE),
        Case("a tool call", CALLED, call=WHOLE_CALL, finish="tool_calls"),
        whole(
            "JSON in place of a stream",
            json.dumps(COMPLETION).encode(),
            line(WHOLE_TEXT, done=True, done_reason="stop"),
            JSON,
        ),
    ],
    "the stream ends early, cleanly": [
        part("after some text", b"", PART_LINES),
        part(ERASED, chunk({"content": ""}, model="")),
        part("inside an event", CUT_EVENT, CUT_LINE),
        call_part("inside a tool call's arguments"),
        part("in a body without a length", b"", PART_LINES, "unsized"),
    ],
    "the connection breaks": [
        part("closed after some text", b"", PART_LINES, "cut"),
        part("reset after some text", b"", PART_LINES, "reset"),
        part("closed inside an event", CUT_EVENT, CUT_LINE, "cut"),
        call_part("closed inside a tool call's arguments", "cut"),
    ],
    "the server reports an error": [
        part("`error`, an object", event(ERROR), PART_LINES + FAULT_LINE),
        *(part(name, body) for name, body in ERRORS.items()),
    ],
    "the `finish_reason` is a failure": [failure(word) for word in FAILURES],
    "one of two choices is cut off": [
        Case("`n=2`", ALL + say("It is", 1) + STOP, text=HALF, finish="stop", choices=2)
    ],
    "the body is no answer": [
        Case("HTML", HTML, HTML, kind="text/html"),
        Case("an error as JSON", json.dumps(ERROR).encode(), FAULT_LINE, kind=JSON),
        Case("nothing", b"", b""),
        Case("`[DONE]` alone", DONE),
    ],
    "the server falls silent": [part("after some text", b"", PART_LINES, "silence")],
}
CASES = [case for cases in GROUPS.values() for case in cases]


# ---- The server ----------------------------------------------------------------------


class Handler(socketserver.StreamRequestHandler):
    """Answers one request with the case whose number begins its path."""

    def handle(self) -> None:
        path = self.rfile.readline().split(b" ")[1].decode()
        length = 0
        while header := self.rfile.readline().rstrip():
            name, _, value = header.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        self.rfile.read(length)
        case = CASES[int(path.split("/")[1])]
        if path.endswith("/api/chat"):
            kind = case.kind.replace("text/event-stream", "application/x-ndjson")
            self._send(case.lines or b"", kind, case.end)
        else:
            self._send(case.body, case.kind, case.end)
        if case.end == "silence":
            self.connection.settimeout(HOLD)
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # It returns early where the client leaves.
        elif case.end == "reset":
            time.sleep(PAUSE)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close()
            self.connection.close()

    def _send(self, body: bytes, kind: str, end: str) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        if end != "unsized":
            head += "Transfer-Encoding: chunked\r\n"
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
        if end == "clean":
            body += b"0\r\n\r\n"
        self.wfile.write(head.encode() + b"\r\n" + body)


@contextlib.contextmanager
def served() -> Iterator[str]:
    """Run the server on a free port of the loopback interface; yields its address."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# ---- The clients that are only here, and the loop around each ------------------------


def litellm(url: str, is_async: bool, timeout: float, **options: Any) -> Any:
    from litellm import acompletion, completion

    ask: Any = acompletion if is_async else completion
    options |= {"model": "openai/m", "api_base": url, "api_key": "none"}
    return lambda: ask(messages=MESSAGES, stream=True, timeout=timeout, **options)


def llm(url: str, is_async: bool, timeout: float) -> Any:
    from llm.default_plugins.openai_models import AsyncChat, Chat

    # It has no option for the timeout.
    make: Any = AsyncChat if is_async else Chat
    response = make("m", api_base=url).prompt("hi", key="none")
    return response.astream_events if is_async else response.stream_events


def ollama(url: str, is_async: bool, timeout: float) -> Any:
    from ollama import AsyncClient, Client

    make: Any = AsyncClient if is_async else Client
    client = make(host=url.removesuffix("/v1"), timeout=timeout)
    return lambda: client.chat(model="m", messages=MESSAGES, stream=True)


@dataclass
class Answer:
    """What the loop around a client has collected."""

    texts: dict[int, str] = field(default_factory=dict)
    calls: dict[int, str] = field(default_factory=dict)
    finishes: list[str] = field(default_factory=list)

    def add(self, index: int, text: str | None, finish: str | None = None) -> None:
        """Add a piece of a choice."""
        self.texts[index] = self.texts.get(index, "") + (text or "")
        if finish:
            self.finishes.append(finish)

    def add_call(self, index: int, name: str | None, arguments: str | None) -> None:
        """Add a piece of a tool call."""
        opening = f"{name} " if name else ""
        self.calls[index] = self.calls.get(index, "") + opening + (arguments or "")


def take_chunk(answer: Answer, chunk: Any) -> None:
    for choice in chunk.choices:
        answer.add(choice.index, choice.delta.content, choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            answer.add_call(call.index, call.function.name, call.function.arguments)


def take_dict(answer: Answer, chunk: Any) -> None:
    for choice in chunk["choices"]:
        delta, finish = choice["delta"], choice.get("finish_reason")
        answer.add(choice["index"], delta.get("content"), finish)
        for call in delta.get("tool_calls") or []:
            name = call["function"].get("name")
            answer.add_call(call["index"], name, call["function"].get("arguments"))


def take_line(answer: Answer, line: Any) -> None:
    answer.add(0, line.message.content, line.done_reason)


def take_llm_event(answer: Answer, event: Any) -> None:
    if event.type == "text":
        answer.add(0, event.chunk)
    elif event.type == "tool_call_name":
        answer.add_call(0, event.chunk, None)
    elif event.type == "tool_call_args":
        answer.add_call(0, None, event.chunk)


# By name: how the client is made, what its loop does, and the package it comes in.
CLIENTS: dict[str, tuple[Callable[..., Any], Callable[[Answer, Any], None], str]] = {
    "sse_chat": (clients.sse_chat, take_chunk, "httpx"),
    "openai": (clients.openai, take_chunk, "openai"),
    "litellm": (litellm, take_chunk, "litellm"),
    "httpx-sse, json.loads": (clients.dicts, take_dict, "httpx-sse"),
    "llm": (llm, take_llm_event, "llm"),
    "ollama": (ollama, take_line, "ollama"),
}


# ---- The child process: one client reads all answers ---------------------------------


class LoopError(Exception):
    """What a client gave was so unlike a chunk that the loop around it failed."""


def outcome(name: str, is_async: bool, url: str, case: Case) -> str:
    """Read one answer; returns how that ended, and what was lost or invented."""
    make, take, _ = CLIENTS[name]
    if case.choices > 1 and name == "llm" or case.lines is None and name == "ollama":
        return NOT_SENT
    options = {"n": case.choices} if case.choices > 1 else {}
    answer, ending = Answer(), SILENT

    def add(item: Any) -> None:
        try:
            take(answer, item)
        except Exception as error:
            raise LoopError(f"{type(error).__name__} {IN_THE_LOOP}") from error

    async def read() -> None:
        stream = make(url, True, TIMEOUT, **options)
        async for item in await clients.opened(stream):
            add(item)

    start = time.monotonic()
    try:
        if is_async:
            asyncio.run(read())
        else:
            for item in make(url, False, TIMEOUT, **options)():
                add(item)
    except Exception as error:
        ending = str(error) if isinstance(error, LoopError) else type(error).__name__
    if case.end == "silence" and time.monotonic() - start > HOLD - 1:
        ending = STUCK
    return ", ".join([ending, *faults(case, answer)])


def faults(case: Case, answer: Answer) -> Iterator[str]:
    """Yield what the client lost of what was sent, and what it invented."""
    text = "|".join(answer.texts[index] for index in sorted(answer.texts))
    call = "|".join(answer.calls[index] for index in sorted(answer.calls))
    for what, sent, kept in (("text", case.text, text), ("call", case.call, call)):
        if kept != sent:
            part = "part of the " if kept and sent.startswith(kept) else ""
            yield f"{part}{what} {'lost' if sent else INVENTED}"
    for word in sorted({word for word in answer.finishes if word != case.finish}):
        yield f"`{word}` {INVENTED}"


def child(name: str, mode: str, address: str) -> None:
    """Let one client read all answers; prints the outcomes as JSON in the last line."""
    outcomes = [
        outcome(name, mode == "async", f"{address}/{number}/v1", case)
        for number, case in enumerate(CASES)
    ]
    print(json.dumps([versions([CLIENTS[name][2]]), outcomes]))


# ---- The tables ----------------------------------------------------------------------

PAGE = """\
# Who notices a broken answer

Written by `python bench/endings.py`, with {versions}.

{summary}

The count is of right answers: whole ones that came without an exception and unchanged,
and broken ones that ended with an exception. "In the loop" counts those of them that a
client passed on as if they were chunks, so that the loop around it failed by chance, on
`None` or a missing key. The last row counts answers for which a client gave its caller
a `finish_reason` that no server had sent.

{details}

A cell says how the loop ended: with this exception, or silently, as if the answer were
whole. The text and the tool calls that came before are all there, unless the cell says
what was lost. A dash: the client cannot be sent such an answer. Sync and async are told
apart where they differ. The read timeout was {timeout:g} s; llm has no option for it.

After a silent end, callers can still look at `finish_reason` themselves, except where
it was invented, and with llm: it is None where none came, or the server's own word.
"""


def litellm_python(make: bool) -> str | None:
    """Find the Python that has litellm, an environment of its own; None without one."""
    executable = LITELLM_ENVIRONMENT / "bin/python"
    if make and not executable.exists():
        venv.create(LITELLM_ENVIRONMENT, with_pip=True)
        install = [str(executable), "-m", "pip", "install", "-qq", "litellm"]
        subprocess.run(install, check=True)
    return str(executable) if executable.exists() else None


def column(name: str, python: str, address: str) -> tuple[dict[str, str], list[str]]:
    """Run a client in processes of its own; returns its version and outcomes."""

    def run(mode: str) -> Any:
        command = [python, __file__, "--client", name, mode, address]
        return json.loads(output(command, CLIENT_SECONDS).splitlines()[-1])

    # Both wait for timeouts most of the time, so that they do not disturb each other.
    with ThreadPoolExecutor() as pool:
        (version, sync), (_, asynchronous) = pool.map(run, ("sync", "async"))
    return version, [
        a if a == b else f"{a}; async: {b}"
        for a, b in zip(sync, asynchronous, strict=True)
    ]


def is_right(case: Case, outcome: str) -> bool:
    """Say whether a break was noticed, or a whole answer given as it is."""
    if case in GROUPS[WHOLE]:
        return outcome == SILENT
    return SILENT not in outcome and STUCK not in outcome


def count(cases: Sequence[Case], outcomes: Sequence[str]) -> str:
    """Return how many of these cases were right, of those that apply."""
    pairs = [pair for pair in zip(cases, outcomes, strict=True) if pair[1] != NOT_SENT]
    right = sum(is_right(*pair) for pair in pairs)
    looped = sum(IN_THE_LOOP in outcome for _, outcome in pairs)
    looped_too = f", {looped} {IN_THE_LOOP}" if looped else ""
    return f"{right} of {len(pairs)}{looped_too}" if pairs else NOT_SENT


def tables(columns: dict[str, list[str]]) -> tuple[str, str]:
    """Render the short table, which counts, and the long one, which has every case."""
    short, long, start = [], [], 0
    for group, cases in GROUPS.items():
        numbers = slice(start, start := start + len(cases))
        found = [outcomes[numbers] for outcomes in columns.values()]
        short.append([group, *(count(cases, outcomes) for outcomes in found)])
        long.append([f"**{group}**", *[""] * len(columns)])
        for case, *outcomes in zip(cases, *found, strict=True):
            long.append([case.name, *outcomes])
    invented = [sum(f"` {INVENTED}" in word for word in c) for c in columns.values()]
    short.append(["a `finish_reason` invented", *map(str, invented)])
    head = ["", *columns]
    return markdown(head, short), markdown(head, long)


def endings(quick: bool) -> Part:
    """Find out who notices; writes endings.md unless the run is a quick one."""
    found: dict[str, str] = {}
    columns = {}
    with served() as address:
        for name in CLIENTS:
            python = sys.executable if name != "litellm" else litellm_python(not quick)
            if python:
                version, columns[name] = column(name, python, address)
                found |= version
    summary, details = tables(columns)
    if not quick:
        names = ", ".join(f"{name} {version}" for name, version in found.items())
        page = PAGE.format(
            versions=names, summary=summary, details=details, timeout=TIMEOUT
        )
        (BENCH / "endings.md").write_text(page, encoding="utf-8")
    right = sum(map(is_right, CASES, columns["sse_chat"]))
    return Part(
        ["", summary, "", details],
        {"versions": found, "answers": [case.name for case in CASES], **columns},
        {"endings": Figure.of([right / len(CASES)])},
    )


if __name__ == "__main__":
    if "--client" in sys.argv:
        child(*sys.argv[2:5])
    else:
        print(*endings("--quick" in sys.argv).tables, sep="\n")
