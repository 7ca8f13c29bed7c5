"""Keyed random streams, and the random state that ``fn`` sees.

A key is (64-bit seed, purpose, counter). Everything random in an estimate is a function of its key, so that any slice
of any direction regenerates alone, on any worker, in any order. Purposes never share a stream.
"""

from __future__ import annotations

import functools
import threading
from contextvars import ContextVar
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from zograd._base.torch_private import dispatch_mode, schema
from zograd.errors import SharedStreamError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Token
    from types import TracebackType

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_COUNTER_BITS = 30
SEED_BITS = 63  # what one int64 draw gives, and what an int64 tensor holds


class Purpose(IntEnum):
    """What a stream is for."""

    DIRECTION = 0
    FN = 1
    INNER = 2


@functools.lru_cache(maxsize=8)  # an estimate mixes its own seed for each of its streams
def _mix64(x: int) -> int:
    """A bijection of 64-bit integers (splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def key(seed: int, purpose: Purpose, counter: int) -> int:
    """The 32-bit key of one stream.

    torch's CPU generator reads the low 32 bits of its seed only, so all 64 bits of ours have to be mixed into them. For
    one seed the map from (purpose, counter) is a bijection: no two streams of an estimate can collide.

    Returns:
        What a generator is seeded with.

    Raises:
        OverflowError: if the counter does not fit; an estimate that large has over 2**45 random values.
    """
    if counter >> _COUNTER_BITS:
        raise OverflowError(
            f"an estimate has at most 2**{_COUNTER_BITS} streams for each purpose, got number {counter}."
        )
    x, mixed = purpose << _COUNTER_BITS | counter, _mix64(seed)
    for half in (mixed & _MASK32, mixed >> 32):
        # A bijection of 32-bit integers in which each input bit moves half of the output bits (murmur3's finalizer).
        x ^= half
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
        x ^= x >> 16
    return x


def derive(seed: int, *counters: int) -> int:
    """A seed for something inside an estimate, independent of the estimate's own streams."""
    mixed = _mix64(seed ^ Purpose.INNER)
    for counter in counters:
        mixed = _mix64(mixed ^ counter)
    return mixed >> (64 - SEED_BITS)


def draw_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of one estimate: the user's, or one draw from the user's generator or torch's global stream.

    Inside another estimate's ``fn`` it is derived from the outer point's key instead, so that both sides of a pair see
    the same inner directions, and those are independent of the outer ones even where both were given one seed.

    Returns:
        A seed of 63 bits.
    """
    outer = _stream.get()
    if isinstance(outer, FnStream):
        return outer.next_seed() if seed is None else outer.nested_seed(seed)
    if seed is not None:
        return seed
    return _ownership.draw() if generator is None else _draw(generator)


def _draw(generator: torch.Generator) -> int:
    return int(torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator))


# ---------------------------------------------------------------------------------------------- torch's global stream


class _Ownership:
    """Which thread's estimate may seed torch's global CPU stream: the first that asks, until it is done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._depth = 0
        self._state = torch.empty(0)  # of the global stream as all others should find it
        self._drawn = torch.empty((), dtype=torch.int64)

    def acquire(self) -> int:
        """How deep in its estimates this thread now is, the outermost being 1; 0 if another thread is the owner."""
        with self._lock:
            if self._depth and self._thread != threading.get_ident():
                return 0
            if not self._depth:
                self._state = torch.default_generator.get_state()
            self._thread = threading.get_ident()
            self._depth += 1
            return self._depth

    def release(self) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                torch.default_generator.set_state(self._state)

    def draw(self) -> int:
        """One draw from the global stream, past the owner if that is another thread."""
        with self._lock:
            if not self._depth or self._thread == threading.get_ident():
                return int(self._drawn.random_(generator=torch.default_generator))
            beside = torch.Generator()
            beside.set_state(self._state)
            drawn = _draw(beside)
            self._state = beside.get_state()
            return drawn


_ownership = _Ownership()


