"""How much of two workers' time goes into fn?

fn sleeps, as one does that waits for a program elsewhere, so that other load on the machine counts less. Efficiency is
the time that the sleeps take one after the other, over twice the time of the estimate; two processes, after a first
estimate that starts them. At 1 ms without a batch size the figure is reported and has no aim.
"""

import sys
import time

import torch
from _record import arguments, write
from _simulators import processes, sleeps

import zograd
from zograd.evaluators import Pool

CASES = {(0.1, 1): 0.9, (0.01, 1): 0.9, (0.001, 20): 0.8, (0.001, 1): 0.0}  # seconds and points in a task: the aim
SECONDS = 4.0  # of sleep in an estimate
TRIES = 3  # the best counts


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
            best = 0.0
            for _ in range(given.count):
                began = time.perf_counter()
                fn.estimate(torch.ones(3), seconds)
                best = max(best, (num + 1) * seconds / (2 * (time.perf_counter() - began)))
            counts[f"at {seconds * 1000:g} ms, {batch} points a task"] = round(best, 2)
            wrong += best < aim
    return write(given, "efficiency of two workers", counts, wrong, started)


if __name__ == "__main__":
    sys.exit(main())
