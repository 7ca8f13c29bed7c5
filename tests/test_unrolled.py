"""Unrolled systems: each estimator against its formula and closed forms, states of every kind, resets and resuming."""

import math
import pickle
import re

import numpy as np
import pytest
import torch

import zograd
from problems import Directions
from statistical import draws, noise
from zograd import SecondDerivativeError, Until
from zograd._base.streams import derive
from zograd._base.trees import Space, take_apart
from zograd.distributions import Coordinate, Gaussian, Orthogonal, Rademacher, Sobol, Sphere
from zograd.evaluators import EVALUATORS, Journal
from zograd.unrolled import NRES, PES, TruncatedES
from zograd.unrolled.particles import Particles

ALL = (TruncatedES, PES, NRES)
SIGMA = {"a": 0.3, "b": 0.1}


def leaves():
    torch.manual_seed(1)
    draw = {"a": torch.randn(3, dtype=torch.float64), "b": torch.randn(2, 2, dtype=torch.float64)}
    return {name: p.requires_grad_() for name, p in draw.items()}


def system(params, state, gain):
    """Not linear, not symmetric, for one parameter set or many."""
    a, b = params["a"], params["b"].sum(dim=-1)
    x = 0.8 * torch.tanh(state["x"] + a) + 0.1 * a * state["x"]
    y = torch.cos(state["y"] * b) + b * x[..., :2]
    loss = gain * (x.square().sum(dim=-1) + x[..., 0] * y[..., 1]) + y[..., 0]
    return loss, {"x": x, "y": y, "t": state["t"] + 1}


def start():
    return {"x": torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64), "y": torch.ones(2).double(), "t": 0}


@pytest.fixture(scope="module")
def two_workers():
    with zograd.evaluators.Pool(workers=2) as pool:
        yield pool


