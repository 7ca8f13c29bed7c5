"""Report of a check: an object with fields, and a table when printed."""

from __future__ import annotations

import importlib
import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zograd.diagnostics.distribution.report import table

if TYPE_CHECKING:
    from zograd.diagnostics.distribution.report import DistributionReport
    from zograd.diagnostics.function.advice import Need, Suggestion
    from zograd.diagnostics.function.autograd import Autograd
    from zograd.diagnostics.function.calls import Calls
    from zograd.diagnostics.function.noise import Noise
    from zograd.diagnostics.function.pickling import Pickling
    from zograd.diagnostics.function.radii import Radius
    from zograd.diagnostics.function.vectorized import Vectorized


@dataclass(frozen=True, repr=False)
class CheckReport:
    """Findings of :func:`zograd.check`; true if nothing speaks against the setup.

    Attributes:
        name: the function.
        dim: differentiated values.
        shape: of what it returns; of several values one random combination is looked at.
        evaluations: of the function, all in all.
        calls: value, whether two calls agree, what they draw from and change, seconds.
        noise: what stays in a difference of two values with one random state.
        pickling: whether it reaches another process.
        vectorized: what ``torch.vmap`` makes of it.
        autograd: how the smoothed gradient compares with autograd's.
        sweep: bias and deviation over sigma.
        roundoff_sigma: below it, rounding (or the steps of a function that jumps) is more than a tenth of the
            differences.
        noise_sigma: likewise for the noise of a function that is random with one random state.
        needed: directions and evaluations for a cosine of 0.9 by method, at the suggested sigma; empty if none works.
        given_cosine: the cosine to expect of the settings that it is decorated with, or None.
        distribution: the report on the distribution that it is decorated with, or None.
        suggestion: what to use.
        problems: what makes a gradient wrong or useless.
        notes: what one should know.
    """

    name: str
    dim: int
    shape: tuple[int, ...]
    evaluations: int
    calls: Calls
    noise: Noise
    pickling: Pickling
    vectorized: Vectorized
    autograd: Autograd
    sweep: tuple[Radius, ...]
    roundoff_sigma: float
    noise_sigma: float
    needed: dict[str, Need]
    given_cosine: float | None
    distribution: DistributionReport | None
    suggestion: Suggestion
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        rows = [*self._about_calls(), *self._about_gradients(), *self._about_settings()]
        rows += [("PROBLEM", text) for text in self.problems] + [("note", text) for text in self.notes]
        rows = [(label if line == 0 else "", part) for label, text in rows for line, part in enumerate(_lines(text))]
        return table(f"{self.name}: {self.dim} parameters, {self.evaluations} evaluations", rows)

    def __repr__(self) -> str:
        name, ok = self.name.strip("`"), bool(self)
        return (
            f"CheckReport({name}, parameters={self.dim}, evaluations={self.evaluations}, ok={ok}, "
            f"problems={len(self.problems)}, suggestion={self.suggestion})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the table where IPython or a notebook shows the value of a cell."""
        printer.text(str(self))

    @property
    def _limit(self) -> str:
        """Name of the limit below which a sigma is of no use."""
        return "limit of steps" if self.noise.kind == "steps" else "round-off limit"

    def _about_calls(self) -> list[tuple[str, str]]:
        c, v = self.calls, self.vectorized
        again = "yes" if c.deterministic else "no, but with one random state" if c.repeatable else "no"
        vmaps = f"yes, {v.looped / v.seconds:.2g} x the loop's speed" if v.works and v.seconds else "no"
        if v.works and not v.same:
            vmaps = f"with OTHER VALUES (relative difference {v.difference:.1e})"
        return [
            ("value", f"{c.value:.6g}" + (f", of a result of shape {self.shape}" if self.shape else "")),
            ("deterministic", again + (f"; draws from {', '.join(c.draws)}" if c.draws else "")),
            ("changes", ", ".join(c.changed) or "nothing"),
            ("pickles", "yes" if self.pickling.works else f"no: {_short(self.pickling.error)}"),
            ("vectorizes", vmaps if v.works else f"no: {_short(v.error)}"),
            ("one call", _seconds(c.seconds)),
            ("noise floor", "none seen" if not self.noise.level else f"{self.noise.level:.2g} ({self.noise.kind})"),
        ]

    def _about_gradients(self) -> list[tuple[str, str]]:
        a = self.autograd
        truth = f"no: {_short(a.error)}"
        if a.differentiable:
            truth = f"cosine {a.cosine:.4f}, scale {a.scale:.4f} ± {a.scale_error:.4f}"
        rows = [("beside autograd", truth), (self._limit, f"sigma = {self.roundoff_sigma:.2g}")]
        if self.noise_sigma:
            rows.append(("noise limit", f"sigma = {self.noise_sigma:.2g}"))
        lines = [_line(radius) for radius in self.sweep]
        return rows + [("" if k else "bias, deviation", line) for k, line in enumerate(lines)]

    def _about_settings(self) -> list[tuple[str, str]]:
        s = self.suggestion
        num = "not known" if s.num_samples is None else str(s.num_samples)
        sigma = "none found" if s.sigma is None else f"{s.sigma:.2g}"
        rows = [("" if k else "N for cosine 0.9", _need(need)) for k, need in enumerate(self.needed.values())]
        if self.given_cosine is not None:
            rows.append(("as decorated", f"a cosine of about {self.given_cosine:.2f} with the smoothed gradient"))
        if self.distribution is not None:
            rows.append(("distribution", self.distribution.summary()))
        rows.append(("SUGGESTED", f"method={s.method!r}, sigma={sigma}, num_samples={num}, evaluator={s.evaluator!r}"))
        return rows + [("", reason) for reason in s.reasons]

    def plot(self, ax: Any = None) -> Any:
        """Draw bias and deviation over sigma, with the limits and the suggestion marked.

        Args:
            ax: the axes to draw on; None makes new ones.

        Returns:
            The axes (``.figure`` is what one saves).

        Raises:
            ImportError: without matplotlib.
        """
        ax = ax if ax is not None else importlib.import_module("matplotlib.pyplot").subplots(figsize=(7, 4.2))[1]
        known = [r for r in self.sweep if r.deviation > 0]
        sigmas = [r.sigma for r in known]
        num = self.suggestion.num_samples or 1
        ax.plot(sigmas, [r.deviation / math.sqrt(num) for r in known], "o-", label=f"deviation of {num} directions")
        ax.plot(sigmas, [r.bias if r.bias > 0 else math.nan for r in known], "s-", label="bias")
        floor = [r for r in known if r.bias_limit > 0]
        ax.fill_between(
            [r.sigma for r in floor], 1e-12, [r.bias_limit for r in floor], alpha=0.15, color="C1", lw=0,
            label="bias, two standard errors included",
        )  # fmt: skip
        _limits(ax, self)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="sigma",
            ylabel="relative to the gradient's length",
            title=self.name.strip("`"),
        )
        lows = [x for r in known for x in (r.bias, r.deviation / math.sqrt(num)) if x > 0]
        if lows:
            ax.set_ylim(max(min(lows) / 3, 1e-9), None)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize="small", frameon=False)
        return ax


