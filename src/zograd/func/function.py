"""A decorated function, and one call of it: taken apart, checked, estimated."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec

import torch

from zograd._base.isolation import ModuleFunction
from zograd._base.streams import draw_seed, plain_call
from zograd._base.torch_private import forward_mode_active, is_transformed, without_function_modes
from zograd._base.trees import Arguments, Form, Space, flatten, sigma_per_leaf, unsupported
from zograd.estimate.estimate import estimate
from zograd.estimate.settings import Settings
from zograd.evaluators.task.answer import Facts
from zograd.evaluators.task.objective import Objective, refuses_grad, wants_grad
from zograd.evaluators.task.points import check_radii
from zograd.evaluators.task.returned import as_tensor, function_name
from zograd.func.autograd import attach, is_tracked
from zograd.func.inputs import instead, refuse, warn_of_lost_gradients
from zograd.func.options import Options
from zograd.sampling import Until
from zograd.tracking import RunningEstimate, trackers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zograd.estimate.result import Estimate

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
        if inspect.isfunction(fn):  # a callable object's attributes are its state, and could hide ours
            self.__dict__.update({k: v for k, v in fn.__dict__.items() if not hasattr(type(self), k)})
        functools.update_wrapper(self, fn, updated=())
        self.fn = fn
        self.options = options
        self._facts = facts or Facts()
        self._typed = function_name(fn)
        # Those of the last call with what they belong to: to make and check them anew is 3 % of the smallest estimate.
        self._last: tuple[Space, Form, tuple[int, ...], Settings] | None = None

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
        if not isinstance(self.fn, ModuleFunction):
            return any_tensor(plain_call(self.fn, built, kwargs, rows=1), self._typed)[0]
        with self.fn.estimating():
            out = plain_call(self.fn.at_center, built, kwargs, rows=1)
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
        o, leaves = self.options, arguments.leaves
        params = tuple([leaves[i] for i in chosen])
        if o.batch_dim is not None or len(params) > 1 or not params[0].numel() or unsupported(params[0]):
            refuse(params, o.call, o.argnums, o.batch_dim)
        space = Space.of(params, o.batch_dim)
        last = self._last
        if last is None or last[:3] != (space, arguments.form, chosen):
            last = space, arguments.form, chosen, self._settings(arguments, chosen, space)
            # A family that knows places in the space is one for these radii, made of what it is now.
            self._last = last if last[3].distribution is o.distribution else None
        lost = None if len(leaves) == len(params) else _lost_gradient(arguments)
        if lost is not None:
            warn_of_lost_gradients(lost, self._typed, module=o.call != "zero_order")
        positions = tuple([i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)])
        bare = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        call = Call(
            self.fn,
            Arguments(arguments.form, arguments.spec, bare, chosen),
            positions,
            tuple([positions.index(i) for i in chosen]),
            self._facts,
            last[3],
            space,
            o.seed,
            o.generator,
        )
        return call, tuple([leaves[i] for i in positions])

    def _settings(self, arguments: Arguments, chosen: tuple[int, ...], space: Space) -> Settings:
        o, num = self.options, self.options.num_samples
        each = sigma_per_leaf(o.sigma, arguments, several=len(o.argnums) > 1)
        sigma = tuple([s for i, s in zip(arguments.chosen, each, strict=True) if i in chosen])
        check_radii(sigma, o.method, space.dtype, o.call)
        return Settings(
            o.distribution.at_radii(sigma),
            o.method,
            num.bound if isinstance(num, Until) else num or space.dim,
            sigma,
            o.evaluator,
            o.shaping,
            o.policy,
            o.surrogate,
            num if isinstance(num, Until) else None,
        )

    def __get__(self, instance: object, owner: type | None = None) -> ZeroOrderFunction[Any]:
        if instance is None or not hasattr(self.fn, "__get__"):
            return self
        bound = self.fn.__get__(instance, owner)
        return ZeroOrderFunction(bound, self.options, self._facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroOrderFunction[P]:
        options = self.options
        if options.generator is not None:
            fresh = torch.Generator(options.generator.device)
            fresh.set_state(options.generator.get_state())
            options = replace(options, generator=fresh)
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


# torch.compile breaks its graph here, since that cannot hold generators and user code.
def _outside_the_graph(function: ZeroOrderFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = torch.compiler.disable(function.__call__)(*args, **kwargs)  # type: ignore[no-untyped-call]
    return out


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


def _lost_gradient(arguments: Arguments) -> torch.Size | None:
    """Return the shape of a tensor that requires grad and gets none, being in no differentiated argument."""
    ours = {i for span in arguments.form.spans for i in span}
    others = (x for i, x in enumerate(arguments.leaves) if i not in ours and isinstance(x, torch.Tensor))
    return next((x.shape for x in others if x.requires_grad), None)


def any_tensor(out: Any, name: str) -> torch.Tensor:
    """Return what ``fn`` returned as a tensor of any dtype."""
    return out if isinstance(out, torch.Tensor) else as_tensor(out, name)


@dataclass
class Call:
    """One call of a decorated function.

    Attributes:
        fn: the function.
        arguments: the arguments, taken apart, without their tensors, which autograd has to see as inputs.
        positions: where the tensors are, among the leaves.
        chosen: which of the tensors are differentiated.
        facts: what earlier calls have shown about ``fn``.
        settings: what the estimate is made of.
        space: the layout of the differentiated tensors.
        seed: the seed of the estimate; None to draw one.
        generator: where it is drawn from.
    """

    fn: Callable[..., Any]
    arguments: Arguments
    positions: tuple[int, ...]
    chosen: tuple[int, ...]
    facts: Facts
    settings: Settings
    space: Space
    seed: int | None
    generator: torch.Generator | None

    def estimate(self, tensors: Sequence[torch.Tensor], structure: Callable[[Sequence[Any]], Any] = tuple) -> Estimate:
        """Draw the seed and estimate.

        Args:
            tensors: those of the call.
            structure: makes the user's structure of a tuple of leaves.

        Returns:
            The estimate.
        """
        arguments = self.arguments
        if len(self.positions) > len(self.chosen):
            leaves = arguments.leaves.copy()
            for k, position in enumerate(self.positions):
                if k not in self.chosen:
                    t = tensors[k]  # detached, so that what fn computes with it has no way into the caller's graph
                    leaves[position] = t.detach().requires_grad_() if t.requires_grad else t
            arguments = Arguments(arguments.form, arguments.spec, leaves, arguments.chosen)
        params = tuple([tensors[k].detach() for k in self.chosen])
        objective = Objective(self.fn, arguments, params, self.facts, self.settings.policy)
        if not trackers():  # the smallest estimate has no time to lose
            return self._estimate(objective, params, structure)
        with RunningEstimate(objective.name, self.settings.evaluations) as running:
            objective.counted = running.count
            made = self._estimate(objective, params, structure)
            running.finish(
                made.seed,
                made.value.item() if made.value.numel() == 1 else None,
                None if made.flat is None else made.flat.norm().item(),
                evaluations=made.evaluations,
                failures=made.failures,
            )
        return made

    def _estimate(
        self, objective: Objective, params: tuple[torch.Tensor, ...], structure: Callable[[Sequence[Any]], Any]
    ) -> Estimate:
        seed = draw_seed(self.seed, self.generator)  # after the budget was asked: an error must not cost a draw
        return estimate(objective, self.settings, params, self.space, seed, structure)
