"""Contracts over the registries: a new scheme, distribution or evaluator is tested by being listed."""

import inspect
import itertools
import pickle
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import zograd
from problems import Directions, adapted
from zograd import distributions, evaluators, schemes, shaping, zero_order
from zograd._base.trees import Space
from zograd.distributions import Dense
from zograd.evaluators import EVALUATORS, Evaluator
from zograd.evaluators.task.answer import Answer
from zograd.failures import Drop
from zograd.schemes import SCHEMES


class Signs:
    """TorchOpt's first form: an object."""

    def sample(self, sample_shape=()):
        return torch.randint(0, 2, sample_shape) * 2 - 1


def normal(sample_shape=()):
    """TorchOpt's second form: a function."""
    return torch.randn(sample_shape)


class Guided(distributions.Guided):
    """With surrogates of its own for whatever parameters it meets."""

    def __init__(self):
        super().__init__(torch.ones(1), alpha=0.3)

    def _columns(self, space):
        generator = torch.Generator().manual_seed(3)
        return torch.randn(space.slices, space.dim, 2, dtype=torch.float64, generator=generator)


MADE = {"Guided": Guided}
FAMILIES = {
    name: MADE.get(name, family)()
    for name, family in vars(distributions).items()
    if inspect.isclass(family) and issubclass(family, distributions.Distribution) and not inspect.isabstract(family)
}
ADAPTED = {
    "object": adapted(Signs()),
    "function": adapted(normal),
    "torch Distribution": adapted(torch.distributions.Uniform(-(3**0.5), 3**0.5)),
}
DISTRIBUTIONS = FAMILIES | ADAPTED

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
every_evaluator = pytest.mark.parametrize("evaluator", EVALUATORS.values(), ids=EVALUATORS.keys())
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())


def test_the_registries_hold_every_member():
    assert FAMILIES
    assert {e.__name__ for e in EVALUATORS.values()} == set(evaluators.__all__) - {
        "EVALUATORS",
        "Evaluator",
        "Distributed",  # not by name: it needs a process group; tests/test_distributed.py holds it to the contract
        "Journal",  # not by name: it needs a file; tests/test_journal.py holds it to the contract
        "Pool",  # nor this: it has workers; tests/test_pool.py does
    }
    assert {s.name for s in SCHEMES.values()} == set(schemes.__all__) - {"SCHEMES", "Scheme"}
    assert set(FAMILIES) | {"Distribution", "Dense"} >= {n for n in distributions.__all__ if n[0].isupper()}


# ----------------------------------------------------------------------------------------------------------- schemes


@every_scheme
def test_a_scheme_is_exact_up_to_its_order(scheme):
    center, step = 0.7, 0.3
    for power in range(scheme.order + 1):
        sides = torch.tensor([[(center + step * c) ** power for c in scheme.sides]], dtype=torch.float64)
        # A scheme without a center that does not sum to zero sees the constant too.
        level = 0.0 if scheme.is_difference else center**power
        slope = scheme.combine(sides - level, torch.tensor(center**power - level, dtype=torch.float64)) / step
        assert slope.item() == pytest.approx(power * center ** max(power - 1, 0), abs=1e-12)


@every_scheme
def test_a_scheme_combines_each_direction_alone(scheme):
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(23, len(scheme.sides), 3, dtype=torch.float64, generator=generator)
    center = torch.randn(3, dtype=torch.float64, generator=generator)
    whole = scheme.combine(sides, center)
    assert torch.equal(whole, torch.cat([scheme.combine(part, center) for part in sides.split([1, 7, 3, 12])]))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_goes_by_its_name(name):
    assert zero_order(method=name)(np.sum).options.method is SCHEMES[name]


# ----------------------------------------------------------------------------------------------------- distributions


SPACES = {
    "one leaf": Space.of((torch.zeros(5),)),
    "three leaves": Space.of((torch.zeros(2, 3), torch.zeros(()), torch.zeros(2, 3))),
    "mixed dtypes": Space.of((torch.zeros(4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float64))),
    "several rows a block": Space.of((torch.zeros(60, 50), torch.zeros(60, 50))),  # 10 of them
    "larger than a tile": Space.of((torch.zeros(33000), torch.zeros(70))),
    "slices": Space.of((torch.zeros(3, 4, 2), torch.zeros(5, 4)), batch_dim=1),
}
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def directions_of(distribution, space, num=7, seed=5):
    if space.batch_dim is not None and isinstance(distribution, distributions.LowRank):
        pytest.skip("has no form by slices")
    if space.dim > 21201 and isinstance(distribution, distributions.Sobol):
        pytest.skip("has no more dimensions")
    return Directions(distribution, space, seed, num)


