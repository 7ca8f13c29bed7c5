"""zograd beside recipes of JAX: ``jax.grad``, ``pure_callback``, ``custom_vjp``, and optax's perturbed functions."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from checks import checks, raised, told

import zograd

PEER, PACKAGE = "JAX", "jax"
CHECKS, check = checks()
SIGMA = 0.1


def ours(fn, num=1000, **options):
    return zograd.zero_order(method="antithetic", num_samples=num, sigma=SIGMA, **options)(fn)


def differences(fn, x, num, chunk):
    """Antithetic differences summed over chunks of directions."""

    def one(key):
        eps = jax.random.normal(key, x.shape)
        return (fn(x + SIGMA * eps) - fn(x - SIGMA * eps)) / (2 * SIGMA) * eps

    keys = jax.random.split(jax.random.PRNGKey(0), num).reshape(-1, chunk, 2)
    add = lambda total, some: (total + jax.vmap(one)(some).sum(axis=0), None)  # noqa: E731
    return jax.lax.scan(add, jnp.zeros_like(x), keys)[0] / num


def recipe(fn, num=1000):
    """The recipe: a ``custom_vjp`` whose forward pass makes the estimate and whose backward pass multiplies by it."""

    @jax.custom_vjp
    def smoothed(x):
        return fn(x)

    def forward(x):
        return fn(x), differences(fn, x, num, num)

    def backward(estimate, cotangent):
        return (cotangent * estimate,)

    smoothed.defvjp(forward, backward)
    return smoothed


@check("a staircase, the sum of round(4 x) / 4: the slope, which is 1 on the whole")
def staircase():
    a = float(jax.grad(lambda x: (jnp.round(4 * x) / 4).sum())(jnp.zeros(1))[0])
    b = ours(lambda x: (torch.round(4 * x) / 4).sum(), seed=0).replace(sigma=0.3).estimate(torch.zeros(1)).grad.item()
    return f"{a:.2f} by `jax.grad`", f"{b:.2f}", a == 0 and abs(b - 1) < 0.2


@check("a numpy simulator (`jax.pure_callback`) under the gradient")
def callback():
    def simulate(x):
        return np.float32(np.round(x).sum())

    shape = jax.ShapeDtypeStruct((), jnp.float32)

    def called(x):
        return jax.pure_callback(simulate, shape, x, vmap_method="sequential")

    a, in_recipe = (raised(lambda f=f: jax.grad(f)(jnp.zeros(2))) for f in (called, recipe(called)))
    x = torch.zeros(2, requires_grad=True)
    b = raised(lambda: ours(lambda x: simulate(x.numpy()))(x).backward())
    return f"{a}; works in a `custom_vjp`", "works", a is not None and in_recipe is None and b is None


@check("h = f^2 where f(x) = x^2 hidden from autograd, at 1: the second derivative of h, which is 12")
def second_derivative():
    f = recipe(lambda x: jax.lax.stop_gradient(x**2), num=20000)
    a = float(jax.grad(jax.grad(lambda x: f(x) ** 2))(1.0))
    g = ours(lambda x: x.detach() ** 2, num=20000, seed=0)
    x = torch.tensor(1.0, dtype=torch.float64)
    b = torch.func.grad(torch.func.grad(lambda x: g(x) ** 2))(x).item()
    return (
        f"{a:.2f} by a `custom_vjp` that keeps the estimate, no word",
        f"{b:.2f}",
        abs(a - 12) > 2 and abs(b - 12) < 1,
    )


@check("the same seed with 5 and with 100 directions in a call (`vmap` in a `scan`): the same bits?")
def chunks():
    def cost(x):
        return (jnp.sin(3 * x) ** 2).sum()

    a = jnp.array_equal(*(differences(cost, jnp.linspace(-1, 1, 50), 100, c) for c in (5, 100)))
    fn = ours(lambda x: (torch.sin(3 * x) ** 2).sum(), num=100, seed=0)
    x = torch.linspace(-1, 1, 50)
    grads = (fn.replace(evaluator=zograd.evaluators.Vmap(chunk_size=c)).estimate(x).grad for c in (5, 100))
    b = torch.equal(*grads)
    return "yes" if a else "no", "yes" if b else "no", b and not a


@check("`optax.perturbations.make_perturbed_fun`, f(x) = sum(x), 10 parameters, sigma 0.1, N = 1000: the mean slope")
def perturbed():
    def slope(level):
        fn = optax.perturbations.make_perturbed_fun(lambda x: x.sum() + level, num_samples=1000, sigma=SIGMA)
        grad = jax.grad(functools.partial(fn, jax.random.PRNGKey(0)))(jnp.zeros(10))
        return float(grad.mean())

    def mine(level):
        return ours(lambda x: x.sum() + level, seed=0).estimate(torch.zeros(10)).grad.mean().item()

    a, b = [slope(level) for level in (0.0, 1000.0)], [mine(level) for level in (0.0, 1000.0)]
    shown = [f"{g[0]:.2f}; {g[1]:.2f} for 1000 + f" for g in (a, b)]
    return *shown, all(abs(slope - 1) < 0.1 for slope in a + b)


def main():
    return told([check() for check in CHECKS], PEER)


if __name__ == "__main__":
    sys.exit(not main())
