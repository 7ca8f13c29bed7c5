"""What comes back of a task: values, a report, or why there are none."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zograd._base.buffers import from_bytes, to_bytes
from zograd._base.digest import Digest
from zograd.errors import DeterminismError, EvaluationError, WorkerError

if TYPE_CHECKING:
    from zograd.evaluators.task.points import Points


@dataclass
class Facts:
    """Cache of facts about ``fn``, kept from call to call.

    Attributes:
        differentiates: whether it uses autograd, maybe with respect to its differentiated arguments.
        draws: whether it draws torch random numbers in a call for many points.
    """

    differentiates: bool = False
    draws: bool = False

    def learn(self, other: Facts) -> None:
        """Add what was found out elsewhere."""
        self.differentiates |= other.differentiates
        self.draws |= other.draws


class Proof(NamedTuple):
    """What shows that two processes make the same points: torch's version and a digest of the first point."""

    version: str
    digest: bytes

    @classmethod
    def of(cls, points: Points) -> Proof:
        """Make the first point here."""
        return cls(torch.__version__, Digest().add([leaf.detach() for leaf in points.first()]).result())

    def compare(self, other: Proof, worker: str | None, typed: str) -> None:
        """Raise if a worker makes other points.

        Args:
            other: the worker's.
            worker: what it is called.
            typed: how errors call the evaluator.

        Raises:
            DeterminismError: if it has another torch or makes other points.
        """
        if other.version != self.version:
            raise DeterminismError(
                f"{typed}: worker {worker} has torch {other.version}, this process {self.version}: directions, and so "
                "the gradient, may differ. Install the same version everywhere."
            )
        if other.digest != self.digest:
            raise DeterminismError(
                f"{typed}: worker {worker} makes other points than this process from the same seed, as if it were "
                "another kind of machine. Its values would belong to another gradient."
            )


@dataclass
class Report:
    """What evaluations cost and showed.

    Attributes:
        evaluations: evaluations of ``fn``, repeated ones included.
        retries: those that were repeated because they had failed.
        failures: those that failed and were dealt with by a policy.
        facts: what is known about ``fn`` afterwards.
        worker: the process and thread that evaluated; None for the objective's own.
        proof: with a worker's first answer, its version of torch and a digest of its first point.
        read: names of a module's parameters that the evaluations read.
        counted: whether the estimate's objective has added it up.
    """

    evaluations: int = 0
    retries: int = 0
    failures: int = 0
    facts: Facts = field(default_factory=Facts)
    worker: str | None = None
    proof: Proof | None = None
    read: frozenset[str] = frozenset()
    counted: bool = False

    @classmethod
    def of(cls, reports: list[Report]) -> Report:
        """Return the report of a task from those of its parts, which were counted."""
        whole = cls(
            sum(report.evaluations for report in reports),
            sum(report.retries for report in reports),
            sum(report.failures for report in reports),
            counted=True,
        )
        for report in reports:
            whole.facts.learn(report.facts)
            whole.read |= report.read
        return whole


@dataclass
class Answer:
    """What comes back of a task; it pickles by the bytes of its values, and with an error of any kind.

    Attributes:
        values: float64, of shape (directions, offsets, *out); of the center ``out``.
        report: what the evaluations cost and showed.
        error: why there are no values; an answer with an error may be handed on before all others.
        dtype: that of the center's value as ``fn`` returned it.
        device: where ``fn`` returned the values, if they are not there.
    """

    values: torch.Tensor
    report: Report = field(default_factory=Report)
    error: BaseException | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device | None = None

    def __getstate__(self) -> dict[str, Any]:
        error = None if self.error is None else packed_error(self.error)
        values, device = (to_bytes(self.values), tuple(self.values.shape)), self.device or self.values.device
        return {**self.__dict__, "values": values, "device": device, "error": error}

    def __setstate__(self, state: dict[str, Any]) -> None:
        error = None if state["error"] is None else unpacked_error(state["error"])
        self.__dict__.update({**state, "values": from_bytes(*state["values"]), "error": error})


def beside(answers: list[Answer], directions: int) -> Answer:
    """Return the answer that these are parts of, direction by direction and offset by offset."""
    values = torch.cat([answer.values.flatten(0, 1) for answer in answers])
    return Answer(values.view(directions, -1, *values.shape[1:]), Report.of([answer.report for answer in answers]))


class RemoteTraceback(Exception):
    """Where an exception was raised in a worker, as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def packed_error(error: BaseException) -> tuple[list[bytes | str], str]:
    """An exception and its causes for another process: pickled, or told in words if they do not pickle."""
    chain: list[bytes | str] = []
    link: BaseException | None = error
    while link is not None and len(chain) < 4:
        try:
            data = pickle.dumps(link)
            pickle.loads(data)  # one whose constructor takes more than its text pickles and cannot be read
            chain.append(data)
        except Exception:
            chain.append(f"{type(link).__module__}.{type(link).__qualname__}, which does not pickle: {link!s:.200}")
        link = link.__cause__
    return chain, "".join(traceback.format_exception(error))


def unpacked_error(packed: tuple[list[bytes | str], str]) -> BaseException:
    """The exception, with its causes and where it was raised."""
    chain, text = packed
    errors = [_read(link) for link in chain]
    for error, cause in zip(errors, [*errors[1:], RemoteTraceback(text)], strict=True):
        error.__cause__ = cause
    return errors[0]


def _read(link: bytes | str) -> BaseException:
    if isinstance(link, str):
        return EvaluationError(f"a worker raised {link}")
    try:
        found = pickle.loads(link)
    except Exception as error:
        return WorkerError(f"a worker raised an exception that cannot be read here: {error!r:.200}")
    return found if isinstance(found, BaseException) else WorkerError(f"a worker raised {found!r:.200}")
