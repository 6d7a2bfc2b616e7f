"""The pictures of a run, as SVG; the README shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from measure import number

OURS = "#1a7f5a"
PEER = "#b9c0c8"
FLOOR = "#e3e6ea"
INK = "#24292f"
FLOORS = ("httpx", "httpx async", "http.client", "split + json.loads")
LABELS = {
    "dicts": "httpx-sse + json.loads\n(dicts only)",
    "recipe": "httpx-sse + json.loads\n+ openai's types",
    "httpx": "httpx alone\n(raw bytes)",
    "http.client": "http.client alone\n(raw lines)",
}
STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    # The same run gives the same file.
    "svg.hashsalt": "sse_chat",
}

Values = Mapping[str, Mapping[str, float]]


def draw(parts: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draws what was measured; gives the files written."""
    pictures = {
        "end_to_end": _end_to_end,
        "decode": _decode,
        "typed": _typed,
        "cold_start": _cold_start,
        "concurrency": _concurrency,
    }
    written = []
    with mpl.rc_context(STYLE):
        for part, picture in pictures.items():
            if part in parts:
                path = folder / f"{part}.svg"
                picture(parts[part])
                plt.savefig(path, bbox_inches="tight", metadata={"Date": None})
                plt.close()
                written.append(path)
    return written


def _end_to_end(data: Mapping[str, Any]) -> None:
    values = data["microseconds of client CPU per event"]
    names = ("sse_chat", "dicts", "recipe", "openai", "httpx", "http.client")
    _bars(
        values,
        names,
        "Streaming over HTTP: client CPU per event",
        "microseconds; a local server sends as fast as the client reads",
    )


def _decode(data: Mapping[str, Any]) -> None:
    found = data["chat, ASCII, 1,460 B"]
    values = {
        name: {key: ms * 1e3 / found["events"] for key, ms in value.items()}
        for name, value in found["milliseconds"].items()
    }
    _bars(
        values,
        [
            name
            for name in ("sse_chat", "httpx-sse", "sseclient-py", "httpx2", "openai")
            if name in values
        ],
        "Bytes to server-sent events: CPU per event",
        "microseconds; a chat stream read in pieces of 1,460 bytes",
    )


def _typed(data: Mapping[str, Any]) -> None:
    values = data["chat, ASCII, one event"]["microseconds per chunk"]
    named = {"split + json.loads": values["floor"], **values}
    _bars(
        named,
        ("sse_chat", "recipe", "openai", "split + json.loads"),
        "Bytes to chunk objects, without HTTP: CPU per chunk",
        "microseconds; one event per read",
    )


def _cold_start(data: Mapping[str, Any]) -> None:
    values = data["milliseconds to the first chunk"]
    names = [
        name
        for name in ("sse_chat", "dicts", "ollama", "openai", "litellm")
        if name in values
    ]
    _bars(
        values,
        names,
        "A fresh process: from its start to the first chunk",
        "milliseconds; everything imported, connected and asked",
    )


def _concurrency(data: Mapping[str, Any]) -> None:
    values = {
        name.removesuffix(" async"): value
        for name, value in data["microseconds of client CPU per event"].items()
    }
    _bars(
        values,
        ("sse_chat", "openai", "httpx"),
        f"{data['streams']:,} streams at once on one event loop: client CPU per event",
        "microseconds; 10 events a second each",
    )


def _bars(values: Values, names: Sequence[str], title: str, unit: str) -> None:
    """Horizontal bars from the top, medians with their quartiles, ours in colour."""
    figure, axes = plt.subplots(figsize=(7.2, 0.55 * len(names) + 1.2))
    medians = [values[name]["value"] for name in names]
    errors = [
        [values[name]["value"] - values[name]["low"] for name in names],
        [values[name]["high"] - values[name]["value"] for name in names],
    ]
    colors = [_color(name) for name in names]
    labels = [LABELS.get(name, name) for name in names]
    axes.barh(labels, medians, color=colors, height=0.62)
    axes.errorbar(medians, labels, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8)
    base = values["sse_chat"]["value"]
    end = max(values[name]["high"] for name in names)
    for i, name in enumerate(names):
        times = "" if name == "sse_chat" else f"   {medians[i] / base:.2g} ×"
        x = values[name]["high"] + 0.015 * end
        axes.text(x, i, f"{number(medians[i])}{times}", va="center", fontsize=9)
    axes.set_xlim(0, end * 1.2)
    _tidy(axes)
    figure.text(
        0.0, 1.06, title, fontsize=12, fontweight="bold", transform=axes.transAxes
    )
    axes.set_xlabel(unit, fontsize=9)


def _color(name: str) -> str:
    if name == "sse_chat":
        return OURS
    return FLOOR if name in FLOORS else PEER


def _tidy(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PEER)
    axes.grid(axis="x", color=FLOOR, linewidth=0.6)
    axes.set_axisbelow(True)
