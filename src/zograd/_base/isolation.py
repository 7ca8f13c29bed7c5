"""The state that evaluations of a function begin from, and what the center leaves of it.

Every evaluation of an estimate begins from the state that was there before; only the center leaves traces, those of
one plain call. For modules that is made so here: they are evaluated where they stand, with the tensors of the point in
the places of their parameters, and whatever they reach is put back after each evaluation. Other functions keep their
state to themselves.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import threading
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zograd._base.digest import Digest
from zograd._base.execution import free_memory
from zograd._base.reach import is_array, of_library, slots
from zograd._base.state import LIMIT, Place, State, Things, bit_generator, can_change
from zograd._base.streams import derive, seed_of_point, vectorizes
from zograd._base.torch_private import as_parameter, parametrizations_cached, registries, set_registry, storages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locking = threading.Lock()


class ModuleFunction:
    """A module as a function of its trainable parameters: each evaluation begins where the module was.

    Args:
        module: the module.
        names: the names of the parameters to replace, by their ``id``.
        written: what is known of its frozen parameters from earlier calls.
        alone: whether no other thread knows the module.

    Attributes:
        read: names of the parameters that an evaluation of this estimate has read, or may have.
    """

    def __init__(
        self, module: nn.Module, names: dict[int, str], written: Written | None = None, *, alone: bool = False
    ) -> None:
        self.module: nn.Module = module
        self._names = names
        self._written = Written() if written is None else written
        self._alone = alone
        self._again: bool | None = None  # whether a copy of the module is the same function
        self._held: _Held | None = None
        self.read: set[str] = set()
        if parametrizations_cached():
            raise RuntimeError(
                "a zeroth-order module cannot be evaluated inside `parametrize.cached()`: the cache would serve all "
                "points "
                "the parametrized weight of one."
            )
        self.__qualname__ = type(module).__qualname__

    def __call__(self, params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Evaluate with these parameters, as the module was before the center, and leave no trace."""
        held = self._begun()
        with held.turn:
            held.seed_generators()
            try:
                held.put(params)
                return held.apart(nn.Module.__call__(self.module, *args, **kwargs))
            finally:
                held.put_back()

    @property
    def names(self) -> list[str]:
        """The names of the trained parameters, sorted, as the leaves of a dict of them are."""
        return sorted(self._names.values())

    def begin(self) -> None:
        """Note how the module is before the center, unless that is known."""
        if self._held is None:
            self.read = set()
            self._held = _Held(self.module, self._names, self._written, self.read, alone=self._alone)

    def at_center(self, params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Evaluate as one plain call, whose traces :meth:`end` leaves on the module."""
        held = self._begun()
        try:
            held.put(params)
            out = held.apart(nn.Module.__call__(self.module, *args, **kwargs))
            held.keep_traces()
        finally:
            held.put_back()
        return out

    @contextlib.contextmanager
    def estimating(self) -> Iterator[None]:
        """Hold the module; at the end it has what the center left, or nothing of it after an exception.

        Yields:
            Nothing.
        """
        self.begin()
        try:
            yield
        except BaseException:
            self.end(commit=False)
            raise
        self.end(commit=True)

    def end(self, *, commit: bool) -> None:
        """Let the module have what the center left, or nothing of it, now that the estimate is done or failed."""
        held, self._held = self._held, None
        if held is not None:
            held.end(commit=commit)

    def __reduce__(self) -> tuple[Any, ...]:
        """As the module was before the center, with the parameters that are differentiated, for another process."""
        parameters = {id(p): p for p in self.module.parameters()}
        own = {name: parameters[identity] for identity, name in self._names.items()}
        return _again, (self.module, own, self._written)

    def for_thread(self) -> ModuleFunction:
        """Return one with a module of its own, for another thread; itself if a copy would be another function."""
        if self._again is None:
            self._again = self._begun().deep_copies()
        if not self._again:
            return self
        try:
            return copy.deepcopy(self)
        except Exception:  # whatever an object of the user's raises
            return self

    def _begun(self) -> _Held:
        self.begin()
        assert self._held is not None
        return self._held


@contextlib.contextmanager
def settled(module: nn.Module) -> Iterator[None]:
    """Wait until no other thread evaluates a module, whose parameters are others meanwhile, and let none begin.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for lock in _locks_of(list(module.modules())):
            stack.enter_context(lock)
        yield


class Written:
    """The frozen parameters that forward writes to, as far as that is known; kept from call to call.

    Attributes:
        paths: theirs; None before the first estimate.
    """

    def __init__(self) -> None:
        self.paths: set[str] | None = None


class _Held:
    """A module in the hands of one estimate.

    Args:
        module: the module.
        names: the names of the parameters to replace, by their ``id``.
        written: what is known of its frozen parameters.
        read: takes the names of the parameters that are read.
        alone: whether no other thread knows the module.
    """

    def __init__(
        self, module: nn.Module, names: dict[int, str], written: Written, read: set[str], *, alone: bool
    ) -> None:
        self._module, self._names, self._written, self._read = module, names, written, read
        self._parts = list(module.modules())
        self.turn = threading.RLock()  # of a thread of a pool, where all evaluate the one module
        for part in self._parts:
            if isinstance(part, torch.jit.ScriptModule):
                raise TypeError(f"{type(part).__name__} cannot be evaluated with other parameters: it is compiled.")
        self._locks = [] if alone else _locks_of(self._parts)
        for lock in self._locks:
            lock.acquire()
        try:
            self._look()
        except BaseException:
            self._release()
            raise

    def _look(self) -> None:
        self._trained = {id(p): p for p in self._module.parameters() if id(p) in self._names}
        self._registered = [(registries(m)[0], registries(m)[2].keys() | ()) for m in self._parts]
        self._things = Things(self._module)
        around = Things(self._module, held=False)
        self._aliases = _aliases(around, self._trained)
        own = set(map(id, self._parts))
        self._meets_others = any(isinstance(h.value, nn.Module) and id(h.value) not in own for h in around.reached)
        registered = {id(parameters) for parameters, _ in self._registered}
        places = list(around.places(self._trained.keys() | self._aliases.keys()))
        self._places = [place for place in places if id(place.cell) not in registered]
        # What is held elsewhere, too, may be read there without a sign.
        held = {id(place.tensor) for place in self._places} | {of for _, of in self._aliases.values()}
        self._read |= {self._names[k] for k in held & self._names.keys()}
        frozen = {name: p for name, p in self._module.named_parameters() if id(p) not in self._names}
        known, written = self._written.paths is not None, self._written.paths or set()
        tries = not known and _fits_twice(frozen.values())
        self._tried = {name: _checksum(p) for name, p in frozen.items() if tries}
        self._apart = {*self._trained, *(id(p) for name, p in frozen.items() if not tries and name not in written)}
        self._frozen = frozen
        self._before = State(self._things, self._apart)
        compared = [(name, p) for name, p in frozen.items() if id(p) in self._apart]
        self._compared = [(path, x, _checksum(x)) for path, x in (*compared, *self._before.large)]
        self._seeds = [int.from_bytes(Digest().add(s).result()[:7], "big") for _, s in self._before.generators]
        self._after: State | None = None
        self._renormalized: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._batched: tuple[list[torch.Tensor], list[Place]] | None = None
        if self._written.paths is None:
            self._written.paths = set()

    def deep_copies(self) -> bool:
        """Return whether `copy.deepcopy` makes a module that computes the same, with no state in common."""
        if self._aliases or any(vars(p) for p in self._module.parameters()):
            return False
        shared = self._before.of_classes  # by all copies
        if any(map(can_change, shared.values())):
            return False
        if self._after is not None and any(self._after.of_classes.get(k) is not x for k, x in shared.items()):
            return False
        return not self._meets_others and all(map(_deep_copies, (self._module, *self._things.held())))

    def put(self, params: dict[str, torch.Tensor]) -> None:
        """Let the tensors of a point stand in the places of the parameters."""
        new: dict[int, Any] = {k: _as(params[name], self._trained[k]) for k, name in self._names.items()}
        for identity, (alias, of) in self._aliases.items():
            new[identity] = _viewed_alike(new[of], alias, self._trained[of])
        self._now = new
        for part, (parameters, _) in zip(self._parts, self._registered, strict=True):
            own = {k: id(p) for k, p in parameters.items() if id(p) in new}
            if own:
                tensors = {**parameters, **{k: new[identity] for k, identity in own.items()}}
                set_registry(part, _Reads(tensors, {k: self._names[i] for k, i in own.items()}, self._read))
        for place in self._places:
            place.put(new[id(place.tensor)])
        if vectorizes():
            self._batch(next(iter(params.values())))

    def _batch(self, like: torch.Tensor) -> None:
        """Let buffers, and what the center wrote to, be of many points at once: forward may write there."""
        if self._batched is None:
            self._batched = self._to_be_batched()
        memory_of: dict[int, torch.Tensor] = {}
        new: dict[int, torch.Tensor] = {}
        for t in self._batched[0]:
            start, size = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes() // t.element_size()
            key = start ^ hash(t.dtype)
            if key not in memory_of:
                whole = t.detach().as_strided((size,), (1,), 0)
                memory_of[key] = like.new_zeros(size, dtype=t.dtype, device=t.device).copy_(whole)
            new[id(t)] = memory_of[key].as_strided(t.shape, t.stride(), t.storage_offset())
            vars(new[id(t)]).update(vars(t))
        for place in self._batched[1]:
            place.put(new[id(place.tensor)])

    def _to_be_batched(self) -> tuple[list[torch.Tensor], list[Place]]:
        buffers = {id(b) for part in self._parts for b in registries(part)[1].values() if b is not None}
        written = set()
        if self._after is not None:
            now = self._after.storages
            written = {p for p, copied in self._before.storages.items() if p in now and not now[p].equal(copied)}
        found = []
        for t in self._before.tensors:
            plain = t.layout == torch.strided and not t.is_quantized and not t.is_nested and t.numel()
            if plain and (id(t) in buffers or t.untyped_storage().data_ptr() in written):
                found.append(t)
        return found, list(self._things.places({id(t) for t in found}))

    def seed_generators(self) -> None:
        """Let the generators that the module holds draw for this direction; a shared stream is that of the center."""
        if self._seeds and (seed := seed_of_point()) is not None:
            for (generator, _), own in zip(self._before.generators, self._seeds, strict=True):
                _seed(generator, derive(seed, own))

    def apart(self, out: Any) -> Any:
        """Return a result that does not change when the state is put back."""
        if isinstance(out, torch.Tensor):
            return out if vectorizes() or not self._before.storages else out.clone()
        return out.copy() if is_array(out) and hasattr(out, "flags") else out

    def put_back(self) -> None:
        """Let the module be as it was before."""
        if self._tried:
            assert self._written.paths is not None
            self._written.paths |= {name for name, old in self._tried.items() if _checksum(self._frozen[name]) != old}
        try:
            self._before.put_back()
        except BaseException:  # an interrupt
            self._before.put_back()
            raise

    def keep_traces(self) -> None:
        """Note what the center has left, with the module's own parameters in the places of its point's."""
        for part, (parameters, modules) in zip(self._parts, self._registered, strict=True):
            if dict.keys(registries(part)[0]) != parameters.keys() or registries(part)[2].keys() != modules:
                raise RuntimeError(
                    f"`{type(part).__name__}.forward` registered or removed a parameter or submodule, which would "
                    "differ between evaluations: make them in `__init__`, or by one call under `torch.no_grad()`."
                )
        for part, (parameters, _) in zip(self._parts, self._registered, strict=True):
            set_registry(part, parameters)
        things = Things(self._module)
        self._renormalized = [
            (p, leaf.detach().clone())
            for p, leaf in ((self._trained[k], self._now[k]) for k in self._trained)
            if not torch.equal(leaf.detach(), p.detach())
        ]
        known = {**self._trained, **{identity: alias for identity, (alias, _) in self._aliases.items()}}
        own = {id(leaf): known[identity] for identity, leaf in self._now.items()}
        for place in list(things.places(own.keys())):
            place.put(own[id(place.tensor)])
        things.add(self._things)
        self._after = State(things, self._apart, last=True)

    def compare(self) -> None:
        """Raise if something changed that is not put back.

        Raises:
            RuntimeError: if a frozen parameter, or a part of the state that is too large to be kept, was written to.
        """
        for path, x, old in self._compared:
            if _checksum(x) != old:
                assert self._written.paths is not None
                self._written.paths.add(path)
                raise RuntimeError(
                    f"`{type(self._module).__name__}` wrote to {path} in this estimate, which it had not done before: "
                    "evaluations began from different states, and the gradient would be wrong. From the next estimate "
                    "on a frozen parameter that forward writes to is put back after each evaluation; hold other state "
                    f"above {LIMIT >> 20} MiB in a buffer."
                )

    def end(self, *, commit: bool) -> None:
        """Leave what the center left, or nothing."""
        try:
            if commit and self._after is not None:
                self._after.put_back()
                for param, value in self._renormalized:  # `Embedding(max_norm=...)` writes to its weight
                    with torch.no_grad():
                        param.copy_(value)
                self.compare()
        finally:
            self._release()

    def _release(self) -> None:
        for lock in reversed(self._locks):
            lock.release()


def _aliases(things: Things, trained: dict[int, nn.Parameter]) -> dict[int, tuple[Any, int]]:
    """Return the views of parameters that are held somewhere by their ``id``, with that of the parameter."""
    owners = [(view.data_ptr(), view.numel(), key) for key, p in trained.items() for view in storages(p) or ()]
    found = {}
    for here in things.reached:
        x = here.value
        if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) and x.layout == torch.strided:
            start = 0 if x.is_nested or not x.numel() else x.data_ptr()
        elif is_array(x) and hasattr(x, "flags") and x.size:
            start = x.__array_interface__["data"][0]
        else:
            continue
        for first, size, key in owners:
            if first <= start < first + size and _element(x) == _element(trained[key]):
                found[id(x)] = x, key
    return found


