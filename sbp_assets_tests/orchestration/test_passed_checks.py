"""What has passed all its checks, compared with what Dagster says of each check on each partition."""

from collections.abc import Iterator
from uuid import uuid4

import dagster as dg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.dagster_support.internals import AssetCheckExecutionRecordStatus, SqlEventLogStorageMetadata
from sbp_assets.orchestration.passed_checks import passed_checks

NAMES = "complete", "intact"
STATUSES = [status.value for status in AssetCheckExecutionRecordStatus]
MATERIALISATIONS = st.sampled_from([None, 1, 2])
EXECUTIONS = st.tuples(
    st.sampled_from(NAMES), st.sampled_from(["0", "1", None]), st.sampled_from(STATUSES), MATERIALISATIONS
)


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as ephemeral:
        yield ephemeral


@settings(deadline=None)
@given(executions=st.lists(EXECUTIONS, max_size=10))
def test_it_agrees_with_what_dagster_says_of_each_check(
    instance: dg.DagsterInstance, executions: list[tuple[str, str | None, str, int | None]]
):
    key = dg.AssetKey(uuid4().hex)
    checks = [dg.AssetCheckKey(key, name) for name in NAMES]
    rows = [
        {
            "asset_key": key.to_string(),
            "check_name": name,
            "partition": partition,
            "run_id": uuid4().hex,
            "execution_status": status,
            "evaluation_event_storage_id": number,
            "materialization_event_storage_id": materialisation,
        }
        for number, (name, partition, status, materialisation) in enumerate(executions, 1)
    ]
    if rows:
        with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
            table = SqlEventLogStorageMetadata.tables["asset_check_executions"]
            connection.execute(sa.insert(table), rows)
    expected: dict[str | None, set[int | None]] = {}
    for partition in ("0", "1", None):
        infos = [
            info
            for info in instance.event_log_storage.get_asset_check_partition_info(checks)
            if info.partition_key == partition
            and info.latest_execution_status is AssetCheckExecutionRecordStatus.SUCCEEDED
        ]
        if len(infos) == len(checks):
            expected[partition] = {info.latest_target_materialization_storage_id for info in infos}
    passed = {name: targets.pop() for name, targets in expected.items() if len(targets) == 1 and None not in targets}
    assert passed_checks(instance, checks) == passed
