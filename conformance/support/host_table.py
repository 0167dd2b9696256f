"""The same five steps in our PyTorch trainer and in the hosts, side by side: the table of docs/adapters.md.

Each host writes its steps where it is installed; the last call prints the table from what it finds.

python conformance/support/host_table.py gvpo_torch FOLDER   in that of `nox -s "conformance(torch)"`, then trl
python conformance/support/host_table.py verl FOLDER         in that of `nox -s verl`, and then verl-functions
python conformance/support/host_table.py mlx-lm FOLDER       in that of `nox -s "conformance(mlx)"`
python conformance/support/host_table.py tunix FOLDER           in that of `nox -s tunix`
python conformance/support/host_table.py table FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

BETA, RATE, K, STEPS = 0.1, 0.01, 4, 5
HOSTS = {
    "gvpo_torch": "`gvpo_torch`",
    "trl": "TRL, `GVPOTrainer`",
    "verl": "verl, `GVPOWorker`",
    "verl-functions": "verl's functions, settings alone",
    "mlx-lm": "mlx-lm, `gvpo_mlx_lm`",
    "tunix": "Tunix, `GVPOLearner`",
}


def rows_of(step: int) -> list[dict[str, Any]]:
    """4 prompts with 4 given responses each, and their rewards."""
    draw = np.random.default_rng(step)
    rows = []
    for label in range(4):
        prompt = draw.integers(1, 96, 5).tolist()
        for _ in range(K):
            response = [*draw.integers(1, 96, int(draw.integers(2, 7))).tolist(), 0]
            reward = float(draw.normal())
            rows.append({"uid": str(label), "prompt": prompt, "response": response, "reward": reward})
    return rows


def gvpo_torch(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    from torch_policies import parameters, policy

    from gvpo_core import gvpo_coefficients, gvpo_loss
    from gvpo_core.training.policy import Batch

    of_policy, found = policy(model, reference=True, learning_rate=RATE, max_gradient_norm=1.0), []
    for step in range(STEPS):
        rows = rows_of(step)
        fields = [[tuple(row[name]) for row in rows] for name in ("prompt", "response")]
        of = Batch(*fields, [row["uid"] for row in rows])
        ref, rewards = of_policy.logprobs(of, reference=True), np.asarray([row["reward"] for row in rows])
        ids = np.arange(len(rows)) // K
        loss = float(gvpo_loss(of_policy.logprobs(of), ref, rewards, ids, beta=BETA).loss)
        weigh = lambda logprobs, chosen, ref=ref, rewards=rewards, ids=ids: (
            gvpo_coefficients(logprobs, ref[chosen], rewards[chosen], ids[chosen] - ids[chosen].min(), beta=BETA)
            * (len(chosen) / len(ids))
        )
        update = of_policy.update(of, weigh)
        found.append({"loss": loss, "gradient": update.gradient_norm})
    return found, parameters(of_policy)


def trl(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    import trl_runs

    drawn = iter(range(STEPS))
    now: list[dict[str, Any]] = []

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        now[:] = rows_of(next(drawn))
        return {
            "prompt_ids": [row["prompt"] for row in now],
            "completion_ids": [row["response"] for row in now],
            "logprobs": None,
        }

    trainer = trl_runs.make_trainer(
        model,
        model / "trl",
        reward_funcs=lambda completions, **_: [row["reward"] for row in now],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        optim="adamw_torch",
        learning_rate=RATE,
        max_grad_norm=1.0,
        beta=BETA,
        max_steps=STEPS,
        max_completion_length=8,
    )
    trainer.rollout_func = given
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    end = {name: p.detach().double().numpy() for name, p in trainer.model.named_parameters()}
    return [{"loss": line["loss"], "gradient": line["grad_norm"]} for line in lines], end


def verl(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    import torch
    import verl_runs
    from transformers import AutoModelForCausalLM

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29513",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    torch.distributed.init_process_group("gloo")
    worker = verl_runs.make_worker(model, smooth=False, rate=RATE, micro=2, clip=1.0)
    initial, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for step in range(STEPS):
        rows = rows_of(step)
        # old_log_probs are the policy's own, as verl's trainer makes them.
        current = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        current.load_state_dict({n: torch.from_numpy(p) for n, p in verl_runs.parameters(worker).items()}, strict=False)
        metrics = verl_runs.train(worker, rows, current, initial, mini=16, epochs=1, beta=BETA)
        found.append({"loss": metrics["gvpo/loss"][0], "gradient": metrics["grad_norm"][0]})
    end = verl_runs.parameters(worker)
    torch.distributed.destroy_process_group()
    return found, end


def verl_functions(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    import torch
    import verl_runs
    from transformers import AutoModelForCausalLM
    from verl.trainer.ppo import core_algos

    load = lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy, initial, found = load(), load(), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        rows = rows_of(step)
        padded = lambda values: torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
        now = padded([verl_runs.logprobs(policy, row) for row in rows])
        with torch.no_grad():
            ref = padded([verl_runs.logprobs(initial, row) for row in rows])
        mask = padded([torch.ones(len(row["response"])) for row in rows])
        scores = torch.zeros_like(mask)
        scores[torch.arange(len(rows)), mask.sum(1).long() - 1] = torch.tensor([row["reward"] for row in rows])
        rewards = scores - BETA * core_algos.kl_penalty(now.detach(), ref, "kl") * mask
        advantages, _ = core_algos.compute_rloo_outcome_advantage(
            rewards, mask, np.asarray([row["uid"] for row in rows])
        )
        loss = core_algos.agg_loss(-now * advantages, mask, "seq-mean-token-sum")
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
        optimizer.step()
        found.append({"gradient": norm})
    return found, {name: p.detach().double().numpy() for name, p in policy.named_parameters()}


def mlx_lm(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    import mlx.core as mx
    import mlx.optimizers as optim
    from gvpo_mlx_lm import GVPO, Group, load
    from mlx.utils import tree_flatten
    from mlx_lm.tuner import trainer

    mx.disable_compile()
    policy, found = load(str(model))[0], []
    policy.unfreeze()

    class Clipped(optim.AdamW):  # mlx-lm's trainer clips nothing itself
        def update(self, of: Any, gradients: Any) -> None:
            gradients, norm = optim.clip_grad_norm(gradients, 1.0)
            found.append({"gradient": norm.item()})
            super().update(of, gradients)

    class Report:
        def on_train_loss_report(self, info: dict[str, float]) -> None:
            found[-1]["loss"] = info["train_loss"]

        def on_val_loss_report(self, info: dict[str, float]) -> None: ...

    args = trainer.TrainingArgs(
        batch_size=2,
        grad_accumulation_steps=8,
        iters=8,
        steps_per_report=8,
        adapter_file=str(model.parent / "mlx.safetensors"),
    )
    gvpo, steps = GVPO(policy, args, model, beta=BETA, groups_per_step=4), []
    for step in range(STEPS):
        rows = rows_of(step)
        parts = [rows[i : i + K] for i in range(0, len(rows), K)]
        steps.append(
            gvpo.with_reference(
                [
                    Group(tuple(p[0]["prompt"]), tuple(tuple(r["response"]) for r in p), tuple(r["reward"] for r in p))
                    for p in parts
                ]
            )
        )
    optimizer = Clipped(learning_rate=RATE, weight_decay=0.0, bias_correction=True)
    for groups in steps:
        trainer.train(
            policy,
            optimizer,
            groups,
            args=args,
            loss=gvpo.loss,
            iterate_batches=gvpo.iterate_batches,
            training_callback=Report(),
        )
    return found, {name: np.array(p, dtype=np.float64) for name, p in tree_flatten(policy.parameters())}


def tunix(model: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    from types import SimpleNamespace

    import jax
    import optax
    import tunix_runs
    from gvpo_tunix import GVPOConfig, GVPOLearner

    norms: list[float] = []
    losses: list[float] = []
    drawn, now = iter(range(STEPS)), []

    def note(updates: Any, state: Any, of: Any = None) -> tuple[Any, Any]:
        jax.debug.callback(lambda norm: norms.append(float(norm)), optax.tree.norm(updates), ordered=True)
        return updates, state

    optimizer = optax.chain(
        optax.GradientTransformation(lambda of: optax.EmptyState(), note),
        optax.clip_by_global_norm(1.0),
        optax.adamw(RATE, weight_decay=0.0),
    )
    training = {"mini_batch_size": 4, "train_micro_batch_size": 1, "rollout_micro_batch_size": 4, "max_steps": STEPS}
    made = tunix_runs.cluster(
        model, optimizer=optimizer, training=training, rollout={"max_tokens_to_generate": 8}, noise=0.0
    )

    def given(**_: Any) -> SimpleNamespace:
        now[:] = rows_of(next(drawn))
        tokens = [np.asarray(row["response"][:-1]) for row in now]  # as Tunix's samples come
        prompts = np.asarray([row["prompt"] for row in now])
        return SimpleNamespace(text=[""] * len(now), tokens=tokens, left_padded_prompt_tokens=prompts)

    made.generate = given
    trainer = made.actor_trainer
    buffer = trainer._buffer_metrics
    trainer._buffer_metrics = lambda *a, loss, **k: losses.append(float(loss)) or buffer(*a, loss=loss, **k)
    settings = GVPOConfig(num_generations=K, beta=BETA)
    learner = GVPOLearner(made, settings, lambda **_: [row["reward"] for row in now], model_path=model)
    learner.train([{"prompts": np.array(list("0123"))}] * STEPS)
    of = tunix_runs.parameters(trainer.model)
    flat = lambda w, last: w.reshape(-1, w.shape[-1]).T if last else w.reshape(w.shape[0], -1).T
    end = {
        "model.embed_tokens.weight": of["embedder"]["input_embedding"],
        "model.norm.weight": of["final_norm"]["w"],
        "lm_head.weight": of["lm_head"]["w"].T,
    }
    for i, layer in of["layers"].items():
        at = f"model.layers.{i}."
        end |= {f"{at}self_attn.{n}_proj.weight": flat(layer["attn"][f"{n}_proj"]["w"], n == "o") for n in "qkvo"}
        end |= {f"{at}mlp.{n}_proj.weight": layer["mlp"][f"{n}_proj"]["kernel"].T for n in ("gate", "up", "down")}
        end |= {f"{at}{n}.weight": layer[n]["w"] for n in ("input_layernorm", "post_attention_layernorm")}
    # optax computes the optimizer's part after every micro-batch, and takes that of the last.
    jax.effects_barrier()
    found = [{"loss": float(np.mean(losses[i - 3 : i + 1])), "gradient": norms[i]} for i in range(3, 4 * STEPS, 4)]
    return found, {name: value.astype(np.float64) for name, value in end.items()}


def table(folder: Path) -> str:
    found = {host: json.loads((folder / f"{host}.json").read_text()) for host in HOSTS}
    ends = {host: np.load(folder / f"{host}.npz") for host in HOSTS}
    start = np.load(folder / "start.npz")
    ours, norm = ends["gvpo_torch"], lambda of: sum(float((x**2).sum()) for x in of) ** 0.5
    way = norm(ours[name] - start[name] for name in start.files)
    lines = [
        "| | " + " | ".join(f"step {i + 1}" for i in range(STEPS)) + " | parameters apart |",
        "|---" * (STEPS + 2) + "|",
    ]
    for key, unit in (("loss", "loss"), ("gradient", "gradient norm")):
        for host, name in HOSTS.items():
            values = [step.get(key) for step in found[host]]
            if None in values:  # verl's functions alone know no GVPO loss
                continue
            shown = " | ".join(f"{value:.5f}" for value in values)
            apart = norm(ours[p] - ends[host][p] for p in start.files) / way
            last = "" if key == "loss" else ("–" if host == "gvpo_torch" else f"{apart:.0e}")
            lines.append(f"| {unit}, {name} | {shown} | {last} |")
    return "\n".join(lines)


def main() -> None:
    host, folder = sys.argv[1], Path(sys.argv[2])
    if host == "table":
        print(table(folder))
        return
    from safetensors.numpy import load_file

    model = folder / "model"
    if not model.exists():
        tiny_models.write_model("llama", model)
    steps, end = globals()[host.replace("-", "_")](model)
    start = {name: value.astype(np.float64) for name, value in load_file(model / "model.safetensors").items()}
    assert end.keys() == start.keys()
    (folder / f"{host}.json").write_text(json.dumps(steps))
    np.savez(folder / f"{host}.npz", **end)
    np.savez(folder / "start.npz", **start)


if __name__ == "__main__":
    main()
