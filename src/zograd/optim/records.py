"""What an optimizer did: a seed and a few numbers for each step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from os import PathLike

    from zograd._base.trees import Leaves


@dataclass(frozen=True)
class Group:
    """The settings of a parameter group at a step, which parameters it trains, and which of them were not used."""

    lr: float
    sigma: float
    weight_decay: float
    trained: tuple[int, ...]
    unused: tuple[int, ...] = ()


@dataclass
class Records:
    """What an optimizer did: a seed and the coefficients of each step, a few bytes, and the settings where they change.

    With the weights that the run began with they are the weights it ended with, see :func:`replay`. A run of 20000
    steps with one direction each takes 160 kB. A learning rate that changes at every step adds its number to each.

    Attributes:
        num_samples: directions of each step.
        distribution: their family, by its ``repr``.
        double: whether a parameter is of float64, and so the coefficients are.
        seeds: one for each step.
        coefficients: ``num_samples`` for each step.
        shapes: those of the parameters.
        changes: the settings of the groups, with the step from which on they hold.

    Examples:
        >>> import torch, zograd
        >>> weights = torch.zeros(3)
        >>> x = torch.nn.Parameter(weights.clone())
        >>> opt = zograd.optim.MeZO([x], lr=0.1, sigma=0.01, seed=0)
        >>> for _ in range(10):
        ...     _ = opt.step(lambda: (x - 1).square().sum())
        >>> len(opt.records), opt.records.nbytes
        (10, 80)
        >>> zograd.replay(opt.records, [weights])
        >>> torch.equal(weights, x)
        True
    """

    num_samples: int
    distribution: str
    double: bool = False
    seeds: array[int] = field(default_factory=lambda: array("I"))
    coefficients: array[float] = field(default_factory=lambda: array("f"))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    changes: list[tuple[int, list[Group]]] = field(default_factory=list)  # from which step on

    def __len__(self) -> int:
        return len(self.seeds)

    def __repr__(self) -> str:
        return f"Records(steps={len(self)}, num_samples={self.num_samples}, distribution={self.distribution})"

    @property
    def nbytes(self) -> int:
        """Bytes of all steps, without the settings."""
        return sum(a.itemsize * len(a) for a in (self.seeds, self.coefficients))

    def steps(self) -> Iterator[tuple[int, list[float], list[Group]]]:
        """Seed, coefficients and settings of each step.

        Yields:
            ``(seed, coefficients, groups)``, one step after the other.
        """
        changes = iter([*self.changes, (len(self), [])])
        groups: list[Group] = []
        upcoming = next(changes)
        for step, seed in enumerate(self.seeds):
            while upcoming[0] == step:
                groups, upcoming = upcoming[1], next(changes)
            lo = step * self.num_samples
            yield seed, list(self.coefficients[lo : lo + self.num_samples]), groups

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain numbers, for ``torch.save`` and ``torch.load(weights_only=True)``.

        Returns:
            A dict for :meth:`from_state_dict`.
        """
        return {
            "num_samples": self.num_samples,
            "distribution": self.distribution,
            "seeds": torch.tensor(self.seeds, dtype=torch.int64).to(torch.uint32),
            "coefficients": torch.tensor(self.coefficients, dtype=torch.float64 if self.double else torch.float32),
            "shapes": [list(shape) for shape in self.shapes],
            "changes": [
                (step, [(g.lr, g.sigma, g.weight_decay, list(g.trained), list(g.unused)) for g in groups])
                for step, groups in self.changes
            ],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Records:
        """Records from :meth:`state_dict`.

        Args:
            state: what that returned.

        Returns:
            The records.
        """
        double = state["coefficients"].dtype == torch.float64
        return cls(
            state["num_samples"],
            state["distribution"],
            double,
            array("I", state["seeds"].to(torch.int64).tolist()),
            array("d" if double else "f", state["coefficients"].tolist()),
            [tuple(shape) for shape in state["shapes"]],
            [
                (step, [Group(a, b, c, tuple(d), tuple(e)) for a, b, c, d, e in groups])
                for step, groups in state["changes"]
            ],
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file.

        Args:
            path: where.
        """
        torch.save(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Records:
        """Read a file that :meth:`save` wrote; it can hold numbers only, no code.

        Args:
            path: where it is.

        Returns:
            The records.
        """
        return cls.from_state_dict(torch.load(path, weights_only=True))


def append(records: Records, seed: int, coefficients: list[float], groups: list[Group], params: Leaves) -> None:
    """Write one step down; the settings only if they changed."""
    if not records.double and any(p.dtype == torch.float64 for p in params):  # a group of them may come later
        records.double, records.coefficients = True, array("d", records.coefficients)
    if not records.changes or records.changes[-1][1] != groups:
        records.changes.append((len(records), groups))
        records.shapes = [tuple(p.shape) for p in params]
    records.seeds.append(seed)
    records.coefficients.extend(coefficients)
