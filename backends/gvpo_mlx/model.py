"""A model of mlx-lm as a function that scores response tokens; checked when it is loaded."""

import contextlib
import copy
import logging
import resource
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import layout
from gvpo_core.training.policy.hugging_face import local_folder
from gvpo_mlx.adapters import adapted, add_adapters
from gvpo_mlx.logprobs import Quantized, token_logprobs
from gvpo_mlx.packed import Packed, take_positions
from gvpo_mlx.read import Loaded, language_model
from gvpo_mlx.twin import pretrained

log = logging.getLogger("gvpo.mlx")


class Scorer:
    """The language model. Its trainable parameters are arguments, so that gradients and compilation see them."""

    def __init__(self, loaded: Loaded, dtype: mx.Dtype) -> None:
        lm, config = loaded.lm, loaded.config
        self.lm, self.loaded, self.config, self.dtype = lm, loaded, config, dtype
        self.language = language_model(lm)
        self.decoder: Any = getattr(self.language, "model", None)
        if self.decoder is None or not hasattr(lm, "layers"):
            raise ConfigError(f"{self.name} of mlx-lm has no decoder `model` with `layers`, which is not supported")
        self.names = [name for name, _ in _flat(lm.trainable_parameters())]
        self.head = _head_of(self.language, self.decoder, self.name)
        self.trains_head = bool(tree_flatten(self.head.trainable_parameters()))
        scale = config.get("logit_scale") or 1.0
        scale /= config.get("logits_scaling") or 1.0
        self.head_options: dict[str, Any] = {"softcap": config.get("final_logit_softcapping"), "scale": float(scale)}
        self.window = loaded.window

    @property
    def name(self) -> str:
        """Module and class of the model in mlx-lm."""
        return f"{type(self.lm).__module__.rpartition('.')[2]}.{type(self.lm).__name__}"

    @property
    def adapted(self) -> bool:
        """Whether the model has adapters."""
        return bool(adapted(self.lm))

    @property
    def parameters(self) -> list[mx.array]:
        """The trainable parameters, in the order of `names`."""
        return [value for _, value in _flat(self.lm.trainable_parameters())]

    @parameters.setter
    def parameters(self, values: Sequence[mx.array]) -> None:
        self.lm.update(tree_unflatten(list(zip(self.names, values, strict=True))))

    @contextlib.contextmanager
    def using(self, values: Sequence[mx.array]) -> Iterator[None]:
        """Gives the model other parameters, in the compute dtype, while the context is open."""
        before = self.parameters
        # Adapters stay float32; their products are added in the layer's dtype.
        self.parameters = list(values) if self.adapted else [v.astype(self.dtype) for v in values]
        try:
            yield
        finally:
            self.parameters = before

    def in_compute_dtype(self, values: Sequence[mx.array]) -> list[mx.array]:
        """Casts parameters for scoring without training, as in `load_reference`. Adapters and head stay float32."""
        if self.adapted:
            return list(values)
        head = self._head_name()
        return [v if name == head else v.astype(self.dtype) for name, v in zip(self.names, values, strict=True)]

    def score(
        self,
        values: Sequence[mx.array],
        ids: mx.array,
        positions: mx.array,
        segments: mx.array,
        last: mx.array,
        predict: mx.array,
        targets: mx.array,
        packed: bool,
    ) -> mx.array:
        """(n,) float32 log-probability of each target under parameters `values`. For the arrays see `layout.Arrays`."""
        wide = values[self.names.index(name)] if (name := self._head_name()) in self.names else None
        with self.using(values):
            cache = [Packed(positions, segments, last)] * len(self.lm.layers) if packed else None
            hidden = self.decoder(ids, cache=cache)
            hidden = hidden.reshape(-1, hidden.shape[-1])[predict]
            return self._token_logprobs(hidden, targets, wide)

    def _head_name(self) -> str:
        return next((n for n, m in self.lm.named_modules() if m is self.head), "") + ".weight"

    def _token_logprobs(self, hidden: mx.array, targets: mx.array, wide: mx.array | None) -> mx.array:
        head = self.head
        packed = None
        if "scales" in head:
            packed = Quantized(head.scales, head.get("biases"), head.group_size, head.bits, head.mode)
        # Under bfloat16 training, use the float32 parameter itself: logits rounded to 16 bits are off by 0.05 nat.
        weight = head.weight if wide is None else wide
        if wide is not None:
            hidden = hidden.astype(wide.dtype)
        return token_logprobs(
            hidden,
            weight,
            targets,
            bias=head.get("bias"),
            quantized=packed,
            trained=self.trains_head,
            **self.head_options,
        )

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., V) float32 logits."""
        z = self.head.as_linear(hidden) if hasattr(self.head, "as_linear") else self.head(hidden)
        z = z.astype(mx.float32) * self.head_options["scale"]
        cap = self.head_options["softcap"]
        return z if cap is None else mx.tanh(z / cap) * cap

    def check_length(self, length: int) -> None:
        """Raises ConfigError if a row is longer than a sliding window that mlx-lm's model ignores."""
        if self.window is not None and length > self.window:
            raise ConfigError(
                f"a row has {length} tokens; {self.name} has a sliding window of {self.window}, which mlx-lm leaves "
                "out, so its log-probs are right up to that length only. Take shorter prompts or responses"
            )


