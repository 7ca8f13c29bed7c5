"""Every private name of torch that zograd touches, and what each waits for; no other module touches one.

tests/test_torch_private.py tries each of them and says what breaks where torch has changed it. All are looked up when
they are used: a name that a release has dropped stops what needs it, not the import.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_NOTHING = contextlib.nullcontext()

# ------------------------------------------------------------------------------------------------ torch.func transforms


def transforms_active() -> bool:
    """Return whether code runs under a torch.func transform."""
    # In place of a public question: such code must not be watched for autograd, and its gradients are outputs.
    return bool(torch._C._are_functorch_transforms_active())


def transform_depth() -> int:
    """Return how many torch.func transforms are around."""
    # Tells whether a derivative is the innermost one. A public `torch.func` question of that kind does not exist.
    return len(torch._C._functorch.get_interpreter_stack() or ())


def is_transformed(value: object) -> bool:
    """Return whether a value is a tensor that a torch.func transform has wrapped."""
    # Under `grad` or `vmap` a derivative is asked for without `requires_grad`, and nothing public says so.
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has a hidden axis of ``torch.vmap``."""
    # A product with shared weights must be made once for all rows; torch.func does not say what is a row.
    return torch._C._functorch.is_batchedtensor(tensor)


def is_legacy_batched(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a batch of cotangents of ``is_grads_batched=True``, of which no value can be read."""
    # torch vmaps such a backward by its old machinery, past `Function.vmap`; goes once it uses torch.func.
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor below all wrappers of torch.func transforms."""
    # The only way to recognize a parameter that was given to a transform inside a closure.
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def below_transforms() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no torch.func transform is active."""
    # A transform refuses the random numbers that make a perturbed parameter. Waits for a public way to step out of one.
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


# --------------------------------------------------------------------------------------------------- autograd's modes


def forward_mode_active() -> bool:
    """Return whether code runs inside a level of forward-mode differentiation."""
    # `forward_ad` can enter a level and unpack a tensor, and cannot be asked whether there is one.
    return bool(forward_ad._current_level >= 0)


def forward_mode_enabled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which forward-mode derivatives are made."""
    # torch switches them off inside `Function.jvp`, so that the derivative of a derivative would be zero there.
    return forward_ad._set_fwd_grad_enabled(True)


def random_allowed() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which random numbers may be drawn, also inside ``is_grads_batched=True``."""
    # torch's old vmap refuses every random operation in its thread; goes together with it.
    torch._C._vmapmode_increment_nesting()
    levels = torch._C._vmapmode_decrement_nesting()
    return _outside(levels) if levels else _NOTHING


@contextlib.contextmanager
def _outside(levels: int) -> Iterator[None]:
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels):
            torch._C._vmapmode_increment_nesting()


# --------------------------------------------------------------------------- function modes, dispatch modes, subclasses


def without_function_modes() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no function mode sees what torch is asked."""
    # An outer estimate watches what its fn asks of tensors; our own questions are not fn's. `torch.overrides` has no
    # public way past a mode.
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else _NOTHING


def without_overrides() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which ``__torch_function__`` of subclasses is not called."""
    # torch's own page on subclasses uses this name; there is no public one.
    return torch._C.DisableTorchFunctionSubclass()


def dispatch_mode() -> type[Any]:
    """Return the class of modes that see each operation below autograd."""
    # The one place where every random operation of a thread can be met. Documented, in a module with a private name.
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def schema(operator: Any) -> Any:
    """Return an operator's schema: what its arguments are called, of what type, and which are written to."""
    # Tells the random operators that take a generator, and those that write to a parameter. `torch.library` takes
    # schemas and does not show them.
    return getattr(operator, "_schema", None)


def wrapper(kind: type[Any], like: torch.Tensor) -> Any:
    """Return a tensor of a subclass that has the shape of another and no memory."""
    # Nothing can read the bare weight of a factored one by mistake. The constructor of torch's page on subclasses.
    return torch.Tensor._make_wrapper_subclass(
        kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
    )


_watching = threading.local()
_installing = threading.Lock()
_watches = 0


def watch_engine(notify: Callable[[], None] | None) -> Callable[[], None] | None:
    """Have ``notify`` called before autograd's engine runs in this thread; return what was called so far."""
    # A function mode would see `backward` and `grad`, too, and lets fused encoders take another path. Every way into
    # the engine from Python asks its module for this one function; nothing public stands there.
    global _watches, _run_engine
    with _installing:
        if not _watches:
            _run_engine = vars(torch.autograd)["_engine_run_backward"]
            vars(torch.autograd)["_engine_run_backward"] = _watched_engine
        _watches += 1
    outer, _watching.notify = getattr(_watching, "notify", None), notify
    return outer


def unwatch_engine(outer: Callable[[], None] | None) -> None:
    """Undo :func:`watch_engine`, which returned ``outer``."""
    # Without a watch under way, torch is as it was.
    global _watches
    _watching.notify = outer
    with _installing:
        _watches -= 1
        if not _watches:
            vars(torch.autograd)["_engine_run_backward"] = _run_engine


def own_code(scope: dict[str, Any]) -> bool:
    """Return whether globals are those of torch's compiler, printer and the like."""
    # They ask tensors about their gradients on their own account, and not on fn's.
    return bool(scope.get("__name__", "").startswith("torch._"))


def _run_engine(*args: Any, **keywords: Any) -> Any:
    """Stand for torch's own, which is noted when it is first replaced."""


def _watched_engine(*args: Any, **keywords: Any) -> Any:
    notify = getattr(_watching, "notify", None)
    if notify is not None:
        notify()
    return _run_engine(*args, **keywords)


# ------------------------------------------------------------------------------------------------ tensors and modules


def writes(tensor: torch.Tensor) -> int:
    """Return a number that changes with each write in place; that of a tensor made in inference mode does not."""
    # autograd's own counter. It misses `.data` and numpy; a comparison of values would read all parameters.
    return 0 if tensor.is_inference() else tensor._version


def as_parameter(tensor: torch.Tensor) -> None:
    """Let ``isinstance(tensor, nn.Parameter)`` be true, whatever wraps the tensor."""
    # Modules ask that of what stands in for their parameters; `nn.Parameter(tensor)` would cut it off from autograd.
    tensor._is_param = True


def storages(tensor: torch.Tensor) -> list[torch.Tensor] | None:
    """Return the memory of a tensor as bytes: of its storage, or of each part of a sparse one; None if it has none.

    Writing there is no write that autograd counts, and reaches whatever else is a view of the same storage.
    """
    # `indices()` and `values()` of a sparse tensor raise before it is coalesced; other layouts name theirs in public.
    parts = [tensor]
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif tensor.layout == torch.jagged:
        parts = [tensor.values(), tensor.offsets()]  # type: ignore[attr-defined]
    try:
        found = [part.untyped_storage() for part in parts]
        if any(storage.nbytes() and not storage.data_ptr() for storage in found):
            return None  # that of a wrapper, or on the meta device
        return [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in found]
    except (NotImplementedError, RuntimeError):
        return None


REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Where ``nn.Module`` keeps its parts. A copy of a module that shares its other attributes is made of these."""


def registries(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the parameters, buffers and submodules of a module itself, None at names that are declared empty."""
    # `named_parameters()` and the like leave the empty ones out, and cannot be written to.
    return module._parameters, module._buffers, module._modules


def set_registry(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Let a module look for its parameters in another dict."""
    # `nn.Module.__getattr__` looks for the dict by this name; a hook on reading a parameter does not exist.
    module.__dict__["_parameters"] = parameters


def parametrizations_cached() -> bool:
    """Return whether code runs inside ``parametrize.cached()``."""
    # Its cache would serve all points the weight of one; it cannot be asked or emptied.
    from torch.nn.utils import parametrize

    return bool(parametrize._cache_enabled)


# ------------------------------------------------------------------------------------------------------- torch.compile


def compiler_loaded() -> bool:
    """Return whether torch.compile is in use in this process."""
    # `torch.compiler.set_stance` imports the whole compiler, which takes seconds and is needed only if it is there.
    return "torch._dynamo" in sys.modules
