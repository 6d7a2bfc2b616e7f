"""Measures sse_chat beside what people would take instead.

    python bench/run.py                 everything: tables, results.json, charts
    python bench/run.py --only decode   some parts, separated by commas
    python bench/run.py --quick         does it all work? no verdict, writes nothing

The last table says which of the aims in reach.py were reached; the exit code is 1 if
one was not.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
# The sse_chat.py of this checkout is measured, whatever else is installed.
sys.path.insert(0, str(BENCH.parent))

from charts import draw  # noqa: E402
from measure import Part, freeze_imports, machine, versions  # noqa: E402
from reach import judge, reach_table  # noqa: E402

PARTS = {
    "decode": "decode.decode",
    "typed": "decode.typed",
    "scaling": "scaling.scaling",
    "end_to_end": "network.end_to_end",
    "paced": "network.paced",
    "concurrency": "network.concurrency",
    "cold_start": "startup.cold_start",
    "one_shot": "startup.one_shot",
    "memory": "memory.memory",
    "split": "network.split",
    "cluster": "cluster.cluster",
}


def measure_part(name: str, quick: bool) -> Part:
    """Runs one part and prints its tables."""
    module, function = PARTS[name].split(".")
    run: Callable[[bool], Part] = getattr(import_module(module), function)
    freeze_imports()
    start = time.perf_counter()
    part = run(quick)
    seconds = time.perf_counter() - start
    part.data["seconds it took"] = seconds
    print(*part.tables, f"\n({name}: {seconds:.0f} s)", sep="\n", flush=True)
    return part


def results(parts: dict[str, Part], judged: list[dict[str, Any]]) -> Any:
    """Everything that goes into results.json, in four digits: the rest is noise."""
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "reach": judged,
        "parts": {name: part.data for name, part in parts.items()},
    }
    return json.loads(
        json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}")
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures sse_chat beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test, no verdict")
    parser.add_argument("--only", metavar="PARTS", help=", ".join(PARTS))
    options = parser.parse_args()
    options.parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def main() -> int:
    """Runs the parts; 1 if an aim was not reached."""
    options = arguments()
    print(*(f"{name}: {value}" for name, value in machine().items()), sep="\n")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    parts = {name: measure_part(name, options.quick) for name in options.parts}
    if options.quick:
        print("\nEvery part works.")
        return 0
    figures = {
        name: figure for part in parts.values() for name, figure in part.figures.items()
    }
    judged = judge(figures)
    if not options.only:
        found = results(parts, judged)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (BENCH / "results.json").write_text(text + "\n", encoding="utf-8")
        draw(found["parts"], BENCH)
    reached = sum(row["reached"] for row in judged)
    if judged:
        print(reach_table(judged))
        print(f"\n{reached} of {len(judged)} reached")
    return 0 if reached == len(judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())
