"""Settings of PyTorch's kernels that apply within a pass and are restored after it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gvpo_core.training.config import ConfigError, ModelConfig

_HAVE_TENSOR_FLOAT = ("cuda",)  # types of devices


@contextlib.contextmanager
def tensor_float(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """With model.tf32, the float32 products of a bfloat16 model use TensorFloat-32, which has 10 bits of mantissa.

    Changes nothing for dtype float32, or if the process has used PyTorch's newer settings (`fp32_precision`).
    """
    enabled = config.tf32 and config.dtype == "bfloat16" and device.type in _HAVE_TENSOR_FLOAT
    try:
        before = torch.get_float32_matmul_precision() if enabled else None
    except RuntimeError:  # raised if the process uses the newer settings
        before = None
    if before is None:
        yield
        return
    try:
        torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """If `enabled`, restricts PyTorch to kernels whose results repeat bit for bit.

    Raises: ConfigError: an operation has no such kernel.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # its attributes are made at run time
    filling = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # no code here reads uninitialised memory
        yield
    except RuntimeError as error:
        if "deterministic" in str(error):
            raise ConfigError(f"model.deterministic = true: {error}".splitlines()[0]) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filling
