"""Learn from unrolls a few steps at a time: persistent and noise-reuse evolution strategies beside truncated ones.

Influence balancing: what the parameter does at once is the opposite of what it does in the long run, and an update
comes after each single step. Toy regression: the learning rates of an inner optimizer of 100 steps, an update every 10.
Truncated ES does not see what the parameters did before the window, and goes the wrong way.
"""

import numpy as np
import torch
from tqdm import tqdm

from tasks.report import Report, arguments
from zograd.unrolled import NRES, PES, TruncatedES

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib`.") from error

COLORS = {PES: "#0072B2", NRES: "#009E73", TruncatedES: "#D55E00"}
NAMES = {PES: "PES", NRES: "NRES", TruncatedES: "truncated ES"}

# ---- influence balancing: s <- A s + theta signs, loss (s_0 - 1)^2 / 2; in the steady state s_0 = -6 theta

SIGNS = torch.tensor([1.0] * 10 + [-1.0] * 13, dtype=torch.float64)
A = (0.5 * torch.eye(23) + 0.5 * torch.diag(torch.ones(22), 1)).double()
SHORT = {"updates": 3000}


def influence(theta, state):
    """One step of many particles: (sets,), (sets, 23)."""
    state = state @ A.T + theta.unsqueeze(1) * SIGNS
    return (state[:, 0] - 1) ** 2 / 2, state


def steady_loss(theta):
    return (-6 * theta - 1) ** 2 / 2


def balance(kind, seed, updates, progress):
    """The steady state's loss after each update."""
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    estimator = kind(influence, num_samples=500, sigma=0.1, evaluator="batched", seed=seed)
    optimizer = torch.optim.SGD([theta], lr=1e-4)
    state, losses = estimator.init(theta, torch.ones(23, dtype=torch.float64)), [steady_loss(0.5)]
    for _ in range(updates):
        loss, state = estimator(theta, state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(steady_loss(theta.item()))
        progress.update()
    return losses


# ---- toy regression: gradient descent on f, the log of its rate a straight line from theta_0 to theta_1

LENGTH, WINDOW = 100, 10
LONG = {"updates": 20_000}
SIGMA = {PES: 0.3, NRES: 0.3, TruncatedES: 1.0}


def f(a, b):
    return np.sqrt(a * a + 5) - np.sqrt(5) + np.sin(b) ** 2 * np.exp(-5 * a * a) + 0.25 * np.abs(b - 100)


def descend(theta, state):
    """A window of ten steps of many particles, in numpy."""
    theta, x, t = theta.numpy(), state["x"].numpy(), state["t"].numpy()
    a, b, loss = x[:, 0], x[:, 1], 0.0
    first, slope = theta[:, 0], (theta[:, 1] - theta[:, 0]) / LENGTH
    for k in range(WINDOW):
        rate, sine, bump = np.exp(first + (t + k) * slope), np.sin(b), np.exp(-5 * a * a)
        down = a / np.sqrt(a * a + 5) - 10 * a * sine**2 * bump
        a, b = a - rate * down, b - rate * (2 * np.cos(b) * sine * bump + 0.25 * np.sign(b - 100))
        loss = loss + f(a, b)
    return torch.from_numpy(loss), {"x": np.stack([a, b], axis=1), "t": t + WINDOW}


def beginning():
    return {"x": torch.ones(2, dtype=torch.float64), "t": 0}


def whole(theta):
    """The sum of the losses of an episode without perturbation, for (sets, 2)."""
    theta = theta.detach().double()
    state = {"x": torch.ones(len(theta), 2, dtype=torch.float64), "t": torch.zeros(len(theta), dtype=torch.int64)}
    total = 0.0
    for _ in range(LENGTH // WINDOW):
        loss, state = descend(theta, state)
        state = {name: torch.as_tensor(leaf) for name, leaf in state.items()}
        total = total + loss
    return total


def tune(kind, seed, updates, progress):
    """The parameters on the way, every 50 updates."""
    theta = torch.tensor([-4.0, -4.0], dtype=torch.float64, requires_grad=True)
    estimator = kind(descend, num_samples=50, sigma=SIGMA[kind], evaluator="batched", seed=seed)
    optimizer = torch.optim.Adam([theta], lr=0.01, betas=(0.99, 0.999))
    state, path = estimator.init(theta, beginning()), [theta.detach().clone()]
    for step in range(updates):
        loss, state = estimator(theta, state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (LENGTH // WINDOW) == LENGTH // WINDOW - 1:
            state = estimator.reset(state, True, beginning())  # all particles are at the end of their episodes
        if step % 50 == 49:
            path.append(theta.detach().clone())
        progress.update()
    return torch.stack(path)


def save_picture(path, curves, paths):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind, losses in curves.items():
        left.plot(losses, color=COLORS[kind], label=NAMES[kind])
    left.set(title="influence balancing, windows of one step", xlabel="updates", ylabel="loss", yscale="log")
    across, up = (torch.linspace(low, 8, 141, dtype=torch.float64) for low in (-6, -18))
    x, y = torch.meshgrid(across, up, indexing="xy")
    level = whole(torch.stack([x.flatten(), y.flatten()], dim=1)).view(x.shape).clamp(max=4000)
    shades = right.contourf(across, up, level.numpy(), levels=20, cmap="Greys")
    figure.colorbar(shades, ax=right, label="loss of 100 steps")
    for kind, points in paths.items():
        right.plot(*points.T.numpy(), color=COLORS[kind], label=NAMES[kind])
    right.set(title="toy regression, windows of 10 of 100 steps", xlabel="log rate, first", ylabel="log rate, last")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=90)


def main():
    args = arguments(__doc__, "unrolled")
    report = Report("unrolled", args)
    if args.quick:
        SHORT.update(updates=100)
        LONG.update(updates=50)
    curves, paths, final, sums = {}, {}, {}, {}
    with tqdm(total=3 * len(args.seeds) * (SHORT["updates"] + LONG["updates"]), unit="update") as progress:
        for kind, reference in ((PES, "5.8e-18"), (NRES, ""), (TruncatedES, "211")):
            progress.set_description(f"influence balancing, {NAMES[kind]}")
            runs = [balance(kind, seed, progress=progress, **SHORT) for seed in args.seeds]
            curves[kind], final[kind] = runs[0], [losses[-1] for losses in runs]
            what = f"influence balancing from 8, {NAMES[kind]}: loss"
            report.row(what, reference, final[kind], 1001 * SHORT["updates"])
        for kind, reference in ((PES, 278), (NRES, 287), (TruncatedES, 1137)):
            progress.set_description(f"toy regression, {NAMES[kind]}")
            runs = [tune(kind, seed, progress=progress, **LONG) for seed in args.seeds]
            # Over the last 1000 updates, since it is not the same from one to the next.
            paths[kind], sums[kind] = runs[0], [whole(run[-20:]).mean().item() for run in runs]
            what = f"toy regression from 2488, {NAMES[kind]}: loss"
            report.row(what, f"{reference} (20,000 updates)", sums[kind], 101 * LONG["updates"])
    save_picture(args.output, curves, paths)
    report.finish()
    print(f"seeds {args.seeds}; saved {args.output}")
    assert abs(whole(torch.tensor([[-4.0, -4.0]])).item() - 2488) < 1  # the same task as the reference
    assert args.quick or max(final[PES]) < 1e-12
    assert args.quick or min(final[TruncatedES]) > 100
    assert args.quick or max(sums[PES] + sums[NRES]) < 320
    assert args.quick or min(sums[TruncatedES]) > 1000


if __name__ == "__main__":
    main()
