"""What ``fn`` returned, as a tensor."""

from __future__ import annotations

from typing import Any

import torch


def as_tensor(out: Any, name: str) -> torch.Tensor:
    """What fn returned, as a tensor: of its own dtype, or torch's default one for a Python number.

    Args:
        out: what fn returned.
        name: how errors call fn.

    Returns:
        The tensor.

    Raises:
        TypeError: if it is not a number or an array of real floating-point numbers.
    """
    if not isinstance(out, torch.Tensor):
        return _from_number(out, name)
    if not out.is_floating_point():
        raise TypeError(
            f"{name} must return floating-point values to have a gradient, got a tensor of {out.dtype} with shape "
            f"{tuple(out.shape)}: return `{'.abs()` or `.real' if out.is_complex() else '.float()'}` of it."
        )
    return out


def _from_number(out: Any, name: str) -> torch.Tensor:
    # numpy's scalars and arrays, recognized by what they offer, so that numpy need not be imported. They come first,
    # since numpy's float64 is a Python float, too.
    if getattr(getattr(out, "dtype", None), "kind", "") in tuple("fiu"):
        return torch.as_tensor(float(out) if not out.shape else out.copy(), dtype=_numpy_dtype(out))
    if isinstance(out, (int, float)) and not isinstance(out, bool):
        return torch.tensor(out, dtype=torch.get_default_dtype())
    got = "None (is a `return` missing?)" if out is None else f"{type(out).__name__} {out!r:.80}"
    raise TypeError(f"{name} must return a tensor or a number, got {got}.")


def _numpy_dtype(out: Any) -> torch.dtype:
    return {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}.get(
        out.dtype.name, torch.get_default_dtype()
    )


def function_name(fn: Any) -> str:
    """How errors call a function."""
    return f"`{getattr(fn, '__qualname__', None) or type(fn).__qualname__}`"
