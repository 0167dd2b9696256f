"""A transformers model as one module that scores response tokens and decodes, checked when it is loaded."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import layout
from gvpo_core.training.policy.hugging_face import explained, load_tokenizer, source
from gvpo_torch import rope
from gvpo_torch.adapters import with_adapters
from gvpo_torch.cache import cache_argument
from gvpo_torch.logprobs import token_logprobs

log = logging.getLogger("gvpo.torch")

_DROPPING = ("dropout", "pdrop", "layerdrop", "drop_path")  # in names of settings and of modules' attributes


class Scorer(nn.Module):
    """The language model behind one `forward`, so that the hooks of DDP and FSDP2 see every use of it."""

    def __init__(self, lm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm = lm
        self.dtype = dtype  # of products; parameters may be wider
        base = self.base
        self.config = base.config
        self._no_split_modules = list(base._no_split_modules or ())
        head = base.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"the head of {type(base).__name__} is {type(head).__name__}; expected a linear layer")
        self.cache_argument = cache_argument(self.decoder, self.config)
        self.rope = rope.by_length(self.decoder, self.config)
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        self.same_length = bool(kinds)  # of prompts decoded together: a recurrent state would run through padding
        scale = getattr(self.config, "logit_scale", None) or 1.0
        scale /= getattr(self.config, "logits_scaling", None) or 1.0
        self.head_options = {
            "softcap": getattr(self.config, "final_logit_softcapping", None),
            "scale": float(scale),
        }

    @property
    def base(self) -> nn.Module:
        """The transformers model, without peft around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm

    @property
    def decoder(self) -> nn.Module:
        """The transformers model without its head."""
        decoder = self.base.get_decoder()
        # Llama4ForCausalLM names no base model, and transformers then returns the model with its head.
        return decoder if decoder is not self.base else self.base.model

    @property
    def adapted(self) -> bool:
        return hasattr(self.lm, "peft_config")

    def recomputes(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` tokens takes other RoPE frequencies than one of a token less."""
        return self.rope is not None and self.rope.frequencies(tokens) != self.rope.frequencies(tokens - 1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Products in `dtype` over wider parameters, where the two differ."""
        head = self.base.get_output_embeddings().weight
        mixed = head.dtype != self.dtype
        return torch.autocast(head.device.type, self.dtype) if mixed else contextlib.nullcontext()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        segments: Tensor | None = None,
        predict: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Scores where `targets` is given, else decodes one step.

        Args:
          ids, positions: (B, T) int64.
          segments: (B, T) int64, as `layout.Arrays` has them; with `predict` and `targets`, both (n,) int64.
          mask: (B, S) bool over the cache and `ids`; with `cache`, transformers' cache, which is extended.
        Returns: (n,) float32 log-probability of each target, or (B, V) float32 logits after the last token.
        """
        if self.rope is not None:
            rope.reset(self.decoder)
        if targets is None:
            hidden = self.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state[:, -1]
            return self._logits(hidden)
        width = ids.shape[1]
        if self.rope is not None:  # a response's last token is no input, and counts in the length of its sequence
            ids, segments = F.pad(ids, (0, 1)), F.pad(segments, (0, 1), value=-1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        hidden = self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=_attention(segments), use_cache=False
        ).last_hidden_state[:, :width]
        hidden = hidden.flatten(0, 1).index_select(0, predict)
        head = self.base.get_output_embeddings()
        if torch.is_autocast_enabled(hidden.device.type) and hidden.device.type != "cpu":
            hidden = hidden.to(self.dtype)
        return token_logprobs(hidden, head.weight, targets, bias=head.bias, **self.head_options)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.base.get_output_embeddings()(hidden).float() * self.head_options["scale"]
        cap = self.head_options["softcap"]
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _attention(segments: Tensor) -> Tensor | None:
    """What each token sees: a 4-D mask for packed rows, a 2-D one for plain rows with padding, else none."""
    if int(segments.max()) <= 1:
        real = segments >= 0
        return None if bool(real.all()) else real
    sees = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return sees.tril_()[:, None]  # padding sees itself: a row of the mask that is all False gives NaN


def score(scorer: nn.Module, arrays: layout.Arrays, device: torch.device) -> Tensor:
    """(n,) float32 log-probability of each response token of a micro-batch."""
    on = {
        name: torch.from_numpy(getattr(arrays, name)).to(device, non_blocking=True)
        for name in ("ids", "positions", "segments", "predict", "targets")
    }
    return scorer(**on)


def shape(scorer: Scorer) -> dict[str, int] | None:
    """The model's sizes under the names of `Policy.describe`; None where its configuration has other names."""
    c = scorer.config
    try:
        heads = c.num_attention_heads
        width = getattr(c, "head_dim", None) or c.hidden_size // heads
        experts = getattr(c, "num_experts_per_tok", None)
        return {
            "layers": c.num_hidden_layers,
            "hidden": c.hidden_size,
            "intermediate": experts * c.moe_intermediate_size if experts else c.intermediate_size,
            "heads": heads,
            "kv_heads": getattr(c, "num_key_value_heads", None) or heads,
            "head_dim": width,
            "vocabulary": c.vocab_size,
        }
    except AttributeError:
        return None


def load_scorer(config: ModelConfig, device: torch.device, seed: int) -> tuple[Scorer, Any]:
    """Model and tokenizer of a folder or hub name, on the device, without dropout, in evaluation mode.

    Raises: ConfigError: no such folder, no config.json, no safetensors, no tokenizer, an unknown architecture,
      weights missing from the files, adapter targets that match nothing.
    """
    tokenizer = load_tokenizer(config)
    # Full fine-tuning steps float32 parameters: a step of 1e-6 of a bfloat16 number is lost to rounding.
    compute = getattr(torch, config.dtype)
    stored = compute if config.lora_rank else torch.float32
    lm = _pretrained(config, stored)
    _exact(lm)
    if config.lora_rank:
        lm = with_adapters(lm, config, seed)
    lm.eval().to(device)
    if config.gradient_checkpointing:
        base = lm.get_base_model() if config.lora_rank else lm
        # Renamed in transformers 5.2x, where the old name warns.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        with explained("gradient checkpointing", config):
            enable({"use_reentrant": False})
    return Scorer(lm, compute), tokenizer


def load_reference(config: ModelConfig, device: torch.device) -> Scorer:
    """The initial model, frozen; its linear layers are kept in the compute dtype, in which they are used anyway."""
    compute = getattr(torch, config.dtype)
    lm = _pretrained(config, torch.float32)
    _exact(lm)
    lm.requires_grad_(False).eval().to(device)
    head = lm.get_output_embeddings()
    for module in lm.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.to(compute)
    return Scorer(lm, compute)


@contextlib.contextmanager
def checkpointing(scorer: Scorer) -> Iterator[None]:
    """Puts the layers that checkpoint into training mode, which transformers asks for, and nothing else.

    In training mode the parts of a layer do more: routers of PhiMoE, Mixtral, DBRX and MiniMax draw noise.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    able = [module for module in scorer.modules() if getattr(module, "gradient_checkpointing", False) is True]
    layers = [module for module in able if isinstance(module, GradientCheckpointingLayer)] or able
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextlib.contextmanager
def without_bars(path: str | os.PathLike[str]) -> Iterator[None]:
    """Without transformers' progress bars for a local folder, which takes seconds; downloads keep theirs."""
    from transformers.utils import logging as bars

    hide = os.path.isdir(path) and bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


def _pretrained(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    where = source(config)
    options = {**where, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    with explained("the model", config), without_bars(where["pretrained_model_name_or_path"]):
        try:
            lm, info = AutoModelForCausalLM.from_pretrained(**options, attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.info("%s has no SDPA attention: eager is used", config.path)
            lm, info = AutoModelForCausalLM.from_pretrained(**options, attn_implementation="eager")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"model.path {config.path!r} lacks {len(missing)} weights of {type(lm).__name__}, "
            f"the first {missing[0]}: they would start random"
        )
    return lm


def _exact(lm: nn.Module) -> None:
    """Switches off what would make training differ from scoring: dropout, layer drop, embedding rows left untrained.

    Dropout counts although the model stays in evaluation mode: `checkpointing` puts single layers in training mode.
    """
    for module in lm.modules():
        if isinstance(module, nn.Embedding):
            # transformers sets it to pad_token_id, and its row then gets no gradient. Lengths tell padding here, and
            # that id is an input as any other: often it ends each message of a chat.
            module.padding_idx = None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if any(word in name for word in _DROPPING) and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in lm.config.to_dict().items():
        if any(word in name for word in _DROPPING) and isinstance(value, float):
            setattr(lm.config, name, 0.0)
