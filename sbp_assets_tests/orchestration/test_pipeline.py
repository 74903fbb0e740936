"""The steps, and `sbp run` as a user starts it, on corpora with bad rows and unreadable files, up to the pairs."""

import json
import os
import subprocess
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.dagster_support.internals import BaseAssetGraph
from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.pipeline import Step, pipeline_among, pipeline_of
from sbp_assets.settings import ConceptsSource, load_settings
from sbp_assets_tests import warm

LONG = "Prose 長い文章 🙂 " * 3000


def good_rows(count: int, start: int = 0) -> list[bytes]:
    world = ConceptWorld(ConceptsSource(documents=1000, concepts=12, attributes=4, facts_per_document=2))
    rows = [world.document(number) for number in range(start, start + count)]
    return [json.dumps({"id": row["id"], "text": row["text"]}).encode() for row in rows]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four files for four shards: a usual one, one with bad rows, one with a single document, an empty one."""
    bad_rows = [
        b'{"id": "cut", "text": "no end',
        b"[1, 2]",
        b'{"id": "none"}',
        b'{"id": "empty", "text": "   "}',
        b'{"id": "number", "text": 7}',
        b'{"id": "bytes", "text": "\xff\xfe"}',
        b'{"id": "twin", "text": "The first of two rows with one id."}',
        b'{"id": "twin", "text": "The second of two rows with one id."}',
        json.dumps({"id": "long", "text": LONG}).encode(),
        '{"id": "emoji", "text": "Ein Text über Käse 🧀, écrit en trois langues。"}'.encode(),
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join(good_rows(360)))
    (folder / "b.jsonl").write_bytes(b"\n".join(bad_rows + good_rows(40, 400)))
    (folder / "c.jsonl").write_bytes(good_rows(1, 500)[0])
    (folder / "d.jsonl").write_bytes(b"")
    return folder


def run(corpus: Path, home: Path, until: str, *options: str) -> subprocess.CompletedProcess[str]:
    names = ("data_dir", "work_dir", "instance_dir")
    source = {"kind": "files", "path": str(corpus)}
    environ = {
        **os.environ,
        **{f"SBP_DEPLOYMENT__{name.upper()}": str(home / name) for name in names},
        "SBP_EXPERIMENT__CORPUS__SOURCE": json.dumps(source),
        "SBP_EXPERIMENT__CORPUS__SHARDS": "4",
    }
    for name in ("DAGSTER_HOME", "SBP_INSTANCE_DIR"):
        environ.pop(name, None)
    return warm.call(("run", "--profile", "tiny", "--until", until, *options), environ, home, seconds=300)


def table(home: Path, name: str, shard: str) -> pl.DataFrame:
    return pl.read_parquet(home / "data_dir" / f"{name}/{shard}.parquet")


FILTERED = {
    "SBP_EXPERIMENT__SYNTHESIS__FILTER__MAX_COPYING": "0.5",
    "SBP_EXPERIMENT__SYNTHESIS__FILTER__CONTAMINATION_WORDS": "13",
    "SBP_EXPERIMENT__SYNTHESIS__FILTER__MIN_SEED_SIMILARITY": "0.5",
}
SECOND_ROUND = {"SBP_EXPERIMENT__SYNTHESIZER__EARLIER_ROUND": "/first/round"}
Graph = tuple[BaseAssetGraph, tuple[Step, ...]]


@pytest.fixture(
    scope="module",
    params=[{}, FILTERED, SECOND_ROUND, FILTERED | SECOND_ROUND],
    ids=["all", "filtered", "second_round", "both"],
)
def graph(request: pytest.FixtureRequest) -> Graph:
    settings = load_settings("tiny", request.param)
    found = build_definitions(settings).resolve_asset_graph()
    assert pipeline_among(found.get_all_asset_keys()) == pipeline_of(settings)
    return found, pipeline_of(settings)


def test_every_asset_is_in_one_step(graph: Graph):
    assets, pipeline = graph
    assert sorted(key for step in pipeline for key in step.keys) == sorted(assets.materializable_asset_keys)


def test_a_step_has_one_partitioning(graph: Graph):
    assets, pipeline = graph
    for step in pipeline:
        first, *others = (assets.get(key).partitions_def for key in step.keys)
        assert all(other == first for other in others), step.name


def test_no_step_comes_before_its_inputs(graph: Graph):
    assets, pipeline = graph
    places = {key: place for place, step in enumerate(pipeline) for key in step.keys}
    assert [key for key, place in places.items() if any(places[p] > place for p in assets.get(key).parent_keys)] == []


def test_without_its_setting_there_is_no_filter_no_second_round_and_no_other_version():
    def versions(environ: dict[str, str]) -> dict[str, str | None]:
        found = build_definitions(load_settings("tiny", environ)).resolve_asset_graph()
        return {key.to_user_string(): found.get(key).code_version for key in found.get_all_asset_keys()}

    plain, filtered = versions({}), versions(FILTERED)
    changed = {key for key in plain | filtered if plain.get(key) != filtered.get(key)}
    assert changed == {"synthesis/filter_decisions", "synthesis/synthetic_tokens", "evaluation/report"}
    second = versions(SECOND_ROUND)
    changed = {key for key in plain | second if plain.get(key) != second.get(key)}
    assert changed == {"synthesizer/earlier_pairs", "synthesizer/tuning_examples", "evaluation/report"}
    in_turn = versions({"SBP_EXPERIMENT__SYNTHESIS__SEED_ORDER": "in_turn"})
    drawn = versions({"SBP_EXPERIMENT__SYNTHESIS__SEED_ORDER": "random"})
    assert in_turn == plain
    changed = {key for key in plain if plain[key] != drawn[key]}
    assert changed == {"synthesis/synthetic_documents", "evaluation/report"}


@pytest.mark.processes
def test_bad_rows_are_kept_with_their_reason_and_the_run_goes_on(corpus: Path, tmp_path: Path):
    done = run(corpus, tmp_path, until="pair")
    assert done.returncode == 0, done.stderr
    rejected = table(tmp_path, "corpus/rejected_rows", "00001")
    assert sorted(rejected["line"]) == [1, 2, 3, 4, 5, 6, 8]
    assert all(reason for reason in rejected["reason"])
    assert set(rejected["file"]) == {"b.jsonl"}
    raw = table(tmp_path, "corpus/raw_documents", "00001")
    assert raw.filter(pl.col("id") == "long")["text"].str.len_chars().item() == len(LONG)
    assert "🧀" in raw.filter(pl.col("id") == "emoji")["text"].item()
    assert [len(table(tmp_path, "corpus/raw_documents", shard)) for shard in ("00000", "00002", "00003")] == [360, 1, 0]
    pairs = pl.concat([table(tmp_path, "pairing/neighbor_pairs", f"{shard:05d}") for shard in range(4)])
    assert len(pairs)
    assert not pairs.filter(pl.col("d1") == pl.col("d2")).height


@pytest.mark.processes
def test_an_unreadable_file_fails_its_shard_alone_and_is_ingested_once_fixed(corpus: Path, tmp_path: Path):
    import zstandard

    whole = zstandard.compress(b"\n".join(good_rows(20, 600)))
    (corpus / "b.jsonl").unlink()
    (corpus / "b.jsonl.zst").write_bytes(whole[:-20])
    done = run(corpus, tmp_path, until="ingest")
    assert done.returncode == 1
    assert "00001" in done.stderr
    assert "b.jsonl.zst" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(table(tmp_path, "corpus/raw_documents", "00000")) == 360
    assert not (tmp_path / "data_dir/corpus/raw_documents/00001.parquet").exists()
    (corpus / "b.jsonl.zst").write_bytes(whole)
    fixed = run(corpus, tmp_path, "ingest", "--refresh")
    assert fixed.returncode == 0, fixed.stderr
    assert len(table(tmp_path, "corpus/raw_documents", "00001")) == 20


@pytest.mark.processes
@pytest.mark.parametrize("rows", [0, 6])
def test_a_corpus_too_small_is_refused_early_with_what_is_needed(tmp_path: Path, rows: int):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join(good_rows(rows)))
    done = run(folder, tmp_path, until="train_tokenizer")
    assert done.returncode == 1
    assert "CorpusError" in done.stderr
    assert "Traceback" not in done.stderr
