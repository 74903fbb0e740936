"""The verdict on figures that were measured where it is known what SBP did, and on changes of them."""

from typing import Any

import pytest

from sbp_assets.pilot.table import as_json, render
from sbp_assets.pilot.verdict import NOT_KNOWN, NOT_WORTH_IT, PAIRED, READINGS, SIMILARITY, WORTH_IT, Judgement, judge


def row(threshold: float, per_document: float, paired: float, copied: float | None, above: float) -> dict[str, Any]:
    return {
        "min_similarity": threshold, "pairs": round(1000 * per_document), "pairs_per_document": per_document,
        "paired_share": paired, "rare_words_in_d1": copied, "rare_words_in_random": None if copied is None else 0.01,
        "random_pairs_above": above,
    }  # fmt: skip


def figures(configured: dict[str, Any], *thresholds: dict[str, Any], **budget: float) -> dict[str, Any]:
    size = {"documents": 1000, "pairs_per_document": configured["pairs_per_document"], "pairs": configured["pairs"]}
    return {
        "documents": {"read": 5000, "whole_corpus": True, "sample": 3000, "d": 1000, "measured": 1000},
        "pairs": {
            **configured,
            "thresholds": list(thresholds),
            "sizes": [{**size, "paired_share": configured["paired_share"]}],
        },
        "budget": {"tokens_of_d": 100_000, "readings": 12, "readings_in_sbp": 6, "tuning_tokens": 2_000_000, **budget},
    }


CONCEPTS = figures(row(0.53, 4.1, 0.97, 0.98, 0.003))
TEXT = figures(row(0.55, 1.18, 0.39, 0.1, 0.004), readings=8, tuning_tokens=916_000)
FIVE_TOKENS = figures(row(0.7, 2.9, 1.0, None, 0.91), tuning_tokens=214_000)


@pytest.mark.parametrize(
    ("found", "verdict"), [(CONCEPTS, WORTH_IT), (TEXT, NOT_WORTH_IT), (FIVE_TOKENS, NOT_WORTH_IT)]
)
def test_what_is_known_to_help_harm_and_do_nothing(found: dict[str, Any], verdict: str):
    judged = judge(found)
    assert judged.verdict == verdict
    assert as_json(found, judged)["verdict"] == verdict
    assert judged.lines[0] in render(found, judged)


def test_criteria_are_judged_on_the_right_side():
    assert [PAIRED.judge(value) for value in (0.45, 0.5, 0.9)] == ["bad", "unknown", "good"]
    assert [SIMILARITY.judge(value) for value in (0.2, 0.05, 0.0)] == ["bad", "unknown", "good"]
    assert READINGS.judge(4) is Judgement.BAD


def test_every_reason_is_given_and_what_is_bad_alone_decides():
    few = judge(figures(row(0.55, 0.9, 0.3, 0.95, 0.002), readings=3))
    assert few.verdict == NOT_WORTH_IT
    assert "only 30% of 1,000 documents have a pair" in few.lines[0] and "read 3 times" in few.lines[0]
    between = judge(figures(row(0.55, 0.9, 0.6, 0.95, 0.002)))
    assert between.verdict == NOT_KNOWN and "60% of 1,000" in between.lines[0]


def test_a_threshold_is_advised_only_where_pairs_are_still_told_from_random_ones():
    configured = row(0.7, 0.5, 0.3, 0.95, 0.001)
    good, blind = row(0.5, 2.0, 0.92, 0.7, 0.008), row(0.3, 5.0, 1.0, 0.4, 0.2)
    assert "pairing.min_similarity 0.5, at which 92%" in "\n".join(judge(figures(configured, good, blind)).lines)
    assert "min_similarity 0.3" not in "\n".join(judge(figures(configured, blind)).lines)
    random = row(0.5, 2.0, 0.92, 0.011, 0.008)  # d1 says no more of d2 than a random document does
    assert "min_similarity 0.5" not in "\n".join(judge(figures(configured, random)).lines)


def test_a_larger_d_is_advised_where_the_sample_shows_that_it_has_more_pairs():
    found = figures(row(0.55, 0.9, 0.34, 0.95, 0.002))
    found["pairs"]["sizes"].append({"documents": 3000, "pairs": 6000, "pairs_per_document": 2.0, "paired_share": 0.6})
    assert "a larger D: of 3,000 documents 60% have a pair" in "\n".join(judge(found).lines)
    assert "at the same budget each is read 4.0 times" in "\n".join(judge(found).lines)


def test_of_a_d_that_is_larger_than_the_sample_a_lack_of_pairs_is_not_known():
    found = figures(row(0.55, 0.9, 0.34, 0.95, 0.002))
    found["documents"]["d"] = 1_000_000
    assert judge(found).verdict == NOT_KNOWN


def test_of_documents_that_say_nothing_of_each_other_no_setting_is_advised():
    assert judge(FIVE_TOKENS).lines[1:] == [
        "Change the corpus: here no document says anything of another one, and no setting makes it."
    ]


def test_no_pair_at_all_is_said():
    found = judge(figures(row(0.9, 0.0, 0.0, None, 0.0), tuning_tokens=0))
    assert found.verdict == NOT_WORTH_IT and "there is no pair" in found.lines[0]


def test_a_synthesizer_that_loses_its_subject_decides_against():
    tuning = {
        "synthetic_documents": 300, "subject": {"kept": 0.3, "to_seed": 0.5, "to_random": 0.1},
        "rare_words_in_seed": 0.4, "rare_words_in_random": 0.01,
        "baseline": {"tokens": 100, "heldout_loss": 2.0, "best_heldout_loss": 1.5, "best_heldout_tokens": 75},
    }  # fmt: skip
    found = {**CONCEPTS, "tuning": tuning}
    judged = judge(found)
    assert judged.verdict == NOT_WORTH_IT and "30% of the synthetic documents" in judged.lines[0]
    assert "2.000 at the end, 1.500 at its lowest (at 75% of its tokens)" in render(found, judged)
    tuning["subject"] = {"kept": 0.95, "to_seed": 0.8, "to_random": 0.1}
    assert judge(found).verdict == WORTH_IT
