"""Measures sse_chat beside what people would take instead.

    python bench/run.py                 everything: tables, results, chart, endings
    python bench/run.py --only decode   some parts, separated by commas
    python bench/run.py --quick         does it all work? no verdict, writes nothing

The last table says which of ROWS were reached; the exit code is 1 if one was not.
"""

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
# The sse_chat.py of this checkout is measured, whatever else is installed.
sys.path.insert(0, str(BENCH.parent))

from measure import Figure, Part, machine, number, table, versions  # noqa: E402

PARTS = {
    "endings": "endings.endings",
    "decode": "decode.decode",
    "typed": "decode.typed",
    "growth": "decode.growth",
    "end_to_end": "network.end_to_end",
    "concurrency": "network.concurrency",
    "start": "network.start",
}


# ---- What is to be reached -----------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One thing to reach: the figure has to be at least, or at most, the limit."""

    what: str
    figure: str
    relation: str
    limit: float

    def reached(self, value: float) -> bool:
        """Say whether `value` is on the right side of the limit."""
        return value >= self.limit if self.relation == "≥" else value <= self.limit


ROWS = (
    Row("endings: answers judged right by us", "endings", "≥", 1),
    Row("decode, chat, 64 KiB, 1,460 B: httpx-sse", "decode, segments", "≥", 1.8),
    Row("decode, chat, one event a read: httpx-sse", "decode, events", "≥", 2.4),
    Row("decode, chat, 16 B: httpx-sse", "decode, 16 B", "≥", 1.9),
    Row("decode, every cell: httpx-sse", "decode, all", "≥", 1.25),
    Row("typed, chat: the recipe", "typed chat / recipe", "≥", 1.4),
    Row("typed, chat: openai", "typed chat / openai", "≥", 15),
    Row("typed, tool calls: the recipe", "typed tools / recipe", "≥", 1.2),
    Row("typed, tool calls: openai", "typed tools / openai", "≥", 9.5),
    Row("end to end: dicts only", "end to end / dicts", "≥", 0.95),
    Row("end to end: dicts only, async", "end to end / dicts async", "≥", 1),
    Row("end to end: the recipe", "end to end / recipe", "≥", 1.25),
    Row("end to end: openai", "end to end / openai", "≥", 7),
    Row("start to first token: us over httpx", "first token / httpx", "≤", 1.1),
    Row("start to first token: openai", "first token / openai", "≥", 3),
    Row("sse-chat --version over python -c pass", "--version / pass", "≤", 5),
    Row("1,000 streams: whole", "concurrency whole", "≥", 1),
    Row("1,000 streams: us over httpx", "concurrency / httpx", "≤", 1.2),
    Row("1,000 streams: openai", "concurrency / openai", "≥", 1.5),
    Row("growth: time for 16 times the size", "growth", "≤", 40),
    Row("growth: memory for the bytes of one event", "memory of one event", "≤", 3),
)


def judge(figures: dict[str, Figure]) -> list[dict[str, Any]]:
    """Return each row that was measured, with its figure and whether it is reached."""
    return [
        {**asdict(row), **asdict(figure), "reached": row.reached(figure.value)}
        for row in ROWS
        if (figure := figures.get(row.figure))
    ]


# ---- The chart -----------------------------------------------------------------------

BARS = {
    "sse_chat": "sse_chat",
    "dicts": "httpx-sse, json.loads (only dicts)",
    "recipe": "httpx-sse, openai's types",
    "openai": "openai",
    "httpx": "httpx alone (only bytes)",
}
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="760" height="206" role="img">
<title>Streaming over HTTP: processor time per event</title>
<style>
text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }}
.title {{ font-size: 16px; font-weight: 600 }}
.note {{ fill: #57606a }}
.label {{ text-anchor: end }}
rect {{ fill: #b9c0c8 }}
.sse_chat {{ fill: #1a7f5a }}
.httpx {{ fill: #e3e6ea }}
</style>
<rect width="760" height="206" style="fill: #fff"/>
<text class="title" x="12" y="24">Streaming over HTTP: processor time per event</text>
<text class="note" x="12" y="44">microseconds in the client, medians; \
a local server sends as fast as the client reads</text>
{bars}
</svg>
"""
BAR = """\
<text class="label" x="236" y="{text_y}">{label}</text>
<rect class="{name}" x="244" y="{y}" width="{width:.0f}" height="18"/>
<text x="{text_x:.0f}" y="{text_y}">{value}</text>"""


def chart(medians: dict[str, float]) -> str:
    """Draw horizontal bars, ours in colour and the floor pale."""
    bars = []
    for y, (name, label) in zip(range(60, 200, 28), BARS.items(), strict=True):
        width = 400 * medians[name] / max(medians[name] for name in BARS)
        value = number(medians[name])
        if name != "sse_chat":
            value += f" ({number(medians[name] / medians['sse_chat'])} ×)"
        places = {"y": y, "text_y": y + 14, "width": width, "text_x": 252 + width}
        bars.append(BAR.format(name=name, label=label, value=value, **places))
    return SVG.format(bars="\n".join(bars))


# ---- The run -------------------------------------------------------------------------


def measure_part(name: str, quick: bool) -> Part:
    """Run one part and print its tables."""
    module, function = PARTS[name].split(".")
    run: Callable[[bool], Part] = getattr(import_module(module), function)
    # What is imported leaves the garbage collector's rounds, else each contender would
    # be charged for walking the modules of all others.
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    part = run(quick)
    seconds = time.perf_counter() - start
    print(*part.tables, f"\n({name}: {seconds:.0f} s)", sep="\n", flush=True)
    return part


def write(parts: dict[str, Part], judged: list[dict[str, Any]]) -> None:
    """Write results.json, in four digits since the rest is noise, and the chart."""
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": judged,
        **{name: part.data for name, part in parts.items()},
    }
    found = json.loads(
        json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}")
    )
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (BENCH / "results.json").write_text(text + "\n", encoding="utf-8")
    picture = chart(found["end_to_end"]["CPU µs per event"])
    (BENCH / "end_to_end.svg").write_text(picture, encoding="utf-8")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measures sse_chat beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test, no verdict")
    parser.add_argument("--only", metavar="PARTS", help=", ".join(PARTS))
    options = parser.parse_args()
    options.parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def main() -> int:
    """Run the parts; returns 1 if a row was not reached."""
    options = arguments()
    print(*(f"{name}: {value}" for name, value in machine().items()), sep="\n")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    parts = {name: measure_part(name, options.quick) for name in options.parts}
    if options.quick:
        print("\nEvery part works.")
        return 0
    judged = judge({k: v for part in parts.values() for k, v in part.figures.items()})
    if not options.only:
        write(parts, judged)
    rows = [
        [
            row["what"],
            f"{row['relation']} {row['limit']:g}",
            Figure(row["value"], row["low"], row["high"]),
            "reached" if row["reached"] else "NOT REACHED",
        ]
        for row in judged
    ]
    print(
        table(
            "rows: the others over ours, or what is said", ["", "reach", "", ""], rows
        )
    )
    reached = sum(row["reached"] for row in judged)
    print(f"\n{reached} of {len(judged)} reached")
    return 0 if reached == len(judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
