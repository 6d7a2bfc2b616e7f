"""The child process in which one contender reads over HTTP.

    python bench/clients.py NAME BASE_URL [STREAMS]

makes its client, prints "ready", and then for each line on standard input reads one
answer to its end (or STREAMS answers at once) and prints what that took, as JSON. It
runs async if its name has the word in it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import allow_many_sockets
from peak import peak_bytes
from programs import without_async


def contenders(sync: bool) -> dict[str, Any]:
    """What contenders.py defines, or its sync twin."""
    path = Path(__file__).with_name("contenders.py")
    source = path.read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    exec(compile(without_async(source) if sync else source, path, "exec"), found)
    return found


def text_of(items: list[Any]) -> str:
    """What the items of one answer say: chunks, dicts, or bytes cut anywhere."""
    if isinstance(items[0], bytes):
        lines = b"".join(items).split(b"\n")
        items = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(
        item["choices"][0]["delta"].get("content", "")
        if isinstance(item, dict)
        else item.choices[0].delta.content or ""
        for item in items
    )


def taken(read: Callable[[], list[Any]]) -> dict[str, float]:
    """What reading took, in seconds and bytes, and what came."""
    start, cpu = time.perf_counter(), time.process_time()
    answers = read()
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - start
    whole = [answer for answer in answers if not isinstance(answer, Exception)]
    firsts = [first for _, first, _ in whole]
    first_end = min((end for _, _, end in whole), default=start)
    return {
        "cpu": cpu,
        "wall": wall,
        "first": max(firsts, default=start) - start,
        "items": sum(items for items, _, _ in whole),
        "failed": len(answers) - len(whole),
        "open at once": sum(first < first_end for first in firsts),
        "peak": peak_bytes(),
    }


def main(name: str, base_url: str, streams: int = 1) -> None:
    """Runs the contender `name` against the server at `base_url`."""
    allow_many_sockets()
    sync = "async" not in name
    found = contenders(sync)
    make = found["CONTENDERS"][name.replace(" async", "")]
    loop = asyncio.new_event_loop()

    async def at_once(read: Callable[[Any], Any], count: int) -> list[Any]:
        answers = (read(stream) for _ in range(count))
        return await asyncio.gather(*answers, return_exceptions=count > 1)

    def run(read: Callable[[Any], Any], count: int) -> list[Any]:
        if sync:
            return [read(stream)]
        return loop.run_until_complete(at_once(read, count))

    stream = make(base_url)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "check\n":
            done: dict[str, Any] = {"text": text_of(run(found["collect"], 1)[0])}
        else:
            if streams > 1:  # Each run has a new client.
                stream = make(base_url)
            done = taken(lambda: run(found["read"], streams))
        print(json.dumps(done), flush=True)
    loop.run_until_complete(loop.shutdown_asyncgens())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
