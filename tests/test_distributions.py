"""What every distribution of directions owes, over all of them."""

import pytest
import torch

import zograd
from problems import Directions, adapted
from zograd import ZeroOrderWarning, zero_order
from zograd._base.trees import Space
from zograd.distributions import Dense, Gaussian, Hadamard, Orthogonal, Rademacher, Sobol, Sphere


class Standard:
    def sample(self, sample_shape=()):
        return torch.randn(sample_shape)


FAMILIES = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "orthogonal": Orthogonal(),
    "orthogonal, one length": Orthogonal("sqrt_d"),
    "hadamard": Hadamard(),
    "sobol": Sobol(),
    "sample": adapted(Standard()),
    "function": adapted(torch.randn),
    "torch": adapted(torch.distributions.Uniform(-(3**0.5), 3**0.5)),
}
DTYPES = [torch.float32, torch.float64]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def space(*shapes, dtype=torch.float64, batch_dim=None):
    return Space.of(tuple(torch.empty(shape, dtype=dtype) for shape in shapes), batch_dim)


def directions(family, layout, num, seed=5):
    if family == "sobol" and layout.dim > 21201:
        pytest.skip("has no more dimensions")
    return Directions(FAMILIES[family], layout, seed, num)


def all_noise(d):
    return torch.cat([d.noise(lo, hi)[0].clone() for lo, hi in d.blocks()])


@every_dtype
@every_family
def test_moments(family, dtype):
    """Mean zero and scale * E[eps eps^T] = I, also across leaves, rows and blocks."""
    num = 4000
    d = directions(family, space((3, 2), (2,), dtype=dtype), num)
    rows = all_noise(d)
    assert rows.dtype == dtype
    assert rows.isfinite().all()
    rows = rows.double()
    assert rows.mean(dim=0).abs().max() < 6 / num**0.5
    second = d.distribution.scale(d.space) * rows.T @ rows / num
    assert (second - torch.eye(8)).abs().max() < 6 * 2**0.5 / num**0.5
    if d.distribution.independent:
        following = (rows[1:] * rows[:-1]).mean(dim=0)
        assert following.abs().max() < 6 / num**0.5


@every_family
def test_blocks_and_tiles_are_not_correlated(family):
    d = directions(family, space((70_000,), dtype=torch.float32), 2)
    values = all_noise(d).double()[:, : 2 * 32768].reshape(4, 32768)  # two tiles of each of two blocks
    correlation = torch.corrcoef(values) - torch.eye(4)
    assert correlation.abs().max() < 6 / 32768**0.5


@pytest.mark.parametrize("shapes", [((7,),), ((3, 2), (1,)), ((300, 300),)], ids=str)
@every_dtype
def test_sphere_has_the_radius_of_the_whole_vector(shapes, dtype):
    d = directions("sphere", space(*shapes, dtype=dtype), 20)
    lengths = all_noise(d).double().square().sum(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, d.space.size), rtol=2e-6, atol=0)


def test_each_slice_has_a_sphere_of_its_own():
    d = directions("sphere", space((4, 3), (4, 2), batch_dim=0), 50)
    lengths = all_noise(d).view(50, 4, 5).square().sum(dim=2)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 5.0))


@every_dtype
@pytest.mark.parametrize("d", [1, 31, 33, 64, 65, 40_000])
def test_rademacher_has_signs_only_and_both(d, dtype):
    rows = all_noise(directions("rademacher", space((d,), dtype=dtype), 129))
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    assert rows.double().mean().abs() < 6 / rows.numel() ** 0.5


@every_family
@pytest.mark.parametrize(
    ("shapes", "batch_dim"), [(((3, 2), (), (2,)), None), (((6,),), None), (((2, 3), (2,)), 0), (((3, 2), (2, 2)), 1)]
)
def test_sum_dot_and_shift_are_their_formulas(family, shapes, batch_dim):
    layout = space(*shapes, batch_dim=batch_dim)
    d = directions(family, layout, 11)
    noise = d.noise(0, 11)
    rows = noise[0].clone().view(11, layout.slices, layout.dim)
    c = torch.randn(11, layout.slices, dtype=torch.float64)
    start = torch.randn(layout.size, dtype=torch.float64)
    out = start.clone()
    d.add_sum(0, c, out)
    torch.testing.assert_close(out, start + torch.einsum("rs,rsd->sd", c, rows).flatten())

    vector = torch.randn(layout.size, dtype=torch.float64)
    dots = d.distribution.dot(layout, d.noise(0, 11), vector)
    torch.testing.assert_close(dots, torch.einsum("rsd,sd->rs", rows, vector.view(layout.slices, layout.dim)))

    params = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    scale = tuple(0.1 * (i + 1) for i in range(len(shapes)))
    parts = d.distribution.parts(layout, d.noise(0, 11))
    moved = d.distribution.shift(layout, params, parts, scale)
    for k in (0, 10):
        leaves = layout.split(rows[k].flatten())
        one = d.distribution.shift(layout, params, tuple(part[k] for part in parts), scale)
        for at_k, single, leaf, eps, s in zip((m[k] for m in moved), one, params, leaves, scale, strict=True):
            torch.testing.assert_close(at_k, leaf + s * eps)
            torch.testing.assert_close(single, leaf + s * eps)


