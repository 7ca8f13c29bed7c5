"""zograd beside EvoTorch: its PGPE as a gradient estimator."""

import logging
import pickle
import sys

import torch
from checks import checks, raised, told

import zograd

logging.disable(logging.WARNING)
from evotorch import Problem  # noqa: E402
from evotorch.algorithms import PGPE  # noqa: E402

PEER, PACKAGE = "EvoTorch", "evotorch"
CHECKS, check = checks()


def search(fn, size=10, popsize=100, ranking="raw", start=0.0, **options):
    """PGPE whose center moves by the estimate times the rate, with nothing adapted."""
    torch.manual_seed(0)
    problem = Problem("min", fn, solution_length=size, initial_bounds=(-1, 1), **options)
    fixed = {"stdev_learning_rate": 0.0, "stdev_init": 0.1, "optimizer": "sgd", "optimizer_config": {"momentum": 0.0}}
    center = torch.full((size,), start)
    return PGPE(problem, popsize=popsize, center_init=center, center_learning_rate=1.0, ranking_method=ranking, **fixed)


def move(run):
    before = run.status["center"].clone()
    run.step()
    run.step()  # the center moves at the beginning of the next
    return run.status["center"] - before


def ours(fn, **options):
    return zograd.zero_order(method="antithetic", num_samples=50, sigma=0.1, **options)(fn)


@check("one evaluation of 100 gives nan: the parameters after a step")
def nan():
    def make(nth):
        calls = []

        def fn(x):
            calls.append(1)
            return x.sum() * (float("nan") if len(calls) == nth else 1.0)

        return fn

    def later(ranking):
        run = search(make(150), ranking=ranking)
        run.step()
        return int(move(run).isnan().sum())

    first = raised(lambda: search(make(50)).step())
    raw, ranked = map(later, ("raw", "centered"))
    error = raised(lambda: ours(make(50)).estimate(torch.zeros(10)))
    told = f"{first} in the first population; later {raw} of 10 nan with raw values, {ranked} with ranks, no word"
    return told, str(error), raw == 10 and error == "NonFiniteError"


@check("f is constant, values ranked: does the center move?")
def ties():
    a = move(search(lambda x: torch.zeros(()), ranking="centered")).abs().max().item()
    fn = ours(lambda x: torch.zeros(()), shaping=zograd.shaping.centered_ranks)
    b = fn.estimate(torch.zeros(10)).grad.abs().max().item()
    return "yes" if a else "no", "yes" if b else "no", a > 0 and b == 0


@check("fn adds noise of deviation 1 by `torch.randn`: deviation of the slope of sum(x) over its mean, 60 estimates")
def common_random_numbers():
    def noisy(x):
        return x.sum() + torch.randn(())

    moves = []
    run = search(noisy, size=1, popsize=20)
    run.step()
    for _ in range(60):
        before = run.status["center"].clone()
        run.step()
        moves.append(run.status["center"] - before)
    a = torch.stack(moves)
    fn = ours(noisy).replace(num_samples=10)
    b = torch.stack([fn.estimate(torch.zeros(1)).grad for _ in range(60)])
    a, b = (float(g.std() / g.mean().abs()) for g in (a, b))
    return f"{a:.1f}", f"{b:.1f} (both sides of a pair see the same noise)", a > 3 * b


@check("a search on a named function, saved after a step and resumed: the same bits?")
def resumed():
    run = search(torch.sum)
    run.step()
    again = pickle.loads(pickle.dumps(run))

    def end(some):
        torch.manual_seed(1)
        return move(some)

    a = torch.equal(end(run), end(again))
    fn, twin = (ours(torch.sum, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    fn.estimate(torch.zeros(10))
    twin.load_state_dict(fn.state_dict())
    b = torch.equal(*(f.estimate(torch.zeros(10)).grad for f in (fn, twin)))
    return "yes, by pickle" if a else "no", "yes, by `state_dict()`" if b else "no", a and b


@check("evaluations in a step of 50 pairs")
def evaluations():
    calls = []
    search(lambda x: calls.append(1) or x.sum()).step()
    b = ours(lambda x: x.sum()).estimate(torch.zeros(10)).evaluations
    return str(len(calls)), f"{b}: the center as well", len(calls) == 100 and b == 101


def main():
    return told([check() for check in CHECKS], PEER)


if __name__ == "__main__":
    sys.exit(not main())
