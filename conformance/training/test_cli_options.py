"""What the commands say and take: evaluations, help, suggestions, mistakes on the command line."""

import json

import pytest
import table_run

pytest.importorskip("tyro", reason="the command line's extra is not installed")

from gvpo_core.training import cli
from gvpo_core.training.config import Config
from gvpo_core.training.config.mappings import with_mapping_option
from gvpo_core.training.terminal.text import columns, fit

pytestmark = pytest.mark.core


def gvpo(capfd, *arguments):
    status = cli.main([str(a) for a in arguments])
    said = capfd.readouterr()
    return status, said.out, said.err


def records(folder, kind):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


COMMANDS = ("init", "train", "train-reward", "collect", "eval", "export", "report", "doctor")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=["gvpo", *COMMANDS])
def test_help_fits_80_columns(command, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        status = cli.main([*command, "--help"])
    except SystemExit as ended:  # argparse's own
        status = ended.code
    out = capfd.readouterr().out
    lines = out.splitlines()
    assert not status and len(lines) > 4
    assert max(map(len, lines)) <= 80
    if not command:
        assert all(f"gvpo {name}" in out for name in COMMANDS)


def test_eval_prints_a_line_takes_another_file_and_compares_with_the_start(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=6)
    assert gvpo(capfd, "train", config)[0] == 0
    run = tmp_path / "run"
    last = records(tmp_path, "eval")[-1]
    status, out, _ = gvpo(capfd, "eval", run)
    assert status == 0 and out.startswith(f"newest: reward {fit(last['eval/reward'], 8)} +- ")
    assert "on 3 prompts" in out and len(out.splitlines()) == 1
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "p0", "answer": "b"}\n')
    status, out, _ = gvpo(capfd, "eval", run, "--data", other, "--json")
    assert status == 0 and json.loads(out)["eval/prompts"] == 1
    status, out, _ = gvpo(capfd, "eval", run, "--compare", "initial", "--json")
    found = json.loads(out)
    assert found["compared"]["checkpoint"] == "initial"
    assert found["compared"]["eval/reward"] == records(tmp_path, "eval")[0]["eval/reward"]
    assert found["difference"] == pytest.approx(found["eval/reward"] - found["compared"]["eval/reward"])
    status, out, _ = gvpo(capfd, "eval", run, "--compare", "initial")
    assert [line.split(":")[0] for line in out.splitlines()] == ["newest", "initial", "newest - initial"]
    assert gvpo(capfd, "eval", run, "--data", tmp_path / "none.jsonl")[0] == 2


def test_changed_settings_are_refused_before_a_model_is_loaded(tmp_path, capfd, monkeypatch):
    from gvpo_core.training.policy import load

    config = table_run.make(tmp_path, steps=2)
    assert gvpo(capfd, "train", config)[0] == 0
    monkeypatch.setattr(load, "load_policy", lambda config: pytest.fail("the model was loaded"))
    status, _, err = gvpo(capfd, "train", config, "--objective.beta", "0.25")
    assert status == 2 and "objective.beta: 0.5 -> 0.25" in err


def test_a_checkpoint_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path, capfd, monkeypatch):
    """`--compare 77` was refused after an evaluation, and an export left an empty folder."""
    from gvpo_core.training.policy import load

    config, run = table_run.make(tmp_path, steps=2), tmp_path / "run"
    assert gvpo(capfd, "train", config)[0] == 0
    monkeypatch.setattr(load, "load_policy", lambda config: pytest.fail("the model was loaded"))
    status, _, err = gvpo(capfd, "eval", run, "--compare", "77")
    assert status == 2 and "has no checkpoint '77'; saved steps: 2" in err
    status, _, err = gvpo(capfd, "export", run, tmp_path / "out", "--checkpoint", "latest")
    assert (
        status == 2 and "no checkpoint 'latest'; expected a saved step, newest, best or initial; saved steps: 2" in err
    )
    assert not (tmp_path / "out").exists()
    status, _, err = gvpo(capfd, "eval", run / "config.toml")
    assert status == 2 and f"config.toml is a file; expected a run folder, such as {run}" in err


def test_help_lists_the_settings_of_a_reward(tmp_path, capfd):
    config = tmp_path / "config.toml"
    config.write_text("")
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(config), "--help"])
    assert left.value.code == 0
    out = capfd.readouterr().out
    assert "--rewards.NAME.function" in out and "--rewards.NAME.timeout" in out


