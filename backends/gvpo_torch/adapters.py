"""LoRA and DoRA adapters by peft, and which layers can take them."""

import collections
import contextlib
import copy
import functools
import inspect
import re
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy.hugging_face import explained
from gvpo_torch.dora import hold_less
from gvpo_torch.language_model import LanguageModel
from gvpo_torch.weights import decoder_of


def with_adapters(lm: LanguageModel, config: ModelConfig, seed: int) -> LanguageModel:
    """Adds new LoRA or DoRA adapters to the text layers of the model, and freezes the rest.

    Raises: ConfigError: `lora_targets` that are not layers, or layers on which an adapter would not always be used.
    """
    from peft import LoraConfig, get_peft_model

    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    named = [name for name, module in lm.named_modules() if any(module is end for end in ends)]
    text = {id(module) for module in decoder_of(lm).modules()}
    outside = [name for name, module in lm.named_modules() if hasattr(module, "weight") and id(module) not in text]
    left_out = unfit(lm)
    for target in config.lora_targets:
        if any(_is_called(name, target) for name in named):
            raise ConfigError(
                f"model.lora_targets has {target!r}, the head or the embedding of {type(lm).__name__}, which may be "
                "tied and are used without adapters: leave it out"
            )
    everywhere = config.lora_targets == ("all-linear",)
    for target in () if everywhere else config.lora_targets:  # of several, peft ignores those without a match
        called = {name: module for name, module in lm.named_modules() if _is_called(name, target)}
        matching = [name for name, module in called.items() if id(module) in text]
        if not matching:
            raise ConfigError(
                f"model.lora_targets has {target!r}, which is not a layer of {type(lm).__name__}: use all-linear, or "
                "names of its layers such as q_proj"
            )
        why = next((left_out[name] for name in matching if name in left_out), None)
        if why:
            raise ConfigError(
                f"model.lora_targets has {target!r}, a layer of {type(lm).__name__} that takes no adapter: {why}. "
                "Leave it out"
            )
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=cast(int, config.lora_alpha or 2 * config.lora_rank),  # peft takes floats too
        target_modules="all-linear" if everywhere else list(config.lora_targets),
        exclude_modules=[*outside, *left_out] or None,
        lora_dropout=0.0,
        use_dora=config.lora_kind == "dora",
        task_type="CAUSAL_LM",
    )
    with (
        torch.random.fork_rng(),
        explained(f"adapters for {config.lora_targets}", config),
        without_peft_warnings(),
    ):
        torch.manual_seed(seed % 2**63)
        adapted = get_peft_model(lm, adapters)
    changed = _changed_in_place(adapted)
    for layer in lora_layers(adapted):
        if id(layer) not in changed:
            hold_less(layer)
        layer.cast_input_dtype_enabled = False
        for down in layer.lora_A.values():
            down.__class__ = _Down
    return cast(LanguageModel, adapted)


_IN_PLACE = re.compile(r"\w\.[a-z]\w*_\(|\s[-+*/]=\s")


def _changed_in_place(lm: nn.Module) -> set[int]:
    """Returns the ids of layers in modules of a decoder layer that change results in place, like Llama 4's experts.

    Such a layer's backward pass would not find the result that the layer returned: see `dora`.
    """
    layer_ids: set[int] = set()
    for module in lm.modules():
        parts = list(module.modules())
        if not type(module).__module__.startswith("transformers.") or any(isinstance(p, nn.ModuleList) for p in parts):
            continue
        try:
            source = inspect.getsource(type(module).forward)
        except (OSError, TypeError):
            continue
        if _IN_PLACE.search(source):
            layer_ids |= {id(part) for part in parts}
    return layer_ids


def lora_layers(lm: nn.Module) -> list[Any]:
    """Returns the layers to which peft added adapters."""
    from peft.tuners.lora import LoraLayer

    return [module for module in lm.modules() if isinstance(module, LoraLayer)]


class _Down(nn.Linear):
    """An adapter's first layer, with `_Product` as its product."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.weight)
        return product


class _Product(torch.autograd.Function):
    """x W^T in the dtype of W; saves x for the backward pass in its own dtype.

    peft casts a layer's 16-bit input to the adapter's float32 first, so autograd holds a copy for each adapter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ x.to(gradient.dtype).flatten(0, -2)
            of_weight = of_weight.to(weight.dtype)
        return of_x, of_weight


def mergeable(lm: nn.Module) -> int:
    """Returns the bytes of the weights that `merged` makes; 0: it must not be used.

    In 16 bits a sum is rounded: after one step of 1e-4 with rank 16, 86 % of the weights would be those of the base.
    """
    bases = [layer.get_base_layer() for layer in lora_layers(lm)]
    if not all(hasattr(base, "weight") for base in bases):  # experts, whose weights are in one tensor
        return 0
    weights = [base.weight for base in bases]
    if any(w.dtype != torch.float32 or hasattr(w, "device_mesh") for w in weights):
        return 0
    return sum(w.nbytes for w in weights)


@contextlib.contextmanager
def merged(lm: nn.Module) -> Iterator[None]:
    """Adds the adapters to the weights of their layers, so that a layer computes one product.

    Afterwards the base weights are restored bit for bit.
    """
    base_weights: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in lora_layers(lm):
                base_weights.append((layer, layer.get_base_layer().weight.data))
                layer.merge(safe_merge=True)  # into a copy of the weight
        yield
    finally:
        for layer, weight in base_weights:
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters.clear()


@contextlib.contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Silences warnings of peft that do not apply to adapters made here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a deprecated name of transformers
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # about unadapted experts
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft sets what GPT-2's layers need
        yield


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def unfit(lm: LanguageModel) -> dict[str, str]:
    """Returns the text model's linear layers on which an adapter would not always be used: name -> reason."""
    modules = dict(lm.named_modules())
    text = {id(module) for module in decoder_of(lm).modules()}
    users = collections.Counter(id(p) for _, p in lm.named_parameters(remove_duplicate=False))
    unfit = {}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear) or id(module) not in text:
            continue
        parent, _, attribute = name.rpartition(".")
        kind: Any = type(modules[parent])
        if not _is_linear(module):
            unfit[name] = f"{type(module).__name__} is a router, or computes something other than x W^T"
        elif users[id(module.weight)] > 1:
            unfit[name] = f"{attribute} shares its weight with another layer"
        elif re.search(rf"\bself\.{attribute}\.weight(?!\.dtype|\.device)", _source(kind)):
            unfit[name] = f"{kind.__name__} uses the weight of {attribute} outside of it"
    return unfit


@torch.no_grad()
def _is_linear(module: nn.Linear) -> bool:
    if type(module).forward is nn.Linear.forward or hasattr(module, "dense"):  # the latter: `quantized.Linear4bit`
        return True
    if hasattr(module.weight, "deferred"):  # its values are not read yet: any values will do
        module = copy.deepcopy(module)
        module.weight = nn.Parameter(torch.cos(torch.arange(float(module.weight.numel())).view(module.weight.shape)))
    x = torch.linspace(-1, 1, 2 * module.in_features).view(2, -1).to(module.weight)
    try:
        return bool(torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias)))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False


@functools.cache
def _source(kind: Any) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
