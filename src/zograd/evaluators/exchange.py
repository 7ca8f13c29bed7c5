"""What ranks of torch.distributed tell each other: a few bytes each, gathered by all."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist

from zograd._base.buffers import from_bytes, memory
from zograd.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Groups of our own by the default one, their ranks and the timeout: a new default group knows nothing of the old ones.
# torch holds them until `destroy_process_group`. If they were held here longer, they would end with the interpreter,
# whose exit aborts on gloo's threads.
_groups: WeakKeyDictionary[Any, WeakValueDictionary[tuple[tuple[int, ...], float], Any]] = WeakKeyDictionary()


class Exchange:
    """A group of ranks that gathers bytes.

    The bytes go through a gloo group of its own, made once, whatever the backend of the user's group: so that its
    timeout is ours, its order of collectives that of estimates alone, and no accelerator has to wait.

    Args:
        group: the user's group; None for all ranks.
        timeout: seconds to wait for the slowest rank.

    Raises:
        RankError: if torch.distributed is not set up, this process has no rank in the group, or another rank does not
            answer.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RankError(
                "`Distributed` needs torch.distributed: call `torch.distributed.init_process_group()` before the first "
                "estimate, in a program started by `torchrun`."
            )
        self.index: int = dist.get_rank(group)
        if self.index < 0:
            raise RankError("`Distributed(group=...)`: this process has no rank in the group.")
        self.ranks: list[int] = dist.get_process_group_ranks(group)  # global ones, by index
        self._timeout = timeout
        self._group = None if len(self.ranks) == 1 else self._own(group)

    def _own(self, group: Any) -> Any:
        made = _groups.setdefault(dist.group.WORLD, WeakValueDictionary())
        key = (tuple(self.ranks), self._timeout)
        if key not in made:
            patience = timedelta(seconds=self._timeout)
            try:
                made[key] = (
                    dist.new_group(timeout=patience, backend="gloo")
                    if group is None
                    else dist.new_group(self.ranks, timeout=patience, backend="gloo", use_local_synchronization=True)
                )
            except (RuntimeError, ValueError) as error:
                raise self._silent(error) from error
        return made[key]

    def gather(self, data: bytes) -> list[bytes]:
        """What each rank gave.

        Args:
            data: of this rank; every rank gives as many bytes.

        Returns:
            The bytes by rank.

        Raises:
            RankError: if a rank died, or did not answer within the timeout.
        """
        if self._group is None or not data:
            return [data] * len(self.ranks)
        mine = from_bytes(data, dtype=torch.uint8)
        everyone = [torch.empty(len(data), dtype=torch.uint8, device="cpu") for _ in self.ranks]
        try:
            dist.all_gather(everyone, mine, group=self._group)
        except RuntimeError as error:
            raise self._silent(error) from error
        return [bytes(memory(part)) for part in everyone]

    def name(self, indices: Sequence[int]) -> str:
        """How errors call ranks."""
        ranks = ", ".join(str(self.ranks[i]) for i in indices)
        return f"rank{'s' * (len(indices) > 1)} {ranks}"

    def _silent(self, error: Exception) -> RankError:
        return RankError(
            f"`Distributed(timeout={self._timeout:g})`: a rank died, left the estimate, or did not answer within "
            f"{self._timeout:g} s; rank {self.ranks[self.index]} waited for it. torch said: {error}"
        )
