"""The reward `reward_model`: a transformers model for sequence classification with one output."""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .cache import cache_of, key_of


class Classifier:
    """A reward model and its tokenizer."""

    def __init__(self, path: str, device: str, dtype: str) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
        except ImportError as e:
            raise LookupError(f'reward_model needs PyTorch and transformers ({e}): pip install "gvpo[torch]"') from e
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise LookupError(f"options.dtype = {dtype!r}; expected float32, bfloat16 or float16")
        folder = _folder(path)
        try:
            config = AutoConfig.from_pretrained(folder)
            outputs = config.get_text_config().num_labels
            if outputs != 1:
                raise LookupError(f"options.path = {path!r}: the model has {outputs} outputs; expected 1, a score")
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtypes[dtype], use_safetensors=True, output_loading_info=True
            )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
            self.model: Any = model.to(self.device).eval()
        except (OSError, ValueError, RuntimeError, ImportError) as e:
            raise LookupError(f"options.path = {path!r}: {str(e).strip().splitlines()[0]}") from e
        if missing := sorted(loaded["missing_keys"]):
            raise LookupError(
                f"options.path = {path!r}: its files lack {', '.join(missing[:3])}, so its scores would be random;"
                " expected a folder of a trained reward model"
            )
        # Only rows of equal length are scored together, so no token is padding. If the end token is also the padding
        # token, transformers would take it for padding and read the score one token early.
        self.model.config.get_text_config().pad_token_id = -1
        sizes = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.longest = sizes if isinstance(sizes, int) and sizes > 0 else sys.maxsize
        self.identity = [path, dtype, *_files(folder)]

    def score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One score for each of several rows of equal length."""
        import torch

        with torch.inference_mode():
            logits = self.model(input_ids=torch.tensor(rows, device=self.device)).logits
        return [float(value) for value in logits.float()[:, 0].cpu()]


def _folder(path: str) -> str:
    """The folder of the model, which is downloaded first if `path` is a hub name.

    Raises: LookupError: the folder has no safetensors files, has an adapter, or has quantised weights.
    """
    from gvpo_core.training.config import ConfigError, ModelConfig
    from gvpo_core.training.policy import hugging_face, weight_files

    try:
        folder = hugging_face.local_folder(ModelConfig(path=path))
        config = hugging_face.read_json(folder / "config.json")
        weight_files.refuse_quantization(config, "reward_model")
        weight_files.check_settings(config, folder)
        weight_files.refuse_integers(weight_files.tensors(folder))
    except ConfigError as e:
        raise LookupError(f"options.path = {path!r}: {str(e).replace('model.path', 'options.path')}") from e
    return str(folder)


def row_ids(tokenizer: Any, prompt: Any, completion: Any) -> list[int]:
    """Token ids of prompt and response: messages by the chat template; texts concatenated, with the end token."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt + completion)["input_ids"])
        end = tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]
    messages, answer = [dict(m) for m in prompt], completion[-1]["content"]
    if messages and messages[-1]["role"] == "assistant":  # the response continues this message
        messages[-1]["content"] += answer
    else:
        messages.append({"role": "assistant", "content": answer})
    return [int(i) for i in tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)]


def _files(path: str) -> list[str]:
    """Names, sizes and times of a folder's files. They identify the model in the cache."""
    if not os.path.isdir(path):
        return []
    facts = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts]


@functools.lru_cache(maxsize=2)
def _loaded(path: str, device: str, dtype: str) -> Classifier:
    return Classifier(path, device, dtype)


def reward_model(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    path: str,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 16384,
    cache: str = "",
) -> list[float | None]:
    """Scores of a reward model: a folder or hub name that transformers loads for sequence classification.

    Args:
      path: folder or hub name of the model, which must have one output.
      device: "cpu", "cuda", "cuda:1", or "auto".
      dtype: float32, bfloat16 or float16.
      batch_tokens: largest number of tokens in a forward pass, unless one row is longer.
      cache: file of scores that later calls and runs reuse. Empty: memory only.
    Returns: a score each; None if prompt and response are longer than the model's context.
    Raises: LookupError: the model cannot be used.
    """
    model, score_cache = _loaded(path, device, dtype), cache_of(cache)
    rows = [row_ids(model.tokenizer, p, completion) for p, completion in zip(prompts, completions, strict=True)]
    keys = [key_of(model.identity, row) for row in rows]
    rows_by_length: dict[int, dict[str, list[int]]] = {}  # by length
    long = 0
    for key, row in zip(keys, rows, strict=True):
        if len(row) > model.longest:
            long += 1
        elif key not in score_cache.scores:
            rows_by_length.setdefault(len(row), {})[key] = row
    if long:
        print(
            f"reward_model: {long} of {len(rows)} responses with their prompts exceed {model.longest} tokens: no score"
        )
    for length, same in sorted(rows_by_length.items(), reverse=True):
        size, chosen = max(1, batch_tokens // length), list(same)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            score_cache.put(dict(zip(part, model.score([same[key] for key in part]), strict=True)))
    return [score_cache.scores.get(key) for key in keys]


def _load(options: Mapping[str, Any]) -> None:
    settings = {name: options.get(name, default) for name, default in (("device", "cpu"), ("dtype", "float32"))}
    if options.get("path"):
        _loaded(str(options["path"]), **settings)
        cache_of(str(options.get("cache", "")))


reward_model.warm_up = _load  # type: ignore[attr-defined]  # before any time limit runs
reward_model.settings = ("path", "device", "dtype", "batch_tokens", "cache")  # type: ignore[attr-defined]
