"""One window of all particles: how it is called, and the gradient of what comes back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from zograd._base.execution import full_precision
from zograd._base.streams import derive
from zograd._base.trees import Arguments, Leaves, Space, flatten, sigma_per_leaf, unsupported
from zograd.errors import ZeroOrderWarning
from zograd.estimate.checks import check_gradient, check_radii, warn_below_resolution
from zograd.estimate.evidence import Evidence
from zograd.estimate.result import Estimate
from zograd.estimate.settings import Recipe
from zograd.evaluators.objective import Objective
from zograd.func.autograd import Plan, Setup, is_tracked
from zograd.tracking import Tally
from zograd.unrolled.particles import SIDES, Particles, Values, draw, evaluate

if TYPE_CHECKING:
    from zograd.func.options import Options

Rule = Callable[[torch.Tensor | None, Callable[[], torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""From the last weights, and what draws directions, to each particle's perturbation and weights, both (N, 2, d)."""


class WindowRecipe(Recipe):
    """A recipe whose estimates have a first derivative only."""

    def no_curvature(self, *, scalar: bool) -> str | None:
        """Why."""
        del scalar
        return "the loss of a window depends on perturbations of earlier ones, whose second derivative is not made"


class WindowPlan(Plan):
    """One call of an estimator of unrolled systems, in the place of an ordinary estimate.

    Args:
        plan: its parts, as those of an ordinary estimate.
        rule: the estimator's.
        seed: of this window.
    """

    __slots__ = ("_center", "_held", "_rule", "_seed", "_states", "values", "weights")

    def __init__(self, plan: Plan, rule: Rule, seed: int) -> None:
        super().__init__(plan.setup, plan.fn, plan.arguments, plan.habits)
        self._rule, self._seed = rule, seed
        self.values: Values | None = None
        self.weights: torch.Tensor = torch.empty(0)

    def begin(self, center: torch.Tensor, states: torch.Tensor | None, held: torch.Tensor | None) -> None:
        """Take the packed states of the center and of the particles, None for the same, and the weights so far."""
        num = self.setup.recipe.num_samples
        self._center, self._held = center, held
        self._states: torch.Tensor = center.expand(num, len(SIDES), -1) if states is None else states

    def offsets(self, tensors: Sequence[torch.Tensor], center: torch.Tensor, num: int) -> torch.Tensor:
        """The packed states after 0, 1, ... ``num - 1`` windows at the parameters."""
        states, recipe, space = [center], self.setup.recipe, self.setup.space
        for k in range(num - 1):
            self.begin(states[-1], None, None)
            objective, params = self._objective(tensors)
            seed = derive(self._seed, 1, k)
            still = center.new_zeros(space.size, dtype=space.dtype).expand(recipe.num_samples, len(SIDES), -1)
            points = Particles(params, states[-1], recipe.directions(space, seed), recipe.sigma, still, self._states)
            with Tally(objective.name, 1) as tally:
                objective.counted = tally.count if tally.trackers else None
                states.append(evaluate(objective, recipe.evaluator, points, seed, pairs=0).center)
        return torch.stack(states)

    def _objective(self, tensors: Sequence[torch.Tensor]) -> tuple[Objective, Leaves]:
        """The window as evaluators call it, and the parameters."""
        leaves = self.arguments.leaves.copy()
        for k, position in self.setup.others:
            leaves[position] = tensors[k].detach()
        params = tuple([tensors[k].detach() for k in self.setup.chosen])
        arguments = type(self.arguments)(self.arguments.form, self.arguments.spec, leaves, self.arguments.chosen)
        return Objective(self.fn, arguments, (*params, self._center), self.habits), params

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Sequence[Any]], Any] = tuple) -> Estimate:
        """Perturb, evaluate and sum."""
        if self.values is not None:
            raise RuntimeError(
                f"`torch.vmap` over `{self.fn.__qualname__}` cannot be: its particles have one state each."
            )
        recipe, space = self.setup.recipe, self.setup.space
        objective, params = self._objective(tensors)
        with Tally(objective.name, recipe.evaluations) as tally:
            objective.counted = tally.count if tally.trackers else None
            directions = recipe.directions(space, self._seed)
            shifts, self.weights = self._rule(self._held, functools.partial(draw, directions))
            points = Particles(params, self._center, directions, recipe.sigma, shifts, self._states)
            self.values = evaluate(objective, recipe.evaluator, points, self._seed)
            flat = self._gradient(self.values.losses)
            evaluations = recipe.evaluations + objective.repeated
            value = self.values.loss.to(space.dtype)
            if tally.trackers:
                tally.finish(self._seed, value.item(), flat.norm().item(), evaluations=evaluations, failures=0)
        evidence = Evidence(recipe, [self.values.losses], self.values.loss)
        return Estimate(
            value, directions, recipe.sigma, self._seed, evaluations, 0, [self.values.losses], flat, evidence, structure
        )

    def keep(self, result: Estimate) -> int:
        """Nothing: backward needs the gradient alone."""
        del result
        return 0

    def _gradient(self, losses: torch.Tensor) -> torch.Tensor:
        """The mean over particles of weight times loss, by the difference and the mean of each pair."""
        space, recipe = self.setup.space, self.setup.recipe
        half = torch.stack([losses[:, 0] - losses[:, 1], losses[:, 0] + losses[:, 1]]).to(space.dtype) / 2
        plus, minus = self.weights.unbind(1)
        with full_precision(space.device):
            flat = torch.mv((plus - minus).t(), half[0])
            together = plus + minus
            if together.any():  # pairs of which one side has begun anew; in all others the mean cancels
                flat += torch.mv(together.t(), half[1])
        flat /= 2 * len(losses)
        for leaf, sigma in zip(space.split(flat), recipe.sigma, strict=True):
            leaf /= sigma
        check_gradient(flat)
        return flat


def set_up(
    o: Options, fn: Callable[..., Any], params: Any, args: tuple[Any, ...]
) -> tuple[Setup, Arguments, tuple[torch.Tensor, ...]]:
    """Take a call apart.

    Args:
        o: the settings.
        fn: the window.
        params: the parameters.
        args: further arguments.

    Returns:
        What calls with such arguments share, the arguments, and their tensors; the packed state's place is empty.

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
    recipe = WindowRecipe(o.distribution.at_radii(sigma), o.method, num, sigma, o.evaluator)
    # A number stands for the packed state, and the function comes as an argument: so a journal reads what it does.
    arguments = flatten((params, 0.0, fn, *args), {}, (0, 1))
    packed = arguments.form.spans[1][0]
    arguments = Arguments(arguments.form, arguments.spec, arguments.leaves, (*tracked, packed))
    _warn_of_lost_gradients(arguments.leaves[packed + 1 :], typed)
    positions = tuple([i for i, leaf in enumerate(arguments.leaves) if isinstance(leaf, torch.Tensor)])
    setup = Setup(
        positions=positions,
        chosen=tuple([positions.index(i) for i in tracked]),
        others=tuple([(k, i) for k, i in enumerate(positions) if i not in tracked]),
        recipe=recipe,
        space=space,
        lost=None,
        seed=o.seed,
        generator=o.generator,
    )
    return setup, arguments, tuple([arguments.leaves[i] for i in positions])


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