@functools.cache
def _local_draws() -> type[Any]:
    """Return the class, made when first needed, of what makes torch's random functions draw from a thread's generators.

    torch's global stream belongs to the process. Where another thread's estimate owns it, ours hands its own generator
    to every random operation that accepts one, and refuses the others before they draw.
    """

    class LocalDraws(dispatch_mode()):  # type: ignore[misc]
        def __init__(self, device: torch.device) -> None:
            super().__init__()
            self.generators = {d: torch.Generator(d) for d in {torch.device("cpu"), device}}

        def __torch_dispatch__(
            self,
            func: Any,
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
                return func(*args, **kwargs)
            overload = _overload_with_generator(func)
            if overload is None and _draws_nothing(func, args, kwargs):
                return func(*args, **kwargs)
            if overload is None:
                raise SharedStreamError(
                    f"`{func}` drew from torch's global random stream in thread {threading.current_thread().name!r} "
                    "while an estimate in another thread owns it, so its numbers could not be reproduced. Draw from a "
                    "generator: `torch.Generator().manual_seed(zograd.current_seed())`."
                )
            tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
            device = tensor.device if tensor is not None else torch.device(kwargs.get("device") or "cpu")
            return overload(*args, **kwargs, generator=self.generators[device])

    return LocalDraws


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a random operator is called such that it draws no number, as attention without dropout is."""
    for i, argument in enumerate(schema(func).arguments):
        if argument.name in ("dropout_p", "train", "training"):
            given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return given is not None and not given
    return False


def _overload_with_generator(func: Any) -> Any:
    """The overload of a random operator with the same arguments and a generator, if there is one."""

    def arguments(overload: Any) -> dict[str, str]:
        return {a.name: str(a.type) for a in schema(overload).arguments}

    own = arguments(func)
    if "generator" in own:
        return func
    packet = func.overloadpacket
    candidates = (getattr(packet, name) for name in packet.overloads())
    return next((c for c in candidates if arguments(c) == {**own, "generator": "Optional[Generator]"}), None)


_thread = threading.local()  # .draws: the mode that is active in this thread


class TorchStream:
    """While entered, ``seed(k)`` decides what torch's random functions draw in this thread; left, all is as before.

    The first thread to enter owns torch's global stream until it has left for good; others draw from generators of
    their own, and keep to them in what they enter meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.generators: list[torch.Generator] = []
        self._states: list[tuple[torch.Generator, torch.Tensor]] = []
        self._leave: list[Callable[..., Any]] = []

    def __enter__(self) -> TorchStream:
        draws = getattr(_thread, "draws", None)
        depth = 0 if draws is not None else _ownership.acquire()
        if draws is not None:
            self.generators = list(draws.generators.values())
        elif depth:
            self._leave = [_ownership.release]
            self.generators = [torch.default_generator]
            if self._device.type in ("cuda", "xpu"):
                of_device = torch.get_device_module(self._device).default_generators
                self.generators.append(of_device[self._device.index or 0])
        else:
            self._begin_local_draws()
        restored = self.generators[1:] if depth == 1 else self.generators  # the owner gives back the CPU's itself
        self._states = [(g, g.get_state()) for g in restored]
        return self

    def _begin_local_draws(self) -> None:
        draws = _thread.draws = _local_draws()(self._device)
        draws.__enter__()
        self.generators = list(draws.generators.values())
        self._leave = [
            lambda: draws.__exit__(None, None, None),
            lambda: setattr(_thread, "draws", None),
        ]

    def seed(self, seed: int) -> None:
        """Let every stream start at ``seed``."""
        for generator in self.generators:
            generator.manual_seed(seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for generator, state in self._states:
                generator.set_state(state)
        finally:
            for leave in self._leave:
                leave()


# ------------------------------------------------------------------------------------------------- what fn sees of it

CENTER = -1
"""The index of the center among directions 0, 1, ..."""


class FnStream:
    """The random state of ``fn`` during one estimate.

    ``at(i)`` comes before each evaluation for direction i: all points of a direction see the same stream, different
    directions different ones. With ``shared`` (a scheme that uses the center) all points see the center's.
    """

    def __init__(self, seed: int, device: torch.device, *, shared: bool) -> None:
        self._seed = seed
        self.shared = shared
        self._torch = TorchStream(device)
        self._token: Token[FnStream | _PlainStream | None] | None = None
        self.depth: int = 1  # how many estimates this one is inside of, itself included
        self._rows: range | None = None  # under Batched: the directions of this call
        self._index = CENTER
        self._key = self.key(CENTER)
        self._nested = 0
        self.vmapped: bool = False  # whether the evaluation is a call of torch.vmap for many points

    def key(self, index: int) -> int:
        """The seed that ``fn`` sees at direction ``index``."""
        return key(self._seed, Purpose.FN, 0 if self.shared else index + 1)

    @property
    def seed(self) -> int:
        """The estimate's."""
        return self._seed

    def __enter__(self) -> FnStream:
        self._torch.__enter__()
        outer = _stream.get()
        self.depth = outer.depth + 1 if isinstance(outer, FnStream) else 1
        self._token = _stream.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _stream.reset(self._token)
        self._torch.__exit__(kind, error, trace)

    def at(self, index: int, rows: range | None = None, *, vmapped: bool = False) -> None:
        """Begin an evaluation at direction ``index``; with ``rows`` or ``vmapped``, at many from there on."""
        if index != self._index:
            self._index = index
            self._key = key(self._seed, Purpose.FN, 0 if self.shared else index + 1)
        self._rows = rows
        self.vmapped = vmapped
        self._nested = 0
        for generator in self._torch.generators:
            generator.manual_seed(self._key)

    def current_seed(self) -> int:
        if self.vmapped:
            raise RuntimeError(
                '`zograd.current_seed()` has no single answer under `evaluator="vmap"`, where one call of fn serves '
                'many directions: use `evaluator="loop"`, or `evaluator="batched"` with `zograd.current_seeds()`.'
            )
        if self._rows is not None:
            raise RuntimeError(
                '`zograd.current_seed()` has no single answer under `evaluator="batched"`: use '
                "`zograd.current_seeds()`, one seed for each parameter set."
            )
        return self._key

    def current_seeds(self) -> torch.Tensor:
        if self._rows is None:
            raise RuntimeError(
                '`zograd.current_seeds()` is for `evaluator="batched"`: here fn sees one point, use `current_seed()`.'
            )
        return torch.tensor([self.key(i) for i in self._rows], dtype=torch.int64)

    def seed_of_point(self) -> int | None:
        return None if self.shared or self._index == CENTER else self._key

    def nested_seed(self, seed: int) -> int:
        """Salt the seed that a nested estimate was given, the same at every point."""
        return derive(seed, self.depth)

    def next_seed(self) -> int:
        """The seed of the next nested estimate of this evaluation."""
        self._nested += 1
        return derive(self._seed, 0 if self.shared else self._index + 1, self._nested)


class _PlainStream:
    """What :func:`current_seed` reads in a plain call, where there are no directions: one fresh seed a call."""

    def __init__(self, rows: int | None) -> None:
        self._rows = rows
        self._key: int | None = None

    def current_seed(self) -> int:
        if self._key is None:
            self._key = int(torch.randint(2**32, (), dtype=torch.int64))
        return self._key

    def current_seeds(self) -> torch.Tensor:
        return torch.tensor([self.current_seed()] * (self._rows or 1), dtype=torch.int64)


_stream: ContextVar[FnStream | _PlainStream | None] = ContextVar("zograd_stream", default=None)


def plain_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None = None) -> Any:
    """Call fn once, outside any estimate, with :func:`current_seed` answering."""
    if _stream.get() is not None:
        return fn(*args, **kwargs)
    token = _stream.set(_PlainStream(rows))
    try:
        return fn(*args, **kwargs)
    finally:
        _stream.reset(token)


def _running() -> FnStream | _PlainStream:
    stream = _stream.get()
    if stream is None:
        raise RuntimeError("`zograd.current_seed()` is for use inside a function that zograd calls; none is running.")
    return stream


def seed_of_point() -> int | None:
    """Return the seed of the direction that is being evaluated; None at the center, and where all points share it."""
    stream = _stream.get()
    return stream.seed_of_point() if isinstance(stream, FnStream) else None


def vectorizes() -> bool:
    """Return whether the evaluation under way is a call of ``torch.vmap`` for many points."""
    stream = _stream.get()
    return isinstance(stream, FnStream) and stream.vmapped


def current_seed() -> int:
    """The seed for what ``fn`` draws outside torch: for ``env.reset(seed=...)``, numpy or a subprocess.

    It is the same for all points of one direction, so that their difference measures the parameters and not the luck
    (common random numbers), and another for each direction. With a scheme that uses the center all points share the
    center's. In a plain call (under ``torch.no_grad()``) it is drawn from torch's global stream.

    Returns:
        An integer in ``[0, 2**32)``, which numpy, gymnasium and ``random`` accept.

    Raises:
        RuntimeError: outside any function that zograd calls, and under ``evaluator="vmap"`` or ``"batched"``, where one
            call of ``fn`` serves many directions.

    Examples:
        >>> import random, torch, zograd
        >>> @zograd.zero_order(method="antithetic", num_samples=4)
        ... def noisy(x):
        ...     return x.sum() + random.Random(zograd.current_seed()).gauss(0, 100)
        >>> x = torch.zeros(3)
        >>> [abs(c) < 10 for c in noisy.estimate(x).coefficients.tolist()]
        [True, True, True, True]
    """
    return _running().current_seed()


def current_seeds() -> torch.Tensor:
    """The seeds of all parameter sets of this call, for an ``fn`` under ``evaluator="batched"``.

    Returns:
        An int64 tensor, one seed in ``[0, 2**32)`` for each entry of the leading axis.

    Raises:
        RuntimeError: outside any function that zograd calls, or under another evaluator.

    Examples:
        >>> import torch, zograd
        >>> @zograd.zero_order(num_samples=4, evaluator="batched")
        ... def noisy(x):
        ...     lengths.append(len(zograd.current_seeds()))
        ...     return x.sum(dim=1)
        >>> lengths = []
        >>> _ = noisy.estimate(torch.zeros(3))
        >>> lengths
        [1, 4]
    """
    return _running().current_seeds()
