"""Settings: reading, overriding, writing back, and the message of each mistake."""

import dataclasses
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gvpo_core.objectives import OBJECTIVES
from gvpo_core.training.cli import commands
from gvpo_core.training.config import Config, ConfigError, DataConfig, ModelConfig, RewardConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.config.file import differences, parse_arguments, read_config, write_config

pytestmark = pytest.mark.core

pytest.importorskip("tyro", reason="the command line's extra is not installed")

GOOD = """
[run]
folder = "runs/a"
seed = 3

[model]
path = "model"

[data]
train = "train.jsonl"

[optimizer]
learning_rate = 1  # an int where a float is wanted

[rewards.correct]
function = "exact_match"
options = {column = "target"}
"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write


def test_reads_what_is_given_and_keeps_the_rest(file):
    config = read_config(file(GOOD))
    assert (config.run.folder, config.run.seed, config.optimizer.learning_rate) == ("runs/a", 3, 1.0)
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.rewards == {"correct": RewardConfig("exact_match", options={"column": "target"})}
    assert config.rollout == Config().rollout


def test_written_settings_read_back_equal(file, tmp_path):
    config = replace(
        read_config(file(GOOD)), model=ModelConfig(path="m", revision="abc", lora_rank=2, lora_targets=("q", "v"))
    )
    write_config(config, tmp_path / "again.toml")
    assert read_config(tmp_path / "again.toml") == config


def test_command_line_overrides_the_file(file):
    path = file(GOOD)
    _, config = parse_arguments(
        [
            str(path),
            "--optimizer.learning-rate",
            "2e-5",
            "--run.trackers",
            "wandb",
            "trackio",
            "--rewards.correct.weight=2",
        ]
    )
    assert config.optimizer.learning_rate == 2e-5
    assert config.run.trackers == ("wandb", "trackio")
    assert config.rewards["correct"].weight == 2.0
    assert config.run.seed == 3


def test_switches_of_the_command_line_are_written_as_in_the_file(file):
    path = str(file(GOOD))
    for words in (["--run.allow_changes", "true"], ["--run.allow-changes=true"], ["--run.allow-changes", "True"]):
        assert parse_arguments([path, *words])[1].run.allow_changes is True
    assert parse_arguments([path, "--run.keep_best", "false"])[1].run.keep_best is False
    assert parse_arguments([path, "--run.folder", "true"])[1].run.folder == "true"


def test_an_override_can_mend_the_file(file):
    broken = GOOD + "\n[rollout]\ntop_p = 0.9\n"
    with pytest.raises(ConfigError, match="allow_truncated_support"):
        read_config(file(broken))
    _, config = parse_arguments([str(file(broken)), "--rollout.top_p", "1.0"])
    assert config.rollout.top_p == 1.0


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--help"])
    assert exit_.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out.replace("│", " "))
    for phrase in ("Peak learning rate.", "(default: 1e-06)", "reward units per nat", "Cuts the support that Cor. 3.2"):
        assert phrase in text


def test_every_mistake_is_reported_at_once_with_its_line(file):
    text = '[run]\nstepz = 3\n[rollout]\nmax_tokens = "many"\nbeta = 0.5\n[objective]\nname = "gvp"\n'
    text += "[optimiser]\nwarmup = 1\n"
    with pytest.raises(ConfigError) as caught:
        read_config(file(text))
    lines = str(caught.value).splitlines()
    assert [re.search(r"config.toml:(\d+): (.*)", line).groups() for line in lines[:5]] == [
        ("2", "unknown field run.stepz; did you mean run.steps?"),
        ("4", "rollout.max_tokens = 'many'; expected int"),
        ("5", "unknown field rollout.beta; did you mean objective.beta?"),
        ("7", f"objective.name = 'gvp'; expected one of {', '.join(map(repr, OBJECTIVES))} or file.py:function;"
         " did you mean 'gvpo'?"),
        ("8", "unknown section optimiser; did you mean optimizer?"),
    ]  # fmt: skip
    # What is missing has no line, and comes last.
    assert [line.partition("config.toml: ")[2].partition(" ")[0] for line in lines[5:]] == [
        "data.train", "model.path", "no",
    ]  # fmt: skip


def test_mistakes_of_every_level_are_reported_together(file, tmp_path):
    """Names, types, ranges, combinations, and the files and functions that the settings name."""
    (tmp_path / "mine.py").write_text("import nowhere_at_all")
    text = '[run]\nstepz = 3\nseed = "one"\nkeep_checkpoints = 0\ntrackers = ["wandbb"]\nbackend = "table"\n'
    text += '[objective]\nminibatches = 9\n[model]\npath = "model"\n'
    text += f'[data]\ntrain = "none.jsonl"\n[rewards.mine]\nfunction = "{tmp_path}/mine.py:f"\n'
    with pytest.raises(ConfigError) as caught:
        parse_arguments([str(file(text))], lambda config: commands._opened(config)[1])
    said = str(caught.value).splitlines()
    assert len(said) == 7, said
    for i, part in enumerate(
        ("config.toml:2: unknown field run.stepz", "config.toml:3: run.seed = 'one'; expected int",
         "config.toml:4: run.keep_checkpoints = 0", "config.toml:8: objective.minibatches = 9",
         "No module named 'nowhere_at_all'", "none.jsonl", "did you mean wandb?")
    ):  # fmt: skip
        assert part in said[i], said[i]


def test_no_mistake_is_reported_twice(file):
    def opened(config: Config) -> list[str]:
        inputs, messages = commands._opened(config)
        with inputs:
            return messages

    with pytest.raises(ConfigError) as caught:
        read_config(file(GOOD.replace('"exact_match"', "3") + "\n[rollout]\nprompts = 'x'\n"))
    assert len(str(caught.value).splitlines()) == 2, caught.value
    with pytest.raises(ConfigError) as caught:
        parse_arguments([str(file(GOOD)), "--rollout.responses", "1"], opened)
    assert str(caught.value).count("rollout.responses = 1") == 1, caught.value
    with pytest.raises(ConfigError) as caught:
        parse_arguments([str(file(GOOD + '\n[objective]\nname = "ppo"\n'))], opened)
    assert str(caught.value).count("objective.name = 'ppo'") == 1, caught.value


def merged(change: str) -> str:
    """GOOD with other lines in a section, which a file may have but once."""
    section, _, lines = change.partition("\n")
    if section in GOOD:
        return GOOD.replace(section, change)
    return f"{GOOD}\n{section}\n{lines}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[rollout]\nprompts = 0", r"config.toml:\d+: rollout.prompts = 0; expected at least 1"),
        ("[rollout]\nresponses = 1", r"rollout.responses = 1; expected at least 2 for gvpo"),
        ("[objective]\nbeta = -0.1", r"objective.beta = -0.1; expected >= 0"),
        ("[objective]\nbeta = nan", r"^\S*config.toml:\d+: objective.beta = nan; expected a finite number$"),
        ("[objective]\nname = 'dpo'\nbeta = 0", r"objective.beta = 0.0; expected > 0 for dpo"),
        ("[objective]\nminibatches = 9", r"objective.minibatches = 9; expected at most rollout.prompts = 8"),
        ("[rollout]\ntop_k = 5", r"rollout.top_k = 5 gives some responses probability 0.*Cor. 3.2"),
        ("[rollout]\ntemperature = 0", r"rollout.temperature = 0.0 gives some responses probability 0"),
        ("[rollout]\nmin_p = 1.5", r"rollout.min_p = 1.5; expected in \[0, 1\)"),
        ("[run]\nsteps = true", r"config.toml:3: run.steps = True; expected int$"),
        ("[run]\nsteps = 3.0", r"config.toml:3: run.steps = 3.0; expected int$"),
        ("[optimizer]\nbetas = [0.9]", r"config.toml:13: optimizer.betas = \[0.9\]; expected a list of float"),
        ("[optimizer]\neps = '1'", r"config.toml:13: optimizer.eps = '1'; expected float$"),
        ("[rewards.slow]\nfunction = 'exact_match'\ntimeout = 0", r"rewards.slow.timeout = 0.0; expected > 0"),
        ("[rewards.mean]\nfunction = 'exact_match'", r"a reward cannot be named 'mean'"),
        ("[objective]\nbeta = 1e308", r"objective.beta = 1e\+308; expected at most 1,000,000,000,000"),
        ("[rollout]\ntemperature = 1e-320", r"rollout.temperature = 1e-320; expected at least 1e-06"),
        ("[evaluation]\ntemperature = 1e308", r"evaluation.temperature = 1e\+308; expected at most 1,000,000"),
        (
            "[rewards.w]\nfunction = 'exact_match'\nweight = -1e308",
            r"rewards.w.weight = -1e\+308; expected within 1e\+12",
        ),
        (
            "[rewards.w]\nfunction = 'exact_match'\nfailure_value = 1e300",
            r"rewards.w.failure_value = 1e\+300; expected",
        ),
        ("[model]\nlora_alpha = 16", r"model.lora_alpha is set and has no effect, as model.lora_rank is 0"),
        ("[replay]\nage = 3", r"replay.age is set and has no effect, as replay.groups is 0"),
        ("[environment]\nmax_turns = -1", r"environment.max_turns is set and has no effect, as environment.path and"),
        ("[rewards.empty]\nweight = 2", r"rewards.empty.function is empty"),
    ],
)
def test_values_that_cannot_be(file, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(file(merged(change)))
    assert "Cannot" not in str(caught.value)  # a section declared twice is another mistake


def test_a_value_in_the_place_of_a_section(file):
    with pytest.raises(ConfigError, match=r"config.toml:1: run = 3; expected a section \[run\]"):
        read_config(file("run = 3\n" + GOOD.replace('[run]\nfolder = "runs/a"\nseed = 3\n', "")))


def test_no_reward_no_data_no_model():
    with pytest.raises(ConfigError) as caught:
        check_config(Config())
    for part in ("data.train", "model.path", "no reward"):
        assert part in str(caught.value)


def test_a_missing_and_a_broken_file(tmp_path, file):
    with pytest.raises(ConfigError, match=r"cannot read the config .*nowhere.toml"):
        read_config(tmp_path / "nowhere.toml")
    saved = file("[run]\n")
    with pytest.raises(ConfigError, match=rf"Is a directory; give the file in it: {saved}$"):
        read_config(saved.parent)
    with pytest.raises(ConfigError, match=r"config.toml is not valid TOML: .*line 2"):
        read_config(file("[run]\nsteps = = 3\n"))


def test_an_unknown_option_gets_a_suggestion(file):
    with pytest.raises(ConfigError, match=r"unknown option --optimizer.lr\b"):
        parse_arguments([str(file(GOOD)), "--optimizer.lr", "1"])
    with pytest.raises(
        ConfigError, match=r"unknown option --optimizer.learing_rate; did you mean --optimizer.learning_rate"
    ):
        parse_arguments([str(file(GOOD)), "--optimizer.learing_rate=1"])


def test_mistakes_of_options_are_reported_with_those_of_the_file(file, capsys):
    text = GOOD.replace("seed = 3", "sead = 3").replace("[optimizer]", "[optimizer]\nbetas = [2, 0]")
    options = [
        "--run.stepz",
        "3",
        "--run.steps",
        "abc",
        "--optimizer.lr=1",
        "--run.backend",
        "tabel",
        "--run.seed",
        "x",
    ]
    with pytest.raises(ConfigError) as caught:
        parse_arguments([str(file(text)), *options, "--optimizer.eps", "0.5", "--run.keep-checkpoints", "0"])
    said = str(caught.value).splitlines()
    for part in (
        "unknown option --run.stepz; did you mean --run.steps?", "unknown option --optimizer.lr",
        "options: Error parsing --run.steps: invalid literal for int() with base 10: 'abc'",
        "options: invalid choice 'tabel' for argument '--run.backend'. Expected one of",
        "options: Error parsing --run.seed: ", "config.toml:4: unknown field run.sead",
        "betas", "run.keep_checkpoints = 0; expected at least 1",
    ):  # fmt: skip
        assert sum(part in line for line in said) == 1, (part, said)
    assert len(said) == 8, said
    assert capsys.readouterr() == ("", "")


def test_a_word_too_many_or_too_few_is_named(file):
    for options, message in (
        (["stray", "--run.steps", "3"], "Unrecognized options: stray"),
        (["--run.steps=4", "5"], "Unrecognized options: 5"),
        (["--run.steps"], "Missing value for argument '--run.steps'"),
        (["--rewards.correct.options", "a"], "--rewards.correct.options"),
    ):
        with pytest.raises(ConfigError, match=f"options: .*{re.escape(message)}") as caught:
            parse_arguments([str(file(GOOD)), *options])
        assert "│" not in str(caught.value) and "╰" not in str(caught.value)


def test_help_and_errors_contain_no_secret(file, capsys):
    secret = "canary-4711"
    text = GOOD.replace('options = {column = "target"}', f'options = {{api_key = "{secret}", n = "1"}}')
    with pytest.raises(SystemExit):
        parse_arguments([str(file(text)), "--help"])
    said = capsys.readouterr().out
    assert "--rewards.correct.options.api-key" in said and "***" in said and secret not in said
    option = "--rewards.correct.options"
    for options in ([option, "n", "2"], [f"{option}.api-key", "x", f"{secret}2"], [f"{option}.api_key"]):
        with pytest.raises(ConfigError, match="options: ") as caught:
            parse_arguments([str(file(text)), *options])
        assert secret not in str(caught.value)


def test_differences_name_old_and_new():
    old = Config(data=DataConfig(train="a"))
    new = replace(old, data=DataConfig(train="b"), rewards={"r": RewardConfig("exact_match")})
    assert differences(old, new)[0] == "data.train: 'a' -> 'b'"
    assert "rewards.r.function: 'unset' -> 'exact_match'" in differences(old, new)


def test_remote_code_needs_a_revision(file):
    text = GOOD.replace('path = "model"', 'path = "someone/model"\ntrust_remote_code = true')
    with pytest.raises(ConfigError, match=r"model.trust_remote_code = True; expected a full commit hash"):
        read_config(file(text))
    for moving in ("main", "v1.0", "0a1b", "0" * 39):
        with pytest.raises(ConfigError, match="a full commit hash"):
            read_config(file(text.replace("[data]", f'revision = "{moving}"\n[data]')))
    pinned = read_config(file(text.replace("[data]", f'revision = "{"0a1b" * 10}"\n[data]')))
    assert pinned.model.trust_remote_code


@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_wraps_each_setting_as_one_paragraph(columns, monkeypatch, capsys):
    pytest.importorskip("tyro")
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    room, paragraphs = int(columns) - 10, []  # within the frame and the indent
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= int(columns)
        if re.match("[│ ] {7}[^ ]", line):
            paragraphs[-1].append(line.strip("│ "))
        else:
            paragraphs.append([])
    explained = [lines for lines in paragraphs if "(default: " in " ".join(lines)]
    for lines in explained:
        for line, following in itertools.pairwise(lines):
            assert len(f"{line} {following.split()[0]}") > room, (line, following)
    assert len(explained) > 100 and max(map(len, explained)) > 1


def test_the_class_of_every_section_is_a_name_of_the_package():
    """EnvironmentConfig was none."""
    import gvpo
    import gvpo_core.training

    classes = {type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)} - {dict} | {RewardConfig}
    assert len(classes) == len(dataclasses.fields(Config))
    for package in (gvpo, gvpo_core.training):
        assert {cls.__name__ for cls in classes} <= {*package.__all__}
        assert all(getattr(package, cls.__name__) is cls for cls in classes)
