"""Directions from the rows of a Hadamard matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from zograd._base.streams import Purpose, key
from zograd.distributions.base import TILE, Dense, Noise, fill_tiles
from zograd.distributions.rademacher import Rademacher

if TYPE_CHECKING:
    from zograd._base.trees import Space

MOST = 1 << 22  # values in a block: those of larger groups are made part by part
_SIGNS = Rademacher()


class Hadamard(Dense):
    r"""Rows of the Hadamard matrix of order :math:`n = 2^k \ge d`, in random order and under random signs.

    .. math:: \epsilon_{ij} = H_{\pi(i) j} \, s_j, \qquad H_{ij} = (-1)^{\text{number of ones in } i \wedge j},
              \quad j < d

    Every direction is a vector of signs, of length :math:`\sqrt d`. All n of them together have :math:`\frac1n \sum_i
    \epsilon_i \epsilon_i^\top = I`: at N = n an antithetic estimate of a quadratic is exact. Below that they are rows
    drawn without replacement, with the error :math:`\frac{d - 1}{N} \frac{n - N}{n - 1} \lVert g \rVert^2` where
    independent signs have :math:`\frac{d - 1}{N} \lVert g \rVert^2`. If d is not a power of two, rows cut to d values
    are not quite orthogonal, and exactness takes the whole n < 2d of them.

    Directions come in groups of n; above that, groups are independent of each other, with signs and an order of their
    own. With ``batch_dim`` each slice has its own, n following from one slice. A direction costs O(d) operations, and
    no group is held whole that does not fit into 4 million values, so that it suits thousands of parameters where
    ``Orthogonal()`` does not. The mean is the gradient up to :math:`O(\sigma^2)`, as for all signs.

    Examples:
        >>> import torch, zograd
        >>> scale = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0])
        >>> @zograd.zero_order(zograd.distributions.Hadamard(), method="antithetic", num_samples=8, sigma=0.5)
        ... def quadratic(x):
        ...     return (scale * x**2).sum() / 2
        >>> quadratic.estimate(torch.ones(5)).grad  # 8 is the next power of two
        tensor([ 1.0000, -2.0000,  3.0000,  0.5000,  4.0000])

    References:
        Choromanski et al., "Structured evolution with compact architectures for scalable policy optimization"
        (arXiv:1804.02395).
    """

    independent: ClassVar[bool] = False

    def group(self, space: Space, num: int) -> int:
        """All rows of the matrix, or as many as are asked for."""
        return min(_order(space.dim), num)

    def rows(self, space: Space, num: int) -> int:
        """A group, or the part of it that there is room for."""
        return min(_part(space), num)

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Signs."""
        _SIGNS.fill(out, generator)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """The block's rows, built up by doubling: the right half of a row is its left half, or minus that."""
        order = _order(space.dim)
        group, start = divmod(block * _part(space), order)
        signs, index = self._group(space, seed, group, noise[0])
        index = index[start : start + noise[0].shape[0]].reshape(-1, 1)
        out = noise[0].view(-1, space.dim)
        out[:, 0] = 1
        for bit in range(order.bit_length() - 1):
            low, high = 1 << bit, min(2 << bit, space.dim)
            sign = (1 - 2 * (index >> bit & 1)).to(out.dtype)
            torch.mul(out[:, : high - low], sign, out=out[:, low:high])
        noise[0].mul_(signs)

    def _group(self, space: Space, seed: int, group: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Signs (size,) and the order of the rows, (n, slices)."""
        streams = -(-space.size // TILE) + 1
        signs = like.new_empty(space.size)
        fill_tiles(self.fill, signs, seed, group * streams + 1)
        generator = torch.Generator().manual_seed(key(seed, Purpose.DIRECTION, group * streams))
        orders = [torch.randperm(_order(space.dim), generator=generator) for _ in range(space.slices)]
        return signs, torch.stack(orders, dim=1).to(like.device)


def _order(dim: int) -> int:
    """The least power of two that is not below ``dim``."""
    return 1 << (dim - 1).bit_length()


def _part(space: Space) -> int:
    """Rows in a block: a power of two, so that whole blocks make a group."""
    fitting: int = max(1, MOST // space.size)
    return min(_order(space.dim), 1 << (fitting.bit_length() - 1))
