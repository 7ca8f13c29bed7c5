"""``check_distribution``: the properties that a family of directions says it has, compared with samples."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.trees import Space, take_apart
from zograd.diagnostics.distribution import limits
from zograd.diagnostics.distribution.draws import INDEPENDENCE_TESTS, independence, replay
from zograd.diagnostics.distribution.groups import dense, groups
from zograd.diagnostics.distribution.moments import Moments
from zograd.diagnostics.distribution.report import FALSE_ALARM, DistributionReport, Finding
from zograd.distributions.adapter import DistributionLike, Sampled, adapt
from zograd.distributions.directions import Directions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zograd.distributions.base import Distribution

_CALLS = 256  # of a user's `sample`, which are slow


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
    moments = Moments(family, space, seed)
    for rows in groups(family, space, seed):
        moments.add(rows)
    ratio, speed = _speed(family, space)
    z = limits.normal(FALSE_ALARM, moments.tests)
    return DistributionReport(
        name=str(family),
        dim=space.size,
        directions=moments.directions,
        mean=moments.mean(z),
        covariance=moments.covariance(z),
        fourth_moment=moments.fourth(z),
        replay=replay(family, space, seed),
        agreement=_agreement(family, space, seed),
        independence=independence(family, space, seed, limits.normal(FALSE_ALARM, INDEPENDENCE_TESTS)),
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


def _agreement(family: Distribution, space: Space, seed: int) -> Finding:
    """Compare the dense directions, by way of points, with the family's own sums and products."""
    num = min(8, family.rows(space, 8))
    directions = Directions(family, space, seed, num)
    noise = directions.noise(0, num)
    rows = dense(directions, 0, num).double()
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


def _best(run: Callable[[int], Any]) -> float:
    times = []
    for k in range(5):
        start = time.perf_counter()
        run(k)
        times.append(time.perf_counter() - start)
    return min(times)
