"""Part 5: cold starts, timed as whole processes, and the second one-shot call.

    python bench/startup.py URL

is the child that times one-shot calls; `run.py` starts it.
"""

import json
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

from measure import (
    Figure,
    Part,
    difference,
    interleave,
    largest,
    medians,
    ratio,
    spread,
    table,
)
from processes import BENCH, ROOT, output, seconds_to_end, seconds_to_output, server
from workloads import ASCII_WORDS

EVENTS = 20
LITELLM_ROUNDS = 3
LITELLM_ENVIRONMENT = BENCH / ".venv-litellm"

IMPORTS = {
    "pass": "pass",
    "sse_chat": "import sse_chat",
    "httpx": "import httpx",
    "openai": "import openai",
    "ollama": "import ollama",
}

OPENAI = """
from openai import OpenAI
client = OpenAI(base_url=URL, api_key="none")
stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
for chunk in stream:
    print(chunk.choices[0].delta.content, flush=True)
"""
OPENAI_ASYNC = """
import asyncio
from openai import AsyncOpenAI
async def main():
    client = AsyncOpenAI(base_url=URL, api_key="none")
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True
    )
    async for chunk in stream:
        print(chunk.choices[0].delta.content, flush=True)
asyncio.run(main())
"""
SSE_CHAT = """
from sse_chat import stream_chat
for chunk in stream_chat(MESSAGES, model="m", base_url=URL):
    print(chunk.choices[0].delta.content, flush=True)
"""
SSE_CHAT_ASYNC = """
import asyncio
from sse_chat import astream_chat
async def main():
    async for chunk in astream_chat(MESSAGES, model="m", base_url=URL):
        print(chunk.choices[0].delta.content, flush=True)
asyncio.run(main())
"""
DICTS = """
import json
import httpx
from httpx_sse import connect_sse
body = {"model": "m", "messages": MESSAGES, "stream": True}
with httpx.Client() as client:
    with connect_sse(client, "POST", URL + "/chat/completions", json=body) as source:
        for event in source.iter_sse():
            if event.data != "[DONE]":
                chunk = json.loads(event.data)
                print(chunk["choices"][0]["delta"].get("content"), flush=True)
"""
DICTS_ASYNC = """
import asyncio
import json
import httpx
from httpx_sse import aconnect_sse
body = {"model": "m", "messages": MESSAGES, "stream": True}
async def main():
    async with httpx.AsyncClient() as client:
        url = URL + "/chat/completions"
        async with aconnect_sse(client, "POST", url, json=body) as source:
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    chunk = json.loads(event.data)
                    print(chunk["choices"][0]["delta"].get("content"), flush=True)
asyncio.run(main())
"""
OLLAMA = """
from ollama import Client
for chunk in Client(host=URL).chat(model="m", messages=MESSAGES, stream=True):
    print(chunk.message.content, flush=True)
"""
LITELLM = """
from litellm import completion
for chunk in completion(
    model="openai/m", messages=MESSAGES, stream=True, api_base=URL, api_key="none"
):
    print(chunk.choices[0].delta.content, flush=True)
"""
FIRST_CHUNK = {
    "sse_chat": SSE_CHAT,
    "sse_chat async": SSE_CHAT_ASYNC,
    "openai": OPENAI,
    "openai async": OPENAI_ASYNC,
    "dicts": DICTS,
    "dicts async": DICTS_ASYNC,
    "ollama": OLLAMA,
}


class WrongStart(Exception):
    """A program did not print the first word, or imported what it should not."""


def program(code: str, url: str = "", python: str = sys.executable) -> list[str]:
    """The command of a program that knows URL and MESSAGES."""
    messages = [{"role": "user", "content": "hi"}]
    return [python, "-c", f"URL = {url!r}\nMESSAGES = {messages!r}\n{code}"]


