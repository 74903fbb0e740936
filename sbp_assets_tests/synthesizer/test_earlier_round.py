from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from sbp_assets.corpus.tokenizer import encode_documents, related_id, train_tokenizer
from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.pipeline import pipeline_of
from sbp_assets.settings import Settings, SettingsError, load_settings
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesizer.audit import check_contents, check_examples
from sbp_assets.synthesizer.earlier_round import PAIRS, EarlierRoundError, earlier_pairs_problems, write_earlier_pairs
from sbp_assets.synthesizer.examples import format_prompt, write_examples
from sbp_assets_tests.tiny import tiny_settings

SHARD = "00000"
D = {"a": "a red stone lies here", "b": "the stone is red", "c": "a blue stone"}
SYNTHETIC = pl.DataFrame(
    [
        ("syn-a-0", "a", 30, "here lies a red stone", "vllm"),
        ("syn-a-1", "a", 10, "red is the stone", "vllm"),
        ("syn-b-0", "b", 20, "it is a red stone", "vllm"),
        ("syn-c-0", "c", 5, "dropped by the filter of that run", "vllm"),
    ],
    schema=["id", "seed_id", "sampling_seed", "text", "engine"],
    orient="row",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(D.values(), 300)


@pytest.fixture
def tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    frame = pl.DataFrame({"id": [*D, "held"], "split": [*["unique"] * len(D), "heldout"]})
    write_token_arrays(tmp_path / SHARD, frame, encode_documents(tokenizer, [*D.values(), "x"]), len(tokenizer))
    return tmp_path / SHARD


def store(home: Path, tokenizer: PreTrainedTokenizerFast, synthetic: pl.DataFrame, kept: pl.DataFrame) -> Path:
    """The store of an earlier run."""
    (home / "synthesis/synthetic_documents").mkdir(parents=True)
    synthetic.write_parquet(home / f"synthesis/synthetic_documents/{SHARD}.parquet")
    encoded = encode_documents(tokenizer, kept["text"].to_list())
    write_token_arrays(home / f"synthesis/synthetic_tokens/{SHARD}", kept.select("id", "seed_id"), encoded, 300)
    return home


@pytest.fixture
def artifacts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return store(tmp_path / "earlier", tokenizer, SYNTHETIC, SYNTHETIC[:3])


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (0, set()),
        (1, {("a", "earlier-syn-a-1")}),
        (2, {("a", "earlier-syn-a-1"), ("earlier-syn-a-1", "a")}),
        (3, {("a", "earlier-syn-a-1"), ("b", "earlier-syn-b-0"), ("earlier-syn-a-1", "a")}),
        (99, {("a", "earlier-syn-a-0"), ("a", "earlier-syn-a-1"), ("b", "earlier-syn-b-0"),
              ("earlier-syn-a-0", "a"), ("earlier-syn-a-1", "a"), ("earlier-syn-b-0", "b")}),
    ],
)  # fmt: skip
def test_documents_of_the_lowest_sampling_seeds_are_paired_both_ways(
    pairs: int,
    expected: set[tuple[str, str]],
    artifacts: Path,
    tokens: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    counts = write_earlier_pairs(out, artifacts, SHARD, tokens, pairs, tokenizer)
    assert set(pl.read_parquet(out / PAIRS).rows()) == expected
    assert (counts["pairs"], counts["documents"]) == (len(expected), (len(expected) + 1) // 2)
    held = TokenArrays.load(out)
    texts = dict(SYNTHETIC.select("earlier-" + pl.col("id"), "text").iter_rows())
    encoded = encode_documents(tokenizer, [texts[name] for name in held.documents["id"]])
    assert held.tokens.tolist() == [token for ids in encoded for token in ids]
    assert earlier_pairs_problems(out, tokens, tokenizer.bos_token_id, tokenizer.eos_token_id) == []


def test_they_become_examples_beside_those_of_neighbours(
    artifacts: Path, tokens: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    earlier, out = tmp_path / "pairs_of_earlier", tmp_path / "examples"
    write_earlier_pairs(earlier, artifacts, SHARD, tokens, 2, tokenizer)
    neighbours = pl.DataFrame({"d1": ["a", "b"], "d2": ["b", "a"], "similarity": [0.9, 0.9]})
    neighbours.write_parquet(tmp_path / "neighbours.parquet")
    pairs = {SHARD: tmp_path / "neighbours.parquet", "earlier": earlier / PAIRS}
    located = {SHARD: tokens, "earlier": earlier}
    related, vocabulary, eos = related_id(tokenizer), len(tokenizer), tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as scratch:
        frames = {shard: pl.scan_parquet(path) for shard, path in pairs.items()}
        counts = write_examples(out, frames, located, related, 50, vocabulary, Path(scratch), "100MB")
    assert counts["examples"] == 4
    held = TokenArrays.load(out)
    place = held.documents["id"].to_list().index("earlier-syn-a-1->a")
    d1, d2 = encode_documents(tokenizer, ["red is the stone", D["a"]])
    expected = [*format_prompt(d1, related, 50), *d2[1:]]
    assert held.tokens[held.offsets[place] : held.offsets[place + 1]].tolist() == expected
    for checked, rest in ((4, {}), (5, {"count": ["4 examples for 5 pairs"]})):
        with tempfile.TemporaryDirectory() as scratch:
            assert check_examples(out, located, checked, 200, related, eos, Path(scratch), "100MB") == rest
    with tempfile.TemporaryDirectory() as scratch:
        assert not check_contents(out, pairs, located, related, 50, False, Path(scratch), "100MB")
    with tempfile.TemporaryDirectory() as scratch:
        found = check_contents(out, {SHARD: pairs[SHARD]}, located, related, 50, False, Path(scratch), "100MB")
    assert found == {"not the pairs": ["a->earlier-syn-a-1", "earlier-syn-a-1->a"]}


def rewritten(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    return lambda directory: change(pl.read_parquet(directory / name)).write_parquet(directory / name)


def other_tokens(directory: Path) -> None:
    np.save(directory / "tokens.npy", np.load(directory / "tokens.npy")[::-1].copy())


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (rewritten(PAIRS, lambda rows: rows.with_columns(d2=pl.col("d1"))), "2 pairs do not join"),
        (rewritten(PAIRS, lambda rows: rows.with_columns(d1=pl.lit("held"))), "2 pairs do not join"),
        (rewritten(PAIRS, lambda rows: pl.concat([rows, rows[:1]])), "2 pairs are there twice"),
        (rewritten("documents.parquet", lambda rows: rows.with_columns(id=pl.lit("a"))), "1 ids are there twice"),
        (other_tokens, "1 documents do not begin with <bos>"),
    ],
)
def test_damaged_pairs_are_found(
    damage: Callable[[Path], None],
    problem: str,
    artifacts: Path,
    tokens: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    write_earlier_pairs(out, artifacts, SHARD, tokens, 2, tokenizer)
    damage(out)
    found = earlier_pairs_problems(out, tokens, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert any(text.startswith(problem) for text in found), found


@pytest.mark.parametrize(
    ("synthetic", "kept", "reason"),
    [
        (
            SYNTHETIC.with_columns(seed_id=pl.lit("held")),
            SYNTHETIC,
            "1 seed documents that are not in D of shard 00000",
        ),
        (SYNTHETIC, SYNTHETIC[:0], "none of the synthetic documents: loosen the filter"),
        (SYNTHETIC.with_columns(engine=pl.lit("none")), SYNTHETIC, "holds real pairs"),
    ],
)
def test_an_unsuitable_run_is_refused(
    synthetic: pl.DataFrame,
    kept: pl.DataFrame,
    reason: str,
    tokens: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    artifacts = store(tmp_path / "unsuitable", tokenizer, synthetic, kept)
    with pytest.raises(EarlierRoundError, match=reason):
        write_earlier_pairs(tmp_path / "out", artifacts, SHARD, tokens, 9, tokenizer)


@pytest.mark.parametrize("missing", ["synthesis/synthetic_documents", "synthesis/synthetic_tokens"])
def test_a_run_that_has_not_synthesised_the_shard_is_refused(
    missing: str, artifacts: Path, tokens: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (artifacts / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(EarlierRoundError, match=rf"there is no .*{missing}/{SHARD}.*: name the data_dir"):
        write_earlier_pairs(tmp_path / "out", artifacts, SHARD, tokens, 9, tokenizer)


EARLIER_ROUND = "SBP_EXPERIMENT__SYNTHESIZER__EARLIER_ROUND"


def test_a_folder_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spelled = (f"{tmp_path}/tiny/x", "~/{profile}/x", "tiny/y/../x/")
    (tmp_path / "tiny/y").mkdir(parents=True)
    found = {load_settings("tiny", {EARLIER_ROUND: text}).experiment.synthesizer.earlier_round for text in spelled}
    assert found == {f"{tmp_path}/tiny/x"}


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({EARLIER_ROUND: "own", "SBP_DEPLOYMENT__DATA_DIR": "own"}, "this run's own data_dir"),
        ({EARLIER_ROUND: "other", "SBP_EXPERIMENT__SYNTHESIS__CONDITION": "pairs"}, "synthesis.condition is pairs"),
        ({EARLIER_ROUND: "s3://bucket/artifacts"}, "synthesizer.earlier_round"),
    ],
)
def test_impossible_settings_are_refused(environ: dict[str, str], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        load_settings("tiny", environ)


def materialised(settings: Settings, until: str) -> None:
    """Materialise the steps up to `until` that make examples of pairs, in order; every check passes."""
    defs = build_definitions(settings)
    with dg.DagsterInstance.ephemeral() as instance:
        for step in pipeline_of(settings):
            job = defs.resolve_job_def(step.name)
            for shard in job.partitions_def.get_partition_keys() if job.partitions_def else [None]:
                done = job.execute_in_process(instance=instance, partition_key=shard)
                assert all(evaluation.passed for evaluation in done.get_asset_check_evaluations()), step.name
            if step.name == until:
                return


@pytest.mark.processes
def test_a_second_round_materialises_and_its_checks_pass(tmp_path: Path) -> None:
    first = tiny_settings(tmp_path / "first")
    materialised(first, "pair")
    home = Path(first.deployment.data_dir)
    for shard in first.experiment.shard_keys:
        seeds = pl.read_parquet(home / f"pairing/neighbor_pairs/{shard}.parquet")["d1"].unique(maintain_order=True)
        rows = pl.DataFrame({"seed_id": seeds}).with_row_index("sampling_seed").with_columns(
            id="syn-" + pl.col("seed_id"), text=pl.lit("A synthetic document.")
        )  # fmt: skip
        (home / "synthesis/synthetic_documents").mkdir(parents=True, exist_ok=True)
        rows.write_parquet(home / f"synthesis/synthetic_documents/{shard}.parquet")
        (kept := home / f"synthesis/synthetic_tokens/{shard}").mkdir(parents=True)
        rows.select("id").write_parquet(kept / "documents.parquet")
    second = tiny_settings(tmp_path / "second", {"experiment.synthesizer.earlier_round": str(home)})
    materialised(second, "format_examples")
    made = Path(second.deployment.data_dir)
    ids = pl.read_parquet(made / "synthesizer/tuning_examples/documents.parquet")["id"]
    counts = [
        (
            len(pl.read_parquet(made / f"pairing/neighbor_pairs/{shard}.parquet")),
            len(pl.read_parquet(made / f"synthesizer/earlier_pairs/{shard}/{PAIRS}")),
        )
        for shard in second.experiment.shard_keys
    ]
    assert len(ids) == sum(map(sum, counts)) and all(earlier > 0 for _, earlier in counts)
    assert ids.str.contains("earlier-").sum() == sum(earlier for _, earlier in counts)
