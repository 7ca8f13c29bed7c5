"""Values written down as they arrive, so that a killed run goes on where it stopped."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.buffers import from_bytes, to_bytes
from zograd._base.digest import Digest, Undigestable, code_of
from zograd._base.streams import CENTER
from zograd._base.versions import __version__
from zograd.errors import JournalError, ReplayError
from zograd.evaluators.base import Evaluator, as_evaluator
from zograd.evaluators.journal_file import Ledger
from zograd.failures import dropping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd.evaluators.base import Piece
    from zograd.evaluators.objective import Objective, Value
    from zograd.evaluators.points import Points

_FORMAT = "1"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class Journal(Evaluator):
    """Write each value to a file as it arrives; run again, read what is there and evaluate the rest.

    A run that is killed at any moment and started again with the same journal gets the same values, and so the same
    gradients, bit for bit; ``fn`` is called again only for what was being evaluated at that moment. A value is looked
    up by the contents of all arguments of ``fn``, the settings, the seed and the point, so a file can serve a whole
    run, and whatever differs is evaluated. Of what ``fn`` reads elsewhere, its closure and the globals it names count
    as far as they are numbers, texts, tensors, arrays, functions or modules; what those call in turn does not count.
    ``fn`` and the versions of zograd, torch and Python are in the file's header, and another one is refused.

    The file is an sqlite database on a local disk (a network file system may lack the locks it needs), safe against
    ``kill -9`` and for several processes at once. It holds plain numbers: reading one from elsewhere runs no code.

    The seed must be the same when the run is started again: give ``seed=``, or restore the state of ``generator=`` (of
    torch's global stream if there is neither). A module's center is evaluated again, for the traces it leaves (buffers,
    attributes). Values that are not finite are written once the estimate has accepted them, and read where
    ``failures=`` is a policy that accepts them.

    Args:
        inner: how ``fn`` is called for what is not in the file, an evaluator or its name. It may be another one when
            the run is started again.
        path: the file; it is made if there is none.
        key: called with the arguments of ``fn`` (of a module: of ``forward``) where these have no digest; what it
            returns stands for all of them but the differentiated tensors, and for what ``fn`` reads elsewhere.

    Raises:
        TypeError: if a setting is of a wrong type; of an estimate, if an argument of ``fn`` has no digest.
        ValueError: if ``inner`` is an unknown name.
        JournalError: of an estimate, if the file is of another program or version, or is damaged.
        ReplayError: of an estimate, if the distribution's directions cannot be made again.

    Examples:
        >>> import pathlib, tempfile, torch, zograd
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.journal"
        >>> @zograd.zero_order(num_samples=10, seed=0, evaluator=zograd.evaluators.Journal("loop", path))
        ... def slow(x):
        ...     return x.square().sum()
        >>> first, second = slow.estimate(torch.ones(3)), slow.estimate(torch.ones(3))
        >>> first.evaluations, second.evaluations, torch.equal(first.grad, second.grad)
        (11, 0, True)
    """

    def __init__(
        self, inner: Evaluator | str, path: str | os.PathLike[str], *, key: Callable[..., Any] | None = None
    ) -> None:
        self.inner: Evaluator = as_evaluator(inner, "Journal(inner)")
        checks.instance(path, (str, os.PathLike), "`Journal(path=...)`", "a path")
        checks.function(key, "`Journal(key=...)`", none=True)
        self.path: str = os.fspath(path)
        self.key: Callable[..., Any] | None = key
        self.batched: bool = self.inner.batched
        self._ledger = Ledger(self.path)

    def close(self) -> None:
        """Close the file; the next estimate opens it again."""
        self._ledger.close()

    def __call__(
        self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None, *, center: bool = True
    ) -> Iterator[Piece]:
        """Yield what the file has, and what the inner evaluator finds for the rest."""
        hi = len(points) if hi is None else hi
        page = self._page(fn, points)
        asked = center and (page.center is None or hasattr(fn.fn, "at_center"))
        fn.repeated -= page.known(lo, hi) + (center and not asked)
        if center and not asked:
            yield page.recall_center()
        spans = list(page.spans(lo, hi))
        if asked and not (spans and spans[0][2]):
            spans.insert(0, (lo, lo, points.sides))
        for n, (start, stop, sides) in enumerate(spans):
            if sides:
                yield from self._evaluate(page, start, stop, sides, center=asked and n == 0)
            else:
                yield page.values(start, stop)
        page.settle()

    def _page(self, fn: Objective, points: Points) -> _Page:
        if not points.directions.replayable:
            raise ReplayError(
                f"`Journal`: the directions of {points.directions.distribution} cannot be made again when the run is "
                "started again. Draw from torch's random functions in `sample`."
            )
        self._ledger.open(_header(fn.fn))
        return _Page(self._ledger, _digest(fn, points, self.key), fn, points)

    def _evaluate(
        self, page: _Page, start: int, stop: int, sides: tuple[float, ...], *, center: bool
    ) -> Iterator[Piece]:
        fn, points = page.fn, page.points
        columns = [points.sides.index(side) for side in sides]
        fn.arrived = page.listener(columns)
        pieces = self.inner(fn, points.only(sides), start, stop, center=center)
        try:
            if center:
                yield page.take_center(next(pieces))
            for piece in pieces:
                yield page.take(piece, start, columns)
                start += len(piece)
        finally:
            fn.arrived = None
            if isinstance(pieces, Generator):
                pieces.close()

    def __repr__(self) -> str:
        key = "" if self.key is None else f", key={self.key!r}"
        return f"Journal({self.inner!r}, {self.path!r}{key})"

    def __eq__(self, other: object) -> bool:
        mine = (self.inner, self.path, self.key)
        return isinstance(other, Journal) and mine == (other.inner, other.path, other.key)

    def __hash__(self) -> int:
        return hash(self.path)


class _Page:
    """The rows of one estimate: those of the file, and those that come."""

    def __init__(self, ledger: Ledger, key: bytes, fn: Objective, points: Points) -> None:
        self.fn, self.points = fn, points
        self._ledger, self._key = ledger, key
        self._rows = ledger.read(key)
        self._pending: dict[int, bytes] = {}  # not finite: of use only if the estimate comes to its end
        self.center = self._rows.pop(CENTER, None)
        if dropping(fn.policy) is None:  # what another policy gave up, this one has to evaluate
            self._rows = {point: data for point, data in self._rows.items() if _finite(from_bytes(data))}

    # ------------------------------------------------------------------------------------------ what is in the file

    def known(self, lo: int, hi: int) -> int:
        """Points of these directions that need no evaluation."""
        sides = len(self.points.sides)
        return sum(point in self._rows for point in range(lo * sides, hi * sides))

    def spans(self, lo: int, hi: int) -> Iterator[tuple[int, int, tuple[float, ...]]]:
        """Spans of directions that lack the same sides, and those sides."""
        sides = self.points.sides

        def missing(i: int) -> tuple[float, ...]:
            return tuple(c for j, c in enumerate(sides) if i * len(sides) + j not in self._rows)

        for lacking, group in itertools.groupby(range(lo, hi), missing):
            span = list(group)
            yield span[0], span[-1] + 1, lacking

    def values(self, lo: int, hi: int) -> torch.Tensor:
        """Values of whole directions, from the file."""
        sides = len(self.points.sides)
        rows = [self._row(point) for point in range(lo * sides, hi * sides)]
        return torch.stack(rows).view(hi - lo, sides, *self.fn.shape).to(self.fn.value.device)

    def _row(self, point: int) -> torch.Tensor:
        data = self._rows[point]
        if len(data) != 8 * self.fn.shape.numel():
            raise JournalError(
                f"`Journal(path={self._ledger.path!r})`: {self.fn.name} returned values of shape "
                f"{tuple(self.fn.shape)} now and others before: it is not a function of its arguments and seed alone."
            )
        return from_bytes(data, self.fn.shape)

    def recall_center(self) -> torch.Tensor:
        """The center's value, with what its evaluation had shown about ``fn``."""
        head, _, data = (self.center or b"").partition(b"\0")
        try:
            told = json.loads(head)
            dtype = _DTYPES[told["dtype"]]
            exact = from_bytes(data, told["shape"]).to(told["device"])
            self.fn.habits.differentiates |= bool(told["differentiates"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise JournalError(
                f"`Journal(path={self._ledger.path!r})` is damaged: the center's value cannot be read: {error!r}. Give "
                "another path, or delete the file and evaluate again."
            ) from error
        self.fn.recall(exact.to(dtype))
        return exact

    # ------------------------------------------------------------------------------------------------ what arrives

    def take_center(self, value: Piece) -> Piece:
        """Write the center's value down, or replace one that was evaluated for its traces by that of the file."""
        if self.center is not None:
            return self.recall_center()
        if not isinstance(value, torch.Tensor):
            return value  # which the estimator will not have
        told = {
            "shape": list(value.shape),
            "dtype": str(self.fn.value.dtype).removeprefix("torch."),
            "device": str(value.device),
            "differentiates": self.fn.habits.differentiates,
        }
        self._keep({CENTER: json.dumps(told).encode() + b"\0" + to_bytes(value)}, finite=_finite(value))
        return value

    def listener(self, columns: list[int]) -> Callable[[int, int, Value], None]:
        """What an evaluator of these sides tells each value as it comes."""
        sides = len(self.points.sides)

        def arrived(i: int, j: int, value: Value) -> None:
            self._keep({i * sides + columns[j]: to_bytes(value)}, finite=_finite(value))

        return arrived

    def take(self, piece: Piece, start: int, columns: list[int]) -> Piece:
        """Write a piece down, as far as it was not as it came, and put the sides in that the file has."""
        values = torch.tensor(piece, dtype=torch.float64) if isinstance(piece, list) else piece
        sides, count = len(self.points.sides), len(values)
        fresh = {
            (start + r) * sides + column: (r, k)
            for r in range(count)
            for k, column in enumerate(columns)
            if (start + r) * sides + column not in self._rows and (start + r) * sides + column not in self._pending
        }
        if fresh:
            host = values.detach().to("cpu", torch.float64)
            finite = {point: _finite(host[at]) for point, at in fresh.items()}
            for which in (True, False):
                self._keep({p: to_bytes(host[at]) for p, at in fresh.items() if finite[p] is which}, finite=which)
        if len(columns) == sides or not count:
            return piece if len(columns) == sides else values.new_empty((0, sides, *self.fn.shape))
        self._rows.update(self._pending)
        return self.values(start, start + count).to(values.device)

    def _keep(self, rows: dict[int, bytes], *, finite: bool) -> None:
        if not finite:
            self._pending.update(rows)
        elif rows:
            self._ledger.write(self._key, rows)
            self._rows.update(rows)

    def settle(self) -> None:
        """The estimate took all values, those that are not finite included."""
        if self._pending:
            self._ledger.write(self._key, self._pending)


def _digest(fn: Objective, points: Points, key: Callable[..., Any] | None) -> bytes:
    """The key of an estimate: 128 bits of all that its values depend on."""
    directions, space = points.directions, points.directions.space
    shared = fn.stream is not None and fn.stream.shared
    device = space.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    digest = Digest().add([directions.seed, directions.num, list(points.sides), list(points.sigma), shared])
    digest.add([space.batch_dim, space.slices, device, str(torch.get_default_dtype()), autocast])
    digest.add([leaf.detach() for leaf in points.params])
    # A point of direction 0, which tells the distribution with all its settings from any other.
    (first,) = points.rows(0, 1)
    digest.add([leaf.detach() for leaf in first(points.sides[0])])
    if key is not None:
        args, kwargs = fn.arguments.builder()(points.params)
        stands = key(*args[hasattr(fn.fn, "at_center") :], **kwargs)
        return _add(digest, stands, "what `Journal(key=...)` returned").result()
    chosen = set(fn.arguments.chosen)
    digest.add(str(fn.arguments.spec)).add(fn.arguments.order())
    for i, leaf in enumerate(fn.arguments.leaves):
        digest.add(i)
        if i not in chosen:
            _add(digest, leaf, f"an argument of {fn.name}")
    return _with_digest(digest.captured, fn.fn, f"an argument that {fn.name} holds", digest).result()


def _add(digest: Digest, value: Any, what: str) -> Digest:
    return _with_digest(digest.add, value, what, digest)


def _with_digest(take: Callable[[Any], Any], value: Any, what: str, digest: Digest) -> Digest:
    try:
        take(value)
    except Undigestable as error:
        raise TypeError(
            f"`Journal(key=...)` is needed: {what} has no digest by which its values could be found again, {error}. "
            "Give a function of the arguments that returns what tells them apart, as numbers, text or tensors."
        ) from error
    return digest


def _header(fn: Callable[..., Any]) -> dict[str, str]:
    owner = fn if hasattr(fn, "__qualname__") else type(fn)
    return {
        **_versions(),
        "function": f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', '')}",
        "function's code": code_of(fn),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "format": _FORMAT,
        "zograd version": __version__,
        "torch version": torch.__version__,
        "Python version": ".".join(platform.python_version_tuple()[:2]),
    }


def _finite(value: Value) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(torch.isfinite(value).all())
    return math.isfinite(value)
