"""What the scripts of this folder share: how they are called, and the file that each writes."""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

import zograd

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(description, count, unit):
    """The command line of a script that tries many cases.

    Args:
        description: what it asks.
        count: cases by default.
        unit: what a case is.

    Returns:
        The parsed arguments: ``count``, ``seed`` and ``output``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help=f"{unit} (default {count})")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{Path(sys.argv[0]).stem}.json")
    torch.set_num_threads(1)
    return parser.parse_args()


def write(given, question, rows, wrong, started):
    """Write the results and print them.

    Args:
        given: the parsed arguments.
        question: what the script asked.
        rows: what was counted, by name.
        wrong: how many cases went wrong.
        started: ``time.perf_counter()`` at the beginning.

    Returns:
        The exit status: 0 if nothing went wrong.
    """
    report = {
        "question": question,
        "command": f"python chaos/{Path(sys.argv[0]).name} --count {given.count} --seed {given.seed}",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "zograd": zograd.__version__,
        },
        "seconds": round(time.perf_counter() - started, 1),
        "counts": rows,
        "wrong": wrong,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(question)
    for name, number in {**rows, "WRONG": wrong}.items():
        print(f"  {name:<44} {number}")
    return int(wrong > 0)
