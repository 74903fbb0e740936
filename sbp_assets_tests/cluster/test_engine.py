"""Tasks on the nodes of a real cluster: the same files as in one process, whichever node is lost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sbp_assets.fan_out import InProcess, PublishedFiles, TaskError, open_engine
from sbp_assets.fan_out.ray_cluster import ClusterError, RayCluster, _Need
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.cluster.conftest import HEAD, SECRET, Nodes, wait_for
from sbp_assets_tests.fan_out import work
from sbp_assets_tests.pairing.tiny_embedders import write_bert
from sbp_assets_tests.tiny import tiny_settings

BLOCKS, SHARDS = [f"block{n}" for n in range(6)], tuple(f"shard{n}" for n in range(4))
PARTIAL = [f"{block}/{shard}.parquet" for block in BLOCKS for shard in SHARDS]


def search(folder: Path, files: PublishedFiles, seconds: float = 0) -> list[tuple[str, tuple]]:
    return [(block, (block, SHARDS, str(folder), files, seconds)) for block in BLOCKS]


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    work.write_vectors(tmp_path, [*BLOCKS, *SHARDS])
    return tmp_path


@pytest.fixture
def expected(vectors: Path) -> dict[str, bytes]:
    """The files that the loop in the process writes."""
    files = PublishedFiles(f"{vectors}/in-process", f"{vectors}/cache")
    assert dict(InProcess().run(work.search_block, search(vectors, files))) == dict.fromkeys(BLOCKS, len(SHARDS))
    shutil.rmtree(vectors / "attempts")
    return work.written(files, PARTIAL)


@pytest.fixture
def files(vectors: Path) -> PublishedFiles:
    return PublishedFiles(f"{vectors}/partial", f"{vectors}/cache")


def test_a_search_writes_the_same_files(
    engine: RayCluster, vectors: Path, files: PublishedFiles, expected: dict[str, bytes]
):
    assert dict(engine.run(work.search_block, search(vectors, files))) == dict.fromkeys(BLOCKS, len(SHARDS))
    assert work.written(files, PARTIAL) == expected
    # Nothing is begun that is there already.
    assert dict(engine.run(work.search_block, search(vectors, files))) == dict.fromkeys(BLOCKS, 0)
    assert set(work.attempts(vectors).values()) == {1}


def test_an_embedding_model_writes_the_same_files(engine: RayCluster, tmp_path: Path):
    model = str(write_bert(tmp_path / "model"))
    texts = {f"{n:05d}": tuple(f"word{n} and {m} others" * (1 + m % 3) for m in range(9)) for n in range(4)}
    written = {}
    for cpus, one in ((1, InProcess()), (1, engine)):
        files = PublishedFiles(f"{tmp_path}/{type(one).__name__}", f"{tmp_path}/cache")
        tasks = [(shard, (found, model, files, shard)) for shard, found in texts.items()]
        assert dict(one.run(work.embed_shard, tasks, cpus=cpus)) == dict.fromkeys(texts, 9)
        written[type(one)] = work.written(files, list(texts))
    assert written[InProcess] == written[RayCluster]


def test_tasks_are_spread_over_the_nodes_and_none_is_on_the_head(engine: RayCluster):
    found = Counter(node for _, node in engine.run(work.where, [(str(n), (0.3,)) for n in range(20)]))
    assert HEAD not in found
    assert len(found) == 2 and max(found.values()) <= 12


def test_a_task_has_the_threads_of_its_cores(engine: RayCluster, node: Callable):
    node(num_cpus=3)
    for cpus in (2, 3, 1):
        assert dict(engine.run(work.threads, [("x", ())], cpus=cpus)) == {"x": (cpus, cpus)}


def test_few_tasks_are_submitted_at_a_time_and_progress_is_told(engine: RayCluster, caplog: pytest.LogCaptureFixture):
    asked = 0

    def tasks():
        nonlocal asked
        for number in range(40):
            asked += 1
            yield str(number), (0.02,)

    ahead = []
    with caplog.at_level(logging.INFO), Progress("waiting", "tasks", 40, seconds=0) as progress:
        for _ in engine.run(work.where, tasks(), progress=progress):
            ahead.append(asked - progress.done)
    assert max(ahead) <= 4 and progress.done == 40
    assert "submitted to 2 nodes" in caplog.text


def test_a_task_that_raises_names_its_key_and_node_and_is_not_tried_again(engine: RayCluster):
    with pytest.raises(TaskError, match=r"^task 00007: a\.parquet holds no vectors; embed it first$") as raised:
        list(engine.run(work.refuse, [("00007", ("a.parquet",))]))
    assert isinstance(raised.value.__cause__, ValueError)
    assert "on node 127.0.0." in raised.value.__cause__.__notes__[0]


def test_a_lost_worker_is_replaced(engine: RayCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tasks = [("x", (str(tmp_path), 2)), ("y", (str(tmp_path), 0))]
    assert dict(engine.run(work.die_once, tasks[:1])) == {"x": "lived"}
    assert work.attempts(tmp_path) == {"deaths": 3}
    assert caplog.text.count("task x: its worker was lost (WorkerCrashedError") == 2


def test_a_task_that_kills_every_worker_ends_the_run(engine: RayCluster, tmp_path: Path):
    with pytest.raises(TaskError, match="task x: its worker was lost 5 times, the last time by WorkerCrashedError"):
        list(engine.run(work.die_once, [("x", (str(tmp_path), 99))]))


def test_a_lost_node_costs_the_work_in_flight(
    engine: RayCluster,
    nodes: Nodes,
    node: Callable,
    vectors: Path,
    files: PublishedFiles,
    expected: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
):
    doomed = node(num_cpus=2)

    def kill() -> None:
        wait_for(lambda: len(work.attempts(vectors)) >= 5 if (vectors / "attempts").exists() else 0)
        nodes.kill(doomed)

    killer = threading.Thread(target=kill)
    killer.start()
    found = dict(engine.run(work.search_block, search(vectors, files, 0.4)))
    killer.join()
    assert found.keys() == set(BLOCKS)
    assert work.written(files, PARTIAL) == expected
    assert "its worker was lost" in caplog.text
    assert sum(work.attempts(vectors).values()) <= len(PARTIAL) + 2


def test_a_run_without_a_node_waits_for_one(
    engine: RayCluster, node: Callable, nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    only = node(num_cpus=2)
    found = []

    def run() -> None:
        found.extend(engine.run(work.search_block, search(tmp_path, files, 0.5), cpus=2))

    work.write_vectors(tmp_path, [*BLOCKS, *SHARDS])
    files = PublishedFiles(f"{tmp_path}/partial", f"{tmp_path}/cache")
    running = threading.Thread(target=run)
    running.start()
    wait_for(lambda: (tmp_path / "attempts").exists() and len(work.attempts(tmp_path)) >= 2)
    nodes.kill(only)
    wait_for(lambda: "any more; waiting for one" in caplog.text)
    node(num_cpus=2)
    running.join(60)
    assert {block for block, _ in found} == set(BLOCKS)


def test_a_lost_driver_costs_the_work_in_flight(
    nodes: Nodes, engine: RayCluster, vectors: Path, files: PublishedFiles, expected: dict[str, bytes]
):
    arguments = [nodes.address, str(vectors), str(len(BLOCKS)), str(len(SHARDS)), "0.3"]
    driver = subprocess.Popen([sys.executable, "-m", "sbp_assets_tests.cluster.driver", *arguments])
    wait_for(lambda: (vectors / "attempts").exists() and len(work.attempts(vectors)) >= 6)
    driver.kill()
    driver.wait()
    begun = work.attempts(vectors)
    assert len(begun) < len(PARTIAL)
    made = sum(dict(engine.run(work.search_block, search(vectors, files))).values())
    assert made >= len(PARTIAL) - len(begun)
    assert work.written(files, PARTIAL) == expected
    again = {name for name, times in work.attempts(vectors).items() if times > 1}
    assert len(again) <= 4  # two at work, and two that a killed driver's workers were just about to begin


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_driver_stops_its_tasks(nodes: Nodes, vectors: Path, how: signal.Signals):
    arguments = [nodes.address, str(vectors), str(len(BLOCKS)), str(len(SHARDS)), "2"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "sbp_assets_tests.cluster.driver", *arguments], stderr=subprocess.PIPE
    )
    wait_for(lambda: (vectors / "attempts").exists() and len(work.attempts(vectors)) >= 2)
    driver.send_signal(how)
    driver.communicate(timeout=30)
    assert driver.returncode != 0
    begun = work.attempts(vectors)
    time.sleep(3)
    assert work.attempts(vectors) == begun


def test_a_run_that_is_given_up_ends_its_tasks_which_clean_up(engine: RayCluster, tmp_path: Path):
    found = engine.run(work.write_slowly, [("a", (str(tmp_path), "a", 0)), ("b", (str(tmp_path), "b", 60))])
    assert next(found)[0] == "a"
    wait_for((tmp_path / "b.begun").exists)
    start = time.monotonic()
    found.close()
    assert time.monotonic() - start < 4
    assert not list(tmp_path.glob(".b.*")) and not (tmp_path / "b").exists()
    assert not list(Path(engine._settings.deployment.data_dir).iterdir())
    assert dict(engine.run(work.square, [("x", (3,))])) == {"x": 9}


def test_a_node_of_another_experiment_is_refused(engine: RayCluster, node: Callable):
    bad = node(env_vars={"SBP_EXPERIMENT__CORPUS__SHARDS": "77"})
    with pytest.raises(ClusterError, match=f"node {bad.node_ip_address}: its environment sets another") as raised:
        list(engine.run(work.square, [("x", (3,))]))
    assert "77" not in str(raised.value) and "127.0.0.3" not in str(raised.value)


def test_a_node_with_another_version_is_refused_also_when_it_joins_later(
    engine: RayCluster, node: Callable, tmp_path: Path
):
    other = tmp_path / "polars-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: polars\nVersion: 0.0.1\n")
    elsewhere = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    found = engine.run(work.where, [(str(n), (0.3,)) for n in range(200)])
    assert next(found)
    bad = node(num_cpus=2, env_vars=elsewhere)
    with pytest.raises(ClusterError, match=f"node {bad.node_ip_address}: polars is 0.0.1 there, and [1-9]"):
        list(found)
    with pytest.raises(ClusterError, match=f"node {bad.node_ip_address}: polars is"):
        list(engine.run(work.square, [("x", (3,))]))


def test_a_task_that_no_node_has_room_for_is_refused(engine: RayCluster):
    with pytest.raises(ClusterError, match=r"no node has the 3 CPUs .*127\.0\.0\.3: 1, 1\.0 GB"):
        list(engine.run(work.square, [("x", (3,))], cpus=3))
    with pytest.raises(ClusterError, match=r"no node has the 1 CPUs and 2\.0 GB"):
        list(engine.run(work.square, [("x", (3,))], memory=2 * 10**9))


def test_memory_bounds_the_tasks_of_a_node(engine: RayCluster, node: Callable):
    node(num_cpus=4, memory=2 * 10**9)
    assert engine.run(work.square, [], memory=10**9) is not None
    list(engine.run(work.square, [("x", (3,))], memory=9 * 10**8))
    assert engine._slots(_Need(1, 0, 9 * 10**8)) == 4  # two nodes of one, and two of the four cores


def test_a_task_that_needs_a_gpu_waits_for_a_node_that_has_one(engine: RayCluster, node: Callable):
    with pytest.raises(ClusterError, match=r"no node has the 1 CPUs, 1 GPUs and 0\.0 GB of a task \(.*: 1, 0 GPUs"):
        list(engine.run(work.where, [("x", (0,))], gpus=1))
    having = node(num_gpus=1)
    assert dict(engine.run(work.where, [("x", (0,))], gpus=1)) == {"x": having.node_ip_address}


def test_no_secret_of_the_driver_reaches_a_task(engine: RayCluster):
    assert os.environ[SECRET] == "hush-hush"
    assert dict(engine.run(work.environment, [("x", (SECRET,))])) == {"x": None}


def test_no_cluster_at_the_address(tmp_path: Path, namespace: None):
    engine = open_engine(tiny_settings(tmp_path, {"deployment.ray_address": "127.0.0.2:1"}))
    with pytest.raises(ClusterError, match=r"no Ray cluster can be used at deployment\.ray_address 127\.0\.0\.2:1"):
        list(engine.run(work.square, [("x", (3,))]))


LOCAL = """
import json, sys
from pathlib import Path
from sbp_assets_tests.cluster import driver
driver.main("local", *sys.argv[1:])
"""


def test_a_cluster_on_this_machine_writes_the_same_files_and_ends(
    namespace: None, vectors: Path, files: PublishedFiles, expected: dict[str, bytes]
):
    arguments = [str(vectors), str(len(BLOCKS)), str(len(SHARDS)), "0"]
    done = subprocess.run([sys.executable, "-c", LOCAL, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(BLOCKS, len(SHARDS))
    assert work.written(files, PARTIAL) == expected