def _flat(tree: Any) -> list[tuple[str, Any]]:
    """`tree_flatten`, typed for calls without a destination."""
    return cast("list[tuple[str, Any]]", tree_flatten(tree))


def _head_of(lm: nn.Module, decoder: nn.Module, name: str) -> nn.Module:
    tied = getattr(getattr(lm, "args", None), "tie_word_embeddings", False)
    head = lm.get("lm_head") if not tied else None
    if head is None:
        embeddings = (nn.Embedding, nn.QuantizedEmbedding)
        tables = [m for m in decoder.children().values() if isinstance(m, embeddings)]
        head = max(tables, key=lambda m: m.weight.shape[0], default=None)
    if head is None or not isinstance(head, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
        raise ConfigError(f"the head of {name} is {type(head).__name__}; expected a linear layer or a tied embedding")
    return head


@contextlib.contextmanager
def global_state_kept() -> Iterator[None]:
    """Protects the limit of open files and MLX's random state while mlx-lm loads a model."""
    # mlx-lm lowers the limit of open files at import, and new layers draw from MLX's global random stream.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    random: Any = mx.random  # its `state` is a list of arrays
    key = np.array(random.state[0])
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.models.cache
        import mlx_lm.tuner.utils
        import mlx_lm.utils  # noqa: F401
    finally:
        resource.setrlimit = set_limit
    try:
        yield
    finally:
        state = random.state[0]
        state[:] = mx.array(key)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


def load_scorer(config: ModelConfig, seed: int, *, frozen: bool = False) -> Scorer:
    """Loads the model of a folder or hub name, and compares it with transformers if PyTorch is installed.

    Args:
      frozen: whether nothing will be trained. All parameters are then in the compute dtype, or quantized as stored.
    Raises: ConfigError: no such folder, no config.json, no safetensors, an unknown architecture, RoPE or another
      setting that mlx-lm computes differently, weights missing from the files, full training of a quantized model,
      adapter targets that match nothing.
    """
    folder = local_folder(config)
    with global_state_kept():
        loaded = pretrained(config, folder)
        lm = loaded.lm
        compute = getattr(mx, config.compute_dtype)
        # Full fine-tuning steps float32 parameters: a step of 1e-6 of a bfloat16 number is lost to rounding.
        lm.set_dtype(compute if config.lora_rank or frozen else mx.float32)
        if config.lora_rank:
            add_adapters(lm, config, seed)
        elif frozen:
            lm.freeze()
        elif any("scales" in module for module in lm.modules()):
            raise ConfigError(
                f"model.path {config.path!r} is quantized, and its quantized weights cannot be trained: set "
                "model.lora_rank, or take the model without quantization"
            )
    take_positions(lm)
    if config.gradient_checkpointing:
        for layer in lm.layers:
            _recompute(layer)
    _evaluate(lm)
    return Scorer(loaded, compute)


def load_reference(config: ModelConfig) -> Scorer:
    """Loads the initial model, frozen, in the compute dtype. Its head stays float32, like the trained model's."""
    with global_state_kept():
        loaded = pretrained(config, local_folder(config))
    lm = loaded.lm
    lm.set_dtype(mx.float32)
    lm.freeze()
    scorer = Scorer(loaded, getattr(mx, config.compute_dtype))
    if scorer.dtype != mx.float32:
        wide = copy.copy(scorer.head)  # keeps the float32 weight when the model is cast
        lm.set_dtype(scorer.dtype)
        scorer.head = wide
    take_positions(lm)
    _evaluate(lm)
    return scorer


def _evaluate(lm: nn.Module) -> None:
    """Evaluates all lazy arrays of the model, RoPE tables included; `parameters()` leaves those out."""
    mx.eval([v for module in lm.modules() for v in module.values() if isinstance(v, mx.array)])


def _recompute(layer: nn.Module) -> None:
    """Makes the backward pass recompute this layer's activations. mlx-lm's own function changes the whole class."""
    plain = type(layer)

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, **options: Any) -> mx.array:
        def inner(parameters: dict[str, Any], x: mx.array) -> mx.array:
            self.update(parameters)
            result: mx.array = plain.__call__(self, x, mask, cache, **options)
            return result

        trained = self.trainable_parameters()
        result: mx.array = mx.checkpoint(inner)(trained, x)
        self.update(trained)
        return result

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def inputs(arrays: layout.Arrays) -> dict[str, mx.array]:
    """Returns the arrays of a micro-batch on MLX's device."""
    names = ("ids", "positions", "segments", "last", "predict", "targets")
    return {name: mx.array(getattr(arrays, name).astype(np.int32)) for name in names}
