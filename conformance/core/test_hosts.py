"""What the adapters share: the window of a host's releases, and settings that are rejected by name."""

import subprocess
import sys

import pytest

from gvpo_core.hosts import (
    Host,
    HostError,
    Rule,
    SettingsError,
    at_random,
    check_beta,
    equals,
    is_beta,
    is_number,
    refused,
)

pytestmark = pytest.mark.core
HOST = Host("gvpo_x", "x", "x-trainer", "0.9", "0.10", "score otherwise")


@pytest.mark.parametrize("found", ["0.9", "0.9.0", "0.9.12", "0.9rc1", "0.9.1+local", "0.9.1.post2"])
def test_a_release_in_the_window_passes(found: str) -> None:
    HOST.check(found)


@pytest.mark.parametrize("found", ["0.8.9", "0.10", "0.10.0.dev1", "0.10rc1", "1.0", "1", "unknown", ""])
def test_another_release_is_rejected_and_the_error_says_what_to_install(found: str) -> None:
    with pytest.raises(HostError) as error:
        HOST.check(found)
    assert str(error.value) == (
        f"x-trainer {found} is installed; gvpo_x was tried with >=0.9,<0.10, and another release may score otherwise:"
        ' pip install "x-trainer>=0.9,<0.10"'
    )
    assert isinstance(error.value, ImportError)


def test_a_host_that_is_not_installed_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r'gvpo_x needs x-trainer \(.*x-trainer.*\): pip install "gvpo\[x\]"'):
        HOST.check()


def test_the_installed_release_is_looked_up() -> None:
    Host("gvpo_x", "x", "numpy", "1", "100", "").check()
    with pytest.raises(HostError, match=r"numpy \d.* is installed; gvpo_x was tried with >=0.1,<0.2"):
        Host("gvpo_x", "x", "numpy", "0.1", "0.2", "").check()


def test_every_broken_rule_is_one_line() -> None:
    rules = [
        Rule("loss", equals("a", "b"), "a or b", "the others divide"),
        Rule("beta", is_beta, "a number", "it is beta"),
        Rule("clip", equals(None), "None", "no ratio"),
    ]
    settings = {"loss": "c", "beta": 0.1, "clip": 0.2}
    assert refused(rules, settings.__getitem__) == [
        "loss is 'c'; set it to a or b: the others divide",
        "clip is 0.2; set it to None: no ratio",
    ]
    assert refused(rules, {"loss": "b", "beta": 0, "clip": None}.__getitem__) == []


@pytest.mark.parametrize("beta", [None, "0.1", -0.1, float("inf"), float("nan"), True])
def test_a_beta_that_is_not_finite_is_rejected(beta: object) -> None:
    assert not is_beta(beta)
    with pytest.raises(SettingsError, match="expected a finite number of at least 0, reward units per nat"):
        check_beta(beta)


def test_numbers() -> None:
    assert is_number(0) and is_number(-1.5) and is_beta(0) and is_beta(3)
    assert not is_number(False) and not is_number("1")
    check_beta(0.1)


class Dropout:
    def __init__(self, p: float) -> None:
        self.p = p


class Block:
    def __init__(self, **settings: object) -> None:
        vars(self).update(settings)


def test_what_changes_activations_at_random_is_named() -> None:
    quiet = [Dropout(0.0), Block(p=0.5, attention_dropout=0.0, jitter_noise=0.0, drop_path=None)]
    assert at_random(quiet) == []
    loud = [Dropout(0.5), Block(attention_dropout=0.1), Block(router_jitter=0.01), Block(layerdrop=0.3)]
    assert at_random([*loud, *quiet]) == [
        "Block.attention_dropout = 0.1",
        "Block.layerdrop = 0.3",
        "Block.router_jitter = 0.01",
        "Dropout.p = 0.5",
    ]


def test_importing_it_imports_no_host() -> None:
    code = "import sys, gvpo_core.hosts; assert not {'trl', 'verl', 'mlx_lm', 'tunix', 'packaging'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
