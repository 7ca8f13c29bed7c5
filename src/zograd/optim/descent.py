"""One step of gradient descent on an estimate, in place, without room for a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from zograd.distributions.directions import contract

if TYPE_CHECKING:
    from zograd._base.trees import Leaves
    from zograd.distributions.directions import Directions
    from zograd.optim.records import Group


def update(params: Leaves, groups: list[Group], directions: Directions, coefficients: list[float]) -> None:
    """One step of gradient descent on the estimate, leaf by leaf and run by run."""
    settings = [group for group in groups for _ in group.trained]
    chosen = [params[i] for group in groups for i in group.trained]
    still = {k for k, i in enumerate(i for group in groups for i in group.trained) if i in settings[k].unused}
    with directions.space.full_precision():
        gradient = _gradient(directions, coefficients, tuple(group.sigma for group in settings))
        for k, (param, group) in enumerate(zip(chosen, settings, strict=True)):
            if group.lr == 0 or k in still:
                continue
            contiguous = param.detach().contiguous()
            flat = contiguous.view(-1)
            lo, _ = directions.space.bounds[k]
            for start, piece in gradient(k):
                _descend(flat[start - lo : start - lo + piece.numel()], piece, group)
            if contiguous.data_ptr() != param.data_ptr():
                param.copy_(contiguous)


def _descend(param: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
    exact = param.to(gradient.dtype)
    if group.weight_decay:
        gradient = gradient.add(exact, alpha=group.weight_decay)
    exact.add_(gradient, alpha=-group.lr)
    if exact.dtype != param.dtype:
        param.copy_(exact)


def _gradient(
    directions: Directions, coefficients: list[float], sigma: tuple[float, ...]
) -> Callable[[int], Iterator[tuple[int, torch.Tensor]]]:
    """The gradient of a leaf by runs: where one begins, and its values. In the order of WeightedMean's sums."""
    space, num = directions.space, len(directions)
    c = torch.tensor(coefficients, dtype=space.dtype, device=space.device)
    if not directions.tiled:
        flat = contract(directions, sigma, c.unsqueeze(1))
        return lambda k: iter([(space.bounds[k][0], flat[slice(*space.bounds[k])])])

    def runs(k: int) -> Iterator[tuple[int, torch.Tensor]]:
        divisor = num / directions.distribution.scale(space) * sigma[k]
        for first, *others in zip(*(directions.entries(i, *space.bounds[k]) for i in range(num)), strict=True):
            total = first[1] * c[0]
            for i, (_, eps) in enumerate(others, 1):
                total.addcmul_(eps, c[i])
            yield first[0], total.div_(divisor)

    return runs
