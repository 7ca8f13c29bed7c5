"""Nested arguments to a tuple of float leaves and back; the only module that imports optree."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import optree
import torch

from zograd._base.torch_private import storages

_tree_flatten: Callable[[Any], tuple[list[Any], optree.PyTreeSpec]] = optree.tree_flatten

Leaves: TypeAlias = tuple[torch.Tensor, ...]

_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True, eq=False)
class Form:
    """What a call looks like without its leaves; the same object for all calls that look alike.

    It holds no tree structure: those of two dicts with the same keys compare equal whatever their order, and an object
    shared by both would give the one's order to the other.
    """

    argnums: tuple[int | str, ...]
    places: tuple[int, ...]  # where each differentiated argument stands among all
    spans: tuple[range, ...]  # and where its leaves are


@dataclass(frozen=True)
class Arguments:
    """A call's arguments, taken apart: what is differentiated, the other tensors, and everything else."""

    form: Form
    spec: optree.PyTreeSpec
    leaves: list[Any]
    chosen: tuple[int, ...]  # the leaves that are differentiated

    def params(self) -> Leaves:
        """The differentiated leaves."""
        return tuple(self.leaves[i] for i in self.chosen)

    def build(self, params: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's positional and keyword arguments with these tensors in place of the differentiated ones."""
        return self.call(_both, params)  # type: ignore[no-any-return]

    def call(self, fn: Callable[..., Any], params: Leaves) -> Any:
        """Call a function with these tensors in place of the differentiated ones."""
        leaves = self.leaves.copy()
        for i, leaf in zip(self.chosen, params, strict=True):
            leaves[i] = leaf
        args, kwargs = optree.tree_unflatten(self.spec, leaves)
        return fn(*args, **kwargs)

    def structure(self, per_leaf: Sequence[Any], *, several: bool) -> Any:
        """One value a differentiated leaf, in the structure of the differentiated arguments; None at the others."""
        values = dict(zip(self.chosen, per_leaf, strict=True))
        trees = [
            optree.tree_unflatten(tree, [values.get(i) for i in span])
            for tree, span in zip(self.trees(), self.form.spans, strict=True)
        ]
        return tuple(trees) if several else trees[0]

    def order(self) -> list[int]:
        """The leaves' numbers as one meets them in the call, numbered with every dict's keys sorted."""
        numbers = optree.tree_unflatten(self.spec, range(len(self.leaves)))
        with optree.dict_insertion_ordered(True, namespace="zograd"):
            return [int(number) for number in optree.tree_leaves(numbers, namespace="zograd")]

    def trees(self) -> list[optree.PyTreeSpec]:
        """The structure of each differentiated argument."""
        positional, keyword = self.spec.children()
        children = [*positional.children(), *keyword.children()]
        return [children[k] for k in self.form.places]


def _both(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any], argnums: tuple[int | str, ...]) -> Arguments:
    """Take a call apart.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
        argnums: the differentiated ones, an index into ``args`` or a key of ``kwargs`` each.

    Returns:
        The arguments, with every leaf in ``argnums`` that is a floating or complex tensor chosen.
    """
    leaves, spec = _tree_flatten((args, kwargs))
    form = _form(spec, argnums)
    chosen = []
    for span in form.spans:
        for i in span:
            x = leaves[i]
            if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex() or x.is_quantized):
                chosen.append(i)
    return Arguments(form, spec, leaves, tuple(chosen))


@functools.lru_cache(maxsize=256)
def _form(spec: optree.PyTreeSpec, argnums: tuple[int | str, ...]) -> Form:
    positional, keyword = spec.children()
    names = [*range(positional.num_children), *keyword.entries()]
    children = [*positional.children(), *keyword.children()]
    starts = [0, *itertools.accumulate(tree.num_leaves for tree in children)]
    places = tuple([names.index(argnum) for argnum in argnums])
    return Form(argnums, places, tuple([range(starts[k], starts[k + 1]) for k in places]))


def sigma_per_leaf(sigma: Any, arguments: Arguments, *, several: bool, call: str = "zero_order") -> tuple[float, ...]:
    """The smoothing radius of each differentiated leaf, from a number or a tree of numbers.

    Returns:
        One number a leaf.

    Raises:
        ValueError: if ``sigma`` is a tree of another structure than the differentiated arguments.
    """
    if isinstance(sigma, (int, float)):
        return (float(sigma),) * len(arguments.chosen)
    trees = sigma if several and isinstance(sigma, (tuple, list)) else (sigma,)
    specs = [optree.tree_structure(tree) for tree in trees]
    if specs != arguments.trees():
        wanted = str(arguments.structure([Ellipsis] * len(arguments.chosen), several=several)).replace(
            "Ellipsis", "..."
        )
        raise ValueError(
            f"`{call}(sigma=...)` must be a number or have the structure of the differentiated arguments, "
            f"{wanted}, "
            f"got {sigma}."
        )
    values = [leaf for tree in trees for leaf in optree.tree_leaves(tree)]
    positions = [i for span in arguments.form.spans for i in span]
    by_position = dict(zip(positions, values, strict=True))
    return tuple(float(by_position[i]) for i in arguments.chosen)


