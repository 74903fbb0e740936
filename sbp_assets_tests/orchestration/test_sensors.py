"""The sensors on an ephemeral instance: files at the source, and checks that have not been evaluated."""

import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sbp_assets.corpus.ingest import source_changes, source_manifest
from sbp_assets.corpus.source_files import Root
from sbp_assets.orchestration import sensors
from sbp_assets.orchestration.pipeline import NightlyPolicy, Step
from sbp_assets.orchestration.sensors import MANIFEST, source_sensor, unchecked_sensor
from sbp_assets.settings import Deployment, FilesSource
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.progress import Progress


class Source:
    """A folder of files, its manifest on an ephemeral instance, and the sensor that compares the two."""

    def __init__(self, folder: Path, **deployment: Any) -> None:
        self.folder, self.cursor = folder / "corpus", None
        self.folder.mkdir()
        self.write("a.jsonl", 1)
        settings = FilesSource(path=str(self.folder))
        self.sensor = source_sensor(settings, Deployment(**deployment))
        self.instance = dg.DagsterInstance.ephemeral()

        @dg.asset(key=MANIFEST, io_manager_key="parquet")
        def manifest():
            with Progress("manifest", "files") as progress:
                return dg.MaterializeResult(value=source_manifest(settings, 2, progress)[0])

        self.defs = dg.Definitions(
            assets=[manifest],
            jobs=[dg.define_asset_job("manifest", [MANIFEST])],
            sensors=[self.sensor],
            resources={"parquet": ParquetIOManager(str(folder / "store"), cache=str(folder / "cache"))},
        )

    def write(self, name: str, rows: int) -> None:
        (self.folder / name).write_text('{"text": "some words"}\n' * rows)

    def ingest(self) -> None:
        assert self.defs.resolve_job_def("manifest").execute_in_process(instance=self.instance).success

    def fail_to_ingest(self) -> None:
        """What the sensor requested is run while the source is away."""
        away = self.folder.rename(self.folder.with_name("away"))
        job = self.defs.resolve_job_def("manifest")
        tags = {"dagster/sensor_name": "source_files"}
        assert not job.execute_in_process(instance=self.instance, tags=tags, raise_on_error=False).success
        away.rename(self.folder)

    def look(self) -> tuple[dict[str, Any], int]:
        """Metadata of what the sensor observes, {} for nothing, and how many runs it requests."""
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, repository_def=self.defs.get_repository_def()
        )
        said = self.sensor.evaluate_tick(context)
        self.cursor = said.cursor
        observed = [event.metadata for event in said.asset_events]
        return ({key: value.value for key, value in observed[0].items()} if observed else {}), len(said.run_requests)


def test_each_change_at_the_source_is_reported_once(tmp_path: Path):
    source = Source(tmp_path)
    assert source.look() == ({}, 0), "no manifest to compare with"
    source.ingest()
    assert source.look() == ({}, 0)
    source.write("b.jsonl", 2)
    source.write("ignored.pdf", 2)
    assert source.look() == ({"new_files": 1, "changed_files": 0, "gone_files": 0, "first_new": ["b.jsonl"]}, 0)
    assert source.look() == ({}, 0), "told already"
    source.write("a.jsonl", 3)
    (source.folder / "b.jsonl").unlink()
    source.write("c.jsonl", 1)
    observed, _ = source.look()
    assert (observed["first_changed"], observed["first_new"], observed["gone_files"]) == (["a.jsonl"], ["c.jsonl"], 0)
    source.ingest()
    (source.folder / "c.jsonl").unlink()
    assert source.look()[0]["first_gone"] == ["c.jsonl"]


def test_a_file_of_the_same_size_has_changed_by_its_time(tmp_path: Path):
    source = Source(tmp_path)
    source.ingest()
    os.utime(source.folder / "a.jsonl", (1, 1))
    assert source.look()[0]["first_changed"] == ["a.jsonl"]


def test_changes_are_ingested_where_configured_once_two_ticks_agree(tmp_path: Path):
    source = Source(tmp_path, ingest_new_files=True)
    source.ingest()
    source.write("b.jsonl", 1)
    assert source.look()[1] == 0
    source.write("b.jsonl", 5)  # was still being written
    observed, requested = source.look()
    assert (observed["new_files"], requested) == (1, 0)
    assert source.look() == ({}, 1)
    assert source.look() == ({}, 0), "requested already"
    source.ingest()
    assert source.look() == ({}, 0)


