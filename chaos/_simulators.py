"""What the scripts of this folder let workers evaluate, and the executors that they do it in."""

import concurrent.futures
import ctypes
import functools
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import torch

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(["zograd"])


def processes(workers):
    """A function that makes processes which start fast."""
    return functools.partial(concurrent.futures.ProcessPoolExecutor, workers, mp_context=CONTEXT)


class Shuffled(concurrent.futures.Executor):
    """Does tasks in this process, one at a time, in a random order."""

    def __init__(self, chance, workers):
        self._max_workers, self._chance, self._lock, self._tasks = workers, chance, threading.Lock(), []

    def submit(self, fn, /, *args):
        future = concurrent.futures.Future()
        with self._lock:
            self._tasks.append((future, fn, args))
        threading.Timer(0.0002, self._run).start()
        return future

    def _run(self):
        with self._lock:
            future, fn, args = self._tasks.pop(self._chance.randrange(len(self._tasks)))
            if future.set_running_or_notify_cancel():
                future.set_result(fn(*args))


def noisy(x):
    """Draws random numbers, as a simulator would."""
    return (x**3).sum() + 0.1 * torch.randn(())


def smooth(x):
    return (x**3).sum()


def sleeps(x, seconds):
    """A simulator that waits for something elsewhere, and returns how long that took."""
    began = time.perf_counter()
    time.sleep(seconds)
    return time.perf_counter() - began


def counted(x, path, rate):
    """Says that it was called, in a file that every process adds to; fails now and then, in one of several ways."""
    with open(path, "ab", buffering=0) as file:
        file.write(b".")
    luck = random.random()
    if luck < rate:
        raise ConnectionError("busy")
    return float("nan") if luck < 2 * rate else (x**3).sum()


class CannotBeRead(Exception):
    """Pickles, and cannot be read again."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class CannotBePickled(Exception):
    """Holds what does not pickle."""

    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


def _raise(error):
    raise error


FAULTS = {
    "exception": lambda: _raise(OSError("down")),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "wrong shape": lambda: torch.zeros(2),
    "wrong dtype": lambda: torch.tensor(1),
    "None": lambda: None,
    "sys.exit": lambda: sys.exit(3),
    "unpicklable result": threading.Lock,
    "unpicklable exception": lambda: _raise(CannotBePickled()),
    "unreadable exception": lambda: _raise(CannotBeRead(1, 2)),
    "straggler": lambda: time.sleep(0.02),
    "hang": lambda: time.sleep(3600),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
}


DONE = "done"  # a file with a byte for each fault


def faulty(x, path, fault, always):
    """Does something wrong at some points, the first time or always, and says so in a file beside ``path``."""
    if float(x[0]) > 0.3:
        try:
            if not always:
                os.close(os.open(f"{path}{float(x[0]).hex()}", os.O_CREAT | os.O_EXCL))
            with open(os.path.join(os.path.dirname(path), DONE), "ab", buffering=0) as file:
                file.write(b".")
            done = FAULTS[fault]()
        except FileExistsError:
            pass
        else:
            if fault != "straggler":
                return done
    return (x**3).sum()
