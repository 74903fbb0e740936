"""The storage that dagster.yaml names, beside Dagster's own: the same files and events, for fewer calls."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
import sqlalchemy as sa
from dagster._core.storage.event_log import SqliteEventLogStorage
from sqlalchemy.exc import OperationalError

from sbp_assets.instance.home import project_file
from sbp_assets.instance.sqlite_storage import OPEN_LOGS, EventLogStorage, SqliteStorage
from sbp_assets_tests.instance.test_open_files import forked

KINDS = ("plain", "ours")


@contextmanager
def opened(folder: Path, kind: str = "ours") -> Iterator[dg.DagsterInstance]:
    """Yield the instance in `folder`, in a storage of Dagster's or in ours."""
    folder.mkdir(exist_ok=True)
    config = {"base_dir": str(folder)}
    custom = {"module": SqliteStorage.__module__, "class": SqliteStorage.__name__, "config": config}
    storage: dict[str, Any] = {"sqlite": config} if kind == "plain" else {"custom": custom}
    overrides = {"storage": storage, "telemetry": {"enabled": False}}
    with dg.DagsterInstance.local_temp(str(folder), overrides=overrides) as instance:
        assert isinstance(instance.event_log_storage, EventLogStorage) == (kind == "ours")
        yield instance


@dg.asset
def one() -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"rows": 1})


@dg.asset_check(asset=one)
def good() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


JOB = dg.Definitions(
    assets=[one], asset_checks=[good], jobs=[dg.define_asset_job("job", executor_def=dg.in_process_executor)]
).resolve_job_def("job")


def run(instance: dg.DagsterInstance) -> str:
    return JOB.execute_in_process(instance=instance).run_id


def materialise(instance: dg.DagsterInstance, key: str = "one", times: int = 1) -> None:
    for _ in range(times):
        instance.report_runless_asset_event(dg.AssetMaterialization(key))


def materialisations(instance: dg.DagsterInstance, key: str = "one") -> int:
    return len(instance.fetch_materializations(dg.AssetKey(key), limit=1000).records)


def write(log: EventLogStorage | SqliteEventLogStorage, run_id: str, text: str) -> None:
    log.store_event(dg.EventLogEntry(None, 20, text, run_id, time.time()))


def texts(log: EventLogStorage | SqliteEventLogStorage, run_id: str) -> list[str]:
    return [entry.user_message for entry in log.get_logs_for_run(run_id)]


def log_of(instance: dg.DagsterInstance) -> EventLogStorage:
    assert isinstance(instance.event_log_storage, EventLogStorage)
    return instance.event_log_storage