def test_a_request_that_failed_is_repeated_less_and_less_often(tmp_path: Path):
    source = Source(tmp_path, ingest_new_files=True)
    source.ingest()
    source.write("b.jsonl", 1)
    assert [source.look()[1] for _ in range(3)] == [0, 1, 0]
    source.fail_to_ingest()
    assert source.look()[1] == 1
    source.fail_to_ingest()
    assert [source.look()[1] for _ in range(2)] == [0, 1]
    source.ingest()
    assert source.look() == ({}, 0)


def test_a_source_out_of_reach_fails_the_tick_and_names_it(tmp_path: Path):
    source = Source(tmp_path)
    source.ingest()
    for file in source.folder.iterdir():
        file.unlink()
    source.folder.rmdir()
    with pytest.raises(Exception, match="does not exist") as error:
        source.look()
    assert str(source.folder) in str(error.value.__cause__ or error.value)


def test_what_is_unchecked_is_checked_and_not_materialised_again(monkeypatch: pytest.MonkeyPatch):
    """An upgrade brings a check: it is asked for on each shard alone, and once a day where it crashes."""
    made: list[str] = []
    shards = dg.StaticPartitionsDefinition(["0", "1"])
    steps = (
        Step("ingest", "Ingest", ("corpus/rows",), NightlyPolicy.IF_NEEDED),
        Step("train", "Train", ("corpus/model",)),
    )
    key = dg.AssetKey(["corpus", "rows"])

    @dg.asset(key=key, partitions_def=shards, code_version="1")
    def rows(context: dg.AssetExecutionContext):
        made.append(context.partition_key)

    @dg.asset(key=["corpus", "model"], code_version="1")
    def model():
        return None

    @dg.asset_check(asset=key, partitions_def=shards, blocking=True)
    def sound(context: dg.AssetCheckExecutionContext):
        if context.partition_key == "1":
            raise OSError("the store is away")
        return dg.AssetCheckResult(passed=True)

    @dg.asset_check(asset=model, blocking=True)
    def finite():
        return dg.AssetCheckResult(passed=True)

    sensor = unchecked_sensor(Deployment(automation=True), pipeline=steps)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING

    def definitions(*checks: Any) -> dg.Definitions:
        jobs = [step.job for step in steps]
        return dg.Definitions([rows, model], asset_checks=checks, jobs=jobs, sensors=[sensor])

    older, newer = definitions(), definitions(sound, finite)
    instance = dg.DagsterInstance.ephemeral()
    for partition in ("0", "1"):
        older.resolve_job_def("ingest").execute_in_process(instance=instance, partition_key=partition)
    older.resolve_job_def("train").execute_in_process(instance=instance)

    def look(defs: dg.Definitions) -> list[dg.RunRequest]:
        context = dg.build_sensor_context(instance=instance, repository_def=defs.get_repository_def())
        return list(sensor.evaluate_tick(context).run_requests)

    def run(request: dg.RunRequest) -> None:
        """As the daemon does."""
        job = newer.resolve_job_def(request.job_name).get_subset(asset_check_selection=set(request.asset_check_keys))
        tags = {**request.tags, "dagster/run_key": request.run_key}
        job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)

    assert look(older) == []
    monkeypatch.setattr(sensors, "UNCHECKED_AT_ONCE", 2)
    first = look(newer)
    assert [(request.job_name, request.partition_key) for request in first] == [("ingest", "0"), ("ingest", "1")]
    assert first[0].asset_check_keys == [dg.AssetCheckKey(key, "sound")]
    waiting = instance.create_run_for_job(
        newer.resolve_job_def("train"), tags={**first[0].tags}, status=dg.DagsterRunStatus.NOT_STARTED
    )
    assert look(newer) == [], "no more before those are done"
    instance.delete_run(waiting.run_id)
    for request in first:
        run(request)
    (model_too,) = look(newer)
    assert model_too.job_name == "train", "and the shard whose check crashed not again today"
    run(model_too)
    assert look(newer) == []
    assert made == ["0", "1"]


def test_changes_on_a_remote_file_system_are_seen_in_a_process_that_has_looked_before():
    root = Root("memory://grown")
    with root.fs.open("memory://grown/a.jsonl", "w") as file:
        file.write('{"text": "some words"}\n')
    settings = FilesSource(path="memory://grown")
    with Progress("manifest", "files") as progress:
        manifest, _ = source_manifest(settings, 1, progress)
    assert not any(source_changes(settings, manifest).values())
    with root.fs.open("memory://grown/deeper/b.parquet", "wb") as file:
        file.write(b"1")
    changes = source_changes(settings, manifest)
    assert [*changes["new"]] == ["deeper/b.parquet"]
    assert changes["changed"] == changes["gone"] == {}
