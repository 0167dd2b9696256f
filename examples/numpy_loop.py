"""GVPO in NumPy: a table of logits stands for the language model, and its gradient is written by hand."""

import numpy as np

from gvpo_core import gvpo_coefficients

rng = np.random.default_rng(0)
logits, reference = np.zeros((8, 32)), np.full((8, 32), -np.log(32))  # 8 prompts, 32 possible responses
prompts = np.repeat(np.arange(8), 16)  # 16 samples a prompt; the prompt is the group
for step in range(101):
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    responses = np.argmax(logprobs[prompts] + rng.gumbel(size=(128, 32)), axis=1)  # samples of the policy
    rewards = (responses == 3 * prompts).astype(float)
    policy, ref = logprobs[prompts, responses], reference[prompts, responses]
    c = gvpo_coefficients(policy, ref, rewards, prompts, beta=0.1)
    np.add.at(logits, (prompts, responses), 8 * c)  # the softmax's other term is 0: c sums to 0 in a group
    if step % 50 == 0:
        print(f"step {step} reward {rewards.mean():.2f}")