def descriptors(folder: Path) -> list[str]:
    return [file.path for file in psutil.Process().open_files() if Path(file.path).is_relative_to(folder)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of engines, of files that are opened and of those that Alembic stamps, from now on."""
    count: Counter[str] = Counter()

    def spy(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            count[what] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    spy(sa.Engine, "__init__", "engines")
    spy(sqlite3, "connect", "files")
    spy(sqlite3.dbapi2, "connect", "files")
    spy(sys.modules["dagster._core.storage.sql"], "stamp", "stamps")
    return count


def test_a_run_opens_its_own_file_and_makes_no_engine(tmp_path: Path, counted: Counter[str]):
    with opened(tmp_path) as instance:
        run(instance)
        counted.clear()
        runs = [run(instance) for _ in range(3)]
        assert len(instance.all_logs(runs[-1])) > 10
        assert counted == {"files": 3}


def test_dagsters_own_opens_and_stamps_as_counted_above(tmp_path: Path, counted: Counter[str]):
    with opened(tmp_path, "plain") as instance:
        run(instance)
        counted.clear()
        run(instance)
    assert counted["stamps"] == 1 and min(counted["files"], counted["engines"]) > 50


def shape(path: Path) -> dict[str, Any]:
    """Return everything about an SQLite file but its rows."""
    pragmas = ("journal_mode", "page_size", "encoding", "auto_vacuum", "user_version", "application_id")
    with closing(sqlite3.connect(path)) as database:
        return {
            "tables": database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall(),
            "revision": database.execute("SELECT * FROM alembic_version").fetchall(),
            **{name: database.execute(f"PRAGMA {name}").fetchone() for name in pragmas},
        }


def test_files_are_dagsters_in_the_same_places(tmp_path: Path):
    files: dict[str, dict[str, Any]] = {}
    modes = set()
    for kind in KINDS:
        with opened(tmp_path / kind, kind) as instance:
            for number in range(3):  # of ours, the first is set up and the others are copied
                write(instance.event_log_storage, f"run{number}", "begun")
        found = sorted((tmp_path / kind).rglob("*.db*"))
        files[kind] = {path.relative_to(tmp_path / kind).as_posix(): shape(path) for path in found}
        modes |= {path.stat().st_mode for path in found}
    assert set(files["ours"]) >= {"history/runs.db", "history/runs/index.db", "history/runs/run2.db"}
    assert files["ours"] == files["plain"]
    assert files["ours"]["history/runs/run2.db"]["journal_mode"] == ("wal",)
    assert len(modes) == 1
    assert not list(tmp_path.rglob("*-new"))


@pytest.mark.parametrize("kinds", [("plain", "ours"), ("ours", "plain")], ids="-".join)
def test_either_reads_and_goes_on_with_what_the_other_has_written(tmp_path: Path, kinds: tuple[str, str]):
    with opened(tmp_path, kinds[0]) as instance:
        first = run(instance)
        said = [entry.user_message for entry in instance.all_logs(first)]
        materialise(instance)
    with opened(tmp_path, kinds[1]) as instance:
        assert [entry.user_message for entry in instance.all_logs(first)] == said
        assert materialisations(instance) == 2
        second = run(instance)
        materialise(instance)
    with opened(tmp_path, kinds[0]) as instance:
        assert {run.run_id for run in instance.get_runs()} == {first, second}
        assert materialisations(instance) == 4


def test_open_logs_are_bounded_and_closed_with_the_instance(tmp_path: Path):
    with opened(tmp_path) as instance:
        for number in range(OPEN_LOGS + 3):
            write(log_of(instance), f"run{number}", "begun")
        assert instance.get_runs() == [] and materialisations(instance) == 0
        assert {Path(name).name for name in descriptors(tmp_path) if name.endswith(".db")} == {
            "index.db", "runs.db", *(f"run{number}.db" for number in range(3, OPEN_LOGS + 3)),
        }  # fmt: skip
        assert texts(log_of(instance), "run0") == ["begun"]
    assert descriptors(tmp_path) == []
    assert not list(tmp_path.rglob("*-wal")), "what was written is in the files themselves"


def test_a_deleted_run_leaves_no_file(tmp_path: Path):
    with opened(tmp_path) as instance:
        first, second = run(instance), run(instance)
        instance.delete_run(first)
        assert not list(tmp_path.rglob(f"{first}.db*"))
        assert not [name for name in descriptors(tmp_path) if first in name]
        assert instance.all_logs(second) and [run.run_id for run in instance.get_runs()] == [second]
        assert materialisations(instance) == 1
        log_of(instance).wipe()
        assert not list(tmp_path.rglob(f"{second}.db*")) and materialisations(instance) == 0
        assert run(instance)


def test_a_log_is_created_where_files_have_no_second_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links")

    with opened(tmp_path) as instance:
        monkeypatch.setattr(os, "link", refuse)
        for name in ("a", "b"):
            write(log_of(instance), name, "begun")
            assert texts(log_of(instance), name) == ["begun"]
    assert not list(tmp_path.rglob("*-new"))


def test_a_log_that_another_process_creates_at_that_moment_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.link

    def later(source: str, target: str) -> None:
        write(SqliteEventLogStorage(str(tmp_path)), "a", "theirs")
        real(source, target)

    log = EventLogStorage(str(tmp_path))
    monkeypatch.setattr(os, "link", later)
    write(log, "a", "ours")
    assert texts(log, "a") == ["theirs", "ours"]
    log.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_space_is_an_error_of_the_database_until_there_is_some(tmp_path: Path, kind: str):
    with opened(tmp_path, kind) as instance:
        log = instance.event_log_storage
        write(log, "a", "begun")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OperationalError):
                write(log, "a", "x" * 100_000)
            # It is opened again: there is no space for the file that SQLite needs beside it.
            with pytest.raises(OperationalError, match="full" if kind == "ours" else "I/O"):
                write(log, "a", "short")
            with pytest.raises(OperationalError):
                write(log, "b", "begun")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for name in ("a", "b"):
            write(log, name, "again")
        assert texts(log, "a") == ["begun", "again"] and texts(log, "b") == ["again"]
    assert not list(tmp_path.rglob("*-new"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_gone_is_an_error_of_the_database(tmp_path: Path, kind: str):
    with opened(tmp_path / "instance", kind) as instance:
        (tmp_path / "instance").rename(tmp_path / "elsewhere")
        with pytest.raises(OperationalError, match="unable to open database file"):
            write(instance.event_log_storage, "a", "begun")
        with pytest.raises(OperationalError, match="unable to open database file"):
            instance.get_runs()
        (tmp_path / "elsewhere").rename(tmp_path / "instance")
        write(instance.event_log_storage, "a", "begun")
        assert instance.get_runs() == []


WRITES = """
import dagster as dg, sys
from pathlib import Path
from sbp_assets_tests.instance.test_sqlite_storage import materialise, opened
with opened(Path(sys.argv[1]), sys.argv[2]) as instance:
    print("open", flush=True)
    sys.stdin.readline()
    materialise(instance, times=30)
"""


def test_processes_write_the_same_index_at_once(tmp_path: Path):
    with opened(tmp_path) as instance:
        command = [sys.executable, "-c", WRITES, str(tmp_path)]
        others = [
            subprocess.Popen([*command, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for kind in ("ours", "plain")
        ]
        for other in others:
            assert other.stdout is not None and other.stdout.readline() == "open\n"
        for other in others:
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
        materialise(instance, times=30)
        assert [other.wait(60) for other in others] == [0, 0]
        assert materialisations(instance) == 90
        assert len(instance.all_logs("")) == 90, "they share a log, too"


def test_threads_share_an_instance(tmp_path: Path):
    with opened(tmp_path) as instance:
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for _ in range(5):
                    materialise(instance, f"asset{number}")
                    write(log_of(instance), f"run{number}", "text")
                    instance.get_runs()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(OPEN_LOGS + 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert [materialisations(instance, f"asset{number}") for number in range(OPEN_LOGS + 2)] == [5] * len(threads)


def test_a_transaction_on_the_runs_may_be_within_another(tmp_path: Path):
    with opened(tmp_path) as instance:
        run(instance)
        storage: Any = instance.run_storage
        count = sa.text("SELECT count(*) FROM runs")
        with storage.connect() as outer, storage.connect() as inner:
            assert outer.scalar(count) == inner.scalar(count) == 1


def test_a_fork_shares_no_file_with_its_parent(tmp_path: Path):
    with opened(tmp_path) as instance:
        materialise(instance)
        instance.get_runs()
        assert descriptors(tmp_path)

        def child() -> None:
            assert descriptors(tmp_path) == []
            materialise(instance)
            assert instance.get_runs() == []
            instance.dispose()
            assert descriptors(tmp_path) == []

        assert forked(child) == 0
        materialise(instance)
        assert materialisations(instance) == 3
        with closing(sqlite3.connect(tmp_path / "history" / "runs" / "index.db")) as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_who_watches_a_log_hears_of_each_event(tmp_path: Path, kind: str):
    log = EventLogStorage(str(tmp_path))
    write(log, "a", "first")
    watching = EventLogStorage(str(tmp_path)) if kind == "ours" else SqliteEventLogStorage(str(tmp_path))
    heard: list[str] = []

    def hear(entry: dg.EventLogEntry, _: str) -> None:
        heard.append(entry.user_message)

    watching.watch("a", None, hear)
    try:
        for count, text in enumerate(("second", "third"), start=2):
            write(log, "a", text)
            until = time.monotonic() + 20
            while len(heard) < count and time.monotonic() < until:
                time.sleep(0.02)
        assert heard == ["first", "second", "third"]
    finally:
        watching.end_watch("a", hear)
        watching.dispose()
        log.dispose()


def test_the_project_s_instance_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SBP_INSTANCE_DIR", str(tmp_path))
    with dg.DagsterInstance.from_config(str(project_file("dagster.yaml").parent)) as instance:
        run(instance)
        # As a run worker does, from what it is handed.
        with dg.DagsterInstance.from_ref(instance.get_ref()) as worker:
            assert materialisations(worker) == 1
            assert descriptors(tmp_path / "history" / "runs")
    assert (tmp_path / "history" / "runs" / "index.db").is_file()
    assert descriptors(tmp_path) == []
