"""A transformers model as one module that scores response tokens and decodes, checked when it is loaded."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.policy.hugging_face import explained, load_tokenizer, source
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
        if targets is None:
            hidden = self.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{self.cache_argument: cache},
            ).last_hidden_state[:, -1]
            return self._logits(hidden)
        hidden = self.decoder(
            input_ids=ids, position_ids=positions, attention_mask=_attention(segments), use_cache=False
        ).last_hidden_state
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
        lm = _with_adapters(lm, config, seed)
    lm.eval().to(device)
    if config.gradient_checkpointing:
        base = lm.get_base_model() if config.lora_rank else lm
        # Renamed in transformers 5.2x, where the old name warns.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
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


def _with_adapters(lm: nn.Module, config: ModelConfig, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    named = [name for name, module in lm.named_modules() if any(module is end for end in ends)]
    for target in config.lora_targets:
        if any(name == target or name.endswith(f".{target}") for name in named):
            raise ConfigError(
                f"model.lora_targets has {target!r}, the head or the embedding of {type(lm).__name__}, which may be "
                "tied and are used without adapters: leave it out"
            )
    targets = "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    for target in () if targets == "all-linear" else targets:  # peft passes over one of several that match nothing
        if not any(name == target or name.endswith(f".{target}") for name, _ in lm.named_modules()):
            raise ConfigError(
                f"model.lora_targets has {target!r}, which is no layer of {type(lm).__name__}: use all-linear, or "
                "names of its layers such as q_proj"
            )
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=targets,
        lora_dropout=0.0,
        use_dora=config.lora_kind == "dora",
        task_type="CAUSAL_LM",
    )
    with (
        torch.random.fork_rng(),
        explained(f"adapters for {config.lora_targets}", config),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by a name since deprecated
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # its own, for experts not adapted
        torch.manual_seed(seed % 2**63)
        return get_peft_model(lm, adapters)


@torch.no_grad()
def check(scorer: Scorer, config: ModelConfig, device: torch.device) -> tuple[bool, str]:
    """Compares our log-probs with the model's own, and packed rows with plain ones; chooses the layout.

    Returns: whether rows are packed, and why.
    Raises: ConfigError: the log-probs disagree, or the layout asked for is not exact.
    """
    name = type(scorer.base).__name__
    batch = layout.check_batch(scorer.base.get_output_embeddings().weight.shape[0])
    worst, typical = _tolerance(scorer)
    plain = _by_response(scorer, batch, False, device)
    own = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        ids = torch.tensor([prompt + response], device=device)
        logits = scorer.base(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(response, device=device).unsqueeze(1)
        own.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).cpu().numpy())
    difference = np.abs(np.concatenate(own) - np.concatenate(plain))
    if not (difference.max() <= worst and difference.mean() <= typical):
        raise ConfigError(
            f"log-probs of {name} differ from its own forward pass by up to {difference.max():.3g} nat a token: "
            "it does something to its logits that is not known here, and cannot be trained exactly"
        )
    exact, reason = layout.packing(scorer.config.to_dict())
    if config.layout == "plain":
        exact, reason = False, "model.layout = plain"
    elif exact:
        difference = np.abs(np.concatenate(_by_response(scorer, batch, True, device)) - np.concatenate(plain))
        if not (difference.max() <= worst and difference.mean() <= typical):
            exact, reason = False, f"packed log-probs differ by up to {difference.max():.3g} nat at load"
    if config.layout == "packed" and not exact:
        raise ConfigError(f"model.layout is packed, which is not exact for {name}: {reason}. Use auto or plain")
    log.info("%s: %s rows (%s)", name, "packed" if exact else "plain", reason)
    return exact, reason


def _tolerance(scorer: Scorer) -> tuple[float, float]:
    # Largest and mean difference a token, nat. Without autocast, so full fine-tuning is checked in float32 always;
    # in 16 bits a router may send a token elsewhere, so the mean decides there.
    if scorer.base.get_output_embeddings().weight.dtype == torch.float32:
        strict = torch.get_float32_matmul_precision() == "highest"
        return (2e-3, 5e-4) if strict else (0.1, 0.02)
    return float("inf"), 0.1


def _by_response(scorer: Scorer, batch: Batch, packed: bool, device: torch.device) -> list[np.ndarray]:
    rows = layout.plan_rows(batch, packed=packed, tokens=1 << 30)
    arrays = layout.arrays(batch, rows)
    values = score(scorer, arrays, device).cpu().numpy()
    parts = np.split(values, np.cumsum(arrays.lengths)[:-1])
    return [parts[i] for i in np.argsort(arrays.responses)]
