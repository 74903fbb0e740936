"""What the judge is asked, and what is read from its answers, without an endpoint."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.settings import Judge
from sbp_assets.synthesis.quality import REAL, SYNTHETIC, fixed_sample
from sbp_assets.synthesis.questions import (
    PROMPTS,
    parse_verdict,
    prompts_version,
    questions,
    sample_documents,
)

SETTINGS = Judge(model="small-judge", max_tokens=40)


def test_verdicts_are_read_and_nothing_else_is_taken_for_one() -> None:
    for text, verdict in (
        ("Fine.\nVerdict: FACTUAL", False),
        ("Wrong.\n\n**Verdict: NON_FACTUAL**\n", True),
        ("> verdict: `non-factual`.", True),
        ("Verdict: FACTUAL\nYes, really.\nVerdict: factual", False),
        ("FACTUAL", None),
        ("I cannot say.", None),
        ("Verdict: FACTUAL or NON_FACTUAL", None),
        ("Verdict: FACTUAL\nVerdict: NON_FACTUAL", None),
        ("Verdict:", None),
        ("Verdict: RELATED", None),
        ("", None),
    ):
        assert parse_verdict(text, "non_factual") is verdict, text
    assert parse_verdict("Verdict: Unrelated", "pair_irrelevance") is True
    assert parse_verdict("!" * 100_000 + "\n" * 100_000, "non_factual") is None


def test_questions_hold_the_documents_as_they_are_and_keys_what_decides_the_answer() -> None:
    synthetic = pl.DataFrame({"id": ["s"], "text": ["a $seed and $document"], "seed_text": ["the {seed} text"]})
    real = pl.DataFrame({"id": ["r"], "text": ["x" * 9000]})
    first, pair, last = questions(synthetic, real, SETTINGS)
    assert [(q.id, q.corpus, q.metric) for q in (first, pair, last)] == [
        ("s", SYNTHETIC, "non_factual"),
        ("s", SYNTHETIC, "pair_irrelevance"),
        ("r", REAL, "non_factual"),
    ]
    assert "a $seed and $document" in first.messages[0]["content"]
    assert "the {seed} text" in pair.messages[0]["content"] and "a $seed and" in pair.messages[0]["content"]
    assert "x" * 8000 in last.messages[0]["content"] and "x" * 8001 not in last.messages[0]["content"]
    assert len({first.key, pair.key, last.key}) == 3
    assert first.key == questions(synthetic, real, SETTINGS.model_copy(update={"documents": 7}))[0].key
    for change in ({"model": "other"}, {"max_tokens": 41}, {"temperature": None}):
        assert first.key != questions(synthetic, real, SETTINGS.model_copy(update=change))[0].key


def test_other_wording_is_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = prompts_version("v1")
    shutil.copytree(PROMPTS, tmp_path / "prompts")
    monkeypatch.setattr("sbp_assets.synthesis.questions.PROMPTS", tmp_path / "prompts")
    assert prompts_version("v1") == before, "wherever the project lies"
    for name in ("non_factual.md", "reminder.md"):
        path = tmp_path / "prompts/v1" / name
        path.write_text(path.read_text() + "Think twice.\n")
        assert prompts_version("v1") != before
        before = prompts_version("v1")


def test_sample_is_of_all_shards_and_brings_the_seeds() -> None:
    ids = [str(number) for number in range(9)]
    documents = {s: pl.LazyFrame({"id": [s + n for n in ids], "text": [f"text {s}{n}" for n in ids]}) for s in "ab"}
    synthetic = {
        s: frame.select(id="syn-" + pl.col("id"), seed_id="id", text="of " + pl.col("text"))
        for s, frame in documents.items()
    }
    sampled, real = sample_documents(synthetic, documents, 10)
    assert len(sampled) == len(real) == 10 and {name[0] for name in real["id"]} == {"a", "b"}
    assert (sampled["text"] == "of " + sampled["seed_text"]).all()
    empty = {s: frame.clear() for s, frame in documents.items()}
    assert [len(frame) for frame in sample_documents({s: f.clear() for s, f in synthetic.items()}, empty, 5)] == [0, 0]


def test_no_shards_ids_are_read_before_the_sample_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def shard(name: str) -> pl.LazyFrame:
        def reading(rows: pl.DataFrame) -> pl.DataFrame:
            read.append(name)
            return rows

        return pl.LazyFrame({"id": [f"{name}{n}" for n in range(3)], "text": ["t"] * 3}).map_batches(reading)

    def sampling(ids: Mapping[str, Iterable[str]], size: int) -> dict[str, list[str]]:
        assert not read, "memory is the sample's and one shard's ids"
        return fixed_sample(ids, size)

    monkeypatch.setattr("sbp_assets.synthesis.questions.fixed_sample", sampling)
    _, real = sample_documents({}, {name: shard(name) for name in "abc"}, 2)
    assert read[:3] == ["a", "b", "c"] and len(real) == 2
