"""GVPO in MLX: an embedding stands for the language model; the loop is the same with a real one."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from gvpo_core import gvpo_surrogate

mx.random.seed(0)
model, optimizer = nn.Embedding(8, 32), optim.Adam(learning_rate=0.1)  # 8 prompts, 32 possible responses
prompts = mx.repeat(mx.arange(8), 16)  # 16 samples a prompt; the prompt is the group
reference = nn.log_softmax(model(prompts), axis=1)


def loss(model, responses, rewards):
    policy, ref = (
        mx.take_along_axis(x, responses[:, None], axis=1)[:, 0]
        for x in (nn.log_softmax(model(prompts), axis=1), reference)
    )
    return gvpo_surrogate(policy, ref, rewards, prompts, beta=0.1)


for step in range(101):
    responses = mx.random.categorical(model(prompts))
    rewards = (responses == 3 * prompts).astype(mx.float32)
    optimizer.update(model, nn.value_and_grad(model, loss)(model, responses, rewards)[1])
    if step % 50 == 0:
        print(f"step {step} reward {rewards.mean().item():.2f}")
