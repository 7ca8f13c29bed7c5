"""Do 1, 2 and 3 ranks get the same bits, and does every rank name the error when one of them fails?

Random estimates (scheme, directions, evaluator, number of values, of samples and of parameters) run on processes that
torch.distributed connects, and in this one. In others a rank, chosen like the moment by chance, raises, ends the
program, returns what fits nothing, begins with another seed or other parameters; after each the ranks go on with the
next. In the last group of each size the chosen rank is killed; the others must name that within the timeout.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from _record import arguments, write

import zograd
from zograd.evaluators import Distributed

TIMEOUT, DEADLINE = 20.0, 900.0  # seconds: of an exchange, and of a group of ranks
NAMED = "survivors that named it within the timeout"
FAULTS = ["raise", "exit", "none", "shape", "seed", "parameters"]
OUTS = {
    "number": lambda x: float(x.sum().sin()),
    "tensor": lambda x: (x**3).sum() + torch.randn(()),
    "vector": lambda x: torch.outer(x[:3], x.exp()[:2]),
}


def cases(seed, count):
    """Random settings, and the fault that one rank of an estimate meets, if any."""
    chance = random.Random(seed)
    families = [zograd.distributions.Gaussian, zograd.distributions.Rademacher, zograd.distributions.Orthogonal]
    for k in range(count):
        out = chance.choice(list(OUTS))
        settings = {
            "distribution": chance.choice(families)(),
            "method": chance.choice(["naive", "forward", "antithetic"]),
            "num_samples": chance.randint(1, 12),
            "seed": k,
        }
        inner = "vmap" if out == "vector" and chance.random() < 0.5 else "loop"
        fault = chance.choice(FAULTS) if k % 3 == 2 else None
        yield settings, out, inner, chance.randint(3, 20), fault, chance.random(), chance.randint(0, 3)


def one(case, rank, ranks, evaluator):
    """One estimate on one rank.

    Returns:
        The gradient, or the error as text.
    """
    settings, out, _, size, fault, which, moment = case
    broken = fault is not None and rank == int(which * ranks)
    calls = []

    def fn(x):
        calls.append(1)
        if broken and len(calls) == 1 + (0 if fault == "shape" else moment):
            return spoil(fault, x)
        return OUTS[out](x)

    x = torch.linspace(-1, 1, size) + (1e-6 if broken and fault == "parameters" else 0)
    seed = settings["seed"] + (broken and fault == "seed")
    try:
        estimate = zograd.zero_order(**{**settings, "seed": seed}, evaluator=evaluator)(fn).estimate(x)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return estimate.vjp(torch.ones_like(estimate.value))


def spoil(fault, x):
    """What goes wrong inside fn."""
    if fault == "raise":
        raise OSError("the simulator is gone")
    if fault == "exit":
        sys.exit(3)
    return None if fault == "none" else x.new_ones(5)


def run_rank(rank, ranks, folder, seed, count):
    """All cases as one of several ranks; at the end one of them is killed."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    results = [one(case, rank, ranks, Distributed(inner=case[2], timeout=TIMEOUT)) for case in cases(seed, count)]
    chance = random.Random(seed + ranks)
    chosen, moment, calls, begun = chance.randrange(ranks), chance.randint(1, 8), [], time.monotonic()

    def dies(x):
        calls.append(1)
        if rank == chosen and len(calls) == moment:
            torch.save((results, None, 0.0), f"{folder}/result{rank}")
            os.kill(os.getpid(), signal.SIGKILL)
        return x.sum()

    try:
        zograd.zero_order(num_samples=8 * ranks, seed=0, evaluator=Distributed(timeout=TIMEOUT))(dies).estimate(
            torch.ones(3)
        )
    except Exception as error:
        torch.save((results, type(error).__name__, time.monotonic() - begun), f"{folder}/result{rank}")
    os._exit(0)  # not to wait for the dead


def run_group(ranks, seed, count):
    """All cases on so many processes.

    Returns:
        What each of them saw, None of one that hung.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--rank", str(ranks), folder, str(seed), str(count)]
        processes = [subprocess.Popen([*command, str(rank)]) for rank in range(ranks)]
        give_up = time.monotonic() + DEADLINE
        try:
            for process in processes:
                process.wait(max(0.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        paths = [Path(folder) / f"result{rank}" for rank in range(ranks)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def same(results):
    """Whether all ranks have the same bits, or the same text."""
    if any(isinstance(r, str) for r in results):
        return len({r if isinstance(r, str) else "" for r in results}) == 1
    return all(torch.equal(r, results[0]) for r in results)


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 300, "estimates for each number of ranks")
    started = time.perf_counter()
    names = ["estimates", "same bits", "named errors", "ranks killed", NAMED, "hangs"]
    counts, wrong = dict.fromkeys(names, 0), 0
    for ranks in (2, 3):
        seen = run_group(ranks, given.seed, given.count)
        counts["hangs"] += sum(one_rank is None for one_rank in seen)
        if None in seen:
            wrong += 1
            continue
        for k, case in enumerate(cases(given.seed, given.count)):
            results = [results[k] for results, _, _ in seen]
            # A fault whose moment never comes is none; what one rank calls another shape may be right for one process.
            wanted = one((*case[:4], None, 0, 0), 0, 1, case[2])
            right = same(results) and not isinstance(results[0], str) and torch.equal(results[0], wanted)
            named = same(results) and isinstance(results[0], str) and results[0].startswith("RankError: ")
            counts["estimates"] += 1
            counts["same bits"] += right
            counts["named errors"] += named
            wrong += not (right or (named and case[4] is not None))
        survivors = [(kind, seconds) for _, kind, seconds in seen if kind is not None]
        timely = [kind == "RankError" and seconds < TIMEOUT + 10 for kind, seconds in survivors]
        counts["ranks killed"] += 1
        counts[NAMED] += sum(timely)
        wrong += len(timely) != ranks - 1 or not all(timely)
    return write(given, "1, 2 and 3 ranks: the same bits, or one named error on all", counts, wrong, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        torch.set_num_threads(1)
        run_rank(int(sys.argv[6]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    sys.exit(main())
