"""``torch.func`` and forward mode over decorated functions: every composition right, or an error that says so.

``Exact`` draws the rows of a Hadamard matrix, so that antithetic differences of a quadratic are its gradient and every
composition can be compared with the truth, to rounding.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, vjp, vmap

from problems import EXACT
from zograd import zero_order

# torch's own forward mode imports decompositions that use what torch deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit:DeprecationWarning")

RANDOM = {"method": "antithetic", "num_samples": 5, "sigma": 0.1}

B = torch.tensor([1.0, -2.0, 3.0])
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, -1.0, 0.25], [0.0, 0.25, 3.0]])
X = torch.tensor([0.5, 1.0, -1.5])
XS = torch.stack([X, 2 * X - 1, X.flip(0), -X])
T = torch.tensor([1.0, 2.0, -1.0])
W = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])


def scalar(x):
    return x @ H @ x / 2 + B @ x


def numpy_scalar(x):
    a = x.detach().numpy()
    return float(a @ H.numpy() @ a / 2 + B.numpy() @ a)


def vector(x):
    return torch.stack([x @ H @ x / 2, B @ x])


def numpy_vector(x):
    a = x.detach().numpy()
    return np.stack([a @ H.numpy() @ a / 2, B.numpy() @ a])


def matrix(x):
    return torch.outer(x, x)


def numpy_matrix(x):
    return np.outer(x.detach().numpy(), x.detach().numpy())


PAIRS = [(scalar, scalar), (scalar, numpy_scalar), (vector, vector), (vector, numpy_vector), (matrix, matrix)]
PAIRS.append((matrix, numpy_matrix))
each_objective = pytest.mark.parametrize(("truth", "fn"), PAIRS, ids=[fn.__name__ for _, fn in PAIRS])
each_scalar = pytest.mark.parametrize("fn", [scalar, numpy_scalar], ids=["torch", "numpy"])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


def decorated(fn, **options):
    return zero_order(**{**EXACT, **options})(fn)


# ------------------------------------------------------------------------------------------------- one level


@each_scalar
def test_grad(fn):
    f = decorated(fn)
    close(grad(f)(X), grad(scalar)(X))
    gradient, value = grad_and_value(f)(X)
    close(gradient, grad(scalar)(X))
    close(value, scalar(X))
    assert torch.equal(grad(f.replace(seed=3))(X), f.replace(seed=3).estimate(X).grad)


@each_objective
@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap(truth, fn, in_dim):
    xs = XS if in_dim == 0 else XS.t()
    close(vmap(decorated(fn), in_dims=in_dim)(xs), vmap(truth, in_dims=in_dim)(xs))


@each_objective
def test_vmap_with_out_dims(truth, fn):
    for out_dim in range(truth(X).dim() + 1):
        close(vmap(decorated(fn), out_dims=out_dim)(XS), vmap(truth, out_dims=out_dim)(XS))


@each_objective
def test_jacrev(truth, fn):
    close(jacrev(decorated(fn))(X), jacrev(truth)(X))


@each_objective
def test_jacfwd(truth, fn):
    close(jacfwd(decorated(fn))(X), jacrev(truth)(X))


@each_objective
def test_jvp(truth, fn):
    value, tangent = jvp(decorated(fn), (X,), (T,))
    close(value, truth(X))
    close(tangent, jvp(truth, (X,), (T,))[1])


@each_objective
def test_vjp(truth, fn):
    value, pull = vjp(decorated(fn), X)
    close(value, truth(X))
    for k in range(2):
        cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(k))
        close(pull(cotangent)[0], vjp(truth, X)[1](cotangent)[0])


@each_objective
def test_make_dual(truth, fn):
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(decorated(fn)(forward_ad.make_dual(X, T)))
    close(value, truth(X))
    close(tangent, jvp(truth, (X,), (T,))[1])


@each_objective
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_functional_jacobian(truth, fn, strategy, vectorize):
    if strategy == "forward-mode" and not vectorize:
        pytest.skip("torch has forward mode in its vectorized form only")
    # With a seed, because torch's older vmap, which this uses, allows no random draw below it.
    jacobian = torch.autograd.functional.jacobian(decorated(fn, seed=1), X, strategy=strategy, vectorize=vectorize)
    close(jacobian, jacrev(truth)(X))


@each_objective
def test_forward_and_reverse_mode_are_transposes(truth, fn):
    # With few random directions the estimate is far from the truth, but it is one estimate.
    f = decorated(fn, **RANDOM, distribution=None, seed=4)
    rows = jacrev(f)(X)
    close(jacfwd(f)(X), rows)
    close(jvp(f, (X,), (T,))[1], rows @ T)
    estimate = f.estimate(X)
    for i, index in enumerate(itertools.product(*map(range, rows.shape[:-1]))):
        cotangent = torch.zeros(rows[..., 0].shape)
        cotangent[index] = 1.0 + i
        close((1.0 + i) * rows[index], estimate.vjp(cotangent))
    assert not torch.allclose(rows, jacrev(truth)(X), rtol=1e-2)


# ----------------------------------------------------------------------------------------------- two levels


@each_scalar
def test_vmap_of_grad(fn):
    close(vmap(grad(decorated(fn)))(XS), vmap(grad(scalar))(XS))


@each_scalar
def test_grad_of_the_sum_of_vmap(fn):
    close(grad(lambda xs: vmap(decorated(fn))(xs).sum())(XS), vmap(grad(scalar))(XS))


@each_scalar
def test_backward_through_vmap(fn):
    xs = XS.clone().requires_grad_()
    weights = torch.tensor([1.0, -1.0, 2.0, 0.5])
    (vmap(decorated(fn))(xs) * weights).sum().backward()
    close(xs.grad, vmap(grad(scalar))(XS) * weights[:, None])


@each_objective
def test_backward_through_vmap_of_any_output(truth, fn):
    xs, other = XS.clone().requires_grad_(), XS.clone().requires_grad_()
    values = vmap(decorated(fn))(xs)
    cotangent = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    values.backward(cotangent)
    vmap(truth)(other).backward(cotangent)
    close(xs.grad, other.grad)


@each_objective
def test_vmap_of_jacobians(truth, fn):
    expected = vmap(jacrev(truth))(XS)
    close(vmap(jacrev(decorated(fn)))(XS), expected)
    close(vmap(jacfwd(decorated(fn)))(XS), expected)


@each_objective
def test_jacobians_of_vmap(truth, fn):
    expected = jacrev(vmap(truth))(XS)
    close(jacrev(vmap(decorated(fn)))(XS), expected)
    close(jacfwd(vmap(decorated(fn)))(XS), expected)


@each_objective
def test_vmap_of_jvp_and_jvp_of_vmap(truth, fn):
    tangents = torch.stack([T, -T, 2 * T, T.flip(0)])
    expected = jvp(vmap(truth), (XS,), (tangents,))[1]
    close(vmap(lambda x, t: jvp(decorated(fn), (x,), (t,))[1])(XS, tangents), expected)
    close(jvp(vmap(decorated(fn)), (XS,), (tangents,))[1], expected)
    close(
        vmap(lambda t: jvp(decorated(fn), (X,), (t,))[1])(tangents), vmap(lambda t: jvp(truth, (X,), (t,))[1])(tangents)
    )


@each_scalar
def test_vmap_of_vmap_of_grad(fn):
    xs = torch.stack([XS, XS + 1])
    close(vmap(vmap(grad(decorated(fn))))(xs), vmap(vmap(grad(scalar)))(xs))


@each_scalar
def test_composites_of_the_first_order(fn):
    f = decorated(fn)
    close(grad(lambda x: f(torch.sin(x)) ** 2)(X), grad(lambda x: scalar(torch.sin(x)) ** 2)(X))
    close(
        jacfwd(lambda x: torch.stack([f(x), f(2 * x)]))(X), jacrev(lambda x: torch.stack([scalar(x), scalar(2 * x)]))(X)
    )


# ------------------------------------------------------------------------------------- several arguments and dims


def loss(params, data, scale=1.0):
    return ((params["w"] @ data) ** 2).sum() * scale + params["b"].sum()


def numpy_loss(params, data, scale=1.0):
    w, d, b = (t.detach().numpy() for t in (params["w"], data, params["b"]))
    return float(((w @ d) ** 2).sum() * scale + b.sum())


PARAMS = {"w": W, "b": torch.tensor([0.5])}


@pytest.mark.parametrize("fn", [loss, numpy_loss], ids=["torch", "numpy"])
@pytest.mark.parametrize("in_dims", [(None, 0), ({"w": None, "b": 0}, 0), ({"w": 1, "b": None}, None)], ids=range(3))
def test_in_dims_with_none(fn, in_dims):
    size = 4
    params = {
        "w": torch.stack([W, W + 1, -W, 2 * W], dim=1) if in_dims[0] and in_dims[0]["w"] == 1 else W,
        "b": torch.arange(4.0).view(4, 1) if in_dims[0] and in_dims[0]["b"] == 0 else PARAMS["b"],
    }
    data = XS if in_dims[1] == 0 else X
    assert len(XS) == size
    close(vmap(decorated(fn), in_dims)(params, data), vmap(loss, in_dims)(params, data))
    per_sample = vmap(grad(decorated(fn)), in_dims)(params, data)
    expected = vmap(grad(loss), in_dims)(params, data)
    close(per_sample["w"], expected["w"])
    close(per_sample["b"], expected["b"])
    total = grad(lambda p: vmap(decorated(fn), in_dims)(p, data).sum())(params)
    wanted = grad(lambda p: vmap(loss, in_dims)(p, data).sum())(params)
    close(total["w"], wanted["w"])
    close(total["b"], wanted["b"])


def test_keyword_arguments_under_transforms():
    close(grad(decorated(loss))(PARAMS, X, scale=2.0)["w"], grad(loss)(PARAMS, X, scale=2.0)["w"])
    close(
        vmap(lambda s: decorated(loss)(PARAMS, X, scale=s))(torch.arange(3.0)),
        vmap(lambda s: loss(PARAMS, X, s))(torch.arange(3.0)),
    )


def product(x, w):
    return (x * w).sum()


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)])
def test_grad_by_some_of_the_differentiated_arguments(argnums):
    f = decorated(product, argnums=(0, 1))
    expected = grad(product, argnums)(X, B)
    got = grad(f, argnums)(X, B)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, expected)), strict=True):
        close(a, b)


@pytest.mark.filterwarnings("ignore:.*outside its differentiated arguments:zograd.ZeroOrderWarning")
def test_grad_by_an_argument_that_is_not_differentiated_is_zero():
    f = decorated(product)
    assert torch.equal(grad(f, 1)(X, B), torch.zeros(3))
    gradient, other = grad(f, (0, 1))(X, B)
    close(gradient, B)
    assert torch.equal(other, torch.zeros(3))


def test_jvp_by_an_argument_that_is_not_differentiated_is_zero():
    f = decorated(product)
    value, tangent = jvp(lambda w: f(X, w), (B,), (T,))
    close(value, product(X, B))
    assert torch.equal(tangent, torch.zeros(()))
    close(jvp(f, (X, B), (T, T))[1], (T * B).sum())


def test_a_tangent_beside_a_parameter():
    f, w = decorated(product, argnums=(0, 1)), torch.nn.Parameter(B.clone())
    close(jvp(lambda x: f(x, w), (X,), (T,))[1], (T * B).sum())
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(f(forward_ad.make_dual(X, T), w)).tangent, (T * B).sum())
        close(forward_ad.unpack_dual(f(X, forward_ad.make_dual(B, T))).tangent, (T * X).sum())


def test_vmapped_arguments_beside_a_parameter():
    f, w = decorated(product, argnums=(0, 1)), torch.nn.Parameter(B.clone())
    close(grad(lambda xs: vmap(f, (0, None))(xs, w).sum())(XS), B.expand(4, 3))
    close(jacfwd(lambda xs: vmap(f, (0, None))(xs, w).sum())(XS), B.expand(4, 3))
    xs = XS.clone().requires_grad_()
    vmap(f, (0, None))(xs, w).sum().backward()
    close(xs.grad, B.expand(4, 3))
    close(w.grad, XS.sum(dim=0))


def test_vmapped_trees_with_whole_numbers_and_frozen_leaves():
    def fn(tree):
        return (tree["x"] * tree["w"])[tree["index"]].sum()

    tree = {"x": XS, "w": B, "index": torch.tensor([0, 2])}
    expected = B * torch.tensor([1.0, 0.0, 1.0])
    f = decorated(fn)
    got = grad(lambda xs: vmap(f, ({"x": 0, "w": None, "index": None},))({**tree, "x": xs}).sum())(XS)
    close(got, expected.expand(4, 3))


def test_a_module_through_functional_call():
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(W)

    def fn(params, data):
        return functional_call(layer, params, (data,)).square().sum()

    params = {k: v.detach() for k, v in layer.named_parameters()}
    got, expected = (vmap(grad(g), (None, 0))(params, XS) for g in (decorated(fn), fn))
    close(got["weight"], expected["weight"])
    close(got["bias"], expected["bias"])


# ----------------------------------------------------------------------------------------------- modes and randomness


@each_scalar
def test_forward_mode_without_grad_mode_is_the_estimate(fn):
    # torch.no_grad() does not switch forward mode off: a plain call would give fn's own derivative, or none at all.
    f = decorated(fn)
    with torch.no_grad():
        close(jvp(f, (X,), (T,))[1], jvp(scalar, (X,), (T,))[1])
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(X, T))).tangent
    close(tangent, jvp(scalar, (X,), (T,))[1])


def test_forward_mode_without_grad_mode_of_a_step():
    f = decorated(lambda x: torch.sign(x).sum())
    at = torch.full((3,), 0.25)
    with torch.no_grad():
        inside = jvp(f, (at,), (T,))[1]
    assert inside != 0
    assert torch.equal(inside, jvp(f, (at,), (T,))[1])


@each_scalar
def test_grad_ignores_no_grad_around_it(fn):
    with torch.no_grad():
        close(grad(decorated(fn))(X), grad(scalar)(X))


def test_no_grad_inside_grad_is_a_plain_call():
    calls = []
    f = decorated(lambda x: calls.append(0) or scalar(x))

    def outer(x):
        with torch.no_grad():
            y = f(x)
        return y * x.sum()

    close(grad(outer)(X), scalar(X) * torch.ones(3))
    assert len(calls) == 1


def test_vmapped_instances_draw_their_own_seeds():
    f = zero_order(**RANDOM)(scalar)
    same = X.expand(3, 3)
    torch.manual_seed(8)
    rows = vmap(grad(f))(same)
    advanced = torch.get_rng_state()
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    torch.manual_seed(8)
    for row in rows:
        torch.testing.assert_close(row, f.estimate(X).grad)
    assert torch.equal(torch.get_rng_state(), advanced), "one draw an instance"


@pytest.mark.parametrize("randomness", ["error", "different", "same"])
def test_randomness_of_an_outer_vmap(randomness):
    f = zero_order(**RANDOM, seed=2)(lambda x: scalar(x) + torch.rand(()))
    rows = vmap(grad(f), randomness=randomness)(XS)
    torch.testing.assert_close(rows, torch.stack([f.estimate(x).grad for x in XS]))


def test_with_a_seed_each_instance_is_the_estimate():
    f = zero_order(**RANDOM, seed=2)(vector)
    rows = vmap(jacrev(f))(XS)
    for row, x in zip(rows, XS, strict=True):
        estimate = f.estimate(x)
        torch.testing.assert_close(row[0], estimate.vjp(torch.tensor([1.0, 0.0])))
        torch.testing.assert_close(row[1], estimate.vjp(torch.tensor([0.0, 1.0])))


@pytest.mark.parametrize("evaluator", ["vmap", "batched"])
def test_other_evaluators_under_transforms(evaluator):
    def batched(x):
        return torch.einsum("bi,ij,bj->b", x, H, x) / 2 + x @ B

    f = decorated(scalar if evaluator == "vmap" else batched, evaluator=evaluator)
    close(grad(f)(X), grad(scalar)(X))
    close(vmap(grad(f))(XS), vmap(grad(scalar))(XS))
    close(jvp(f, (X,), (T,))[1], jvp(scalar, (X,), (T,))[1])
    close(grad(lambda xs: vmap(f)(xs).sum())(XS), vmap(grad(scalar))(XS))


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_a_decorated_function_inside_the_objective_of_another(evaluator):
    inner = decorated(scalar)
    outer = decorated(lambda x: inner(2 * x) + x.sum(), evaluator=evaluator)
    expected = grad(lambda x: scalar(2 * x) + x.sum())
    close(grad(outer)(X), expected(X))
    close(vmap(grad(outer))(XS), vmap(expected)(XS))


@pytest.mark.parametrize("seed", [None, 5])
def test_directions_that_cannot_be_replayed(seed):
    drawn = []
    random = np.random.default_rng(0)

    def sample(shape):
        signs = torch.from_numpy(random.choice([-1.0, 1.0], size=tuple(shape))).float()
        drawn.append(signs)
        return signs

    f = zero_order(sample, "antithetic", num_samples=3, sigma=0.5, seed=seed)(lambda x: W @ x)
    f(X.clone().requires_grad_())  # the check for replay, once for each distribution
    drawn.clear()
    xs = XS.clone().requires_grad_()
    values = vmap(f)(xs)
    noise = torch.stack(drawn).view(4, 3, 3)
    cotangent = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0], [0.5, 0.5]])
    values.backward(cotangent)
    coefficients = torch.einsum("bo,oi,bni->bn", cotangent, W, noise)
    close(xs.grad, torch.einsum("bn,bni->bi", coefficients, noise) / 3)


# ------------------------------------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_a_vmapped_tensor_that_fn_closes_over_is_a_named_error(numpy):
    def instance(w):
        f = decorated(lambda x: float(x.detach().sum()) * w if numpy else (x * w).sum())
        return f(X)

    # Nothing is differentiated here: one plain call inside the transform, where the tensor is at home.
    close(vmap(instance)(torch.arange(3.0)), torch.arange(3.0) * X.sum())
    with pytest.raises(RuntimeError, match=r"(?s)clos.*argument"):
        vmap(lambda w, x: grad(decorated(lambda x: (x * w).sum()))(x))(torch.arange(3.0), XS[:3])


def test_a_vmapped_tensor_as_another_argument_is_right():
    f = decorated(lambda x, w: (x * w).sum())
    close(vmap(lambda w: f(X, w))(torch.arange(3.0)), torch.arange(3.0) * X.sum())
    close(vmap(lambda w, x: grad(f)(x, w))(torch.arange(3.0), XS[:3]), torch.arange(3.0)[:, None].expand(3, 3))


def test_what_fn_closes_over_is_a_constant_under_grad_and_jvp():
    # As under backward: only arguments named by argnums are differentiated.
    def through(w):
        return decorated(lambda x: (x * w).sum())(X)

    assert grad(through)(torch.tensor(2.0)) == 0
    value, tangent = jvp(through, (torch.tensor(2.0),), (torch.tensor(1.0),))
    close(value, 2 * X.sum())
    assert tangent == 0


def test_the_state_of_transforms_survives_an_error_in_fn():
    def fn(x):
        raise ArithmeticError("the simulator stopped")

    for transform in (grad, jacrev, jacfwd, lambda f: vmap(grad(f), in_dims=0)):
        with pytest.raises(ArithmeticError, match="the simulator stopped"):
            transform(decorated(fn))(XS if transform not in (grad, jacrev, jacfwd) else X)
        close(grad(decorated(scalar))(X), grad(scalar)(X))
    assert not torch._C._are_functorch_transforms_active()
