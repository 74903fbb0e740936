"""The tasks of the stage in one process; sbp_assets_tests/cluster has them on several nodes."""

from dataclasses import replace
from pathlib import Path

import pytest

from sbp_assets.fan_out import InProcess, PublishedFiles, TaskError
from sbp_assets.fan_out.task import prepared
from sbp_assets.pairing.embed import Embedder
from sbp_assets.pairing.search import COVERAGE_FILE, Coverage, assemble
from sbp_assets.pairing.tasks import EMBEDDINGS_FILE, current_coverage, embed_shard, search_block, staged_tables
from sbp_assets.storage.artifacts import content_version
from sbp_assets_tests.pairing import stores
from sbp_assets_tests.pairing.tiny_embedders import write_bert


def test_a_search_reads_the_store_and_publishes_a_table_per_block_and_shard(tmp_path: Path):
    stores.write_store(tmp_path / "data", 3)
    tasks = stores.search_tasks(tmp_path / "data", tmp_path / "made", 3, 4)
    made = dict(InProcess().run(search_block, tasks.items()))
    assert sum(one.figures["keys"] for one in made.values()) == 600, "each key once"
    assert [one.figures["queries"] for one in made.values()] == [600] * 4
    assert set(stores.begun(tmp_path / "made").values()) == {1}
    assert len(stores.tables_of(tasks, 3)) == 4 * 4
    (artifact := tmp_path / "artifact").mkdir()
    assemble(tasks["00002"][0].tables, artifact)
    assert {path.name for path in artifact.iterdir()} == {"coverage.json", *(f"0000{n}.parquet" for n in range(3))}
    # What is published is read and made no more.
    again = dict(InProcess().run(search_block, tasks.items()))
    assert {name: again["00001"].figures[name] for name in ("resumed", "keys", "queries")} == {
        "resumed": 3, "keys": 0, "queries": 0
    }  # fmt: skip


def test_what_is_materialised_again_meanwhile_ends_a_search(tmp_path: Path):
    stores.write_store(tmp_path / "data", 2)
    tasks = stores.search_tasks(tmp_path / "data", tmp_path / "made", 2, 1)
    digest = tmp_path / "data/pairing/ann_index/00001/digest.txt"
    before = digest.read_text()
    digest.write_text("another")
    with pytest.raises(TaskError, match="pairing/ann_index of shard 00001 has been materialised again"):
        list(InProcess().run(search_block, tasks.items()))
    digest.write_text(before)
    (tmp_path / "data/pairing/quantizer/more").touch()
    with pytest.raises(TaskError, match="pairing/quantizer has been materialised again"):
        list(InProcess().run(search_block, tasks.items()))


def test_a_task_of_ten_thousand_shards_is_small(tmp_path: Path):
    stores.write_store(tmp_path / "data", 2, documents=50)
    for shard in stores.shard_names(10_000)[2:]:
        (folder := tmp_path / f"data/pairing/ann_index/{shard}").mkdir()
        (folder / "digest.txt").write_text("0123456789abcdef")
    tasks = stores.search_tasks(tmp_path / "data", tmp_path / "made", 10_000, 2)
    assert all(len(prepared(block, search_block, task, 1).payload) < 4000 for block, task in tasks.items())


def test_a_model_is_loaded_once_and_what_is_embedded_stays(tmp_path: Path):
    stores.write_store(tmp_path / "data", 2, documents=20)
    tasks = stores.embedding_tasks(tmp_path / "data", tmp_path / "made", 2, str(write_bert(tmp_path / "model")))
    made = dict(InProcess().run(embed_shard, tasks.items()))
    assert [one.figures["engine_reused"] for one in made.values()] == [False, True]
    before = (table := made["00000"].files.fetch(EMBEDDINGS_FILE)).stat().st_mtime_ns
    again = dict(InProcess().run(embed_shard, tasks.items()))
    assert again == made and table.stat().st_mtime_ns == before


