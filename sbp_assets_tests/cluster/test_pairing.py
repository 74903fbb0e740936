"""The tasks of the pairing stage on the nodes of a real cluster: the same files as in one process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.definitions import build_definitions
from sbp_assets.fan_out import InProcess
from sbp_assets.fan_out.ray_cluster import RayCluster
from sbp_assets.orchestration.ranges import range_tags
from sbp_assets.pairing.tasks import EMBEDDINGS_FILE, embed_shard, search_block
from sbp_assets.settings import Settings
from sbp_assets_tests.cluster.conftest import Nodes, wait_for
from sbp_assets_tests.pairing import stores
from sbp_assets_tests.pairing.tiny_embedders import write_bert
from sbp_assets_tests.tiny import tiny_settings

SHARDS, BLOCKS = 6, 4
MEMORY = 5 * 10**8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, and beside it what the loop in the process makes of it: its tasks by the number of blocks."""
    folder = tmp_path_factory.mktemp("pairing")
    stores.write_store(folder / "data", SHARDS)
    for blocks in (1, BLOCKS):
        made = dict(InProcess().run(search_block, expected_tasks(folder, blocks).items()))
        assert len(made) == blocks
    return folder


def expected_tasks(folder: Path, blocks: int) -> dict:
    return stores.search_tasks(folder / "data", folder / f"in-process-{blocks}", SHARDS, blocks)


def expected(folder: Path, blocks: int = BLOCKS) -> dict[str, bytes]:
    return stores.tables_of(expected_tasks(folder, blocks), SHARDS)


def require_same_tables(engine: RayCluster, data: Path, made: Path, blocks: int, gpus: int) -> None:
    tasks = stores.search_tasks(data / "data", made, SHARDS, blocks)
    found = dict(engine.run(search_block, tasks.items(), cpus=None, gpus=gpus, memory=MEMORY))
    assert stores.tables_of(tasks, SHARDS) == expected(data, blocks)
    # Each key is read once, and each query once per block.
    assert sum(one.figures["keys"] for one in found.values()) == 600
    assert [one.figures["queries"] for one in found.values()] == [600] * blocks
    assert set(stores.begun(made).values()) == {1}


def test_two_nodes_search_blocks_with_the_same_tables(engine: RayCluster, data: Path, tmp_path: Path):
    for blocks in (1, BLOCKS):
        require_same_tables(engine, data, tmp_path / str(blocks), blocks, gpus=0)
    tasks = stores.search_tasks(data / "data", tmp_path / str(BLOCKS), SHARDS, BLOCKS)
    again = dict(engine.run(search_block, tasks.items(), memory=MEMORY))
    assert {(one.figures["resumed"], one.figures["keys"]) for one in again.values()} == {(SHARDS, 0)}


def test_one_node_searches_blocks_with_the_same_tables(engine: RayCluster, node: Callable, data: Path, tmp_path: Path):
    node(num_gpus=1)  # the only one that has room for a task that asks for one
    for blocks in (1, BLOCKS):
        require_same_tables(engine, data, tmp_path / str(blocks), blocks, gpus=1)


def test_shards_are_embedded_on_nodes_and_the_model_is_loaded_once_per_process(
    engine: RayCluster, data: Path, tmp_path: Path
):
    model, found = str(write_bert(tmp_path / "model")), {}
    for one in (InProcess(), engine):
        name = type(one).__name__
        tasks = stores.embedding_tasks(data / "data", tmp_path / name, SHARDS, model)
        made = dict(one.run(embed_shard, tasks.items(), cpus=None))
        found[name] = {shard: made[shard].files.fetch(EMBEDDINGS_FILE).read_bytes() for shard in tasks}
        loaded = sum(not made[shard].figures["engine_reused"] for shard in tasks)
        assert 1 <= loaded <= (1 if one is not engine else 2)
    assert found["InProcess"] == found["RayCluster"]


