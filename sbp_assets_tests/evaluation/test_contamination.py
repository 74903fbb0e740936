"""Contamination: planted overlaps of known size, a plain implementation to compare with, and the checks' verdicts."""

import random
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.corpus.shingles import normalise
from sbp_assets.evaluation import checks
from sbp_assets.evaluation.benchmarks import BENCHMARKS
from sbp_assets.evaluation.contamination import (
    COMMON,
    CORPORA,
    TEXTS,
    Comparison,
    above,
    compare,
    evaluation_items,
    misplaced,
    mostly_unjudged,
    training_documents,
    uncompared,
)
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.evaluation.tasks import HELDOUT
from sbp_assets.evaluation.tasks import QUESTIONS as QUESTION_TASKS
from sbp_assets.settings import Contamination
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.evaluation.conftest import HELDOUT as HELDOUT_ROWS
from sbp_assets_tests.evaluation.conftest import QUESTIONS, write_benchmarks
from sbp_assets_tests.twins import TWINS, extract

SETTINGS = Contamination(words=5, min_words=3, max_share=0.1)
VOCABULARY = [f"word{number}" for number in range(400)]


def prose(seed: int, words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(VOCABULARY) for _ in range(words))


def frame(**texts: str) -> pl.DataFrame:
    return pl.DataFrame({"id": list(texts), "text": list(texts.values())}, schema={"id": pl.String, "text": pl.String})


def items(*texts: str) -> pl.DataFrame:
    names = [f"i{number}" for number in range(len(texts))]
    return pl.DataFrame({"evaluation_set": ["test"] * len(texts), "item": names, "text": list(texts)})


