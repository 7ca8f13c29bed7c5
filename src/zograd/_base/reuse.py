"""Memory used again where nobody kept it: fresh pages cost an evaluation at a million parameters as much as it does."""

from __future__ import annotations

import functools
import sys
from typing import TypeAlias

import torch

Rooms: TypeAlias = "tuple[torch.Tensor | None, ...]"

_SMALL = 1 << 15


def is_small(values: int) -> bool:
    """Whether an allocator has room for so many values at hand."""
    return values <= _SMALL


def _holders(tensor: torch.Tensor) -> tuple[int, ...]:
    """References to the tensor and to its memory, from Python and from below: by names, graphs, views and the like."""
    memory = tensor.untyped_storage()
    below = tensor._use_count(), torch._C._storage_Use_Count(memory._cdata)  # type: ignore[attr-defined]
    return sys.getrefcount(tensor), sys.getrefcount(memory), *below


def _unshared(leaves: list[torch.Tensor]) -> Rooms:
    free: list[torch.Tensor | None] = []
    while leaves:
        leaf = leaves.pop()
        small = is_small(leaf.numel()) or leaf.requires_grad or leaf.is_inference()
        free.append(None if small or _holders(leaf) != _ALONE else leaf)
    return tuple(reversed(free))


class Room:
    """Tensors of one size after the other, in the same memory as long as nobody holds on to it.

    A function may keep its argument, or anything that shares its memory; then the next tensor gets memory of its own.
    """

    def __init__(self) -> None:
        self._leaves: tuple[torch.Tensor, ...] = ()

    def take(self) -> Rooms:
        """The tensors of :meth:`give` that nobody else holds, None in place of the others."""
        leaves, self._leaves = self._leaves, ()
        waiting = list(leaves)
        del leaves
        return _unshared(waiting)

    def give(self, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Remember tensors to be used again."""
        if not all(is_small(leaf.numel()) for leaf in leaves):
            keep_pages()
        self._leaves = leaves
        return leaves


@functools.cache
def keep_pages() -> None:
    """Let the C library keep the memory that ``fn`` frees for its next evaluation.

    glibc gives blocks above a threshold back to the system and gets them again page by page, until a block as large as
    its upper limit, 32 MiB, was freed once: here one that is never touched.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)


_ALONE: tuple[int, ...] = ()  # matches nothing


def _measure_alone() -> tuple[int, ...]:
    """What :func:`_holders` says in :func:`_unshared` of a tensor that nobody else holds; it differs by version."""
    leaves = [torch.empty(_SMALL + 1)]
    leaf = leaves.pop()
    return _holders(leaf)


if hasattr(torch.Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count"):
    _ALONE = _measure_alone()
