"""Whether a function maps slices independently, as ``batch_dim`` takes for granted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.streams import TorchStream, plain_call
from zograd._base.trees import Arguments, flatten
from zograd.evaluators.task.returned import as_tensor, function_name
from zograd.func.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TOLERANCE = 1e-4  # of the values' spread
_ROUNDING = 1e-6  # of the values' size: vectorized kernels round a subset otherwise than the whole


@dataclass(frozen=True)
class SliceCheck:
    """What :func:`check_slices` found; true where the slices are independent.

    Attributes:
        subset_error: the largest difference, beyond rounding and relative to the values' spread, between the values of
            every second slice evaluated alone and among all.
        permutation_error: likewise after a permutation of the slices.

    Examples:
        >>> import torch, zograd
        >>> bool(zograd.check_slices(torch.sin, torch.randn(8)))
        True
        >>> bool(zograd.check_slices(lambda x: x - x.mean(), torch.randn(8)))
        False
    """

    subset_error: float
    permutation_error: float

    def __bool__(self) -> bool:
        return max(self.subset_error, self.permutation_error) <= _TOLERANCE

    def __str__(self) -> str:
        verdict = "independent" if self else "NOT independent: `batch_dim` would give a wrong gradient"
        return (
            f"slices are {verdict} (relative difference on a subset {self.subset_error:.1e}, "
            f"after a permutation {self.permutation_error:.1e})"
        )


def check_slices(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_dim: int = 0,
    along: int | Sequence[int] = (),
    **kwargs: Any,
) -> SliceCheck:
    r"""Check that ``fn`` maps slices independently, :math:`y_b = g(x_b)`, before trusting ``batch_dim``.

    ``fn`` is called on all slices, on every second one and on a permutation, each time from one state of torch's random
    stream. It finds mixing that moves a value by more than 1e-4 of the values' spread. A function that draws other
    numbers for each slice, or normalizes over the batch, does not pass.

    Args:
        fn: the function; of a decorated one ``argnums`` and ``batch_dim`` are its own.
        *args: its arguments.
        argnums: the arguments that carry the slices and are differentiated.
        batch_dim: the dimension of the slices, in the arguments and in what ``fn`` returns.
        along: further arguments that carry the slices along ``batch_dim`` (labels, say).
        **kwargs: keyword arguments, passed as they are.

    Returns:
        The two errors; true as a bool if both are small.

    Raises:
        ValueError: if there are fewer than two slices, or ``fn`` does not return one entry a slice.

    Examples:
        >>> import torch, zograd
        >>> bool(zograd.check_slices(lambda x: x.sign().sum(dim=1), torch.randn(6, 3)))
        True
        >>> bool(zograd.check_slices(lambda x: x.softmax(dim=0).sum(dim=1), torch.randn(6, 3)))
        False
    """
    options = getattr(fn, "options", None)
    if isinstance(options, Options):
        argnums, fn = options.argnums, fn.fn  # type: ignore[attr-defined]
        batch_dim = batch_dim if options.batch_dim is None else options.batch_dim
    as_tuple = [tuple([a] if isinstance(a, int) else a) for a in (argnums, along)]
    call = flatten(args, kwargs, (*as_tuple[0], *as_tuple[1]))
    slices = {call.leaves[i].shape[batch_dim] for i in _carrying(call)}
    if len(slices) != 1 or min(slices) < 2:
        raise ValueError(
            f"`check_slices(batch_dim={batch_dim})` needs equally many slices in each argument, two at least, got "
            f"{slices}."
        )
    num = slices.pop()
    whole = _values(fn, call, torch.arange(num), batch_dim)
    spread = float((whole - whole.mean()).abs().max()) or 1.0
    errors = []
    for index in (torch.arange(0, num, 2), torch.arange(num).roll(1).flip(0)):
        part = _values(fn, call, index, batch_dim)
        difference = (part - whole.index_select(batch_dim, index)).abs() - _ROUNDING * whole.abs().max()
        errors.append(float(difference.nan_to_num(nan=torch.inf).clamp(min=0).max()) / spread)
    return SliceCheck(*errors)


def _carrying(call: Arguments) -> list[int]:
    return [i for span in call.form.spans for i in span if isinstance(call.leaves[i], torch.Tensor)]


def _values(fn: Callable[..., Any], call: Arguments, index: torch.Tensor, batch_dim: int) -> torch.Tensor:
    leaves = call.leaves.copy()
    for i in _carrying(call):
        leaves[i] = leaves[i].detach().index_select(batch_dim, index.to(leaves[i].device))
    args, kwargs = replace(call, leaves=leaves).build(tuple(leaves[i] for i in call.chosen))
    with TorchStream(torch.device("cpu")) as stream:
        stream.seed(0)
        out = plain_call(fn, args, kwargs)
    values = as_tensor(out, function_name(fn)).detach().to("cpu", torch.float64)
    if values.dim() <= batch_dim or values.shape[batch_dim] != len(index):
        raise ValueError(
            f"{function_name(fn)} must return one entry a slice, {len(index)} along dimension {batch_dim}, got the "
            f"shape {tuple(values.shape)}."
        )
    return values
