import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from sbp_assets.corpus.tokenizer import train_tokenizer
from sbp_assets.definitions import build_definitions
from sbp_assets.evaluation.task_files import sample_heldout
from sbp_assets.pretraining.budget import ARMS, plan_arm
from sbp_assets.provenance.lookup import Trace, UnknownIdError
from sbp_assets.provenance.records import graph_of
from sbp_assets.provenance.store import NotMaterialisedError, Store
from sbp_assets.provenance.view import show
from sbp_assets.provenance.walk import trace
from sbp_assets.settings import Settings
from sbp_assets.storage.remote import RemoteStore, root
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.earlier_round import PAIRS, write_earlier_pairs
from sbp_assets.synthesizer.examples import write_examples
from sbp_assets.training.order import StreamOrder
from sbp_assets_tests.provenance.conftest import BEST_STEP, RELATED, SHARDS, SPLITS, ids

EVERY_KIND = [
    "d0-1",
    "syn-d1-2-1",
    "d0-1->d1-2",
    "heldout/perplexity/sbp/0",
    "heldout/perplexity/early_stopped/0",
    "pretraining/token_budget",
]


@pytest.fixture
def one(settings: Settings, store: Store, records):
    def only(name: str) -> Trace:
        (found,) = trace(name, settings, store, records)
        json.dumps(found)
        return found

    return only


def test_a_document_leads_to_its_line_its_pairs_and_its_synthetic_documents(one):
    found = one("d1-2")
    assert (found["kind"], found["shard"], found["split"]) == ("document", "00001", "unique")
    source = found["source"]
    assert (source["file"], source["line"], source["sha256"], source["bytes"]) == ("b.jsonl", 3, "bb" * 32, 800)
    assert [row["document"] for row in found["pairs_as_seed"]] == ["d0-3"]
    assert [row["document"] for row in found["pairs_as_related"]] == ["d0-1"]
    assert [(row["id"], row["rollout"]) for row in found["synthetic_documents"]] == [
        ("syn-d1-2-0", 0),
        ("syn-d1-2-1", 1),
    ]
    passed = {row["asset"] for row in found["artifacts"]}
    assert {
        "corpus/raw_documents",
        "pairing/neighbor_pairs",
        "pretraining/sbp_model",
        "evaluation/sbp_scores",
    } <= passed
    assert {row["partition"] for row in found["artifacts"]} == {None, "00001", "0"}


