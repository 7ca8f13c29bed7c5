"""Directions of a family, drawn by groups that are independent of each other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from zograd.distributions.directions import Directions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution

_GROUPS = 256  # every test rests on the means of so many
_ROWS = 32  # directions in one, of an independent family
_FRAME = 64  # likewise of one whose directions depend on each other
_ENTRIES = 1 << 24  # about as many are looked at
_PAIRS = 64  # seeds of a family whose directions depend on each other
_SEEDS = 2  # of an independent one
_SAMPLES = 1 << 12  # directions of each
_LARGEST = 1 << 20  # entries of a group


def groups(family: Distribution, space: Space, seed: int) -> Iterator[torch.Tensor]:
    """Yield independent groups of directions, of shape (groups, rows, size)."""
    rows = _rows(family, space)
    if not family.independent:
        for k in range(_GROUPS):
            yield dense(Directions(family, space, seed + k, rows), 0, rows)[None]
        return
    directions = Directions(family, space, seed, rows * _GROUPS)
    step = max(1, directions.block // rows) * rows
    for lo in range(0, len(directions), step):
        yield dense(directions, lo, min(lo + step, len(directions))).view(-1, rows, space.size)


def pairs(family: Distribution, space: Space, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return neighboring groups of one seed, and first groups of neighboring seeds; none if they are too large."""
    block = max(family.group(space, 1 << 16), family.rows(space, 1 << 16))
    if block * space.size > _LARGEST:
        return []
    if family.independent:  # each direction then is a sample of its own
        num, seeds = min(block, _SAMPLES), _SEEDS
    else:
        num, seeds = min(block, _rows(family, space)), _PAIRS if block * space.size <= _LARGEST >> 3 else _PAIRS >> 2
    found = []
    for k in range(seeds):
        directions = Directions(family, space, seed + k, block + num)
        found.append((dense(directions, 0, num), dense(directions, block, block + num)))
    return found + list(itertools.pairwise(first for first, _ in found))


def _rows(family: Distribution, space: Space) -> int:
    most = max(1, _ENTRIES // (space.size * _GROUPS))
    return min(_ROWS, most) if family.independent else min(family.group(space, 1 << 16), _FRAME, most)


def dense(directions: Directions, lo: int, hi: int) -> torch.Tensor:
    """Return directions ``lo`` to ``hi`` as the points show them: a copy, of shape (rows, size)."""
    family, space = directions.distribution, directions.space
    zeros = tuple(torch.zeros(shape, dtype=space.dtype) for shape in space.shapes)
    leaves = family.shift(space, zeros, family.parts(space, directions.noise(lo, hi)), (1.0,) * len(zeros))
    return torch.cat([leaf.reshape(hi - lo, -1) for leaf in leaves], dim=1)
