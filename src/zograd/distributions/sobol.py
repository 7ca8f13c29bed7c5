"""Quasi-random Gaussian directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.quasirandom import SobolEngine

from zograd._base.streams import Purpose, key
from zograd.distributions.base import BLOCK, Dense, Noise

if TYPE_CHECKING:
    from zograd._base.trees import Space

LEAST = 256  # points of one sequence that are made together at least, however large they are


class Sobol(Dense):
    r"""Points of a scrambled Sobol sequence, made Gaussian by the inverse normal distribution function.

    .. math:: \epsilon_{ij} = \Phi^{-1}(u_{ij})

    The points u fill the unit cube more evenly than independent ones, and each of them alone is uniform in it: the mean
    is :math:`\nabla f_\sigma`, for any ``fn``. On smooth functions of few parameters, or of which few matter, the error
    falls faster than :math:`1 / \sqrt N`; N a power of two is best. With many more parameters than directions little is
    gained: ``Orthogonal()`` does more there.

    Directions come in groups of points of one sequence, a power of two of them: about :math:`2^{16} / d`, 256 at least.
    Groups have a scrambling of their own and are independent; a last one that is not whole is the beginning of a
    sequence. With ``batch_dim`` each slice has its own. The sequences are made on the CPU; the scrambling takes a few
    kB a parameter and group.

    Raises:
        ValueError: when used with more than 21201 parameters (in one slice), torch's limit for the sequence.

    Examples:
        >>> import torch, zograd
        >>> options = {"method": "antithetic", "num_samples": 256, "sigma": 0.1, "seed": 0}
        >>> fn = zograd.zero_order(zograd.distributions.Sobol(), **options)(lambda x: (x * x.cos()).sum())
        >>> rough = fn.replace(distribution=None)
        >>> x = torch.zeros(3)
        >>> bool((fn.estimate(x).grad - 1).norm() < (rough.estimate(x).grad - 1).norm() / 2)
        True

    References:
        Owen, "Scrambling Sobol' and Niederreiter-Xing points" (1998); Buchholz et al., "Quasi-Monte Carlo variational
        inference" (arXiv:1807.01604).
    """

    gaussian_marginals: ClassVar[bool] = True
    independent: ClassVar[bool] = False
    parallel: ClassVar[bool] = True

    def rows(self, space: Space, num: int) -> int:
        """A power of two of points."""
        if space.dim > SobolEngine.MAXDIM:
            raise ValueError(
                f"`zero_order(Sobol())` has at most {SobolEngine.MAXDIM} dimensions, torch's limit for the sequence, "
                f"got {space.dim} parameters: use `Orthogonal()` or `Hadamard()`."
            )
        fitting = max(LEAST, BLOCK // space.size)
        return min(1 << (fitting.bit_length() - 1), num)

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Not used: a point is no sequence of independent values."""
        raise NotImplementedError

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """One scrambled sequence a slice."""
        rows = noise[0].view(-1, space.slices, space.dim)
        for k in range(space.slices):
            points = _points(space.dim, rows.shape[0], key(seed, Purpose.DIRECTION, block * space.slices + k))
            rows[:, k] = torch.special.ndtri(points).to(rows.dtype).to(rows.device)


def _points(dim: int, num: int, seed: int) -> torch.Tensor:
    """The sequence's first points in float64, in the middle of their cells: never 0 or 1, and symmetric."""
    engine = SobolEngine(dim, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    unit = 2.0**-engine.MAXBIT
    # The engine keeps its first point in the default dtype, whose rounding may make it 1.
    first = engine.quasi.to(torch.float64).mul(unit).unsqueeze(0)
    return torch.cat([first, engine.draw(num, dtype=torch.float64)[1:]]) + unit / 2
