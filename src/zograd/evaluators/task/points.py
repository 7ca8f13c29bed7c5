"""The points that directions lead to, as a sequence."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.execution import keep_freed_memory
from zograd.errors import ZeroOrderWarning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from zograd._base.trees import Leaves
    from zograd.distributions.base import Noise
    from zograd.distributions.directions import Directions
    from zograd.schemes import Scheme

_CLEAR = {dtype: 100 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}
"""Radii that :func:`warn_below_resolution` looks at no further; half precision always is."""


class Points(ABC):
    """Points as evaluators see them: point ``i * len(offsets) + j`` is that of direction i at ``offsets[j]``.

    A subclass says where the center and a point is. A point is made when it is asked for, as tensors that ``fn`` may
    write to.

    Args:
        params: all that the points depend on besides the directions, detached.
        directions: the directions.
        sigma: the smoothing radius of each leaf.
        offsets: the scheme's offsets without the center.
    """

    def __init__(
        self, params: Leaves, directions: Directions, sigma: tuple[float, ...], offsets: tuple[float, ...]
    ) -> None:
        self.params = params
        self.directions = directions
        self.sigma = sigma
        self.offsets = offsets
        self._first = offsets[0]
        self._scales = {c: tuple([c * s for s in sigma]) for c in offsets}

    def __len__(self) -> int:
        return len(self.directions) * len(self.offsets)

    def __getitem__(self, number: int) -> Leaves:
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} points, got number {number}.")
        i, j = divmod(number, len(self.offsets))
        return self.point(i, self.offsets[j])

    @abstractmethod
    def center(self) -> Leaves:
        """Return a copy of the center."""

    @abstractmethod
    def point(self, i: Any, offset: float) -> Leaves:
        """Return the point of direction ``i``, or of a slice of them with a leading axis, at an offset."""

    def each(self, lo: int, hi: int) -> Iterator[Leaves]:
        """Yield the points of directions ``lo`` to ``hi`` one by one."""
        return (self.point(i, c) for i in range(lo, hi) for c in self.offsets)

    def rows(self, lo: int, hi: int, offsets: tuple[float, ...]) -> Leaves:
        """Return the points of directions ``lo`` to ``hi``, offset after offset, with a leading axis of rows."""
        columns = [self.point(slice(lo, hi), c) for c in offsets]
        return tuple(map(torch.cat, zip(*columns, strict=True)))

    def factors(self, lo: int, hi: int, offsets: tuple[float, ...]) -> Noise:
        """Return what the points of :meth:`rows` are made of, by rows, for :meth:`of_factors`."""
        return self.rows(lo, hi, offsets)

    def of_factors(self, row: Noise) -> Leaves:
        """Return the point of one row of :meth:`factors`; called inside ``torch.vmap``."""
        return row

    def only(self, offsets: tuple[float, ...]) -> Self:
        """Return the points at these offsets, which share the directions in memory."""
        if offsets == self.offsets:
            return self
        some = copy.copy(self)
        some.offsets = offsets
        return some

    def copy(self) -> Self:
        """Return the same points with directions of their own in memory, for another thread."""
        own = copy.copy(self)
        own.directions = copy.copy(self.directions)
        return own

    def first(self) -> Leaves:
        """Return the point of direction 0 at the scheme's first offset, by which processes compare their points."""
        return self.point(0, self._first)

    def spans(self, chunk: int, lo: int = 0, hi: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield spans of about ``chunk`` directions that cover ``lo`` to ``hi``.

        A span lies within one block or is made of whole blocks: otherwise a block would have to be drawn twice.

        Yields:
            The bounds of each span, in order.
        """
        stop, block = len(self.directions) if hi is None else hi, self.directions.block
        step = chunk // block * block or chunk
        while lo < stop:
            whole = chunk >= block and lo % block == 0
            end = lo + step if whole else min(lo + chunk, (lo // block + 1) * block)
            yield lo, min(end, stop)
            lo = end


class PerturbedPoints(Points):
    """Where ``fn`` is evaluated: point ``i * len(offsets) + j`` is ``params + offsets[j] * sigma * eps_i``.

    They pickle without the directions that they hold: another process makes those from the seed. Blocks of directions
    are shifted together, and families that keep the parameters apart from their low-rank change have factors.
    """

    def center(self) -> Leaves:
        """Return a copy of the parameters."""
        return tuple([p.clone() for p in self.params])

    def point(self, i: Any, offset: float) -> Leaves:
        """Return the point of direction ``i`` at an offset."""
        d, row = self.directions, tuple([part[0] for part in self._parts(i, i + 1)])
        return d.distribution.shift(d.space, self.params, row, self._scales[offset])

    def each(self, lo: int, hi: int) -> Iterator[Leaves]:
        """Yield the points of directions ``lo`` to ``hi`` one by one."""
        space, shift = self.directions.space, self.directions.distribution.shift
        scales = [self._scales[c] for c in self.offsets]
        for row in zip(*[part.unbind(0) for part in self._parts(lo, hi)], strict=True):
            for scale in scales:
                yield shift(space, self.params, row, scale)

    def rows(self, lo: int, hi: int, offsets: tuple[float, ...]) -> Leaves:
        """Return the points of directions ``lo`` to ``hi``, offset after offset, with a leading axis of rows."""
        keep_freed_memory()
        d, parts, num = self.directions, self._parts(lo, hi), hi - lo
        if len(offsets) == 1:
            return d.distribution.shift(d.space, self.params, parts, self._scales[offsets[0]])
        rows = tuple([leaf.new_empty((len(offsets) * num, *leaf.shape)) for leaf in self.params])
        for k, c in enumerate(offsets):
            out = tuple([leaf[k * num : (k + 1) * num] for leaf in rows])
            d.distribution.shift_into(out, d.space, self.params, parts, self._scales[c])
        return rows

    def factors(self, lo: int, hi: int, offsets: tuple[float, ...]) -> Noise:
        """Return the factors of the points' change, where the family has them; elsewhere a row is the point."""
        d = self.directions
        if not d.distribution.factored:
            return self.rows(lo, hi, offsets)
        return d.distribution.mirrored(d.space, self._parts(lo, hi), offsets)

    def of_factors(self, row: Noise) -> Leaves:
        """Return the point of one row of :meth:`factors`."""
        d = self.directions
        return d.distribution.factor(d.space, self.params, row, self.sigma) if d.distribution.factored else row

    def _parts(self, lo: int, hi: int) -> Noise:
        d = self.directions
        return d.distribution.parts(d.space, d.noise(lo, hi))


def check_radii(sigma: tuple[float, ...], scheme: Scheme, dtype: torch.dtype, call: str) -> None:
    """Refuse a step that the compute dtype cannot hold; torch's own error would name neither."""
    largest = max(sigma) * max(map(abs, scheme.sides))
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"`{call}(sigma=...)` must make steps within the range of {dtype}, at most {torch.finfo(dtype).max:.3g}, "
            f"got {max(sigma):g}. Pass float64 tensors, or scale the parameters down."
        )


def warn_below_resolution(params: Leaves, sigma: tuple[float, ...], call: str) -> None:
    """A leaf rounds steps below its resolution away, and with them its gradient."""
    for leaf, radius in zip(params, sigma, strict=True):
        if radius > _CLEAR.get(leaf.dtype, math.inf):
            continue  # the mean would cost time in each estimate, and few parameters are that large
        typical = float(leaf.abs().mean(dtype=torch.promote_types(leaf.dtype, torch.float32)))
        resolution = torch.finfo(leaf.dtype).eps * typical
        if radius < resolution / 2:
            warnings.warn(
                f"`{call}(sigma=...)` is {radius:g}, below the resolution of {leaf.dtype} at a typical parameter, "
                f"{resolution:.2g}: most perturbations round to nothing. Use a larger sigma or {_wider(leaf.dtype)}.",
                ZeroOrderWarning,
                stacklevel=2,
            )


def _wider(dtype: torch.dtype) -> str:
    return {torch.float32: "float64 parameters", torch.float64: "smaller parameters"}.get(dtype, "float32 parameters")
