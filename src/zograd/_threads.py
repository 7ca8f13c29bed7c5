"""The second thread, in which noise is made while ``fn`` is evaluated."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

__all__ = ["cores", "second_thread"]


@functools.cache
def second_thread() -> ThreadPoolExecutor:
    """One thread for the process, begun when first asked for."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="zograd-noise")


if hasattr(os, "register_at_fork"):
    # A fork copies the pool and not its thread: work given to it would wait for ever.
    os.register_at_fork(after_in_child=second_thread.cache_clear)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
