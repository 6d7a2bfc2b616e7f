"""Parts 3 and 4: end to end over loopback, one stream and a thousand at once.

The server and every client have a process of their own. What is measured is the
processor time of the client's process, per event that the server sent.
"""

import itertools
from typing import Any

from measure import Figure, Part, Samples, interleave, table
from processes import Client, clients, peak_streams, server
from workloads import ASCII_WORDS

OURS = ("sse_chat", "sse_chat async")
BOTH = ("sse_chat", "openai", "recipe", "dicts", "httpx")
ALL = (*BOTH, "http.client", *(f"{name} async" for name in BOTH))
LAYERS = ("socket", "h11", "httpcore", "httpx", "SSE", "JSON", "sse_chat")
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


def over_ours(samples: Samples, name: str) -> list[Figure]:
    """The ratios, sync and async, of a contender to us."""
    return [samples.ratio(ours.replace("sse_chat", name), ours) for ours in OURS]


def ours_over(samples: Samples, name: str) -> list[Figure]:
    """The ratios, sync and async, of us to a contender."""
    return [samples.ratio(ours, ours.replace("sse_chat", name)) for ours in OURS]


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
    return Part(
        [_table(f"end to end: {events:,} events a stream, flat out", samples, first)],
        {
            "microseconds of client CPU per event": samples.summary(),
            "milliseconds to the first chunk on an open connection": first.summary(),
        },
        {
            "end to end / openai": min(over_ours(samples, "openai")),
            "end to end / recipe": min(over_ours(samples, "recipe")),
            "end to end / dicts": min(over_ours(samples, "dicts")),
            "end to end / httpx": max(ours_over(samples, "httpx")),
        },
    )


def per_event(done: dict[str, Any], events: int) -> float:
    """The microseconds of processor time that an event took."""
    cpu: float = done["cpu"]
    return cpu / events * 1e6


def _table(title: str, samples: Samples, first: Samples) -> str:
    rows = []
    for name in samples:
        over = samples.ratio(name, OURS["async" in name]).value
        begun = first.figure(name).value
        rows.append([name, str(samples.figure(name)), f"{over:.2f} ×", f"{begun:.2f}"])
    return table(title, ["", "CPU µs/event", "over ours", "first chunk ms"], rows)


def paced(quick: bool) -> Part:
    """One stream of each contender at the pace of a model, all at the same time.

    Each is idle almost always, so they do not disturb each other, and what disturbs
    them disturbs them all.
    """
    events = 10 if quick else 5 * TOKENS_A_SECOND
    names = (*OURS, "httpx", "httpx async") if quick else ALL
    samples = Samples({name: [] for name in names})
    first = Samples({name: [] for name in names})
    with server() as address:
        base_url = f"{address}/{events}/{TOKENS_A_SECOND}/v1"
        with clients(names, base_url) as contenders:
            check(contenders, events)
            for _ in range(1 if quick else 5):
                for client in contenders.values():
                    client.ask("run")
                for name, client in contenders.items():
                    done = client.answer()
                    samples[name].append(per_event(done, events))
                    first[name].append(done["first"] * 1e3)
    title = f"end to end: {events:,} events a stream, {TOKENS_A_SECOND} a second"
    return Part(
        [_table(title, samples, first)],
        {"microseconds of client CPU per event": samples.summary()},
        {"paced / httpx": max(ours_over(samples, "httpx"))},
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
        runs[name].append({**done, "open at once": peak_streams(address)})
        return per_event(done, streams * events)

    with server() as address:
        base_url = f"{address}/{events}/{SLOW_TOKENS_A_SECOND}/v1"
        with clients([*names, default], base_url, streams) as contenders:
            check(contenders, events)
            samples = interleave(run, names, 1 if quick else 3, warm_up=0)
            run(default)
    failed = {name: max(r["failed"] for r in found) for name, found in runs.items()}
    whole = min(run["items"] for run in runs[ours]) / (streams * (events - 1))
    at_once = min(run["open at once"] for run in runs[ours]) / streams
    return Part(
        [_concurrency_table(streams, events, samples, runs)],
        {
            "streams": streams,
            "events per stream": events,
            "microseconds of client CPU per event": samples.summary(),
            "failed": failed,
        },
        {
            "concurrency whole": Figure.of([whole]),
            "concurrency at once": Figure.of([at_once]),
            "concurrency / httpx": samples.ratio(ours, httpx),
            "concurrency / openai": samples.ratio(ours, openai),
        },
    )


def _concurrency_table(
    streams: int, events: int, samples: Samples, runs: dict[str, list[dict[str, Any]]]
) -> str:
    rows = []
    for name, found in runs.items():
        whole = not any(run["failed"] for run in found)
        rows.append(
            [
                name,
                str(samples.figure(name)) if name in samples else "",
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
    events = 50 if quick else 5_000

    def run(name: str) -> float:
        return per_event(contenders[name].run(), events)

    with server() as address, clients(LAYERS, f"{address}/{events}/0/v1") as contenders:
        samples = interleave(run, LAYERS, 1 if quick else 15)
    whole = samples.figure(LAYERS[-1]).value
    shares = {LAYERS[0]: samples.figure(LAYERS[0])}
    for below, name in itertools.pairwise(LAYERS):
        shares[name] = samples.difference(name, below)
    rows = [
        [
            name,
            f"{samples.figure(name).value:.2f}",
            str(share),
            f"{share.value / whole:.0%}",
        ]
        for name, share in shares.items()
    ]
    head = ["up to", "CPU µs/event", "of it this layer", "share"]
    return Part(
        [table("where the time goes, flat out", head, rows)],
        {"microseconds of client CPU per event": samples.summary()},
    )