@pytest.mark.parametrize("name", ["d0->0", "d1-5", "d0-7", "syn-d0-4-1"])
def test_times_read_are_those_of_the_stream_that_training_reads(one, folder: Path, settings: Settings, name: str):
    """Counted again from the rows of tokens themselves: every document is made of a token of its own."""
    found = one(name)
    synthetic = found["kind"] == "synthetic_document"
    asset = "synthesis/synthetic_tokens" if synthetic else "corpus/tokens"
    arrays = TokenArrays.load(folder / asset / found["shard"])
    number = arrays.documents["id"].to_list().index(name)
    own = int(arrays.tokens[arrays.offsets[number] + 1])
    inner = int(arrays.lengths[number]) if synthetic else int(arrays.lengths[number]) - 2  # without <bos> and <eos>
    pretraining = settings.experiment.pretraining
    directories = [{s: folder / a / s for s in SHARDS} for a in ("corpus/tokens", "synthesis/synthetic_tokens")]
    assert [(row["arm"], row["seed"]) for row in found["readers"]] == [(arm, seed) for arm in ARMS for seed in "01"]
    total = 0
    for row in found["readers"]:
        plan = plan_arm(row["arm"], pretraining, *(directories if row["arm"] == "sbp" else directories[:1]))
        order = StreamOrder(plan.data, settings.experiment.model.context_length, int(row["seed"]))
        stream = order.rows(0, plan.tokens // settings.experiment.model.context_length).input_ids.ravel()
        seen = np.flatnonzero(stream == own)
        assert len(seen) <= row["reads"] * inner
        assert len(seen) > (row["reads"] - 1) * inner
        # The first of each run of its tokens, in the step in which the document begins or just after.
        starts = seen[np.flatnonzero(np.diff(seen, prepend=-2) > 1)] - (0 if synthetic else 1)
        assert row["steps"][: len(starts)] == (starts // pretraining.tokens_per_step).tolist()
        assert row["trained"] == (row["seed"] == "0")
        total += row["reads"]
    assert total


def test_arms_read_what_they_are_said_to(one):
    def reads(name: str) -> dict[str, set[int]]:
        rows = one(name)["readers"]
        return {arm: {row["reads"] for row in rows if row["arm"] == arm} for arm in ARMS}

    assert reads("syn-d1-3-0") == {"baseline": {0}, "sbp": {1}, "oracle": {0}}
    assert reads("d0-8")["baseline"] == reads("d0-8")["sbp"] == {0}
    assert reads("d0-8")["oracle"] <= {1, 2}
    assert reads("d0-1")["baseline"] <= {2, 3}


def test_a_synthesis_leads_to_its_seed_and_tells_a_foreign_checkpoint(one, settings: Settings, store: Store, records):
    found = one("syn-d1-2-1")
    assert (found["seed_id"], found["rollout"], found["sampling_seed"]) == ("d1-2", 1, 7 * 8)
    assert (found["synthesizer_version"], found["synthesizer_is_current"]) == ("version-1", True)
    assert (found["seed"]["file"], found["seed"]["line"]) == ("b.jsonl", 3)
    assert [row["document"] for row in found["seed_pairs"]] == ["d0-3"]

    def later_records(artifacts):
        return [row | {"data_version": "version-2"} for row in records(artifacts)]

    (later,) = trace("syn-d1-2-1", settings, store, later_records)
    assert later["synthesizer_is_current"] is False


def test_a_synthesis_names_its_engine_where_that_is_recorded(one, folder: Path):
    assert one("syn-d1-2-1")["engine"] == "vllm"
    first, second = (folder / f"synthesis/synthetic_documents/{shard}.parquet" for shard in SHARDS)
    whole = {path: path.read_bytes() for path in (first, second)}
    try:
        for path, engine_of_the_first in ((second, "vllm"), (first, None)):
            pl.read_parquet(path).drop("engine").write_parquet(path)
            assert one("syn-d1-2-1")["engine"] is None, "older shards beside newer ones, and alone"
            assert one("syn-d0-2-1")["engine"] == engine_of_the_first
    finally:
        for path, content in whole.items():
            path.write_bytes(content)


def test_a_pair_leads_to_both_lines_its_ranks_and_its_example(one):
    found = one("d0->0->d1-1")
    assert found["kept"] and found["similarity"] == pytest.approx(0.9)
    assert [(found[side]["file"], found[side]["line"]) for side in ("d1", "d2")] == [("a.jsonl", 1), ("b.jsonl", 2)]
    assert [(row["query_id"], row["rank"]) for row in found["candidates"]] == [("d0->0", 1)]
    assert found["tuning"]["split"] in ("train", "heldout")
    assert found["synthetic_documents_of_d1"] == 2
    # One epoch and a half: read once or twice, never if held out.
    assert found["tuning"]["reads"] in ((0,) if found["tuning"]["split"] == "heldout" else (1, 2))


def test_a_pair_of_the_earlier_round_leads_to_its_seed_and_its_text(folder: Path, settings, records, tmp_path):
    earlier, home = tmp_path / "earlier", tmp_path / "home"
    shutil.copytree(folder / "synthesis", earlier / "synthesis")
    shutil.copytree(folder, home)
    tokens = {shard: home / "corpus/tokens" / shard for shard in SHARDS}
    pairs = {shard: pl.scan_parquet(home / f"pairing/neighbor_pairs/{shard}.parquet") for shard in SHARDS}
    tokenizer = train_tokenizer(["Synthesis"], 300)
    tokenizer.save_pretrained(home / "corpus/tokenizer")
    for shard in SHARDS:
        directory = home / "synthesizer/earlier_pairs" / shard
        write_earlier_pairs(directory, earlier, shard, tokens[shard], 3, tokenizer)
        tokens[f"earlier-{shard}"], pairs[f"earlier-{shard}"] = directory, pl.scan_parquet(directory / PAIRS)
    examples = home / "synthesizer/tuning_examples"
    shutil.rmtree(examples)
    (tmp_path / "joined").mkdir()
    write_examples(examples, pairs, tokens, RELATED, 14, 5000, tmp_path / "joined", "100MB")
    synthesizer = settings.experiment.synthesizer.model_copy(update={"earlier_round": str(earlier)})
    experiment = settings.experiment.model_copy(update={"synthesizer": synthesizer})
    settings = settings.model_copy(update={"experiment": experiment})
    store = Store(str(home), str(tmp_path), graph_of(build_definitions(settings)), "1GB")
    # The lowest sampling seeds of the shard: of the first two documents, and one of the pairs the other way round.
    for name, text in (("d0->0->earlier-syn-d0->0-0", "Synthesis 0"), ("earlier-syn-d1-0-0->d1-0", "Synthesis 0")):
        (found,) = trace(name, settings, store, records)
        json.dumps(found)
        assert found["kind"] == "earlier_pair" and found["synthetic_document"]["text"] == text
        assert found["tuning"]["split"] in ("train", "heldout")
        assert found["seed"]["file"] == {"d1-0": "b.jsonl", "d0->0": "a.jsonl"}[found["seed"]["id"]]
        assert "synthesizer/earlier_pairs" in {row["asset"] for row in found["artifacts"]}
    shutil.rmtree(earlier)
    (found,) = trace("d1-1->earlier-syn-d1-1-0", settings, store, records)
    out = StringIO()
    show(found, Console(file=out, width=200))
    assert "syn-d1-1-0 of" in out.getvalue() and "Synthesis 1" in out.getvalue(), "what was tuned on"
    # The other way round, of another seed document, and not in the sample.
    for name in ("earlier-syn-d0->0-0->d0->0", "d1-1->earlier-syn-d1-0-0", "d1-5->earlier-syn-d1-5-0"):
        with pytest.raises(UnknownIdError, match="in synthesizer/earlier_pairs, 4 rows"):
            trace(name, settings, store, records)


def test_a_pair_that_was_filtered_out_is_told_from_one_that_never_was(one):
    filtered = one("d0->0->d1-3")
    assert not filtered["kept"] and filtered["tuning"] is None
    assert [row["rank"] for row in filtered["candidates"]] == [2]
    assert one("d0-1->d0-2")["candidates"] == []


def test_duplicates_are_shown_from_both_sides(one):
    dropped = one("copy-1")
    assert dropped["split"] is None and dropped["readers"] == []
    assert (dropped["duplicate_of"]["kept_id"], dropped["duplicate_of"]["kind"]) == ("d0-2", "near")
    assert [row["id"] for row in one("d0-2")["duplicates"]] == ["copy-1"]


def test_held_out_documents_say_whether_they_are_scored(one, folder: Path, settings: Settings):
    frames = {shard: pl.scan_parquet(folder / f"corpus/documents/{shard}.parquet") for shard in SHARDS}
    scored = set(sample_heldout(frames, settings.experiment.evaluation.heldout_documents)["id"])
    held = [name for shard in SHARDS for name, split in zip(ids(shard), SPLITS, strict=True) if split == "heldout"]
    assert 0 < len(scored) < len(held)
    assert {name for name in held if one(name)["scored_for_perplexity"]} == scored
    assert one(held[0])["readers"] == []


@pytest.mark.parametrize("name", ["heldout/perplexity/sbp/0", "heldout/perplexity/sbp"])
def test_a_score_leads_to_what_it_rests_on(one, name: str):
    found = one(name)
    assert [(row["task"], row["value"]) for row in found["scores"]] == [("heldout", 9.5)]
    assert found["model"]["asset"] == "pretraining/sbp_model" and found["model"]["tokens"]
    assert {row["source"]: row["unique_documents"] for row in found["data"]} == {"unique": 12, "synthetic": 24}
    assert found["synthesizer_versions"] == [{"synthesizer_version": "version-1", "documents": 24}]
    assert (found["pairs"], found["documents"]) == (12, {"heldout": 6, "oracle": 8, "unique": 12})
    assert found["source"] == {"files": 2, "bytes": 1500}
    assert found["used_by"][0] == "evaluation/comparison"
    assert found["comparison"][0]["delta_sbp"] == -0.5
    rests = {row["asset"] for row in found["artifacts"]}
    assert {"corpus/source_manifest", "synthesis/synthetic_documents", "pretraining/sbp_model"} <= rests
    assert "pretraining/oracle_model" not in rests


def test_an_early_stopped_score_tells_what_its_weights_had_read(one, folder: Path):
    last, found = one("heldout/perplexity/baseline/0"), one("early_stopped_scores/0")
    steps = pl.read_parquet(folder / "pretraining/token_budget.parquet").filter(arm="baseline")["steps"].item()
    assert 0 < BEST_STEP < steps
    assert (last["model"]["tokens"], last["model"]["heldout_loss"]) == (64 * steps, 3.5)
    assert (found["model"]["step"], found["model"]["tokens"]) == (BEST_STEP, 64 * BEST_STEP)
    assert (found["model"]["train_loss"], found["model"]["heldout_loss"]) == (3.2, 3.1)
    (whole,), (row,) = last["data"], found["data"]
    assert (whole["tokens_read"], row["tokens_read"]) == (64 * steps, 64 * BEST_STEP)
    assert row["passes"] == pytest.approx(64 * BEST_STEP / row["unique_tokens"]) != whole["passes"]
    out = StringIO()
    show(found, Console(file=out, width=200))
    assert f"lowest held-out loss along training, after step {BEST_STEP}" in out.getvalue()
    assert f"{64 * BEST_STEP:,} tokens, held-out loss 3.1000" in out.getvalue()


@pytest.mark.parametrize(("name", "rests"), [("d0-1", True), ("d0-8", False), ("syn-d1-2-1", False)])
def test_both_scores_of_the_baseline_rest_on_what_it_reads(one, name: str, rests: bool):
    """d0-8 is the oracle's alone, a synthesis the SBP arm's."""
    passed = {row["asset"] for row in one(name)["artifacts"]}
    for scored in ("baseline", "early_stopped"):
        assert (f"evaluation/{scored}_scores" in passed) is rests


def test_the_baseline_rests_on_no_synthesis(one):
    found = one("baseline_scores")
    assert len(found["scores"]) == 2
    assert not any(row["asset"].startswith("synthesis/") for row in found["artifacts"])


def test_an_unknown_id_says_where_it_was_looked_for_and_what_is_near(one):
    with pytest.raises(UnknownIdError) as caught:
        one("d1-22")
    message = str(caught.value)
    assert "corpus/raw_documents, 28 rows in 2 of 2 partitions" in message
    assert "d1-2" in message.splitlines()[-1]
    with pytest.raises(UnknownIdError, match="sbp_scores"):
        one("sbp_score")
    with pytest.raises(UnknownIdError, match="it has heldout/perplexity, mmlu/acc"):
        one("heldout/acc/sbp/0")
    with pytest.raises(UnknownIdError, match="no training seed '7'"):
        one("heldout/perplexity/sbp/7")


def test_what_is_not_materialised_names_the_asset_and_its_job(one, folder: Path, assets, settings, records, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "evaluation")
    (copy / "synthesis/synthetic_documents/00001.parquet").unlink()
    shutil.rmtree(copy / "synthesis/synthetic_tokens/00001")
    store = Store(str(copy), str(tmp_path), assets, "1GB")
    with pytest.raises(NotMaterialisedError, match=r"evaluation/sbp_scores is not materialised.*job score"):
        trace("sbp_scores", settings, store, records)
    # A document is still found; what is not there is said, and the arm that it would tell of is left out.
    (found,) = trace("d0-1", settings, store, records)
    assert any("synthesis/synthetic_documents is not materialised for 1 of 2" in line for line in found["missing"])
    assert {row["arm"] for row in found["readers"]} == {"baseline", "oracle"}
    nothing = Store(str(tmp_path / "empty"), str(tmp_path), assets, "1GB")
    with pytest.raises(UnknownIdError, match="job ingest"):
        trace("d0-1", settings, nothing, records)


def test_a_store_behind_a_url_gives_the_same_traces(one, folder: Path, assets, settings, records, tmp_path):
    base = root(f"memory://{tmp_path.name}")
    remote = RemoteStore(base, tmp_path / "cache", 1e9, patience=0)
    for name, asset in assets.items():
        for partition in asset.partitions or ("",):
            local, path = folder / name / partition, (base / name / partition).path.rstrip("/")
            if asset.directory and local.is_dir():
                remote.put_directory(local, path, "v")
            elif (table := local.with_name(f"{local.name}.parquet")).is_file():
                remote.put_file(table, f"{path}.parquet")
    far = Store(str(base), str(tmp_path), assets, "1GB")
    for name in EVERY_KIND:
        assert trace(name, settings, far, records) == [one(name)]


@pytest.mark.parametrize("name", EVERY_KIND)
def test_traces_print_without_what_a_document_could_smuggle_in(one, name: str):
    out = StringIO()
    show(one(name), Console(file=out, width=200))
    assert name.split("/")[-1].split("->")[0] in out.getvalue() or "sbp" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "Passes through" in out.getvalue() or "Upstream" in out.getvalue()