def said(*parts):
    """A pattern for a message that holds these parts in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


# ----------------------------------------------------------------------------------------------------------- formulas


class Reference:
    """The same estimators, written particle by particle."""

    def __init__(self, kind, params, num, seed):
        self.kind, self.num, self.seed, self.t = kind, num, seed, 0
        self.params = {name: p.detach() for name, p in params.items()}
        self.space = Space.of(tuple(self.params.values()))
        self.center = {k: torch.as_tensor(v) for k, v in start().items()}
        self.states = [[self.center, self.center] for _ in range(num)]
        self.weights = torch.zeros(num, 2, 7, dtype=torch.float64)

    def window(self, *args):
        eps = noise(Directions(Gaussian(), self.space, derive(self.seed, 0, self.t), self.num))
        total = torch.zeros(7, dtype=torch.float64)
        for i in range(self.num):
            for j, sign in enumerate((1, -1)):
                fresh = sign * eps[i]
                if self.kind is TruncatedES:
                    shift = weight = fresh
                elif self.kind is PES:
                    shift, weight = fresh, self.weights[i, j] + fresh
                else:
                    shift = weight = self.weights[i, j] if self.weights[i, j].any() else fresh
                point = dict(zip("ab", self.space.split(shift), strict=True))
                point = {name: p + SIGMA[name] * point[name] for name, p in self.params.items()}
                begin = self.center if self.kind is TruncatedES else self.states[i][j]
                loss, self.states[i][j] = system(point, begin, *args)
                self.weights[i, j] = weight
                total += weight * loss / (2 * self.num)
        loss, self.center = system(self.params, self.center, *args)
        self.t += 1
        parts = self.space.split(total)
        return loss, {name: g / SIGMA[name] for name, g in zip("ab", parts, strict=True)}

    def reset(self, mask):
        for i, j in mask.nonzero().tolist():
            self.weights[i, j] = 0
            self.states[i][j] = {k: torch.as_tensor(v) for k, v in start().items()}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_the_gradient_is_the_formula(kind, evaluator):
    params, num = leaves(), 5
    estimator = kind(system, num, SIGMA, evaluator=evaluator, seed=11)
    state, reference = estimator.init(params, start()), Reference(kind, params, num, 11)
    masks = {1: [[0, 0], [1, 1], [0, 1], [0, 0], [1, 0]], 3: [[1, 1], [0, 0], [1, 0], [0, 0], [0, 1]]}
    for t in range(6):
        for p in params.values():
            p.grad = None
        loss, state = estimator(params, state, 1.0 + t)
        loss.backward()
        wanted, grad = reference.window(1.0 + t)
        torch.testing.assert_close(loss.detach(), wanted, rtol=1e-12, atol=1e-12)
        for name, p in params.items():
            torch.testing.assert_close(p.grad, grad[name], rtol=1e-10, atol=1e-10)
        if t in masks and kind is not TruncatedES:
            mask = torch.tensor(masks[t]).bool()
            state = estimator.reset(state, mask, start())
            reference.reset(mask)
    torch.testing.assert_close(state["center"]["x"], reference.center["x"], rtol=1e-12, atol=1e-12)
    assert state["window"] == state["center"]["t"] == 6


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "evaluator", ["batched", zograd.evaluators.Vmap(chunk_size=2), zograd.evaluators.Batched(chunk_size=3)], ids=str
)
def test_evaluators_and_chunks_give_the_same_bits(kind, evaluator):
    results = []
    for each in ("loop", evaluator):
        params = leaves()
        estimator = kind(lambda p, s: ((p["a"] * s).sum(dim=-1), s + p["a"]), 7, 0.1, evaluator=each, seed=2)
        state = estimator.init(params, torch.ones(3).double())
        for _ in range(3):
            loss, state = estimator(params, state)
            loss.backward()
        results.append((params["a"].grad, params["b"].grad, state))
    (a, b, state), (a2, b2, state2) = results
    assert torch.equal(a, a2)
    assert torch.equal(b, b2)
    assert torch.equal(state["center"], state2["center"])
    assert kind is TruncatedES or torch.equal(state["particles"], state2["particles"])


# ------------------------------------------------------------------------------------------------------- closed forms


def total(params, state):
    """Losses t theta where each window adds theta to the state: T(T+1)/2 in all. The loss stays visible."""
    s = state["s"] + params
    return s, {"s": s, "loss": s}


def contributions(kind, num, windows, seed):
    """What each pair alone would estimate for the whole trajectory, and the estimate."""
    params = torch.zeros((), dtype=torch.float64, requires_grad=True)
    estimator = kind(total, num, 1.0, evaluator="batched", seed=seed)
    state = estimator.init(params, {"s": torch.zeros(()).double(), "loss": torch.zeros(()).double()})
    samples = torch.zeros(num, dtype=torch.float64)
    for _ in range(windows):
        loss, state = estimator(params, state)
        loss.backward()
        if kind is not TruncatedES:
            samples += (state["perturbation"].squeeze(2) * state["particles"]["loss"]).mean(dim=1)
    return samples, params.grad


@pytest.mark.statistics
@pytest.mark.parametrize(("kind", "variance"), [(PES, 4070.0), (NRES, 6050.0)])
def test_moments_of_a_trajectory(kind, variance, checks):
    windows, truth = 10, 55.0
    num = max(draws(variance / truth**2, 0.1), 60_000)
    samples, grad = contributions(kind, num, windows, checks.seed())
    torch.testing.assert_close(samples.mean(), grad, rtol=1e-10, atol=0)
    checks.mean(samples, truth, effect=0.1 * truth)
    checks.trace(samples, truth, variance, effect=0.35)


@pytest.mark.statistics
def test_truncated_es_sees_its_own_window_only(checks):
    grads = []
    for _ in range(150):
        _, grad = contributions(TruncatedES, 200, 10, checks.seed())
        grads.append(grad)
    checks.mean(torch.stack(grads), 10.0, effect=1.0)  # where the truth is 55


INFLUENCE = 0.5 * torch.eye(23) + 0.5 * torch.diag(torch.ones(22), 1)
SIGNS = torch.tensor([1.0] * 10 + [-1.0] * 13)


def influence(theta, state):
    """One step: what theta does now raises the loss's slope, what it does in the long run lowers it."""
    state = state @ INFLUENCE.T.to(state) + theta.unsqueeze(-1) * SIGNS.to(state)
    return (state[..., 0] - 1).square() / 2, state


@pytest.mark.parametrize("kind", [PES, TruncatedES])
def test_influence_balancing(kind):
    """Windows of one step: PES goes to the minimum at -1/6, truncated ES away from it."""
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    estimator = kind(influence, 500, 0.1, evaluator="batched", seed=0)
    state = estimator.init(theta, torch.ones(23).double())
    optimizer = torch.optim.SGD([theta], lr=1e-4)
    for _ in range(1000 if kind is PES else 400):
        optimizer.zero_grad()
        loss, state = estimator(theta, state)
        loss.backward()
        optimizer.step()
    final = (-6 * theta.item() - 1) ** 2 / 2  # the steady state's loss
    if kind is PES:
        assert final < 1e-3  # it began with 8
    else:
        assert final > 10


