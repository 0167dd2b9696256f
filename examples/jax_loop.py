"""GVPO in JAX with optax: a table of logits stands for the language model; the step is compiled."""

import jax
import jax.numpy as jnp
import optax

from gvpo_core import gvpo_surrogate

logits = reference = jnp.zeros((8, 32))  # 8 prompts, 32 possible responses
prompts = jnp.repeat(jnp.arange(8), 16)  # 16 samples a prompt; the prompt is the group
optimizer = optax.adam(0.1)
state = optimizer.init(logits)


def logprobs(logits, responses):
    return jax.nn.log_softmax(logits)[prompts, responses]


@jax.jit
def train(logits, state, key):
    responses = jax.random.categorical(key, logits[prompts])
    rewards = (responses == 3 * prompts).astype(jnp.float32)
    ref = logprobs(reference, responses)
    loss = lambda x: gvpo_surrogate(logprobs(x, responses), ref, rewards, prompts, beta=0.1, num_groups=8)
    updates, state = optimizer.update(jax.grad(loss)(logits), state)
    return optax.apply_updates(logits, updates), state, rewards.mean()


for step in range(101):
    logits, state, reward = train(logits, state, jax.random.key(step))
    if step % 50 == 0:
        print(f"step {step} reward {reward:.2f}")
