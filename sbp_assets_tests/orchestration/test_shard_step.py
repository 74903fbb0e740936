"""A step of many shards in one run: two assets, a check of each, on a store and an instance of the test's own."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from sbp_assets.dagster_support.internals import (
    BACKFILL_ID_TAG,
    RESUME_RETRY_TAG,
    ROOT_RUN_ID_TAG,
    AssetCheckExecutionRecordStatus,
)
from sbp_assets.fan_out import InProcess, PartitionTasks, PublishedFiles, tasks_of
from sbp_assets.orchestration.fan_in_checks import due_checks, failed_checks_of_all
from sbp_assets.orchestration.pipeline import Step
from sbp_assets.orchestration.ranges import contiguous, range_tags
from sbp_assets.orchestration.shard_step import FAILED_SHARDS, GIVEN_UP, with_shard_steps
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.remote import StorageError
from sbp_assets_tests.fan_out import work
from sbp_assets_tests.fan_out.test_partition_tasks import AllAtOnce

SHARDS = dg.StaticPartitionsDefinition(["a", "b", "c", "d"])
ROWS, LENGTHS, SUMS = (dg.AssetKey(["t", name]) for name in ("rows", "lengths", "sums"))
SOURCE = dg.AssetKey(["t", "source"])
PIPELINE = (Step("read", "Read", ("t/rows", "t/lengths")), Step("sum", "Sum", ("t/sums",)))
ALL = dg.AllPartitionMapping()
EVERY_SHARD = set(SHARDS.get_partition_keys())


class World:
    """Definitions whose functions raise, or checks fail, for the shards that the test names."""

    def __init__(self, tmp_path: Path, batched: bool = True, per_run: int = 50) -> None:
        self.store = ParquetIOManager(str(tmp_path / "store"), cache=str(tmp_path))
        self.broken, self.failing, self.crashing, self.away = set[str](), set[str](), set[str](), set[str]()
        self.failing_lengths = set[str]()
        self.meanwhile: Callable[[], object] = lambda: None
        self.value, self.looked = 1, list[str]()
        self.made = list[tuple[str, str]]()
        self.instance = dg.DagsterInstance.ephemeral()
        self.defs = self._definitions(batched, per_run)
        self.graph = self.defs.resolve_asset_graph()

    def _definitions(self, batched: bool, per_run: int) -> dg.Definitions:
        @dg.asset(key=SOURCE, io_manager_key="parquet", code_version="1")
        def source():
            return dg.MaterializeResult(value=pl.DataFrame({"v": [self.value]}))

        @dg.asset(
            key=ROWS,
            ins={"table": dg.AssetIn(SOURCE)},
            partitions_def=SHARDS,
            io_manager_key="parquet",
            code_version="1",
            metadata={"owner": "me"},
        )
        def rows(context: dg.AssetExecutionContext, limit: dg.ResourceParam[int], table: pl.LazyFrame):
            """What it is."""
            shard = context.partition_key
            self.made.append(("rows", shard))
            if shard in self.away:
                raise StorageError("the store is away")
            if shard in self.broken:
                raise ValueError(f"file {shard}.jsonl cannot be read")
            value = table.collect()["v"].item() + limit
            return dg.MaterializeResult(value=pl.DataFrame({"v": [f"{shard}{value}"]}), metadata={"shard": shard})

        @dg.asset(
            key=LENGTHS,
            ins={"rows": dg.AssetIn(ROWS)},
            partitions_def=SHARDS,
            io_manager_key="parquet",
            code_version="1",
        )
        def lengths(context: dg.AssetExecutionContext, rows: pl.LazyFrame):
            self.made.append(("lengths", context.partition_key))
            return dg.MaterializeResult(value=rows.select(pl.col("v").str.len_chars()))

        @dg.asset(
            key=SUMS,
            ins={"lengths": dg.AssetIn(LENGTHS, partition_mapping=ALL), "own": dg.AssetIn(ROWS)},
            partitions_def=SHARDS,
            io_manager_key="parquet",
            code_version="1",
        )
        def sums(lengths: dict[str, pl.LazyFrame], own: pl.LazyFrame):
            return dg.MaterializeResult(
                value=pl.concat([*lengths.values()]).sum().with_columns(own.collect()["v"].alias("own"))
            )

        @dg.asset_check(asset=ROWS, partitions_def=SHARDS, blocking=True)
        def rows_are_good(context: dg.AssetCheckExecutionContext, rows: pl.LazyFrame):
            shard = context.partition_key
            if shard in self.crashing:
                raise OSError("the store is away")
            return dg.AssetCheckResult(passed=shard not in self.failing, metadata={"shard": shard}, description="why")

        @dg.asset_check(asset=LENGTHS, additional_ins={"rows": dg.AssetIn(ROWS)}, partitions_def=SHARDS, blocking=True)
        def lengths_are_known(context: dg.AssetCheckExecutionContext, lengths: pl.LazyFrame, rows: pl.LazyFrame):
            if context.partition_key in self.failing_lengths:
                return dg.AssetCheckResult(passed=False)
            return dg.AssetCheckResult(passed=lengths.collect()["v"].item() == len(rows.collect()["v"].item()))

        @dg.asset_check(asset=LENGTHS)
        def lengths_differ_over_all_shards(parquet: dg.ResourceParam[Any]):
            self.looked.append("over all")
            self.meanwhile()
            found = {shard: parquet.load(LENGTHS, shard).collect()["v"].item() for shard in EVERY_SHARD}
            return dg.AssetCheckResult(passed=set(found.values()) == {2}, description="one is longer")

        assets = [source, rows, lengths, sums]
        checks = [rows_are_good, lengths_are_known, lengths_differ_over_all_shards]
        if not batched:
            checks = checks[:2]
        else:
            assets, checks = with_shard_steps(assets, checks, (SHARDS,), per_run, PIPELINE)
        return dg.Definitions(
            assets=assets,
            asset_checks=checks,
            jobs=[step.job for step in PIPELINE],
            executor=dg.in_process_executor,
            resources={"parquet": self.store, "limit": 0},
        )

    def run(
        self, keys: Iterable[dg.AssetKey], shards: Iterable[str] | None, tags: dict[str, str] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Materialise `keys` as the UI does: shards are one partition, or a range."""
        names = sorted(shards or ())
        job = self.defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(keys))
        return job.execute_in_process(
            instance=self.instance,
            partition_key=names[0] if len(names) == 1 else None,
            tags={**(tags or {}), **(range_tags(names) if len(names) > 1 else {})},
            raise_on_error=False,
        )

    def check(
        self, step: Step, checks: Iterable[str], shards: Iterable[str], tags: dict[str, str] | None = None
    ) -> dg.ExecuteInProcessResult:
        wanted = {check for check in self.graph.asset_check_keys if check.name in checks}
        job = self.defs.resolve_job_def(step.name).get_subset(asset_check_selection=wanted)
        tags = {**(tags or {}), **range_tags(sorted(shards))}
        return job.execute_in_process(instance=self.instance, tags=tags, raise_on_error=False)

    def backfill(self, key: dg.AssetKey) -> dg.ExecuteInProcessResult:
        return self.run([key], EVERY_SHARD, {BACKFILL_ID_TAG: "x"})

    def staleness(self) -> Staleness:
        return Staleness(self.graph, self.instance)

    def tags(self, key: dg.AssetKey) -> dict[str | None, dict[str, str]]:
        """Return the tags of the last materialisation of each shard."""
        events = self.staleness().materialisations(key, sorted(EVERY_SHARD))
        return {name: dict(e.asset_materialization.tags or {}) for name, e in events.items() if e.asset_materialization}

    def states(self, name: str) -> dict[str | None, str]:
        (key,) = (check for check in self.graph.asset_check_keys if check.name == name)
        infos = self.instance.event_log_storage.get_asset_check_partition_info([key])
        return {info.partition_key: info.latest_execution_status.value for info in infos}