def rows_of(directions, lo=0, hi=None):
    """The directions as a matrix (rows, size), by way of the contract: the sum with one coefficient 1."""
    space, rows = directions.space, []
    for i in range(lo, len(directions) if hi is None else hi):
        out = torch.zeros(space.size, dtype=space.dtype)
        one = torch.ones(1, space.slices, dtype=space.dtype)
        directions.distribution.add_sum(space, directions.noise(i, i + 1), one, out)
        rows.append(out)
    return torch.stack(rows)


@every_distribution
@every_space
def test_a_direction_is_a_function_of_its_key(distribution, space):
    block = directions_of(distribution, space).block
    directions = directions_of(distribution, space, num=2 * block + 3 if space.size > 1000 else 7)
    whole = rows_of(directions)
    assert whole.dtype == space.dtype
    assert torch.isfinite(whole).all()
    num = len(directions)
    for lo, hi in [(num - 1, num), (0, 1), (num // 2, num), (0, num), (1, 2)]:
        assert torch.equal(rows_of(directions, lo, hi), whole[lo:hi])
        again = directions_of(distribution, space, num)
        assert torch.equal(rows_of(again, lo, hi), whole[lo:hi])
    with torch.random.fork_rng():
        torch.randn(3)  # whatever torch's stream does meanwhile
        assert torch.equal(rows_of(directions_of(distribution, space, num)), whole)


@every_distribution
@every_space
def test_directions_differ_by_seed_by_block_by_row_and_by_leaf(distribution, space):
    num = 2 * directions_of(distribution, space).block + 1 if space.size > 1000 else 12
    rows = rows_of(directions_of(distribution, space, num))
    other = rows_of(directions_of(distribution, space, num, seed=5 + 2**32))  # torch itself reads 32 bits of a seed
    assert not torch.equal(rows, other)
    if space.size > 30:  # so many signs are not equal by chance
        assert len({tuple(row.tolist()) for row in rows}) == num
    leaves = [leaf.reshape(num, -1) for leaf in space.split(rows)]
    for one, two in itertools.combinations(leaves, 2):
        assert one.shape != two.shape or not torch.equal(one, two)


@every_distribution
@every_space
def test_parts_shift_sum_and_dot_agree(distribution, space):
    directions = directions_of(distribution, space)
    rows = rows_of(directions)
    noise = directions.noise(0, 7)
    generator = torch.Generator().manual_seed(1)
    params = tuple(
        torch.randn(s, dtype=torch.float64, generator=generator).to(d)
        for s, d in zip(space.shapes, space.dtypes, strict=True)
    )
    scale = tuple(0.25 * (k + 1) for k in range(len(params)))

    parts = distribution.parts(space, noise)
    together = distribution.shift(space, params, parts, scale)
    for i, row in enumerate(zip(*(part.unbind(0) for part in parts), strict=True)):
        alone = distribution.shift(space, params, row, scale)
        leaves = space.split(rows[i])
        for p, leaf, eps, s, many in zip(params, alone, leaves, scale, together, strict=True):
            assert leaf.dtype == p.dtype
            assert leaf.shape == p.shape
            assert torch.equal(leaf, many[i])
            wanted = torch.add(p.to(space.dtype), eps, alpha=s).to(p.dtype)
            if distribution.factored:  # which rounds the product once less
                torch.testing.assert_close(leaf, wanted)
            else:
                assert torch.equal(leaf, wanted)

    c = torch.randn(7, space.slices, dtype=space.dtype, generator=generator)
    out = torch.ones(space.size, dtype=space.dtype)
    distribution.add_sum(space, noise, c, out)
    by_slice = rows.view(7, space.slices, space.dim)
    torch.testing.assert_close(out - 1, torch.einsum("rs,rsd->sd", c, by_slice).reshape(-1), rtol=1e-4, atol=1e-5)

    vector = torch.randn(space.size, dtype=space.dtype, generator=generator)
    wanted = (by_slice * vector.view(space.slices, space.dim)).sum(dim=2)
    torch.testing.assert_close(distribution.dot(space, noise, vector), wanted, rtol=1e-3, atol=1e-3)


@every_distribution
def test_the_second_moment_is_the_identity_over_the_scale(distribution):
    space = Space.of((torch.zeros(2, 2), torch.zeros(3)))
    num = 20000
    rows = rows_of_many(directions_of(distribution, space, num))
    moment = distribution.scale(space) * rows.t() @ rows / num
    # Seven standard errors of a mean of 20000 products, whose variance is at most 2 (fixed seed, 28 numbers).
    wanted = torch.stack([distribution.covariance(space, row) for row in torch.eye(7)])
    assert (moment - wanted).abs().max() < 7 * (2 / num) ** 0.5 * float(wanted.abs().max())
    mean = 1 / 7 if distribution.finite else 0.0  # unit vectors have no negatives
    assert (rows.mean(dim=0) - mean).abs().max() < 7 * (1 / num) ** 0.5


def rows_of_many(directions):
    """As rows_of, by the shift of a zero: fast."""
    space = directions.space
    parts = directions.distribution.parts(space, directions.noise(0, len(directions)))
    zeros = tuple(torch.zeros(s, dtype=space.dtype) for s in space.shapes)
    leaves = directions.distribution.shift(space, zeros, parts, (1.0,) * len(zeros))
    return torch.cat([leaf.reshape(len(directions), -1) for leaf in leaves], dim=1)


@every_distribution
def test_pickled_directions_have_no_buffers(distribution):
    directions = directions_of(distribution, SPACES["larger than a tile"], num=3)
    before = len(pickle.dumps(directions))
    rows = rows_of(directions)
    data = pickle.dumps(directions)
    assert before == len(data) < 2000
    assert torch.equal(rows_of(pickle.loads(data)), rows)
    assert torch.equal(rows_of(directions), rows)  # pickling took nothing from the original


class Counting(distributions.Gaussian):
    """Counts how often each block is drawn."""

    def __init__(self):
        self.drawn = []

    def draw(self, space, noise, seed, block):
        self.drawn.append(block)
        super().draw(space, noise, seed, block)


def tree(dim=5000, dtype=torch.float32):
    """Parameters whose blocks have 13 rows (dim 5000)."""
    x = torch.linspace(-1, 1, dim, dtype=dtype)
    return {"w": x[: dim - 40].reshape(-1, 20).sin(), "b": x[dim - 40 :].exp()}


def objective(p):
    """A whole number, so that every evaluator computes the same bits; with and without a leading axis."""
    return (p["w"] > 0.01).float().flatten(-2).sum(-1) + 3 * (p["b"] > 1.2).float().sum(-1)


@every_evaluator
@pytest.mark.parametrize("num", [1, 12, 13, 40])
def test_each_block_is_drawn_once(evaluator, num):
    distribution = Counting()
    decorated = zero_order(distribution, "antithetic", num_samples=num, sigma=0.1, evaluator=evaluator())(objective)
    decorated.estimate(tree())
    assert distribution.drawn == list(range(-(-num // 13)))


def test_each_block_is_drawn_once_in_each_direction_for_several_values():
    distribution = Counting()
    params = tree()
    params["b"].requires_grad_()
    params["w"].requires_grad_()
    decorated = zero_order(distribution, num_samples=30, sigma=0.1)(lambda p: torch.stack([p["w"].sum(), p["b"].sum()]))
    out = decorated(params)
    assert distribution.drawn == [0, 1, 2]
    out.sum().backward()
    assert distribution.drawn == [0, 1, 2] * 2


class Counter:
    """Directions that cannot be made again."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def sample(self, sample_shape=()):
        return torch.from_numpy(self.rng.standard_normal(tuple(sample_shape)))


@every_evaluator
def test_what_cannot_be_made_again_is_kept(evaluator):
    params = tree()
    decorated = zero_order(Counter(), "antithetic", num_samples=30, sigma=0.1, evaluator=evaluator())(objective)
    estimate = decorated.estimate(params)
    check_against_the_definition(estimate, objective, params, zograd.ANTITHETIC, sigma={"w": 0.1, "b": 0.1})
    with pytest.raises(zograd.ReplayError, match=r"cannot be made again.*torch's random functions"):
        pickle.dumps(estimate.directions)


def test_what_cannot_be_made_again_is_kept_for_backward():
    w = torch.linspace(-1, 1, 4000).reshape(-1, 4).requires_grad_()
    scales = torch.tensor([1.0, -2.0, 3.0, 0.5])
    decorated = zero_order(Counter(), "antithetic", num_samples=50)(lambda w: w.mul(scales).sum(0))
    out = decorated(w)
    grads = [torch.autograd.grad(out, w, cotangent, retain_graph=True)[0] for cotangent in torch.eye(4)]
    assert torch.equal(grads[1], torch.autograd.grad(out, w, torch.eye(4)[1], retain_graph=True)[0])
    # Linear: the gradient of output k is mean_i (eps_i . g_k) eps_i. Along g_k itself that is a mean of squares.
    for k, grad in enumerate(grads):
        truth = torch.zeros_like(w)
        truth[:, k] = scales[k]
        along = (grad * truth).sum() / (truth * truth).sum()
        assert 0.2 < along < 2.5  # 1 +- sqrt(2 / 50); misaligned directions give 0 +- 0.2
        cosine = torch.cosine_similarity(grad.flatten(), truth.flatten(), dim=0)
        assert cosine == pytest.approx((50 / (50 + 4000)) ** 0.5, abs=0.05)


# --------------------------------------------------------------------------------------- what an estimate must equal


def check_against_the_definition(estimate, fn, params, scheme, sigma, rtol=1e-4):
    """value, coefficients and gradient, computed again in float64 with nothing but the formula."""
    names = sorted(params)
    rows = rows_of_many(estimate.directions) if estimate.directions.replayable else rows_of(estimate.directions)
    rows = rows.double()
    sizes = [params[k].numel() for k in names]
    eps = dict(zip(names, rows.split(sizes, dim=1), strict=True))

    def at(i, c):
        return {
            k: (params[k].double() + sigma[k] * c * eps[k][i].view(params[k].shape)).to(params[k].dtype) for k in names
        }

    coefficients = torch.stack(
        [
            sum(w * fn(at(i, c)).double() for c, w in zip(scheme.offsets, scheme.weights, strict=True))
            for i in range(len(rows))
        ]
    )
    torch.testing.assert_close(estimate.coefficients, coefficients, rtol=rtol, atol=rtol)
    assert torch.equal(estimate.value, fn(params))
    scale = estimate.directions.distribution.scale(estimate.directions.space)
    for k in names:
        wanted = scale * (estimate.coefficients @ eps[k]) / len(rows) / sigma[k]
        got = estimate.grad[k].double().flatten()
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
        assert estimate.grad[k].dtype == params[k].dtype
        assert estimate.grad[k].shape == params[k].shape


def smooth(p):
    """Neither symmetric nor linear; with and without a leading axis."""
    return (p["w"].sin() * 3 + p["w"] ** 2).flatten(-2).sum(-1) + (p["b"] * 0.5).exp().sum(-1) + 2.0


@every_scheme
@every_distribution
@every_evaluator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_an_estimate_is_its_definition(scheme, distribution, evaluator, dtype):
    if not (distribution.centered or scheme.is_difference):
        pytest.skip("these directions need differences")
    params = {
        "w": torch.tensor([[0.3, -1.2, 0.5], [2.0, 0.1, -0.4]], dtype=dtype),
        "b": torch.tensor([1.0, -0.7], dtype=dtype),
    }
    sigma = {"w": 0.1, "b": 0.25}
    decorated = zero_order(distribution, scheme, num_samples=9, sigma=sigma, seed=3, evaluator=evaluator())(smooth)
    estimate = decorated.estimate(params)
    check_against_the_definition(estimate, smooth, params, scheme, sigma, rtol=2e-4 if dtype == torch.float32 else 1e-9)
    assert estimate.evaluations == 1 + 9 * len(scheme.sides)


# -------------------------------------------------------------------------------------------------------- evaluators


def one(fn, points, i):
    """The values of direction i, one call an offset."""
    return fn.take(fn.evaluate(points, i, i + 1), points)[0]


class Fake(Evaluator):
    """An evaluator as strange as the contract allows."""

    def values(self, fn, points, lo=0, hi=None):
        for piece in self.pieces(fn, points, range(lo, len(points.directions) if hi is None else hi)):
            yield Answer(piece)

    def pieces(self, fn, points, indices):
        raise NotImplementedError


class OddPieces(Fake):
    """1 direction, then 7, then 3, ... whatever the blocks are."""

    def pieces(self, fn, points, indices):
        sizes = itertools.cycle([1, 7, 3, 19])
        while indices:
            size = next(sizes)
            yield torch.stack([one(fn, points, i) for i in indices[:size]])
            indices = indices[size:]


class Empty(Fake):
    """Pieces of no direction in between."""

    def pieces(self, fn, points, indices):
        for i in indices:
            yield one(fn, points, i)[None]
            yield one(fn, points, i)[None][:0]


class Repeats(Fake):
    """Evaluates points again and again, as retries do, and yields each once."""

    def pieces(self, fn, points, indices):
        for i in indices:
            for _ in range(i % 3):
                one(fn, points, (i * 7) % len(points.directions))
            values = [one(fn, points, i) for _ in range(1 + i % 2)]
            yield values[-1][None]


class Reversed(Fake):
    """Evaluates in reverse and yields in order, all at once."""

    def pieces(self, fn, points, indices):
        done = {i: one(fn, points, i) for i in reversed(indices)}
        yield torch.stack([done[i] for i in indices])


class Late(Fake):
    """Evaluates block by block and yields what it has five directions later, as a queue of workers would."""

    def pieces(self, fn, points, indices):
        ready = []
        for lo, hi in points.spans(points.directions.block, indices.start, indices.stop):
            for row in fn.take(fn.evaluate(points, lo, hi), points):
                ready.append(row)
                if len(ready) > 5:
                    yield ready.pop(0)[None]
        yield torch.stack(ready)


class Ahead(Fake):
    """Draws and evaluates one block ahead of what it yields."""

    def pieces(self, fn, points, indices):
        pending = None
        for lo, hi in points.spans(points.directions.block, indices.start, indices.stop):
            values = torch.stack([one(fn, points, i) for i in range(lo, hi)])
            if pending is not None:
                yield pending
            pending = values
        yield pending


class Halves(Evaluator):
    """Joins two parts of another evaluator's range, as a resumed or distributed estimate does."""

    def __init__(self, inner, at):
        self.inner, self.at = inner, at

    @property
    def batched(self):
        return self.inner.batched

    def values(self, fn, points, lo=0, hi=None):
        yield from self.inner.values(fn, points, lo, self.at)
        yield from self.inner.values(fn, points, self.at, hi)


class Pickled(Fake):
    """Sends function and points through pickle, as processes do."""

    def pieces(self, fn, points, indices):
        there = pickle.loads(pickle.dumps(points))
        for i in indices:
            yield one(fn, there, i)[None]


FAKES = [OddPieces(), Empty(), Repeats(), Reversed(), Late(), Ahead(), Pickled(), Halves(evaluators.Loop(), 17)]

USES = {
    "scalar": (objective, {}),
    "scalar, forward": (objective, {"method": "forward"}),
    "vector": (lambda p: torch.stack([objective(p), p["b"].sum(), p["w"][3].sum()]), {}),
    "shaped": (objective, {"method": "naive", "shaping": shaping.leave_one_out}),
    "one direction": (objective, {"num_samples": 1}),
    "random": (lambda p: objective(p) + torch.rand(()), {}),
}


def results(fn, settings, evaluator, params):
    """All that an estimate says, and what autograd makes of it."""
    settings = {"method": "antithetic", "num_samples": 30, "sigma": 0.1, "seed": 11} | settings
    decorated = zero_order(evaluator=evaluator, **settings)(fn)
    estimate = decorated.estimate(params)
    tracked = {k: v.clone().requires_grad_() for k, v in params.items()}
    out = decorated(tracked)
    out.backward(torch.arange(1.0, 1.0 + out.numel()).view(out.shape))
    return estimate.value, estimate.coefficients, tracked["w"].grad, tracked["b"].grad


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fake", FAKES, ids=lambda e: type(e).__name__)
def test_any_evaluator_gives_the_gradient_of_loop(fake, use):
    fn, settings = USES[use]
    if isinstance(fake, Halves) and use == "one direction":
        fake = Halves(fake.inner, 1)
    params = tree()
    for got, wanted in zip(results(fn, settings, fake, params), results(fn, settings, "loop", params), strict=True):
        assert wanted.any()
        assert torch.equal(got, wanted)


@every_evaluator
@pytest.mark.parametrize("at", [0, 1, 13, 14, 29, 30])
def test_parts_of_a_range_join(evaluator, at):
    params = tree()
    whole = results(objective, {}, evaluator(), params)
    parts = results(objective, {}, Halves(evaluator(), at), params)
    assert all(map(torch.equal, whole, parts))


@every_evaluator
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 13, 26, 27, 1000], ids=str)
def test_the_chunk_size_changes_no_bit(evaluator, chunk_size):
    if "chunk_size" not in inspect.signature(evaluator).parameters:
        pytest.skip("has no chunks")
    params = tree()
    got = results(objective, {}, evaluator(chunk_size=chunk_size), params)
    assert all(map(torch.equal, got, results(objective, {}, "loop", params)))


@every_evaluator
@every_scheme
def test_value_is_fn_at_the_parameters(evaluator, scheme):
    params = tree(100)
    decorated = zero_order(method=scheme, num_samples=3, sigma=0.5, evaluator=evaluator())(smooth)
    assert torch.equal(decorated.estimate(params).value, smooth(params))
    tracked = {k: v.requires_grad_() for k, v in params.items()}
    assert torch.equal(decorated(tracked), smooth(params))


class Stopped(Exception):
    pass


class Dies(Fake):
    """Fails in the middle, with user code on the stack and a piece half done."""

    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in indices[:9]])
        with torch.no_grad():
            one(fn, points, 9)
            torch.rand(5)
            raise Stopped("a worker died")


def state_of(params):
    bits = {k: (v.clone(), v.requires_grad, v.grad, v._version) for k, v in params.items()}
    return torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), bits


