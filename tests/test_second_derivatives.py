"""Hessians by Stein's identity: every route of autograd to them, and their mean, variance and limits."""

import numpy as np
import pytest
import torch

import zograd
from problems import Directions
from statistical import Checks
from zograd import SecondDerivativeError, zero_order
from zograd._base.trees import Space
from zograd.distributions import Gaussian, LowRank, Rademacher, Sphere
from zograd.estimate.second_order import differences
from zograd.schemes import SCHEMES, Scheme
from zograd.shaping import leave_one_out

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit:DeprecationWarning")

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, -1.0, 0.25], [0.0, 0.25, 3.0]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
OPTIONS = {"method": "antithetic", "num_samples": 7, "sigma": 0.2, "seed": 3}
OWN = Scheme((0.0, 1.0, -2.0, 0.5), (-0.75, 0.25, -0.25, 0.5))


def cubic(x):
    return x @ H @ x / 2 + B @ x + (x**3).sum() / 3


def by_numpy(x):
    v = x.numpy()
    return v @ H.numpy() @ v / 2 + B.numpy() @ v + (v**3).sum() / 3


def vector(x):
    return torch.stack([cubic(x), (x**3).sum(), x.prod()])


def expected(f, x, *, method, num_samples, sigma, seed, **_):
    """The formula, row by row, for a function of one or several values: (*out, d, d)."""
    scheme = method if isinstance(method, Scheme) else SCHEMES[method]
    space = Space.of((x,))
    eps = Directions(Gaussian(), space, seed, num_samples).noise(0, num_samples)[0].clone()
    center = torch.as_tensor(f(x))
    rows = []
    for e in eps:
        pairs = [(c, w) for c, w in zip(scheme.offsets, scheme.weights, strict=True) if c]
        rows.append(sum(w / c * (torch.as_tensor(f(x + sigma * c * e)) - center) for c, w in pairs))
    total = 0
    for i, e in enumerate(eps):
        others = [h for k, h in enumerate(rows) if k != i]
        h = rows[i] - sum(others) / len(others) if others else rows[i]
        total = total + h[..., None, None] * (torch.outer(e, e) - torch.eye(len(x), dtype=x.dtype))
    return total / num_samples / sigma**2


def close(got, wanted, **how):
    torch.testing.assert_close(got, wanted, **{"rtol": 1e-9, "atol": 1e-9, **how})


def leaf(x=X):
    return x.clone().requires_grad_()


# ------------------------------------------------------------------------------------------------ routes


def by_rows(f, x):
    x = leaf(x)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.stack([torch.autograd.grad(row, x, retain_graph=True)[0] for row in g])


def batched_rows(f, x):
    x = leaf(x)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g, x, torch.eye(3, dtype=x.dtype), is_grads_batched=True)[0]


def forward_over_reverse(f, x):
    rows = []
    for tangent in torch.eye(3, dtype=x.dtype):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf(x), tangent)
            (g,) = torch.autograd.grad(f(dual), dual)
            rows.append(torch.autograd.forward_ad.unpack_dual(g).tangent)
    return torch.stack(rows)


def jvp(f, x, tangent):
    return torch.func.jvp(f, (x,), (tangent,))[1]


EYE = torch.eye(3, dtype=torch.float64)
ROUTES = {
    "create_graph": by_rows,
    "is_grads_batched": batched_rows,
    "forward over reverse": forward_over_reverse,
    "functional.hessian": torch.autograd.functional.hessian,
    "functional.hessian, vectorized": lambda f, x: torch.autograd.functional.hessian(f, x, vectorize=True),
    "functional.hessian, forward": lambda f, x: torch.autograd.functional.hessian(
        f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "functional.hvp": lambda f, x: torch.stack([torch.autograd.functional.hvp(f, x, e)[1] for e in EYE]),
    "functional.vhp": lambda f, x: torch.stack([torch.autograd.functional.vhp(f, x, e)[1] for e in EYE]),
    "func.hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacrev(jacrev)": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "jacfwd(jacfwd)": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
    "jacrev(jacfwd)": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "jvp(grad)": lambda f, x: torch.stack([jvp(torch.func.grad(f), x, e) for e in EYE]),
    "grad(jvp)": lambda f, x: torch.stack([torch.func.grad(lambda x, e=e: jvp(f, x, e))(x) for e in EYE]),
    "jvp(jvp)": lambda f, x: torch.stack(
        [torch.stack([jvp(lambda x, e=e: jvp(f, x, e), x, d) for d in EYE]) for e in EYE]
    ),
    "vmap(hessian)": lambda f, x: torch.vmap(torch.func.hessian(f))(x.expand(2, 3))[0],
}


@pytest.mark.parametrize("fn", [cubic, by_numpy], ids=["torch", "numpy"])
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_every_route_gives_the_formula(route, fn):
    close(route(zero_order(**OPTIONS)(fn), X), expected(cubic, X, **OPTIONS))


VECTOR_ROUTES = {
    "functional": lambda f, x: torch.stack(
        [torch.autograd.functional.hessian(lambda x, i=i: f(x)[i], x) for i in range(3)]
    ),
    "jacfwd(jacrev)": lambda f, x: torch.func.jacfwd(torch.func.jacrev(f))(x),
    "jacrev(jacrev)": lambda f, x: torch.func.jacrev(torch.func.jacrev(f))(x),
    "jacfwd(jacfwd)": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(f))(x),
    "jacrev(jacfwd)": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "vmap": lambda f, x: torch.vmap(torch.func.jacrev(torch.func.jacrev(f)))(x.expand(2, 3))[1],
}


