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
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
# The sse_chat.py of this checkout is measured, whatever else is installed.
sys.path.insert(0, str(BENCH.parent))

from measure import Figure, Part, freeze_imports, machine, versions  # noqa: E402
from reach import Row, judge, reach_table  # noqa: E402

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


def results(
    parts: dict[str, Part], judged: list[tuple[Row, Figure, bool]]
) -> dict[str, Any]:
    """Everything that goes into results.json."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "reach": [
            {**asdict(row), **asdict(figure), "reached": reached}
            for row, figure, reached in judged
        ],
        "parts": {name: part.data for name, part in parts.items()},
    }


def write(found: dict[str, Any], folder: Path) -> None:
    """Writes the results and their charts."""
    from charts import draw

    text = json.dumps(rounded(found), indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    draw(found["parts"], folder)


def rounded(value: Any) -> Any:
    """The same with every number rounded to four digits; the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures sse_chat beside its peers.")
    parser.add_argument("--quick", action="store_true", help="a smoke test, no verdict")
    parser.add_argument("--only", metavar="PARTS", help=", ".join(PARTS))
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes: --only split"
    )
    options = parser.parse_args()
    options.only = "split" if options.profile else options.only
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(chosen) - PARTS.keys():
        parser.error(
            f"no part named {', '.join(unknown)}; there are {', '.join(PARTS)}"
        )
    options.parts = chosen
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
        write(results(parts, judged), BENCH)
    missed = [row.what for row, _, reached in judged if not reached]
    if judged:
        print(reach_table(judged))
        print(f"\n{len(judged) - len(missed)} of {len(judged)} reached")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
