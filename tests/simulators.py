"""Functions that worker processes find by name, and the executors that tests start them in."""

import concurrent.futures
import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import torch

import zograd

CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    CONTEXT.set_forkserver_preload(["zograd", "torch"])


def processes(workers=2):
    """A factory of process pools that start fast and share nothing with the tests' own process."""
    return lambda: concurrent.futures.ProcessPoolExecutor(workers, mp_context=CONTEXT)


class Shuffled(concurrent.futures.Executor):
    """Runs tasks in this process, one at a time, in a random order."""

    def __init__(self, seed, workers=4):
        self._max_workers = workers
        self._chance, self._lock, self._tasks = random.Random(seed), threading.Lock(), []
        self.most = 0

    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        with self._lock:
            self._tasks.append((future, fn, args, kwargs))
            self.most = max(self.most, len(self._tasks))
        threading.Timer(0.001, self._run).start()
        return future

    def _run(self):
        with self._lock:
            future, fn, args, kwargs = self._tasks.pop(self._chance.randrange(len(self._tasks)))
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)


def cubes(x):
    return (x**3).sum()


def noisy(x):
    return float((x**2).sum()) + float(torch.randn(())) + random.Random(zograd.current_seed()).random()


def vector(x):
    return torch.stack([x.sum(), (x**2).sum(), x[0]])


def trains(x):
    (gradient,) = torch.autograd.grad((x**3).sum(), x)
    return gradient.sum()


@zograd.zero_order(method="antithetic", num_samples=6, seed=0)
def decorated(x):
    return (x**3).sum()


def nested(x):
    inner = zograd.zero_order(method="antithetic", num_samples=2, seed=5)(cubes)
    return inner.estimate(x).grad.sum()


class Broken(Exception):
    """One that pickles and cannot be read again."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class Locked(Exception):
    """One that does not pickle."""

    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


def at(x, where):
    """Whether this is the point of ``where``: some of them are, and always the same ones."""
    return float(x[0]) > where


def raises_broken(x):
    if at(x, 0.5):
        raise Broken(1, 2)
    return cubes(x)


def raises_locked(x):
    if at(x, 0.5):
        raise Locked
    return cubes(x)


def leaves(x):
    if at(x, 0.5):
        sys.exit(7)
    return cubes(x)


def kills(x):
    if at(x, 0.5):
        os.kill(os.getpid(), signal.SIGKILL)
    return cubes(x)


def kills_once(x, path):
    """Takes its worker along the first time that it is called."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return cubes(x)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(x):
    if at(x, 0.5):
        time.sleep(3600)
    return cubes(x)


def hangs_once(x, path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return cubes(x)
    time.sleep(3600)


def rests(x):
    time.sleep(0.03)
    return cubes(x)


def straggles(x):
    time.sleep(0.3 if at(x, 0.5) else 0.0)
    return cubes(x)


def counted(x, path):
    """Says that it was called, in a file that every process can add to."""
    with open(path, "ab", buffering=0) as file:
        file.write(b".")
    return cubes(x)


def counted_and_fails(x, path, rate):
    counted(x, path)
    if random.random() < rate:
        raise ConnectionError("busy")
    return cubes(x)


def threads_of_torch(x):
    return float(torch.get_num_threads()) + 0 * float(x.sum())
