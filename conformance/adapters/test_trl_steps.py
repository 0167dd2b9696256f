"""GVPOTrainer's parameters after each optimizer step are those of plain PyTorch on the whole batch with gvpo_core."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from required import require
from torch_processes import run_processes

require("trl", "datasets", "peft", subject="trl")

import torch
import trl_runs
from trl_checks import check_steps

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names

CASES = {
    "one micro-batch": {"per_device_train_batch_size": 16},
    "rows one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "micro-batches of half a group": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "mask_truncated_completions": True,
    },
    "mini-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
        "max_steps": 4,
    },
    "mini-batches, twice each": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 3,
        "num_iterations": 2,
        "max_steps": 8,
        "temperature": 0.7,
    },
    "LoRA, twice": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 4,
        "lora": True,
        "learning_rate": 0.05,
        "temperature": 1.6,
    },
    "without KL": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "beta": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", CASES)
def test_the_steps_of_one_process(name: str, folder, tmp_path) -> None:
    found = trl_runs.run(folder, tmp_path, CASES[name])
    check_steps(folder, found, CASES[name])
    for rows in found["seen"]:  # whole groups, however they were shuffled
        prompts = [tuple(prompt) for prompt, *_ in rows]
        assert {prompts.count(prompt) for prompt in prompts} == {trl_runs.K}
    loss = [line for line in found["log"] if "loss" in line]
    assert len(loss) == len(found["steps"])
    for line in loss:
        parts = line["gvpo/implicit_variance"] + line["gvpo/reward_variance"] - 2 * line["gvpo/covariance"]
        assert line["loss"] == pytest.approx(parts, rel=1e-3)
        assert line["gvpo/groups/counted"] + line["gvpo/groups/dropped"] == len(found["seen"][0]) / trl_runs.K
        assert ("gvpo/kl" in line) == ("gvpo/regret" in line) == (CASES[name].get("beta") != 0.0)


def test_the_steps_of_responses_that_hold_tokens_of_tools(folder, tmp_path) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found = trl_runs.run(folder, tmp_path, settings, rollout_func=trl_runs.tool_calls)
    assert all(own[:3] == [1, 0, 0] for rows in found["seen"] for _, _, own in rows)
    check_steps(folder, found, settings)


def test_a_response_without_a_token_of_its_own_leaves_its_group(folder, tmp_path) -> None:
    def silent(prompts, trainer):
        made = trl_runs.tool_calls(prompts, trainer)
        made["env_mask"][0] = [0] * len(made["env_mask"][0])
        return made

    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    found = trl_runs.run(folder, tmp_path, settings, rollout_func=silent)
    assert all(sum(not any(own) for _, _, own in rows) == 1 for rows in found["seen"])
    check_steps(folder, found, settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, id="a group on both"),
        pytest.param(
            {
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 4,
                "num_iterations": 2,
                "max_steps": 4,
            },
            id="mini-batches, twice each",
        ),
    ],
)
def test_the_steps_of_two_processes(settings: dict, folder, tmp_path) -> None:
    run_processes(2, "trl_runs.py", [str(folder), str(tmp_path), json.dumps(settings)], tmp_path)
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    start = {name: torch.from_numpy(x) for name, x in np.load(tmp_path / "start.npz").items()}
    steps: list[dict[str, torch.Tensor]] = []
    first, second = (np.load(tmp_path / f"steps{rank}.npz") for rank in (0, 1))
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])
        step, name_of = name.split("/", 1)
        if int(step) == len(steps):
            steps.append({})
        steps[int(step)][name_of] = torch.from_numpy(first[name])
    both = [a + b for a, b in zip(*seen, strict=True)]
    counts = [{tuple(p) for p, *_ in rows} for rows in (seen[0][0], seen[1][0])]
    assert bool(counts[0] & counts[1]) == (settings["per_device_train_batch_size"] == 3)
    check_steps(folder, {"start": start, "steps": steps, "seen": both}, settings)
    line = next(line for line in json.loads((tmp_path / "log.json").read_text()) if "loss" in line)
    parts = line["gvpo/implicit_variance"] + line["gvpo/reward_variance"] - 2 * line["gvpo/covariance"]
    assert line["loss"] == pytest.approx(parts, rel=1e-3)
