"""GVPO in PyTorch: an embedding stands for the language model; the loop is the same with a real one."""

import torch

from gvpo_core import gvpo_surrogate

torch.manual_seed(0)
model = torch.nn.Embedding(8, 32)  # 8 prompts, 32 possible responses
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
prompts = torch.arange(8).repeat_interleave(16)  # 16 samples a prompt; the prompt is the group
reference = model(prompts).detach().log_softmax(1)
for step in range(101):
    logprobs = model(prompts).log_softmax(1)
    responses = torch.multinomial(logprobs.detach().exp(), 1)
    rewards = (responses[:, 0] == 3 * prompts).float()
    policy, ref = logprobs.gather(1, responses)[:, 0], reference.gather(1, responses)[:, 0]
    gvpo_surrogate(policy, ref, rewards, prompts, beta=0.1).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step} reward {rewards.mean():.2f}")
