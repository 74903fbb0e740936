"""The nightly conditions, evaluated on an ephemeral instance, with real runs of what they request."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import polars as pl
import sqlalchemy as sa

from sbp_assets.dagster_support.partitions import key_blocks, shards
from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.in_process import RUN_TAGS
from sbp_assets.orchestration.nightly import NIGHTLY, NightlyAutomation
from sbp_assets.orchestration.pipeline import NightlyPolicy
from sbp_assets.settings import Deployment, load_settings
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets.storage.row_versions import ROW_VERSIONS, row_versions

SETTINGS = load_settings("tiny", {})
project = build_definitions(SETTINGS)
DEPLOYMENT = Deployment(nightly="0 2 * * *", nightly_until="0 8 * * *")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass
class World:
    """A small pipeline of the project's shape: listing -> rows ▤ -> signs ▤ -> dropped -> kept ▤ -> model -> made ▤.

    `texts` is what lies at the source, by shard. The nightly automation never makes the model. `rows` read their own
    shard's lines of the listing alone.
    """

    folder: Path
    texts: dict[str, str]
    broken: set[str] = field(default_factory=set)
    corrupted: set[str] = field(default_factory=set)
    setting: str = "1"
    newly_checked: bool = False
    meanwhile: Callable[[], None] = lambda: None  # while rows are being made

    def definitions(self) -> dg.Definitions:
        shards = dg.StaticPartitionsDefinition(sorted(self.texts))
        everything = dg.AllPartitionMapping()
        needed = ("listing", "rows", "signs", "dropped", "kept", "made")
        policies = {dg.AssetKey(name): NightlyPolicy.IF_NEEDED for name in needed}
        policies[dg.AssetKey("tokenizer")] = NightlyPolicy.IF_MISSING
        nightly = NightlyAutomation(DEPLOYMENT, policies=policies)

        def frame(text: str) -> dg.MaterializeResult:
            return dg.MaterializeResult(value=pl.DataFrame({"text": [text]}))

        def text(frames: Mapping[str, pl.LazyFrame] | pl.LazyFrame) -> str:
            parts = frames.values() if isinstance(frames, Mapping) else [frames]
            return "".join(part.collect()["text"][0] for part in parts)

        common = {"io_manager_key": "parquet"}

        @dg.asset(code_version=repr(sorted(self.texts.items())), **common)
        def listing():
            table = pl.DataFrame({"shard": [*map(int, self.texts)], "text": [*self.texts.values()]})
            versions = row_versions(table, sorted(self.texts), ["text"])
            return dg.MaterializeResult(value=table, metadata={ROW_VERSIONS: dg.MetadataValue.json(versions)})

        @dg.asset(partitions_def=shards, code_version="1", **common)
        def rows(context: dg.AssetExecutionContext, listing: pl.LazyFrame):
            self.meanwhile()
            if context.partition_key in self.broken:
                raise ValueError(f"{context.partition_key} cannot be read")
            return frame(listing.filter(pl.col("shard") == int(context.partition_key)).collect()["text"][0])

        @dg.asset_check(asset=rows, blocking=True, partitions_def=shards)
        def passes(context: dg.AssetCheckExecutionContext):
            return dg.AssetCheckResult(passed=context.partition_key not in self.corrupted)

        @dg.asset_check(asset=rows, name="new", blocking=True, partitions_def=shards)
        def new():
            return dg.AssetCheckResult(passed=True)

        @dg.asset(partitions_def=shards, code_version=self.setting, **common)
        def signs(rows: pl.LazyFrame):
            return frame(text(rows)[:1])

        @dg.asset(ins={"signs": dg.AssetIn(partition_mapping=everything)}, code_version="1", **common)
        def dropped(signs: dict[str, pl.LazyFrame]):
            return frame(text(signs))

        @dg.asset(partitions_def=shards, code_version="1", **common)
        def kept(rows: pl.LazyFrame, dropped: pl.LazyFrame):
            return frame(text(rows) + text(dropped))

        @dg.asset(
            ins={"kept": dg.AssetIn(partition_mapping=everything)},
            code_version="1",
            io_manager_key="parquet",
        )
        def tokenizer(kept: dict[str, pl.LazyFrame]):
            return frame(text(kept))

        @dg.asset(ins={"kept": dg.AssetIn(partition_mapping=everything)}, code_version="1", io_manager_key="parquet")
        def model(kept: dict[str, pl.LazyFrame]):
            return frame(text(kept))

        @dg.asset(partitions_def=shards, code_version="1", **common)
        def made(kept: pl.LazyFrame, tokenizer: pl.LazyFrame, model: pl.LazyFrame):
            return frame(text(kept))

        return dg.Definitions(
            assets=[
                asset.map_asset_specs(nightly.with_condition)
                for asset in (listing, rows, signs, dropped, kept, tokenizer, model, made)
            ],
            asset_checks=[passes, new] if self.newly_checked else [passes],
            resources={"parquet": ParquetIOManager(str(self.folder / "store"), cache=str(self.folder / "cache"))},
            executor=dg.in_process_executor,
        )


class Automation:
    """Evaluations one after another, as the sensor's ticks, each followed by runs of what it requested."""

    def __init__(self, world: World) -> None:
        self.world, self.instance, self.cursor, self.now = world, dg.DagsterInstance.ephemeral(), None, NOON
        assert self.evaluate() == {}  # switched on: nothing is requested at once

    def evaluate(self, minutes: float = 1) -> dict[str, list[str]]:
        """{asset: partitions} requested at this tick of the sensor; '' stands for an unpartitioned asset."""
        self.now += timedelta(minutes=minutes)
        result = dg.evaluate_automation_conditions(
            self.world.definitions(), self.instance, cursor=self.cursor, evaluation_time=self.now
        )
        self.cursor = result.cursor
        requested = {r.key: result.get_requested_partitions(r.key) for r in result.results}
        return {
            key.to_user_string(): sorted(partition or "" for partition in partitions)
            for key, partitions in requested.items()
            if partitions
        }

    def run(self, requested: Mapping[str, list[str]]) -> None:
        defs = self.world.definitions()
        job = defs.resolve_implicit_global_asset_job_def()
        for partition in sorted({partition for partitions in requested.values() for partition in partitions}):
            job.execute_in_process(
                instance=self.instance,
                asset_selection=[dg.AssetKey(name) for name in requested if partition in requested[name]],
                partition_key=partition or None,
                raise_on_error=False,
            )

    def run_window(self) -> list[dict[str, list[str]]]:
        """What is requested, wave after wave, from the next nightly tick until nothing more is."""
        until_two = (timedelta(hours=26) - timedelta(hours=self.now.hour, minutes=self.now.minute)) % timedelta(days=1)
        waves, requested = [], self.evaluate(until_two / timedelta(minutes=1) + 1)
        while requested:
            waves.append(requested)
            self.run(requested)
            requested = self.evaluate()
        return waves


