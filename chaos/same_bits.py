"""Is the gradient the same, bit for bit, for any number of workers, kind of executor and order of answers?

Threads, processes, loky and dask with 1, 2, 4 and 16 workers (dask with 2), and tasks done in random order; random
schemes, distributions, batch sizes and arguments. fn draws random numbers.
"""

import concurrent.futures
import contextlib
import importlib.util
import logging
import random
import sys
import time

import torch
from _record import arguments, write
from _simulators import Shuffled, noisy, processes

import zograd
from zograd.evaluators import Pool

FAMILIES = [
    zograd.distributions.Gaussian(),
    zograd.distributions.Rademacher(),
    zograd.distributions.Sphere(),
    zograd.distributions.Orthogonal(),
]


def executors(stack, chance, count):
    """Pools by name; those that are slow to start only if they serve many estimates.

    Returns:
        The pools.
    """
    pools = {"4 in random order": Pool(Shuffled(chance, 4))}
    for workers in (1, 2, 4, 16):
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
        pools[f"{workers} thread{'s' * (workers > 1)}"] = Pool(threads)
        if workers < 16 or count >= 500:
            pools[f"{workers} process{'es' * (workers > 1)}"] = stack.enter_context(Pool(processes(workers)))
    if count >= 500 and importlib.util.find_spec("loky"):
        import loky

        pools["2 workers of loky"] = stack.enter_context(Pool(lambda: loky.get_reusable_executor(2)))
    if count >= 500 and importlib.util.find_spec("distributed"):
        from dask.distributed import Client, LocalCluster

        settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "silence_logs": logging.ERROR}
        cluster = stack.enter_context(LocalCluster(**settings))
        pools["2 workers of dask"] = Pool(stack.enter_context(Client(cluster)).get_executor())
    return pools


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 1000, "estimates")
    chance, started = random.Random(given.seed), time.perf_counter()
    counts, wrong = {"estimates": 0}, 0
    with contextlib.ExitStack() as stack:
        pools = executors(stack, chance, given.count)
        counts |= {f"by {name}": 0 for name in pools}
        for _ in range(given.count):
            name = chance.choice(list(pools))
            pools[name].batch_size = chance.choice([1, 2, 7])
            fn = zograd.zero_order(
                chance.choice(FAMILIES),
                chance.choice(["naive", "forward", "antithetic", "fourth_order"]),
                num_samples=chance.randint(1, 12),
                sigma=0.1,
                seed=chance.getrandbits(62),
            )(noisy)
            x = torch.randn(chance.choice([1, 7, 300]), dtype=chance.choice([torch.float32, torch.float64]))
            one, other = fn.estimate(x), fn.replace(evaluator=pools[name]).estimate(x)
            same = torch.equal(one.grad, other.grad) and torch.equal(one.value, other.value)
            wrong += not same or one.evaluations != other.evaluations
            counts["estimates"] += 1
            counts[f"by {name}"] += 1
    return write(given, "the same bits from any workers in any order", counts, wrong, started)


if __name__ == "__main__":
    sys.exit(main())
