"""The remote layout and retries, on fsspec's memory file system; the real protocol is in operations/test_s3.py."""

import errno
import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.registry import known_implementations
from upath import UPath

from sbp_assets.storage.artifacts import ABANDONED
from sbp_assets.storage.remote import CorruptedArtifactError, RemoteStore, StorageError, root, url


@pytest.fixture
def store(tmp_path: Path) -> RemoteStore:
    return RemoteStore(root(f"memory://{uuid.uuid4().hex}"), tmp_path / "cache", cache_bytes=1e9, patience=0)


@pytest.mark.parametrize("base", ["github://a/b", "zip://x", "ftp://127.0.0.1:1/x", "nowhere://x"])
def test_a_store_that_cannot_be_opened_is_an_error_with_its_url(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"class": "no_such_package.Files", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "nowhere", lacking)
    with pytest.raises(StorageError, match=f"deployment.data_dir {base} cannot be opened: ") as refused:
        root(base)
    assert base != "nowhere://x" or "Please install no_such_package" in str(refused.value)


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


@pytest.mark.parametrize("name", ["exp?1", "a*", "exp [v2]"])
def test_a_path_is_no_pattern_when_what_it_was_is_removed(tmp_path: Path, name: str):
    bucket = f"memory://{uuid.uuid4().hex}"
    stores = [
        RemoteStore(root(f"{bucket}/{prefix}"), tmp_path / "c", 1e9, 0) for prefix in (name, "expX1", "ab", "exp v")
    ]
    for store in stores:  # the same content version, hence names that differ in the prefix of the store alone
        store.put_directory(folder(tmp_path / uuid.uuid4().hex, "first"), path_of(store, "model"), "v")
    others = {file for store in stores[1:] for file in store.fs.find(store.base.path)}
    stores[0].put_directory(folder(tmp_path, "second"), path_of(stores[0], "model"), "v")
    found = stores[0].fs.find(stores[0].base.path.rpartition("/")[0])
    assert others < set(found) and len([file for file in found if f"/{name}/" in file]) == 3
    assert (stores[0].get(path_of(stores[0], "model"), directory=True) / "deep/file.txt").read_text() == "second"


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
    # Another write keeps the dead upload, which a living process may still be at; a day later it does not.
    leftover = [p for p in store.fs.ls(path.rpartition("/")[0], detail=False) if not p.endswith(".json")]
    assert len(leftover) == 2
    for file in store.fs.find(path.rpartition("/")[0]):
        store.fs.store[file].modified = datetime.now(UTC) - timedelta(seconds=ABANDONED + 1)
    store.put_directory(folder(tmp_path, "third"), path, "v")
    assert len(store.fs.ls(path.rpartition("/")[0], detail=False)) == 2  # the listing and its files
    assert (store.get(path, directory=True) / "deep/file.txt").read_text() == "third"


def test_what_was_replaced_or_corrupted_is_never_served_from_the_cache(store: RemoteStore, tmp_path: Path):
    table, model = path_of(store, "s/table.parquet"), path_of(store, "s/model")
    for content in ("one", "two"):
        (tmp_path / "table").write_text(content)
        store.put_file(tmp_path / "table", table)
        assert store.get(table, directory=False).read_text() == content
    store.put_directory(folder(tmp_path, "first"), model, "v")
    store.get(model, directory=True)
    store.fs.rm(f"{url(store.base / 's/model')}/deep/file.txt")
    with pytest.raises(CorruptedArtifactError, match=r"s/model is not what was uploaded.*re-materialise it"):
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
    with pytest.raises(CorruptedArtifactError, match=r"model\.json is no list of files"):
        store.get(path_of(store, "s/model"), directory=True)
    assert not [path for path in tmp_path.rglob("planted") if path.is_file()]


class FailingPut:
    """Stands for the file system's `put_file`: raises each of `errors` once, then uploads."""

    def __init__(self, store: RemoteStore, monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> None:
        self.errors, self.calls, self._put = list(errors), 0, store.fs.put_file
        monkeypatch.setattr(store.fs, "put_file", self)

    def __call__(self, *arguments: str) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self._put(*arguments)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "table").write_text("x")
    return tmp_path / "table"


def connection_errors() -> list[Exception]:
    """What file systems raise when a server restarts, is out of reach or does not answer."""
    botocore, aiohttp = pytest.importorskip("botocore.exceptions"), pytest.importorskip("aiohttp")
    return [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        OSError(errno.EBUSY, "SlowDown"),
        FSTimeoutError(),
        botocore.EndpointConnectionError(endpoint_url="http://127.0.0.1:1/"),
        botocore.ReadTimeoutError(endpoint_url="http://127.0.0.1:1/"),
        botocore.ConnectionClosedError(endpoint_url="http://127.0.0.1:1/"),
        aiohttp.ClientPayloadError("Response payload is not completed"),
        aiohttp.ServerDisconnectedError(),
    ]


def test_a_lost_connection_is_retried(
    store: RemoteStore, table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    store._patience = 1000
    put = FailingPut(store, monkeypatch, *connection_errors())
    store.put_file(table, path_of(store, "t"))
    assert not put.errors and store.fs.exists(path_of(store, "t"))
    assert waits == [0.5, 1, 2, 4, 8, 15, 15, 15, 15]
    assert "reset; trying again in 0.5 s" in caplog.text


def test_patience_ends_with_an_error_that_says_what_to_do(
    store: RemoteStore, table: Path, monkeypatch: pytest.MonkeyPatch
):
    for error in connection_errors():
        put = FailingPut(store, monkeypatch, error)
        with pytest.raises(StorageError, match=r"cannot write memory://.*storage_patience") as raised:
            store.put_file(table, path_of(store, "t"))
        assert raised.value.__cause__ is error and put.calls == 1


def test_an_error_that_would_come_again_is_not_retried(
    store: RemoteStore, table: Path, monkeypatch: pytest.MonkeyPatch
):
    store._patience = 60
    botocore = pytest.importorskip("botocore.exceptions")
    for error, expected in (
        (PermissionError("denied"), "AWS_ACCESS_KEY_ID"),
        (botocore.NoCredentialsError(), "AWS_ACCESS_KEY_ID"),
        (botocore.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), "AWS_ACCESS_KEY_ID"),
        (botocore.ProfileNotFound(profile="nope"), "nope.*AWS_ACCESS_KEY_ID"),
        (botocore.ParamValidationError(report="Invalid bucket name"), "Invalid bucket name.*data_dir"),
        (FileNotFoundError("no bucket"), "Create the bucket, or set deployment.data_dir"),
        (ValueError("Invalid endpoint: nonsense"), "Invalid endpoint.*data_dir"),
    ):
        put = FailingPut(store, monkeypatch, error)
        with pytest.raises(StorageError, match=expected):
            store.put_file(table, path_of(store, "t"))
        assert put.calls == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt("stop")])
def test_a_full_disk_and_an_interruption_are_raised_as_they_are(
    store: RemoteStore, table: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    store._patience = 60
    put = FailingPut(store, monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        store.put_file(table, path_of(store, "t"))
    assert raised.value is error and put.calls == 1