# ------------------------------------------------------------------------------------------------------------- states


MANY = {
    "f32": torch.tensor([1e-45, -0.0, math.inf, 3.1]),
    "f64": torch.tensor(1 + 2**-52, dtype=torch.float64),
    "bf16": torch.tensor([[0.1]]).bfloat16(),
    "i64": torch.tensor([2**62 + 1, -(2**63), -1, 2**53 + 1]),
    "rest": (torch.tensor([True, False]), torch.tensor(200, dtype=torch.uint8), torch.tensor([1 - 2j]), None),
    "none": torch.zeros(0, 3),
}


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("kind", ALL)
def test_states_keep_every_bit(kind, evaluator):
    seen = []

    def window(p, s):
        seen.append(s)
        return p.sum(dim=-1), s

    params = torch.ones(2, requires_grad=True)
    estimator = kind(window, 3, 0.1, evaluator=evaluator)
    state = estimator.init(params, MANY)
    for _ in range(2):
        _, state = estimator(params, state)
    flat = take_apart
    found, _ = flat(state["center"])
    wanted, _ = flat(MANY)
    inside, _ = flat(seen[0])
    assert len(found) == len(inside) == len(wanted)
    for x, y, z in zip(found, wanted, inside, strict=True):
        assert x.dtype == y.dtype == z.dtype
        assert torch.equal(x, y)
        assert torch.equal(x.double().signbit() if x.is_floating_point() else x, _sign(y))
    for x, y in zip(
        *[flat(state[k] if state[k] is not None else MANY)[0] for k in ("particles", "center")], strict=True
    ):
        assert torch.equal(x, y.expand(x.shape))


def _sign(y):
    return y.double().signbit() if y.is_floating_point() else y


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("nothing", [(), None, {}])
def test_a_system_without_a_state(nothing, evaluator):
    params = torch.ones(2, requires_grad=True)
    estimator = PES(lambda p, s: (p.sum(dim=-1), s), 2, 0.1, evaluator=evaluator)
    loss, state = estimator(params, estimator.init(params, nothing))
    loss.backward()
    assert state["center"] == state["particles"] == nothing
    assert not estimator.reset(state, torch.tensor([True, False]), nothing)["perturbation"][0].any()


def test_numpy_and_numbers():
    """A simulator of plain Python: its state comes back as tensors."""

    def window(params, state):
        position = state["position"].numpy() + 0.1 * params.numpy()
        return float((position**2).sum()), {"position": position, "steps": int(state["steps"]) + 1}

    params = torch.tensor([1.0, -1.0], requires_grad=True)
    estimator = NRES(window, 4, 0.1)
    state = estimator.init(params, {"position": np.zeros(2, dtype=np.float32), "steps": 0})
    for _ in range(3):
        loss, state = estimator(params, state)
    loss.backward()
    assert params.grad.any()
    assert state["center"]["position"].tolist() == pytest.approx([0.3, -0.3])
    assert state["particles"]["steps"].tolist() == [[3, 3]] * 4


def test_a_window_that_trains():
    """The window uses autograd itself, on what it keeps in its state."""

    def window(log_rate, weights):
        for _ in range(2):
            weights = weights.detach().requires_grad_()
            (grad,) = torch.autograd.grad(((weights - 1) ** 2).sum(), weights)
            weights = weights - log_rate.exp() * grad
        return ((weights - 1) ** 2).sum(), (weights, torch.tensor(3))

    def with_counter(log_rate, state):
        return window(log_rate, state[0])

    params = torch.tensor(-3.0, requires_grad=True)
    estimator = PES(with_counter, 20, 0.1, seed=0)
    state = estimator.init(params, (torch.zeros(5), torch.tensor(3)))
    for _ in range(3):
        loss, state = estimator(params, state)
        loss.backward()
    assert params.grad < 0
    assert not state["center"][0].requires_grad


