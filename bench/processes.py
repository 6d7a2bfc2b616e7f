"""The processes of a run: the server, the clients, and whole programs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
EXIT_SECONDS = 30
PROGRAM_SECONDS = 120


def environment() -> dict[str, str]:
    """Ours: this checkout importable, and nothing that would change a contender."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("OPENAI_")
    }
    return {**kept, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@contextmanager
def server() -> Iterator[str]:
    """Runs server.py; gives its address, without a path."""
    command = [sys.executable, str(BENCH / "server.py")]
    with started(command) as process:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Runs a program that ends when its standard input does."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Client:
    """A contender in its own process, see clients.py."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        self._in = process.stdin
        self._out = process.stdout
        if self._out.readline() != "ready\n":
            raise RuntimeError(f"{process.args!r} did not start")

    def ask(self, command: str) -> None:
        """Starts a command without waiting for its end."""
        self._in.write(command + "\n")
        self._in.flush()

    def answer(self) -> dict[str, Any]:
        """What the last command gave."""
        answer: dict[str, Any] = json.loads(self._out.readline())
        return answer

    def run(self) -> dict[str, Any]:
        """Reads one answer, or as many at once as the client was started with."""
        self.ask("run")
        return self.answer()


@contextmanager
def clients(
    names: Sequence[str], base_url: str, streams: int = 1
) -> Iterator[dict[str, Client]]:
    """Starts one client process for each name."""
    with ExitStack() as stack:
        command = [sys.executable, str(BENCH / "clients.py")]
        processes = [
            stack.enter_context(started([*command, name, base_url, str(streams)]))
            for name in names
        ]
        yield dict(zip(names, map(Client, processes), strict=True))


def output(command: Sequence[str]) -> str:
    """Runs a whole program to its end; gives what it printed."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PROGRAM_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
