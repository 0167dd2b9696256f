"""verl's actor worker and FSDP engine on CPU: optimizer steps of one rollout, and the same steps in plain PyTorch.

torchrun --nproc-per-node 2 verl_runs.py FOLDER OUT SETTINGS_AS_JSON      one of several processes
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import verl_cpu
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from gvpo_core import dense_group_ids, gvpo_surrogate
from gvpo_core.hosts import SettingsError

BETA, RATE, LORA_ALPHA = 0.2, 0.05, 8
SMOOTH: dict[str, Any] = {"betas": (0.0, 0.0), "override_optimizer_config": {"eps": 1.0}}  # near gradient descent


def make_worker(
    folder: Path,
    *,
    dynamic: bool = False,
    micro: int = 2,
    smooth: bool = True,
    rate: float = RATE,
    clip: float = 1e9,
    lora: int = 0,
) -> Any:
    from gvpo_verl import GVPOWorker

    verl_cpu.register_engine()
    optimizer = SMOOTH if smooth else {}
    model = HFModelConfig(
        path=str(folder),
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        lora_rank=lora,
        lora_alpha=LORA_ALPHA,
    )
    mixed = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine = FSDPEngineConfig(
        strategy="fsdp2",
        model_dtype="fp32",
        mixed_precision=mixed,
        use_torch_compile=False,
        use_dynamic_bsz=dynamic,
        max_token_len_per_gpu=40,
        infer_max_token_len_per_gpu=40,
        micro_batch_size_per_gpu=micro,
        infer_micro_batch_size_per_gpu=micro,
    )
    optim = FSDPOptimizerConfig(lr=rate, weight_decay=0.0, clip_grad=clip, total_training_steps=100, **optimizer)
    worker = GVPOWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=model, engine_config=engine, optimizer_config=optim
        )
    )
    worker.reset()
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=micro,
        use_dynamic_bsz=dynamic,
        policy_loss=PolicyLossConfig(loss_mode="gpg"),
        loss_agg_mode="seq-mean-token-sum",
        use_torch_compile=False,
    )
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def rollout(groups: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of prompts with as many responses as each group says, shuffled; padding rows as verl makes them at last."""
    draw = np.random.default_rng(seed)
    rows = []
    for label, size in enumerate(groups):
        prompt = draw.integers(1, 96, int(draw.integers(2, 8))).tolist()
        prompt[len(prompt) // 2] = 0  # config.pad_token_id, here an input as any other
        for _ in range(size):
            response = [*draw.integers(1, 96, int(draw.integers(1, 7))).tolist(), 0]
            rows.append({"uid": f"u{label}", "prompt": prompt, "response": response, "reward": float(draw.normal())})
    rows = [rows[i] for i in draw.permutation(len(rows))]
    while len(rows) % 8:
        rows.append({"uid": "pad", "prompt": [0], "response": [0], "reward": None})
    return rows


def tensors(rows: list[dict[str, Any]], old: list[torch.Tensor], ref: list[torch.Tensor]) -> TensorDict:
    """verl's v1 batch of rows: nested tensors without padding."""
    nested = lambda values: torch.nested.as_nested_tensor(values, layout=torch.jagged)
    ids = [torch.tensor(row["prompt"] + row["response"]) for row in rows]
    counted = [torch.full((len(row["response"]),), int(row["reward"] is not None)) for row in rows]
    scores = [torch.zeros(len(row["response"])) for row in rows]
    for row, score in zip(rows, scores, strict=True):
        score[-1] = row["reward"] or 0.0
    batch = tu.get_tensordict(
        {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(len(x)) for x in ids]),
            "prompts": nested([torch.tensor(row["prompt"]) for row in rows]),
            "responses": nested([torch.tensor(row["response"]) for row in rows]),
            "response_mask": nested(counted),
            "loss_mask": nested(counted),
            "rm_scores": nested(scores),
            "old_log_probs": nested(old),
            "ref_log_prob": nested(ref),
            "advantages": nested([torch.full_like(x, 7.0) for x in scores]),  # replaced
        },
        {"temperature": 1.0, "global_batch_size": None},
    )
    tu.assign_non_tensor(batch, uid=[row["uid"] for row in rows])
    return batch


