"""Over loopback: one stream, a thousand at once, and whole programs from their start.

The server and every client have a process of their own. Starts are wall-clock time.
"""

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from measure import BENCH, Part, interleave, output, started
from streams import ASCII_WORDS

BOTH = ("sse_chat", "openai", "recipe", "dicts", "httpx")
TOKENS_A_SECOND = 10
STARTS = ("sse_chat", "sse_chat async", "httpx", "httpx async", "dicts", "openai")
PROGRAM = "import clients; clients.start({!r}, {!r})"


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    if not (found := process.stdout.readline()):
        raise RuntimeError(f"{process.args!r} printed nothing")
    return found


@contextmanager
def server() -> Iterator[str]:
    """Run the server of streams.py; yields its address, without a path."""
    with started([sys.executable, str(BENCH / "streams.py")]) as process:
        yield f"http://127.0.0.1:{int(line(process))}"


@contextmanager
def clients(
    names: Sequence[str], events: int, rate: int = 0, streams: int = 1
) -> Iterator[Callable[..., Any]]:
    """Start a server, and a client for each name that reads what was sent.

    Yields a function that lets a client read, and returns what that took.
    """

    def ask(name: str) -> Any:
        print(file=processes[name].stdin, flush=True)
        return json.loads(line(processes[name]))

    with server() as address, ExitStack() as stack:
        processes = {}
        for name in names:
            command = [sys.executable, str(BENCH / "clients.py"), name]
            command += [f"{address}/{events}/{rate}/v1", str(streams)]
            processes[name] = stack.enter_context(started(command))
        # The last two events are the finish and [DONE].
        sent = "".join(ASCII_WORDS[i % len(ASCII_WORDS)] for i in range(events - 2))
        for name, process in processes.items():
            text = json.loads(line(process))
            if text != sent and not name.startswith("httpx"):  # It has only bytes.
                raise RuntimeError(f"{name} lost or changed text")
        yield ask


def end_to_end(quick: bool) -> Part:
    """Measure the client's processor time of one stream, as fast as it reads."""
    events = 50 if quick else 3_000
    names = [*BOTH, *(f"{name} async" for name in BOTH)]
    with clients(names, events) as ask:
        samples = interleave(lambda name: ask(name)["cpu"], names, 1 if quick else 15)
    samples = samples.times(1e6 / events)
    title = f"end to end: {events:,} events a stream, flat out"
    dicts, dicts_async = samples.both("dicts", "sse_chat")
    return Part(
        [samples.table(title, "CPU µs/event")],
        {"CPU µs per event": samples.medians()},
        {
            "end to end / dicts": dicts,
            "end to end / dicts async": dicts_async,
            "end to end / recipe": min(samples.both("recipe", "sse_chat")),
            "end to end / openai": min(samples.both("openai", "sse_chat")),
        },
    )


def concurrency(quick: bool) -> Part:
    """Measure the processor time of very many streams at once on one event loop."""
    streams, events = (20, TOKENS_A_SECOND) if quick else (1_000, 3 * TOKENS_A_SECOND)
    ours, openai, httpx = names = ("sse_chat async", "openai async", "httpx async")
    items: dict[str, list[int]] = {name: [] for name in names}

    def run(name: str) -> float:
        done = ask(name)
        items[name].append(done["items"])
        return float(done["cpu"]) / (streams * events) * 1e6

    with clients(names, events, TOKENS_A_SECOND, streams) as ask:
        samples = interleave(run, names, 1 if quick else 5, warm_up=0)
    title = (
        f"concurrency: {streams:,} streams at once, {TOKENS_A_SECOND} events a second"
    )
    return Part(
        [samples.table(title, "CPU µs/event")],
        {"CPU µs per event": samples.medians()},
        {
            "concurrency whole": min(items[ours]) / (streams * (events - 1)),
            "concurrency / httpx": samples.ratio(ours, httpx),
            "concurrency / openai": samples.ratio(openai, ours),
        },
    )


def start(quick: bool) -> Part:
    """Measure whole programs: up to their first token, and `--version`."""
    rounds = 1 if quick else 11
    script = Path(sysconfig.get_path("scripts"), "sse-chat")
    if not script.exists():
        raise RuntimeError("sse-chat is not installed: pip install -e '.[bench]'")
    whole = {"pass": [sys.executable, "-c", "pass"]}
    whole["--version"] = [str(script), "--version"]
    with server() as address:
        url = f"{address}/20/0/v1"
        programs = {name: PROGRAM.format(name, url) for name in STARTS}
        first = {name: [sys.executable, "-c", programs[name]] for name in STARTS}
        for name, command in first.items():
            if ASCII_WORDS[0] not in output(command).split("\n")[0]:
                raise RuntimeError(f"{name} did not print the first word")
        firsts = interleave(lambda n: milliseconds(first[n], False), first, rounds)
    wholes = interleave(lambda n: milliseconds(whole[n], True), whole, rounds)
    return Part(
        [
            firsts.table("start: a program to its first token", "ms"),
            wholes.table("start: a program that asks for nothing", "ms"),
        ],
        {"ms to the first token": firsts.medians(), "ms": wholes.medians()},
        {
            "first token / httpx": max(firsts.both("sse_chat", "httpx")),
            "first token / openai": firsts.ratio("openai", "sse_chat"),
            "--version / pass": wholes.ratio("--version", "pass"),
        },
    )


def milliseconds(command: list[str], whole: bool) -> float:
    """Return the wall-clock time from a program's start to its first line, or end."""
    start = time.perf_counter()
    with started(command) as process:
        process.wait() if whole else line(process)
        return (time.perf_counter() - start) * 1e3
