"""Every kind of artifact is damaged in turn: the named check fails, and nothing downstream is materialised.

The project's own definitions run on a copy of a finished store, real checks and real assets. A damaged artifact is what
a broken asset would have left: it lies in the store when the run starts in which its checks and an asset that reads it
are to be done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.staleness import fan_in_checks
from sbp_assets.orchestration.verification import OVER_ALL, recorded_evaluations
from sbp_assets.settings import load_settings
from sbp_assets.storage.checks import NAME as STORED
from sbp_assets_tests.operations.damage import DAMAGES, SHARD, Damage
from sbp_assets_tests.operations.deployment import Deployment

GRAPH = build_definitions(load_settings("tiny", {})).resolve_asset_graph()
ASSETS = {key.to_user_string() for key in GRAPH.get_all_asset_keys()}


@pytest.fixture(scope="module")
def deployment(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("mutations"), finished=finished) as copy:
        yield copy


@pytest.fixture(scope="module")
def defs(deployment: Deployment) -> dg.Definitions:
    return build_definitions(load_settings(environ=deployment.environ))


@pytest.fixture(scope="module")
def instance(deployment: Deployment) -> Iterator[dg.DagsterInstance]:
    with deployment.instance() as opened:
        yield opened


def run(
    defs: dg.Definitions, instance: dg.DagsterInstance, checked: str, downstream: str | None, partition: str | None
) -> dg.ExecuteInProcessResult:
    """Run the checks of `checked` and materialise the asset `downstream`, and nothing else."""
    key, wanted = dg.AssetKey(checked.split("/")), dg.AssetKey((downstream or "").split("/"))
    # The content version is not the matter here: a broken asset records that of what it broke.
    checks = {check for check in GRAPH.asset_check_keys if check.asset_key == key and check.name != STORED}
    if partition == OVER_ALL:
        checks &= set(fan_in_checks(GRAPH, key))
    together = GRAPH.get(wanted).execution_set_asset_keys if downstream else set()
    job = defs.resolve_implicit_global_asset_job_def().get_subset(
        asset_selection=together or None, asset_check_selection=checks
    )
    # As a tag: what is asked for here spans several partitionings, which a job's own partition key may not.
    tags = {} if partition == OVER_ALL else {"dagster/partition": partition or SHARD}
    return job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)


def failed_checks(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> set[str]:
    """Names of checks that failed as errors, or that could not read their artifact."""
    evaluations = recorded_evaluations(instance, result)
    failed = {e.check_name for e in evaluations if not e.passed and e.severity == dg.AssetCheckSeverity.ERROR}
    broken = {event.step_key: str(event.step_failure_data.error) for event in result.get_step_failure_events()}
    names = {GRAPH.assets_def_for_key(key).node_def.name: key.name for key in GRAPH.asset_check_keys}
    # Those of a step of many shards are told by its error.
    raised = {
        key.name
        for key in GRAPH.asset_check_keys
        for error in broken.values()
        if f"raised by the check {key.to_user_string()}" in error
    }
    return failed | raised | {names[step] for step in broken if step in names and not step.endswith("_shards")}


def planned(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> set[str]:
    records = instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    return {r.dagster_event.asset_key.to_user_string() for r in records if r.dagster_event}


def materialised(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.asset_key.to_user_string() for event in result.get_asset_materialization_events()}


def test_every_kind_of_artifact_is_damaged():
    without_own_store = {"pretraining/baseline_model", "pretraining/oracle_model", "pretraining/sbp_model"}
    scores = {f"evaluation/{name}_scores" for name in ("baseline", "early_stopped", "oracle")}
    damaged = {damage.artifact for damage in DAMAGES}
    assert damaged >= ASSETS - scores
    assert damaged >= without_own_store


@pytest.mark.parametrize("checked", sorted({damage.checked for damage in DAMAGES}))
def test_undamaged_artifacts_pass(defs: dg.Definitions, instance: dg.DagsterInstance, checked: str):
    result = run(defs, instance, checked, None, next(d.partition for d in DAMAGES if d.checked == checked))
    assert not failed_checks(instance, result)


CHEAP = {"corpus/minhash_signatures", "corpus/documents", "corpus/tokens", "pairing/ann_index",
         "pairing/neighbor_pairs", "synthesizer/tuning_examples", "synthesis/synthetic_tokens",
         "pretraining/token_budget", "evaluation/comparison"}  # fmt: skip


@pytest.mark.parametrize("downstream", sorted(CHEAP))
def test_assets_downstream_of_an_undamaged_artifact_are_materialised(
    defs: dg.Definitions, instance: dg.DagsterInstance, downstream: str
):
    damage = next(d for d in DAMAGES if d.downstream == downstream)
    result = run(defs, instance, damage.checked, downstream, damage.partition)
    assert result.success
    assert materialised(result) == {downstream}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: f"{d.artifact}: {d.what}".replace("/", "."))
def test_damage_fails_its_check_and_stops_what_is_downstream(
    defs: dg.Definitions, instance: dg.DagsterInstance, deployment: Deployment, tmp_path: Path, damage: Damage
):
    path = damage.path(deployment.artifacts)
    intact = tmp_path / path.name
    # A check of all shards holds none of them up.
    over_all = damage.check.endswith("_over_all_shards")
    downstream = None if over_all else damage.downstream
    (shutil.copytree if path.is_dir() else shutil.copy)(path, intact)
    try:
        damage.harm(path)
        result = run(defs, instance, damage.checked, downstream, OVER_ALL if over_all else damage.partition)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        intact.rename(path)
    assert damage.check.split(":")[1] in failed_checks(instance, result)
    if downstream:
        assert downstream in planned(instance, result)
    assert not materialised(result)
    # The run stopped before the asset downstream began: only steps of the checks may have failed.
    checked = dg.AssetKey(damage.checked.split("/"))
    checks = {GRAPH.assets_def_for_key(key).node_def.name for key in GRAPH.get(checked).check_keys}
    assert {event.step_key for event in result.get_step_failure_events()} <= checks
