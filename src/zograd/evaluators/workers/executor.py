"""The executor of a pool: made when needed, made anew when it breaks, and ended with all its processes."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from zograd._base.execution import cores
from zograd.errors import WorkerError
from zograd.evaluators.workers.process import ping, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from zograd.evaluators.task.objective import Objective

_STARTS = 3  # times that new workers may die before they say a word


def spawned(workers: int) -> ProcessPoolExecutor:
    """Processes that share nothing with this one, as on every platform; a fork would copy torch's threads halfway."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


class Workers:
    """An executor, given or made by a factory.

    Args:
        executor: one that somebody else owns.
        factory: what makes one of our own.
        workers: how many it has, if that is known.
    """

    def __init__(self, executor: Executor | None, factory: Callable[[], Executor] | None, workers: int | None) -> None:
        self.factory = factory
        self.names: set[str] = set()  # workers of this executor that have spoken
        self.started: float = 0.0  # seconds that the first of them took to start
        self.lost: int = 0  # workers that are busy with what nobody waits for any more
        self.jobs: weakref.WeakKeyDictionary[Objective, Any] = weakref.WeakKeyDictionary()  # those it knows
        self._executor = executor
        self._workers = workers
        self._lock = threading.RLock()
        self._turns = _Turns()
        self._end: Any = None

    @property
    def owned(self) -> bool:
        """Whether the executor is ours, to be ended and made anew."""
        return self.factory is not None

    @property
    def executor(self) -> Executor:
        """The executor; one of our own is made now if there is none, and has answered once."""
        with self._lock:
            if self._executor is None:
                if self.factory is None:
                    raise WorkerError(
                        "this `Pool` was pickled or copied without its executor: give it one in this process."
                    )
                self._executor = self._made(self.factory)
            return self._executor

    def _made(self, factory: Callable[[], Executor]) -> Executor:
        cause: BaseException | None = None
        for _ in range(_STARTS):
            began = time.monotonic()
            executor = factory()
            if not callable(getattr(executor, "submit", None)):
                raise TypeError(
                    f"`Pool(executor=...)`: the function must return an executor, got {type(executor).__name__} "
                    f"{executor!r:.80}."
                )
            if isinstance(executor, ProcessPoolExecutor) and getattr(executor, "_initializer", settle) is None:
                executor._initializer = settle  # also for workers that never get a task
            try:
                self.names = {executor.submit(ping).result()}
                self.started = time.monotonic() - began
            except BrokenExecutor as error:
                cause = error
                end(executor)
                continue
            except BaseException:
                end(executor)
                raise
            self._end = weakref.finalize(self, end, executor)
            return executor
        raise WorkerError(
            "`Pool`: the workers died as they started. A script that starts processes needs its own code under "
            '`if __name__ == "__main__":`, since they import it.'
        ) from cause

    def meet(self) -> None:
        """Wait for a first worker, so that no clock runs while it starts."""
        executor = self.executor
        if not self.names:
            began = time.monotonic()
            self.names.add(executor.submit(ping).result())
            self.started = time.monotonic() - began

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """The time in which one estimate has the workers to itself, if they are processes of our own.

        Several threads may estimate by one pool. If its executor breaks, or is ended since a task is late, the tasks of
        all are lost: where two share it, each would make it anew under the other, and blame its own tasks for that.

        Returns:
            What is entered for that time.
        """
        _ = self.executor
        return self._turns if self.owned and not self.in_threads else contextlib.nullcontext()

    @property
    def in_threads(self) -> bool:
        """Whether workers are threads of this process, which cannot be ended."""
        return isinstance(self._executor, ThreadPoolExecutor)

    def ways(self) -> tuple[bool, ...]:
        """Whether functions are pickled by value, in the order to try: the standard library's know the main module."""
        return (False, True) if isinstance(self._executor, ProcessPoolExecutor) else (True,)

    @property
    def workers(self) -> int:
        """How many there are, as far as one can know."""
        if self._workers is not None:
            return self._workers
        for name in ("_max_workers", "num_workers"):
            count = getattr(self._executor, name, None)
            if isinstance(count, int) and count > 0:
                return count
        with contextlib.suppress(Exception):  # dask's
            return max(1, sum(self._executor._client.nthreads().values()))  # type: ignore[union-attr]
        return cores()

    def abandon(self, future: Future[Any]) -> None:
        """Leave a task to itself; its worker is lost until it comes back."""
        executor = self._executor
        self.lost += 1

        def back(_: Future[Any]) -> None:
            with self._lock:
                self.lost -= self._executor is executor

        future.add_done_callback(back)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the executor, as part of a module that goes to the workers."""
        own = isinstance(self.factory, functools.partial) and self.factory.func is spawned
        return Workers, (None, self.factory if own else None, self._workers)

    def __repr__(self) -> str:
        if self._executor is None and isinstance(self.factory, functools.partial):
            return f"workers={self._workers}"
        return repr(self._executor or self.factory)

    def end(self) -> None:
        """End an executor of our own, with the processes and what they started; the next is made when needed."""
        with self._lock:
            if self.owned and self._executor is not None:
                self._executor = None
                self.names, self.lost = set(), 0
                self._end()


class _Turns:
    """A lock that a thread may take again while it has it, and that any thread may give back."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: self._owner in (None, me))
            self._owner = me
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._free:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._free.notify()


def end(executor: Executor) -> None:
    """End an executor now, whatever its processes are doing."""
    processes = list((getattr(executor, "_processes", None) or {}).values())
    for process in processes:
        _kill(process)
    with contextlib.suppress(Exception):
        executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(Exception):
            process.join(5)


def _kill(process: Any) -> None:
    with contextlib.suppress(Exception):
        if hasattr(os, "killpg") and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
