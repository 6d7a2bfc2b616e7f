"""Cold starts, timed as whole processes, and the second one-shot call."""

import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

from measure import Figure, Part, Samples, interleave
from processes import BENCH, ROOT, clients, output, server, started
from programs import program, python
from workloads import ASCII_WORDS

EVENTS = 20
LITELLM_ROUNDS = 3
LITELLM_ENVIRONMENT = BENCH / ".venv-litellm"

IMPORTS = ("sse_chat", "httpx", "openai", "ollama")
STARTS = (
    *("sse_chat", "sse_chat async", "openai", "openai async"),
    *("dicts", "dicts async", "ollama"),
)
WORDS = {
    "dicts": 'item["choices"][0]["delta"].get("content")',
    "ollama": "item.message.content",
}
"""What an item says; chunk objects are all alike."""


def printing(name: str, address: str) -> str:
    """The code that prints each word of an answer as it comes."""
    url = f"{address}/{EVENTS}/0" + ("" if name == "ollama" else "/v1")
    word = WORDS.get(name.removesuffix(" async"), "item.choices[0].delta.content")
    return program(name, url, f"print({word}, flush=True)")


def litellm_python() -> str:
    """A Python that has litellm; makes it at the first call.

    litellm and openai 3 cannot be installed together.
    """
    executable = str(LITELLM_ENVIRONMENT / "bin" / "python")
    if not Path(executable).exists():
        venv.create(LITELLM_ENVIRONMENT, with_pip=True)
        install = [executable, "-m", "pip", "install", "-qq", "litellm"]
        subprocess.run(install, check=True)
    return executable


def cold_start(quick: bool) -> Part:
    """Whole processes: imports, `--version`, and the time to the first chunk."""
    rounds = 1 if quick else 7
    whole = {"pass": python("pass")}
    whole |= {name: python(f"import {name}") for name in IMPORTS}
    for option in ("--version", "--help"):
        whole[option] = [sys.executable, str(ROOT / "sse_chat.py"), option]
    with server() as address:
        first = {name: python(printing(name, address)) for name in STARTS}
        check_starts(first)
        imports = _timed(whole, seconds_to_end, rounds)
        starts = _timed(first, seconds_to_output, rounds)
        if not quick:
            # It takes seconds, so it has few rounds, after the others.
            apart = litellm_python()
            whole = {"litellm": python("import litellm", apart)}
            first = {"litellm": python(printing("litellm", address), apart)}
            check_starts(first)
            imports |= _timed(whole, seconds_to_end, LITELLM_ROUNDS)
            starts |= _timed(first, seconds_to_output, LITELLM_ROUNDS)
    return Part(
        [
            _table("cold start: whole processes", imports, "pass"),
            _table("cold start: process start to first chunk", starts, "sse_chat"),
        ],
        {
            "milliseconds of the whole process": imports.summary(),
            "milliseconds to the first chunk": starts.summary(),
        },
        _figures(imports, starts),
    )


def check_starts(firsts: dict[str, list[str]]) -> None:
    """Each program prints the first word."""
    for name, command in firsts.items():
        if output(command).split("\n", 1)[0] != ASCII_WORDS[0]:
            raise RuntimeError(f"{name} did not print the first word")


def seconds_to_end(command: list[str]) -> float:
    """Wall-clock seconds of a whole program."""
    start = time.perf_counter()
    output(command)
    return time.perf_counter() - start


def seconds_to_output(command: list[str]) -> float:
    """Wall-clock seconds from the start of a program to its first line."""
    start = time.perf_counter()
    with started(command) as process:
        assert process.stdout
        if not process.stdout.readline():
            raise RuntimeError(f"{' '.join(command)} printed nothing")
        return time.perf_counter() - start


def _timed(
    commands: dict[str, list[str]], seconds: Callable[[list[str]], float], rounds: int
) -> Samples:
    """Milliseconds by command and round."""

    def run(name: str) -> float:
        return seconds(commands[name]) * 1e3

    return interleave(run, commands, rounds, warm_up=min(1, rounds - 1))


def _table(title: str, samples: Samples, base: str) -> str:
    unit = samples.figure(base).value
    over = {name: f"{samples.figure(name).value / unit:.2f} ×" for name in samples}
    return samples.table(title, "ms", {f"over {base}": over})


def _figures(imports: Samples, starts: Samples) -> dict[str, Figure]:
    return {
        "first chunk / openai": starts.ratio("sse_chat", "openai"),
        "first chunk / openai async": starts.ratio("sse_chat async", "openai async"),
        "first chunk / dicts": max(starts.both("sse_chat", "dicts")),
        "import over pass": imports.difference("sse_chat", "pass"),
        "--version / pass": imports.ratio("--version", "pass"),
        "--help / pass": imports.ratio("--help", "pass"),
    }


ONE_SHOT = ", one-shot"


def one_shot(quick: bool) -> Part:
    """What a one-shot call takes longer than one on a client that is there.

    The server closes each connection, so that both open one.
    """
    kept = ("sse_chat", "openai")
    names = [name + kind for name in kept for kind in (ONE_SHOT, "")]

    def run(name: str) -> float:
        milliseconds: float = contenders[name].run()["wall"] * 1e3
        return milliseconds

    with server() as address, clients(names, f"{address}/3/0/close/v1") as contenders:
        samples = interleave(run, names, 3 if quick else 60, warm_up=2)
    set_ups = {
        name + ONE_SHOT: samples.difference(name + ONE_SHOT, name) for name in kept
    }
    columns = {"of it client set-up": set_ups}
    return Part(
        [samples.table("one-shot calls to an http:// URL", "ms per call", columns)],
        {"milliseconds per call": samples.summary()},
        {"one-shot set-up": set_ups["sse_chat" + ONE_SHOT]},
    )