def failed_shards(result: dg.ExecuteInProcessResult) -> dict[str, str]:
    """Return the reasons of a run's failure by shard."""
    (event,) = (event for event in result.all_events if event.is_step_failure)
    failure: Any = event.step_failure_data.user_failure_data
    return failure.metadata[FAILED_SHARDS].value


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    assert world.run([SOURCE], None).success
    return world


def test_a_range_is_recorded_shard_by_shard_as_runs_of_one_record_it(tmp_path: Path) -> None:
    """Versions, provenance, metadata and checks are those of Dagster's own assets in runs of one shard."""
    plain, one, many = (World(tmp_path / name, name != "plain") for name in ("plain", "one", "many"))
    for world in (plain, one, many):
        assert world.run([SOURCE], None).success
    for shard in sorted(EVERY_SHARD):
        assert plain.run([ROWS], [shard]).success and plain.run([LENGTHS], [shard]).success
        assert one.run([ROWS, LENGTHS], [shard]).success
    assert many.run([ROWS, LENGTHS], EVERY_SHARD).success
    for shard in sorted(EVERY_SHARD):
        assert plain.run([SUMS], [shard]).success and one.run([SUMS], [shard]).success
    assert many.run([SUMS], EVERY_SHARD).success
    versions = "dagster/data_version", "dagster/code_version", "dagster/data_version_is_user_provided"
    for key in (ROWS, LENGTHS, SUMS):
        recorded = {name: {tag: tags.get(tag) for tag in versions} for name, tags in plain.tags(key).items()}
        for world in (one, many):
            assert {n: {tag: tags.get(tag) for tag in versions} for n, tags in world.tags(key).items()} == recorded
            for name, tags in world.tags(key).items():
                read = {t: v for t, v in plain.tags(key)[name].items() if "input_data_version" in t}
                if not (
                    key == LENGTHS and name == "a"
                ):  # plain: in one run with its input, which Dagster digests otherwise
                    assert {t: v for t, v in tags.items() if "input_data_version" in t} == read
    for world in (one, many):
        assert not any(world.staleness().pending(key) for key in (ROWS, LENGTHS, SUMS))
        assert (
            world.states("rows_are_good")
            == world.states("lengths_are_known")
            == dict.fromkeys(EVERY_SHARD, "SUCCEEDED")
        )
        event = world.instance.fetch_materializations(
            dg.AssetRecordsFilter(ROWS, asset_partitions=["c"]), limit=1
        ).records[0]
        assert event.asset_materialization and event.asset_materialization.metadata["shard"].value == "c"
        assert event.asset_materialization.metadata["bytes"].value
    assert len(many.instance.get_runs()) == 3


