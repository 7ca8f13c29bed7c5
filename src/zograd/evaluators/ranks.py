"""What the ranks of an estimate send each other once they have evaluated: values, or what went wrong."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zograd._base.buffers import from_bytes, to_bytes
from zograd.errors import RankError

if TYPE_CHECKING:
    from zograd.evaluators.exchange import Exchange


@dataclass(frozen=True)
class Share:
    """Which rows each rank has: rank r those from ``cuts[r]`` to ``cuts[r + 1]``."""

    cuts: tuple[int, ...]
    index: int

    @classmethod
    def of(cls, exchange: Exchange, lo: int, hi: int) -> Share:
        """Return shares that differ by one row at most."""
        ranks = len(exchange.ranks)
        return cls(tuple(lo + r * (hi - lo) // ranks for r in range(ranks + 1)), exchange.index)

    @classmethod
    def one_each(cls, exchange: Exchange) -> Share:
        """Return shares of one row each."""
        return cls(tuple(range(len(exchange.ranks) + 1)), exchange.index)

    @property
    def counts(self) -> list[int]:
        """Rows by rank."""
        return [b - a for a, b in itertools.pairwise(self.cuts)]

    @property
    def mine(self) -> int:
        """Rows of this rank."""
        return self.counts[self.index]


@dataclass(frozen=True)
class Outcome:
    """What became of a rank's evaluations: float64 rows, or an exception."""

    rows: torch.Tensor
    failure: BaseException | None = None

    _HEAD = struct.Struct("<?q64s")  # failed, numbers in a row, the shape of a row as text
    _TEXT = 1000  # bytes of a failure that the others are told

    @classmethod
    def of(cls, evaluate: Callable[[], torch.Tensor]) -> Outcome:
        """Return what becomes of evaluations; what an exception is, the others decide with this rank."""
        try:
            return cls(evaluate().to("cpu", torch.float64).contiguous())
        except (Exception, SystemExit) as error:
            return cls(torch.empty(0, dtype=torch.float64, device="cpu"), error)

    @property
    def shape(self) -> torch.Size:
        """The shape of a row."""
        return self.rows.shape[1:]

    def head(self) -> bytes:
        """Return a fixed number of bytes that say how it went."""
        return self._HEAD.pack(self.failure is not None, self.shape.numel(), str(tuple(self.shape)).encode()[:64])

    @classmethod
    def read(cls, data: bytes) -> tuple[bool, int, str]:
        """Return whether a rank failed, how many numbers its rows have, and their shape."""
        failed, numel, text = cls._HEAD.unpack_from(data)
        return failed, numel, text.rstrip(b"\0").decode()

    def told(self) -> bytes:
        """Return the failure, if there is one, as a fixed number of bytes."""
        text = "" if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"
        return text.encode(errors="replace")[: self._TEXT].ljust(self._TEXT, b"\0")


def gather(exchange: Exchange, share: Share, outcome: Outcome, name: str, expected: int) -> torch.Tensor:
    """Return the rows of all ranks in order, float64 on the CPU.

    One message carries what became of each rank and its rows, if these have as many numbers as expected. Where that
    cannot be known before, as at the center of a function of several values, the rows come in a second one, and so do
    the words of a failure.
    """
    most, shape = max(share.counts), outcome.shape
    fits = shape.numel() == expected
    replies = exchange.gather(outcome.head() + _padded(outcome.rows if fits else None, most * expected))
    _check(exchange, [Outcome.read(reply) for reply in replies], outcome, name)
    if fits:
        data = [reply[len(reply) - 8 * most * expected :] for reply in replies]
    else:
        data = exchange.gather(_padded(outcome.rows, most * shape.numel()))
    rows = [from_bytes(part, (most, *shape)) for part in data]
    return torch.cat([part[:count] for part, count in zip(rows, share.counts, strict=True)])


def _check(exchange: Exchange, heads: list[tuple[bool, int, str]], outcome: Outcome, name: str) -> None:
    failed = [r for r, head in enumerate(heads) if head[0]]
    if failed:
        words = [reply.rstrip(b"\0").decode(errors="replace") for reply in exchange.gather(outcome.told())]
        texts = {words[r] for r in failed}
        if len(failed) == len(heads) and len(texts) == 1 and outcome.failure is not None:
            raise outcome.failure  # as in one process
        text = words[failed[0]]
        more = "" if len(failed) == 1 else f" on {exchange.name(failed[:1])}"
        raise RankError(f"`Distributed`: {name} failed on {exchange.name(failed)}. It raised{more} {text}") from (
            outcome.failure
        )
    others = [r for r, head in enumerate(heads) if head[1:] != heads[0][1:]]
    if others:
        raise RankError(
            f"`Distributed`: {name} must return one shape on all ranks, got {heads[others[0]][2]} on "
            f"{exchange.name(others[:1])} and {heads[0][2]} on {exchange.name([0])}."
        )


def _padded(values: torch.Tensor | None, count: int) -> bytes:
    """Return float64 values as bytes, with zeros up to so many values."""
    return (b"" if values is None else to_bytes(values)).ljust(8 * count, b"\0")
