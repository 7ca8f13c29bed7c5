"""Independent standard normal directions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from zograd.distributions.base import Dense

if TYPE_CHECKING:
    import torch


class Gaussian(Dense):
    r"""Directions :math:`\epsilon \sim \mathcal{N}(0, I_d)`, the default.

    The estimate then has the mean :math:`\nabla f_\sigma(\theta)`, :math:`f_\sigma(\theta) = \mathbb{E}[f(\theta +
    \sigma \epsilon)]`, for every ``sigma`` and for any ``fn``, smooth or not, by schemes with the offsets 0 and ±1;
    other offsets see other radii, see :class:`~zograd.schemes.Scheme`.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(zograd.distributions.Gaussian(), method="antithetic", num_samples=1000, seed=0)
        ... def fn(x):
        ...     return (3 * x).sum()
        >>> fn.estimate(torch.zeros(2)).grad.round()
        tensor([3., 3.])

    References:
        Nesterov & Spokoiny, "Random gradient-free minimization of convex functions" (2017); arXiv:1703.03864.
    """

    gaussian_marginals: ClassVar[bool] = True
    parallel: ClassVar[bool] = True

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Standard normal values."""
        out.normal_(generator=generator)
