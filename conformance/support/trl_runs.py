"""Short runs of GVPOTrainer on a tiny model that keep what each step saw, and the same steps in plain PyTorch.

torchrun --nproc-per-node 2 trl_runs.py FOLDER OUT SETTINGS_AS_JSON       one of several processes
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from gvpo_core import dense_group_ids, gvpo_surrogate

K, RATE = 4, 0.05
PROMPTS = ["a+b", "the sum of", "7", "what is it?", "count: 1 2 3", "z", "on", "so far so"]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"}


def reward(completion: list[int] | tuple[int, ...]) -> float | None:
    """A number of the tokens alone; some completions have none."""
    return None if sum(completion) % 9 == 0 else float(np.sin(sum(completion)) + 0.1 * len(completion))


def rewards(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [reward(ids) for ids in completion_ids]


class Steps(TrainerCallback):
    """The parameters after each optimizer step."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.parameters.append(trained(model))


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}


def make_trainer(
    folder: Path,
    out: Path,
    *,
    lora: bool = False,
    reward_funcs: Any = rewards,
    generation: dict[str, Any] | None = None,
    moved: float = 0.0,
    dtype: torch.dtype = torch.float32,
    model: Any = None,
    **settings: Any,
) -> Any:
    """`moved`: what is added to a parameter of the model in memory, which its folder does not know of.

    `model`: in place of the folder's.
    """
    from datasets import Dataset
    from gvpo_trl import GVPOConfig, GVPOTrainer
    from peft import LoraConfig

    fixed = {
        "output_dir": str(out),
        "num_generations": K,
        "max_completion_length": 6,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_steps": 3,
    }
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if moved:
        model.model.norm.weight.data += moved
    model.generation_config.eos_token_id = [0, *range(50, 70)]  # so that some completions end
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    return GVPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=GVPOConfig(**(fixed | settings)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_models.make_tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def run(folder: Path, out: Path, settings: dict[str, Any], rollout_func: Any = None) -> dict[str, Any]:
    """Trains; the prompt, completion and mask that each step saw of this process, and the parameters after it."""
    trainer = make_trainer(folder, out, **settings)
    trainer.rollout_func = rollout_func
    start, steps, seen = trained(trainer.model), Steps(), []
    trainer.add_callback(steps)
    theirs, window = trainer._compute_loss, trainer.args.gradient_accumulation_steps

    def compute_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if len(seen) * window == trainer._step:
            seen.append([])
        for row in range(len(inputs["prompt_ids"])):
            kept = [inputs[f"{part}_mask"][row].bool() for part in ("prompt", "completion")]
            texts = [inputs["prompt_ids"][row][kept[0]], inputs["completion_ids"][row][kept[1]]]
            own = inputs["tool_mask"][row][kept[1]] if "tool_mask" in inputs else torch.ones_like(texts[1])
            seen[-1].append([text.tolist() for text in (*texts, own)])
        return theirs(model, inputs)

    trainer._compute_loss = compute_loss
    trainer.train()
    return {"start": start, "steps": steps.parameters, "seen": seen, "log": trainer.state.log_history}


def reference(
    folder: Path, start: dict[str, torch.Tensor], seen: list[list[list[list[int]]]], *, beta: float, lora: bool = False
) -> list[dict[str, torch.Tensor]]:
    """The parameters after each step of gradient descent along gvpo_surrogate of the whole batch, in float64."""
    from peft import LoraConfig, get_peft_model

    load = lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model, initial = load(), load()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # the id is an input as any other
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert parameters.keys() == start.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(start[name])
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    made = []
    for rows in seen:
        ids, groups = dense_group_ids(tuple(prompt) for prompt, _, _ in rows)
        given = [reward(completion) for _, completion, _ in rows]
        scores = torch.tensor([float("nan") if x is None else x for x in given], dtype=torch.float64)
        scores[[not any(own) for *_, own in rows]] = float("nan")  # masked by TRL or an environment
        logprobs = torch.stack([logprob(model, *row) for row in rows])
        with torch.no_grad():
            ref = torch.stack([logprob(initial, *row) for row in rows])
        gvpo_surrogate(logprobs, ref, scores, torch.from_numpy(ids), beta=beta, num_groups=groups).backward()
        optimizer.step()
        optimizer.zero_grad()
        made.append(trained(model))
    return made


def logprob(model: Any, prompt: list[int], completion: list[int], own: list[int]) -> torch.Tensor:
    """() sum of the log-probabilities at temperature 1 of a completion's own tokens, one sequence alone."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    tokens = torch.tensor(completion, dtype=torch.int64)
    per_token = logits[: len(completion)].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return (per_token * torch.tensor(own)).sum()


def tool_calls(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A rollout in which the environment has written the second and third token of each completion."""
    draw = np.random.default_rng(trainer.state.global_step)
    tokens = [[7 + PROMPTS.index(prompt)] for prompt in prompts]
    completions = [draw.integers(1, 96, int(draw.integers(4, 7))).tolist() for _ in prompts]
    masks = [[1, 0, 0, *[1] * (len(completion) - 3)] for completion in completions]
    return {"prompt_ids": tokens, "completion_ids": completions, "logprobs": None, "env_mask": masks}


def main() -> None:
    folder, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = run(folder, out, settings)
    rank = torch.distributed.get_rank()
    (out / f"seen{rank}.json").write_text(json.dumps(found["seen"]))
    flat = {f"{n}/{name}": p.numpy() for n, step in enumerate(found["steps"]) for name, p in step.items()}
    np.savez(out / f"steps{rank}.npz", **flat)
    if rank == 0:
        np.savez(out / "start.npz", **{name: p.numpy() for name, p in found["start"].items()})
        (out / "log.json").write_text(json.dumps(found["log"]))
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # the group's threads release their tensors: see test_processes_end


if __name__ == "__main__":
    main()
