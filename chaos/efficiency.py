"""How much of two workers' time goes into fn?

fn sleeps, as one does that waits for a program elsewhere, and measures how long that took. Efficiency is the sum of
what it measured over the time of two workers: twice that of the estimate. Of several estimates the best counts, since
other load on the machine can only take away. At 1 ms without a batch size the figure is reported and has no aim.
"""

import sys
import time

import torch
from _record import arguments, write
from _simulators import processes, sleeps

import zograd
from zograd.evaluators import Pool

CASES = {(0.1, 1): 0.9, (0.01, 1): 0.9, (0.001, 20): 0.8, (0.001, 1): 0.0}  # seconds and points in a task: the aim
SECONDS = 2.0  # of sleep in an estimate
TRIES = 5


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, TRIES, "estimates of each kind")
    started, wrong, counts = time.perf_counter(), 0, {"estimates": len(CASES) * given.count}
    with Pool(processes(2)) as pool:
        for (seconds, batch), aim in CASES.items():
            pool.batch_size = batch
            num = round(SECONDS / seconds)
            fn = zograd.zero_order(num_samples=num, seed=0, evaluator=pool)(sleeps)
            fn.replace(num_samples=8).estimate(torch.ones(3), seconds)
            best = max(share(fn, seconds) for _ in range(given.count))
            asked = f" (at least {aim})" if aim else ""
            counts[f"at {seconds * 1000:g} ms, {batch} point{'s' * (batch > 1)} a task{asked}"] = round(best, 2)
            wrong += best < aim
    return write(given, "efficiency of two workers", counts, wrong, started)


def share(fn, seconds):
    """The part of two workers' time that goes into fn.

    Returns:
        A number below 1.
    """
    began = time.perf_counter()
    found = fn.estimate(torch.ones(3), seconds)
    # Naive coefficients are the values themselves.
    return float(found.value + found.coefficients.sum()) / (2 * (time.perf_counter() - began))


if __name__ == "__main__":
    sys.exit(main())
