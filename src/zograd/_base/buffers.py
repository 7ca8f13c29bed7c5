"""Values of tensors as bytes, and back."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def memory(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the values of a dense tensor as a buffer, in row-major order and without a copy if they lie so.

    numpy, which has this as a method, need not be installed.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    buffer = (ctypes.c_ubyte * (plain.numel() * plain.element_size())).from_address(plain.data_ptr())
    buffer.tensor = plain  # type: ignore[attr-defined]  # the memory lives as long as its owner
    return buffer


def to_bytes(value: torch.Tensor | float) -> bytes:
    """Return values in float64, 8 bytes each, as they are in memory."""
    if isinstance(value, torch.Tensor):
        return bytes(memory(value.detach().to("cpu", torch.float64)))
    return struct.pack("d", value)


def from_bytes(data: bytes, shape: Sequence[int] = (-1,), dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a tensor on the CPU with the values that are these bytes in memory."""
    if not data:  # which torch refuses
        return torch.empty(0, dtype=dtype, device="cpu").view(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
