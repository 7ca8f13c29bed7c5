"""A weight and its low-rank change, kept apart: products share the weight, anything else sees the sum."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.nn import functional as F

from zograd._base.torch_private import is_batched, without_overrides, wrapper
from zograd._base.trees import take_apart


class Factored(torch.Tensor):
    """The matrix ``weight + left @ right.T``, of the weight's shape, its first dimension being the rows.

    Inside ``torch.vmap`` the factors belong to one direction and the weight to all, so that a product with the weight
    is made once for all, and only thin products for each. Whatever has no rule here gets the sum, from then on in
    place of the factors: then writing to it, or to a view of it, does what it does to a tensor.
    """

    weight: torch.Tensor
    left: torch.Tensor  # (out, rank), scaled
    right: torch.Tensor  # (rest, rank)
    _sum: torch.Tensor | None
    _of: Factored | None  # what this is the transpose of

    @staticmethod
    def __new__(
        cls: type[Factored], weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, of: Factored | None = None
    ) -> Factored:
        """Hold the parts; the tensor itself has no memory, so that nothing can read the bare weight by mistake."""
        self = cast("Factored", wrapper(cls, weight))
        self.weight, self.left, self.right, self._sum, self._of = weight, left, right, None, of
        return self

    def sum_of_parts(self) -> torch.Tensor:
        """The dense tensor, made once."""
        if self._of is not None:
            return self._of.sum_of_parts().t()
        if self._sum is None:
            with torch.autocast(self.weight.device.type, enabled=False):
                change = (self.left @ self.right.t()).view(self.weight.shape)
                self._sum = (self.weight + change).to(self.weight.dtype)
        return self._sum

    def thin(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors in the weight's dtype, or None where only the sum is up to date."""
        if (self if self._of is None else self._of)._sum is not None:
            return None
        return self.left.to(self.weight.dtype), self.right.to(self.weight.dtype)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply a rule, or hand over the sum."""
        kwargs = kwargs or {}
        if func in _OF_KIND:
            with without_overrides():
                return func(*args, **kwargs)
        rule = _RULES.get(func)
        if rule is not None and kwargs.keys() <= _keywords(rule):
            out = rule(*args, **kwargs)
            if out is not NotImplemented:
                return out
        leaves, together = take_apart((args, kwargs))
        args, kwargs = together([dense(leaf) for leaf in leaves])
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse: what comes here is past the rules."""
        raise RuntimeError(
            f'`{func}` reached a low-rank weight past torch\'s Python functions, under vmap: use `evaluator="loop"`.'
        )


def dense(value: Any) -> Any:
    """A factored weight as the tensor it stands for, anything else as it is."""
    return value.sum_of_parts() if isinstance(value, Factored) else value


def _matrix(value: Any) -> bool:
    return isinstance(value, Factored) and value.dim() == 2 and value.thin() is not None


def _inner(x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``x @ right``, which the other way round takes a tenth of the time: torch's batched product with one column."""
    if x.dim() == 1:
        return x @ right
    return (right.t() @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], right.shape[1])


