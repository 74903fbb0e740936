"""`sbp pilot` from end to end on the pairing of a small corpus, and what it refuses."""

import json
from pathlib import Path

import pytest

from sbp_assets.cli.pilot import expected_documents
from sbp_assets.storage.paths import read_table
from sbp_assets_tests.cli.conftest import Sbp
from sbp_assets_tests.tiny import tiny_settings


@pytest.mark.processes
def test_a_pilot_judges_a_sample_in_a_store_of_its_own(sbp: Sbp, tmp_path: Path):
    result = sbp("pilot", "-p", "tiny", "--documents", "100", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    documents, pairs = found["documents"], found["pairs"]
    assert (documents["read"], documents["whole_corpus"], documents["d"]) == (400, True, 80)
    assert documents["measured"] == 80 <= documents["sample"] <= 100
    assert pairs["pairs"] > 0 and [row["documents"] for row in pairs["sizes"]][-1] == documents["sample"]
    # Half of the four facts are in each document, and pairs share concepts more often than random ones do.
    assert pairs["truth"]["one_concept"] > pairs["truth_of_random"]["one_concept"]
    assert found["verdict"] in {"worth it", "not worth it here", "not known"} and found["lines"]
    # The pipeline's own pairs of the whole sample are those of the exact search.
    at_all = next(row for row in pairs["sizes"] if row["documents"] == documents["sample"])
    pilot = tmp_path / ".sbp/tiny/work.pilot/pairing"
    stored = read_table(pilot / "artifacts/pairing/neighbor_pairs/00000.parquet")
    assert at_all["pairs"] == len(stored)
    assert {path.name for path in (tmp_path / ".sbp/tiny").iterdir()} == {"work.pilot"}

    variables = {"SBP_EXPERIMENT__PAIRING__MIN_SIMILARITY": "0.9999"}
    refused = sbp("pilot", "-p", "tiny", "--documents", "100", "--tune", **variables)
    assert refused.exit_code == 2 and "pairing.min_similarity 0.9999" in refused.stderr


def test_a_corpus_that_is_too_small_is_refused_with_what_it_has(sbp: Sbp, tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "one"}\n' * 3)
    path = {"SBP_EXPERIMENT__CORPUS__SOURCE__PATH": str(tmp_path / "corpus.jsonl")}
    result = sbp("pilot", "-p", "text", **path)
    assert result.exit_code == 2 and "holds 3 documents; a pilot needs 100 at least" in result.stderr
    assert not (tmp_path / ".sbp").exists()
    missing = sbp("pilot", "-p", "text", SBP_EXPERIMENT__CORPUS__SOURCE__PATH=str(tmp_path / "nowhere"))
    assert missing.exit_code == 2 and "does not exist" in missing.stderr


def test_a_head_size_that_the_engine_lacks_is_refused_before_anything_is_tuned(sbp: Sbp):
    variables = {
        "SBP_EXPERIMENT__MODEL__HEAD_DIM": "48",
        "SBP_DEPLOYMENT__GENERATION_ENGINE": "vllm",
        "SBP_DEPLOYMENT__DEVICE": "cpu",
    }
    result = sbp("pilot", "-p", "tiny", "--tune", **variables)
    assert result.exit_code == 2 and "no CPU attention for model.head_dim 48" in result.stderr


def test_the_size_of_d_is_the_configured_share_of_what_was_read(tmp_path: Path):
    settings = tiny_settings(tmp_path)
    assert expected_documents(settings, 1000) == 200
    assert expected_documents(settings, None) == 80  # of the 400 documents of the source
