"""Reinforcement learning by evolution strategies: an objective of episodes, and a normalizer of observations.

Nothing here imports gymnasium or numpy: an environment is whatever has ``reset(seed=...)`` and ``step(action)`` in the
form of gymnasium, an observation whatever can be added and multiplied.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from zograd._base import checks
from zograd._base.streams import current_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Episodes", "Moments", "Normalizer"]


def __dir__() -> list[str]:
    return list(__all__)


class Episodes:
    r"""Minus the return of episodes under a policy, as an ``fn`` for :func:`zograd.zero_order`.

    .. math:: f(\theta) = -\frac{1}{K} \sum_{k=1}^{K} \sum_t (r_t - b)

    All points of a direction, both sides of a pair, say, begin with the same seeds, from
    :func:`zograd.current_seed`: their difference is that of the policies and not of the weather. Each thread makes
    an environment of its own at its first episode, and so does each process that the objective is sent to.

    Args:
        make: makes an environment: ``functools.partial(gymnasium.make, "CartPole-v1")``. To send it to other processes
            it must pickle.
        policy: from what the objective is called with to a function from an observation to an action.
        normalizer: applied to observations before the policy sees them, and shown all of them.
        episodes: how many one evaluation takes, K.
        bonus: what is subtracted from each reward, b: a bonus for staying alive that would teach standing still.

    Attributes:
        steps: of environments so far, in this process.

    Raises:
        ValueError: if ``episodes`` is below 1.
        TypeError: if it is not an int, or ``make`` or ``policy`` cannot be called.

    Examples:
        >>> import torch, zograd
        >>> class Walk:  # stand-in for an environment of gymnasium
        ...     def reset(self, *, seed):
        ...         self.x, self.left = float(seed % 3), 10
        ...         return self.x, {}
        ...     def step(self, action):
        ...         self.x, self.left = self.x + action, self.left - 1
        ...         return self.x, -abs(self.x), False, self.left == 0, {}
        >>> fn = Episodes(Walk, lambda gain: lambda x: -x * float(gain))
        >>> zograd.zero_order(num_samples=4, seed=0)(fn).estimate(torch.tensor(0.5)).evaluations
        5
        >>> fn.returns(torch.tensor(1.0), [0, 1, 2])
        [0.0, 0.0, 0.0]

    References:
        Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864).
    """

    def __init__(
        self,
        make: Callable[[], Any],
        policy: Callable[..., Callable[[Any], Any]],
        *,
        normalizer: Normalizer | None = None,
        episodes: int = 1,
        bonus: float = 0.0,
    ) -> None:
        checks.function(make, "`Episodes(make=...)`")
        checks.function(policy, "`Episodes(policy=...)`")
        self.make: Callable[[], Any] = make
        self.policy: Callable[..., Callable[[Any], Any]] = policy
        self.normalizer: Normalizer | None = normalizer
        self.episodes: int = checks.integer(episodes, "`Episodes(episodes=...)`", least=1)
        self.bonus: float = float(bonus)
        self.steps: int = 0
        self._own = threading.local()

    def __call__(self, *params: Any) -> float:
        """Minus the mean return, bonus taken off, over episodes whose seeds belong to the direction."""
        first, act = current_seed(), self.policy(*params)
        totals = [self._episode(act, first + k, self.bonus, learn=True) for k in range(self.episodes)]
        return -sum(totals) / len(totals)

    def returns(self, params: Any, seeds: Iterable[int]) -> list[float]:
        """The returns of single episodes, bonus included, from which the normalizer learns nothing.

        Args:
            params: what the policy is made of.
            seeds: one an episode.

        Returns:
            The return of each.
        """
        act = self.policy(params)
        return [self._episode(act, seed, 0.0, learn=False) for seed in seeds]

    def _episode(self, act: Callable[[Any], Any], seed: int, bonus: float, *, learn: bool) -> float:
        env, normalizer, total, over = self._env(), self.normalizer, 0.0, False
        observation, _ = env.reset(seed=seed)
        while not over:
            if normalizer is not None:
                if learn:
                    normalizer.seen.add(observation)
                observation = normalizer(observation)
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total += float(reward) - bonus
            over = bool(terminated or truncated)
            self.steps += 1
        return total

    def _env(self) -> Any:
        if not hasattr(self._own, "env"):
            self._own.env = self.make()
        return self._own.env

    def __repr__(self) -> str:
        return (
            f"Episodes({self.make!r}, {self.policy!r}, normalizer={self.normalizer}, episodes={self.episodes}, "
            f"bonus={self.bonus}, steps={self.steps})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()


class Moments:
    r"""Count, mean and sum of squared deviations of observations; two of them merge into those of both.

    .. math:: m = \frac{n_a m_a + n_b m_b}{n_a + n_b}, \qquad
              S = S_a + S_b + \frac{n_a n_b}{n_a + n_b} (m_b - m_a)^2

    Attributes:
        count: of observations.
        mean: of each of their entries.
        squares: the sum of squared deviations from it.

    Examples:
        >>> a, b = Moments(), Moments()
        >>> for x in (1.0, 2.0):
        ...     a.add(x)
        >>> b.add(6.0)
        >>> a.merge(b)
        >>> a.count, a.mean, round(a.squares, 9)
        (3, 3.0, 14.0)

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def __repr__(self) -> str:
        return f"Moments(count={self.count})"

    def add(self, observation: Any) -> None:
        """Take one observation.

        Args:
            observation: a number or an array.
        """
        if hasattr(observation, "astype"):
            observation = observation.astype("float64")  # a sum over millions in float32 would stand still
        self.count += 1
        away = observation - self.mean
        self.mean = self.mean + away / self.count
        self.squares = self.squares + away * (observation - self.mean)

    def merge(self, other: Moments) -> None:
        """Take what another one has seen.

        Args:
            other: of observations of the same shape.
        """
        if not other.count:
            return
        count = self.count + other.count
        away = other.mean - self.mean
        self.squares = self.squares + other.squares + away * away * (self.count * other.count / count)
        self.mean = self.mean + away * (other.count / count)
        self.count = count


