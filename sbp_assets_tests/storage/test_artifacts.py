import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.storage import artifacts
from sbp_assets.storage.artifacts import (
    ABANDONED,
    RUN_RECORD,
    atomic_path,
    content_version,
    exclusive,
    release_staging,
    staging,
)


def test_a_failed_write_leaves_the_old_artifact_and_no_debris(tmp_path: Path):
    target = tmp_path / "table.parquet"
    with atomic_path(target) as path:
        path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_is_replaced_as_a_whole(tmp_path: Path):
    target = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_path(target) as path:
            path.mkdir()
            (path / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_is_never_absent_while_it_is_replaced(tmp_path: Path):
    target, absent, done = tmp_path / "model", [], threading.Event()

    def look() -> None:
        while not done.is_set():
            if not (target / "file").exists():
                absent.append(time.monotonic())

    reader = threading.Thread(target=look)
    for number in range(200):
        with atomic_path(target) as path:
            path.mkdir()
            (path / "file").write_text(str(number))
        if number == 0:
            reader.start()
    done.set()
    reader.join()
    assert not absent


def test_a_file_system_that_cannot_exchange_directories_takes_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifacts, "_exchange", lambda *_: False)
    test_a_directory_is_replaced_as_a_whole(tmp_path)


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path):
    (tmp_path / ".table.parquet.old.partial").write_text("half")
    (tmp_path / ".model.old.partial").mkdir()
    (tmp_path / ".model.old.partial/file").write_text("of another artifact")
    for age, left in ((ABANDONED - 60, 3), (ABANDONED + 60, 2)):
        for path in tmp_path.rglob(".*.partial"):
            os.utime(path, (time.time() - age, time.time() - age))
        with atomic_path(tmp_path / "table.parquet") as path:
            path.write_text("whole")
        assert len(list(tmp_path.iterdir())) == left


@given(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=8), min_size=1))
def test_version_follows_names_and_bytes_alone(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]):
    def write(extra: dict[str, bytes]) -> str:
        root = tmp_path_factory.mktemp("v")
        for name, data in {**files, **extra}.items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
        return content_version(root)

    assert write({}) == write({}) == write({RUN_RECORD: b"seconds"})
    assert write({}) != write({"e": b""})
    name = next(iter(files))
    assert write({}) != write({name: files[name] + b"!"})


def test_one_holder_at_a_time(tmp_path: Path):
    refused = pytest.raises(RuntimeError, match="another process is training x")
    with exclusive(tmp_path, "training x"), refused, exclusive(tmp_path, "training x", seconds=0.3):
        pass
    with exclusive(tmp_path, "training x"):
        pass


STAGES = """
import sys
from sbp_assets.storage.artifacts import staging
directory = staging(sys.argv[1], "index", "00000")
(directory / "vectors").write_text("half")
print(directory, flush=True)
sys.stdin.read()
"""


def test_staging_is_for_one_process_alone_and_what_dead_ones_left_is_removed(tmp_path: Path):
    command = [sys.executable, "-c", STAGES, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        first = staging(str(tmp_path), "index", "00000")
        (first / "vectors").write_text("whole")
        second = staging(str(tmp_path), "index", "00000")
        assert not first.exists() and list(second.iterdir()) == []
        assert (theirs / "vectors").read_text() == "half"
        other.kill()
    third = staging(str(tmp_path), "index", "00000")
    assert not theirs.exists() and not second.exists() and third.is_dir()


def test_what_was_staged_is_let_go_of_with_its_descriptor(tmp_path: Path):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for shard in range(20):
        (directory := staging(str(tmp_path), "index", f"{shard:05d}")).joinpath("file").touch()
        release_staging(directory)
        assert not directory.exists()
    assert descriptors() <= before
    release_staging(tmp_path)
    assert tmp_path.exists(), "staged by nobody"
