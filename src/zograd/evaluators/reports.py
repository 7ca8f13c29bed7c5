"""What the ranks of an estimate tell each other once they have evaluated: values, or what went wrong."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zograd._base.buffers import from_bytes, to_bytes
from zograd.errors import RankError

if TYPE_CHECKING:
    from zograd.evaluators.exchange import Exchange


@dataclass(frozen=True)
class Share:
    """Which directions each rank evaluates: rank r those from ``cuts[r]`` to ``cuts[r + 1]``."""

    cuts: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, exchange: Exchange, lo: int, hi: int) -> Share:
        """As many for each rank, or one less."""
        ranks = len(exchange.ranks)
        return cls(tuple(lo + r * (hi - lo) // ranks for r in range(ranks + 1)), exchange.index)

    @property
    def counts(self) -> list[int]:
        """Directions by rank."""
        return [b - a for a, b in itertools.pairwise(self.cuts)]

    @property
    def mine(self) -> int:
        """Directions of this rank."""
        return self.counts[self.index]


@dataclass(frozen=True)
class Report:
    """What became of a rank's evaluations: float64 values, the center's first, or an exception."""

    shape: torch.Size
    values: torch.Tensor
    failure: BaseException | None = None

    _HEAD = struct.Struct("<?q1000s")  # failed, numbers a value, the shape or the failure as text

    @property
    def text(self) -> str:
        """The failure, or the shape of a value."""
        failure = self.failure
        return str(tuple(self.shape)) if failure is None else f"{type(failure).__name__}: {failure}"

    def head(self) -> bytes:
        """A fixed number of bytes."""
        text = self.text.encode(errors="replace")[:1000]
        return self._HEAD.pack(self.failure is not None, self.shape.numel(), text)

    @classmethod
    def read(cls, data: bytes) -> tuple[bool, int, str]:
        """Whether a rank failed, how many numbers its values have, and the text."""
        failed, numel, text = cls._HEAD.unpack_from(data)
        return failed, numel, text.rstrip(b"\0").decode(errors="replace")


def gather(
    exchange: Exchange, share: Share, report: Report, name: str, sides: int, center: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The center's value on the first rank, and the values of all directions in order.

    One message carries what became of each rank and one number a point. Only when that shows that ``fn`` returns
    several numbers, of which no rank can know before, the values come in a second one.

    Returns:
        Float64 tensors of shape ``(*out)`` and ``(directions, sides, *out)``.
    """
    points, shape = 1 + max(share.counts) * sides, report.shape  # of the largest slice
    single = shape.numel() == 1
    replies = exchange.gather(report.head() + _padded(report.values if single else None, points))
    _check_reports(exchange, [Report.read(reply) for reply in replies], report, name)
    if single:
        data = [reply[-8 * points :] for reply in replies]
    else:
        data = exchange.gather(_padded(report.values, points * shape.numel()))
    rows = [from_bytes(part, (points, *shape)) for part in data]
    begin = int(center)
    parts = [row[begin : begin + count * sides] for row, count in zip(rows, share.counts, strict=True)]
    return rows[0][0], torch.cat(parts).view(sum(share.counts), sides, *shape)


def _check_reports(exchange: Exchange, heads: list[tuple[bool, int, str]], report: Report, name: str) -> None:
    failed = [r for r, head in enumerate(heads) if head[0]]
    if failed:
        texts = {heads[r][2] for r in failed}
        if len(failed) == len(heads) and len(texts) == 1 and report.failure is not None:
            raise report.failure  # as in one process
        text = heads[failed[0]][2]
        more = "" if len(failed) == 1 else f" on {exchange.name(failed[:1])}"
        raise RankError(f"`Distributed`: {name} failed on {exchange.name(failed)}. It raised{more} {text}") from (
            report.failure
        )
    others = [r for r, head in enumerate(heads) if head[1:] != heads[0][1:]]
    if others:
        raise RankError(
            f"`Distributed`: {name} must return one shape on all ranks, got {heads[others[0]][2]} on "
            f"{exchange.name(others[:1])} and {heads[0][2]} on {exchange.name([0])}."
        )


def _padded(values: torch.Tensor | None, count: int) -> bytes:
    """Float64 values as bytes, with zeros up to so many values."""
    return (b"" if values is None else to_bytes(values)).ljust(8 * count, b"\0")
