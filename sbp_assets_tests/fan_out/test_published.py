import multiprocessing
import shutil
from pathlib import Path

import pytest

from sbp_assets.fan_out import LazyMapping, PublishedFiles
from sbp_assets.storage.prune import UNFINISHED, find_in_store
from sbp_assets.storage.remote import RemoteStore, root
from sbp_assets_tests.fan_out import work


@pytest.fixture(params=["folder", "store"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> PublishedFiles:
    if request.param == "folder":
        return PublishedFiles(str(tmp_path / "exp [1]" / "partial"), str(tmp_path / "cache"))
    return PublishedFiles(f"memory://{tmp_path.name}/partial", str(tmp_path / "cache"), patience=0.1)


def publish(files: PublishedFiles, name: str, text: str) -> None:
    with files.publish(name) as path:
        path.write_text(text)


def test_a_file_is_there_once_it_is_published(files: PublishedFiles):
    assert not files.exists("00001/00002.parquet")
    with pytest.raises(FileNotFoundError):
        files.fetch("00001/00002.parquet")
    publish(files, "00001/00002.parquet", "one")
    assert files.exists("00001/00002.parquet")
    assert files.fetch("00001/00002.parquet").read_text() == "one"
    publish(files, "00001/00002.parquet", "two, later")
    assert files.fetch("00001/00002.parquet").read_text() == "two, later"


def test_a_write_that_fails_leaves_what_was_there(files: PublishedFiles):
    publish(files, "a", "before")
    with pytest.raises(ValueError), files.publish("a") as path:
        path.write_text("half")
        raise ValueError
    assert files.fetch("a").read_text() == "before"


def test_files_of_other_inputs_are_others(files: PublishedFiles):
    old, new = files.under(embeddings="1", quantizer="1"), files.under(embeddings="2", quantizer="1")
    publish(old, "a", "of the old ones")
    assert not new.exists("a")
    assert files.under(quantizer="1", embeddings="1").exists("a")


def test_all_are_removed_and_their_neighbours_stay(files: PublishedFiles):
    other = PublishedFiles(f"{files.location}-2", files.cache)
    publish(files.under(a="1"), "x", "1")
    publish(other, "x", "2")
    files.remove()
    files.remove()
    assert not files.under(a="1").exists("x")
    assert other.exists("x")


def test_two_writers_leave_one_whole_file(tmp_path: Path):
    files, context = PublishedFiles(str(tmp_path), str(tmp_path)), multiprocessing.get_context("spawn")
    publish(files, "x", "a" * 2**20)
    writers = [
        context.Process(target=work.publish_often, args=(str(tmp_path), "x", letter, 20)) for letter in ("a", "b")
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        content = files.fetch("x").read_bytes()
        assert len(content) == 2**20
        seen.add(bytes(set(content)))
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {b"a", b"b"} and len(seen) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_directory_artifact_is_fetched_whole_and_read_in_part(files: PublishedFiles, tmp_path: Path):
    for name in ("keys", "digest"):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / name).write_text(name)
    for read in (files.fetch, lambda name, directory: files.read(name, "digest")):
        with pytest.raises(FileNotFoundError):
            read("00000", directory=True)
    if remote := files._remote:
        remote.put(tmp_path / "made", files._path("00000"), "1")
    else:
        shutil.copytree(tmp_path / "made", files._local("00000"))
    assert {path.name for path in files.fetch("00000", directory=True).iterdir()} == {"keys", "digest"}
    assert files.read("00000", "digest") == b"digest"
    with pytest.raises(FileNotFoundError):
        files.read("00000", "other")


def test_what_is_staged_for_an_artifact_is_an_unfinished_write_of_it(
    files: PublishedFiles, monkeypatch: pytest.MonkeyPatch
):
    one, other = (files.staged_for("00000", documents=version) for version in "12")
    publish(one, "table", "of the first")
    assert not other.exists("table") and files.staged_for("00000", documents="1").exists("table")
    current = {"partial/00000": False}
    store = files._remote and RemoteStore(root(files.location.removesuffix("/partial")), Path(files.cache), 1e9, 0.1)
    base = root(files.location).parent

    def left() -> list[str]:
        found = find_in_store(base, store, current, {})
        assert not found.unknown
        return [leftover.kind for leftover in found.leftovers]

    assert left() == []
    monkeypatch.setattr("sbp_assets.storage.artifacts.ABANDONED", -1)
    monkeypatch.setattr("sbp_assets.storage.remote.ABANDONED", -1)
    assert left() == [UNFINISHED]
    one.remove()
    assert left() == []


def test_what_is_made_lazily_is_made_when_it_is_asked_for():
    asked = []
    found = LazyMapping(["a", "b"], lambda key: asked.append(key) or key.upper())
    assert len(found) == 2 and sorted(found) == ["a", "b"] and "c" not in found and asked == []
    assert found["a"] == "A" and asked == ["a"]
    with pytest.raises(KeyError):
        found["c"]