def test_definitions_keep_what_assets_and_checks_declare(world: World) -> None:
    node = world.graph.get(ROWS)
    assert (node.description, node.code_version, node.metadata["owner"]) == ("What it is.", "1", "me")
    assert node.parent_keys == {SOURCE} and world.graph.get(SUMS).parent_keys == {LENGTHS, ROWS}
    assert isinstance(world.graph.get_partition_mapping(SUMS, LENGTHS), dg.AllPartitionMapping)
    (blocking,) = (world.graph.get(check).blocking for check in node.check_keys)
    assert blocking
    sizes = [world.graph.get(key).backfill_policy for key in (ROWS, LENGTHS, SUMS)]
    assert [policy.max_partitions_per_run for policy in sizes if policy] == [50, 50, 51], "a run holds one step"


def test_a_broken_shard_and_a_failed_check_end_their_own_chain_alone(world: World) -> None:
    world.broken, world.failing, world.crashing = {"a"}, {"b"}, {"c"}
    failed = world.run([ROWS, LENGTHS], EVERY_SHARD)
    assert not failed.success
    (event,) = (event for event in failed.all_events if event.is_step_failure)
    failure: Any = event.step_failure_data.user_failure_data
    reasons = failure.metadata[FAILED_SHARDS].value
    assert set(reasons) == {"a", "b", "c"} and failure.description.startswith("3 of 4 shards failed")
    assert "a.jsonl cannot be read" in reasons["a"] and reasons["b"] == "check failed: rows_are_good"
    assert "the store is away" in reasons["c"] and "t/rows:rows_are_good" in reasons["c"]
    assert set(world.staleness().versions(ROWS)) == {"b", "c", "d"} and set(world.staleness().versions(LENGTHS)) == {
        "d"
    }
    planned = AssetCheckExecutionRecordStatus.PLANNED.value
    assert world.states("rows_are_good") == {"a": planned, "b": "FAILED", "c": planned, "d": "SUCCEEDED"}
    world.broken, world.failing, world.crashing = set(), set(), set()
    world.made.clear()
    assert world.run([ROWS, LENGTHS], {"a", "b", "c"}).success
    assert world.made == [(name, shard) for shard in "abc" for name in ("rows", "lengths")]
    assert not world.staleness().pending(ROWS) and not world.staleness().pending(LENGTHS)


def test_a_run_of_one_shard_may_go_on_with_other_steps(world: World) -> None:
    assert world.run([ROWS, LENGTHS], EVERY_SHARD - {"d"}).success
    result = world.run([ROWS, LENGTHS, SUMS], ["d"])
    assert result.success and {e.step_key for e in result.get_step_success_events()} >= {"read_shards", "sum_shards"}
    assert set(world.staleness().versions(SUMS)) == {"d"} and not world.staleness().pending(LENGTHS)
    world.failing = {"d"}
    stopped = world.run([ROWS, LENGTHS, SUMS], ["d"])
    assert not stopped.success and "rows_are_good" in str(
        [e.step_failure_data for e in stopped.all_events if e.is_step_failure]
    )
    assert stopped.get_step_skipped_events() or not stopped.get_asset_materialization_events()[1:]


