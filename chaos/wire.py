"""How many bytes go to the workers and back for an estimate, and does anything grow with directions x parameters?

An executor of two processes weighs what it passes on. The job (function, arguments, parameters) may go to each worker
once, and once more for each that had started late; whatever else goes is a few hundred bytes a task and back 8 a value.
"""

import concurrent.futures
import pickle
import sys
import time

import torch
from _record import arguments, write
from _simulators import processes, smooth

import zograd
from zograd.evaluators import Pool

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
BATCH = 10
TASK, ANSWER = 600, 600  # bytes that one may have beyond its values


class Weighing(concurrent.futures.Executor):
    """Passes on, and weighs."""

    def __init__(self, inner):
        self._inner, self._max_workers, self.out, self.back = inner, inner._max_workers, [], []

    def submit(self, fn, /, *args):
        self.out.append(len(pickle.dumps(args)))
        future = self._inner.submit(fn, *args)
        future.add_done_callback(lambda f: self.back.append(len(pickle.dumps(f.result()))))
        return future


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 200, "directions at the smallest size")
    started, wrong, counts = time.perf_counter(), 0, {}
    with processes(2)() as inner:
        for size in SIZES:
            num = max(20, given.count * SIZES[0] // size)
            weighing = Weighing(inner)
            x = torch.zeros(size)
            fn = zograd.zero_order(num_samples=num, seed=0, evaluator=Pool(weighing, BATCH))(smooth)
            fn.estimate(x)
            jobs = [n for n in weighing.out if n > 4 * size]
            tasks = [n for n in weighing.out if n <= 4 * size]
            wrong += len(jobs) > 2 * 2 or sum(jobs) > len(jobs) * (4 * size + 8000)
            wrong += max(tasks, default=0) > TASK or max(weighing.back) > ANSWER + 8 * BATCH
            counts[f"kB for {num} directions of {size} parameters"] = round(sum(weighing.out) / 1000)
            counts[f"sends of the {size} parameters"] = len(jobs)
    counts["directions at the smallest size"] = given.count
    return write(given, "bytes over the wire: the job once a worker, 8 a value", counts, wrong, started)


if __name__ == "__main__":
    sys.exit(main())
