"""How many evaluations a good gradient takes, by direction family, and how many a descent takes with it.

Cosine: the least N at which the mean cosine between the estimate and the true gradient reaches 0.9, times two (all
schemes are antithetic; the center is not counted). Descent: evaluations until the loss reaches a target, the learning
rate chosen for each family on seeds that are not shown. Nothing is timed, so that a busy machine does no harm.
"""

import argparse
import json
import math
import os
import platform
import statistics
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from fixed_cost import processor

import zograd
from zograd.distributions import Coordinate, Gaussian, Hadamard, Orthogonal, Rademacher, Sobol

RESULTS = Path(__file__).parent / "results"
SIGMA, COSINE = 1e-2, 0.9
GAUSSIAN, TORCHOPT, PGPE = "Gaussian (independent)", "TorchOpt antithetic", "EvoTorch PGPE"
FAMILIES = {
    GAUSSIAN: Gaussian(),
    "Rademacher": Rademacher(),
    "Orthogonal": Orthogonal(),
    "Orthogonal, sqrt(d)": Orthogonal(lengths="sqrt_d"),
    "Hadamard": Hadamard(),
    "Sobol": Sobol(),
    "Coordinate": Coordinate(),
}
DESCENDED = (GAUSSIAN, "Orthogonal", "Orthogonal, sqrt(d)", "Hadamard", "Sobol")
SLOW = 2000  # parameters beyond which a d x d factorization or a sequence of d dimensions takes minutes
TUNING, SHOWN = (100,), (0, 1, 2)
RATES = (0.01, 0.03, 0.1, 0.3)


class Problem:
    """A loss of a flat vector, where it starts, and what counts as done (None: no descent)."""

    def __init__(self, name, loss, start, seeds, target=None, steps=0, dear=True):
        self.name, self.loss, self.start, self.seeds, self.target, self.steps = name, loss, start, seeds, target, steps
        self.dear = dear  # too slow for a loop over single directions
        self.size = start.numel()

    def gradient(self):
        x = self.start.clone().requires_grad_()
        return torch.autograd.grad(self.loss(x), x)[0]


def quadratic(size, seeds, **descent):
    """Eigenvalues from 1 to 1000, evenly on a logarithmic scale; the start has the same value along each."""
    spectrum = torch.logspace(0, 3, size)
    start = spectrum.rsqrt()
    return Problem(f"quadratic, d = {size}", lambda x: (spectrum * x * x).sum() / (2 * size), start, seeds, **descent)


