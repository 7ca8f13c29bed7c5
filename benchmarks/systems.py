"""Who is timed: each function returns a call that makes one whole estimate with its gradient, or None if not there."""

import copy
import functools
import importlib.util
import os

import torch

import zograd
from zograd.distributions import Gaussian, LowRank, Rademacher
from zograd.evaluators import Loop, Vmap

SIGMA = 0.01
TORCHOPT, FLOOR, INFERENCE, JAX = "TorchOpt antithetic", "evaluations alone", "shared-weight inference", "JAX scan"
REFERENCES = (TORCHOPT, FLOOR, INFERENCE, JAX, "EvoTorch PGPE", "evosax Open_ES")


def there(name):
    return importlib.util.find_spec(name) is not None


def ours(workload, distribution=None, evaluator=None):
    fn = zograd.zero_order(
        distribution, method="antithetic", num_samples=workload.num, sigma=SIGMA, evaluator=evaluator or Loop()
    )(workload.loss)
    return lambda: torch.autograd.grad(fn(workload.params), workload.params)


def ours_on_the_module(workload, distribution, evaluator):
    module = zograd.nn.ZeroOrder(workload.module, distribution, "antithetic", workload.num, SIGMA, evaluator=evaluator)
    params = [p for p in workload.module.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(module(*workload.inputs), params)


def torchopt(workload):
    if not there("torchopt"):
        return None
    import torchopt

    fn = torchopt.diff.zero_order(
        distribution=torch.distributions.Normal(0, 1),
        method="antithetic",
        argnums=0,
        num_samples=workload.num,
        sigma=SIGMA,
    )(workload.loss)
    return lambda: torch.autograd.grad(fn(workload.params), workload.params)


def floor(workload):
    """The same 2N evaluations one by one, at a point that is there already."""

    @torch.no_grad()
    def run():
        for _ in range(2 * workload.num):
            workload.loss(workload.params)

    return run


def inference(workload, at_once=16):
    """As many forward passes of the module with shared weights: what low rank is measured against.

    Batches of 16 passes were the fastest of 1 to 64, by 10 percent at most.
    """
    module = copy.copy(workload.module)
    module.labels = module.labels.repeat(at_once)
    (x,) = workload.inputs
    batch = x.repeat(at_once, *[1] * (x.dim() - 1))

    @torch.no_grad()
    def run():
        for _ in range(2 * workload.num // at_once):
            module(batch)

    return run


class NoiseAtHand(LowRank):
    """Draws once and sums nothing: what is left of an estimate are its evaluations, and its fixed cost."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def draw(self, space, noise, seed, block):
        if block not in self._made:
            super().draw(space, noise, seed, block)
            self._made[block] = noise[0].clone()
        noise[0].copy_(self._made[block])

    def add_sum(self, space, noise, c, out):
        return torch.zeros(space.size, device=space.device) if out is None else out


def on_one_core(make):
    """Make and run a system on one core: XLA has as many threads as it finds cores, whatever its flags say."""
    if not hasattr(os, "sched_setaffinity"):
        return make

    def pinned(call):
        def run(*args):
            cores = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {max(cores)})
            try:
                return call(*args)
            finally:
                os.sched_setaffinity(0, cores)

        return run

    @functools.wraps(make)
    def made(workload):
        run = pinned(make)(workload)
        return run and pinned(run)

    return made


@on_one_core
def jax_pairs(workload):
    """``jit`` of a scan over antithetic pairs."""
    if not there("jax"):
        return None
    import jax
    import jax.numpy as jnp

    x, labels = jnp.asarray(workload.inputs[0].cpu().numpy()), jnp.asarray(workload.module.labels.cpu().numpy())
    params = [jnp.asarray(p.detach().cpu().numpy()) for p in workload.params]

    def loss(ps):
        hidden = x
        for k in range(0, len(ps) - 2, 2):
            hidden = jax.nn.relu(hidden @ ps[k].T + ps[k + 1])
        logits = jax.nn.log_softmax(hidden @ ps[-2].T + ps[-1])
        return -logits[jnp.arange(len(labels)), labels].mean()

    @jax.jit
    def estimate(key, ps):
        def pair(total, key):
            eps = [jax.random.normal(k, p.shape) for k, p in zip(jax.random.split(key, len(ps)), ps, strict=True)]
            up = loss([p + SIGMA * e for p, e in zip(ps, eps, strict=True)])
            down = loss([p - SIGMA * e for p, e in zip(ps, eps, strict=True)])
            c = (up - down) / (2 * SIGMA * workload.num)
            return [t + c * e for t, e in zip(total, eps, strict=True)], None

        zeros = [jnp.zeros_like(p) for p in ps]
        return jax.lax.scan(pair, zeros, jax.random.split(key, workload.num))[0]

    key = jax.random.PRNGKey(0)
    return lambda: jax.block_until_ready(estimate(key, params))


def evotorch_pgpe(workload):
    """PGPE's symmetric sampling and gradient, the values by ``torch.vmap``: 2N evaluations in one population."""
    if not there("evotorch"):
        return None
    import logging

    logging.disable(logging.WARNING)
    from evotorch import Problem
    from evotorch.algorithms import PGPE

    shapes, sizes = [p.shape for p in workload.params], [p.numel() for p in workload.params]

    def one(flat):
        return workload.loss([part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)])

    batched = torch.no_grad()(torch.vmap(one, chunk_size=100))
    problem = Problem("min", batched, solution_length=sum(sizes), initial_bounds=(-1, 1), vectorized=True)
    start = torch.cat([p.detach().flatten() for p in workload.params])
    options = {"center_learning_rate": 0.0, "stdev_learning_rate": 0.0, "stdev_init": SIGMA, "ranking_method": "raw"}
    search = PGPE(problem, popsize=2 * workload.num, center_init=start, **options)
    return search.step


@on_one_core
def evosax_open_es(workload):
    """Open_ES with antithetic sampling, asked and told under ``jit``, the values by ``vmap``."""
    if not (there("evosax") and there("jax")):
        return None
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import Open_ES

    x, labels = jnp.asarray(workload.inputs[0].cpu().numpy()), jnp.asarray(workload.module.labels.cpu().numpy())
    params = [jnp.asarray(p.detach().cpu().numpy()) for p in workload.params]

    def loss(ps):
        hidden = x
        for k in range(0, len(ps) - 2, 2):
            hidden = jax.nn.relu(hidden @ ps[k].T + ps[k + 1])
        logits = jax.nn.log_softmax(hidden @ ps[-2].T + ps[-1])
        return -logits[jnp.arange(len(labels)), labels].mean()

    radius = optax.constant_schedule(SIGMA)
    search = Open_ES(2 * workload.num, params, optimizer=optax.sgd(0.01), std_schedule=radius)
    options = search.default_params
    state = search.init(jax.random.PRNGKey(0), params, options)

    @jax.jit
    def step(key, state):
        ask, tell = jax.random.split(key)
        population, state = search.ask(ask, state, options)
        state, _ = search.tell(tell, population, jax.vmap(loss)(population), state, options)
        return state

    key = jax.random.PRNGKey(1)
    return lambda: jax.block_until_ready(step(key, state))


def systems(workload, name):
    """The systems of a workload, with the ratios that ours should reach: another's time over ours.

    A peer that cannot do this work has None for its function; the workload may be None where names are all one needs.
    """
    gaussian, signs, low_rank = Gaussian(), Rademacher(), LowRank()
    alone, second = Vmap(prefetch=False), Vmap()
    looped = {
        "python": {"zograd loop": (lambda: ours(workload), {TORCHOPT: 1.35})},
        "quadratic10": {
            "zograd loop": (lambda: ours(workload), {}),
            "zograd vmap": (lambda: ours(workload, gaussian, Vmap()), {TORCHOPT: 60}),
            "zograd vmap, Normal(0, 1)": (lambda: ours(workload, torch.distributions.Normal(0, 1), Vmap()), {}),
            "zograd vmap, signs": (lambda: ours(workload, signs, Vmap()), {}),
        },
        "quadratic1000": {
            "zograd vmap": (lambda: ours(workload, gaussian, alone), {TORCHOPT: 7}),
            "zograd vmap, signs": (lambda: ours(workload, signs, alone), {TORCHOPT: 15}),
        },
        "one": {"zograd loop": (lambda: ours(workload), {TORCHOPT: 1.0, "us": 200})},
        "small100": {
            "zograd vmap": (lambda: ours(workload, gaussian, alone), {TORCHOPT: 5, JAX: 1 / 1.5}),
            "zograd vmap, signs": (lambda: ours(workload, signs, alone), {TORCHOPT: 7, JAX: 1 / 1.5}),
        },
        "small1000": {
            "zograd vmap": (lambda: ours(workload, gaussian, alone), {JAX: 1 / 1.5}),
            "zograd vmap, second core": (lambda: ours(workload, gaussian, second), {}),
            "zograd vmap, signs": (lambda: ours(workload, signs, alone), {JAX: 1 / 1.5}),
        },
        "large": {
            "zograd loop": (lambda: ours(workload, gaussian, Loop(prefetch=False)), {TORCHOPT: 1.15}),
            "zograd loop, second core": (lambda: ours(workload, gaussian, Loop()), {TORCHOPT: 1.7}),
            "zograd loop, signs": (lambda: ours(workload, signs, Loop(prefetch=False)), {TORCHOPT: 1.75, JAX: 1.0}),
            "zograd vmap, low rank": (
                lambda: ours_on_the_module(workload, low_rank, alone),
                {TORCHOPT: 3.5, JAX: 1.0, INFERENCE: 0.8},
            ),
            "zograd low rank, noise at hand": (
                lambda: ours_on_the_module(workload, NoiseAtHand(), alone),
                {INFERENCE: 0.9},
            ),
        },
        "transformer": {
            "zograd loop, signs": (lambda: ours(workload, signs, Loop(prefetch=False)), {TORCHOPT: 1.15}),
            "zograd vmap, low rank": (
                lambda: ours_on_the_module(workload, low_rank, alone),
                {TORCHOPT: 1.25, INFERENCE: 0.85},
            ),
            "zograd low rank, noise at hand": (
                lambda: ours_on_the_module(workload, NoiseAtHand(), alone),
                {INFERENCE: 0.9},
            ),
        },
        "batch_norm": {"zograd loop": (lambda: ours_on_the_module(workload, gaussian, Loop(prefetch=False)), {})},
        "backbone": {
            "zograd loop": (lambda: ours_on_the_module(workload, gaussian, Loop(prefetch=False)), {}),
            "zograd vmap": (lambda: ours_on_the_module(workload, gaussian, alone), {}),
        },
        "attributes": {"zograd loop": (lambda: ours_on_the_module(workload, gaussian, Loop(prefetch=False)), {})},
    }[name]
    others = {TORCHOPT: torchopt, FLOOR: floor}
    if name in ("small100", "small1000", "large"):
        others |= {JAX: jax_pairs, "EvoTorch PGPE": evotorch_pgpe, "evosax Open_ES": evosax_open_es}
    if name in ("large", "transformer"):
        others[INFERENCE] = inference
    if name in ("batch_norm", "backbone", "attributes"):
        # JAX has no torch modules; EvoTorch's population goes through vmap, which refuses to move running statistics.
        others |= {JAX: None, "evosax Open_ES": None, "EvoTorch PGPE": None if name == "batch_norm" else evotorch_pgpe}
    return {system: (make and functools.partial(make, workload), {}) for system, make in others.items()} | looped
