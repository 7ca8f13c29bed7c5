"""TorchOpt's three forms of a distribution, adapted: an object with ``sample``, a function, a torch Distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from zograd._base.streams import Purpose, TorchStream, key
from zograd.distributions.base import Dense, Distribution, Noise
from zograd.distributions.gaussian import Gaussian
from zograd.errors import NonFiniteError

if TYPE_CHECKING:
    from zograd._base.trees import Space


class _Sampler(Protocol):
    def sample(self, sample_shape: Any = ...) -> torch.Tensor: ...


DistributionLike: TypeAlias = (
    "Distribution | torch.distributions.Distribution | _Sampler | Callable[[torch.Size], torch.Tensor]"
)
"""What ``distribution=`` accepts."""

_PROBE = 64  # values drawn twice: two independent rows of 64 signs are equal by chance once in 2**64


class Sampled(Dense):
    """Directions from a user's ``sample``, called once for each direction and leaf with the leaf's shape.

    torch's random stream is set to the block's key first, so a ``sample`` that draws from torch gives the same
    directions again. One that uses numpy or a counter does not; that is found by drawing twice under one key.
    """

    def __init__(self, sample: Callable[..., torch.Tensor], *, by_keyword: bool, call: str) -> None:
        self._sample = sample
        self._by_keyword = by_keyword
        self._call = call
        self._same: bool | None = None

    def samples(self, sample: Callable[..., torch.Tensor]) -> bool:
        """Whether this is the adapter of that very ``sample``."""
        return self._sample == sample

    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Not used: a user's ``sample`` takes no generator."""
        raise NotImplementedError

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Call ``sample`` row by row and leaf by leaf."""
        with torch.no_grad(), TorchStream(space.device) as stream:
            stream.seed(key(seed, Purpose.DIRECTION, block))
            for row in noise[0].unbind(0):
                for leaf in space.split(row):
                    leaf.copy_(self._checked(leaf.shape))
        finite = torch.isfinite(noise[0])
        if not finite.all():
            bad = noise[0][~finite][0].item()
            raise NonFiniteError(f"`{self._call}(distribution=...)`: its sample must be finite, got {bad}.")

    def replayable(self, space: Space) -> bool:
        """Draw some rows twice under one key and compare; once for each distribution."""
        if self._same is None:
            first, second = (self.empty(space, -(-_PROBE // space.size)) for _ in range(2))
            for noise in (first, second):
                self.draw(space, noise, seed=0, block=0)
            self._same = torch.equal(first[0], second[0])
        return self._same

    def _checked(self, shape: torch.Size) -> torch.Tensor:
        sample = self._sample(sample_shape=shape) if self._by_keyword else self._sample(shape)
        typed = f"`{self._call}(distribution=...)`"
        if not isinstance(sample, torch.Tensor):
            raise TypeError(f"{typed}: its sample must be a tensor, got {type(sample).__name__} {sample!r:.80}.")
        if sample.shape != shape:
            raise ValueError(
                f"{typed}: its sample must have the shape it was asked for, {tuple(shape)}, got {tuple(sample.shape)}."
            )
        if sample.is_complex() or sample.dtype == torch.bool or sample.layout != torch.strided:
            raise TypeError(
                f"{typed}: its sample must be a dense tensor of real numbers, got {sample.dtype}, {sample.layout}."
            )
        return sample

    def __repr__(self) -> str:
        return f"Sampled({getattr(self._sample, '__qualname__', self._sample)!s})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sampled) and self._sample == other._sample

    def __hash__(self) -> int:
        return hash(type(self))


def adapt(distribution: Any, call: str) -> Distribution:
    """A Distribution from anything that ``distribution=`` accepts.

    Args:
        distribution: None (the standard Gaussian), a Distribution, a ``torch.distributions.Distribution`` of mean 0 and
            variance 1, an object with ``sample(sample_shape=...)``, or a function of the shape.
        call: the name of what the user called, for errors.

    Returns:
        The distribution.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is a torch Distribution with a batch or event shape, or of another mean or variance.
    """
    typed = f"`{call}(distribution=...)`"
    if distribution is None:
        return Gaussian()
    if isinstance(distribution, Distribution):
        return distribution
    if isinstance(distribution, type):
        raise TypeError(f"{typed} must be an instance, got the class {distribution.__name__}: call it first.")
    if isinstance(distribution, torch.distributions.Distribution):
        _check_moments(distribution, typed)
        if type(distribution) is torch.distributions.Normal:
            return Gaussian()
    sample = getattr(distribution, "sample", None)
    if callable(sample):
        return Sampled(sample, by_keyword=True, call=call)
    if callable(distribution):
        return Sampled(distribution, by_keyword=False, call=call)
    raise TypeError(
        f"{typed} must be a zograd or torch distribution, an object with `sample(sample_shape=...)` or a function of "
        f"the shape, got {type(distribution).__name__} {distribution!r:.80}."
    )


def _check_moments(distribution: torch.distributions.Distribution, typed: str) -> None:
    if distribution.batch_shape or distribution.event_shape:
        raise ValueError(
            f"{typed} must have no `batch_shape` and no `event_shape`, got {tuple(distribution.batch_shape)} and "
            f"{tuple(distribution.event_shape)} of {distribution}: every value of a direction is drawn from it alone."
        )
    mean, variance = (_moment(distribution, name) for name in ("mean", "variance"))
    if not (abs(mean) < 1e-6 and abs(variance - 1) < 1e-6):
        raise ValueError(
            f"{typed} must have mean 0 and variance 1, got {mean:g} and {variance:g} of {distribution}: the gradient "
            "would be scaled by the variance. Use `torch.distributions.Normal(0, 1)` and set the width with `sigma=`."
        )


def _moment(distribution: torch.distributions.Distribution, name: str) -> float:
    try:
        return float(getattr(distribution, name))
    except NotImplementedError:
        return float("nan")