def _added(base: torch.Tensor, inner: torch.Tensor, left: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """``base + inner @ left.T + bias``."""
    thick = base.dim() == 1 or left.shape[1] > 1
    out = base + inner @ left.t() if thick else torch.addcmul(base, inner, left.t()).to(base.dtype)  # under autocast
    return out if bias is None else out.add_(bias)


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not _matrix(weight):
        return NotImplemented
    left, right = weight.thin()
    x = dense(input)
    if x.dim() < 3:
        return _added(F.linear(x, weight.weight), _inner(x, right), left, dense(bias))
    # As one matrix: where it is not contiguous, torch's vectorized product would repeat the weight for every row.
    rows = x.reshape(-1, x.shape[-1])
    out = _added(F.linear(rows, weight.weight), _inner(rows, right), left, dense(bias))
    return out.view(*x.shape[:-1], out.shape[-1])


def _matmul(a: Any, b: Any, /) -> Any:
    if _matrix(b):
        left, right = b.thin()
        x = dense(a)
        return _added(x @ b.weight, _inner(x, left), right)
    if _matrix(a) and isinstance(b, torch.Tensor):
        left, right = a.thin()
        x = dense(b)
        return a.weight @ x + left @ (right.t() @ x)
    return NotImplemented


def _reflected(b: Any, a: Any, /) -> Any:
    return _matmul(a, b)


def _transposed(weight: Factored, /, *dims: int) -> Any:
    if (
        not isinstance(weight, Factored)
        or weight.dim() != 2
        or tuple(dims) not in ((), (0, 1), (1, 0), (-1, -2), (-2, -1))
    ):
        return NotImplemented
    if weight._of is not None:
        return weight._of
    return Factored(weight.weight.t(), weight.right, weight.left, weight)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not _matrix(weight) or max_norm is not None:
        return NotImplemented
    left, right = weight.thin()
    with torch.autocast(weight.weight.device.type, enabled=False):  # as torch's own, which has no product to be cast
        return _added(F.embedding(input, weight.weight, padding_idx), F.embedding(input, left), right)


def _convolution(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def rule(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not isinstance(weight, Factored) or groups != 1 or weight.thin() is None:
            return NotImplemented
        left, right = weight.thin()  # type: ignore[misc]
        x, kernel = dense(input), right.t().reshape(-1, *weight.shape[1:])
        base = function(x, weight.weight, dense(bias), stride, padding, dilation)
        channel = x.dim() - weight.dim() + 1
        if is_batched(x):
            # Kernels of each direction's own would make a convolution in groups, which is slow: products with all of
            # a kernel's places first, and one convolution for all directions that picks them.
            rank, places = kernel.shape[0], kernel[0, 0].numel()
            taps = kernel.flatten(2).transpose(1, 2).reshape(rank * places, -1)
            x = (taps @ x.flatten(channel + 1)).view(*x.shape[:channel], rank * places, *x.shape[channel + 1 :])
            picks = torch.eye(rank * places, dtype=x.dtype, device=x.device).view(rank, places, rank * places)
            kernel = picks.transpose(1, 2).reshape(rank, rank * places, *weight.shape[2:])
        inner = function(x, kernel, None, stride, padding, dilation)  # (batch, rank, places), or without the batch
        return base + (left @ inner.flatten(channel + 1)).view(base.shape)

    return rule


def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Self-attention by its formula, so that the projections share their weights; other forms are torch's own."""
    special = (
        not (query is key and key is value)
        or query.dim() != 3
        or bias_k is not None
        or bias_v is not None
        or add_zero_attn
        or (training and dropout_p > 0)
        or key_padding_mask is not None
        or use_separate_proj_weight
        or static_k is not None
        or static_v is not None
        or (is_causal and attn_mask is None)
    )
    if special:
        return NotImplemented
    length, batch, width = query.shape
    heads = (length, batch * num_heads, width // num_heads)
    q, k, v = (
        part.reshape(heads).transpose(0, 1) for part in F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    )
    scores = q @ k.transpose(1, 2) / math.sqrt(heads[2])
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(attn_mask, -math.inf)
        scores = scores + attn_mask
    weights = scores.softmax(dim=-1)
    if attn_mask is not None and not need_weights:
        # As torch has it: nothing to attend to gives zeros here, and is not a number where weights are asked for.
        weights = weights.masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0)
    out = (weights @ v).transpose(0, 1).reshape(length, batch, width)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if not need_weights:
        return out, None
    weights = weights.view(batch, num_heads, length, length)
    return out, weights.mean(dim=1) if average_attn_weights else weights


@functools.cache
def _keywords(rule: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a rule knows; a call with others, torch has synonyms for some, gets the sum."""
    parameters = inspect.signature(rule).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.mv: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.mv: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _reflected,
    torch.t: _transposed,
    torch.Tensor.t: _transposed,
    torch.Tensor.T.__get__: _transposed,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]
    torch.transpose: _transposed,
    torch.Tensor.transpose: _transposed,
    torch.Tensor.data.__get__: dense,  # type: ignore[attr-defined] # torch's own does not work under vmap
    F.embedding: _embedding,
    torch.conv1d: _convolution(torch.conv1d),
    torch.conv2d: _convolution(torch.conv2d),
    torch.conv3d: _convolution(torch.conv3d),
    F.multi_head_attention_forward: _attention,
}
_OF_KIND = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ["shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn"]
    ),
    *(getattr(torch.Tensor, name).__get__ for name in ["is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"]),
    *(
        getattr(torch.Tensor, name)
        for name in ["size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "__len__"]
    ),
    torch.Tensor.__hash__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
"""What tells of a tensor without its values."""
