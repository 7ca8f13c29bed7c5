"""``check``: all questions to one function, in order, within a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd.diagnostics.distribution.check import check_distribution
from zograd.diagnostics.function import advice, probes, radii
from zograd.diagnostics.function.subject import Subject
from zograd.diagnostics.function.sweep import SCHEMES, Samples, measure, sample, square_of
from zograd.diagnostics.function.watch import Picture, RandomStates
from zograd.diagnostics.report import Autograd, CheckReport
from zograd.distributions.gaussian import Gaussian
from zograd.sampling import Until
from zograd.schemes import ANTITHETIC

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zograd.distributions.base import Distribution
    from zograd.estimate.statistics import Length

LEAST_BUDGET = 120
_INTEGER = "an integer"  # the words for an int in the errors of `check`
_SWEEP = 0.55  # of the rest
_LEAST = 8  # directions that say more than the range's
_TENTH = 0.1  # a bias or a difference from autograd above this is worth a note


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
            return _Examination(subject, seed).report()
        finally:
            picture.restore()
    finally:
        states.restore()


@dataclass(frozen=True)
class _Found:
    """What the single questions showed."""

    calls: probes.Calls
    pickling: probes.Pickling
    noise: probes.Noise
    vectorized: probes.Vectorized
    gradient: probes.Gradient


class _Examination:
    """One check as it goes: single questions, the range of sigma, and estimates at the best of them."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject = subject
        self.seed = seed
        self.family, self.family_note = _family(subject)
        given = subject.radii()
        self.given: float | None = max(given) if given else None
        self.unit: tuple[float, ...] = tuple(r / max(given) for r in given) if given else (1.0,) * len(subject.params)
        self.found = self._ask()
        v = self.found.vectorized
        self.vmapped: bool = v.works and v.same and v.seconds < v.looped

    def report(self) -> CheckReport:
        sweep, limits = self._sweep()
        best = radii.choose(sweep, max(limits))
        final = self._final(best)
        compared, whole = self._beside_autograd(final), None
        if best is not None and final is not None:
            ours = measure(final, final.coefficients(ANTITHETIC))
            whole = self._known(ours, compared) or square_of(final, ours, smooth=radii.smooth(best, sweep))
        needed = advice.needs(final, whole) if final is not None and whole is not None else {}
        given_cosine = self._given_cosine(sweep)
        suggestion = self._suggest(best, needed, whole)
        problems, notes = self._verdicts(sweep, limits, compared)
        distribution = self._distribution()
        if distribution is not None and not distribution:
            problems.append(f"the distribution is not what it says: {distribution.summary()}")
        found = self.found
        return CheckReport(
            name=self.subject.name,
            dim=self.subject.space.size,
            shape=tuple(self.subject.shape or ()),
            evaluations=self.subject.evaluations,
            calls=found.calls,
            noise=found.noise,
            pickling=found.pickling,
            vectorized=found.vectorized,
            autograd=compared,
            sweep=tuple(sweep),
            roundoff_sigma=limits[0],
            noise_sigma=limits[1],
            needed=needed,
            given_cosine=given_cosine,
            distribution=distribution,
            suggestion=suggestion,
            problems=tuple(problems),
            notes=tuple(notes),
        )

    def _ask(self) -> _Found:
        subject = self.subject
        calls = probes.calls(subject)
        subject.facts.draws = "torch" in calls.draws
        expected = subject.value(seed=1) if calls.repeatable else None
        pickling = probes.pickling(subject, expected)
        noise = probes.noise(subject, calls, self.seed)
        if subject.batched:
            vectorized = probes.Vectorized(False, 'fn takes many points at once, as `evaluator="batched"` asks')
        else:
            sigma = self.given or min(radii.grid(subject, None, 3)[1], 1.0)
            vectorized = self._vmap(sigma, noise.level)
        return _Found(calls, pickling, noise, vectorized, probes.autograd(subject, calls, self.seed))

    def _vmap(self, sigma: float, level: float) -> probes.Vectorized:
        try:
            return probes.vmap(self.subject, sigma, level, self.seed)
        except Exception as error:  # fn's own, at some point away from the center
            return probes.Vectorized(False, f"fn raised at sigma = {sigma:.2g}: {type(error).__name__}: {error}")

    def _sweep(self) -> tuple[list[radii.Radius], tuple[float, float]]:
        subject, found = self.subject, self.found
        rest = subject.left
        points = 9 if rest >= 250 else 5
        num = max(4, int(rest * _SWEEP / points - 1) // 2)
        seen = [
            radii.look(subject, self.family, sigma, self.unit, num, vmapped=self.vmapped)
            for sigma in radii.grid(subject, self.given, points)
        ]
        slope = _slope(seen)
        random = found.noise.level if found.noise.kind == "random" else 0.0
        limits = (
            radii.roundoff_limit(subject, found.calls.value, 0.0 if random else found.noise.level, slope),
            radii.tenth(random, slope),
        )
        return radii.with_bias(seen, found.gradient.flat, self._mean(), max(limits)), limits

    def _mean(self) -> torch.Tensor | None:
        """The mean of an estimate of autograd's gradient: that itself, unless directions have another covariance."""
        flat = self.found.gradient.flat
        return None if flat is None else self.family.covariance(self.subject.space, flat)

    def _final(self, best: radii.Radius | None) -> Samples | None:
        """Estimates at the chosen sigma, with all that is left of the budget."""
        if best is None:
            return None
        num, unit = (self.subject.left - 1) // 2, tuple(best.sigma * u for u in self.unit)
        try:
            if num > _LEAST:
                return sample(self.subject, self.family, unit, num, self.seed + 2, vmapped=self.vmapped)
        except Exception:  # fn raises at some of the further points, or repeats them: the sweep's have to serve
            return best.samples
        return best.samples

    def _beside_autograd(self, final: Samples | None) -> Autograd:
        gradient, mean = self.found.gradient, self._mean()
        if gradient.flat is None or mean is None or final is None:
            return Autograd(False, gradient.error or "no sigma works")
        flat = mean.double().cpu()
        off = measure(final, final.coefficients(ANTITHETIC) - final.slopes(gradient.flat))
        length = float(flat.norm())
        along = off.groups @ flat / length**2
        error = float(along.std()) / math.sqrt(len(along))
        scale = 1 + float(along.mean())
        square = max(off.square, 0.0) / length**2 + 2 * float(along.mean()) + 1
        cosine = scale / math.sqrt(square) if square > 0 else math.nan
        return Autograd(True, None, max(-1.0, min(1.0, cosine)), scale, error)

    def _known(self, ours: Length, compared: Autograd) -> Length | None:
        """With the length that follows from autograd's gradient and the bias, which are known better than by chance."""
        mean = self._mean()
        if mean is None or not compared.cosine > 0:
            return None
        square = float(mean.double().norm()) ** 2
        return ours.replace(square * (compared.scale / compared.cosine) ** 2, 2 * square * compared.scale_error)

    def _given_cosine(self, sweep: list[radii.Radius]) -> float | None:
        options = self.subject.options
        at = next((r for r in sweep if r.sigma == self.given and r.samples is not None), None)
        if options is None or at is None or at.samples is None or options.method not in SCHEMES:
            return None
        ours = measure(at.samples, at.samples.coefficients(ANTITHETIC))
        ours = square_of(at.samples, ours, smooth=radii.smooth(at, sweep))
        one = measure(at.samples, at.samples.coefficients(options.method)).replace(ours.square, ours.square_error)
        num = options.num_samples
        return one.cosine(num.bound if isinstance(num, Until) else num or self.subject.space.dim)

    def _suggest(
        self, best: radii.Radius | None, needed: dict[str, advice.Need], whole: Length | None
    ) -> advice.Suggestion:
        found = self.found
        name, why = advice.evaluator(found.calls, found.pickling, found.vectorized, batched=self.subject.batched)
        if best is None or whole is None:
            return advice.Suggestion("antithetic", None, None, name, ("no sigma gave estimates that can be used", why))
        method = _cheapest(needed, found.calls)
        need = needed[method]
        num = math.ceil(need.num_samples) if math.isfinite(need.num_samples) else None
        reasons = [f"{method}: the fewest evaluations for a cosine of 0.9" if num else _unresolved(whole), why]
        if not math.isnan(best.bias):
            reasons.insert(1, f"sigma {best.sigma:.2g}: the least bias and deviation together, over some steps")
        space = self.subject.space
        if num and isinstance(self.family, Gaussian) and space.slices == 1 and space.dim <= _FRAMES:
            fewer = advice.orthogonal(need.num_samples, space.dim)
            if fewer <= _WORTH * num:
                reasons.append(f"with `Orthogonal()` directions N = {fewer} would do, for {space.dim} parameters")
        return advice.Suggestion(method, best.sigma, num, name, tuple(reasons))

    def _distribution(self) -> Any:
        options, space = self.subject.options, self.subject.space
        if options is None or options.batch_dim is not None:
            return None
        if space.size > (_LARGE if options.distribution.independent else _SMALL):
            return None
        return check_distribution(options.distribution, space.shapes, dtype=space.dtype, seed=self.seed)

    def _verdicts(
        self, sweep: list[radii.Radius], limits: tuple[float, float], compared: Autograd
    ) -> tuple[list[str], list[str]]:
        found, options = self.found, self.subject.options
        problems, notes = [], [self.family_note] if self.family_note else []
        if found.calls.changed:
            problems.append(f"fn changes {', '.join(found.calls.changed)}: later evaluations see another function.")
        if all(r.samples is not None and not r.samples.varies for r in sweep):
            problems.append("fn has the same value at all points that were tried: there is no gradient to estimate.")
        if found.calls.writes_to_point:
            notes.append("fn writes to its differentiated argument; zograd gives it a copy.")
        if not found.calls.repeatable and not found.calls.changed:
            notes.append(
                "fn is random with one torch random state: seed what it draws from with `zograd.current_seed()`, so "
                "that both sides of a pair have the same luck."
            )
        if found.vectorized.works and not found.vectorized.same:
            asked = options is not None and options.evaluator.__class__.__name__ == "Vmap"
            (problems if asked else notes).append('its values under `evaluator="vmap"` are others than in a loop.')
        if found.vectorized.warning:
            notes.append("torch.vmap has no fast rule for something in fn.")
        if self.given is not None and self.given < max(limits):
            problems.append(f"sigma = {self.given:g} is below the limit of {max(limits):.2g}: differences are noise.")
        failed = [r for r in sweep if r.error is not None and "budget" not in r.error]
        notes += [f"fn fails at sigma = {r.sigma:.2g}: {r.error}" for r in failed[:1]]
        off = compared.differentiable and abs(compared.scale - 1) > _TENTH + 3 * compared.scale_error
        if off or (compared.differentiable and compared.cosine < 1 - _TENTH):
            notes.append(
                "autograd's gradient differs from that of the values even at the suggested sigma: fn is not smooth at "
                "that scale, or something in it hides from autograd (`detach`, `round`, `.item()`)."
            )
        return problems, notes


# Parameters up to which a distribution is looked at along the way: a second, or one with groups some.
_LARGE, _SMALL = 1 << 13, 1 << 8

_FRAMES = 1 << 12  # parameters up to which frames of orthogonal directions are made fast
_WORTH = 0.9  # a share of the directions that is worth a word


def _slope(seen: list[radii.Radius]) -> float:
    """A typical slope along a direction: the median over sigma, since the ends are noise and curvature."""
    rms = sorted(float(r.samples.coefficients(ANTITHETIC).square().mean().sqrt()) for r in seen if r.samples)
    return rms[len(rms) // 2] if rms else 0.0


def _family(subject: Subject) -> tuple[Distribution, str | None]:
    if subject.options is None:
        return Gaussian(), None
    given = subject.options.distribution
    if given.independent and given.centered and given.replayable(subject.space):
        return given, None
    return Gaussian(), f"measured with Gaussian directions in place of {given}, to whose groups N would have to fit."


def _cheapest(needed: dict[str, advice.Need], calls: probes.Calls) -> str:
    if not calls.repeatable:
        return "antithetic"  # one center's luck in all differences does not average out
    return min(needed.values(), key=lambda need: need.evaluations).method


def _unresolved(whole: Length) -> str:
    if math.isinf(whole.at_least()):
        return "no gradient shows"
    return f"no gradient shows above the noise in these evaluations; N is more than {whole.at_least():.3g}"