def test_other_arguments_may_require_grad():
    scale = torch.tensor(2.0, requires_grad=True)
    params = torch.tensor(1.0, requires_grad=True)
    estimator = PES(lambda p, s, scale: (scale * p, s), 4, 0.1)
    state = estimator.init(params, 0.0)
    with pytest.warns(zograd.ZeroOrderWarning, match=said("`PES(params, state)`", "shape ()", "no gradient")):
        loss, _ = estimator(params, state, scale)
    loss.backward()
    assert scale.grad is None
    assert params.grad != 0


@pytest.mark.parametrize("family", [Orthogonal(), Sobol()], ids=str)
def test_gaussian_families_are_unbiased_in_pes(family):
    params = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    slope = torch.arange(16.0).double().view(4, 4)
    estimator = PES(
        lambda p, s: ((slope * (s + p)).sum(), s + p), 4000, 0.1, distribution=family, evaluator="vmap", seed=0
    )
    state = estimator.init(params, torch.zeros(4, 4).double())
    for _ in range(2):
        loss, state = estimator(params, state)
        loss.backward()
    assert torch.cosine_similarity(params.grad.flatten(), slope.flatten(), dim=0) > 0.95
    torch.testing.assert_close(params.grad.norm(), 3 * slope.norm(), rtol=0.15, atol=0)


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_random_windows_under_every_evaluator(evaluator):
    """Pairs see the same numbers, so that only the parameters tell their losses apart."""
    params = torch.zeros(3, requires_grad=True)
    estimator = NRES(lambda p, s: (p.sum() + 1e3 * torch.randn(()), s + 1), 50, 0.1, evaluator=evaluator, seed=0)
    state = estimator.init(params, 0.0)
    for _ in range(2):
        loss, state = estimator(params, state)
        loss.backward()
    assert (params.grad - 2).abs().max() < 2


def test_the_weights_of_a_module():
    """A cell of torch as the system, by functional_call; small half-precision steps are warned of."""
    cell = torch.nn.Linear(2, 2)

    def window(p, s):
        s = torch.tanh(torch.func.functional_call(cell, p, (s,)))
        return (s - 0.5).square().sum(), s

    params = dict(cell.named_parameters())
    estimator = PES(window, 8, 0.1, evaluator="vmap", seed=0)
    loss, _ = estimator(params, estimator.init(params, torch.zeros(2)))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in cell.parameters())
    again = torch.func.grad(lambda p: estimator(p, estimator.init(p, torch.zeros(2)))[0])(params)
    assert torch.equal(again["weight"], cell.weight.grad)
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with pytest.warns(zograd.ZeroOrderWarning, match=said("`PES(sigma=...)` is 0.001, below the resolution")):
        PES(lambda p, s: (p.float().sum(), s), 1, 1e-3).init(half, 0.0)


def test_vmap_over_a_window_is_refused():
    estimator = PES(fine, 2, 0.1, seed=0)
    state = estimator.init(torch.ones(2), 0.0)
    with pytest.raises(RuntimeError, match=said("torch.vmap", "`fine`", "one state each")):
        torch.vmap(torch.func.grad(lambda p: estimator(p, state)[0]))(torch.ones(3, 2))


# ----------------------------------------------------------------------------------------------------- resets, offsets


@pytest.mark.parametrize("kind", [PES, NRES])
def test_a_reset_begins_anew_where_the_mask_says(kind):
    params = leaves()
    estimator = kind(system, 4, 0.1, seed=0)
    state = estimator.init(params, start())
    for _ in range(3):
        _, state = estimator(params, state, 1.0)
    mask = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    fresh = estimator.reset(state, mask, start())
    assert torch.equal(fresh["perturbation"] == 0, mask.unsqueeze(-1).expand(4, 2, 7))
    assert torch.equal(fresh["perturbation"][~mask], state["perturbation"][~mask])
    for name, leaf in fresh["particles"].items():
        assert torch.equal(leaf[~mask], state["particles"][name][~mask])
        assert torch.equal(leaf[mask], torch.as_tensor(start()[name]).expand(leaf[mask].shape))
    assert torch.equal(fresh["center"]["x"], state["center"]["x"])
    assert (state["particles"]["t"] == 3).all()  # not changed
    _, after = estimator(params, fresh, 1.0)
    same = after["perturbation"] == state["perturbation"]
    if kind is NRES:  # another one exactly where it was reset, and the same pair's sides are opposite again
        assert torch.equal(same, ~mask.unsqueeze(-1).expand(4, 2, 7))
        assert torch.equal(after["perturbation"][0, 0], -after["perturbation"][0, 1])
    else:
        assert not same.any()
    assert after["particles"]["t"].tolist() == [[1, 1], [4, 4], [1, 4], [4, 4]]


