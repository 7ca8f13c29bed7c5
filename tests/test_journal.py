"""The journal: a run that was stopped goes on with the same bits, and nothing damaged or foreign is believed."""

import collections
import copy
import dataclasses
import functools
import math
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import tqdm

import zograd
from zograd import zero_order
from zograd.evaluators import Batched, Evaluator, Journal, Loop, Vmap
from zograd.schemes import SCHEMES


class Stop(BaseException):
    """What ends a run: not for anybody's `except Exception`."""


class Fn:
    """A function that counts its calls and stops before one of them."""

    def __init__(self, out=lambda x: (x**3).sum()):
        self.out = out
        self.calls = 0
        self._plan = [None]  # in a list, which is no input of fn to a journal

    @property
    def stop_at(self):
        return self._plan[0]

    @stop_at.setter
    def stop_at(self, calls):
        self._plan[0] = calls

    def __call__(self, x, *others, **named):
        if self.calls == self.stop_at:
            raise Stop("stopped")
        self.calls += 1
        return self.out(x)


X = torch.tensor([0.3, -1.2, 2.5])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.journal"


def same(a, b):
    assert torch.equal(a.value, b.value)
    assert a.value.dtype == b.value.dtype
    assert torch.equal(a.coefficients, b.coefficients)
    if a.flat is not None:
        assert torch.equal(a.flat, b.flat)


OUTS = {
    "float32": lambda x: (x**3).sum(),
    "float64": lambda x: (x.double() ** 3).sum(),
    "bfloat16": lambda x: (x**3).sum().bfloat16(),
    "a Python number": lambda x: float((x.double() ** 3).sum()) / 3,
    "numpy": lambda x: np.float64(float((x.double() ** 3).sum())),
    "a vector": lambda x: x * 3,
    "a matrix": lambda x: torch.outer(x, x.exp()),
    "nothing in it": lambda x: x[:0],
}


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_stopped_at_any_evaluation_it_goes_on_with_the_same_bits(path, scheme):
    settings = {"method": scheme, "num_samples": 5, "seed": 3}
    fn = Fn()
    whole = zero_order(**settings)(fn).estimate(X)
    for stop_at in range(whole.evaluations):
        fn, at = Fn(), Path(f"{path}{stop_at}")
        journaled = zero_order(**settings, evaluator=Journal("loop", at))(fn)
        fn.stop_at = stop_at
        with pytest.raises(Stop, match="stopped"):
            journaled.estimate(X)
        fn.stop_at = None
        again = journaled.estimate(X)
        same(again, whole)
        assert again.evaluations == whole.evaluations - stop_at
        assert fn.calls == whole.evaluations
        same(journaled.estimate(X), whole)
        assert fn.calls == whole.evaluations


@pytest.mark.parametrize("out", OUTS.values(), ids=OUTS.keys())
def test_values_of_every_kind_come_back_as_they_were(path, out):
    fn = Fn(out)
    settings = {"method": "forward", "num_samples": 5, "seed": 3}
    whole = zero_order(**settings)(fn).estimate(X)
    journaled = zero_order(**settings, evaluator=Journal(Loop(), path))(fn)
    same(journaled.estimate(X), whole)
    fn.calls = 0
    same(journaled.estimate(X), whole)
    assert fn.calls == 0


def vector(x):
    return (x**3).sum(dim=-1)


@pytest.mark.parametrize("inner", [Vmap(chunk_size=3), Vmap(chunk_size=16), Batched(chunk_size=4)], ids=repr)
@pytest.mark.parametrize("method", ["naive", "antithetic"])
def test_evaluators_of_many_points_are_resumed_by_whole_calls(path, inner, method):
    settings = {"method": method, "num_samples": 50, "seed": 3, "sigma": 0.1}
    whole = zero_order(**settings, evaluator=inner)(vector).estimate(X)
    journal = Journal(inner, path)

    def stopped_after(pieces):
        class Stopped(Evaluator):
            batched = inner.batched

            def center(self, fn, points):
                return journal.center(fn, points)

            def values(self, fn, points, lo=0, hi=None):
                for n, piece in enumerate(journal.values(fn, points, lo, hi), 1):
                    if n == pieces:
                        raise Stop("stopped")
                    yield piece

        return Stopped()

    for pieces in (1, 2, 3):
        with pytest.raises(Stop, match="stopped"):
            zero_order(**settings, evaluator=stopped_after(pieces))(vector).estimate(X)
    again = zero_order(**settings, evaluator=journal)(vector).estimate(X)
    same(again, whole)
    assert again.evaluations < whole.evaluations
    replayed = zero_order(**settings, evaluator=journal)(vector).estimate(X)
    same(replayed, whole)
    assert replayed.evaluations == 0


