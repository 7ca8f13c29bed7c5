"""``check_distribution``: is a family of directions what it says?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.trees import Space, take_apart
from zograd.diagnostics.distribution.moments import Moments, Samplings, dense, student
from zograd.diagnostics.distribution.table import table
from zograd.distributions.adapter import DistributionLike, Sampled, adapt
from zograd.distributions.directions import Directions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.distributions.base import Distribution

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
    """What :func:`check_distribution` found; true where the family is what it says.

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
        """All of them, in the order of the table."""
        return (
            self.mean,
            self.covariance,
            self.fourth_moment,
            self.replay,
            self.agreement,
            self.independence,
            self.speed,
        )

    def __bool__(self) -> bool:
        return all(finding.ok is not False for finding in self.findings)

    def summary(self) -> str:
        """One line: the family, and what does not hold."""
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
        """The table, where IPython or a notebook shows what a cell returns."""
        printer.text(str(self))


def check_distribution(
    d: DistributionLike | None, shape: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> DistributionReport:
    r"""Look whether a distribution of directions is what it says, :math:`s \, \mathbb{E}[\epsilon \epsilon^\top] = I`.

    Tested are the mean of every value and along some random vectors (zero, unless the family says otherwise); the
    square of every value and the products along these vectors against the family's own covariance statement, the
    identity for most; the fourth moment, where it says that its marginals are Gaussian; replay (one seed, same bits,
    over any span); that points, weighted sums and products with a vector are made of the same directions; and that
    groups of directions and different seeds are independent. A right family fails with a probability of 1e-4 at most:
    each test compares with the normal law at 1e-4 over the number of tests, corrected for skewness.

    Args:
        d: what ``zero_order(distribution=...)`` accepts.
        shape: the shape of the differentiated tensor, or a list of shapes.
        dtype: of the parameters.
        seed: of the directions that are looked at.

    Returns:
        The report: a table when printed, true if all holds.

    Raises:
        TypeError: if ``d`` is no distribution or ``shape`` not made of integers.
        ValueError: if there are no values.

    Examples:
        >>> import torch, zograd
        >>> bool(zograd.diagnostics.check_distribution(zograd.distributions.Sphere(), (20,)))
        True
        >>> report = zograd.diagnostics.check_distribution(lambda shape: 1.1 * torch.randn(shape), (20,))
        >>> bool(report), report.covariance.ok, report.mean.ok
        (False, False, True)
    """
    family, space = adapt(d, "check_distribution"), _space(shape, dtype)
    samplings = Samplings.of(family, space, seed)
    moments = Moments(family, space, seed)
    directions = 0
    for rows in samplings.batches():
        moments.add(rows)
        directions += rows.shape[0] * rows.shape[1]
    ratio, speed = _speed(family, space)
    return DistributionReport(
        name=str(family),
        dim=space.size,
        directions=directions,
        mean=_mean(moments),
        covariance=_covariance(moments),
        fourth_moment=_fourth(moments),
        replay=_replay(family, space, seed),
        agreement=_agreement(family, space, seed),
        independence=_independence(family, space, seed),
        speed=speed,
        kurtosis=moments.kurtosis(),
        slowdown=ratio,
    )


def _space(shape: Any, dtype: torch.dtype) -> Space:
    given: Sequence[Any] = (shape,) if isinstance(shape, int) else tuple(shape)
    several = bool(given) and all(isinstance(s, (tuple, list)) for s in given)
    shapes = [tuple(s) for s in given] if several else [tuple(given)]
    for size in take_apart(shapes)[0]:
        try:
            given_size = checks.integer(size, "a size")
        except TypeError:
            raise TypeError(f"`check_distribution(shape=...)` must hold integers, got {shape!r:.80}.") from None
        if given_size < 1:
            raise ValueError(f"`check_distribution(shape=...)` must be of sizes of at least 1, got {shape!r:.80}.")
    return Space(tuple(torch.Size(map(int, s)) for s in shapes), (dtype,) * len(shapes), torch.device("cpu"))


def limit(tests: int) -> float:
    """The normal law's limit for one of so many tests."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / 2 / tests)


def _mean(moments: Moments) -> Finding:
    if not moments.family.centered:
        return Finding("mean", None, "not zero, as it says; only differences make a gradient")
    worst, off = moments.worst_mean(limit(moments.tests))
    return Finding("mean", worst <= 1, f"0 within {off:.2g} for every value", worst)


def _covariance(moments: Moments) -> Finding:
    worst, off = moments.worst_covariance(limit(moments.tests))
    detail = "as stated" if worst <= 1 else "not as stated"
    return Finding("covariance", worst <= 1, f"{detail}; largest deviation {off:.2g}", worst)


def _fourth(moments: Moments) -> Finding:
    kurtosis = f"kurtosis {moments.kurtosis():.3f}"
    if not moments.family.gaussian_marginals:
        return Finding("fourth moment", None, f"{kurtosis}; it does not say that its marginals are Gaussian")
    worst = moments.worst_fourth(limit(moments.tests))
    return Finding("fourth moment", worst <= 1, f"{kurtosis}, 3 for Gaussian marginals", worst)


def _blocks(family: Distribution, space: Space, seed: int) -> Directions:
    rows = family.rows(space, 1 << 16)
    return Directions(family, space, seed, rows + min(rows, 5))


def _copies(noise: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [part.clone() for part in noise]


def _replay(family: Distribution, space: Space, seed: int) -> Finding:
    if not family.replayable(space):
        return Finding("replay", None, "not replayable, as it says: directions are kept, and other processes have none")
    first, again = _blocks(family, space, seed), _blocks(family, space, seed)
    block, num = first.block, len(first)
    wholes = {lo: _copies(first.noise(lo, hi)) for lo, hi in first.blocks()}
    spans = [(block, num), (0, block), (block // 2, block), (block - 1, block), (num - 1, num), (0, 1)]
    wrong = [
        (lo, hi)
        for lo, hi in spans
        for got, whole in zip(again.noise(lo, hi), wholes[lo // block * block], strict=True)
        if not torch.equal(got, whole[lo % block : lo % block + hi - lo])
    ]
    detail = f"other bits at directions {wrong[0]}" if wrong else f"same bits over {len(spans)} spans"
    return Finding("replay", not wrong, detail, float(len(wrong)))


def _agreement(family: Distribution, space: Space, seed: int) -> Finding:
    """The dense directions, by way of points, against the family's own sums and products."""
    num = min(8, family.rows(space, 8))
    directions = Directions(family, space, seed, num)
    noise = directions.noise(0, num)
    rows = dense(family, space, noise).double()
    generator = torch.Generator().manual_seed(seed % (1 << 32))
    vector = torch.randn(space.size, generator=generator, dtype=space.dtype)
    c = torch.randn(num, 1, generator=generator, dtype=space.dtype)
    product = family.dot(space, noise, vector)[:, 0].double()
    total = family.add_sum(space, noise, c, None).double()
    eps = torch.finfo(space.dtype).eps
    allowed = 16 * eps * math.sqrt(space.size + num)
    off_product = float((product - rows @ vector.double()).abs().max() / (rows.norm(dim=1).max() + 1e-30))
    off_sum = float((total - rows.T @ c[:, 0].double()).abs().max() / (rows.abs().max() * c.norm() + 1e-30))
    worst = max(off_product, off_sum) / allowed
    detail = f"points, sums and products agree within {max(off_product, off_sum):.1e}"
    return Finding("agreement", worst <= 1, detail if worst <= 1 else f"they differ by {worst * allowed:.1e}", worst)


def _independence(family: Distribution, space: Space, seed: int) -> Finding:
    """Correlate neighboring groups, and the first groups of neighboring seeds, along random vectors."""
    pairs = Samplings.of(family, space, seed).pairs()
    if not pairs:
        return Finding("independence", None, "one group of directions is too large to look at two")
    generator = torch.Generator().manual_seed((seed + 1) % (1 << 32))
    vectors = torch.randn(space.size, _ALONG, generator=generator, dtype=torch.float64)
    along = [torch.stack([group.double() @ vectors for group in pair]) for pair in pairs]
    worst, largest, bound = 0.0, 0.0, limit(2 * _ALONG * _SHARES)
    for power in (1, 2):
        off, error, num = _correlation([pair**power for pair in along], rowwise=family.independent)
        allowed = student(bound, num - 1) * error + _EXACT
        worst, largest = max(worst, float((off.abs() / allowed).max())), max(largest, float(off.abs().max()))
    return Finding("independence", worst <= 1, f"correlation between groups and seeds at most {largest:.2g}", worst)


_ALONG = 4  # random vectors
_EXACT = 1e-6
_SHARES = 16  # these tests are few; a sixteenth of the false alarms is theirs


def _correlation(pairs: list[torch.Tensor], *, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The correlation of two groups' values (2, rows, vectors), its standard error and the number of samples.

    Samples are rows where these are independent, else the means over a pair's rows.

    Returns:
        All three, the first two by vector.
    """
    mean = torch.cat([pair.flatten(0, 1) for pair in pairs]).mean(dim=0)
    variance = torch.cat([(pair - mean).square().flatten(0, 1) for pair in pairs]).mean(dim=0).clamp_min(1e-12)
    products = [(pair[0] - mean) * (pair[1] - mean) / variance for pair in pairs]
    samples = torch.cat(products) if rowwise else torch.stack([p.mean(dim=0) for p in products])
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples)), len(samples)


def _speed(family: Distribution, space: Space) -> tuple[float, Finding]:
    num = family.rows(space, max(1, (1 << 16) // space.size))
    num = min(num, _CALLS) if isinstance(family, Sampled) else num
    noise = family.empty(space, num)
    values = num * space.size
    ours = _best(lambda k: family.draw(space, noise, k, 0))
    generator = torch.Generator()
    randn = _best(lambda k: torch.randn(values, dtype=space.dtype, generator=generator))
    ratio = ours / randn
    return ratio, Finding("speed", None, f"{ratio:.2g} times what torch.randn takes for {values} values")


_CALLS = 256  # of a user's `sample`, which are slow


def _best(run: Any) -> float:
    times = []
    for k in range(5):
        start = time.perf_counter()
        run(k)
        times.append(time.perf_counter() - start)
    return min(times)
