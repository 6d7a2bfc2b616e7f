"""Timing, the arithmetic on it, and what it ran on."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from operator import sub, truediv
from pathlib import Path

Columns = Mapping[str, Mapping[str, object]]
"""For a table: by heading, what stands there for each contender."""

PACKAGES = (
    *("httpx", "httpcore", "h11", "httpx2", "httpcore2", "httpx-sse", "openai"),
    *("pydantic", "sseclient-py", "ollama", "dask", "distributed"),
)


def number(value: float) -> str:
    """Three digits, which is more than the noise leaves, and no exponent."""
    if abs(value) < 1_000:
        return f"{value:.3g}"
    return f"{float(f'{value:.3g}'):,.0f}"


@dataclass(frozen=True, order=True)
class Figure:
    """A measured number and its spread, the quartiles over the rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The median and the quartiles."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)}–{number(self.high)})"


class Samples(dict[str, list[float]]):
    """For each contender one value per round."""

    def figure(self, name: str) -> Figure:
        """The median of a contender, and its quartiles."""
        return Figure.of(self[name])

    def ratio(self, over: str, under: str) -> Figure:
        """The ratio of the medians, with the quartiles of the ratios of each round."""
        return self._compared(truediv, over, under)

    def both(self, over: str, under: str) -> list[Figure]:
        """The ratio of the sync ones, and that of the async ones."""
        return [self.ratio(over + kind, under + kind) for kind in ("", " async")]

    def difference(self, name: str, base: str) -> Figure:
        """The difference of the medians, with the quartiles of that of each round."""
        return self._compared(sub, name, base)

    def _compared(
        self, compare: Callable[[float, float], float], a: str, b: str
    ) -> Figure:
        rounds = [compare(x, y) for x, y in zip(self[a], self[b], strict=True)]
        value = compare(self.figure(a).value, self.figure(b).value)
        return replace(Figure.of(rounds), value=value)

    def times(self, factor: float) -> Samples:
        """The same in another unit."""
        return Samples({k: [v * factor for v in values] for k, values in self.items()})

    def table(self, title: str, unit: str, columns: Columns | None = None) -> str:
        """A table with a row for each contender, and more columns by contender."""
        more = columns or {}
        rows = [
            [name, self.figure(name), *(c.get(name, "") for c in more.values())]
            for name in self
        ]
        return table(title, ["", unit, *more], rows)

    def summary(self) -> dict[str, dict[str, float]]:
        """Median and quartiles by contender, for the results file."""
        return {name: asdict(self.figure(name)) for name in self}


@dataclass
class Part:
    """What one part of the suite found.

    `data` goes into the results; the rows of `reach.py` look at `figures`, by name.
    """

    tables: list[str] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)


def cpu_seconds(run: Callable[[], object]) -> float:
    """The processor time of one call, in seconds.

    The collection before it keeps one contender's garbage out of another's time.
    """
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def interleave(
    run: Callable[[str], float], names: Iterable[str], rounds: int, warm_up: int = 1
) -> Samples:
    """Runs A B C A B C …, so that a slow minute of the machine meets all alike."""
    samples = Samples({name: [] for name in names})
    for done in range(warm_up + rounds):
        for name in samples:
            value = run(name)
            if done >= warm_up:
                samples[name].append(value)
    return samples


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in plain text, the first column to the left, the others to the right."""
    lines = [list(map(_cell, row)) for row in (head, *rows)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in (first, *others)])
    layout = f"{{:<{first}}}" + "".join(f"  {{:>{width}}}" for width in others)
    return "\n".join(
        ["", title, "", *(layout.format(*line).rstrip() for line in lines)]
    )


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def freeze_imports() -> None:
    """Takes what is imported out of the garbage collector's rounds.

    Else each contender would be charged for walking the modules of all others.
    """
    gc.collect()
    gc.freeze()


def machine() -> dict[str, object]:
    """Processor, number of cores, system, Python, and how busy it is just now."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load average": os.getloadavg()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The version of every installed package that takes part."""
    return {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES}


def allow_many_sockets() -> None:
    """Lets this process open as many files and sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
