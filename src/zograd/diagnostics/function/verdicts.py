"""Problems, which make a gradient wrong or useless, and notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from zograd.diagnostics.function.autograd import Autograd
    from zograd.diagnostics.function.calls import Calls
    from zograd.diagnostics.function.radii import Radius
    from zograd.diagnostics.function.subject import Subject
    from zograd.diagnostics.function.vectorized import Vectorized

_TENTH = 0.1  # a bias or a difference from autograd above this is worth a note


@dataclass(frozen=True)
class Found:
    """Answers of the single questions, and of the estimates over sigma."""

    subject: Subject
    calls: Calls
    vectorized: Vectorized
    autograd: Autograd
    sweep: Sequence[Radius]
    limit: float  # below it, differences are noise

    @property
    def asked_for_vmap(self) -> bool:
        """Whether the function is decorated with it."""
        options = self.subject.options
        return options is not None and options.evaluator.__class__.__name__ == "Vmap"


_OTHER_VALUES = 'its values under `evaluator="vmap"` are others than in a loop.'


def problems(found: Found) -> Iterator[str]:
    """Yield what makes a gradient wrong or useless, a sentence each."""
    calls, vectorized, sigma = found.calls, found.vectorized, found.subject.sigma
    if calls.changed:
        yield f"fn changes {', '.join(calls.changed)}: later evaluations see another function."
    if all(r.samples is not None and not r.samples.varies for r in found.sweep):
        yield "fn has the same value at all points that were tried: there is no gradient to estimate."
    if vectorized.works and not vectorized.same and found.asked_for_vmap:
        yield _OTHER_VALUES
    if sigma is not None and sigma < found.limit:
        yield f"sigma = {sigma:g} is below the limit of {found.limit:.2g}: differences are noise."


def notes(found: Found) -> Iterator[str]:
    """Yield what the user should know, a sentence each."""
    subject, calls, vectorized, autograd = found.subject, found.calls, found.vectorized, found.autograd
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
    if vectorized.works and not vectorized.same and not found.asked_for_vmap:
        yield _OTHER_VALUES
    if vectorized.warning:
        yield "torch.vmap has no fast rule for something in fn."
    failed = [r for r in found.sweep if r.error is not None and "budget" not in r.error]
    for radius in failed[:1]:
        yield f"fn fails at sigma = {radius.sigma:.2g}: {radius.error}"
    off = autograd.differentiable and abs(autograd.scale - 1) > _TENTH + 3 * autograd.scale_error
    if off or (autograd.differentiable and autograd.cosine < 1 - _TENTH):
        yield (
            "autograd's gradient differs from that of the values even at the suggested sigma: fn is not smooth at "
            "that scale, or something in it hides from autograd (`detach`, `round`, `.item()`)."
        )
