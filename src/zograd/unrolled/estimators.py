"""The estimators of unrolled systems: truncated ES, PES and NRES."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

import torch

from zograd._base import checks
from zograd._base.streams import derive, draw_seed
from zograd._base.trees import take_apart
from zograd.evaluators.task.answer import Facts
from zograd.evaluators.task.returned import function_name
from zograd.func.autograd import attach
from zograd.func.options import Options
from zograd.sampling import Until
from zograd.unrolled.particles import SIDES
from zograd.unrolled.plan import Run, Setup, set_up
from zograd.unrolled.window import Layout, Window

if TYPE_CHECKING:
    from zograd.distributions.adapter import DistributionLike
    from zograd.evaluators.base import Evaluator

_KINDS = ("TruncatedES", "PES", "NRES")


class State(TypedDict):
    """Where an unroll stands: a plain dict of tensors, to be saved with ``torch.save`` and gone on with, bit for bit.

    Attributes:
        kind: whose state it is: 0 of :class:`TruncatedES`, 1 of :class:`PES`, 2 of :class:`NRES`.
        center: the state at the parameters themselves.
        particles: the states of the particles, each leaf with leading axes (num_samples, 2); None in truncated ES.
        perturbation: what each particle's loss is weighted with, in units of sigma, (num_samples, 2, d): in PES the sum
            of its perturbations, in NRES the one it has. None in truncated ES.
        seed: what all directions are a function of.
        window: windows done.
    """

    kind: torch.Tensor
    center: Any
    particles: Any
    perturbation: torch.Tensor | None
    seed: torch.Tensor
    window: torch.Tensor


class UnrolledEstimator(ABC):
    """What the estimators of this module have in common; each adds what particles are perturbed by.

    Args:
        fn: ``fn(params, state, *args) -> (loss, state)``, a window of the system. Any trees; the loss is one number,
            the state's tensors keep their shapes and dtypes (numbers and arrays come back as tensors).
        num_samples: pairs of particles, N.
        sigma: the smoothing radius, a number or a tree of them matching the parameters.
        distribution: what perturbations are drawn from; None is the standard Gaussian.
        evaluator: how ``fn`` is called on the particles.
        generator: where :meth:`init` draws the seed; None is torch's global stream.
        seed: the seed, in place of a draw.

    Attributes:
        options: these settings; what unrolls come to is in the states that calls take and return, not in here.

    Raises:
        TypeError: if a setting is of a wrong type.
        ValueError: if it is out of its range, or the distribution is not one that the estimator can use.
    """

    _kind: ClassVar[str]
    _carries: ClassVar[bool] = True  # whether particles have states of their own
    _gaussian: ClassVar[bool] = False  # whether the formula rests on Gaussian marginals

    def __init__(
        self,
        fn: Callable[..., Any],
        num_samples: int = 1,
        sigma: Any = 1.0,
        *,
        distribution: DistributionLike | None = None,
        evaluator: str | Evaluator = "loop",
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        call = type(self).__name__
        checks.function(fn, f"`{call}(fn)`")
        if isinstance(num_samples, Until):
            raise TypeError(f"`{call}(num_samples=...)` must be an int, got {num_samples}: each particle has a state.")
        self.options: Options = Options.make(
            call,
            distribution=distribution,
            method="antithetic",
            argnums=(0,),
            num_samples=num_samples,
            sigma=sigma,
            evaluator=evaluator,
            shaping=None,
            failures="raise",
            batch_dim=None,
            generator=generator,
            seed=seed,
        )
        self._check_distribution()
        self._fn, self._typed, self._facts = fn, function_name(fn), Facts()

    def _check_distribution(self) -> None:
        family, call = self.options.distribution, self.options.call
        if not family.centered:
            raise ValueError(
                f"`{call}(distribution={family})`: perturbations must have mean zero, which these have not."
            )
        if self._gaussian and not family.gaussian_marginals:
            raise ValueError(
                f"`{call}(distribution={family})` must have Gaussian marginals, which the sum over windows rests on: "
                "use `Gaussian()` or `Orthogonal()`, or `NRES`, whose episodes have one perturbation each."
            )

    @abstractmethod
    def _perturb(
        self, held: torch.Tensor | None, draw: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What particles are perturbed by and weighted with, from the latter in the last window; zero is a new one."""

    # ------------------------------------------------------------------------------------------------ what users call

    def init(self, params: Any, state: Any, *args: Any, offsets: int = 1) -> State:
        """The beginning of an unroll: all particles in the same state, or spread over the episode.

        Args:
            params: the parameters, a tree; those of its tensors that require grad are perturbed.
            state: the state in which an episode begins, a tree of tensors, arrays and numbers.
            *args: further arguments of the window, for ``offsets``.
            offsets: windows over which the pairs are spread (step-unlocked particles): pair i begins in the state that
                ``i * offsets // num_samples`` windows at ``params`` lead to, which takes ``offsets - 1`` evaluations.
                Until its first reset its gradient leaves out what the parameters did before that.

        Returns:
            The state of the unroll.

        Raises:
            TypeError: if the state has a leaf that is no tensor, array or number, or ``offsets`` is not an int.
            ValueError: if ``params`` has nothing to differentiate, ``offsets`` is less than 1, or more in
                :class:`TruncatedES`, whose particles carry no state.
        """
        offsets = _offsets(offsets, self.options.call, carries=self._carries)
        setup, tensors = set_up(self.options, self._fn, params, args)
        device, num = setup.space.device, setup.settings.num_samples
        layout, leaves = Layout.of(state, device, f"`{self.options.call}.init(params, state)`")
        seed = draw_seed(self.options.seed, self.options.generator)
        begun = State(
            kind=torch.tensor(_KINDS.index(self._kind)),
            center=layout.together([leaf.clone() for leaf in leaves]),
            particles=None,
            perturbation=None,
            seed=torch.tensor(seed),
            window=torch.tensor(0),
        )
        if self._carries:
            states = [layout.pack(leaves, torch.Size(), device)]
            for k in range(offsets - 1):
                states.append(self._run(setup, layout, seed, states[-1]).step(tensors, derive(seed, 1, k)))
            starts = torch.stack(states)
            rows = starts[[i * offsets // num for i in range(num)]].unsqueeze(1).expand(num, len(SIDES), -1)
            begun["particles"] = layout.unpack(rows.clone())
            begun["perturbation"] = torch.zeros(
                num, len(SIDES), setup.space.size, dtype=setup.space.dtype, device=device
            )
        return begun

    def __call__(self, params: Any, state: State, *args: Any) -> tuple[torch.Tensor, State]:
        """Run one window.

        Args:
            params: the parameters.
            state: of :meth:`init`, :meth:`reset` or the last call; it is not changed.
            *args: further arguments of the window, the same for all particles.

        Returns:
            The loss of the window at ``params`` (from the center's state), whose ``backward()`` gives ``params`` the
            estimate, and the state after the window.

        Raises:
            TypeError: if the window returns no pair, or ``state`` did not come from :meth:`init`.
            ValueError: if the window changes the structure, a shape or a dtype of its state, or ``state`` is that of
                another estimator.
            NonFiniteError: if a loss is nan or infinite.
            SecondDerivativeError: if a second derivative is asked for.
        """
        self._check_state(state)
        setup, tensors = set_up(self.options, self._fn, params, args)
        layout, center = Layout.of(state["center"], setup.space.device, self._given)
        seed = derive(int(state["seed"]), 0, int(state["window"]))
        packed = layout.pack(center, torch.Size(), setup.space.device)
        run = self._run(setup, layout, seed, packed, *self._held(state, layout, setup))
        loss = attach(run.estimate, tensors, setup.chosen)
        assert run.values is not None
        after = State(**{**state, "center": layout.unpack(run.values.center), "window": state["window"] + 1})
        if self._carries:
            after["particles"], after["perturbation"] = layout.unpack(run.values.states), run.weights
        return loss, after

    def reset(self, state: State, done: Any, start: Any) -> State:
        """Begin new episodes where old ones have ended.

        A particle that begins anew loses what it has been perturbed by: in PES its accumulated perturbation is zero, in
        NRES another one is drawn for it. If only one side of a pair begins anew, both count, but as two particles and
        no longer as a difference: the variance is higher until both have begun anew.

        Args:
            state: the state of the unroll; it is not changed.
            done: a function from a window's state to a bool, which is called with the center's state and with the
                particles', whose leaves have leading axes (num_samples, 2); or a bool tensor of shape (num_samples, 2)
                or, for whole pairs, (num_samples,), which leaves the center alone; or one bool for all.
            start: the state in which a new episode begins, as in :meth:`init`.

        Returns:
            The new state of the unroll.

        Raises:
            TypeError: if ``state`` did not come from :meth:`init`, or a mask is not of bools.
            ValueError: if a mask or ``start`` has a wrong shape, or ``state`` is that of another estimator.

        Examples:
            >>> import torch, zograd
            >>> def window(params, state):
            ...     return (state["x"] - 1) ** 2, {"x": 0.5 * state["x"] + params, "t": state["t"] + 1}
            >>> estimator = zograd.unrolled.PES(window, num_samples=4, sigma=0.1)
            >>> params, start = torch.tensor(0.3, requires_grad=True), {"x": 0.0, "t": 0}
            >>> state = estimator.init(params, start)
            >>> for _ in range(10):
            ...     loss, state = estimator(params, state)
            ...     loss.backward()
            ...     state = estimator.reset(state, lambda s: s["t"] >= 8, start)
            >>> state["center"]["t"]
            tensor(2)
        """
        self._check_state(state)
        typed = f"`{self.options.call}.reset(state, done, start)`"
        device = _device(state["center"])
        layout, _ = Layout.of(state["center"], device, typed)
        leaves = layout.taken(start, torch.Size(), device, f"{typed}: `start`")
        here, there = self._masks(state, done, typed)
        begun = State(**state)
        if here:
            begun["center"] = layout.together([leaf.clone() for leaf in leaves])
        if state["perturbation"] is not None:
            there = there.to(device)
            old, _ = take_apart(state["particles"])
            begun["particles"] = layout.together([_chosen(there, x, y) for x, y in zip(leaves, old, strict=True)])
            begun["perturbation"] = state["perturbation"].masked_fill(there.unsqueeze(-1), 0.0)
        return begun

    def __repr__(self) -> str:
        o = self.options
        return (
            f"{o.call}({self._typed.strip('`')}, num_samples={o.num_samples}, sigma={o.sigma}, "
            f"distribution={o.distribution}, evaluator={o.evaluator}, seed={o.seed})"
        )

    # ---------------------------------------------------------------------------------------------------------- parts

    @property
    def _given(self) -> str:
        return f"`{self.options.call}(params, state)`"

    @property
    def _num(self) -> int:
        return cast("int", self.options.num_samples)  # None is for directions with another mean than zero

    def _run(
        self,
        setup: Setup,
        layout: Layout,
        seed: int,
        center: torch.Tensor,
        states: torch.Tensor | None = None,
        held: torch.Tensor | None = None,
    ) -> Run:
        window = Window(layout, self._typed, lead=int(self.options.evaluator.batched))
        return Run(setup, window, self._facts, self._perturb, seed, center, states, held)

    def _held(self, state: State, layout: Layout, setup: Setup) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The particles' packed states and what they are weighted with; none where they begin at the center's."""
        perturbation = state["perturbation"]
        if not self._carries or perturbation is None:
            return None, None
        lead = torch.Size((setup.settings.num_samples, len(SIDES)))
        if perturbation.shape != (*lead, setup.space.size):
            raise ValueError(
                f"{self._given}: the state must be that of `params` and of num_samples={lead[0]}, with a perturbation "
                f"of shape {(*lead, setup.space.size)}, got {tuple(perturbation.shape)}."
            )
        leaves = layout.taken(state["particles"], lead, setup.space.device, f"{self._given}: the particles' state")
        return layout.pack(leaves, lead, setup.space.device), perturbation

    def _check_state(self, state: Any) -> None:
        wanted = State.__annotations__
        if not isinstance(state, dict) or state.keys() != wanted.keys():
            raise TypeError(
                f"{self._given}: the state must be that of `{self.options.call}.init(params, state)`, a dict of "
                f"{', '.join(wanted)}, got {type(state).__name__} {state!r:.80}."
            )
        kind = int(state["kind"])
        if kind != _KINDS.index(self._kind):
            name = dict(enumerate(_KINDS)).get(kind, f"kind {kind}")
            raise ValueError(f"{self._given}: the state is that of another estimator, `{name}`.")

    def _masks(self, state: State, done: Any, typed: str) -> tuple[bool, torch.Tensor]:
        """Whether the center begins anew, and which particles do."""
        lead = (self._num, len(SIDES))
        particles = state["perturbation"] is not None
        here = _mask(done(state["center"]) if callable(done) else done, typed)
        there = _mask(done(state["particles"]), typed) if callable(done) and particles else here
        alone = not callable(done) and here.dim() > 0  # a mask of the particles
        if there.shape == lead[:1]:
            there = there.unsqueeze(1)
        if (here.dim() and not alone) or there.shape not in ((), (lead[0], 1), lead) or (alone and not particles):
            raise ValueError(
                f"{typed}: `done` must be one bool for the center and {lead if particles else 'none'} for particles, "
                f"got the shapes {tuple(here.shape)} and {tuple(there.shape)}."
            )
        return bool(here) if not alone else False, there.expand(lead)


class TruncatedES(UnrolledEstimator):
    r"""Evolution strategies on windows alone: biased, since it forgets what :math:`\theta` did before the window.

    All particles begin each window in the center's state, and are weighted with this window's perturbation. What
    :math:`\theta` does by way of the state is left out; it is here to compare with, and for systems that forget fast.
    Any distribution of mean zero will do.

    Args:
        fn: ``fn(params, state, *args) -> (loss, state)``; this and the others are those of :class:`UnrolledEstimator`.

    Examples:
        >>> import torch, zograd
        >>> def window(params, state):
        ...     return state + params, state + params
        >>> estimator = zograd.unrolled.TruncatedES(window, num_samples=8, sigma=0.1, seed=0)
        >>> params = torch.tensor(1.0, requires_grad=True)
        >>> loss, state = estimator(params, estimator.init(params, 0.0))
        >>> loss
        tensor(1., grad_fn=<_ZeroOrderBackward>)

    References:
        Metz et al., "Understanding and correcting pathologies in the training of learned optimizers"
        (arXiv:1810.10180).
    """

    _kind = "TruncatedES"
    _carries = False

    def _perturb(
        self, held: torch.Tensor | None, draw: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = draw()
        return fresh, fresh


class PES(UnrolledEstimator):
    r"""Persistent evolution strategies: unbiased, with a new perturbation for each window.

    .. math:: \hat g_t = \frac{1}{2 N \sigma} \sum_i \sum_{\pm} \xi_{it}^\pm L_{it}^\pm,
              \qquad \xi_{it}^\pm = \pm \sum_{\tau \le t} \epsilon_{i \tau}

    The sum runs from the beginning of the particle's episode. Over an episode the mean of :math:`\sum_t \hat g_t` is
    the gradient of its smoothed loss, each window's parameters being smoothed on their own; that is Stein's identity,
    so the distribution must have Gaussian marginals. The variance grows with the number of windows in an episode.

    Args:
        fn: ``fn(params, state, *args) -> (loss, state)``; this and the others are those of :class:`UnrolledEstimator`.

    Examples:
        >>> import torch, zograd
        >>> def window(params, state):  # a leaky sum that should come to 1
        ...     state = 0.5 * state + params
        ...     return (state - 1) ** 2, state
        >>> estimator = zograd.unrolled.PES(window, num_samples=32, sigma=0.1, evaluator="vmap", seed=0)
        >>> params = torch.tensor(0.0, requires_grad=True)
        >>> optimizer = torch.optim.SGD([params], lr=0.02)
        >>> state = estimator.init(params, torch.tensor(0.0))
        >>> for _ in range(200):
        ...     loss, state = estimator(params, state)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> abs(params.item() - 0.5) < 0.05
        True

    References:
        Vicol et al., "Unbiased gradient estimation in unrolled computation graphs with persistent evolution strategies"
        (arXiv:2112.13835).
    """

    _kind = "PES"
    _gaussian = True

    def _perturb(
        self, held: torch.Tensor | None, draw: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert held is not None
        fresh = draw()
        return fresh, held + fresh


class NRES(UnrolledEstimator):
    r"""Noise-reuse evolution strategies: each particle keeps one perturbation for its whole episode.

    .. math:: \hat g_t = \frac{1}{2 N \sigma} \sum_i \epsilon_i (L_{it}^+ - L_{it}^-)

    Over an episode :math:`\sum_t \hat g_t` is the antithetic estimate of its smoothed loss, taken a window at a time:
    unbiased for whatever distribution is so elsewhere. With a window for a whole episode it is plain ES; with all
    pairs beginning their episodes together it is ES-Single (arXiv:2304.11153), and with ``init(..., offsets=...)`` the
    step-unlocked NRES. Its variance is often, but not always, lower than that of :class:`PES`: where T windows add the
    parameters to a sum that is each one's loss, it is :math:`T^2 (T + 1)^2 / 2` and that of PES
    :math:`2 \sum_{s,t \le T} \min(s, t)^2`.

    Args:
        fn: ``fn(params, state, *args) -> (loss, state)``; this and the others are those of :class:`UnrolledEstimator`.

    Examples:
        >>> import torch, zograd
        >>> estimator = zograd.unrolled.NRES(lambda p, s: (s + p, s + p), num_samples=8, sigma=0.1, seed=0)
        >>> params = torch.tensor(1.0, requires_grad=True)
        >>> first, state = estimator(params, estimator.init(params, 0.0))
        >>> second, after = estimator(params, state)
        >>> torch.equal(state["perturbation"], after["perturbation"])
        True

    References:
        Li et al., "Variance-reduced gradient estimation via noise-reuse in online evolution strategies"
        (arXiv:2304.12180).
    """

    _kind = "NRES"

    def _perturb(
        self, held: torch.Tensor | None, draw: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert held is not None
        new = (held == 0).all(dim=-1, keepdim=True)
        if new.any():
            held = torch.where(new, draw(), held)
        return held, held


def _device(tree: Any) -> torch.device:
    return next((x.device for x in take_apart(tree)[0] if isinstance(x, torch.Tensor)), torch.device("cpu"))


def _chosen(mask: torch.Tensor, start: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(*mask.shape, *[1] * start.dim()), start, old)


def _mask(given: Any, typed: str) -> torch.Tensor:
    mask: torch.Tensor = torch.as_tensor(given)
    if mask.dtype != torch.bool:
        raise TypeError(f"{typed}: `done` must be a bool or a tensor of bools, got {mask.dtype}.")
    return mask


def _offsets(offsets: Any, call: str, *, carries: bool) -> int:
    typed = f"`{call}.init(offsets=...)`"
    given = checks.integer(offsets, typed, least=1)
    if given > 1 and not carries:
        raise ValueError(f"{typed} must be 1, got {given}: its particles all begin in the center's state.")
    return given
