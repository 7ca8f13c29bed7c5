"""``check``: all questions to one function, in order, within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd.diagnostics.distribution.check import check_distribution
from zograd.diagnostics.function import advice, autograd, radii, verdicts
from zograd.diagnostics.function.calls import plain_calls
from zograd.diagnostics.function.noise import noise_floor
from zograd.diagnostics.function.pickling import pickled
from zograd.diagnostics.function.samples import Samples
from zograd.diagnostics.function.subject import Subject
from zograd.diagnostics.function.vectorized import vectorized
from zograd.diagnostics.function.watch import Picture, RandomStates
from zograd.diagnostics.report import CheckReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zograd.diagnostics.distribution.report import DistributionReport
    from zograd.diagnostics.function.calls import Calls
    from zograd.diagnostics.function.noise import Noise

LEAST_BUDGET = 120
_INTEGER = "an integer"  # the words for an int in the errors of `check`
_SWEEP = 0.55  # the part of the rest of the budget that goes into the range of sigma
_LEAST = 8  # directions that say more than the range's
# Parameters up to which a distribution is looked at along the way: a second, or one with groups some.
_LARGE, _SMALL = 1 << 13, 1 << 8


def check(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    budget: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> CheckReport:
    r"""Look at a function, its arguments and its settings before trusting a gradient from its values.

    .. math:: \mathbb{E} \lVert \hat g \rVert^2 = \lVert g \rVert^2 + \frac VN, \qquad
              \cos \approx \frac{\lVert g \rVert}{\sqrt{\lVert g \rVert^2 + V / N}}, \qquad
              N_{0.9} = \frac{0.81}{0.19} \frac{V}{\lVert g \rVert^2}

    It calls ``fn`` at its arguments some times, then around them, and tells whether it is deterministic (two calls,
    same bits, and with torch's random state alike), what it changes, whether it pickles and vectorizes, its noise
    floor, what a call costs, bias and deviation over sigma with the round-off limit, the N that a cosine of 0.9 with
    the smoothed gradient takes by each method, how that gradient compares with autograd's where there is one, and which
    settings all this suggests. :math:`\lVert g \rVert^2` is estimated without bias, from the products of independent
    groups of directions, and V, the variance of one direction's estimate, from their differences.

    Random states, parameters, buffers, gradients and tensors that ``fn`` reaches are left as they were found; of
    Python objects that ``fn`` changes it is told, but they stay changed. ``fn`` gets copies of its arguments' tensors.
    A :class:`zograd.Tracker` does not count these evaluations, the report does.
    Directions are those of a decorated function where they are independent of each other, else Gaussian ones.

    Args:
        fn: a function, a decorated one, or a module whose ``forward`` returns the objective.
        *args: its arguments.
        argnums: the arguments to differentiate; of a decorated function they are its own.
        budget: evaluations of ``fn`` that may be made, 120 at least; with more of them N is known better.
        seed: of the directions.
        **kwargs: keyword arguments of ``fn``.

    Returns:
        The report: a table when printed, true if nothing speaks against the setup; ``report.plot()`` draws it.

    Raises:
        TypeError: if ``fn`` is none of these, or a setting is not an integer.
        ValueError: if ``budget`` is too small, or there is nothing to differentiate.
        NonFiniteError: if the value at the arguments themselves is not finite.
        Exception: what ``fn`` raises at the arguments themselves. What it raises elsewhere is reported.

    Examples:
        >>> import torch, zograd
        >>> report = zograd.check(lambda x: (x.sin() + x).sum(), torch.linspace(0, 1, 10))
        >>> report.calls.deterministic, report.pickling.works, report.vectorized.works
        (True, False, True)
        >>> 30 < report.suggestion.num_samples < 70  # 4.26 (d + 1) for a smooth function
        True

    References:
        Moré & Wild, "Estimating computational noise" (2011), doi:10.1137/100786125; Nesterov & Spokoiny,
        "Random gradient-free minimization of convex functions" (2017);
        arXiv:1905.01332 for the round-off of differences.
    """
    chosen = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)
    chosen = tuple(checks.integer(a, "`check(argnums=...)`", kind=_INTEGER) for a in chosen)
    budget = checks.integer(budget, "`check(budget=...)`", kind=_INTEGER)
    if budget < LEAST_BUDGET:
        raise ValueError(f"`check(budget=...)` must be at least {LEAST_BUDGET} evaluations, got {budget}.")
    seed = checks.seed(seed, "`check(seed=...)`", kind=_INTEGER)
    states = RandomStates(torch.device("cpu"))
    try:
        subject = Subject(fn, args, kwargs, chosen, budget)
        if subject.space.device.type != "cpu":
            states = RandomStates(subject.space.device)
        picture = Picture(subject.fn, subject.beside)
        try:
            return _examine(subject, seed)
        finally:
            picture.restore()
    finally:
        states.restore()


def _examine(subject: Subject, seed: int) -> CheckReport:
    """Ask the single questions, estimate over a range of sigma and once more at the best, and conclude."""
    calls = plain_calls(subject)
    subject.facts.draws = "torch" in calls.draws
    pickling = pickled(subject, subject.value(seed=1) if calls.repeatable else None)
    noise = noise_floor(subject, seed, repeatable=calls.repeatable)
    sigma = subject.sigma or min(radii.grid(subject, 3)[1], 1.0)
    many = vectorized(subject, sigma, noise.level, seed)
    subject.vmapped = many.works and many.same and many.seconds < many.looped
    gradient = autograd.gradient(subject, seed, deterministic=calls.deterministic)
    sweep, limits = _sweep(subject, calls, noise, gradient)
    best = radii.choose(sweep, max(limits))
    final = None if best is None else _final(subject, best, seed + 2)
    compared, needed = autograd.compare(gradient, final), {}
    if best is not None and final is not None:
        length = autograd.known_length(gradient, compared, final) or final.best_length(smooth=radii.smooth(best, sweep))
        needed = advice.needs(final, length)
    problems, distribution = (
        [*verdicts.problems(subject, calls, many, sweep, max(limits))],
        _distribution(subject, seed),
    )
    if distribution is not None and not distribution:
        problems.append(f"the distribution is not what it says: {distribution.summary()}")
    evaluator = advice.evaluator(calls, pickling, many, batched=subject.batched)
    return CheckReport(
        name=subject.name,
        dim=subject.space.size,
        shape=tuple(subject.shape or ()),
        evaluations=subject.evaluations,
        calls=calls,
        noise=noise,
        pickling=pickling,
        vectorized=many,
        autograd=compared,
        sweep=tuple(sweep),
        roundoff_sigma=limits[0],
        noise_sigma=limits[1],
        needed=needed,
        given_cosine=advice.cosine_as_decorated(subject, sweep),
        distribution=distribution,
        suggestion=advice.suggest(subject, calls, evaluator, best, needed),
        problems=tuple(problems),
        notes=tuple(verdicts.notes(subject, calls, many, sweep, compared)),
    )


def _sweep(
    subject: Subject, calls: Calls, noise: Noise, gradient: autograd.Gradient
) -> tuple[list[radii.Radius], tuple[float, float]]:
    """Return what each sigma does, and the limits below which rounding and noise are too much of the differences."""
    points = 9 if subject.left >= 250 else 5
    num = max(4, int(subject.left * _SWEEP / points - 1) // 2)
    seen = [radii.measure(subject, sigma, num) for sigma in radii.grid(subject, points)]
    slope, random = radii.typical_slope(seen), noise.kind == "random"
    limits = (
        radii.roundoff_limit(subject, calls.value, 0.0 if random else noise.level, slope),
        radii.noise_limit(noise.level if random else 0.0, slope),
    )
    return radii.with_bias(seen, gradient.flat, gradient.mean, max(limits)), limits


def _final(subject: Subject, best: radii.Radius, seed: int) -> Samples | None:
    """Estimate at the chosen sigma, with all that is left of the budget."""
    num = (subject.left - 1) // 2
    try:
        return Samples(subject.estimate(best.sigma, num, seed)) if num > _LEAST else best.samples
    except Exception:  # fn raises at some of the further points, or repeats them: the sweep's have to serve
        return best.samples


def _distribution(subject: Subject, seed: int) -> DistributionReport | None:
    options, space = subject.options, subject.space
    if options is None or options.batch_dim is not None:
        return None
    if space.size > (_LARGE if options.distribution.independent else _SMALL):
        return None
    return check_distribution(options.distribution, space.shapes, dtype=space.dtype, seed=seed)
