"""The instance on a real PostgreSQL server: what commands do with it. Daemon and webserver on it: test_instance.py."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from sqlalchemy import create_engine, text

from sbp_assets.instance.storage import with_driver
from sbp_assets.settings import load_settings
from sbp_assets_tests.operations.deployment import Deployment
from sbp_assets_tests.operations.servers import PostgresServer


def rows(server: PostgresServer, query: str) -> list[tuple]:
    engine = create_engine(with_driver(server.url))
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def schemas(server: PostgresServer) -> list[str]:
    found = rows(server, "select nspname from pg_namespace where nspname like 'sbp%' order by nspname")
    return [name for (name,) in found]


@pytest.fixture
def overrides(postgres: PostgresServer) -> dict[str, str]:
    return {"SBP_POSTGRES_URL": postgres.url}


def test_a_run_is_recorded_in_the_profiles_own_schema_and_the_next_finds_it_fresh(
    postgres: PostgresServer, overrides: dict[str, str], tmp_path: Path
):
    with Deployment(tmp_path / "one", overrides) as one, Deployment(tmp_path / "two", overrides) as two:
        assert "[   done] Read" in one.sbp("run", "--until", "ingest").stderr
        (schema,) = schemas(postgres)
        recorded = rows(postgres, f"select count(*) from {schema}.runs")
        again = one.sbp("run", "--until", "ingest")
        assert "nothing to do" in again.stdout and "done]" not in again.stderr
        assert rows(postgres, f"select count(*) from {schema}.runs") == recorded
        # Another store starts from nothing, though its database is the same.
        assert "[   done] Find source files" in two.sbp("run", "--until", "manifest").stderr
        assert len(schemas(postgres)) == 2
        assert rows(postgres, f"select count(*) from {schema}.runs") == recorded
        # Runs and events are in the database alone.
        assert not [path for path in (tmp_path / "one/instance").rglob("*.db") if path.name != "index.db"]


def test_runs_and_events_of_a_finished_store_are_copied_from_sqlite(
    postgres: PostgresServer, overrides: dict[str, str], finished: Path, tmp_path: Path
):
    with Deployment(tmp_path, {}, finished) as deployment:
        with deployment.instance() as instance:
            runs = {run.run_id: instance.all_logs(run.run_id) for run in instance.get_runs()}
            assets = {key: instance.get_latest_materialization_event(key) for key in instance.get_asset_keys()}
        deployment.overrides |= overrides
        assert f"copied {len(runs)} runs" in deployment.sbp("to-postgres").stdout
        with deployment.instance() as instance:
            assert {run.run_id for run in instance.get_runs()} == {*runs}
            for run_id, log in runs.items():
                copied = instance.all_logs(run_id)
                assert sorted(map(repr, copied)) == sorted(map(repr, log)), "none is lost or there twice"
            assert {key: instance.get_latest_materialization_event(key) for key in instance.get_asset_keys()} == assets
        assert "nothing to do" in deployment.sbp("run").stdout
        assert "0 corrupted" in deployment.sbp("verify", "pair").stdout, "new events follow the copied ones"
        again = deployment.sbp("to-postgres", check=False)
        assert again.returncode == 2 and "already has rows in" in again.stderr
        assert postgres.PASSWORD not in again.stderr


def test_a_copy_that_is_refused_says_why_and_copies_nothing(
    postgres: PostgresServer, overrides: dict[str, str], tmp_path: Path
):
    with Deployment(tmp_path) as deployment:
        assert "set $SBP_POSTGRES_URL" in deployment.sbp("to-postgres", check=False).stderr
        deployment.overrides |= overrides
        assert "no run storage in SQLite" in deployment.sbp("to-postgres", check=False).stderr
        deployment.overrides.clear()
        with deployment.instance() as instance:
            run = dg.DagsterRun(job_name="ingest", status=dg.DagsterRunStatus.STARTED)
            instance.add_run(run)
        deployment.overrides |= overrides
        said = deployment.sbp("to-postgres", check=False)
        assert said.returncode == 2 and f"have not ended, as {run.run_id}" in said.stderr
        with deployment.instance() as instance:
            assert instance.get_runs() == []


def test_sbp_env_serves_bare_commands_and_shows_no_password(
    postgres: PostgresServer, overrides: dict[str, str], tmp_path: Path
):
    with Deployment(tmp_path, overrides) as deployment:
        shown = deployment.sbp("env").stdout
        assert postgres.PASSWORD not in shown
        # What a user has: the URL as they wrote it, and `eval "$(sbp env)"`.
        environ = {**deployment.environ, "SBP_POSTGRES_URL": postgres.url, "DAGSTER_HOME": "", "PGOPTIONS": ""}
        script = (
            "import dagster as dg\n"
            "with dg.DagsterInstance.get() as instance:\n"
            "    print(instance.get_runs_count(), instance.info_str())"
        )
        done = subprocess.run(
            ["sh", "-c", f'eval "$({shlex.quote(sys.executable)} -m sbp_assets.cli env)"; '
             f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)}"],
            env=environ, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("0 ") and "PostgresRunStorage" in done.stdout
        assert postgres.PASSWORD not in done.stdout + done.stderr


def test_two_runs_of_a_store_exclude_each_other_across_machines(
    postgres: PostgresServer, overrides: dict[str, str], tmp_path: Path
):
    """Two machines: instance directories of their own, one store, one database."""
    shared = {**overrides, "SBP_DEPLOYMENT__DATA_DIR": str(tmp_path / "store")}
    holder = (
        "import sys\n"
        "from sbp_assets.settings import load_settings\n"
        "from sbp_assets.instance.storage import exclusive_instance\n"
        "with exclusive_instance(load_settings(), 'running `sbp run`'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()"
    )
    with Deployment(tmp_path / "one", shared) as one, Deployment(tmp_path / "two", shared) as two:
        process = subprocess.Popen(
            [sys.executable, "-c", holder], env=one.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            refused = two.sbp("run", "--until", "manifest", check=False)
            assert refused.returncode == 2
            assert "another machine is at work in schema sbp_tiny_" in refused.stderr
        finally:
            process.kill()
            process.communicate()
        two.sbp("run", "--until", "manifest")


def test_an_unreachable_database_is_a_one_line_error(overrides: dict[str, str], tmp_path: Path):
    with Deployment(
        tmp_path, {"SBP_POSTGRES_URL": "postgresql://tests:planted-password@127.0.0.1:1/none"}
    ) as deployment:
        for command in (["run"], ["env"], ["trace", "sbp_scores"]):
            done = deployment.sbp(*command, check=False)
            assert done.returncode == 2 and "Traceback" not in done.stderr
            assert "$SBP_POSTGRES_URL cannot be used" in done.stderr and "planted-password" not in done.stderr
        assert deployment.sbp("plan").returncode == 0
        branch = deployment.sbp("branch", "placebo", "synthesis.top_p=0.5", check=False)
        assert branch.returncode == 2 and "SQLite alone" in branch.stderr


def test_profile_names_are_safe_as_schemas(tmp_path: Path):
    from sbp_assets.instance.storage import schema_name

    settings = load_settings("tiny", dict(os.environ)).model_copy(update={"profile": 'a"b; drop schema public'})
    assert schema_name(settings).replace("_", "").isalnum()
