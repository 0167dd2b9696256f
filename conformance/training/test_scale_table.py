"""The counts of `nox -s scale`: what is beyond its bound fails, and docs/scaling.md is what the saved counts say."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

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
