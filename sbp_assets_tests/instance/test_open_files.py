"""SQLite files that stay open: what is seen of them, and when they are closed."""

import gc
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from sbp_assets.instance.open_files import OpenFiles


def opened(folder: Path) -> set[str]:
    """Return the names of the files in `folder` that this process has open, without SQLite's own beside them."""
    found = {Path(file.path) for file in psutil.Process().open_files()}
    return {path.name for path in found if path.parent == folder and path.suffix == ".db"}


def add(files: OpenFiles, path: Path, *values: int) -> None:
    with files.lock, files.transaction(str(path)) as connection:
        connection.execute(sa.text("CREATE TABLE IF NOT EXISTS t (x)"))
        for value in values:
            connection.execute(sa.text("INSERT INTO t VALUES (:x)"), {"x": value})


def rows(files: OpenFiles, path: Path) -> list[int]:
    with files.lock, files.transaction(str(path)) as connection:
        return list(connection.scalars(sa.text("SELECT x FROM t ORDER BY x")))


def forked(work: Callable[[], None]) -> int:
    """Return 0 if `work` succeeds in a fork of this process."""
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    return tmp_path / "a.db"


def test_the_files_used_last_stay_open_and_those_that_always_do(tmp_path: Path):
    files = OpenFiles(2, 1, frozenset({str(tmp_path / "index.db")}))
    for name in ("index", "a", "b", "a", "c", "d"):
        add(files, tmp_path / f"{name}.db", 1)
    assert opened(tmp_path) == {"index.db", "c.db", "d.db"}
    assert rows(files, tmp_path / "a.db") == [1, 1]
    assert opened(tmp_path) == {"index.db", "d.db", "a.db"}
    files.close()
    assert opened(tmp_path) == set()
    assert rows(files, tmp_path / "b.db") == [1], "it is opened again"
    files.close()


def test_a_block_that_raises_changes_nothing(path: Path):
    files = OpenFiles(1, 1)
    add(files, path, 1)
    with pytest.raises(ValueError), files.lock, files.transaction(str(path)) as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (2)"))
        raise ValueError
    assert rows(files, path) == [1]
    files.close()


def test_rows_that_nobody_fetched_hide_nothing_and_hold_nothing_up(path: Path):
    files = OpenFiles(1, 0.1)
    add(files, path, 1, 2, 3)
    with files.lock, files.transaction(str(path)) as connection:
        unread = connection.execute(sa.text("SELECT x FROM t"))
        assert unread.fetchone() == (1,)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO t VALUES (4)")
        other.commit()
        (busy, _, _) = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not busy
    assert rows(files, path) == [1, 2, 3, 4]
    add(files, path, 5)
    assert unread is not None
    files.close()


def test_a_file_that_another_process_has_removed_is_not_written_to(path: Path):
    files = OpenFiles(1, 1)
    add(files, path, 1)
    for file in path.parent.iterdir():
        file.unlink()
    add(files, path, 2)
    assert rows(files, path) == [2]
    files.remove(str(path))
    assert list(path.parent.iterdir()) == [] and opened(path.parent) == set()


def test_a_locked_file_is_waited_for_and_can_be_used_afterwards(path: Path):
    files = OpenFiles(1, 0.1)
    add(files, path, 1)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="database is locked"):
            add(files, path, 2)
        assert rows(files, path) == [1], "reading waits for nobody"
    add(files, path, 3)
    assert rows(files, path) == [1, 3]
    files.close()


def test_a_full_file_can_be_used_again_when_there_is_space(path: Path):
    full = [False, True, False]

    def prepare(_: str, connection: sa.Connection) -> None:
        if full.pop(0):
            connection.execute(sa.text("PRAGMA max_page_count = 1"))

    files = OpenFiles(1, 1, prepare=prepare)
    add(files, path, 1)
    files.close()
    with pytest.raises(OperationalError, match="full"):
        add(files, path, *range(2, 10_000))
    assert rows(files, path) == [1]
    assert full == [], "it was opened again"
    files.close()


def test_a_statement_is_compiled_once_for_all_files(tmp_path: Path):
    table = sa.Table("t", sa.MetaData(), sa.Column("x"))
    files = OpenFiles(8, 1)
    found = []
    for name in "abc":
        add(files, tmp_path / f"{name}.db", 1)
        with files.lock, files.transaction(str(tmp_path / f"{name}.db")) as connection:
            result = connection.execute(sa.select(table))
            found.append(result.context.compiled)
    assert len({id(compiled) for compiled in found}) == 1
    files.close()


def test_what_the_parent_uses_during_a_fork_is_left_to_it(path: Path):
    files = OpenFiles(1, 1)
    add(files, path, 1)

    def child() -> None:
        own = files.of_this_process()
        assert own is not files and own.of_this_process() is own
        assert rows(own, path) == [1], "which the parent has committed"
        own.close()
        gc.collect()
        assert opened(path.parent) == {"a.db"}, "that of the parent"

    with files.lock, files.transaction(str(path)) as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (2)"))
        assert forked(child) == 0
        assert files.of_this_process() is files
        connection.execute(sa.text("INSERT INTO t VALUES (3)"))
    assert rows(files, path) == [1, 2, 3]
    files.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
