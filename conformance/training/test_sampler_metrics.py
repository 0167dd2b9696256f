"""What a run says of its sampler: the gap to the policy, the age of its weights, their alerts, column and charts."""

from dataclasses import replace

import pytest
from killing import lasting
from sampler_runs import Copy, lines, run, short
from table_problem import REFERENCE, table

from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.report import write_report
from gvpo_core.training.watch.alerts import BAD, WATCH, Alerts
from gvpo_core.training.watch.columns import columns_for, row, titles

pytestmark = pytest.mark.core


class Old(Copy):
    """Takes the weights of steps 0 and 1 and none after them, and says so."""

    def refresh(self, policy, version):
        if version <= 1:
            super().refresh(policy, version)


def trained(folder, sampler, steps):
    run(config := short(folder, steps), sampler)
    return [record for record in lines(config, "metrics") if record["kind"] == "train"]


def test_the_age_of_the_weights_is_a_metric(tmp_path, capsys):
    records = trained(tmp_path, Old(), 5)
    assert [record["sampler/staleness"] for record in records] == [0, 0, 1, 2, 3]
    assert [record["sampler/staleness/max"] for record in records] == [0, 0, 1, 2, 3]
    found = [[a["key"] for a in record["alerts"] if a["key"] == "staleness"] for record in records]
    assert found == [[], [], *[["staleness"]] * 3]
    assert "are 3 steps behind the policy, at most 0 expected" in records[-1]["alerts"][0]["seen"]


def test_weights_of_no_known_version_have_no_age(tmp_path, capsys):
    (record,) = trained(tmp_path, TablePolicy(table(REFERENCE)), 1)
    assert not [key for key in record if key.startswith("sampler/")]


def test_the_gap_of_weights_that_are_kept_is_an_alert(tmp_path, capsys):
    records = trained(tmp_path, Copy(refreshed=False, tolerance=50.0), 25)
    first = next(r for r in records if any(a["key"] == "sampler_gap" for a in r["alerts"]))
    assert first["step"] > 1 and first["sampler/gap"] > 0.05
    (alert,) = [a for a in first["alerts"] if a["key"] == "sampler_gap"]
    assert alert["level"] == (BAD if first["sampler/gap"] > 0.5 else WATCH) and "nats a token" in alert["seen"]


@pytest.mark.parametrize(
    ("gaps", "levels"),
    [
        ([0.001] * 30, set()),
        ([0.06] * 30, set()),  # another precision: from the first step on
        ([0.01] * 20 + [0.04] * 10, set()),
        ([0.01] * 20 + [0.07] * 10, {WATCH}),
        ([0.6] * 3, {BAD}),
        ([None] * 5, set()),
    ],
)
def test_a_gap_is_an_alert_where_it_grows_or_is_large(gaps, levels):
    alerts = Alerts()
    verdicts = [
        alerts.update({"kind": "train", "step": i, "reward/mean": 0.1, "sampler/gap": g}) for i, g in enumerate(gaps)
    ]
    assert {a.level for v in verdicts for a in v.reasons if a.key == "sampler_gap"} == levels


def test_an_age_that_was_asked_for_is_not_an_alert():
    record = {"kind": "train", "step": 1, "reward/mean": 0.1, "sampler/staleness/max": 2}
    assert [a.key for a in Alerts(ahead=2).update(record).reasons] == []
    assert [a.key for a in Alerts(ahead=1).update(record).reasons] == ["staleness"]


def test_a_resumed_run_repeats_them(tmp_path, capsys):
    for stops in ((12,), (6, 12)):
        for steps in stops:
            config = short(tmp_path / f"{len(stops)}", steps)
            run(replace(config, run=replace(config.run, checkpoint_every=3)), Copy(refreshed=False, tolerance=50.0))
    whole, parts = (lasting(tmp_path / name) for name in "12")
    assert whole == parts and any(record["alerts"] for record in parts if record["kind"] == "train")


def test_a_wide_console_and_the_report_show_the_gap(tmp_path, capsys):
    records = trained(tmp_path, Old(), 4)
    wide = columns_for(140, records[-1])
    assert titles(wide).split().count("gap") == 1 and len(titles(wide)) <= 140
    assert {len(row(record, columns=wide).rpartition(" ")[0]) for record in records} == {
        len(titles(wide)) - len(" state")
    }
    assert "gap" not in titles(columns_for(80, records[-1])) and "gap" not in titles(
        columns_for(140, {"reward/mean": 1})
    )
    page = write_report(tmp_path).read_text()
    assert "Sampler and policy" in page and "Age of the sampler's weights" in page.replace("&#x27;", "'")
