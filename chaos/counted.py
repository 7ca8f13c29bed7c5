"""Are the evaluations that a tracker reports those that fn saw, exceptions, repeats and journals included?"""

import random
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from _record import arguments, write

import zograd
from zograd.evaluators import Journal, Pool
from zograd.failures import Drop, Retry


class Down(Exception):
    """What fn raises now and then."""


class Fn:
    """Counts its calls, or the parameter sets of a batched one; may raise, draw, or train something inside."""

    def __init__(self):
        # A dict is no input of fn to a journal.
        self.log = {"calls": 0, "fail at": None, "once": False, "trains": False, "lock": threading.Lock()}

    def __call__(self, x, *, batched=False):
        """The value."""
        log = self.log
        with log["lock"]:
            log["calls"] += len(x) if batched else 1
            fails = log["fail at"] is not None and log["calls"] >= log["fail at"]
            if fails and log["once"]:
                log["fail at"] = None
        if fails:
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
    names = ["estimates", "evaluations", "retries", "failures", "ended by an exception", "with a journal", "by threads"]
    counts = dict.fromkeys([*names, "by MeZO"], 0)
    warnings.simplefilter("ignore", zograd.ZeroOrderWarning)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(3) as threads, zograd.Tracker() as tracker:
        inner = {"loop": "loop", "batched": "batched", "threads": Pool(threads, 2)}
        journals = {name: Journal(evaluator, Path(folder) / name) for name, evaluator in inner.items()}
        # The settings are a few, so that a journal finds some of them again.
        for k in range(given.count):
            evaluator = chance.choice(list(inner))
            with_journal = chance.random() < 0.2
            x = torch.full((chance.randint(1, 4),), float(chance.randint(0, 3)))
            fn.log["trains"] = chance.random() < 0.2
            fn.log["fail at"] = fn.log["calls"] + chance.randint(1, 30) if chance.random() < 0.3 else None
            fn.log["once"] = chance.random() < 0.5
            try:
                if chance.random() < 0.1:
                    counts["by MeZO"] += 1
                    mezo(fn, x, chance.randint(1, 4))
                else:
                    counts["with a journal"] += with_journal
                    counts["by threads"] += evaluator == "threads"
                    settings = {
                        "method": chance.choice(["naive", "forward", "antithetic", "fourth_order"]),
                        "num_samples": chance.randint(1, 8),
                        "seed": chance.randint(0, 3),
                        "evaluator": (journals if with_journal else inner)[evaluator],
                        "failures": chance.choice(["raise", Retry(2), Drop(0.1), Retry(1, then=Drop(0.1))]),
                    }
                    zograd.zero_order(**settings)(fn).estimate(x, batched=evaluator == "batched")
            except (Down, zograd.EvaluationError):
                counts["ended by an exception"] += 1
            wrong += tracker.evaluations - reported != fn.log["calls"]
            reported, fn.log["calls"], counts["estimates"] = tracker.evaluations, 0, k + 1
    counts |= {"evaluations": reported, "retries": tracker.retries, "failures": tracker.failures}
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
