"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bench.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world: its number, and how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Join the process group that torchrun's environment describes, if any.

        Raises:
            InputError: ``device`` is not on this machine.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and world > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            chosen = torch.device(device)
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device: expected one of this machine's, got {device!r} ({reason})") from error
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(rank, world, chosen)

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The rows of a batch that this process computes.

        Raises:
            InputError: the batch cannot be shared equally.
        """
        if batch % self.world:
            raise InputError(f"batch: expected a multiple of the {self.world} processes, got {batch}")
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of ``values`` (any shape, on this process's device)."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        self.sum(torch.zeros(1, device=self.device))

    @staticmethod
    def finish() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