@pytest.mark.parametrize("route", VECTOR_ROUTES.values(), ids=VECTOR_ROUTES.keys())
def test_every_route_gives_the_formula_for_several_values(route):
    close(route(zero_order(**OPTIONS)(vector), X), expected(vector, X, **OPTIONS))


@pytest.mark.parametrize("method", [*SCHEMES, OWN], ids=str)
@pytest.mark.parametrize("num", [1, 2, 9])
def test_every_scheme_gives_the_formula(method, num):
    options = {**OPTIONS, "method": method, "num_samples": num}
    f = zero_order(**options)(cubic)
    wanted = expected(cubic, X, **options)
    close(torch.stack([f.estimate(X).hvp(e) for e in EYE]), wanted)
    close(by_rows(f, X), wanted)


@pytest.mark.parametrize("evaluator", ["loop", "vmap", zograd.evaluators.Vmap(chunk_size=3)], ids=str)
def test_every_evaluator_gives_the_formula(evaluator):
    options = {**OPTIONS, "num_samples": 300}
    close(by_rows(zero_order(**options, evaluator=evaluator)(cubic), X), expected(cubic, X, **options))


def test_trees_with_a_radius_for_each_leaf():
    """The Hessian of g(a, b) in units of its own for each leaf: that of x = (a / r, b / s) for one radius."""
    sigma = {"a": 0.1, "b": 0.4}
    scale = torch.tensor([0.1, 0.1, 0.4], dtype=torch.float64)
    tree = {"a": X[:2].clone(), "b": X[2:].clone()}

    def fn(tree):
        return cubic(torch.cat([tree["a"], tree["b"]]))

    got = zero_order(**{**OPTIONS, "sigma": sigma})(fn).estimate(tree).hvp({"a": B[:2], "b": B[2:]})
    scaled = expected(lambda y: cubic(y * scale), X / scale, **{**OPTIONS, "sigma": 1.0})
    wanted = (scaled / scale / scale.unsqueeze(1)) @ B
    assert list(got) == ["a", "b"]
    close(torch.cat([got["a"], got["b"]]), wanted)


@pytest.mark.parametrize("several", [False, True])
def test_slices_have_a_hessian_each(several):
    x = torch.stack([X, X + 1])

    def rows(x):
        values = ((x @ H) * x).sum(1) / 2 + x @ B + (x**3).sum(1) / 3
        return torch.stack([values, values**2], dim=1) if several else values

    f = zero_order(**OPTIONS, batch_dim=0)(rows)
    full = torch.func.jacrev(torch.func.jacrev(lambda x: f(x).flatten().sum()))(x)
    assert (full[0, :, 1] == 0).all()
    assert (full[1, :, 0] == 0).all()
    space = Space.of((x,), 0)
    eps = Directions(Gaussian(), space, 3, 7).noise(0, 7)[0].clone().view(7, 2, 3)
    for b in range(2):
        fb = lambda y, b=b: rows(y.unsqueeze(0))[0].sum()  # noqa: E731
        h = torch.stack([(fb(x[b] + 0.2 * e) + fb(x[b] - 0.2 * e)) / 2 - fb(x[b]) for e in eps[:, b]])
        h = (h - h.mean()) * 7 / 6
        close(full[b, :, b], torch.einsum("n,ni,nj->ij", h, eps[:, b], eps[:, b]) / 7 / 0.04)


def test_composites_follow_the_chain_rule():
    f, x = zero_order(**OPTIONS)(cubic), X
    estimate = f.estimate(x)
    g, h, v = estimate.grad, expected(cubic, x, **OPTIONS), estimate.value
    square = torch.autograd.functional.hessian(lambda x: f(x) ** 2, x)
    close(square, 2 * (v * h + torch.outer(g, g)))
    inner = torch.func.hessian(lambda x: f(x.exp()))(x)
    e = x.exp()
    at = f.estimate(e)
    close(inner, expected(cubic, e, **OPTIONS) * torch.outer(e, e) + torch.diag(at.grad * e))


