"""Values written down as they arrive, so that a killed run goes on where it stopped."""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

import torch

from zograd._base import checks
from zograd._base.buffers import from_bytes, to_bytes
from zograd._base.digest import Digest, Undigestable, code_of
from zograd._base.streams import CENTER
from zograd._base.versions import __version__
from zograd.errors import JournalError, ReplayError
from zograd.evaluators.base import Evaluator, as_evaluator
from zograd.evaluators.journal_file import JournalFile
from zograd.evaluators.task.answer import Answer
from zograd.evaluators.task.objective import all_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zograd.evaluators.task.objective import Objective
    from zograd.evaluators.task.points import Points

_FORMAT = "1"
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class Journal(Evaluator):
    """Write each value to a file as it arrives; run again, read what is there and evaluate the rest.

    A run that is killed at any moment and started again with the same journal gets the same values, and so the same
    gradients, bit for bit; ``fn`` is called again only for what was being evaluated at that moment. A value is looked
    up by the contents of all arguments of ``fn``, the settings, the seed and the point, so a file can serve a whole
    run, and whatever differs is evaluated. Of what ``fn`` reads elsewhere (closures, globals, attributes of
    objects, and what the functions that it calls read) numbers, texts, tensors, arrays, functions and modules count;
    what lists, dicts and sets hold may be a log, and does not, nor does what ``fn`` itself assigns to.
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
        self._file = JournalFile(self.path)
        self._estimates: WeakKeyDictionary[Objective, _Recorded] = WeakKeyDictionary()

    def close(self) -> None:
        """Close the file; the next estimate opens it again."""
        self._file.close()

    def center(self, fn: Objective, points: Points) -> Answer:
        """Return the center's value from the file; a module is evaluated again, for the traces that this leaves."""
        recorded = self._recorded(fn, points)
        if recorded.center is not None and fn.module is None:
            return recorded.recall_center()
        answer = self.inner.center(fn, points)
        return answer if answer.error is not None else recorded.take_center(answer)

    def values(self, fn: Objective, points: Points, lo: int = 0, hi: int | None = None) -> Iterator[Answer]:
        """Yield what the file has, and what the inner evaluator finds for the rest."""
        recorded = self._recorded(fn, points)
        for start, stop, offsets in list(recorded.spans(lo, len(points.directions) if hi is None else hi)):
            if offsets:
                yield from self._evaluate(fn, recorded, start, stop, offsets)
            else:
                yield Answer(recorded.values(start, stop))
        recorded.settle()

    def _recorded(self, fn: Objective, points: Points) -> _Recorded:
        if fn not in self._estimates:
            if not points.directions.replayable:
                raise ReplayError(
                    f"`Journal`: the directions of {points.directions.distribution} cannot be made again when the run "
                    "is started again. Draw from torch's random functions in `sample`."
                )
            self._file.open(_header(fn.fn))
            self._estimates[fn] = _Recorded(self._file, _digest(fn, points, self.key), fn, points)
        return self._estimates[fn]

    def _evaluate(
        self, fn: Objective, recorded: _Recorded, start: int, stop: int, offsets: tuple[float, ...]
    ) -> Iterator[Answer]:
        points = recorded.points
        columns = [points.offsets.index(c) for c in offsets]
        fn.arrived = recorded.listener(columns)
        answers = self.inner.values(fn, points.only(offsets), start, stop)
        try:
            for answer in answers:
                if answer.error is None:
                    answer = replace(answer, values=recorded.take(answer.values, start, columns))
                    start += len(answer.values)
                yield answer
        finally:
            if isinstance(answers, Generator):
                answers.close()  # it may yet be told of values that were under way
            fn.arrived = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: part for name, part in self.__dict__.items() if name != "_estimates"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _estimates=WeakKeyDictionary())

    def __repr__(self) -> str:
        key = "" if self.key is None else f", key={self.key!r}"
        return f"Journal({self.inner!r}, {self.path!r}{key})"

    def __eq__(self, other: object) -> bool:
        mine = (self.inner, self.path, self.key)
        return isinstance(other, Journal) and mine == (other.inner, other.path, other.key)

    def __hash__(self) -> int:
        return hash(self.path)


