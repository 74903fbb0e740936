"""The finished store that the tests of operations copy; all of them carry the marker `operations`."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from sbp_assets_tests.operations.deployment import PLANTED, Deployment
from sbp_assets_tests.operations.servers import PostgresServer, S3Server, postgres_programs

# What need not wait for the finished store stands beside its making; then the longest first (minutes), so that none is
# left to run alone at the end. Needs --no-loadscope-reorder.
FIRST = (
    "faults_killed", "growth", "faults_disk", "faults_database", "faults_services", "s3", "operating", "daemon",
    "security", "instance", "postgres", "browser",
)  # fmt: skip

FINISHED = """finished [v2] {a,b} ~ it's "1" #2 50% k=v *\\x é"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(FIRST)}
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("operations")
            if item.path.stem.startswith("test_faults_"):
                item.add_marker("faults")
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home of a deployment in which `sbp run -p tiny` has finished; to be copied, never changed.

    Its path has what some library takes for a pattern, a quote or a comment: a path is a path. Its environment
    held secrets (PLANTED), and the output of the command is in said.log. All workers of pytest-xdist
    share it. $SBP_FINISHED_STORE names one from an earlier session, kept for work on these tests.
    """
    if kept := os.environ.get("SBP_FINISHED_STORE"):
        home = Path(kept)
    else:
        shared = tmp_path_factory.getbasetemp()
        home = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / FINISHED
    with FileLock(f"{home}.lock"), Deployment(home, PLANTED) as deployment:
        if not (deployment.artifacts / "evaluation/report/index.html").is_file():
            done = deployment.sbp("run", fresh=True)
            (home / "said.log").write_text(done.stdout + done.stderr)
    return home


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the module's own; `{"SBP_POSTGRES_URL": postgres.url}` in a deployment's overrides."""
    if postgres_programs() is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server of the module's own."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server
