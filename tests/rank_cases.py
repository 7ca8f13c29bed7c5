"""What the ranks of tests/test_distributed.py run: one function a case, given its rank; each returns plain results."""

from __future__ import annotations

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import zograd
from zograd import zero_order
from zograd.evaluators import Distributed, Journal, Vmap

X = torch.tensor([0.3, -1.2, 2.5])
TIMEOUT = 60.0  # of a machine under load


def cubes(x):
    return (x**3).sum()


def noisy(x):
    return (x**3).sum() + torch.randn(())


def vector(x):
    return torch.outer(x, x.exp())


def number(x):
    return float((x.double() ** 3).sum()) / 3


def plain(estimate):
    grad = estimate.vjp(torch.ones_like(estimate.value))
    return {"value": estimate.value, "coefficients": estimate.coefficients, "grad": grad}


SETTINGS = [
    {"fn": cubes, "method": "naive", "num_samples": 7},
    {"fn": cubes, "method": "forward", "num_samples": 1},  # fewer than ranks
    {"fn": noisy, "method": "antithetic", "num_samples": 5},
    {"fn": vector, "method": "antithetic", "num_samples": 5},
    {"fn": number, "method": zograd.FOURTH_ORDER, "num_samples": 4},
    {"fn": lambda x: x[:0], "method": "naive", "num_samples": 3},
    {"fn": lambda x: (x.double() ** 3).sum(), "method": "naive", "num_samples": 3},
    {"fn": lambda x: cubes(x).bfloat16(), "method": "forward", "num_samples": 3},
    {"fn": cubes, "method": "antithetic", "num_samples": 6, "distribution": zograd.distributions.Orthogonal()},
    {"fn": cubes, "method": "antithetic", "num_samples": 6, "shaping": zograd.shaping.leave_one_out},
    {"fn": lambda x: (x**2).sum(1), "x": torch.ones(4, 3), "batch_dim": 0, "method": "antithetic", "num_samples": 5},
    {"fn": cubes, "method": "antithetic", "num_samples": 300, "x": torch.ones(700), "inner": "vmap"},  # several blocks
    {"fn": cubes, "method": "antithetic", "num_samples": 9, "inner": Vmap(chunk_size=2)},
    {"fn": lambda x: (x**3).sum(1), "method": "forward", "num_samples": 9, "inner": "batched"},
]


def bits(evaluator=None):
    """The estimates of SETTINGS."""
    out = []
    for given in SETTINGS:
        given = dict(given)
        fn, x, inner = given.pop("fn"), given.pop("x", X), given.pop("inner", "loop")
        chosen = inner if evaluator is None else evaluator(inner)
        out.append(plain(zero_order(**given, seed=3, evaluator=chosen)(fn).estimate(x)))
    return out


def same_bits(rank, folder):
    return bits(lambda inner: Distributed(inner=inner, timeout=TIMEOUT))


def other_data(rank, folder):
    settings = {"num_samples": 6, "method": "forward", "seed": 3, "evaluator": Distributed(timeout=TIMEOUT)}
    return plain(zero_order(**settings)(lambda x: x.sum() * (1 + rank)).estimate(X))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x)).square().mean() + 0.1 * torch.randn(())


