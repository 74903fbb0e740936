"""What is removed from a store and what never is; records and runs are in orchestration/test_prune_records.py."""

import os
import shutil
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.storage import prune
from sbp_assets.storage.artifacts import ABANDONED, content_version
from sbp_assets.storage.prune import ARTIFACTS, UNFINISHED, Found, Recorded, find_in_store
from sbp_assets.storage.remote import RemoteStore, root

CURRENT = {"corpus/documents/00000": False, "corpus/tokens/00000": True, "corpus/tokenizer": True}
HEX = "0123456789abcdef" * 2


def write(path: Path, text: str = "text", age: float = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for changed in (path, path.parent):
        os.utime(changed, (time.time() - age, time.time() - age))
    return path


def recorded(path: Path) -> Recorded:
    size = sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
    return Recorded(content_version(path), size)


def local(base: Path, superseded: Mapping[str, Recorded], *elsewhere: Path) -> Found:
    return find_in_store(root(str(base)), None, CURRENT, superseded, elsewhere)


def kinds(found: Found) -> list[tuple[str, str]]:
    return sorted((one.kind, one.path) for one in found.leftovers)


def files(base: Path) -> list[str]:
    return sorted(path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A store with all current artifacts."""
    write(tmp_path / "data/corpus/documents/00000.parquet")
    write(tmp_path / "data/corpus/tokens/00000/tokens.npy")
    write(tmp_path / "data/corpus/tokenizer/tokenizer.json")
    return tmp_path / "data"


def test_superseded_artifacts_go_and_current_ones_stay(base: Path):
    before = files(base)
    table = write(base / "corpus/documents/00001.parquet")
    folder = write(base / "corpus/tokens/00001/tokens.npy", "other").parent
    gone = write(base / "corpus/gone/00000.parquet", "of an asset that is no more")
    superseded = {
        "corpus/documents/00001": recorded(table),
        "corpus/tokens/00001": recorded(folder),
        "corpus/gone/00000": recorded(gone),
        "corpus/documents/00009": Recorded("0" * 16, 3),  # lost
        "corpus/tokenizer": recorded(base / "corpus/tokenizer"),  # recorded, and a current one
    }
    found = local(base, superseded)
    assert kinds(found) == [
        (ARTIFACTS, "corpus/documents/00001.parquet"),
        (ARTIFACTS, "corpus/gone/00000.parquet"),
        (ARTIFACTS, "corpus/tokens/00001"),
    ]
    assert {one.artifact: one.bytes for one in found.leftovers} == {
        name: superseded[name].bytes for name in ("corpus/documents/00001", "corpus/gone/00000", "corpus/tokens/00001")
    }
    assert (found.unknown, found.changed) == ([], set())
    for one in found.leftovers:
        one.remove()
    assert files(base) == before
    assert not (base / "corpus/gone").exists() and (base / "corpus/documents").is_dir()
    assert local(base, superseded) == Found()


def test_what_is_not_the_projects_own_is_named_and_left(base: Path):
    other = write(base / "corpus/documents/00001.parquet", "another store's shard of the same name")
    theirs = [
        write(base / "notes.txt"),
        write(base / "corpus/documents/00000.parquet.bak"),
        write(base / "corpus/documents/.draft.partial", age=2 * ABANDONED),
        write(base / "mine/table.parquet").parent,
    ]
    link = base / "corpus/tokens/00001"
    link.symlink_to(base / "corpus/tokens/00000")
    superseded = {
        "corpus/documents/00001": Recorded("0" * 16, other.stat().st_size),
        "corpus/tokens/00001": recorded(base / "corpus/tokens/00000"),
    }
    found = local(base, superseded)
    assert found.leftovers == []
    assert {path.rstrip("/") for path in found.unknown} == {str(path) for path in [*theirs, other, link]}
    assert found.changed == {*superseded}


def test_a_folder_of_the_deployment_inside_the_store_is_left_out(base: Path):
    write(base / "work/synthesis/x.jsonl")
    assert local(base, {}).unknown == [f"{base}/work/"]
    assert local(base, {}, base / "work") == Found()


def test_unfinished_writes_go_after_a_day(base: Path):
    folder = base / "corpus/documents"
    old = write(folder / f".00000.parquet.{HEX}.partial", age=ABANDONED + 60)
    write(folder / f".00001.parquet.{HEX}.partial", age=ABANDONED - 60)
    half = write(base / f"corpus/.tokenizer.{HEX}.partial/tokenizer.json", age=ABANDONED + 60).parent
    only = write(base / f"corpus/tokens/.00001.{HEX}.replaced.partial/tokens.npy", age=ABANDONED + 60).parent
    copy = write(base / f"corpus/tokens/.00000.{HEX}.replaced.partial/tokens.npy", age=ABANDONED + 60).parent
    found = local(base, {})
    assert {one.path for one in found.leftovers} == {p.relative_to(base).as_posix() for p in (old, half, copy)}
    assert {one.kind for one in found.leftovers} == {UNFINISHED} and found.unknown == []
    for one in found.leftovers:
        one.remove()
    assert only.exists() and not half.exists() and not old.exists()


def test_a_removal_that_is_killed_is_finished_a_day_later(base: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(base / "corpus/tokens/00001/tokens.npy").parent
    superseded = {"corpus/tokens/00001": recorded(folder)}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        local(base, superseded).leftovers[0].remove()
    assert not folder.exists()
    assert local(base, superseded) == Found()
    monkeypatch.setattr(prune, "is_abandoned", lambda path: True)
    (left,) = local(base, superseded).leftovers
    left.remove()
    assert [path.name for path in folder.parent.iterdir()] == ["00000"]


def test_files_of_a_branch_free_nothing(base: Path, tmp_path: Path):
    table = write(base / "corpus/documents/00001.parquet")
    os.link(table, tmp_path / "branch.parquet")
    (leftover,) = local(base, {"corpus/documents/00001": recorded(table)}).leftovers
    assert leftover.bytes == 0


def test_a_store_that_is_not_there_has_nothing_to_remove(tmp_path: Path):
    assert local(tmp_path / "nothing", {}) == Found()


parts = st.sampled_from(["corpus", "documents", "tokens", "tokenizer", "00000", "00001", "00000.parquet", "x.json"])


@given(st.lists(st.lists(parts, min_size=1, max_size=4), max_size=8))
def test_current_artifacts_stay_whatever_is_recorded_as_superseded(tmp_path_factory, paths):
    base = tmp_path_factory.mktemp("store")
    for name, directory in CURRENT.items():
        write(base / name / "file" if directory else base / f"{name}.parquet")
    kept = files(base)
    for path in ("/".join(path) for path in paths):
        if not any(p.is_file() for p in (base / path).parents) and not (base / path).exists():
            write(base / path)
    # Everything is recorded as superseded, with the content that it has.
    superseded = {
        path.relative_to(base).as_posix().removesuffix(".parquet"): recorded(path)
        for path in base.rglob("*")
        if path.relative_to(base).as_posix().removesuffix(".parquet") not in CURRENT
    }
    folders = [f"{name}/" for name, directory in CURRENT.items() if directory]
    inside = [name for name in files(base) if name.startswith(tuple(folders))]
    for one in local(base, superseded).leftovers:
        one.remove()
    assert {*kept, *inside} <= {*files(base)}


@pytest.fixture
def store(tmp_path: Path) -> RemoteStore:
    """A remote store with all current artifacts."""
    store = RemoteStore(root(f"memory://{uuid.uuid4().hex}"), tmp_path / "cache", cache_bytes=1e9, patience=0)
    for name, directory in CURRENT.items():
        put(store, tmp_path, name, "text", directory)
    return store


def put(store: RemoteStore, tmp_path: Path, name: str, text: str, directory: bool, version: str = "") -> Recorded:
    made = write(tmp_path / uuid.uuid4().hex / "file", text)
    made = made.parent if directory else made
    version = version or content_version(made)
    store.put(made, store.path_of(name if directory else f"{name}.parquet"), version)
    return Recorded(version, len(text))


def remote(store: RemoteStore, superseded: Mapping[str, Recorded]) -> Found:
    return find_in_store(store.base, store, CURRENT, superseded)


def grow_old(store: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day passes."""
    monkeypatch.setattr(type(store.fs), "modified", lambda *_: datetime.now(UTC) - timedelta(seconds=ABANDONED + 60))


def test_superseded_artifacts_on_an_object_store_go(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = store.objects()
    grow_old(store, monkeypatch)
    superseded = {
        "corpus/documents/00001": put(store, tmp_path, "corpus/documents/00001", "table", directory=False),
        "corpus/tokens/00001": put(store, tmp_path, "corpus/tokens/00001", "folder", directory=True),
    }
    found = remote(store, superseded)
    assert kinds(found) == [(ARTIFACTS, "corpus/documents/00001.parquet"), (ARTIFACTS, "corpus/tokens/00001")]
    assert found.unknown == [] and sum(one.bytes for one in found.leftovers) > len("table" + "folder")
    for one in found.leftovers:
        one.remove()
    assert store.objects() == before
    assert remote(store, superseded) == Found()


def test_a_removal_from_an_object_store_that_is_killed_goes_on(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = store.objects()
    superseded = {"corpus/tokens/00001": put(store, tmp_path, "corpus/tokens/00001", "folder", directory=True)}
    (leftover,) = remote(store, superseded).leftovers
    take, removed = store.remove, []

    def killed_after_one(path: str) -> None:
        if removed:
            raise KeyboardInterrupt
        take(path)
        removed.append(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store, "remove", killed_after_one)
        leftover.remove()
    assert removed == [store.path_of("corpus/tokens/00001.json")], "what readers follow goes first"
    (leftover,) = remote(store, superseded).leftovers
    leftover.remove()
    assert store.objects() == before


def test_on_an_object_store_other_content_stays(store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put(store, tmp_path, "corpus/documents/00001", "another store's", directory=False)
    put(store, tmp_path, "corpus/tokens/00001", "another store's", directory=True)
    store.fs.pipe_file(store.path_of("notes.txt"), b"text")
    superseded = {"corpus/documents/00001": Recorded("0" * 16, 3), "corpus/tokens/00001": Recorded("0" * 16, 3)}
    found = remote(store, superseded)
    assert found.leftovers == []
    names = {path.removeprefix(str(store.base)).lstrip("/") for path in found.unknown}
    assert {"notes.txt", "corpus/documents/00001.parquet", "corpus/tokens/00001.json"} <= names
    assert found.changed == {*superseded}
    grow_old(store, monkeypatch)
    assert remote(store, superseded).leftovers == [], "a listing names these files"


def test_interrupted_uploads_go_after_a_day_and_the_listed_one_never(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = store.objects()
    for name in ("corpus/tokens/00000.0123-89abcdef", "corpus/tokenizer.0123-89abcdef"):
        store.fs.pipe_file(store.path_of(f"{name}/file"), b"half")
    assert remote(store, {}) == Found(), "perhaps still going on"
    grow_old(store, monkeypatch)
    found = remote(store, {})
    assert kinds(found) == [
        (UNFINISHED, "corpus/tokenizer.0123-89abcdef"),
        (UNFINISHED, "corpus/tokens/00000.0123-89abcdef"),
    ]
    for one in found.leftovers:
        one.remove()
    assert store.objects() == before
    store.fs.rm_file(store.path_of("corpus/tokenizer.json"))
    store.fs.pipe_file(store.path_of("corpus/tokens/00000.json"), b"no list of files")
    store.fs.pipe_file(store.path_of("corpus/tokens/00000.0123-89abcdef/file"), b"half")
    (first,) = remote(store, {}).leftovers
    assert first.path.startswith("corpus/tokenizer."), "its listing was never put; of the other nothing can be said"