@pytest.mark.parametrize("kind", ALL)
def test_ways_to_say_who_is_done(kind):
    params = leaves()
    estimator = kind(system, 2, 0.1, seed=0)
    _, state = estimator(params, estimator.init(params, start()), 1.0)
    ended = estimator.reset(state, lambda s: s["t"] >= 1, start())
    assert ended["center"]["t"] == 0
    assert estimator.reset(state, True, start())["center"]["t"] == 0
    assert estimator.reset(state, False, start())["center"]["t"] == 1
    if kind is not TruncatedES:
        assert (ended["particles"]["t"] == 0).all()
        pairs = estimator.reset(state, torch.tensor([True, False]), start())
        assert pairs["particles"]["t"].tolist() == [[0, 0], [1, 1]]
        assert pairs["center"]["t"] == 1


def test_episodes_of_random_length_have_an_unbiased_gradient(checks):
    """Windows end episodes by chance, one side of a pair before the other: the sum over windows stays right."""
    num = 60_000

    def window(p, s):
        x = s["x"] + p
        return x, {"x": x, "t": s["t"] + 1, "end": s["end"], "loss": x}

    params = torch.zeros((), dtype=torch.float64, requires_grad=True)
    estimator = PES(window, num, 1.0, evaluator="batched", seed=checks.seed())
    begin = {"x": torch.zeros(()).double(), "t": 0, "end": 3, "loss": torch.zeros(()).double()}
    state = estimator.init(params, begin)
    lengths = torch.tensor([2, 3]).expand(num, 2)  # plus begins anew after two windows, minus after three
    samples = torch.zeros(num, dtype=torch.float64)
    for _ in range(6):
        _, state = estimator(params, state)
        samples += (state["perturbation"].squeeze(2) * state["particles"]["loss"]).mean(dim=1)
        state = estimator.reset(state, state["particles"]["t"] >= lengths, begin)
    checks.mean(samples, (3 * 3 + 2 * 6) / 2, effect=0.8)  # three episodes of 1 + 2, two of 1 + 2 + 3


@pytest.mark.statistics
@pytest.mark.parametrize("kind", [PES, NRES])
def test_what_the_parameters_do_to_the_length_of_an_episode(kind, checks):
    """A loss of 1 for each window that an episode lasts; after the first it ends where the parameters are above c."""
    num, c = 200_000, 0.5

    def window(p, s):
        return torch.ones_like(p), {"p": p + 0 * s["p"], "t": s["t"] + 1}

    params = torch.zeros((), dtype=torch.float64, requires_grad=True)
    estimator = kind(window, num, 1.0, evaluator="batched", seed=checks.seed())
    begin = {"p": torch.zeros(()).double(), "t": 0}
    state = estimator.init(params, begin)
    samples = torch.zeros(num, dtype=torch.float64)
    for _ in range(2):
        loss, state = estimator(params, state)
        loss.backward()
        samples += state["perturbation"].squeeze(2).mean(dim=1)
        state = estimator.reset(state, lambda s: s["p"] > c, begin)
    torch.testing.assert_close(params.grad, samples.mean(), rtol=0, atol=1e-12)
    checks.mean(samples, -math.exp(-c * c / 2) / math.sqrt(2 * math.pi), effect=0.05)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_offsets_spread_the_particles(evaluator):
    params, num, offsets = leaves(), 6, 4
    estimator = NRES(system, num, 0.1, evaluator=evaluator, seed=0)
    with zograd.Tracker() as t:
        state = estimator.init(params, start(), 1.0, offsets=offsets)
        assert t.evaluations == offsets - 1
        estimator(params, state, 1.0)
        assert t.evaluations == offsets - 1 + 2 * num + 1
    assert state["particles"]["t"].tolist() == [[k, k] for k in (0, 0, 1, 2, 2, 3)]
    expected = {k: torch.as_tensor(v) for k, v in start().items()}
    for _ in range(3):
        _, expected = system({k: p.detach() for k, p in params.items()}, expected, 1.0)
    torch.testing.assert_close(state["particles"]["x"][5, 1], expected["x"], rtol=1e-12, atol=0)
    assert state["center"]["t"] == 0