def _element(x: Any) -> int:
    return x.element_size() if isinstance(x, torch.Tensor) else int(x.itemsize)


def _viewed_alike(leaf: torch.Tensor, alias: Any, param: torch.Tensor) -> Any:
    """Return what a view of a parameter, a tensor or an array, is of a point's tensor."""
    if leaf.stride() != param.stride():
        leaf = torch.empty_strided(param.shape, param.stride(), dtype=leaf.dtype, device=leaf.device).copy_(leaf)
    view = alias if isinstance(alias, torch.Tensor) else torch.from_numpy(alias)
    start = (view.data_ptr() - param.data_ptr()) // param.element_size()
    made = leaf.as_strided(view.shape, view.stride(), leaf.storage_offset() + start)
    return made if view is alias else made.detach().numpy()


class _Reads(dict[str, Any]):
    """The parameters of a module, which note what is read of them.

    Torch's own path is that of any dict, and vmap works; it costs 3 % of a forward pass of 20 us.

    Args:
        tensors: by their names in the module.
        names: what the trained ones are called.
        read: takes their names.
    """

    def __init__(self, tensors: dict[str, Any], names: dict[str, str], read: set[str]) -> None:
        super().__init__(tensors)
        self._names, self._read = names, read

    def __getitem__(self, key: str) -> Any:
        name = self._names.get(key)
        if name is not None:
            self._read.add(name)
        return super().__getitem__(key)

    def _all(self) -> None:
        self._read.update(self._names.values())

    def __iter__(self) -> Iterator[str]:  # so that `dict(...)` and `**` come here for each entry
        return iter(list(super().keys()))

    def get(self, key: str, default: Any = None) -> Any:
        self._all()
        return super().get(key, default)

    def items(self) -> Any:
        self._all()
        return super().items()

    def values(self) -> Any:
        self._all()
        return super().values()

    def pop(self, *key: Any) -> Any:
        self._all()
        return super().pop(*key)

    def copy(self) -> dict[str, Any]:
        self._all()
        return dict(self)


