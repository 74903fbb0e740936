"""Artifacts between two local stores and one behind a remote file system, in this process."""

import json
from pathlib import Path

import dagster as dg
import pytest
from upath import UPath

from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.copy import Artifact, copy_artifacts
from sbp_assets.storage.io_managers import ArtifactIOManager, DirectoryIOManager, ParquetIOManager

ROWS, MODEL = dg.AssetKey(["corpus", "rows"]), dg.AssetKey(["pretraining", "model"])


def store(base: str, cache: Path) -> dict[dg.AssetKey, ArtifactIOManager]:
    return {ROWS: ParquetIOManager(base, str(cache)), MODEL: DirectoryIOManager(base, str(cache))}


@pytest.fixture
def made(tmp_path: Path) -> list[Artifact]:
    """Two shards of a table and a directory, in tmp_path/local."""
    rows, model = tmp_path / "local/corpus/rows", tmp_path / "local/pretraining/model"
    rows.mkdir(parents=True)
    (model / "best").mkdir(parents=True)
    paths = [(ROWS, "00000", rows / "00000.parquet"), (ROWS, "00001", rows / "00001.parquet"), (MODEL, None, model)]
    for _, partition, path in paths:
        if partition:
            path.write_bytes(partition.encode())
    (model / "config.json").write_text("{}")
    (model / "best/weights").write_bytes(b"1" * 1000)
    return [Artifact(key, partition, content_version(path)) for key, partition, path in paths]


def test_there_and_back_is_the_same(made: list[Artifact], tmp_path: Path):
    local, back = store(str(tmp_path / "local"), tmp_path / "cache"), store(str(tmp_path / "back"), tmp_path / "cache")
    remote = store(f"memory://{tmp_path.name}/store", tmp_path / "cache")
    assert copy_artifacts(made, local, remote, tmp_path / "there.jsonl") == (3, 0, [])
    assert copy_artifacts(made, remote, back, tmp_path / "back.jsonl") == (3, 0, [])
    files = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "local" / file).read_bytes()


def test_a_copy_that_stopped_resumes(made: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local, other = store(str(tmp_path / "local"), tmp_path), store(str(tmp_path / "other"), tmp_path)
    ledger = tmp_path / "copied" / "other.jsonl"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(other[MODEL], "put", full)
        copy_artifacts(made, local, other, ledger)
    assert not (tmp_path / "other/pretraining/model").exists()
    with ledger.open("a") as file:
        file.write(
            json.dumps([MODEL.path, None, made[2].version])[:-4]
        )  # of what was written when the machine went down
    assert copy_artifacts(made, local, other, ledger) == (1, 2, [])
    assert copy_artifacts(made, local, other, ledger) == (0, 3, [])
    # What was re-materialised since is copied again.
    (tmp_path / "local/corpus/rows/00001.parquet").write_bytes(b"other")
    newer = made[1]._replace(version=content_version(tmp_path / "local/corpus/rows/00001.parquet"))
    assert copy_artifacts([made[0], newer, made[2]], local, other, ledger) == (1, 2, [])
    assert (tmp_path / "other/corpus/rows/00001.parquet").read_bytes() == b"other"


def test_what_the_target_no_longer_has_is_copied_again(made: list[Artifact], tmp_path: Path):
    local = store(str(tmp_path / "local"), tmp_path / "cache")
    url = f"memory://{tmp_path.name}/store"
    for target, remove in (
        (store(str(tmp_path / "other"), tmp_path / "cache"), None),
        (store(url, tmp_path / "cache"), url),
    ):
        ledger = tmp_path / f"{bool(remove)}.jsonl"
        assert copy_artifacts(made, local, target, ledger) == (3, 0, [])
        assert copy_artifacts(made, local, target, ledger) == (0, 3, [])
        # Another content has taken the place of one, and one is gone.
        newer = tmp_path / "newer.parquet"
        newer.write_bytes(b"newer")
        target[ROWS].put(ROWS, "00000", newer, content_version(newer))
        gone = UPath(remove or str(tmp_path / "other")) / ("pretraining/model.json" if remove else "pretraining/model")
        gone.fs.rm(gone.path, recursive=True)
        assert copy_artifacts(made, local, target, ledger) == (2, 1, [])
        assert target[ROWS].stored_version(ROWS, "00000") == made[0].version


def test_a_corrupted_directory_of_a_bucket_is_named_and_the_rest_copied(made: list[Artifact], tmp_path: Path):
    local, back = store(str(tmp_path / "local"), tmp_path / "cache"), store(str(tmp_path / "back"), tmp_path / "cache")
    remote = store(f"memory://{tmp_path.name}/store", tmp_path / "cache")
    copy_artifacts(made, local, remote, tmp_path / "there.jsonl")
    (weights,) = UPath(f"memory://{tmp_path.name}/store/pretraining").glob("model.*/best/weights")
    weights.unlink()
    first = [made[2], *made[:2]]
    assert copy_artifacts(first, remote, back, tmp_path / "back.jsonl") == (2, 0, ["pretraining/model"])


def test_what_is_lost_or_corrupted_is_named_and_not_copied(made: list[Artifact], tmp_path: Path):
    local, other = store(str(tmp_path / "local"), tmp_path), store(str(tmp_path / "other"), tmp_path)
    (tmp_path / "local/corpus/rows/00000.parquet").unlink()
    (tmp_path / "local/pretraining/model/config.json").write_text("{ }")
    copied = copy_artifacts(made, local, other, tmp_path / "ledger.jsonl")
    assert copied == (1, 0, ["corpus/rows/00000", "pretraining/model"])
    assert [path.name for path in (tmp_path / "other").rglob("*") if path.is_file()] == ["00001.parquet"]
