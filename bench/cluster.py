"""Past one machine: Dask maps `generate` over a thousand prompts.

This process asks the demo server, then a cluster of two worker processes does; the
answers must be the same. For a real cluster only the address in `Client(…)` changes.
"""

import logging
import time
from functools import partial

from dask.distributed import Client, LocalCluster
from measure import Part, table

import sse_chat

PROMPTS = 1_000
WORKERS = 2


def texts(completions: list[sse_chat.ChatCompletion]) -> list[str]:
    """What was answered; ids and times differ from call to call."""
    return [completion.text for completion in completions]


def cluster(quick: bool) -> Part:
    """The answers of two worker processes, and of one process."""
    prompts = [f"What is {i} + {i}?" for i in range(20 if quick else PROMPTS)]
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
        together = client.gather(client.map(ask, prompts))
        seconds = {"one process": middle - start}
        seconds[f"{WORKERS} workers"] = time.perf_counter() - middle
    if texts(together) != texts(alone):
        raise RuntimeError("the cluster's answers are not those of one process")
    title = f"cluster: {len(prompts):,} prompts, the same answers"
    return Part(
        [table(title, ["", "seconds"], seconds.items())],
        {"prompts": len(prompts), "seconds": seconds},
    )