def test_the_update_of_es_maml_in_five_lines():
    """The gradient of a loss after one step of gradient ascent on it: first order times (1 + step * Hessian)."""
    reward, x, step = zero_order(**OPTIONS)(cubic), leaf(), 0.1
    (g,) = torch.autograd.grad(reward(x), x, create_graph=True)
    adapted = x + step * g
    reward(adapted).backward()
    outer = reward.estimate(adapted.detach()).grad
    close(x.grad, outer + step * expected(cubic, X, **OPTIONS) @ outer)


def test_no_further_calls_of_fn():
    calls = []
    f = zero_order(**OPTIONS)(lambda x: calls.append(0) or cubic(x))
    x = leaf()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    g.sum().backward()
    assert len(calls) == 15


def test_an_optimizer_step_before_the_second_derivative():
    f, x = zero_order(**OPTIONS)(cubic), leaf()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    with torch.no_grad():
        x += 1
    close(torch.autograd.grad(g[0], x)[0], expected(cubic, X, **OPTIONS)[0])


def test_modules_have_one_too():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(X.clone())

        def forward(self):
            return cubic(self.weight)

    net = zograd.nn.ZeroOrder(Net(), **OPTIONS)
    weight = next(net.parameters())
    (g,) = torch.autograd.grad(net(), weight, create_graph=True)
    close(torch.autograd.grad(g @ B, weight)[0], expected(cubic, X, **OPTIONS) @ B)


# ------------------------------------------------------------------------------------------------ statistics


def normal(x):
    return torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5


ROWS = torch.full((6000, 1), 0.4, dtype=torch.float64)  # slices, each an estimate of its own
TRUTHS = {
    "cubic": (lambda x: x**3, lambda x, s: 6 * x),
    "step": (lambda x: (x > 0).double(), lambda x, s: -x / s * normal(x / s) / s**2),
    "abs": (torch.abs, lambda x, s: 2 * normal(x / s) / s),
    "numpy": (lambda x: np.abs(x.numpy()), lambda x, s: 2 * normal(x / s) / s),
}


def second_derivatives(fn, method, seed):
    f = zero_order(method=method, num_samples=4, sigma=0.5, seed=seed, batch_dim=0)(lambda x: fn(x[:, 0]))
    return f.estimate(ROWS).hvp(torch.ones_like(ROWS))


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic"])
@pytest.mark.parametrize("name", TRUTHS)
def test_the_mean_is_the_hessian_of_the_smoothed_function(name, method):
    fn, truth = TRUTHS[name]
    checks = Checks(7)
    samples = second_derivatives(fn, method, checks.seed())
    checks.mean(samples, truth(ROWS[0], 0.5), effect=14 * samples.std() / len(samples) ** 0.5 + 1e-3)
    assert not checks.failed


def test_fourth_order_differences_have_the_hessian_of_their_target():
    """For x**4: 12 x**2 + 12 s**2 smoothed by s, of which it takes 4/3 at s less 1/3 at 2 s, and 12 x**2 is left."""
    checks = Checks(8)
    samples = second_derivatives(lambda x: x**4, "fourth_order", checks.seed())
    checks.mean(samples, 12 * ROWS[0] ** 2, effect=14 * samples.std() / len(samples) ** 0.5)
    assert not checks.failed


def test_the_error_falls_with_the_root_of_the_number_of_directions():
    """Mean squared errors at N and 16 N, 400 estimates each: their ratio is 16 within 30 %, at 5 standard errors."""
    errors = []
    for num in (50, 800):
        f = zero_order(method="antithetic", num_samples=num, sigma=0.1, evaluator="vmap")(lambda x: x @ H @ x / 2)
        rows = [f.replace(seed=seed).estimate(X).hvp(B) - H @ B for seed in range(400)]
        errors.append(torch.stack(rows).square().sum(1).mean())
    assert 16 * 0.7 < errors[0] / errors[1] < 16 * 1.3


