"""docs/models.md from the results of `family_trial`: which families each backend trains exactly, which it refuses."""

import json
import re
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from places import ROOT

PAGE = ROOT / "docs" / "models.md"
BACKENDS = ("torch", "jax", "mlx")
GROUPS: dict[str, tuple[str, ...]] = {
    "Dense": (
        *("llama", "qwen2", "qwen3", "mistral", "ministral", "ministral3", "gemma", "gemma2", "gemma3_text"),
        *("gemma3n_text", "gemma4_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "granite", "glm", "glm4"),
        *("cohere", "cohere2", "seed_oss", "apertus", "exaone4", "starcoder2", "stablelm", "nanochat", "gpt2"),
        *("gpt_neox", "falcon", "opt", "bloom"),
    ),
    "Mixture of experts": (
        *("qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"),
        *("llama4_text", "olmoe", "granitemoe", "ernie4_5_moe", "phimoe", "minimax_m2", "dots1", "dbrx"),
    ),
    "Hybrid and recurrent": (
        *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe"),
        *("nemotron_h", "bamba", "jamba", "zamba2", "kimi_linear", "minimax", "recurrent_gemma", "mamba", "mamba2"),
    ),
    "Images and text, trained on text": (
        *("gemma3", "gemma4", "gemma4_unified", "mistral3", "mistral4", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        *("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "kimi_k25", "glm4v", "glm4v_moe", "internvl", "lfm2_vl", "smolvlm"),
        *("idefics3", "llava", "llava_next", "llava_onevision", "paligemma", "aya_vision", "cohere2_vision", "aria"),
        *("ernie4_5_vl_moe", "minimax_m3_vl", "exaone4_5", "phi4_multimodal", "fuyu"),
    ),
}
# In transformers' list of causal models, but made for something else: encoders, decoders of translation and speech.
OTHER = (
    *("bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"),
    *("cpmant", "data2vec-text", "electra", "ernie", "git", "got_ocr2", "marian", "mbart", "megatron-bert", "moshi"),
    *("moss_transcribe_diarize", "mvp", "pegasus", "plbart", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
    *("roformer", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"),
)
# Drafters of another model, and what no tiny model can be made of with sizes alone.
NOT_TRIED = (
    *("blt", "cohere_compass_text", "dots3_note", "emu3", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant"),
    *("mllama", "musicgen", "musicgen_melody", "prophetnet", "reformer", "xglm", "xlnet", "xmod", "zamba"),
)
INTRODUCTION = """# Models

This page lists which transformers model families each backend trains exactly. `nox -s models` tested them and wrote the
page. For each family it creates a two-layer model with random weights from the configuration class of transformers, and
turns on every setting that an implementation can easily miss: windows, caps, multipliers, norms other than one.
No released checkpoint was used.

**exact** means that all of these hold, for full fine-tuning and for LoRA:

- Log-probs of a batch of unequal rows are within {within} nat per response of transformers' float64 forward pass.
- Each sampled token is the one that the row's random number selects from that distribution, within {drawn} of the mass.
- The gradient norm is within {norm} of transformers', and a step changes the parameters.
- After the step, `gvpo export` writes a folder that transformers loads and scores the same.

**refused**: loading ends with a one-line error. The number refers to the reasons below, each quoted for one family.
**window**: exact while rows are no longer than the model's sliding window; longer rows are rejected.
**full**: exact for full fine-tuning only, not for LoRA. An empty cell was not tried.
The name of a family is its `model_type` in config.json.
"""


def names() -> list[str]:
    """Every family that is tried."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    grouped = [name for group in GROUPS.values() for name in group]
    rest = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in {*grouped, *OTHER, *NOT_TRIED}]
    return [*grouped, *rest, *OTHER]


def write(out: Path, limits: dict[str, float], page: Path = PAGE) -> None:
    """The page from the results in `out`; families without a result are left out."""
    results = {
        name: json.loads((out / f"{name}.json").read_text()) for name in names() if (out / f"{name}.json").is_file()
    }
    page.write_text(text_of(results, limits))


def text_of(results: dict[str, dict[str, Any]], limits: dict[str, float]) -> str:
    """The page's text."""
    reasons = _Reasons()
    lines = [INTRODUCTION.format(**{name: f"{value:g}" for name, value in limits.items()})]
    lines += [_summary(results), ""]
    for title, members in GROUPS.items():
        lines += [f"## {title}", "", "| family | torch | JAX | MLX |", "|---|---|---|---|"]
        for name in members:
            if name in results and results[name]["made"]["state"] == "made":
                lines.append(f"| {name} | {' | '.join(_cells(results[name], reasons))} |")
        lines.append("")
    grouped = {name for group in GROUPS.values() for name in group}
    lines += ["## All others of transformers' causal models", ""]
    lines += _joined(results, [name for name in results if name not in {*grouped, *OTHER}], reasons)
    lines += [
        "## Encoders, and decoders of translation and speech",
        "",
        "Transformers lists these as causal models, but they are not chat models.",
        "",
    ]
    lines += _joined(results, [name for name in results if name in OTHER], reasons)
    lines += ["## Reasons", "", *reasons.lines(), ""]
    unmade = sorted({n for n in results if results[n]["made"]["state"] != "made"} | set(NOT_TRIED))
    lines += ["## Not tried", "", f"No tiny model could be created for: {', '.join(unmade)}.", ""]
    return "\n".join(lines)


def _joined(results: dict[str, dict[str, Any]], members: list[str], reasons: "_Reasons") -> list[str]:
    """A table with families of the same cells in one row."""
    rows = defaultdict(list)
    for name in members:
        if results[name]["made"]["state"] == "made":
            rows[tuple(_cells(results[name], reasons))].append(name)
    ordered = sorted(rows.items(), key=lambda row: (-sum(cell == "exact" for cell in row[0]), row[1]))
    table = [f"| {', '.join(families)} | {' | '.join(cells)} |" for cells, families in ordered]
    return ["| families | torch | JAX | MLX |", "|---|---|---|---|", *table, ""]


def _cells(result: dict[str, Any], reasons: "_Reasons") -> list[str]:
    return [_cell(result.get(backend), backend, reasons) for backend in BACKENDS]


def _cell(found: dict[str, Any] | None, backend: str, reasons: "_Reasons") -> str:
    if found is None:
        return ""
    if found["state"] == "exact":
        lora = found.get("lora", {})
        word = "window" if found.get("window") else "exact"
        return word if lora.get("state") == "exact" else f"full {reasons.number(backend, lora.get('reason', ''))}"
    word = {"refused": "refused", "fails": "**fails**", "wrong": "**wrong**"}[found["state"]]
    return f"{word} {reasons.number(backend, found['reason'])}"


class _Reasons:
    """Numbers reasons that differ in names and figures alone the same."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}
        self.said: list[str] = []

    def number(self, backend: str, reason: str) -> int:
        """The number of a reason, new where it is new."""
        reason = re.sub(r"(the model of |of )?model\.path '[^']*'|/tmp/\S+?(?=[:,\s]|$)", "the model", reason).replace(
            "|", "/"
        )
        reason = re.sub(r"\s+", " ", reason)
        kind = re.sub(r"cannot be loaded: .*", "cannot be loaded", re.sub(r"\([^)]*\)", "", reason))
        kind = re.sub(r"(RoPE of|activation of|mlx-lm's) \w+", r"\1 *", kind)
        kind = re.sub(r"\w*[A-Z]\w+|'[^']*'|[\d.e-]*\d|[a-z0-9]+_[a-z0-9_]+|\w+\.[A-Za-z]\S+", "*", kind)
        key = (backend, kind[:70])
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers) + 1
            self.said.append(f"{len(self.numbers)}. {backend}: {_cut(reason)}")
        return self.numbers[key]

    def lines(self) -> list[str]:
        return self.said


def _cut(text: str, limit: int = 230) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."


def _summary(results: dict[str, dict[str, Any]]) -> str:
    made = [result for result in results.values() if result["made"]["state"] == "made"]
    parts = []
    for backend in BACKENDS:
        tried = [r[backend]["state"] for r in made if backend in r]
        if tried:
            bad = sum(state in ("fails", "wrong") for state in tried)
            also = f", {bad} neither" if bad else ""
            parts.append(f"{backend}: {tried.count('exact')} exact, {tried.count('refused')} refused{also}")
    return f"Of {len(made)} families, {'; '.join(parts)}.\n{_tried(made)}"


def _tried(made: list[dict[str, Any]]) -> str:
    """When and with which versions each column was tried; results of several runs are counted apart."""
    lines = []
    for backend in BACKENDS:
        runs = Counter(result[backend].get("tried", "not recorded when") for result in made if backend in result)
        lines += [f"{backend} ({count} families) {tried}" for tried, count in sorted(runs.items())]
    return f"Tried: {'; '.join(lines)}."


def versions(backend: str) -> str:
    """The installed packages that a result of this backend depends on; torch computes the reference."""
    found = []
    for package in ("transformers", "torch", *{"torch": ("peft",), "jax": ("jax",), "mlx": ("mlx", "mlx-lm")}[backend]):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
