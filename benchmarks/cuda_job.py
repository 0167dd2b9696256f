"""Steps of job J1 of docs/scaling.md on one GPU: `gvpo train` with Qwen2.5-1.5B's shape and random weights.

python benchmarks/cuda_job.py                       one step of 64 prompts x 8 responses of 2,048 tokens; needs CUDA
python benchmarks/cuda_job.py --steps 2 --lora 16   two steps of LoRA

Random weights almost never draw the end token, so nearly all responses have their full length.
"""

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_step import PROMPT, QWEN, RESPONSE, SMALL, make_folder

CONFIG = """
run = {{ folder = "run", backend = "torch", steps = {steps} }}
model = {{ path = "model", dtype = "bfloat16", gradient_checkpointing = true, lora_rank = {lora} }}
data = {{ train = "rows.jsonl" }}
rollout = {{ prompts = {prompts}, responses = 8, max_tokens = {response} }}
objective = {{ beta = 0.1 }}
optimizer = {{ micro_batch_tokens = 16384 }}
rewards = {{ even = {{ function = "reward.py:even" }} }}
"""
REWARD = """
def even(completions: list[str]) -> list[float]:
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]
"""
SHOWN = ("seconds/generate", "seconds/score", "seconds/update", "seconds/step", "tokens/sampled", "tokens/computed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape on any device, to try the script")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step, with 8 responses each")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapter rank; default: full training")
    options = parser.parse_args()
    prompt, response = (16, 32) if options.small else (PROMPT, RESPONSE)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folder(folder / "model", SMALL if options.small else QWEN, "cpu" if options.small else "cuda")
        rows = [{"prompt": "".join(draw.choices(string.ascii_letters, k=prompt))} for _ in range(options.prompts)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "reward.py").write_text(REWARD)
        settings = {"steps": options.steps, "lora": options.lora, "prompts": options.prompts, "response": response}
        (folder / "config.toml").write_text(CONFIG.format(**settings))
        subprocess.run([sys.executable, "-m", "gvpo", "train", "config.toml"], cwd=folder, check=True)
        for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["kind"] == "train":
                figures = {name: round(record[name], 2) for name in SHOWN if name in record}
                figures["tokens sampled a second"] = round(record["tokens/sampled"] / record["seconds/generate"])
                figures["tokens updated a second"] = round(record["tokens/computed"] / record["seconds/update"])
                figures["peak GiB"] = round(record["memory/peak"] / 2**30, 1)
                print(json.dumps({"step": record["step"]} | figures))


if __name__ == "__main__":
    main()