# ------------------------------------------------------------------------------------------------ what has none


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distribution": Rademacher()}, r"Gaussian marginals, which Rademacher\(\) has not: use `Gaussian\(\)`"),
        ({"distribution": Sphere()}, r"Gaussian marginals, which Sphere\(\) has not: use `Gaussian\(\)`"),
        ({"distribution": LowRank()}, r"Gaussian marginals, which LowRank\(rank=1\) has not: use `Gaussian\(\)`"),
        ({"distribution": lambda shape: torch.randn(shape)}, r"Gaussian marginals, which .* use `Gaussian\(\)`"),
        ({"shaping": torch.tanh}, r"`shaping=tanh` changes what is estimated: use `shaping=None`"),
    ],
    ids=["signs", "sphere", "low rank", "a function", "shaping"],
)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
def test_what_has_none_says_so(route, options, words):
    f = zero_order(**{**OPTIONS, **options})(cubic)
    with pytest.raises(SecondDerivativeError, match=words):
        route(f, X)
    assert torch.isfinite(torch.func.jvp(f, (X,), (B,))[1])  # the first one is there
    with pytest.raises(SecondDerivativeError, match=words):
        f.estimate(X).hvp(B)


def test_leave_one_out_leaves_the_hessian():
    f = zero_order(**{**OPTIONS, "method": "naive"}, shaping=leave_one_out)(cubic)
    close(by_rows(f, X), expected(cubic, X, **{**OPTIONS, "method": "naive"}))


def test_one_direction_of_a_vector():
    f = zero_order(**{**OPTIONS, "num_samples": 1})(vector)
    with pytest.raises(
        SecondDerivativeError, match=r"two independent directions or more, got num_samples=1 of Gaussian"
    ):
        torch.func.jacrev(torch.func.jacrev(f))(X)
    assert torch.func.jacfwd(f)(X).shape == (3, 3)


THIRD = {
    "reverse": lambda f, x: by_rows(lambda x: by_rows_of(f, x).sum(), x),
    "jacrev(hessian)": lambda f, x: torch.func.jacrev(torch.func.hessian(f))(x),
    "jacfwd(hessian)": lambda f, x: torch.func.jacfwd(torch.func.hessian(f))(x),
    "jacfwd of all": lambda f, x: torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(f)))(x),
    "jacrev of all": lambda f, x: torch.func.jacrev(torch.func.jacrev(torch.func.jacrev(f)))(x),
    "jacrev(jacfwd(jacrev))": lambda f, x: torch.func.jacrev(torch.func.jacfwd(torch.func.jacrev(f)))(x),
    "jacfwd(jacrev(jacrev))": lambda f, x: torch.func.jacfwd(torch.func.jacrev(torch.func.jacrev(f)))(x),
}


def by_rows_of(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("fn", [cubic, vector], ids=["scalar", "vector"])
@pytest.mark.parametrize("third", THIRD.values(), ids=THIRD.keys())
def test_a_third_derivative_is_an_error(third, fn):
    f = zero_order(**OPTIONS)(fn)
    with pytest.raises(SecondDerivativeError, match="third derivative"):
        third(f if fn is cubic else lambda x: f(x).sum(), X)


def test_the_hessian_product_is_linear_in_its_vector():
    """A derivative by the vector is none by the parameters, and right."""
    f, x, v = zero_order(**OPTIONS)(cubic), leaf(), leaf(B)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (hv,) = torch.autograd.grad(g @ v, x, create_graph=True)
    close(torch.autograd.grad(hv[0], v)[0], expected(cubic, X, **OPTIONS)[0])


@pytest.mark.parametrize("wrong", [torch.ones(2), {"a": X}, [X, X], None, 1.0], ids=str)
def test_a_vector_of_another_shape_is_refused(wrong):
    with pytest.raises(ValueError, match=r"`estimate.hvp\(vector\)` must have tensors of the shapes of `grad`"):
        zero_order(**OPTIONS)(lambda x: cubic(x["x"])).estimate({"x": X}).hvp(wrong)


def test_several_values_have_no_product():
    with pytest.raises(
        ValueError, match=r"`estimate.hvp\(vector\)` is for objectives of one value, got the shape \(3,\)"
    ):
        zero_order(**OPTIONS)(vector).estimate(X).hvp(B)


class Blocks(Gaussian):
    """Gaussian directions in blocks of three that claim to depend on each other."""

    independent = False

    def rows(self, space, num):
        return 3


@pytest.mark.parametrize("num", [3, 6, 8])
def test_the_baseline_of_a_dependent_family_comes_from_other_blocks(num):
    directions = Directions(Blocks(), Space.of((X,)), 5, num)
    values = torch.arange(2.0 * num, dtype=torch.float64).view(num, 2) ** 2
    center = torch.tensor(1.0, dtype=torch.float64)
    h = values.mean(1) - 1
    got = differences(SCHEMES["antithetic"], directions, values, center)
    for i in range(num):
        others = [h[k] for k in range(num) if k // 3 != i // 3]
        close(got[i], h[i] - (sum(others) / len(others) if others else 0))
    f = zero_order(Blocks(), **{**OPTIONS, "num_samples": num})(cubic)
    close(by_rows(f, X)[0], f.estimate(X).hvp(EYE[0]))
