"""A window of an unrolled system as evaluators see it: parameters and a packed state to a loss and the next state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from zograd._base.trees import Leaves, same_structure, take_apart
from zograd.evaluators.task.returned import as_tensor


@dataclass(frozen=True)
class Layout:
    """A tree of tensors as a vector of float64 values and back, with every bit.

    float64 holds the values of all types of 32 bits or fewer; of a 64-bit integer it holds each half.

    Attributes:
        shapes: one a leaf.
        dtypes: likewise.
        skeleton: the tree, with numbers for leaves.
        together: what puts leaves into the tree.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    skeleton: Any
    together: Callable[[list[Any]], Any]

    @classmethod
    def of(cls, tree: Any, device: torch.device, typed: str) -> tuple[Layout, Leaves]:
        """The layout of a tree of tensors, arrays and numbers, and its leaves as tensors.

        Args:
            tree: the state.
            device: where all of it must be.
            typed: what the user called, for errors.

        Returns:
            The layout and the leaves.

        Raises:
            TypeError: if a leaf is none of these.
            ValueError: if a tensor is elsewhere.
        """
        found, together = take_apart(tree)
        leaves = tuple([_leaf(leaf, device, typed) for leaf in found])
        for leaf in leaves:
            if leaf.device != device:
                raise ValueError(f"{typed}: the state must be on the device of `params`, {device}, got {leaf.device}.")
        shapes, dtypes = tuple([x.shape for x in leaves]), tuple([x.dtype for x in leaves])
        return cls(shapes, dtypes, together(list(range(len(leaves)))), together), leaves

    @cached_property
    def widths(self) -> list[int]:
        """How many values of the vector each leaf takes."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [shape.numel() * (1 + (dtype == torch.int64 or dtype.is_complex)) for shape, dtype in pairs]

    def pack(self, leaves: Leaves, lead: torch.Size, device: torch.device) -> torch.Tensor:
        """Leaves with these leading axes as float64 of shape (*lead, size)."""
        columns = [_to_float64(leaf).reshape(*lead, -1) for leaf in leaves if leaf.numel()]
        return torch.cat(columns or [torch.empty(*lead, 0, dtype=torch.float64, device=device)], dim=-1)

    def unpack(self, packed: torch.Tensor) -> Any:
        """The tree of a vector, or of many with leading axes."""
        lead, leaves = packed.shape[:-1], []
        for part, shape, dtype in zip(
            torch.split_with_sizes(packed, self.widths, dim=-1), self.shapes, self.dtypes, strict=True
        ):
            leaves.append(_from_float64(part, (*lead, *shape), dtype))
        return self.together(leaves)

    def taken(self, tree: Any, lead: torch.Size, device: torch.device, what: str) -> Leaves:
        """The leaves of a tree that must be of this layout.

        Args:
            tree: the state that came back.
            lead: leading axes that each leaf has.
            device: where numbers and arrays go.
            what: whose it is, for errors.

        Returns:
            The leaves, detached.

        Raises:
            ValueError: if its structure, a shape or a dtype differ.
        """
        found, together = take_apart(tree)
        leaves = tuple([_leaf(leaf, device, what) for leaf in found])
        shapes = tuple([(*lead, *shape) for shape in self.shapes])
        same = same_structure(tree, self.skeleton) and tuple([tuple(x.shape) for x in leaves]) == shapes
        if not same or not all(map(_fits, found, leaves, self.dtypes)):
            wanted = self.together(list(map(_told, shapes, self.dtypes)))
            got = together([_told(tuple(leaf.shape), leaf.dtype) for leaf in leaves])
            raise ValueError(f"{what} must have the structure, shapes and dtypes it began with, {wanted}, got {got}.")
        return tuple([leaf.to(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)])


class Window:
    """The function that evaluators call: the user's, with the state packed into a vector on both sides.

    Args:
        layout: of the state.
        name: how errors call the user's function.
        lead: axes in front of each parameter and state, 1 if the user's function is vectorized by its author.
    """

    def __init__(self, layout: Layout, name: str, lead: int) -> None:
        self.__qualname__ = name.strip("`")
        self._layout, self._name, self._lead = layout, name, lead

    def __call__(self, params: Any, packed: torch.Tensor, fn: Callable[..., Any], *args: Any) -> torch.Tensor:
        """The loss and the next state, float64 of shape (*lead, 1 + size)."""
        lead = packed.shape[: self._lead]
        # Detached: if fn differentiates, params may require grad here, but the state is its own affair.
        out = fn(params, self._layout.unpack(packed.detach()), *args)
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"{self._name} must return `(loss, state)`, got {type(out).__name__} {out!r:.80}.")
        loss, state = out
        loss = as_tensor(loss, self._name) if not isinstance(loss, float) else packed.new_tensor(loss)
        if loss.shape != lead:
            raise ValueError(
                f"{self._name} must return a loss of one value{' a parameter set' * self._lead}, of shape "
                f"{tuple(lead)}, got {tuple(loss.shape)}."
            )
        leaves = self._layout.taken(state, lead, packed.device, f"the state that {self._name} returns")
        rest = self._layout.pack(leaves, lead, packed.device)
        return torch.cat([loss.detach().to(rest).unsqueeze(-1), rest], dim=-1)


def _leaf(leaf: Any, device: torch.device, typed: str) -> torch.Tensor:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    try:
        return torch.as_tensor(leaf.copy() if hasattr(leaf, "dtype") else leaf, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{typed}: a state is a tree of tensors, arrays and numbers, got {type(leaf).__name__} {leaf!r:.60} in it."
        ) from None


def _fits(found: Any, leaf: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tensors keep their dtype; a number or an array may have another width of it."""
    return leaf.dtype == dtype or not (isinstance(found, torch.Tensor) or not torch.can_cast(leaf.dtype, dtype))


def _told(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _to_float64(leaf: torch.Tensor) -> torch.Tensor:
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf.resolve_conj())
    if leaf.dtype == torch.int64:
        leaf = torch.stack([leaf >> 32, leaf & 0xFFFFFFFF], dim=-1)
    return leaf.to(torch.float64)


def _from_float64(part: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int64:
        halves = part.reshape(*shape, 2).to(torch.int64)
        return (halves[..., 0] << 32) | halves[..., 1]
    if dtype.is_complex:
        halves = part.reshape(*shape, 2)
        return torch.complex(halves[..., 0], halves[..., 1]).to(dtype)
    return part.reshape(shape).to(dtype)
