"""Autograd's gradient, and the gradient of the values beside it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zograd._base.streams import TorchStream, plain_call
from zograd.evaluators.task.returned import as_tensor

if TYPE_CHECKING:
    from zograd.diagnostics.function.samples import Samples
    from zograd.diagnostics.function.subject import Subject
    from zograd.estimate.statistics import Length


@dataclass(frozen=True)
class Gradient:
    """Autograd's gradient, or the reason why there is none.

    Attributes:
        flat: it, as one vector.
        mean: the mean of an estimate of it: that itself, unless the directions have another covariance.
        error: why there is none.
    """

    flat: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Autograd:
    """Comparison of the smoothed gradient at the suggested sigma with autograd's.

    Attributes:
        differentiable: whether autograd gives a gradient that is finite and not zero.
        error: why not, or None.
        cosine: between the two, the noise of the directions removed.
        scale: the length of the smoothed gradient along autograd's, over the latter's.
        scale_error: the standard error of ``scale``.
    """

    differentiable: bool
    error: str | None = None
    cosine: float = math.nan
    scale: float = math.nan
    scale_error: float = math.nan


def gradient(subject: Subject, seed: int, *, deterministic: bool) -> Gradient:
    """Ask autograd for the gradient at the parameters."""
    if not deterministic:
        return Gradient(error="fn is random, and autograd's gradient is that of one luck")
    if subject.batched:
        return Gradient(error='under `evaluator="batched"` it is not asked')
    leaves = tuple(p.clone().requires_grad_() for p in subject.params)
    args, kwargs = subject.arguments.build(leaves)
    subject.count(1)
    with warnings.catch_warnings(), torch.enable_grad(), TorchStream(subject.space.device) as stream:
        warnings.simplefilter("ignore")
        stream.seed(seed)
        try:
            out = as_tensor(plain_call(subject, args, kwargs), subject.name)
            if not out.requires_grad:
                return Gradient(error="its value has no graph back to the arguments")
            grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        except Exception as error:  # of fn or of autograd: it is no differentiable function
            return Gradient(error=f"{type(error).__name__}: {error}")
    flat = subject.space.join(
        tuple(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))
    ).detach()
    if not torch.isfinite(flat).all():
        return Gradient(error="autograd's gradient is not finite")
    if not flat.any():
        return Gradient(error="autograd's gradient is zero")
    return Gradient(flat, subject.family.covariance(subject.space, flat))


def compare(gradient: Gradient, samples: Samples | None) -> Autograd:
    """Compare autograd's gradient with the smoothed one.

    Args:
        gradient: autograd's.
        samples: at the best sigma; None if there is none.

    Returns:
        The comparison.
    """
    if gradient.flat is None or gradient.mean is None or samples is None:
        return Autograd(False, gradient.error or "no sigma works")
    mean = gradient.mean.double().cpu()
    off = samples.length_of(samples.slopes - samples.slopes_of(gradient.flat))
    length = float(mean.norm())
    along = off.parts @ mean / length**2
    error = float(along.std()) / math.sqrt(len(along))
    scale = 1 + float(along.mean())
    square = max(off.square, 0.0) / length**2 + 2 * float(along.mean()) + 1
    cosine = scale / math.sqrt(square) if square > 0 else math.nan
    return Autograd(True, None, max(-1.0, min(1.0, cosine)), scale, error)


def known_length(gradient: Gradient, compared: Autograd, samples: Samples) -> Length | None:
    """Return the length of the smoothed gradient with the square that follows from autograd's and the bias.

    Both are known better than the products of parts.

    Returns:
        The length; None if autograd gives no gradient, or the two have nothing in common.
    """
    if gradient.mean is None or not compared.cosine > 0:
        return None
    square = float(gradient.mean.double().norm()) ** 2
    return samples.length.replace(square * (compared.scale / compared.cosine) ** 2, 2 * square * compared.scale_error)
