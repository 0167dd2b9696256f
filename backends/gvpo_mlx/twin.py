"""Compares mlx-lm with transformers on a tiny twin of the model.

A comparison on the model itself would hold it in memory twice. The twin has all settings of the model's config.json and
a few small layers with random weights, so a setting that mlx-lm reads differently shows. It is made only if PyTorch is
installed, in about a second, once per configuration.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_mlx import read
from gvpo_mlx.read import Loaded
from gvpo_mlx.settings import QUANTIZATION

log = logging.getLogger("gvpo.mlx")

TOKENS = 24
VOCABULARY = 96
WINDOW = 8
WORST = 2e-3
"""Nats. float32 rounding gives 1e-5; a setting that is read differently gives at least 1e-2."""

_INNER = re.compile(r"(intermediate|ffn|n_inner|inner)\w*(size|dim)$|^n_inner$|^ffn_hidden_size$|^block_ff_dim$")
_EXPERTS = re.compile(r"^(num_(local_)?experts|n_routed_experts|moe_num_experts)$")
_CHOSEN = re.compile(r"^(num_experts_per_tok|moe_k|top_k_experts)$")


def pretrained(config: ModelConfig, folder: Path) -> Loaded:
    """Calls `read.pretrained`, and compares the model with transformers if PyTorch is installed.

    Raises: ConfigError: see `read.pretrained` and `compare`.
    """
    loaded = read.pretrained(config, folder)
    return dataclasses.replace(loaded, compared=compare(loaded.settings, config.path))


def compare(written: Mapping[str, Any], path: str) -> str:
    """Compares mlx-lm's log-probs of the twin with transformers'.

    Args:
      written: config.json of the language model, as in the folder.
      path: of the model, for messages.
    Returns: the result, or why nothing was compared.
    Raises: ConfigError: they differ.
    """
    if importlib.util.find_spec("torch") is None:
        return "not compared with transformers: PyTorch is not installed"
    unread = ("architectures", "dtype", "transformers_version", "_name_or_path", *QUANTIZATION)
    text = json.dumps({k: v for k, v in written.items() if k not in unread}, sort_keys=True, default=str)
    difference, reason = _difference(text)
    if difference is None:
        return f"not compared with transformers: {reason}"
    if not difference <= WORST:
        raise ConfigError(
            f"mlx-lm computes model.path {path!r} differently from transformers: log-probs of a tiny model with its "
            f"settings differ by up to {difference:.2g} nat a token. gvpo_torch takes it"
        )
    return f"a tiny twin agrees with transformers within {difference:.0e} nat a token"


@functools.lru_cache(maxsize=256)
def _difference(text: str) -> tuple[float | None, str]:
    """Returns the largest difference in nats per token, or None and the reason."""
    with tempfile.TemporaryDirectory(prefix="gvpo-twin-") as folder:
        try:
            ids, theirs = _save_twin(json.loads(text), Path(folder))
        except Exception as error:  # transformers may reject the small sizes with any error
            log.debug("no twin", exc_info=True)
            return None, f"no tiny twin ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
        try:
            loaded = read.pretrained(ModelConfig(path=folder), Path(folder))
            logits = loaded.lm(mx.array([ids]))[0].astype(mx.float32)
            ours = np.array(logits).astype(np.float64)
        except (ConfigError, AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            log.debug("no twin", exc_info=True)
            return (
                None,
                f"mlx-lm does not read the tiny twin ({type(error).__name__}: {' '.join(str(error).split())[:160]})",
            )
    ours -= ours.max(1, keepdims=True)
    ours -= np.log(np.exp(ours).sum(1, keepdims=True))
    compared = min(TOKENS, loaded.window or TOKENS) - 1  # longer rows are rejected if a window is not applied
    return float(np.abs(ours - theirs)[np.arange(compared), ids[1 : compared + 1]].max()), ""


def _save_twin(written: dict[str, Any], folder: Path) -> tuple[list[int], np.ndarray]:
    """Saves the twin. Returns token ids and transformers' (T, V) float64 log-probs."""
    torch: Any = importlib.import_module("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shrunk(AutoConfig.for_model(**written))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point() and tensor.ndim == 1 and "freq" not in name:
                    tensor.add_(0.1 * torch.randn_like(tensor))  # moves norms and biases away from one and zero
            ids = torch.randint(1, VOCABULARY, (TOKENS,)).tolist()
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    others = {name: value for name, value in written.items() if name not in saved}  # settings that only mlx-lm reads
    (folder / "config.json").write_text(json.dumps(others | saved), encoding="utf-8")
    return ids, logits.double().log_softmax(-1).numpy()


def shrunk(config: Any) -> Any:
    """Returns the transformers configuration with small sizes and all other settings unchanged."""
    c = config.to_dict()
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    own_width = c.get("head_dim")
    width = own_width or config.hidden_size // heads
    small_heads = 2 if kv in (None, heads) else 4
    small: dict[str, Any] = {
        "num_attention_heads": small_heads,
        "hidden_size": 64 if own_width and own_width * heads != config.hidden_size else small_heads * width,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
    }
    if kv is not None:
        small["num_key_value_heads"] = 1 if kv == 1 else 2
    layers = config.num_hidden_layers
    kinds = c.get("layer_types")
    keep = min(layers, max(2, int(c.get("first_k_dense_replace") or c.get("num_dense_layers") or 0) + 1))
    if kinds:
        keep = max(keep, *(kinds.index(kind) + 1 for kind in set(kinds)))
    small["num_hidden_layers"] = keep
    for name, value in c.items():
        if isinstance(value, list) and len(value) == layers and layers > 1:
            small[name] = value[:keep]
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif _INNER.search(name):
            small[name] = min(value, 48)
        elif _EXPERTS.search(name):
            small[name] = min(value, 8 if (c.get("n_group") or 1) > 1 else 4)
        elif _CHOSEN.search(name):
            small[name] = min(value, 2)
        elif name in ("q_lora_rank", "kv_lora_rank"):
            small[name] = min(value, 16)
        elif name in ("sliding_window", "attention_chunk_size"):
            small[name] = min(value, WINDOW)
        elif name == "vocab_size_per_layer_input":
            small[name] = VOCABULARY
        elif re.search(r"(pad|bos|eos)_token_id$", name):
            small[name] = 0
    if (c.get("n_group") or 1) > 1:
        small |= {"n_group": 2, "topk_group": 1}
    if "mamba_n_heads" in c:
        small |= {"mamba_n_heads": 4, "mamba_d_head": c.get("mamba_expand", 2) * small["hidden_size"] // 4}
    result = config.__class__(**{k: v for k, v in c.items() if k not in small})
    for name, value in small.items():
        setattr(result, name, value)
    return result.__class__(**result.to_dict())