def same_state(one, two):
    assert torch.equal(one[0], two[0])
    assert one[1:3] == two[1:3]
    for k, (value, requires_grad, grad, version) in one[3].items():
        assert torch.equal(value, two[3][k][0])
        assert (requires_grad, grad, version) == two[3][k][1:]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_evaluator_that_fails_leaves_all_as_it_was(grad):
    params = {k: v.requires_grad_() for k, v in tree().items()}
    decorated = zero_order(method="antithetic", num_samples=30, sigma=0.1, seed=11)(objective)
    wanted = decorated.estimate(params)
    with torch.set_grad_enabled(grad):
        before = state_of(params)
        with pytest.raises(Stopped, match="a worker died"):
            decorated.replace(evaluator=Dies()).estimate(params)
        same_state(before, state_of(params))
        again = decorated.estimate(params)
    assert torch.equal(again.grad["w"], wanted.grad["w"])
    with pytest.raises(RuntimeError, match="none is running"):
        zograd.current_seed()


@every_evaluator
def test_an_fn_that_fails_leaves_all_as_it_was(evaluator):
    params = {k: v.requires_grad_() for k, v in tree().items()}
    calls = []

    def fn(p):
        calls.append(p)
        torch.set_grad_enabled(False)  # careless, and not undone
        torch.manual_seed(123)
        with torch.no_grad():
            p["b"].mul_(2)  # its own copy
        if len(calls) > 2:
            raise Stopped("the simulator crashed")
        torch.set_grad_enabled(True)
        return objective(p)

    chunks = {"chunk_size": 4} if "chunk_size" in inspect.signature(evaluator).parameters else {}
    decorated = zero_order(method="antithetic", num_samples=30, seed=11, evaluator=evaluator(**chunks))(fn)
    for use in (decorated, decorated.estimate):
        calls.clear()
        before = state_of(params)
        failed = Stopped if evaluator is evaluators.Vmap else zograd.EvaluationError
        with pytest.raises(failed, match="the simulator crashed"):
            use(params)
        same_state(before, state_of(params))


