"""The directions of an estimate shared out among the ranks of torch.distributed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.digest import Digest
from zograd._base.versions import __version__
from zograd.errors import RankError, ReplayError
from zograd.evaluators.base import Evaluator, as_evaluator
from zograd.evaluators.exchange import Exchange
from zograd.evaluators.reports import Report, Share, gather

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective
    from zograd.evaluators.points import Points

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
        self.group: Any = group
        self.inner: Evaluator = as_evaluator(inner, "Distributed(inner=...)")
        seconds = checks.number(
            timeout, "`Distributed(timeout=...)`", checks.POSITIVE_FINITE, kind="a number of seconds"
        )
        self.timeout: float = float(seconds)
        self.batched: bool = self.inner.batched

    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Yield the values of all ranks, once they are there."""
        hi = len(points) if hi is None else hi
        if lo == hi and not center:
            return
        exchange = Exchange(self.group, self.timeout)
        if len(exchange.ranks) == 1:
            yield from self.inner(fn, points, lo, hi, center=center)
            return
        if not points.directions.replayable:
            raise ReplayError(
                f"`Distributed`: the directions of {points.directions.distribution} cannot be made again on another "
                "rank. Draw from torch's random functions in `sample`."
            )
        _agree(exchange, points, lo, hi, center)
        share = Share.of(exchange, lo, hi)
        report = _evaluate(self.inner, fn, points, share, center)
        first, values = gather(exchange, share, report, fn.name, len(points.sides), center)
        fn.repeated -= (hi - lo - share.mine) * len(points.sides)
        if center:
            fn.recall(first.to(fn.value))
            yield first.to(fn.value.device)
        yield values.to(fn.value.device)

    def __repr__(self) -> str:
        group = "" if self.group is None else f"{self.group!r}, "
        return f"Distributed({group}inner={self.inner!r}, timeout={self.timeout:g})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Distributed:
        return Distributed(self.group, copy.deepcopy(self.inner, memo), self.timeout)  # a group has no copies


def _agree(exchange: Exchange, points: Points, lo: int, hi: int, center: bool) -> None:
    """Raise on every rank if one would evaluate other points."""
    directions, space = points.directions, points.directions.space
    asked = [directions.num, lo, hi, center, list(points.sides), list(points.sigma), space.batch_dim, space.slices]
    first = [values for _, values in directions.values(0, 0, min(space.size, _SEEN))]
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


def _evaluate(inner: Evaluator, fn: Objective, points: Points, share: Share, center: bool) -> Report:
    """The values of this rank's slice."""
    lo, hi = share.cuts[share.index : share.index + 2]
    values: list[torch.Tensor] = []
    try:
        if center or lo < hi:
            for piece in inner(fn, points, lo, hi, center=center):
                tensor = torch.tensor(piece, dtype=torch.float64) if isinstance(piece, list) else piece
                values.append(tensor.to("cpu", torch.float64).reshape(-1))
        flat = torch.cat(values) if values else torch.empty(0, dtype=torch.float64, device="cpu")
        wanted = (center + (hi - lo) * len(points.sides)) * fn.shape.numel()
        if flat.numel() != wanted:
            raise ValueError(f"the inner evaluator must yield {wanted} numbers, got {flat.numel()}.")
    except (Exception, SystemExit) as error:  # what it is, the others decide with this rank
        return Report(torch.Size(), torch.empty(0, dtype=torch.float64, device="cpu"), error)
    return Report(fn.shape, flat)
