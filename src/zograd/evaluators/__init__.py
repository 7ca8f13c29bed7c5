"""Evaluators: how ``fn`` is called on points."""

from zograd.evaluators.base import EVALUATORS, Evaluator, Loop
from zograd.evaluators.batched import Batched
from zograd.evaluators.distributed import Distributed
from zograd.evaluators.journal import Journal
from zograd.evaluators.pool import Pool
from zograd.evaluators.vmap import Vmap

__all__ = ["EVALUATORS", "Batched", "Distributed", "Evaluator", "Journal", "Loop", "Pool", "Vmap"]


def __dir__() -> list[str]:
    return list(__all__)