class TooFew(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in indices[:-1]])


class TooMany(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in [*indices, 0]])


class OnceMore(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in indices])
        yield one(fn, points, 0)[None]


class OneSide(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i)[:1] for i in indices])


class Column(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in indices]).unsqueeze(-1)


class Flat(Fake):
    def pieces(self, fn, points, indices):
        yield torch.stack([one(fn, points, i) for i in indices]).flatten()


@pytest.mark.parametrize(
    ("fake", "says"),
    [
        (TooFew(), r"must yield 30 directions of values, got 29"),
        (TooMany(), r"must yield 30 directions .* ends at direction 31"),
        (OnceMore(), r"must yield 30 directions .* ends at direction 31"),
        (OneSide(), r"of shape \(2,\), got a piece of shape \(30, 1\)"),
        (Column(), r"of shape \(2,\), got a piece of shape \(30, 2, 1\)"),
        (Flat(), r"of shape \(2,\), got a piece of shape \(60,\)"),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, Fake) else "",
)
def test_an_evaluator_that_breaks_the_contract(fake, says):
    decorated = zero_order(method="antithetic", num_samples=30, sigma=0.1, evaluator=fake)(objective)
    with pytest.raises(ValueError, match=says):
        decorated.estimate(tree())


class Nothing(Evaluator):
    def values(self, fn, points, lo=0, hi=None):
        yield from ()


