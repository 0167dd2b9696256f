"""transformers' continuous batching as the sampler: the class of docs/engines.md, on the module that is trained."""

import json
import re
from pathlib import Path

import pytest
from places import DEVICE, ROOT
from required import require
from tiny_models import make_model

from gvpo_core.training import Config, ModelConfig, OptimizerConfig, RolloutConfig, RunConfig, load_policy, train
from gvpo_core.training.samplers import SamplerError

require(subject="torch")

ROWS = [{"prompt": text} for text in ("one two", "three", "one two")]


def batched():
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Batched" in block]
    names: dict = {}
    exec(compile(block, "engines.md", "exec"), names)
    return names["Batched"]()


def run(folder: Path, sampler):
    model = make_model("llama", folder / "model")
    config = Config(
        run=RunConfig(folder=str(folder / "run"), steps=3, backend="torch"),
        model=ModelConfig(path=str(model), device=DEVICE, dtype="float32"),
        rollout=RolloutConfig(prompts=2, responses=4, max_tokens=8),
        optimizer=OptimizerConfig(learning_rate=1e-2),
    )
    reward = lambda completions: [float(c.count("a") + len(c)) for c in completions]
    train(config, load_policy(config), train_rows=ROWS, rewards={"a": reward}, sampler=sampler)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def test_the_class_of_the_docs_draws_from_the_module_that_is_trained(tmp_path, capsys):
    records = run(tmp_path, batched())
    assert [record["responses/lost"] for record in records] == [0] * 3
    assert [record["sampler/staleness/max"] for record in records] == [0] * 3
    assert all(record["sampler/gap/max"] < 1e-3 for record in records) and len(records) == 3
    assert records[0]["gradient_norm"] > 0


@pytest.mark.slow
def test_a_copy_of_the_module_from_before_the_first_step_is_found(tmp_path, capsys):
    import copy

    class Kept(type(batched())):
        def refresh(self, policy, version):
            model = getattr(self, "model", None) or copy.deepcopy(policy.scorer.base)
            super().refresh(policy, version)
            self.model = model

    with pytest.raises(SamplerError, match="log-probabilities differ from the policy's"):
        run(tmp_path, Kept())
