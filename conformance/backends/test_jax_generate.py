"""What only gvpo_jax's sampling has: programs, and how few they are."""

import numpy as np
import tiny_models
from jax_policies import policy
from required import require

require(subject="jax")

from gvpo_core.training.sampling import Sampling, row_seed


def test_a_run_compiles_a_handful_of_programs(tmp_path) -> None:
    of_policy = policy(tiny_models.write_model("llama", tmp_path))
    draw, before = np.random.default_rng(0), len(of_policy.programs)
    for step in range(12):
        prompts = [tuple(draw.integers(1, 96, int(draw.integers(3, 16))).tolist()) for _ in range(4)]
        of_policy.generate(prompts, [[row_seed(step, i, j) for j in range(4)] for i in range(4)], Sampling(10))
    assert len(of_policy.programs) - before == 2  # prefill and decode
