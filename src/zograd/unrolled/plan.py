"""One window of all particles: how it is called, and the gradient of what comes back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from zograd._base.trees import Arguments, Leaves, Space, flatten, sigma_per_leaf, unsupported
from zograd.distributions.directions import Directions
from zograd.errors import ZeroOrderWarning
from zograd.estimate.result import Estimate
from zograd.estimate.settings import Settings, check_gradient
from zograd.evaluators.task.answer import Facts
from zograd.evaluators.task.objective import Objective
from zograd.evaluators.task.points import check_radii, warn_below_resolution
from zograd.func.autograd import is_tracked
from zograd.tracking import RunningEstimate
from zograd.unrolled.particles import SIDES, Particles, Values, draw, evaluate

if TYPE_CHECKING:
    from zograd.func.options import Options

Rule = Callable[[torch.Tensor | None, Callable[[], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""From the last weights, and what draws directions, to each particle's perturbation and weights, both (N, 2, d)."""


_FIRST_ONLY = "the loss of a window depends on perturbations of earlier ones, whose second derivative is not made"


@dataclass(frozen=True)
class Setup:
    """What the windows of one call have in common.

    Attributes:
        settings: what the estimate is made of.
        space: the layout of the differentiated tensors.
        arguments: the window's arguments without their tensors; the place of the packed state is empty.
        positions: where the tensors are, among the leaves.
        chosen: which of the tensors are differentiated.
    """

    settings: Settings
    space: Space
    arguments: Arguments
    positions: tuple[int, ...]
    chosen: tuple[int, ...]


