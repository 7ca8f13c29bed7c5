"""Optimizers that need no gradient storage."""

from zograd.optim.mezo import MeZO, replay
from zograd.optim.records import Records

__all__ = ["MeZO", "Records", "replay"]


def __dir__() -> list[str]:
    return list(__all__)
