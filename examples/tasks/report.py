"""The command line and the table of an example: what a source reports beside what comes out here.

An example reads its arguments with ``arguments``, adds a row for each figure and calls ``finish``, which prints the
table and, after a full run, keeps it in ``examples/results``, from where ``examples/reproductions.py`` makes the page
``docs/reproductions.md``.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"


def parser(doc, name, seeds=(0, 1, 2)):
    """The options that every example has; an example may add its own before it reads them."""
    new = argparse.ArgumentParser(description=doc.splitlines()[0])
    new.add_argument("--quick", action="store_true", help="a smoke of seconds: too short for its result to be asserted")
    new.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="of everything that is drawn")
    new.add_argument("--json", type=Path, metavar="PATH", help="write the rows of the table there as well")
    new.add_argument("--output", type=Path, default=Path(f"{name}.png"), help="where to save the picture")
    new.set_defaults(shown=list(seeds))
    return new


def arguments(doc, name, seeds=(0, 1, 2)):
    """Read them; one torch thread, since tensors this small gain little from a second."""
    torch.set_num_threads(1)
    return parser(doc, name, seeds).parse_args()


class Report:
    """The rows of an example.

    Args:
        name: of the example, without its suffix.
        args: its arguments, from ``arguments`` or ``parser``.
    """

    def __init__(self, name, args):
        self.name, self.args, self.rows = name, args, []
        self._since = time.perf_counter()

    def row(self, what, reference, values, evaluations=None, *, seconds=None, seeds=None):
        """Add a figure.

        Args:
            what: in words, with its unit.
            reference: what the source reports, as a string or a number; "" if nothing is known.
            values: one number a seed, or a number that has no seed.
            evaluations: of the objective, for one seed; None where that has no meaning.
            seconds: for all seeds; the time since the row before by default.
            seeds: that the values belong to; those of the arguments by default.
        """
        now = time.perf_counter()
        numbers = [float(v) for v in values] if isinstance(values, (list, tuple)) else [float(values)]
        if seeds is None:
            seeds = self.args.seeds[: len(numbers)] if isinstance(values, (list, tuple)) else []
        self.rows.append(
            {
                "what": what,
                "reference": reference if isinstance(reference, str) else figure(reference),
                "mean": statistics.fmean(numbers),
                "spread": statistics.stdev(numbers) if len(numbers) > 1 else None,
                "seeds": list(seeds),
                "evaluations": None if evaluations is None else round(evaluations),
                "seconds": round(now - self._since if seconds is None else seconds, 2),
            }
        )
        self._since = now

    def finish(self):
        """Print the table; write it to ``--json`` and, after a full run on the seeds to be shown, to the results."""
        print(f"\n{table(self.rows)}")
        record = {"name": self.name, "torch": torch.__version__, "machine": machine(), "rows": self.rows}
        places = [self.args.json] if self.args.json else []
        if not self.args.quick and self.args.seeds == self.args.shown:
            RESULTS.mkdir(exist_ok=True)
            places.append(RESULTS / f"{self.name}.json")
        for place in places:
            place.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine():
    """The kind of processor, without the machine's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def figure(value):
    """A number with four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def deviation(value):
    """A number with two significant digits, without an exponent where it is large."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.2g}"


def here(row):
    """Mean and standard deviation over the seeds."""
    return figure(row["mean"]) + ("" if row["spread"] is None else f" ± {deviation(row['spread'])}")


def table(rows):
    """Columns of text: what, paper or reference, here, evaluations, seconds."""
    cells = [("", "paper or reference", "here", "evaluations", "seconds")]
    for row in rows:
        evaluations = "" if row["evaluations"] is None else f"{row['evaluations']:,}"
        cells.append((row["what"], row["reference"], here(row), evaluations, f"{row['seconds']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        " | ".join(f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )
