"""What the headline runs, in which order and with which settings, and the tables of what is finished."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import headline
from sbp_assets.evaluation.tuning_seeds import compare_arms
from sbp_assets_tests.evaluation.test_tuning_seeds import world
from sbp_assets_tests.tiny import tiny_settings


def test_all_arms_of_a_tuning_seed_come_before_the_next_and_sbp_first() -> None:
    names = [headline.name_of(run) for run in headline.planned(2)]
    assert names[:4] == ["sbp", "unconditional", "random_pairs", "concatenated_pairs"]
    assert names[4:] == ["sbp_1", "unconditional_1", "random_pairs_1", "concatenated_pairs_1"]
    # Branches are made of the profile's own store.
    assert headline.planned(1, ["random_pairs"]) == [("sbp", 0), ("random_pairs", 0)]


def test_another_tuning_seed_changes_tuning_and_sampling_and_nothing_else(tmp_path: Path) -> None:
    experiment = tiny_settings(tmp_path).experiment
    assert headline.changes_of(("sbp", 0), experiment) == {}
    assert headline.changes_of(("sbp", 1), experiment) == {"synthesis.salt": "sbp-1", "synthesizer.seed": 1}
    # Nothing is tuned for these two: a seed of tuning would tune what they do not use.
    for arm, condition in (("unconditional", "none"), ("concatenated_pairs", "pairs")):
        changes = headline.changes_of((arm, 2), experiment)
        assert changes == {"synthesis.condition": condition, "synthesis.salt": "sbp-2"}


def test_what_is_finished_is_remembered_for_these_settings_alone(tmp_path: Path) -> None:
    record = headline.Record(tiny_settings(tmp_path))
    record.add(("random_pairs", 1), 5.0, finished=False)
    assert not headline.Record(tiny_settings(tmp_path)).finished(("random_pairs", 1))
    record.add(("random_pairs", 1), 2.0, finished=True)
    record.add(("random_pairs", 1), 9.0, finished=True)  # it was looked at again
    again = headline.Record(tiny_settings(tmp_path))
    assert again.finished(("random_pairs", 1)) and again.seconds(("random_pairs", 1)) == 7.0
    assert not headline.Record(tiny_settings(tmp_path, {"experiment.pairing.neighbors": 9})).entries


def test_the_seconds_of_the_profiles_own_run_are_kept_though_its_files_are_there_first(tmp_path: Path) -> None:
    record = headline.Record(tiny_settings(tmp_path))
    record.compared.parent.mkdir(parents=True)
    record.compared.touch()
    record.add(("sbp", 0), 5.0, finished=True)
    record.add(("sbp", 0), 9.0, finished=True)
    assert record.seconds(("sbp", 0)) == 5.0


def test_tables_show_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    shared, arms = world(np.random.default_rng(0), 0.01, 0.01, metric="perplexity")
    rows, leads = compare_arms(shared, {"sbp": arms["sbp"], "random_pairs": arms["control"]}, resamples=50)
    for row in rows:
        if row["against"] == "early_stopped":  # a gain that is not clear of zero
            row["delta_oracle_high"] = 0.1
    result = {
        "training_seeds": ["0", "1", "2"], "tuning_seeds": {"sbp": ["0", "1"], "random_pairs": ["0", "1"]},
        "rows": rows, "lead_over_controls": leads, "quality": {"sbp": {"repetition_synthetic": 0.25}},
    }  # fmt: skip
    headline.print_tables(result, {"sbp": 12.0})
    shown = capsys.readouterr().out
    assert "SBP 2, random pairs 2" in shown and "concatenated" not in shown
    final, early = shown.split("against the early-stopped baseline: share")
    assert re.search(r"\| Held-out documents, perplexity \| 7\d% \[\d+%, \d+%\] \| 1\d% \[", final)
    assert "| Held-out documents, perplexity | – | – |" in early and "| sbp | 25.0% | – |" in early
    assert "SBP's lead over each control" in early and "random pairs" in early
