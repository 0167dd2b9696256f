"""Numbers in few bits, by bitsandbytes: AdamW's moments in 8 bits, frozen linear layers under adapters in 4 (QLoRA)."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from transformers import PreTrainedModel

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.checkpoint import MOMENTS
from gvpo_torch.adapters import unfit
from gvpo_torch.language_model import LanguageModel
from gvpo_torch.weights import decoder_of

MOMENT_BLOCK = 256  # elements of a moment that share a scale
SMALLEST = 4096  # elements; the moments of smaller tensors stay float32
WEIGHT_BLOCK = 64  # elements of a weight that share a scale
_KIND = "nf4"
_FURTHEST = 0.16  # largest error, in units of a block's scale: half of NF4's widest gap, with room for 16-bit rounding


def library() -> Any:
    """Returns the module bitsandbytes. Raises: ConfigError: it is not installed, or cannot be loaded."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # warns of a kernel not used here
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.quantization and optimizer.name = 'adamw_8bit' need bitsandbytes, which cannot be imported "
            f'({error}): pip install "gvpo[bitsandbytes]"'
        ) from error
    return bitsandbytes


# -- AdamW's moments


def adamw_8bit(groups: list[dict[str, Any]], vocabulary: set[int], **options: Any) -> torch.optim.Optimizer:
    """Returns AdamW with 8-bit moments in blocks of 256 (Dettmers et al., arXiv 2110.02861); decoupled weight decay.

    Embedding and head keep float32 moments. A token that is rare in a batch has a much smaller gradient than its
    neighbours: in 8 bits its second moment would be rounded to 0, and its next step divided by eps.

    Args:
      vocabulary: ids of the weights of embedding and head.
    """
    split = []
    for group in groups:
        for float32 in (False, True):
            params = [p for p in group["params"] if (id(p) in vocabulary or p.numel() < SMALLEST) == float32]
            split += [{**group, "params": params, "float32": float32}] if params else []
    optimizer: torch.optim.Optimizer = _adamw_class(library().optim.AdamW8bit)(split, **options)
    return optimizer


@functools.cache
def _adamw_class(base: Any) -> Any:
    class AdamW8bit(base):  # type: ignore[misc]
        """Groups marked `float32` have float32 moments, and take the step of PyTorch's AdamW."""

        def get_config(self, g: int, i: int, group: dict[str, Any]) -> dict[str, Any]:
            return super().get_config(g, i, group) | {"optim_bits": 32 if group["float32"] else 8, "min_8bit_size": 0}

        def update_step(self, group: dict[str, Any], p: nn.Parameter, g: int, i: int) -> None:
            if not group["float32"]:
                super().update_step(group, p, g, i)
                return
            state, (beta1, beta2) = self.state[p], group["betas"]
            settings = {name: group[name] for name in ("lr", "weight_decay", "eps")} | {"beta1": beta1, "beta2": beta2}
            assert p.grad is not None  # bitsandbytes skips parameters without one
            moments, step = ([state["state1"]], [state["state2"]]), torch.tensor(float(state["step"]))
            adamw([p], [p.grad], *moments, [], [step], foreach=False, amsgrad=False, maximize=False, **settings)
            state["step"] += 1

    return AdamW8bit


def vocabulary(module: nn.Module) -> set[int]:
    """Ids of the weights of embeddings and of the head."""
    layers: list[Any] = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and isinstance(head := part.get_output_embeddings(), nn.Linear):
            layers.append(head)
    return {id(layer.weight) for layer in layers}


