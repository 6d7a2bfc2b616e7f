"""Part 7: past one machine. Dask maps `generate` over a thousand prompts.

    python bench/cluster.py [PROMPTS]

starts a cluster of two worker processes on this machine and the demo server, asks
once from this process and once from the workers, and compares the answers. For a
real cluster only the address in `Client(…)` changes.
"""

import logging
import sys
import time
from collections.abc import Callable
from functools import partial

from dask.distributed import Client, LocalCluster
from measure import Part, table
from processes import ROOT

sys.path.insert(0, str(ROOT))  # which the worker processes take over

import sse_chat

PROMPTS = 1_000
WORKERS = 2


class Different(Exception):
    """The cluster's answers are not those of one process."""


def answers(completions: list[sse_chat.ChatCompletion]) -> list[str | None]:
    """What was answered; ids and times differ from call to call."""
    return [completion.choices[0].message.content for completion in completions]


def map_prompts(
    client: Client, ask: Callable[[str], sse_chat.ChatCompletion], prompts: list[str]
) -> list[sse_chat.ChatCompletion]:
    """Asks all prompts on the cluster; the answers in the prompts' order."""
    completions: list[sse_chat.ChatCompletion] = client.gather(client.map(ask, prompts))  # type: ignore[no-untyped-call]
    return completions


def cluster(quick: bool, count: int = PROMPTS) -> Part:
    """The answers of two worker processes, and of one process."""
    part = Part()
    prompts = [f"What is {i} + {i}?" for i in range(20 if quick else count)]
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with (
        sse_chat.demo_server() as base_url,
        LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=WORKERS, threads_per_worker=1, dashboard_address=None
        ) as workers,
        Client(workers) as client,  # type: ignore[no-untyped-call]
    ):
        ask = partial(sse_chat.generate, model="demo", base_url=base_url)
        start = time.perf_counter()
        alone = [ask(prompt) for prompt in prompts]
        middle = time.perf_counter()
        together = map_prompts(client, ask, prompts)
        seconds = {"one process": middle - start}
        seconds[f"{WORKERS} workers"] = time.perf_counter() - middle
    if answers(together) != answers(alone):
        raise Different
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    title = f"cluster: {len(prompts):,} prompts, the same answers"
    part.tables.append(table(title, ["", "seconds"], rows))
    part.data = {"prompts": len(prompts), "seconds": seconds}
    return part


if __name__ == "__main__":
    print(*cluster(False, *map(int, sys.argv[1:2])).tables, sep="\n")
