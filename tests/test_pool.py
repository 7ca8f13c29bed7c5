"""Pool: the bits of Loop from any executor, and what becomes of all that can go wrong in a worker."""

import concurrent.futures
import functools
import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import simulators
import zograd
from simulators import Shuffled, cubes, processes
from zograd import zero_order
from zograd.evaluators import Journal, Pool
from zograd.evaluators.task.answer import Proof
from zograd.failures import Drop, Retry

X = torch.linspace(-1, 1, 5)
SETTINGS = {"method": "antithetic", "num_samples": 12, "sigma": 0.5, "seed": 3}
SOME_FAIL = {**SETTINGS, "num_samples": 16, "sigma": 1.0}  # those whose first value is above 0.5
X0 = torch.zeros(5)


@pytest.fixture(scope="module")
def workers():
    with Pool(processes()) as pool:
        yield pool


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as executor:
        yield Pool(executor)


def estimate(fn, evaluator="loop", x=X, args=(), **settings):
    return zero_order(**{**SETTINGS, **settings}, evaluator=evaluator)(fn).estimate(x, *args)


def assert_same(one, other):
    assert torch.equal(one.value, other.value)
    assert one.value.dtype == other.value.dtype
    assert torch.equal(one.coefficients, other.coefficients)
    assert one.evaluations == other.evaluations


# ----------------------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "fourth_order"])
@pytest.mark.parametrize("fn", [cubes, simulators.noisy, simulators.vector, simulators.trains, simulators.nested])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_processes_give_the_bits_of_loop(workers, fn, method, batch_size):
    workers.batch_size = batch_size
    assert_same(estimate(fn, method=method), estimate(fn, workers, method=method))
    workers.batch_size = 1


@pytest.mark.parametrize("fn", [cubes, simulators.noisy, simulators.vector, simulators.trains, simulators.nested])
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_threads_give_the_bits_of_loop(fn, count):
    with ThreadPoolExecutor(count) as executor:
        assert_same(estimate(fn), estimate(fn, Pool(executor, 3)))


@pytest.mark.parametrize("seed", range(10))
def test_answers_come_in_any_order(seed):
    executor = Shuffled(seed)
    assert_same(estimate(simulators.noisy), estimate(simulators.noisy, Pool(executor)))
    assert 2 < executor.most <= 2 * executor._max_workers


@pytest.mark.parametrize(
    "family",
    [
        zograd.distributions.Rademacher(),
        zograd.distributions.Orthogonal(),
        zograd.distributions.Sobol(),
        zograd.distributions.LowRank(),
        torch.randn,
    ],
    ids=lambda family: type(family).__name__,
)
def test_families(workers, family):
    assert_same(estimate(cubes, distribution=family), estimate(cubes, workers, distribution=family))


def test_directions_that_cannot_be_made_again_are_refused(threads):
    with pytest.raises(zograd.ReplayError, match=r"`Pool`: the directions of .* cannot be made again by the workers"):
        estimate(cubes, threads, distribution=lambda shape: torch.from_numpy(__import__("numpy").random.randn(*shape)))


def test_half_precision_and_a_default_dtype(workers):
    x = X.to(torch.bfloat16)
    assert_same(estimate(cubes, x=x, sigma=1.0), estimate(cubes, workers, x=x, sigma=1.0))
    torch.set_default_dtype(torch.float64)
    assert_same(estimate(simulators.noisy), estimate(simulators.noisy, workers))