def test_a_backfill_does_not_go_on_with_a_shard_of_which_a_check_has_failed(world: World) -> None:
    """Dagster requests the next step for all that is materialised."""
    world.failing = {"b"}
    assert not world.run([ROWS, LENGTHS], EVERY_SHARD).success
    world.failing = set()
    assert world.run([LENGTHS], {"b"}).success
    reasons = failed_shards(world.backfill(SUMS))
    assert (
        set(reasons) == {"b"} and "t/rows of shard b has a check that failed or crashed: rows_are_good" in reasons["b"]
    )
    assert set(world.staleness().versions(SUMS)) == {"a", "c", "d"}
    # One that crashed said nothing of it.
    world.crashing = {"c"}
    assert not world.check(PIPELINE[0], ["rows_are_good"], EVERY_SHARD).success
    world.crashing = set()
    result = world.backfill(SUMS)
    assert set(failed_shards(result)) == {"c"}
    # What every shard reads concerns every shard.
    assert world.run([ROWS, LENGTHS], EVERY_SHARD).success and world.backfill(SUMS).success
    world.failing_lengths = {"a"}
    assert not world.run([LENGTHS], EVERY_SHARD).success
    assert set(failed_shards(world.backfill(SUMS))) == EVERY_SHARD


def test_a_run_of_a_range_and_of_two_steps_is_refused(world: World) -> None:
    refused = world.run([ROWS, LENGTHS, SUMS], EVERY_SHARD)
    (event,) = (event for event in refused.all_events if event.is_step_failure)
    assert "t/sums" in str(event.step_failure_data) and not world.made


def test_one_asset_of_a_chain_can_be_materialised_alone(world: World) -> None:
    assert world.run([ROWS, LENGTHS], EVERY_SHARD).success
    world.made.clear()
    assert world.run([LENGTHS], EVERY_SHARD).success
    assert {name for name, _ in world.made} == {"lengths"} and not world.staleness().pending(LENGTHS)


def test_checks_alone_materialise_nothing(world: World) -> None:
    assert world.run([ROWS, LENGTHS], EVERY_SHARD).success
    world.made.clear()
    world.failing = {"b"}
    assert not world.check(PIPELINE[0], ["rows_are_good"], EVERY_SHARD).success
    assert world.states("rows_are_good") == dict.fromkeys("acd", "SUCCEEDED") | {"b": "FAILED"} and not world.made
    assert set(world.staleness().pending(ROWS)) == {"b"}


def test_a_resumed_run_leaves_out_what_the_run_before_it_has_finished(world: World) -> None:
    world.broken = {"c"}
    first = world.run([ROWS, LENGTHS], EVERY_SHARD)
    world.broken = set()
    world.made.clear()
    resumed = {RESUME_RETRY_TAG: "true", ROOT_RUN_ID_TAG: first.run_id, "dagster/parent_run_id": first.run_id}
    assert world.run([ROWS, LENGTHS], EVERY_SHARD, resumed).success
    assert {shard for _, shard in world.made} == {"c"}
    assert not world.staleness().pending(ROWS) and not world.staleness().pending(LENGTHS), "planned checks are recorded"


def test_a_resumed_run_of_checks_looks_again(world: World) -> None:
    assert world.run([ROWS, LENGTHS], EVERY_SHARD).success
    world.failing = {"b"}
    first = world.check(PIPELINE[0], ["rows_are_good", "lengths_are_known"], EVERY_SHARD)
    resumed = {RESUME_RETRY_TAG: "true", ROOT_RUN_ID_TAG: first.run_id, "dagster/parent_run_id": first.run_id}
    assert not world.check(PIPELINE[0], ["rows_are_good", "lengths_are_known"], EVERY_SHARD, resumed).success
    assert world.states("rows_are_good")["b"] == "FAILED"
    assert set(world.states("lengths_are_known").values()) == {"SUCCEEDED"}, "a failed check hides no other"
    assert set(world.staleness().pending(ROWS)) == {"b"} and not world.staleness().pending(LENGTHS)


