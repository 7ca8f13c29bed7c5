"""What an objective takes along to another process or thread."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zograd._base.execution import Modes
from zograd._base.streams import FnStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass(frozen=True)
class Home:
    """What holds where an estimate is made, for the evaluations that others make for it.

    Attributes:
        modes: torch's, of the caller.
        device: that of the parameters.
        depth: how many estimates deep it is.
    """

    modes: Modes
    device: torch.device
    depth: int

    @contextlib.contextmanager
    def held(self, seed: int, *, shared: bool) -> Iterator[FnStream]:
        """Let it hold here.

        Args:
            seed: the estimate's.
            shared: whether all points see the center's random numbers.

        Yields:
            The random state of the evaluations.
        """
        stream = FnStream(seed, self.device, shared=shared)
        with self.modes.entered(), stream:
            stream.depth = self.depth
            yield stream


def worker_name() -> str:
    """Return how errors call this process and thread."""
    return f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
