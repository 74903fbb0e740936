"""The ledger of a shard's finished requests, whose it is, and which engine finishes a shard."""

import json
from pathlib import Path

import pytest

from sbp_assets.settings import Synthesis
from sbp_assets.synthesis.ledger import Ledger, engine_of_shard, fingerprint

RECORD = {"seed_id": "a", "rollout": 0, "sampling_seed": 1, "text": "kept", "finish_reason": "stop"}


def count_bytes(texts: list[str]) -> list[int]:
    """Stands in for a tokenizer: one token a byte, and <bos> and <eos>."""
    return [len(text.encode()) + 2 for text in texts]


def test_fingerprint_changes_with_what_is_sampled_only() -> None:
    base = fingerprint("v1", Synthesis(), 100, 256, "vllm")
    assert fingerprint("v1", Synthesis(quality_sample=7), 100, 256, "vllm") == base
    assert base not in {
        fingerprint("v2", Synthesis(), 100, 256, "vllm"),
        fingerprint("v1", Synthesis(temperature=0.9), 100, 256, "vllm"),
        fingerprint("v1", Synthesis(salt="other"), 100, 256, "vllm"),
        fingerprint("v1", Synthesis(), 99, 256, "vllm"),
        fingerprint("v1", Synthesis(), 100, 128, "vllm"),
        fingerprint("v1", Synthesis(), 100, 256, "transformers"),
    }


def test_ledgers_from_before_there_were_two_engines_are_those_of_vllm() -> None:
    assert fingerprint("v1", Synthesis(), 100, 256, "vllm") == "6e9cfe0cedce707f"


FINGERPRINTS = {"vllm": "f-vllm", "transformers": "f-transformers"}


@pytest.mark.parametrize("here", ["vllm", "transformers"])
def test_auto_continues_with_the_engine_that_began_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str
) -> None:
    """`here`: what auto would begin a shard with."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in (here, "transformers") else None)
    other = "transformers" if here == "vllm" else "vllm"
    assert engine_of_shard(tmp_path, "auto", FINGERPRINTS) == here
    for setting in ("vllm", "transformers"):
        assert engine_of_shard(tmp_path, setting, FINGERPRINTS) == setting, "asked for, here or not"
    Ledger(tmp_path / "older settings", count_bytes).session_files(1)[0].write_text(json.dumps(RECORD) + "\n")
    file = Ledger(tmp_path / FINGERPRINTS[other], count_bytes).session_files(1)[0]
    assert engine_of_shard(tmp_path, "auto", FINGERPRINTS) == here
    file.write_text(json.dumps(RECORD)[:-3])
    assert engine_of_shard(tmp_path, "auto", FINGERPRINTS) == here, "nothing is finished in a torn file"
    file.write_text(json.dumps(RECORD) + "\n")
    assert engine_of_shard(tmp_path, "auto", FINGERPRINTS) == other
    for setting in ("vllm", "transformers"):
        assert engine_of_shard(tmp_path, setting, FINGERPRINTS) == setting


def test_ledger_drops_torn_lines_and_other_synthesizers(tmp_path: Path) -> None:
    other = tmp_path / "00000" / "old"
    other.mkdir(parents=True)
    (other / "000000-x-engine0.jsonl").write_text(json.dumps(RECORD | {"text": "of another synthesizer"}) + "\n")
    mine = tmp_path / "00000" / "new"
    mine.mkdir()
    torn = json.dumps(RECORD | {"rollout": 1})
    (mine / "000000-x-engine0.jsonl").write_text(json.dumps(RECORD) + "\n" + torn[:-9] + "\n" + torn[:-3])
    ledger = Ledger(mine, count_bytes)
    assert list(ledger.finished) == [("a", 0)] and ledger.finished["a", 0].n_tokens == 6
    assert other.exists(), "kept until this one is sampled"
    ledger.remove_others()
    assert not other.exists() and mine.exists()
    assert all(not path.exists() for path in ledger.session_files(2)), "a torn file is never continued"