def logprobs(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """(T,) of a response's tokens at temperature 1, one sequence alone."""
    logits = model(torch.tensor([row["prompt"] + row["response"]])).logits[0, len(row["prompt"]) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(row["response"])[:, None])[:, 0]


def train(
    worker: Any, rows: list[dict[str, Any]], current: Any, initial: Any, *, mini: int, epochs: int, beta: float = BETA
) -> Any:
    """verl's `train_mini_batch` of this rank's rows, scored by the current and the initial model; its metrics."""
    with torch.no_grad():
        old, ref = ([logprobs(model, row) for row in rows] for model in (current, initial))
    batch = tensors(rows, old, ref)
    tu.assign_non_tensor(
        batch, gvpo_beta=beta, mini_batch_size=mini, global_batch_size=mini, epochs=epochs, calculate_entropy=False
    )
    return tu.get(worker.train_mini_batch(batch), "metrics")


def parameters(worker: Any) -> dict[str, np.ndarray]:
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return {name: whole(p.detach()).double().numpy().copy() for name, p in worker.engine.module.named_parameters()}


def reference(
    folder: Path, steps: list[list[dict[str, Any]]], *, beta: float = BETA, lora: int = 0, start: Any = None
) -> dict[str, np.ndarray]:
    """The trained parameters after a step along gvpo_surrogate of each mini-batch's rows, in float64.

    Args:
      lora: rank of adapters, which begin as in `start`, by their names.
    """
    from peft import LoraConfig, get_peft_model

    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model: Any = load()
    initial = load()
    assert model.config.pad_token_id == 0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # transformers sets it, and the row would get no gradient as an input
    if lora:
        adapters = LoraConfig(r=lora, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
        for name, p in model.named_parameters():
            p.data.copy_(torch.from_numpy(start[name]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    for rows in steps:
        ids, groups = dense_group_ids(row["uid"] for row in rows)
        rewards = torch.tensor([np.nan if row["reward"] is None else row["reward"] for row in rows])
        own = torch.stack([logprobs(model, row).sum() for row in rows])
        with torch.no_grad():
            ref = torch.stack([logprobs(initial, row).sum() for row in rows])
        gvpo_surrogate(own, ref, rewards.double(), torch.from_numpy(ids), beta=beta, num_groups=groups).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().numpy().copy() for name, p in trained.items()}


def learn(folder: Path, out: Path, steps: int = 14) -> None:
    """A run with verl's worker, responses drawn by transformers; the share of wanted tokens in each step."""
    worker = make_worker(folder, smooth=False, rate=0.02, micro=16)
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    initial, sampler, found = load(), load(), []
    prompts = torch.tensor([[5, 9], [11, 30], [70, 8], [41, 41]]).repeat_interleave(8, 0)
    for _ in range(steps):
        with torch.no_grad():
            for name, value in parameters(worker).items():
                sampler.get_parameter(name).copy_(torch.from_numpy(value))
        drawn = sampler.generate(
            prompts, do_sample=True, top_k=0, max_new_tokens=6, min_new_tokens=6, eos_token_id=None
        )
        rows = [
            {"uid": str(i // 8), "prompt": prompts[i].tolist(), "response": response}
            for i, response in enumerate(drawn[:, 2:].tolist())
        ]
        for row in rows:
            row["reward"] = sum(20 <= token < 58 for token in row["response"]) / 6
        found.append(float(np.mean([row["reward"] for row in rows])))
        train(worker, rows, sampler, initial, mini=32, epochs=1, beta=0.02)
    (out / "learned.json").write_text(json.dumps(found))


def refuse(name: str, folder: Path, out: Path) -> None:
    """Writes the message with which a step of a model is refused, and whether its parameters are as they were."""
    worker, rows = make_worker(folder), rollout((4, 4))
    initial, start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), parameters(worker)
    message = ""
    try:
        train(worker, rows, initial, initial, mini=8, epochs=1)
    except SettingsError as error:
        message = str(error)
    same = all(np.array_equal(value, start[key]) for key, value in parameters(worker).items())
    (out / f"{name}.json").write_text(json.dumps({"message": message, "same": same}))


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    initial = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, settings in json.loads(sys.argv[3]).items():
        groups, mini, epochs = (settings.pop(x) for x in ("groups", "mini", "epochs"))
        if changes := settings.pop("refused", None):
            refuse(name, tiny_models.make_model("llama", out / name, **changes), out)
            continue
        worker = make_worker(folder, **settings)
        rows = np.array_split(np.array(rollout(tuple(groups)), dtype=object), size)[rank].tolist()
        start = parameters(worker)
        metrics = train(worker, rows, initial, initial, mini=mini, epochs=epochs)
        end = parameters(worker)
        if rank == 0:
            np.savez(out / f"{name} start.npz", **start)
            np.savez(out / f"{name} end.npz", **end)
            ours = {key: value for key, value in metrics.items() if key.startswith("gvpo/")}
            (out / f"{name}.json").write_text(json.dumps(ours))
    if size == 1:
        learn(folder, out)
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # the group's threads release their tensors: see test_processes_end


if __name__ == "__main__":
    main()