def test_a_lost_worker_costs_the_table_that_it_was_at(
    engine: RayCluster, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tasks = stores.search_tasks(data / "data", tmp_path, SHARDS, BLOCKS, fatal="00003.parquet")
    made = dict(engine.run(search_block, tasks.items(), memory=MEMORY))
    assert stores.tables_of(tasks, SHARDS) == expected(data)
    assert caplog.text.count("its worker was lost (WorkerCrashedError") == BLOCKS
    assert {one.figures["resumed"] for one in made.values()} == {3}
    times = stores.begun(tmp_path)
    assert sum(times.values()) == BLOCKS * (SHARDS + 1) and max(times.values()) == 2


def test_a_lost_node_costs_the_tables_that_it_was_at(
    engine: RayCluster,
    nodes: Nodes,
    node: Callable,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    node(num_gpus=1)
    doomed = node(num_gpus=1)
    tasks = stores.search_tasks(data / "data", tmp_path, SHARDS, BLOCKS, seconds=0.3)

    def kill() -> None:
        wait_for(lambda: stores.begun(tmp_path).total() >= 5)
        nodes.kill(doomed)

    killer = threading.Thread(target=kill)
    killer.start()
    found = dict(engine.run(search_block, tasks.items(), gpus=1, memory=MEMORY))
    killer.join()
    assert found.keys() == tasks.keys() and stores.tables_of(tasks, SHARDS) == expected(data)
    assert "its worker was lost" in caplog.text
    assert stores.begun(tmp_path).total() <= BLOCKS * SHARDS + 1, "one table was at work"


def test_a_lost_driver_costs_the_tables_at_work(nodes: Nodes, engine: RayCluster, data: Path, tmp_path: Path):
    arguments = [nodes.address, str(data / "data"), str(tmp_path), str(SHARDS), str(BLOCKS), "0.3"]
    code = "import sys; from sbp_assets_tests.cluster import driver; driver.search(*sys.argv[1:])"
    driver = subprocess.Popen([sys.executable, "-c", code, *arguments])
    wait_for(lambda: stores.begun(tmp_path).total() >= 5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = stores.begun(tmp_path).total()
    assert before < BLOCKS * SHARDS
    tasks = stores.search_tasks(data / "data", tmp_path, SHARDS, BLOCKS)
    made = dict(engine.run(search_block, tasks.items(), memory=MEMORY))
    assert stores.tables_of(tasks, SHARDS) == expected(data)
    assert sum(one.figures["resumed"] for one in made.values()) >= before - 4
    # Two at work, and two that a killed driver's workers were just about to begin.
    assert stores.begun(tmp_path).total() <= BLOCKS * SHARDS + 4


def documents_of(settings: Settings) -> dg.AssetsDefinition:
    partitions = dg.StaticPartitionsDefinition(settings.experiment.shard_keys)

    @dg.asset(key=["corpus", "documents"], partitions_def=partitions, io_manager_key="parquet")
    def documents(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        ids = [f"{context.partition_key}-{row}" for row in range(12)]
        text = [f"river {row} sea and star {row % 3} oven" * (1 + row % 2) for row in range(12)]
        return dg.MaterializeResult(value=pl.DataFrame({"id": ids, "text": text, "split": UNIQUE}))

    return documents


def versions_with(fan_out: object, folder: Path, model: str) -> dict[str, dict[str, str]]:
    """Materialise the stage up to the search, a run of a range for each step; return data versions."""
    changes = {
        "experiment.corpus.shards": SHARDS,
        "experiment.pairing.key_blocks": BLOCKS,
        "experiment.pairing.embedding_model": model,
        "experiment.pairing.embedding_dtype": "float32",
        "deployment.memory_per_worker": "500MB",
    }
    settings = tiny_settings(folder, changes)
    defs = build_definitions(settings, {"fan_out": fan_out})
    shards, blocks = settings.experiment.shard_keys, settings.experiment.block_keys
    with dg.DagsterInstance.ephemeral() as instance:
        documents = documents_of(settings)
        for shard in shards:
            assert dg.materialize([documents], partition_key=shard, instance=instance, resources=defs.resources).success
        for name, keys in (("embed", shards), ("fit_quantizer", None), ("index", shards), ("search", blocks)):
            tags = range_tags(keys) if keys else {}
            assert defs.resolve_job_def(name).execute_in_process(instance=instance, tags=tags).success
        found = {}
        for name, keys in (("embeddings", shards), ("partial_candidates", blocks)):
            storage, key = instance.event_log_storage, dg.AssetKey(["pairing", name])
            assert storage.get_materialized_partitions(key) == set(keys)
            records = {k: instance.fetch_materializations(dg.AssetRecordsFilter(key, [k]), 1).records[0] for k in keys}
            found[name] = {k: one.asset_materialization.tags["dagster/data_version"] for k, one in records.items()}
    left = [path for path in Path(settings.deployment.data_dir).rglob("*") if path.name.endswith(".partial")]
    assert left == [], "what tasks have published is removed once it is recorded"
    return found


def test_the_pipeline_on_a_cluster_records_the_same_versions(engine: RayCluster, tmp_path: Path):
    model = str(write_bert(tmp_path / "model"))
    environment = os.environ.copy()
    mine = versions_with(InProcess(), tmp_path / "one", model)
    assert versions_with(engine, tmp_path / "many", model) == mine
    assert len(mine["partial_candidates"]) == BLOCKS and os.environ == environment
