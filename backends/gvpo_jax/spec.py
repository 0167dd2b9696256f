"""A decoder's shape and settings as plain data, for which programs are compiled, and its parameters' names."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYERS = "model.layers."
LAYER = LAYERS + "*."
NO_WINDOW = 2**30
_LAYER, _EXPERT = "*", "#"


@dataclass(frozen=True)
class Family:
    """How the models of one transformers model type are built, apart from the settings in config.json."""

    architecture: str
    norms: tuple[str | None, ...] = ("input_layernorm", None, "post_attention_layernorm", None)
    """Norms before attention, after it, before the MLP, and after it."""
    offset: bool = False  # norms multiply by 1 + weight
    wide_norms: bool = False  # norms multiply by the weight in float32, then round
    qk_norms: str = ""  # norms of queries and keys: "head" per head, "row" over all heads together
    value_norm: bool = False  # values have a norm without a weight
    biases: str = ""  # which of q, k, v, o have a bias if `attention_bias` is set
    fixed_biases: str = ""  # which of them always have a bias
    mlp_bias: bool = False  # `mlp_bias` is read
    fused: bool = False  # q, k, v are one projection
    fused_mlp: bool = False  # gate and up are one projection
    windows: str = ""  # which layers have a window: "" none, "all", "switched" by use_sliding_window, "types" by type
    activation: str = "hidden_act"  # name of the setting
    attention_scale: str = "width"  # or "one", or the name of a setting: query_pre_attn_scalar, attention_multiplier
    embedding_scale: str = ""  # "root" of the hidden size, or the name of a setting
    attention_cap: bool = False  # `attn_logit_softcapping` is read
    logit_cap: bool = False  # `final_logit_softcapping` is read
    partial: bool = False  # `partial_rotary_factor` is read
    interleaved: bool = False  # RoPE rotates neighbouring numbers of a head, not its two halves
    sparse: bool = False  # layers with experts
    layer_scalar: bool = False  # each layer ends with a constant factor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of some of the layers."""

    frequencies: tuple[float, ...]  # radians per position; one for two rotated numbers of a head
    scale: float = 1.0  # of cos and sin
    limit: int = 0  # longest row for which these frequencies hold, tokens; 0: no limit


@dataclass(frozen=True)
class Layer:
    """Settings that may differ from layer to layer."""

    width: int  # of a head
    key_heads: int
    intermediate: int
    window: int = NO_WINDOW  # how many tokens back it sees
    rope: int = 0  # index in Spec.ropes
    sparse: bool = False  # a mixture of experts
    values: bool = True  # False: the values are the keys before norm and RoPE
    source: int | None = None  # layer from which it reads keys and values; None: it has its own