# ------------------------------------------------------------------------------------------------------ saved, resumed


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_run_goes_on_bit_for_bit(kind, tmp_path):
    def run(params, state, windows):
        estimator = kind(system, 5, 0.1)  # a new one: all that counts is in the state
        for _ in range(windows):
            loss, state = estimator(params, state, 1.0)
            loss.backward()
            state = estimator.reset(state, lambda s: s["x"][..., 0] > 0.5, start())
        return state

    whole, parts = leaves(), leaves()
    first = kind(system, 5, 0.1).init(whole, start())
    wanted = run(whole, first, 8)
    torch.manual_seed(99)
    torch.save(run(parts, first, 3), tmp_path / "state.pt")
    state = run(parts, torch.load(tmp_path / "state.pt", weights_only=True), 5)
    assert torch.equal(whole["a"].grad, parts["a"].grad)
    for x, y in zip(*[take_apart(s)[0] for s in (wanted, state)], strict=True):
        assert torch.equal(x, y)


def test_seeds_come_from_where_they_should():
    params = leaves()
    one = PES(system, 2, 0.1, generator=torch.Generator().manual_seed(5))
    two = PES(system, 2, 0.1, generator=torch.Generator().manual_seed(5))
    first, second = one.init(params, start()), one.init(params, start())
    assert first["seed"] == two.init(params, start())["seed"] != second["seed"]
    assert PES(system, 2, 0.1, seed=3).init(params, start())["seed"] == 3
    before = torch.get_rng_state()
    one(params, first, 1.0)
    assert torch.equal(before, torch.get_rng_state())


def test_windows_draw_new_numbers_and_pairs_the_same():
    seen = []

    def window(p, s):
        seen.append(torch.rand(()).item())
        return p.sum(), s

    params = torch.ones(2, requires_grad=True)
    estimator = PES(window, 2, 0.1, seed=0)
    state = estimator.init(params, 0.0)
    for _ in range(2):
        _, state = estimator(params, state)
    first, second = seen[1:5], seen[6:]
    assert first[0] == first[1] != first[2] == first[3]
    assert not set(first) & set(second)


def test_a_journal_spares_the_windows_of_a_run_that_died(tmp_path):
    calls = []

    def window(p, s):
        calls.append(1)
        return (p * s).sum(), s + p

    def run(shift):
        params = torch.ones(2, requires_grad=True)
        estimator = PES(window, 3, 0.1, seed=0, evaluator=Journal("loop", tmp_path / "journal"))
        state = estimator.init(params, torch.ones(2), offsets=3)
        state["particles"] = state["particles"] + shift
        for _ in range(3):
            loss, state = estimator(params, state)
            loss.backward()
        return params.grad

    wanted = run(0.0)
    assert len(calls) == 23
    assert torch.equal(run(0.0), wanted)
    assert len(calls) == 23
    assert not torch.equal(run(1.0), wanted)  # other particles: nothing of the file fits
    assert len(calls) == 23 + 21


def simulated(p, s):
    """A window that worker processes can import."""
    x = 0.8 * torch.tanh(s["x"] + p)
    return float(x.square().sum()), {"x": x, "t": s["t"] + 1}


@pytest.mark.parametrize("kind", ALL)
def test_workers_in_other_processes_give_the_same_bits(kind, two_workers):
    results = []
    for evaluator in ("loop", two_workers):
        params, start = torch.tensor([0.1, -0.2, 0.3], requires_grad=True), {"x": torch.zeros(3), "t": 0}
        estimator = kind(simulated, 5, 0.1, evaluator=evaluator, seed=3)
        state = estimator.init(params, start, offsets=1 if kind is TruncatedES else 3)
        for _ in range(3):
            loss, state = estimator(params, state)
            loss.backward()
            state = estimator.reset(state, lambda s: s["t"] >= 3, start)
        results.append((params.grad, state["center"]["x"], state["particles"]))
    (grad, center, particles), (grad2, center2, particles2) = results
    assert torch.equal(grad, grad2)
    assert torch.equal(center, center2)
    assert particles is None or torch.equal(particles["x"], particles2["x"])


