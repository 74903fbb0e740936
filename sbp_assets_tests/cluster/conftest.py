"""Clusters of several Ray nodes on this machine, in a network namespace: `make test-cluster`."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sbp_assets.fan_out import open_engine
from sbp_assets.fan_out.ray_cluster import RayCluster
from sbp_assets_tests.tiny import tiny_settings

HEAD = "127.0.0.2"
OBJECT_STORE = 100 * 2**20
SECRET = "AWS_SECRET_ACCESS_KEY"  # of the driver alone
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def namespace() -> None:
    """A network of this process's own, with loopback alone: every node gets an address and all ports."""
    if not in_namespace():
        pytest.skip("not in a network namespace: make test-cluster")


def in_namespace() -> bool:
    """Return whether this process has a network of its own, as of `unshare --map-root-user --net`; make it usable."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        return False
    with socket.socket() as anything:
        fcntl.ioctl(anything, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # 15 by default: beside other work tasks would hardly run.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    return True


class Nodes:
    """A cluster: a head without cores for tasks, and nodes of one core, each with an address of its own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # A node counts as dead after a second; by default, after 15.
        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_timeout_ms": 500}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "node_ip_address": HEAD,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE,
                "_system_config": quick,
            },
        )
        self._last = 2

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, **arguments: Any) -> Any:
        """Start a node; `env_vars` are of its environment."""
        self._last += 1
        where = {"node_ip_address": f"127.0.0.{self._last}", "object_store_memory": OBJECT_STORE}
        return self.cluster.add_node(**{"num_cpus": 1, "memory": 10**9, **where, **arguments})

    def kill(self, node: Any) -> None:
        """Kill all processes of a node, as a power failure does."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.wait_for_nodes()  # until the head knows


@pytest.fixture(scope="session")
def nodes(namespace: None) -> Iterator[Nodes]:
    """A cluster with two nodes; a test that adds one takes it away again."""
    made = Nodes()
    made.add()
    made.add()
    made.cluster.wait_for_nodes()
    yield made
    made.cluster.shutdown()


@pytest.fixture
def node(nodes: Nodes) -> Iterator[Callable[..., Any]]:
    """A function that adds a node for this test."""
    added = []

    def add(**arguments: Any) -> Any:
        added.append(nodes.add(**arguments))
        return added[-1]

    yield add
    for one in added:
        if one in nodes.cluster.worker_nodes:
            nodes.kill(one)


@pytest.fixture(scope="session")
def engine(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """One driver for all tests: its workers stay, and so does what they have imported."""
    settings = tiny_settings(tmp_path_factory.mktemp("driver"), {"deployment.ray_address": nodes.address})
    opened = open_engine(settings)
    assert isinstance(opened, RayCluster)
    environment, handler = pytest.MonkeyPatch(), signal.getsignal(signal.SIGTERM)
    environment.setenv(SECRET, "hush-hush")
    opened._connect()
    assert signal.getsignal(signal.SIGTERM) is handler, "Ray's own would take the place of Dagster's"
    yield opened
    opened.close()
    environment.undo()