def _limits(ax: Any, report: CheckReport) -> None:
    for at, text, color in (
        (report.roundoff_sigma, report._limit, "C3"),
        (report.noise_sigma, "noise limit", "C4"),
        (report.suggestion.sigma, "suggested", "C2"),
    ):
        if at:
            ax.axvline(at, ls="--", color=color, label=text)


def _lines(text: str) -> list[str]:
    """Return lines that leave the table a hundred characters wide, the further ones indented."""
    return textwrap.wrap(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _short(text: str | None) -> str:
    line = (text or "").strip().split("\n")[0]
    return line if len(line) <= 88 else f"{line[:85]}..."


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _line(radius: Radius) -> str:
    if radius.error is not None:
        return f"sigma {radius.sigma:<8.2g} {_short(radius.error)}"
    if math.isnan(radius.bias):
        return f"sigma {radius.sigma:<8.2g} no gradient shows above the noise"
    if radius.is_reference:
        bias = "reference"
    elif radius.bias_limit == 0:
        bias = "bias 0"
    else:
        bias = f"bias {radius.bias:.1e}" if radius.bias > 0 else f"bias below {radius.bias_limit:.1e}"
    return f"sigma {radius.sigma:<8.2g} {bias}, deviation of one direction {radius.deviation:.2g}"


def _need(need: Need) -> str:
    if math.isfinite(need.num_samples):
        return f"{need.method}: {math.ceil(need.num_samples)} directions, {math.ceil(need.evaluations)} evaluations"
    least = "unknown" if math.isinf(need.at_least) else f"more than {math.ceil(need.at_least)} directions"
    return f"{need.method}: {least} (a larger budget would tell)"
