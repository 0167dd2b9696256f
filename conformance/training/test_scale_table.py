"""The counts of `nox -s scale`: what is beyond its bound fails, and docs/scaling.md is what the saved counts say."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytestmark = pytest.mark.core
ROOT = Path(__file__).parents[2]


@pytest.fixture
def scale(monkeypatch, tmp_path):
    """benchmarks.scale.__main__, whose modules, results and page lie in a folder of the test."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale import __main__ as scale
    from benchmarks.scale import table

    monkeypatch.setattr(table, "FOLDER", tmp_path)
    monkeypatch.setattr(scale, "FOLDER", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(table, "PAGE", tmp_path / "scaling.md")
    (tmp_path / "scaling.md").write_text(
        "before\n<!-- jobs: written by nox -s scale -->\n<!-- end of jobs -->\n"
        "between\n<!-- counts: written by nox -s scale -->\nold\n<!-- end of counts -->\nafter\n"
    )
    (tmp_path / "torch_tokens.py").touch()
    return scale


@pytest.mark.parametrize(("now", "status"), [(2.0, 0), (2.5, 1), (math.nan, 1)])
def test_a_count_beyond_its_bound_fails_and_is_written(scale, monkeypatch, tmp_path, capsys, now, status) -> None:
    from benchmarks.scale.table import Count

    monkeypatch.setattr(scale, "count", lambda module: [Count("waits", "J1", "a token", 3.0, now, 2.0)])
    assert scale.main(["torch"]) == status
    assert ("beyond its bound: waits" in capsys.readouterr().err) == bool(status)
    page = (tmp_path / "scaling.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "\nbetween\n" in page and "old" not in page
    shown = f"{now:.4g}" if status == 0 else f"**{now:.4g}**"
    assert f"| torch | waits, a token | J1 | 3 | {shown} | 2 |" in page
    assert "torch_tokens" in json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("counts", [None, []])
def test_a_module_that_counts_nothing_fails(scale, monkeypatch, counts) -> None:
    monkeypatch.setattr(scale, "count", lambda module: counts)
    assert scale.main(["torch_tokens"]) == 1


def test_an_unknown_backend_is_named(scale, capsys) -> None:
    assert scale.main(["tensorflow"]) == 2
    assert "nothing to count for tensorflow; expected a backend or one of ['torch_tokens']" in capsys.readouterr().err


def test_a_module_counts_in_a_process_of_its_own(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale import __main__ as scale

    assert scale.count("no_such_module") is None


def test_the_page_is_that_of_the_saved_counts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale.table import PAGE, page, read_results

    text = PAGE.read_text(encoding="utf-8")
    assert page(text, read_results()) == text
    assert all(count.within for counts in read_results().values() for count in counts)


def test_jobs_have_the_models_parameters_and_a_steps_flops(monkeypatch) -> None:
    """Parameters: those of the released checkpoints. FLOPs: 8 N a token (reference 2, forward 2, backward 4), the head
    on predicted tokens alone, and attention within 10 % of them at these lengths for a short job.
    """
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale.jobs import JOBS, QWEN_1_5B, QWEN_3B, QWEN_7B

    parameters = [model.parameters for model in (QWEN_1_5B, QWEN_3B, QWEN_7B)]
    assert parameters == [1_543_714_304, 3_085_938_688, 7_615_616_512]
    short = replace(JOBS[0], prompt=8, response=8, responses=2)
    products = 8 * (QWEN_1_5B.linear * 64 * (8 + 2 * 8) + QWEN_1_5B.head * 64 * 2 * 8)
    assert products < short.step_flops < 1.001 * products
    assert JOBS[1].step_flops == pytest.approx(0.75 * JOBS[0].step_flops)  # no gradients of the base's weights
    assert JOBS[2].held == pytest.approx(18 * QWEN_7B.parameters / 8)


HELD, OVER = "bytes held for the backward pass, {} / full training", "FLOPs of a step / lower bound, {}"
PROSE = {  # what docs/scaling.md says beside its table: a text, and the counts that its numbers are
    r"in bfloat16 (\S+) \(tiny Llama\), where peft's .* made it (\S+?)\. DoRA": [
        (HELD.format("LoRA"), "tiny llama, bfloat16", "now"),
        (HELD.format("LoRA"), "tiny llama, bfloat16", "before"),
    ],
    r"DoRA holds (\S+) in bfloat16 and (\S+) in float32 \((\S+) and (\S+) with peft's products\)": [
        (HELD.format("DoRA"), "tiny llama, bfloat16", "now"),
        (HELD.format("DoRA"), "tiny llama, float32", "now"),
        (HELD.format("DoRA"), "tiny llama, bfloat16", "before"),
        (HELD.format("DoRA"), "tiny llama, float32", "before"),
    ],
    r"(\S+) of the operations, at most (\S+) of the peak memory": [
        ("operations of a compiled group pass / of an uncompiled one", "tiny llama", "now"),
        ("peak bytes of a compiled group pass / of an uncompiled one", "tiny llama", "bound"),
    ],
    r"16 at once, (\S+) rows are computed per token instead of (\S+) in chunks": [
        ("rows computed / tokens sampled", "tiny llama, 96 ragged rows, 16 at once", "now"),
        ("rows computed / tokens sampled", "tiny llama, 96 ragged rows, 16 at once", "before"),
    ],
    r"costs (\S+) of the bound in FLOPs where a group fits a micro-batch": [
        (OVER.format("groups that fit a micro-batch"), "J1 / 16, ragged lengths", "now"),
    ],
    r"A group in three micro-batches costs (\S+), or (\S+) with gradient checkpointing, of which (\S+) is left": [
        (OVER.format("groups in three micro-batches"), "J1 / 16, full lengths", "now"),
        (OVER.format("groups in three micro-batches, gradient checkpointing"), "J1 / 16, full lengths", "now"),
        (OVER.format("groups in three micro-batches, recomputation not counted"), "J1 / 16, full lengths", "now"),
    ],
    r"scored first cost (\S+) where they fit a micro-batch and (\S+) in three": [
        (OVER.format("groups that fit a micro-batch, scored first"), "J1 / 16, ragged lengths", "now"),
        (OVER.format("groups in three micro-batches, scored first"), "J1 / 16, full lengths", "now"),
    ],
    r"others are scored first: (\S+), or (\S+) with gradient checkpointing \((\S+) and (\S+) if all are\)": [
        (OVER.format("groups of more than 4 micro-batches"), "J1 / 16, full lengths", "now"),
        (OVER.format("groups of more than 4 micro-batches, gradient checkpointing"), "J1 / 16, full lengths", "now"),
        (OVER.format("groups of more than 4 micro-batches"), "J1 / 16, full lengths", "before"),
        (OVER.format("groups of more than 4 micro-batches, gradient checkpointing"), "J1 / 16, full lengths", "before"),
    ],
}


@pytest.mark.parametrize("pattern", PROSE)
def test_the_page_says_in_words_what_its_table_says(pattern, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale.table import PAGE, read_results

    counts = {(count.name, count.job): count for of in read_results().values() for count in of}
    said = re.search(pattern, " ".join(PAGE.read_text(encoding="utf-8").split()))
    assert said, "the page has no such sentence"
    assert list(said.groups()) == [f"{getattr(counts[name, job], when):.2f}" for name, job, when in PROSE[pattern]]


def test_expected_times_are_of_the_measured_rates(monkeypatch) -> None:
    """Of the page's H200; a job with the measurement's own lengths takes the time that was measured."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale.jobs import FULL, H200, JOBS, LORA

    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [c.strip() for c in line.split("|")[1:-1]]) > 3
    }
    shown = lambda name, column: float(rows[name][column].replace(",", ""))
    assert [shown(name, 2) * 1e12 for name in ("reference scored", "update")] == [FULL.scoring, FULL.update]
    assert [shown(name, 1) * 1e12 for name in ("scoring, LoRA", "update, LoRA")] == [LORA.scoring, LORA.update]
    assert [shown("sampling", 1), shown("512, LoRA", 1)] == [FULL.decoded, LORA.decoded]
    measured = replace(JOBS[0], chip=H200, response=FULL.response)
    assert measured.expected_sampling_seconds == pytest.approx(512 * FULL.response / FULL.decoded, rel=0.01)
    assert measured.expected_sampling_seconds == pytest.approx(shown("sampling", 0), rel=0.01)
    phases = shown("reference scored", 0) + shown("update", 0)
    assert measured.expected_step_seconds == pytest.approx(phases, rel=0.01)
    for job in JOBS:
        assert job.expected_sampling_seconds > job.sampling_bytes / job.chip.bandwidth
        assert job.expected_step_seconds > job.step_seconds


def test_rows_hold_their_prompts_or_share_them(monkeypatch) -> None:
    """J1: 512 rows of 2,560 tokens of 28 layers x 2 heads x 128; PyTorch on CUDA and JAX hold a prompt once."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.scale.jobs import JOBS

    assert replace(JOBS[0], shares=False).cache == 512 * 2560 * 28 * 2 * 2 * 128 * 2
    assert JOBS[0].cache == (64 * 512 + 512 * 2048) * 28 * 2 * 2 * 128 * 2
    assert [job.shares for job in JOBS] == [True, True, True, True, False]
