"""End to end over loopback, one stream and a thousand at once.

The server and every client have a process of their own. What is measured is the
processor time of the client's process, per event that the server sent.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from measure import Columns, Figure, Part, Samples, interleave
from processes import Client, clients, server
from workloads import ASCII_WORDS

OURS = ("sse_chat", "sse_chat async")
BOTH = ("sse_chat", "openai", "recipe", "dicts", "httpx")
ALL = (*BOTH, "http.client", *(f"{name} async" for name in BOTH))
LAYERS = ("socket", "h11", "httpcore", "httpx", "SSE", "JSON", "sse_chat")
STREAMS = 1_000
TOKENS_A_SECOND = 50
SLOW_TOKENS_A_SECOND = 10


def check(contenders: dict[str, Client], events: int) -> None:
    """Compares each contender's text with that of the server's answer."""
    # The last two events are the finish and [DONE].
    sent = "".join(ASCII_WORDS[i % len(ASCII_WORDS)] for i in range(events - 2))
    for client in contenders.values():
        client.ask("check")
    for name, client in contenders.items():
        if client.answer()["text"] != sent:
            raise RuntimeError(f"{name} lost or changed text")


def end_to_end(quick: bool) -> Part:
    """One stream at a time, as fast as the client reads."""
    events = 50 if quick else 3_000
    first = Samples({name: [] for name in ALL})

    def run(name: str) -> float:
        done = contenders[name].run()
        first[name].append(done["first"] * 1e3)
        return per_event(done, events)

    with server() as address, clients(ALL, f"{address}/{events}/0/v1") as contenders:
        check(contenders, events)
        samples = interleave(run, ALL, 1 if quick else 15)
    begun = {name: f"{first.figure(name).value:.2f}" for name in ALL}
    title = f"end to end: {events:,} events a stream, flat out"
    return Part(
        [_table(title, samples, {"first chunk ms": begun})],
        {
            "microseconds of client CPU per event": samples.summary(),
            "milliseconds to the first chunk on an open connection": first.summary(),
        },
        {
            "end to end / openai": min(samples.both("openai", "sse_chat")),
            "end to end / recipe": min(samples.both("recipe", "sse_chat")),
            "end to end / dicts": min(samples.both("dicts", "sse_chat")),
            "end to end / httpx": max(samples.both("sse_chat", "httpx")),
        },
    )


def per_event(done: dict[str, Any], events: int) -> float:
    """The microseconds of processor time that an event took."""
    cpu: float = done["cpu"]
    return cpu / events * 1e6


def _table(title: str, samples: Samples, columns: Columns) -> str:
    over = {
        name: f"{samples.ratio(name, OURS['async' in name]).value:.2f} ×"
        for name in samples
    }
    return samples.table(title, "CPU µs/event", {"over ours": over, **columns})


def paced(quick: bool) -> Part:
    """One stream of each contender at the pace of a model, all at the same time.

    Each is idle almost always, so they do not disturb each other, and what disturbs
    them disturbs them all.
    """
    events = 10 if quick else 5 * TOKENS_A_SECOND
    names = (*OURS, "httpx", "httpx async") if quick else ALL
    samples = Samples({name: [] for name in names})
    with server() as address:
        base_url = f"{address}/{events}/{TOKENS_A_SECOND}/v1"
        with clients(names, base_url) as contenders:
            check(contenders, events)
            for _ in range(1 if quick else 5):
                for client in contenders.values():
                    client.ask("run")
                for name, client in contenders.items():
                    samples[name].append(per_event(client.answer(), events))
    title = f"end to end: {events:,} events a stream, {TOKENS_A_SECOND} a second"
    return Part(
        [_table(title, samples, {})],
        {"microseconds of client CPU per event": samples.summary()},
        {"paced / httpx": max(samples.both("sse_chat", "httpx"))},
    )


def concurrency(quick: bool) -> Part:
    """Very many streams at once on one event loop."""
    streams, seconds = (20, 1) if quick else (STREAMS, 3)
    events = seconds * SLOW_TOKENS_A_SECOND
    ours, openai, httpx = names = ("sse_chat async", "openai async", "httpx async")
    default = "httpx async, default limits"
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*names, default)}

    def run(name: str) -> float:
        done = contenders[name].run()
        runs[name].append(done)
        return per_event(done, streams * events)

    def worst(pick: Callable[[Iterable[float]], float], key: str) -> dict[str, float]:
        return {name: pick(done[key] for done in found) for name, found in runs.items()}

    with server() as address:
        base_url = f"{address}/{events}/{SLOW_TOKENS_A_SECOND}/v1"
        with clients([*names, default], base_url, streams) as contenders:
            check(contenders, events)
            samples = interleave(run, names, 1 if quick else 3, warm_up=0)
            run(default)
    failed, at_once = worst(max, "failed"), worst(min, "open at once")
    columns = {
        "failed": failed,
        "open at once": at_once,
        "all begun s": worst(max, "first"),
        "peak MB": {name: peak // 10**6 for name, peak in worst(max, "peak").items()},
    }
    whole = worst(min, "items")[ours] / (streams * (events - 1))
    rate = f"{events} events each, {SLOW_TOKENS_A_SECOND} a second"
    title = f"concurrency: {streams:,} streams at once, {rate}"
    return Part(
        [
            samples.table(title, "CPU µs/event", columns),
            f"\n{default}: {failed[default]} of {streams:,} streams failed",
        ],
        {
            "streams": streams,
            "events per stream": events,
            "microseconds of client CPU per event": samples.summary(),
            "failed": failed,
        },
        {
            "concurrency whole": Figure.of([whole]),
            "concurrency at once": Figure.of([at_once[ours] / streams]),
            "concurrency / httpx": samples.ratio(ours, httpx),
            "concurrency / openai": samples.ratio(ours, openai),
        },
    )


def split(quick: bool) -> Part:
    """Where the time of one event goes: the layers, one more at each step.

    No profiler is on; a layer's share is what the stack with it takes more than the
    stack without it.
    """
    events = 50 if quick else 5_000

    def run(name: str) -> float:
        return per_event(contenders[name].run(), events)

    with server() as address, clients(LAYERS, f"{address}/{events}/0/v1") as contenders:
        samples = interleave(run, LAYERS, 1 if quick else 15)
    layers = {LAYERS[0]: samples.figure(LAYERS[0])}
    for below, name in itertools.pairwise(LAYERS):
        layers[name] = samples.difference(name, below)
    whole = samples.figure(LAYERS[-1]).value
    shares = {name: f"{layer.value / whole:.0%}" for name, layer in layers.items()}
    columns: Columns = {"of it this layer": layers, "share": shares}
    return Part(
        [samples.table("where the time goes, flat out", "CPU µs/event", columns)],
        {"microseconds of client CPU per event": samples.summary()},
    )
