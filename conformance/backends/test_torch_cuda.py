"""A CUDA device takes the CPU's step, samples its tokens and scores as it does: nox -s gpu, on a machine with one."""

import os

import numpy as np
import pytest
import tiny_models
from batches import SMOOTH, batch, coefficients_of, sections, step_difference
from required import require

require(subject="torch")
import torch

if not torch.cuda.is_available():
    if "gpu" in os.environ.get("GVPO_SUBJECTS", "").split(","):
        raise RuntimeError("no CUDA device on this machine")
    pytest.skip("no CUDA device: nox -s gpu runs these", allow_module_level=True)

from gvpo_torch import load

from gvpo_core.training.sampling import Sampling, row_seed

OF = batch((4, 3, 1, 5))
ROWS = np.arange(len(OF))
KINDS = {"full": {}, "lora": {"lora_rank": 3, "learning_rate": 3.0}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"), attention_bias=True)


def made(folder, device, **settings):
    return load(*sections(folder, device, SMOOTH | settings), updates=10, reference=False, seed=0)


def parameters(policy):
    return {name: p.detach().cpu().double().numpy().copy() for name, p in policy._named.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["group", "score"])
def test_the_step_is_the_cpus(kind, strategy, folder):
    moves = []
    for device in ("cpu", "cuda"):
        policy = made(folder, device, strategy=strategy, micro_batch_responses=5, **KINDS[kind])
        before = parameters(policy)
        policy.update(OF, coefficients_of(OF))
        moves.append({name: value - before[name] for name, value in parameters(policy).items()})
    assert step_difference(*moves) < 1e-4


def test_scores_are_the_cpus(folder):
    one, other = (made(folder, device).logprobs(OF) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-4)


def test_bfloat16_is_close(folder):
    one, other = made(folder, "cpu").logprobs(OF), made(folder, "cuda", dtype="bfloat16").logprobs(OF)
    lengths = np.asarray([len(response) for response in OF.responses])
    assert (np.abs(other - one) / lengths).max() < 0.1


def test_samples_are_the_cpus(folder):
    prompts = [(5, 6, 7), tuple(range(20, 32))]
    seeds = [[row_seed(1, i, j) for j in range(4)] for i in range(2)]
    one, other = (made(folder, device).generate(prompts, seeds, Sampling(8)) for device in ("cpu", "cuda"))
    assert other == one


def test_memory_is_the_devices(folder):
    policy = made(folder, "auto")
    assert policy.describe().device.startswith("cuda")
    done = policy.update(OF, coefficients_of(OF))
    assert 0 < done.peak_memory <= torch.cuda.get_device_properties(0).total_memory
