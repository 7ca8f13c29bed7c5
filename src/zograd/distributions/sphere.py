"""Directions on a sphere."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from zograd.distributions.base import TILE, Dense, Noise

if TYPE_CHECKING:
    from zograd._base.trees import Space


class Sphere(Dense):
    r"""Directions uniform on the sphere of radius :math:`\sqrt d` in the whole parameter vector.

    The estimate has the mean :math:`\nabla \mathbb{E}[f(\theta + \sigma \sqrt{d} \, u)]` with u uniform in the unit
    *ball*. Its variance on a quadratic is that of signs, :math:`(d - 1) \lVert g \rVert^2 / N` for antithetic
    differences, and no direction is unusually long or short. With ``batch_dim`` each slice has a sphere of its own.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(zograd.distributions.Sphere(), num_samples=1, sigma=1.0)
        ... def squared_length(x):
        ...     return x.square().sum()
        >>> squared_length.estimate(torch.zeros(16)).coefficients.round()  # the radius squared
        tensor([16.], dtype=torch.float64)

    References:
        Flaxman et al., "Online convex optimization in the bandit setting" (arXiv:cs/0408007).
    """

    parallel: ClassVar[bool] = True

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Standard normal values, whose direction is uniform."""
        out.normal_(generator=generator)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Normal vectors, brought to the radius."""
        super().draw(space, noise, seed, block)
        rows = noise[0].view(-1, space.dim)
        # Tile by tile: the bits of one long reduction would depend on the number of threads.
        squares = [
            torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).square() for t in torch.split(rows, TILE, dim=1)
        ]
        length = torch.stack(squares).sum(dim=0).sqrt()
        rows.mul_((space.dim**0.5 / length).to(rows.dtype).unsqueeze(1))