def moment_shapes(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of a parameter's tensors in the optimizer's state; not those shared by all."""
    shape = tuple(p.shape)
    if not _in_8_bits(optimizer):
        return dict.fromkeys(MOMENTS, shape)
    scales = (
        {} if _in_float32(p, optimizer) else dict.fromkeys(("absmax1", "absmax2"), (-(-p.numel() // MOMENT_BLOCK),))
    )
    return {"state1": shape, "state2": shape} | scales


def new_state(p: nn.Parameter, optimizer: torch.optim.Optimizer, step: float) -> dict[str, Any]:
    """Makes a parameter's state in the optimizer after `step` steps. The caller fills the tensors of
    `moment_shapes`.
    """
    if not _in_8_bits(optimizer):
        counted = torch.tensor(step, dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": counted, **{name: torch.empty_like(p, requires_grad=False) for name in MOMENTS}}
    else:
        maker: Any = optimizer
        for g, group in enumerate(optimizer.param_groups):
            for i, member in enumerate(group["params"]):
                if member is p:
                    maker.init_state(group, p, g, i)
        optimizer.state[p]["step"] = int(step)
    state: dict[str, Any] = optimizer.state[p]
    return state


def moment_bytes(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> int | None:
    """Returns the bytes of the optimizer's state after its first step; None: all moments are float32."""
    if not _in_8_bits(optimizer):
        return None
    trained = [p for p in parameters if p.requires_grad]
    return sum(
        8 * p.numel() if _in_float32(p, optimizer) else 2 * p.numel() + 8 * -(-p.numel() // MOMENT_BLOCK)
        for p in trained
    )


def _in_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def _in_float32(p: nn.Parameter, optimizer: torch.optim.Optimizer) -> bool:
    return any(group["float32"] and any(p is q for q in group["params"]) for group in optimizer.param_groups)


# -- frozen weights


class Linear4bit(nn.Linear):
    """A frozen linear layer that holds its weight in 4 bits, two numbers per byte, with a float32 scale for each 64.

    Each product unpacks the weight as `dense`, and drops it afterwards. Scoring, sampling and both passes of training
    all do so, so they use the same model.
    """

    absmax: Tensor
    shape: torch.Size  # of the weight
    dtype: torch.dtype  # of the weight that was packed, and of `dense`

    def pack(self, weight: Tensor) -> None:
        """Replaces the layer's weight by the given weight, (out, in), float32 or 16 bits.

        Raises: ConfigError: bitsandbytes restores numbers with larger errors than NF4's levels allow.
        """
        flat = weight.detach().contiguous().view(-1)
        packed, state = library().functional.quantize_4bit(flat, blocksize=WEIGHT_BLOCK, quant_type=_KIND)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", state.absmax, persistent=False)
        limit = state.absmax.repeat_interleave(WEIGHT_BLOCK)[: len(flat)] * _FURTHEST
        if not bool(((self.dense.view(-1) - flat).abs() <= limit).all()):
            raise ConfigError(
                f"bitsandbytes does not restore a weight of shape {tuple(weight.shape)} on {weight.device.type}: "
                "leave model.quantization out"
            )

    @property
    def dense(self) -> Tensor:
        """The unpacked weight, (out, in), with which the layer computes."""
        return _unpacked(self.weight, self.absmax, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See torch.nn.Module."""
        product: Tensor = _Product.apply(x, self.weight, self.absmax, self.bias, self.shape, self.dtype)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b. The backward pass unpacks W again, and needs nothing else."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape, ctx.dtype = shape, dtype
        weight = _unpacked(packed, absmax, shape, dtype).to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax = ctx.saved_tensors
        weight = _unpacked(packed, absmax, ctx.shape, ctx.dtype)
        return (gradient @ weight.to(gradient.dtype), *(None,) * 5)


def _unpacked(packed: Tensor, absmax: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    # Flat: with bitsandbytes 0.50.2 on CPUs with AVX-512, rows of 32, 96 or 160 numbers come back wrong.
    flat = torch.Size([shape.numel()])
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, WEIGHT_BLOCK, _KIND, flat, dtype)
    return dense.view(shape)


@torch.no_grad()
def quantize(lm: LanguageModel, device: torch.device) -> None:
    """Packs the weights of the text model's linear layers on the device, one at a time. The rest moves there unpacked.

    The head, the embedding, layers that share their weight, routers and experts in one tensor stay unpacked.
    Weights that are not read yet are read here.

    Raises: ConfigError: no layer can be packed.
    """
    library()
    left_out, head = unfit(lm), lm.get_output_embeddings()
    text = {id(module) for module in decoder_of(lm).modules()}
    packed = 0
    for name, module in lm.named_modules():
        fits = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and name not in left_out
        if fits and module is not head and id(module) in text:
            weight = _read(module.weight, device)
            module.__class__ = Linear4bit
            module.pack(weight)
            packed += 1
    if not packed:
        raise ConfigError(
            f"model.quantization = '{_KIND}': {type(lm).__name__} has no linear layer that can be held in 4 bits"
        )
    memo: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in lm.modules():
        for name, p in module._parameters.items():
            if p is not None and hasattr(p, "deferred"):
                if id(p) not in memo:
                    memo[id(p)] = (p, nn.Parameter(_read(p, device), p.requires_grad))
                module._parameters[name] = memo[id(p)][1]


def _read(p: nn.Parameter, device: torch.device) -> Tensor:
    value: Tensor = p.deferred.rows() if hasattr(p, "deferred") else p.detach()
    return value.to(device, p.dtype)


def packed_layers(module: nn.Module) -> dict[str, Linear4bit]:
    """Returns the layers with packed weights, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Linear4bit)}


def dense_shapes(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, torch.Size]:
    """Returns the shape of each tensor of the module's `state_dict`; for packed weights, the unpacked shape."""
    packed = {f"{name}.weight": layer.shape for name, layer in packed_layers(module).items()}
    return {name: packed.get(name, tensor.shape) for name, tensor in tensors.items()}


def frozen_bytes(module: nn.Module) -> int | None:
    """Returns the bytes of weights that are not trained; None if nothing is packed."""
    layers = packed_layers(module)
    if not layers:
        return None
    scales = sum(layer.absmax.nbytes for layer in layers.values())
    return scales + sum(p.nbytes for p in module.parameters() if not p.requires_grad)
