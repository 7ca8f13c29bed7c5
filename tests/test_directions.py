"""Directions that complement each other, coordinates and guided ones: the laws that they are there for."""

import inspect
import math
import pickle
import types

import pytest
import torch

from problems import Directions, Quadratic
from statistical import flat
from zograd import ANTITHETIC, FORWARD, FOURTH_ORDER, NAIVE, zero_order
from zograd._base.trees import Space
from zograd.distributions import Coordinate, Gaussian, Guided, Hadamard, Orthogonal, Rademacher, Sobol
from zograd.evaluators import Batched, Loop, Vmap
from zograd.evaluators.base import fitting_rows
from zograd.shaping import leave_one_out

statistics = pytest.mark.statistics
FAMILIES = [Orthogonal(), Orthogonal("sqrt_d"), Hadamard(), Sobol(), Coordinate()]


def directions(family, *shapes, num, dtype=torch.float64, batch_dim=None, seed=5):
    return Directions(family, Space.of(tuple(torch.empty(s, dtype=dtype) for s in shapes), batch_dim), seed, num)


def matrix(d):
    """All directions as rows (num, size)."""
    return torch.cat([d.noise(lo, hi)[0].clone() for lo, hi in d.blocks()])


def grads(problem, family, num, repetitions, checks, method="antithetic", sigma=None):
    generator = torch.Generator().manual_seed(checks.seed())
    options = {"method": method, "num_samples": num, "sigma": sigma or problem.sigma, "evaluator": "batched"}
    fn = zero_order(family, **options, generator=generator)(problem)
    return torch.stack([fn.estimate(problem.x).grad for _ in range(repetitions)])


# ----------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "num"), [(1, 3), (5, 5), (5, 3), (5, 13), (300, 40), (40_000, 4)])
@pytest.mark.parametrize("lengths", ["chi", "sqrt_d"])
def test_a_group_of_directions_is_orthogonal(lengths, size, num, dtype):
    d = directions(Orthogonal(lengths), (size,), num=num, dtype=dtype)
    assert d.block == d.distribution.group(d.space, num) == min(size, num)
    for lo, hi in d.blocks():
        rows = d.noise(lo, hi)[0].double()
        gram = rows @ rows.T
        lengths_squared = gram.diagonal()
        cosines = gram / (lengths_squared.sqrt() * lengths_squared.sqrt()[:, None])
        torch.testing.assert_close(
            cosines, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13
        )
        if lengths == "sqrt_d":
            torch.testing.assert_close(lengths_squared, torch.full_like(lengths_squared, size), rtol=2e-6, atol=0)


@statistics
def test_lengths_and_directions_of_a_frame_are_those_of_gaussian_vectors(checks):
    rows = matrix(directions(Orthogonal(), (3,), num=90_000, seed=checks.seed()))
    checks.mean(rows.square().sum(dim=1), 3.0, effect=0.2)
    checks.mean(rows.square().sum(dim=1).square(), 15.0, effect=2.0, what="fourth moment of the length")
    checks.mean(rows**4, 3.0, effect=0.5, what="fourth moment")
    frames = rows.view(-1, 3, 3)
    # Lengths are independent of each other and of the frame; a sign left to QR would show in the products.
    square = frames.square().sum(dim=2) - 3
    checks.mean(square[:, 0] * square[:, 1], 0.0, effect=0.7)
    unit = frames / frames.norm(dim=2, keepdim=True)
    checks.mean(unit.reshape(-1, 9), 0.0, effect=0.1, what="mean of the frame")
    checks.mean(torch.linalg.det(unit), 0.0, effect=0.15, what="orientation")
    checks.mean(unit[:, 0, 0] * unit[:, 1, 1], 0.0, effect=0.1)
    # E q11 q22 q12 q21 = -1 / (d (d - 1) (d + 2)) under Haar's measure.
    checks.mean(unit[:, 0, 0] * unit[:, 1, 1] * unit[:, 0, 1] * unit[:, 1, 0], -1 / 30, effect=0.02)


