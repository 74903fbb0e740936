"""Precision and recall of pairs whose concepts are known, by hand and on generated documents."""

import itertools
import tempfile
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.definitions import build_resources
from sbp_assets.pairing import assets, checks
from sbp_assets.pairing.ground_truth import OVERALL, PAIR_TRUTH_SCHEMA, not_above_chance, pair_truth, truth_problems
from sbp_assets.settings import ConceptsSource, FilesSource, load_settings
from sbp_assets_tests.tiny import only, tiny_settings

WORLD = ConceptWorld(ConceptsSource(documents=60, concepts=5, attributes=4, facts_per_document=2))
FIRST, SECOND = "00000", "00001"


def about(concept: int | None, *ids: str, split: str = "unique") -> pl.DataFrame:
    text = "Nothing at all." if concept is None else f"This is {WORLD.names[concept]}."
    return pl.DataFrame({"id": ids, "text": [text] * len(ids), "split": [split] * len(ids)})


def pairs(*rows: tuple[str, str]) -> pl.LazyFrame:
    return pl.LazyFrame(rows, schema={"d1": pl.String, "d2": pl.String}, orient="row")


def truth(
    given: dict[str, pl.LazyFrame], documents: dict[str, pl.LazyFrame], cap: int | None, world: ConceptWorld = WORLD
) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        (scratch := Path(folder, "scratch")).mkdir()
        return pair_truth(files(Path(folder), given), documents, world, cap, scratch, "100MB")


def files(folder: Path, given: dict[str, pl.LazyFrame]) -> dict[str, Path]:
    for shard, rows in given.items():
        rows.sink_parquet(folder / f"{shard}.parquet")
    return {shard: folder / f"{shard}.parquet" for shard in given}


DOCUMENTS = {
    FIRST: pl.concat([about(0, "a", "b"), about(1, "x"), about(0, "unread", split="oracle")]).lazy(),
    SECOND: pl.concat([about(0, "c"), about(1, "y"), about(None, "none")]).lazy(),
}


def test_by_hand() -> None:
    table = truth({FIRST: pairs(("a", "b"), ("b", "x")), SECOND: pairs(("none", "a"))}, DOCUMENTS, cap=1)
    first, second, overall = table.to_dicts()
    # a and b have two partners each, x one; with a cap of one, each can be given one.
    assert (first["documents"], first["pairs"], first["same_concept_pairs"]) == (3, 2, 1)
    assert (first["precision"], first["recall"], first["recall_of_attainable"]) == (1 / 2, 1 / 5, 1 / 3)
    assert (second["precision"], second["recall"]) == (0, 0), "a document without a concept matches none"
    # Ordered pairs that share a concept: 3 * 2 of concept 0 and 2 * 1 of concept 1, out of 6 * 5.
    assert overall["shard"] == OVERALL and overall["documents"] == 6
    assert overall["chance_precision"] == pytest.approx(8 / 30)
    assert (overall["precision"], overall["recall"]) == (1 / 3, 1 / 8)
    assert overall["recall_of_attainable"] == 1 / 5
    assert overall["crossing"] == 0 == overall["crossing_pairs"], "a text of no view crosses none"


def test_pairs_across_views_are_counted_among_those_about_one_concept() -> None:
    number = itertools.count()
    written = {n: WORLD.document(n)["text"] for n in itertools.islice(number, 60)}
    of = {n: (WORLD.concept_of(text), view_of(text)) for n, text in written.items()}
    documents = pl.LazyFrame({"id": list(map(str, written)), "text": list(written.values()), "split": ["unique"] * 60})
    every = list(itertools.permutations(written, 2))
    frame = pairs(*((str(a), str(b)) for a, b in every))
    table = truth({FIRST: frame}, {FIRST: documents}, cap=None)
    same = [(a, b) for a, b in every if of[a][0] == of[b][0]]
    crossing = sum(of[a][1] != of[b][1] for a, b in same)
    assert table["crossing_pairs"].to_list() == [crossing, crossing] and table["crossing"][0] == crossing / len(same)
    assert 0.3 < table["crossing"][0] < 0.7


