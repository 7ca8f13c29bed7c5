"""``zero_order``: the front door for functions."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

import torch

from zograd._base.isolation import center_of, commit
from zograd._base.streams import plain_call
from zograd._base.torch_private import forward_mode_active, is_transformed, without_function_modes
from zograd._base.trees import Arguments, Space, flatten
from zograd.estimate.checks import check_radii
from zograd.estimate.settings import Settings
from zograd.evaluators.task.answer import Facts
from zograd.evaluators.task.objective import as_tensor, function_name, refuses_grad, wants_grad
from zograd.func.autograd import attach, is_tracked
from zograd.func.call import Call
from zograd.func.inputs import check_leaves, instead, lost_gradient, radii, warn_of_lost_gradients
from zograd.func.options import Options
from zograd.sampling import Until

if TYPE_CHECKING:
    from zograd.distributions.adapter import DistributionLike
    from zograd.estimate.result import Estimate
    from zograd.evaluators.base import Evaluator
    from zograd.failures import Failures
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping

P = ParamSpec("P")


class ZeroOrderFunction(Generic[P]):
    """A function with a gradient from its values; made by :func:`zero_order`.

    Attributes:
        fn: the function that was decorated.
        options: the settings.

    Examples:
        >>> import torch, zograd
        >>> loss = zograd.zero_order(method="antithetic", num_samples=100, seed=0)(lambda x: x.abs().sum())
        >>> x = torch.tensor([3.0, -2.0], requires_grad=True)
        >>> loss(x).backward()
        >>> x.grad.round()
        tensor([ 1., -1.])
        >>> loss.replace(method="forward").options.method
        FORWARD
    """

    def __init__(self, fn: Callable[P, Any], options: Options, facts: Facts | None = None) -> None:
        functools.update_wrapper(self, fn, updated=())
        if inspect.isfunction(fn):  # a callable object's attributes are its state, and could hide ours
            self.__dict__.update({k: v for k, v in fn.__dict__.items() if not hasattr(type(self), k)})
        self.fn = fn
        self.options = options
        self._facts = facts or Facts()
        self._typed = function_name(fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        """Call ``fn``; the result carries the estimate where a gradient can be asked for.

        Args:
            *args: the arguments of ``fn``.
            **kwargs: likewise.

        Returns:
            The value of ``fn`` at its arguments, as a tensor.
        """
        if torch.compiler.is_compiling():
            return _outside_the_graph(self, args, kwargs)
        if not (torch.is_grad_enabled() or forward_mode_active()):
            return self._plain(args, kwargs)
        arguments = self._arguments(args, kwargs)
        with without_function_modes():  # one may be an outer estimate's, which watches what fn asks of tensors
            chosen = tuple([i for i in arguments.chosen if is_tracked(arguments.leaves[i])])
            if not chosen and any(map(is_transformed, arguments.leaves)):
                chosen = arguments.chosen  # nothing asks, but fn may be numpy: below the transform it can run
            if chosen:
                call, tensors = self._prepared(arguments, chosen)
        return attach(call.estimate, tensors, call.chosen) if chosen else self._plain(args, kwargs)

    def estimate(self, *args: P.args, **kwargs: P.kwargs) -> Estimate:
        """Estimate the gradient of every floating leaf of the differentiated arguments, without autograd.

        Args:
            *args: the arguments of ``fn``.
            **kwargs: likewise.

        Returns:
            The estimate: value, gradient and all they were made of.

        Raises:
            NonFiniteError: if a value is nan or infinite, or the gradient overflows.
            EvaluationError: if ``fn`` raises at a point, or fewer directions survive than ``failures`` asks for. What
                ``fn`` raises at its arguments themselves, or under ``"vmap"``, goes up as it is.
            BudgetExceeded: if the evaluations are more than a :class:`~zograd.Tracker` has left.
            TypeError: if ``fn`` returns no number, or a differentiated tensor is of an unsupported kind.
            ValueError: if the arguments, the settings and the shapes of the values do not fit together.
        """
        arguments = self._arguments(args, kwargs)
        with without_function_modes():
            call, tensors = self._prepared(arguments, arguments.chosen)
        several = len(self.options.argnums) > 1
        return call.estimate(tensors, functools.partial(arguments.structure, several=several))

    def replace(self, **options: Any) -> ZeroOrderFunction[P]:
        """The same function with other options.

        Args:
            **options: settings of :func:`zero_order` by name.

        Returns:
            A new decorated function; this one is as before.

        Raises:
            TypeError: if a name is no setting, or one is of a wrong type.
            ValueError: if a setting is out of its range.
        """
        return ZeroOrderFunction(self.fn, self.options.replace(**options), self._facts)

    def state_dict(self) -> dict[str, Any]:
        """Where ``generator=`` stands, as plain numbers, for a run that is to go on with the same directions.

        Returns:
            A dict for :meth:`load_state_dict`; empty without a generator of its own.
        """
        return self.options.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the directions that come after :meth:`state_dict`.

        Args:
            state_dict: what that returned.

        Raises:
            ValueError: if it has no generator's state and this function has one, or the other way around.
        """
        self.options.load_state_dict(state_dict, f"{self._typed[:-1]}.load_state_dict(...)`")

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if self.options.evaluator.batched:
            return self._plain_with_leading_one(args, kwargs)
        try:
            out = plain_call(self.fn, args, kwargs)
        except RuntimeError as error:
            if torch.is_grad_enabled() or not (wants_grad(error) or refuses_grad(error)):
                raise
            out = self._plain_as_at_points(args, kwargs, tracked=wants_grad(error))
        return any_tensor(out, self._typed)

    def _plain_as_at_points(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, tracked: bool) -> Any:
        """Without grad mode fn may do what it may do in an estimate: use numpy, or train something inside."""
        arguments = self._arguments(args, kwargs)
        params = tuple(p.detach().clone().requires_grad_(tracked) for p in arguments.params())
        built, kwargs = arguments.build(params)
        with torch.set_grad_enabled(tracked):
            out = plain_call(self.fn, built, kwargs)
        return out.detach() if isinstance(out, torch.Tensor) else out

    def _plain_with_leading_one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        arguments = self._arguments(args, kwargs)
        chosen = tuple(i for i in arguments.chosen if arguments.leaves[i].requires_grad) or arguments.chosen
        arguments = replace(arguments, chosen=chosen)
        built, kwargs = arguments.build(tuple(p.unsqueeze(0) for p in arguments.params()))
        out = plain_call(center_of(self.fn), built, kwargs, rows=1)
        commit(self.fn)
        return any_tensor(out, self._typed)[0]

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        argnums = tuple([a if a < len(args) else self._place(a, args, kwargs) for a in self.options.argnums])
        arguments = flatten(args, kwargs, argnums)
        if not arguments.chosen:
            raise ValueError(
                f"`{self.options.call}(argnums={self.options.argnums})`: no floating-point tensor to differentiate in "
                f"these arguments of {self._typed}{instead(argnums, args, kwargs)}. "
                "(For a method, argument 0 is the one after `self`.)"
            )
        return arguments

    def _place(self, argnum: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The name of a differentiated argument that came by keyword."""
        names = self._positional_names
        if argnum < len(names) and names[argnum] in kwargs:
            return names[argnum]
        given = [f"<{len(args)} positional>", *(f"{name}=..." for name in kwargs)]
        raise ValueError(
            f"`{self.options.call}(argnums={self.options.argnums})` must index the call's arguments: there is no "
            f"argument {argnum} in `{self._typed.strip('`')}({', '.join(given)})`."
        )

    @functools.cached_property
    def _positional_names(self) -> list[str]:
        parameters = inspect.signature(self.fn).parameters.values()
        return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

    def _prepared(self, arguments: Arguments, chosen: tuple[int, ...]) -> tuple[Call, tuple[torch.Tensor, ...]]:
        """Check a call's tensors and take them out of its arguments."""
        o, leaves, num = self.options, arguments.leaves, self.options.num_samples
        params = tuple([leaves[i] for i in chosen])
        check_leaves(params, o)
        space = Space.of(params, o.batch_dim)
        sigma = radii(o.sigma, arguments, chosen, several=len(o.argnums) > 1)
        check_radii(sigma, o.method, space.dtype, o.call)
        lost = lost_gradient(arguments)
        if lost is not None:
            warn_of_lost_gradients(lost, self._typed, module=o.call != "zero_order")
        settings = Settings(
            o.distribution.at_radii(sigma),
            o.method,
            num.bound if isinstance(num, Until) else num or space.dim,
            sigma,
            o.evaluator,
            o.shaping,
            o.failures,
            o.surrogate,
            num if isinstance(num, Until) else None,
        )
        positions = tuple([i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)])
        bare = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call = Call(
            self.fn,
            Arguments(arguments.form, arguments.spec, bare, chosen),
            positions,
            tuple([positions.index(i) for i in chosen]),
            self._facts,
            settings,
            space,
            o.seed,
            o.generator,
        )
        return call, tuple([leaves[i] for i in positions])

    def __get__(self, instance: object, owner: type | None = None) -> ZeroOrderFunction[Any]:
        if instance is None or not hasattr(self.fn, "__get__"):
            return self
        bound = self.fn.__get__(instance, owner)
        return ZeroOrderFunction(bound, self.options, self._facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroOrderFunction[P]:
        options = self.options
        if options.generator is not None:
            twin = torch.Generator(options.generator.device)
            twin.set_state(options.generator.get_state())
            options = replace(options, generator=twin)
        return ZeroOrderFunction(copy.deepcopy(self.fn, memo), options)

    def __reduce__(self) -> tuple[Any, ...]:
        if inspect.ismethod(self.fn):
            return _decorated_again, (getattr, (self.fn.__self__, self.fn.__name__), self.options)
        place = getattr(self.fn, "__module__", None), getattr(self.fn, "__qualname__", None)
        found = _look_up(*place)
        if found is self:
            return _look_up, place
        if isinstance(found, ZeroOrderFunction) and found.fn is self.fn:
            return _decorated_again, (_look_up, place, self.options)
        if "<" in (place[1] or ""):
            raise pickle.PicklingError(
                f"{self._typed} cannot be pickled: lambdas and functions defined inside functions have no name that "
                "another process could import. Define it at the top of a module, and pass what it closes over as "
                "arguments."
            )
        return ZeroOrderFunction, (self.fn, self.options)

    def __repr__(self) -> str:
        return f"ZeroOrderFunction({self._typed.strip('`')}, {self.options})"


def _outside_the_graph(function: ZeroOrderFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = torch.compiler.disable(function.__call__)(*args, **kwargs)  # type: ignore[no-untyped-call]
    return out


# Under torch.compile the graph breaks here, since it cannot hold generators and user code. This mark is what
# torch.compiler.disable leaves; calling that at import would import the whole compiler.
_outside_the_graph._torchdynamo_disable = True  # type: ignore[attr-defined]


def _look_up(module: str | None, name: str | None) -> Any:
    if module is None or name is None:
        return None
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _decorated_again(find: Callable[..., Any], where: tuple[Any, ...], options: Options) -> ZeroOrderFunction[Any]:
    found = find(*where)
    return ZeroOrderFunction(found.fn if isinstance(found, ZeroOrderFunction) else found, options)


def any_tensor(out: Any, name: str) -> torch.Tensor:
    """Return what ``fn`` returned as a tensor of any dtype."""
    return out if isinstance(out, torch.Tensor) else as_tensor(out, name)


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
