"""A smooth deterministic bilevel problem: ridge penalties by the error of the refit on other rows."""

import math

import torch
from sklearn.datasets import load_diabetes


def diabetes(seed):
    """Rows and values to fit, 60 of them, and 200 others to validate on."""
    data = load_diabetes()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    rows, values = torch.tensor(data.data)[order], torch.tensor(data.target)[order]
    rows, values = (rows - rows.mean(0)) / rows.std(0), (values - values.mean()) / values.std()
    return rows[:60], values[:60], rows[60:260], values[60:260]


def refit_error(log_penalties, rows, values, new_rows, new_values):
    """Validation error of the ridge regression with one penalty a feature."""
    normal = rows.T @ rows + log_penalties.clamp(-8, 12).exp().diag()
    return (new_rows @ torch.linalg.solve(normal, rows.T @ values) - new_values).square().mean()


def lowest(fn, x):
    """What L-BFGS finds with the exact gradient."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = fn(x)
        value.backward()
        return value

    optimizer.step(closure)
    return fn(x).item()


def hill_climb(fn, x, budget, seed, step=0.3):
    """A (1+1) evolution strategy with the one-fifth rule: its best value after each evaluation."""
    generator = torch.Generator().manual_seed(seed)
    best, history = fn(x).item(), []
    for _ in range(budget):
        history.append(best)
        candidate = x + step * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        value = fn(candidate).item()
        step *= math.exp(0.4 if value <= best else -0.1)
        if value <= best:
            x, best = candidate, value
    return history


def descend(fn, x, lr, budget, cost):
    """Adam on the gradient that ``fn`` gives, where a step costs ``cost`` evaluations."""
    x = x.clone().requires_grad_()
    optimizer, best, history = torch.optim.Adam([x], lr=lr), math.inf, []
    while len(history) + cost <= budget:
        optimizer.zero_grad()
        value = fn(x)
        value.backward()
        optimizer.step()
        best = min(best, value.item())
        history += [best] * cost
    return history + [best] * (budget - len(history))
