"""Plain finite differences: one parameter at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

from zograd._base.streams import Purpose, key
from zograd.distributions.base import Distribution, Noise

if TYPE_CHECKING:
    from zograd._base.trees import Leaves, Space


class Coordinate(Distribution):
    r"""Unit vectors, each of which moves one parameter: plain finite differences, ``sigma`` being the step h.

    .. math:: \frac{\partial f}{\partial \theta_k} \approx \frac1h \sum_j w_j f(\theta + h c_j e_k)

    ``num_samples=None`` means every coordinate once: the result is what finite differences give, without chance. Its
    error is :math:`\frac h2 f''` for ``"forward"``, :math:`\frac{h^2}6 f'''` for ``"antithetic"`` (central differences)
    and :math:`O(h^4)` for ``"fourth_order"``; ``"naive"`` takes no difference and is refused. Rounding of
    relative size :math:`\varepsilon` adds about :math:`\varepsilon |f| / h` to central differences and twice that to
    forward ones, so that the best step is about :math:`2 \sqrt{\varepsilon |f| / |f''|}` for forward and
    :math:`\sqrt[3]{3 \varepsilon |f| / |f'''|}` for central differences: in float32, with f and its
    derivatives near 1, 0.0005 and 0.006.

    With N < d, a random subset of N coordinates is looked at and the others get zero, all times d / N: the mean over
    seeds is the whole gradient. With N > d there are whole passes over all coordinates, independent of each other, and
    a remainder visits a random subset once more, which weights these coordinates more in this one estimate: take a
    multiple of d, and that only for an ``fn`` with noise. With ``batch_dim`` each slice has an order of its own, and d
    counts one slice's parameters. Directions are kept as indices, never as a matrix.

    Examples:
        >>> import torch, zograd
        >>> options = {"method": "antithetic", "num_samples": None, "sigma": 0.5}
        >>> @zograd.zero_order(zograd.distributions.Coordinate(), **options)
        ... def cubic(x):
        ...     return (x**3).sum()
        >>> x = torch.tensor([1.0, 2.0, -1.0])
        >>> cubic.estimate(x).grad  # 3 x^2 + h^2
        tensor([ 3.2500, 12.2500,  3.2500])
        >>> cubic.estimate(x).evaluations
        7

    References:
        Berahas et al., "A theoretical and empirical comparison of gradient approximations in derivative-free
        optimization" (arXiv:1905.01332).
    """

    independent: ClassVar[bool] = False
    centered: ClassVar[bool] = False
    finite: ClassVar[bool] = True

    def scale(self, space: Space) -> float:
        """The number of coordinates: each has one chance in that many."""
        return float(space.dim)

    def rows(self, space: Space, num: int) -> int:
        """One pass over all coordinates, or as much of it as is asked for."""
        return min(space.dim, num)

    def empty(self, space: Space, rows: int) -> Noise:
        """One index for each direction and slice."""
        return (torch.empty(rows, space.slices, dtype=torch.int64, device=space.device),)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """The first of a random order of the coordinates."""
        # Made on the CPU, so that the order is the same on every device.
        generator = torch.Generator().manual_seed(key(seed, Purpose.DIRECTION, block))
        for column in noise[0].unbind(1):
            column.copy_(torch.randperm(space.dim, generator=generator)[: column.shape[0]])

    def parts(self, space: Space, noise: Noise) -> Noise:
        """The indices."""
        return noise

    def shift(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """A copy of each leaf, one value of all moved in the compute dtype and rounded once."""
        index = parts[0].view(-1, space.slices)
        lead = parts[0].shape[:-1]
        out = []
        for k, (param, s) in enumerate(zip(params, scale, strict=True)):
            point = param.new_empty(lead + param.shape).copy_(param)
            row, where = _places(space, k, index)
            flat = point.view(index.shape[0], -1)
            flat[row, where] = (flat[row, where].to(space.dtype) + s).to(param.dtype)
            out.append(point)
        return tuple(out)

    def add_sum(self, space: Space, noise: Noise, c: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Each coefficient goes to its own place."""
        places = (noise[0] + _starts(space)).view(-1)
        if out is None:
            return torch.zeros(space.size, dtype=space.dtype, device=space.device).index_add(0, places, c.reshape(-1))
        return out.index_add_(0, places, c.reshape(-1))

    def dot(self, space: Space, noise: Noise, vector: torch.Tensor) -> torch.Tensor:
        """The entries of the vector."""
        return vector[noise[0] + _starts(space)]


def _starts(space: Space) -> torch.Tensor:
    """Where each slice begins in the flat layout."""
    return torch.arange(space.slices, device=space.device) * space.dim


def _places(space: Space, k: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that move a value of leaf k, and its place in the leaf's own flat order."""
    start, stop = space.bounds[k]
    row, piece = ((index >= start) & (index < stop)).nonzero(as_tuple=True)
    local = index[row, piece] - start
    if space.batch_dim is None:
        return row, local
    inner = math.prod(space.shapes[k][space.batch_dim + 1 :])  # values of one slice that lie together
    return row, local // inner * (space.slices * inner) + piece * inner + local % inner