def test_documents_that_are_materialised_again_meanwhile_are_not_embedded(tmp_path: Path):
    stores.write_store(tmp_path / "data", 1, documents=20)
    made = stores.embedding_tasks(tmp_path / "data", tmp_path / "made", 1, str(write_bert(tmp_path / "model")))
    ((task,),) = made.values()
    version = content_version(tmp_path / "data/corpus/documents/00000.parquet")
    with pytest.raises(ValueError, match="corpus/documents of shard 00000 has been materialised again"):
        embed_shard(replace(task, documents="of another version"))
    assert not task.made.exists(EMBEDDINGS_FILE)
    assert embed_shard(replace(task, documents=version)).figures["dagster/row_count"] > 0


def test_an_artifact_that_another_run_has_assembled_is_no_fault_of_the_store(tmp_path: Path):
    stores.write_store(tmp_path / "data", 2)
    tasks = stores.search_tasks(tmp_path / "data", tmp_path / "made", 2, 1)
    ((_, made),) = InProcess().run(search_block, tasks.items())
    made.files.remove()
    with pytest.raises(RuntimeError, match="another run has materialised this meanwhile"):
        assemble(made.files, tmp_path)


def test_an_embedder_is_the_same_one_wherever_a_task_meets_it_in_a_process():
    import pickle

    mine, other = Embedder(), Embedder()
    assert pickle.loads(pickle.dumps(mine)) is mine
    name = pickle.dumps(other)
    del other
    brought = pickle.loads(name)
    assert pickle.loads(name) is brought and brought is not mine


def test_a_search_reads_and_publishes_through_an_object_store(tmp_path: Path):
    stores.write_store(tmp_path / "data", 3)
    local = stores.search_tasks(tmp_path / "data", tmp_path / "made", 3, 2)
    list(InProcess().run(search_block, local.items()))
    where = f"memory://{tmp_path.name}"
    store = PublishedFiles(where, f"{tmp_path}/cache", cache_gb=1e-6, patience=0.1)  # less than one shard's index
    for path in [*sorted((tmp_path / "data/pairing").glob("*/*")), tmp_path / "data/pairing/quantizer"]:
        name = path.relative_to(tmp_path / "data").as_posix()
        if path.is_dir() or path.suffix == ".parquet":
            store._remote.put(path, store._path(name), content_version(path))
    blocks = PublishedFiles(f"{where}/pairing/partial_candidates", f"{tmp_path}/cache", 1e-6, 0.1)
    made_of = current_coverage(store, stores.shard_names(3), local["00000"][0].quantizer)
    assert made_of.keys == Coverage.read(local["00000"][0].tables.fetch(COVERAGE_FILE)).keys
    made_of = Coverage.read(local["00000"][0].tables.fetch(COVERAGE_FILE))
    remote = {}
    for block, (task,) in local.items():
        tables = staged_tables(blocks, block, made_of)
        remote[block] = (replace(task, store=store, blocks=blocks, tables=tables),)
    made = dict(InProcess().run(search_block, remote.items()))
    assert [one.figures["searched"] for one in made.values()] == [3, 3]
    assert stores.tables_of(remote, 3) == stores.tables_of(local, 3)
    (artifact := tmp_path / "artifact").mkdir()
    assemble(remote["00001"][0].tables, artifact)
    version = content_version(artifact)
    blocks._remote.put(artifact, blocks._path("00001"), version)
    remote["00001"][0].tables.remove()
    # A node builds upon the block's artifact where it is what was recorded of it, and not upon another.
    grown = Coverage(made_of.search, made_of.queries | {"00000": "another"}, made_of.keys)
    for recorded, unchanged in ((version, 2), ("another", 0)):
        tables = staged_tables(blocks, "00001", grown)
        task = replace(remote["00001"][0], tables=tables, earlier=recorded)
        (found,) = dict(InProcess().run(search_block, [("00001", (task,))])).values()
        assert found.figures["unchanged"] == unchanged
        tables.remove()
