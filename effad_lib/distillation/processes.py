"""Several processes, one for each GPU, as `torchrun` starts them; alone without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """Which process this is (`rank`) of how many (`count`)."""

    rank: int = 0
    count: int = 1

    @property
    def share(self) -> slice:
        """Which items of a batch are this process's: every count-th."""
        return slice(self.rank, None, self.count)

    def wrap(self, network: Module) -> Module:
        """Return the network so that its gradients are the mean over all processes; it starts as in the first one."""
        return DistributedDataParallel(network) if self.count > 1 else network

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over all processes."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.count
        return value

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process, so that all of them stop at the same step."""
        return bool(self.mean(torch.tensor(float(flag), device=device))) if self.count > 1 else flag

    def union(self, items: set[int]) -> set[int]:
        """Return the union of the sets of all processes."""
        if self.count == 1:
            return items
        gathered: list[set[int]] = [set()] * self.count
        distributed.all_gather_object(gathered, items)
        return set().union(*gathered)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            distributed.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that `torchrun` started, if it did; yields them and this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The first process takes the backbone's statistics while the others wait.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size()), device
    finally:
        distributed.destroy_process_group()
