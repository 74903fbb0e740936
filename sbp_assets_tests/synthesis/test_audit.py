"""Every rule finds the rows that break it, and nothing where none does."""

from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.settings import Dedup
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesis import audit
from sbp_assets.synthesis.generate import DOCUMENT_SCHEMA, request_order, sampling_seed
from sbp_assets.synthesis.quality import expected_rows, quality_rows
from sbp_assets_tests.synthesis.test_judge import JUDGEMENTS

SEEDS = ["a", "b"]


def rows(*keys: tuple[str, int]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "id": f"syn-{seed_id}-{rollout}",
                "seed_id": seed_id,
                "rollout": rollout,
                "sampling_seed": 1,
                "text": "abc",
                "n_tokens": 5,
                "finish_reason": "stop",
                "synthesizer_version": "v",
                "engine": "vllm",
            }
            for seed_id, rollout in keys
        ],
        schema=DOCUMENT_SCHEMA,
    )


GOOD = rows(("a", 0), ("b", 0), ("a", 1))
NONE = GOOD[:0]


def test_good_rows_and_an_empty_shard_pass() -> None:
    for table, seeds, budget in ((GOOD, SEEDS, 15), (NONE, [], 0)):
        assert not audit.repeated_ids(table)
        assert not audit.foreign_seeds(table, seeds)
        assert not audit.budget_problems(table, budget)
        assert not audit.bad_rows(table)
        assert not audit.rollout_problems(table, seeds, 0)
        assert audit.length_share(table) == 0


def test_ids_are_unique_and_seeds_are_of_the_shard() -> None:
    assert audit.repeated_ids(pl.concat([GOOD, GOOD[:1]])) == ["syn-a-0"]
    assert audit.foreign_seeds(GOOD, ["a"]) == ["b"]


def test_the_budget_is_reached_and_by_the_last_row() -> None:
    assert audit.budget_problems(GOOD, 16) == ["15 tokens of 16"]
    assert audit.budget_problems(GOOD, 11) == []
    assert "without the last row" in audit.budget_problems(GOOD, 10)[0]
    assert audit.budget_problems(NONE, 1)


@pytest.mark.parametrize(
    "broken", [{"finish_reason": "abort"}, {"finish_reason": None}, {"text": " \n"}, {"id": "syn-a-9"}]
)
def test_a_row_has_a_text_an_end_and_the_id_of_its_seed_and_rollout(broken: dict[str, str | None]) -> None:
    table = GOOD.with_columns([pl.lit(value, dtype=pl.String).alias(name) for name, value in broken.items()])
    assert audit.bad_rows(table)


def test_rollouts_occur_once_in_order_and_leave_few_gaps() -> None:
    assert "repeated" in audit.rollout_problems(rows(("a", 0), ("a", 0)), SEEDS, 9)[0]
    assert "out of order" in audit.rollout_problems(rows(("b", 0), ("a", 0)), SEEDS, 9)[0]
    assert "1 rows are not among" in audit.rollout_problems(rows(("a", 0), ("a", 1)), SEEDS, 0)[0]
    assert not audit.rollout_problems(rows(("a", 0), ("a", 1)), SEEDS, 1), "an empty document leaves a gap"
    drawn = list(islice(request_order(SEEDS, "salt"), 12))
    assert not audit.rollout_problems(rows(*drawn), SEEDS, 0, "salt")
    assert audit.rollout_problems(rows(*drawn), SEEDS, 0), "they did not take turns"
    assert audit.rollout_problems(rows(*drawn[::-1]), SEEDS, 0, "salt")
    assert audit.allowed_empty(3) == 1 and audit.allowed_empty(1000) == 100


def test_tokens_are_those_of_their_documents(tmp_path: Path) -> None:
    def arrays(name: str, encoded: list[list[int]]) -> TokenArrays:
        write_token_arrays(tmp_path / name, GOOD.select("id", "seed_id"), [np.array(ids) for ids in encoded], 300)
        return TokenArrays.load(tmp_path / name)

    def problems(table: pl.DataFrame, tokens: TokenArrays) -> list[str]:
        return audit.token_problems(table, tokens, lambda ids: bytes(ids.tolist()).decode(), 0, 1)

    good = [0, *b"abc", 1]
    assert not problems(GOOD, arrays("good", [good] * 3))
    assert "ids differ" in problems(GOOD[:2], arrays("good", [good] * 3))[0]
    assert "n_tokens 5, array 6" in problems(GOOD, arrays("long", [good, [0, *b"abcd", 1], good]))[0]
    assert "another text" in problems(GOOD, arrays("text", [good, good, [0, *b"abd", 1]]))[0]
    assert "not <bos>" in problems(GOOD, arrays("bos", [[*b"xabc", 1], good, good]))[0]


