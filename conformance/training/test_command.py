"""The command that resumes a run is the one that it was started with: interpreter, module or code, launcher."""

import shlex
import subprocess
import sys

import pytest

from gvpo_core.training.run.resume import _own, starts_processes

pytestmark = pytest.mark.core

SAY = "import sys; from gvpo_core.training.run.resume import resume_command; print(resume_command(int(sys.argv[1])))"


def said(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_a_command_is_reported_as_it_was_typed(tmp_path):
    script = tmp_path / "my run.py"
    script.write_text(SAY)
    for command in (
        [sys.executable, "-c", SAY, "1", "--x", "a b"],
        [sys.executable, "-X", "utf8", script, "1"],
    ):
        assert said(*command) == shlex.join(map(str, command))


def test_a_launcher_is_part_of_it(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("the parent's command line is read from /proc")
    script, launcher = tmp_path / "run.py", tmp_path / "torchrun"
    script.write_text(SAY)
    launcher.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[2:]], check=True)\n")
    command = [sys.executable, launcher, "--nproc-per-node=2", script, "2"]
    assert said(*command) == shlex.join(map(str, command))


def test_without_a_known_launcher_it_says_to_start_as_before(tmp_path):
    command = [sys.executable, "-c", SAY, "3"]
    assert said(*command) == f"{shlex.join(command)} (in each of the 3 processes)"


def test_a_parents_name_that_is_cut_within_a_character_is_read(tmp_path):
    """The kernel keeps 15 bytes of a script's name, and of one in Cyrillic the half of a letter."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the parent's name is read from /proc")
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import subprocess, sys\n"
        "open('/proc/self/comm', 'wb').write('обучение.py'.encode()[:15])\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"
    )
    command = [sys.executable, "-c", SAY, "3"]
    assert said(sys.executable, parent, *command[1:]) == f"{shlex.join(command)} (in each of the 3 processes)"


def test_settings_not_typed_are_not_invented(monkeypatch):
    assert _own(["/bin/python", "/env/bin/gvpo", "train", "c.toml"], ["/env/bin/gvpo", "train", "c.toml"]) == [
        "gvpo", "train", "c.toml"
    ]  # fmt: skip
    assert _own(["python"], [""]) == []
    assert _own(["python", "-c", "from multiprocessing..."], ["train.py"]) == []
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert _own(["python", "-i", "a.py"], ["a.py"]) == []


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["/env/bin/python3", "/env/bin/torchrun", "--nproc-per-node", "2", "run.py"], True),
        (["python", "-m", "torch.distributed.run", "run.py"], True),
        (["/env/bin/python", "/env/bin/mlx.launch", "-n", "2", "run.py"], True),
        (["mpirun", "-np", "2", "python", "run.py"], True),
        (["/bin/bash", "-c", "torchrun run.py"], False),
        (["python", "run.py", "torchrun"], False),
        ([], False),
    ],
)
def test_launchers_are_known(words, is_one):
    assert starts_processes(words) is is_one
