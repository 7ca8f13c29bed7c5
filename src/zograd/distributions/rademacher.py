"""Independent signs."""

from __future__ import annotations

import functools

import torch

from zograd.distributions.base import Dense

# By dtype: the integer of its width, the bits of the sign, the bits of 1.0.
_BITS = {
    torch.float32: (torch.int32, 32, -(1 << 31), 0x3F800000),
    torch.float64: (torch.int64, 64, -(1 << 63), 0x3FF0000000000000),
}


class Rademacher(Dense):
    r"""Directions of independent signs, :math:`\epsilon_k = \pm 1` with probability one half each.

    Of all distributions with independent coordinates it has the smallest variance on a quadratic: :math:`(d - 1)
    \lVert g \rVert^2 / N` for antithetic differences where the Gaussian has :math:`(d + 1) \lVert g \rVert^2 / N`. With
    one direction it is SPSA. The mean is :math:`\nabla f + O(\sigma^2)`, not the gradient of the Gaussian smoothing.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(zograd.distributions.Rademacher(), method="antithetic", sigma=0.1)
        ... def square(x):
        ...     return (x**2).sum()
        >>> square.estimate(torch.tensor([3.0])).grad  # exact in one dimension
        tensor([6.0000])

    References:
        Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation" (1992).
    """

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Signs, one random bit each."""
        integer, width, sign, one = _BITS[out.dtype]
        random = torch.empty(-(-out.numel() // 64), dtype=torch.int64, device=out.device)
        random.random_(-(1 << 63), None, generator=generator)
        whole = out.numel() % 64 == 0
        signs = (out.view(integer) if whole else out.new_empty(random.numel() * 64).view(integer)).view(-1, width)
        # Shift each of a word's bits to the sign's place, drop the others, and put the bits of 1.0 below it.
        torch.bitwise_left_shift(random.view(integer).unsqueeze(1), _shifts(integer, width, out.device), out=signs)
        signs.bitwise_and_(sign).bitwise_or_(one)
        if not whole:
            out.copy_(signs.view(-1)[: out.numel()].view(out.dtype))


@functools.cache
def _shifts(integer: torch.dtype, width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(width, dtype=integer, device=device)
