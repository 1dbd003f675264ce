"""Several processes that train one model, started by torchrun: what they share and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import AgreedError, InputError, PeerLostError

T = TypeVar("T")
# Nobody waits longer for another process in one operation. A process that ends is noticed at once; this is for one
# that hangs, or whose machine is gone.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """One process among those of a job. rank: 0 to size - 1. local_rank: on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the files and says what happens."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's share of `count` things in a row."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes.

        Errors: PeerLostError.
        """
        if self.size > 1:
            with self._talking():
                dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of the first process.

        Errors: PeerLostError.
        """
        if self.size > 1:
            with self._talking():
                dist.broadcast(tensor, 0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What the first process's call returns, in all of them.

        Errors: AgreedError where it raised InputError or OSError; PeerLostError.
        """
        if self.size == 1:
            return function()
        outcome = self._attempt(function) if self.is_writer else None
        outcomes = [outcome]
        with self._talking():
            dist.broadcast_object_list(outcomes, 0)
        assert outcomes[0] is not None
        value, complaint = outcomes[0]
        if complaint:
            raise AgreedError(complaint)
        return value  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process; where one of them raises InputError or OSError, all raise.

        Errors: AgreedError with the complaint of the lowest rank; PeerLostError.
        """
        if self.size == 1:
            return function()
        value, complaint = self._attempt(function)
        complaints = self.gather(complaint)
        first = next((rank for rank, text in enumerate(complaints) if text), None)
        if first is not None:
            raise AgreedError((f"rank {first}: " if first else "") + complaints[first])
        return value  # type: ignore[return-value]

    @staticmethod
    def _attempt(function: Callable[[], T]) -> tuple[T | None, str]:
        try:
            return function(), ""
        except (InputError, OSError) as error:
            return None, str(error) or type(error).__name__

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks.

        Errors: PeerLostError.
        """
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with self._talking():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # The first line: what follows is a stack of the library.
            reason = str(error).strip().splitlines()[0]
            raise PeerLostError(
                f"rank {self.rank} of {self.size}: another process of the job has ended or cannot be reached ({reason})"
            ) from None


ALONE = Ranks()


def started_by_torchrun() -> bool:
    """Whether the environment says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def join_ranks(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes of the job for as long as the context lasts; alone without torchrun.

    NCCL between GPUs, gloo between CPUs.

    Args:
        device: its type decides; the value has the process's own GPU.

    Errors: InputError where there are more processes than GPUs, or they do not find each other.
    """
    if not started_by_torchrun():
        yield ALONE, device
        return
    ranks = Ranks(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    )
    on_cuda = device.type == "cuda"
    if on_cuda:
        found = torch.cuda.device_count()
        if ranks.local_rank >= found:
            raise InputError(
                f"--nproc-per-node: process {ranks.local_rank} of this machine has no GPU, torch sees {found}; "
                "start one process per GPU, or add --device cpu"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"torchrun: rank {ranks.rank} of {ranks.size} does not find the others ({error})"
        ) from None
    try:
        yield ranks, device
    except PeerLostError:
        # To leave NCCL in order takes all processes: the command ends without.
        if not on_cuda:
            dist.destroy_process_group()
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def left_in_disorder() -> bool:
    """Whether a lost process has kept this one from leaving its job: then ending as usual would wait for ever."""
    return dist.is_available() and dist.is_initialized()
