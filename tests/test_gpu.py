"""On an accelerator: the same contracts. Skipped without one."""

import pytest
import torch

import zograd
from zograd import zero_order
from zograd.distributions import Coordinate, Gaussian, Hadamard, LowRank, Orthogonal, Rademacher, Sobol, Sphere
from zograd.evaluators import Loop, Vmap
from zograd.evaluators.base import fitting_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
FAMILIES = [Gaussian(), Rademacher(), Sphere(), LowRank(), Orthogonal(), Hadamard(), Sobol(), Coordinate()]


def problem(x):
    return (x.sin() * torch.linspace(0, 1, x.numel(), device=x.device).view(x.shape)).sum()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("evaluator", [Loop(), Vmap(7), Vmap()], ids=repr)
def test_the_gradient_and_its_bits(family, evaluator):
    x = torch.linspace(-1, 1, 60, device="cuda").view(6, 10)
    f = zero_order(family, "antithetic", num_samples=20_000, sigma=0.01, evaluator=Vmap(), seed=3)(problem)
    weights = torch.linspace(0, 1, 60, device="cuda").view(6, 10)
    estimate = f.estimate(x)
    assert estimate.grad.device.type == "cuda"
    truth = weights * x.cos()
    # The variance of an entry is at most 4 |g|^2 / N (low rank); six standard errors.
    assert (estimate.grad - truth).abs().max() < 6 * (4 * truth.square().sum() / 20_000) ** 0.5
    few = f.replace(num_samples=20, evaluator=evaluator)
    assert torch.equal(few.estimate(x).grad, few.estimate(x).grad)


def test_backward_and_the_random_state():
    x = torch.zeros(5, device="cuda", requires_grad=True)
    state = torch.cuda.get_rng_state()
    zero_order(method="antithetic", num_samples=4)(lambda p: (p + torch.randn(5, device="cuda")).sum())(x).backward()
    assert x.grad.device == x.device
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_both_sides_of_a_pair_see_one_stream():
    x = torch.zeros(5, device="cuda")
    f = zero_order(method="antithetic", num_samples=6, sigma=1.0)(lambda p: 1e4 * torch.randn(1, device="cuda").sum())
    assert f.estimate(x).coefficients.abs().max() == 0


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_bfloat16(evaluator):
    x = torch.ones(100, device="cuda", dtype=torch.bfloat16)
    f = zero_order(method="antithetic", num_samples=500, sigma=0.5, evaluator=evaluator, seed=0)
    grad = f(lambda p: p.float().square().sum()).estimate(x).grad
    assert grad.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(grad.float(), 2 * x.float(), dim=0) > 0.8


def test_the_chunk_follows_the_free_memory():
    rows = []

    class Asks(Vmap):
        def values(self, fn, points, lo=0, hi=None):
            rows.append(fitting_rows(points))
            return super().values(fn, points, lo, hi)

    for size in (1000, 100_000):
        zero_order(num_samples=2, evaluator=Asks())(torch.sum).estimate(torch.zeros(size, device="cuda"))
    assert rows[0] > 50 * rows[1] > 50


def test_the_loop_does_not_wait_for_the_device():
    x = torch.zeros(1000, device="cuda")
    estimate = zero_order(num_samples=8, seed=1)(torch.sum)
    estimate.estimate(x)
    calls = []

    def fn(p):
        if calls:  # between two evaluations of a block nothing waits
            torch.cuda.set_sync_debug_mode("error")
        calls.append(1)
        if len(calls) == 9:
            torch.cuda.set_sync_debug_mode("default")
        return p.sum()

    try:
        zero_order(num_samples=8, seed=1)(fn).estimate(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 9


def test_mezo_steps_like_sgd():
    x = torch.nn.Parameter(torch.linspace(-1, 1, 70_001, device="cuda"))
    twin = torch.nn.Parameter(x.detach().clone())
    opt = zograd.optim.MeZO([x], lr=0.1, sigma=0.01, seed=1)
    opt.step(lambda: problem(x))
    zero_order(method="antithetic", sigma=0.01, seed=opt.records.seeds[0])(problem)(twin).backward()
    torch.optim.SGD([twin], lr=0.1).step()
    assert torch.equal(x, twin)


@pytest.mark.parametrize("evaluator", [Loop(), Vmap()], ids=repr)
@pytest.mark.parametrize("kind", [zograd.unrolled.PES, zograd.unrolled.NRES, zograd.unrolled.TruncatedES])
def test_unrolled_systems(kind, evaluator):
    def window(p, s):
        return (s["x"] * p).sum(), {"x": 0.9 * s["x"] + p, "t": s["t"] + 1}

    params = torch.ones(3, device="cuda", requires_grad=True)
    start = {"x": torch.zeros(3, device="cuda"), "t": 0}
    estimator = kind(window, 4, 0.1, evaluator=evaluator, seed=0)
    state = estimator.init(params, start)
    for _ in range(4):
        loss, state = estimator(params, state)
        loss.backward()
        state = estimator.reset(state, lambda s: s["t"] >= 3, start)
    assert params.grad.device.type == state["center"]["x"].device.type == loss.device.type == "cuda"
    assert params.grad.any()
    assert state["center"]["t"] == 1
    with pytest.raises(ValueError, match=r"the state must be on the device of `params`, cuda:0, got cpu"):
        estimator.init(params, torch.zeros(3))


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("family", [Gaussian(), Orthogonal()], ids=str)
def test_a_surrogate_and_its_error_bars(family, evaluator):
    x = torch.linspace(-1, 1, 6, device="cuda")
    settings = {"method": "antithetic", "num_samples": 60, "sigma": 0.1, "seed": 3, "evaluator": evaluator}
    found = zero_order(family, **settings, surrogate=lambda p: 0.9 * problem(p))(problem).estimate(x)
    alone = zero_order(family, **settings)(problem).estimate(x)
    assert found.grad.device == found.standard_error().device == alone.standard_error().device == x.device
    assert found.standard_error().norm() < alone.standard_error().norm()
    assert -1 <= found.split_half_cosine() <= 1


@pytest.mark.parametrize("number", [False, True])
def test_second_derivatives_also_of_a_black_box_on_the_cpu(number):
    x = torch.zeros(3, device="cuda")
    fn = (lambda p: float(p.square().sum())) if number else (lambda p: p.square().sum())
    f = zero_order(method="antithetic", num_samples=4000, sigma=0.5, seed=3)(fn)
    vector = torch.ones(3, device="cuda")
    product = f.estimate(x).hvp(vector)
    assert product.device == x.device
    assert (product - 2).abs().max() < 0.5  # about five deviations
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g @ vector, leaf)[0], product)
