"""The tensors of a model's folder: their files, how mlx-lm converts them, and the inverse conversion for exports.

mlx-lm renames, stacks, splits and shifts tensors when it loads them (`sanitize`). `Origin` inverts this map with
`mx.vjp`. It finds the tensors that mlx-lm drops, and converts trained weights back to the files' names and shapes.
"""

import ast
import contextlib
import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import weight_files

_UNUSED = re.compile(
    r"rotary_emb\.|inv_freq$|\.(attn|attention)\.(masked_)?bias$|position_ids$|(^|[._])mtp([._]|$)|mtp_|eh_proj|\.enorm|\.hnorm"
    r"|(^|\.)(vision|visual|audio|multi_modal|embed_vision|embed_audio|image_newline|vpm|sound)"
)
"""Tensors that no text model of transformers reads: tables, masks, heads for further tokens, other modalities."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder with config.json, code and the weights that transformers reads.

    mlx-lm would read every file model*.safetensors of the original folder.
    """
    with tempfile.TemporaryDirectory(prefix="gvpo-mlx-") as temporary:
        links = {path.name: path for path in (folder / "config.json", *folder.glob("*.py"))} | {
            f"model-{i:05d}.safetensors": path for i, path in enumerate(weight_files.weight_files(folder))
        }
        for name, target in links.items():
            (Path(temporary) / name).symlink_to(target.resolve())
        yield Path(temporary)


class Origin:
    """The map from the tensors of the files to the weights of mlx-lm's model."""

    def __init__(self, lm: nn.Module, folder: Path) -> None:
        """`lm`: unchanged since `load_model` returned it."""
        make: Any = type(lm)
        self._fresh = functools.partial(make, lm.args)
        self._files = weight_files.tensors(folder)
        paths = {tensor.path for tensor in self._files.values()}
        loaded = (cast("tuple[Any, dict[str, str]]", mx.load(str(path), return_metadata=True)) for path in paths)
        formats = {facts.get("format") for _, facts in loaded}
        self.quantized = any("scales" in module for module in lm.modules())
        self.mlx_format = self.quantized or formats == {"mlx"}
        # Shapes of the tensors to differentiate; masks and position ids are excluded.
        self._template = {n: t.shape for n, t in self._files.items() if t.dtype in ("F64", "F32", "F16", "BF16")}

    def _map(self, template: Mapping[str, tuple[int, ...]], values: Sequence[mx.array]) -> dict[str, mx.array]:
        model, tensors = self._fresh(), dict(zip(template, values, strict=True))
        weights: dict[str, mx.array] = model.sanitize(tensors) if hasattr(model, "sanitize") else tensors
        return weights

    def used(self) -> dict[str, tuple[float, float]]:
        """Returns for each tensor how often its elements are read: lowest and highest; (1, 1) if each is read once."""
        zeros = [mx.zeros(shape) for shape in self._template.values()]
        names = list(self._map(self._template, zeros))

        def converted(*values: mx.array) -> list[mx.array]:
            mapped = self._map(self._template, values)
            return [mapped[name] for name in names]

        ones = [mx.broadcast_to(mx.array(1.0), value.shape) for value in converted(*zeros)]
        _, counts = mx.vjp(converted, zeros, ones)
        return {
            name: (float(count.min()), float(count.max()))
            for name, count in zip(self._template, counts, strict=True)
            if count.size
        }

    def check(self, config: Mapping[str, Any]) -> None:
        """Rejects a folder if mlx-lm's model drops or changes tensors that transformers reads.

        Raises: ConfigError: a tensor is dropped, multiplied or read twice; the message names the first one.
        """
        if self.quantized:
            return  # only mlx-lm reads its own format: there is nothing to compare with
        layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1 << 30)
        tied = bool(config.get("tie_word_embeddings"))
        for name, (least, most) in self.used().items():
            layer = re.search(r"(?:layers|\bh)\.(\d+)\.", name)
            beyond = layer is not None and int(layer[1]) >= layers
            if (least, most) == (1.0, 1.0):
                continue
            if most == 0.0 and (_UNUSED.search(name) or beyond or (tied and "lm_head" in name)):
                continue  # for a tied model, `settings.check_head` compares the head
            kind = config.get("model_type")
            if most == 0.0:
                raise ConfigError(
                    f"mlx-lm's {kind} drops {name}, which transformers reads. gvpo_torch takes this model"
                )
            what = "drops a part of" if least == 0.0 else f"multiplies by {most:g} or reads {most:g} times"
            raise ConfigError(
                f"mlx-lm's {kind} {what} {name} when it loads the file: its steps would differ from the model's. "
                "gvpo_torch takes this model"
            )

    def tensors(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Returns the weights under the names and shapes of the files, lazy. Unread tensors come from the files.

        mlx-lm's map is y = A x + b, where A selects elements. Its inverse is x = A^T (y - b) if each element is read
        once.

        Args:
          weights: unpacked, by mlx-lm's names; names that the model does not have are ignored.
        Raises: ConfigError: a weight that mlx-lm reads is missing.
        """
        if self.mlx_format:
            return self._split_experts(dict(weights))
        zeros = [mx.zeros(shape) for shape in self._template.values()]
        shift = self._map(self._template, zeros)
        names = list(shift)
        lacking = sorted(set(names) - weights.keys())
        if lacking:
            raise ConfigError(f"the export has no {lacking[0]}, which mlx-lm reads")

        def converted(*values: mx.array) -> list[mx.array]:
            mapped = self._map(self._template, values)
            return [mapped[name] for name in names]

        differences = [weights[name].astype(mx.float32) - shift[name] for name in names]
        _, back = mx.vjp(converted, zeros, differences)
        tensors = dict(zip(self._template, back, strict=True))
        counts = self.used()
        for name in self._files:
            if name not in tensors or counts.get(name, (1.0, 1.0))[1] == 0.0:
                tensors[name] = self.stored(name)
        return tensors

    def _split_experts(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Splits stacked experts of MLX's own format into one tensor each, if mlx-lm reads them back unchanged."""
        split: dict[str, mx.array] = {}
        for name, value in weights.items():
            stacked = re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name)
            if stacked is None:
                split[name] = value
            else:
                split |= {f"{stacked[1]}.experts.{e}.{stacked[2]}.weight": value[e] for e in range(value.shape[0])}
        if len(split) == len(weights):
            return weights
        shapes = {name: value.shape for name, value in split.items()}
        try:
            read_back = self._map(shapes, list(split.values()))
            same = read_back.keys() == weights.keys() and all(
                value.shape == weights[name].shape and bool(mx.array_equal(value, weights[name]))
                for name, value in read_back.items()
            )
        except (KeyError, ValueError, TypeError):
            same = False
        return split if same else weights

    def stored(self, name: str) -> mx.array:
        """Returns a tensor as it is in the files."""
        return cast("dict[str, mx.array]", mx.load(str(self._files[name].path)))[name]


