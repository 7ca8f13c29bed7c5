"""The most bytes of tensors that are alive at once, counted operation by operation."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations make while it is entered; ``peak`` is the most of them at once, in bytes."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and look at what it returns."""
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place not in before and place not in self._seen:
                self._seen[place] = storage.nbytes()
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._drop, place)
        self.peak = max(self.peak, self.alive)
        return out

    def _drop(self, place):
        self.alive -= self._seen.pop(place, 0)


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def resident(module):
    """Bytes of a module's parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