def test_particles_can_be_made_again_elsewhere():
    """Particles pickle, so that an evaluator of any kind may send them."""
    space = Space.of((torch.zeros(2), torch.zeros(1)))
    shifts, states = torch.randn(4, 2, 3), torch.randn(4, 2, 5).double()
    directions = Directions(Gaussian(), space, 0, 4)
    leaves, center = (torch.ones(2), torch.zeros(1)), torch.arange(5.0).double()
    first = Particles(leaves, center, directions, (0.1, 0.2), shifts, states)
    assert all(map(torch.equal, first.center(), (*leaves, center)))
    second = pickle.loads(pickle.dumps(first)).only((-1.0,))
    assert all(map(torch.equal, second.center(), first.center()))
    for one, two in zip(list(first.each(1, 3))[1::2], second.each(1, 3), strict=True):
        assert all(map(torch.equal, one, two))
    batch = second.rows(1, 3, second.offsets)
    torch.testing.assert_close(batch[1], 0.2 * shifts[1:3, 1, 2:])
    assert torch.equal(batch[2], states[1:3, 1])


# --------------------------------------------------------------------------------------------------------- derivatives


def test_gradients_may_be_asked_for_in_every_way():
    params = leaves()
    estimator = PES(system, 4, 0.1, seed=0)
    state = estimator.init(params, start())
    loss, _ = estimator(params, state, 1.0)
    once = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, list(params.values()))
    torch.testing.assert_close(thrice[1], 3 * once[1])
    with torch.no_grad():
        plain, after = estimator(params, state, 1.0)
    assert not plain.requires_grad
    assert after["window"] == 1
    frozen = {"a": params["a"], "b": params["b"].detach()}
    loss, _ = estimator(frozen, estimator.init(frozen, start()), 1.0)
    loss.backward()
    assert frozen["a"].grad is not None


def test_second_derivatives_are_refused():
    params = torch.ones(2, requires_grad=True)
    estimator = PES(lambda p, s: ((p * s).sum(), s + p), 4, 0.1, seed=0)
    loss, _ = estimator(params, estimator.init(params, torch.ones(2)))
    for composite in (loss, loss**2):
        (grad,) = torch.autograd.grad(composite, params, create_graph=True)
        with pytest.raises(SecondDerivativeError, match="window"):
            torch.autograd.grad(grad.sum(), params)


# ----------------------------------------------------------------------------------------------------------- bad input


def once(window, begin=0.0, kind=PES, **settings):
    params = torch.ones(2, requires_grad=True)
    estimator = kind(window, 2, 0.1, **settings)
    loss, _ = estimator(params, estimator.init(params, begin))
    return loss


def fine(p, s):
    return p.sum(), s


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: {**s, "new": s["x"]}, ("'new'", "float32")),
        (lambda s: {}, ("got {}",)),
        (lambda s: {"x": s["x"][..., :1]}, ("3", "got {'x': 'float32[", "1]")),
        (lambda s: {"x": s["x"].double()}, ("float32", "float64")),
        (lambda s: s["x"], ("got float32",)),
    ],
)
def test_a_window_that_changes_its_state(change, told, evaluator):
    def window(p, s):
        return p.sum(dim=-1), change(s)

    with pytest.raises(ValueError, match=said("the state that `", "window` returns must have the structure", *told)):
        once(window, {"x": torch.zeros(3)}, evaluator=evaluator)


def missing(p, s):
    return p.sum()


def nothing(p, s):
    """No return."""


