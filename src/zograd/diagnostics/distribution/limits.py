"""Limits of test statistics: how far right directions may be off by chance."""

from statistics import NormalDist


def normal(false_alarm: float, tests: int) -> float:
    """Return the normal law's limit for one of so many tests, which fail together with that probability."""
    return NormalDist().inv_cdf(1 - false_alarm / 2 / tests)


def student(z: float, freedom: int) -> float:
    """Return Student's quantile where the normal law has z, by Cornish and Fisher.

    Deviations are those of the samples.

    Args:
        z: the quantile of the normal law.
        freedom: degrees of freedom, the samples less one.

    Returns:
        The quantile.
    """
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
