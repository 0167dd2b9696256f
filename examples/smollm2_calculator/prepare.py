"""Makes the demo's model and data: SmolLM2-135M-Instruct as a Hugging Face folder, and products as JSONL.

The model is that of examples/smollm2_arithmetic. Its prepare.py makes the model if it is missing.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

MODEL, CACHE = Path(".cache/smollm2"), Path(".cache/smollm2_calculator")
TRAIN, HELD_OUT = CACHE / "train.jsonl", CACHE / "held_out.jsonl"
PROBLEMS, HELD_OUT_PROBLEMS = 800, 120
ASK = "What is {} * {}?"
EXAMPLE = [  # without this conversation the model never calls the calculator and cannot learn
    {"role": "system", "content": "Use the calculator."},
    {"role": "user", "content": ASK.format(12, 34)},
    {"role": "assistant", "content": "calc(12*34)"},
    {"role": "tool", "content": "408"},
    {"role": "assistant", "content": "408"},
]


def prepare() -> None:
    """Writes the model, if it is missing, and the problems."""
    if not (MODEL / "config.json").exists():
        script = Path(__file__).parent.parent / "smollm2_arithmetic" / "prepare.py"
        subprocess.run([sys.executable, script], check=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(11, 100) for b in range(a, 100) if (a, b) != (12, 34)]
    order = np.random.default_rng(12).permutation(len(pairs))[: PROBLEMS + HELD_OUT_PROBLEMS]
    rows = [
        {"prompt": [*EXAMPLE, {"role": "user", "content": ASK.format(*pairs[i])}], "answer": str(np.prod(pairs[i]))}
        for i in order.tolist()
    ]
    for path, chosen in ((HELD_OUT, rows[:HELD_OUT_PROBLEMS]), (TRAIN, rows[HELD_OUT_PROBLEMS:])):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    prepare()
