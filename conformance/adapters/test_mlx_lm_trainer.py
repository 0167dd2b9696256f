"""GVPO through mlx-lm's own trainer: exact however it batches, and what it refuses."""

import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from places import ROOT, SUPPORT
from ports import free_ports
from required import require

if (asked := os.environ.get("GVPO_SUBJECTS")) and "mlx_lm" not in asked.split(","):
    pytest.skip("GVPO_SUBJECTS does not name mlx_lm: nox -s 'conformance(mlx)' runs these", allow_module_level=True)
require("mlx_lm", "mlx.core", subject="mlx_lm")

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from gvpo_mlx_lm import GVPO, SettingsError, load, load_groups, response_logprobs, train
from gvpo_mlx_lm.batches import epochs
from gvpo_mlx_lm.models import quantized
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.convert import convert
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm_model import BETA, RATE, adapted, parameters, scored_rows

from gvpo_core import gvpo_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def eager():
    """MLX compiles by a C++ compiler on CPU, which takes seconds a step: one test compiles, the others need not."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def groups(folder):
    return load_groups(scored_rows(), load(folder)[1])


def logprob(model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> mx.array:
    """One response alone, without padding."""
    scores = nn.log_softmax(model(mx.array([prompt + response])).astype(mx.float32), axis=-1)[0]
    return sum(scores[len(prompt) + t - 1, token] for t, token in enumerate(response))


def whole_batch(model, groups):
    return mx.stack([logprob(model, g.prompt, r) for g in groups for r in g.responses])


def reference_step(model: nn.Module, base: nn.Module, groups) -> dict[str, np.ndarray]:
    """The change of parameters by SGD along the whole batch's GVPO gradient, by way of the loss itself."""
    ids = mx.array(np.repeat(np.arange(len(groups)), [len(g) for g in groups]).astype(np.int32))
    rewards = mx.array([r for g in groups for r in g.rewards])
    ref = whole_batch(base, groups)
    loss = lambda m: gvpo_loss(whole_batch(m, groups), ref, rewards, ids, beta=BETA).loss / (2 * BETA)
    _, gradient = nn.value_and_grad(model, loss)(model)
    return {name: -RATE * np.array(g) for name, g in tree_flatten(gradient)}


def apart(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of the second."""
    assert a.keys() == b.keys()
    norm = lambda x: sum(float((v.astype(np.float64) ** 2).sum()) for v in x.values()) ** 0.5
    return norm({name: a[name] - b[name] for name in a}) / norm(b)


def arguments(tmp_path: Path, **settings) -> TrainingArgs:
    usual = {
        "iters": 1,
        "batch_size": 14,
        "steps_per_report": 1,
        "adapter_file": str(tmp_path / "adapters.safetensors"),
    }
    return TrainingArgs(**(usual | settings))


class Report:
    """mlx-lm's callback."""

    def __init__(self) -> None:
        self.train: list[dict] = []
        self.val: list[dict] = []

    def on_train_loss_report(self, info: dict) -> None:
        self.train.append(info)

    def on_val_loss_report(self, info: dict) -> None:
        self.val.append(info)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "kind"),
    [
        *((14, 1, "lora"), (7, 2, "lora"), (5, 4, "lora"), (5, 5, "lora"), (4, 4, "lora"), (1, 14, "lora")),
        *((7, 2, "dora"), (2, 7, "dora"), (7, 2, "full"), (2, 7, "full")),
    ],
)
def test_a_step_is_the_whole_batchs(batch_size, accumulation, kind, folder, groups, tmp_path, capfd):
    """Whole groups in a micro-batch where they fit (5 rows), else split ones; the loss reported is Eq. 16's."""
    model, base = adapted(folder, kind=kind), load(folder)[0]
    before, expected = parameters(model), reference_step(model, base, groups)
    ids = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    scores = [np.array(whole_batch(m, groups)) for m in (model, base)]
    loss = float(gvpo_loss(*scores, np.array([r for g in groups for r in g.rewards]), ids, beta=BETA).loss)
    report = Report()
    train(
        model,
        optim.SGD(learning_rate=RATE),
        groups,
        groups,
        args=arguments(tmp_path, batch_size=batch_size, grad_accumulation_steps=accumulation, iters=accumulation),
        model_path=folder,
        beta=BETA,
        groups_per_step=len(groups),
        training_callback=report,
    )
    change = {name: value - before[name] for name, value in parameters(model).items()}
    assert apart(change, expected) < 1e-5
    assert np.mean([r["train_loss"] for r in report.train]) == pytest.approx(loss, rel=1e-5)
    assert report.val[0]["val_loss"] == pytest.approx(loss, rel=1e-5)