def test_help_escapes_what_would_command_a_terminal_in_values_and_names(tmp_path, capfd):
    config = table_run.make(tmp_path)
    odd = json.dumps("a\x1b]52;\x07\u202eb")
    text = config.read_text().replace("[model]", f"[model]\nrevision = {odd}")
    config.write_text(f"{text}\n[rewards.{odd}]\nfunction = {odd}\noptions = {{ {odd} = [{odd}] }}\n")
    with pytest.raises(SystemExit):
        gvpo(capfd, "train", config, "--help")
    out = capfd.readouterr().out
    assert r"rewards.a\x1b]52;\x07\u202eb" in out and r"(default: 'a\x1b]52;" in out
    assert not set("\x1b\x07\u202e") & set(out)


def test_the_frames_of_help_count_columns(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    config = table_run.make(tmp_path)
    names = ("日本語の報酬" * 4, "e\u0301" * 9, "👍")
    text = config.read_text().replace("[model]", f"[model]\nrevision = {json.dumps('日' * 25)}")
    config.write_text(text + "".join(f'\n[rewards."{name}"]\nfunction = "exact_match"\n' for name in names))
    with pytest.raises(SystemExit):
        gvpo(capfd, "train", config, "--help")
    lines = capfd.readouterr().out.split("\n")
    framed = [line for line in lines if line.startswith("│")]
    assert {columns(line.rstrip()) for line in framed} == {80}
    assert all(any(name in line for line in framed) for name in (*names, "日" * 25))


def test_a_mistake_on_the_command_line_is_not_blamed_on_the_file(tmp_path, capfd):
    config = table_run.make(tmp_path)
    status, _, err = gvpo(capfd, "train", config, "--rollout.responses", "1", "--data.prompt", "")
    assert status == 2 and "options: rollout.responses = 1; expected at least 2" in err
    assert f"{config}:" not in err


@pytest.mark.parametrize("words", [["run.steps=5"], ["-steps", "5"], ["run.steps", "5"]])
def test_an_option_without_two_dashes_is_named_with_the_way_to_write_it(words, tmp_path, capfd):
    """As users of Hydra and of one-dash options write them."""
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), *words)
    assert status == 2 and words[0] in err and "begins with two dashes, as --run.steps 5" in err


def test_a_combination_with_an_option_is_not_blamed_on_the_file(tmp_path, capfd):
    config = table_run.make(tmp_path)
    status, _, err = gvpo(capfd, "train", config, "--rollout.prompts", "0")
    assert status == 2 and "options: objective.minibatches = 1; expected at most rollout.prompts = 0" in err
    assert f"{config}:" not in err