def test_a_run_ends_when_there_is_no_storage(tmp_path: Path) -> None:
    """Each shard would wait as long for it."""
    world = World(tmp_path)
    assert world.run([SOURCE], None).success
    world.away = {"a", "b", "c"}
    failed = world.run([ROWS, LENGTHS], EVERY_SHARD)
    assert [shard for _, shard in world.made] == ["a", "b", "c"] and len(world.made) == GIVEN_UP
    (event,) = (event for event in failed.all_events if event.is_step_failure)
    failure: Any = event.step_failure_data.user_failure_data
    reasons = failure.metadata[FAILED_SHARDS].value
    assert reasons["a"] == "the store is away" and "not tried" in reasons["d"] and "the store is away" in reasons["d"]


def test_a_check_of_all_shards_runs_alone_once_all_are_there(world: World) -> None:
    key = dg.AssetCheckKey(LENGTHS, "lengths_differ_over_all_shards")
    assert world.run([ROWS, LENGTHS], EVERY_SHARD - {"d"}).success
    assert not world.looked and not due_checks(world.staleness(), [LENGTHS]), "a shard is missing"
    assert world.run([ROWS, LENGTHS], ["d"]).success
    assert not world.looked and due_checks(world.staleness(), [ROWS, LENGTHS]) == [key]
    assert not world.staleness().pending(LENGTHS), "it is of no shard"
    job = world.defs.resolve_job_def("read").get_subset(asset_check_selection={key})
    assert job.execute_in_process(instance=world.instance).success
    assert world.looked == ["over all"] and not due_checks(world.staleness(), [LENGTHS])
    world.value = 10
    assert world.run([SOURCE], None).success and world.run([ROWS, LENGTHS], EVERY_SHARD).success is True
    assert due_checks(world.staleness(), [LENGTHS]) == [key] and not failed_checks_of_all(world.staleness(), [LENGTHS])
    assert not job.execute_in_process(instance=world.instance, raise_on_error=False).success, "for the webhook"
    assert failed_checks_of_all(world.staleness(), [LENGTHS]) == {key: "one is longer"}


def test_ranges_have_no_gaps_and_a_bound() -> None:
    among = [f"{number:02d}" for number in range(12)]
    wanted = ["11", "00", "01", "02", "03", "05", "07", "08"]
    assert contiguous(wanted, among, 3) == [["00", "01", "02"], ["03"], ["05"], ["07", "08"], ["11"]]
    assert contiguous([None], [None], 3) == [[None]]


def test_a_check_of_all_shards_says_nothing_of_what_is_materialised_meanwhile(world: World) -> None:
    key = dg.AssetCheckKey(LENGTHS, "lengths_differ_over_all_shards")
    assert world.run([ROWS, LENGTHS], EVERY_SHARD).success
    world.meanwhile = lambda: world.run([LENGTHS], ["a"])
    job = world.defs.resolve_job_def("read").get_subset(asset_check_selection={key})
    assert job.execute_in_process(instance=world.instance).success
    assert due_checks(world.staleness(), [LENGTHS]) == [key]


TABLES = dg.AssetKey(["t", "tables"])
WORDS = ("submit", "assemble")


