"""A transformers model as one module that scores response tokens and decodes, checked when it is loaded."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import layout
from gvpo_core.training.policy.hugging_face import explained
from gvpo_torch import blocks, rope
from gvpo_torch.adapters import with_adapters
from gvpo_torch.cache import cache_argument
from gvpo_torch.compiled import as_they_are, compile_layers
from gvpo_torch.deferred import to_meta
from gvpo_torch.head import head_options, logits_of
from gvpo_torch.language_model import LanguageModel
from gvpo_torch.logprobs import token_logprobs
from gvpo_torch.quantized import quantize
from gvpo_torch.weights import decoder_of, pretrained

log = logging.getLogger("gvpo.torch")

_DROPPING = ("dropout", "pdrop", "layerdrop", "drop_path")  # in names of settings and of modules' attributes


class Scorer(nn.Module):
    """The language model behind one `forward`, so that the hooks of DDP and FSDP2 see every use of it."""

    def __init__(self, lm: LanguageModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm = lm
        self.dtype = dtype  # of matrix products; parameters may be wider
        base = self.base
        self.config = base.config.get_text_config(decoder=True)
        self._no_split_modules = list(base._no_split_modules or ())
        head = base.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"the head of {type(base).__name__} is {type(head).__name__}; expected a linear layer")
        self.cache_argument = cache_argument(self.decoder, self.config)
        self.rope = rope.by_length(self.decoder, self.config)
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        self.decodes_fixed = False  # set by `check`: whether sampling may go through `fixed`
        self.in_graphs = False  # whether `fixed` runs a CUDA graph for each token
        self.in_blocks = False  # set by `check`: whether the attention of packed rows goes through `blocks`
        self.masks_padding = False  # set by `check`: whether tokens before padding depend on it
        # Whether only prompts of one length are decoded together: padding would change a recurrent state.
        self.same_length = bool(kinds)
        self.head_options: dict[str, Any] = {}  # set by `inspect_head`
        self.compiled: list[nn.Module] = []  # layers with compiled programs; see `compiled`

    @property
    def base(self) -> LanguageModel:
        """The transformers model, without peft around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm

    @property
    def decoder(self) -> nn.Module:
        """The transformers model without its head."""
        return decoder_of(self.base)

    @property
    def adapted(self) -> bool:
        """Whether the model has adapters."""
        return hasattr(self.lm, "peft_config")

    def score_as(self, other: "Scorer") -> None:
        """Takes the masks and attention that `check` chose for another scorer of the same architecture."""
        self.masks_padding, self.in_blocks = other.masks_padding, other.in_blocks
        if self.in_blocks:
            self.base.set_attn_implementation(blocks.ATTENTION)

    def inspect_head(self) -> None:
        """Finds how the model scales and caps the products of its head; needs the weights. See `head_options`."""
        with self.autocast(), as_they_are(self.compiled):
            self.head_options = head_options(self.base, self.decoder, self.config)

    def own_logits(self, ids: Tensor) -> Tensor:
        """Returns (B, T, V) logits of (B, T) int64 ids by the model's own forward pass, without this class's code."""
        with as_they_are(self.compiled):
            return self.base(input_ids=ids, use_cache=False).logits

    def recomputes(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` tokens has other RoPE frequencies than a sequence with one token less."""
        return self.rope is not None and self.rope.frequencies(tokens) != self.rope.frequencies(tokens - 1)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Returns autocast to `dtype` if the parameters are wider, else a context that does nothing."""
        head = self.base.get_output_embeddings().weight
        mixed = head.dtype != self.dtype
        return torch.autocast(head.device.type, self.dtype) if mixed else contextlib.nullcontext()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        *,
        segments: np.ndarray | None = None,
        last: np.ndarray | None = None,
        predict: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Scores if `targets` is given, else decodes one step.

        Args:
          ids, positions: (B, T) int64.
          segments, last: (B, T) int64, as in `layout.Arrays`; to score. They say what each token sees. They are on the
            host, so that building the mask does not wait for the device.
          predict, targets: (n,) int64, as in `layout.Arrays`; to score.
          mask: (B, S) bool over the cache and `ids`; to decode.
          cache: transformers' cache, which is extended; to decode.
        Returns: (n,) float32 log-probability of each target, or (B, V) float32 logits after the last token.
        """
        if self.rope is not None:
            rope.reset(self.decoder)
        if targets is None:
            with as_they_are(self.compiled):
                hidden = self.decoder(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=mask,
                    use_cache=True,
                    **{self.cache_argument: cache},
                ).last_hidden_state[:, -1]
            return self._logits(hidden)
        assert segments is not None and last is not None and predict is not None
        width = ids.shape[1]
        if self.rope is not None:  # the length counts a response's last token, which is not an input
            ids = F.pad(ids, (0, 1))
            segments, last = (np.pad(x, ((0, 0), (0, 1)), constant_values=-1) for x in (segments, last))
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        hidden = self.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._sees(segments, last, ids.device),
            use_cache=False,
        ).last_hidden_state[:, :width]
        hidden = hidden.flatten(0, 1).index_select(0, predict)
        head = self.base.get_output_embeddings()
        if torch.is_autocast_enabled(hidden.device.type) and hidden.device.type != "cpu":
            hidden = hidden.to(self.dtype)
        return token_logprobs(hidden, head.weight, targets, bias=head.bias, **self.head_options)

    def _sees(self, segments: np.ndarray, last: np.ndarray, device: torch.device) -> Any:
        """Returns the attention mask: blocks or a dense mask for packed rows. Plain rows need none, as their padding
        comes last, unless the model `masks_padding`."""
        if int(segments.max()) > 1:
            if self.in_blocks and segments.shape[1] > blocks.NARROWEST:
                return blocks.mask(segments, last, device)
            return _attention(*(torch.from_numpy(x).to(device) for x in (segments, last)))
        real = segments >= 0
        return torch.from_numpy(real).to(device) if self.masks_padding and not real.all() else None

    def _logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.base.get_output_embeddings()(hidden), **self.head_options)


def _attention(segments: Tensor, last: Tensor) -> Tensor:
    """Returns the (B, 1, T, T) bool mask of packed rows, from (B, T) int64 `segments` and `last`."""
    sees = segments[:, :, None] <= last[:, None, :]
    return sees.tril_()[:, None]  # padding sees itself: a row of the mask that is all False gives NaN


def score(scorer: nn.Module, arrays: layout.Arrays, device: torch.device) -> Tensor:
    """Returns the (n,) float32 log-probability of each response token of a micro-batch."""
    on = {
        name: torch.from_numpy(getattr(arrays, name)).to(device, non_blocking=True)
        for name in ("ids", "positions", "predict", "targets")
    }
    return scorer(**on, segments=arrays.segments, last=arrays.last)


def load_scorer(
    config: ModelConfig, device: torch.device, seed: int, *, deferred: bool = False, frozen: bool = False
) -> Scorer:
    """Loads the model of a folder or hub name onto the device, without dropout, in evaluation mode.

    Args:
      deferred: `sharding.shard` will read the weights and inspect the head.
      frozen: nothing will be trained, so all parameters are in the compute dtype.
    Raises: ConfigError: no such folder, no config.json, no safetensors, an unknown architecture, weights missing from
      the files, adapter targets that match nothing.
    """
    # Full fine-tuning steps float32 parameters: a step of 1e-6 of a bfloat16 number is lost to rounding.
    compute = getattr(torch, config.compute_dtype)
    stored = compute if config.lora_rank or frozen else torch.float32
    if deferred and config.lora_kind == "dora":
        log.warning("each process reads the whole model before it keeps its part: DoRA starts from its weights")
    packs = config.quantization != "none"
    lm = pretrained(config, stored, deferred=packs or (deferred and config.lora_kind != "dora"))
    _exact(lm)
    if packs:
        quantize(lm, device)
    if config.lora_rank:
        lm = with_adapters(lm, config, seed)
    if frozen:
        lm.requires_grad_(False)
    lm.eval()
    if config.gradient_checkpointing:
        with explained("gradient checkpointing", config):
            enable_checkpointing(lm.get_base_model() if config.lora_rank else lm)
    scorer = _ready(Scorer(lm, compute), device, deferred)
    if config.compile:
        # Now, not in `check.defers`: it marks the layers, and programs made before would be made again.
        with contextlib.suppress(AttributeError, ValueError):  # a model that has no checkpointing
            enable_checkpointing(scorer.base)
        embeddings = scorer.base.get_input_embeddings()
        scorer.compiled = compile_layers(scorer.decoder, embeddings, set(scorer._no_split_modules))
    return scorer


def load_reference(config: ModelConfig, device: torch.device, *, deferred: bool = False) -> Scorer:
    """Loads the initial model, frozen. Its linear layers are in the compute dtype, which their products use anyway."""
    compute = getattr(torch, config.compute_dtype)
    lm = pretrained(config, torch.float32, deferred=deferred)
    _exact(lm)
    to_meta(lm)
    lm.requires_grad_(False).eval()
    head = lm.get_output_embeddings()
    for module in lm.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.to(compute)
    return _ready(Scorer(lm, compute), device, deferred)


def _ready(scorer: Scorer, device: torch.device, deferred: bool) -> Scorer:
    if not deferred:
        scorer.to(device)
        scorer.inspect_head()
    return scorer


def enable_checkpointing(base: LanguageModel) -> None:
    """Enables gradient checkpointing for the layers of a transformers model; it takes effect within `checkpointing`."""
    # Renamed in transformers 5.2x, where the old name warns.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # Only reentrant checkpoints need it. Even without gradients it marks the input of the first layer, unlike those of
    # the other layers, so that torch.compile would make two programs of one.
    base.disable_input_require_grads()


@contextlib.contextmanager
def checkpointing(scorer: Scorer) -> Iterator[list[nn.Module]]:
    """Puts only the checkpointed layers into training mode, as transformers requires, and yields them.

    The modules inside a layer stay in evaluation mode: in training mode routers of PhiMoE, Mixtral, DBRX and MiniMax
    draw noise.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    able = [module for module in scorer.modules() if getattr(module, "gradient_checkpointing", False) is True]
    layers: list[nn.Module] = [module for module in able if isinstance(module, GradientCheckpointingLayer)]
    layers = layers or able
    for layer in layers:
        layer.training = True
    try:
        yield layers
    finally:
        for layer in layers:
            layer.training = False


def cast_parameters(scorer: Scorer) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Returns the parameters of linear layers that autocast casts for each product, as (layer, name, parameter).

    Leaves out the head, which may be the embedding. Empty without autocast: adapters then compute in float32.
    """
    head = scorer.base.get_output_embeddings().weight
    if head.dtype == scorer.dtype:
        return []
    ends = {id(head), id(scorer.base.get_input_embeddings().weight)}
    layers = [m for m in scorer.modules() if type(m) is nn.Linear and id(m.weight) not in ends]
    named = [(m, name, p) for m in layers for name, p in m.named_parameters(recurse=False)]
    return [(m, name, p) for m, name, p in named if p.dtype != scorer.dtype]


@contextlib.contextmanager
def products_in_compute_dtype(scorer: Scorer) -> Iterator[None]:
    """Replaces `cast_parameters` by copies in the compute dtype, so that autocast does not cast them at every token.

    The master weights are set aside and put back unchanged: changing their own dtype would remove DDP's hooks.
    """
    masters = cast_parameters(scorer)
    try:
        for layer, name, p in masters:
            layer._parameters[name] = nn.Parameter(p.detach().to(scorer.dtype), requires_grad=False)
        yield
    finally:
        for layer, name, p in masters:
            layer._parameters[name] = p


def train_padding_row(lm: nn.Module) -> None:
    """Lets the input embedding of pad_token_id have a gradient, which transformers switches off by `padding_idx`.

    Padding is known from lengths here, and this id is a normal input: often it ends each message of a chat.
    """
    for module in lm.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def _exact(lm: LanguageModel) -> None:
    """Switches off all that makes training differ from scoring: dropout, layer drop, embedding rows left untrained.

    Dropout matters although the model stays in evaluation mode: `checkpointing` puts single layers into training mode.
    """
    train_padding_row(lm)
    for module in lm.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if any(word in name for word in _DROPPING) and isinstance(value, float):
                setattr(module, name, 0.0)
    for config in (lm.config, lm.config.get_text_config(decoder=True)):
        for name, value in config.to_dict().items():
            if any(word in name for word in _DROPPING) and isinstance(value, float):
                setattr(config, name, 0.0)