def test_a_config_with_a_byte_order_mark_is_read(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=1)
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert gvpo(capfd, "train", config)[0] == 0


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("num_generations", "rollout.responses"),
        ("max_completion_length", "rollout.max_tokens"),
        ("batch_size", "rollout.prompts"),
        ("output_dir", "run.folder"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("kl_coef", "objective.beta"),
        ("num_train_epochs", "run.steps"),
        ("optimizer.num_train_epochs", "run.steps"),
        ("total_epochs", "run.steps"),
        ("warmup_ratio", "optimizer.warmup"),
        ("bf16", "model.dtype"),
        ("adam_beta1", "optimizer.betas"),
        ("use_vllm", "rollout.sampler"),
        ("temperature", "rollout.temperature"),
        ("gradient_accumulation_steps", "optimizer.micro_batch_tokens"),
        ("promts", "rollout.prompts"),
        ("model.load_in_4bit", "model.quantization"),
        ("optim", "optimizer.name"),
        ("pretrain", "model.path"),
        ("save_strategy", "run.checkpoint_every"),
        ("eval_strategy", "evaluation.every"),
        ("rollout_batch_size", "rollout.prompts"),
        ("generate_max_len", "rollout.max_tokens"),
        ("advantage_estimator", "objective.name"),
        ("early_stopping_patience", "evaluation.patience"),
        ("max_completion_tokens", "rollout.max_tokens"),  # these six were taken for another setting
        ("max_output_tokens", "rollout.max_tokens"),
        ("kl_weight", "objective.beta"),
        ("model", "model.path"),
        ("max_iters", "run.steps"),
        ("checkpoint_dir", "run.folder"),
        ("numGenerations", "rollout.responses"),
        ("samples_per_prompt", "rollout.responses"),
        ("temp", "rollout.temperature"),
        ("rank", "model.lora_rank"),
        ("gradient_clipping", "optimizer.max_gradient_norm"),
        ("random_seed", "run.seed"),
        ("optimizer.grad_accum", "optimizer.micro_batch_tokens"),
        ("dataset_path", "data.train"),
        ("eval_interval", "evaluation.every"),
        ("global_batch_size", "rollout.prompts"),
        ("tensor_parallel_size", "model.mesh_tensor"),
    ],
)
def test_names_of_other_trainers_get_the_right_suggestion(given, meant, tmp_path, capfd):
    config = table_run.make(tmp_path)
    status, _, err = gvpo(capfd, "train", config, f"--{given}", "1")
    assert status == 2 and f"unknown option --{given}; did you mean --{meant}?" in err
    section, _, key = given.rpartition(".")
    text = config.read_text()
    table = f"[{section}]" if section else ""
    if f"[{given}]" in text:  # a section in the file
        return
    new = text.replace(table, f"{table}\n{key} = 1") if section else f"{key} = 1\n{text}"
    config.write_text(new)
    status, _, err = gvpo(capfd, "train", config)
    assert status == 2 and f"{given}; did you mean {meant}?" in err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("engine.tensor_parallel_size", "engine.options"),
        ("engine.max_model_len", "engine.options"),
        ("rollout.tensor_model_parallel_size", "engine.options"),
        ("vllm_tensor_parallel_size", "engine.options"),
        ("engine.base_model", "engine.model"),
        ("engine.path", "engine.model"),
        ("engine.timeout", "engine.deadline"),
        ("engine.port", "engine.url"),
        ("teacher.model_name_or_path", "teacher.path"),
        ("teacher.base_model", "teacher.path"),
        ("teacher.precision", "teacher.dtype"),
        ("teacher.base_url", "teacher.url"),
        ("evaluation.n", "evaluation.responses"),
        ("evaluation.batch_size", "evaluation.prompts"),
        ("actor_rollout_ref.rollout.n", "rollout.responses"),
        ("lora.alpha", "model.lora_alpha"),
        ("optimizer.seed", "run.seed"),
    ],
)
def test_a_suggestion_knows_the_section(given, meant, tmp_path, capfd):
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), f"--{given}", "1")
    assert status == 2 and f"unknown option --{given}; did you mean --{meant}?" in err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("model.context_parallel_size", "context parallel is not supported"),
        ("ulysses_sequence_parallel_size", "context parallel is not supported"),
        ("model.load_in_8bit", "a base in 8 bits is not supported: use model.quantization = 'nf4'"),
        ("resume_from_checkpoint", "gvpo train resumes the run in run.folder by itself"),
        ("reward_funcs", "each reward is a section: [rewards.NAME] with function and weight"),
        ("n_gpus_per_node", "the launcher starts the processes"),
        ("optimizer.dropout", "dropout is always off"),
        ("max_seq_length", "the longest row is the prompt's limit plus the response's"),
        ("gae_lambda", "GVPO has no critic"),
        ("run_name", "the trackers of run.trackers take"),
        ("repetition_penalty", "sampling must cover the model's own distribution"),
    ],
)
def test_what_is_not_supported_is_named(given, why, tmp_path, capfd):
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), f"--{given}", "1")
    assert status == 2 and f"unknown option --{given}; {why}" in err


