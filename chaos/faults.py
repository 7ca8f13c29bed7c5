"""What comes of faults inside workers: the right gradient or a named error, in time, and no process left?

Two processes evaluate fn, which does something wrong at about a fifth of the points: the first time that it sees the
point, where retries must lead to the right gradient, or always, where the estimate must raise or drop just those
directions. Of each fault there are estimates until fn has done it as often as asked, which fn itself counts.
"""

import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from _record import arguments, write
from _simulators import DONE, FAULTS, faulty, processes, smooth

import zograd
from zograd.evaluators import Pool
from zograd.failures import Drop, Retry

PATIENCE, DEADLINE = 0.25, 60.0  # seconds of an evaluation, and until an estimate counts as hanging
NAMED = (zograd.EvaluationError, zograd.NonFiniteError, zograd.WorkerError, ValueError, TypeError)


def settings(seed, policy):
    """Of one estimate."""
    return {"num_samples": 4, "method": "antithetic", "seed": seed, "failures": policy}


def right(found, x, seed, lost):
    """Whether this is the gradient of the directions that did not fail.

    Returns:
        Whether it is, to the last bit if none failed.
    """
    whole = zograd.zero_order(**settings(seed, "raise"))(smooth).estimate(x)
    if not lost:
        return torch.equal(found.grad, whole.grad)
    dropped = found.coefficients == 0
    eps = whole.directions.noise(0, 4)[0]
    points = torch.stack([x + eps, x - eps])[..., 0] > 0.3
    if not torch.equal(dropped, points.any(dim=0)):
        return False
    alive = (~dropped).double()
    wanted = (whole.coefficients * alive) @ eps.double() / alive.sum()
    return torch.allclose(found.grad.double(), wanted, rtol=1e-4, atol=1e-5)


def outcome(pool, path, fault, chance):
    """One estimate with faults in it, which are counted in the folder at ``path``.

    Returns:
        How it ended, and whether that is right.
    """
    x, seed = torch.full((3,), -0.6), chance.getrandbits(62)
    always = chance.random() < 0.5
    policy = chance.choice(["raise", Drop(0.01)] if always else ["raise", Retry(2), Retry(1, then=Drop(0.01))])
    fn = zograd.zero_order(**settings(seed, policy), evaluator=pool)(faulty)
    began = time.monotonic()
    try:
        found = fn.estimate(x, str(path / str(seed)), fault, always)
        lost = bool((found.coefficients == 0).any())
        end, fine = "with directions dropped" if lost else "right gradient", right(found, x, seed, lost)
    except NAMED:
        end, fine = "named error", True
    return end, fine, time.monotonic() - began > DEADLINE


def injected(path):
    """How often fn did something wrong, which it says in a file.

    Returns:
        The number.
    """
    return os.path.getsize(path / DONE) if (path / DONE).exists() else 0


def alive(pid):
    """Whether a process is there and no zombie.

    Returns:
        Whether it is.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 1000, "faults of each kind")
    chance, started = random.Random(given.seed), time.perf_counter()
    ends = dict.fromkeys(["right gradient", "with directions dropped", "named error"], 0)
    wrong = late = 0
    counts, pids = {"estimates": 0}, set()
    warnings.simplefilter("ignore", zograd.ZeroOrderWarning)
    os.chdir(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # where workers that die would say so
        with Pool(processes(2), timeout=PATIENCE) as pool:
            for fault in FAULTS:
                pool.timeout = PATIENCE if fault == "hang" else 10 * DEADLINE
                path = Path(folder, fault)
                path.mkdir()
                while injected(path) < given.count:
                    end, fine, slow = outcome(pool, path, fault, chance)
                    pids |= {int(name.split(":")[1]) for name in pool._workers.names}
                    counts["estimates"] += 1
                    ends[end] += 1
                    wrong += not fine
                    late += slow
                counts[fault] = injected(path)
    time.sleep(0.5)
    orphans = sum(map(alive, pids))
    counts |= {**ends, "silently wrong": wrong, "past the deadline": late, "processes left": orphans}
    return write(given, "faults in workers: right gradient or named error", counts, wrong + late + orphans, started)


if __name__ == "__main__":
    sys.exit(main())
