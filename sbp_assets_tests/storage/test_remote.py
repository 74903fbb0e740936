"""The remote layout and the cache, on fsspec's memory file system; the real protocol is in operations/test_s3.py."""

import json
import os
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from upath import UPath

from sbp_assets.storage.artifacts import ABANDONED
from sbp_assets.storage.remote import Cache, RemoteStore, StorageError, root, url


@pytest.fixture
def store(tmp_path: Path) -> RemoteStore:
    return RemoteStore(root(f"memory://{uuid.uuid4().hex}"), tmp_path / "cache", cache_bytes=1e9, patience=0)


def folder(tmp_path: Path, content: str) -> Path:
    made = tmp_path / content
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "file.txt").write_text(content)
    (made / "empty.txt").touch()
    return made


def path_of(store: RemoteStore, name: str) -> str:
    return (store.base / name).path


def test_a_directory_comes_back_and_a_new_one_replaces_it(store: RemoteStore, tmp_path: Path):
    path = path_of(store, "s/model")
    urls = [store.put_directory(folder(tmp_path, content), path, "v") for content in ("first", "second")]
    got = store.get(path, directory=True)
    assert got.name == "model"
    assert {p.relative_to(got).as_posix() for p in got.rglob("*") if p.is_file()} == {"deep/file.txt", "empty.txt"}
    assert (got / "deep/file.txt").read_text() == "second"
    assert url(store.base / "s/model").rpartition("/")[2] == urls[1].rpartition("/")[2]
    assert not store.fs.exists(UPath(urls[0]).path)


def test_an_upload_that_dies_leaves_the_artifact_as_it_was(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = path_of(store, "s/model")
    store.put_directory(folder(tmp_path, "first"), path, "v")
    with monkeypatch.context() as patch:
        patch.setattr(store.fs, "pipe_file", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(StorageError, match=r"memory://.*s/model.json.*gone"):
            store.put_directory(folder(tmp_path, "second"), path, "v")
    assert (store.get(path, directory=True) / "deep/file.txt").read_text() == "first"
    # The dead upload is kept from its neighbours' writes, for it may be another's that goes on; a day later it is not.
    leftover = [p for p in store.fs.ls(path.rpartition("/")[0], detail=False) if not p.endswith(".json")]
    assert len(leftover) == 2
    for file in store.fs.find(path.rpartition("/")[0]):
        store.fs.store[file].modified = datetime.now(UTC) - timedelta(seconds=ABANDONED + 1)
    store.put_directory(folder(tmp_path, "third"), path, "v")
    assert len(store.fs.ls(path.rpartition("/")[0], detail=False)) == 2  # the listing and its files
    assert (store.get(path, directory=True) / "deep/file.txt").read_text() == "third"


def test_what_was_replaced_or_damaged_is_never_served_from_the_cache(store: RemoteStore, tmp_path: Path):
    table, model = path_of(store, "s/table.parquet"), path_of(store, "s/model")
    for content in ("one", "two"):
        (tmp_path / "table").write_text(content)
        store.put_file(tmp_path / "table", table)
        assert store.get(table, directory=False).read_text() == content
    store.put_directory(folder(tmp_path, "first"), model, "v")
    store.get(model, directory=True)
    store.fs.rm(f"{url(store.base / 's/model')}/deep/file.txt")
    with pytest.raises(StorageError, match=r"s/model is not what was uploaded.*materialise it again"):
        store.get(model, directory=True)
    store.fs.rm(f"{model}.json")
    for missing, directory in ((model, True), (path_of(store, "s/none"), False)):
        with pytest.raises(FileNotFoundError):
            store.get(missing, directory)


@pytest.mark.parametrize(
    "listing",
    [
        "{}",
        "not JSON",
        {"prefix": "../other.v-00000000", "files": {}},
        {"prefix": "model.v-00000000", "files": {"../../planted": 1}},
        {"prefix": "model.v-00000000", "files": {"/planted": 1}},
    ],
)
def test_a_list_of_files_from_elsewhere_leads_nowhere(store: RemoteStore, tmp_path: Path, listing: object):
    text = listing if isinstance(listing, str) else json.dumps(listing)
    store.fs.pipe_file(path_of(store, "s/model.json"), text.encode())
    store.fs.pipe_file(path_of(store, "planted"), b"x")
    with pytest.raises(StorageError, match=r"model\.json is no list of files"):
        store.get(path_of(store, "s/model"), directory=True)
    assert not [path for path in tmp_path.rglob("planted") if path.is_file()]


def test_a_lost_connection_is_tried_again(store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put, failures = store.fs.put_file, [ConnectionResetError("reset"), TimeoutError("slow")]
    (tmp_path / "table").write_text("x")

    def unsteady(*arguments: str) -> None:
        if failures:
            raise failures.pop()
        put(*arguments)

    monkeypatch.setattr(store.fs, "put_file", unsteady)
    with pytest.raises(StorageError, match=r"slow.*storage_patience"):
        store.put_file(tmp_path / "table", path_of(store, "t"))
    store._patience = 10
    store.put_file(tmp_path / "table", path_of(store, "t"))
    assert not failures and store.fs.exists(path_of(store, "t"))


def test_a_full_disk_and_missing_rights_are_not_tried_again(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store._patience = 60
    (tmp_path / "table").write_text("x")
    for error, expected in (
        (PermissionError("denied"), "AWS_ACCESS_KEY_ID"),
        (FileNotFoundError("no bucket"), "data_dir"),
    ):
        monkeypatch.setattr(store.fs, "put_file", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(StorageError, match=expected):
            store.put_file(tmp_path / "table", path_of(store, "t"))
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(store.fs, "put_file", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        store.put_file(tmp_path / "table", path_of(store, "t"))


def fill(size: int):
    return lambda path: path.write_bytes(b"x" * size)


def test_the_cache_is_bounded_but_keeps_what_is_in_use(tmp_path: Path):
    cache = Cache(tmp_path, limit=1000)
    first = [cache.get(f"a{number}", "file", fill(400)) for number in range(4)]
    assert all(path.exists() for path in first)  # one run's inputs, though too many
    for age, path in enumerate(first):
        os.utime(path.parent, (time.time() - age, time.time() - age))
    cache.release()
    assert [path.exists() for path in first] == [True, True, False, False]
    assert cache.get("a0", "file", lambda _: pytest.fail("it is there")) == first[0]


USER = """
import sys
from pathlib import Path
from sbp_assets.storage.remote import Cache
cache = Cache(Path(sys.argv[1]), 1000)
print(cache.get("theirs", "file", lambda path: path.write_bytes(b"x" * 800)), flush=True)
sys.stdin.read()
"""


def test_the_cache_keeps_what_another_living_process_uses(tmp_path: Path):
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout is not None
    theirs = Path(user.stdout.readline().strip())
    os.utime(theirs.parent, (0, 0))
    cache = Cache(tmp_path, limit=1000)
    cache.get("mine", "file", fill(900))
    assert theirs.exists()
    user.kill()
    user.communicate()
    cache.get("more", "file", fill(100))
    assert not theirs.exists()
