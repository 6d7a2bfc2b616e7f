"""Timing and its arithmetic, tables, processes; of the standard library alone."""

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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

BENCH = Path(__file__).resolve().parent
PACKAGES = {"httpx", "httpcore", "h11", "httpx2", "httpx-sse", "openai", "pydantic"}


def number(value: float) -> str:
    """Format three digits, which is more than the noise leaves, and no exponent."""
    return f"{value:.3g}" if abs(value) < 1_000 else f"{float(f'{value:.3g}'):,.0f}"


class Samples(dict[str, list[float]]):
    """One value per round for each contender."""

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.items()}

    def ratio(self, over: str, under: str) -> float:
        return statistics.median(self[over]) / statistics.median(self[under])

    def both(self, over: str, under: str) -> list[float]:
        """Return the ratio of the sync contenders, and that of the async ones."""
        return [self.ratio(over + kind, under + kind) for kind in ("", " async")]

    def times(self, factor: float) -> Samples:
        return Samples({k: [v * factor for v in values] for k, values in self.items()})

    def table(self, title: str, unit: str) -> str:
        """Render the median and the quartiles, and how many times ours it takes."""
        rows = []
        for name, values in self.items():
            ours = "sse_chat async" if name.endswith(" async") else "sse_chat"
            times = f"{self.ratio(name, ours):.2f} ×" if ours in self else ""
            low, middle, high = map(number, statistics.quantiles(values * 2))
            rows.append([name, middle, f"{low}–{high}", times])
        return table(title, ["", unit, "quartiles", "over ours"], rows)


@dataclass
class Part:
    """What a part found: `data` is for results.json, `figures` are for ROWS."""

    tables: list[str] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def table(title: str, head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [" | ".join(map(str, row)) for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(["", title, "", *(f"| {line} |" for line in lines)])


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    gc.collect()  # This keeps one contender's garbage out of another's time.
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
        "system": platform.platform(),
        "python": platform.python_version(),
        "load average": os.getloadavg()[0],
    }


def versions(packages: Collection[str] = PACKAGES) -> dict[str, str]:
    """Return the version of each of these packages that is installed."""
    return {d.name: d.version for d in metadata.distributions() if d.name in packages}


def peak_bytes() -> int:
    """Return the most memory that this process has held so far."""
    # In ru_maxrss of Linux a new process begins with its parent's figure.
    if sys.platform == "linux":
        kibibytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(kibibytes[1]) * 1024 if kibibytes else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allow_many_sockets() -> None:
    """Let this process open as many files and sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def environment() -> Mapping[str, str]:
    """Return ours: this checkout importable, and nothing that changes a contender."""
    strange = re.compile(r"OPENAI_|.*_proxy$", re.IGNORECASE)
    kept = {k: value for k, value in os.environ.items() if not strange.match(k)}
    path = os.pathsep.join([str(BENCH.parent), str(BENCH)])
    return {**kept, "PYTHONPATH": path, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program, and end it when nobody needs it any more."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment(), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def output(command: Sequence[str], seconds: float = 120) -> str:
    """Run a whole program to its end; returns its standard output."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
