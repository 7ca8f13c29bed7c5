"""Same seed: same directions, coefficients and gradient, bit for bit, however the work is cut."""

import pytest
import torch

from zograd import zero_order
from zograd.distributions import Coordinate, Gaussian, Guided, Hadamard, LowRank, Orthogonal, Rademacher, Sobol, Sphere
from zograd.evaluators import Batched, Loop, Vmap
from zograd.shaping import leave_one_out

FAMILIES = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "low rank": LowRank(2),
    "function": torch.randn,
    "orthogonal": Orthogonal(),
    "hadamard": Hadamard(),
    "sobol": Sobol(),
    "coordinate": Coordinate(),
    "guided": Guided,  # made for each size
}
SMALL_BLOCKS = ("function", "orthogonal", "hadamard", "coordinate")  # of d rows or one, so that many take time

# Parameters, directions (never a multiple of the block of about 2**16 values) and chunks below, at and above a block.
SIZES = {
    1: (65_536 + 21, (70_000, 9_999)),
    3: (21_845 + 7, (21_846, 5_000)),
    10: (2 * 6_553 + 50, (6_553, 15_000, 1_234)),
    1000: (150, (1, 7, 65, 64, 130, 400)),
    40_000: (7, (1, 2, 5)),
    70_000: (5, (1, 2, 5)),
}


def staircase(x):
    """Whole numbers: their sum is exact in any order, so that the values are equal bit for bit."""
    weights = torch.arange(x.shape[-1], dtype=x.dtype) % 3 + 1
    return ((x > 0.25) * weights - (x < -1) * 2.0).sum(dim=-1)


def estimate(family, size, num, evaluator, fn=staircase, dtype=torch.float32, **options):
    options = {"method": "antithetic", "sigma": 0.5, "seed": 11, **options}
    start = torch.linspace(-1, 1, size, dtype=dtype)
    if family == "sobol" and size > 21201:
        pytest.skip("has no more dimensions")
    distribution = FAMILIES[family]
    if distribution is Guided:
        distribution = Guided(torch.stack([start.cos(), start.exp() + start][: min(2, size)], dim=1), alpha=0.3)
    return zero_order(distribution, num_samples=num, evaluator=evaluator, **options)(fn).estimate(start)


def same(first, second):
    assert torch.equal(first.coefficients, second.coefficients)
    assert torch.equal(first.grad, second.grad)
    assert first.value == second.value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", SIZES)
def test_chunks_and_evaluators(family, size):
    num, chunks = SIZES[size]
    if family in SMALL_BLOCKS and size < 10:
        num = 3_000  # drawn row by row; its chunks are cut as those of the others
    whole = estimate(family, size, num, Vmap())
    assert whole.grad.abs().sum() > 0
    for chunk in chunks:
        same(estimate(family, size, num, Vmap(chunk)), whole)
    for chunk in (*chunks[:2], None):
        same(estimate(family, size, num, Batched(chunk)), whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [10, 1000, 70_000])
def test_loop_is_the_reference(family, size):
    num = min(SIZES[size][0], 6_553 + 50)
    if family == "function":
        num = min(num, 500)
    method = "forward" if family == "coordinate" else "naive"
    options = {"method": method if size == 10 else "fourth_order"}
    same(estimate(family, size, num, Loop(), **options), estimate(family, size, num, Vmap(700), **options))


@pytest.mark.parametrize("evaluator", [Loop(), Vmap(), Vmap(9)], ids=repr)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [10, 1000, 40_000, 70_000])
def test_threads(family, size, evaluator):
    num = {10: 300, 1000: 140}.get(size, 6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(estimate(family, size, num, evaluator))
    same(*results)


@pytest.mark.parametrize("size", [10, 1000])
def test_float64_and_slices_and_shaping(size):
    num = SIZES[size][0] if size > 10 else 6_553 + 50
    options = {"dtype": torch.float64, "shaping": leave_one_out, "method": "naive"}
    same(estimate("gaussian", size, num, Vmap(), **options), estimate("gaussian", size, num, Vmap(100), **options))

    def by_slice(x):
        return staircase(x.view(2, -1))

    def sliced(evaluator):
        options = {"method": "antithetic", "sigma": 0.5, "seed": 11, "batch_dim": 0, "num_samples": num}
        start = torch.linspace(-1, 1, size).view(2, -1)
        return zero_order(evaluator=evaluator, **options)(by_slice).estimate(start)

    whole = sliced(Vmap())
    for evaluator in (Vmap(100), Vmap(7), *([Loop()] if size > 10 else [])):
        other = sliced(evaluator)
        assert torch.equal(other.coefficients, whole.coefficients)
        assert torch.equal(other.grad, whole.grad)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [3, 1000, 40_000])
def test_points_have_the_same_bits_under_every_evaluator(family, size):
    """So that the values are equal wherever fn's are a function of its argument's bits."""
    num = {3: 50, 1000: 67}.get(size, 4)
    seen = {}
    for name, evaluator in {"loop": Loop(), "whole": Batched(), "single": Batched(1), "some": Batched(13)}.items():
        points = seen.setdefault(name, {1.0: [], -1.0: []})
        calls = []

        def fn(x, calls=calls):
            calls.append(x.clone())
            return x.sum(dim=-1)

        estimate(family, size, num, evaluator, fn)
        calls = calls[1:]  # without the center
        for k, call in enumerate(calls):
            points[1.0 if k % 2 == 0 else -1.0].append(call.view(-1, size))
    for name in ("whole", "single", "some"):
        for side in (1.0, -1.0):
            assert torch.equal(torch.cat(seen[name][side]), torch.cat(seen["loop"][side]))


def test_backward_contracts_the_same_bits_as_the_estimate():
    x = torch.linspace(-1, 1, 1000).requires_grad_()
    fn = zero_order(method="antithetic", num_samples=150, sigma=0.5, seed=11, evaluator=Vmap(7))(staircase)
    (grad,) = torch.autograd.grad(fn(x), x)
    assert torch.equal(grad, estimate("gaussian", 1000, 150, Loop()).grad)


def test_another_seed_is_another_estimate():
    first, second = (estimate("gaussian", 10, 50, Vmap(), seed=seed) for seed in (1, 2))
    assert not torch.equal(first.coefficients, second.coefficients)
    assert not torch.equal(first.grad, second.grad)
    assert first.value == second.value


def test_vector_outputs_replay_the_same_directions():
    """Their gradient is contracted later, from directions made again."""
    fn = lambda x: torch.stack([staircase(x), (x > 0).sum(dim=-1).to(x)], dim=-1)  # noqa: E731
    cotangent = torch.tensor([0.5, -2.0])
    whole, chunked, loop = (estimate("gaussian", 1000, 150, e, fn) for e in (Vmap(), Vmap(9), Loop()))
    for other in (chunked, loop):
        assert torch.equal(other.coefficients, whole.coefficients)
        assert torch.equal(other.vjp(cotangent), whole.vjp(cotangent))
