"""How many directions an estimate takes, where that is not a number given beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zograd._base import checks

__all__ = ["Until"]


@dataclass(frozen=True)
class Until:
    r"""Take directions until the gradient rises above its noise, or a bound is reached.

    .. math:: \sqrt{\max(0, \lVert \hat g \rVert^2 - \lVert \widehat{se} \rVert^2)} \ge \mathrm{snr} \,
              \lVert \widehat{se} \rVert

    Directions come in rounds; after each the signal-to-noise ratio of all so far is looked at, and the next round is as
    large as the last one lets expect, at most as many again. The ratio grows with the root of the number of directions:
    1 is a cosine of about .7 to the target, 2 one of .9, 3 of .95.

    **Bias.** An estimate that looks large by chance stops early, so that its mean is longer than the gradient, in its
    direction: on linear functions of 2 to 100 parameters up to 9 percent for ``snr=1``, 5 for 2 and 1 for 5. For an
    unbiased estimate give a number.

    Args:
        snr: the ratio to reach, positive.
        at_most: the bound on the directions, with which the estimate ends as it is; a budget counts with it. It must
            be given, and be no less than ``at_least``.
        at_least: directions of the first round; more of a family whose directions depend on each other, two whole
            groups.

    Raises:
        ValueError: if a number is out of its range, or there is no bound.
        TypeError: if one of them is not a number.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(num_samples=zograd.Until(snr=2, at_most=1000), seed=0)
        ... def fn(x):
        ...     return x.sum()
        >>> estimate = fn.estimate(torch.zeros(5))
        >>> estimate.snr() > 2, len(estimate.directions) < 100
        (True, True)
    """

    snr: float
    at_most: int | None = None
    at_least: int = 16

    def __post_init__(self) -> None:
        typed = f"`Until(snr={self.snr!r}, at_most={self.at_most!r}, at_least={self.at_least!r})`"
        object.__setattr__(self, "snr", checks.number(self.snr, f"{typed}: `snr`", checks.POSITIVE_FINITE))
        if self.at_most is None:
            raise ValueError(f"{typed} needs a bound: where there is no gradient no number of directions is enough.")
        for name in ("at_most", "at_least"):
            object.__setattr__(self, name, checks.integer(getattr(self, name), f"{typed}: `{name}`"))
        if not 2 <= self.at_least <= self.at_most:
            default = " (16 unless it is given)" if self.at_least == 16 else ""
            raise ValueError(f"{typed}: `at_least`{default} must lie between 2 and `at_most`, got {self.at_least}.")

    @property
    def bound(self) -> int:
        """The most directions that an estimate takes."""
        assert self.at_most is not None
        return self.at_most

    def first(self, group: int) -> int:
        """Directions of the first round, of a family with groups of this size."""
        return self._whole(max(self.at_least, 2 * group), group)

    def following(self, num: int, snr: float, group: int) -> int:
        """Directions by the end of the next round, after one with this ratio."""
        wanted = num * (self.snr / snr) ** 2 if snr > 0 else math.inf
        return self._whole(math.ceil(min(2.0 * num, max(1.1 * num, wanted))), group)

    def _whole(self, num: int, group: int) -> int:
        return min(self.bound, -(-num // group) * group)