def test_an_evaluator_that_yields_nothing():
    with pytest.raises(ValueError, match="the evaluator must yield"):
        zero_order(evaluator=Nothing())(objective).estimate(tree())


class Listed(Evaluator):
    """Returns an iterator that is no generator and has nothing to close."""

    def values(self, fn, points, lo=0, hi=None):
        return iter(list(evaluators.Loop().values(fn, points, lo, hi)))


def test_an_iterator_will_do():
    params = tree()
    assert all(map(torch.equal, results(objective, {}, Listed(), params), results(objective, {}, "loop", params)))


class Cleans(Fake):
    closed = False

    def pieces(self, fn, points, indices):
        try:
            for i in indices:
                yield one(fn, points, i)[None]
        finally:
            Cleans.closed = True


def test_an_evaluator_is_closed_when_its_values_are_refused():
    calls = []

    def fn(p):
        calls.append(p)
        return float("nan") if len(calls) == 4 else 1.0

    decorated = zero_order(num_samples=30, evaluator=Cleans())(fn)
    try:
        decorated.estimate(tree())
    except zograd.NonFiniteError:
        assert Cleans.closed  # while the error is handled, not at some later collection
    assert len(calls) == 4


# --------------------------------------------------------------------------------------------------- sigma by leaf


class AllSigns(Dense):
    """All 2**d vectors of signs, each once: the mean over them is exact."""

    def rows(self, space, num):
        assert num == 2**space.dim
        return num

    def fill(self, out, generator):
        raise NotImplementedError

    def draw(self, space, noise, seed, block):
        signs = list(itertools.product([1.0, -1.0], repeat=space.dim))
        noise[0].view(len(signs), space.slices, space.dim).copy_(torch.tensor(signs).unsqueeze(1))


