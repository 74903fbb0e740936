"""Which synthetic documents are dropped, on texts whose answers are known."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sbp_assets.settings import Filter, Synthesis
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.filter import (
    DECISION_SCHEMA,
    CopiedShares,
    decision_problems,
    dropped_share,
    kept,
    table_of,
    write_decisions,
)
from sbp_assets_tests.twins import TWINS, extract

D = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
LOOP = "the cat sat down and " * 6
WRITTEN = {
    "00000": [D + " and more", LOOP, "alpha beta gamma delta epsilon"],
    "00001": ["two three", "five four three two one zero"],
}
TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=6)


def frames() -> dict[str, pl.LazyFrame]:
    return {
        shard: pl.LazyFrame(
            {
                "id": [f"syn-{shard}-{n}" for n in range(len(texts))],
                "seed_id": ["d"] * len(texts),
                "text": texts,
                "n_tokens": [10 * (n + 1) for n in range(len(texts))],
            }
        )
        for shard, texts in WRITTEN.items()
    }


def decide(tmp_path: Path, criteria: Filter) -> tuple[Path, dict[str, int]]:
    directory, scratch = tmp_path / "decisions", tmp_path / "scratch"
    directory.mkdir()
    scratch.mkdir()
    corpus = {"00000": pl.LazyFrame({"text": ["nothing"]}), "00001": pl.LazyFrame({"text": [D]})}
    with Progress("filter", "documents") as progress:
        counts = write_decisions(
            directory,
            frames(),
            corpus,
            criteria,
            3,
            (lambda texts: np.array(["zero" in text for text in texts])) if criteria.contamination_words else None,
            (lambda shard, rows: np.arange(len(rows)) / 10) if criteria.min_seed_similarity is not None else None,
            scratch,
            "1GB",
            progress,
        )
    return directory, counts


def reasons(directory: Path) -> list[str | None]:
    return [reason for shard in WRITTEN for reason in pl.read_parquet(table_of(directory, shard))["dropped_for"]]


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ({"max_repetition": 0.2}, [None, "repetition", None, None, None]),
        ({"max_copying": 0.5}, ["copying", None, None, "copying", None]),
        ({"contamination_words": 5}, [None, None, None, None, "contaminated"]),
        ({"min_seed_similarity": 0.1}, ["seed_similarity", None, None, "seed_similarity", None]),
        (
            {"max_copying": 0.5, "min_seed_similarity": 0.1, "max_repetition": 0.2},
            ["copying, seed_similarity", "repetition", None, "copying, seed_similarity", None],
        ),
        ({"max_copying": 1.0, "min_seed_similarity": 0.0}, [None] * 5),
    ],
)
def test_documents_are_dropped_by_the_criteria_that_are_set(
    tmp_path: Path, criteria: dict[str, float], expected: list[str | None]
) -> None:
    chosen = Filter.model_validate(criteria)
    directory, counts = decide(tmp_path, chosen)
    assert reasons(directory) == expected
    assert list(decision_problems(directory, frames(), chosen)) == []
    assert counts["documents"] == 5 and counts["dropped"] == 5 - expected.count(None)
    for name in ("repetition", "copying", "contaminated", "seed_similarity"):
        count = sum(name in reason for reason in expected if reason)
        assert counts.get(f"dropped_for_{name}", 0) == count
    ids = [name for shard, frame in frames().items() for name in kept(frame.collect(), directory, shard)["id"]]
    everything = [name for frame in frames().values() for name in frame.collect()["id"]]
    assert ids == [name for name, reason in zip(everything, expected, strict=True) if reason is None]
    assert dropped_share(directory, WRITTEN) == counts["dropped_tokens"] / counts["tokens"]


def test_values_are_those_of_the_set_criteria_alone(tmp_path: Path) -> None:
    directory, _ = decide(tmp_path, Filter(max_copying=0.5))
    rows = pl.read_parquet(table_of(directory, "00000"))
    assert rows.schema == pl.Schema(DECISION_SCHEMA)
    assert rows["copying"].to_list() == pytest.approx([15 / 17, 0, 0])
    assert rows["repetition"].null_count() == rows["contaminated"].null_count() == len(rows)


def test_decisions_of_other_documents_or_values_are_found(tmp_path: Path) -> None:
    criteria = Filter(max_copying=0.5)
    directory, _ = decide(tmp_path, criteria)
    path = table_of(directory, "00000")
    rows = pl.read_parquet(path)
    rows.with_columns(dropped_for=pl.lit(None, dtype=pl.String)).write_parquet(path)
    [problem] = decision_problems(directory, frames(), criteria)
    assert "do not follow" in problem and "syn-00000-0" in problem
    rows[1:].write_parquet(path)
    [problem] = decision_problems(directory, frames(), criteria)
    assert "2 decisions" in problem
    path.unlink()
    assert "0 decisions" in next(decision_problems(directory, frames(), criteria))


def shares(tmp_path: Path, texts: list[list[str]], corpus: list[str], words: int) -> list[float]:
    copied = CopiedShares(words, tmp_path, "1GB")
    for part in texts:
        copied.add(part)
    for text in corpus:
        copied.compare([text])
    copied.finish()
    return [share for part in texts for share in copied.take(len(part))]


@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.integers(2, 4))
def test_copied_shares_are_those_of_a_search_of_all(
    tmp_path_factory: pytest.TempPathFactory, one: list[str], other: list[str], corpus: list[str], words: int
) -> None:
    expected = []
    for text in one + other:
        parts = text.split()
        grams = {" ".join(parts[n : n + words]) for n in range(max(len(parts) - words + 1, 1))}
        # A text's shingles count as often as they stand in it.
        listed = [" ".join(parts[n : n + words]) for n in range(max(len(parts) - words + 1, 1))]
        held = {gram for gram in grams if gram and any(f" {gram} " in f" {whole} " for whole in corpus)}
        expected.append(sum(gram in held for gram in listed) / len(listed))
    found = shares(tmp_path_factory.mktemp("scratch"), [one, other], corpus, words)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("language", TWINS)
def test_copying_is_found_in_every_language(tmp_path: Path, language: str) -> None:
    passage, lake, letters = TWINS[language]
    found = shares(tmp_path, [[passage, extract(passage, 5), letters]], [lake, passage], 13)
    assert found[:2] == [1, 1] and found[2] < 0.1


def test_a_similarity_to_seeds_needs_seeds() -> None:
    with pytest.raises(ValidationError, match="needs condition seed"):
        Synthesis(condition="none", filter=Filter(min_seed_similarity=0.5))
    assert not Filter().drops and Filter(max_copying=0.0).drops
