"""Directions made ahead in a second thread are the same directions."""

import inspect
import os
import threading

import pytest
import torch

from problems import Directions
from zograd import zero_order
from zograd._base.trees import Space
from zograd.distributions import Coordinate, Gaussian, Hadamard, LowRank, Orthogonal, Rademacher, Sobol, Sphere
from zograd.evaluators import Batched, Loop, Vmap

FAMILIES = [Gaussian(), Rademacher(), Sphere(), torch.randn, LowRank(), Orthogonal(), Hadamard(), Sobol(), Coordinate()]


def objective(x):
    return (x * torch.arange(x.shape[-1])).sin().sum(dim=-1)


@pytest.mark.parametrize("num", [1, 2, 9])
@pytest.mark.parametrize("size", [10, 30_000, 140_000])
@pytest.mark.parametrize("evaluator", [Loop, Vmap, Batched])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: getattr(family, "__name__", str(family)))
def test_the_bits_are_the_same(family, evaluator, size, num):
    if isinstance(family, Sobol) and size > 21201:
        pytest.skip("has no more dimensions")

    def estimate(prefetch):
        options = {"method": "antithetic", "num_samples": num, "sigma": 0.1, "seed": 3}
        chunk = {} if evaluator is Loop else {"chunk_size": 2}
        f = zero_order(family, evaluator=evaluator(prefetch=prefetch, **chunk), **options)(objective)
        return f.estimate(torch.zeros(size))

    alone, ahead, default = map(estimate, (False, True, None))
    for other in (ahead, default):
        assert torch.equal(other.grad, alone.grad)
        assert torch.equal(other.coefficients, alone.coefficients)


class Watched(Gaussian):
    """Remembers the threads that drew."""

    def __init__(self):
        self.threads = set()

    def fill(self, out, generator):
        self.threads.add(threading.current_thread().name.partition("_")[0])
        super().fill(out, generator)


@pytest.mark.parametrize(
    ("size", "prefetch", "second"),
    [(1000, None, False), (1000, True, True), (140_000, None, True), (140_000, False, False), (4_300_000, None, False)],
)
def test_the_second_thread_is_used_where_it_gains(monkeypatch, size, prefetch, second):
    monkeypatch.setattr(inspect.getmodule(Directions), "cores", lambda: 2)
    family = Watched()
    zero_order(family, num_samples=200 if size == 1000 else 3, evaluator=Loop(prefetch))(torch.sum).estimate(
        torch.zeros(size)
    )
    assert family.threads == {"MainThread", "zograd-noise"} if second else {"MainThread"}


def test_one_core_makes_nothing_ahead(monkeypatch):
    monkeypatch.setattr(inspect.getmodule(Directions), "cores", lambda: 1)
    family = Watched()
    zero_order(family, num_samples=3)(torch.sum).estimate(torch.zeros(140_000))
    assert family.threads == {"MainThread"}


class Broken(Gaussian):
    def fill(self, out, generator):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("no entropy")
        super().fill(out, generator)


def test_an_error_in_the_second_thread_is_raised():
    f = zero_order(Broken(), num_samples=3, evaluator=Loop(prefetch=True))(torch.sum)
    with pytest.raises(OSError, match="no entropy"):
        f.estimate(torch.zeros(140_000))


def test_any_order_of_spans_gives_the_same_noise():
    space = Space.of((torch.zeros(50_000),))
    alone, ahead = (Directions(Gaussian(), space, 5, 12) for _ in range(2))
    ahead.prefetch = True
    for lo, hi in [(0, 1), (1, 3), (8, 9), (3, 4), (0, 12), (11, 12), (2, 3), (3, 4), (4, 5)]:
        assert torch.equal(ahead.noise(lo, hi)[0], alone.noise(lo, hi)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_second_thread_of_its_own():
    f = zero_order(num_samples=3, seed=1, evaluator=Loop(prefetch=True))(torch.sum)
    wanted = f.estimate(torch.zeros(140_000)).grad.sum().item()
    child = os.fork()
    if child == 0:
        signal = os.EX_SOFTWARE
        try:
            threading.Timer(30, os._exit, (os.EX_TEMPFAIL,)).start()
            signal = 0 if f.estimate(torch.zeros(140_000)).grad.sum().item() == wanted else os.EX_DATAERR
        finally:
            os._exit(signal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_inference_mode_makes_nothing_ahead():
    family = Watched()
    with torch.inference_mode():
        zero_order(family, num_samples=3, evaluator=Loop(prefetch=True))(torch.sum).estimate(torch.zeros(140_000))
    assert family.threads == {"MainThread"}


@pytest.mark.parametrize("evaluator", [Loop, Vmap, Batched])
def test_prefetch_is_checked(evaluator):
    with pytest.raises(TypeError, match=rf"`{evaluator.__name__}\(prefetch=...\)` must be a bool or None, got int 1"):
        evaluator(prefetch=1)