def train(automation: Automation) -> None:
    """What a person asks for."""
    automation.run({"model": [""]})


def finished(tmp_path: Path, **texts: str) -> Automation:
    automation = Automation(World(tmp_path, texts or {"0": "a", "1": "b"}))
    automation.run_window()
    train(automation)
    automation.run_window()
    return automation


def test_the_automation_goes_through_the_pipeline_in_order_and_trains_no_model(tmp_path: Path):
    automation = Automation(World(tmp_path, {"0": "a", "1": "b"}))
    both = ["0", "1"]
    assert automation.run_window() == [
        {"listing": [""]},
        {"rows": both, "signs": both},  # of one shard in one run
        {"dropped": [""]},
        {"kept": both},
        {"tokenizer": [""]},
    ]
    assert automation.run_window() == []
    train(automation)
    assert automation.run_window() == [{"made": both}]
    assert automation.run_window() == []


def test_nothing_is_requested_outside_the_nightly_window(tmp_path: Path):
    automation = Automation(World(tmp_path, {"0": "a"}))
    assert automation.evaluate(60) == {}
    assert automation.evaluate(13 * 60) == {"listing": [""]}
    automation.run({"listing": [""]})
    assert automation.evaluate(6 * 60) == {}, "past nightly_until"
    assert automation.evaluate(18 * 60) == {"rows": ["0"], "signs": ["0"]}


def test_what_is_in_progress_is_neither_requested_again_nor_built_on(tmp_path: Path):
    automation = Automation(World(tmp_path, {"0": "a", "1": "b"}))
    automation.run(automation.evaluate(14 * 60))
    requested = []
    automation.world.meanwhile = lambda: requested.append(automation.evaluate())
    automation.run({"rows": ["0"]})
    assert requested == [{"rows": ["1"], "signs": ["1"]}]


def test_the_automation_leaves_the_work_to_sbp_run_while_that_runs(tmp_path: Path):
    automation = Automation(World(tmp_path, {"0": "a"}))
    job = automation.world.definitions().resolve_implicit_global_asset_job_def()
    running = automation.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=RUN_TAGS)
    assert automation.evaluate(14 * 60) == {}
    automation.instance.report_run_failed(running)
    assert automation.evaluate() == {"listing": [""]}


def test_to_find_nothing_to_do_takes_as_many_queries_whatever_the_number_of_shards(tmp_path: Path):
    asked = [_queries_of_a_second_look(tmp_path / str(shards), shards) for shards in (2, 5)]
    assert asked[0] == asked[1]
    # Of each of seven assets: its latest events. Of the one with a check: what has passed.
    assert len([query for query in asked[0] if "asset_check_executions" in query]) == 1
    assert not [query for query in asked[0] if "event_logs.id IN" in query], "events are read once"


