"""The tasks of a run's partitions, on the engine of the process and on one that ends them all before the first."""

from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sbp_assets.fan_out import Engine, InProcess, PartitionTasks, PublishedFiles, TaskError, tasks_of
from sbp_assets_tests.fan_out import work


class AllAtOnce(InProcess):
    """Executes every task before it yields the results, the last one first, as a cluster of many nodes may."""

    def outcomes(self, *arguments: Any, **needs: Any) -> Generator[tuple[str, Any], None, None]:
        yield from reversed(list(super().outcomes(*arguments, **needs)))


class Broken(Engine):
    def outcomes(self, *arguments: Any, **needs: Any) -> Generator[tuple[str, Any], None, None]:
        raise ConnectionError("no cluster")
        yield

    def close(self) -> None:
        pass


@pytest.fixture
def submitted() -> list[str]:
    return []


@pytest.fixture
def rows(tmp_path: Path, submitted: list[str]) -> Callable[[Sequence[str]], Iterable[tuple[str, tuple]]]:
    """The tasks of shards, of which b is broken."""

    def tasks(shards: Sequence[str]) -> Iterable[tuple[str, tuple]]:
        for shard in shards:
            submitted.append(shard)
            yield shard, (PublishedFiles(f"{tmp_path}/{shard}", str(tmp_path)), shard, shard == "b")

    return tasks


def result(tasks: PartitionTasks, shard: str, rows: Callable, engine: Engine) -> str:
    return tasks.result(shard, engine, work.write_row, rows, what="write")


def test_all_are_submitted_with_the_first_and_one_that_fails_ends_alone(rows: Callable, submitted: list[str]):
    tasks = PartitionTasks(["a", "b", "c"])
    assert result(tasks, "a", rows, AllAtOnce()) == "table" and submitted == ["a", "b", "c"]
    with pytest.raises(TaskError, match=r"task b: file b\.jsonl cannot be read"):
        result(tasks, "b", rows, AllAtOnce())
    assert result(tasks, "c", rows, AllAtOnce()) == "table" and submitted == ["a", "b", "c"]


def test_in_one_process_each_is_executed_when_it_is_asked_for(rows: Callable, submitted: list[str]):
    tasks = PartitionTasks(["a", "b", "c"])
    result(tasks, "a", rows, InProcess())
    assert submitted == ["a"]
    # One that nobody asks for keeps the others from nothing.
    assert result(tasks, "c", rows, InProcess()) == "table" and submitted == ["a", "b", "c"]


def test_an_engine_that_fails_is_asked_again_for_what_has_not_ended(rows: Callable, submitted: list[str]):
    tasks = PartitionTasks(["a", "c"])
    with pytest.raises(ConnectionError):
        result(tasks, "a", rows, Broken())
    assert result(tasks, "c", rows, InProcess()) == "table" and submitted == ["a", "c"]


def test_what_is_recorded_is_cleaned_up_after_once(caplog: pytest.LogCaptureFixture):
    tasks, cleaned = PartitionTasks(["a", "c"]), []
    tasks.when_recorded("a", lambda: cleaned.append("a"))
    tasks.when_recorded("c", lambda: Path("/no/such/file").unlink())
    tasks.recorded("a")
    tasks.recorded("a")
    tasks.recorded("b")
    assert cleaned == ["a"]
    tasks.recorded("c")
    assert "partition c: files of its task are left ([Errno 2]" in caplog.text


def test_a_context_without_tasks_has_those_of_its_own_partition(rows: Callable, submitted: list[str]):
    assert result(tasks_of(SimpleNamespace(partition_key="c")), "c", rows, InProcess()) == "table"
    assert submitted == ["c"]
    shared = PartitionTasks(["a"])
    assert tasks_of(SimpleNamespace(partition_key="a", tasks=shared)) is shared
