"""Lets the wheel carry sse_chat.py twice: to run, and as stubs for type checkers.

A module outside of a package cannot say that it is typed, but may have stubs (PEP 561).
Those of an editable install are from the day it was made.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):
    """Adds the stubs: a copy, since hatchling gives each file one place."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is made."""
        self.folder = TemporaryDirectory()
        copy = shutil.copy(Path(self.root, "sse_chat.py"), self.folder.name)
        build_data["force_include"][copy] = "sse_chat-stubs/__init__.pyi"

    def finalize(self, *_: Any) -> None:
        """After it."""
        self.folder.cleanup()
