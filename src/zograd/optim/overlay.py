"""Parameters replaced where they are used: a function runs at another point and nothing is written to them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from zograd._base.torch_private import below_transforms, compiler_loaded, schema, unwrapped, writes
from zograd._base.trees import take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Overlay(TorchFunctionMode):
    """While entered, every torch function that is given one of the parameters gets its replacement.

    A replacement is made where it is used and dropped after: what is in memory is what is in use. Attributes that tell
    of shape and kind are the parameter's own. What would write to a replacement, and be lost, is an error, and so is
    what reaches a parameter's values in another way: a view made before, or a torch.func transform of it. Functions
    that torch.compile has compiled run uncompiled meanwhile. Code in other threads, and TorchScript, is not seen: what
    it uses is missing in ``used``.

    Args:
        params: the parameters; recognized by identity, wherever a module or a closure keeps them.
        replacement: the tensor in place of a parameter, by its index; may be set again between two uses.

    Attributes:
        used: the parameters that were replaced so far.
    """

    def __init__(self, params: Sequence[torch.Tensor], replacement: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.replacement = replacement
        self.used: set[int] = set()
        self._params = params
        self._indices = {id(p): k for k, p in enumerate(params)}
        self._owners: dict[int, list[int]] = {}  # by memory: several parameters of a fused layer may share one
        for k, p in enumerate(params):
            self._owners.setdefault(_memory(p), []).append(k)
        self._copies: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # that closures hold on to
        self._stance: Any = None

    def __enter__(self) -> Overlay:
        if compiler_loaded():  # it would compile this mode, anew for each point
            self._stance = torch.compiler.set_stance("force_eager")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self._stance is not None:
            self._stance.__exit__(*error)
            self._stance = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        leaves, together = take_apart((args, kwargs))  # parameters may come in lists, as those of an LSTM do
        places = []
        for i, leaf in enumerate(leaves):
            if id(leaf) in self._indices:
                places.append((i, self._indices[id(leaf)]))
            elif isinstance(leaf, torch.Tensor):
                self._check_alias(leaf)
        for target in _written(func, args, kwargs):
            if id(target) in self._indices or (self._copies and _memory(target) in self._copies):
                raise _lost(func)
        if not places:
            return func(*args, **kwargs)
        if args and id(args[0]) in self._indices and getattr(func, "__name__", "") in _RAW:
            raise RuntimeError(
                f"the closure asks for a parameter's memory (`{func.__name__}`), which holds the unperturbed values: "
                "use torch functions of the parameter."
            )
        made = {k: self._make(k) for k in dict.fromkeys(k for _, k in places)}
        before = list(map(writes, made.values()))
        for i, k in places:
            leaves[i] = made[k]
        self.used.update(made)
        args, kwargs = together(leaves)
        del leaves
        out = func(*args, **(kwargs or {}))
        if before != list(map(writes, made.values())):
            raise _lost(func)
        self._remember(out, made)
        return out

    def _make(self, k: int) -> torch.Tensor:
        # Below any torch.func transform that is running, which would refuse its random numbers.
        with below_transforms():
            return self.replacement(k)

    def _remember(self, out: Any, made: dict[int, torch.Tensor]) -> None:
        """Know a view of a replacement, or the replacement itself, again if it is written to."""
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(first, torch.Tensor) and (memory := _memory(first)) in map(_memory, made.values()):
            self._copies[memory] = first.untyped_storage()

    def _check_alias(self, tensor: torch.Tensor) -> None:
        inner = unwrapped(tensor)
        if inner is not tensor and id(inner) in self._indices:
            raise RuntimeError(
                f"the closure gives a parameter of shape {tuple(inner.shape)} to a torch.func transform, which hides "
                "that it is one, so that it cannot be perturbed: give it a copy, `parameter.clone()`."
            )
        owners = self._owners.get(_memory(inner), ())
        if any(_overlap(inner, self._params[k]) for k in owners):
            raise RuntimeError(
                f"the closure uses a tensor of shape {tuple(inner.shape)} that shares its memory with a trained "
                "parameter (a view, or `.detach()` or `.data` of it, made outside?), where it cannot be perturbed. "
                "Make it inside the closure, or use the parameter itself."
            )


def _memory(tensor: torch.Tensor) -> int:
    """What is equal for tensors that share their memory; 0 for those that have none of their own."""
    if tensor.layout != torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one memory may have values in common."""
    (first, end), (start, stop) = _extent(a), _extent(b)
    return first < stop and start < end


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (steps + 1) * tensor.element_size()


def _lost(func: Any) -> RuntimeError:
    return RuntimeError(
        f"the closure writes to a parameter in place (`{resolve_name(func) or func}`): it runs at perturbed "
        "parameters, where that would be lost. Write to it outside the closure."
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The tensors that a function writes to, as far as its name, its schema and its arguments tell."""
    name = getattr(func, "__name__", "")
    of_operator = schema(func)
    if of_operator is not None:
        yield from (
            a for a, s in zip(args, of_operator.arguments, strict=False) if s.alias_info and s.alias_info.is_write
        )
    elif name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        yield from args[0] if args and isinstance(args[0], (tuple, list)) else args[:1]
    elif kwargs.get("inplace") is True:
        yield from args[:1]
    outs = kwargs.get("out")
    yield from outs if isinstance(outs, (tuple, list)) else () if outs is None else (outs,)


_WRITES = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {
    "__ilshift__",
    "__irshift__",
    "__setitem__",
    "__set__",
}
_RAW = {"data_ptr", "untyped_storage", "storage", "__dlpack__"}
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
    cast("Any", torch.Tensor.grad).__set__,  # as `zero_grad` does
    cast("Any", torch.Tensor.grad).__delete__,
}
"""What is told of a tensor without its values."""
