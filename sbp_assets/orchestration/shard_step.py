"""A step of the pipeline whose assets are partitioned by corpus shard: one op materialises and checks many shards.

So are those that are partitioned by blocks of keys, whose partitions are called shards here, too.

A run costs seconds before it does anything, an engine more, a shard of a corpus of thousands often less. So the assets
of such a step, declared for one shard each, and their checks become one multi-asset that goes over the range of shards
of its run: each asset of the chain is materialised, recorded and checked before the next, shard after shard.

Dagster (1.13) records what such an op returns for the whole range with one data version, and its checks without their
shard. So a run of a range logs an event per shard itself and returns nothing; a run of one shard returns its results as
any asset does, so that other steps may follow in that run.
"""

import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.check_results import evaluation_of, looked_at
from sbp_assets.dagster_support.internals import (
    BACKFILL_ID_TAG,
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    AssetCheckEvaluationTargetMaterializationData,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from sbp_assets.fan_out import PartitionTasks, TaskError
from sbp_assets.fan_out.ray_cluster import ClusterError
from sbp_assets.orchestration.fan_in_checks import alone
from sbp_assets.orchestration.materialisations import MATERIALIZED, Partition
from sbp_assets.orchestration.pipeline import PIPELINE, Step
from sbp_assets.orchestration.shard_functions import (
    ArtifactInput,
    AssetFunction,
    CheckFunction,
    ShardContext,
    asset_function,
    check_function,
)
from sbp_assets.orchestration.shard_records import blocks, finished_shards, partitions_with_failed_checks
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.storage.remote import StorageError

# Metadata of the failure of a run: why, by shard.
FAILED_SHARDS = "failed_shards"
NAMED = 20  # Failed shards in the message of a failure.
GIVEN_UP = 3  # Shards in a row that fail for want of storage, or of a cluster, after which a run ends.

ShardResult = dg.MaterializeResult | dg.AssetCheckResult


def shard_step(
    name: str,
    assets: Sequence[dg.AssetsDefinition],
    checks: Sequence[dg.AssetChecksDefinition],
    all_assets: Sequence[dg.AssetsDefinition],
    all_checks: Sequence[dg.AssetChecksDefinition],
    shards_per_run: int,
) -> dg.AssetsDefinition:
    """Return the multi-asset `name` that materialises `assets`, in that order, and runs `checks`, shard by shard.

    `all_assets` and `all_checks` are those of the code location, which say where inputs are kept and which checks they
    have to pass. A backfill puts at most `shards_per_run` shards into a run.
    """
    upstream = {spec.key: (asset, spec) for asset in all_assets for spec in asset.specs}
    partitions = assets[0].partitions_def
    assert isinstance(partitions, dg.StaticPartitionsDefinition)
    functions = [asset_function(asset, upstream, partitions) for asset in assets]
    checked = [check_function(check, upstream, partitions) for check in checks]
    specs = [
        spec.replace_attributes(skippable=True).with_io_manager_key(function.io_managers[spec.key])
        for function in functions
        for spec in function.specs
    ]
    own = {spec.key for spec in specs}
    read = {read.key for function in functions for read in function.reads} - own
    input_checks = [
        spec.key for check in all_checks for spec in check.check_specs if spec.blocking and spec.asset_key in read
    ]
    pools = {pool for asset in assets if (pool := asset.op.pool)}
    if len(pools) > 1:
        raise ValueError(f"the assets of the step {name} are in several pools: {sorted(pools)}")

    @dg.multi_asset(
        name=name,
        specs=specs,
        check_specs=[check.spec for check in checked],
        partitions_def=partitions,
        can_subset=True,
        backfill_policy=dg.BackfillPolicy.multi_run(shards_per_run),
        pool=next(iter(pools), None),
        required_resource_keys={key for one in (*assets, *checks) for key in one.required_resource_keys}
        | {read.io_manager for one in (*functions, *checked) for read in one.inputs.values()},
    )
    def step(context: dg.AssetExecutionContext) -> Iterator[ShardResult]:
        run = _ShardRun(context, functions, checked, input_checks)
        try:
            if context.has_partition_key:
                yield from run.shard(context.partition_key)
            else:
                run.range()
        finally:
            run.close()

    return step


def with_shard_steps(
    assets: Sequence[dg.AssetsDefinition],
    checks: Sequence[dg.AssetChecksDefinition],
    partitions: Sequence[dg.PartitionsDefinition],
    shards_per_run: int,
    pipeline: Sequence[Step] = PIPELINE,
) -> tuple[list[dg.AssetsDefinition], list[dg.AssetChecksDefinition]]:
    """Return `assets` and `checks` with those of each step that has one of `partitions` made one multi-asset.

    An unpartitioned check of those assets looks at all shards, in runs of its own.
    """
    by_key = {key: asset for asset in assets for key in asset.keys if asset.partitions_def in partitions}
    steps = list[dg.AssetsDefinition]()
    for step in pipeline:
        members = list(dict.fromkeys(by_key[key] for key in step.keys if key in by_key))
        if members:
            # Dagster puts assets of one policy into one run, and in a run of a range nothing can follow on a step:
            # it returns nothing. So no two steps have the same.
            many = shards_per_run + len(steps)
            theirs = [check for check in checks if _target(check) in step.keys and check.partitions_def]
            # Not the step's name: that is its job's, and an op has to have another.
            steps.append(shard_step(f"{step.name}_shards", members, theirs, assets, checks, many))
    inside = {key for step in steps for key in (*step.keys, *step.check_keys)}
    other_checks = [check for check in checks if inside.isdisjoint(check.check_keys)]
    return (
        steps + [asset for asset in assets if inside.isdisjoint(asset.keys)],
        [alone(check) if _target(check) in inside else check for check in other_checks],
    )


def _target(check: dg.AssetChecksDefinition) -> dg.AssetKey:
    (spec,) = check.check_specs
    return spec.asset_key


class _ShardRun:
    """A run of a step: what its shards share."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        assets: Sequence[AssetFunction],
        checks: Sequence[CheckFunction],
        input_checks: Sequence[dg.AssetCheckKey],
    ) -> None:
        self._context, self._assets, self._checks, self._input_checks = context, assets, checks, input_checks
        graph = context.op_execution_context.job_def.asset_layer.asset_graph
        self._staleness = Staleness(graph, context.instance)
        self._failed_inputs: dict[tuple[dg.AssetKey, Partition], str] | None = None
        self._fan_ins: dict[ArtifactInput, dict[str | None, Any]] = {}
        self._targets: dict[dg.AssetKey, dict[str, AssetCheckEvaluationTargetMaterializationData]] = {}
        # By shard: a blocking check that failed ends the shard's chain.
        self._stopped_by: dict[str, list[str]] = {}
        self._tasks = PartitionTasks([context.partition_key] if context.has_partition_key else [])
        self._release()

    def close(self) -> None:
        """End the tasks that are at work."""
        self._tasks.close()

    def _release(self) -> None:
        """Let what has been read leave the cache of a remote store."""
        functions = (*self._assets, *self._checks)
        for manager in {read.io_manager for function in functions for read in function.inputs.values()}:
            getattr(self._context.resources, manager).release()

    def shard(self, shard: str) -> Iterator[ShardResult]:
        """Materialise and check one shard, and yield the results as they are found.

        A blocking check that fails ends it. A check that raises does so after those beside it have run.
        """
        context, crashed = ShardContext(self._context, shard, self._tasks), list[Exception]()
        for function in self._assets:
            if any(key in self._context.selected_asset_keys for key in function.keys):
                yield from self._materialise(function, context)
            for check in self._checks:
                if check.spec.key in self._context.selected_asset_check_keys and check.spec.asset_key in function.keys:
                    try:
                        result: dg.AssetCheckResult = check.run(context, self._load)
                    except Exception as error:
                        error.add_note(f"raised by the check {check.spec.key.to_user_string()}")
                        crashed.append(error)
                        continue
                    yield result._replace(asset_key=check.spec.asset_key, check_name=check.spec.name)
                    if blocks(check.spec, result):
                        self._stopped_by.setdefault(shard, []).append(check.spec.name)
            # A run of checks alone is to look at everything.
            if self._context.selected_asset_keys and (crashed or shard in self._stopped_by):
                break
        for another in crashed[1:]:
            crashed[0].add_note(f"{another}, {'; '.join(another.__notes__)}")
        if crashed:
            raise crashed[0]

    def range(self) -> None:
        """Materialise and check the shards of the run's range; raise dg.Failure, which names those that failed."""
        context, failed = self._context, dict[str, str]()
        own = {key for function in self._assets for key in function.keys}
        selected = {*context.op_execution_context.job_def.asset_layer.executable_asset_keys}
        if others := sorted(key.to_user_string() for key in selected - own):
            raise dg.Failure(
                f"A run of a range of shards is of one step, and this one has {', '.join(others)}, too. Select them in "
                "a backfill, which starts runs for each step, or materialise one shard.",
                allow_retries=False,
            )
        shards, alike = context.partition_keys, 0
        specs = [check.spec for check in self._checks if check.spec.key in context.selected_asset_check_keys]
        done = finished_shards(context.run, self._staleness, context.selected_asset_keys, specs, shards)
        # An asset whose work is in tasks has those of all shards at work on a cluster: not of what is refused below.
        self._tasks = PartitionTasks([shard for shard in shards if shard not in done and not self._refusal(shard)])
        for number, shard in enumerate(shards, 1):
            if shard in done:
                # Every check of this run is planned, and one that stays so counts as not executed.
                for evaluation in done[shard]:
                    context.log_event(evaluation)
                continue
            try:
                for result in self.shard(shard):
                    self._log(result, shard)
                if checks := self._stopped_by.get(shard):
                    failed[shard] = f"check failed: {', '.join(checks)}"
                alike = 0
            except Exception as error:
                reasons = (error, error.__cause__) if isinstance(error, TaskError) else (error,)
                lasting = any(isinstance(reason, StorageError | OSError | ClusterError) for reason in reasons)
                alike = alike + 1 if lasting else 0
                failed[shard] = "; ".join([str(error) or repr(error), *getattr(error, "__notes__", [])])
                # Dagster's event log keeps the text of a message and no exception.
                context.log.error("shard %s failed:\n%s", shard, "".join(traceback.format_exception(error)))
            context.log.info("shard %s · %d of %d shards · %d failed", shard, number, len(shards), len(failed))
            if not self._fan_ins:
                self._release()  # what all shards read is still wanted
            if alike == GIVEN_UP and number < len(shards):
                # The store is away or a disk is full: each of the others would wait as long, and hold the pool.
                reason = f"not tried: {GIVEN_UP} shards in a row before it failed, the last one with: {failed[shard]}"
                failed |= dict.fromkeys(shards[number:], reason)
                break
        if failed:
            lines = [f"{shard}: {reason}" for shard, reason in list(failed.items())[:NAMED]]
            if len(failed) > NAMED:
                lines.append(f"and {len(failed) - NAMED} more, in the metadata")
            raise dg.Failure(
                f"{len(failed)} of {len(shards)} shards failed; the others are done.\n" + "\n".join(lines),
                metadata={FAILED_SHARDS: dg.MetadataValue.json(failed)},
                allow_retries=False,
            )

    def _materialise(self, function: AssetFunction, context: ShardContext) -> Iterator[dg.MaterializeResult]:
        shard = context.partition_key
        # Looked up before the inputs are read: what changes meanwhile makes the shard stale. A run may take hours. Not
        # of what its task reads, perhaps before the shard's turn: there the version counts that the run began with.
        for read in function.inputs.values():
            if read.partitions is None:
                self._staleness.look_again(read.key, shard)
        tags = {key: self._provenance(key, shard) for key in function.keys}
        if reason := self._refusal(shard, function):
            raise RuntimeError(reason)
        made = function.run(context, self._load)
        results = (made,) if isinstance(made, dg.MaterializeResult) else made
        for spec, result in zip(function.specs, results, strict=True):
            if spec.key not in self._context.selected_asset_keys:
                continue
            manager = getattr(context.resources, function.io_managers[spec.key])
            version, metadata = manager.save(spec.key, shard, result.value, spec.metadata)
            yield dg.MaterializeResult(
                asset_key=spec.key,
                metadata={**(result.metadata or {}), **metadata},
                data_version=dg.DataVersion(version),
                tags={
                    **tags[spec.key],
                    CODE_VERSION_TAG: spec.code_version or context.run.run_id,
                    DATA_VERSION_TAG: version,
                    DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
                },
            )
            events = context.instance.event_log_storage.get_latest_storage_id_by_partition(
                spec.key, MATERIALIZED, {shard}
            )
            self._staleness.materialised(spec.key, shard, version, events[shard])
            self._targets.setdefault(spec.key, {})[shard] = AssetCheckEvaluationTargetMaterializationData(
                storage_id=events[shard], run_id=context.run.run_id, timestamp=time.time()
            )
        self._tasks.recorded(shard)

    def _refusal(self, shard: str, *functions: AssetFunction) -> str | None:
        """Return why, in a backfill, an asset (of `functions`, or any) is not to be made of this shard; None: it is.

        A blocking check of an input has failed, or has crashed: a backfill goes on to the next step with every shard
        that is materialised, whatever its checks say.
        """
        if BACKFILL_ID_TAG not in self._context.run.tags:
            return None
        if self._failed_inputs is None:
            self._failed_inputs = partitions_with_failed_checks(self._context.instance, self._input_checks)
        reads = (read for function in functions or self._assets for read in function.reads)
        for read in reads if self._failed_inputs else ():
            for partition in (shard,) if read.partitions is None else read.partitions:
                if check := self._failed_inputs.get((read.key, partition)):
                    of = f" of shard {partition}" if partition else ""
                    return (
                        f"{read.key.to_user_string()}{of} has a check that failed or crashed: {check}. "
                        "Materialise that first"
                    )
        return None

    def _provenance(self, key: dg.AssetKey, shard: str) -> dict[str, str]:
        tags = {}
        for parent, (version, event) in self._staleness.inputs(key, shard).items():
            tags[get_input_data_version_tag(parent)] = version
            tags[get_input_event_pointer_tag(parent)] = str(event) if event else "NULL"
        return tags

    def _load(self, read: ArtifactInput, shard: str) -> Any:
        manager = getattr(self._context.resources, read.io_manager)
        load = partial(manager.fetch if read.as_path else manager.load, read.key)
        if read.partitions is None:
            return {shard: load(shard)} if read.as_dict else load(shard)
        if read not in self._fan_ins:
            self._fan_ins[read] = {partition: load(partition) for partition in read.partitions}
        loaded = self._fan_ins[read]
        return dict(loaded) if read.as_dict else loaded[read.partitions[0]]

    def _log(self, result: ShardResult, shard: str) -> None:
        """Record a result as an event of its shard."""
        assert result.asset_key is not None
        if isinstance(result, dg.MaterializeResult):
            self._context.log_event(
                dg.AssetMaterialization(result.asset_key, partition=shard, metadata=result.metadata, tags=result.tags)
            )
            return
        assert result.check_name is not None
        key = dg.AssetCheckKey(result.asset_key, result.check_name)
        spec = next(check.spec for check in self._checks if check.spec.key == key)
        target = self._looked_at(result.asset_key).get(shard)
        self._context.log_event(evaluation_of(spec, result, target, shard))

    def _looked_at(self, key: dg.AssetKey) -> dict[str, AssetCheckEvaluationTargetMaterializationData]:
        """Return the materialisations of an asset that its checks look at, by shard: this run's, or else the last."""
        if key not in self._targets:
            events = self._staleness.materialisations(key, self._context.partition_keys)
            self._targets[key] = {str(shard): looked_at(event) for shard, event in events.items()}
        return self._targets[key]