class Shuffled(Evaluator):
    """Evaluates in a random order, tells of each value as it comes and yields them in order, as workers would."""

    def values(self, fn, points, lo=0, hi=None):
        hi, sides = len(points.directions) if hi is None else hi, len(points.offsets)
        tasks = [(i, j) for i in range(lo, hi) for j in range(sides)]
        random.Random(lo).shuffle(tasks)
        values, arrived, fn.arrived = {}, fn.arrived, None
        for i, j in tasks:
            answer = fn.evaluate(points.only(points.offsets[j : j + 1]), i, i + 1)
            values[i, j] = fn.take(answer, points)[0, 0]
            if arrived is not None:
                arrived(i * sides + j, values[i, j])
        for i in range(lo, hi):
            yield type(answer)(torch.stack([values[i, j] for j in range(sides)])[None])


@pytest.mark.parametrize("stop_at", [0, 1, 2, 7, 18, 40, 60])
def test_values_that_come_in_any_order_are_kept_as_they_come(path, stop_at):
    settings = {"method": "fourth_order", "num_samples": 15, "seed": 3}
    fn = Fn()
    whole = zero_order(**settings)(fn).estimate(X)
    fn.calls, fn.stop_at = 0, stop_at
    journaled = zero_order(**settings, evaluator=Journal(Shuffled(), path))(fn)
    with pytest.raises(Stop, match="stopped"):
        journaled.estimate(X)
    fn.stop_at = None
    again = journaled.estimate(X)
    same(again, whole)
    assert fn.calls == whole.evaluations == again.evaluations + stop_at


class Silent(Shuffled):
    """Tells nobody before it yields."""

    def values(self, fn, points, lo=0, hi=None):
        fn.arrived = None
        return super().values(fn, points, lo, hi)


def test_values_of_an_evaluator_that_tells_nothing_are_kept_as_they_are_yielded(path):
    journaled = zero_order(num_samples=6, seed=0, evaluator=Journal(Silent(), path))(fn := Fn())
    journaled.estimate(X)
    journaled.estimate(X)
    assert fn.calls == 7


def test_another_evaluator_may_go_on(path):
    settings = {"method": "antithetic", "num_samples": 20, "seed": 3}
    first = zero_order(**settings, evaluator=Journal("loop", path))(vector).estimate(X)
    second = zero_order(**settings, evaluator=Journal("vmap", path))(vector).estimate(X)
    same(first, second)
    assert second.evaluations == 0


def test_slices_and_nested_arguments(path):
    def fn(params, scale, *, labels):
        calls.append(0)
        return scale * (params["a"] ** 3 + params["b"] * labels["y"]).sum(dim=1)

    calls = []
    params = {"a": torch.randn(4, 3), "b": torch.randn(4, 3)}
    settings = {"num_samples": 6, "seed": 1, "batch_dim": 0}
    whole = zero_order(**settings)(fn).estimate(params, 2.0, labels={"y": torch.ones(3)})
    journaled = zero_order(**settings, evaluator=Journal("loop", path))(fn)
    for _ in range(2):
        calls.clear()
        again = journaled.estimate(params, 2.0, labels={"y": torch.ones(3)})
        same(again, whole)
    assert not calls


def test_a_run_with_an_optimizer_and_a_generator(path):
    def run(evaluator, fn):
        x = X.clone().requires_grad_()
        decorated = zero_order(num_samples=4, generator=torch.Generator().manual_seed(5), evaluator=evaluator)(fn)
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            decorated(x).backward()
            optimizer.step()
        return x.detach()

    whole = run("loop", Fn())
    for stop_at in (17, 29):
        fn = Fn()
        fn.stop_at = stop_at
        with pytest.raises(Stop, match="stopped"):
            run(Journal("loop", f"{path}{stop_at}"), fn)
        fn.stop_at = None
        assert torch.equal(run(Journal("loop", f"{path}{stop_at}"), fn), whole)
        assert fn.calls == 30


def test_what_fn_draws_from_torch_is_the_same_on_replay_and_the_state_is_left_alone(path):
    noisy = lambda x: (x**3).sum() + torch.randn(())  # noqa: E731
    settings = {"method": "forward", "num_samples": 6}
    torch.manual_seed(1)
    whole = zero_order(**settings)(noisy).estimate(X)
    after = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(1)
        same(zero_order(**settings, evaluator=Journal("loop", path))(noisy).estimate(X), whole)
        assert torch.equal(torch.get_rng_state(), after)


