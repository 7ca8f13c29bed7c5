"""Is anything lost or counted twice while workers are killed at random, and does anything grow?

Four processes evaluate, and each gets SIGKILL after a second on average. Each value is told once
(as a journal would hear it), and each gradient is compared with that of the loop.
"""

import collections
import math
import os
import random
import resource
import signal
import sys
import threading
import time

import torch
from _record import arguments, write
from _simulators import processes, smooth

import zograd
from zograd.evaluators import Evaluator, Loop, Pool

WORKERS = 4
LIFE = 1.0  # seconds of a worker, on average
EACH = 500  # directions of an estimate
GROWTH = 64 << 20  # bytes that may be allocated in the end beyond what was after the first tenth
HANDLES = 16


class Listening(Evaluator):
    """Another evaluator, whose values are counted as they arrive."""

    def __init__(self, inner):
        self.inner, self.heard = inner, collections.Counter()

    def center(self, fn, points):
        return self.inner.center(fn, points)

    def values(self, fn, points, lo=0, hi=None):
        fn.arrived = lambda number, value: self.heard.update([number])
        return self.inner.values(fn, points, lo, hi)


def kill_some(pool, chance, over, killed):
    """Kill one of the workers now and then."""
    while not over.wait(chance.expovariate(WORKERS / LIFE)):
        executor = pool._workers._executor
        pids = list(getattr(executor, "_processes", None) or {})
        if pids:
            try:
                os.kill(chance.choice(pids), signal.SIGKILL)
                killed.append(1)
            except ProcessLookupError:
                pass


def used():
    """Memory and handles.

    Returns:
        Bytes and open files of this process; zeros where the system does not say.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize(), len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0, 0


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 100_000, "evaluations")
    chance, started = random.Random(given.seed), time.perf_counter()
    over, killed, lost, twice, different = threading.Event(), [], 0, 0, 0
    estimates, first = 0, (0, 0)
    rounds = max(2, math.ceil(given.count / (2 * EACH + 1)))
    with Pool(processes(WORKERS), 5) as pool:
        killer = threading.Thread(target=kill_some, args=(pool, chance, over, killed), daemon=True)
        killer.start()
        for k in range(rounds):
            listening = Listening(pool)
            fn = zograd.zero_order(method="antithetic", num_samples=EACH, seed=k, evaluator=listening)(smooth)
            x = torch.linspace(-1, 1, 5)
            found = fn.estimate(x)
            wanted = fn.replace(evaluator=Loop()).estimate(x)
            different += not torch.equal(found.grad, wanted.grad) or found.evaluations != wanted.evaluations
            lost += 2 * EACH - len(listening.heard)
            twice += sum(n > 1 for n in listening.heard.values())
            estimates += 1
            if k == rounds // 10:
                first = used()
        over.set()
        killer.join()
        last = used()
    grown = last[0] - first[0] > GROWTH or last[1] - first[1] > HANDLES
    counts = {
        "evaluations": estimates * (2 * EACH + 1),
        "workers killed": len(killed),
        "lost": lost,
        "counted twice": twice,
        "other gradients": different,
        "MiB more in the end": round((last[0] - first[0]) / (1 << 20), 1),
        "handles more in the end": last[1] - first[1],
    }
    return write(given, "workers killed at random: nothing lost", counts, lost + twice + different + grown, started)


if __name__ == "__main__":
    sys.exit(main())
