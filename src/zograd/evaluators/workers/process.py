"""A worker process of the pool's own: it ends with its parent, and with its own children."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

from zograd.evaluators.task.elsewhere import worker_name

_settled: list[int] = []  # the process that did; a fork has not


def settle() -> None:
    """Do once what a worker process of the pool's own must: watch its parent, and lead a group of its children."""
    if _settled == [os.getpid()]:
        return
    _settled[:] = [os.getpid()]
    _own_group()
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None or hasattr(os, "getppid"):
        threading.Thread(target=_go_with, args=(parent,), name="zograd-parent", daemon=True).start()


def _own_group() -> None:
    """Make a process group, so that ending this process ends the simulators that it started."""
    if hasattr(os, "setpgid"):
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)


def _go_with(parent: Any) -> None:
    """End when the process that the values are for ends, which may be killed without a word."""
    if getattr(parent, "_sentinel", None) is not None:
        parent.join()
    else:  # not started by multiprocessing itself; there is nothing to wait for, but another parent shows
        first = os.getppid()
        while os.getppid() == first:
            time.sleep(1)
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def ping() -> str:
    """Return the name of this worker: something to do for one that has yet to start."""
    return worker_name()
