"""Second derivatives from the values of an estimate, by Stein's identity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zograd.distributions.sums import by_slice, contract, project
from zograd.shaping import leave_one_out

if TYPE_CHECKING:
    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution
    from zograd.distributions.directions import Directions
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping


def refusal(distribution: Distribution, shaping: Shaping | None, num: int, *, scalar: bool) -> str | None:
    """Why the estimates of these settings have no second derivative, or None if they have one.

    Args:
        distribution: the family of the directions.
        shaping: what is done to the values.
        num: how many directions there are.
        scalar: whether ``fn`` returns one value (one a slice).

    Returns:
        The reason with the way out.
    """
    if not distribution.gaussian_marginals:
        return f"Stein's identity needs Gaussian marginals, which {distribution} has not: use `Gaussian()`"
    if shaping not in (None, leave_one_out):
        return f"`shaping={getattr(shaping, '__name__', shaping)}` changes what is estimated: use `shaping=None`"
    if not scalar and not (distribution.independent and num > 1):
        return (
            "for a function of several values it needs two independent directions or more, got "
            f"num_samples={num} of {distribution}"
        )
    return None


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
    directions: Directions, sigma: tuple[float, ...], weights: torch.Tensor, vector: torch.Tensor
) -> torch.Tensor:
    r"""The Hessian's product with a vector.

    .. math:: \hat H v = \frac{1}{N \sigma^2} \sum_i \tilde h_i (\epsilon_i \epsilon_i^\top - I) v

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
        weights: the second differences, of shape (N, slices).
        vector: flat, of shape (size,).

    Returns:
        A flat vector.
    """
    num = len(directions)
    flat = contract(directions, sigma, weights * project(directions, sigma, vector) * num)
    return flat - identity_term(directions.space, sigma, weights, vector)


def identity_term(space: Space, sigma: tuple[float, ...], weights: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """``mean_i(h_i) v / sigma**2``, slice by slice."""
    leaves = zip(space.split(vector), sigma, strict=True)
    scaled = space.join(tuple(leaf / radius**2 for leaf, radius in leaves)).view(space.slices, space.dim)
    return (scaled * weights.mean(dim=0).to(scaled).unsqueeze(1)).view(-1)


def by_direction(values: torch.Tensor, space: Space) -> torch.Tensor:
    """Second differences of an objective of one value a slice, (N, *out), as (N, slices)."""
    return by_slice(values, space, 1).squeeze(2)


def refused(reason: str) -> str:
    """What the error says where there is no second derivative."""
    return (
        "a second derivative was asked for (create_graph=True, or a nested torch.func transform), and this estimate "
        f"has none: {reason}. If the outer derivative does not concern the decorated function, detach its gradient."
    )
