"""Augmented random search: linear policies that swim and balance, from a few hundred episodes of MuJoCo.

Mania et al., "Simple random search provides a competitive approach to reinforcement learning" (arXiv:1803.07055). The
update is plain gradient descent on an antithetic estimate whose values are divided by their deviation: a step of
2 sigma alpha makes it that of the paper. The better half of the directions count (V1-t); for InvertedPendulum-v5
observations are normalized by all that were seen before (V2-t). Every episode of training counts, the one at the
parameters themselves included; the paper's method has no such episode.

The settings are the best of a few on the seeds from 100 on. There Swimmer-v5 missed its target twice in three with all
of 4 directions and sigma = alpha = 0.1, and InvertedPendulum-v5 once in 16 with sigma = 0.3; with these none did. Of
the seeds 3 to 34, tried once afterwards, InvertedPendulum-v5 missed it once. The first full run, with 0.3, had failed
on one of the seeds shown, which is why a wider one was looked for.
"""

import functools
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tasks.report import Report, arguments
from zograd import Tracker, zero_order
from zograd.contrib.rl import Episodes, Normalizer
from zograd.shaping import top_directions

try:
    import gymnasium
    import mujoco  # noqa: F401 - gymnasium's own error would name no remedy
    from matplotlib.figure import Figure

    from tasks import picture
except ImportError as error:
    raise SystemExit(
        f"{error}: this example needs `python -m pip install gymnasium mujoco imageio packaging matplotlib`."
    ) from error


@dataclass(frozen=True)
class Task:
    """An environment, the settings of the search, and what has to be reached within how many episodes."""

    name: str
    observations: int
    actions: int
    directions: int
    kept: int
    alpha: float
    sigma: float
    normalized: bool
    target: float
    budget: int
    tests: int  # episodes whose mean return is compared with the target
    every: int  # updates between tests
    known: str  # episodes of an independent implementation


TASKS = [
    Task("Swimmer-v5", 8, 2, 8, 4, 0.3, 0.3, False, 325, 300, 3, 2, "80, 160, 240 (numpy); paper 100"),
    Task("InvertedPendulum-v5", 4, 1, 8, 4, 0.3, 0.6, True, 1000, 150, 3, 1, "80 (numpy)"),
]


def linear(matrix):
    weights = matrix.numpy()
    return lambda observation: weights @ observation


def train(task, seed, bar, budget):
    """Test returns by episodes of training, up to the target or the budget, and the environment's steps."""
    normalizer = Normalizer() if task.normalized else None
    episodes = Episodes(functools.partial(gymnasium.make, task.name), linear, normalizer=normalizer)
    loss = zero_order(
        method="antithetic",
        num_samples=task.directions,
        sigma=task.sigma,
        shaping=top_directions(task.kept),
        generator=torch.Generator().manual_seed(seed),
    )(episodes)
    matrix = torch.zeros(task.actions, task.observations, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([matrix], lr=2 * task.sigma * task.alpha)
    curve, update = [], 0
    with Tracker() as tracker:
        while tracker.evaluations + 2 * task.directions < budget:
            optimizer.zero_grad()
            loss(matrix).backward()
            optimizer.step()
            if normalizer is not None:
                normalizer.update()
            update += 1
            bar.update(tracker.evaluations - bar.n)
            if update % task.every == 0:
                trained = episodes.steps
                returns = episodes.returns(matrix.detach(), range(10_000, 10_000 + task.tests))
                episodes.steps = trained
                curve.append((tracker.evaluations, sum(returns) / len(returns)))
                bar.set_postfix_str(f"return {curve[-1][1]:.0f}", refresh=False)
                if curve[-1][1] >= task.target:
                    break
    return curve or [(tracker.evaluations, float("nan"))], episodes.steps


def save_picture(path, curves):
    figure = Figure(figsize=(10, 4), layout="constrained")
    for ax, (task, runs) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for seed, run in runs.items():
            ax.plot(*zip(*run, strict=True), ".-", label=f"seed {seed}")
        ax.axhline(task.target, color="gray", linewidth=0.8, linestyle="--")
        ax.set(title=task.name, xlabel="episodes of training", ylabel=f"return, mean of {task.tests} test episodes")
        ax.legend()
    picture.save(figure, path, dpi=90)


def main():
    options = arguments(__doc__, "ars")
    seeds, report, curves = options.seeds[: 1 if options.quick else None], Report("ars", options), {}
    for task in TASKS:
        curves[task], steps, budget = {}, [], (4 * task.directions if options.quick else task.budget)
        for seed in seeds:
            with tqdm(total=budget, desc=f"{task.name}, seed {seed}", unit=" episodes") as bar:
                curves[task][seed], taken = train(task, seed, bar, budget)
                steps.append(taken)
        ends = [run[-1] for run in curves[task].values()]
        count = sum(end[0] for end in ends) / len(ends)
        report.row(f"{task.name}: episodes to a return of {task.target}", task.known, [end[0] for end in ends], count)
        report.row(f"{task.name}: test return there", task.target, [end[1] for end in ends], count)
        report.row(f"{task.name}: environment steps", "", steps, count)
    save_picture(options.output, curves)
    report.finish()
    print(f"saved {options.output}")
    if not options.quick:
        for task, runs in curves.items():
            assert all(run[-1][1] >= task.target and run[-1][0] <= task.budget for run in runs.values()), task.name


if __name__ == "__main__":
    main()