def cubes(*trees):
    """sum over everything of x ** 3, whose antithetic estimate over all signs is 3 x ** 2 + sigma ** 2."""

    def total(thing):
        if isinstance(thing, torch.Tensor):
            return (thing**3).sum()
        return sum(map(total, thing.values() if isinstance(thing, dict) else thing))

    return sum(map(total, trees))


def expected(x, sigma):
    return 3 * x**2 + sigma**2


def test_sigma_of_one_argument_by_leaf():
    params = {"w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), "b": [torch.tensor(0.25, dtype=torch.float64)]}
    sigma = {"w": 0.125, "b": [2.0]}
    decorated = zero_order(AllSigns(), "antithetic", num_samples=16, sigma=sigma)(cubes)
    grad = decorated.estimate(params).grad
    torch.testing.assert_close(grad["w"], expected(params["w"], 0.125))
    torch.testing.assert_close(grad["b"][0], expected(params["b"][0], 2.0))


@pytest.mark.parametrize("keys", ["ab", "ba"])
def test_fn_gets_each_dict_in_the_order_of_its_own_call(keys):
    """Equal structures: an order remembered from the other call would swap the entries of a stacked dict."""
    weights = torch.tensor([1.0, 5.0])

    @zero_order(distributions.Coordinate(), "antithetic", num_samples=None, sigma=1e-2)
    def fn(tree):
        return weights @ torch.stack(list(tree.values()))

    for order in (keys, keys[::-1], keys):
        tree = {key: torch.tensor(float(ord(key)), requires_grad=True) for key in order}
        fn(tree).backward()
        assert list(fn.estimate(tree).grad) == list(order)
        found = torch.stack([tree[key].grad for key in order])
        torch.testing.assert_close(found, weights, rtol=1e-3, atol=1e-3)


def test_sigma_skips_what_is_not_differentiated():
    params = {
        "a": torch.tensor([1.5], dtype=torch.float64),  # frozen
        "n": torch.tensor([2]),
        "w": torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True),
        "x": torch.tensor([3.0], dtype=torch.float64, requires_grad=True),
    }
    sigma = {"a": 8.0, "n": 16.0, "w": 0.125, "x": 2.0}
    zero_order(AllSigns(), "antithetic", num_samples=8, sigma=sigma)(cubes)(params).backward()
    torch.testing.assert_close(params["w"].grad, expected(params["w"].detach(), 0.125))
    torch.testing.assert_close(params["x"].grad, expected(params["x"].detach(), 2.0))
    assert params["a"].grad is None