def litellm_python() -> str:
    """A Python that has litellm; makes it at the first call.

    litellm and openai 3 cannot be installed together.
    """
    python = LITELLM_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(LITELLM_ENVIRONMENT, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-qq", "litellm"]
        subprocess.run(install, check=True)
    return str(python)


def cold_start(quick: bool) -> Part:
    """Whole processes: imports, `--version`, and the time to the first chunk."""
    part = Part()
    rounds = 1 if quick else 7
    commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    for option in ("--version", "--help"):
        commands[option] = [sys.executable, str(ROOT / "sse_chat.py"), option]
    with server() as address:
        url = f"{address}/{EVENTS}/0/v1"
        firsts = {
            name: program(code, address + f"/{EVENTS}/0" if name == "ollama" else url)
            for name, code in FIRST_CHUNK.items()
        }
        check_import()
        check_starts(firsts)
        imports = _timed(commands, seconds_to_end, rounds)
        starts = _timed(firsts, seconds_to_output, rounds)
        if not quick:
            _add_litellm(imports, starts, url)
    part.tables = [
        _table("cold start: whole processes", imports, "pass"),
        _table("cold start: process start to first chunk", starts, "sse_chat"),
    ]
    part.data = {
        "milliseconds of the whole process": medians(imports),
        "milliseconds to the first chunk": medians(starts),
    }
    part.figures = _figures(imports, starts)
    return part


def _add_litellm(
    imports: dict[str, list[float]], starts: dict[str, list[float]], url: str
) -> None:
    # It takes seconds, so it has few rounds, after the others.
    python = litellm_python()
    first = {"litellm": program(LITELLM, url, python)}
    check_starts(first)
    import_it = {"litellm": [python, "-c", "import litellm"]}
    imports |= _timed(import_it, seconds_to_end, LITELLM_ROUNDS)
    starts |= _timed(first, seconds_to_output, LITELLM_ROUNDS)


def check_starts(firsts: dict[str, list[str]]) -> None:
    """Each program prints the first word."""
    for name, command in firsts.items():
        if output(command).split("\n", 1)[0] != ASCII_WORDS[0]:
            raise WrongStart(f"{name} did not print the first word")


def check_import() -> None:
    """Importing sse_chat leaves httpx alone."""
    code = "import sse_chat, sys; print({'httpx', 'httpx2'} & set(sys.modules))"
    if output([sys.executable, "-c", code]) != "set()\n":
        raise WrongStart("import sse_chat imports httpx")


def _timed(
    commands: dict[str, list[str]], seconds: Callable[[list[str]], float], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds by command and round."""
    runs = {name: partial(seconds, command) for name, command in commands.items()}
    samples = interleave(runs, rounds, warm_up=min(1, rounds - 1))
    return {name: [value * 1e3 for value in values] for name, values in samples.items()}


def _table(title: str, samples: dict[str, list[float]], base: str) -> str:
    unit = spread(samples[base]).value
    rows = [
        [name, str(spread(values)), f"{spread(values).value / unit:.2f} ×"]
        for name, values in samples.items()
    ]
    return table(title, ["", "ms", f"over {base}"], rows)


def _figures(
    imports: dict[str, list[float]], starts: dict[str, list[float]]
) -> dict[str, Figure]:
    ours, ours_async = starts["sse_chat"], starts["sse_chat async"]
    return {
        "first chunk / openai": ratio(ours, starts["openai"]),
        "first chunk / openai async": ratio(ours_async, starts["openai async"]),
        "first chunk / dicts": largest(
            [ratio(ours, starts["dicts"]), ratio(ours_async, starts["dicts async"])]
        ),
        "import over pass": difference(imports["sse_chat"], imports["pass"]),
        "--version / pass": ratio(imports["--version"], imports["pass"]),
        "--help / pass": ratio(imports["--help"], imports["pass"]),
    }


# One-shot calls: what making a client costs, beyond the same call on a kept client.
# The server closes each connection, so that both sides open one.


def one_shot(quick: bool) -> Part:
    """What a one-shot call takes longer than one on a client that is there."""
    part = Part()
    with server() as address:
        url = f"{address}/3/0/close/v1"
        rounds = 3 if quick else 60
        command = [sys.executable, str(Path(__file__)), url, str(rounds)]
        samples: dict[str, list[float]] = json.loads(output(command))
    set_ups = {
        name: difference(values, samples[f"{name}, kept client"])
        for name, values in samples.items()
        if not name.endswith("kept client")
    }
    rows = [
        [name, str(spread(values)), str(set_ups.get(name, ""))]
        for name, values in samples.items()
    ]
    head = ["", "ms per call", "of it client set-up"]
    part.tables.append(table("one-shot calls to an http:// URL", head, rows))
    part.data = {"milliseconds per call": medians(samples)}
    part.figures = {"one-shot set-up": set_ups["sse_chat"]}
    return part


def one_shot_calls(url: str) -> dict[str, Callable[[], float]]:
    """The calls, each giving its wall-clock milliseconds."""
    from openai import OpenAI

    from sse_chat import ChatClient, stream_chat

    client = ChatClient(base_url=url, model="m")
    openai = OpenAI(base_url=url, api_key="none")

    def shot() -> None:
        for _ in stream_chat("hi", model="m", base_url=url):
            pass

    def kept() -> None:
        for _ in client.stream("hi"):
            pass

    def openai_shot() -> None:
        with OpenAI(base_url=url, api_key="none") as client:
            _read_openai(client)

    calls = {
        "sse_chat": shot,
        "sse_chat, kept client": kept,
        "openai": openai_shot,
        "openai, kept client": lambda: _read_openai(openai),
    }
    return {name: partial(_milliseconds, call) for name, call in calls.items()}


def _read_openai(client: object) -> None:
    from openai import OpenAI

    assert isinstance(client, OpenAI)
    for _ in client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], stream=True
    ):
        pass


def _milliseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    print(json.dumps(interleave(one_shot_calls(sys.argv[1]), int(sys.argv[2]), 2)))
