from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.corpus import dedup
from sbp_assets.corpus.audit import dangling_duplicates
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.shingles import jaccard, normalise, shingled
from sbp_assets.settings import Dedup
from sbp_assets.storage import database
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.twins import TWINS, extract

SETTINGS = Dedup(shingle_words=2, permutations=64, bands=32, threshold=0.6)
Rows = list[tuple[str, str]]


def find(
    shards: list[Rows],
    chosen: Dedup = SETTINGS,
    store: Path | None = None,
    without_text: Sequence[int] = (),
    order: int = 1,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return what is found in `shards`, handed over in `order` (-1: backwards); to read `without_text` is an error."""
    documents, signatures = {}, {}
    with Progress("test", "docs") as progress, tempfile.TemporaryDirectory() as scratch:
        for number, rows in list(enumerate(shards))[::order]:
            frame = pl.DataFrame(rows, schema={"id": pl.String, "text": pl.String}, orient="row")
            documents[f"{number:05d}"] = frame.drop("text" if number in without_text else []).lazy()
            signatures[f"{number:05d}"] = dedup.signatures(frame, chosen, progress).lazy()
        return dedup.find_duplicates(documents, signatures, chosen, Path(scratch), "500MB", progress, store)


def words(n: int, change: int = 0) -> str:
    return " ".join([*(f"w{i}" for i in range(n - change)), *(f"x{i}" for i in range(change))])


def test_exact_near_and_id_duplicates_point_at_the_first() -> None:
    dropped, counts = find(
        [
            [("a", words(40)), ("b", "Something  else ENTIRELY here")],
            [
                ("c", words(40, 3)),
                ("d", "something else entirely here"),
                ("a", "third text, same id"),
                ("e", words(40, 30)),
            ],
        ]
    )
    assert dropped.select("id", "shard", "kept_id", "kept_shard", "kind").rows() == [
        ("c", 1, "a", 0, "near"),
        ("d", 1, "b", 0, "exact"),
        ("a", 1, "a", 0, "id"),
    ]
    assert dropped["jaccard"].to_list() == [pytest.approx(36 / 42), 1.0, None]
    assert counts["kept"] == 3


def test_a_document_is_not_dropped_for_a_document_that_is_dropped() -> None:
    # b is near a; c is near b, not near a: b goes, so c stays.
    a, b, c = words(40), words(40, 8), " ".join(["y", *words(40, 8).split()[8:]])
    sets = [text.shingles for text in shingled((a, b, c), 2)]
    assert jaccard(sets[0], sets[1]) >= 0.6 <= jaccard(sets[1], sets[2])
    assert jaccard(sets[0], sets[2]) < 0.6
    dropped, _ = find([[("a", a), ("b", b), ("c", c)]])
    assert dropped["id"].to_list() == ["b"]


def test_a_later_version_under_the_same_id_is_near_and_no_other_text() -> None:
    dropped, _ = find([[("url", words(200))], [("url", words(200) + " updated"), ("other", "one more text")]])
    assert dropped.select("id", "shard", "kept_id", "kind").rows() == [("url", 1, "url", "near")]


def test_the_id_of_a_dropped_document_is_free() -> None:
    dropped, _ = find([[("a", words(30)), ("b", words(30))], [("b", "quite another text")]])
    assert dropped.select("id", "shard").rows() == [("b", 0)]


TEXT = st.lists(st.sampled_from(["red", "fox", "日", "🦊", "runs"]), max_size=7).map(" ".join).map(lambda t: t or ".")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcdefgh"), TEXT), max_size=6, unique_by=lambda r: r[0]),
        min_size=1,
        max_size=3,
    )
)
def test_law_every_cluster_keeps_exactly_one(shards: list[Rows]) -> None:
    dropped, counts = find(shards)
    gone = set(dropped.select("shard", "id").iter_rows())
    order = [(shard, name, text) for shard, rows in enumerate(shards) for name, text in rows]
    kept = [row for row in order if row[:2] not in gone]
    texts = {row[:2]: normalise(row[2]) for row in order}
    place = {row[:2]: index for index, row in enumerate(order)}
    assert counts["kept"] == len(kept) == len(order) - len(dropped)
    # What is kept holds no id and no text twice, and at least one document of what there was.
    assert len({name for _, name, _ in kept}) == len(kept) == len({texts[row[:2]] for row in kept})
    assert bool(kept) == bool(order)
    for row in dropped.iter_rows(named=True):
        mine, other = (row["shard"], row["id"]), (row["kept_shard"], row["kept_id"])
        assert other not in gone
        assert place[other] < place[mine]
        similarity = jaccard(*(text.shingles for text in shingled((texts[mine], texts[other]), 2)))
        if row["kind"] == "id":
            assert row["id"] == row["kept_id"] and texts[mine] != texts[other]
        else:
            assert similarity == row["jaccard"] >= SETTINGS.threshold
            assert (row["kind"] == "exact") == (texts[mine] == texts[other])
    frames = {
        f"{i:05d}": pl.DataFrame(r, schema=["id", "text"], orient="row").lazy() for i, r in enumerate(shards) if r
    }
    assert dangling_duplicates(dropped, frames) == []


def test_a_giant_bucket_of_templated_text_stays_linear_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "BUCKET_REACH", 2)
    chosen = SETTINGS.model_copy(update={"permutations": 32, "bands": 16})
    frame = " ".join(f"boilerplate{i}" for i in range(30))
    rows = [(str(i), f"{frame} {' '.join(f'item{i}part{j}' for j in range(30))}") for i in range(400)]
    rows += [(f"copy{i}", f"{rows[i][1]} again") for i in range(0, 400, 50)]
    dropped, counts = find([rows], chosen)
    assert sorted(dropped["id"]) == sorted(f"copy{i}" for i in range(0, 400, 50))
    assert counts["large_buckets"] > 0
    # At most 2 * reach * bands a text; all pairs would be 83,028.
    assert counts["candidate_pairs"] <= 408 * 2 * 2 * 16


@pytest.mark.parametrize("language", TWINS)
def test_a_near_duplicate_is_one_in_every_language(language: str) -> None:
    passage, lake, letters = TWINS[language]
    rows = [
        ("text", passage + lake),
        ("other", letters),
        ("edited", passage + lake[: -len(lake) // 6]),
        ("half", passage),
        ("short", extract(letters, 4)),
        ("same short", f" {extract(letters, 4).upper()}.\u200b"),
        ("other short", extract(lake, 4)),
    ]
    dropped, _ = find([rows], Dedup())
    assert dropped.select("id", "kept_id", "kind").rows() == [
        ("edited", "text", "near"),
        ("same short", "short", "near"),
    ]
    assert dropped["jaccard"][1] == 1


def test_empty_shards_and_single_documents() -> None:
    dropped, counts = find([[], [("a", "one")], []])
    assert (len(dropped), counts["kept"]) == (0, 1)
    with pytest.raises(CorpusError, match="1 usable documents and 1 after"):
        dedup.require_enough(counts, "files")


def test_signatures_of_other_documents_are_refused() -> None:
    with Progress("test", "docs") as progress, tempfile.TemporaryDirectory() as scratch:
        a, b = (pl.DataFrame({"id": [name], "text": ["t"]}) for name in "ab")
        signed = {"00000": dedup.signatures(b, SETTINGS, progress).lazy()}
        with pytest.raises(CorpusError, match="shard 00000"):
            dedup.find_duplicates({"00000": a.lazy()}, signed, SETTINGS, Path(scratch), "500MB", progress)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abcdefgh"), TEXT), max_size=6, unique_by=lambda r: r[0]),
        min_size=2,
        max_size=4,
    ),
    st.integers(0, 2),
    st.sampled_from([1, 32]),
)
def test_law_with_similarities_of_an_earlier_run_the_result_is_that_of_a_run_from_scratch(
    shards: list[Rows], replaced: int, reach: int
) -> None:
    earlier = shards[:-1]
    earlier[replaced % len(earlier)] = shards[-1]  # Since then one shard is new and another one has changed.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "BUCKET_REACH", reach)
        find(earlier, store=(store := Path(folder) / "store's.parquet"))
        found, counts = find(shards, store=store, order=-1)
        scratch, all_counts = find(shards)
        again, none = find(shards, store=store, without_text=range(4))
    assert found.equals(scratch) and again.equals(scratch)
    assert counts["compared_pairs"] <= all_counts["compared_pairs"] == all_counts["candidate_pairs"]
    assert none["compared_pairs"] == 0


def test_a_new_shard_is_compared_with_the_shards_of_its_candidates_alone(tmp_path: Path) -> None:
    other = " ".join(f"other{i}" for i in range(40))
    shards = [[("a", words(40)), ("b", words(40, 2))], [("c", other)], [("d", f"{other} again")]]
    store = tmp_path / "store.parquet"
    assert find(shards[:2], store=store)[1]["compared_pairs"] == 1
    found, counts = find(shards, store=store, without_text=[0])
    assert found.select("id", "kept_id", "kind").rows() == [("b", "a", "near"), ("d", "c", "near")]
    assert (counts["compared_pairs"], counts["candidate_pairs"]) == (1, 2)
    assert found.equals(find(shards)[0])
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        find(shards, without_text=[0])


def test_more_pairs_than_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "ROWS", 2048)
    originals = [(f"o{n}", f"{n} {n + 1} {n + 2} " + " ".join(f"{n}w{i}" for i in range(8))) for n in range(3000)]
    copies = [(f"c{n}", f"{text} end") for n, (_, text) in enumerate(originals)][::-1]
    dropped, counts = find([originals[:1], originals[1:2999], [], [originals[2999], *copies]])
    assert dropped.select("id", "kept_id", "kind").rows() == [(f"c{n}", f"o{n}", "near") for n in range(2999, -1, -1)]
    assert dropped["jaccard"].unique().to_list() == [10 / 11]
    assert counts["compared_pairs"] >= 3000


def test_a_damaged_file_of_similarities_is_named(tmp_path: Path) -> None:
    store = tmp_path / "store.parquet"
    store.write_bytes(b"PAR1 and no more")
    with pytest.raises(CorpusError, match=r"store\.parquet: delete the file"):
        find([[("a", words(40)), ("b", words(40, 2))]], store=store)
