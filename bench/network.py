"""Parts 3 and 4: end to end over loopback, one stream and a thousand at once.

The server and every client have a process of their own. What is measured is the
processor time of the client's process, per event that the server sent.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from clients import ASYNC, LAYERS, SYNC
from measure import (
    Figure,
    Part,
    difference,
    interleave,
    largest,
    medians,
    ratio,
    smallest,
    spread,
    table,
)
from processes import Client, clients, peak_streams, server
from workloads import ASCII_WORDS

OURS = ("sse_chat", "sse_chat async")
UNLIMITED = [name for name in ASYNC if "default" not in name]
ALL = (*SYNC, *UNLIMITED)
STREAMS = 1_000
TOKENS_A_SECOND = 50
SLOW_TOKENS_A_SECOND = 10


class Broken(Exception):
    """A client did not give what the server sent."""


def check(contenders: dict[str, Client], events: int) -> None:
    """Compares each contender's text with that of the server's answer."""
    # The last two events are the finish and [DONE].
    sent = "".join(ASCII_WORDS[i % len(ASCII_WORDS)] for i in range(events - 2))
    for client in contenders.values():
        client.ask("check")
    for name, client in contenders.items():
        if client.answer()["text"] != sent:
            raise Broken(f"{name} lost or changed text")


def other(name: str, ours: str) -> str:
    """The sync or async variant of `name`, whichever `ours` is."""
    return name + ours.removeprefix("sse_chat")


def both(samples: dict[str, list[float]], name: str, over: bool) -> list[Figure]:
    """The ratios, sync and async, of `name` to us (`over`) or of us to `name`."""
    pairs = [(samples[other(name, ours)], samples[ours]) for ours in OURS]
    return [ratio(a, b) if over else ratio(b, a) for a, b in pairs]


def end_to_end(quick: bool) -> Part:
    """One stream at a time, as fast as the client reads."""
    part = Part()
    events = 50 if quick else 3_000
    first: dict[str, list[float]] = {name: [] for name in ALL}

    def run(name: str) -> float:
        done = contenders[name].run()
        first[name].append(done["first"] * 1e3)
        cpu: float = done["cpu"]
        return cpu / events * 1e6

    with server() as address, clients(ALL, f"{address}/{events}/0/v1") as contenders:
        check(contenders, events)
        samples = interleave(
            {name: partial(run, name) for name in ALL}, 1 if quick else 15
        )
    part.tables.append(
        _table(f"end to end: {events:,} events a stream, flat out", samples, first)
    )
    part.data = {
        "microseconds of client CPU per event": medians(samples),
        "milliseconds to the first chunk on an open connection": medians(first),
    }
    part.figures = {
        "end to end / openai": smallest(both(samples, "openai", over=True)),
        "end to end / recipe": smallest(both(samples, "recipe", over=True)),
        "end to end / dicts": smallest(both(samples, "dicts", over=True)),
        "end to end / httpx": largest(both(samples, "httpx", over=False)),
    }
    return part


def _table(
    title: str, samples: dict[str, list[float]], first: dict[str, list[float]]
) -> str:
    rows = []
    for name, values in samples.items():
        ours = OURS["async" in name]
        rows.append(
            [
                name,
                str(spread(values)),
                f"{ratio(values, samples[ours]).value:.2f} ×",
                f"{spread(first[name]).value:.2f}",
            ]
        )
    return table(title, ["", "CPU µs/event", "over ours", "first chunk ms"], rows)


def paced(quick: bool) -> Part:
    """One stream of each contender at the pace of a model, all at the same time.

    Each is idle almost always, so they do not disturb each other, and what disturbs
    them disturbs them all.
    """
    part = Part()
    events = 10 if quick else 5 * TOKENS_A_SECOND
    names = (*OURS, "httpx", "httpx async") if quick else ALL
    samples: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[float]] = {name: [] for name in names}
    rounds = 1 if quick else 5
    with server() as address:
        base_url = f"{address}/{events}/{TOKENS_A_SECOND}/v1"
        with clients(names, base_url) as contenders:
            check(contenders, events)
            for _ in range(rounds):
                for client in contenders.values():
                    client.ask("run")
                for name, client in contenders.items():
                    done = client.answer()
                    samples[name].append(done["cpu"] / events * 1e6)
                    first[name].append(done["first"] * 1e3)
    title = f"end to end: {events:,} events a stream, {TOKENS_A_SECOND} a second"
    part.tables.append(_table(title, samples, first))
    part.data = {"microseconds of client CPU per event": medians(samples)}
    part.figures = {"paced / httpx": largest(both(samples, "httpx", over=False))}
    return part


def concurrency(quick: bool) -> Part:
    """Very many streams at once on one event loop."""
    part = Part()
    streams, seconds = (20, 1) if quick else (STREAMS, 3)
    events = seconds * SLOW_TOKENS_A_SECOND
    names = ("sse_chat async", "openai async", "httpx async")
    default = "httpx async, default limits"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, default)}

    def run(name: str) -> float:
        done = contenders[name].run()
        runs[name].append({**done, "open at once": peak_streams(address)})
        cpu: float = done["cpu"]
        return cpu / (streams * events) * 1e6

    with server() as address:
        base_url = f"{address}/{events}/{SLOW_TOKENS_A_SECOND}/v1"
        with clients([*names, default], base_url, streams) as contenders:
            check(contenders, events)
            samples = interleave(
                {name: partial(run, name) for name in names},
                1 if quick else 3,
                warm_up=0,
            )
            run(default)
    part.tables.append(_concurrency_table(streams, events, samples, runs))
    part.data = {
        "streams": streams,
        "events per stream": events,
        "microseconds of client CPU per event": medians(samples),
        "failed": {
            name: max(r["failed"] for r in found) for name, found in runs.items()
        },
    }
    ours = runs["sse_chat async"]
    whole = min(run["items"] for run in ours) / (streams * (events - 1))
    at_once = min(run["open at once"] for run in ours) / streams
    part.figures = {
        "concurrency whole": Figure(whole, whole, whole),
        "concurrency at once": Figure(at_once, at_once, at_once),
        "concurrency / httpx": ratio(samples[names[0]], samples["httpx async"]),
        "concurrency / openai": ratio(samples[names[0]], samples["openai async"]),
    }
    return part


def _concurrency_table(
    streams: int,
    events: int,
    samples: dict[str, list[float]],
    runs: dict[str, list[dict[str, Any]]],
) -> str:
    rows = []
    for name, found in runs.items():
        values = samples.get(name)
        whole = not any(run["failed"] for run in found)
        rows.append(
            [
                name,
                str(spread(values)) if values else "",
                str(max(run["failed"] for run in found)),
                str(min(run["open at once"] for run in found)),
                f"{max(run['first'] for run in found):.2f}" if whole else "",
                f"{max(run['peak'] for run in found) / 1e6:.0f}",
            ]
        )
    head = ["", "CPU µs/event", "failed", "open at once", "all begun s", "peak MB"]
    rate = f"{events} events each, {SLOW_TOKENS_A_SECOND} a second"
    return table(f"concurrency: {streams:,} streams at once, {rate}", head, rows)


def split(quick: bool) -> Part:
    """Where the time of one event goes: the layers, one more at each step.

    No profiler is on; a layer's share is what the stack with it takes more than the
    stack without it.
    """
    part = Part()
    events = 50 if quick else 5_000
    names: Sequence[str] = tuple(LAYERS)

    def run(name: str) -> float:
        cpu: float = contenders[name].run()["cpu"]
        return cpu / events * 1e6

    with server() as address, clients(names, f"{address}/{events}/0/v1") as contenders:
        samples = interleave(
            {name: partial(run, name) for name in names}, 1 if quick else 15
        )
    whole = spread(samples[names[-1]]).value
    rows = [[names[0], f"{spread(samples[names[0]]).value:.2f}", ""]]
    shares = [spread(samples[names[0]])]
    for below, name in itertools.pairwise(names):
        shares.append(difference(samples[name], samples[below]))
        rows.append([name, f"{spread(samples[name]).value:.2f}", str(shares[-1])])
    for row, share in zip(rows, shares, strict=True):
        row.append(f"{share.value / whole:.0%}")
    head = ["up to", "CPU µs/event", "of it this layer", "share"]
    part.tables.append(table("where the time goes, flat out", head, rows))
    part.data = {"microseconds of client CPU per event": medians(samples)}
    return part
