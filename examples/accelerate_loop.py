"""GVPO in your own loop with accelerate: the rows of a group may be in any micro-batch and on any process.

accelerate launch --num_processes 2 examples/accelerate_loop.py     (or python for one process)
"""

import contextlib

import torch
from accelerate import Accelerator

from gvpo_core import gvpo_coefficients

accelerator = Accelerator()
rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
torch.manual_seed(0)
model = torch.nn.Embedding(8, 32)  # 8 prompts, 32 possible responses: it stands for the language model
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
reference = model.weight.detach().log_softmax(1).to(device)
model, optimizer = accelerator.prepare(model, optimizer)
draw = torch.Generator(device).manual_seed(rank)  # each process samples for itself
for step in range(101):
    shuffled = torch.arange(8).repeat_interleave(16)[torch.randperm(128)]  # the same everywhere
    prompts = shuffled[rank::processes].to(device)

    # Weigh the whole batch: score it without gradient, and gather a few numbers per response.
    with torch.no_grad():
        logprobs = model(prompts).log_softmax(1)
        responses = torch.multinomial(logprobs.exp(), 1, generator=draw)
        rewards = (responses[:, 0] == 3 * prompts).float()
        policy, ref = logprobs.gather(1, responses)[:, 0], reference[prompts].gather(1, responses)[:, 0]
        everywhere = accelerator.gather(torch.stack([policy, ref, rewards], dim=1))
    group_ids = accelerator.gather(prompts)
    coefficients = gvpo_coefficients(*everywhere.unbind(1), group_ids, beta=0.1, num_groups=8)
    local = coefficients.chunk(processes)[rank] * processes  # the processes' gradients are averaged

    # Step along -sum_i c_i grad log pi_i in micro-batches. Sums, so that the step does not depend on their number.
    micro_batches = torch.arange(len(prompts), device=device).split(16)
    for i, rows in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            logprobs = model(prompts[rows]).log_softmax(1).gather(1, responses[rows])[:, 0]
            accelerator.backward(-(local[rows] * logprobs).sum())
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        accelerator.print(f"step {step} reward {everywhere[:, 2].mean():.2f}")