def test_each_slice_has_a_frame_of_its_own():
    d = directions(Orthogonal("sqrt_d"), (4, 3), (4, 2), num=7, batch_dim=0)
    assert d.block == 5
    rows = d.noise(0, 5)[0].view(5, 4, 5).transpose(0, 1)
    torch.testing.assert_close(rows @ rows.mT, 5 * torch.eye(5, dtype=torch.float64).expand(4, 5, 5))
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 13])
def test_hadamard_directions_are_signs_and_complete(dim):
    n = 1 << (dim - 1).bit_length()
    d = directions(Hadamard(), (dim,), num=2 * n)
    assert d.block == n
    rows = matrix(d)
    assert set(rows.unique().tolist()) <= {-1.0, 1.0}
    for part in rows.split(n):
        torch.testing.assert_close(part.T @ part / n, torch.eye(dim, dtype=torch.float64))
    slices = directions(Hadamard(), (3, dim), num=n, batch_dim=0)
    by_slice = matrix(slices).view(n, 3, dim).transpose(0, 1)
    torch.testing.assert_close(by_slice.mT @ by_slice / n, torch.eye(dim, dtype=torch.float64).expand(3, dim, dim))
    if dim > 5:
        assert not torch.equal(by_slice[0], by_slice[1])


def test_a_large_group_is_made_part_by_part(monkeypatch):
    whole = matrix(directions(Hadamard(), (13,), num=50))
    monkeypatch.setattr(inspect.getmodule(Hadamard), "MOST", 60)
    d = directions(Hadamard(), (13,), num=50)
    assert (d.block, d.distribution.group(d.space, 50)) == (4, 16)
    assert torch.equal(matrix(d), whole)
    few = directions(Hadamard(), (13,), num=7)
    assert torch.equal(matrix(few), matrix(directions(Hadamard(), (13,), num=50))[:7])


@pytest.mark.parametrize("dim", [1, 4, 700])
def test_sobol_points_lie_one_in_each_interval(dim):
    num = 128
    d = directions(Sobol(), (dim,), num=num)
    points = torch.special.ndtr(matrix(d))
    cells = (points * num).floor().sort(dim=0).values
    assert torch.equal(cells, torch.arange(float(num), dtype=torch.float64)[:, None].expand(num, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sobol_is_finite_and_does_not_hang_on_the_default_dtype(dtype):
    rows = matrix(directions(Sobol(), (2,), num=200_000, dtype=dtype))
    assert torch.isfinite(rows).all()
    assert rows.abs().max() < 6.4
    torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float16)
    assert torch.equal(matrix(directions(Sobol(), (2,), num=200_000, dtype=dtype)), rows)


def test_no_value_at_the_end_of_a_sequence_is_infinite(monkeypatch):
    """Even where the engine's first point has all bits set."""
    from torch.quasirandom import SobolEngine

    plain = SobolEngine._scramble
    monkeypatch.setattr(SobolEngine, "_scramble", lambda self: (plain(self), self.shift.fill_(2**30 - 1)))
    assert torch.isfinite(matrix(directions(Sobol(), (3,), num=64))).all()


def test_sobol_groups_are_powers_of_two_with_a_scrambling_each():
    d = directions(Sobol(), (100,), num=1200)
    assert d.block == 512
    first, second = d.noise(0, 512)[0].clone(), d.noise(512, 1024)[0].clone()
    assert (first != second).double().mean() > 0.99
    sliced = directions(Sobol(), (3, 8), num=64, batch_dim=0)
    by_slice = matrix(sliced).view(64, 3, 8)
    assert not torch.equal(by_slice[:, 0], by_slice[:, 1])


# --------------------------------------------------------------------------------------------------- laws of variance


@pytest.mark.parametrize("size", [1, 5, 32, 100])
@pytest.mark.parametrize("family", [Orthogonal("sqrt_d"), Hadamard(), Coordinate()], ids=repr)
def test_a_whole_group_is_exact_on_a_quadratic(family, size):
    H = torch.randn(size, size, dtype=torch.float64)
    x, b = torch.randn(2, size, dtype=torch.float64)
    truth = (H + H.T) @ x / 2 + b
    num = 1 << (size - 1).bit_length() if isinstance(family, Hadamard) else size
    for passes in (1, 3):
        fn = zero_order(family, "antithetic", num_samples=passes * num, sigma=0.7)(lambda x: x @ H @ x / 2 + b @ x)
        torch.testing.assert_close(fn.estimate(x).grad, truth, rtol=1e-11, atol=1e-11 * float(truth.norm()))


@statistics
@pytest.mark.parametrize("num", [2, 4, 5, 15])
@pytest.mark.parametrize("lengths", ["chi", "sqrt_d"])
def test_the_error_of_orthogonal_directions_on_a_quadratic(lengths, num, checks):
    problem, d = Quadratic(), 5
    g2 = float(problem.gradient.square().sum())
    got = grads(problem, Orthogonal(lengths), num, 6000, checks)
    inside = min(num, d)
    factor = ((d + 2) / inside - 1 if lengths == "chi" else d / inside - 1) * inside / num
    checks.mean(got, problem.gradient, effect=0.25 * math.sqrt(g2), slack=1e-9)
    checks.trace(got, problem.gradient, max(factor * g2, 1e-20), effect=0.4 if factor else 1e15)


class Wavy:
    """Not a quadratic; its smoothing is known: each wave shrinks by exp(-s^2 k^2 / 2)."""

    k = torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64)
    a = torch.tensor([1.0, -0.4, 2.0, 0.7], dtype=torch.float64)
    x = torch.tensor([0.3, -0.8, 0.1, 1.2], dtype=torch.float64)
    sigma = 0.6

    def __call__(self, x):
        return (self.a * (self.k * x).sin()).sum(dim=-1) + 0.5

    @property
    def smoothed(self):
        return self.a * self.k * (self.k * self.x).cos() * torch.exp(-((self.sigma * self.k) ** 2) / 2)