class _Recorded:
    """The values of one estimate: those of the file, and those that come.

    Args:
        file: the file.
        key: of the estimate.
        fn: the objective, which may be gone before this is.
        points: where.
    """

    def __init__(self, file: JournalFile, key: bytes, fn: Objective, points: Points) -> None:
        self.fn: Objective = proxy(fn)
        self.points = points
        self._file, self._key = file, key
        self._rows = file.read(key)
        self._pending: dict[int, bytes] = {}  # not finite: of use only if the estimate comes to its end
        self.center: bytes | None = self._rows.pop(CENTER, None)
        self._read: set[str] = set()  # names of a module's parameters that the file's values have read
        for point in [point for point in self._rows if point < CENTER]:
            self._read.update(json.loads(self._rows.pop(point)))
        if fn.module is not None:
            fn.module.begin()
            fn.module.read |= self._read
        if fn.policy.drop is None:  # what another policy gave up, this one has to evaluate
            self._rows = {point: data for point, data in self._rows.items() if all_finite(from_bytes(data))}

    # ------------------------------------------------------------------------------------------ what is in the file

    def spans(self, lo: int, hi: int) -> Iterator[tuple[int, int, tuple[float, ...]]]:
        """Spans of directions that lack the same sides, and those sides."""
        sides = self.points.offsets

        def missing(i: int) -> tuple[float, ...]:
            return tuple(c for j, c in enumerate(sides) if i * len(sides) + j not in self._rows)

        for lacking, group in itertools.groupby(range(lo, hi), missing):
            span = list(group)
            yield span[0], span[-1] + 1, lacking

    def values(self, lo: int, hi: int) -> torch.Tensor:
        """Values of whole directions, from the file."""
        sides = len(self.points.offsets)
        rows = [self._row(point) for point in range(lo * sides, hi * sides)]
        return torch.stack(rows).view(hi - lo, sides, *self.fn.shape).to(self.fn.device)

    def _row(self, point: int) -> torch.Tensor:
        data = self._rows[point]
        if len(data) != 8 * self.fn.shape.numel():
            raise JournalError(
                f"`Journal(path={self._file.path!r})`: {self.fn.name} returned values of shape "
                f"{tuple(self.fn.shape)} now and others before: it is not a function of its arguments and seed alone."
            )
        return from_bytes(data, self.fn.shape)

    def recall_center(self) -> Answer:
        """Return the center's value, with what its evaluation had shown about ``fn``."""
        head, _, data = (self.center or b"").partition(b"\0")
        try:
            told = json.loads(head)
            answer = Answer(from_bytes(data, told["shape"]).to(told["device"]), dtype=_DTYPES[told["dtype"]])
            answer.report.facts.differentiates = bool(told["differentiates"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise JournalError(
                f"`Journal(path={self._file.path!r})` is damaged: the center's value cannot be read: {error!r}. Give "
                "another path, or delete the file and evaluate again."
            ) from error
        return answer

    # ------------------------------------------------------------------------------------------------ what arrives

    def take_center(self, answer: Answer) -> Answer:
        """Write the center's value down; one that was evaluated for its traces gives way to that of the file."""
        if self.center is not None:
            recalled = self.recall_center()
            return replace(answer, values=recalled.values, dtype=recalled.dtype)
        told = {
            "shape": list(answer.values.shape),
            "dtype": str(answer.dtype).removeprefix("torch."),
            "device": str(answer.device or answer.values.device),
            "differentiates": answer.report.facts.differentiates,
        }
        self._keep({CENTER: json.dumps(told).encode() + b"\0" + to_bytes(answer.values)}, finite=True)
        return answer

    def listener(self, columns: list[int]) -> Callable[[int, torch.Tensor], None]:
        """Return what an evaluator of points at these offsets tells each value as it comes."""
        sides, asked = len(self.points.offsets), len(columns)

        def arrived(number: int, value: torch.Tensor) -> None:
            i, j = divmod(number, asked)
            self._keep({i * sides + columns[j]: to_bytes(value)}, finite=all_finite(value))

        return arrived

    def take(self, values: torch.Tensor, start: int, columns: list[int]) -> torch.Tensor:
        """Write values down, as far as they were not as they came, and put the offsets in that the file has."""
        sides, count = len(self.points.offsets), len(values)
        fresh = {
            (start + r) * sides + column: (r, k)
            for r in range(count)
            for k, column in enumerate(columns)
            if (start + r) * sides + column not in self._rows and (start + r) * sides + column not in self._pending
        }
        if fresh:
            host = values.detach().to("cpu", torch.float64)
            finite = {point: all_finite(host[at]) for point, at in fresh.items()}
            for which in (True, False):
                self._keep({p: to_bytes(host[at]) for p, at in fresh.items() if finite[p] is which}, finite=which)
        if len(columns) == sides or not count:
            return values if len(columns) == sides else values.new_empty((0, sides, *self.fn.shape))
        self._rows.update(self._pending)
        return self.values(start, start + count).to(values.device)

    def _keep(self, rows: dict[int, bytes], *, finite: bool) -> None:
        if self.fn.module is not None and (names := self.fn.module.read - self._read):
            # Before the values, so that a run that goes on does not take what they read for unread.
            self._file.write(self._key, {CENTER - 1 - len(self._read): json.dumps(sorted(names)).encode()})
            self._read |= names
        if not finite:
            self._pending.update(rows)
        elif rows:
            self._file.write(self._key, rows)
            self._rows.update(rows)

    def settle(self) -> None:
        """The estimate took all values, those that are not finite included."""
        if self._pending:
            self._file.write(self._key, self._pending)


def _digest(fn: Objective, points: Points, key: Callable[..., Any] | None) -> bytes:
    """The key of an estimate: 128 bits of all that its values depend on."""
    directions, space = points.directions, points.directions.space
    device = space.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    digest = Digest().add([directions.seed, directions.num, list(points.offsets), list(points.sigma), fn.shared])
    digest.add([space.batch_dim, space.slices, device, str(torch.get_default_dtype()), autocast])
    digest.add([leaf.detach() for leaf in points.params])
    # A point of direction 0, which tells the distribution with all its settings from any other.
    digest.add([leaf.detach() for leaf in points.first()])
    if key is not None:
        args, kwargs = fn.arguments.build(points.params)
        stands = key(*args[fn.module is not None :], **kwargs)
        return _add(digest, stands, "what `Journal(key=...)` returned").result()
    chosen = set(fn.arguments.chosen)
    digest.add(str(fn.arguments.spec)).add(fn.arguments.order())
    for i, leaf in enumerate(fn.arguments.leaves):
        digest.add(i)
        if i not in chosen:
            _add(digest, leaf, f"an argument of {fn.name}")
    read = fn.fn if fn.module is None else fn.module.module
    return _with_digest(digest.captured, read, f"an argument that {fn.name} holds", digest).result()


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