def test_sigma_of_several_arguments():
    one = torch.tensor([0.5, -1.0], dtype=torch.float64)
    two = {"w": torch.tensor([2.0], dtype=torch.float64), "b": torch.tensor([0.25], dtype=torch.float64)}
    decorated = zero_order(AllSigns(), "antithetic", argnums=(0, 2), num_samples=16, sigma=(0.5, {"w": 2.0, "b": 3.0}))(
        lambda one, scale, two: cubes(one, two) * scale
    )
    grad = decorated.estimate(one, 2.0, two).grad
    torch.testing.assert_close(grad[0], 2 * expected(one, 0.5))
    torch.testing.assert_close(grad[1]["w"], 2 * expected(two["w"], 2.0))
    torch.testing.assert_close(grad[1]["b"], 2 * expected(two["b"], 3.0))


def test_sigma_of_several_arguments_in_another_order():
    one, two = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    decorated = zero_order(AllSigns(), "antithetic", argnums=(1, 0), num_samples=8, sigma=(4.0, 0.5))(cubes)
    grad = decorated.estimate(one, two).grad
    torch.testing.assert_close(grad[0], expected(two, 4.0))
    torch.testing.assert_close(grad[1], expected(one, 0.5))
    one, two = one.requires_grad_(), two.requires_grad_()
    decorated(one, two).backward()
    torch.testing.assert_close(one.grad, expected(one.detach(), 0.5))
    torch.testing.assert_close(two.grad, expected(two.detach(), 4.0))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, on the first jvp
