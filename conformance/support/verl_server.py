"""A Ray actor that draws responses with transformers, for verl's agents. Imports no verl: Ray starts it by itself."""

from typing import Any

import torch


class Server:
    """One model on CPU, whose weights verl replaces before each step."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self.model.eval()
        self.steps = 0

    async def generate(self, prompt_ids: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        from verl.workers.rollout.replica import TokenOutput

        most = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or 8
        prompt = torch.tensor([list(prompt_ids)])
        given = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "pad_token_id": 0}
        with torch.no_grad():
            drawn = self.model.generate(
                prompt, max_new_tokens=min(most, 8), output_logits=True, return_dict_in_generate=True, **given
            )
        tokens = drawn.sequences[0, prompt.shape[1] :].tolist()
        logprobs = [float(logits[0].log_softmax(-1)[t]) for logits, t in zip(drawn.logits, tokens, strict=True)]
        return TokenOutput(
            token_ids=tokens, log_probs=logprobs, stop_reason="completed", extra_fields={"global_steps": self.steps}
        )

    async def load(self, state: dict[str, torch.Tensor], steps: int | None) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        unknown = self.model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown, f"verl sent weights that the model lacks: {unknown[:3]}"
        self.steps = steps or 0
        moved = max(float((p - before[name]).abs().max()) for name, p in self.model.named_parameters())
        print(f"SERVER loaded {len(state)} tensors of step {steps}, moved {moved:.3g}", flush=True)

    async def nothing(self, *args: Any, **options: Any) -> None: ...

    wake_up = sleep = abort_all_requests = resume_generation = set_global_steps = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing
