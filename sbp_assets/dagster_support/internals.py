"""The names that the package takes from Dagster's private modules, with the reason for each.

No other module imports from `dagster._*`, so that an upgrade of Dagster has one place to look at.
"""

from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.asset_graph_view.entity_subset import EntitySubset
from dagster._core.definitions.assets.graph.asset_graph import executable_in_same_run
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import (
    DATA_VERSION_TAG,
    SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
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
from dagster._core.storage.runs.schema import RunsTable, RunStorageSqlMetadata
from dagster._core.storage.schedules.schema import ScheduleStorageSqlMetadata
from dagster._utils import tail_file
from dagster._utils.error import SerializableErrorInfo

# fmt: off
__all__ = [
    # Copying SQLite into PostgreSQL: the tables, and which events are in the index beside the log of their run.
    "ASSET_CHECK_EVENTS",
    "ASSET_EVENTS",  # pruning, too
    "BULK_ACTION_TERMINAL_STATUSES",  # pruning: to find backfills that go on
    # Staleness: the resolver that Dagster has asks for one partition after another and skips inputs of 100 partitions.
    "DATA_VERSION_TAG",  # to read the versions of all partitions in one query; the public API reads one at a time
    "EVENT_TYPE_TO_PIPELINE_RUN_STATUS",  # copying, as above
    "FINISHED_STATUSES",  # of runs; `dg.DagsterRun.is_finished` answers for one run that is already loaded
    "NOT_FINISHED_STATUSES",  # likewise, to ask the run storage for those runs alone
    "SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD",  # from here on Dagster records an input's last event, no digest
    "AssetCheckExecutionRecord",  # type of what the event log storage returns for a check
    "AssetCheckExecutionRecordStatus",  # planned, succeeded, failed: the public API has evaluations alone
    "AssetCheckPartitionInfo",  # type of the one query that answers for all partitions of a check
    "AssetGraphView",  # type of what an automation condition evaluates on
    "BaseAssetGraph",  # type of `defs.resolve_asset_graph()` and of the graph of a view
    "BulkActionStatus",  # pruning, as above
    "BulkActionsFilter",  # pruning, as above
    "CheckRunHealthResult",  # what a run launcher returns to run monitoring
    "EntitySubset",  # type of the partitions that an automation condition returns
    "LaunchRunContext",  # type of what a run launcher is handed
    "PartitionKeyFilter",  # to ask for the evaluation of a check on one partition
    "RunStorageSqlMetadata",  # copying, as above, and pruning
    "RunsTable",  # copying, as above
    "ScheduleStorageSqlMetadata",  # copying, as above
    "SerializableErrorInfo",  # type of the error in a failed step's event
    "SqlEventLogStorageMetadata",  # copying, as above, and pruning
    "SqlEventLogStorageTable",  # copying, as above, and pruning: which events are the latest, of all assets at once
    "WorkerStatus",  # whether the process of a run is alive
    "executable_in_same_run",  # whether an input that is requested now is materialised first in the same run
    "extract_data_provenance_from_entry",  # code version and inputs of a materialisation that was read in bulk
    "extract_data_version_from_entry",  # its data version
    "tail_file",  # follows a file that a training process is writing messages to
]
# fmt: on