@pytest.mark.parametrize("name", ["logging_steps", "project_name", "ddp_timeout", "vf_coef"])
def test_a_name_that_nothing_here_matches_gets_no_suggestion(name, tmp_path, capfd):
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), f"--{name}", "1")
    assert status == 2 and f"unknown option --{name}" in err and "did you mean" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout.prompts", 10**12),
        ("rollout.responses", 10**12),
        ("rollout.max_tokens", 10**12),
        ("run.steps", 10**15),
        ("objective.epochs", 10**9),
        ("rewards.right.workers", 10**6),
        ("evaluation.responses", 10**12),
    ],
)
def test_absurd_sizes_are_refused_in_one_line(name, value, tmp_path, capfd):
    config = table_run.make(tmp_path)
    status, _, err = gvpo(capfd, "train", config, f"--{name}", value)
    assert status == 2 and f"{name} = {value}; expected" in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("model.template.enable_thinking", "false", False),
        ("teacher.template.enable_thinking", "True", True),
        ("engine.fields.reasoning_effort", "low", "low"),
        ("engine.fields.stop_token_ids", "[1, 2]", [1, 2]),
        ("engine.options.gpu_memory_utilization", "0.4", 0.4),
    ],
)
def test_one_entry_of_a_mapping_is_set_by_an_option_and_the_others_stay(option, value, wanted):
    section, mapping, name = option.split(".")
    for words in ([f"--{option}", value], [f"--{option}={value}"]):
        config = with_mapping_option(Config(), [f"--{section}.{mapping}.other_name", "1"])
        config = with_mapping_option(config, [f"--{section}.{mapping}.other-name", "2"])
        config = with_mapping_option(config, words)
        assert getattr(getattr(config, section), mapping) == {"other_name": 2, name: wanted}
    with pytest.raises(ValueError, match=f"--{option} expects one value"):
        with_mapping_option(Config(), [f"--{option}", "1", "2"])
    assert with_mapping_option(Config(), [f"--{section}.other.{name}", "1"]) is None


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--rewards.rigth.weight", "unknown option --rewards.rigth.weight; did you mean --rewards.right.weight?"),
        ("--rewards.new.function", "; there is no reward 'new': add [rewards.new] to the file"),
        ("--dryrun", "; did you mean --dry-run?"),
        ("--dry-runn", "; did you mean --dry-run?"),
        ("--from_stp", "; did you mean --from-step?"),
    ],
)
def test_a_reward_and_a_switch_of_the_command_are_suggested(option, said, tmp_path, capfd):
    """--rewards.rigth.weight was taken for --environment.weight."""
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), option, "1")
    assert status == 2 and said in err


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "fp32", "float32"),
        ("model.dtype", "BFloat16", "bfloat16"),
        ("run.backend", "pytorch", "torch"),
        ("run.backend", "Torch", "torch"),
        ("engine.kind", "vlm", "vllm"),
        ("optimizer.schedule", "cosine_with_restarts", "cosine"),
        ("objective.name", "GRPO", "grpo"),
    ],
)
def test_a_value_by_another_name_gets_a_suggestion(name, value, meant, tmp_path, capfd):
    config = table_run.make(tmp_path)
    status, _, err = gvpo(capfd, "train", config, f"--{name}", value)
    assert status == 2 and f"did you mean {meant!r}?" in err
    section, _, key = name.partition(".")
    text = config.read_text()
    lines = [line for line in text.splitlines() if not line.startswith(f"{key} = ")]
    if f"[{section}]" in lines:
        lines.insert(lines.index(f"[{section}]") + 1, f'{key} = "{value}"')
    else:
        lines += [f"[{section}]", f'{key} = "{value}"']
    config.write_text("\n".join(lines))
    status, _, err = gvpo(capfd, "train", config)
    assert status == 2 and f"did you mean {meant!r}?" in err


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://huggingface.co/datasets/openai/gsm8k", "'https://huggingface.co/datasets/openai/gsm8k': there is no"),
        ("https://hf.co/datasets/openai/gsm8k/tree/main", "a dataset of the hub is given by its name, 'openai/gsm8k'"),
        ("s3://bucket/rows.jsonl", "'s3://bucket/rows.jsonl': there is no such file or folder; expected a file"),
        ("openai/gsm8k:main", "given by its name, 'openai/gsm8k', and its part by data.subset or data.split"),
        ("gsm8k", "a dataset of the hub has an owner: OWNER/gsm8k"),
    ],
)
def test_data_that_is_no_path_is_named_as_it_was_typed(source, said, tmp_path, capfd):
    status, _, err = gvpo(capfd, "train", table_run.make(tmp_path), "--data.train", source)
    assert status == 2 and said in err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("https://huggingface.co/Qwen/Qwen3-0.6B", "a model of the hub is given by its name, 'Qwen/Qwen3-0.6B'"),
        ("not a name!", "there is no such folder, and a hub name is NAME or OWNER/NAME"),
    ],
)
def test_init_refuses_what_is_no_name_of_the_hub(model, said, tmp_path, capfd):
    status, _, err = gvpo(capfd, "init", tmp_path / "new", "--model", model)
    assert status == 2 and said in err and not (tmp_path / "new").exists()


def test_a_command_that_is_not_there_and_a_collection_by_another_name(tmp_path, capfd, monkeypatch):
    status, _, err = gvpo(capfd, "trian")
    assert status == 2 and "there is no command 'trian'; did you mean 'train'?" in err
    monkeypatch.setattr("gvpo_core.training.policy.load.load_policy", lambda config: pytest.fail("it loads a model"))
    status, _, err = gvpo(capfd, "collect", table_run.make(tmp_path), tmp_path / "out.txt")
    assert status == 2 and "expected a name that ends with .jsonl" in err