def test_every_pair_of_a_concept_recalls_all_and_nothing_makes_no_share() -> None:
    ids = {"a": 0, "b": 0, "c": 0, "x": 1, "y": 1}
    every = [(d1, d2) for d1, d2 in itertools.permutations(ids, 2) if ids[d1] == ids[d2]]
    split = {shard: pairs(*(p for p in every if (p[0] in "abx") == (shard == FIRST))) for shard in (FIRST, SECOND)}
    table = truth(split, DOCUMENTS, cap=8)
    assert table["precision"].to_list() == table["recall"].to_list() == [1, 1, 1]
    assert table["recall_of_attainable"].to_list() == [1, 1, 1]
    assert not truth_problems(table, [FIRST, SECOND]) + not_above_chance(table)
    none = truth({FIRST: pairs(), SECOND: pairs()}, DOCUMENTS, cap=8)
    assert none["precision"].to_list() == [None] * 3 and none["recall"].to_list() == [0] * 3
    assert not truth_problems(none, [FIRST, SECOND]) + not_above_chance(none), "no pairs: nothing to judge"


def test_problems_are_found() -> None:
    table = truth({FIRST: pairs(("a", "x")), SECOND: pairs()}, DOCUMENTS, cap=8)
    assert not_above_chance(table) == ["precision is not above that of random pairs"]

    def problem(broken: pl.DataFrame) -> str:
        return truth_problems(broken, [FIRST, SECOND])[0]

    assert "recall of" in problem(table.with_columns(recall=pl.lit(1.5)))
    assert "is not that of its counts" in problem(table.with_columns(precision=pl.lit(0.5)))
    assert "not their sum" in problem(table.with_columns(documents=pl.int_range(pl.len())))
    assert "rows are of" in problem(table[1:])


class Upstream(dg.IOManager):
    """Documents of the world of profile tiny, and every pair of one concept as neighbours."""

    def __init__(self, folder: Path) -> None:
        source = load_settings("tiny", {}).experiment.ground_truth
        assert source
        world = ConceptWorld(source)
        rows = [world.document(number) for number in range(30)]
        concept = {row["id"]: world.concept_of(row["text"]) for row in rows}
        same = [(d1, d2) for d1, d2 in itertools.permutations(concept, 2) if concept[d1] == concept[d2]]
        self.values = {"documents": {}, "neighbor_pairs": {}}
        for number, shard in enumerate((FIRST, SECOND)):
            mine = pl.DataFrame(rows[number::2]).select("id", "text", split=pl.lit("unique"))
            self.values["documents"][shard] = mine.lazy()
            own = pairs(*(p for p in same if p[0] in set(mine["id"])))
            self.values["neighbor_pairs"] |= files(folder, {shard: own})

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        raise NotImplementedError

    def load_input(self, context: dg.InputContext) -> dict[str, pl.LazyFrame]:
        return self.values[context.asset_key.path[-1]]


@pytest.mark.parametrize("known", [True, False])
def test_asset_records_the_shares_as_numbers(known: bool, tmp_path: Path) -> None:
    changes = {} if known else {"experiment.corpus.source": FilesSource(path="corpus")}
    settings = tiny_settings(tmp_path, changes)
    sources = [
        dg.AssetSpec(key, partitions_def=shards(settings)).with_io_manager_key("upstream")
        for key in (["corpus", "documents"], ["pairing", "neighbor_pairs"])
    ]
    result = dg.materialize(
        [*sources, *only(assets, checks, settings, "pair_truth")],
        selection=dg.AssetSelection.assets(["pairing", "pair_truth"]),
        resources=build_resources(settings) | {"upstream": Upstream(tmp_path)},
    )
    assert [e.passed for e in result.get_asset_check_evaluations()] == [True]
    [event] = result.asset_materializations_for_node("pairing__pair_truth")
    metadata = {key: value.value for key, value in event.metadata.items()}
    table = pl.read_parquet(tmp_path / "data_dir" / "pairing" / "pair_truth.parquet")
    assert dict(table.schema) == PAIR_TRUTH_SCHEMA
    if known:
        assert metadata["precision"] == metadata["recall"] == 1 > metadata["chance_precision"] > 0
        assert table["shard"].to_list() == [FIRST, SECOND, OVERALL]
    else:
        assert table.is_empty() and "precision" not in metadata and "Not known" in metadata["preview"]