def test_an_fn_that_uses_autograd_is_known_to_on_replay(path):
    """The center shows whether points must require grad: without it, a point's value would be another."""
    other = torch.tensor(2.0)

    def trains_inside(x):
        if plan == [len(calls)]:  # after the center, which is evaluated twice, and one point
            raise Stop("stopped")
        calls.append(0)
        y = other.clone().requires_grad_()
        loss = (x**2).sum() * y + y
        loss.backward()
        return x.grad.sum() + y.grad if x.grad is not None else y.grad * 0

    calls, plan = [], []  # lists, which are no input of fn to a journal
    settings = {"num_samples": 4, "seed": 0}
    whole = zero_order(**settings)(trains_inside).estimate(X)
    calls.clear()
    plan.append(3)
    with pytest.raises(Stop, match="stopped"):
        zero_order(**settings, evaluator=Journal("loop", path))(trains_inside).estimate(X)
    plan.clear()
    calls.clear()
    same(zero_order(**settings, evaluator=Journal("loop", path))(trains_inside).estimate(X), whole)
    assert len(calls) == 3  # of five points and the center once more, two points and the center were there


class Normed(torch.nn.Module):
    """A module whose evaluations leave traces: a buffer and an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)
        self.seen = 0

    def forward(self, x):
        global evaluations
        if evaluations == stop_module_at[0]:
            raise Stop("stopped")
        evaluations += 1
        self.seen += 1
        return self.norm(self.linear(x)).sign().mean() + self.linear.weight.square().sum()


evaluations, stop_module_at = 0, [None]  # in a list, which is no input of forward to a journal


def test_a_module_has_the_traces_of_its_center_on_replay(path):
    global evaluations

    def run(evaluator):
        net = zograd.nn.ZeroOrder(
            Normed(), num_samples=3, evaluator=evaluator, generator=torch.Generator().manual_seed(0)
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            net(torch.arange(12.0).view(4, 3) * (step + 1)).backward()
            optimizer.step()
        return net

    whole = run("loop")
    evaluations, stop_module_at[0] = 0, 10  # in the third estimate, after its center and one point
    with pytest.raises(Stop, match="stopped"):
        run(Journal("loop", path))
    stop_module_at[0] = None
    with zograd.Tracker() as t:
        again = run(Journal("loop", path))
    assert t.evaluations == evaluations - 10 == 2 + 1 + 2 + 4  # three centers again, what was left, the last estimate
    assert again.module.seen == whole.module.seen == 4
    states = whole.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name


def test_values_that_are_not_finite_are_evaluated_again(path):
    bad = [math.inf]
    journaled = zero_order(num_samples=5, seed=0, evaluator=Journal("loop", path))(
        fn := Fn(lambda x: x.sum() * (bad[0] if fn.calls == 4 else 1.0))
    )
    with pytest.raises(zograd.NonFiniteError, match="direction 2"):
        journaled.estimate(X)
    fn.calls = 0
    estimate = journaled.estimate(X)
    assert estimate.evaluations == fn.calls == 3  # the one that failed, and what came after


def test_values_that_ended_an_estimate_are_evaluated_again_by_the_policy_that_refused_them(path):
    bad = [True]
    settings = {"num_samples": 10, "seed": 0, "failures": zograd.failures.Drop(min_success=0.9)}
    journaled = zero_order(**settings, evaluator=Journal("loop", path, key=lambda x: 0))(
        lambda x: x.sum() * (math.nan if bad[0] and x[0] > 0.3 else 1.0)
    )
    with pytest.raises(zograd.EvaluationError, match=r"`Drop\(min_success=0.9\)`"):
        journaled.estimate(X)
    bad[0] = False
    found = journaled.estimate(X)
    assert found.failures == 0
    assert torch.equal(found.grad, zero_order(num_samples=10, seed=0)(lambda x: x.sum()).estimate(X).grad)


def test_values_that_are_not_finite_and_were_accepted_are_kept(path):
    class Accepting(Evaluator):
        """Looks at the values that the policy accepts, and has them take no part."""

        def __init__(self):
            self.journal = Journal("loop", path)

        def center(self, fn, points):
            return self.journal.center(fn, points)

        def values(self, fn, points, lo=0, hi=None):
            for answer in self.journal.values(fn, points, lo, hi):
                seen.append(answer.values)
                yield dataclasses.replace(answer, values=answer.values.nan_to_num(nan=0.0))

    seen = []
    journaled = zero_order(num_samples=5, seed=0, evaluator=Accepting(), failures=zograd.failures.Drop())(
        fn := Fn(lambda x: x.sum() * (math.nan if fn.calls == 4 else 1.0))
    )
    first = journaled.estimate(X)
    assert sum(int(values.isnan().sum()) for values in seen) == 1
    fn.calls = 0
    same(journaled.estimate(X), first)
    assert fn.calls == 0
    assert sum(int(values.isnan().sum()) for values in seen) == 2


# --------------------------------------------------------------------------------------------------------------- key


def test_whatever_differs_is_evaluated(path):
    def calls(fn=None, x=X, args=(1.0,), **settings):
        fn = fn or Fn()
        fn.calls = 0
        options = {"num_samples": 4, "seed": 0, "evaluator": Journal("loop", path)} | settings
        zero_order(**options)(fn).estimate(x, *args)
        return fn.calls

    assert calls() == 5
    assert calls() == 0
    for different in (
        {"x": X + 1e-7},
        {"x": X.double()},
        {"x": X.view(3, 1)},
        {"args": (1.5,)},
        {"args": (1,)},
        {"args": (np.float64(1.0),)},
        {"args": (torch.tensor(1.0),)},
        {"args": ([1.0],)},
        {"args": ((1.0,),)},
        {"args": (1.0, None)},
        {"args": ("1.0",)},
        {"args": ({"a": 1.0},)},
        {"args": ({"b": 1.0},)},
        {"args": (np.ones((2, 3)),)},
        {"args": (np.ones((3, 2)),)},
        {"args": (np.ones((2, 3), dtype=np.float32),)},
        {"args": (torch.ones(2, 3, dtype=torch.int32),)},
        {"args": (torch.ones(2, 3),)},
        {"args": (torch.ones(2, 3).t(),)},
        {"seed": 1},
        {"sigma": 0.5},
        {"num_samples": 5},
        {"method": "forward"},
        {"method": "antithetic"},
        {"distribution": zograd.distributions.Rademacher()},
        {"distribution": zograd.distributions.Sphere()},
    ):
        assert (
            calls(**different)
            == different.get("num_samples", 4) * (2 if different.get("method") == "antithetic" else 1) + 1
        ), different
        assert calls(**different) == 0, different
    assert calls() == 0
    with torch.autocast("cpu"):
        assert calls() == 5


def test_equal_contents_are_found_again_whatever_they_are_in_memory(path):
    fn = Fn()
    journaled = zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(fn)
    journaled.estimate(X, torch.arange(6.0).view(2, 3).t(), a={1, "b"}, b=Path("x"), c=float("nan"))
    journaled.estimate(
        X.repeat(2)[3:], torch.arange(6.0).view(2, 3).t().contiguous(), a={"b", 1}, b=Path("x"), c=float("nan")
    )
    assert fn.calls == 5


def test_the_order_of_a_dict_counts(path):
    """What fn makes of its items may depend on it."""
    fn = Fn(lambda tree: torch.stack(list(tree.values())) @ torch.tensor([1.0, 5.0]))
    journaled = zero_order(num_samples=2, seed=3, evaluator=Journal("loop", path))(fn)
    values = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    first = journaled.estimate(values)
    assert journaled.estimate(dict(values)).evaluations == 0
    other = journaled.estimate({key: values[key] for key in "ba"})
    assert other.evaluations == first.evaluations
    assert (first.value, other.value) == (11, 7)


def test_what_fn_reads_elsewhere_counts(path):
    def made(factor, weights, model, log):
        def fn(x):
            log.append(0)
            return factor * (x * weights).sum() + model(x).sum()

        return zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(fn)

    log, model = [], torch.nn.Linear(3, 1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.bias += 1
    for factor, weights, net, fresh in (
        (1.0, torch.ones(3), model, 5),
        (1.0, torch.ones(3), copy.deepcopy(model), 0),
        (2.0, torch.ones(3), model, 5),
        (1.0, torch.ones(3) * 2, model, 5),
        (1.0, torch.ones(3), other, 5),
        (1.0, torch.ones(3), copy.deepcopy(model).eval(), 5),
    ):
        before = len(log)
        made(factor, weights, net, log).estimate(X)
        assert len(log) - before == fresh


SCALE, COUNT = 1.0, 0


def reads_a_global(x):
    global COUNT
    COUNT += 1
    return SCALE * x.sum()


def test_globals_count_and_what_fn_assigns_to_does_not(path, monkeypatch):
    journaled = zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(reads_a_global)
    for scale, fresh in ((1.0, 5), (1.0, 0), (2.0, 5), (1.0, 0)):
        before = COUNT
        monkeypatch.setitem(globals(), "SCALE", scale)
        journaled.estimate(X)
        assert COUNT - before == fresh


@dataclasses.dataclass
class Config:
    value: Any
    calls: int = 0


class Pair(NamedTuple):
    name: str
    value: Any


class Slotted:
    __slots__ = ("__hidden",)

    def __init__(self, value):
        self.__hidden = value

    def __call__(self, x):
        return (x * self.__hidden).sum()


class Agent:
    def __init__(self, value):
        self.inner = types.SimpleNamespace(value=value)
        self.calls = self.outer = 0
        self.log = []
        self.random = random.Random(0)

    def act(self, x):
        self.calls += 1
        self.log.append(x)
        self.random.gauss(0, 1)
        return self.helper(x)

    def helper(self, x):
        return (x * self.inner.value).sum()


def of_the_class(held):
    class Own:
        value = held

        def __call__(self, x):
            return (x * self.value).sum()

    return Own()


def with_function(value):
    def outer(x):
        return helper(x)

    def helper(x):
        return (x * value).sum()

    return outer


def with_local(value):
    config = Config(value)

    def fn(x):
        value = 2.0  # a variable of fn's own, and no attribute of the config
        return (lambda: (x * value * config.value).sum())()

    return fn


HOLDERS = {
    "a dataclass": lambda v: (lambda c: lambda x: (x * c.value).sum())(Config(v)),
    "a namedtuple": lambda v: (lambda c: lambda x: (x * c.value).sum())(Pair("a", v)),
    "a tuple": lambda v: (lambda c: lambda x: (x * c[1][0]).sum())((0, (v,))),
    "an object": lambda v: (lambda a: lambda x: a.act(x))(Agent(v)),
    "a method": lambda v: Agent(v).act,
    "slots": lambda v: (lambda s: lambda x: s(x))(Slotted(v)),
    "a class attribute": of_the_class,
    "a function that it calls": with_function,
    "a function inside": lambda v: lambda x: (lambda y: (y * v).sum())(x),
    "a decorator": lambda v: torch.no_grad()(with_function(v)),
    "a cache": lambda v: (lambda f: lambda x: f(x))(functools.lru_cache(None)(with_function(v))),
    "a partial": lambda v: (lambda p: lambda x: p(x))(functools.partial(lambda held, x: (x * held).sum(), v)),
    "an estimate inside": lambda v: (lambda f: lambda x: f.fn(x))(zero_order(seed=0)(with_function(v))),
    "a default": lambda v: lambda x, *, held=Config(v): (x * held.value).sum(),  # noqa: B008
    "a name that it assigns to": with_local,
}


@pytest.mark.parametrize("where", HOLDERS)
@pytest.mark.parametrize("made", [float, torch.tensor, np.float64, lambda v: torch.full((3,), v)])
def test_what_fn_reads_counts_wherever_it_is(path, where, made):
    def run(value):
        fn = HOLDERS[where](made(value))
        got = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))(fn).estimate(X)
        torch.testing.assert_close(got.value.double(), HOLDERS[where](value)(X).double())
        again = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))(fn).estimate(X)
        assert again.evaluations == 0  # fn's own counts and logs are no inputs
        return got.evaluations

    assert [run(v) for v in (1.0, 1.0, 2.0, 1.0)] == [3, 0, 3, 0]


def test_a_module_in_an_object_counts(path):
    def fresh(net):
        agent = types.SimpleNamespace(policy=Pair("a", Config(net)))
        journaled = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))
        return journaled(lambda x: agent.policy.value.value(x).sum()).estimate(X).evaluations

    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    net.forward = functools.partial(lambda net, x: torch.nn.Sequential.forward(net, x[None]), net)
    assert (fresh(net), fresh(copy.deepcopy(net))) == (3, 0)
    for change in (
        lambda n: torch.nn.init.zeros_(n[0].bias),
        lambda n: n[1].running_mean.fill_(1.0),
        lambda n: setattr(n[1], "eps", 0.1),
    ):
        other = copy.deepcopy(net)
        change(other)
        assert (fresh(other), fresh(net)) == (3, 0)


def test_what_is_held_in_two_places_counts_as_such(path):
    def fresh(*held):
        journaled = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))
        return journaled(lambda x: x.sum() * (held[2].value + 2 * held[0].value)).estimate(X).evaluations

    one, other = Config(1.0), Config(2.0)
    assert [fresh(one, other, one), fresh(one, other, other), fresh(one, other, one)] == [3, 3, 0]


def test_tools_of_libraries_that_count_themselves_are_no_inputs(path, tmp_path):
    stream = (tmp_path / "bar").open("w")
    bar = tqdm.tqdm(file=stream)

    def fn(x):
        bar.update()
        return x.sum()

    journaled = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))(fn)
    assert [journaled.estimate(X).evaluations for _ in range(3)] == [3, 0, 0]
    stream.close()


class Simulator:
    def __init__(self, gravity):
        self.gravity = gravity


def uses(x, simulator):
    CALLS.append(0)
    return x.sum() * simulator.gravity


CALLS = []


def test_what_has_no_digest_asks_for_a_key(path):
    with pytest.raises(TypeError, match=r"`Journal\(key=...\)` is needed: an argument of `uses` has no.*Simulator"):
        zero_order(evaluator=Journal("loop", path))(uses).estimate(X, Simulator(9.8))
    with pytest.raises(TypeError, match=r"what `Journal\(key=...\)` returned has no digest.*Simulator"):
        zero_order(evaluator=Journal("loop", path, key=lambda x, s: s))(uses).estimate(X, Simulator(9.8))
    by_gravity = Journal("loop", path, key=lambda x, simulator: simulator.gravity)
    journaled = zero_order(num_samples=4, seed=0, evaluator=by_gravity)(uses)
    CALLS.clear()
    for gravity, total in ((9.8, 5), (9.8, 5), (1.6, 10), (9.8, 10)):
        journaled.estimate(X, Simulator(gravity))
        assert len(CALLS) == total
    journaled.estimate(X + 1, Simulator(9.8))  # the differentiated tensors always count
    assert len(CALLS) == 15


def under(x, scales, settings):
    return x.sum() * scales[0] * settings["gravity"]


def test_the_arguments_that_a_partial_holds_count(path):
    """They are arguments: another list or dict in one is another estimate, and no log."""
    for scale, gravity, fresh in ((1.0, 9.8, 3), (1.0, 9.8, 0), (2.0, 9.8, 3), (1.0, 1.6, 3)):
        held = functools.partial(under, scales=[scale], settings={"gravity": gravity})
        got = zero_order(num_samples=2, seed=0, evaluator=Journal("loop", path))(held).estimate(X)
        assert got.evaluations == fresh
        torch.testing.assert_close(got.value, X.sum() * scale * gravity)
    held = functools.partial(uses, simulator=Simulator(9.8))
    other = Journal("loop", f"{path} of another")
    with pytest.raises(TypeError, match=r"is needed: an argument that `partial` holds has no digest.*Simulator"):
        zero_order(evaluator=other)(held).estimate(X)


def test_the_key_of_a_module_is_called_with_the_arguments_of_forward(path):
    seen = []
    net = zograd.nn.ZeroOrder(
        torch.nn.Linear(3, 1), seed=0, evaluator=Journal("loop", path, key=lambda *args: seen.append(args) or 1)
    )
    net(X[None])
    assert torch.equal(seen[0][0], X[None])


@pytest.mark.parametrize(
    "value",
    [object(), np.array([object()]), random.Random(0), torch.Generator(), threading.Lock(), torch.ones(2).to("meta")],
    ids=lambda v: type(v).__name__,
)
def test_values_without_a_digest(value, path):
    with pytest.raises(TypeError, match=r"Journal\(key=...\)` is needed: an argument of `Fn` has no digest"):
        zero_order(evaluator=Journal("loop", path))(Fn()).estimate(X, [value])


def test_directions_that_cannot_be_made_again_are_refused(path):
    generator = np.random.default_rng(0)
    sample = lambda shape: torch.from_numpy(generator.standard_normal(tuple(shape)))  # noqa: E731
    with pytest.raises(zograd.ReplayError, match=r"`Journal`: the directions of .* cannot be made again"):
        zero_order(sample, evaluator=Journal("loop", path))(Fn()).estimate(X)


# -------------------------------------------------------------------------------------------------- the file's header


def change_header(path, name, text):
    connection = sqlite3.connect(path)
    connection.execute("UPDATE header SET text = ? WHERE name = ?", (text, name))
    connection.commit()
    connection.close()


@pytest.mark.parametrize("name", ["format", "zograd version", "torch version", "Python version", "function"])
def test_a_journal_of_something_else_is_refused(path, name):
    journal = Journal("loop", path)
    zero_order(num_samples=4, seed=0, evaluator=journal)(Fn()).estimate(X)
    journal.close()
    change_header(path, name, "0.0")
    with pytest.raises(zograd.JournalError, match=f"journal of another run: its {name} is 0.0, now it is"):
        zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(Fn()).estimate(X)


def test_a_journal_of_another_function_is_refused(path):
    zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(vector).estimate(X)
    with pytest.raises(zograd.JournalError, match=r"its function is .*vector, now it is .*Fn"):
        zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(Fn()).estimate(X)


def versions(text):
    scope = {"__name__": "program"}
    exec(text, scope)
    return scope["fn"]


def test_a_function_whose_code_changed_is_refused_and_comments_may_change(path):
    def estimate(text):
        return zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(versions(text)).estimate(X)

    estimate("def fn(x):\n    return (x * 2).sum()")
    assert estimate("def fn(x):\n    # twice\n\n    return (x * 2).sum()").evaluations == 0
    for changed in ("(x * 3).sum()", "(x + 2).sum()", "(x * 2).mean()", "(lambda y: (y * 2).sum())(x)"):
        with pytest.raises(zograd.JournalError, match="its function's code is"):
            estimate(f"def fn(x):\n    return {changed}")


def test_other_files_are_refused(tmp_path):
    text, database = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("my notes\n" * 1000)
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    connection.close()
    for path, match in (
        (text, "is damaged: file is not a database"),
        (database, "is a database of another program"),
        (tmp_path / "nowhere" / "j", "cannot be read or written: unable to open"),
        (tmp_path, "cannot be read or written: unable to open"),
    ):
        with pytest.raises(zograd.JournalError, match=match):
            zero_order(evaluator=Journal("loop", path))(Fn()).estimate(X)
    assert text.read_text() == "my notes\n" * 1000


# ---------------------------------------------------------------------------------------------------- damaged journals


def a_whole_journal(path, **settings):
    journal = Journal("loop", path)
    estimate = zero_order(method="antithetic", num_samples=40, seed=3, evaluator=journal)(Fn()).estimate(X)
    journal.close()
    return estimate


def right_or_named(path, whole):
    """Whether a run on this file gave the right gradient; a named error is the other possibility."""
    journal = Journal("loop", path)
    try:
        same(zero_order(method="antithetic", num_samples=40, seed=3, evaluator=journal)(Fn()).estimate(X), whole)
    except zograd.JournalError:
        return False
    finally:
        journal.close()
    return True


@pytest.mark.parametrize("kind", ["truncated", "a byte changed", "a page of noise", "zeros at the end"])
def test_a_damaged_journal_is_an_error_or_gives_the_right_gradient(tmp_path, kind):
    whole = a_whole_journal(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    chance, right = random.Random(0), collections.Counter()
    for k in range(60):
        broken, at = bytearray(data), chance.randrange(len(data))
        if kind == "truncated":
            del broken[at:]
        elif kind == "a byte changed":
            broken[at] ^= 1 << chance.randrange(8)
        elif kind == "a page of noise":
            broken[at : at + 4096] = chance.randbytes(4096)
        else:
            broken[at:] = bytes(len(broken) - at)
        path = tmp_path / f"{k}"
        path.write_bytes(broken)
        right[right_or_named(path, whole)] += 1
    assert right[False] > 5


def test_a_value_that_was_changed_is_noticed(path):
    whole = a_whole_journal(path)
    connection = sqlite3.connect(path)
    ((data,),) = connection.execute("SELECT data FROM value WHERE point = 7").fetchall()
    connection.execute("UPDATE value SET data = ? WHERE point = 7", (data[:-1] + bytes([data[-1] ^ 1]),))
    connection.commit()
    connection.close()
    with pytest.raises(zograd.JournalError, match="is damaged: the row of point 7 does not fit its checksum"):
        right_or_named_raises(path, whole)


def right_or_named_raises(path, whole):
    journal = Journal("loop", path)
    try:
        same(zero_order(method="antithetic", num_samples=40, seed=3, evaluator=journal)(Fn()).estimate(X), whole)
    finally:
        journal.close()


def test_an_empty_file_is_a_new_journal(path):
    path.touch()
    assert right_or_named(path, zero_order(method="antithetic", num_samples=40, seed=3)(Fn()).estimate(X))


def test_nothing_is_unpickled():
    source = Path(zograd.__file__).parent
    for name in ("journal_file.py", "journal.py"):
        text = (source / "evaluators" / name).read_text()
        assert not any(word in text for word in ("pickle", "torch.load", "eval(", "exec(", "marshal", "shelve"))


# ------------------------------------------------------------------------------------------- processes and their death


PROGRAM = """
import sys, time, torch, zograd

