"""The points that directions lead to."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from zograd._base.reuse import Room, is_small

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd._base.trees import Leaves
    from zograd.distributions.base import Noise
    from zograd.distributions.directions import Directions


class Points:
    """Where ``fn`` is evaluated: the center, and for each direction one point a side of the scheme.

    Args:
        params: the differentiated leaves, detached.
        directions: the directions.
        sigma: the smoothing radius of each leaf.
        sides: the scheme's offsets without the center.
    """

    def __init__(
        self, params: Leaves, directions: Directions, sigma: tuple[float, ...], sides: tuple[float, ...]
    ) -> None:
        self.params = params
        self.directions = directions
        self.sides = sides
        self._scales = {c: tuple([c * s for s in sigma]) for c in sides}
        self._sigma = sigma
        self._room = Room()

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def sigma(self) -> tuple[float, ...]:
        """The smoothing radius of each leaf."""
        return self._sigma

    @classmethod
    def again(
        cls, params: Leaves, directions: Directions, sigma: tuple[float, ...], sides: tuple[float, ...]
    ) -> Points:
        """The points of another one's ``params``, for who evaluates them elsewhere."""
        return cls(params, directions, sigma, sides)

    def only(self, sides: tuple[float, ...]) -> Points:
        """The points of these sides."""
        return self if sides == self.sides else Points(self.params, self.directions, self._sigma, sides)

    def center(self) -> Leaves:
        """The parameters, as a copy that ``fn`` may write to."""
        return tuple([p.clone() for p in self.params])

    def rows(self, lo: int, hi: int) -> Iterator[Callable[[float], Leaves]]:
        """For each direction, a function from a side's offset to its point."""
        d = self.directions
        parts = d.distribution.parts(d.space, d.noise(lo, hi))
        small = is_small(d.space.size)
        for row in zip(*[part.unbind(0) for part in parts], strict=True):
            yield functools.partial(self._point, row, small)

    def batch(self, lo: int, hi: int, sides: tuple[float, ...]) -> Leaves:
        """The points of directions ``lo`` to ``hi`` side after side, with a leading axis of rows."""
        d = self.directions
        parts = d.distribution.parts(d.space, d.noise(lo, hi))
        if len(sides) == 1:
            return self._point(parts, False, sides[0])
        columns = zip(*[self._point(parts, False, side) for side in sides], strict=True)
        return tuple(map(torch.cat, columns))

    def factors(self, lo: int, hi: int, sides: tuple[float, ...]) -> tuple[Noise, Callable[[Noise], Leaves]]:
        """What the points of :meth:`batch` are made of, by rows, and a function from one row to its point."""
        d = self.directions
        family, space, params = d.distribution, d.space, self.params
        rows = family.mirrored(space, family.parts(space, d.noise(lo, hi)), sides)
        return rows, lambda row: family.factor(space, params, row, self._sigma)

    def _point(self, parts: Noise, small: bool, side: float) -> Leaves:
        d = self.directions
        rooms = () if small else self._room.take()
        point = d.distribution.shift(d.space, self.params, parts, self._scales[side], rooms)
        return point if small else self._room.give(point)

    def spans(self, chunk: int, lo: int, hi: int | None) -> Iterator[tuple[int, int]]:
        """Spans of about ``chunk`` directions that cover ``lo`` to ``hi`` and cut no block they could keep whole.

        A span is either within one block or made of whole blocks: otherwise a block would have to be drawn twice.

        Yields:
            The bounds of each span, in order.
        """
        stop, block = len(self) if hi is None else hi, self.directions.block
        step = chunk // block * block or chunk
        while lo < stop:
            end = (
                min(lo + step, stop)
                if chunk >= block and lo % block == 0
                else min(lo + chunk, (lo // block + 1) * block)
            )
            yield lo, min(end, stop)
            lo = min(end, stop)