@pytest.mark.parametrize("together", [False, True])
def test_tasks_of_a_range_are_submitted_before_the_first_shard_is_recorded(tmp_path: Path, together: bool) -> None:
    engine, events = AllAtOnce() if together else InProcess(), list[str]()
    store = PublishedFiles(f"{tmp_path}/store/t/tables", str(tmp_path))

    @dg.asset(key=SOURCE, io_manager_key="parquet")
    def source():
        return dg.MaterializeResult(value=pl.DataFrame({"v": [1]}))

    @dg.asset(key=TABLES, deps=[SOURCE], partitions_def=SHARDS, io_manager_key="parquet", code_version="1")
    def tables(context: dg.AssetExecutionContext):
        def tasks(shards: Iterable[str]) -> Iterable[tuple[str, tuple[Any, ...]]]:
            for shard in shards:
                events.append(f"submit {shard}")
                yield shard, (store.staged_for(shard), shard, shard == "b")

        running, shard = tasks_of(context), context.partition_key
        name = running.result(shard, engine, work.write_row, tasks, what="tables")
        events.append(f"assemble {shard}")
        running.when_recorded(shard, store.staged_for(shard).remove)
        return dg.MaterializeResult(value=store.staged_for(shard).fetch(name))

    assets, _ = with_shard_steps([source, tables], [], (SHARDS,), 50, (Step("make", "Make", ("t/tables",)),))
    defs = dg.Definitions(
        assets=assets, resources={"parquet": ParquetIOManager(str(tmp_path / "store"), str(tmp_path))}
    )
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_implicit_global_asset_job_def()
        assert job.get_subset(asset_selection={SOURCE}).execute_in_process(instance=instance).success
        only = job.get_subset(asset_selection={TABLES})
        names = sorted(EVERY_SHARD)
        failed = only.execute_in_process(instance=instance, tags=range_tags(names), raise_on_error=False)
        assert failed_shards(failed) == {"b": "task b: file b.jsonl cannot be read"}
        if together:
            assert events == [*(f"submit {s}" for s in "abcd"), *(f"assemble {s}" for s in "acd")]
        else:
            assert events == ["submit a", "assemble a", "submit b", *(f"{do} {s}" for s in "cd" for do in WORDS)]
        staleness = Staleness(defs.resolve_asset_graph(), instance)
        assert set(staleness.versions(TABLES)) == {"a", "c", "d"}
        # The engine's own input is an input: its change makes them stale, and its version is recorded.
        assert staleness.inputs(TABLES, "a").keys() == {SOURCE} and set(staleness.pending(TABLES)) == {"b"}
        events.clear()
        assert only.execute_in_process(instance=instance, partition_key="c").success
        assert events == ["submit c", "assemble c"]
    assert sorted(path.name for path in (tmp_path / "store/t/tables").iterdir()) == [f"{s}.parquet" for s in "acd"]
    assert pl.read_parquet(tmp_path / "store/t/tables/c.parquet")["v"].to_list() == ["c"]


def test_a_shard_that_a_backfill_refuses_has_no_task(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[list[str]]()
    monkeypatch.setattr(
        "sbp_assets.orchestration.shard_step.PartitionTasks",
        lambda shards: (given.append(shards), PartitionTasks(shards))[1],
    )
    world.failing = {"b"}
    assert not world.run([ROWS, LENGTHS], EVERY_SHARD).success
    assert world.run([LENGTHS], {"b"}).success
    given.clear()
    assert set(failed_shards(world.backfill(SUMS))) == {"b"}
    assert given == [[], ["a", "c", "d"]]


@pytest.mark.parametrize("engine", [InProcess(), AllAtOnce()])
def test_what_changes_after_its_task_has_read_it_makes_a_shard_stale(tmp_path: Path, engine: InProcess) -> None:
    documents_key, text, changes = dg.AssetKey(["t", "documents"]), ["old"], list[Callable[[], object]]()
    store, own = (PublishedFiles(f"{tmp_path}/{place}", str(tmp_path)) for place in ("store", "store/t/tables"))

    @dg.asset(key=documents_key, partitions_def=SHARDS, io_manager_key="parquet", code_version="1")
    def documents():
        return dg.MaterializeResult(value=pl.DataFrame({"v": text}))

    @dg.asset(key=TABLES, deps=[documents_key], partitions_def=SHARDS, io_manager_key="parquet", code_version="1")
    def tables(context: dg.AssetExecutionContext):
        def tasks(shards: Iterable[str]) -> Iterable[tuple[str, tuple[Any, ...]]]:
            yield from ((shard, (store, shard, own.staged_for(shard))) for shard in shards)

        shard = context.partition_key
        tasks_of(context).result(shard, engine, work.copy_rows, tasks, what="tables")
        if changes:
            changes.pop()()
        return dg.MaterializeResult(value=own.staged_for(shard).fetch("rows.parquet"))

    steps = (Step("read", "Read", ("t/documents",)), Step("make", "Make", ("t/tables",)))
    assets, _ = with_shard_steps([documents, tables], [], (SHARDS,), 50, steps)
    manager = ParquetIOManager(str(tmp_path / "store"), str(tmp_path))
    defs = dg.Definitions(assets=assets, resources={"parquet": manager})
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_implicit_global_asset_job_def()
        read, make = (job.get_subset(asset_selection={key}) for key in (documents_key, TABLES))
        everything = range_tags(sorted(EVERY_SHARD))
        assert read.execute_in_process(instance=instance, tags=everything).success

        def change_d() -> None:
            text[0] = "new"
            assert read.execute_in_process(instance=instance, partition_key="d").success

        changes.append(change_d)  # while the range is at shard a
        assert make.execute_in_process(instance=instance, tags=everything).success
        assert set(Staleness(defs.resolve_asset_graph(), instance).pending(TABLES)) == {"d"}
