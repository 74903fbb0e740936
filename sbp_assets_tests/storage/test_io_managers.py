import json
from pathlib import Path

import dagster as dg
import fsspec
import polars as pl
import pytest

from sbp_assets.storage.column_metadata import LINEAGE, column_metadata
from sbp_assets.storage.columns import Column
from sbp_assets.storage.io_managers import DirectoryIOManager, ParquetIOManager


def pipeline(shards: int, tmp_path: Path, base: str | None = None):
    partitions = dg.StaticPartitionsDefinition([str(i) for i in range(shards)])
    every = dg.AllPartitionMapping()

    @dg.asset(key=["s", "table"], partitions_def=partitions, io_manager_key="parquet")
    def table(context: dg.AssetExecutionContext):
        return dg.MaterializeResult(value=pl.DataFrame({"x": [int(context.partition_key)]}))

    @dg.asset(
        key=["s", "folder"],
        partitions_def=partitions,
        io_manager_key="directory",
        ins={"table": dg.AssetIn(["s", "table"])},
        metadata=column_metadata([Column("x", pl.Int64, "", "s/table"), Column("total", pl.Int64, "", "s/table.x")]),
    )
    def folder(context: dg.AssetExecutionContext, table: pl.LazyFrame):
        made = tmp_path / "staging" / context.partition_key
        made.mkdir(parents=True)
        (made / "sum.txt").write_text(str(table.collect()["x"].sum()))
        return dg.MaterializeResult(value=made)

    @dg.asset(
        key=["s", "total"],
        io_manager_key="parquet",
        ins={
            "tables": dg.AssetIn(["s", "table"], partition_mapping=every),
            "folders": dg.AssetIn(["s", "folder"], partition_mapping=every),
        },
    )
    def total(tables: dict[str, pl.LazyFrame], folders: dict[str, Path]):
        rows = [
            (key, frame.collect()["x"][0], int((folders[key] / "sum.txt").read_text())) for key, frame in tables.items()
        ]
        return dg.MaterializeResult(value=pl.LazyFrame(rows, schema=["shard", "x", "sum"], orient="row"))

    base = base or str(tmp_path / "store")
    resources = {
        "parquet": ParquetIOManager(base, cache=str(tmp_path / "cache")),
        "directory": DirectoryIOManager(base, cache=str(tmp_path / "cache")),
    }
    instance = dg.DagsterInstance.ephemeral()
    assets = [table, folder, total]
    for key in partitions.get_partition_keys():
        assert dg.materialize(
            assets, selection=[table, folder], partition_key=key, resources=resources, instance=instance
        ).success
    result = dg.materialize(assets, selection=[total], resources=resources, instance=instance)
    assert result.success
    return instance, Path(base)


@pytest.mark.parametrize("shards", [1, 3])
def test_fan_in_is_a_dict_whatever_the_number_of_shards(shards: int, tmp_path: Path):
    _, store = pipeline(shards, tmp_path)
    total = pl.read_parquet(store / "s" / "total.parquet")
    assert total["shard"].to_list() == [str(i) for i in range(shards)]
    assert total["x"].to_list() == total["sum"].to_list() == list(range(shards))


def test_equal_content_has_equal_data_versions(tmp_path: Path):
    versions = []
    for run in ("a", "b"):
        instance, _ = pipeline(2, tmp_path / run)
        event = instance.get_latest_materialization_event(dg.AssetKey(["s", "total"]))
        assert event is not None and event.asset_materialization is not None
        versions.append(event.asset_materialization.tags["dagster/data_version"])
    assert versions[0] == versions[1]


def test_materialisations_carry_the_column_lineage_of_their_definition(tmp_path: Path):
    instance, _ = pipeline(1, tmp_path)
    event = instance.get_latest_materialization_event(dg.AssetKey(["s", "folder"]))
    assert event is not None and event.asset_materialization is not None
    made_of = event.asset_materialization.metadata[LINEAGE].value
    deps = [dg.TableColumnDep(dg.AssetKey(["s", "table"]), "x")]
    assert made_of == dg.TableColumnLineage({"x": deps, "total": deps})
    event = instance.get_latest_materialization_event(dg.AssetKey(["s", "table"]))
    assert event is not None and event.asset_materialization is not None
    assert LINEAGE not in event.asset_materialization.metadata


def test_a_missing_artifact_is_named(tmp_path: Path):
    manager = ParquetIOManager(str(tmp_path), cache=str(tmp_path))
    context = dg.build_input_context(asset_key=dg.AssetKey(["s", "table"]))
    with pytest.raises(FileNotFoundError, match="materialise s/table first"):
        manager.load_input(context)


@pytest.mark.parametrize("manager_class", [ParquetIOManager, DirectoryIOManager])
@pytest.mark.parametrize("partition", [None, "00007", "a.b", "a/b", "/a"])
def test_an_artifact_is_looked_for_where_a_run_writes_it(manager_class, partition: str | None, tmp_path: Path):
    manager = manager_class(str(tmp_path), cache=str(tmp_path))
    key = dg.AssetKey(["stage", "some.table"])
    if partition is None:
        expected = manager._get_path(dg.build_input_context(asset_key=key))
    else:
        definition = dg.StaticPartitionsDefinition(["00000", partition])
        context = dg.build_input_context(
            asset_key=key,
            asset_partitions_def=definition,
            asset_partition_key_range=dg.PartitionKeyRange(partition, partition),
        )
        (expected,) = manager._get_paths_for_partitions(context).values()
    assert manager._path_of(key, partition) == expected


def test_looking_for_an_artifact_makes_no_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    ephemeral = dg.DagsterInstance.ephemeral
    monkeypatch.setattr(dg.DagsterInstance, "ephemeral", lambda *a, **k: made.append(a) or ephemeral(*a, **k))
    manager = ParquetIOManager(str(tmp_path), cache=str(tmp_path))
    key = dg.AssetKey(["stage", "table"])
    for shard in ("00000", "00001"):
        manager.put(key, shard, _table(tmp_path / "made.parquet"), "version")
        assert manager.load(key, shard).collect()["x"].to_list() == [1]
        assert manager.etag(key, shard) and manager.stored_version(key, shard)
    assert made == []
    dg.build_input_context(asset_key=key)
    assert len(made) == 1  # so what is counted is what a context makes


def _table(path: Path) -> Path:
    pl.DataFrame({"x": [1]}).write_parquet(path)
    return path


def test_artifacts_may_live_on_an_fsspec_url(tmp_path: Path):
    remote = fsspec.filesystem("memory")
    for run in ("first", "second"):
        pipeline(2, tmp_path / run, base="memory://fsspec-url")
        (listing,) = remote.glob("/fsspec-url/s/folder/1.json")
        prefix = json.loads(remote.cat_file(listing))["prefix"]
        # The second replaced the first.
        assert remote.find("/fsspec-url/s/folder/1") == []
        assert [path for path in remote.find("/fsspec-url/s/folder") if "/1." in path] == [
            f"/fsspec-url/s/folder/1.{prefix.removeprefix('1.')}/sum.txt",
            listing,
        ]
    assert remote.exists("/fsspec-url/s/total.parquet")
    assert not list((tmp_path / "second" / "cache" / "partial").iterdir())
