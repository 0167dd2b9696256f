"""verl's own command trains with gvpo_verl: Ray, agents, a rollout by transformers, two steps on CPU."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models
from places import SUPPORT
from required import require

with warnings.catch_warnings(action="ignore"):  # of verl's, at import
    require("verl", "ray", subject="verl")
pytestmark = pytest.mark.filterwarnings("default")

BETA, K, PROMPTS = 0.1, 4, 4
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **others):
    return sum(c in "aeiou" for c in solution_str) / 8
"""
ACTOR, ROLLOUT, REF = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref"))


def settings(folder: Path, out: Path, steps: int) -> list[str]:
    """verl's settings: those that GVPO needs, then those that keep the run on this machine."""
    return [
        "trainer.v1.trainer_mode=gvpo",
        "algorithm.adv_estimator=rloo",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_penalty=kl",
        "algorithm.kl_ctrl.type=fixed",
        f"algorithm.kl_ctrl.kl_coef={BETA}",
        f"{ACTOR}.policy_loss.loss_mode=gpg",
        f"{ACTOR}.loss_agg_mode=seq-mean-token-sum",
        f"{ACTOR}.use_kl_loss=False",
        f"{ACTOR}.entropy_coeff=0",
        f"{ACTOR}.shuffle=False",
        f"{ACTOR}.ppo_epochs=1",
        f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
        f"{ACTOR}.ppo_micro_batch_size_per_gpu={K}",
        f"{ACTOR}.optim.lr=0.01",
        f"{REF}.log_prob_micro_batch_size_per_gpu={K}",
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu={K}",
        *(f"{part}.{name}" for part in (ACTOR, REF) for name in ("strategy=fsdp2", "use_torch_compile=False")),
        *(f"{part}.fsdp_config.strategy=fsdp2" for part in (ACTOR, REF)),
        *(f"{part}.fsdp_config.use_torch_compile=False" for part in (ACTOR, REF)),
        *(f"{part}.fsdp_config.model_dtype=fp32" for part in (ACTOR, REF)),
        *(
            f"+{part}.fsdp_config.mixed_precision.{name}=fp32"
            for part in (ACTOR, REF)
            for name in ("param_dtype", "reduce_dtype", "buffer_dtype")
        ),
        f"actor_rollout_ref.model.path={folder}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{ROLLOUT}.name=transformers_cpu",
        f"{ROLLOUT}.temperature=1.0",
        f"{ROLLOUT}.top_p=1.0",
        f"{ROLLOUT}.n={K}",
        f"{ROLLOUT}.tensor_model_parallel_size=1",
        f"{ROLLOUT}.agent.num_workers=1",
        f"{ROLLOUT}.free_cache_engine=False",
        f"data.train_files={out}/rows.parquet",
        f"data.val_files={out}/rows.parquet",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=64",
        "data.max_response_length=8",
        "data.dataloader_num_workers=0",
        f"reward.custom_reward_function.path={out}/reward.py",
        "reward.num_workers=1",
        "trainer.n_gpus_per_node=1",
        "trainer.nnodes=1",
        "trainer.device=cpu",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={out}/checkpoints",
        f"trainer.rollout_data_dir={out}/rollouts",
        "ray_kwargs.ray_init.num_cpus=32",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=300000000",
    ]


def write_rows(path: Path, count: int) -> None:
    import datasets

    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": f"Say {chr(97 + i)}"}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": i},
        }
        for i in range(count)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[str, Path]:
    """What two steps print, and their folder."""
    out = tmp_path_factory.mktemp("verl")
    folder = tiny_models.make_model("llama", out / "model")
    write_rows(out / "rows.parquet", 2 * PROMPTS)
    (out / "reward.py").write_text(REWARD)
    env = {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)]),
        "VERL_USE_EXTERNAL_MODULES": "verl_end_to_end,gvpo_verl",
        "VERL_PLATFORM": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "1",
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings(folder, out, 2)]
    done = subprocess.run(
        command, cwd=out, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=800
    )
    (out / "log.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout, out


def metrics(log: str, step: int) -> dict[str, float]:
    line = re.findall(rf"step:{step} - (.*)", log)[0]  # verl 0.9.0 prints it twice
    parts = re.findall(r"([\w/@.]+):([-+\deE.naif]+)(?: |$)", re.sub(r"np\.float\d+\(([^)]*)\)", r"\1", line))
    return {name: float(value) for name, value in parts}


def test_gvpos_worker_takes_both_steps(run) -> None:
    log, _ = run
    for step in (1, 2):
        assert "actor/gvpo/loss" in metrics(log, step), "a step was not GVPO's"
    assert "training/global_step:3" not in log


def test_the_first_step_is_that_of_the_rewards(run) -> None:
    """The policy is the reference then, so the implicit reward is 0 and the loss is half the rewards' variance."""
    log, out = run
    rows = [json.loads(line) for line in (out / "rollouts" / "1.jsonl").read_text().splitlines()]
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row["input"], []).append(row["score"])
    assert sorted(map(len, groups.values())) == [K] * PROMPTS
    variances = [sum((r - sum(g) / K) ** 2 for r in g) / (K - 1) for g in groups.values()]
    found, expected = metrics(log, 1), sum(variances) / PROMPTS
    assert expected > 0
    assert found["actor/gvpo/reward_variance"] == pytest.approx(expected, rel=1e-5)
    assert abs(found["actor/gvpo/implicit_variance"]) < 1e-9
    assert abs(metrics(log, 2)["actor/gvpo/kl"]) > 1e-6, "the first step changed nothing"


def test_each_steps_weights_reach_the_rollout(run) -> None:
    moved = [float(value) for value in re.findall(r"SERVER loaded \d+ tensors of step \S+, moved (\S+)", run[0])]
    assert len(moved) >= 2 and moved[0] < 1e-6 < 1e-4 < max(moved[1:])
