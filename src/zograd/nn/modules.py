"""The modules: one to inherit from, one that wraps any other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from zograd._base.isolation import ModuleFunction, Written, settled
from zograd._base.streams import plain_call
from zograd.distributions.adapter import Sampled
from zograd.distributions.gaussian import Gaussian
from zograd.evaluators.task.answer import Facts
from zograd.func.function import ZeroOrderFunction, any_tensor
from zograd.func.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd.distributions.adapter import DistributionLike
    from zograd.estimate.result import Estimate
    from zograd.evaluators.base import Evaluator
    from zograd.failures import Failures
    from zograd.sampling import Until
    from zograd.schemes import Scheme
    from zograd.shaping import Shaping


class _ZeroOrderModule(nn.Module):
    """What the two modules share: a call that differentiates the trainable parameters by their values."""

    zero_order_options: Options
    _without_parameters: ClassVar[str] = ""  # what else its user may have meant

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state_dict_post_hook(_without_empty_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_empty_state)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward``; with grad mode on, the result carries the estimate for the trainable parameters.

        Args:
            *args: the arguments of ``forward``.
            **kwargs: likewise.

        Returns:
            The value of ``forward``.
        """
        trainable = self._trainable()
        if torch.is_grad_enabled() and trainable:
            return self._function(trainable)(trainable, *args, **kwargs)
        if self.zero_order_options.evaluator.batched and trainable:
            return self._function(trainable)(trainable, *args, **kwargs)
        return any_tensor(plain_call(super().__call__, args, kwargs), f"`{type(self).__name__}`")

    def estimate(self, *args: Any, **kwargs: Any) -> Estimate:
        """Estimate the gradient of every trainable parameter, without autograd.

        Args:
            *args: the arguments of ``forward``.
            **kwargs: likewise.

        Returns:
            The estimate; its ``grad`` is a dict by parameter name.
        """
        trainable = self._trainable()
        return self._function(trainable).estimate(trainable, *args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        """Where ``generator=`` stands, as plain numbers; without one the module's state is that of its tensors alone.

        Returns:
            The state, which ``state_dict()`` holds under ``_extra_state``.
        """
        return self.zero_order_options.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Go on with the directions that come after :meth:`get_extra_state`; ``load_state_dict`` calls it.

        Args:
            state: what that returned.

        Raises:
            ValueError: if it has no generator's state and this module has one, or the other way around.
        """
        self.zero_order_options.load_state_dict(state, f"`{type(self).__name__}.load_state_dict(...)`")

    def _trainable(self) -> dict[str, nn.Parameter]:
        with settled(self):
            parameters = dict(self.named_parameters())
            buffers = self.named_buffers()
            lazy = [
                n
                for n, x in (*parameters.items(), *buffers)
                if isinstance(x, (nn.UninitializedParameter, nn.UninitializedBuffer))
            ]
        if lazy:
            raise RuntimeError(
                f"`{type(self).__name__}`: no shape is known of {', '.join(lazy)} before the first call of a "
                "lazy module: call it once with an input, under `torch.no_grad()`."
            )
        if not parameters:
            raise RuntimeError(f"The module has no parameters.{self._without_parameters}")
        return {name: p for name, p in parameters.items() if p.requires_grad}

    def _function(self, trainable: dict[str, nn.Parameter]) -> ZeroOrderFunction[Any]:
        facts, written = self.__dict__.setdefault("_zero_order_facts", (Facts(), Written()))
        return ZeroOrderFunction(
            ModuleFunction(self, {id(p): name for name, p in trainable.items()}, written),
            self._resolved_options(),
            facts,
        )

    def _resolved_options(self) -> Options:
        return self.zero_order_options

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        o = self.zero_order_options
        return (
            f"distribution={o.distribution}, method={o.method}, num_samples={o.num_samples}, sigma={o.sigma}, "
            f"evaluator={o.evaluator}"
        )


# Without a generator there is no state but that of the tensors: the key is left out, so that checkpoints of the plain
# module fit, and the other way around.


def _has_extra_state(module: _ZeroOrderModule) -> bool:
    own = type(module).get_extra_state is _ZeroOrderModule.get_extra_state
    return not own or module.zero_order_options.generator is not None


def _without_empty_state(module: Any, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    if not _has_extra_state(module):
        state_dict.pop(f"{prefix}_extra_state", None)


def _with_empty_state(module: Any, state_dict: dict[str, Any], prefix: str, *_others: Any) -> None:
    if not _has_extra_state(module):
        state_dict.setdefault(f"{prefix}_extra_state", {})


class ZeroOrderGradientModule(_ZeroOrderModule):
    r"""A module that defines ``forward`` and ``sample`` and trains by the values of ``forward``.

    .. math:: \nabla f_\sigma(\theta) \approx \frac{1}{N \sigma} \sum_{i=1}^{N} \epsilon_i
              \sum_j w_j f(\theta + \sigma c_j \epsilon_i)

    The settings are class keywords, inherited by subclasses, and live in one attribute, ``zero_order_options``; an
    instance can have its own: ``net.zero_order_options = net.zero_order_options.replace(sigma=0.1)``. Every
    evaluation begins with the module as it was, whatever it holds, and the center alone leaves traces, those of one
    plain call; ``docs/noise.md`` has the table. While a point is evaluated the module has its tensors for parameters:
    another thread that calls the module meanwhile sees them. A parameter that no evaluation reads gets zero, and is
    named in a warning. Frozen parameters are not perturbed, tied ones get the gradient of all their uses.

    Subclasses define ``forward(self, ...)``, which returns the objective, and ``sample(self, sample_shape)``, which
    returns directions of that shape with mean 0 and variance 1 for each value.

    Raises:
        TypeError: when made without ``forward`` or ``sample`` in its class's ancestry.
        RuntimeError: when called without parameters.

    Examples:
        >>> import torch
        >>> class Net(ZeroOrderGradientModule, method="antithetic", num_samples=100, sigma=0.01):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(3, 1)
        ...
        ...     def forward(self, x, y):
        ...         return (self.linear(x) - y).sign().mean()
        ...
        ...     def sample(self, sample_shape=torch.Size()):
        ...         return torch.randn(sample_shape)
        >>> net = Net()
        >>> loss = net(torch.randn(8, 3), torch.zeros(8, 1))
        >>> [g.shape for g in torch.autograd.grad(loss, net.parameters())]
        [torch.Size([1, 3]), torch.Size([1])]

    References:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864).
    """

    zero_order_options: ClassVar[Options] = Options.make(  # type: ignore[misc]
        "ZeroOrderGradientModule",
        distribution=None,
        method="naive",
        argnums=(0,),
        num_samples=1,
        sigma=1.0,
        evaluator="loop",
        shaping=None,
        failures="raise",
        batch_dim=None,
        generator=None,
        seed=None,
    )

    def __init_subclass__(cls, **options: Any) -> None:
        """Take the class keywords as settings, on top of those of the bases."""
        super().__init_subclass__()
        call = f"class {cls.__name__}"
        for name in ("distribution", "argnums", "batch_dim"):
            if name in options:
                raise TypeError(
                    f"`{call}({name}=...)`: a ZeroOrderGradientModule has no setting `{name}`; see `sample`."
                )
        cls.zero_order_options = dataclasses.replace(cls.zero_order_options, call=call).replace(**options)

    def __new__(cls, *args: Any, **kwargs: Any) -> ZeroOrderGradientModule:
        """Refuse a class without ``forward`` or ``sample``, wherever in its ancestry they may stand."""
        missing = [name for name in ("forward", "sample") if getattr(cls, name, None) in (None, nn.Module.forward)]
        if missing:
            raise TypeError(f"Can't instantiate abstract class {cls.__name__} without `{'` and `'.join(missing)}`.")
        return super().__new__(cls)

    def _resolved_options(self) -> Options:
        if type(self.zero_order_options.distribution) is not Gaussian:
            return self.zero_order_options  # chosen for this instance, past `sample`
        sampler = self.__dict__.get("_zero_order_sampler")
        if sampler is None or not sampler.samples(self.sample):
            # Kept, since whether it can be replayed is found out once.
            sample = cast("Callable[..., torch.Tensor]", self.sample)
            sampler = Sampled(sample, by_keyword=True, call=f"class {type(self).__name__}")
            self.__dict__["_zero_order_sampler"] = sampler
        return dataclasses.replace(self.zero_order_options, distribution=sampler)


class ZeroOrder(_ZeroOrderModule):
    """Any module whose ``forward`` returns the objective, trained by its values.

    The wrapped module's trainable parameters get the estimate; see :class:`ZeroOrderGradientModule` for what happens to
    buffers, tied and frozen ones.

    Args:
        module: the module.
        distribution: as in :func:`zograd.zero_order`, like all settings.
        method: the scheme or its name.
        num_samples: the number of directions; or an :class:`~zograd.Until`; None, for
            ``Coordinate()`` alone, is every coordinate once.
        sigma: the smoothing radius, a number or a dict by parameter name (``"module."`` in front).
        evaluator: how ``forward`` is called on points.
        shaping: what is done to the values first.
        failures: what a failed evaluation means.
        generator: where each call's seed is drawn from.
        seed: the seed of every call.

    Raises:
        TypeError: if ``module`` is not a module, or a setting is of a wrong type.
        ValueError: if a setting is out of its range.

    Examples:
        >>> import torch
        >>> class Hits(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 3)
        ...
        ...     def forward(self, x, label):
        ...         return (self.linear(x).argmax(dim=1) != label).float().mean()
        >>> net = ZeroOrder(Hits(), method="antithetic", num_samples=32, sigma=0.1, evaluator="vmap")
        >>> net(torch.randn(50, 2), torch.zeros(50)).backward()
        >>> net.module.linear.weight.grad.shape
        torch.Size([3, 2])
    """

    _without_parameters: ClassVar[str] = (
        " `ZeroOrder` differentiates those; for the gradient of a module's input decorate a function of it: "
        "`zero_order(...)(lambda x: module(x))`, with `batch_dim=0` for a layer."
    )

    def __init__(
        self,
        module: nn.Module,
        distribution: DistributionLike | None = None,
        method: str | Scheme = "naive",
        num_samples: int | Until | None = 1,
        sigma: Any = 1.0,
        *,
        evaluator: str | Evaluator = "loop",
        shaping: Shaping | None = None,
        failures: Failures = "raise",
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"`ZeroOrder(module)` must be a module, got {type(module).__name__} {module!r:.80}.")
        self.module: nn.Module = module
        self.zero_order_options: Options = Options.make(
            "ZeroOrder",
            distribution=distribution,
            method=method,
            argnums=(0,),
            num_samples=num_samples,
            sigma=sigma,
            evaluator=evaluator,
            shaping=shaping,
            failures=failures,
            batch_dim=None,
            generator=generator,
            seed=seed,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module.

        Args:
            *args: its arguments.
            **kwargs: likewise.

        Returns:
            What it returns.
        """
        return self.module(*args, **kwargs)
