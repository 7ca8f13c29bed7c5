"""Problems, which make a gradient wrong or useless, and notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zograd.evaluators import Vmap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zograd.diagnostics.function.autograd import Autograd
    from zograd.diagnostics.function.calls import Calls
    from zograd.diagnostics.function.radii import Radius
    from zograd.diagnostics.function.subject import Subject
    from zograd.diagnostics.function.vectorized import Vectorized

_TENTH = 0.1  # a bias or a difference from autograd above this is worth a note
_OTHER_VALUES = 'its values under `evaluator="vmap"` are others than in a loop.'


def problems(
    subject: Subject, calls: Calls, vectorized: Vectorized, sweep: Sequence[Radius], limit: float
) -> Iterator[str]:
    """Yield what makes a gradient wrong or useless, a sentence each; below ``limit``, differences are noise."""
    if calls.changed:
        yield f"fn changes {', '.join(calls.changed)}: later evaluations see another function."
    if all(r.samples is not None and not r.samples.varies for r in sweep):
        yield "fn has the same value at all points that were tried: there is no gradient to estimate."
    if vectorized.works and not vectorized.same and _asked_for_vmap(subject):
        yield _OTHER_VALUES
    if subject.sigma is not None and subject.sigma < limit:
        yield f"sigma = {subject.sigma:g} is below the limit of {limit:.2g}: differences are noise."


def notes(
    subject: Subject, calls: Calls, vectorized: Vectorized, sweep: Sequence[Radius], autograd: Autograd
) -> Iterator[str]:
    """Yield what the user should know, a sentence each."""
    if subject.options is not None and subject.family is not subject.options.distribution:
        given = subject.options.distribution
        yield f"measured with Gaussian directions in place of {given}, to whose groups N would have to fit."
    if calls.writes_to_point:
        yield "fn writes to its differentiated argument; zograd gives it a copy."
    if not calls.repeatable and not calls.changed:
        yield (
            "fn is random with one torch random state: seed what it draws from with `zograd.current_seed()`, so "
            "that both sides of a pair have the same luck."
        )
    if vectorized.works and not vectorized.same and not _asked_for_vmap(subject):
        yield _OTHER_VALUES
    if vectorized.warning:
        yield "torch.vmap has no fast rule for something in fn."
    failed = [r for r in sweep if r.error is not None and "budget" not in r.error]
    for radius in failed[:1]:
        yield f"fn fails at sigma = {radius.sigma:.2g}: {radius.error}"
    off = autograd.differentiable and abs(autograd.scale - 1) > _TENTH + 3 * autograd.scale_error
    if off or (autograd.differentiable and autograd.cosine < 1 - _TENTH):
        yield (
            "autograd's gradient differs from that of the values even at the suggested sigma: fn is not smooth at "
            "that scale, or something in it hides from autograd (`detach`, `round`, `.item()`)."
        )


def _asked_for_vmap(subject: Subject) -> bool:
    return subject.options is not None and isinstance(subject.options.evaluator, Vmap)
