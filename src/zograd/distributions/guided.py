"""Gaussian directions that favor a subspace."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from zograd._base import checks
from zograd._base.buffers import memory
from zograd._base.execution import one_thread
from zograd._base.trees import take_apart
from zograd.distributions.base import TILE, Dense, Noise, fill_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd._base.trees import Space

_RANK = 1e-6  # below, float32 surrogates differ by rounding only


class Guided(Dense):
    r"""Gaussian directions stretched along a subspace that is thought to hold the gradient (Guided ES).

    .. math:: \epsilon \sim \mathcal{N}(0, S), \qquad
              S = \alpha I + (1 - \alpha) \frac dk U U^\top, \qquad \operatorname{tr} S = d

    U is an orthonormal basis of the k surrogate gradients: those of a coarser model, of earlier steps, of synthetic
    gradients. With the trace d a direction is as long as those of other families, so that ``sigma`` means the same.

    The estimate is biased on purpose: its mean on a linear function is S times the gradient. What lies in the subspace
    is multiplied by :math:`\alpha + (1 - \alpha) \frac dk`, the rest by :math:`\alpha`, and both stay descent
    directions; divide the learning rate by the first number if the surrogates are good. :meth:`covariance` multiplies
    a vector by S. With few directions the gain is a factor of up to d / k in the evaluations that a gradient inside the
    subspace takes; a gradient outside of it costs what it costs ``Gaussian()``.

    Where leaves have a ``sigma`` each, the subspace is that of the surrogates in units of sigma, in which points are
    drawn: a gradient that lies in their span is seen as such, and multiplied by the same number.

    The basis belongs to the parameters it was made for; where it changes, give a new one by
    ``fn.replace(distribution=Guided(basis))``. With ``batch_dim`` each slice has its own part of it.

    Args:
        basis: the surrogate gradients, copied: a matrix of shape (d, k), one a column, or a tree in the structure of
            the differentiated arguments, or a list of such trees. Linearly independent, k <= d (of one slice), each
            tree with a leaf for every differentiated tensor. They need not be orthogonal or of one length.
        alpha: how much of the directions' square length is spread over the whole space, in [0, 1]. With 0 nothing
            outside the subspace is seen, with 1 the basis is not used.

    Raises:
        TypeError: if ``basis`` holds anything but real tensors, or ``alpha`` is no number.
        ValueError: if ``alpha`` is out of its range, ``basis`` is empty or not finite; when used, if it does not fit
            the parameters or is rank-deficient.

    Examples:
        >>> import torch, zograd
        >>> slope = torch.linspace(-1, 1, 1000)
        >>> surrogate = slope + 0.5 * torch.randn(1000)
        >>> options = {"method": "antithetic", "num_samples": 20, "sigma": 0.1, "seed": 0}
        >>> family = zograd.distributions.Guided(surrogate)
        >>> fn = zograd.zero_order(family, **options)(lambda x: (slope * x).sum())
        >>> grad = fn.estimate(torch.zeros(1000)).grad
        >>> torch.cosine_similarity(grad, slope, dim=0) > 0.5  # 0.14 without the surrogate
        tensor(True)

    References:
        Maheswaranathan et al., "Guided evolutionary strategies: augmenting random search with surrogate gradients"
        (arXiv:1806.10230).
    """

    parallel: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    def __init__(self, basis: Any, alpha: float = 0.5) -> None:
        self.alpha: float = float(checks.number(alpha, "`Guided(alpha=...)`", checks.UNIT))
        # Copies: directions are made again in backward, and a buffer of surrogates may have moved on by then.
        self._leaves: tuple[torch.Tensor, ...] = tuple(_checked(leaf) for leaf in take_apart(basis)[0])
        if not sum(leaf.numel() for leaf in self._leaves):
            raise ValueError(f"`Guided(basis=...)` must hold a surrogate gradient at least, got {basis!r:.80}.")
        self._made: tuple[Space, torch.Tensor] | None = None
        self._sigma: tuple[float, ...] | None = None  # of each leaf, where they differ

    def at_radii(self, sigma: tuple[float, ...]) -> Guided:
        """The same surrogates in units of the smoothing radius of each leaf."""
        if len(set(sigma)) == 1:
            return self
        scaled = copy.copy(self)
        scaled._sigma, scaled._made = tuple(s / max(sigma) for s in sigma), None
        return scaled

    def rows(self, space: Space, num: int) -> int:
        """As many rows as make about 2**16 values, once the basis is known to fit."""
        self.subspace(space)
        return super().rows(space, num)

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Standard normal values."""
        out.normal_(generator=generator)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Normal values in the whole space, and some for the subspace added."""
        basis = self.subspace(space)
        rows, width = noise[0].shape[0], basis.shape[0] * basis.shape[2]
        whole = super().rows(space, rows)
        tiles, inner = -(-whole * space.size // TILE), -(-whole * width // TILE)
        start = block * (tiles + inner)
        fill_tiles(self.fill, noise[0].view(-1), seed, start)
        weights = noise[0].new_empty(rows, width)
        fill_tiles(self.fill, weights.view(-1), seed, start + tiles)
        by_slice = weights.view(rows, space.slices, -1).transpose(0, 1)
        with one_thread():
            inside = torch.bmm(by_slice, basis.mT).transpose(0, 1).reshape(rows, -1)
        noise[0].mul_(math.sqrt(self.alpha)).add_(inside, alpha=math.sqrt(self._inside(basis)))

    def covariance(self, space: Space, vector: torch.Tensor) -> torch.Tensor:
        """S times a vector of shape (size,); where leaves have a radius each, S is in units of it."""
        basis, radii = self.subspace(space), self._radii(space).to(vector)
        pieces = vector.view(space.slices, space.dim, 1) * radii
        projected = basis.to(vector) @ (basis.to(vector).mT @ pieces)
        return ((self.alpha * pieces + self._inside(basis) * projected) / radii).view(-1)

    def subspace(self, space: Space) -> torch.Tensor:
        """The orthonormal basis U of each slice, of shape (slices, dim, k).

        Args:
            space: the layout of the parameters.

        Returns:
            The basis in the compute dtype.

        Raises:
            ValueError: if the surrogates do not fit the layout or are linearly dependent.
        """
        if self._made is None or self._made[0] != space:
            self._made = space, _orthonormal(self._columns(space) * self._radii(space)).to(space.dtype)
        return self._made[1]

    def _radii(self, space: Space) -> torch.Tensor:
        """The radius at each value, (slices, dim, 1) in float64; 1 where there is one for all."""
        if self._sigma is None:
            return torch.ones(1, 1, 1, dtype=torch.float64, device=space.device)
        leaves = zip(space.shapes, self._sigma, strict=True)
        flat = space.join(tuple(torch.full(shape, radius, device=space.device) for shape, radius in leaves))
        return flat.to(torch.float64).view(space.slices, space.dim, 1)

    def _inside(self, basis: torch.Tensor) -> float:
        return (1 - self.alpha) * basis.shape[1] / basis.shape[2]

    def _columns(self, space: Space) -> torch.Tensor:
        """The surrogates as columns, (slices, dim, k) in float64."""
        first, leaves = self._leaves[0], [leaf.to(space.device, torch.float64) for leaf in self._leaves]
        if len(leaves) == 1 and first.dim() == 2 and first.shape[0] == space.size:
            return leaves[0].view(space.slices, space.dim, first.shape[1])
        num, rest = divmod(len(leaves), len(space.shapes))
        if rest or [leaf.shape for leaf in leaves] != list(space.shapes) * num:
            raise ValueError(
                f"`Guided(basis=...)` must be of shape ({space.size}, k), or trees with the shapes of the "
                f"differentiated tensors, {_shapes(space.shapes)}, got {_shapes([leaf.shape for leaf in leaves])}."
            )
        trees = zip(*[iter(leaves)] * len(space.shapes), strict=True)
        flat = [space.join(tree).to(torch.float64).view(space.slices, space.dim) for tree in trees]
        return torch.stack(flat, dim=2)

    def __repr__(self) -> str:
        digest = functools.reduce(_digest, self._leaves, 0)  # what records of a run are compared by
        return f"Guided(basis=<{_shapes([leaf.shape for leaf in self._leaves])}, {digest:08x}>, alpha={self.alpha})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Guided):
            return False
        mine, others = self._leaves, other._leaves
        same = (self.alpha, self._sigma, len(mine)) == (other.alpha, other._sigma, len(others))
        return same and all(map(torch.equal, mine, others))

    def __hash__(self) -> int:
        return hash((type(self), self.alpha))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def _digest(so_far: int, leaf: torch.Tensor) -> int:
    return zlib.crc32(memory(leaf), so_far)


def _shapes(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _checked(leaf: Any) -> torch.Tensor:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.layout != torch.strided:
        got = leaf.dtype if isinstance(leaf, torch.Tensor) else f"{type(leaf).__name__} {leaf!r:.80}"
        raise TypeError(f"`Guided(basis=...)` must hold dense tensors of real floating-point numbers, got {got}.")
    if not torch.isfinite(leaf).all():
        raise ValueError(
            f"`Guided(basis=...)` must be finite, got {int((~torch.isfinite(leaf)).sum())} values of {leaf.numel()} "
            "that are not."
        )
    return leaf.detach().clone(memory_format=torch.contiguous_format)


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the span of the columns, (slices, dim, k)."""
    dim, k = columns.shape[1:]
    if not 1 <= k <= dim:
        raise ValueError(f"`Guided(basis=...)` must have 1 to d columns, d = {dim} values of a slice, got {k}.")
    unit = columns / columns.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    with one_thread():
        q: torch.Tensor
        q, r = torch.linalg.qr(unit)
        least = float(torch.linalg.svdvals(r).min())
    if least < _RANK:
        raise ValueError(
            f"`Guided(basis=...)` must have full rank, got {k} surrogate gradients of which some are zero or nearly "
            f"combinations of others (least singular value {least:.1e} at unit lengths): drop them."
        )
    return q
