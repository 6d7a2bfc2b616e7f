"""Timing, the arithmetic on it, tables, and the processes of a run.

Child processes import this too, so that it imports nothing but the standard library.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

BENCH = Path(__file__).resolve().parent
EXIT_SECONDS = 30
PROGRAM_SECONDS = 120
PACKAGES = {"httpx", "httpcore", "h11", "httpx2", "httpx-sse", "openai", "pydantic"}


def number(value: float) -> str:
    """Format three digits, which is more than the noise leaves, and no exponent."""
    return f"{value:.3g}" if abs(value) < 1_000 else f"{float(f'{value:.3g}'):,.0f}"


@dataclass(frozen=True, order=True)
class Figure:
    """A measured number and its spread, the quartiles over the rounds."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Take the median and the quartiles."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)}–{number(self.high)})"


class Samples(dict[str, list[float]]):
    """One value per round for each contender."""

    def ratio(self, over: str, under: str) -> Figure:
        """Return the ratio of the medians, with the quartiles of each round's ratio."""
        spread = Figure.of(
            [a / b for a, b in zip(self[over], self[under], strict=True)]
        )
        value = statistics.median(self[over]) / statistics.median(self[under])
        return Figure(value, spread.low, spread.high)

    def both(self, over: str, under: str) -> list[Figure]:
        """Return the ratio of the sync contenders, and that of the async ones."""
        return [self.ratio(over + kind, under + kind) for kind in ("", " async")]

    def times(self, factor: float) -> Samples:
        """Return the same in another unit."""
        return Samples({k: [v * factor for v in values] for k, values in self.items()})

    def medians(self) -> dict[str, float]:
        """Return the median of each contender."""
        return {name: statistics.median(values) for name, values in self.items()}

    def table(self, title: str, unit: str) -> str:
        """Render a row for each contender, and how many times ours it takes."""
        rows = []
        for name, values in self.items():
            ours = "sse_chat async" if name.endswith(" async") else "sse_chat"
            times = f"{self.ratio(name, ours).value:.2f} ×" if ours in self else ""
            rows.append([name, Figure.of(values), times])
        return table(title, ["", unit, "over ours"], rows)


@dataclass
class Part:
    """What one part of the suite found.

    `data` goes into results.json; the rows to reach look into `figures`, by name.
    """

    tables: list[str] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)


def table(title: str, head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Render plain text, the first column to the left and the others to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return f"\n{title}\n\n{text}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call, in seconds.

    The collection before it keeps one contender's garbage out of another's time.
    """
    gc.collect()
    start = time.process_time()
    run()
    return time.process_time() - start


def interleave(
    run: Callable[[str], float], names: Iterable[str], rounds: int, warm_up: int = 1
) -> Samples:
    """Run A B C A B C …, so that a slow minute of the machine meets all alike."""
    samples = Samples({name: [] for name in names})
    for done in range(warm_up + rounds):
        for name in samples:
            value = run(name)
            if done >= warm_up:
                samples[name].append(value)
    return samples


def machine() -> dict[str, object]:
    """Return processor, cores, system, Python, and how busy it is just now."""
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text() if info.exists() else "")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load average": os.getloadavg()[0],
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    wanted = set(packages)
    return {d.name: d.version for d in metadata.distributions() if d.name in wanted}


def peak_bytes() -> int:
    """Return the most memory that this process has held so far.

    Linux also has `ru_maxrss`, but there a new process begins with its parent's figure.
    """
    if sys.platform == "linux":
        kibibytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(kibibytes[1]) * 1024 if kibibytes else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allow_many_sockets() -> None:
    """Let this process open as many files and sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ---- Processes -----------------------------------------------------------------------


def environment() -> Mapping[str, str]:
    """Return ours: this checkout importable, and nothing that changes a contender."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.startswith("OPENAI_")
    }
    path = os.pathsep.join([str(BENCH.parent), str(BENCH)])
    return {**kept, "PYTHONPATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program that ends when its standard input does."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=environment(), **pipes)
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


def output(command: Sequence[str], seconds: float = PROGRAM_SECONDS) -> str:
    """Run a whole program to its end; returns its standard output."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
