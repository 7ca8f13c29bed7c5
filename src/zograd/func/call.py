"""One call of a decorated function: its estimate, made when autograd asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.streams import draw_seed
from zograd.estimate.estimate import estimate
from zograd.evaluators.task.objective import Objective
from zograd.tracking import RunningEstimate, watched

if TYPE_CHECKING:
    from zograd._base.trees import Arguments, Space
    from zograd.estimate.result import Estimate
    from zograd.estimate.settings import Settings
    from zograd.evaluators.task.answer import Facts


@dataclass
class Call:
    """One call of a decorated function.

    Attributes:
        fn: the function.
        arguments: the arguments, taken apart, without their tensors, which autograd has to see as inputs.
        positions: where the tensors are, among the leaves.
        chosen: which of the tensors are differentiated.
        facts: what earlier calls have shown about ``fn``.
        settings: what the estimate is made of.
        space: the layout of the differentiated tensors.
        seed: the seed of the estimate; None to draw one.
        generator: where it is drawn from.
    """

    fn: Callable[..., Any]
    arguments: Arguments
    positions: tuple[int, ...]
    chosen: tuple[int, ...]
    facts: Facts
    settings: Settings
    space: Space
    seed: int | None
    generator: torch.Generator | None

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Sequence[Any]], Any] = tuple) -> Estimate:
        """Draw the seed and estimate.

        Args:
            tensors: those of the call.
            structure: makes the user's structure of a tuple of leaves.

        Returns:
            The estimate.
        """
        leaves = self.arguments.leaves.copy()
        for k, position in enumerate(self.positions):
            if k not in self.chosen:
                t = tensors[k]  # detached, so that what fn computes with it has no way into the caller's graph
                leaves[position] = t.detach().requires_grad_() if t.requires_grad else t
        params = tuple([tensors[k].detach() for k in self.chosen])
        arguments = replace(self.arguments, leaves=leaves)
        objective = Objective(self.fn, arguments, params, self.facts, self.settings.failures)
        if not watched():  # the smallest estimate has no time to lose
            return self._estimate(objective, params, structure)
        with RunningEstimate(objective.name, self.settings.evaluations) as running:
            objective.counted = running.count
            made = self._estimate(objective, params, structure)
            running.finish(
                made.seed,
                made.value.item() if made.value.numel() == 1 else None,
                None if made.flat is None else made.flat.norm().item(),
                evaluations=made.evaluations,
                failures=made.failures,
            )
        return made

    def _estimate(
        self, objective: Objective, params: tuple[torch.Tensor, ...], structure: Callable[[Sequence[Any]], Any]
    ) -> Estimate:
        seed = draw_seed(self.seed, self.generator)  # after the budget was asked: an error must not cost a draw
        return estimate(objective, self.settings, params, self.space, seed, structure)
