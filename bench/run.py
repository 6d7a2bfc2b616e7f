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
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
# The sse_chat.py of this checkout is measured, whatever else is installed.
sys.path.insert(0, str(BENCH.parent))

from measure import Part, machine, number, table, versions  # noqa: E402

# By name, the module in which the function of that name runs the part.
PARTS = {
    "endings": "endings",
    **dict.fromkeys(("decode", "typed", "memory"), "decode"),
    **dict.fromkeys(("end_to_end", "concurrency", "start"), "network"),
}

# What is to be reached: the figure has to be at least, or at most, the limit.
ROWS = (
    ("endings: the share that we judge right", "endings", "≥", 1),
    ("decode, chat, 64 KiB and 1,460 B: httpx-sse", "decode, segments", "≥", 1.8),
    ("decode, chat, an event a read: httpx-sse", "decode, events", "≥", 2.4),
    ("decode, chat, 16 B: httpx-sse", "decode, 16 B", "≥", 1.9),
    ("decode, every cell: httpx-sse", "decode, all", "≥", 1.25),
    ("typed, chat: the recipe", "typed chat / recipe", "≥", 1.4),
    ("typed, chat: openai", "typed chat / openai", "≥", 15),
    ("typed, tool calls: the recipe", "typed tools / recipe", "≥", 1.2),
    ("typed, tool calls: openai", "typed tools / openai", "≥", 9.5),
    ("end to end: dicts only", "end to end / dicts", "≥", 0.95),
    ("end to end: dicts only, async", "end to end / dicts async", "≥", 1),
    ("end to end: the recipe", "end to end / recipe", "≥", 1.25),
    ("end to end: openai", "end to end / openai", "≥", 7),
    ("start to first token: us over httpx", "first token / httpx", "≤", 1.1),
    ("start to first token: openai", "first token / openai", "≥", 3),
    ("sse-chat --version over python -c pass", "--version / pass", "≤", 5),
    ("1,000 streams: the share that is whole", "concurrency whole", "≥", 1),
    ("1,000 streams: us over httpx", "concurrency / httpx", "≤", 1.2),
    ("1,000 streams: openai", "concurrency / openai", "≥", 1.5),
    ("memory for the bytes of one event", "memory of one event", "≤", 3),
)


def judge(parts: dict[str, Part]) -> list[dict[str, Any]]:
    """Return each row that was measured, with its figure and whether it is reached."""
    figures = {name: f for part in parts.values() for name, f in part.figures.items()}
    judged = []
    for what, name, relation, limit in ROWS:
        if name in figures:
            value = figures[name]
            reached = value >= limit if relation == "≥" else value <= limit
            row = {"what": what, "aim": f"{relation} {limit}", "reached": reached}
            judged.append(row | {"measured": float(f"{value:.3g}")})
    return judged


BARS = {
    "sse_chat": "sse_chat",
    "dicts": "httpx-sse, json.loads (only dicts)",
    "recipe": "httpx-sse, openai's types",
    "openai": "openai",
    "httpx": "httpx alone (only bytes)",
}
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 206" width="760" role="img">
<title>Streaming over HTTP: processor time per event</title>
<style>
text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }}
rect {{ fill: #b9c0c8 }}
.sse_chat {{ fill: #1a7f5a }}
.httpx {{ fill: #e3e6ea }}
</style>
<rect width="760" height="206" style="fill: #fff"/>
<text x="12" y="24" style="font-weight: 600">Streaming over HTTP: processor time per \
event</text>
<text x="12" y="44">microseconds in the client, medians; a local server sends as fast \
as the client reads</text>
{bars}
</svg>
"""
BAR = """\
<text text-anchor="end" x="236" y="{text_y}">{label}</text>
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


def measure_part(name: str, quick: bool) -> Part:
    run = getattr(import_module(PARTS[name]), name)
    # What is imported leaves the garbage collector's rounds, else each contender would
    # be charged for walking the modules of all others.
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    part: Part = run(quick)
    seconds = time.perf_counter() - start
    print(*part.tables, f"\n({name}: {seconds:.0f} s)", sep="\n", flush=True)
    return part


def write(parts: dict[str, Part], judged: list[dict[str, Any]]) -> None:
    """Write results.json, in four digits since the rest is noise, and the chart."""
    found = {"date": datetime.date.today().isoformat(), "machine": machine()}
    found |= {"versions": versions(), "rows": judged}
    found |= {name: part.data for name, part in parts.items()}
    found = json.loads(
        json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}")
    )
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (BENCH / "results.json").write_text(text, encoding="utf-8")
    medians = found["end_to_end"]["CPU µs per event"]
    (BENCH / "end_to_end.svg").write_text(chart(medians), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures sse_chat beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test, no verdict")
    parser.add_argument("--only", metavar="PARTS", help=", ".join(PARTS))
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    print(*(f"{name}: {value}" for name, value in machine().items()), sep="\n")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    parts = {name: measure_part(name, options.quick) for name in names}
    if options.quick:
        print("\nEvery part works.")
        return 0
    judged = judge(parts)
    if not options.only:
        write(parts, judged)
    title = "what was to be reached: the others over ours, or what the row says"
    print(table(title, list(judged[0]), [row.values() for row in judged]))
    reached = sum(row["reached"] for row in judged)
    print(f"\n{reached} of {len(judged)} reached")
    return 0 if reached == len(judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