class Outer(torch.nn.Module):
    """A wrapper around a module that estimates."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def train(evaluator, wrap):
    torch.manual_seed(0)
    model = zograd.nn.ZeroOrder(Net(), method="antithetic", num_samples=5, sigma=0.1, evaluator=evaluator)
    data, wrapped = torch.randn(8, 3), wrap(model)
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        wrapped(data).backward()
        optimizer.step()
    return [t.detach().clone() for t in model.state_dict().values() if isinstance(t, torch.Tensor)]


def in_a_wrapper(rank, folder):
    return train(Distributed(timeout=TIMEOUT), Outer)


def in_ddp(rank, folder):
    return train(Distributed(timeout=TIMEOUT), torch.nn.parallel.DistributedDataParallel)


def counts(rank, folder):
    calls = []

    def fn(x):
        calls.append(1)
        return cubes(x)

    out = []
    for num in (1, 4, 7):
        calls.clear()
        with zograd.Tracker() as tracker:
            done = zero_order(num_samples=num, method="antithetic", seed=0, evaluator=Distributed())(fn).estimate(X)
        out.append((len(calls), done.evaluations, tracker.evaluations))
    return out


CALLS = []


def counted(x):
    CALLS.append(1)
    return (x**3).sum()


def with_journals(rank, folder):
    out = []
    for name in ("shared", f"own{rank}"):
        for _ in range(2):
            journal = Journal("loop", Path(folder) / name)
            CALLS.clear()
            done = zero_order(num_samples=7, method="antithetic", seed=3, evaluator=Distributed(inner=journal))(counted)
            out.append((plain(done.estimate(X)), len(CALLS)))
    journal = Journal(Distributed(timeout=TIMEOUT), Path(folder) / f"outside{rank}")
    for _ in range(2):
        CALLS.clear()
        done = zero_order(num_samples=7, method="antithetic", seed=3, evaluator=journal)(counted).estimate(X)
        out.append((plain(done), len(CALLS)))
    return out


def in_a_group(rank, folder):
    group = dist.new_group([0, 2])
    if rank == 1:
        try:
            zero_order(seed=3, evaluator=Distributed(group))(cubes).estimate(X)
        except zograd.RankError as error:
            return str(error)
    settings = {"num_samples": 7, "method": "antithetic", "seed": 3}
    return plain(zero_order(**settings, evaluator=Distributed(group, timeout=TIMEOUT))(cubes).estimate(X))


# ------------------------------------------------------------------------------------------------------ what goes wrong


def failing(rank, fn, x=X, **settings):
    """The error of an estimate, its cause, and the seconds it took."""
    settings = {"num_samples": 6, "method": "antithetic", "seed": 3, "evaluator": Distributed(timeout=5.0), **settings}
    begun = time.monotonic()
    try:
        zero_order(**settings)(fn).estimate(x)
    except BaseException as error:
        return type(error).__name__, str(error), repr(error.__cause__), time.monotonic() - begun
    return None


def on_rank(which, rank, act):
    """A function that acts on one rank, at its third evaluation."""
    calls = []

    def fn(x):
        calls.append(1)
        if rank == which and len(calls) == 3:
            act()
        return cubes(x)

    return fn


def raises():
    raise OSError("the simulator is gone")


def one_raises(rank, folder):
    return failing(rank, on_rank(1, rank, raises))


def one_drops(rank, folder):
    """The gradient of a function that fails at some points of one rank's slice, which the policy leaves out."""
    settings = {"num_samples": 6, "method": "antithetic", "seed": 3, "failures": zograd.failures.Drop(min_success=0.1)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fn = zero_order(**settings, evaluator=Distributed(timeout=TIMEOUT))(on_rank(1, rank, raises))
        result = fn.estimate(X)
    return {"grad": result.grad, "coefficients": result.coefficients.isnan().sum(), "warned": len(seen)}


def one_exits(rank, folder):
    return failing(rank, on_rank(1, rank, lambda: sys.exit(3)))


def one_raises_at_the_center(rank, folder):
    def fn(x):
        if rank == 1:
            raises()
        return cubes(x)

    return failing(rank, fn)


def all_raise(rank, folder):
    return failing(rank, lambda x: None)


def one_is_not_finite(rank, folder):
    return failing(rank, lambda x: x.sum() * (float("nan") if rank == 1 else 1.0))


def one_dies(rank, folder):
    return failing(rank, on_rank(1, rank, lambda: os._exit(9)))


def one_hangs(rank, folder):
    return failing(rank, on_rank(1, rank, lambda: time.sleep(8)), evaluator=Distributed(timeout=2.0))


def one_leaves(rank, folder):
    return None if rank == 1 else failing(rank, cubes)


def other_seed(rank, folder):
    return failing(rank, cubes, seed=3 + (rank == 1))


def other_parameters(rank, folder):
    return failing(rank, cubes, x=X + (1e-6 if rank == 1 else 0.0))


def other_shapes_of_parameters(rank, folder):
    return failing(rank, cubes, x=X[: 3 - (rank == 1)])


def other_points(rank, folder):
    return failing(rank, cubes, num_samples=6 + (rank == 1))


def other_directions(rank, folder):
    family = zograd.distributions.Rademacher if rank == 1 else zograd.distributions.Gaussian
    return failing(rank, cubes, distribution=family())


def other_shape_of_values(rank, folder):
    return failing(rank, lambda x: x[: 1 + rank], method="naive")


def no_replay(rank, folder):
    import numpy as np

    def sample(sample_shape):
        return torch.from_numpy(np.random.standard_normal(sample_shape))

    return failing(rank, cubes, distribution=sample)


POLITE = {
    case.__name__: case
    for case in (
        one_raises,
        one_raises_at_the_center,
        one_exits,
        all_raise,
        one_is_not_finite,
        other_seed,
        other_parameters,
        other_shapes_of_parameters,
        other_points,
        other_directions,
        other_shape_of_values,
        no_replay,
    )
}


def polite(rank, folder):
    """What goes wrong and leaves the group whole, one after the other."""
    return {name: case(rank, folder) for name, case in POLITE.items()}


def main():
    """Run a case as one of its ranks: name, rank, ranks, rendezvous file, folder."""
    name, rank, ranks, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.save(globals()[name](rank, folder), f"{folder}/result{rank}")
    os._exit(0)  # the others may be gone, which torch's own end of the group would wait for
