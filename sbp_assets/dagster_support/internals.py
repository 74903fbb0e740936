"""The names that the package takes from Dagster's private modules, with the reason for each.

No other module imports from `dagster._*`, so that an upgrade of Dagster has one place to look at.
"""

from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.asset_graph_view.entity_subset import EntitySubset
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.definitions.assets.graph.asset_graph import executable_in_same_run
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster._core.events import ASSET_CHECK_EVENTS, ASSET_EVENTS, EVENT_TYPE_TO_PIPELINE_RUN_STATUS
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionsFilter, BulkActionStatus
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
    AssetCheckPartitionInfo,
)
from dagster._core.storage.dagster_run import FINISHED_STATUSES, NOT_FINISHED_STATUSES
from dagster._core.storage.event_log.base import PartitionKeyFilter
from dagster._core.storage.event_log.schema import SqlEventLogStorageMetadata, SqlEventLogStorageTable
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME, SqliteEventLogStorage
from dagster._core.storage.runs.schema import RunsTable, RunStorageSqlMetadata
from dagster._core.storage.runs.sqlite.sqlite_run_storage import SqliteRunStorage
from dagster._core.storage.schedules.schema import ScheduleStorageSqlMetadata
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
    RESUME_RETRY_TAG,
    ROOT_RUN_ID_TAG,
)
from dagster._serdes import ConfigurableClassData
from dagster._utils import tail_file
from dagster._utils.error import SerializableErrorInfo

# fmt: off
__all__ = [
    # Copying SQLite into PostgreSQL: the tables, and which events are in the index beside the log of their run.
    "ASSET_CHECK_EVENTS",
    "ASSET_EVENTS",
    # pruning, too
    "ASSET_PARTITION_RANGE_END_TAG",  # of a run of a range of partitions, as backfills start them
    "ASSET_PARTITION_RANGE_START_TAG",  # likewise
    "BACKFILL_ID_TAG",  # of a run that a backfill has started
    "BULK_ACTION_TERMINAL_STATUSES",  # pruning: to find backfills that go on
    # A run of many shards records the provenance of each itself, as Dagster does in a run of one.
    "CODE_VERSION_TAG",
    "DATA_VERSION_IS_USER_PROVIDED_TAG",
    # Staleness: the resolver that Dagster has asks for one partition after another and skips inputs of 100 partitions.
    "DATA_VERSION_TAG",  # to read the versions of all partitions in one query; the public API reads one at a time
    "EVENT_TYPE_TO_PIPELINE_RUN_STATUS",  # copying, as above
    "FINISHED_STATUSES",  # of runs; `dg.DagsterRun.is_finished` answers for one run that is already loaded
    "INDEX_SHARD_NAME",  # of the event log in SQLite: the file that is no run's
    "NOT_FINISHED_STATUSES",  # likewise, to ask the run storage for those runs alone
    "RESUME_RETRY_TAG",  # of a run that goes on where another has ended
    "ROOT_RUN_ID_TAG",  # likewise: the first of them
    "SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD",  # from here on Dagster records an input's last event, no digest
    "SQLITE_BUSY_TIMEOUT_SECONDS",  # how long that event log waits for a lock
    "AssetCheckEvaluationTargetMaterializationData",  # the materialisation that a check looked at, in a run of many
    "AssetCheckExecutionRecord",  # type of what the event log storage returns for a check
    "AssetCheckExecutionRecordStatus",  # planned, succeeded, failed: the public API has evaluations alone
    "AssetCheckPartitionInfo",  # type of the one query that answers for all partitions of a check
    "AssetGraphView",  # type of what an automation condition evaluates on
    "BaseAssetGraph",  # type of `defs.resolve_asset_graph()` and of the graph of a view
    "BulkActionStatus",  # pruning, as above
    "BulkActionsFilter",  # pruning, as above
    "CheckRunHealthResult",  # what a run launcher returns to run monitoring
    "ConfigurableClassData",  # type of what a class that dagster.yaml names is made with
    "DagsterSqliteStorage",  # the storage in SQLite; no public name, like the two that it consists of
    "EntitySubset",  # type of the partitions that an automation condition returns
    "LaunchRunContext",  # type of what a run launcher is handed
    "PartitionKeyFilter",  # to ask for the evaluation of a check on one partition
    "RunStorageSqlMetadata",  # copying, as above, and pruning
    "RunsTable",  # copying, as above
    "ScheduleStorageSqlMetadata",  # copying, as above
    "SerializableErrorInfo",  # type of the error in a failed step's event
    "SqlEventLogStorageMetadata",  # copying, as above
    # copying, as above, and pruning
    "SqlEventLogStorageTable",  # copying, as above
    # copying, as above, and pruning: which events are the latest, of all assets at once
    "SqliteEventLogStorage",  # to keep its files open
    "SqliteRunStorage",  # likewise
    "WorkerStatus",  # whether the process of a run is alive
    "executable_in_same_run",  # whether an input that is requested now is materialised first in the same run
    "extract_data_provenance_from_entry",  # code version and inputs of a materialisation that was read in bulk
    "extract_data_version_from_entry",  # its data version
    "get_input_data_version_tag",  # provenance, as above
    "get_input_event_pointer_tag",  # likewise
    "tail_file",  # follows a file that a training process is writing messages to
]
# fmt: on
