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
import http.client
import json
import socket
import socketserver
import struct
import sys
import threading
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import clients
from measure import BENCH, Part, output, table, versions

LITELLM_ENVIRONMENT = BENCH / ".venv-litellm"
TIMEOUT = 2.0  # seconds of silence that each client is told to bear
HOLD = 6.0  # seconds of silence after which the server gives up: the client was stuck
PAUSE = 0.2  # seconds from the last byte to a reset, so that the client has read it
CLIENT_SECONDS = 240  # for all answers; more ends the run

SILENT, STUCK = "silent", f"waits over {HOLD - 1:g} s"
INVENTED, IN_THE_LOOP, NOT_SENT = "invented", "in the loop", "–"


def event(payload: Any, before: str = "") -> bytes:
    return f"{before}data: {json.dumps(payload)}\n\n".encode()


def chunk(delta: Any, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return event({**head, "choices": [choice], **more})


def say(text: str, index: int = 0) -> bytes:
    return chunk({"role": "assistant", "content": text}, index=index)


def call(arguments: str, **opening: Any) -> bytes:
    function = {"arguments": arguments} | ({"name": "weather"} if opening else {})
    return chunk({"tool_calls": [{"index": 0, **opening, "function": function}]})


def line(text: str, **more: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    head = {"model": "m", "created_at": "2026-11-01T00:00:00Z", "message": message}
    return json.dumps({**head, "done": False, **more}).encode() + b"\n"


DONE = b"data: [DONE]\n\n"
STOP = chunk({}, "stop")

PART_TEXT, WHOLE_TEXT = "The sky is", "The sky is blue."
PART, PART_LINES = say("The sky") + say(" is"), line("The sky") + line(" is")
ALL, LAST_LINE = PART + say(" blue."), line(" blue.", done=True, done_reason="stop")
TWO = ALL + say("It is", 1) + STOP
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
ONE_LINE = line(WHOLE_TEXT, done=True, done_reason="stop")
MESSAGE = {"role": "assistant", "content": WHOLE_TEXT}
ANSWER = {"index": 0, "message": MESSAGE, "finish_reason": "stop"}
COMPLETION = json.dumps({"object": "chat.completion", "choices": [ANSWER]}).encode()

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
FAILURES = "error network_error cancelled timeout ERROR_TOXIC MALFORMED_FUNCTION_CALL"


@dataclass(frozen=True)
class Case:
    """An answer that the server sends, and what a caller should have of it.

    `lines` is the same in Ollama's own format. `end` is that of the HTTP body: "clean",
    "unsized" (the connection's end is its own), "cut" (closed before it), "reset" or
    "silence".
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


def part(name: str, more: bytes, lines: Any = None, end: str = "clean") -> Case:
    """Make an answer of which only a part is sent, and then `more`."""
    return Case(name, PART + more, lines, end, text=PART_TEXT)


def failure(word: str) -> Case:
    return Case(f"`{word}`", PART + chunk({}, word) + DONE, text=PART_TEXT, finish=word)


JSON = "application/json"
COMPLETE: Any = {"text": WHOLE_TEXT, "finish": "stop"}
WHOLE = "whole answers, taken as they are"
ERASED = "after a chunk without a model (Ollama's `/v1` after an error)"
GROUPS: dict[str, list[Case]] = {
    WHOLE: [
        Case("a text", ALL + STOP + DONE, PART_LINES + LAST_LINE, **COMPLETE),
        Case("a tool call", CALLED, call=WHOLE_CALL, finish="tool_calls"),
        Case("JSON in place of a stream", COMPLETION, ONE_LINE, kind=JSON, **COMPLETE),
    ],
    "the stream ends early, cleanly": [
        part("after some text", b"", PART_LINES),
        part(ERASED, chunk({"content": ""}, model="")),
        part("inside an event", CUT_EVENT, CUT_LINE),
        Case("inside a tool call's arguments", CALL, call=PART_CALL),
        part("in a body without a length", b"", PART_LINES, "unsized"),
    ],
    "the connection breaks": [
        part("closed after some text", b"", PART_LINES, "cut"),
        part("reset after some text", b"", PART_LINES, "reset"),
        part("closed inside an event", CUT_EVENT, CUT_LINE, "cut"),
        Case("closed inside a tool call", CALL, None, "cut", call=PART_CALL),
    ],
    "the server reports an error": [
        part("`error`, an object", event(ERROR), PART_LINES + FAULT_LINE),
        *(part(name, body) for name, body in ERRORS.items()),
    ],
    "the `finish_reason` is a failure": [failure(word) for word in FAILURES.split()],
    "one of two choices is cut off": [
        Case("`n=2`", TWO, text=f"{WHOLE_TEXT}|It is", finish="stop", choices=2)
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
        headers = http.client.parse_headers(self.rfile)
        self.rfile.read(int(headers["content-length"]))
        case = CASES[int(path.split("/")[1])]
        body = case.lines if path.endswith("/api/chat") else case.body
        self._send(body or b"", case.kind, case.end)
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
    return lambda: ask(
        messages=clients.MESSAGES, stream=True, timeout=timeout, **options
    )


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
    return lambda: client.chat(model="m", messages=clients.MESSAGES, stream=True)


class Answer:
    """What the loop around a client has collected, by index of choice or of call."""

    def __init__(self) -> None:
        self.texts: defaultdict[int, str] = defaultdict(str)
        self.calls: defaultdict[int, str] = defaultdict(str)
        self.finishes: set[str | None] = {None}

    def add_call(self, index: int, name: str | None, arguments: str | None) -> None:
        self.calls[index] += (f"{name} " if name else "") + (arguments or "")


def take_chunk(answer: Answer, chunk: Any) -> None:
    for choice in chunk.choices:
        answer.texts[choice.index] += choice.delta.content or ""
        answer.finishes.add(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            answer.add_call(call.index, call.function.name, call.function.arguments)


def take_dict(answer: Answer, chunk: Any) -> None:
    for choice in chunk["choices"]:
        answer.texts[choice["index"]] += choice["delta"].get("content") or ""
        answer.finishes.add(choice.get("finish_reason"))
        for call in choice["delta"].get("tool_calls") or []:
            name = call["function"].get("name")
            answer.add_call(call["index"], name, call["function"]["arguments"])


def take_line(answer: Answer, line: Any) -> None:
    answer.texts[0] += line.message.content
    answer.finishes.add(line.done_reason)


def take_llm_event(answer: Answer, event: Any) -> None:
    if event.type == "text":
        answer.texts[0] += event.chunk
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


def outcome(name: str, is_async: bool, url: str, case: Case) -> str:
    """Read one answer; returns how that ended, and what was lost or invented."""
    make, take, _ = CLIENTS[name]
    options = {"n": case.choices} if case.choices > 1 else {}
    if (name == "llm" and options) or (name == "ollama" and case.lines is None):
        return NOT_SENT
    answer, ending, in_the_loop = Answer(), SILENT, False

    def add(item: Any) -> None:
        nonlocal in_the_loop
        in_the_loop = True  # What is raised here is not the client's own doing.
        take(answer, item)
        in_the_loop = False

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
        ending = type(error).__name__ + (f" {IN_THE_LOOP}" if in_the_loop else "")
    if case.end == "silence" and time.monotonic() - start > HOLD - 1:
        ending = STUCK
    return ", ".join([ending, *faults(case, answer)])


def faults(case: Case, answer: Answer) -> Iterator[str]:
    text, call = "|".join(answer.texts.values()), "|".join(answer.calls.values())
    for what, sent, kept in (("text", case.text, text), ("call", case.call, call)):
        if kept != sent:
            part = "part of the " if kept and sent.startswith(kept) else ""
            yield f"{part}{what} {'lost' if sent else INVENTED}"
    for word in answer.finishes - {None, case.finish}:
        yield f"`{word}` {INVENTED}"


def child(name: str, address: str) -> None:
    """Let one client read all answers; prints the outcomes as JSON in the last line."""
    outcomes = []
    for number, case in enumerate(CASES):
        url = f"{address}/{number}/v1"
        sync, asynchronous = (outcome(name, mode, url, case) for mode in (False, True))
        both = f"{sync}; async: {asynchronous}"
        outcomes.append(sync if sync == asynchronous else both)
    print(json.dumps([versions([CLIENTS[name][2]]), outcomes]))


# ---- The tables ----------------------------------------------------------------------

PAGE = """\
# Who notices a broken answer

Written by `bench/endings.py`; [README.md](README.md) says how to read it. Of {}.
{}
{}
"""


def litellm_python(make: bool) -> str | None:
    """Find the Python that has litellm, an environment of its own; None without one."""
    executable = LITELLM_ENVIRONMENT / "bin/python"
    if make and not executable.exists():
        venv.create(LITELLM_ENVIRONMENT, with_pip=True)
        output([str(executable), "-m", "pip", "install", "-qq", "litellm"], 600)
    return str(executable) if executable.exists() else None


def is_right(case: Case, outcome: str) -> bool:
    if case in GROUPS[WHOLE]:
        return outcome == SILENT
    return SILENT not in outcome and STUCK not in outcome


def count(cases: Sequence[Case], outcomes: Sequence[str]) -> str:
    pairs = [pair for pair in zip(cases, outcomes, strict=True) if pair[1] != NOT_SENT]
    right = sum(is_right(*pair) for pair in pairs)
    looped = sum(IN_THE_LOOP in outcome for _, outcome in pairs)
    looped_too = f", {looped} {IN_THE_LOOP}" if looped else ""
    return f"{right} of {len(pairs)}{looped_too}" if pairs else NOT_SENT


def tables(columns: dict[str, list[str]]) -> tuple[str, str]:
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
    how_many, how = "How many answers were right:", "How each loop ended:"
    return table(how_many, ["", *columns], short), table(how, ["", *columns], long)


def endings(quick: bool) -> Part:
    """Find out who notices; writes endings.md unless the run is a quick one."""
    found: dict[str, str] = {}
    columns = {}
    with served() as address:
        for name in CLIENTS:
            python = sys.executable if name != "litellm" else litellm_python(not quick)
            if python:
                command = [python, __file__, "--client", name, address]
                printed = output(command, CLIENT_SECONDS).splitlines()
                version, columns[name] = json.loads(printed[-1])
                found |= version
    summary, details = tables(columns)
    if not quick:
        names = ", ".join(f"{package} {found[package]}" for package in found)
        page = PAGE.format(names, summary, details)
        (BENCH / "endings.md").write_text(page, encoding="utf-8")
    right = sum(map(is_right, CASES, columns["sse_chat"]))
    data = {"versions": found, "answers": [case.name for case in CASES], **columns}
    return Part([summary, details], data, {"endings": right / len(CASES)})


if __name__ == "__main__":
    if "--client" in sys.argv:
        child(*sys.argv[2:])
    else:
        print(*endings("--quick" in sys.argv).tables, sep="\n")
