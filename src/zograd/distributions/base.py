"""What a distribution of directions owes the rest of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import torch

from zograd._base.streams import Purpose, key
from zograd._base.trees import Leaves, Space

Noise: TypeAlias = tuple[torch.Tensor, ...]

BLOCK = 1 << 16  # values in a block: smaller ones make Python loops, larger ones leave the cache
TILE = 1 << 15  # values in one stream: CUDA streams of one seed agree between GPU models up to here


class Distribution(ABC):
    r"""Directions :math:`\epsilon` of mean zero with :math:`s \, \mathbb{E}[\epsilon \epsilon^\top] = I`, s the scale.

    Directions are over the whole flattened parameter vector (with ``batch_dim``, over each slice's). They come in
    blocks of rows, a block being the unit of noise and of summation; a block is a function of ``(seed, block)`` alone.
    The noise of some rows is a tuple of tensors with a leading row axis, in whatever form the family likes.
    """

    gaussian_marginals: ClassVar[bool] = False
    """Whether each direction's marginals are standard normal, which Stein's identities rest on."""
    independent: ClassVar[bool] = True
    """Whether directions are independent of each other, which a standard error over directions rests on."""
    symmetric: ClassVar[bool] = False
    """Whether, in a family of dependent directions, each may change its sign without the others, as far as their law
    goes, which a baseline from the others rests on."""
    parallel: ClassVar[bool] = False
    """Whether ``draw`` may run in a second thread while ``fn`` is evaluated, and gains by it."""
    factored: ClassVar[bool] = False
    """Whether points have a form that shares the parameters between directions, by ``factor`` and ``mirrored``."""
    mixes: ClassVar[bool] = False
    """Whether an entry of the mean is made of several of the gradient's."""
    centered: ClassVar[bool] = True
    """Whether the directions' mean is zero; if not, only a scheme's differences make a gradient."""
    finite: ClassVar[bool] = False
    """Whether there are only ``space.dim`` different directions, so that ``num_samples=None`` can mean each once."""

    def scale(self, space: Space) -> float:
        """The factor s above."""
        del space
        return 1.0

    def covariance(self, space: Space, vector: torch.Tensor) -> torch.Tensor:
        r"""The product of :math:`s \, \mathbb{E}[\epsilon \epsilon^\top]` with a vector of shape (size,).

        The mean of an estimate on a linear function is this product with its slope. It is the vector itself, but for
        families that declare another covariance.

        Returns:
            A vector of that shape.
        """
        del space
        return vector

    def at_radii(self, sigma: tuple[float, ...]) -> Distribution:
        """The family for points with these smoothing radii, one a leaf: itself, unless it knows places in the space."""
        del sigma
        return self

    def group(self, space: Space, num: int) -> int:
        """Directions, counted from the first, that make a group independent of the next; a last one may be smaller."""
        return 1 if self.independent else self.rows(space, num)

    def replayable(self, space: Space) -> bool:
        """Whether ``draw`` gives the same noise for the same key each time."""
        del space
        return True

    @abstractmethod
    def rows(self, space: Space, num: int) -> int:
        """Directions in one block, of ``num`` in all."""

    @abstractmethod
    def empty(self, space: Space, rows: int) -> Noise:
        """Return memory for the noise of some rows."""

    @abstractmethod
    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Fill ``noise`` with the block's directions."""

    @abstractmethod
    def parts(self, space: Space, noise: Noise) -> Noise:
        """What ``shift`` takes: tensors with a leading row axis, which may be taken off."""

    @abstractmethod
    def shift(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """Return the point ``params + scale * eps``, ``scale`` by leaf; a row axis of ``parts`` stays in front."""

    def shift_into(self, out: Leaves, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> None:
        """Write points of :meth:`shift` to memory that is there; to be overridden where that saves a copy."""
        for place, leaf in zip(out, self.shift(space, params, parts, scale), strict=True):
            place.copy_(leaf)

    def factor(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """The same point for one row of ``parts``, in a form that shares ``params``; called inside ``torch.vmap``."""
        return self.shift(space, params, parts, scale)

    def mirrored(self, space: Space, parts: Noise, sides: tuple[float, ...]) -> Noise:
        """The parts of ``side * eps`` for each side, side after side."""
        del space
        return tuple(torch.cat([part * side for side in sides]) for part in parts)

    @abstractmethod
    def add_sum(self, space: Space, noise: Noise, c: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``out + sum_i c_i eps_i``, in place if there is an ``out``; ``c`` is (rows, slices), ``out`` (size,)."""

    @abstractmethod
    def dot(self, space: Space, noise: Noise, vector: torch.Tensor) -> torch.Tensor:
        """``eps_i . vector`` for each row and slice, with ``vector`` of shape (size,)."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(type(self))


class Tiled(Distribution):
    """A family whose noise is one matrix, filled by tiles that are a stream each."""

    @abstractmethod
    def fill(self, out: torch.Tensor, generator: torch.Generator) -> None:
        """Fill a vector with values of mean 0 and variance 1, in place."""

    @abstractmethod
    def width(self, space: Space) -> int:
        """Values in one row of noise."""

    def rows(self, space: Space, num: int) -> int:
        """As many rows as make about 2**16 values."""
        del num
        return max(1, BLOCK // self.width(space))

    def empty(self, space: Space, rows: int) -> Noise:
        """One matrix (rows, width) in the compute dtype."""
        return (torch.empty(rows, self.width(space), dtype=space.dtype, device=space.device),)

    def draw(self, space: Space, noise: Noise, seed: int, block: int) -> None:
        """Fill the block by tiles, a stream each."""
        values = self.rows(space, BLOCK) * noise[0].shape[1]
        tiles = -(-max(BLOCK, values) // TILE)  # of a whole block: a last, partial one keeps its keys
        fill_tiles(self.fill, noise[0].view(-1), seed, block * tiles)


def fill_tiles(
    fill: Callable[[torch.Tensor, torch.Generator], None], values: torch.Tensor, seed: int, counter: int
) -> None:
    """Fill a vector by tiles, a stream each; the first has this counter, the next ones those that follow."""
    generator = torch.Generator(values.device)
    for tile, part in enumerate(torch.split(values, TILE) if values.numel() > TILE else (values,)):
        generator.manual_seed(key(seed, Purpose.DIRECTION, counter + tile))
        fill(part, generator)


class Dense(Tiled):
    """A family whose noise is the matrix of its directions; a simple one writes ``fill`` and nothing else.

    ``fill(out, generator)`` fills the vector ``out`` in place with independent values of mean 0 and variance 1, drawn
    from ``generator``.

    Examples:
        >>> import torch, zograd
        >>> class Uniform(zograd.distributions.Dense):
        ...     def fill(self, out, generator):
        ...         out.uniform_(-(3**0.5), 3**0.5, generator=generator)
        >>> loss = zograd.zero_order(Uniform(), method="antithetic", num_samples=1000, seed=0)(lambda x: x.sum())
        >>> loss.estimate(torch.zeros(2)).grad.round()
        tensor([1., 1.])
    """

    def width(self, space: Space) -> int:
        """All values of a direction."""
        return space.size

    def tiles(self, space: Space, seed: int, row: int, lo: int, hi: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Values ``lo`` to ``hi`` of one row, where a block is a row, in the memory of one tile.

        Yields:
            Where a run of values begins, and the run; valid until the next.
        """
        buffer = torch.empty(min(TILE, space.size), dtype=space.dtype, device=space.device)
        generator = torch.Generator(space.device)
        tiles = -(-max(BLOCK, space.size) // TILE)
        for tile in range(lo // TILE, -(-hi // TILE)):
            start = tile * TILE
            part = buffer[: min(TILE, space.size - start)]
            generator.manual_seed(key(seed, Purpose.DIRECTION, row * tiles + tile))
            self.fill(part, generator)
            first = max(lo, start)
            yield first, part[first - start : hi - start]

    def parts(self, space: Space, noise: Noise) -> Noise:
        """Views by leaf."""
        return space.split(noise[0])

    def shift(self, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> Leaves:
        """Each leaf moved in the compute dtype and rounded once."""
        return tuple(
            [
                torch.add(leaf, eps, alpha=c)
                if leaf.dtype == eps.dtype
                else torch.add(leaf.to(eps.dtype), eps, alpha=c).to(leaf.dtype)
                for leaf, eps, c in zip(params, parts, scale, strict=True)
            ]
        )

    def shift_into(self, out: Leaves, space: Space, params: Leaves, parts: Noise, scale: tuple[float, ...]) -> None:
        """The same points, without memory of their own where no rounding follows."""
        if type(self).shift is not Dense.shift:
            super().shift_into(out, space, params, parts, scale)
            return
        for place, leaf, eps, c in zip(out, params, parts, scale, strict=True):
            if leaf.dtype == eps.dtype:
                torch.add(leaf, eps, alpha=c, out=place)
            else:
                place.copy_(torch.add(leaf.to(eps.dtype), eps, alpha=c))

    def add_sum(self, space: Space, noise: Noise, c: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """One matrix-vector product a block."""
        rows = noise[0]
        if space.slices == 1 and rows.shape[0] == 1:
            # Without a third vector of the parameters' size.
            return (rows * c).view(-1) if out is None else out.addcmul_(rows[0], c[0, 0])
        if space.slices == 1:
            block = torch.mv(rows.t(), c[:, 0])
        else:
            by_slice = rows.view(-1, space.slices, space.dim).transpose(0, 1)
            block = torch.bmm(c.t().unsqueeze(1), by_slice).view(-1)
        # Not addmv: its bits depend on what was summed before.
        return block if out is None else out.add_(block)

    def dot(self, space: Space, noise: Noise, vector: torch.Tensor) -> torch.Tensor:
        """The product of the noise matrix with the vector, slice by slice."""
        by_slice = noise[0].view(-1, space.slices, space.dim).transpose(0, 1)
        return torch.matmul(by_slice, vector.view(space.slices, space.dim, 1)).squeeze(2).t()
