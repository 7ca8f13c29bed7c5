"""Evaluators: how ``fn`` is called on points, one file each."""

from zograd.evaluators.base import Evaluator
from zograd.evaluators.batched import Batched
from zograd.evaluators.loop import Loop
from zograd.evaluators.vmap import Vmap

__all__ = ["EVALUATORS", "Batched", "Evaluator", "Loop", "Vmap"]

EVALUATORS: dict[str, type[Loop | Vmap | Batched]] = {"loop": Loop, "vmap": Vmap, "batched": Batched}
"""The names that ``evaluator=`` accepts."""
