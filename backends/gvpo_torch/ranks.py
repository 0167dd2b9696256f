"""Processes and devices: this process's device, the number of ranks, and exchange between ranks."""

import atexit
import datetime
import os
import time
import weakref

import numpy as np
import torch
import torch.distributed as dist

from gvpo_core.training.config import ConfigError, ModelConfig

_RELEASE_SECONDS = 5.0  # longest wait, after a collective, for gloo's threads to release its tensors
_YIELD_SECONDS = 1e-4
_WAIT = datetime.timedelta(hours=4)
"""Longest wait for another rank. It may sample, score rewards or commit a checkpoint alone, and take longer than the
limits of torch's own groups: 30 minutes, and 10 for NCCL. A rank that has died ends the wait at once."""
_REST_SECONDS = 0.1  # before the process ends


class Ranks:
    """This process among the run's processes."""

    def __init__(self, config: ModelConfig) -> None:
        """Joins the process group if torchrun or another launcher started several processes.

        Raises: ConfigError: a device that does not exist, or one named by index with several processes.
        """
        world_size = _world_size()
        on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
        if world_size > 1:
            self.device = _device_of_rank(config.device, on_cpu)
            if not dist.is_initialized():
                backend = dist.get_default_backend_for_device(self.device)
                dist.init_process_group("gloo" if on_cpu else f"cpu:gloo,{self.device.type}:{backend}")
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=_WAIT)
            atexit.register(_rest)
        else:
            self.device = _one_device(config.device)
            self.rank, self.world_size = 0, 1
        modern = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.auto_dtype = "bfloat16" if modern else "float32"

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Concatenates the ranks' arrays in rank order along axis 0; lengths may differ."""
        if self.world_size == 1:
            return values
        values = np.array(values, order="C")  # a copy: torch warns of read-only arrays
        lengths = self._all(torch.tensor([len(values)]))
        longest = max(int(n) for n in lengths)
        padded = torch.zeros((longest, *values.shape[1:]), dtype=torch.from_numpy(values).dtype)
        padded[: len(values)] = torch.from_numpy(values)
        parts = self._all(padded)
        return np.concatenate([part[: int(n)].numpy() for part, n in zip(parts, lengths, strict=True)], axis=0)

    def most(self, count: int) -> int:
        """Returns the largest of the ranks' counts."""
        if self.world_size == 1:
            return count
        return max(int(n) for n in self._all(torch.tensor([count])))

    def agree(self, verdict: bool) -> bool:
        """Whether the verdict of every rank is true."""
        return self.most(int(not verdict)) == 0

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns each rank's tensor, exchanged on the CPU by gloo: a waiting rank occupies no device, and NCCL's time
        limit does not apply.

        Returns once no thread of gloo holds a tensor of the collective. Such a thread needs Python's lock to release
        the tensor. If Python ends meanwhile, the process aborts with "terminate called without an active exception"
        (pytorch/pytorch#190489). If the process group is freed meanwhile, for example with the last model under DDP
        after `destroy_process_group`, its destructor holds that lock, joins the thread and never returns.
        """
        sent, parts = tensor.clone(), [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, sent, group=self._group)
        copies = [part.clone() for part in parts]
        in_use = [weakref.ref(t) for t in (sent, *parts)]
        del sent, parts
        until = time.monotonic() + _RELEASE_SECONDS
        time.sleep(_YIELD_SECONDS)  # also for threads that hold tensors of earlier collectives of DDP or FSDP2
        while any(ref() is not None for ref in in_use) and time.monotonic() < until:
            time.sleep(_YIELD_SECONDS)
        return copies


def _rest() -> None:
    """Waits before the process ends, so that threads can get Python's lock and release tensors of DDP or FSDP2."""
    time.sleep(_REST_SECONDS)


def _world_size() -> int:
    """Returns the number of processes that a launcher started.

    Raises: ConfigError: WORLD_SIZE is set without the variables that a launcher sets with it.
    """
    value = os.environ.get("WORLD_SIZE", "1") or "1"
    if not value.isdigit():
        raise ConfigError(f"the environment has WORLD_SIZE = {value!r}; expected a number of processes: unset it")
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if int(value) > 1 and missing:
        raise ConfigError(
            f"the environment has WORLD_SIZE = {value} without {', '.join(missing)}: unset it to train in one process,"
            " or start the processes with torchrun or accelerate launch"
        )
    return int(value)


def _one_device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, 0)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"model.device is {name!r}, which this machine does not have: use auto or cpu") from error
    return device


def _device_of_rank(name: str, on_cpu: bool) -> torch.device:
    """Returns the device of this process among several, by its number on the machine."""
    if name not in ("auto", "cpu", "cuda", "xpu", "mps"):
        raise ConfigError(f"model.device is {name!r} with several processes: use auto, one device per process")
    if on_cpu:
        return torch.device("cpu")
    kind = _one_device(name).type
    here, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if here >= count:
        raise ConfigError(f"process {here} of this machine has no device: start at most {count}, one per {kind} device")
    torch.accelerator.set_device_index(here)
    return torch.device(kind, here)