def freeze_constants(lm: nn.Module, kind: str) -> None:
    """Freezes arrays that are buffers or parameters without gradient in transformers but trainable in mlx-lm."""
    names = constants(kind)
    for module in lm.modules():
        if not type(module).__module__.startswith("mlx_lm"):
            continue
        keys = [key for key, value in module.items() if key in names and isinstance(value, mx.array)]
        if keys:
            module.freeze(recurse=False, keys=keys)


@functools.cache
def constants(kind: str) -> frozenset[str]:
    """Returns the names of buffers and of parameters without gradient in transformers' source of this model type.

    The source is read as text, because PyTorch may be missing. `weight` and `bias` are excluded.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None
    root = Path(package.origin).parent
    name = kind.replace("-", "_")
    names: set[str] = set()
    for path in (root / "activations.py", *sorted((root / "models" / name).glob("modeling_*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                function = node.value.func
                constructor = function.attr if isinstance(function, ast.Attribute) else ""
                untrained = any(
                    k.arg == "requires_grad" and isinstance(k.value, ast.Constant) and k.value.value is False
                    for k in node.value.keywords
                )
                if constructor == "Buffer" or (constructor == "Parameter" and untrained):
                    names |= {t.attr for t in node.targets if isinstance(t, ast.Attribute)}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                first = node.args[0] if node.args else None
                if node.func.attr == "register_buffer" and isinstance(first, ast.Constant):
                    names.add(str(first.value))
    return frozenset(names - {"weight", "bias"})
