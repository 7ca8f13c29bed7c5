"""What to do with what was found: method, sigma, number of directions, evaluator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zograd.diagnostics.function.sweep import SCHEMES, Samples, measure
from zograd.estimate.statistics import Length
from zograd.schemes import ANTITHETIC

if TYPE_CHECKING:
    from zograd.diagnostics.function.probes import Calls, Pickling, Vectorized

_SLOW = 1e-3  # seconds: what handing a point to another process may cost
_FASTER = 1.2
_ODDS = 0.81 / 0.19  # of a cosine of 0.9: the gradient's square over the error's


@dataclass(frozen=True)
class Need:
    """What a method takes for a cosine of 0.9 at one sigma.

    Attributes:
        method: its name.
        num_samples: directions, infinite if the gradient did not show above the noise.
        at_least: directions that it hardly takes less than.
        evaluations: of ``fn`` in all, by ``num_samples`` or else ``at_least``.
    """

    method: str
    num_samples: float
    at_least: float
    evaluations: float


@dataclass(frozen=True)
class Suggestion:
    """Settings for :func:`zograd.zero_order`.

    Attributes:
        method: the name of the scheme.
        sigma: the radius of the smoothing; None if none of those that were tried works.
        num_samples: N for a cosine of 0.9 with the smoothed gradient; None if the budget was too small to tell.
        evaluator: ``"loop"``, ``"vmap"``, ``"batched"`` or ``"Pool"``.
        reasons: one sentence each.
    """

    method: str
    sigma: float | None
    num_samples: int | None
    evaluator: str
    reasons: tuple[str, ...]


def needs(samples: Samples, ours: Length) -> dict[str, Need]:
    """What each method would take, all from the same values.

    Args:
        samples: at one sigma.
        ours: what the antithetic estimates tell. The squared length of the gradient is theirs for all methods: the
            means are the same, and their noise the least.

    Returns:
        The needs by method.
    """
    found = {}
    for scheme in SCHEMES:
        variance = ours.variance if scheme is ANTITHETIC else measure(samples, samples.coefficients(scheme)).variance
        shared = Length(ours.square, ours.square_error, variance, ours.groups)
        num, least = shared.directions_needed(), shared.at_least()
        name = scheme.name.lower()
        found[name] = Need(name, num, least, 1 + len(scheme.sides) * (num if math.isfinite(num) else least))
    return found


def orthogonal(num: float, dim: int) -> int:
    """Directions of ``Orthogonal()`` for the cosine that takes ``num`` Gaussian ones, for any function and method.

    N of them, at most ``dim``, have a mean squared error less by (N - 1) / N of the gradient's square; above that,
    frames are independent.

    Args:
        num: of independent Gaussian directions, for a cosine of 0.9.
        dim: parameters.

    Returns:
        The number.
    """
    noise = num / _ODDS  # of one direction, in units of the gradient's square
    within = (noise + 1) / (1 + 1 / _ODDS)
    return math.ceil(within) if within <= dim else dim * math.ceil(((noise + 1) / dim - 1) * _ODDS)


def evaluator(calls: Calls, pickling: Pickling, vectorized: Vectorized, *, batched: bool) -> tuple[str, str]:
    """The evaluator, and why."""
    if batched:
        return "batched", "fn takes many points at once as it is"
    usable = vectorized.works and vectorized.same
    gain = vectorized.looped / vectorized.seconds if usable and vectorized.seconds else 0.0
    if gain > _FASTER:
        return "vmap", f"torch.vmap gives the same values {gain:.1f} times as fast"
    if calls.seconds > _SLOW and pickling.works:
        took = f"{calls.seconds * 1e3:.3g} ms"
        return "Pool", f"a call takes {took} and fn pickles: `zograd.evaluators.Pool` shares the work between processes"
    if calls.seconds > _SLOW:
        return "loop", "fn is slow but does not pickle; if it did, `Pool` could share the work between processes"
    if usable:
        return "loop", f"torch.vmap works but is {gain:.1f} times as fast on these shapes"
    return "loop", "torch.vmap does not serve here, and a call is too short to be handed to another process"
