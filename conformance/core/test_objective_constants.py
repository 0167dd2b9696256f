"""Only what is documented as differentiated has a gradient; arrays with a mask are rejected."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import CASES
from reference import gradients
from settings import Setting

import gvpo_core as core

EVEN = next(case for case in CASES if case.name == "even")
EVEN = replace(EVEN, response_weights=np.linspace(0.5, 2.0, len(EVEN.logprobs)))
EVEN = replace(EVEN, rewards=EVEN.rewards - EVEN.rewards.min())  # maxrl rejects negative rewards
CONSTANTS = ("ref_logprobs", "rewards", "old_logprobs", "response_weights")  # and beta
DIFFERENTIATED = ("gvpo_loss.loss", "gvpo_surrogate", "gvpo_regret.series", "dpo_loss", "importance_ratio")


def _functions() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Name -> f(arrays) -> (): every public function of scores, summed to a scalar."""

    def of(function: Callable[..., Any], part: Callable[[Any], Any] = lambda x: x) -> Callable[[dict[str, Any]], Any]:
        def call(a: dict[str, Any]) -> Any:
            scores = (a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])
            options = {} if "dpo" in function.__name__ else {"response_weights": a["response_weights"]}
            return part(function(*scores, beta=a["beta"], num_groups=EVEN.num_groups, **options)).sum()

        return call

    def coefficients(name: str) -> Callable[[dict[str, Any]], Any]:
        def call(a: dict[str, Any]) -> Any:
            scores = (a["logprobs"], a["ref_logprobs"], a["old_logprobs"], a["rewards"], a["group_ids"])
            options = {"response_weights": a["response_weights"]} if name == "gvpo" else {}
            options |= {"beta": a["beta"], "num_groups": EVEN.num_groups, "lengths": a["lengths"]}
            return core.objective_coefficients(name, *scores, **options).sum()

        return call

    def penalised(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
        def call(a: dict[str, Any]) -> Any:
            options = {"beta": a["beta"], "logprobs": a["logprobs"], "ref_logprobs": a["ref_logprobs"]}
            return (function(a["rewards"], a["group_ids"], num_groups=EVEN.num_groups, **options) ** 2).sum()

        return call

    found = {
        "importance_ratio": lambda a: core.importance_ratio(a["logprobs"], a["old_logprobs"]).sum(),
        "clipped_ratio_weights": lambda a: core.clipped_ratio_weights(
            a["logprobs"], a["old_logprobs"], a["rewards"]
        ).sum(),
        "reject_sampling_weights": lambda a: (
            core.reject_sampling_weights(a["rewards"], a["group_ids"], num_groups=EVEN.num_groups) ** 2
        ).sum(),
        "dpo_loss": of(core.dpo_loss),
        "dpo_weights": of(core.dpo_weights, lambda w: w**2),
        "gvpo_weights": of(core.gvpo_weights, lambda w: w**2),
        "gvpo_coefficients": of(core.gvpo_coefficients, lambda w: w**2),
        "gvpo_surrogate": of(core.gvpo_surrogate),
    }
    found |= {f"gvpo_loss.{part}": of(core.gvpo_loss, lambda x, p=part: getattr(x, p)) for part in _LOSS}
    found |= {f"gvpo_regret.{part}": of(core.gvpo_regret, lambda x, p=part: getattr(x, p)) for part in _REGRET}
    found |= {f"{f.__name__}": penalised(f) for f in (core.grpo_weights, core.dr_grpo_weights, core.rloo_weights)}
    return found | {f"objective_coefficients.{name}": coefficients(name) for name in core.OBJECTIVES}


_LOSS = core.GVPOLoss._fields[:8]
_REGRET = core.GVPORegret._fields


def _gradients(setting: Setting, a: dict[str, Any]) -> dict[str, Any]:
    """Name of a function -> its gradient in all constants, which are parts of one array: (4 N + 1,)."""
    n, functions, of = len(EVEN.logprobs), _functions(), setting.subject.value_and_grad
    assert of is not None

    def unpacked(x: Any) -> dict[str, Any]:
        parts = {name: x[i * n : (i + 1) * n] for i, name in enumerate(CONSTANTS)}
        return a | parts | {"beta": x[len(CONSTANTS) * n]}

    x = setting.array(np.concatenate([getattr(EVEN, name) for name in CONSTANTS] + [[EVEN.beta]]))
    if setting.mode == "compiled" and setting.subject.name == "torch":
        # torch.compile makes the backward of a forward: one graph, of the functions that have a gradient
        functions = {key: f for key, f in functions.items() if key in DIFFERENTIATED}
        total = setting.subject.compile(lambda x: sum(f(unpacked(x)) for f in functions.values()))
        return {"all": of(total)(x)[1]}
    grads = {key: of(lambda x, f=f: f(unpacked(x))) for key, f in functions.items()}
    every = lambda x: {key: g(x)[1] for key, g in grads.items()}
    return (setting.subject.compile(every) if setting.mode == "compiled" else every)(x)


@pytest.mark.slow_on("compiled")
@pytest.mark.needs("grad")
@pytest.mark.capability("gradients")
@pytest.mark.dtypes("float32")
def test_reference_rewards_old_logprobs_and_beta_have_no_gradient(setting: Setting) -> None:
    a = {name: x for name, x in setting.arrays(EVEN).items() if x is not None}
    for key, got in _gradients(setting, a).items():
        got = setting.numpy(got)
        assert np.array_equal(got, np.zeros(got.shape)), f"{key}: {got}"


@pytest.mark.needs("grad")
@pytest.mark.capability("gradients")
@pytest.mark.dtypes("float32")
def test_policy_as_its_own_reference_is_a_constant(setting: Setting) -> None:
    """gvpo_loss(x, x, ...): with the reference differentiated too the gradient would be 0."""
    case = replace(EVEN, ref_logprobs=EVEN.logprobs, response_weights=None)
    a = setting.arrays(case)

    def loss(x: Any) -> Any:
        return core.gvpo_loss(x, x, a["rewards"], a["group_ids"], beta=case.beta, num_groups=case.num_groups).loss

    run = setting.subject.value_and_grad(loss)
    if setting.mode == "compiled":
        compiled = setting.subject.compile
        run = setting.subject.value_and_grad(compiled(loss)) if setting.subject.name == "torch" else compiled(run)
    expected = gradients(setting.rounded(case))["gvpo_loss"]
    assert np.abs(expected).max() > 0.01
    setting.check("d gvpo_loss(x, x)", run(a["logprobs"])[1], expected, gradient=True)


def _masked() -> dict[str, Any]:
    values = {"logprobs": np.zeros(4), "ref_logprobs": np.zeros(4), "rewards": np.arange(4.0)}
    return values | {"group_ids": np.array([0, 0, 1, 1])}


@pytest.mark.core
@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "rewards", "group_ids", "valid"])
def test_masked_arrays_are_rejected_by_name(name: str) -> None:
    a = _masked() | {"valid": np.ones(4, bool)}
    a[name] = np.ma.MaskedArray(a[name], mask=[False, True, False, False])
    functions = (
        *(core.gvpo_weights, core.gvpo_coefficients, core.gvpo_surrogate, core.gvpo_loss, core.gvpo_regret),
        *(core.dpo_weights, core.dpo_loss),
    )
    for function in functions:
        with pytest.raises(TypeError, match=f"^{name}: got a numpy masked array; .* pass `valid`"):
            function(**a, beta=0.1)
    for objective in core.OBJECTIVES:
        with pytest.raises(TypeError, match=f"^{name}: got a numpy masked array"):
            core.objective_coefficients(objective, old_logprobs=np.zeros(4), **a, beta=0.1, lengths=np.ones(4))