def logistic():
    """Multinomial logistic regression on scikit-learn's digits, from zero."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows, labels = torch.tensor(data.data[:256] / 16).float(), torch.tensor(data.target[:256])

    def loss(x):
        return torch.nn.functional.cross_entropy(rows @ x[:640].view(64, 10) + x[640:], labels)

    return Problem("logistic, digits, d = 650", loss, torch.zeros(650), 4, target=0.5, steps=40)


def control():
    """A cart and pole near the top, 40 steps, a policy of 4-12-1; the mean squared state and force is the loss."""
    generator = torch.Generator().manual_seed(0)
    starts = 0.2 * torch.randn(8, 4, generator=generator)

    def loss(x):
        first, bias, last = x[:48].view(4, 12), x[48:60], x[60:72]
        state, total = starts, 0.0
        for _ in range(40):
            force = 10 * torch.tanh(torch.tanh(state @ first + bias) @ last)
            place, speed, angle, turn = state.unbind(-1)
            push = (force + 0.05 * turn**2 * angle.sin()) / 1.1
            bend = (9.8 * angle.sin() - angle.cos() * push) / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
            haste = push - 0.05 * bend * angle.cos() / 1.1
            state = torch.stack(
                [place + 0.02 * speed, speed + 0.02 * haste, angle + 0.02 * turn, turn + 0.02 * bend], dim=-1
            )
            total = total + (state[:, :3:2] ** 2).sum(dim=1).mean() + 1e-4 * (force**2).mean()
        return total / 40

    start = 0.3 * torch.randn(72, generator=torch.Generator().manual_seed(1))
    return Problem("cart and pole, d = 72", loss, start, 16, target=0.13, steps=100)


PROBLEMS = {
    "quadratic64": lambda: quadratic(64, 32, target=0.05, steps=600, dear=False),
    "control": control,
    "logistic": logistic,
    "quadratic1000": lambda: quadratic(1000, 4),
    "quadratic10000": lambda: quadratic(10_000, 2),
}
QUICK = ("quadratic64", "control")


# ------------------------------------------------------------------------------------------------------------- systems


def estimator(problem, family, num):
    """A function from a point and a seed to the gradient there."""
    decorated = zograd.zero_order(
        family, "antithetic", num_samples=num, sigma=SIGMA, evaluator=zograd.evaluators.Vmap(chunk_size=None)
    )(problem.loss)
    return lambda x, seed: decorated.replace(seed=seed).estimate(x).grad


def torchopt(problem, num):
    import torchopt

    normal = torch.distributions.Normal(0, 1)
    decorated = torchopt.diff.zero_order(
        distribution=normal, method="antithetic", argnums=0, num_samples=num, sigma=SIGMA
    )(problem.loss)

    def gradient(x, seed):
        torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(decorated(leaf), leaf)[0]

    return gradient


def families(problem):
    for name, family in FAMILIES.items():
        large = problem.size > SLOW and isinstance(family, (Orthogonal, Sobol))
        if not large:
            yield name, lambda num, family=family: estimator(problem, family, num)
    if find_spec("torchopt") and not problem.dear:  # a Python loop over directions of the same law as Gaussian()
        yield TORCHOPT, lambda num: torchopt(problem, num)


# -------------------------------------------------------------------------------------------------------------- cosine


def cosine(make, problem, truth, num):
    gradient = make(num)
    found = [
        torch.cosine_similarity(gradient(problem.start, seed), truth, dim=0).item() for seed in range(problem.seeds)
    ]
    return statistics.mean(found)


def least(make, problem):
    """The least N that reaches the cosine, to two percent."""
    truth, lo, hi = problem.gradient(), 1, max(2, problem.size)
    while cosine(make, problem, truth, hi) < COSINE:
        lo, hi = hi, math.ceil(1.5 * hi)
        if hi > 40 * problem.size:
            return None
    while hi - lo > max(1, 0.02 * hi):
        middle = (lo + hi) // 2
        lo, hi = (lo, middle) if cosine(make, problem, truth, middle) >= COSINE else (middle, hi)
    return hi


# ------------------------------------------------------------------------------------------------------------- descent


def race(gradient, problem, num, rate, seed):
    """Evaluations of a descent by Adam until the loss reaches the target; infinite if it does not."""
    x = problem.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=rate)
    for step in range(problem.steps):
        x.grad = gradient(x.detach(), 100_000 * seed + step)
        optimizer.step()
        with torch.no_grad():
            loss = problem.loss(x)
        if loss <= problem.target:
            return 2 * num * (step + 1)
        if not torch.isfinite(loss):
            break
    return math.inf


def descent(make, problem, num):
    """The median over the seeds that are shown, at the learning rate that was best on the others."""
    gradient = make(num)
    tuned = {rate: statistics.median(race(gradient, problem, num, rate, seed) for seed in TUNING) for rate in RATES}
    rate = min(tuned, key=tuned.get)
    found = [race(gradient, problem, num, rate, seed) for seed in SHOWN]
    return {"num_samples": num, "rate": rate, "evaluations": found, "median": statistics.median(found)}


def pgpe(problem, num):
    """EvoTorch's PGPE with its own optimizer and a fixed deviation."""
    import logging

    logging.disable(logging.WARNING)
    from evotorch import Problem as Task
    from evotorch.algorithms import PGPE as Search

    def one(rate, seed):
        torch.manual_seed(seed)
        task = Task(
            "min",
            torch.no_grad()(torch.vmap(problem.loss, chunk_size=100)),
            solution_length=problem.size,
            initial_bounds=(-1, 1),
            vectorized=True,
            seed=seed,
        )
        search = Search(
            task,
            popsize=2 * num,
            center_init=problem.start.clone(),
            center_learning_rate=rate,
            stdev_learning_rate=0.0,
            stdev_init=0.1,
            ranking_method="centered",
            optimizer="adam",
        )
        for step in range(problem.steps):
            search.step()
            with torch.no_grad():
                if problem.loss(search.status["center"].clone()) <= problem.target:
                    return 2 * num * (step + 1)
        return math.inf

    tuned = {rate: statistics.median(one(rate, seed) for seed in TUNING) for rate in RATES}
    rate = min(tuned, key=tuned.get)
    found = [one(rate, seed) for seed in SHOWN]
    return {"num_samples": num, "rate": rate, "evaluations": found, "median": statistics.median(found)}


