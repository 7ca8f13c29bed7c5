"""How zograd's own work runs: in which threads, and under which of torch's modes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch


@functools.cache
def second_thread() -> ThreadPoolExecutor:
    """One thread for the process, begun when first asked for."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="zograd-noise")


if hasattr(os, "register_at_fork"):
    # A fork copies the pool and not its thread: work given to it would wait for ever.
    os.register_at_fork(after_in_child=second_thread.cache_clear)


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed for the next call of ``fn``: once in a process.

    glibc gives blocks above a threshold back to the system, and gets them again page by page, until a block of almost
    its upper limit, 32 MiB, was freed once. Without that the quadratic of 1000 parameters takes 1.4 times as long under
    Vmap, and 2.5 times with Rademacher directions (1200 to 1900 page faults an estimate; 1 to 50 with it).
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)  # never touched


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where it does not tell."""
    if device.type == "cpu":
        known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {})
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None
    # Some kinds of device, Apple's for one, do not tell what memory is free.
    info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if info is None else int(info(device)[0])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Whatever LAPACK and matrix products do inside, in one thread: their bits depend on the number of threads.

    Yields:
        Nothing.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)  # of this Python thread
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Modes:
    """The caller's default dtype, default device and autocast, which decide what torch computes."""

    dtype: torch.dtype
    device: torch.device
    autocast: tuple[tuple[str, torch.dtype], ...]

    @classmethod
    def here(cls, device: torch.device) -> Modes:
        """Return those of this thread."""
        kinds = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.get_default_dtype(), torch.get_default_device(), autocast)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let them hold in this thread."""
        if torch.get_default_dtype() != self.dtype:  # of the process: only in another one
            torch.set_default_dtype(self.dtype)
        with contextlib.ExitStack() as stack:
            if torch.get_default_device() != self.device:
                stack.enter_context(self.device)
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            stack.enter_context(torch.enable_grad())
            yield
