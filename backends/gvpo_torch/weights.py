"""Loads a transformers model from its files, and rejects files that would be misread."""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import weight_files
from gvpo_core.training.policy.hugging_face import explained, local_folder, located, read_json
from gvpo_torch.deferred import NotDeferred, from_files
from gvpo_torch.language_model import LanguageModel

log = logging.getLogger("gvpo.torch")

DEQUANTIZED = ("fp8", "mxfp4")  # transformers unpacks these exactly into floats
# Names of unused weights: not part of the text model, or recomputed from config.json. The pattern matches names of
# model parts, never a weight inside a layer.
UNUSED = re.compile(
    r"^((?!layers\.\d).)*(vision|visual|image|audio|video|speech|projector|multi_modal|mtp|nextn)"
    r"|inv_freq$|masked_bias$"
)


@contextlib.contextmanager
def without_bars(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hides transformers' progress bars for a local folder, which loads in seconds. Downloads keep them."""
    from transformers.utils import logging as bars

    hide = os.path.isdir(path) and bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()


def pretrained(config: ModelConfig, dtype: torch.dtype, *, deferred: bool = False) -> LanguageModel:
    """Loads the model of a folder or hub name in `dtype`, and freezes the parameters that text does not reach.

    A model of images and text is loaded by its own class, and trained on text.

    Args:
      deferred: if possible, leave the weights unread, for `gvpo_torch.deferred` to read in parts.
    Raises: ConfigError: weights that are missing, quantised or not those of the model; an adapter beside the model;
      an unknown architecture.
    """
    where, folder = located(config), local_folder(config)
    written = read_json(folder / "config.json")
    weight_files.check_settings(written, folder)  # names damaged files
    with explained("the model", config), without_bars(where["pretrained_model_name_or_path"]):
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(**where)
        options = {**where, "config": settings, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        options["ignore_mismatched_sizes"] = True  # `_check` names them
        unpacked = _dequantized(settings, written)
        options |= unpacked
        auto = _auto_class(settings, config)
        lm: Any = None
        info: dict[str, Any] = {}
        if deferred:
            try:
                lm, info = _attending(
                    functools.partial(from_files, _own_class(auto, settings, unpacked), folder), options
                )
            except NotDeferred as reason:
                packs = "the whole model is read before it is packed"
                parts = "each process reads the whole model before it keeps its part"
                log.warning("%s: %s (%s)", config.path, packs if config.quantization != "none" else parts, reason)
        if lm is None:
            lm, info = _attending(auto.from_pretrained, options)
    _check(lm, info, config, folder, bool(unpacked))
    _forget_quantization(lm.config)
    _correct_tie_setting(lm)
    text = {
        id(p) for part in (decoder_of(lm), lm.get_output_embeddings()) if part is not None for p in part.parameters()
    }
    for p in lm.parameters():
        p.requires_grad_(p.requires_grad and id(p) in text)
    return lm


def _attending(make: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Calls `make` with SDPA attention, or with eager attention if the model has no SDPA attention."""
    try:
        return make(**options, attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        log.info("%s has no SDPA attention: eager is used", options["pretrained_model_name_or_path"])
        return make(**options, attn_implementation="eager")


def _own_class(auto: Any, settings: Any, unpacked: dict[str, Any]) -> Any:
    """Returns the model's class. Raises: NotDeferred: its code or weights are of a kind that `deferred` cannot load."""
    if unpacked:
        raise NotDeferred("its weights are unpacked when they are read")
    if type(settings) not in auto._model_mapping:
        raise NotDeferred("it is loaded by code that comes with it")
    if getattr(settings, "transformers_weights", None):
        raise NotDeferred("config.json names the file of its weights")
    kind = auto._model_mapping[type(settings)]
    if not isinstance(kind, type):  # several classes; config.json names one
        named = {candidate.__name__: candidate for candidate in kind}
        kind = next((named[name] for name in settings.architectures or () if name in named), kind[0])
    return kind


def decoder_of(base: LanguageModel) -> nn.Module:
    """Returns the part of a transformers model that turns tokens into the hidden states for its head.

    Raises: ConfigError: no such part can be found.
    """
    part: Any = base
    while getattr(part, "lm_head", None) is not None or part is base:  # some models wrap another model with a head
        inner = part.get_decoder()
        if inner is part or not hasattr(inner, "get_input_embeddings"):  # not found, or the head is named "decoder"
            inner = getattr(part, "model", None)
        part = inner
        if part is None:
            raise ConfigError(f"{type(base).__name__} has no decoder separate from its head, which is not supported")
    return cast(nn.Module, part)


def _auto_class(settings: Any, config: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    remote = config.trust_remote_code and "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    if remote or type(settings) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(settings) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    raise ConfigError(
        f"model.path {config.path!r} is of type {settings.model_type!r}, which has no causal language model in "
        "transformers: give a model that generates text from text"
    )


def _dequantized(settings: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the load options that unpack quantised weights, if transformers does so exactly.

    Args:
      written: the contents of config.json; `settings` may lack a part of them.
    Raises: ConfigError: quantised by another method, or in a part of the model that transformers does not unpack.
    """
    import transformers

    method = weight_files.quantization(written)
    parts = (getattr(part, "quantization_config", None) for part in (settings, settings.get_text_config()))
    quantization = next((part for part in parts if part), None)
    if method not in DEQUANTIZED or quantization is None:
        weight_files.refuse_quantization(written, "gvpo_torch")
        return {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}[method]
    rest = {name: value for name, value in quantization.items() if name not in ("quant_method", "dequantize")}
    return {"quantization_config": getattr(transformers, kind)(**rest, dequantize=True)}


def _forget_quantization(settings: Any) -> None:
    for part in (settings, settings.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def _correct_tie_setting(lm: LanguageModel) -> None:
    """Sets `tie_word_embeddings` by the weights: files with a separate head are not tied, whatever config.json says."""
    head = lm.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return
    tied = head.weight is lm.get_input_embeddings().weight
    for part in (lm.config, lm.config.get_text_config(decoder=True)):
        if getattr(part, "tie_word_embeddings", tied) != tied:
            part.tie_word_embeddings = tied


def _check(lm: LanguageModel, info: dict[str, Any], config: ModelConfig, folder: Path, unpacked: bool) -> None:
    if getattr(lm, "_hf_peft_config_loaded", False):
        raise ConfigError(f"model.path {config.path!r} holds an adapter: merge it into its model first")
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"model.path {config.path!r} lacks {len(missing)} weights of {type(lm).__name__}, "
            f"the first {missing[0]}: they would be initialised at random"
        )
    unlike = sorted(info.get("mismatched_keys") or ())
    if unlike:
        raise ConfigError(f"model.path {config.path!r} has {unlike[0][0]} in another shape than {type(lm).__name__}")
    unknown = sorted(name for name in info["unexpected_keys"] if not UNUSED.search(name))
    if unknown:
        raise ConfigError(
            f"model.path {config.path!r} has {len(unknown)} weights that {type(lm).__name__} does not use, "
            f"the first {unknown[0]}: the files belong to another model, or to a quantised one"
        )
    _refuse_integers(lm, info, folder, unpacked)


def _refuse_integers(lm: LanguageModel, info: dict[str, Any], folder: Path, unpacked: bool) -> None:
    """Rejects integers in place of floats: transformers would read quantised weights without their scales."""
    tensors = weight_files.tensors(folder)
    tables = {name.rpartition(".")[2] for name, b in lm.named_buffers() if not b.is_floating_point()}
    tables |= {name.rpartition(".")[2] for name in info["unexpected_keys"]}
    ignored = [re.compile(pattern) for pattern in lm._keys_to_ignore_on_load_unexpected or ()]
    allowed = {n for n in tensors if n.rpartition(".")[2] in tables or any(p.search(n) for p in ignored)}
    if unpacked:  # allow weights with the scales that transformers expects
        allowed |= {n for n in tensors if any(f"{n}{end}" in tensors for end in ("_scale_inv", "_scale"))}
        allowed |= {n for n in tensors if f"{n.removesuffix('weight')}scale" in tensors}
        packs = {n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")}
        allowed |= {f"{n}{end}" for n in packs if f"{n}_scales" in tensors for end in ("_blocks", "_scales")}
    weight_files.refuse_integers(tensors, allowed)