BAD = {
    "no pair": (lambda: once(missing), TypeError, "`missing` must return `(loss, state)`, got Tensor"),
    "no return": (lambda: once(nothing), TypeError, "`nothing` must return `(loss, state)`, got NoneType"),
    "vector loss": (lambda: once(lambda p, s: (p, s)), ValueError, "a loss of one value, of shape (), got (2,)"),
    "integer loss": (lambda: once(lambda p, s: (torch.tensor(1), s)), TypeError, "floating-point values"),
    "text state": (lambda: once(fine, "abc"), TypeError, "`PES.init(params, state)`: a state is a tree of tensors"),
    "nan loss": (
        lambda: once(lambda p, s: (p.sum() / 0 - p.sum() / 0, s)),
        zograd.NonFiniteError,
        "a loss that is not finite at the parameters: nan",
    ),
    "inf at a particle": (
        lambda: once(lambda p, s: (torch.where(p[0] == 1, 0.0, torch.inf), s)),
        zograd.NonFiniteError,
        "a loss that is not finite at 4 of 4 particles: at pair 0 (+), 0 (-), 1 (+), 1 (-)",
    ),
    "fn": (lambda: PES(3), TypeError, "`PES(fn)` must be a function, got int 3"),
    "num_samples": (lambda: PES(fine, 0), ValueError, "`PES(num_samples=...)` must be at least 1, got 0"),
    "num_samples None": (lambda: PES(fine, None), TypeError, "`PES(num_samples=...)` must be an int, got None"),
    "num_samples Until": (lambda: PES(fine, Until(2, 100)), TypeError, "must be an int, got Until(snr=2, at_most=100"),
    "sigma": (lambda: TruncatedES(fine, 1, -0.1), ValueError, "`TruncatedES(sigma=...)` must be positive, got -0.1"),
    "evaluator": (lambda: PES(fine, evaluator="pol"), ValueError, "`PES(evaluator=...)` must be one of"),
    "not Gaussian": (
        lambda: PES(fine, distribution=Rademacher()),
        ValueError,
        "`PES(distribution=Rademacher())` must have Gaussian marginals",
    ),
    "on a sphere": (lambda: PES(fine, distribution=Sphere()), ValueError, "Gaussian marginals"),
    "coordinates": (lambda: NRES(fine, distribution=Coordinate()), ValueError, "must have mean zero"),
    "offsets": (lambda: offsets(PES, 0), ValueError, "`PES.init(offsets=...)` must be at least 1, got 0"),
    "offsets kind": (lambda: offsets(PES, 1.0), TypeError, "`PES.init(offsets=...)` must be an int, got float 1.0"),
    "offsets, truncated": (lambda: offsets(TruncatedES, 2), ValueError, "`TruncatedES.init(offsets=...)` must be 1"),
    "integers": (
        lambda: PES(fine).init(torch.ones(2).int(), 0.0),
        ValueError,
        "no floating-point tensor to differentiate in `params`",
    ),
    "empty": (lambda: PES(fine).init(torch.ones(0), 0.0), ValueError, "`params` have no elements"),
    "complex": (lambda: PES(fine).init(torch.ones(2) * 1j, 0.0), TypeError, "must be dense and real, got a complex"),
    "a state of the window": (lambda: PES(fine)(torch.ones(2), 0.0), TypeError, "must be that of `PES.init(params, st"),
    "another's": (
        lambda: PES(fine)(torch.ones(2), TruncatedES(fine).init(torch.ones(2), 0.0)),
        ValueError,
        "the state is that of another estimator, `TruncatedES`",
    ),
    "another's with particles": (
        lambda: NRES(fine)(torch.ones(2), PES(fine).init(torch.ones(2), 0.0)),
        ValueError,
        "`NRES(params, state)`: the state is that of another estimator, `PES`",
    ),
    "nobody's": (
        lambda: PES(fine)(torch.ones(2), {**PES(fine).init(torch.ones(2), 0.0), "kind": torch.tensor(7)}),
        ValueError,
        "the state is that of another estimator, `kind 7`",
    ),
    "other num_samples": (
        lambda: PES(fine, 3)(torch.ones(2), PES(fine, 2).init(torch.ones(2), 0.0)),
        ValueError,
        "num_samples=3, with a perturbation of shape (3, 2, 2), got (2, 2, 2)",
    ),
    "mask shape": (lambda: reset(torch.ones(3).bool()), ValueError, "(2, 2) for particles, got the shapes (3,)"),
    "mask dtype": (lambda: reset(torch.ones(2)), TypeError, "`done` must be a bool or a tensor of bools, got"),
    "mask of the center": (lambda: reset(lambda s: torch.ones(2).bool()), ValueError, "one bool for the center"),
    "start": (lambda: reset(True, torch.ones(3)), ValueError, "`start` must have the structure"),
    "radius": (lambda: once(fine, distribution=None, kind=lambda f, n, s, **k: PES(f, n, 1e40)), ValueError, "1e+40"),
    "sigma tree": (lambda: PES(fine, 1, {"a": 1.0}).init(torch.ones(2), 0.0), ValueError, "`PES(sigma=...)` must be"),
}


def offsets(kind, value):
    return kind(fine).init(torch.ones(2), 0.0, offsets=value)


def reset(done, begin=0.0):
    estimator = PES(fine, 2, 0.1)
    return estimator.reset(estimator.init(torch.ones(2), 0.0), done, begin)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, told = BAD[case]
    with pytest.raises(error, match=re.escape(told)):
        call()
