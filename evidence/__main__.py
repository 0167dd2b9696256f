"""Runs the claims; writes docs/evidence.md, docs/evidence_training.md, pictures, and docs/evidence/results.json.

python -m evidence               all claims, minutes on 2 cores
python -m evidence 2 7           claims 2 and 7; the others keep their results
python -m evidence page          the pages and the pictures from the saved results
"""

import importlib
import json
import re
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

CLAIMS = ("1_optimum", "2_bias", "3_misaligned", "4_parts", "5_stability", "6_off_policy", "7_regret", "8_plus_plus")
DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "evidence" / "results.json"
PAGES = {"evidence.md": CLAIMS[:4], "evidence_training.md": CLAIMS[4:]}
INTRODUCTION = """# Evidence

Each claim of the paper as an experiment. `nox -s paper` runs claims 1 to 8 in two minutes on two CPU cores and writes
this page, [Evidence: training](evidence_training.md), their pictures and [results.json](evidence/results.json).
`python -m evidence 2 7` repeats only claims 2 and 7. The code is in [evidence](../evidence/__main__.py), one file per
claim. Every number comes from the run, and the run fails if a sentence under "Shows" is no longer true. Claims that the
experiments do not confirm and baselines that win are reported too.

The policies are softmax tables over a few responses, so pi\\*, KL and expectations are exact sums. An "exact step" is
the expectation of an objective's step over all groups that a sampler can draw. The steps come from
`objective_coefficients`, as in `gvpo train`. J, pi\\* and the equation and section numbers are the paper's ([The
paper](paper.md)). [Objectives](objectives.md) describes the methods.
"""
TRAINING = """# Evidence: training

Claims 5 to 9. [Evidence](evidence.md) has claims 1 to 4 and explains how to run them.
"""
REAL = """## 9. A real model

`nox -s paper -- real` trains SmolLM2-135M-Instruct on two reasoning-gym tasks with GVPO, GRPO, RLOO and reject
sampling. Every method gets the same number of samples, on-policy and from a policy 4 steps old, with three seeds each
and its own tuned learning rate. This takes hours on two cores. Each finished run is saved, so the same command resumes.
[Evidence: a real model](evidence_real.md) has the results.
"""


def claim(name: str) -> ModuleType:
    return importlib.import_module(f"evidence.claim{name}")


def pages(results: dict[str, Any]) -> dict[str, str]:
    """Returns file in docs/ -> its text, made from the results."""
    out = {}
    for file, names in PAGES.items():
        parts = [INTRODUCTION if names[0] == CLAIMS[0] else TRAINING]
        for name in names:
            module = claim(name)
            picture = f"![{module.TITLE.partition('. ')[2]}](evidence/claim{name}.png)"
            parts.append(f"## {module.TITLE}\n\n{_filled(module.text(results[name]))}\n\n{picture}\n")
        out[file] = "\n".join(parts)
    out["evidence_training.md"] += "\n" + REAL
    return out


def _filled(text: str) -> str:
    """Returns the text with wrapped paragraphs and unchanged tables. "Does not show:" starts a paragraph."""
    paragraphs = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("|"):
            paragraphs.append(paragraph)
            continue
        parts = re.split(r"\n(?=Does not show:)", paragraph)
        paragraphs += [textwrap.fill(part, 125, break_long_words=False, break_on_hyphens=False) for part in parts]
    return "\n\n".join(paragraphs)


def broken(results: dict[str, Any]) -> list[str]:
    """Returns the sentences of the pages that the results do not support."""
    return [
        f"claim {name[0]}: {statement}"
        for name in CLAIMS
        for statement, true in claim(name).holds(results[name]).items()
        if not true
    ]


def draw(name: str, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = getattr(claim(name), "PANELS", 1)
    figure, panels = pyplot.subplots(1, count, figsize=(1 + 4 * count, 3.2), layout="constrained")
    claim(name).draw(result, panels)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "evidence" / f"claim{name}.png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["real"]:
        from evidence.real import main as real

        return real(arguments[1:])
    chosen = [name for name in CLAIMS if not arguments or name[0] in arguments]
    if unknown := [a for a in arguments if a != "page" and a not in [name[0] for name in CLAIMS]]:
        print(f"there is no claim {', '.join(unknown)}; expected 1 to {len(CLAIMS)}, page or real", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in chosen:
        start = time.perf_counter()
        results[name] = json.loads(json.dumps(claim(name).run()))
        print(f"claim {name}: {time.perf_counter() - start:.0f} s", flush=True)
    if missing := [name[0] for name in CLAIMS if name not in results]:
        print(f"no results of claim {', '.join(missing)} yet; run python -m evidence", file=sys.stderr)
        return 2
    RESULTS.parent.mkdir(exist_ok=True)
    # One claim per line. The order inside a claim is the order of its table and legend.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(results[name])}" for name in CLAIMS)
    RESULTS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    for name in chosen or CLAIMS:
        draw(name, results[name])
    for file, content in pages(results).items():
        (DOCS / file).write_text(content, encoding="utf-8")
    for sentence in broken(results):
        print(f"no longer true: {sentence}", file=sys.stderr)
    return 1 if broken(results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