@statistics
@pytest.mark.parametrize(("scheme", "num"), [(NAIVE, 4), (FORWARD, 4), (ANTITHETIC, 4), (ANTITHETIC, 2)], ids=str)
def test_orthogonality_takes_off_its_share_for_any_function_and_scheme(scheme, num, checks):
    """MSE of independent directions minus MSE of orthogonal ones = (N - 1) / N |grad f_s|^2."""
    problem = Wavy()
    target = problem.smoothed
    repetitions = 8000 if num == 4 else 16_000
    independent, orthogonal = (
        grads(problem, family, num, repetitions, checks, scheme) for family in (Gaussian(), Orthogonal())
    )
    checks.mean(orthogonal, target, effect=0.2 * float(target.norm()))
    difference = (independent - target).square().sum(dim=1) - (orthogonal - target).square().sum(dim=1)
    expected = (num - 1) / num * float(target.square().sum())
    checks.mean(difference, expected, effect=expected)


@statistics
@pytest.mark.parametrize("num", [1, 3, 7, 12])
def test_the_error_of_hadamard_directions_on_a_quadratic(num, checks):
    problem, d, n = Quadratic(), 5, 8
    g2 = float(problem.gradient.square().sum())
    got = grads(problem, Hadamard(), num, 5000, checks)
    inside = num % n or n  # a whole group has no error
    expected = (d - 1) / inside * (n - inside) / (n - 1) * (inside / num) ** 2 * g2
    checks.mean(got, problem.gradient, effect=0.25 * math.sqrt(g2))
    checks.trace(got, problem.gradient, expected, effect=0.4)


@statistics
@pytest.mark.parametrize("scheme", [NAIVE, FORWARD, ANTITHETIC], ids=repr)
def test_sobol_is_unbiased_and_better_than_chance_on_a_smooth_function(scheme, checks):
    problem, num = Wavy(), 256
    target = problem.smoothed
    independent, sobol = (grads(problem, family, num, 400, checks, scheme) for family in (Gaussian(), Sobol()))
    checks.mean(sobol, target, effect=0.1 * float(target.norm()))
    errors = [(g - target).square().sum(dim=1).mean() for g in (independent, sobol)]
    assert errors[1] < errors[0] / 5