def _queries_of_a_second_look(folder: Path, shards: int) -> list[str]:
    automation = finished(folder, **{str(shard): "a" for shard in range(shards)})
    defs = automation.world.definitions()
    automation.world.definitions = lambda: defs  # type: ignore[method-assign]  # one process, which remembers
    assert automation.run_window() == []
    queries = []

    def note(connection, cursor, statement: str, parameters, context, many) -> None:
        queries.append(statement)

    sa.event.listen(sa.engine.Engine, "before_cursor_execute", note)
    try:
        assert automation.evaluate() == {}
    finally:
        sa.event.remove(sa.engine.Engine, "before_cursor_execute", note)
    return queries


def test_a_failed_shard_stops_no_other_and_is_tried_again_at_the_next_tick(tmp_path: Path):
    automation = finished(tmp_path)
    automation.world.texts = {"0": "a", "1": "b", "2": "c", "3": "d"}
    automation.world.broken = {"2"}
    assert automation.run_window() == [{"listing": [""]}, {"rows": ["2", "3"], "signs": ["2", "3"]}]
    assert automation.evaluate() == {}
    automation.world.broken = set()
    assert automation.run_window()[:2] == [{"rows": ["2"], "signs": ["2"]}, {"dropped": [""]}]


def test_a_failed_blocking_check_holds_up_what_follows_and_is_retried(tmp_path: Path):
    automation = Automation(World(tmp_path, {"0": "a", "1": "b"}, corrupted={"1"}))
    automation.run_window()
    materialized = automation.instance.get_materialized_partitions
    assert materialized(dg.AssetKey("rows")) == {"0", "1"}
    assert materialized(dg.AssetKey("signs")) == {"0"}
    assert automation.instance.get_latest_materialization_event(dg.AssetKey("dropped")) is None
    automation.world.corrupted = set()
    assert automation.run_window()[0] == {"rows": ["1"], "signs": ["1"]}


def test_what_is_unchecked_is_not_materialised_again_nor_anything_downstream(tmp_path: Path):
    automation = finished(tmp_path)
    automation.world.newly_checked = True
    automation.world.texts["1"] = "c"
    assert automation.run_window() == [{"listing": [""]}, {"rows": ["1"]}, {"signs": ["1"]}], "what has changed alone"


def test_a_grown_corpus_requests_the_new_work_alone(tmp_path: Path):
    automation = finished(tmp_path)
    automation.world.texts = {"0": "a", "1": "b", "2": "c"}
    assert automation.run_window() == [
        {"listing": [""]},
        {"rows": ["2"], "signs": ["2"]},  # not the shards whose files are the same
        {"dropped": [""]},
        {"kept": ["0", "1", "2"], "made": ["2"]},  # all: here `kept` reads the whole of `dropped`
        {"made": ["0", "1"]},  # with the tokenizer and the model that are there
    ]


def test_a_changed_setting_requests_what_it_changes_and_stops_where_content_stays_the_same(tmp_path: Path):
    automation = finished(tmp_path)
    automation.world.setting = "2"
    assert automation.run_window() == [{"signs": ["0", "1"]}]


def test_a_changed_file_requests_its_shard_and_what_that_changes(tmp_path: Path):
    automation = finished(tmp_path)
    automation.world.texts["1"] = "bb"
    assert automation.run_window() == [
        {"listing": [""]},
        {"rows": ["1"]},
        {"signs": ["1"]},  # comes out the same, which `kept` waits to see
        {"kept": ["1"]},
        {"made": ["1"]},
    ]


def test_training_and_evaluation_are_never_nightly():
    graph = project.resolve_asset_graph()
    expensive = {key for key in graph.materializable_asset_keys if key.path[1].endswith(("_model", "checkpoint"))}
    assert len(expensive) == 4
    assert not expensive & set(NIGHTLY)
    assert not any(key.path[0] == "evaluation" for key in NIGHTLY)
    automatic = {key for key in graph.materializable_asset_keys if graph.get(key).automation_condition}
    assert automatic == set(NIGHTLY)
    assert {key.path[1] for key in NIGHTLY if NIGHTLY[key] is NightlyPolicy.IF_MISSING} == {"tokenizer"}


def test_every_asset_partitioned_by_shard_or_block_is_nightly():
    graph = project.resolve_asset_graph()
    partitioned = {key for key in graph.materializable_asset_keys if graph.get(key).is_partitioned}
    by_part = (shards(SETTINGS), key_blocks(SETTINGS))
    of_corpus = {key for key in partitioned if graph.get(key).partitions_def in by_part}
    assert of_corpus
    assert of_corpus == {key for key in partitioned if NIGHTLY.get(key) is NightlyPolicy.IF_NEEDED}


def test_fan_ins_are_overdue_after_a_while():
    graph = project.resolve_asset_graph()
    overdue = {key.path[1] for key in graph.materializable_asset_keys if graph.get(key).freshness_policy}
    assert {"duplicates", "tuning_examples", "quality_table", "token_budget"} <= overdue
    assert not overdue & {"tokenizer", "checkpoint", "baseline_model", "raw_documents"}