def take_apart(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree, and what puts such leaves together again."""
    leaves, spec = _tree_flatten(tree)
    return leaves, functools.partial(optree.tree_unflatten, spec)


def same_structure(tree: Any, other: Any) -> bool:
    """Whether two trees differ in their leaves only."""
    return bool(optree.tree_structure(tree) == optree.tree_structure(other))


def numbers(tree: Any) -> list[Any]:
    """The leaves of a tree of numbers."""
    return list(optree.tree_leaves(tree))


def unsupported(p: torch.Tensor) -> str | None:
    """What kind of tensor this is that cannot be differentiated, if it is one."""
    if p.is_complex():
        return f"a complex tensor ({p.dtype})"
    if p.layout != torch.strided:
        return f"a sparse tensor ({p.layout})"
    if p.is_quantized:
        return f"a quantized tensor ({p.dtype})"
    if p.is_floating_point() and p.dtype.itemsize == 1:  # which torch computes nothing with
        return f"a tensor of {p.dtype}"
    if p.is_meta:
        return "a meta tensor (without values)"
    if hasattr(p, "device_mesh"):
        return "a DTensor (differentiate its local part)"
    if type(p) not in (torch.Tensor, torch.nn.Parameter) and storages(p) is None:
        return f"a {type(p).__name__}, which wraps other tensors,"
    return None


@dataclass(frozen=True)
class Space:
    """The flat layout of the differentiated leaves in one compute dtype.

    With ``batch_dim`` every leaf carries ``slices`` independent slices along that dimension, and the layout is
    (slices, dim): all leaves of slice 0, then all of slice 1. Otherwise there is one slice.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    batch_dim: int | None = None
    slices: int = 1
    dtype: torch.dtype = field(init=False)
    dim: int = field(init=False)  # values in one slice
    size: int = field(init=False)  # and in all of them
    bounds: tuple[tuple[int, int], ...] = field(init=False)
    simple: bool = field(init=False)  # one leaf that is its own flat vector

    def __post_init__(self) -> None:
        sizes = [shape.numel() // self.slices for shape in self.shapes]
        ends = list(itertools.accumulate(sizes))
        double = torch.float64 in self.dtypes
        # Noise and sums in a leaf's own half precision would lose what the differences measure.
        object.__setattr__(self, "dtype", torch.float64 if double else torch.float32)
        object.__setattr__(self, "dim", sum(sizes))
        object.__setattr__(self, "size", self.slices * self.dim)
        object.__setattr__(self, "bounds", tuple(zip([0, *ends[:-1]], ends, strict=True)))
        object.__setattr__(self, "simple", len(sizes) == 1 and len(self.shapes[0]) == 1 and self.batch_dim is None)

    @classmethod
    def of(cls, params: Leaves, batch_dim: int | None = None) -> Space:
        """The layout of some leaves, all on one device."""
        shapes = tuple(p.shape for p in params)
        return _space(shapes, tuple(p.dtype for p in params), params[0].device, batch_dim)

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """No autocast: a matrix product of ours in bfloat16 would round points or gradient to three digits."""
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING

    def split(self, flat: torch.Tensor) -> Leaves:
        """Views of ``(*lead, size)`` as leaves of shape ``(*lead, *shape)``, in the compute dtype."""
        if self.simple:
            return (flat,)
        lead = flat.shape[:-1]
        if self.batch_dim is None:
            return tuple(
                flat[..., a:b].view(lead + shape) for (a, b), shape in zip(self.bounds, self.shapes, strict=True)
            )
        rows = flat.view((*lead, self.slices, self.dim))
        return tuple(self._leaf(rows[..., a:b], i) for i, (a, b) in enumerate(self.bounds))

    def _leaf(self, rows: torch.Tensor, i: int) -> torch.Tensor:
        assert self.batch_dim is not None
        lead, shape = rows.shape[:-2], self.shapes[i]
        rest = shape[: self.batch_dim] + shape[self.batch_dim + 1 :]
        return rows.reshape((*lead, self.slices, *rest)).movedim(len(lead), len(lead) + self.batch_dim)

    def join(self, leaves: Leaves) -> torch.Tensor:
        """The flat vector of some leaves of these shapes."""
        if self.batch_dim is None:
            return torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in leaves])
        rows = [leaf.movedim(self.batch_dim, 0).reshape(self.slices, -1).to(self.dtype) for leaf in leaves]
        return torch.cat(rows, dim=1).reshape(-1)

    def cast(self, leaves: Leaves) -> Leaves:
        """Leaves in their own dtypes."""
        return tuple(leaf.to(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True))


@functools.lru_cache(maxsize=256)
def _space(
    shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...], device: torch.device, batch_dim: int | None
) -> Space:
    return Space(shapes, dtypes, device, batch_dim, 1 if batch_dim is None else shapes[0][batch_dim])


def by_slice(values: torch.Tensor, space: Space, lead: int) -> torch.Tensor:
    """Return values of shape (*lead, *out) as (*lead, slices, outputs a slice)."""
    if space.batch_dim is not None:
        values = values.movedim(lead + space.batch_dim, lead)
    return values.reshape(*values.shape[:lead], space.slices, -1)


def one_per_slice(values: torch.Tensor, space: Space) -> torch.Tensor:
    """Return values (N, *out) of an objective of one value a slice as (N, slices)."""
    return by_slice(values, space, 1).squeeze(2)


def from_slices(values: torch.Tensor, shape: torch.Size, space: Space, lead: int) -> torch.Tensor:
    """Return values of shape (*lead, slices, outputs a slice) as (*lead, *out), ``shape`` being ``out``."""
    if space.batch_dim is None:
        return values.reshape(*values.shape[:lead], *shape)
    rest = shape[: space.batch_dim] + shape[space.batch_dim + 1 :]
    return values.reshape(*values.shape[:lead], space.slices, *rest).movedim(lead, lead + space.batch_dim)


def weigh(coefficients: torch.Tensor, cotangent: torch.Tensor, space: Space) -> torch.Tensor:
    """Return coefficients (N, *out) times a cotangent (*out), one number a direction and slice, (N, slices)."""
    columns = by_slice(coefficients, space, 1)
    return (columns * by_slice(cotangent.to(columns), space, 0)).sum(dim=2)