@pytest.mark.core
def test_masked_arrays_are_rejected_by_every_other_function() -> None:
    masked, ids, plain = np.ma.MaskedArray(np.zeros(4), mask=[0, 1, 0, 0]), np.array([0, 0, 1, 1]), np.zeros(4)
    tokens, mask = np.ma.MaskedArray(np.zeros((2, 2)), mask=[[0, 1], [0, 0]]), np.ones((2, 2), bool)
    calls: dict[str, Callable[[], Any]] = {
        "logprobs": lambda: core.sft_weights(masked),
        "rewards": lambda: core.reject_sampling_weights(masked, ids),
        "rewards ": lambda: core.grpo_weights(masked, ids),
        "rewards  ": lambda: core.dr_grpo_weights(masked, ids),
        "rewards   ": lambda: core.rloo_weights(masked, ids),
        "ref_logprobs": lambda: core.grpo_weights(plain, ids, beta=0.1, logprobs=plain, ref_logprobs=masked),
        "old_logprobs": lambda: core.importance_ratio(plain, masked),
        "advantages": lambda: core.clipped_ratio_weights(plain, plain, masked),
        "chosen_rewards": lambda: core.bradley_terry_loss(masked, plain),
        "token_logprobs": lambda: core.sequence_logprobs(tokens, mask),
        "mask": lambda: core.sequence_logprobs(plain.reshape(2, 2), np.ma.MaskedArray(mask, mask=False)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name.strip()}: got a numpy masked array"):
            call()
    with pytest.raises(TypeError, match="labels is a numpy masked array"):
        core.dense_group_ids(np.ma.MaskedArray([1, 1, 2], mask=[0, 1, 0]))
    with pytest.raises(TypeError, match=r"labels\[1\] is masked"):
        core.dense_group_ids([1, np.ma.masked])


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_a_masked_tensor_is_rejected_by_name(setting: Setting) -> None:
    if setting.subject.name != "torch":
        pytest.skip("torch.masked.MaskedTensor")
    import torch

    a = {name: setting.array(x) for name, x in _masked().items()}
    a["rewards"] = torch.masked.masked_tensor(a["rewards"], torch.tensor([True, False, True, True]))
    with pytest.raises(TypeError, match=r"^rewards: got a MaskedTensor; .* pass `valid`"):
        core.gvpo_loss(**a, beta=0.1)


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
def test_a_sparse_tensor_is_rejected_by_name(setting: Setting) -> None:
    if setting.subject.name != "torch":
        pytest.skip("torch's layouts")
    a = {name: setting.array(x) for name, x in _masked().items()}
    a["logprobs"] = a["logprobs"].to_sparse()
    with pytest.raises(TypeError, match=r"^logprobs: got a tensor of layout torch.sparse_coo; expected a dense one"):
        core.gvpo_loss(**a, beta=0.1)


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_rejected_by_name(setting: Setting) -> None:
    if setting.subject.name != "torch":
        pytest.skip("torch.nested")
    import torch

    a = {name: setting.array(x) for name, x in _masked().items()}
    a["rewards"] = torch.nested.nested_tensor([a["rewards"][:1], a["rewards"][1:]])
    with pytest.raises(TypeError, match=r"^rewards: got a nested tensor; expected a dense one"):
        core.gvpo_loss(**a, beta=0.1)


@pytest.mark.core
def test_the_result_of_gvpo_loss_used_as_a_scalar_names_its_loss() -> None:
    result = core.gvpo_loss(*(_masked()[x] for x in ("logprobs", "ref_logprobs", "rewards", "group_ids")), beta=0.1)
    with pytest.raises(AttributeError, match=r"GVPOLoss has no 'backward'; the scalar to differentiate is .loss"):
        result.backward()
    with pytest.raises(TypeError, match=r"GVPOLoss is a tuple of the loss and its parts; take .loss"):
        float(result)
    assert hasattr(result, "loss") and not hasattr(result, "detach")
