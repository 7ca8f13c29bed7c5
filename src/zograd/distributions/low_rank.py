"""Gaussian directions of low rank in each weight matrix."""

from __future__ import annotations

import functools
import math
import warnings
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from zograd._base import checks
from zograd.distributions.base import Noise, Tiled
from zograd.distributions.factored import Factored
from zograd.errors import ZeroOrderWarning

if TYPE_CHECKING:
    from zograd._base.trees import Leaves, Space

_TOGETHER = 16  # rows whose sum is one thin product, which passes once over the gradient


class _Leaf(NamedTuple):
    """Where a leaf's factors are in a row of noise; without ``out`` it is dense."""

    start: int
    middle: int
    stop: int
    out: int
    rest: int


class LowRank(Tiled):
    r"""Directions of rank r in each leaf of two or more dimensions, Gaussian ones in the others.

    .. math:: \epsilon = \frac{1}{\sqrt r} A B^\top, \qquad A_{ik}, B_{jk} \sim \mathcal{N}(0, 1)

    A leaf counts as the matrix of its first dimension by the rest. The covariance is the identity for every rank, so
    the mean is the gradient up to :math:`O(\sigma^2)`. What makes it fast is a network under ``evaluator="vmap"``: all
    directions share the product with the weights and add a thin one each, in linear layers, matrix products, embeddings
    and convolutions, of a module as it is. Other uses of a weight see the dense sum. The sum over the directions of a
    block is one thin product a leaf. Under the other evaluators each point is dense.

    Recurrent layers have no vectorized form in torch: use ``evaluator="loop"``. There is no form by slices
    (``batch_dim``).

    Args:
        rank: the rank r, at least 1; above the smaller dimension of a leaf it gains nothing, and a warning says so.

    Raises:
        TypeError: if ``rank`` is not an int.
        ValueError: if it is below 1; of an estimate, with ``batch_dim``.

    Examples:
        >>> import torch, zograd
        >>> layer, x = torch.nn.Linear(8, 4), torch.randn(16, 8)
        >>> class Hits(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = layer
        ...
        ...     def forward(self, x):
        ...         return (self.layer(x).argmax(dim=1) != 0).float().mean()
        >>> options = {"method": "antithetic", "num_samples": 32, "sigma": 0.1, "evaluator": "vmap"}
        >>> zograd.nn.ZeroOrder(Hits(), zograd.distributions.LowRank(rank=1), **options)(x).backward()
        >>> layer.weight.grad.shape
        torch.Size([4, 8])

    References:
        Sarkar et al., "Evolution strategies at the hyperscale" (arXiv:2511.16652).
    """

    parallel: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def __init__(self, rank: int = 1) -> None:
        self.rank: int = checks.integer(rank, "`LowRank(rank=...)`", least=1)

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank})"

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Standard normal values."""
        out.normal_(generator=generator)

    def width(self, space: Space) -> int:
        """Values of both factors of each matrix, and of the other leaves."""
        return _layout(space.shapes, self.rank)[-1].stop

    def rows(self, space: Space, num: int) -> int:
        """As many rows as make about 2**16 values, or more if they take no more room than the parameters do."""
        if space.batch_dim is not None:
            raise ValueError(
                f"`zero_order({self}, batch_dim={space.batch_dim})`: LowRank has no form by slices: use a dense "
                "distribution, `Gaussian()` or `Rademacher()`, with `batch_dim`."
            )
        return max(super().rows(space, num), min(_TOGETHER, space.size // self.width(space)))

    def parts(self, space: Space, noise: Noise) -> Noise:
        """For each leaf its two factors, (rows, out, rank) and (rows, rest, rank), or the values by (rows, shape)."""
        rows, parts = noise[0], []
        num = rows.shape[0]
        for leaf, shape in zip(_layout(space.shapes, self.rank), space.shapes, strict=True):
            if leaf.out:
                parts.append(rows[:, leaf.start : leaf.middle].view(num, leaf.out, self.rank))
                parts.append(rows[:, leaf.middle : leaf.stop].view(num, leaf.rest, self.rank))
            else:
                parts.append(rows[:, leaf.start : leaf.stop].view(num, *shape))
        return tuple(parts)

    def shift(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """Each leaf moved in the compute dtype and rounded once."""
        pieces, out = iter(parts), []
        for leaf, param, s in zip(_layout(space.shapes, self.rank), params, scale, strict=True):
            if not leaf.out:
                out.append(torch.add(param.to(space.dtype), next(pieces), alpha=s).to(param.dtype))
                continue
            left, right = next(pieces), next(pieces)
            shape = (*left.shape[:-2], *param.shape)
            weight = param.to(space.dtype).reshape(leaf.out, leaf.rest)
            moved = _moved(space, weight, left, right, s / math.sqrt(self.rank))
            out.append(moved.view(shape).to(param.dtype))
        return tuple(out)

    def factor(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """The same point, the matrices with their factors kept apart; for one row of ``parts``."""
        pieces = iter(parts)
        out: list[torch.Tensor] = []
        for leaf, param, s in zip(_layout(space.shapes, self.rank), params, scale, strict=True):
            if leaf.out:
                out.append(Factored(param, next(pieces) * (s / math.sqrt(self.rank)), next(pieces)))
            else:
                out.append(torch.add(param.to(space.dtype), next(pieces), alpha=s).to(param.dtype))
        return tuple(out)

    def mirrored(self, space: Space, parts: Noise, sides: tuple[float, ...]) -> Noise:
        """The parts of ``side * eps`` for each side, side after side."""
        pieces, out = iter(parts), []
        for leaf in _layout(space.shapes, self.rank):
            first = next(pieces)
            out.append(torch.cat([first * side for side in sides]))
            if leaf.out:
                out.append(torch.cat([next(pieces)] * len(sides)))
        return tuple(out)

    def add_sum(self, space: Space, noise: Noise, c: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """One thin product a leaf and block."""
        flat = torch.empty(space.size, dtype=space.dtype, device=space.device)
        pieces = iter(self.parts(space, noise))
        for leaf, (lo, hi) in zip(_layout(space.shapes, self.rank), space.bounds, strict=True):
            first = next(pieces)
            if leaf.out:
                left = (first * (c / math.sqrt(self.rank)).unsqueeze(2)).transpose(0, 1).reshape(leaf.out, -1)
                right = next(pieces).transpose(0, 1).reshape(leaf.rest, -1)
                torch.mm(left, right.t(), out=flat[lo:hi].view(leaf.out, leaf.rest))
            else:
                flat[lo:hi] = torch.mv(first.flatten(1).t() if first.dim() > 1 else first.unsqueeze(0), c[:, 0])
        # Not addmm: its bits depend on what was summed before.
        return flat if out is None else out.add_(flat)

    def dot(self, space: Space, noise: Noise, vector: torch.Tensor) -> torch.Tensor:
        """The factors contracted with each leaf of the vector."""
        pieces, total = iter(self.parts(space, noise)), torch.zeros(noise[0].shape[0], 1).to(vector)
        for leaf, (lo, hi) in zip(_layout(space.shapes, self.rank), space.bounds, strict=True):
            first = next(pieces)
            if leaf.out:
                inner = vector[lo:hi].view(leaf.out, leaf.rest) @ next(pieces)
                total += (first * inner).sum(dim=(1, 2)).unsqueeze(1) / math.sqrt(self.rank)
            else:
                total += first.reshape(first.shape[0], -1) @ vector[lo:hi].unsqueeze(1)
        return total


def _moved(space: Space, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    if left.shape[-1] == 1:
        return torch.addcmul(weight, left, right.mT, value=scale)
    with space.full_precision():
        if left.dim() == 2:
            return torch.addmm(weight, left, right.t(), alpha=scale)
        return torch.baddbmm(weight.expand(left.shape[0], -1, -1), left, right.mT, alpha=scale)


@functools.lru_cache(maxsize=256)
def _layout(shapes: tuple[torch.Size, ...], rank: int) -> tuple[_Leaf, ...]:
    leaves, start = [], 0
    for shape in shapes:
        if len(shape) < 2 or not shape.numel():
            leaves.append(_Leaf(start, start, start + shape.numel(), 0, 0))
        else:
            out, rest = shape[0], shape.numel() // shape[0]
            if rank > min(out, rest):
                warnings.warn(
                    f"`LowRank(rank={rank})` is above the smaller dimension of a leaf of shape {tuple(shape)}, "
                    f"{min(out, rest)}: dense directions (`Gaussian()`) cost less there.",
                    ZeroOrderWarning,
                    stacklevel=2,
                )
            leaves.append(_Leaf(start, start + out * rank, start + (out + rest) * rank, out, rest))
        start = leaves[-1].stop
    return tuple(leaves)