class Run:
    """One window of all particles.

    Args:
        setup: what it has in common with other windows.
        window: the function that evaluators call.
        facts: what earlier calls have shown about it.
        rule: the estimator's.
        seed: of this window.
        center: the packed state of the center.
        states: those of the particles; None if they begin at the center's.
        held: what the particles were weighted with so far; None for nothing.

    Attributes:
        values: what the window gave, once the estimate is made.
        weights: what the particles are weighted with now.
    """

    def __init__(
        self,
        setup: Setup,
        window: Callable[..., Any],
        facts: Facts,
        rule: Rule,
        seed: int,
        center: torch.Tensor,
        states: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> None:
        self.setup: Setup = setup
        self._window, self._facts, self._rule, self._seed = window, facts, rule, seed
        num = setup.settings.num_samples
        self._center, self._held = center, held
        self._states: torch.Tensor = center.expand(num, len(SIDES), -1) if states is None else states
        self.values: Values | None = None
        self.weights: torch.Tensor = torch.empty(0)

    def step(self, tensors: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
        """Return the packed state after this window at the parameters; no particle is evaluated."""
        settings, space = self.setup.settings, self.setup.space
        objective, params = self._objective(tensors)
        still = self._center.new_zeros(space.size, dtype=space.dtype).expand(settings.num_samples, len(SIDES), -1)
        points = Particles(params, self._center, self._directions(seed), settings.sigma, still, self._states)
        with RunningEstimate(objective.name, 1) as running:
            objective.counted = running.count if running.trackers else None
            return evaluate(objective, settings.evaluator, points, seed, pairs=0).center

    def estimate(self, tensors: Sequence[torch.Tensor]) -> Estimate:
        """Perturb, evaluate and sum.

        Args:
            tensors: those of the call.

        Returns:
            The estimate.

        Raises:
            RuntimeError: if it was made already, as under ``torch.vmap``.
        """
        if self.values is not None:
            raise RuntimeError(
                f"`torch.vmap` over `{self._window.__qualname__}` cannot be: its particles have one state each."
            )
        settings, space = self.setup.settings, self.setup.space
        objective, params = self._objective(tensors)
        with RunningEstimate(objective.name, settings.evaluations) as running:
            objective.counted = running.count if running.trackers else None
            directions = self._directions(self._seed)
            shifts, self.weights = self._rule(self._held, functools.partial(draw, directions))
            points = Particles(params, self._center, directions, settings.sigma, shifts, self._states)
            values = self.values = evaluate(objective, settings.evaluator, points, self._seed)
            flat = self._gradient(values.losses)
            value = values.loss.to(space.dtype)
            if running.trackers:
                evaluations = objective.evaluations
                running.finish(self._seed, value.item(), flat.norm().item(), evaluations=evaluations, failures=0)
        differences = settings.scheme.combine(values.losses, torch.zeros_like(values.loss))
        return Estimate(
            value, values.losses, differences, directions.again(), settings, objective.evaluations, 0, flat, values.loss
        )

    def _directions(self, seed: int) -> Directions:
        settings = self.setup.settings
        return Directions(settings.distribution, self.setup.space, seed, settings.num_samples)

    def _objective(self, tensors: Sequence[torch.Tensor]) -> tuple[Objective, Leaves]:
        """Return the window as evaluators call it, and the parameters."""
        setup = self.setup
        leaves = setup.arguments.leaves.copy()
        for k, position in enumerate(setup.positions):
            if k not in setup.chosen:
                leaves[position] = tensors[k].detach()
        params = tuple([tensors[k].detach() for k in setup.chosen])
        arguments = replace(setup.arguments, leaves=leaves)
        return Objective(self._window, arguments, (*params, self._center), self._facts, judges=False), params

    def _gradient(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the mean over particles of weight times loss, by the difference and the mean of each pair."""
        space, settings = self.setup.space, self.setup.settings
        half = torch.stack([losses[:, 0] - losses[:, 1], losses[:, 0] + losses[:, 1]]).to(space.dtype) / 2
        plus, minus = self.weights.unbind(1)
        with space.full_precision():
            flat = torch.mv((plus - minus).t(), half[0])
            together = plus + minus
            if together.any():  # pairs of which one side has begun anew; in all others the mean cancels
                flat += torch.mv(together.t(), half[1])
        flat /= 2 * len(losses)
        for leaf, sigma in zip(space.split(flat), settings.sigma, strict=True):
            leaf /= sigma
        check_gradient(flat)
        return flat


def set_up(
    o: Options, fn: Callable[..., Any], params: Any, args: tuple[Any, ...]
) -> tuple[Setup, tuple[torch.Tensor, ...]]:
    """Take a call apart.

    Args:
        o: the settings.
        fn: the window.
        params: the parameters.
        args: further arguments.

    Returns:
        The call without its tensors, and these.

    Raises:
        TypeError: if a tensor to differentiate is of a kind that cannot be.
        ValueError: if there is none.
    """
    typed, recorded = f"`{o.call}(params, state)`", flatten((params,), {}, (0,))
    if not recorded.chosen:
        raise ValueError(f"{typed}: no floating-point tensor to differentiate in `params`, got {params!r:.80}.")
    tracked = [i for i in recorded.chosen if is_tracked(recorded.leaves[i])] or recorded.chosen
    radii = dict(zip(recorded.chosen, sigma_per_leaf(o.sigma, recorded, several=False, call=o.call), strict=True))
    leaves = tuple([recorded.leaves[i] for i in tracked])
    _check_params(leaves, typed)
    space, sigma = Space.of(leaves), tuple([radii[i] for i in tracked])
    check_radii(sigma, o.method, space.dtype, o.call)
    warn_below_resolution(tuple([p.detach() for p in leaves]), sigma, o.call)
    num = cast("int", o.num_samples)  # None is for directions with another mean than zero
    settings = Settings(o.distribution.at_radii(sigma), o.method, num, sigma, o.evaluator, first_only=_FIRST_ONLY)
    # A number stands for the packed state, and the function comes as an argument: so a journal reads what it does.
    arguments = flatten((params, 0.0, fn, *args), {}, (0, 1))
    packed = arguments.form.spans[1][0]
    leaves = tuple(arguments.leaves)
    _warn_of_lost_gradients(list(leaves[packed + 1 :]), typed)
    positions = tuple([i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)])
    bare = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    setup = Setup(
        settings,
        space,
        Arguments(arguments.form, arguments.spec, bare, (*tracked, packed)),
        positions,
        tuple([positions.index(i) for i in tracked]),
    )
    return setup, tuple([leaves[i] for i in positions])


def _check_params(leaves: tuple[torch.Tensor, ...], typed: str) -> None:
    for p in leaves:
        if kind := unsupported(p):
            raise TypeError(f"{typed}: differentiated tensors must be dense and real, got {kind}.")
    if len({p.device for p in leaves}) > 1:
        raise ValueError(f"{typed}: `params` must be on one device, got {sorted({str(p.device) for p in leaves})}.")
    if not any(p.numel() for p in leaves):
        raise ValueError(f"{typed}: `params` have no elements, got shapes {[tuple(p.shape) for p in leaves]}.")


def _warn_of_lost_gradients(others: list[Any], typed: str) -> None:
    for leaf in others:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            warnings.warn(
                f"{typed} gets a tensor of shape {tuple(leaf.shape)} that requires grad among its other arguments: it "
                "gets no gradient through this call. Put it into `params`, or detach it.",
                ZeroOrderWarning,
                stacklevel=4,
            )
            return
