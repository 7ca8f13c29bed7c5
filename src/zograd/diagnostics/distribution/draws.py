"""Draws of directions: the same bits from the same seed, independent groups and seeds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from zograd.diagnostics.distribution.groups import pairs
from zograd.diagnostics.distribution.limits import student
from zograd.diagnostics.distribution.report import Finding
from zograd.distributions.directions import Directions

if TYPE_CHECKING:
    from zograd._base.trees import Space
    from zograd.distributions.base import Distribution

_ALONG = 4  # random vectors
_EXACT = 1e-6
INDEPENDENCE_TESTS = 16 * 2 * _ALONG  # these tests are few; a sixteenth of the false alarms is theirs


def _blocks(family: Distribution, space: Space, seed: int) -> Directions:
    rows = family.rows(space, 1 << 16)
    return Directions(family, space, seed, rows + min(rows, 5))


def replay(family: Distribution, space: Space, seed: int) -> Finding:
    """Draw blocks twice from one seed, the second time by spans, and compare the bits."""
    if not family.replayable(space):
        return Finding("replay", None, "not replayable, as it says: directions are kept, and other processes have none")
    first, again = _blocks(family, space, seed), _blocks(family, space, seed)
    block, num = first.block, len(first)
    wholes = {lo: [part.clone() for part in first.noise(lo, hi)] for lo, hi in first.blocks()}
    spans = [(block, num), (0, block), (block // 2, block), (block - 1, block), (num - 1, num), (0, 1)]
    wrong = [
        (lo, hi)
        for lo, hi in spans
        for got, whole in zip(again.noise(lo, hi), wholes[lo // block * block], strict=True)
        if not torch.equal(got, whole[lo % block : lo % block + hi - lo])
    ]
    detail = f"other bits at directions {wrong[0]}" if wrong else f"same bits over {len(spans)} spans"
    return Finding("replay", not wrong, detail, float(len(wrong)))


def independence(family: Distribution, space: Space, seed: int, z: float) -> Finding:
    """Correlate neighboring groups, and the first groups of neighboring seeds, along random vectors."""
    found = pairs(family, space, seed)
    if not found:
        return Finding("independence", None, "one group of directions is too large to look at two")
    generator = torch.Generator().manual_seed((seed + 1) % (1 << 32))
    vectors = torch.randn(space.size, _ALONG, generator=generator, dtype=torch.float64)
    along = [torch.stack([group.double() @ vectors for group in pair]) for pair in found]
    worst, largest = 0.0, 0.0
    for power in (1, 2):
        off, error, num = _correlation([pair**power for pair in along], rowwise=family.independent)
        allowed = student(z, num - 1) * error + _EXACT
        worst, largest = max(worst, float((off.abs() / allowed).max())), max(largest, float(off.abs().max()))
    return Finding("independence", worst <= 1, f"correlation between groups and seeds at most {largest:.2g}", worst)


def _correlation(pairs: list[torch.Tensor], *, rowwise: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the correlation of two groups' values (2, rows, vectors), its standard error and the number of samples.

    Samples are rows where these are independent, else the means over a pair's rows.

    Returns:
        All three, the first two by vector.
    """
    mean = torch.cat([pair.flatten(0, 1) for pair in pairs]).mean(dim=0)
    variance = torch.cat([(pair - mean).square().flatten(0, 1) for pair in pairs]).mean(dim=0).clamp_min(1e-12)
    products = [(pair[0] - mean) * (pair[1] - mean) / variance for pair in pairs]
    samples = torch.cat(products) if rowwise else torch.stack([p.mean(dim=0) for p in products])
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples)), len(samples)
