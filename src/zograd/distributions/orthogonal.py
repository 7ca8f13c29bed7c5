"""Directions that are orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from zograd._base.execution import one_thread
from zograd.distributions.base import TILE, Dense, Noise, fill_tiles

if TYPE_CHECKING:
    from zograd._base.trees import Space

LENGTHS = ("chi", "sqrt_d")


class Orthogonal(Dense):
    r"""Directions that are orthogonal to each other and uniform over all such frames (Haar), in the whole vector.

    .. math:: \epsilon_i = \ell_i \, q_i, \qquad q_i^\top q_j = \delta_{ij}, \qquad \mathbb{E}\,\ell_i^2 = d

    No direction repeats what another has seen. For every ``fn``, and for naive, forward and antithetic differences
    alike, lengths ``"chi"`` lower the mean squared error of N <= d independent Gaussian directions by :math:`\frac{N -
    1}{N} \lVert \nabla f_\sigma \rVert^2`. That is nearly all of it at N = d for antithetic differences of a smooth
    ``fn``, and next to nothing of what the level of ``fn`` adds to naive values. On a quadratic, antithetic differences
    have the error :math:`(\frac{d + 2}{N} - 1) \lVert g \rVert^2`, and with lengths ``"sqrt_d"`` :math:`(\frac{d}{N} -
    1) \lVert g \rVert^2`: none at N = d.

    Directions come in groups of d; above that, groups are independent of each other, and a last one that is not whole
    is some of a frame's vectors. With ``batch_dim`` each slice has frames of its own, of the size of one slice. Making
    them takes :math:`O(d N^2)` operations and room for min(d, N) directions: where d and N are both in the thousands,
    ``Hadamard()`` costs less.

    Args:
        lengths: ``"chi"``: each direction is as long as a Gaussian one, so that its marginals are standard normal and
            the mean is :math:`\nabla f_\sigma`, exactly, for any ``fn``. ``"sqrt_d"``: all have the length
            :math:`\sqrt d`, with less variance and the mean of ``Sphere()``.

    Raises:
        ValueError: if ``lengths`` is neither.

    Examples:
        >>> import torch, zograd
        >>> scale = torch.tensor([1.0, -2.0, 3.0, 0.5])
        >>> family = zograd.distributions.Orthogonal(lengths="sqrt_d")
        >>> @zograd.zero_order(family, method="antithetic", num_samples=4, sigma=0.1)
        ... def quadratic(x):
        ...     return (scale * x**2).sum() / 2
        >>> grad = quadratic.estimate(torch.ones(4)).grad  # of as many directions as parameters
        >>> (grad - scale).abs().max() < 1e-4
        tensor(True)

    References:
        Choromanski et al., "Structured evolution with compact architectures for scalable policy optimization"
        (arXiv:1804.02395); Stewart (1980), Mezzadri (arXiv:math-ph/0609050) on the signs that make QR uniform.
    """

    independent: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    parallel: ClassVar[bool] = True

    def __init__(self, lengths: str = "chi") -> None:
        if lengths not in LENGTHS:
            raise ValueError(
                f"`Orthogonal(lengths=...)` must be one of {', '.join(map(repr, LENGTHS))}, got {lengths!r}."
            )
        self.lengths: str = lengths

    @property
    def gaussian_marginals(self) -> bool:  # type: ignore[override]
        """Whether the lengths are those of Gaussian directions."""
        return self.lengths == "chi"

    def rows(self, space: Space, num: int) -> int:
        """One frame, or as much of it as is asked for."""
        return min(space.dim, num)

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Standard normal values, to be orthogonalized."""
        out.normal_(generator=generator)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Orthogonalize normal vectors."""
        tiles = -(-space.dim * space.size // TILE)  # of a whole frame: a last, partial one keeps its keys
        fill_tiles(self.fill, noise[0].view(-1), seed, block * tiles)
        rows = noise[0].view(-1, space.slices, space.dim).transpose(0, 1)
        # A Gaussian vector's length is independent of its direction, and so of the frame made of the directions.
        lengths = _norms(rows) if self.lengths == "chi" else space.dim**0.5
        rows.copy_(_frame(rows) * lengths)

    def __repr__(self) -> str:
        return f"Orthogonal(lengths={self.lengths!r})"


def _frame(rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the rows span, uniform if they are normal."""
    with one_thread():
        q: torch.Tensor
        r: torch.Tensor
        q, r = torch.linalg.qr(rows.mT)
    # QR leaves the signs to the algorithm; with a positive diagonal it is unique, and uniform as its input is.
    return (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT


def _norms(rows: torch.Tensor) -> torch.Tensor:
    # Tile by tile: the bits of one long reduction would depend on the number of threads.
    squares = [
        torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=torch.float64).square()
        for t in torch.split(rows, TILE, dim=-1)
    ]
    return torch.stack(squares).sum(dim=0).sqrt().to(rows.dtype)
