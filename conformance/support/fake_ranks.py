"""One process as one rank of many: PyTorch's fake process group, whose collectives do nothing."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist


@contextlib.contextmanager
def fake_ranks(size: int, rank: int = 0) -> Iterator[None]:
    """Inside `with`, this process is rank `rank` of `size`. What collectives give is arbitrary."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
