"""The loop in the process, and what every engine asks of a task."""

import logging
import os
import pickle
from pathlib import Path

import pytest

from sbp_assets.fan_out import InProcess, PublishedFiles, TaskError, open_engine
from sbp_assets.fan_out.ray_cluster import RayCluster
from sbp_assets.fan_out.task import LARGEST_ARGUMENTS, LARGEST_RESULT, prepared
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.fan_out import work
from sbp_assets_tests.tiny import tiny_settings


def results(function, tasks, **needs) -> dict:
    return dict(InProcess().run(function, tasks, **needs))


def test_each_task_gives_its_result_under_its_key():
    assert results(work.square, [(str(n), (n,)) for n in range(5)]) == {"0": 0, "1": 1, "2": 4, "3": 9, "4": 16}
    assert results(work.square, []) == {}


def test_tasks_are_asked_for_one_at_a_time():
    asked = []

    def tasks():
        for number in range(3):
            asked.append(number)
            yield str(number), (number,)

    found = InProcess().run(work.square, tasks())
    assert asked == []
    next(found)
    assert asked == [0]


def test_the_default_is_this_process_and_an_address_is_a_cluster(tmp_path: Path):
    assert isinstance(open_engine(tiny_settings(tmp_path)), InProcess)
    assert isinstance(open_engine(tiny_settings(tmp_path, {"deployment.ray_address": "local"})), RayCluster)


def test_a_task_that_raises_is_named_with_its_own_message():
    with pytest.raises(TaskError, match=r"^task 00007: a\.parquet holds no vectors; embed it first$") as raised:
        results(work.refuse, [("00007", ("a.parquet",))])
    assert isinstance(raised.value.__cause__, ValueError)
    assert "work.py" in raised.value.__cause__.__notes__[0]


def test_an_exception_that_cannot_be_pickled_keeps_its_message():
    with pytest.raises(TaskError, match="task x: 00001 has 7 rows") as raised:
        results(work.refuse_awkwardly, [("x", ())])
    assert type(raised.value.__cause__) is RuntimeError


def local_function() -> None:
    pass


@pytest.mark.parametrize("function", [lambda: None, Path("x").exists])
def test_a_function_that_a_node_cannot_import_is_refused(function):
    with pytest.raises(TypeError, match="at the top of a module"):
        results(function, [("x", ())])


def test_one_of_the_command_line_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_function, "__module__", "__main__")
    with pytest.raises(TypeError, match="at the top of a module"):
        results(local_function, [("x", ())])


def test_arguments_that_cannot_be_pickled_or_are_large_are_refused():
    with pytest.raises(TypeError, match="task x: square and its arguments cannot be pickled"):
        results(work.square, [("x", (lambda: None,))])
    with pytest.raises(ValueError, match=r"task x: its arguments are 1,048,6\d\d bytes"):
        results(work.square, [("x", (b"x" * LARGEST_ARGUMENTS,))])


def test_a_result_that_is_large_is_refused():
    with pytest.raises(TaskError, match=r"task x: its result is .* write it to a file"):
        results(work.large_result, [("x", (LARGEST_RESULT,))])
    assert len(results(work.large_result, [("x", (LARGEST_RESULT - 100,))])["x"]) == LARGEST_RESULT - 100


def test_progress_is_told_after_each_task(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO), Progress("squares", "tasks", 3, seconds=0) as progress:
        seen = [progress.done for _ in InProcess().run(work.square, [("a", (1,)), ("b", (2,))], progress=progress)]
    assert seen == [1, 2]
    assert "squares: 1/3 tasks" in caplog.text


def test_a_task_computes_on_the_threads_that_it_asks_for_and_gives_them_back():
    before, variable = work.threads(), os.environ.get("OMP_NUM_THREADS")
    for cpus in (3, 2):
        assert results(work.threads, [("x", ())], cpus=cpus) == {"x": (cpus, cpus)}
    assert work.threads() == before
    assert os.environ.get("OMP_NUM_THREADS") == variable


def test_settings_and_files_travel_with_a_task_and_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    settings = tiny_settings(tmp_path)
    files = PublishedFiles.of(settings.deployment, "partial")
    task = prepared("x", work.search_block, (settings, files), 1)
    assert b"hush" not in task.payload
    assert pickle.loads(task.payload)[1] == (settings, files)


def test_ray_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    engine = open_engine(tiny_settings(tmp_path, {"deployment.ray_address": "local"}))
    with pytest.raises(RuntimeError, match=r"pip install -r requirements/ray\.lock"):
        list(engine.run(work.square, [("x", (1,))]))
