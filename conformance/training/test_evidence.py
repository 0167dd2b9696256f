"""docs/evidence.md says what its results say, and the cheap experiments give these results again."""

import contextlib
import json
import re

import numpy as np
import pytest
from places import ROOT

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def evidence():
    import sys

    sys.path.insert(0, str(ROOT))
    try:
        import evidence.__main__ as main
    finally:
        sys.path.remove(str(ROOT))
    return main


@pytest.fixture(scope="module")
def results(evidence):
    return json.loads(evidence.RESULTS.read_text(encoding="utf-8"))


def numbers(value) -> list[float]:
    """All numbers of nested dicts and lists, in order."""
    if isinstance(value, dict):
        return [x for key in sorted(value, key=str) for x in numbers(value[key])]
    if isinstance(value, list | tuple):
        return [x for item in value for x in numbers(item)]
    return [float(value)]


def test_the_pages_are_those_of_the_results(evidence, results) -> None:
    pages = evidence.pages(results)
    assert set(pages) == {"evidence.md", "evidence_training.md"}
    for file, text in pages.items():
        assert (ROOT / "docs" / file).read_text(encoding="utf-8") == text, f"run: python -m evidence page ({file})"
        assert len(text.splitlines()) < 200
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (ROOT / "docs" / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_results_support_every_sentence_of_the_pages(evidence, results) -> None:
    assert evidence.broken(results) == []
    assert sum(len(evidence.claim(name).holds(results[name])) for name in evidence.CLAIMS) > 30


def test_a_sentence_that_is_not_true_is_found(evidence, results) -> None:
    wrong = json.loads(json.dumps(results))
    wrong["2_bias"]["mean"][0] *= 1.01
    assert evidence.broken(wrong) == ["claim 2: 1/(k-1) is exact"]


@pytest.mark.parametrize("name", ["2_bias", "3_misaligned", "7_regret"])
def test_cheap_experiments_give_the_results_again(name: str, evidence, results) -> None:
    module = evidence.claim(name)
    assert module.CHEAP
    again = json.loads(json.dumps(module.run()))
    np.testing.assert_allclose(numbers(again), numbers(results[name]), rtol=1e-6, atol=1e-9)


def test_parts_of_the_other_experiments_give_the_results_again(evidence, results) -> None:
    """Claim 1 from two samplers, an ablation of claim 4, cells of the sampled claims 5 and 6, a descent of claim 8."""
    optimum, stability = evidence.claim("1_optimum"), evidence.claim("5_stability")
    for sampler in ("uniform", "cut"):
        _, path = optimum.descend("gvpo", sampler, False, optimum.RATE, steps=120)
        np.testing.assert_allclose(path[:61], results["1_optimum"]["curves"][sampler], rtol=1e-6, atol=1e-12)
    i = stability.RATES.index(10.0)
    seed = stability.FIRST_SEED + i
    runs = stability.sampled_steps("gvpo", stability.SEEDS, stability.STEPS, 10.0, beta=0.5, k=8, seed=seed)
    assert list(stability.outcome(runs, 0.5)) == results["5_stability"]["cells"]["GVPO|0.5|10"]
    parts, stale, plus_plus = (evidence.claim(name) for name in ("4_parts", "6_off_policy", "8_plus_plus"))
    _, _, path = parts.descend("no variance")
    np.testing.assert_allclose(path[::4], results["4_parts"]["curves"]["GVPO without the variance"], rtol=1e-6)
    regrets = stale.regrets("rloo", True, 16, 0, stale.RATES["rloo"])
    again = [regrets.mean(), stale.mean_half_width(regrets)]
    np.testing.assert_allclose(again, results["6_off_policy"]["cells"]["RLOO, clipped ratio|stale 16"], rtol=1e-6)
    path = plus_plus.descend("pi_ref", 0.0, plus_plus.TEACHER, 0 * plus_plus.REWARDS, plus_plus.TEACHER, 1.0)
    np.testing.assert_allclose(path[:300:5], results["8_plus_plus"]["curves"]["pi_ref|0"], rtol=1e-6, atol=1e-12)


def test_an_unknown_claim_is_answered(evidence, capsys) -> None:
    assert evidence.main(["12"]) == 2
    assert "there is no claim 12; expected 1 to 8, page or real" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_runs_resume_and_say_what_is_significant(evidence, tmp_path, monkeypatch, capsys) -> None:
    """A finished run is not run again; the rate is the best on validation; intervals are over the seeds."""
    monkeypatch.syspath_prepend(str(ROOT))
    from evidence import real, real_plan

    trained = []

    def accuracy(run, steps, held_out):
        trained.append(run.name)
        if len(trained) == 40:  # stopped in the middle
            raise KeyboardInterrupt
        best = {"gvpo": 0.7, "grpo": 0.6}.get(run.method, 0.5)
        after = best + run.seed / 1000 - (0.1 if run.rate != real_plan.RATES[1] else 0)
        return {"before": 0.3, "after": after, "half_width": 0.06, "problems": 240, "steps": steps, "seconds": 1.0}

    monkeypatch.setattr(real, "accuracy", accuracy)
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results" / "real.jsonl")
    monkeypatch.setattr(real, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(real, "PICTURE", tmp_path / "page.png")
    monkeypatch.setattr(real, "FOLDER", tmp_path / "claims")
    assert real.main([]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert "24 of 24 tuning runs\nand 15 of 48 reported runs are\nfinished" in (tmp_path / "page.md").read_text("utf-8")
    assert real.main([]) == 0
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    cells = len(real_plan.TASKS) * len(real_plan.METHODS)
    runs = len(real_plan.RATES) + len(real_plan.STALENESS) * len(real_plan.SEEDS)
    assert len(trained) == 1 + cells * runs  # one of them twice
    assert all(f"-{real_plan.RATES[1]:g}-" in name for name in trained if name.startswith("run-"))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "48 of 48 reported runs are\nfinished" in text
    assert "| gcd | 1.2e-05 | 1.2e-05 | 1.2e-05 | 1.2e-05 |" in text
    assert "| basic_arithmetic, 0 steps old: gvpo - grpo | +0.100 +- 0.000 | significant |" in text
    assert "| gcd, 4 steps old | 0.702 +- 0.002 | 0.602 +- 0.002 | 0.502 +- 0.002 | 0.502 +- 0.002 |" in text
    before = len(trained)
    assert real.main([]) == 0 and len(trained) == before


def test_the_page_of_the_real_model_is_that_of_its_results(evidence, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from evidence import real, real_page

    results, elsewhere = real.read_results(real.RESULTS), real.read_results(real.ELSEWHERE)
    assert [sentence for sentence, true in real_page.holds(results, elsewhere).items() if not true] == []
    text = real.page(results, elsewhere)
    assert "48 of 48 reported runs" in text and real_page.SHOWS in text
    assert real.PAGE.read_text(encoding="utf-8") == text, "run: python -m evidence real"
    assert real.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_real_runs_beside_each_other_share_the_runs(evidence, tmp_path, monkeypatch) -> None:
    """What another process is at is left to it, and waited for."""
    monkeypatch.syspath_prepend(str(ROOT))
    from evidence import real

    others, waits, trained = real.tuning_runs()[:2], [], []

    def accuracy(run, steps, held_out):
        trained.append(run.name)
        return {"before": 0.3, "after": 0.5, "half_width": 0.06, "problems": 240, "steps": steps, "seconds": 1.0}

    def wait(seconds):
        """The other process finishes one of its runs, or it is killed."""
        waits.append(seconds)
        if others:
            of, claim = others.pop(0), claims.pop(0)
            if others:
                real.carry_out(of, real.RESULTS, steps=1)
            claim.close()

    monkeypatch.setattr(real, "accuracy", accuracy)
    monkeypatch.setattr(real, "RESULTS", tmp_path / "real.jsonl")
    monkeypatch.setattr(real, "FOLDER", tmp_path / "claims")
    monkeypatch.setattr(real.time, "sleep", wait)
    claims = []
    for of in others:
        claim = contextlib.ExitStack()
        assert claim.enter_context(real.claimed(of))
        claims.append(claim)
    theirs = [of.name for of in others]
    real.carry_out_all(real.RESULTS)
    assert len(waits) == 2 and len(trained) == len(set(trained)) == 72
    assert min(map(trained.index, theirs)) > 20, "a claimed run was taken"
    found = real.read_results(real.RESULTS)
    assert {found[of.name]["steps"] for of in real.tuning_runs()} == {1, real.TUNING_STEPS}


def test_a_stale_sampler_draws_with_old_weights(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from evidence.real import Stale

    class Scorer:
        def __init__(self, value: float) -> None:
            self.weights = {"w": np.array([value])}

        def state_dict(self):
            return {name: Tensor(value) for name, value in self.weights.items()}

        def load_state_dict(self, state) -> None:
            self.weights = {name: value.value for name, value in state.items()}

    class Tensor:
        def __init__(self, value) -> None:
            self.value = value

        def detach(self):
            return self

        def clone(self):
            return Tensor(self.value.copy())

    class Policy:
        def __init__(self, value: float) -> None:
            self.scorer = Scorer(value)

    trained, drawing = Policy(0.0), Policy(-1.0)
    sampler, seen = Stale(drawing, 4), []
    for version in range(8):
        trained.scorer.weights["w"][:] = version
        sampler.refresh(trained, version)
        sampler.refresh(trained, version)  # perhaps again with one version
        seen.append(float(drawing.scorer.weights["w"][0]))
    assert seen == [0, 0, 0, 0, 0, 1, 2, 3]
