"""The directions of an estimate shared out among the ranks of torch.distributed."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.digest import Digest
from zograd._base.versions import __version__
from zograd.errors import RankError, ReplayError
from zograd.evaluators.base import Evaluator, as_evaluator
from zograd.evaluators.exchange import Exchange
from zograd.evaluators.ranks import Outcome, Share, gather
from zograd.evaluators.task.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd._base.isolation import ModuleFunction
    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

_SEEN = 1024  # values of direction 0 that the ranks compare

_HINTS = {
    "versions": "Install the same zograd and torch everywhere.",
    "seed": "Give the same `seed=`, a `generator=` in the same state, or call `torch.manual_seed` alike on every rank, "
    "and make as many estimates on each.",
    "parameters": "Begin with the same ones on every rank, and change them alike.",
    "points asked for": "`num_samples`, `method`, `sigma` and `batch_dim` must be the same on every rank.",
    "directions": "`distribution` must be the same on every rank, and the processors of one kind.",
}


class Distributed(Evaluator):
    """Evaluate a slice of the directions on each rank of torch.distributed: for programs under ``torchrun``.

    Every rank runs the same program and evaluates its slice; the values are gathered, 8 bytes each, and every rank sums
    all directions in order. So every rank has the gradient of one process, bit for bit, whatever the number of ranks,
    and nothing of the parameters' size is sent. Each rank evaluates the center for itself; the value is that of the
    first rank.

    Before it evaluates, the ranks compare digests of the seed, the parameters, the points and the versions. The other
    arguments of ``fn`` are not compared: give the same data to all ranks for the gradient of one process; with data of
    its own on each rank, the directions of a rank see that rank's.

    If ``fn`` raises on a rank, all ranks raise the same :class:`~zograd.errors.RankError`, with the original exception
    chained on that rank; if it raises alike on all of them, that exception goes up as it is. If a rank dies or hangs,
    the others raise once the connection breaks or after ``timeout`` seconds. After that the group is of no more use.

    ``fn`` itself must not use collectives of this group, nor an estimate inside it another ``Distributed``.

    Args:
        group: the process group; None for all ranks.
        inner: how ``fn`` is called on a rank's slice, an evaluator or its name.
        timeout: seconds to wait for the slowest rank, at least as long as a slice takes it.

    Raises:
        TypeError: if a setting is of a wrong type.
        ValueError: if the timeout is not positive, or ``inner`` an unknown name.
        ReplayError: of an estimate, if the distribution's directions cannot be made again.

    Examples:
        >>> import torch, zograd
        >>> import torch.distributed as dist
        >>> alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # nothing under torchrun
        >>> dist.init_process_group("gloo", **alone)
        >>> evaluator = zograd.evaluators.Distributed(inner="vmap")
        >>> @zograd.zero_order(num_samples=10, seed=0, evaluator=evaluator)
        ... def loss(x):
        ...     return x.square().sum()
        >>> loss.estimate(torch.ones(3)).evaluations
        11
        >>> dist.destroy_process_group()

    References:
        Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning" (arXiv:1703.03864).
    """

    def __init__(self, group: Any = None, inner: Evaluator | str = "loop", timeout: float = 1800.0) -> None:
        seconds = checks.number(
            timeout, "`Distributed(timeout=...)`", checks.POSITIVE_FINITE, kind="a number of seconds"
        )
        self.group: Any = group
        self.inner: Evaluator = as_evaluator(inner, "Distributed(inner=...)")
        self.timeout: float = float(seconds)
        self.batched: bool = self.inner.batched

    def center(self, fn: Objective, points: Points) -> Answer:
        """Evaluate the parameters on each rank, for the shape and the traces; the value is that of the first rank."""
        exchange = Exchange(self.group, self.timeout)
        if len(exchange.ranks) == 1:
            return self.inner.center(fn, points)
        _agree(exchange, points, "the center")
        answer: Answer | None = None

        def evaluate() -> torch.Tensor:
            nonlocal answer
            with fn.unjudged():
                answer = self.inner.center(fn, points)
                return fn.take(answer, points).unsqueeze(0)

        values = gather(exchange, Share.one_each(exchange), Outcome.of(evaluate), fn.name, 1)
        assert answer is not None
        fn.judge_center(values[0])
        return replace(answer, values=values[0].to(answer.device or answer.values.device))

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Yield the values of all ranks, once they are there."""
        hi = len(points.directions) if hi is None else hi
        exchange = Exchange(self.group, self.timeout)
        if lo == hi or len(exchange.ranks) == 1:
            yield from self.inner.values(fn, points, lo, hi)
            return
        # Judged when all of them are there, so that every rank raises the same.
        yield fn.evaluate(points, lo, hi, functools.partial(self._gathered, exchange))

    def _gathered(self, exchange: Exchange, fn: Objective, points: Points, lo: int, hi: int) -> torch.Tensor:
        _agree(exchange, points, (lo, hi))
        share = Share.of(exchange, lo, hi)
        first, last = share.cuts[share.index : share.index + 2]
        row = (len(points.offsets), *fn.shape)

        def evaluate() -> torch.Tensor:
            values = torch.empty(0, *row, dtype=torch.float64, device="cpu")
            if first < last:
                with fn.unjudged():
                    answers = self.inner.values(fn, points, first, last)
                    values = torch.cat([values, *(fn.take(answer, points).cpu() for answer in answers)])
            if len(values) != share.mine:
                raise ValueError(f"the inner evaluator must yield {share.mine} directions, got {len(values)}.")
            return values

        values = gather(exchange, share, Outcome.of(evaluate), fn.name, math.prod(row))
        if fn.module is not None:
            self._share_read(exchange, fn.module)
        return values

    def _share_read(self, exchange: Exchange, module: ModuleFunction) -> None:
        """Let every rank know which parameters of a module any of them has read."""
        names = module.names
        mine = bytes(name in module.read for name in names)
        for theirs in exchange.gather(mine):
            module.read |= {name for name, read in zip(names, theirs, strict=True) if read}

    def __repr__(self) -> str:
        group = "" if self.group is None else f"{self.group!r}, "
        return f"Distributed({group}inner={self.inner!r}, timeout={self.timeout:g})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Distributed:
        return Distributed(self.group, copy.deepcopy(self.inner, memo), self.timeout)  # a group has no copies


def _agree(exchange: Exchange, points: Points, span: Any) -> None:
    """Raise on every rank if one would evaluate other points."""
    if not points.directions.replayable:
        raise ReplayError(
            f"`Distributed`: the directions of {points.directions.distribution} cannot be made again on another "
            "rank. Draw from torch's random functions in `sample`."
        )
    directions, space = points.directions, points.directions.space
    asked = [directions.num, span, list(points.offsets), list(points.sigma), space.batch_dim, space.slices]
    first = [run for _, run in directions.entries(0, 0, min(space.size, _SEEN))]
    told = {
        "versions": [__version__, str(torch.__version__)],
        "seed": directions.seed,
        "parameters": [leaf.detach() for leaf in points.params],
        "points asked for": asked,
        "directions": first,
    }
    digests = [Digest().add(value).result() for value in told.values()]
    size = len(digests[0])
    replies = exchange.gather(b"".join(digests))
    for k, what in enumerate(told):
        at = slice(k * size, (k + 1) * size)
        others = [r for r, reply in enumerate(replies) if reply[at] != replies[0][at]]
        if others:
            raise RankError(
                f"`Distributed`: the ranks do not agree on the {what}: those of {exchange.name(others)} differ from "
                f"those of {exchange.name([0])}. {_HINTS[what]}"
            )
