"""Stochastic gradient descent on antithetic estimates, in the memory of inference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.streams import FnStream, derive, draw_seed
from zograd._base.torch_private import writes
from zograd._base.trees import Leaves, Space, unsupported
from zograd.distributions.adapter import adapt
from zograd.distributions.directions import Directions
from zograd.errors import NonFiniteError, ReplayError, ZeroOrderWarning
from zograd.evaluators.task.objective import wants_grad
from zograd.evaluators.task.points import check_radii, warn_below_resolution
from zograd.evaluators.task.returned import as_tensor
from zograd.optim.descent import update
from zograd.optim.overlay import Overlay
from zograd.optim.records import Group, Records, append
from zograd.schemes import ANTITHETIC
from zograd.tracking import RunningEstimate

if TYPE_CHECKING:
    from zograd.distributions.adapter import DistributionLike
    from zograd.distributions.base import Distribution

_SEED_BITS = 32  # of a step: what a record holds


class MeZO(torch.optim.Optimizer):
    r"""Stochastic gradient descent on antithetic estimates, in the memory of inference.

    .. math:: \theta \leftarrow (1 - \eta \lambda) \, \theta - \frac{\eta}{N \sigma} \sum_{i=1}^{N} a_i \epsilon_i,
              \qquad a_i = \tfrac12 \left( f(\theta + \sigma \epsilon_i) - f(\theta - \sigma \epsilon_i) \right)

    It is the estimator of :func:`zograd.zero_order` with ``method="antithetic"``, without the value at the center: a
    step has the bits of ``torch.optim.SGD`` on that gradient. The closure runs 2N times, and each parameter is replaced
    by its perturbed copy where it is used; nothing is written to a parameter but the update, so that no perturbing and
    restoring can make it drift. Beyond what the closure itself needs there is memory for one perturbed tensor: noise is
    made by runs of at most 32768 values, for the points and again for the update.

    The closure returns the loss and does not call ``backward()``; it runs without grad mode. Both sides of a direction
    see the same torch random numbers. Buffers (of BatchNorm, say) change as in 2N forward passes. Parameters that do
    not require grad are left alone.

    Args:
        params: the parameters, or groups of them, each with its own ``lr``, ``sigma`` and ``weight_decay``.
        lr: the learning rate, at least 0; with 0 nothing is written.
        sigma: the smoothing radius, positive.
        num_samples: directions a step, at least 1; the closure runs twice for each.
        weight_decay: the L2 penalty as in ``torch.optim.SGD``, at least 0.
        distribution: as in :func:`zograd.zero_order`. Those that fill tiles (Gaussian, Rademacher) need no room for a
            whole direction.
        seed: the seed of the run; each step draws from it. Otherwise from ``generator`` or torch's global stream.
        generator: where each step's seed is drawn from.

    Attributes:
        records: seed and coefficients of each step, see :func:`replay`.

    Raises:
        TypeError: if a setting is of a wrong type, or a parameter of an unsupported kind.
        ValueError: if a setting is out of its range, or the parameters are on two devices or share memory (expanded).

    Examples:
        >>> import torch, zograd
        >>> model = torch.nn.Linear(4, 1)
        >>> x, y = torch.randn(64, 4), torch.zeros(64, 1)
        >>> opt = zograd.optim.MeZO(model.parameters(), lr=0.05, sigma=1e-3, seed=0)
        >>> first = opt.step(lambda: (model(x) - y).square().mean())
        >>> for _ in range(200):
        ...     loss = opt.step(lambda: (model(x) - y).square().mean())
        >>> bool(loss < first / 10)
        True

    References:
        Malladi et al., "Fine-tuning language models with just forward passes" (arXiv:2305.17333).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        sigma: float = 1e-3,
        num_samples: int = 1,
        weight_decay: float = 0.0,
        *,
        distribution: DistributionLike | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.num_samples: int = checks.integer(num_samples, "`MeZO(num_samples=...)`", least=1)
        if seed is not None:
            seed = checks.seed(seed, "`MeZO(seed=...)`", kind="an int or None")
        if generator is not None:
            checks.instance(generator, torch.Generator, "`MeZO(generator=...)`", "a torch.Generator or None")
        if seed is not None and generator is not None:
            raise ValueError("`MeZO(generator=..., seed=...)` must not have both: `seed` fixes every step.")
        self.distribution: Distribution = adapt(distribution, "MeZO")
        self.records: Records = Records(self.num_samples, repr(self.distribution))
        self._seed, self._generator, self._warned = seed, generator, False
        super().__init__(params, {"lr": lr, "sigma": sigma, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, checked.

        Args:
            param_group: ``params`` and the settings that differ.

        Raises:
            TypeError: if a parameter is of an unsupported kind.
            ValueError: if a setting is out of its range, or a parameter on another device.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "sigma", "weight_decay"):
            _setting(group, name)
        for p in group["params"]:
            kind = unsupported(p) or ("" if p.is_floating_point() else f"a tensor of {p.dtype}")
            if kind:
                raise TypeError(
                    f"`MeZO(params)`: parameters must be dense and real, got {kind} of shape {tuple(p.shape)}."
                )
            if any(step == 0 and size > 1 for step, size in zip(p.stride(), p.shape, strict=True)):
                raise ValueError(
                    "`MeZO(params)`: each value of a parameter must have its own memory to be written to, got an "
                    f"expanded tensor of shape {tuple(p.shape)}: `clone()` it."
                )
        devices = {str(p.device) for g in self.param_groups for p in g["params"]}
        if len(devices) > 1:
            raise ValueError(f"`MeZO(params)`: all parameters must be on one device, got {sorted(devices)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> torch.Tensor:  # type: ignore[override]
        """Evaluate the closure at 2N points and move the parameters.

        Nothing is written before all values are there: after an exception the parameters are as before.

        Args:
            closure: returns the loss at the parameters it sees, without ``backward()``.

        Returns:
            The mean of the 2N values, close to the loss.

        Raises:
            TypeError: without a closure, or if it returns no number.
            ValueError: if it returns several values, or no parameter requires grad.
            NonFiniteError: if it returns a value that is not finite.
            RuntimeError: if it differentiates the loss, writes to a parameter in place or uses none.
            ReplayError: if the distribution's directions cannot be made again.
            BudgetExceeded: if the 2N evaluations are more than a :class:`~zograd.Tracker` has left.
        """
        if not callable(closure):
            raise TypeError(
                f"`MeZO.step(closure)` needs a closure that returns the loss, got {closure!r:.80}: write "
                "`opt.step(lambda: loss(model(x), y))`; it is called at perturbed parameters."
            )
        params, groups = self._params(), self._groups()
        trained = [i for group in groups for i in group.trained]
        chosen = tuple(params[i] for i in trained)
        if not sum(p.numel() for p in chosen):
            which = "of those that require grad has a value" if chosen else "requires grad"
            raise ValueError(f"`MeZO.step(closure)`: no parameter {which}, so there is nothing to train.")
        sigma = tuple(group.sigma for group in groups for _ in group.trained)
        if not self._warned:
            self._warned = True
            warn_below_resolution(chosen, sigma, "MeZO")
        space = Space.of(tuple(p.detach() for p in chosen))
        check_radii(sigma, ANTITHETIC, space.dtype, "MeZO")
        with RunningEstimate("`MeZO.step`", len(ANTITHETIC.sides) * self.num_samples) as running:
            directions = Directions(self.distribution, space, self._draw_seed(), self.num_samples)
            loss = self._move(closure, params, groups, chosen, directions, sigma, running)
            running.finish(directions.seed, loss.item())
        return loss

    def _move(
        self,
        closure: Callable[[], Any],
        params: Leaves,
        groups: list[Group],
        chosen: Leaves,
        directions: Directions,
        sigma: tuple[float, ...],
        running: RunningEstimate,
    ) -> torch.Tensor:
        if not directions.replayable:
            raise ReplayError(
                f"`MeZO(distribution={self.distribution!r})`: its directions cannot be made again, which points and "
                "update need. Draw from torch's random functions in `sample`."
            )
        dtype = directions.space.dtype
        values, used = _evaluate(closure, chosen, directions, sigma, len(self.records), running)
        sides = torch.tensor(values, dtype=torch.float64)
        coefficients: list[float] = ANTITHETIC.combine(sides, torch.zeros((), dtype=torch.float64)).to(dtype).tolist()
        if not all(map(math.isfinite, coefficients)):
            raise NonFiniteError(
                f"`MeZO.step(closure)`: the closure's values, up to {max(abs(v) for row in values for v in row):.3g}, "
                f"have differences beyond the range of {dtype}; the parameters are as before the step. Scale the loss."
            )
        unused = [i for k, i in enumerate(i for g in groups for i in g.trained) if k not in used and params[i].numel()]
        if unused:
            self._warn_of_unused(unused, params)
            if not self.distribution.mixes:
                groups = [replace(g, unused=tuple(i for i in g.trained if i in unused)) for g in groups]
        update(params, groups, directions, coefficients)
        append(self.records, directions.seed, coefficients, groups, params)
        return sides.mean().to(dtype)

    def _warn_of_unused(self, unused: list[int], params: Leaves) -> None:
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        listed = ", ".join(names[i] if names else f"{i} of shape {tuple(params[i].shape)}" for i in unused[:8])
        moved = f"{self.distribution} moves them all the same" if self.distribution.mixes else "they stay as they are"
        warnings.warn(
            f"`MeZO.step(closure)`: the closure used {len(unused)} of the parameters at no point, {listed}: {moved}. "
            "Usual reasons: a head that the loss does not use, adapters that are merged or disabled, a weight kept "
            "from an earlier call, code past Python (TorchScript, `torch.cond`, another thread, callables inside "
            "torch's losses).",
            ZeroOrderWarning,
            stacklevel=4,
        )

    def _params(self) -> Leaves:
        return tuple(p for group in self.param_groups for p in group["params"])

    def _groups(self) -> list[Group]:
        indices = {id(p): i for i, p in enumerate(self._params())}
        return [
            Group(
                _setting(group, "lr"),  # checked again: schedulers and users set them
                _setting(group, "sigma"),
                _setting(group, "weight_decay"),
                tuple(indices[id(p)] for p in group["params"] if p.requires_grad),
            )
            for group in self.param_groups
        ]

    def _draw_seed(self) -> int:
        seed = self._seed
        drawn = draw_seed(None, self._generator) if seed is None else derive(seed, len(self.records))
        return drawn & ((1 << _SEED_BITS) - 1)

    def __repr__(self) -> str:
        groups = [{name: group[name] for name in ("lr", "sigma", "weight_decay")} for group in self.param_groups]
        settings = {**groups[0], "num_samples": self.num_samples, "distribution": self.distribution, "seed": self._seed}
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        others = f", other groups: {groups[1:]}" if len(groups) > 1 else ""
        return f"MeZO({shown}{others})"

    def __getstate__(self) -> dict[str, Any]:
        names = ("num_samples", "distribution", "records", "_seed", "_generator", "_warned")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """The state of every torch optimizer, with the records and the seed: a run resumes bit for bit.

        Returns:
            A dict for :meth:`load_state_dict`.
        """
        return {**super().state_dict(), "records": self.records.state_dict(), "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was made.

        Args:
            state_dict: what that returned.

        Raises:
            ValueError: if it belongs to another distribution or number of directions.
        """
        records = Records.from_state_dict(state_dict["records"])
        for name in ("num_samples", "distribution"):
            mine, theirs = getattr(self.records, name), getattr(records, name)
            if mine != theirs:
                raise ValueError(
                    f"`MeZO.load_state_dict(...)`: `{name}` must be the saved run's, {theirs}, got {mine}."
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in ("records", "seed")})
        self.records = records
        self._seed = state_dict["seed"]


def replay(records: Records, params: Iterable[torch.Tensor], distribution: DistributionLike | None = None) -> None:
    """Make the trained weights of a run from the weights it began with, in place, bit for bit.

    Args:
        records: of the run.
        params: the weights it began with, in the order of the optimizer's parameters.
        distribution: of the run; None is the standard Gaussian.

    Raises:
        ValueError: if the weights are of other shapes than the run's, or the distribution is another.

    Examples:
        >>> import torch, zograd
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> opt = zograd.optim.MeZO([x], lr=0.1, seed=0)
        >>> _ = opt.step(lambda: (x - 1).square().sum())
        >>> weights = torch.zeros(2)
        >>> zograd.replay(opt.records, [weights])
        >>> torch.equal(weights, x)
        True
    """
    leaves = tuple(p.detach() for p in params)
    family = adapt(distribution, "replay")
    if repr(family) != records.distribution:
        raise ValueError(f"`replay(distribution=...)` must be the run's, {records.distribution}, got {family!r}.")
    shapes = [tuple(p.shape) for p in leaves]
    if shapes != records.shapes and len(records):
        raise ValueError(f"`replay(records, params)`: the run had parameters of shapes {records.shapes}, got {shapes}.")
    if len(records) and records.double != any(p.dtype == torch.float64 for p in leaves):  # other random streams
        ran = "some" if records.double else "none"
        raise ValueError(
            f"`replay(records, params)`: {ran} of the run's parameters were of float64, got "
            f"{[p.dtype for p in leaves]}."
        )
    with torch.no_grad():
        for seed, coefficients, groups in records.steps():
            space = Space.of(tuple(leaves[i] for group in groups for i in group.trained))
            update(leaves, groups, Directions(family, space, seed, records.num_samples), coefficients)


def _setting(group: dict[str, Any], name: str) -> float:
    """Return a number of a group, which may be a tensor, as torch's optimizers have it."""
    wanted = checks.POSITIVE_FINITE if name == "sigma" else checks.NOT_NEGATIVE_FINITE
    return float(checks.number(group[name], f"`MeZO({name}=...)`", wanted))


def _evaluate(
    closure: Callable[[], Any],
    params: Leaves,
    directions: Directions,
    sigma: tuple[float, ...],
    step: int,
    running: RunningEstimate,
) -> tuple[list[list[float]], set[int]]:
    """The closure's values at each direction's two points, and the parameters that it used."""
    before = list(map(writes, params))
    values: list[list[float]] = []
    used: set[int] = set()
    with FnStream(directions.seed, directions.space.device, shared=False) as stream:
        for i in range(len(directions)):
            values.append([])
            for side in ANTITHETIC.sides:
                stream.at(i)
                point = _Point(params, directions, i, tuple(side * s for s in sigma))
                running.count()
                overlay = Overlay(params, point)
                values[-1].append(_value(closure, overlay, step, i, side))
                used |= overlay.used
    if before != list(map(writes, params)):
        raise RuntimeError(
            "`MeZO.step(closure)`: the closure wrote to a parameter in place, past torch's Python functions; the "
            "values are of no point. Write to parameters outside the closure."
        )
    return values, used


def _value(closure: Callable[[], Any], overlay: Overlay, step: int, i: int, side: float) -> float:
    try:
        with overlay:
            out = closure()
    except RuntimeError as error:
        if not wants_grad(error):
            raise
        raise RuntimeError(
            "`MeZO.step(closure)`: the closure must return the loss and not differentiate it, and got as far as "
            f"autograd: {error}"
        ) from error
    out = as_tensor(out, "`MeZO.step(closure)`: the closure")
    if out.numel() != 1:
        raise ValueError(f"`MeZO.step(closure)`: the closure must return one value, got the shape {tuple(out.shape)}.")
    value = float(out)
    if not math.isfinite(value):
        raise NonFiniteError(
            f"`MeZO.step(closure)`: the closure returned {value} in step {step} at direction {i} (offset {side:+g}); "
            "the parameters are as before the step. Return a finite penalty, or use a smaller sigma or lr."
        )
    if not overlay.used:
        raise RuntimeError(
            "`MeZO.step(closure)`: the closure used no trained parameter. Compute the loss inside it; scripted "
            "modules, and views or copies of parameters made outside, keep the unperturbed values."
        )
    return value


class _Point:
    """The parameters moved along one direction, each made when asked for."""

    def __init__(self, params: Leaves, directions: Directions, i: int, scale: tuple[float, ...]) -> None:
        self._params, self._directions, self._i, self._scale = params, directions, i, scale

    def __call__(self, k: int) -> torch.Tensor:
        param, scale = self._params[k].detach(), self._scale[k]
        point = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        old, new = param.reshape(-1), point.view(-1)
        lo, hi = self._directions.space.bounds[k]
        for start, eps in self._directions.entries(self._i, lo, hi):
            run = slice(start - lo, start - lo + eps.numel())
            if param.dtype == eps.dtype:
                torch.add(old[run], eps, alpha=scale, out=new[run])
            else:
                new[run] = torch.add(old[run].to(eps.dtype), eps, alpha=scale)
        return point
