"""model.compile in gvpo_torch: compiled layers give scores and gradients, and take the step of plain ones."""

import logging

import batches
import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of, step_difference
from required import require
from torch_policies import parameters, policy

require(subject="torch")
import torch
from gvpo_torch import compiled

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # dynamo's own
OF = batch((4, 3))
# Settings, and programs of a run: each for rows with a mask or without, for one row or several, with gradients or not,
# with adapters or without.
KINDS = {
    "packed": ({}, 4),
    "plain, checkpointing": ({"layout": "plain", "gradient_checkpointing": True}, 2),
    "lora, several micro-batches": ({"lora_rank": 2, "micro_batch_tokens": 30}, 9),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def runs(monkeypatch):
    """Operations of each run of a compiled program; programs are traced, and not made into machine code."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def counted(graph, inputs):
        size = len(graph.graph.nodes)

        def run(*given):
            seen.append(size)
            return graph(*given)

        return make_boxed_func(run)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # else pytest keeps each graph as text
    monkeypatch.setattr(compiled, "BACKEND", aot_autograd(fw_compiler=counted, bw_compiler=counted))
    yield seen
    torch._dynamo.reset()


def compiled_programs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_take_the_step_of_plain_ones(kind, folder, runs) -> None:
    """What is compiled for the checks at load is used again in the steps."""
    settings, programs = KINDS[kind]
    of_policy, plain = (policy(folder, **batches.SMOOTH, **settings, compile=c) for c in (True, False))
    assert len(of_policy.scorer.compiled) == 2 and not plain.scorer.compiled
    steps = []
    for one in (of_policy, plain):
        before = parameters(one)
        runs.clear()
        scores = [one.logprobs(OF)]
        scored = len(runs)
        scores.append(one.update(OF, coefficients_of(OF)).logprobs)
        assert (scored >= 2 and len(runs) >= scored + 4 and min(runs) > 20) if one is of_policy else not runs
        scores += [one.logprobs(OF), one.logprobs(OF, reference=True)] if "lora" in kind else [one.logprobs(OF)]
        after = parameters(one)
        steps.append((scores, {name: after[name] - before[name] for name in after}))
    np.testing.assert_allclose(steps[0][0], steps[1][0], rtol=0, atol=1e-4)
    assert step_difference(steps[1][1], steps[0][1]) < 1e-5
    assert compiled_programs() <= programs


@pytest.mark.slow
def test_scores_run_a_compiled_program_and_sampling_runs_none(folder, runs) -> None:
    """On a policy whose layers are compiled after its checks at load, which compile several programs."""
    of_policy = policy(folder)
    asked = ([(5, 6, 7), (9,)], [[1, 2], [3, 4]], Sampling(12))
    scored, drawn = of_policy.logprobs(OF), of_policy.generate(*asked)
    scorer = of_policy.scorer
    embeddings = scorer.base.get_input_embeddings()
    scorer.compiled = compiled.compile_layers(scorer.decoder, embeddings, set(scorer._no_split_modules))
    np.testing.assert_allclose(of_policy.logprobs(OF), scored, rtol=0, atol=1e-4)
    assert len(runs) == len(scorer.compiled) == 2 and min(runs) > 20
    assert of_policy.generate(*asked) == drawn
    scorer.own_logits(torch.tensor([[5, 6, 7]], device=of_policy.device))
    assert len(runs) == 2 and all(layer._compiled_call_impl is not None for layer in scorer.compiled)


@pytest.mark.slow
def test_other_lengths_need_few_programs(folder, runs) -> None:
    """Shapes are symbols: ten batches of other lengths compile at most as much again as the first."""
    of_policy = policy(folder, compile=True, **batches.SMOOTH)
    for seed in range(2):
        of_policy.update(batch((4, 3), seed=seed), coefficients_of(batch((4, 3), seed=seed)))
    first = compiled_programs()
    for seed in range(2, 10):
        of = batch((4, 3), seed=seed, longest=5 + 2 * seed)
        of_policy.update(of, coefficients_of(of))
    assert first > 0 and compiled_programs() <= first + 1


def test_layers_that_cannot_be_compiled_whole_are_refused(folder, runs, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward

    def breaks(self, x):
        print(end="")
        return plain(self, x) * (1 + 0 * float(x.sum()))

    monkeypatch.setattr(LlamaMLP, "forward", breaks)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot be scored with model.compile = true: \w+: \w+"):
        policy(folder, compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of inductor and what it imports
def test_machine_code_takes_the_step_of_plain_layers(folder) -> None:
    """As a run does it, by inductor."""
    torch._dynamo.reset()
    of_policy, plain = (policy(folder, **batches.SMOOTH, compile=c) for c in (True, False))
    moved = []
    for one in (of_policy, plain):
        before = parameters(one)
        one.update(OF, coefficients_of(OF))
        after = parameters(one)
        moved.append({name: after[name] - before[name] for name in after})
    assert torch._dynamo.utils.counters["inductor"], "nothing was compiled"
    assert step_difference(moved[1], moved[0]) < 1e-5
