"""The pictures of a run as SVG, small and with text as text; the README shows them."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

from measure import number

Values: TypeAlias = Mapping[str, Mapping[str, float]]

# By part: where the values are in its results, whose are shown, title, and unit.
PICTURES = {
    "end_to_end": (
        ("microseconds of client CPU per event",),
        ("sse_chat", "dicts", "recipe", "openai", "httpx", "http.client"),
        "Streaming over HTTP: processor time per event",
        "microseconds in the client; a local server sends as fast as it reads",
    ),
    "cold_start": (
        ("milliseconds to the first chunk",),
        ("sse_chat", "dicts", "ollama", "openai", "litellm"),
        "A fresh process: from its start to the first token",
        "milliseconds; Python started, everything imported, connected, asked",
    ),
    "concurrency": (
        ("microseconds of client CPU per event",),
        ("sse_chat async", "openai async", "httpx async"),
        "1,000 streams at once on one event loop: processor time per event",
        "microseconds in the client; 10 events a second in each stream",
    ),
    "typed": (
        ("chat, ASCII, one event", "microseconds per event"),
        ("sse_chat", "recipe", "openai", "floor"),
        "Bytes to chunk objects, without HTTP: processor time per chunk",
        "microseconds; one event per read",
    ),
    "decode": (
        ("chat, ASCII, 1,460 B", "microseconds per event"),
        ("sse_chat", "httpx-sse", "sseclient-py", "httpx2", "openai"),
        "Bytes to server-sent events, without HTTP: processor time per event",
        "microseconds; a chat stream read in pieces of 1,460 bytes",
    ),
}
LABELS = {
    "dicts": "httpx-sse + json.loads (only dicts)",
    "recipe": "httpx-sse + openai's types",
    "httpx": "httpx alone (only bytes)",
    "http.client": "http.client alone (only lines)",
    "floor": "split + json.loads (only dicts)",
}
FLOORS = ("httpx", "http.client", "floor")

WIDTH, LEFT, BARS = 760, 244, 400  # of all, of the labels, of the longest bar
TOP, ROW, BAR, BOTTOM = 58, 28, 18, 34
SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" \
viewBox="0 0 {width} {height}" role="img">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }}
.title {{ font-size: 16px; font-weight: 600 }}
.note {{ font-size: 12px; fill: #57606a }}
.label {{ text-anchor: end }}
.ours {{ fill: #1a7f5a }}
.peer {{ fill: #b9c0c8 }}
.floor {{ fill: #e3e6ea }}
path {{ stroke: #24292f; fill: none }}
</style>
<rect width="{width}" height="{height}" fill="#fff"/>
<text class="title" x="12" y="24">{title}</text>
<text class="note" x="12" y="43">{unit}</text>
{rows}
{whisker}
<text class="note" x="46" y="{legend}">the middle half of all rounds · 2 ×: twice as \
much as sse_chat · pale: does less of the work · less is better</text>
</svg>
"""


def draw(parts: Mapping[str, Any], folder: Path) -> None:
    """Draws what was measured."""
    for part, (path, names, title, unit) in PICTURES.items():
        values = parts[part]
        for key in path:
            values = values[key]
        shown = {name: values[name] for name in names if name in values}
        picture = svg(title, unit, shown)
        (folder / f"{part}.svg").write_text(picture, encoding="utf-8")


def svg(title: str, unit: str, shown: Values) -> str:
    """Horizontal bars from the top, medians with their quartiles, ours in colour."""
    height = TOP + ROW * len(shown) + BOTTOM
    return SVG.format(
        width=WIDTH,
        height=height,
        title=escape(title),
        unit=escape(unit),
        rows="\n".join(_rows(shown)),
        whisker=_whisker(14, 38, height - 16),
        legend=height - 12,
    )


def _rows(shown: Values) -> Iterator[str]:
    scale = BARS / max(value["high"] for value in shown.values())
    ours = next(iter(shown.values()))["value"]
    for row, (name, value) in enumerate(shown.items()):
        name = name.removesuffix(" async")
        kind = "ours" if row == 0 else "floor" if name in FLOORS else "peer"
        middle = TOP + ROW * row + BAR // 2
        end = LEFT + value["high"] * scale
        times = f" ({value['value'] / ours:.2g} ×)" if row else ""
        label = escape(LABELS.get(name, name))
        yield f'<text class="label" x="{LEFT - 8}" y="{middle + 5}">{label}</text>'
        yield (
            f'<rect class="{kind}" x="{LEFT}" y="{middle - BAR // 2}" '
            f'width="{value["value"] * scale:.1f}" height="{BAR}"/>'
        )
        yield _whisker(LEFT + value["low"] * scale, end, middle)
        text = f"{number(value['value'])}{times}"
        yield f'<text x="{end + 8:.1f}" y="{middle + 5}">{text}</text>'


def _whisker(low: float, high: float, y: int) -> str:
    return f'<path d="M{low:.1f} {y - 4}v8m0-4H{high:.1f}m0-4v8"/>'
