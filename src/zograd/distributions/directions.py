"""The directions of one estimate: drawn when asked for, drawn again, summed."""

from __future__ import annotations

from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, cast

import torch

from zograd._base.execution import cores, second_thread
from zograd.distributions.base import Dense
from zograd.errors import ReplayError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution, Noise

# Values of a span that a second thread makes ahead by default: fewer are made faster than handed over, and more would
# take a fourth vector of the parameters' size where memory counts.
_LEAST_AHEAD, _MOST_AHEAD = 1 << 17, 1 << 22


class Directions:
    """The directions of one estimate, each a function of (seed, num, index).

    Nothing is stored but the span of blocks made last: what an evaluator has just used is what the estimate sums next,
    so each direction is made once, and neither of them knows of the other. Only directions that cannot be made again (a
    user's ``sample`` on numpy) are kept. With ``prefetch`` a second thread makes the next span meanwhile.

    Args:
        distribution: the family.
        space: the layout of the parameters.
        seed: 64 bits.
        num: how many directions there are.
    """

    def __init__(self, distribution: Distribution, space: Space, seed: int, num: int) -> None:
        self.distribution = distribution
        self.space = space
        self.seed = seed
        self.num = num
        self.block: int = distribution.rows(space, num)
        self.replayable: bool = distribution.replayable(space)
        self._used = num  # how many of them the estimate is a mean over
        self.unread: tuple[int, ...] = ()  # leaves that fn never reads, of which every mean is zero
        self.prefetch: bool | None = False  # make the next span in a second thread; None: where it gains
        self._span = range(0)
        self._noise: Noise = ()
        self._scratch: Noise = ()
        self._kept: list[Noise] = []  # of a family that cannot make them again
        self._next: tuple[int, int, Noise, Future[Noise]] | None = None

    def __len__(self) -> int:
        return self._used

    def first(self, used: int) -> Directions:
        """Return the first of these directions, drawn by the same blocks and apart from those in memory."""
        some = Directions.__new__(Directions)
        some.__dict__.update(self.__dict__)
        some.num = min(self.num, -(-used // self.block) * self.block)
        some._used, some._span, some._noise, some._scratch, some._next = used, range(0), (), (), None
        return some

    def again(self) -> Directions:
        """Return the same directions apart from those in memory, for another thread."""
        return self.first(self._used)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """The bounds of each block: the units of noise and of summation."""
        return ((lo, min(lo + self.block, self.num)) for lo in range(0, self.num, self.block))

    def noise(self, lo: int, hi: int) -> Noise:
        """The noise of directions ``lo`` to ``hi``; valid until the next call."""
        if not (self._span.start <= lo and hi <= self._span.stop):
            self._load(lo // self.block, -(-hi // self.block))
        start = self._span.start
        if (lo, hi) == (start, self._span.stop):
            return self._noise
        return tuple(part[lo - start : hi - start] for part in self._noise)

    @property
    def tiled(self) -> bool:
        """Whether a part of a direction can be made without the rest."""
        family = self.distribution
        return self.block == 1 and isinstance(family, Dense) and type(family).draw is Dense.draw and self.replayable

    def entries(self, i: int, lo: int, hi: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Return flat entries ``lo`` to ``hi`` of direction ``i``, those of a long one by tiles if the family has them.

        Returns:
            Where each run of entries begins, and the run; valid until the next.
        """
        family, space = self.distribution, self.space
        if self.tiled:
            return cast("Dense", family).tiles(space, self.seed, i, lo, hi)
        noise = self.noise(i, i + 1)
        if isinstance(family, Dense):
            return iter([(lo, noise[0][0, lo:hi])])
        parts = tuple(part[0] for part in family.parts(space, noise))
        zeros = tuple(torch.zeros(shape, dtype=space.dtype, device=space.device) for shape in space.shapes)
        return iter([(lo, space.join(family.shift(space, zeros, parts, (1.0,) * len(zeros)))[lo:hi])])

    def add_sum(self, lo: int, c: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``out + sum_i c_i eps_i`` over the block that begins at ``lo``; ``c`` is (rows, slices)."""
        hi = lo + c.shape[0]
        if self._span.start <= lo and hi <= self._span.stop:
            noise = self.noise(lo, hi)
        else:
            # Elsewhere: an evaluator that is ahead of the sum may still be using what it was given.
            noise = self._scratch = self._draw(lo // self.block, lo // self.block + 1, self._scratch)
        return self.distribution.add_sum(self.space, noise, c, out)

    def _load(self, first: int, last: int) -> None:
        buffer, self._span = self._noise, range(0)  # empty in case drawing fails halfway
        if self._next is not None and self._next[:2] == (first, last):
            _, _, self._noise, made = self._next
            made.result()
        else:
            if self._next is not None:
                wait([self._next[3]])  # it may not be written to any more
            buffer, self._noise = (), self._draw(first, last, buffer)
        lo, hi = first * self.block, min(last * self.block, self.num)
        self._next = None
        if hi < self.num and self._makes_ahead(sum(part.numel() for part in self._noise)):
            stop = min(2 * last - first, -(-self.num // self.block))
            buffer = self._memory(last, stop, buffer)
            self._next = last, stop, buffer, second_thread().submit(self._draw, last, stop, buffer)
        self._span = range(lo, hi)

    def _makes_ahead(self, values: int) -> bool:
        if not (self.replayable and self.distribution.parallel) or self.space.device.type != "cpu":
            return False
        if self.prefetch is None:
            return _LEAST_AHEAD <= values <= _MOST_AHEAD and cores() > 1 and not torch.is_inference_mode_enabled()
        return self.prefetch and not torch.is_inference_mode_enabled()

    def _memory(self, first: int, last: int, buffer: Noise) -> Noise:
        """Return memory for blocks ``first`` to ``last``: that of earlier ones, if it fits."""
        rows = min(last * self.block, self.num) - first * self.block
        return buffer if buffer and buffer[0].shape[0] == rows else self.distribution.empty(self.space, rows)

    def _draw(self, first: int, last: int, buffer: Noise) -> Noise:
        noise = self._memory(first, last, buffer)
        # The same bits in every thread: autocast is of the thread, and the sum draws without it.
        with self.space.full_precision():
            for block in range(first, last):
                start = (block - first) * self.block
                part = noise if last - first == 1 else tuple([p[start : start + self.block] for p in noise])
                if self.replayable:
                    self.distribution.draw(self.space, part, self.seed, block)
                else:
                    self._recall(part, block)
        return noise

    def _recall(self, noise: Noise, block: int) -> None:
        while len(self._kept) <= block:
            rows = min(self.block, self.num - len(self._kept) * self.block)
            fresh = self.distribution.empty(self.space, rows)
            self.distribution.draw(self.space, fresh, self.seed, len(self._kept))
            self._kept.append(fresh)
        for part, kept in zip(noise, self._kept[block], strict=True):
            part.copy_(kept)

    def __getstate__(self) -> dict[str, Any]:
        if not self.replayable:
            raise ReplayError(
                f"the directions of {self.distribution} cannot be made again elsewhere: its `sample` gave two answers "
                "for one state of torch's random stream. Draw from torch's random functions in it."
            )
        return {**self.__dict__, "_span": range(0), "_noise": (), "_scratch": (), "_kept": [], "_next": None}

    def __repr__(self) -> str:
        return f"Directions({self.distribution}, num={self.num}, size={self.space.size}, seed={self.seed})"


class WeightedMean:
    """The weighted mean of directions, ``mean_i c_i eps_i / sigma``, by fixed blocks in order.

    The sum runs over the same blocks whatever the evaluator's chunks are, so its bits are a function of the
    coefficients. It goes on while values arrive, so that each direction is drawn once.

    Args:
        directions: the directions.
        sigma: the smoothing radius of each leaf.
    """

    def __init__(self, directions: Directions, sigma: tuple[float, ...]) -> None:
        self._directions = directions
        self._sigma = sigma
        self._done = 0  # directions summed
        self._waiting: torch.Tensor | None = None  # coefficients of a block that is not whole yet
        self._sum: torch.Tensor | None = None

    def add(self, coefficients: torch.Tensor) -> None:
        """Take the coefficients of the next directions, one for each slice, and sum every block that is whole now."""
        d, space = self._directions, self._directions.space
        c = coefficients.reshape(-1, space.slices).to(space.device, space.dtype)
        if self._waiting is not None:
            c = torch.cat([self._waiting, c])
        used, known = 0, c.shape[0]  # not len(): torch's is a Python function
        with space.full_precision():
            while (rows := min(d.block, d.num - self._done)) and used + rows <= known:
                self._sum = d.add_sum(self._done, c if rows == known else c[used : used + rows], self._sum)
                self._done += rows
                used += rows
        self._waiting = c[used:] if used < known else None

    def result(self, num: int | None = None) -> torch.Tensor:
        """Return the flat mean over the first ``num`` directions, of shape (size,) in the compute dtype."""
        d, space = self._directions, self._directions.space
        if self._waiting is not None:  # the estimate ended within a block
            rows = min(d.block, d.num - self._done) - self._waiting.shape[0]
            self.add(self._waiting.new_zeros(rows, space.slices))
        assert self._sum is not None
        if d.unread:
            leaves = space.split(self._sum)
            for i in d.unread:
                leaves[i].zero_()
        divisor = (len(d) if num is None else num) / d.distribution.scale(space)
        if len(set(self._sigma)) == 1:
            return self._sum.div_(divisor * self._sigma[0])
        for leaf, sigma in zip(space.split(self._sum), self._sigma, strict=True):
            leaf.div_(divisor * sigma)
        return self._sum


def contract(directions: Directions, sigma: tuple[float, ...], coefficients: torch.Tensor) -> torch.Tensor:
    """Return the flat gradient that belongs to coefficients of shape (N, slices)."""
    mean = WeightedMean(directions, sigma)
    mean.add(coefficients)
    return mean.result()


def project(directions: Directions, sigma: tuple[float, ...], vector: torch.Tensor) -> torch.Tensor:
    """Return the transpose of :func:`contract`: ``eps_i . vector / (N sigma)``, float64 of shape (N, slices)."""
    space, family = directions.space, directions.distribution
    leaves = [leaf / radius for leaf, radius in zip(space.split(vector), sigma, strict=True)]
    for i in directions.unread:
        leaves[i].zero_()
    scaled = space.join(tuple(leaves))
    with space.full_precision():
        dots = [family.dot(space, directions.noise(lo, hi), scaled) for lo, hi in directions.blocks()]
    return torch.cat(dots)[: len(directions)].double() * (family.scale(space) / len(directions))
