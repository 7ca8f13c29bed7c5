"""Second derivatives from the values of an estimate, by Stein's identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd._base.trees import Space
    from zograd.distributions.directions import Directions
    from zograd.schemes import Scheme


def differences(scheme: Scheme, directions: Directions, values: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    r"""The second difference along each direction, minus a baseline from the other directions.

    .. math:: h_i = \sum_j \frac{w_j}{c_j} (f_{ij} - f_0), \qquad \tilde h_i = h_i - \frac{1}{N - 1} \sum_{k \ne i} h_k

    The weights :math:`w_j / c_j` make the Hessian that of the smoothed function whose gradient the scheme estimates.
    The baseline is the mean over what is independent of direction i: other directions, or other groups in a family
    whose directions depend on each other; there may be none.

    Args:
        scheme: the offsets and weights.
        directions: the directions.
        values: of shape (N, sides, *out).
        center: the value at the center, of shape ``out``.

    Returns:
        float64, of shape (N, *out).
    """
    sides = zip(values.unbind(1), scheme.sides, strict=True)
    weights = {c: w / c for c, w in zip(scheme.offsets, scheme.weights, strict=True) if c}
    rows = torch.stack([weights[c] * (column - center) for column, c in sides]).sum(dim=0)
    num = rows.shape[0]
    if directions.distribution.independent:
        return rows if num == 1 else (rows - rows.mean(dim=0)) * (num / (num - 1))
    total = rows.sum(dim=0)
    groups = torch.split(rows, directions.distribution.group(directions.space, num))
    if len(groups) == 1:
        return rows
    return torch.cat([group - (total - group.sum(dim=0)) / (num - len(group)) for group in groups])


def hessian_product(
    space: Space,
    sigma: tuple[float, ...],
    weights: torch.Tensor,
    vector: torch.Tensor,
    contract: Callable[[torch.Tensor], torch.Tensor],
    project: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    r"""Compute the Hessian's product with a vector.

    .. math:: \hat H v = \frac{1}{N \sigma^2} \sum_i \tilde h_i (\epsilon_i \epsilon_i^\top - I) v

    Args:
        space: the layout of the parameters.
        sigma: the smoothing radius of each leaf.
        weights: the second differences, of shape (N, slices).
        vector: flat, of shape (size,).
        contract: makes a flat gradient of coefficients (N, slices), as ``directions.contract`` does.
        project: its transpose.

    Returns:
        A flat vector.
    """
    flat = contract(weights * project(vector) * weights.shape[0])
    leaves = zip(space.split(vector), sigma, strict=True)
    scaled = space.join(tuple(leaf / radius**2 for leaf, radius in leaves)).view(space.slices, space.dim)
    return flat - (scaled * weights.mean(dim=0).to(scaled).unsqueeze(1)).view(-1)


def refused(reason: str) -> str:
    """What the error says where there is no second derivative."""
    return (
        "a second derivative was asked for (create_graph=True, or a nested torch.func transform), and this estimate "
        f"has none: {reason}. If the outer derivative does not concern the decorated function, detach its gradient."
    )