calls = open(sys.argv[2], "a", buffering=1)

@zograd.zero_order(method="antithetic", num_samples=8, sigma=0.1, generator=torch.Generator().manual_seed(0),
                   evaluator=zograd.evaluators.Journal("loop", sys.argv[1]))
def loss(x):
    calls.write("%s\\n" % x.tolist())
    time.sleep(0.002)
    return ((x - 1) ** 4).sum() + torch.randn(()) * 0.01

if __name__ == "__main__":
    torch.set_num_threads(1)
    x = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for step in range(12):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    print(x.tolist())
"""


def run_program(program, journal, calls, *, kill_after=None):
    command = [sys.executable, str(program), str(journal), str(calls)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if kill_after is not None:
        deadline = time.monotonic() + 60
        while len(calls.read_bytes().splitlines()) < kill_after and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    return out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_kill_9_and_resume(tmp_path):
    program, total, kills = tmp_path / "program.py", 12 * 17, (40, 90, 150)
    program.write_text(PROGRAM)
    for name in ("a", "b"):
        (tmp_path / f"calls {name}").touch()
    whole = run_program(program, tmp_path / "a", tmp_path / "calls a")
    for kill_after in kills:
        assert not run_program(program, tmp_path / "b", tmp_path / "calls b", kill_after=kill_after)
    assert run_program(program, tmp_path / "b", tmp_path / "calls b") == whole
    calls = (tmp_path / "calls b").read_text().splitlines()
    assert total <= len(calls) <= total + len(kills)
    assert set(calls) == set((tmp_path / "calls a").read_text().splitlines())


def estimate_in(path, queue):
    fn = Fn()
    with zograd.Tracker() as t:
        grad = zero_order(method="antithetic", num_samples=100, seed=3, evaluator=Journal("loop", path))(fn).estimate(X)
    queue.put((grad.grad.tolist(), t.evaluations))


@pytest.mark.slow
def test_two_processes_at_once(path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=estimate_in, args=(path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    plain = zero_order(method="antithetic", num_samples=100, seed=3)(Fn()).estimate(X)
    assert [grad for grad, _ in results] == [plain.grad.tolist()] * 2
    assert zero_order(method="antithetic", num_samples=100, seed=3, evaluator=Journal("loop", path))(
        fn := Fn()
    ).estimate(X)
    assert fn.calls == 0


def test_threads_share_a_journal(path):
    journal = Journal("loop", path)
    wanted = [zero_order(num_samples=20, seed=k)(Fn()).estimate(X).grad for k in range(4)]
    got = {}

    def work(k):
        got[k] = [zero_order(num_samples=20, seed=k, evaluator=journal)(Fn()).estimate(X).grad for _ in range(3)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(grad, wanted[k]) for k in range(4) for grad in got[k])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_opens_its_own_connection(path):
    journal = Journal("loop", path)
    journaled = zero_order(num_samples=4, seed=0, evaluator=journal)(Fn())
    journaled.estimate(X)
    mine = journal._file._connection
    journal._file._pid -= 1  # as a child would find it
    journaled.estimate(X)
    assert journal._file._connection is not mine
    mine.close()


# ----------------------------------------------------------------------------------------------------------- the object


def test_it_copies_pickles_compares_and_shows_itself(path):
    journal = Journal(Vmap(chunk_size=3), path)
    zero_order(num_samples=4, seed=0, evaluator=journal)(vector).estimate(X)
    for twin in (copy.deepcopy(journal), pickle.loads(pickle.dumps(journal))):
        assert twin == journal
        assert hash(twin) == hash(journal)
        assert zero_order(num_samples=4, seed=0, evaluator=twin)(vector).estimate(X).evaluations == 0
    assert journal != Journal("loop", path)
    assert repr(journal) == f"Journal(Vmap(chunk_size=3), {str(path)!r})"
    assert Journal("batched", path).batched
    assert not journal.batched


@pytest.mark.parametrize(
    ("args", "settings", "error", "match"),
    [
        (("pool", "x"), {}, ValueError, r"`Journal\(inner\)` must be one of 'loop', 'vmap', 'batched' or an Evaluator"),
        ((Loop, "x"), {}, TypeError, r"`Journal\(inner\)` must be an instance, got the class Loop: add"),
        (("loop", 3), {}, TypeError, r"`Journal\(path=...\)` must be a path, got int 3"),
        (("loop", "x"), {"key": "k"}, TypeError, r"`Journal\(key=...\)` must be a function or None, got str 'k'"),
    ],
)
def test_bad_settings(args, settings, error, match):
    with pytest.raises(error, match=match):
        Journal(*args, **settings)


def test_a_function_of_another_shape_on_replay_is_told(path):
    shapes = [3]
    journaled = zero_order(num_samples=4, seed=0, evaluator=Journal("loop", path))(
        fn := Fn(lambda x: x.repeat(shapes[0]))
    )
    fn.stop_at = 3
    with pytest.raises(Stop, match="stopped"):
        journaled.estimate(X)
    fn.stop_at, shapes[0] = None, 2
    with pytest.raises(ValueError, match=r"must return one shape at all points, got .6,. after .9,."):
        journaled.estimate(X)


class Halves(Evaluator):
    """Asks a journal for two parts of the directions, as ranks that share the work would."""

    def __init__(self, journal):
        self.journal = journal

    def center(self, fn, points):
        return self.journal.center(fn, points)

    def values(self, fn, points, lo=0, hi=None):
        for part in ((0, 4), (4, len(points.directions))):
            yield from self.journal.values(fn, points, *part)


def test_parts_of_an_estimate_are_read_and_written_as_the_whole(path):
    settings = {"method": "antithetic", "num_samples": 11, "seed": 3}
    whole = zero_order(**settings)(Fn()).estimate(X)
    for stop_at in (1, 6, 9, 15):
        fn, journal = Fn(), Journal("loop", f"{path}{stop_at}")
        fn.stop_at = stop_at
        with pytest.raises(Stop, match="stopped"):
            zero_order(**settings, evaluator=journal)(fn).estimate(X)
        fn.stop_at = None
        same(zero_order(**settings, evaluator=Halves(journal))(fn).estimate(X), whole)
        assert fn.calls == whole.evaluations
        same(zero_order(**settings, evaluator=journal)(fn).estimate(X), whole)
        assert fn.calls == whole.evaluations