@functools.cache
def _class_like(kind: type[Any]) -> type[Any]:
    """Return the class of what stands for a parameter of some class.

    It says that it requires grad, as the parameter does, so that torch takes the same path (that of a fused encoder
    depends on it); a graph is recorded where autograd is used, and only there.
    """
    base = torch.Tensor if kind is nn.Parameter else kind
    own = {"__torch_function__": nn.Parameter.__torch_function__, "requires_grad": property(_says_yes, _is_set)}
    return type(kind.__name__, (base,), own)


def _says_yes(leaf: torch.Tensor) -> bool:
    return True


def _is_set(leaf: torch.Tensor, value: bool) -> None:
    leaf.requires_grad_(value)


def _as(leaf: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a point's tensor with the class and the attributes of the parameter that it stands for."""
    if type(leaf) is torch.Tensor:
        leaf = leaf.as_subclass(_class_like(type(param)))
    as_parameter(leaf)
    if vars(param):
        vars(leaf).update(vars(param))
    return leaf


def _deep_copies(value: Any) -> bool:
    """Return whether a thing that a module holds is copied with it, or needs no copy."""
    if isinstance(value, torch.Tensor):
        return value.grad_fn is None and value.layout == torch.strided
    if isinstance(value, nn.Module):
        return not slots(type(value))
    if isinstance(value, types.FunctionType):
        return of_library(value)
    return not isinstance(value, (types.MethodType, functools.partial))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        bits = bit_generator(generator)
        bits.state = type(bits)(seed).state


def _checksum(value: Any) -> tuple[int, ...]:
    """Return the sum of the memory of a tensor or an array as integers: a fifth of what a forward pass costs."""
    if not isinstance(value, torch.Tensor):
        return (hash(value.tobytes()),)
    sums = []
    for view in storages(value) or ():
        whole = view.numel() // 8 * 8
        sums += [int(view[:whole].view(torch.int64).sum()), int(view[whole:].sum())]
    return tuple(sums)


def _fits_twice(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether there is memory for a second copy of some tensors."""
    sizes: dict[torch.device, int] = {}
    for t in tensors:
        sizes[t.device] = sizes.get(t.device, 0) + t.numel() * t.element_size()
    return all(size <= LIMIT or 2 * size < (free_memory(device) or 0) for device, size in sizes.items())


def _locks_of(modules: list[nn.Module]) -> list[Any]:
    """Return a lock for each module, in one order for all who take them."""
    with _locking:
        return [_locks.setdefault(m, threading.RLock()) for m in sorted(modules, key=id)]


def _again(module: nn.Module, parameters: dict[str, nn.Parameter], written: Written) -> ModuleFunction:
    return ModuleFunction(module, {id(p): name for name, p in parameters.items()}, written, alone=True)