def test_steps_follow_each_other_through_shuffled_epochs(folder, groups, tmp_path, capfd):
    """Three steps of two of the four groups: each group once in two steps, each step exact."""
    order = list(islice(epochs(len(groups), 2, seed=5), 3))
    assert sorted(order[0] + order[1]) == [0, 1, 2, 3]
    model, base = adapted(folder), load(folder)[0]
    train(
        model,
        optim.SGD(learning_rate=RATE),
        groups,
        args=arguments(tmp_path, batch_size=5, grad_accumulation_steps=2, iters=6),
        model_path=folder,
        beta=BETA,
        groups_per_step=2,
        seed=5,
    )
    expected = adapted(folder)
    start = parameters(expected)
    for step in order:
        change = reference_step(expected, base, [groups[g] for g in step])
        names = dict(tree_flatten(expected.trainable_parameters()))
        expected.update(tree_unflatten([(name, names[name] + mx.array(change[name])) for name in names]))
    moved = {name: value - start[name] for name, value in parameters(expected).items()}
    assert apart({name: value - start[name] for name, value in parameters(model).items()}, moved) < 1e-5


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [7, 4], ids=["whole groups", "split groups"])
def test_the_compiled_step_is_the_same(batch_size, folder, groups, tmp_path, capfd):
    changes = []
    for compiled in (False, True):
        (mx.enable_compile if compiled else mx.disable_compile)()
        model = adapted(folder)
        before = parameters(model)
        settings = arguments(tmp_path, batch_size=batch_size, grad_accumulation_steps=14 // batch_size, iters=6)
        train(model, optim.SGD(learning_rate=RATE), groups, args=settings, model_path=folder, beta=BETA)
        changes.append({name: value - before[name] for name, value in parameters(model).items()})
    assert apart(*changes) < 1e-5


def test_the_expected_reward_over_the_groups_rises(folder, groups, tmp_path, capfd):
    """To that of Eq. 6's optimum over the scored responses, pi* ~ pi_ref exp(R / beta), as the loss goes to 0."""

    def expected(model, tilt: float = 0.0) -> float:
        logprobs = iter(np.array(whole_batch(model, groups), dtype=np.float64).tolist())
        means = []
        for group in groups:
            s = np.array([next(logprobs) for _ in group.responses]) + tilt * np.array(group.rewards)
            p = np.exp(s - s.max())
            means.append(float((p * group.rewards).sum() / p.sum()))
        return float(np.mean(means))

    model, report = adapted(folder, spread=0.0), Report()
    before, optimum = expected(model), expected(model, tilt=1 / 0.1)
    train(
        model,
        optim.Adam(learning_rate=0.003),
        groups,
        args=arguments(tmp_path, batch_size=7, grad_accumulation_steps=2, iters=80),
        model_path=folder,
        beta=0.1,
        groups_per_step=4,
        training_callback=report,
    )
    assert optimum > before + 0.2
    assert expected(model) == pytest.approx(optimum, abs=0.05)
    losses = [r["train_loss"] for r in report.train]
    assert np.mean(losses[-4:]) < 0.02 * np.mean(losses[:4])


def test_the_reference_is_the_base_and_the_model_comes_back(folder, groups):
    for kind in ("lora", "dora"):
        model, base = adapted(folder, kind=kind), load(folder)[0]
        before = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
        scored = GVPO(model, TrainingArgs(batch_size=3), folder).with_reference(groups)
        reference, moved = (np.array(whole_batch(m, groups)) for m in (base, model))
        np.testing.assert_allclose([x for g in scored for x in g.ref_logprobs], reference, rtol=1e-5)
        assert np.abs(moved - reference).mean() > 0.1
        after = {name: np.array(p) for name, p in tree_flatten(model.parameters())}
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"batch_size": 0}, {}, "batch_size = 0"),
        ({"grad_accumulation_steps": 0}, {}, "grad_accumulation_steps = 0; expected at least 1"),
        ({"iters": 3, "grad_accumulation_steps": 2}, {}, "iters = 3 is not a multiple of grad_accumulation_steps = 2"),
        ({"batch_size": 4}, {}, "4 groups of up to 5 responses may be 14 .* raise grad_accumulation_steps"),
        ({"batch_size": 4}, {"groups_per_step": None}, "1 groups of up to 5 responses may be 5"),
        ({}, {"groups_per_step": 5}, "groups_per_step = 5; expected 1 to 4"),
        ({}, {"beta": -1.0}, "beta is -1.0"),
    ],
)
def test_refused_settings(settings, options, message, folder, groups, tmp_path, capfd):
    options = {"beta": BETA, "groups_per_step": 4} | options
    with pytest.raises(SettingsError, match=message):
        train(
            adapted(folder),
            optim.SGD(learning_rate=RATE),
            groups,
            args=arguments(tmp_path, **settings),
            model_path=folder,
            **options,
        )


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("quantized")
    whole = tiny_models.write_model("llama", made / "whole", hidden_size=64, intermediate_size=128)
    convert(str(whole), str(made / "q4"), quantize=True, q_bits=4, q_group_size=32)
    return made / "q4"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_quantized_weights_take_the_whole_batchs_step(kind, in_four_bits, tmp_path, capfd):
    model, base = adapted(in_four_bits, kind=kind), load(in_four_bits)[0]
    assert quantized(model)
    groups = load_groups(scored_rows(), load(in_four_bits)[1])
    start, wanted = parameters(model), reference_step(model, base, groups)
    args = arguments(tmp_path, batch_size=7, grad_accumulation_steps=2, iters=2)
    options = {"model_path": in_four_bits, "beta": BETA, "groups_per_step": len(groups)}
    train(model, optim.SGD(learning_rate=RATE), groups, args=args, **options)
    assert apart({name: p - start[name] for name, p in parameters(model).items()}, wanted) < 2e-5


