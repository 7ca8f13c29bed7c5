"""Parameters replaced where they are used: a function runs at another point and nothing is written to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from zograd._tree import take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Overlay"]


class Overlay(TorchFunctionMode):
    """While entered, every torch function that is given one of the parameters gets its replacement.

    A replacement is made where it is used and dropped after: what is in memory is what is in use. Attributes that tell
    of shape and kind are the parameter's own.

    Args:
        params: the parameters; recognized by identity, wherever a module or a closure keeps them.
        replacement: the tensor in place of a parameter, by its index.
    """

    def __init__(self, params: Sequence[torch.Tensor], replacement: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._indices = {id(p): k for k, p in enumerate(params)}
        self._replacement = replacement
        self.used: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        leaves, together = take_apart((args, kwargs))  # parameters may come in lists, as those of an LSTM do
        places = [(i, self._indices[id(leaf)]) for i, leaf in enumerate(leaves) if id(leaf) in self._indices]
        if places:
            self._check(func, args, kwargs)
            made: dict[int, torch.Tensor] = {}
            for i, k in places:
                leaves[i] = made[k] if k in made else made.setdefault(k, self._replacement(k))
            self.used.update(made)
            args, kwargs = together(leaves)
            del leaves, made
        return func(*args, **(kwargs or {}))

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets = args[:1] if not args or not isinstance(args[0], (list, tuple)) else args[0]
        first = any(id(target) in self._indices for target in targets)
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True
        outs = kwargs.get("out")
        outs = outs if isinstance(outs, (tuple, list)) else (outs,)
        if (first and writes) or any(id(out) in self._indices for out in outs):
            raise RuntimeError(
                f"the closure writes to a parameter in place (`{resolve_name(func) or name}`): it runs at perturbed "
                "parameters, where that would be lost. Write to it outside the closure."
            )
        if first and name in _RAW:
            raise RuntimeError(
                f"the closure asks for a parameter's memory (`{name}`), which holds the unperturbed values: use torch "
                "functions of the parameter."
            )


_WRITES = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {
    "__ilshift__",
    "__irshift__",
    "__setitem__",
    "__set__",
}
_RAW = {"data_ptr", "untyped_storage", "storage", "_typed_storage", "__dlpack__"}
_ATTRIBUTES = [
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "grad",
    "grad_fn",
    "names",
    "itemsize",
    "nbytes",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_nested",
]
_METHODS = [
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "stride",
    "is_contiguous",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "storage_offset",
    "get_device",
    "is_inference",
    "is_same_size",
    "__len__",
    "__hash__",
]
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What tells of a tensor without its values."""