def test_low_precision_leaves_are_moved_in_full_precision_and_rounded_once():
    layout = space((2000,), dtype=torch.bfloat16)
    assert layout.dtype == torch.float32
    d = directions("gaussian", layout, 3)
    params = torch.linspace(0.5, 1.5, 2000).bfloat16()
    parts = d.distribution.parts(layout, d.noise(0, 3))
    (moved,) = d.distribution.shift(layout, (params,), parts, (0.05,))
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, (params.float() + 0.05 * d.noise(0, 3)[0]).bfloat16())


@every_family
def test_a_range_of_directions_is_the_same_alone(family):
    """In any order, from a fresh object, across blocks and at the partial end."""
    num = 2 * 655 + 77
    layout = space((60,), (40,))
    whole = all_noise(directions(family, layout, num))
    d = directions(family, layout, num)
    for lo, hi in [(1300, num), (0, 1), (654, 656), (3, 1390 - 10), (0, num)]:
        hi = min(hi, num)
        assert torch.equal(d.noise(lo, hi)[0], whole[lo:hi])
        assert torch.equal(directions(family, layout, num).noise(lo, hi)[0], whole[lo:hi])


@every_family
def test_leaves_of_equal_shape_get_different_noise(family):
    first, second = FAMILIES[family].parts(space((50,), (50,)), directions(family, space((50,), (50,)), 3).noise(0, 3))
    assert not torch.equal(first, second)
    assert (first != second).double().mean() > 0.2


def test_a_family_needs_only_fill():
    class Uniform(Dense):
        def fill(self, out, generator):
            out.uniform_(-(3**0.5), 3**0.5, generator=generator)

    a = torch.tensor([1.0, -2.0, 0.5])
    fn = zero_order(Uniform(), "antithetic", num_samples=20_000, evaluator="vmap", seed=1)(lambda x: (a * x).sum())
    torch.testing.assert_close(fn.estimate(torch.zeros(3)).grad, a, rtol=0, atol=0.1)


class Recorded(Gaussian):
    """Remembers which rows it was asked to make, and how many it holds at once."""

    def __init__(self):
        self.drawn, self.held, self.most = [], {}, 0

    def empty(self, space, rows):
        import weakref

        (noise,) = super().empty(space, rows)
        self.held[id(noise)] = rows
        weakref.finalize(noise, self.held.pop, id(noise))
        self.most = max(self.most, sum(self.held.values()))
        return (noise,)

    def draw(self, space, noise, seed, block):
        self.drawn.append(block)
        super().draw(space, noise, seed, block)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("size", [1000, 40_000])
@pytest.mark.parametrize(
    ("evaluator", "chunk"),
    [("loop", None), ("vmap", 3), ("vmap", 70), ("vmap", 150), ("batched", 10), ("batched", None)],
)
def test_each_direction_is_made_once_and_few_are_held(evaluator, chunk, size, prefetch):
    from zograd import evaluators

    family = Recorded()
    made = {"loop": evaluators.Loop, "vmap": evaluators.Vmap, "batched": evaluators.Batched}[evaluator]
    fn = torch.vmap(torch.sum) if evaluator == "batched" else torch.sum
    options = {
        "num_samples": 150,
        "evaluator": made(prefetch) if evaluator == "loop" else made(chunk, prefetch=prefetch),
    }
    estimate = zero_order(family, "antithetic", **options)(fn).estimate(torch.zeros(size))
    block = estimate.directions.block
    assert family.drawn == list(range(-(-150 // block)))
    # One block, or one chunk of whole blocks, and the next if it is made ahead; while sizes change, the one before.
    chunk = chunk or (1 if evaluator == "loop" else max(1, (1 << 19) // size))
    assert family.most <= (2 + prefetch) * max(block, chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sigma_below_the_resolution_is_warned_of(dtype):
    f = zero_order(method="antithetic", sigma=1e-3)(lambda x: x.sum())
    with pytest.warns(ZeroOrderWarning, match=r"is 0\.001, below the resolution of torch\.(b?float16)"):
        f.estimate(torch.full((4,), 100.0, dtype=dtype))
    f.replace(sigma=1.0).estimate(torch.full((4,), 100.0, dtype=dtype))


class Mirrored(Gaussian):
    """Points on the other side, by a `shift` of its own."""

    def shift(self, space, params, parts, scale):
        return super().shift(space, params, parts, tuple(-s for s in scale))


@pytest.mark.parametrize("evaluator", ["loop", "vmap", "batched", zograd.evaluators.Vmap(3)])
def test_a_family_that_moves_parameters_in_its_own_way_does_so_under_every_evaluator(evaluator):
    def fn(x):
        return (x * torch.arange(1.0, 5.0)).sum(dim=-1)

    settings = {"num_samples": 7, "seed": 0, "evaluator": evaluator, "method": "fourth_order"}
    own = zograd.zero_order(Mirrored(), **settings)(fn).estimate(torch.ones(4))
    plain = zograd.zero_order(Gaussian(), **settings)(fn).estimate(torch.ones(4))
    torch.testing.assert_close(own.coefficients, -plain.coefficients)
