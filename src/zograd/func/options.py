"""The settings of an estimate as the user gives them, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.trees import numbers
from zograd.distributions.adapter import adapt
from zograd.estimate.surrogate import no_surrogate
from zograd.evaluators import Evaluator
from zograd.evaluators.base import as_evaluator
from zograd.failures import Drop, Policy, Retry
from zograd.sampling import Until
from zograd.schemes import SCHEMES, Scheme
from zograd.shaping import centered_ranks, check_shaping, leave_one_out, standardize

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd.distributions.base import Distribution
    from zograd.failures import Failures
    from zograd.shaping import Shaping


@dataclass(frozen=True)
class Options:
    """The settings of a decorated function, in their checked form.

    Attributes:
        distribution: what directions are drawn from.
        method: the scheme.
        argnums: the differentiated positional arguments; an int counts as a tuple of one.
        num_samples: directions in one estimate, or until when they are taken; None is each of them once.
        sigma: the smoothing radius, a number or a tree of them matching the differentiated arguments.
        evaluator: how ``fn`` is called on points.
        shaping: what is done to the values first.
        failures: what a failed evaluation means.
        batch_dim: the dimension of independent slices.
        generator: where each call's seed is drawn from.
        seed: the seed of every call.
        surrogate: a differentiable approximation of ``fn``.
    """

    distribution: Distribution
    method: Scheme
    argnums: tuple[int, ...]
    num_samples: int | Until | None
    sigma: Any
    evaluator: Evaluator
    shaping: Shaping | None
    failures: Failures
    batch_dim: int | None
    generator: torch.Generator | None
    seed: int | None
    surrogate: Callable[..., Any] | None = None
    call: str = "zero_order"

    @classmethod
    def make(cls, call: str = "zero_order", **given: Any) -> Options:
        """Check settings and bring them to one form.

        Args:
            call: the name of what the user called, which errors show.
            **given: the settings, all of them but ``call``.

        Returns:
            The options.

        Raises:
            ValueError: if a setting is out of its range.
            TypeError: if a setting is of a wrong type.
        """
        checked = {name: _CHECKS[name](value, f"`{call}({name}=...)`", call) for name, value in given.items()}
        options = cls(**checked, call=call)
        options._check_together()
        return options

    def replace(self, **changes: Any) -> Options:
        """These options with some changed, checked again.

        Args:
            **changes: settings by name.

        Returns:
            New options.

        Raises:
            TypeError: if a name is not a setting, or a setting of a wrong type.
            ValueError: if a setting is out of its range.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "call"}
        for name in changes:
            if name not in settings:
                raise TypeError(f"`{self.call}` has no setting `{name}`; it has {', '.join(settings)}.")
        return self.make(self.call, **{**settings, **changes})

    @cached_property
    def policy(self) -> Policy:
        """What ``failures`` comes down to."""
        return Policy.of(self.failures)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands, as plain numbers: empty without one."""
        if self.generator is None:
            return {}
        return {"seed": self.generator.initial_seed(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], typed: str) -> None:
        """Put the generator where another one stood.

        Args:
            state: of :meth:`state_dict`.
            typed: what the user called, for errors.

        Raises:
            ValueError: if the state is not one, or of another kind of generator, or there is no generator to take it.
        """
        position = state.get("generator") if isinstance(state, dict) else None
        if (self.generator is None) != (position is None):
            has = "none here" if self.generator is None else "none there"
            raise ValueError(f"{typed}: `generator=` must be given in the saved run and in this one, there is {has}.")
        if self.generator is None or position is None:
            return
        try:
            self.generator.set_state(position)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{typed}: the state must be that of a generator on {self.generator.device}, got "
                f"{type(position).__name__} {position!r:.60}: {error}"
            ) from error

    def _check_together(self) -> None:
        typed = f"`{self.call}(generator=..., seed={self.seed})`"
        if self.generator is not None and self.seed is not None:
            raise ValueError(f"{typed} must not have both, got a generator and a seed: `seed` fixes every call.")
        if self.shaping is not None and self.method.uses_center and not self.method.is_difference:
            raise ValueError(
                f"`{self.call}(shaping=..., method={self.method})` needs a scheme whose weights sum to zero."
            )
        if self.shaping is not None and self.batch_dim is not None:
            raise ValueError(
                f"`{self.call}(shaping=..., batch_dim={self.batch_dim})`: shaping is for objectives of one value."
            )
        if self.num_samples is None and not self.distribution.finite:
            raise TypeError(
                f"`{self.call}(num_samples=...)` must be an int, got None: that means each direction once, which "
                f"`distribution=Coordinate()` has and {self.distribution} does not."
            )
        self._check_differences()
        if self.surrogate is not None and isinstance(self.num_samples, Until):
            raise ValueError(
                f"`{self.call}(surrogate=..., num_samples={self.num_samples})`: the surrogate's factor is fitted to "
                "all directions at once: give a number."
            )
        if isinstance(self.num_samples, Until) and self.policy.drop and not self.distribution.independent:
            raise ValueError(
                f"`{self.call}({self.distribution}, num_samples={self.num_samples}, failures={self.failures})`: the "
                "directions depend on each other, so that what is left of them where some are dropped does not tell "
                "the noise. Use `Gaussian()`, or `Retry`."
            )
        if self.surrogate is not None and self.policy.drop is not None:
            raise ValueError(
                f"`{self.call}(surrogate=..., failures={self.failures})`: the halves of the directions that a "
                "surrogate compares must be whole: use `Retry`, or no surrogate."
            )
        if self.surrogate is not None and (reason := no_surrogate(self.distribution, self.shaping, self.batch_dim)):
            raise ValueError(f"`{self.call}(surrogate=...)` has no unbiased estimate here: {reason}.")
        if self.shaping is not None:
            name = getattr(self.shaping, "__name__", self.shaping)
            typed = f"`{self.call}(shaping={name}, num_samples={self.num_samples}, method={self.method})`"
            sides, is_difference = len(self.method.sides), self.method.is_difference
            if isinstance(self.num_samples, Until) and self.shaping is not leave_one_out:
                raise ValueError(f"{typed}: `Until` sees the noise of values as they are: use `shaping=None`.")
            num = self.num_samples.bound if isinstance(self.num_samples, Until) else self.num_samples
            check_shaping(self.shaping, num, sides, typed, is_difference=is_difference)
            self._check_baseline(typed)

    def _check_baseline(self, typed: str) -> None:
        """A baseline from other directions must not know the sign of this one."""
        family = self.distribution
        if family.independent or family.symmetric or self.method.sides_cancel:
            return
        if self.shaping in (leave_one_out, centered_ranks, standardize):
            raise ValueError(
                f"{typed}: the directions of {family} tell each other's signs, so that a baseline from the others "
                "takes part of the gradient away. Use `Orthogonal()` or `Gaussian()`, or a scheme whose weights sum to "
                "zero without the center, such as 'antithetic'."
            )

    def _check_differences(self) -> None:
        """Directions with a mean that is not zero would carry the level of ``fn`` into the gradient."""
        if self.distribution.centered:
            return
        if not self.method.is_difference:
            raise ValueError(
                f"`{self.call}({self.distribution}, method={self.method})` needs a scheme whose weights sum to zero, "
                "such as 'forward' or 'antithetic': its directions have another mean than zero."
            )
        if self.shaping is not None and not self.method.sides_cancel:
            raise ValueError(
                f"`{self.call}({self.distribution}, method={self.method}, shaping=...)` needs a scheme whose weights "
                "sum to zero without the center, such as 'antithetic': its directions have another mean than zero."
            )

    def __repr__(self) -> str:
        settings = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "call")
        return f"Options({', '.join(settings)})"


def _method(value: Any, typed: str, call: str) -> Scheme:
    if isinstance(value, Scheme):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{typed} must be a name or a Scheme, got {type(value).__name__} {value!r}.")
    if value not in SCHEMES:
        raise ValueError(f"{typed} must be one of {', '.join(map(repr, SCHEMES))} or a Scheme, got {value!r}.")
    return SCHEMES[value]


def _argnums(value: Any, typed: str, call: str) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not given:
        raise ValueError(f"{typed} must name an argument, got {value!r}.")
    argnums = tuple(checks.integer(a, typed) for a in given)
    if min(argnums) < 0:
        raise ValueError(f"{typed} must count positional arguments from 0, got {value!r}.")
    if len(set(argnums)) != len(argnums):
        raise ValueError(f"{typed} must not name an argument twice, got {value!r}.")
    return argnums


def _num_samples(value: Any, typed: str, call: str) -> int | Until | None:
    if value is None or isinstance(value, Until):
        return value
    return checks.integer(value, typed, least=1)


def _sigma(value: Any, typed: str, call: str) -> Any:
    leaves = numbers(value)
    if value is None or (not leaves and not isinstance(value, (tuple, list, dict))):
        raise TypeError(f"{typed} must be a number or a tree of numbers, got {type(value).__name__} {value!r}.")
    if not leaves:
        raise ValueError(f"{typed} must be a positive number or a tree of them, got {value!r}.")
    for leaf in leaves:
        checks.number(leaf, typed, checks.POSITIVE, checks.FINITE, kind="a number or a tree of numbers")
    return float(value) if len(leaves) == 1 and leaves[0] is value else value


def _evaluator(value: Any, typed: str, call: str) -> Evaluator:
    return as_evaluator(value, typed.strip("`"))


def _shaping(value: Any, typed: str, call: str) -> Shaping | None:
    if value is not None and not callable(value):
        raise TypeError(
            f"{typed} must be None or a function such as `zograd.shaping.leave_one_out`, got {type(value).__name__} "
            f"{value!r}."
        )
    return value  # type: ignore[no-any-return]


def _surrogate(value: Any, typed: str, call: str) -> Callable[..., Any] | None:
    if value is not None and not callable(value):
        raise TypeError(f"{typed} must be None or a function of what `fn` takes, got {type(value).__name__} {value!r}.")
    return value  # type: ignore[no-any-return]


def _failures(value: Any, typed: str, call: str) -> Failures:
    if isinstance(value, (Retry, Drop)):
        return value
    if isinstance(value, type) and issubclass(value, (Retry, Drop)):
        raise TypeError(f"{typed} must be an instance, got the class {value.__name__}: add `()`.")
    wanted = f"{typed} must be 'raise', a Retry or a Drop of `zograd.failures`, got"
    if not isinstance(value, str):
        raise TypeError(f"{wanted} {type(value).__name__} {value!r:.80}.")
    if value != "raise":
        raise ValueError(f"{wanted} {value!r:.80}.")
    return value


def _batch_dim(value: Any, typed: str, call: str) -> int | None:
    if value is None:
        return None
    dim = checks.integer(value, typed)
    if dim < 0:
        raise ValueError(f"{typed} must count dimensions from 0, since leaves may differ in theirs, got {dim}.")
    return dim


def _generator(value: Any, typed: str, call: str) -> torch.Generator | None:
    checks.instance(value, (torch.Generator, type(None)), typed, "a torch.Generator or None")
    return value  # type: ignore[no-any-return]


def _seed(value: Any, typed: str, call: str) -> int | None:
    return None if value is None else checks.seed(value, typed)


_CHECKS: dict[str, Any] = {
    "distribution": lambda value, _, call: adapt(value, call),
    "method": _method,
    "argnums": _argnums,
    "num_samples": _num_samples,
    "sigma": _sigma,
    "evaluator": _evaluator,
    "shaping": _shaping,
    "failures": _failures,
    "batch_dim": _batch_dim,
    "generator": _generator,
    "seed": _seed,
    "surrogate": _surrogate,
}
