"""Tiny Tunix clusters, runs that are recorded, and the step that they should have taken."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import tiny_models
from flax import nnx
from gvpo_tunix import GVPOConfig, GVPOLearner
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.rl import rl_cluster
from tunix.rl.rollout.base_rollout import RolloutConfig

from gvpo_core import gvpo_loss, gvpo_surrogate

THETA = 700.0  # of tiny_models' llama
PROMPTS = ("say a:", "say bee:", "e", "code the")
Role = rl_cluster.Role


def write_model(folder: Path) -> Path:
    return tiny_models.write_model("llama", folder, num_hidden_layers=1)


def load(folder: Path, *, theta: float = THETA, noise: float = 0.0) -> llama.Llama3:
    """Tunix's model of the folder, on all devices; with noise its parameters have moved."""
    config = llama.ModelConfig(
        num_layers=json.loads((folder / "config.json").read_text())["num_hidden_layers"],
        vocab_size=tiny_models.VOCABULARY,
        embed_dim=32,
        hidden_dim=48,
        num_heads=4,
        head_dim=8,
        num_kv_heads=2,
        rope_theta=theta,
        norm_eps=1e-6,
    )
    model = params.create_model_from_safe_tensors(str(folder), config, mesh(), dtype=jnp.float32)
    draw = np.random.default_rng(7)
    moved = jax.tree.map(lambda x: x + noise * draw.normal(size=x.shape).astype(np.float32), nnx.state(model))
    nnx.update(model, moved)
    return model


def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(-1, 1), ("fsdp", "tp"))


def adapted(folder: Path) -> Any:
    """The folder's model with LoRA, whose adapters have moved from zero."""
    base = load(folder)
    provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj", rank=4, alpha=8.0)
    model = qwix.apply_lora_to_model(base, provider, **base.get_model_input())
    draw = np.random.default_rng(7)
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape).astype(np.float32), state))
    return model


def cluster(
    folder: Path,
    *,
    optimizer: Any,
    training: dict[str, Any],
    rollout: dict[str, Any],
    lora: bool = False,
    noise: float = 0.05,
) -> Any:
    roles = dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh())
    usual = {"max_tokens_to_generate": 6, "max_prompt_length": 8, "kv_cache_size": 32, "temperature": 1.3}
    config = rl_cluster.ClusterConfig(
        role_to_mesh=roles,
        training_config=rl_cluster.RLTrainingConfig(
            **({"actor_optimizer": optimizer, "eval_every_n_steps": 1000, "max_steps": 1} | training)
        ),
        rollout_config=RolloutConfig(**(usual | rollout)),
    )
    tokenizer = tiny_models.make_tokenizer()
    actor = adapted(folder) if lora else load(folder, noise=noise)
    return rl_cluster.RLCluster(actor=actor, reference=load(folder), tokenizer=tokenizer, cluster_config=config)


def vowels(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


@dataclass
class Rollout:
    """What one call of the reward function saw, and the samples behind it."""

    prompts: list[tuple[int, ...]]
    responses: list[tuple[int, ...]]  # with their end tokens
    rewards: list[float]


@dataclass
class Recorded:
    """A run of the learner on PROMPTS."""

    before: Any
    after: Any
    rollouts: list[Rollout] = field(default_factory=list)


def run(
    folder: Path,
    *,
    k: int = 3,
    beta: float = 0.3,
    iterations: int = 1,
    batches: int = 1,
    reward: Any = vowels,
    optimizer: Any = None,
    shuffle: int | None = None,
    prompts: tuple[str, ...] = PROMPTS,
    training: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    lora: bool = False,
) -> Recorded:
    """Trains on `batches` batches of the prompts; what was sampled is read off the cluster, not off the adapter."""
    optimizer = optimizer or optax.sgd(0.02)
    made = cluster(folder, optimizer=optimizer, training=training or {}, rollout=rollout or {}, lora=lora)
    limit = made.get_rollout_config(rl_cluster.Mode.TRAIN).max_tokens_to_generate
    outputs: list[Any] = []
    generate = made.generate

    def recording(**arguments: Any) -> Any:
        outputs.append(generate(**arguments))
        return outputs[-1]

    made.generate = recording
    kind = nnx.LoRAParam if lora else nnx.Param
    recorded = Recorded(parameters(made.actor_trainer.model, kind), None)

    def rewarding(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        rewards = reward(prompts, completions, **columns)
        encode = made.tokenizer.encode
        tokens = [tuple(np.asarray(row).tolist()) for output in outputs for row in output.tokens]
        outputs.clear()
        responses = [row if len(row) == limit else (*row, 0) for row in tokens]
        scores = [float("nan") if r is None else r for r in rewards]
        recorded.rollouts.append(Rollout([tuple(encode(p)) for p in prompts], responses, scores))
        return rewards

    settings = GVPOConfig(num_generations=k, num_iterations=iterations, beta=beta)
    learner = GVPOLearner(made, settings, rewarding, data_shuffle_seed=shuffle, model_path=folder)
    learner.train([{"prompts": np.array(prompts)}] * batches)
    recorded.after = parameters(made.actor_trainer.model, kind)
    return recorded


def parameters(model: Any, kind: Any = nnx.Param) -> Any:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kind)))


def logprobs(model: Any, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> jax.Array:
    """(N,) of whole responses, from rows that are padded behind: nothing in them needs a mask but causality."""
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = np.zeros((len(prompts), length), dtype=np.int32)
    inside = np.zeros((len(prompts), length - 1), dtype=bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : len(prompt) + len(response)] = prompt + response
        inside[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    causal = np.broadcast_to(np.tril(np.ones((length, length), dtype=bool)), (len(prompts), length, length))
    positions = np.broadcast_to(np.arange(length), ids.shape)
    logits, _ = model(jnp.asarray(ids), jnp.asarray(positions), None, jnp.asarray(causal))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(inside, chosen, 0.0).sum(axis=1)


def whole_step(
    folder: Path, at: Any, rollouts: list[Rollout], *, k: int, beta: float, rate: float = 0.02, lora: bool = False
) -> Any:
    """Parameters after one SGD step at `at` along the gradient of GVPO's loss over all the rows, by 2 beta."""
    model, base = adapted(folder) if lora else load(folder), load(folder)
    wanted = nnx.DiffState(0, nnx.LoRAParam) if lora else 0
    nnx.update(model, jax.tree.map(jnp.asarray, at))
    prompts = [p for rollout in rollouts for p in rollout.prompts]
    responses = [r for rollout in rollouts for r in rollout.responses]
    rewards = jnp.asarray([r for rollout in rollouts for r in rollout.rewards])
    ids = jnp.arange(len(prompts)) // k
    ref = nnx.jit(lambda of: logprobs(of, prompts, responses))(base)

    def loss(of: Any) -> jax.Array:
        rows = (logprobs(of, prompts, responses), ref, rewards, ids)
        options = {"beta": beta, "num_groups": len(prompts) // k}
        return gvpo_loss(*rows, **options).loss / (2 * beta) if beta else gvpo_surrogate(*rows, **options)

    gradient = nnx.to_pure_dict(nnx.jit(nnx.grad(loss, argnums=wanted))(model))
    return jax.tree.map(lambda p, g: p - rate * np.asarray(g), at, gradient)


def apart(one: Any, other: Any, start: Any) -> float:
    """Norm of the difference of two changes from `start`, over the norm of the second."""
    norm = lambda tree: sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in jax.tree.leaves(tree)) ** 0.5
    difference = jax.tree.map(lambda a, b: a - b, one, other)
    return norm(difference) / norm(jax.tree.map(lambda a, b: a - b, other, start))
