"""What autograd sees of a decorated function: right numbers, or an error that says so.

Most tests are exact. ``Exact`` draws the rows of a Hadamard matrix, whose second moment is the identity without any
chance, so that antithetic differences give a quadratic's gradient to rounding.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import zograd
from problems import EXACT, ROWS
from zograd import SecondDerivativeError, zero_order
from zograd.distributions import Rademacher
from zograd.failures import Drop

# torch's own forward mode imports decompositions that use what torch deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit:DeprecationWarning")

RANDOM = {"method": "antithetic", "num_samples": 8, "sigma": 0.1}

B = torch.tensor([1.0, -2.0, 3.0])
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, -1.0, 0.25], [0.0, 0.25, 3.0]])
X = torch.tensor([0.5, 1.0, -1.5])
C = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])  # the Jacobian of `linear`


def quadratic(x):
    return x @ H.to(x) @ x / 2 + B.to(x) @ x


def numpy_quadratic(x):
    a = x.detach().numpy()
    return float(a @ H.numpy() @ a / 2 + B.numpy() @ a)


def linear(x):
    return C @ x


def numpy_linear(x):
    return C.numpy() @ x.detach().numpy()


def gradient(x):
    return x @ H + B


def leaf(x=X):
    return x.clone().requires_grad_()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def gradient_of(fn, x=X, **options):
    x = leaf(x)
    zero_order(**{**EXACT, **options})(fn)(x).backward()
    return x.grad


class Calls:
    """Counts the calls of a function."""

    def __init__(self, fn):
        self.fn = fn
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.fn(*args, **kwargs)


# ------------------------------------------------------------------------------------------ what fn may do inside


def inner_grad_of_fresh(x):
    w = torch.zeros(3, requires_grad=True)
    for _ in range(3):
        (g,) = torch.autograd.grad(((w - x) ** 2).sum(), w)
        w = (w - 0.25 * g).detach().requires_grad_()
    return (w**2).sum()  # w = (1 - 1/8) x


def inner_backward_on_fresh(x):
    w = torch.zeros(3, requires_grad=True)
    for _ in range(3):
        w.grad = None
        ((w - x) ** 2).sum().backward()
        with torch.no_grad():
            w -= 0.25 * w.grad
    return (w**2).sum()


def inner_optimizer_on_fresh(x):
    layer = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
    for _ in range(3):
        optimizer.zero_grad()
        ((layer.weight[0] - x) ** 2).sum().backward()
        optimizer.step()
    return (layer.weight**2).sum()


def inner_grad_of_argument(x):
    w = x
    for _ in range(3):
        (g,) = torch.autograd.grad((w**2).sum(), w, create_graph=False)
        w = (w - 0.25 * g).detach().requires_grad_()
    return (w**2).sum()  # w = x / 8


def inner_backward_on_argument(x):
    (x**2).sum().backward()
    return (x.grad**2).sum()


def inner_optimizer_on_argument(x):
    optimizer = torch.optim.SGD([x], lr=0.25)
    for _ in range(3):
        optimizer.zero_grad()
        (x**2).sum().backward()
        optimizer.step()
    return (x**2).sum()


def inner_second_order(x):
    (g,) = torch.autograd.grad((x**3).sum() / 3, x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    return (h**2).sum()  # h = 2 x


INNER = [
    (inner_grad_of_fresh, 49 / 64),
    (inner_backward_on_fresh, 49 / 64),
    (inner_optimizer_on_fresh, 49 / 64),
    (inner_grad_of_argument, 1 / 64),
    (inner_backward_on_argument, 4.0),
    (inner_optimizer_on_argument, 1 / 64),
    (inner_second_order, 4.0),
]


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "fourth_order"])
@pytest.mark.parametrize(("fn", "factor"), INNER, ids=[fn.__name__ for fn, _ in INNER])
def test_an_inner_training_loop_needs_no_action(fn, factor, method):
    x = leaf()
    value = zero_order(**{**EXACT, "method": method})(fn)(x)
    close(value.detach(), factor * (X**2).sum())
    value.backward()
    if method in ("antithetic", "fourth_order"):
        close(x.grad, 2 * factor * X)
    else:  # with the even part of a quadratic in the values, whose mean over these rows is not zero by coordinate
        plain = zero_order(**{**EXACT, "method": method})(lambda x: factor * (x.detach() ** 2).sum())
        close(x.grad, plain.estimate(X).grad)


@pytest.mark.parametrize(("fn", "factor"), INNER, ids=[fn.__name__ for fn, _ in INNER])
def test_an_inner_training_loop_leaves_the_argument_alone(fn, factor):
    x = leaf()
    value = zero_order(**EXACT)(fn)(x)
    assert torch.equal(x.detach(), X)
    assert x.grad is None
    value.backward()
    close(x.grad, 2 * factor * X)


def test_an_inner_training_loop_under_torch_func_grad():
    close(torch.func.grad(zero_order(**EXACT)(inner_optimizer_on_fresh))(X), 49 / 32 * X)
    close(torch.func.grad(zero_order(**EXACT)(inner_grad_of_argument))(X), X / 32)


def test_an_inner_training_loop_under_vmap_of_grad():
    xs = torch.stack([X, 2 * X])
    close(torch.vmap(torch.func.grad(zero_order(**EXACT)(inner_backward_on_fresh)))(xs), 49 / 32 * xs)


def test_an_inner_torch_func_transform():
    def fn(x):
        return (torch.func.grad(lambda w: (w**3).sum() / 3)(x) + x).sum()

    close(gradient_of(fn), 2 * X + 1)
    close(gradient_of(fn, evaluator="vmap"), 2 * X + 1)


def test_an_inner_gradient_that_only_some_points_ask_for():
    def fn(x):
        if x.detach()[0] > X[0]:  # not at the center
            return torch.autograd.grad((x**2).sum(), x)[0].sum()
        return 2 * x.sum()

    close(gradient_of(fn), torch.full((3,), 2.0))


def careful_step(parameters):
    """As many write it: whatever has no gradient stays."""
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p -= 0.25 * p.grad
                p.grad = None


def joint_by_hand(x):
    w = torch.ones(3, requires_grad=True)
    (((w - 1) ** 2).sum() + (x**2).sum()).backward()
    careful_step([w, x])
    return (x**2).sum() + (w**2).sum()  # x / 2, and 1


def clipped(x):
    w = torch.ones(3, requires_grad=True)
    (w.sum() + 3 * x.sum()).backward()
    return torch.nn.utils.clip_grad_norm_([w, x], 1.0) + x.detach().sum()  # sqrt(30), and x


def written_to_first(x):
    with torch.no_grad():
        x.mul_(0.5)
    (g,) = torch.autograd.grad((x**2).sum(), x)
    return (g**2).sum()  # g = x


def hooked(x):
    seen = []
    x.register_hook(seen.append)
    (((x + torch.zeros(3, requires_grad=True)) ** 2).sum()).backward()
    return (seen[0] ** 2).sum()


def retained(x):
    x.retain_grad()
    (x**2).sum().backward()
    return (x.grad**2).sum()


def asks_whether_it_is_tracked(x):
    return (x**2).sum() * (2 if x.requires_grad else 1)


SUBTLE = [
    (joint_by_hand, X / 2),
    (clipped, torch.ones(3)),
    (written_to_first, 2 * X),
    (hooked, 8 * X),
    (retained, 8 * X),
    (asks_whether_it_is_tracked, 4 * X),
]


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize(("fn", "expected"), SUBTLE, ids=[fn.__name__ for fn, _ in SUBTLE])
def test_fn_sees_arguments_that_require_grad_as_in_a_plain_call(fn, expected, first):
    f = zero_order(**EXACT)(fn)
    if not first:
        f(leaf())
    x, own = leaf(), leaf()
    value = f(x)
    # A copy with a history of its own, so that fn may write to it; what it returns is the value of a plain call.
    close(value.detach(), fn(own).detach())
    value.backward()
    close(x.grad, expected)


@pytest.mark.parametrize(("fn", "factor"), INNER, ids=[fn.__name__ for fn, _ in INNER])
def test_an_inner_training_loop_counts_every_call(fn, factor):
    calls = Calls(fn)
    f = zero_order(**EXACT)(calls)
    for _ in range(2):
        calls.count = 0
        assert f.estimate(leaf()).evaluations == calls.count
    assert calls.count == 2 * ROWS + 1


@pytest.mark.filterwarnings("ignore:.*outside its differentiated arguments:zograd.ZeroOrderWarning")
def test_gradients_of_another_argument_do_not_pile_up_over_evaluations():
    def fn(x, w):
        ((x * w).sum() ** 2 / 2).backward()
        return w.grad.sum()

    w = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    x = leaf()
    value = zero_order(**EXACT)(fn)(x, w)
    value.backward()
    expected = torch.func.grad(lambda x: (x @ w.detach()) * x.sum())(X)
    close(value.detach(), (X @ w.detach()) * X.sum())
    close(x.grad, expected)
    assert w.grad is None


@pytest.mark.filterwarnings("ignore:.*outside its differentiated arguments:zograd.ZeroOrderWarning")
def test_an_inner_training_loop_on_another_argument():
    def fn(x, w):
        (g,) = torch.autograd.grad(((w - x) ** 2).sum(), w)
        return ((w - 0.25 * g) ** 2).sum()

    x, w = leaf(), torch.zeros(3, requires_grad=True)
    zero_order(**EXACT)(fn)(x, w).backward()
    close(x.grad, X / 2)
    assert w.grad is None


# --------------------------------------------------------------------------------------------------------- nested


CENTER = torch.tensor([1.0, -1.0, 0.5, 2.0])
START = torch.tensor([0.5, 1.0, -2.0, 0.0])
CURVATURE, RATE, PAIRS = 1.5, 0.2, 3


def objective(y):
    return CURVATURE / 2 * ((y - CENTER) ** 2).sum()


def adapted(inner):
    """The objective after one step of the inner estimate."""

    def fn(x):
        y = x.detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(inner(y), y)
        return objective(x - RATE * g)

    return fn


BRACKET = (1 - RATE * CURVATURE) ** 2 + (RATE * CURVATURE) ** 2 * (len(START) + 1) / PAIRS


def test_nested_estimates_have_the_mean_of_the_closed_form():
    inner = zero_order(method="antithetic", num_samples=PAIRS, sigma=0.1)(objective)
    # So small a sigma that all points are one: the coefficients are draws of f(U(x)), each with its own inner stream.
    draws = zero_order(num_samples=500, sigma=1e-6, seed=3)(adapted(inner)).estimate(START.double()).coefficients
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - BRACKET * objective(START)) < 5 * error
    assert error < 0.04 * objective(START)


def test_the_outer_gradient_of_nested_estimates_has_the_closed_form():
    inner = zero_order(method="antithetic", num_samples=PAIRS, sigma=0.1)(objective)
    outer = zero_order(**{**EXACT, "num_samples": ROWS})(adapted(inner))
    grads = torch.stack([outer.replace(seed=k).estimate(START).grad for k in range(25)])
    error = grads.std(dim=0) / math.sqrt(len(grads))
    assert ((grads.mean(dim=0) - BRACKET * CURVATURE * (START - CENTER)).abs() < 5 * error).all()
    assert (error < 0.2).all()


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("seed", [None, 7])
def test_the_inner_stream_is_independent_of_the_outer_one(seed, evaluator):
    if evaluator == "vmap" and seed is not None:
        pytest.skip("under vmap the inner directions cannot be read")
    noises = []

    def fn(x):
        if evaluator == "loop":
            estimate = inner.estimate(x.detach())
            noises.append(estimate.directions.noise(0, 1)[0].clone())
        return (inner(x) + x.sum()).detach()

    inner = zero_order(num_samples=2, seed=seed)(lambda y: y.sum())
    outer = zero_order(num_samples=3, method="antithetic", seed=7, evaluator=evaluator)(fn)
    estimate = outer.estimate(torch.zeros(6))
    if evaluator == "vmap":
        assert torch.isfinite(estimate.grad).all()
        return
    outer_noise = estimate.directions.noise(0, 3)[0]
    _, *sides = noises
    for i in range(3):
        plus, minus = sides[2 * i], sides[2 * i + 1]
        assert torch.equal(plus, minus), "both sides of a pair see the same inner directions"
        assert not any(torch.equal(plus[0], row) for row in outer_noise)
    distinct = {tuple(noise[0].tolist()) for noise in sides}
    assert len(distinct) == (3 if seed is None else 1)


def test_nested_in_nested_with_one_seed_everywhere():
    noises = []

    def spy(estimate):
        noises.append(tuple(estimate.directions.noise(0, 1)[0][0].tolist()))
        return estimate.value

    first = zero_order(seed=7)(lambda y: y.sum())
    second = zero_order(seed=7)(lambda y: spy(first.estimate(y)))
    third = zero_order(seed=7)(lambda y: spy(second.estimate(y)))
    spy(third.estimate(torch.zeros(5)))
    assert len(set(noises)) == 3


# ---------------------------------------------------------------------------------------------- backward and friends


def test_backward_and_autograd_grad_agree_with_the_truth_and_with_estimate():
    f, x = zero_order(**EXACT)(quadratic), leaf()
    (by_grad,) = torch.autograd.grad(f(x), x)
    f(x).backward()
    close(x.grad, gradient(X))
    assert torch.equal(x.grad, by_grad)
    assert torch.equal(x.grad, f.estimate(X).grad)


@pytest.mark.parametrize("fn", [quadratic, linear], ids=["scalar", "vector"])
def test_retain_graph_gives_the_same_gradient_twice(fn):
    calls = Calls(fn)
    x = leaf()
    value = zero_order(**RANDOM)(calls)(x)
    before = calls.count
    cotangent = torch.tensor([2.0, -3.0])[: value.numel()].view_as(value)
    (first,) = torch.autograd.grad(value, x, cotangent, retain_graph=True)
    torch.manual_seed(11)  # whatever happens to the random state in between
    (second,) = torch.autograd.grad(value, x, cotangent, retain_graph=True)
    assert torch.equal(first, second)
    assert calls.count == before, "backward does not call fn"


@pytest.mark.parametrize("fn", [quadratic, linear], ids=["scalar", "vector"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_there_is_one_plain_call(mode, fn):
    calls = Calls(fn)
    with mode():
        value = zero_order(**RANDOM)(calls)(leaf())
        assert torch.equal(value, fn(X))
    assert calls.count == 1
    assert not value.requires_grad


def test_with_nothing_to_differentiate_there_is_one_plain_call():
    calls = Calls(lambda x, w: (x * w).sum())
    w = leaf()
    f = zero_order(**RANDOM)(calls)
    state = torch.get_rng_state()
    assert f(X, B).item() == (X * B).sum().item()
    assert calls.count == 1
    f(X, w).backward()  # an ordinary call, so that an ordinary gradient of the rest
    assert calls.count == 2
    close(w.grad, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_estimate_calls_fn_as_often_as_it_reports():
    for method, evaluations in [("naive", 9), ("forward", 9), ("antithetic", 17), ("fourth_order", 33)]:
        calls = Calls(quadratic)
        zero_order(**{**RANDOM, "method": method})(calls)(leaf()).backward()
        assert calls.count == evaluations


@pytest.mark.parametrize("fn", [quadratic, linear], ids=["scalar", "vector"])
def test_an_optimizer_step_between_forward_and_backward(fn):
    f, x = zero_order(**EXACT, seed=0)(fn), leaf()
    value = f(x).sum()
    optimizer = torch.optim.SGD([x], lr=0.1)
    x.grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    value.backward()
    close(x.grad, gradient(X) if fn is quadratic else C.sum(dim=0))


def test_the_value_can_be_changed_in_place():
    x = leaf()
    value = zero_order(**EXACT)(quadratic)(x)
    value += 1
    value *= 3
    value.backward()
    close(x.grad, 3 * gradient(X))


def test_a_gradient_flows_on_to_what_the_argument_was_made_of():
    w = leaf()
    zero_order(**EXACT)(quadratic)(2 * w + 1).square().backward()
    at = 2 * X + 1
    close(w.grad, 4 * quadratic(at) * gradient(at))


@pytest.mark.filterwarnings("ignore:.*outside its differentiated arguments:zograd.ZeroOrderWarning")
def test_other_arguments_get_no_gradient():
    x, w, closed = leaf(), leaf(B), leaf(B)
    f = zero_order(**EXACT)(lambda x, w, scale: (x * w * closed).sum() * scale)
    scale = torch.tensor(2.0, requires_grad=True)
    value = f(x, w, scale=scale)
    value.backward(retain_graph=True)
    close(x.grad, 2 * B * B)
    assert w.grad is None
    assert closed.grad is None
    assert scale.grad is None
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(value, w, retain_graph=True)
    assert torch.autograd.grad(value, [x, w, closed, scale], allow_unused=True)[1:] == (None, None, None)


@pytest.mark.parametrize("scheme", ["antithetic", "fourth_order"])
def test_gradcheck_passes_and_calls_again(scheme):
    # One dimension, signs, a quadratic: antithetic differences are exact, so the numbers must agree to 1e-6.
    f = zero_order(Rademacher(), scheme, sigma=0.3, num_samples=3, seed=5)(lambda x: (x**2).sum() + 3 * x.sum())
    x = torch.tensor([1.25], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x,), check_undefined_grad=True, check_batched_grad=True, check_forward_ad=True)


def test_gradcheck_of_a_vector():
    f = zero_order(**{**EXACT, "sigma": 0.3}, seed=5)(lambda x: C.double() @ x)
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(f, (x,), check_undefined_grad=True, check_batched_grad=True, check_forward_ad=True)


def test_gradgradcheck_is_an_error():
    f = zero_order(**EXACT)(quadratic)
    with pytest.raises(SecondDerivativeError, match="second derivative"):
        torch.autograd.gradgradcheck(f, (X.double().requires_grad_(),))


def test_gradients_in_a_batch_of_cotangents():
    for fn, jacobian in [(linear, C), (numpy_linear, C)]:
        x = leaf()
        value = zero_order(**EXACT)(fn)(x)
        cotangents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -3.0]])
        (rows,) = torch.autograd.grad(value, x, cotangents, is_grads_batched=True)
        close(rows, cotangents @ jacobian)


# ------------------------------------------------------------------------------------------ precision and scaling


@pytest.mark.parametrize("fn", [quadratic, linear], ids=["scalar", "vector"])
def test_sums_stay_in_full_precision_under_autocast(fn):
    f = zero_order(num_samples=100, sigma=0.1, method="antithetic", seed=2)(fn)
    x = torch.linspace(-1, 1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = f.estimate(x)
        live = leaf(x)
        value = f(live)
        cotangent = torch.linspace(1, 2, value.numel()).view_as(value)
        inside = estimate.vjp(cotangent)
    value.backward(cotangent)
    outside = estimate.vjp(cotangent)
    assert torch.equal(inside, outside)
    close(live.grad, outside)
    if fn is quadratic:
        assert torch.equal(estimate.grad, estimate.vjp(torch.ones_like(estimate.value)))


def test_sums_stay_in_full_precision_under_autocast_in_forward_mode():
    f = zero_order(num_samples=100, sigma=0.1, method="antithetic", seed=2)(lambda x: x * B)
    tangent = torch.tensor([0.1, 0.7, -0.3])
    _, outside = torch.func.jvp(f, (X,), (tangent,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, inside = torch.func.jvp(f, (X,), (tangent,))
    assert torch.equal(inside, outside)


def test_fn_runs_under_the_callers_autocast_at_every_point():
    seen = []

    def fn(x):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return x @ B

    for backward_too in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = zero_order(**RANDOM)(fn)(leaf())
            if backward_too:
                value.backward()
    assert set(seen) == {(True, torch.bfloat16)}
    assert len(seen) == 34


def test_grad_scaler():
    results = []
    for scaler in (torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)):
        x = leaf()
        optimizer = torch.optim.SGD([x], lr=0.125)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = zero_order(**RANDOM, seed=4)(quadratic)(x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(x.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[0], X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_their_leaf(dtype):
    x = X.to(dtype).requires_grad_()
    value = zero_order(**EXACT)(lambda x: (x * B.to(dtype)).sum())(x)
    value.backward()
    assert value.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, B.to(dtype), rtol=2e-2, atol=2e-2)


# -------------------------------------------------------------------------------------- checkpointing and compiling


@pytest.mark.parametrize("fn", [quadratic, linear], ids=["scalar", "vector"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, fn):
    f = zero_order(**RANDOM)(fn)

    def block(x):
        return f(torch.sin(x)).sum() ** 2

    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x = leaf()
        value = run(x)
        close(value.detach(), fn(torch.sin(X)).sum() ** 2)
        value.backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_activation_checkpointing_keeps_what_is_drawn_after_the_estimate():
    # Not the reentrant form: it runs forward without grad mode, hence one plain call that draws no seed, and again with
    # grad mode in backward, where a seed is drawn.
    f = zero_order(**EXACT)(lambda x: x.sum())
    masks = []

    def block(x):
        masks.append(torch.rand(4))
        y = f(x)
        masks.append(torch.rand(4))
        return y * masks[-1].sum()

    checkpoint(block, leaf(), use_reentrant=False).backward()
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])


# The compiler looks at the `.grad` of tensors that have none, and warns of that itself.
COMPILER = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@COMPILER
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_around_it(backend):
    f = zero_order(**EXACT, seed=1)(quadratic)

    def step(x):
        return torch.sin(f(x * 2) + 1) * 3

    expected_x, x = leaf(), leaf()
    expected = step(expected_x)
    expected.backward()
    torch._dynamo.reset()
    try:
        compiled = torch.compile(step, backend=backend)
        for _ in range(2):
            x.grad = None
            value = compiled(x)
            value.backward()
            close(value.detach(), expected.detach())
            close(x.grad, expected_x.grad)
        with torch.no_grad():
            close(compiled(x), expected.detach())
    finally:
        torch._dynamo.reset()


@COMPILER
def test_torch_compile_draws_anew_each_call():
    f = zero_order(**RANDOM)(quadratic)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(lambda x: f(x) * 2, backend="eager")
        grads = []
        for _ in range(3):
            x = leaf()
            compiled(x).backward()
            grads.append(x.grad)
    finally:
        torch._dynamo.reset()
    assert not torch.equal(grads[0], grads[1])
    assert not torch.equal(grads[1], grads[2])


# ------------------------------------------------------------------------------------------------ second derivatives


def second_by_create_graph(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)


def second_by_backward(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (g**2).sum().backward()


def second_of_square(f, x):
    (g,) = torch.autograd.grad(f(x) ** 2, x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)


def second_of_composite(f, x):
    (g,) = torch.autograd.grad(f(x.sin()).exp(), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x)


def forward_over_reverse(f, x):
    """The imperative form: a backward without create_graph, whose result still carries a tangent."""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        (g,) = torch.autograd.grad(f(dual), dual)
        return torch.autograd.forward_ad.unpack_dual(g).tangent


def jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


SECOND = {
    "create_graph": second_by_create_graph,
    "backward": second_by_backward,
    "square": second_of_square,
    "composite": second_of_composite,
    "forward over reverse": forward_over_reverse,
    "hessian": lambda f, x: torch.func.hessian(f)(x.detach()),
    "hessian of a square": lambda f, x: torch.func.hessian(lambda x: f(x) ** 2)(x.detach()),
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(f, x.detach()),
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(f, x.detach(), torch.ones(3)),
    "functional.vhp": lambda f, x: torch.autograd.functional.vhp(f, x.detach(), torch.ones(3)),
    "jacfwd(jacrev)": lambda f, x: torch.func.jacfwd(torch.func.jacrev(f))(x.detach()),
    "jacrev(jacrev)": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x.detach()),
    "jacfwd(jacfwd)": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x.detach()),
    "jacrev(jacfwd)": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x.detach()),
    "grad(grad)": lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(x.detach()),
    "grad(jvp)": lambda f, x: torch.func.grad(lambda x: jvp(f, x))(x.detach()),
    "jvp(jvp)": lambda f, x: jvp(lambda x: jvp(f, x), x.detach()),
    "jvp(grad)": lambda f, x: jvp(torch.func.grad(f), x.detach()),
    "vmap(hessian)": lambda f, x: torch.vmap(torch.func.hessian(f))(x.detach().expand(2, 3)),
}


@pytest.mark.parametrize("fn", [quadratic, numpy_quadratic], ids=["torch", "numpy"])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND.keys())
def test_a_second_derivative_is_an_error(second, fn):
    with pytest.raises(SecondDerivativeError, match="second derivative"):
        second(zero_order(**EXACT)(fn), leaf())


VECTOR_SECOND = {
    "create_graph": lambda f, x: second_by_create_graph(lambda x: f(x) @ torch.tensor([1.0, 2.0]), x),
    "forward over reverse": lambda f, x: forward_over_reverse(lambda x: f(x) @ torch.tensor([1.0, 2.0]), x),
    "square": lambda f, x: second_by_create_graph(lambda x: (f(x) ** 2).sum(), x),
    "jacfwd(jacrev)": SECOND["jacfwd(jacrev)"],
    "jacrev(jacrev)": SECOND["jacrev(jacrev)"],
    "jacfwd(jacfwd)": SECOND["jacfwd(jacfwd)"],
    "jacrev(jacfwd)": SECOND["jacrev(jacfwd)"],
    "jvp(jvp)": SECOND["jvp(jvp)"],
}


@pytest.mark.parametrize("second", VECTOR_SECOND.values(), ids=VECTOR_SECOND.keys())
def test_a_second_derivative_of_a_vector_is_an_error(second):
    with pytest.raises(SecondDerivativeError, match="second derivative"):
        second(zero_order(**EXACT)(lambda x: torch.stack([quadratic(x), (x**2).sum()])), leaf())


@pytest.mark.parametrize("fn", [quadratic, linear, numpy_linear], ids=["scalar", "vector", "numpy vector"])
def test_create_graph_alone_is_no_second_derivative(fn):
    x = leaf()
    value = zero_order(**EXACT)(fn)(x).sum()
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    close(g.detach(), gradient(X) if fn is quadratic else C.sum(dim=0))


@pytest.mark.parametrize(
    ("fn", "jacobian"), [(quadratic, gradient(X)), (linear, C), (numpy_linear, C)], ids=["scalar", "vector", "numpy"]
)
def test_the_double_backward_trick_for_jvp(fn, jacobian):
    tangent = torch.tensor([1.0, 2.0, -1.0])
    f = zero_order(**EXACT)(fn)
    value, product = torch.autograd.functional.jvp(f, X, tangent)
    close(value, torch.as_tensor(fn(X)))
    close(product, jacobian @ tangent)


def test_a_derivative_by_the_cotangent_is_right_beside_a_fence():
    x, scale = leaf(), torch.tensor(2.0, requires_grad=True)
    (g,) = torch.autograd.grad(scale * zero_order(**EXACT)(quadratic)(x), x, create_graph=True)
    (by_scale,) = torch.autograd.grad(g.sum(), scale)
    close(by_scale, gradient(X).sum())


# ----------------------------------------------------------------------------------- what fn returns, and its gradient


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda v: float(v), torch.float32),
        (lambda v: v.numpy()[()], torch.float32),
        (lambda v: v.double().numpy()[()], torch.float64),
        (lambda v: np.float64(v), torch.float64),
        (lambda v: v.numpy().reshape(()), torch.float32),
        (lambda v: np.array(v.double().numpy()), torch.float64),
        (lambda v: v.double(), torch.float64),
        (lambda v: v, torch.float32),
    ],
    ids=["float", "np.float32", "np.float64 of array", "np.float64", "0-d", "0-d float64", "double tensor", "tensor"],
)
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_kinds_of_scalars(convert, dtype, evaluator):
    if evaluator == "batched":

        def fn(x):
            rows = [convert(quadratic(row)) for row in x.detach()]
            return torch.stack([torch.as_tensor(r) for r in rows])
    else:

        def fn(x):
            return convert(quadratic(x.detach()))

    x = leaf()
    value = zero_order(**EXACT, evaluator=evaluator)(fn)(x)
    assert value.shape == ()
    if evaluator == "loop":
        assert value.dtype == dtype
        with torch.no_grad():
            plain = zero_order(**EXACT)(fn)(x)
        assert (plain.dtype, plain.item()) == (value.dtype, value.item())
    value.backward()
    close(x.grad, gradient(X))


@pytest.mark.parametrize("kind", [int, np.int64, lambda v: np.array(v)], ids=["int", "np.int64", "0-d int"])
def test_whole_numbers(kind):
    def fn(x):
        return kind(int(100 * x.detach().sum()))  # a staircase

    x = torch.tensor([0.5, 1.0, -0.25], requires_grad=True)
    value = zero_order(**EXACT)(fn)(x)
    assert value.dtype == torch.float32
    assert value.item() == 125
    value.backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 100.0), rtol=0, atol=2)


def test_an_array_of_float64():
    x = leaf()
    value = zero_order(**EXACT)(lambda x: C.double().numpy() @ x.detach().double().numpy())(x)
    assert value.dtype == torch.float64
    value.backward(torch.tensor([2.0, -1.0], dtype=torch.float64))
    close(x.grad, 2 * C[0] - C[1])
    assert x.grad.dtype == torch.float32


OUTPUTS = {
    "vector": lambda x: C @ x,
    "one": lambda x: (C @ x)[:1],
    "matrix": lambda x: torch.outer(x, torch.tensor([1.0, -2.0])) + B[:, None],
    "cube": lambda x: torch.einsum("i,j,k->ijk", x, torch.ones(2), torch.tensor([1.0, -1.0])),
    "view of the argument": lambda x: x,
    "part of the argument": lambda x: x[1:],
}


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("fn", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_any_cotangent_of_any_shape(fn, evaluator):
    jacobian = torch.func.jacrev(fn)(X)
    shape = fn(X).shape
    for k in range(3):
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(k))
        x = leaf()
        f = zero_order(**EXACT, evaluator=evaluator)(fn)
        value = f(x)
        close(value.detach(), fn(X))
        value.backward(cotangent)
        close(x.grad, torch.tensordot(cotangent, jacobian, dims=len(shape)))


@pytest.mark.parametrize("num_samples", [1, 7, 30000])
@pytest.mark.parametrize("fn", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_backward_is_the_vjp_of_the_estimate(fn, num_samples):
    # 30000 directions of 3 values are two blocks.
    f = zero_order(num_samples=num_samples, sigma=0.1, seed=3, evaluator="vmap", method="antithetic")(fn)
    estimate, x = f.estimate(X), leaf()
    value = f(x)
    cotangent = torch.linspace(-1, 2, value.numel()).view_as(value)
    value.backward(cotangent)
    torch.testing.assert_close(x.grad, estimate.vjp(cotangent), rtol=1e-6, atol=1e-6)


def test_a_vector_with_random_directions_has_the_true_jacobian_as_mean():
    x, n = leaf(), 40_000
    f = zero_order(method="antithetic", num_samples=n, sigma=0.1, seed=9, evaluator="vmap")(linear)
    cotangent = torch.tensor([1.0, -0.5])
    f(x).backward(cotangent)
    truth = cotangent @ C
    error = ((truth.square().sum() + truth.square()) / n).sqrt()
    assert ((x.grad - truth).abs() < 5 * error).all()


def test_no_cotangent_of_a_vector_is_torchs_own_error():
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        zero_order(**EXACT)(linear)(leaf()).backward()


# ------------------------------------------------------------------------------------------------------- arguments


class Pair(NamedTuple):
    first: torch.Tensor
    second: object


def test_nested_containers():
    tree = {
        "z": [leaf(torch.tensor([1.0, 2.0])), (leaf(torch.tensor(3.0)),)],
        "a": Pair(leaf(torch.tensor([[4.0, -1.0]])), None),
        "frozen": torch.tensor([5.0]),
        "mask": torch.tensor([True, False]),
        "index": torch.tensor([1, 0]),
        "name": "some",
        "number": 2.0,
    }
    seen = []

    def fn(tree, data):
        seen.append(tree)
        assert isinstance(tree["a"], Pair)
        assert isinstance(tree["z"][1], tuple)
        assert list(tree) == ["z", "a", "frozen", "mask", "index", "name", "number"]
        assert tree["name"] == "some"
        flat = torch.cat([tree["z"][0], tree["z"][1][0].view(1), tree["a"].first[0]])
        picked = tree["z"][0][tree["index"]] * tree["mask"]
        return (flat * data).sum() * tree["number"] + tree["frozen"].sum() + picked.sum()

    data = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])
    zero_order(**EXACT)(fn)(tree, data=data).backward()
    close(tree["z"][0].grad, 2 * data[:2] + torch.tensor([0.0, 1.0]))
    close(tree["z"][1][0].grad, 2 * data[2])
    close(tree["a"].first.grad, 2 * data[3:].view(1, 2))
    for name in ("frozen", "mask", "index"):
        assert all(torch.equal(call[name], tree[name]) for call in seen), "left alone at every point"
        assert tree[name].grad is None


@pytest.mark.parametrize("make", [dict, OrderedDict], ids=["dict", "OrderedDict"])
def test_the_order_of_a_dict_is_kept(make):
    tree = make([("z", leaf(torch.ones(2))), ("a", leaf(torch.ones(1)))])
    zero_order(**EXACT)(lambda p: torch.cat(list(p.values()))[0])(tree).backward()
    close(tree["z"].grad, torch.tensor([1.0, 0.0]))
    close(tree["a"].grad, torch.zeros(1))


@pytest.mark.filterwarnings("ignore:.*outside its differentiated arguments:zograd.ZeroOrderWarning")
@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_several_argnums_positional_and_by_keyword(evaluator):
    def fn(x, data, y, *, scale=1.0):
        return ((x * data).sum() + (y**2).sum()) * scale

    for call in (
        lambda f, x, y, d: f(x, d, y, scale=2.0),
        lambda f, x, y, d: f(x, d, scale=2.0, y=y),
        lambda f, x, y, d: f(y=y, x=x, data=d, scale=2.0),
    ):
        x, y, data = leaf(), leaf(torch.tensor([[1.0, -1.0]])), leaf(B)
        call(zero_order(**EXACT, argnums=(0, 2), evaluator=evaluator)(fn), x, y, data).backward()
        close(x.grad, 2 * B)
        close(y.grad, 4 * y.detach())
        assert data.grad is None


def test_argnums_in_any_order():
    x, y = leaf(), leaf(B)
    f = zero_order(**EXACT, argnums=(1, 0))(lambda x, y: (x * B).sum() - 3 * y.sum())
    f(x, y).backward()
    close(x.grad, B)
    close(y.grad, torch.full((3,), -3.0))
    by_y, by_x = f.estimate(X, B).grad
    close(by_x, B)
    close(by_y, torch.full((3,), -3.0))


def test_only_leaves_that_require_grad_are_moved():
    seen = []

    def fn(x, y):
        seen.append(y.clone())
        return (x * y).sum()

    x, y = leaf(), B.clone()
    zero_order(**EXACT, argnums=(0, 1))(fn)(x, y).backward()
    close(x.grad, B)
    assert all(torch.equal(at, B) for at in seen)


def test_the_same_tensor_twice_gets_both_gradients():
    x = leaf()
    zero_order(**EXACT)(lambda tree: (tree[0] * B).sum() + 2 * tree[1].sum())([x, x]).backward()
    close(x.grad, B + 2)


@pytest.mark.parametrize(
    "make", [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w.expand(2, 2, 3), lambda w: w[0, 0]], ids=range(4)
)
def test_arguments_of_any_layout(make):
    w = torch.tensor([[1.0, 2.0, -1.0], [0.5, 3.0, 4.0]], requires_grad=True)
    other = w.detach().clone().requires_grad_()

    def weighted(x):
        return (x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum()

    zero_order(**EXACT)(weighted)(make(w)).backward()
    weighted(make(other)).backward()
    close(w.grad, other.grad)


def test_a_parameter_and_a_buffer_of_inference_mode():
    with torch.inference_mode():
        data = B * 2
    x = torch.nn.Parameter(X.clone())
    zero_order(**EXACT)(lambda x, data: (x * data).sum())(x, data).backward()
    close(x.grad, 2 * B)


def test_what_fn_writes_to_its_argument_stays_there():
    def fn(x):
        with torch.no_grad():
            x.mul_(2)
        return quadratic(x)

    x = leaf()
    value = zero_order(**EXACT)(fn)(x)
    close(value.detach(), quadratic(2 * X))
    value.backward()
    assert torch.equal(x.detach(), X)
    close(x.grad, 2 * gradient(2 * X))


def test_the_value_is_a_copy_of_its_own():
    kept = torch.zeros(3)

    def fn(x):
        return kept.copy_(x.detach())  # one buffer that every call overwrites

    x = leaf()
    value = zero_order(**EXACT)(fn)(x)
    assert torch.equal(value.detach(), X)
    value.backward(B)
    close(x.grad, B)


def test_public_errors_are_exported():
    assert issubclass(zograd.SecondDerivativeError, NotImplementedError)


def test_a_lost_gradient_is_warned_of():
    f = zero_order(num_samples=2)(lambda x, w: (x * w).sum())
    with pytest.warns(zograd.ZeroOrderWarning, match=r"shape \(3,\) that requires grad outside its differentiated"):
        f(leaf(), torch.ones(3, requires_grad=True))


def test_an_inner_loop_is_not_hidden_by_the_users_except():
    @zero_order(method="antithetic", num_samples=400, sigma=0.1, seed=0)
    def f(x):
        try:
            (g,) = torch.autograd.grad((x**2).sum(), x)
            return g.sum()
        except Exception:
            return 7.0

    x = leaf()
    value = f(x)
    assert value.item() == 2 * X.sum().item()
    value.backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0), rtol=0, atol=0.6)


def test_a_float_at_the_center_is_as_exact_as_at_the_points():
    @zero_order(method="forward", num_samples=2000, sigma=1e-4, seed=0)
    def f(x):
        return 1e5 + float(3 * x.double().sum())

    gradient = f.estimate(torch.zeros(2, dtype=torch.float64)).grad
    torch.testing.assert_close(gradient, torch.full((2,), 3.0, dtype=torch.float64), rtol=0, atol=0.5)


def test_an_inner_loop_runs_in_a_plain_call_without_grad_mode():
    def f(x):
        (g,) = torch.autograd.grad((x**2).sum(), x)
        return g.sum()

    with torch.no_grad():
        value = zero_order()(f)(leaf())
    assert value.item() == 2 * X.sum().item()
    assert not value.requires_grad


def test_numpy_after_autograd_is_counted_and_sees_the_same_stream():
    draws = []

    def fn(x, how):
        if how == "autograd":
            return torch.autograd.grad((x**2).sum(), x)[0].sum()
        draws.append(torch.rand(()).item())
        return float(x.numpy().sum())

    f = zero_order(method="antithetic", num_samples=2, seed=0)(fn)
    assert f.estimate(X, "autograd").evaluations == 6  # the center twice
    estimate = f.estimate(X, "numpy")
    assert estimate.evaluations == len(draws) == 10  # each point once more
    assert draws[::2] == draws[1::2]


def test_calls_that_differ_in_what_is_tracked_have_the_radii_of_their_own_leaves():
    """The settings of the last call serve the next one that looks alike, and no other."""

    def fn(params):
        return params["a"].sum().sin() + params["b"].prod()

    settings = {"sigma": {"a": 0.1, "b": 3.0}, "method": "antithetic", "num_samples": 3, "seed": 0}
    often = zero_order(**settings)(fn)
    for tracked in ("ab", "a", "b", "ab", "b", "a"):
        for size in (2, 3):
            grads = []
            for once in (often, zero_order(**settings)(fn)):
                params = {name: torch.ones(size).requires_grad_(name in tracked) for name in "ab"}
                once(params).backward()
                grads.append([params[name].grad for name in tracked])
            assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("failures", ["raise", Drop(0.5)], ids=str)
def test_a_loop_holds_one_point_at_a_time(failures):
    points, alive = [], []

    def fn(x):
        alive.append(sum(point() is not None for point in points))
        points.append(weakref.ref(x))
        return float(x.sum())

    zero_order(method="antithetic", num_samples=5, failures=failures)(fn).estimate(torch.ones(3))
    assert alive == [0] * 11