def test_autocast_reaches_the_workers(workers, threads):
    weight = torch.randn(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = estimate(matmul, args=(weight,))
        assert_same(wanted, estimate(matmul, workers, args=(weight,)))
        assert_same(wanted, estimate(matmul, threads, args=(weight,)))
    assert not torch.equal(wanted.value, estimate(matmul, args=(weight,)).value)


def matmul(x, weight):
    return (weight @ x).float().square().sum()


# ------------------------------------------------------------------------------------------------- functions, modules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        self.last = x
        return self.norm(self.linear(x)).pow(3).sum()


@pytest.mark.parametrize("kind", ["workers", "threads"])
def test_modules(kind, request):
    nets = []
    for evaluator in ("loop", request.getfixturevalue(kind)):
        torch.manual_seed(1)
        net = zograd.nn.ZeroOrder(Net(), method="antithetic", num_samples=6, seed=1, evaluator=evaluator)
        net(torch.randn(4, 3)).backward()
        nets.append(net)
    one, other = nets
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def call(x, model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(x.sum())  # as functional_call does, and undone below
        out = model(torch.ones(3))
        time.sleep(0.001)
        for p in model.parameters():
            p.sub_(x.sum())
    return (out - model(torch.ones(3)).detach()).sum().round()


def test_threads_never_share_a_module(threads):
    model = nn.Linear(3, 2)

    def closed(x):
        return call(x, model)

    before = [p.clone() for p in model.parameters()]
    assert_same(estimate(call, args=(nn.Linear(3, 2),)), estimate(call, threads, args=(nn.Linear(3, 2),)))
    assert_same(estimate(closed), estimate(closed, threads))
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q)


shared_net = nn.Linear(3, 2)


def by_helper(x):
    return call(x, shared_net)


def through(x, net=shared_net):
    return call(x, net)


def recurs(x, deep=2):
    return recurs(x, deep - 1) if deep else by_helper(x)


def uses_modules_everywhere():
    """Functions that use a module from all the places where Python lets them."""
    nets = [nn.Linear(3, 2)]

    class Own:
        def run(self, x):
            return call(x, shared_net)

    return {
        "a function that it calls": by_helper,
        "a default": through,
        "a function inside": lambda x: max(call(x, net) for net in [shared_net]),
        "a list": lambda x: call(x, nets[0]),
        "itself": recurs,
        "a method": Own().run,
        "a wrapper": functools.wraps(by_helper)(lambda x: by_helper(x)),
        "a partial": functools.partial(through),
    }


class Counting(nn.Module):
    """A module that writes to a buffer and an attribute and puts them back, as an estimate is of a pure function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("sum", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.last = x
        self.sum += x.detach().sum()
        time.sleep(0.001)
        out = self.linear(x[:3]).detach().sum() + (self.last * self.sum).sum()
        self.sum.zero_()
        return out


class Held(NamedTuple):
    name: str
    net: nn.Module


@dataclass
class Config:
    net: nn.Module
    scale: float = 1.0


@dataclass(frozen=True)
class FrozenConfig:
    nets: list[nn.Module]


class Slotted:
    __slots__ = ("__hidden", "missing", "net")

    def __init__(self, net):
        self.net = self.__hidden = net

    def __call__(self, x):
        return self.__hidden(x)


class Attribute:
    def __init__(self, net):
        self.inner = types.SimpleNamespace(nets={"a": [net]})
        self.lock = threading.Lock()

    def __call__(self, x):
        return self.inner.nets["a"][0](x)

    def run(self, x):
        return self(x)

    def __getstate__(self):
        raise AssertionError("nothing is pickled")


class OwnDict(dict):
    pass


counting = Counting()


class ForwardReadsAGlobal(nn.Module):
    def forward(self, x):
        return counting(x)


class ReadsAGlobal:
    def __call__(self, x):
        return self.net(x)

    @property
    def net(self):
        return counting

    @classmethod
    def of_the_class(cls, x):
        return counting(x)

    @staticmethod
    def alone(x):
        return counting(x)


def as_closure(value, use):
    return lambda x: use(value, x)


def holders():
    """Functions that use one network, held in all kinds of things."""
    net = Counting()

    class OfTheClass:
        held = net

        def __call__(self, x):
            return self.held(x)

    @functools.wraps(net.forward)
    def decorated(x):
        return net(x)

    @torch.no_grad()
    def of_torch(x):
        return net(x)

    def by_parameters(x):
        with torch.no_grad():
            before = [p.clone() for p in parameters]
            parameters[1].add_(x.sum())
            time.sleep(0.001)
            out = net(x)
            for p, q in zip(parameters, before, strict=True):
                p.copy_(q)
        return out

    def trains(x):
        before = [p.clone() for p in parameters]
        optimizer.zero_grad()
        net.linear(x[:3]).square().sum().backward()
        time.sleep(0.001)
        optimizer.step()
        out = net.linear(x[:3]).sum()
        with torch.no_grad():
            for p, q in zip(parameters, before, strict=True):
                p.copy_(q)
        return out.detach()

    def twice(x):
        first.net.sum += x.sum()
        time.sleep(0.001)
        out = second["net"].sum.clone()
        second["net"].sum.zero_()
        return out

    parameters, first, second = list(net.parameters()), Config(net), {"net": net}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapping = nn.Sequential()
    wrapping.forward = lambda x: net(x)
    cycle = [net]
    cycle.append((cycle,))
    attribute = Attribute(net)
    return {
        "a dataclass": as_closure(Config(net), lambda c, x: c.net(x) * c.scale),
        "a frozen dataclass": as_closure(FrozenConfig([net]), lambda c, x: c.nets[0](x)),
        "a namedtuple": as_closure(Held("a", net), lambda h, x: h.net(x)),
        "a deque": as_closure(deque([net], maxlen=2), lambda d, x: d[0](x)),
        "a set": as_closure({net}, lambda d, x: next(iter(d))(x)),
        "a frozenset": as_closure(frozenset([net]), lambda d, x: next(iter(d))(x)),
        "a dict's key": as_closure({net: 2.0}, lambda d, x: sum(k(x) * v for k, v in d.items())),
        "a dict of one's own": as_closure(OwnDict(a=net), lambda d, x: d["a"](x)),
        "nested containers": as_closure({"a": [(net,)]}, lambda d, x: d["a"][0][0](x)),
        "a cycle": as_closure(cycle, lambda c, x: c[1][0][0](x)),
        "slots": as_closure(Slotted(net), lambda s, x: s.net(x) + s(x)),
        "an attribute": as_closure(attribute, lambda a, x: a(x)),
        "a callable object": Attribute(net),
        "a method of an object": attribute.run,
        "a partial in a closure": as_closure(functools.partial(attribute.run), lambda p, x: p(x)),
        "a class attribute": OfTheClass(),
        "a class": as_closure(OfTheClass, lambda c, x: c.held(x) + c()(x)),
        "an object whose method reads a global": ReadsAGlobal(),
        "a module whose forward reads a global": as_closure(ForwardReadsAGlobal(), lambda n, x: n(x)),
        "a class method": ReadsAGlobal.of_the_class,
        "a static method": ReadsAGlobal().alone,
        "a decorated function": decorated,
        "a decorator of torch": of_torch,
        "a cache": as_closure(functools.lru_cache(None)(lambda x: net(x)), lambda f, x: f(x)),
        "an estimate inside": as_closure(zero_order(num_samples=1, seed=0)(decorated), lambda f, x: f(x).detach()),
        "a keyword's default": lambda x, *, held=Config(net): held.net(x),  # noqa: B008
        "a function's attribute": with_attribute(net),
        "nested closures": as_closure(
            as_closure(as_closure(net, lambda n, x: n(x)), lambda f, x: f(x)), lambda f, x: f(x)
        ),
        "a function in a module": as_closure(wrapping, lambda w, x: w(x)),
        "its parameters": by_parameters,
        "its optimizer": trains,
        "two places": twice,
        "a Python module": lambda x: helpers.counting(x),
    }


def with_attribute(net):
    def fn(x):
        return fn.net(x)

    fn.net = net
    return fn


helpers = types.ModuleType("helpers")
helpers.counting = Counting()


@pytest.mark.parametrize("where", [*uses_modules_everywhere(), *holders()])
def test_threads_never_share_a_module_wherever_it_is(threads, where):
    torch.manual_seed(0)
    fn = {**uses_modules_everywhere(), **holders()}[where]
    assert_same(estimate(fn, num_samples=6), estimate(fn, threads, num_samples=6))


def test_threads_share_what_leads_to_no_module(threads):
    seen, log, net = [], [], Counting()

    @dataclass
    class Both:
        net: nn.Module
        log: list

    both, plain = Both(net, log), types.SimpleNamespace(a=1)

    def fn(x):
        both.log.append(1)
        seen.append((plain, both.net is net))
        return both.net(x)

    estimate(fn, threads, num_samples=3)
    assert len(log) == len(seen) == 7
    assert all(one is plain and same for one, same in seen)  # the thread's own, in both places
    assert type(both) is Both
    assert both.net is net


class Simulator:
    def __init__(self, power):
        self.power = power

    def run(self, x):
        return (x**self.power).sum()

    @zero_order(**SETTINGS)
    def decorated(self, x):
        return (x**self.power).sum()


def test_decorated_functions_and_methods_go_by_name(workers):
    assert_same(
        simulators.decorated.estimate(X),
        simulators.decorated.replace(evaluator=workers).estimate(X),
    )
    assert_same(estimate(Simulator(3).run), estimate(Simulator(3).run, workers))
    model = Simulator(3)
    assert_same(model.decorated.estimate(X), model.decorated.replace(evaluator=workers).estimate(X))


@pytest.mark.skipif(importlib.util.find_spec("cloudpickle") is None, reason="no cloudpickle")
def test_lambdas_go_with_cloudpickle(workers):
    power = 3
    assert_same(estimate(lambda x: (x**power).sum()), estimate(lambda x: (x**power).sum(), workers))


@pytest.mark.parametrize("fn", [cubes, lambda x: x.sum()], ids=["argument", "lambda"])
def test_what_does_not_pickle_is_a_named_error(workers, fn, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    from zograd.evaluators.workers import shipping as _shipping

    _shipping._pickler.cache_clear()
    argument = () if fn is not cubes else (threading.Lock(),)
    try:
        with pytest.raises(zograd.WorkerError, match=r"`Pool`: `.*` or an argument cannot be sent to other processes"):
            estimate(lambda x, lock: x.sum() if lock else 0, workers, args=argument) if argument else estimate(
                fn, workers
            )
    finally:
        _shipping._pickler.cache_clear()
    assert_same(estimate(cubes), estimate(cubes, workers))


def test_a_view_goes_without_the_rest_of_its_memory():
    from zograd.evaluators.workers.shipping import pack

    assert len(pack(torch.zeros(1_000_000)[:10], by_value=False)) < 2000


def test_workers_use_one_thread_of_torch(workers):
    torch.set_num_threads(1)
    assert estimate(simulators.threads_of_torch, workers).value == 1


# --------------------------------------------------------------------------------------------------- what is sent


class Postman(concurrent.futures.Executor):
    """Passes on, and weighs what it passes."""

    def __init__(self, inner):
        self.inner, self._max_workers, self.sent, self.back = inner, inner._max_workers, [], []
        self.missed = 0  # tasks that found a worker without the parameters

    def submit(self, fn, /, *args):
        import pickle

        self.sent.append(len(pickle.dumps(args)))
        future = self.inner.submit(fn, *args)

        def weigh(future):
            self.back.append(len(pickle.dumps(future.result())))
            self.missed += getattr(future.result(), "answer", ()) is None

        future.add_done_callback(weigh)
        return future


@pytest.mark.parametrize("size", [1000, 100_000])
def test_parameters_go_once_an_estimate_and_worker(size):
    with processes(2)() as inner:
        postman = Postman(inner)
        pool = Pool(postman, workers=2)
        estimate(cubes, pool, x=torch.zeros(size), num_samples=50)
    heavy = [n for n in postman.sent if n > 4 * size]
    assert 1 <= len(heavy) <= 2 + postman.missed  # who takes a task is the executor's choice, and so is who misses it
    assert sum(postman.sent) < len(heavy) * (4 * size + 6000) + 103 * 400
    assert max(postman.back) < 600


def test_eight_bytes_a_value():
    with processes(2)() as inner:
        sizes = []
        for batch in (10, 1010):
            postman = Postman(inner)
            estimate(cubes, Pool(postman, batch, workers=2), num_samples=2020)
            sizes.append(min(postman.back[-2:]) if batch == 10 else sorted(postman.back)[-2])
    assert sizes[1] - sizes[0] == pytest.approx(8 * 1000, abs=20)


def _elsewhere(version, digest):
    """What proves points: another thing in the threads of a pool."""
    of = Proof.of

    def proves(points):
        return of(points) if threading.current_thread() is threading.main_thread() else Proof(version, digest)

    return proves


def test_a_worker_with_other_directions_is_found_out(threads, monkeypatch):
    monkeypatch.setattr(Proof, "of", _elsewhere(torch.__version__, b"other"))
    with pytest.raises(zograd.DeterminismError, match=r"`Pool`: worker .* makes other points than this process"):
        estimate(cubes, threads, failures=Drop())


def test_a_worker_with_another_torch_is_found_out(threads, monkeypatch):
    monkeypatch.setattr(Proof, "of", _elsewhere("2.0", b""))
    with pytest.raises(zograd.DeterminismError, match=r"worker .* has torch 2\.0, this process .*: directions"):
        estimate(cubes, threads)


# ------------------------------------------------------------------------------------------------- journal, tracker


def test_a_journal_around_a_pool(tmp_path, workers):
    path = tmp_path / "calls"
    wanted = estimate(simulators.counted, args=(str(path),))
    path.unlink()
    pool = Journal(workers, tmp_path / "journal")
    with zograd.Tracker() as tracker:
        first = estimate(simulators.counted, pool, args=(str(path),))
        again = estimate(simulators.counted, pool, args=(str(path),))
    assert_same(wanted, first)
    assert torch.equal(again.grad, wanted.grad)
    assert (again.evaluations, tracker.evaluations, path.stat().st_size) == (0, 25, 25)


def test_what_came_before_an_error_is_in_the_journal(tmp_path, threads):
    path, broken, one_at_a_time = tmp_path / "calls", [True], threading.Lock()

    def fn(x):
        with one_at_a_time:  # so that it is just the first twelve that succeed
            simulators.counted(x, path)
            failed = broken and len(path.read_bytes()) > 12
        if failed:
            raise OSError("down")
        return cubes(x)

    journal = Journal(threads, tmp_path / "journal", key=lambda x: 0)
    with zograd.Tracker() as tracker:
        with pytest.raises(zograd.EvaluationError, match="down"):
            estimate(fn, journal)
        broken.clear()
        first = tracker.evaluations
        assert_bits = estimate(fn, journal)
        assert tracker.evaluations == path.stat().st_size
    assert assert_bits.evaluations == tracker.evaluations - first == 25 - 12
    assert torch.equal(assert_bits.grad, estimate(cubes).grad)


def test_a_journal_with_holes(tmp_path, threads):
    """Single sides of single directions are asked for, of one job."""
    import sqlite3

    path = tmp_path / "journal"
    wanted = estimate(cubes, Journal(threads, path))
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM value WHERE point % 3 = 1")
    again = estimate(cubes, Journal(threads, path))
    assert torch.equal(again.grad, wanted.grad)
    assert again.evaluations == len([p for p in range(24) if p % 3 == 1])


# ------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("fn", "error", "text"),
    [
        (simulators.raises_broken, zograd.EvaluationError, r"raised Broken at direction \d+ of the estimate"),
        (simulators.raises_locked, zograd.EvaluationError, r"raised Locked at direction \d+ of the estimate"),
        (simulators.leaves, zograd.WorkerError, r"called `sys.exit\(7\)` in a worker"),
    ],
)
@pytest.mark.parametrize("kind", ["workers", "threads"])
def test_exceptions_of_workers_are_named(kind, fn, error, text, request):
    with pytest.raises(error, match=text) as caught:
        estimate(fn, request.getfixturevalue(kind), X0, **{"num_samples": 16, "sigma": 1.0})
    assert caught.value.__cause__ is not None
    assert_same(estimate(cubes), estimate(cubes, request.getfixturevalue(kind)))


def test_the_cause_is_what_fn_raised(workers):
    with pytest.raises(zograd.EvaluationError, match="too large") as caught:
        estimate(int_of_inf, workers, X0, sigma=1.0)
    assert isinstance(caught.value.__cause__, OverflowError)
    assert "in int_of_inf" in str(caught.value.__cause__.__cause__)  # where, as the worker saw it


def int_of_inf(x):
    if simulators.at(x, 0.5):
        raise OverflowError("too large")
    return cubes(x)


@pytest.mark.parametrize(
    ("fn", "policy"),
    [
        (simulators.raises_locked, Drop(0.1)),
        (simulators.raises_locked, Retry(1, then=Drop(0.1))),
        (simulators.kills, Drop(0.1)),
        (simulators.hangs, Drop(0.1)),
    ],
)
def test_directions_that_fail_are_dropped(fn, policy):
    """By exception, by the death of the worker, by the clock: the estimate is the same."""
    settings = {**SOME_FAIL, "num_samples": 6, "failures": policy}
    with pytest.warns(zograd.ZeroOrderWarning, match=r"of 6 directions were dropped"):
        wanted = estimate(simulators.raises_locked, x=X0, **settings)
    with Pool(processes(), timeout=0.5) as pool:
        with pytest.warns(zograd.ZeroOrderWarning, match=r"of 6 directions were dropped"):
            got = estimate(fn, pool, X0, **settings)
        assert_same(wanted, got)
        assert got.failures == wanted.failures > 0
        assert_same(estimate(cubes), estimate(cubes, pool))


@pytest.mark.parametrize("fn", [simulators.kills, simulators.hangs])
def test_a_point_that_ends_its_worker_is_a_named_error(fn):
    error, text = {
        simulators.kills: (zograd.WorkerError, r"a worker died while it evaluated `kills` at direction \d+ \(offset"),
        simulators.hangs: (zograd.EvaluationTimeout, r"`Pool\(timeout=0.5\)`: `hangs` took longer at direction \d+"),
    }[fn]
    with Pool(processes(), timeout=0.5) as pool:
        with pytest.raises(error, match=text):
            estimate(fn, pool, X0, **SOME_FAIL)
        pids = [int(name.split(":")[1]) for name in pool._workers.names]
    assert not [pid for pid in pids if alive(pid)]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z" if Path("/proc").exists() else True


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("fn", [simulators.kills_once, simulators.hangs_once])
def test_a_worker_that_ends_once_costs_nothing(tmp_path, fn, batch_size):
    policy = Retry(1) if fn is simulators.hangs_once else "raise"
    with Pool(processes(), batch_size, timeout=0.3) as pool:
        got = estimate(fn, pool, args=(str(tmp_path / "once"),), failures=policy)
    assert torch.equal(got.grad, estimate(cubes).grad)


def test_threads_that_share_a_pool_do_not_end_each_others_workers(tmp_path):
    """One death makes one new executor; if several estimates made it anew, each would end that of the others."""
    made, asked = [], []

    class Recorded(concurrent.futures.ProcessPoolExecutor):
        def submit(self, fn, /, *args):
            # The center is a call of its own, which another estimate's may follow: nothing is under way in between.
            asked.extend(task.key for task in args[:1] if task.offsets)
            return super().submit(fn, *args)

    def factory():
        made.append(Recorded(2, mp_context=simulators.CONTEXT))
        return made[-1]

    with Pool(factory) as pool, ThreadPoolExecutor(3) as threads:
        estimate(cubes, pool)
        tasks = [(simulators.rests,), (simulators.rests,), (simulators.kills_once, (str(tmp_path / "once"),))]
        shares = [threads.submit(estimate, fn, pool, args=args) for fn, *rest in tasks for args in (rest or [()])]
        assert all(torch.equal(done.result(120).grad, estimate(cubes).grad) for done in shares)
    assert len(made) == 2
    assert [key for key, _ in itertools.groupby(asked)] == list(dict.fromkeys(asked)), "estimates ran into each other"


def test_an_executor_of_others_that_breaks_is_a_named_error(tmp_path):
    with (
        processes()() as executor,
        pytest.raises(zograd.WorkerError, match=r"as `Pool\(lambda: ProcessPoolExecutor\(4\)\)`: then it is made anew"),
    ):
        estimate(simulators.kills_once, Pool(executor), args=(str(tmp_path / "once"),), failures=Drop())


def test_an_executor_that_was_shut_down_is_a_named_error():
    with ThreadPoolExecutor(1) as executor:
        pool = Pool(executor)
    with pytest.raises(zograd.WorkerError, match="its executor was shut down"):
        estimate(cubes, pool)


def test_threads_that_hang_are_left_to_themselves():
    free = threading.Event()

    def waits(x):
        if simulators.at(x, 0.5):
            free.wait(60)
        return cubes(x)

    with ThreadPoolExecutor(8) as many, ThreadPoolExecutor(2) as few:
        estimate(cubes, Pool(many))  # what torch imports at its first use in a thread takes seconds
        try:
            with pytest.raises(zograd.EvaluationTimeout, match="took longer at direction"):
                estimate(waits, Pool(many, timeout=0.1), X0, **SOME_FAIL)
            pool = Pool(few, timeout=0.1)
            for _ in range(2):  # and again, when none has come back
                with pytest.raises(zograd.EvaluationTimeout, match="all 2 workers hang in"):
                    estimate(waits, pool, X0, **SOME_FAIL, failures=Drop(0.01))
        finally:
            free.set()


def test_stragglers_are_waited_for(threads):
    threads.timeout = 20.0
    assert_same(estimate(cubes, x=X0, sigma=1.0), estimate(simulators.straggles, threads, X0, sigma=1.0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, zograd.BudgetExceeded("over")], ids=repr)
@pytest.mark.parametrize("policy", [Drop(0.01), Retry(2), Retry(2, then=Drop(0.01))])
def test_policies_let_through_what_is_no_failure(error, policy, threads):
    calls = []

    def fn(x):
        calls.append(x)
        if len(calls) == 5:
            raise error
        return cubes(x)

    for evaluator in ("loop", threads):
        calls.clear()
        with pytest.raises(error if isinstance(error, type) else type(error)):
            estimate(fn, evaluator, failures=policy)


def test_evaluations_retries_and_failures_are_those_of_fn(tmp_path, workers):
    path = tmp_path / "calls"
    path.touch()
    for seed in range(20):
        before = path.stat().st_size
        with zograd.Tracker() as tracker:
            try:
                got = estimate(
                    simulators.counted_and_fails, workers, args=(str(path), 0.2), failures=Retry(3), seed=seed
                )
            except (zograd.EvaluationError, ConnectionError):
                got = None
        made = path.stat().st_size - before
        assert tracker.evaluations == made
        if got is not None:
            assert got.evaluations == made == 25 + tracker.retries
            assert got.failures == tracker.failures == tracker.retries


def test_nothing_is_left_when_the_main_process_is_killed(tmp_path):
    program = f"""
        import os, sys, torch, zograd
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import simulators
        if __name__ == "__main__":
            pool = zograd.evaluators.Pool(workers=2)
            executor = pool._workers.executor
            waits = [executor.submit(os.getpid) for _ in range(8)]  # it starts processes as they are needed
            names = set(executor._processes)
            print(*names, flush=True)
            fn = zograd.zero_order(num_samples=4, sigma=5.0, seed=0, evaluator=pool)(simulators.hangs)
            fn.estimate(torch.zeros(2))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(program))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as run:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        time.sleep(1)
        run.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(pids) == 2
    assert not [pid for pid in pids if alive(pid)]


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, zograd\n"
        "def fn(x):\n    return x.sum()\n"
        "zograd.zero_order(evaluator=zograd.evaluators.Pool(workers=1))(fn).estimate(torch.ones(2))\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 1
    assert "the workers died as they started" in run.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"executor": 4}, TypeError, r"`Pool\(executor=...\)` must be an Executor, a function .*, got int 4"),
        ({"batch_size": 0}, ValueError, r"`Pool\(batch_size=...\)` must be at least 1, got 0"),
        ({"batch_size": None}, TypeError, r"`Pool\(batch_size=...\)` must be an int, got NoneType None"),
        ({"batch_size": 1.0}, TypeError, r"`Pool\(batch_size=...\)` must be an int, got float 1.0"),
        ({"timeout": 0}, ValueError, r"`Pool\(timeout=...\)` must be positive and finite, got 0"),
        ({"timeout": float("nan")}, ValueError, r"`Pool\(timeout=...\)` must be positive and finite, got nan"),
        ({"timeout": "1"}, TypeError, r"`Pool\(timeout=...\)` must be a number or None, got str '1'"),
        ({"workers": 0}, ValueError, r"`Pool\(workers=...\)` must be at least 1, got 0"),
        ({"threads": True}, TypeError, r"`Pool\(threads=...\)` must be an int or None, got bool True"),
    ],
)
def test_bad_settings(settings, error, text):
    with pytest.raises(error, match=text):
        Pool(**settings)


def test_a_factory_that_makes_something_else():
    with pytest.raises(TypeError, match=r"the function must return an executor, got int 3"):
        estimate(cubes, Pool(lambda: 3))


def test_a_pool_is_copied_with_its_workers_and_pickled_without(threads):
    import copy
    import pickle

    assert copy.deepcopy(threads) is threads
    assert "ThreadPoolExecutor" in repr(threads)
    assert repr(Pool(workers=3)) == "Pool(workers=3, batch_size=1, timeout=None, threads=1)"
    with pytest.raises(zograd.WorkerError, match="pickled or copied without its executor"):
        estimate(cubes, pickle.loads(pickle.dumps(threads)))
