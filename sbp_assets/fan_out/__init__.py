"""Many independent tasks through one interface: a loop in this process, or the nodes of a Ray cluster.

Plain code: no dagster. docs/cluster.md says what a task may do, and how to start a cluster.
"""

from sbp_assets.fan_out.engine import Engine, InProcess, open_engine
from sbp_assets.fan_out.partition_tasks import PartitionTasks, tasks_of
from sbp_assets.fan_out.published import LazyMapping, PublishedFiles
from sbp_assets.fan_out.task import TaskError

__all__ = [
    "Engine",
    "InProcess",
    "LazyMapping",
    "PartitionTasks",
    "PublishedFiles",
    "TaskError",
    "open_engine",
    "tasks_of",
]