def test_sigma_by_leaf_of_a_vector_and_of_a_tangent():
    w, b = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    decorated = zero_order(AllSigns(), "antithetic", argnums=(0, 1), num_samples=8, sigma=(0.5, 3.0), seed=0)(
        lambda w, b: torch.stack([cubes(w, b), 7 * cubes(b), (w[0] * w[1]).sum()])
    )
    jw, jb = expected(w, 0.5), expected(b, 3.0)
    jacobian_w = torch.stack([jw, torch.zeros(2, dtype=torch.float64), w.flip(0)])
    jacobian_b = torch.stack([jb, 7 * jb, torch.zeros(1, dtype=torch.float64)])
    got_w, got_b = torch.func.jacrev(decorated, argnums=(0, 1))(w, b)
    torch.testing.assert_close(got_w, jacobian_w)
    torch.testing.assert_close(got_b, jacobian_b)
    tangents = torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    _, out = torch.func.jvp(decorated, (w, b), tangents)
    torch.testing.assert_close(out, jacobian_w @ tangents[0] + jacobian_b @ tangents[1])


def test_sigma_by_leaf_and_by_slice():
    w = torch.tensor([[0.5, -1.0], [2.0, 0.25], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    decorated = zero_order(AllSigns(), "antithetic", argnums=(0, 1), num_samples=8, sigma=(0.5, 2.0), batch_dim=0)(
        lambda w, b: (w**3).sum(dim=1) + b**3
    )
    w, b = w.requires_grad_(), b.requires_grad_()
    cotangent = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    decorated(w, b).backward(cotangent)
    torch.testing.assert_close(w.grad, cotangent[:, None] * expected(w.detach(), 0.5))
    torch.testing.assert_close(b.grad, cotangent * expected(b.detach(), 2.0))


class InThreads(Evaluator):
    """An engine of threads, which are handed the objective and the points as they are."""

    def values(self, fn, points, lo=0, hi=None):
        with ThreadPoolExecutor(4) as threads:
            yield from threads.map(lambda span: fn.evaluate(points, *span), points.spans(2, lo, hi))


@pytest.mark.parametrize("failures", ["raise", Drop(0.1)], ids=str)
def test_an_engine_of_threads_shares_nothing_by_mistake(failures):
    def fn(x):
        time.sleep(1e-4)  # so that they get in each other's way
        value = (x * torch.rand(300)).sum() + random.Random(zograd.current_seed()).random()
        return value * (float("nan") if failures != "raise" and value < -10 else 1)

    settings = {"num_samples": 40, "method": "antithetic", "seed": 0, "failures": failures}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zograd.ZeroOrderWarning)  # of what was dropped
        one = zero_order(**settings)(fn).estimate(torch.zeros(300))
        many = zero_order(**settings, evaluator=InThreads())(fn).estimate(torch.zeros(300))
    assert torch.equal(one.grad, many.grad)
    assert (one.evaluations, one.failures) == (many.evaluations, many.failures)


class Remembering(torch.nn.Module):
    """Another function if two threads share it: it writes what it was called with, waits, and reads."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        self.last = x
        time.sleep(0.001)
        return (self.last * x).sum()


class Held:
    """A module one step deeper than a global."""

    def __init__(self, module):
        self.module = module


HELD = Held(Remembering())


@pytest.mark.parametrize("reads", [lambda x: HELD.module(x), Remembering().forward], ids=["global", "method"])
def test_an_engine_of_threads_has_copies_of_modules(reads):
    fn = zero_order(method="antithetic", num_samples=20, sigma=0.1, seed=0)(reads)
    alone = fn.estimate(torch.ones(3)).grad
    assert torch.equal(fn.replace(evaluator=InThreads()).estimate(torch.ones(3)).grad, alone)
