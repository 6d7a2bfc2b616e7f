"""Contenders as code: their sync twins, and whole programs that stream one answer."""

import inspect
import re
import sys

from contenders import BODY, CONTENDERS, MESSAGES, ROUTE, TIMEOUT

ASYNC_WORDS = re.compile(r"\b(async |await |Async|a(?=iter|connect|stream_chat))")

PROGRAM = """
from __future__ import annotations
URL = {url!r}
MESSAGES, BODY, ROUTE, TIMEOUT = {constants!r}
{contender}
async def main():
    async for item in {function}(URL)():
        {then}
"""


def without_async(source: str) -> str:
    """The same code without its async words."""
    return ASYNC_WORDS.sub("", source)


def python(code: str, executable: str = sys.executable) -> list[str]:
    """The command that runs this code."""
    return [executable, "-c", code]


def program(name: str, url: str, then: str, finish: str = "") -> str:
    """The code that streams an answer with a contender.

    `then` is done with each `item`, `finish` at the end.
    """
    contender = CONTENDERS[name.removesuffix(" async")]
    code = PROGRAM.format(
        url=url,
        constants=(MESSAGES, BODY, ROUTE, TIMEOUT),
        contender=inspect.getsource(contender),
        function=contender.__name__,
        then=then,
    )
    if name.endswith(" async"):
        return f"{code}import asyncio\nasyncio.run(main())\n{finish}"
    return f"{without_async(code)}main()\n{finish}"