# -------------------------------------------------------------------------------------------------------------- report


def measure(problem):
    print(
        f"\n{problem.name}: the least N for a cosine of {COSINE}, evaluations (2N), and how many times fewer",
        flush=True,
    )
    cosines, descents = {}, {}
    for name, make in families(problem):
        num = least(make, problem)
        cosines[name] = num
        factor = cosines[GAUSSIAN] / num if num else math.nan
        print(f"  {name:24} {num or '-':>7} {2 * num if num else '-':>8} {factor:7.2f} x", flush=True)
    if problem.target is None:
        return {"problem": problem.name, "size": problem.size, "cosine": cosines, "descent": {}}
    sizes = (max(1, problem.size // 8), problem.size)
    print(f"  a loss of {problem.target} by Adam: evaluations at N = {sizes[0]} and N = {sizes[1]}", flush=True)
    for name, make in families(problem):
        if name not in DESCENDED:
            continue
        descents[name] = [descent(make, problem, num) for num in sizes]
        show(name, descents[name], descents[GAUSSIAN])
    if find_spec("torchopt") and not problem.dear:
        descents[TORCHOPT] = [descent(lambda num: torchopt(problem, num), problem, sizes[0])]
        show(TORCHOPT, descents[TORCHOPT], descents[GAUSSIAN])
    if find_spec("evotorch"):
        descents[PGPE] = [pgpe(problem, num) for num in sizes]
        show(PGPE, descents[PGPE], descents[GAUSSIAN])
    return {"problem": problem.name, "size": problem.size, "cosine": cosines, "descent": descents}


def show(name, rows, base):
    cells = [
        f"{row['median']:>9.0f} ({b['median'] / row['median']:5.2f} x)" for row, b in zip(rows, base, strict=False)
    ]
    print(f"  {name:24} {'  '.join(cells)}", flush=True)


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    names = [name for name in FAMILIES if any(name in result["cosine"] for result in results)]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        places = [i for i, result in enumerate(results) if result["cosine"].get(name)]
        heights = [2 * results[i]["cosine"][name] / results[i]["size"] for i in places]
        axes.bar([i + (k - len(names) / 2 + 0.5) * width for i in places], heights, width, label=name)
    axes.set_xticks(range(len(results)), [result["problem"].replace(", d", ",\nd") for result in results], fontsize=8)
    axes.set_ylabel(f"evaluations for a cosine of {COSINE}, per parameter")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


def finite(value):
    """Infinite numbers have no place in JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two small problems")
    parser.add_argument("--only", nargs="*", choices=PROBLEMS, help="these problems; the others keep their results")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; the picture goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = options.output or RESULTS / ("evaluations-quick.json" if options.quick else "evaluations.json")
    chosen = options.only or (QUICK if options.quick else tuple(PROBLEMS))
    found = {name: measure(PROBLEMS[name]()) for name in chosen}
    if options.only and output.exists():
        found = json.loads(output.read_text())["problems"] | found
    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    problems = {name: found[name] for name in PROBLEMS if name in found}
    report = {"machine": machine, "cosine": COSINE, "sigma": SIGMA, "tuning": TUNING, "seeds": SHOWN}
    output.write_text(json.dumps(finite({**report, "problems": problems}), indent=2) + "\n")
    picture(list(problems.values()), output.with_suffix(".png"))


if __name__ == "__main__":
    main()
