"""What we set out to reach, row by row, and whether a run did."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from measure import Figure, table


@dataclass(frozen=True)
class Row:
    """One thing to reach: the figure has to be at least, or at most, the limit."""

    what: str
    figure: str
    relation: str
    limit: float
    unit: str = "×"

    def reached(self, value: float) -> bool:
        """Whether `value` is on the right side of the limit."""
        return value >= self.limit if self.relation == "≥" else value <= self.limit


ROWS = (
    Row("decode, chat: httpx-sse over us", "decode chat / httpx-sse", "≥", 1.8),
    Row("decode, chat: openai over us", "decode chat / openai", "≥", 3.4),
    Row("decode, every workload: httpx-sse", "decode all / httpx-sse", "≥", 1.4),
    Row("decode, geometric mean: httpx-sse", "decode mean / httpx-sse", "≥", 2),
    Row("decode, 16 B and 1 B: httpx-sse", "decode tiny / httpx-sse", "≥", 1.1),
    Row("typed, chat: openai over us", "typed chat / openai", "≥", 16),
    Row("typed, tool calls: openai over us", "typed tools / openai", "≥", 13),
    Row("typed: the recipe over us", "typed / recipe", "≥", 1.85),
    Row("typed, chat: us over split + json.loads", "typed chat / floor", "≤", 1.5),
    Row("typed, tool calls: us over the same", "typed tools / floor", "≤", 1.8),
    Row("end to end: openai over us", "end to end / openai", "≥", 7),
    Row("end to end: the recipe over us", "end to end / recipe", "≥", 1.4),
    Row("end to end: dicts only over us", "end to end / dicts", "≥", 1),
    Row("end to end: us over httpx alone", "end to end / httpx", "≤", 2.2),
    Row("paced: us over httpx alone", "paced / httpx", "≤", 1.25),
    Row("first chunk: us over openai", "first chunk / openai", "≤", 0.22),
    Row("first chunk: async", "first chunk / openai async", "≤", 0.25),
    Row("first chunk: us over dicts only", "first chunk / dicts", "≤", 1),
    Row("import sse_chat over pass", "import over pass", "≤", 40, "ms"),
    Row("--version over pass", "--version / pass", "≤", 5),
    Row("--help over pass", "--help / pass", "≤", 5),
    Row("second one-shot call: set-up", "one-shot set-up", "≤", 1, "ms"),
    Row("1,000 streams: whole", "concurrency whole", "≥", 1),
    Row("1,000 streams: open at once", "concurrency at once", "≥", 1),
    Row("1,000 streams: us over httpx", "concurrency / httpx", "≤", 1.2),
    Row("1,000 streams: us over openai", "concurrency / openai", "≤", 0.75),
    Row("memory: us over openai", "memory / openai", "≤", 0.56),
    Row("memory: over the size of one event", "memory of one event", "≤", 3),
    Row("memory: a longer stream takes more", "memory of a long stream", "≤", 1, "MB"),
    Row("growth of 16 × the size", "growth", "≤", 40),
)


def judge(figures: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """Each row that was measured, with its figure, and whether it was reached."""
    return [
        {**asdict(row), **asdict(figure), "reached": row.reached(figure.value)}
        for row in ROWS
        if (figure := figures.get(row.figure))
    ]


def reach_table(judged: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    rows = [
        [
            row["what"],
            f"{row['relation']} {row['limit']:g} {row['unit']}",
            Figure(row["value"], row["low"], row["high"]),
            "reached" if row["reached"] else "NOT REACHED",
        ]
        for row in judged
    ]
    return table("reach", ["", "reach", "measured", ""], rows)
