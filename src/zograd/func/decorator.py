"""``zero_order``: the front door for functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import torch

from zograd.evaluators.task.returned import function_name
from zograd.func.function import ZeroOrderFunction
from zograd.func.options import Options

if TYPE_CHECKING:
    from zograd.distributions.adapter import DistributionLike
    from zograd.evaluators.base import Evaluator
    from zograd.failures import Failures
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping

P = ParamSpec("P")


def zero_order(
    distribution: DistributionLike | None = None,
    method: str | Scheme = "naive",
    argnums: int | tuple[int, ...] = (0,),
    num_samples: int | Until | None = 1,
    sigma: Any = 1.0,
    *,
    evaluator: str | Evaluator = "loop",
    shaping: Shaping | None = None,
    failures: Failures = "raise",
    batch_dim: int | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    surrogate: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, Any]], ZeroOrderFunction[P]]:
    r"""Give a function a gradient from its values alone.

    .. math:: \nabla f_\sigma(\theta) \approx \frac{1}{N \sigma} \sum_{i=1}^{N} \epsilon_i
              \sum_j w_j f(\theta + \sigma c_j \epsilon_i)

    The :math:`\epsilon_i` are random directions, :math:`c_j` and :math:`w_j` the offsets and weights of ``method``.
    (For ``Coordinate()``, whose directions are unit vectors, it is d times that.) The decorated function returns what
    ``fn`` returns at its arguments; ``backward()``, ``torch.autograd.grad`` and the torch.func transforms see the
    estimate. ``fn`` runs in the forward pass only. Without grad mode, or with nothing that requires grad, it is called
    once and that is all.

    Args:
        distribution: directions of mean 0 and variance 1 for each value: one of :mod:`zograd.distributions`, an object
            with ``sample(sample_shape=...)``, a function of the shape, or ``torch.distributions.Normal(0, 1)``. None is
            the standard Gaussian.
        method: ``"naive"`` (N + 1 evaluations), ``"forward"`` (N + 1), ``"antithetic"`` (2N + 1), ``"fourth_order"``
            (4N + 1), or a :class:`~zograd.schemes.Scheme`. Naive has no baseline: its variance grows with the square of
            the objective's level.
        argnums: the positional arguments to differentiate, each a tensor or any nested tree; integer and frozen
            (``requires_grad=False``) leaves are left alone. Other arguments, and what ``fn`` closes over, get no
            gradient. For a method, 0 is the argument after ``self``.
        num_samples: N, the number of directions; or an :class:`~zograd.Until`, which takes directions until the
            gradient is good enough; None, for ``Coordinate()`` alone, is every coordinate once.
        sigma: the radius of the smoothing, in units of the parameters: bias grows with its square, and noise in ``fn``
            is divided by it. A number, or a tree of them in the structure of the differentiated argument.
        evaluator: ``"loop"`` (any ``fn``), ``"vmap"`` (many directions at once, for torch operations),
            ``"batched"`` (``fn`` takes a leading axis of parameter sets), or an instance.
        shaping: a function of all values at once, such as :func:`~zograd.shaping.leave_one_out`.
        failures: what it means if ``fn`` raises at a point or its value there is not finite: ``"raise"``, a
            :class:`~zograd.failures.Retry` or a :class:`~zograd.failures.Drop`.
        batch_dim: ``fn`` maps the slices along this dimension independently, and each gets a direction and coefficient
            of its own. Check it with :func:`zograd.check_slices`: the gradient is wrong if ``fn`` mixes slices.
        generator: where the seed of each call is drawn from; torch's global stream otherwise, one draw a call.
        seed: the seed of every call: the same directions each time, for line searches and gradcheck.
        surrogate: a differentiable approximation h of ``fn``, of the same arguments: a coarse simulator, a soft
            version, a learned emulator. It takes noise off and leaves the mean what it is, however wrong h is: the
            estimate becomes the mean of :math:`a \nabla h` at the same points plus the estimate for ``fn - a h``, with
            a factor a fitted to the values, so that a bad h costs little. One evaluation of h with its gradient for
            each point; for Gaussian marginals and an ``fn`` of one value.

    Returns:
        A decorator. What it returns also has ``estimate(...)``, ``options`` and ``replace(...)``.

    Raises:
        ValueError: if a setting is out of its range.
        TypeError: if a setting is of a wrong type.

    Examples:
        >>> import torch, zograd
        >>> generator = torch.Generator().manual_seed(0)  # other directions in each step, the same in each run
        >>> @zograd.zero_order(method="antithetic", num_samples=100, sigma=1.0, generator=generator)
        ... def loss(x):
        ...     return (x.round() - 3).abs().sum()  # a staircase: its own gradient is zero
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([x], lr=0.5)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss(x).backward()
        ...     optimizer.step()
        >>> x.round().tolist()
        [3.0, 3.0]

    References:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864);
        Nesterov & Spokoiny, "Random gradient-free minimization of convex functions" (2017); Choromanski et al.,
        "Structured evolution with compact architectures for scalable policy optimization" (arXiv:1804.02395).
    """
    options = Options.make(
        distribution=distribution,
        method=method,
        argnums=argnums,
        num_samples=num_samples,
        sigma=sigma,
        evaluator=evaluator,
        shaping=shaping,
        failures=failures,
        batch_dim=batch_dim,
        generator=generator,
        seed=seed,
        surrogate=surrogate,
    )

    def decorate(fn: Callable[P, Any], /, *args: Any, **kwargs: Any) -> ZeroOrderFunction[P]:
        bare = callable(distribution) and not hasattr(distribution, "sample")
        if bare and (args or kwargs or isinstance(fn, torch.Tensor)):
            name = function_name(distribution)
            raise TypeError(
                f"`zero_order` was given {name} as its distribution: write `@zero_order()` above the function."
            )
        if isinstance(fn, torch.nn.Module):
            raise TypeError(
                f"`zero_order` decorates functions, got the module {type(fn).__name__}: use "
                "`zograd.nn.ZeroOrder(module, ...)`, which differentiates its parameters, or decorate "
                "`lambda x: module(x)` for the gradient of its input."
            )
        if not callable(fn):
            raise TypeError(f"`zero_order(...)` must decorate a callable, got {type(fn).__name__} {fn!r:.80}.")
        if isinstance(fn, ZeroOrderFunction):
            raise TypeError(f"{function_name(fn.fn)} is decorated already: use `.replace(...)` to change its options.")
        return ZeroOrderFunction(fn, options)

    return decorate