class Normalizer:
    r"""Observations minus their running mean, over their running deviation; frozen between updates.

    .. math:: \tilde o = (o - m) / s

    What it has ``seen`` changes nothing before :meth:`update`, so that all episodes of an estimate are normalized
    alike; call that after the optimizer's step. Entries whose variance is below ``least`` become zero. Before the first
    update observations stay as they are.

    It is for evaluations one after the other: threads would get in each other's way, and what worker processes see
    stays with them. Ranks that share one merge what each has seen, in the same order:
    ``normalizer.seen.merge(other.seen)``.

    Args:
        least: the least variance of an entry that is used.
        clip: the largest absolute value that comes out; None for no limit.

    Attributes:
        known: the :class:`Moments` by which it normalizes.
        seen: those of the observations since.

    Examples:
        >>> normalizer = Normalizer()
        >>> for x in (1.0, 3.0):
        ...     normalizer.seen.add(x)
        >>> normalizer(5.0)
        5.0
        >>> normalizer.update()
        >>> normalizer(5.0)
        3.0

    References:
        Mania et al., "Simple random search provides a competitive approach to reinforcement learning"
        (arXiv:1803.07055), algorithm 2, V2.
    """

    def __init__(self, *, least: float = 1e-8, clip: float | None = None) -> None:
        self.least: float = checks.number(least, "`Normalizer(least=...)`", checks.POSITIVE)
        self.clip: float | None = checks.number(clip, "`Normalizer(clip=...)`", checks.POSITIVE, none=True)
        self.known: Moments = Moments()
        self.seen: Moments = Moments()
        self._factor: Any = 1.0

    def __call__(self, observation: Any) -> Any:
        """The normalized observation."""
        if not self.known.count:
            return observation
        out = (observation - self.known.mean) * self._factor
        if self.clip is None:
            return out
        return out.clip(-self.clip, self.clip) if hasattr(out, "clip") else min(max(out, -self.clip), self.clip)

    def __repr__(self) -> str:
        return f"Normalizer(least={self.least}, clip={self.clip}, count={self.known.count})"

    def update(self) -> None:
        """Normalize by all that was seen from now on."""
        self.known.merge(self.seen)
        self.seen = Moments()
        if self.known.count:
            variance = self.known.squares / self.known.count
            used = (variance >= self.least) * 1.0
            self._factor = used / (variance * used + (1.0 - used)) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """What it normalizes by.

        Returns:
            The count, and mean and sum of squared deviations as tensors.
        """
        known = self.known
        return {"count": known.count, "mean": torch.as_tensor(known.mean), "squares": torch.as_tensor(known.squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Normalize as another one did; what was seen since the last update is forgotten.

        Args:
            state: of :meth:`state_dict`.
        """
        self.known, self.seen = Moments(), Moments()
        self.known.count = state["count"]
        self.known.mean, self.known.squares = _number_or_array(state["mean"]), _number_or_array(state["squares"])
        self.update()


def _number_or_array(value: torch.Tensor) -> Any:
    return value.numpy().copy() if value.dim() else value.item()
