"""Are the evaluations that a tracker reports those that fn saw, exceptions, repeats and journals included?"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from _record import arguments, write

import zograd
from zograd.evaluators import Journal


class Down(Exception):
    """What fn raises now and then."""


class Fn:
    """Counts its calls, or the parameter sets of a batched one; may raise, draw, or train something inside."""

    def __init__(self):
        self.log = {"calls": 0, "fail at": None, "trains": False}  # a dict is no input of fn to a journal

    def __call__(self, x, *, batched=False):
        """The value."""
        log = self.log
        log["calls"] += len(x) if batched else 1
        if log["fail at"] is not None and log["calls"] >= log["fail at"]:
            raise Down
        if log["trains"] and not batched:
            (gradient,) = torch.autograd.grad((x**2).sum(), x)
            return gradient.sum() + x.abs().sum()
        return (x**3).sum(dim=-1)


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 10_000, "estimates")
    chance, started = random.Random(given.seed), time.perf_counter()
    fn, reported, wrong = Fn(), 0, 0
    counts = dict.fromkeys(["estimates", "evaluations", "ended by an exception", "with a journal", "by MeZO"], 0)
    with tempfile.TemporaryDirectory() as folder, zograd.Tracker() as tracker:
        journals = {name: Journal(name, Path(folder) / name) for name in ("loop", "batched")}
        # The settings are a few, so that a journal finds some of them again.
        for k in range(given.count):
            evaluator = chance.choice(["loop", "batched"])
            with_journal = chance.random() < 0.2
            x = torch.full((chance.randint(1, 4),), float(chance.randint(0, 3)))
            fn.log["trains"] = chance.random() < 0.2
            fn.log["fail at"] = fn.log["calls"] + chance.randint(1, 30) if chance.random() < 0.3 else None
            try:
                if chance.random() < 0.1:
                    counts["by MeZO"] += 1
                    mezo(fn, x, chance.randint(1, 4))
                else:
                    counts["with a journal"] += with_journal
                    settings = {
                        "method": chance.choice(["naive", "forward", "antithetic", "fourth_order"]),
                        "num_samples": chance.randint(1, 8),
                        "seed": chance.randint(0, 3),
                        "evaluator": journals[evaluator] if with_journal else evaluator,
                    }
                    zograd.zero_order(**settings)(fn).estimate(x, batched=evaluator == "batched")
            except (Down, zograd.EvaluationError):
                counts["ended by an exception"] += 1
            wrong += tracker.evaluations - reported != fn.log["calls"]
            reported, fn.log["calls"], counts["estimates"] = tracker.evaluations, 0, k + 1
    counts["evaluations"] = reported
    wrong += counts["estimates"] - counts["ended by an exception"] != tracker.estimates
    return write(given, "evaluations reported = calls counted by fn", counts, wrong, started)


def mezo(fn, x, num_samples):
    """One step."""
    trains, fn.log["trains"] = fn.log["trains"], False  # its closure runs without grad mode
    x = torch.nn.Parameter(x)
    try:
        zograd.optim.MeZO([x], lr=0.1, num_samples=num_samples, seed=0).step(lambda: fn(x))
    finally:
        fn.log["trains"] = trains


if __name__ == "__main__":
    sys.exit(main())