def test_rows_of_other_requests_are_found() -> None:
    seeds = pl.Series([sampling_seed("salt", *key) for key in GOOD["seed_id", "rollout"].iter_rows()])
    good = GOOD.with_columns(sampling_seed=seeds)
    assert audit.other_requests(good, "salt", "v") == audit.other_requests(NONE, "salt", "v") == []
    assert audit.other_requests(good, "pepper", "v") == audit.other_requests(good, "salt", "w") == good["id"].to_list()
    assert audit.other_requests(good, "salt", None) == good["id"].to_list()
    assert audit.other_requests(good.with_columns(rollout=pl.col("rollout") + 1), "salt", "v") == good["id"].to_list()


def test_rows_of_other_engines_are_found() -> None:
    ids = GOOD["id"].to_list()
    assert audit.other_engines(GOOD) == audit.other_engines(NONE) == []
    assert audit.other_engines(GOOD.with_columns(engine=pl.lit("transformers"))) == []
    one = pl.int_range(pl.len()) == 1
    for engine in ("transformers", None):
        mixed = GOOD.with_columns(engine=pl.when(one).then(pl.lit(engine)).otherwise("engine"))
        assert audit.other_engines(mixed) == [ids[1]]
    assert audit.other_engines(GOOD.with_columns(engine=pl.lit("another"))) == ids
    assert audit.other_engines(GOOD.drop("engine")) == ids, "of a version that recorded none"


def test_miscounted_texts_are_found() -> None:
    def count(texts: list[str]) -> list[int]:
        return [len(text) + 2 for text in texts]

    assert audit.miscounted(GOOD, count) == audit.miscounted(NONE, count) == []
    assert audit.miscounted(GOOD.with_columns(text=pl.lit("abcd")), count) == GOOD["id"].to_list()


def test_the_share_of_cut_documents_is_counted() -> None:
    assert audit.length_share(GOOD.with_columns(finish_reason=pl.lit("length"))) == 1 > audit.MAX_LENGTH_SHARE


def test_quality_rows_are_complete_and_follow_from_their_counts(tmp_path: Path) -> None:
    texts = pl.DataFrame({"text": ["a b c"], "seed_text": ["d"]})
    expected = expected_rows(False, judged=False)
    table = quality_rows(texts, texts.select("text"), Dedup(), 13, None, tmp_path, "1GB")
    assert not audit.quality_problems(table, expected)
    assert audit.quality_problems(table[1:], expected)
    assert audit.quality_problems(table, expected_rows(True, judged=False)), "a row per method"
    assert audit.quality_problems(table.with_columns(value=pl.col("value") + 1.5), expected)
    assert audit.quality_problems(table.with_columns(flagged=pl.col("scored")), expected), "not flagged / scored"
    unscored = table.with_columns(value=pl.lit(None, dtype=pl.Float64))
    assert audit.quality_problems(unscored, expected), "scored but null"
    assert audit.quality_problems(table.with_columns(value=pl.lit(0.0)), expected), "not scored but zero"
    assert audit.quality_problems(table.with_columns(documents=pl.col("sample") + 1), expected)


def test_each_question_has_one_verdict_or_a_reason_for_none() -> None:
    judged = JUDGEMENTS.filter(pl.col("verdict").is_not_null())
    assert not audit.judgement_problems(judged)
    assert not audit.judgement_problems(JUDGEMENTS)
    assert not audit.unjudged_problems(judged)
    assert audit.unjudged_problems(JUDGEMENTS) == ["4 of 5 questions have a verdict; unjudged: 1 timeout"]
    assert audit.judgement_problems(pl.concat([judged, judged[:1]])) == ["non_factual of a"] * 2
    assert audit.judgement_problems(judged.with_columns(unjudged=pl.lit("timeout"))), "a verdict and a reason"
    invented = JUDGEMENTS.with_columns(unjudged=pl.lit(None, dtype=pl.String))
    assert "non_factual of c" in audit.judgement_problems(invented), "neither"
