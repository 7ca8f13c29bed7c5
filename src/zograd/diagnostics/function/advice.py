"""Suggested settings: method, sigma, number of directions, evaluator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zograd.diagnostics.function.radii import smooth
from zograd.distributions.gaussian import Gaussian
from zograd.sampling import Until
from zograd.schemes import ANTITHETIC, FORWARD, NAIVE, Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.diagnostics.function.calls import Calls
    from zograd.diagnostics.function.pickling import Pickling
    from zograd.diagnostics.function.radii import Radius
    from zograd.diagnostics.function.samples import Samples
    from zograd.diagnostics.function.subject import Subject
    from zograd.diagnostics.function.vectorized import Vectorized
    from zograd.estimate.statistics import Length

SCHEMES: tuple[Scheme, ...] = (FORWARD, ANTITHETIC, NAIVE)  # in the order of preference, where all else is equal
_SLOW = 1e-3  # seconds: what handing a point to another process may cost
_FASTER = 1.2
_FRAMES = 1 << 12  # parameters up to which frames of orthogonal directions are made fast
_WORTH = 0.9  # a share of the directions that is worth a word
_ODDS = 0.81 / 0.19  # of a cosine of 0.9: the gradient's square over the error's


@dataclass(frozen=True)
class Need:
    """Cost of a method for a cosine of 0.9 at one sigma.

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


def needs(samples: Samples, length: Length) -> dict[str, Need]:
    """Return what each method would take, all from the same values.

    Args:
        samples: at one sigma.
        length: the gradient's, with the variance of antithetic estimates. Its square is that of all methods: the means
            are the same, and the noise of antithetic estimates the least.

    Returns:
        The needs by method.
    """
    found = {}
    for scheme in SCHEMES:
        own = length if scheme is ANTITHETIC else samples.length_of(samples.coefficients(scheme))
        own = own.replace(length.square, length.square_error)
        num, least = own.directions_needed(), own.at_least()
        name = scheme.name.lower()
        found[name] = Need(name, num, least, 1 + len(scheme.sides) * (num if math.isfinite(num) else least))
    return found


def cosine_as_decorated(subject: Subject, radii: Sequence[Radius]) -> float | None:
    """Return the cosine to expect of the settings that a function is decorated with; None if they do not tell."""
    options = subject.options
    at = next((r for r in radii if r.sigma == subject.sigma and r.samples is not None), None)
    if options is None or at is None or at.samples is None or options.method not in SCHEMES:
        return None
    length = at.samples.best_length(smooth=smooth(at, radii))
    own = at.samples.length_of(at.samples.coefficients(options.method)).replace(length.square, length.square_error)
    num = options.num_samples
    return own.cosine(num.bound if isinstance(num, Until) else num or subject.space.dim)


def suggest(
    subject: Subject, calls: Calls, evaluator: tuple[str, str], best: Radius | None, needed: dict[str, Need]
) -> Suggestion:
    """Suggest settings.

    Args:
        subject: the function.
        calls: what its plain calls show.
        evaluator: its name, and why.
        best: what the best sigma does; None if there is none.
        needed: directions and evaluations there, by method.

    Returns:
        The settings.
    """
    name, why = evaluator
    if best is None or not needed:
        return Suggestion("antithetic", None, None, name, ("no sigma gave estimates that can be used", why))
    method = "antithetic"  # one center's noise in all differences does not average out
    if calls.repeatable:
        method = min(needed.values(), key=lambda need: need.evaluations).method
    need = needed[method]
    num = math.ceil(need.num_samples) if math.isfinite(need.num_samples) else None
    reasons = [f"{method}: the fewest evaluations for a cosine of 0.9" if num else _unresolved(needed), why]
    if not math.isnan(best.bias):
        reasons.insert(1, f"sigma {best.sigma:.2g}: the least bias and deviation together, over some steps")
    space = subject.space
    if num and isinstance(subject.family, Gaussian) and space.slices == 1 and space.dim <= _FRAMES:
        fewer = orthogonal(need.num_samples, space.dim)
        if fewer <= _WORTH * num:
            reasons.append(f"with `Orthogonal()` directions N = {fewer} would do, for {space.dim} parameters")
    return Suggestion(method, best.sigma, num, name, tuple(reasons))


def _unresolved(needed: dict[str, Need]) -> str:
    least = needed["antithetic"].at_least
    if math.isinf(least):
        return "no gradient shows"
    return f"no gradient shows above the noise in these evaluations; N is more than {least:.3g}"


def orthogonal(num: float, dim: int) -> int:
    """Return the directions of ``Orthogonal()`` for the cosine that takes ``num`` Gaussian ones.

    This holds for any function and method: N of them, at most ``dim``, have a mean squared error less by (N - 1) / N
    of the gradient's square; above that, frames are independent.

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
    """Return the evaluator to use, and why."""
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