def test_quantized_weights_are_not_trained(in_four_bits, tmp_path):
    model, _ = load(in_four_bits)
    model.unfreeze()
    with pytest.raises(SettingsError, match="has quantized weights, which take no gradient: train LoRA"):
        GVPO(model, arguments(tmp_path), in_four_bits)


def test_dropout_is_refused(folder, groups, tmp_path):
    with pytest.raises(SettingsError, match=r"dropout of 0.25 in .*dropout: 0.0"):
        GVPO(adapted(folder, dropout=0.25), arguments(tmp_path), folder)


def test_groups_without_reference_are_refused(folder, groups, tmp_path):
    gvpo = GVPO(adapted(folder), arguments(tmp_path), folder)
    with pytest.raises(SettingsError, match="with_reference"):
        next(gvpo.iterate_batches(groups, 14, 2048, loop=True))


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(folder, tmp_path):
    """mlx.launch over its ring: groups whole on a process, groups split over both, and a process without rows."""
    script = SUPPORT / "mlx_lm_worker.py"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MLX_DISABLE_COMPILE": "1"}
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--env", f"PYTHONPATH={env['PYTHONPATH']}"]
    launch += ["--starting-port", str(free_ports())]
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    for command, out in (([sys.executable], one), ([*launch, "--env", "MLX_DISABLE_COMPILE=1", "--"], two)):
        python = [] if out == one else [sys.executable]
        done = subprocess.run(
            [*command, *python, str(script), str(folder), str(out)],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = np.load(one), np.load(two)
    assert int(second["world"]) == 2 and int(first["world"]) == 1
    for case in ("whole", "split", "idle"):
        a, b = ({k: v for k, v in x.items() if k.startswith(case)} for x in (second, first))
        assert apart(a, b) < 1e-5, case


def test_the_loop_of_the_docs_runs(folder, tmp_path, monkeypatch, capfd):
    text = (ROOT / "docs" / "mlx_lm.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import mlx\.optimizers.*?)```", text, re.DOTALL)
    (row,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(row * 2)
    exec(code.replace("path/to/model", str(folder)).replace("iters=400", "iters=4"), {})
    assert (tmp_path / "adapters.safetensors").stat().st_size > 0


@pytest.mark.parametrize("vocabulary", [152_064, 151_937])
def test_a_large_vocabulary_is_normalised_to_float32(vocabulary):
    """MLX adds float32 one after another on CPU: here 1e-3 nat a token off, and the gradient with it."""
    logits = np.full((1, 3, vocabulary), -5.1, dtype=np.float32)
    logits[0, :, :9] = np.random.default_rng(0).uniform(-1, 1, (3, 9))
    logits = mx.array(logits)
    ids, lengths = mx.array([[5, 6, 7, 8]]), mx.array([[1, 4]])
    score = lambda z: response_logprobs(lambda ids: z, ids, lengths).sum()
    wide = np.array(logits).astype(np.float64)[0]
    normaliser = np.log(np.exp(wide).sum(1))
    expected = wide[range(3), [6, 7, 8]] - normaliser
    assert abs(float(score(logits)) - expected.sum()) < 1e-5
    gradient = np.array(mx.grad(score)(logits))[0].astype(np.float64)
    right = -np.exp(wide - normaliser[:, None])
    right[range(3), [6, 7, 8]] += 1
    np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-11)