@statistics
@pytest.mark.parametrize("num", [2, 4, 7, 10])
def test_random_coordinates_are_unbiased_with_the_variance_of_a_sample_without_replacement(num, checks):
    problem, d = Quadratic(curved=False), 5
    g2 = float(problem.gradient.square().sum())
    got = grads(problem, Coordinate(), num, 1500, checks)
    inside = num % d
    expected = (d / inside - 1) * (inside / num) ** 2 * g2 if inside else 1e-20
    checks.mean(got, problem.gradient, effect=0.5 * math.sqrt(g2))
    checks.trace(got, problem.gradient, expected, effect=0.4 if inside else 1e15)


# --------------------------------------------------------------------------------------------------------- coordinates


STEPS = {"w": 0.5, "b": 0.25, "c": 2.0}


def tree(dtype=torch.float64):
    return {
        "w": torch.tensor([[0.5, -1.25, 2.0], [0.25, 1.0, -0.5]], dtype=dtype),
        "b": torch.tensor(0.75, dtype=dtype),
        "c": torch.tensor([1.5, -2.0], dtype=dtype),
    }


def uneven(p):
    w, b, c = p["w"].double(), p["b"].double(), p["c"].double()
    return (w.sin() * 3 + w**3).flatten(-2).sum(-1) + b.exp() + (c[..., 0] * c[..., 1] ** 2)


def differences(scheme, dtype):
    """Finite differences, written out."""
    out = {}
    for name, leaf in tree(dtype).items():
        out[name] = torch.empty_like(leaf)
        for k in range(leaf.numel()):
            total = 0.0
            for c, w in zip(scheme.offsets, scheme.weights, strict=True):
                point = tree(dtype)
                point[name].view(-1)[k] += c * STEPS[name]
                total = total + w * uneven(point)
            out[name].view(-1)[k] = total.to(dtype) / STEPS[name]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("evaluator", [Loop(), Vmap(), Vmap(4), Batched(), Batched(2)], ids=repr)
@pytest.mark.parametrize("scheme", [FORWARD, ANTITHETIC, FOURTH_ORDER], ids=repr)
def test_every_coordinate_once_is_plain_finite_differences(scheme, evaluator, dtype):
    options = {"num_samples": None, "sigma": STEPS, "evaluator": evaluator}
    estimate = zero_order(Coordinate(), scheme, **options)(uneven).estimate(tree(dtype))
    assert estimate.evaluations == 1 + 9 * len(scheme.sides)
    assert len(estimate.directions) == 9
    for name, wanted in differences(scheme, dtype).items():
        # Vectorized kernels may round a value otherwise; one call after the other they are the same bits.
        if isinstance(evaluator, Loop):
            assert torch.equal(estimate.grad[name], wanted)
        else:
            torch.testing.assert_close(estimate.grad[name], wanted)


def test_coordinates_need_differences():
    with pytest.raises(ValueError, match=r"`zero_order\(Coordinate\(\), method=.*` needs a scheme whose weights sum"):
        zero_order(Coordinate(), NAIVE, num_samples=None)(uneven)
    with pytest.raises(ValueError, match="whose weights sum to zero without the center, such as 'antithetic'"):
        zero_order(Coordinate(), FORWARD, num_samples=None, shaping=leave_one_out)(uneven)
    zero_order(Coordinate(), ANTITHETIC, num_samples=None, shaping=leave_one_out)(uneven)