def run(evaluated: pl.DataFrame, *documents: tuple[str, pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    with Progress("test", "documents") as progress:
        return compare(evaluated, documents, SETTINGS, progress)


def counts(summary: pl.DataFrame, corpus: str) -> tuple[int, int, int]:
    row = summary.row(by_predicate=pl.col("corpus") == corpus, named=True)
    return row["judged"], row["hit"], row["contained"]


def test_a_whole_item_in_a_document_is_contained_and_listed_with_document_and_words() -> None:
    item, other = prose(1, 40), prose(2, 40)
    document = f"{prose(3, 30)} {item.replace(' ', ', ').upper()}! {prose(4, 30)}"
    summary, listed = run(items(item, other), ("unique", frame(a=prose(5, 90), b=document)), ("oracle", frame(c=other)))
    assert counts(summary, "unique") == (2, 1, 1)
    assert counts(summary, "oracle") == (2, 1, 1)
    assert counts(summary, "synthetic") == (2, 0, 0)
    row = listed.row(by_predicate=pl.col("corpus") == "unique", named=True)
    assert (row["item"], row["document"], row["document_share"]) == ("i0", "b", 1.0)
    assert row["ngram"] == " ".join(item.split()[:5])
    assert misplaced(listed, [("unique", frame(b=document)), ("oracle", frame(c=other))]) == []


def test_a_quoted_passage_is_a_hit_and_not_contained() -> None:
    item = prose(1, 40)
    quote = " ".join(item.split()[10:17])
    summary, listed = run(items(item), ("unique", frame(a=f"{prose(2, 20)} {quote} {prose(3, 20)}")))
    assert counts(summary, "unique") == (1, 1, 0)
    assert listed["shared_ngrams"].to_list() == [3] and listed["ngrams"].to_list() == [36]
    assert listed["ngram"].item() == " ".join(item.split()[10:15])


def test_passages_of_many_documents_are_common_but_a_copy_counts_however_often_it_stands() -> None:
    item, boilerplate = prose(1, 40), prose(2, 12)
    many = frame(**{f"d{n}": f"{prose(10 + n, 20)} {boilerplate}" for n in range(COMMON + 1)})
    few = many.head(COMMON)
    assert counts(run(items(f"{item} {boilerplate}"), ("unique", few))[0], "unique") == (1, 1, 0)
    assert counts(run(items(f"{item} {boilerplate}"), ("unique", many))[0], "unique") == (1, 0, 0)
    copies = frame(**{f"d{n}": f"{item} {prose(50 + n, 9)}" for n in range(COMMON + 1)})
    assert counts(run(items(item), ("unique", copies))[0], "unique") == (1, 0, 1)


def test_short_items_are_matched_whole_and_shorter_ones_not_judged() -> None:
    summary, _ = run(
        items("one two three four", "one two three nine", "one two", ""),
        ("unique", frame(a="Zero one two three four!")),
    )
    assert counts(summary, "unique") == (2, 1, 1)
    assert summary["items"].unique().to_list() == [4]
    nothing, listed = run(items("one two"), ("unique", frame(a="one two")))
    assert nothing["hit_share"].null_count() == len(CORPORA) and listed.is_empty()


def test_agrees_with_a_plain_implementation_whatever_the_batches() -> None:
    rng = random.Random(7)
    few = [*VOCABULARY[:4], *"日本ก"]  # So that runs of words are shared by chance.
    length = {"日": 2 / 3, "本": 2 / 3, "ก": 1 / 3}

    def text(words: int) -> str:
        return " ".join(rng.choice(few) for _ in range(words))

    evaluated = items(*(text(rng.randint(0, 30)) for _ in range(40)))
    documents = frame(**{f"d{n}": text(rng.randint(0, 80)) for n in range(60)})
    summary, listed = run(evaluated, ("unique", documents))

    def words_in(words: Sequence[str]) -> float:
        return round(sum(length.get(word, 1) for word in words), 6)

    def grams(value: str, n: float) -> set[tuple[str, ...]]:
        words, found = value.split(), set()
        for first in range(len(words)):
            ends = (end for end in range(first + 1, len(words) + 1) if words_in(words[first:end]) >= n)
            if end := next(ends, 0):
                found.add(tuple(words[first:end]))
        return found

    expected = {}
    for name, value in evaluated.select("item", "text").iter_rows():
        n = min(words_in(value.split()), SETTINGS.words)
        if n < SETTINGS.min_words:
            continue
        own = grams(value, n)
        shared = [len(own & grams(text_, n)) for text_ in documents["text"]]
        holders = {gram: sum(gram in grams(text_, n) for text_ in documents["text"]) for gram in own}
        hit = any(1 <= number <= COMMON for number in holders.values())
        if hit or max(shared) / len(own) >= 0.8:
            expected[name] = (hit, max(shared) / len(own), f"d{shared.index(max(shared))}")
    found = {row["item"]: (row["hit"], row["document_share"], row["document"]) for row in listed.iter_rows(named=True)}
    assert expected and found == expected
    assert counts(summary, "unique")[1] == sum(hit for hit, _, _ in expected.values())
    one_by_one = Comparison(evaluated, SETTINGS)
    for row in documents.iter_slices(1):
        one_by_one.feed("unique", row["id"], [normalise(row["text"].item())])
    assert one_by_one.results()[1].equals(listed)
    # A synthetic document that shares anything with an item may be dropped: those that were listed are among them.
    sharing = set(documents.filter(pl.Series(one_by_one.sharing(documents["text"].to_list())))["id"])
    assert set(listed["document"]) <= sharing < set(documents["id"])


@pytest.mark.parametrize("language", TWINS)
def test_contamination_is_found_in_every_language(language: str) -> None:
    passage, lake, letters = TWINS[language]
    short, shorter = extract(passage, 9), extract(passage, 3)  # More and less than the least that is compared, 8.
    evaluated = items(passage, letters, short, shorter, f"{short} {letters}")
    documents = frame(a=f"{lake}\n{passage} {lake}", b=lake)
    with Progress("test", "documents") as progress:
        summary, listed = compare(evaluated, [("unique", documents)], Contamination(), progress)
    assert counts(summary, "unique") == (4, 2, 2)
    assert listed.select("item", "document", "document_share").rows() == [("i0", "a", 1.0), ("i2", "a", 1.0)]
    assert misplaced(listed, [("unique", documents)]) == []


def test_every_task_has_its_text_and_questions_their_right_answer(tmp_path: Path) -> None:
    assert set(TEXTS) == {HELDOUT, *QUESTION_TASKS, *BENCHMARKS}
    folder = write_benchmarks(tmp_path / "benchmarks")
    made = tmp_path / "tasks"
    made.mkdir()
    write_tasks(made, HELDOUT_ROWS, questions=QUESTIONS, benchmarks=tuple(BENCHMARKS), benchmarks_dir=folder)
    evaluated = evaluation_items(made)
    texts = {name: group["text"][0] for (name,), group in evaluated.group_by("evaluation_set", maintain_order=True)}
    assert evaluated.filter(pl.col("evaluation_set") == "heldout")["item"].to_list() == ["a", "b", "c"]
    assert texts["concept_questions"] == "The kettle is made of copper"
    assert texts["mmlu"] == "f x"
    assert texts["arc_easy"] == "Colour of sky? blue"
    assert texts["sciq"] == "s q d"
    assert texts["winogrande"] == "Ann met Eve and Ann left."
    assert texts["triviaqa"] == "Which metal tin" and texts["webqs"] == "where? Rome"
    summary, listed = run(evaluated, ("unique", frame(a="nothing alike")))
    short = uncompared(summary, listed, made)
    assert [problem.split(":")[0] for problem in short] == ["mmlu", "webqs"], "of two words or fewer"
    assert short[0] == "mmlu: none of 2 items has enough words to compare: lower contamination.min_words"
    with Progress("test", "documents") as progress:
        summary, _ = compare(evaluated, [], Contamination(min_words=1), progress)
    assert uncompared(summary, listed, made) == [] == mostly_unjudged(summary)
    assert uncompared(summary.filter(pl.col("evaluation_set") != "mmlu"), listed, made) == [
        "mmlu: compared with nothing"
    ]
    lacking = run(evaluated.filter(pl.col("item") != "b"), ("unique", frame(a="")))[0]
    assert uncompared(lacking, listed, made) == ["heldout: 2 items compared of 3", *short]


def test_items_that_are_counted_and_not_listed(tmp_path: Path) -> None:
    write_tasks(tmp_path, HELDOUT_ROWS)
    evaluated = evaluation_items(tmp_path)
    with Progress("test", "documents") as progress:
        text = evaluated["text"][0]
        summary, listed = compare(evaluated, [("oracle", frame(a=text))], Contamination(min_words=1), progress)
    assert len(listed) and not uncompared(summary, listed, tmp_path)
    assert "in oracle" in uncompared(summary, listed[:0], tmp_path)[0]
    assert "in synthetic" in uncompared(summary, listed.with_columns(corpus=pl.lit("synthetic")), tmp_path)[1]


@pytest.mark.parametrize(("long", "said"), [(0, []), (1, ["test: 1 of 4 items have enough words"]), (2, []), (4, [])])
def test_a_set_of_mostly_short_items_is_named(long: int, said: list[str]) -> None:
    summary, _ = run(items(*["one two three"] * long, *["one two"] * (4 - long)), ("unique", frame(a="nothing")))
    assert mostly_unjudged(summary) == said


@pytest.mark.parametrize(
    ("texts", "passed", "severity"),
    [
        (["one two", "one"], False, "ERROR"),
        (["one two", "one", "one two three"], False, "WARN"),
        (["one two", "one two three"], True, "WARN"),
    ],
)
def test_the_check_tells_what_was_not_judged(texts: list[str], passed: bool, severity: str, tmp_path: Path) -> None:
    heldout = pl.DataFrame({"id": [f"d{n}" for n in range(len(texts))], "text": texts})
    write_tasks(tmp_path, heldout)
    summary, listed = run(evaluation_items(tmp_path), ("unique", frame(a="nothing alike")))
    result = checks.every_evaluation_set_is_compared(summary.lazy(), listed.lazy(), tmp_path)
    assert isinstance(result, dg.AssetCheckResult)
    assert (result.passed, result.severity.value) == (passed, severity)


def test_the_corpora_are_d_the_oracle_and_synthetic_documents_and_nothing_held_out() -> None:
    splits = ["unique", "oracle", "heldout"]
    documents = {"00000": pl.LazyFrame({"id": splits, "text": splits, "split": splits})}
    synthetic = {"00000": pl.LazyFrame({"id": ["syn"], "text": ["made"], "seed_id": ["unique"]})}
    found = {corpus: rows["id"].to_list() for corpus, rows in training_documents(documents, synthetic)}
    assert found == {"unique": ["unique"], "oracle": ["oracle"], "synthetic": ["syn"]}


@pytest.mark.parametrize(("leaked", "reported"), [(1, False), (2, True)])
def test_more_than_the_allowed_share_is_reported(leaked: int, reported: bool) -> None:
    evaluated = items(*(prose(seed, 30) for seed in range(10)))
    documents = frame(**{f"d{n}": text for n, text in enumerate(evaluated["text"].head(leaked))})
    summary, _ = run(evaluated, ("synthetic", documents))
    problems = above(summary, "contained", SETTINGS.max_share)
    assert problems == (["test in synthetic: 2 of 10 items contained"] if reported else [])


def test_a_document_that_does_not_hold_its_ngram_is_found() -> None:
    item = prose(1, 20)
    _, listed = run(items(item), ("unique", frame(a=item)))
    assert misplaced(listed, [("unique", frame(a=prose(2, 20)))]) == ["i0: not in a (unique)"]
    assert misplaced(listed, [("unique", frame(b=item))]) == ["i0: not in a (unique)"]
