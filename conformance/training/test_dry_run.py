"""`gvpo train --dry-run`: the real samples and rewards of the first step, what to expect, and nothing written."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import table_run

from gvpo_core.training import cli
from gvpo_core.training.cli.dry_run import preview
from gvpo_core.training.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, RolloutConfig
from gvpo_core.training.config.file import read_config
from gvpo_core.training.policy import MemoryFacts, PolicyFacts
from gvpo_core.training.policy.memory import (
    Memory,
    available_memory,
    estimate_memory,
    in_words,
    peak_memory,
    rows_at_once,
)
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core
pytest.importorskip("tyro", reason="the command line's extra is not installed")


def listing(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_it_shows_what_the_first_step_would_sample_and_writes_nothing(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=4)
    before = listing(tmp_path)
    assert cli.main(["train", str(config), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert listing(tmp_path) == before and not (tmp_path / "run").exists()
    assert cli.main(["train", str(config)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    first = [r for r in rows if r["kind"] == "train" and r["step"] == 1]
    for prompt in {r["prompt"] for r in first}:
        rewards = sorted((r["reward"] for r in first if r["prompt"] == prompt), reverse=True)
        said = " ".join("0" if r == 0 else f"{r:.2f}" for r in rewards)
        assert f"  | {prompt}\n  its 6 responses: rewards {said}\n  best: reward" in out
    assert "4 of 2 prompts: 2.67 passes over 3 prompts, 48 responses" in " ".join(out.split())
    assert "(right=" in out and "\x1b" not in out


def test_an_existing_run_stays_as_it_is(tmp_path, capfd):
    config = table_run.make(tmp_path, steps=2)
    assert cli.main(["train", str(config)]) == 0
    before = listing(tmp_path)
    assert cli.main(["train", "--dry-run", str(config)]) == 0
    assert listing(tmp_path) == before


def test_no_parameter_changes(tmp_path):
    config = read_config(table_run.make(tmp_path))
    policy = TablePolicy(json.loads((tmp_path / "table.json").read_text()), config.optimizer, updates=config.updates)
    before = policy.logits.copy()
    rollout = preview(config, policy, console=Console(1, stream=io.StringIO()))
    assert (policy.logits == before).all() and policy.update_count == 0
    assert rollout.num_groups == 2 and len(rollout.completions) == 12


@pytest.mark.parametrize(
    ("old", "new", "status", "message"),
    [
        ("beta = 0.5", "betta = 0.5", 2, "did you mean objective.beta?"),
        ("train.jsonl", "none.jsonl", 2, "there is no such file"),
        ('"exact_match"', '"exact_match"\noptions = {column = "wrong"}', 2, "the data has no column 'wrong'"),
    ],
)
def test_what_would_stop_the_run_stops_it(old, new, status, message, tmp_path, capfd):
    config = table_run.make(tmp_path)
    config.write_text(config.read_text().replace(old, new))
    assert cli.main(["train", str(config), "--dry-run"]) == status
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# A made-up model: 2 layers, 64 wide, of 1e6 parameters, so that every term can be worked out by hand.
FACTS = PolicyFacts(
    backend="made up",
    parameters=1_000_000,
    trainable_parameters=1_000_000,
    layout="plain",
    vocabulary=500,
    memory=MemoryFacts(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, framework=7, head=11),
)


def facts(**memory):
    return replace(FACTS, memory=replace(FACTS.memory, **memory))


CONFIG = Config(
    model=ModelConfig(path="m"),
    rollout=RolloutConfig(prompts=4, responses=3, max_tokens=10),
    optimizer=OptimizerConfig(micro_batch_tokens=60),
)


def test_every_part_of_the_estimate_by_hand():
    # 12 rows of 11 + 10 - 1 = 20 tokens; 60 tokens a micro-batch take 3 of them.
    # A block: 4 x 64 floats of norms, and 2 x 64 + 5 x 4 x 16 + 4 x 128 = 960 numbers.
    block = 4 * 64 * 4 + 960 * 4
    want = Memory(
        framework=7,
        parameters=4_000_000,
        reference=4_000_000,
        optimizer=8_000_000,
        gradients=4_000_000,
        activations=60 * 2 * block,
        head=11 + 2 * 500 * 64 * 4,
        sampling=12 * (21 * 2 * 2 * 2 * 16 * 4 + 500 * 28),
    )
    assert estimate_memory(FACTS, CONFIG, 11) == want
    assert want.peak == sum(want) - want.sampling
    assert want._replace(sampling=10**9).peak == 16_000_007 + 10**9


def test_a_teacher_on_the_same_device_counts():
    base = estimate_memory(FACTS, CONFIG, 11)
    teacher = replace(FACTS, parameters=3_000_000)
    taught = estimate_memory(FACTS, CONFIG, 11, teacher)
    assert taught == base._replace(teacher=12_000_000) and taught.peak == base.peak + 12_000_000
    assert "teacher 0.01" in in_words(taught, None) and "teacher" not in in_words(base, None)
    assert estimate_memory(FACTS, CONFIG, 11, replace(teacher, device="cuda:1")) == base
    narrow = replace(teacher, dtype="bfloat16", trainable_parameters=0)
    assert estimate_memory(FACTS, CONFIG, 11, narrow).teacher == 6_000_000
    quantized = replace(narrow, memory=replace(FACTS.memory, frozen=5))
    assert estimate_memory(FACTS, CONFIG, 11, quantized).teacher == 5
    sharded = with_("model", sharding="fsdp")
    assert estimate_memory(replace(FACTS, ranks=2), sharded, 11, teacher).teacher == 6_000_000


@pytest.mark.parametrize(("device", "counts"), [("", True), ("cuda:0", True), ("cuda", True), ("cuda:1", False)])
def test_a_copy_that_draws_ahead_on_the_same_device_counts(device, counts):
    here = replace(FACTS, device="cuda:0")
    base = estimate_memory(here, CONFIG, 11)
    early = with_("rollout", ahead=2, ahead_device=device)
    copy = FACTS.memory.framework + 4_000_000 + base.sampling
    assert estimate_memory(here, early, 11) == (base._replace(copy=copy) if counts else base)
    assert estimate_memory(here, early, 11).peak == base.peak + copy * counts
    assert estimate_memory(here, with_("rollout", ahead=2, sampler="engine"), 11) == base
    narrow = estimate_memory(replace(here, dtype="bfloat16"), with_("rollout", ahead=2), 11)
    assert narrow.copy == FACTS.memory.framework + 2_000_000 + narrow.sampling
    sharded = replace(with_("model", sharding="fsdp"), rollout=early.rollout)
    ranked = estimate_memory(replace(here, ranks=2), sharded, 11)
    assert ranked.copy == (FACTS.memory.framework + 4_000_000 + ranked.sampling) * counts


def with_(section, **changes):
    return replace(CONFIG, **{section: replace(getattr(CONFIG, section), **changes)})


def test_what_changes_the_estimate_and_how():
    base = estimate_memory(FACTS, CONFIG, 11)
    assert estimate_memory(replace(FACTS, memory=None), CONFIG, 11) is None
    rollout = replace(CONFIG, objective=ObjectiveConfig(reference="rollout"))
    assert estimate_memory(FACTS, rollout, 11).reference == 0
    narrow = estimate_memory(replace(FACTS, dtype="bfloat16"), CONFIG, 11)
    assert narrow.parameters == base.parameters and narrow.reference < base.reference  # float32 masters
    few = replace(FACTS, trainable_parameters=10_000)
    lora = estimate_memory(replace(few, dtype="bfloat16"), with_("model", lora_rank=4), 11)
    assert lora.reference == 0 and lora.optimizer == 80_000 and lora.parameters == 990_000 * 2 + 40_000
    again = estimate_memory(FACTS, with_("model", gradient_checkpointing=True), 11)
    assert again.activations == 60 * (2 * 64 * 4 + (4 * 64 * 4 + 960 * 4))
    assert estimate_memory(FACTS, with_("optimizer", micro_batch_tokens=20), 11).activations == base.activations // 3
    assert estimate_memory(FACTS, with_("optimizer", micro_batch_responses=1), 11).activations == base.activations // 3
    assert base.gradients == 4_000_000
    alone = estimate_memory(facts(allocator=2.0), with_("optimizer", micro_batch_tokens=240), 11)
    assert alone.activations == 8 * base.activations and alone.gradients == max(0, 4_000_000 - alone.activations)
    packed = estimate_memory(replace(FACTS, layout="packed"), CONFIG, 11)  # a row of 11 + 3 x 9 tokens, and its mask
    assert packed.activations == 38 * (base.activations // 60) + 2 * 38**2 * 4
    assert estimate_memory(facts(cache=1), CONFIG, 11).sampling == base.sampling // 12
    grown = estimate_memory(facts(cache_step=32), CONFIG, 11)  # 21 tokens a row take 32
    assert grown.sampling - base.sampling == 12 * 11 * 2 * 2 * 2 * 16 * 4
    assert estimate_memory(facts(sampled=7), CONFIG, 11).sampling == base.sampling + 7  # merged adapters
    shared = estimate_memory(facts(shares_prompts=True, sampled=7), CONFIG, 11)  # 4 prompts of 11 tokens, not 12
    assert base.sampling + 7 - shared.sampling == 8 * 11 * 2 * 2 * 2 * 16 * 4
    held = estimate_memory(replace(facts(frozen=5), trainable_parameters=10_000), with_("model", lora_rank=4), 11)
    assert held.parameters == 40_000 + 5
    assert estimate_memory(facts(moments=7), CONFIG, 11).optimizer == 7
    mesh = estimate_memory(facts(split=4, parts=2), CONFIG, 11)  # of a device: 6 of the 12 rows, one micro-batch
    assert (mesh.parameters, mesh.optimizer, mesh.reference) == (1_000_000, 2_000_000, 1_000_000)
    assert mesh.activations == base.activations and mesh.sampling == base.sampling // 2
    together = estimate_memory(facts(split=4, parts=2, devices=8), CONFIG, 11)  # two copies of the model
    assert together.parameters == 8_000_000 and together.sampling == base.sampling
    long = with_("optimizer", micro_batch_tokens=160)  # 6 rows of 20 tokens take 8: numbers of rows are powers of two
    filled = estimate_memory(facts(split=4, parts=2, fills=True), long, 11)
    assert filled.activations == 160 * (base.activations // 60) and filled.gradients == 1_000_000
    sharded = estimate_memory(replace(FACTS, ranks=2), with_("model", sharding="fsdp"), 11)
    assert sharded.optimizer == base.optimizer // 2 and sharded.sampling == base.sampling // 2


def taken(prompts, rows, token, logits):
    """Bytes of prompts of 1024 tokens, and of rows with 4096 tokens and the logits of one."""
    return prompts * 1024 * token + rows * (4096 * token + logits)


def test_rows_at_once_leave_room_for_prompts_whose_rows_end_late():
    of = [0] * 3 + [1] * 4 + [2] * 2 + [3] * 3
    assert rows_at_once(of, 5, 2, None) == (12, 4) == rows_at_once(of, 5, 2, 4 * 5 + 12 * 2)
    for room in range(4 * 5 + 12 * 2):
        rows, prompts = rows_at_once(of, 5, 2, room)
        fit = [n for n in range(1, 13) if needed(of, n) * 5 + n * 2 <= room]
        assert (rows, prompts) == (max(fit, default=1), needed(of, max(fit, default=1)))
    alone = list(range(6))  # one row a prompt: as many rows as without sharing
    assert all(rows_at_once(alone, 5, 2, 7 * n)[0] == n for n in range(1, 7))


def needed(of, rows):
    """Three times the prompts of any rows that follow one another, at most one a row, at most all."""
    together = max(len(set(of[i : i + rows])) for i in range(len(of) - rows + 1))
    return min(rows, 3 * together, len(set(of)))


def test_generation_takes_no_more_than_its_share_of_what_is_left():
    """J2's shape on 80 GB: the rows of a rank would take more than the device has, and are decoded in parts."""
    sizes = MemoryFacts(
        layers=28, hidden=3584, intermediate=18944, heads=28, kv_heads=4, head_dim=128, device=80 * 10**9
    )
    counts = {"parameters": 7 * 10**9, "trainable_parameters": 7 * 10**9, "vocabulary": 152_064}
    of = replace(FACTS, ranks=8, dtype="bfloat16", memory=sizes, **counts)
    config = Config(
        model=ModelConfig(path="m", sharding="fsdp", gradient_checkpointing=True),
        rollout=RolloutConfig(prompts=128, responses=32, max_tokens=4096),
    )
    whole = estimate_memory(of, config, 1024)
    assert whole.peak > 80e9 and whole.sampling == 512 * (5120 * 2 * 28 * 4 * 128 * 2 + 152_064 * 28)
    capped = estimate_memory(replace(of, memory=replace(sizes, cache_share=0.5)), config, 1024)
    left = 80 * 10**9 - sizes.framework - capped.parameters - capped.reference - capped.optimizer
    row = whole.sampling // 512
    assert capped.sampling == (left // 2) // row * row and capped.peak < 80e9
    shared = estimate_memory(
        replace(of, memory=replace(sizes, cache_share=0.5, shares_prompts=True)), config, 1024
    ).sampling
    token, logits, room = 2 * 28 * 4 * 128 * 2, 152_064 * 28, left // 2
    prompts, rows = next((p, n) for n in range(1, 513) for p in range(1, 17) if shared == taken(p, n, token, logits))
    assert rows > capped.sampling // row and shared <= room < taken(prompts, rows + 1, token, logits)
    tiny = replace(sizes, cache_share=0.5, device=10**9)
    assert estimate_memory(replace(of, memory=tiny), config, 1024).sampling == row  # one row at least


def test_block_attention_needs_no_mask_and_shares_prompts():
    """J1, full, without checkpointing: a dense mask of such a row would be 15 GiB over 28 layers."""
    sizes = MemoryFacts(layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128)
    of = replace(FACTS, dtype="bfloat16", layout="packed", memory=sizes)
    config = Config(
        model=ModelConfig(path="m"),
        rollout=RolloutConfig(prompts=64, responses=8, max_tokens=2048),
        optimizer=OptimizerConfig(micro_batch_tokens=17_000),
    )
    block = 4 * 1536 * 4 + (2 * 1536 + 5 * 12 * 128 + 4 * 8960) * 2  # bytes that a layer keeps a token
    activations = lambda **more: estimate_memory(replace(of, memory=replace(sizes, **more)), config, 512).activations
    casts = of.parameters * 2
    assert activations(in_blocks=True) == (512 + 8 * 2047) * 28 * block + casts  # a group a row
    # With a mask a row of two responses costs more attention than the prompt that it saves.
    assert activations() == 6 * 2559 * 28 * block + 28 * 6 * 2559**2 * 2 + casts


def test_a_deferred_backward_pass_holds_the_inputs_of_layers():
    config = with_("optimizer", micro_batch_tokens=25)  # a group of 3 rows of 20 tokens takes three micro-batches
    base, held = estimate_memory(FACTS, config, 11), estimate_memory(facts(defers=True), config, 11)
    assert held.activations == base.activations + 40 * 2 * 64 * 4
    few = with_(
        "optimizer", micro_batch_tokens=12
    )  # 60 tokens are more than 4 x 12: a row of the group is scored first
    base, held = estimate_memory(FACTS, few, 11), estimate_memory(facts(defers=True), few, 11)
    assert held.activations == base.activations + 20 * 2 * 64 * 4


def test_the_estimate_in_words_and_what_there_is():
    memory = Memory(0, 2**30, 0, 2 * 2**30, 2**30, 2**29, 0, 2**28)
    assert in_words(memory, 8 * 2**30) == (
        "4.50 of 8.00 GiB: parameters 1.00, optimizer 2.00, gradients 1.00, activations 0.50"
    )
    sampling = memory._replace(sampling=3 * 2**30)
    assert in_words(sampling, None, 2) == "6.00 GiB a rank, 2 ranks: parameters 1.00, optimizer 2.00, sampling 3.00"
    assert available_memory(facts(device=5)) == 5
    assert available_memory(FACTS) > 2**28


class Large(TablePolicy):
    def describe(self):
        return facts(device=2**20)


def test_peak_memory_under_a_name_that_is_cut_within_a_character():
    """The kernel keeps 15 bytes of a script's name."""
    name = Path("/proc/self/comm")
    if not name.exists():
        pytest.skip("a process's name is in /proc on Linux alone")
    before = name.read_bytes()
    try:
        name.write_bytes("обучение.py".encode()[:15])
        assert b"\xd0\n" in Path("/proc/self/status").read_bytes().partition(b"Umask")[0]
        assert peak_memory() > 2**20
    finally:
        name.write_bytes(before.strip())


@pytest.mark.slow
def test_peak_memory_is_of_this_process_alone():
    """Not of the process that started it: a notebook with a model in it, say."""
    held = np.ones(2**28 // 8)  # 256 MiB
    assert peak_memory() > held.nbytes
    program = (
        "from gvpo_core.training.policy.memory import peak_memory\n"
        "before = peak_memory()\n"
        "held = b'x' * 2**26\n"
        "print(before, peak_memory() - before)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, grown = map(int, found.split())
    assert before < held.nbytes and 0.9 * 2**26 < grown < 1.2 * 2**26


def test_a_model_that_is_too_large_is_reported(tmp_path):
    config = read_config(table_run.make(tmp_path))
    policy = Large(json.loads((tmp_path / "table.json").read_text()))
    out = io.StringIO()
    preview(config, policy, console=Console(1, stream=out))
    text = " ".join(out.getvalue().split())
    assert "estimated memory 0.02 of 0.00 GiB: framework 0.00, parameters 0.00" in text
    assert "too much memory 0.02 GiB estimated, 0.00 GiB available: lower optimizer.micro_batch_tokens (8192)" in text