def test_the_bias_of_finite_differences():
    x, h = torch.tensor([0.7, -1.1, 0.3], dtype=torch.float64), 0.25
    fn = zero_order(Coordinate(), "forward", num_samples=None, sigma=h)(lambda x: (x**3).sum())
    torch.testing.assert_close(fn.estimate(x).grad - 3 * x**2, 3 * x * h + h**2)
    central = fn.replace(method="antithetic").estimate(x).grad
    torch.testing.assert_close(central - 3 * x**2, torch.full_like(x, h**2))
    torch.testing.assert_close(fn.replace(method="fourth_order").estimate(x).grad, 3 * x**2)


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_coordinates_of_each_slice(batch_dim, evaluator):
    params = {
        "w": torch.randn(3, 2, 4, dtype=torch.float64).movedim(0, batch_dim),
        "b": torch.randn(3, 5, dtype=torch.float64).movedim(0, batch_dim).contiguous(),
        "e": torch.zeros(3, 0, dtype=torch.float64).movedim(0, batch_dim),
    }

    def fn(p):
        w, b = p["w"].movedim(batch_dim, 0), p["b"].movedim(batch_dim, 0)
        out = (w**3).sum(dim=(1, 2)) * torch.arange(1.0, 4.0) + (b**2).sum(dim=1)
        return out if batch_dim == 0 else out.unsqueeze(0)

    options = {"num_samples": None, "sigma": 0.5, "batch_dim": batch_dim, "evaluator": evaluator}
    f = zero_order(Coordinate(), "antithetic", **options)(fn)
    params = {k: v.requires_grad_() for k, v in params.items()}
    out = f(params)
    out.sum().backward()
    w, b = params["w"].detach().movedim(batch_dim, 0), params["b"].detach()
    wanted = (3 * w**2 + 0.25) * torch.arange(1.0, 4.0).view(3, 1, 1)
    torch.testing.assert_close(params["w"].grad.movedim(batch_dim, 0), wanted)
    torch.testing.assert_close(params["b"].grad, 2 * b)
    order = f.estimate(params).directions.noise(0, 13)[0]
    assert torch.equal(order.sort(dim=0).values, torch.arange(13)[:, None].expand(13, 3))
    assert not torch.equal(order[:, 0], order[:, 1])


def test_a_subset_is_without_replacement_and_by_the_seed():
    first, again, other = (
        directions(Coordinate(), (50,), num=20, seed=seed).noise(0, 20)[0].clone() for seed in (1, 1, 2)
    )
    assert len(first.unique()) == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    passes = directions(Coordinate(), (50,), num=120)
    counts = matrix(passes).flatten().bincount(minlength=50)
    assert set(counts.tolist()) == {2, 3}


def test_coordinates_of_many_parameters_are_not_a_matrix():
    d = directions(Coordinate(), (1_000_000,), num=1_000_000)
    assert d.block == 1_000_000
    assert [part.numel() for part in d.noise(5, 6)] == [1]
    assert sum(part.numel() for part in d._noise) == 1_000_000
    assert len(pickle.dumps(d)) < 2000


def test_low_precision_coordinates_move_in_full_precision_and_round_once():
    x = torch.linspace(0.5, 1.5, 20).bfloat16()
    d = directions(Coordinate(), (20,), num=20, dtype=torch.bfloat16)
    (moved,) = d.distribution.shift(d.space, (x,), d.noise(0, 20), (0.05,))
    at = d.noise(0, 20)[0][:, 0]
    assert torch.equal(moved[torch.arange(20), at], (x.float() + 0.05).bfloat16()[at])
    moved[torch.arange(20), at] = x[at]
    assert torch.equal(moved, x.expand(20, 20))


NOT_FINITE = {"none": None, "signs": Rademacher(), "orthogonal": Orthogonal(), "hadamard": Hadamard(), "sobol": Sobol()}
NOT_FINITE["a function"] = lambda shape: 1


@pytest.mark.parametrize("family", NOT_FINITE.values(), ids=NOT_FINITE)
def test_only_coordinates_can_be_taken_each_once(family):
    with pytest.raises(
        TypeError, match=r"`zero_order\(num_samples=...\)` must be an int, got None: .*`distribution=Co"
    ):
        zero_order(family, num_samples=None)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first jvp