@dataclass(frozen=True)
class Spec:
    """A model's shape and settings. Hashable, so that programs are compiled once per spec."""

    family: Family
    vocabulary: int
    hidden: int
    heads: int
    eps: float
    tied: bool
    each: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    biases: str = ""  # which of q, k, v, o have a bias
    mlp_bias: bool = False
    activation: str = "silu"
    attention_scale: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    experts: int = 0
    experts_a_token: int = 0
    expert_width: int = 0
    experts_normalised: bool = False
    inputs: int = 0  # size of a layer's own embedding of each token (Gemma 4); 0: none
    inputs_vocabulary: int = 0

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.each)

    @property
    def head_share(self) -> float:
        """Operations of the head per token, as a share of those of the layers without attention; approximate."""
        return self.vocabulary / (12 * self.hidden * self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same parameter shapes. They are then stacked, and only one layer is compiled."""
        alike = {replace(layer, window=0, rope=0) for layer in self.each}
        turning = {len(rope.frequencies) for rope in self.ropes}
        return len(alike) == 1 and len(turning) == 1 and self.each[0].source is None

    @property
    def windows(self) -> tuple[int, ...]:
        """Sliding window of each layer, tokens; NO_WINDOW: none."""
        return tuple(layer.window for layer in self.each)

    @property
    def cache_numbers(self) -> int:
        """How many numbers the keys and values of one token have, over all layers with keys and values of their own."""
        return sum(2 * layer.key_heads * layer.width for layer in self.each if layer.source is None)

    @property
    def longest(self) -> int:
        """Longest row in tokens for which RoPE's frequencies hold; 0: no limit."""
        return min((rope.limit for rope in self.ropes if rope.limit), default=0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape. `*` stands for the layer's number, `#` for the expert's; each is a leading axis."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocabulary, self.hidden), NORM: (self.hidden,)}
        if not self.tied:
            shapes[HEAD] = (self.vocabulary, self.hidden)
        if self.inputs:
            wide = self.layers * self.inputs
            shapes["model.embed_tokens_per_layer.weight"] = (self.inputs_vocabulary, wide)
            shapes["model.per_layer_model_projection.weight"] = (wide, self.hidden)
            shapes["model.per_layer_projection_norm.weight"] = (self.inputs,)
        if self.uniform:
            layer = self.layer_shapes(self.each[0])
            return shapes | {LAYER + name: (self.layers, *shape) for name, shape in layer.items()}
        for i, kind in enumerate(self.each):
            shapes |= {f"{LAYERS}{i}.{name}": shape for name, shape in self.layer_shapes(kind).items()}
        return shapes

    def layer_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape for one layer."""
        h, family = self.hidden, self.family
        queries, keys = self.heads * layer.width, layer.key_heads * layer.width
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (h,) for name in family.norms if name}
        if family.fused:
            shapes["self_attn.qkv_proj.weight"] = (queries + 2 * keys, h)
            shapes["self_attn.o_proj.weight"] = (h, queries)
        else:
            projections = "qkvo" if layer.values else "qko"
            for which in projections if layer.source is None else "qo":
                size = queries if which in "qo" else keys
                shapes[f"self_attn.{which}_proj.weight"] = (h, size) if which == "o" else (size, h)
                if which in self.biases:
                    shapes[f"self_attn.{which}_proj.bias"] = (h if which == "o" else size,)
        if family.qk_norms:
            sizes = {"q": queries, "k": keys} if family.qk_norms == "row" else dict.fromkeys("qk", layer.width)
            for which in "qk" if layer.source is None else "q":
                shapes[f"self_attn.{which}_norm.weight"] = (sizes[which],)
        if self.inputs:
            shapes["per_layer_input_gate.weight"] = (self.inputs, h)
            shapes["per_layer_projection.weight"] = (h, self.inputs)
            shapes["post_per_layer_input_norm.weight"] = (h,)
        if family.layer_scalar:
            shapes["layer_scalar"] = (1,)
        return shapes | self._mlp_shapes(layer)

    def _mlp_shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        h, m = self.hidden, layer.intermediate
        if layer.sparse:
            shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (self.experts, h)}
            m = self.expert_width
            for which, shape in {"gate": (m, h), "up": (m, h), "down": (h, m)}.items():
                shapes[f"mlp.experts.#.{which}_proj.weight"] = (self.experts, *shape)
            return shapes
        if self.family.fused_mlp:
            return {"mlp.gate_up_proj.weight": (2 * m, h), "mlp.down_proj.weight": (h, m)}
        shapes = {}
        for which, shape in {"gate": (m, h), "up": (m, h), "down": (h, m)}.items():
            shapes[f"mlp.{which}_proj.weight"] = shape
            if self.mlp_bias:
                shapes[f"mlp.{which}_proj.bias"] = shape[:1]
        return shapes


def leading(name: str) -> int:
    """Number of leading axes of a parameter for layers and experts."""
    return (_LAYER in name) + (_EXPERT in name)


def fill(name: str, place: tuple[int, ...]) -> str:
    """Returns the name in the files of the matrix or vector at index `place` of a parameter's leading axes."""
    for mark, number in zip([m for m in (_LAYER, _EXPERT) if m in name], place, strict=True):
        name = name.replace(mark, str(number))
    return name


def file_names(name: str, shape: tuple[int, ...]) -> Iterator[str]:
    """Yields all names in the files that make up a parameter."""
    for place in itertools.product(*(range(size) for size in shape[: leading(name)])):
        yield fill(name, place)


def is_linear(name: str) -> bool:
    """Whether a parameter is the matrix of a linear layer for LoRA: not an embedding, head, router or expert."""
    if not name.endswith(".weight") or "norm" in name or "embed_tokens" in name or name == HEAD:
        return False
    return "experts" not in name and not name.endswith("mlp.gate.weight")
