"""Report on a family of directions: one finding a property, and a table when printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FALSE_ALARM = 1e-4
"""The probability that a right family fails one report, all its tests together."""


@dataclass(frozen=True)
class Finding:
    """One property of a family.

    Attributes:
        name: the property.
        ok: whether it holds; None where there was nothing to test.
        detail: what was measured.
        worst: the largest deviation, in units of what is allowed.
    """

    name: str
    ok: bool | None
    detail: str
    worst: float = 0.0


@dataclass(frozen=True, repr=False)
class DistributionReport:
    """Findings of :func:`check_distribution`; true if the family is what it says.

    Attributes:
        name: the family.
        dim: values of a direction.
        directions: how many were looked at.
        mean: whether their mean is zero.
        covariance: whether it is as stated.
        fourth_moment: whether the marginals are Gaussian, where the family says so.
        replay: whether one seed gives the same bits, over any span.
        agreement: whether points, sums and products are made of the same directions.
        independence: whether groups of directions, and seeds, are independent.
        speed: the time for a value beside ``torch.randn``.
        kurtosis: the measured fourth moment over the squared variance, 3 for Gaussian marginals.
        slowdown: the time for a value, in units of ``torch.randn``'s.
    """

    name: str
    dim: int
    directions: int
    mean: Finding
    covariance: Finding
    fourth_moment: Finding
    replay: Finding
    agreement: Finding
    independence: Finding
    speed: Finding
    kurtosis: float
    slowdown: float

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the table."""
        return tuple(part for part in vars(self).values() if isinstance(part, Finding))

    def __bool__(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)

    def summary(self) -> str:
        """Return one line: the family, and the properties that do not hold."""
        wrong = ", ".join(f"{f.name} ({f.detail})" for f in self.findings if f.ok is False)
        return f"{self.name} is as it says" if not wrong else f"{self.name}: WRONG {wrong}"

    def __str__(self) -> str:
        words = {True: "ok", False: "WRONG", None: "-"}
        rows = [(f.name, f"{words[f.ok]:<5}  {f.detail}") for f in self.findings]
        rows.append(("", f"a right family fails with probability {FALSE_ALARM:g} at most"))
        return table(f"{self.name}, {self.dim} values: {self.directions} directions looked at", rows)

    def __repr__(self) -> str:
        wrong = [f.name for f in self.findings if f.ok is False]
        return f"DistributionReport({self.name}, size={self.dim}, directions={self.directions}, wrong={wrong})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show the table where IPython or a notebook shows the value of a cell."""
        printer.text(str(self))


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """Return two columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "-" * len(title), *(f"{name:<{width}}  {text}".rstrip() for name, text in rows)])