def test_a_vector_valued_function_gets_its_jacobian_by_coordinates():
    fn = zero_order(Coordinate(), "antithetic", num_samples=None, sigma=0.1)(
        lambda x: torch.stack([x.prod(), x[0] * 3])
    )
    x = torch.tensor([2.0, -3.0, 0.5], dtype=torch.float64)
    wanted = torch.tensor([[-1.5, 1.0, -6.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(fn)(x), wanted)
    torch.testing.assert_close(torch.func.jacfwd(fn)(x), wanted)


# -------------------------------------------------------------------------------------------------------------- guided


BASIS = torch.tensor([[1.0, 0.5], [2.0, -0.3], [0.0, 1.0], [-1.0, 0.2], [0.4, 0.7]], dtype=torch.float64)


@statistics
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_mean_of_guided_estimates_is_the_covariance_times_the_gradient(alpha, checks):
    problem = Quadratic(curved=False)
    family = Guided(BASIS, alpha)
    fn = zero_order(family, "antithetic", num_samples=200_000, sigma=0.5, evaluator="batched", seed=checks.seed())
    estimate = fn(problem).estimate(problem.x)
    rows = torch.cat([estimate.directions.noise(lo, hi)[0].clone() for lo, hi in estimate.directions.blocks()])
    q, _ = torch.linalg.qr(BASIS)
    S = alpha * torch.eye(5, dtype=torch.float64) + (1 - alpha) * 5 / 2 * q @ q.T
    assert float(S.trace()) == pytest.approx(5)
    products = torch.einsum("ni,nj->nij", rows, rows).flatten(1)
    checks.mean(products, S.flatten(), effect=0.15, what="covariance")
    target = S @ problem.gradient
    torch.testing.assert_close(family.covariance(estimate.directions.space, problem.gradient), target)
    each = estimate.coefficients[:, None] * rows / 0.5
    checks.mean(each, target, effect=0.2 * float(problem.gradient.norm()))
    # Var = |S g|^2 + tr(S) g.S g, by Isserlis; with S = I the (d + 1) |g|^2 of Gaussian directions.
    g = problem.gradient
    checks.trace(each, target, float(target @ target + 5 * g @ target), effect=0.15, what="guided")


def test_a_gradient_in_the_subspace_stays_in_it_whatever_the_radius_of_each_leaf():
    """With alpha = 0 and the gradient itself as basis, every single direction gives a multiple of it."""
    slope = {"a": torch.tensor([1.0, -2.0], dtype=torch.float64), "b": torch.tensor([0.5], dtype=torch.float64)}
    family = Guided([slope], alpha=0.0)
    options = {"method": "antithetic", "num_samples": 2000, "sigma": {"a": 0.1, "b": 3.0}, "seed": 1}
    decorated = zero_order(family, **options)(lambda x: sum((slope[k] * x[k]).sum() for k in slope))
    found = decorated.estimate({k: torch.zeros_like(v) for k, v in slope.items()})
    gradient = flat(slope)
    torch.testing.assert_close(flat(found.grad), gradient * (flat(found.grad)[0] / gradient[0]))
    stated = found.directions.distribution.covariance(found.directions.space, gradient)
    torch.testing.assert_close(stated, 3 * gradient)  # d / k
    torch.testing.assert_close(flat(found.grad), stated, rtol=0.2, atol=0)


def test_directions_in_a_subspace_are_the_same_under_autocast():
    options = {"method": "antithetic", "num_samples": 6, "sigma": 0.1, "seed": 0}
    fn = zero_order(Guided(torch.randn(60, 2, generator=torch.Generator().manual_seed(0))), **options)(torch.sum)
    plain = fn.estimate(torch.zeros(60))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fn.estimate(torch.zeros(60)).coefficients, plain.coefficients)


def test_a_basis_has_many_forms():
    def fn(p):
        return (p["a"] * 2).sum() + (p["b"] ** 2).sum()

    params = {"b": torch.tensor([0.5, -1.0]), "a": torch.tensor([[1.0, 2.0], [3.0, -1.0]])}
    trees = [{k: torch.randn_like(v) for k, v in params.items()} for _ in range(2)]
    columns = torch.stack([flat(t).float() for t in trees], dim=1)
    options = {"method": "antithetic", "num_samples": 5, "seed": 1}
    wanted = zero_order(Guided(columns), **options)(fn).estimate(params).grad
    for basis in (trees, tuple(trees), [{"a": columns[:4, k].view(2, 2), "b": columns[4:, k]} for k in (0, 1)]):
        got = zero_order(Guided(basis), **options)(fn).estimate(params).grad
        assert all(torch.equal(got[k], wanted[k]) for k in params)
    one = zero_order(Guided(trees[0]), **options)(fn).estimate(params).grad
    column = zero_order(Guided(columns[:, :1]), **options)(fn).estimate(params).grad
    assert all(torch.equal(one[k], column[k]) for k in params)
    # The estimate of one step is a surrogate of the next.
    assert zero_order(Guided([one, wanted]), **options)(fn).estimate(params).evaluations == 11


def test_each_slice_has_its_own_part_of_a_basis():
    basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    fn = zero_order(Guided(basis, alpha=0.0), num_samples=4, batch_dim=0, seed=1)(lambda x: x.sum(dim=1))
    rows = fn.estimate(torch.zeros(2, 3)).directions.noise(0, 4)[0].view(4, 2, 3)
    assert not rows[:, 0, 1:].any()
    assert not rows[:, 1, :2].any()
    assert rows[:, 0, 0].all()
    assert rows[:, 1, 2].all()


def test_a_basis_that_changes_later_changes_nothing():
    basis = BASIS.clone()
    family = Guided(basis)
    before = matrix(directions(family, (5,), num=4))
    twin = pickle.loads(pickle.dumps(family))
    basis.zero_()
    assert torch.equal(matrix(directions(family, (5,), num=4)), before)
    assert torch.equal(matrix(directions(twin, (5,), num=4)), before)
    assert twin == family != Guided(BASIS, 0.4)
    assert family != Guided(BASIS + 1)
    assert repr(twin) == repr(family) != repr(Guided(BASIS + 1))
    assert hash(twin) == hash(family)
    # Used on other parameters meanwhile, and then again.
    square = Guided(torch.ones(1, 1))
    matrix(directions(square, (1,), num=2))
    assert torch.isfinite(matrix(directions(square, (1,), num=2, dtype=torch.float32))).all()


@pytest.mark.parametrize(
    ("basis", "says"),
    [
        (torch.ones(4, 2), r"must be of shape \(5, k\), or trees .*\(5,\), got \(4, 2\)"),
        (torch.ones(4), r"must be of shape \(5, k\), or trees .* got \(4,\)"),
        ([torch.ones(5), torch.ones(4)], r"must be of shape \(5, k\).*got \(5,\), \(4,\)"),
        (torch.randn(2, 5), r"must be of shape \(5, k\).* got \(2, 5\)"),
        (torch.randn(5, 6), r"must have 1 to d columns, d = 5 values of a slice, got 6"),
        (torch.stack([BASIS[:, 0], -2 * BASIS[:, 0]], dim=1), r"must have full rank, got 2 surrogate gradients"),
        (torch.stack([BASIS[:, 0], torch.zeros(5)], dim=1), r"must have full rank.*singular value 0\.0e\+00"),
        (torch.cat([BASIS, BASIS @ torch.tensor([[1.0], [2.0]]).double()], dim=1), "must have full rank, got 3"),
    ],
)
def test_a_basis_that_does_not_fit_is_refused_before_fn_is_called(basis, says):
    with pytest.raises(ValueError, match=r"`Guided\(basis=...\)` " + says):
        zero_order(Guided(basis))(lambda x: pytest.fail("called")).estimate(torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Guided([]), ValueError, r"`Guided\(basis=...\)` must hold a surrogate gradient at least, got \[\]"),
        (lambda: Guided(torch.ones(3, 0)), ValueError, "must hold a surrogate gradient at least"),
        (lambda: Guided([1.0]), TypeError, r"must hold dense tensors of real floating-point numbers, got float 1\.0"),
        (lambda: Guided(torch.ones(3, dtype=torch.int64)), TypeError, r"got torch\.int64"),
        (lambda: Guided(torch.tensor([1.0, math.nan])), ValueError, "must be finite, got 1 values of 2"),
        (lambda: Guided(BASIS, 1.5), ValueError, r"`Guided\(alpha=...\)` must lie in \[0, 1\], got 1\.5"),
        (lambda: Guided(BASIS, math.nan), ValueError, r"must lie in \[0, 1\], got nan"),
        (lambda: Guided(BASIS, "half"), TypeError, r"`Guided\(alpha=...\)` must be a number, got str 'half'"),
        (
            lambda: Orthogonal("one"),
            ValueError,
            r"`Orthogonal\(lengths=...\)` must be one of 'chi', 'sqrt_d', got 'one'",
        ),
        (lambda: Orthogonal(lengths=None), ValueError, r"must be one of 'chi', 'sqrt_d', got None"),
    ],
)
def test_settings_are_checked(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_sobol_has_a_limit_that_it_names_before_fn_is_called():
    fn = zero_order(Sobol())(lambda x: pytest.fail("called"))
    with pytest.raises(
        ValueError, match=r"`zero_order\(Sobol\(\)\)` has at most 21201 dimensions.*got 21202 parameters"
    ):
        fn.estimate(torch.zeros(21_202))
    assert directions(Sobol(), (2, 20_000), num=2, batch_dim=0).noise(0, 2)[0].shape == (2, 40_000)  # by slice


# --------------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("family", [*FAMILIES, Guided(BASIS)], ids=str)
def test_what_they_say_about_themselves(family):
    assert family.independent is isinstance(family, Guided)
    assert family.gaussian_marginals is (family in (Orthogonal(), Sobol()))
    assert family.finite is isinstance(family, Coordinate)
    assert pickle.loads(pickle.dumps(family)) == family
    space = Space.of((torch.zeros(5),))
    assert family.group(space, 100) == {Hadamard: 8, Sobol: 100, Guided: 1}.get(type(family), 5)
    if not isinstance(family, Guided):
        vector = torch.arange(5.0)
        assert torch.equal(family.covariance(space, vector), vector)


@pytest.mark.parametrize("family", [*FAMILIES, Guided(BASIS)], ids=str)
def test_sigma_of_each_leaf(family):
    """In units of each leaf's sigma the estimate is that of one radius."""
    problem, sigma = Quadratic(), {"first": 0.1, "second": 2.0, "third": 0.5}
    scale = torch.tensor([0.1, 0.1, 2.0, 2.0, 0.5], dtype=torch.float64)
    start = problem.params()
    options = {"method": "antithetic", "num_samples": 7, "seed": 3}
    got = zero_order(family, **options, sigma=sigma)(problem).estimate(start).grad
    if isinstance(family, Guided):  # a subspace is one of the parameters, and moves to these units with them
        family = Guided(BASIS.double() * scale[:, None], family.alpha)
    one = zero_order(family, **options, sigma=1.0)(lambda u: problem(problem.x + scale * u))
    wanted = one.estimate(torch.zeros(5, dtype=torch.float64)).grad
    torch.testing.assert_close(flat(got) * scale, wanted)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("num", [1, 2, 9])
def test_one_parameter(family, num):
    fn = zero_order(family, "antithetic", num_samples=num, sigma=0.5, seed=2)(lambda x: (3 * x).sum())
    grad = fn.estimate(torch.zeros(1, dtype=torch.float64)).grad
    assert grad > 0
    if not family.gaussian_marginals:
        torch.testing.assert_close(grad, torch.tensor([3.0], dtype=torch.float64))


@pytest.mark.parametrize("family", [Orthogonal(), Guided(torch.eye(300)[:, :40] + 0.1 * torch.ones(300, 40))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(family, dtype):
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows.append(matrix(directions(pickle.loads(pickle.dumps(family)), (300,), num=700, dtype=dtype)))
        assert torch.get_num_threads() == threads
    assert torch.equal(*rows)


def test_the_families_train():
    """In plain use: fewer evaluations for the same gradient."""
    torch.manual_seed(1)
    weights = torch.randn(64)
    x = torch.randn(64)
    truth = weights * x.cos()
    fn = zero_order(method="antithetic", num_samples=64, sigma=0.01, seed=1)(lambda x: (weights * x.sin()).sum())
    cosines = {
        str(family): float(torch.cosine_similarity(fn.replace(distribution=family).estimate(x).grad, truth, dim=0))
        for family in [Gaussian(), *FAMILIES]
    }
    assert cosines["Gaussian()"] < 0.85
    assert min(cosines[str(f)] for f in FAMILIES if not isinstance(f, Sobol)) > 0.95, cosines


def test_a_device_that_does_not_tell_its_free_memory_has_chunks_by_the_cache():
    space = types.SimpleNamespace(device=torch.device("mps"), size=1 << 10, dtype=torch.float32)
    points = types.SimpleNamespace(directions=types.SimpleNamespace(space=space, distribution=Gaussian()))
    assert fitting_rows(points) == 1 << 9
