"""zograd beside evosax: its Open_ES as a gradient estimator."""

import sys

import jax
import jax.numpy as jnp
import optax
import torch
from checks import checks, raised, told
from evosax.algorithms import Open_ES

import zograd

PEER, PACKAGE = "evosax", "evosax"
CHECKS, check = checks()


def step(fitness, raw=False, size=10, popsize=100):
    """How one step of rate 1 moves the mean from zero."""
    options = {"fitness_shaping_fn": lambda population, fitness, state, params: fitness} if raw else {}
    radius = optax.constant_schedule(0.1)
    search = Open_ES(popsize, jnp.zeros(size), optimizer=optax.sgd(1.0), std_schedule=radius, **options)
    params = search.default_params
    state = search.init(jax.random.PRNGKey(0), jnp.zeros(size), params)
    population, state = search.ask(jax.random.PRNGKey(1), state, params)
    state, _ = search.tell(jax.random.PRNGKey(2), population, fitness(population), state, params)
    return state.mean


def ours(fn, **options):
    return zograd.zero_order(method="antithetic", num_samples=50, sigma=0.1, **options)(fn)


@check("one evaluation of 100 gives nan: the mean after a step")
def nan():
    def broken(population):
        return population.sum(axis=1).at[50].set(jnp.nan)

    calls = []

    def fn(x):
        calls.append(1)
        return x.sum() * (float("nan") if len(calls) == 50 else 1.0)

    raw, ranked = (int(jnp.isnan(step(broken, raw)).sum()) for raw in (True, False))
    error = raised(lambda: ours(fn).estimate(torch.zeros(10)))
    return f"{raw} of 10 nan with raw values, {ranked} with ranks; no word", str(error), raw == 10 and error is not None


@check("f is constant, values ranked: does the mean move?")
def ties():
    a = float(jnp.abs(step(lambda population: jnp.zeros(len(population)))).max())
    fn = ours(lambda x: torch.zeros(()), shaping=zograd.shaping.centered_ranks)
    b = fn.estimate(torch.zeros(10)).grad.abs().max().item()
    return "yes" if a else "no", "yes" if b else "no", a > 0 and b == 0


@check("f(x) = sum(x), raw values, one step of rate 1: the mean of the slope, which is 1")
def scale():
    def level(population):
        return population.sum(axis=1)

    a = -float(step(level, raw=True, popsize=20000).mean())
    b = ours(lambda x: x.sum(), seed=0).replace(num_samples=10000).estimate(torch.zeros(10)).grad.mean().item()
    return f"{a:.2f}", f"{b:.2f}", abs(a - 1) < 0.05 and abs(b - 1) < 0.05


def main():
    return told([check() for check in CHECKS], PEER)


if __name__ == "__main__":
    sys.exit(not main())
