"""Dockerfile and deploy/compose.yaml: their form, and every command of theirs run here as the services would run it.

No image is built or pulled: programs come from this environment and the system's packages, host names and ports of the
containers become free ports of loopback, their folders those of the test. All else is read from the files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pathspec
import pytest
import s3fs
import yaml
from sqlalchemy import create_engine, text

from sbp_assets.instance.storage import schema_name, with_driver
from sbp_assets.settings import load_settings
from sbp_assets_tests.operations.deployment import CHECKOUT, Deployment, free_port, wait_for
from sbp_assets_tests.operations.servers import PostgresServer, postgres_programs

DOCKERFILE = CHECKOUT / "Dockerfile"
COMPOSE = CHECKOUT / "deploy/compose.yaml"
PROGRAMS = Path(sys.executable).parent
SECRETS = {
    "POSTGRES_PASSWORD": PostgresServer.PASSWORD,
    "AWS_ACCESS_KEY_ID": "tests-access-key",
    "AWS_SECRET_ACCESS_KEY": "tests-secret-key",
}
OWN = ("code", "daemon", "webserver")


def read(path: Path, variables: dict[str, str]) -> dict[str, Any]:
    """A YAML file with ${VARIABLE…} replaced as Compose does; AssertionError where a required one is missing."""

    def value(match: re.Match[str]) -> str:
        name, how, otherwise = match.groups()
        assert how != ":?" or variables.get(name), f"{name}: {otherwise}"
        return variables.get(name) or (otherwise if how == ":-" else "")

    return yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?])?([^}]*)\}", value, path.read_text()))


def instruction(name: str) -> list[str]:
    """What the Dockerfile's instructions `name` say."""
    joined = DOCKERFILE.read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, flags=re.MULTILINE)


class Containers:
    """The services of compose.yaml as processes of a deployment."""

    def __init__(self, deployment: Deployment, postgres: PostgresServer) -> None:
        self.deployment = deployment
        self._ports = {port: str(free_port()) for port in ("3000", "4000", "8080")} | {"5432": str(postgres.port)}
        compose = read(COMPOSE, SECRETS | {"SBP_PROFILE": "tiny"})
        self.services: dict[str, dict[str, Any]] = self.here(compose["services"])
        deployment.port = int(self._ports["3000"])
        workspace = self.here(yaml.safe_load((CHECKOUT / "deploy/workspace.yaml").read_text()))
        (deployment.home / "workspace.yaml").write_text(yaml.safe_dump(workspace))

    def here(self, value: Any) -> Any:
        """`value` of a file of the containers with their names, ports and folders replaced by those of the test."""
        if isinstance(value, dict):
            return {key: self.here(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.here(inner) for inner in value]
        if value == "code":
            return "127.0.0.1"
        if str(value) in self._ports:
            return type(value)(self._ports[str(value)])
        if not isinstance(value, str):
            return value
        value = re.sub(r"\b(0\.0\.0\.0|postgres|s3)(?=:\d{4}\b)", "127.0.0.1", value).replace("0.0.0.0", "127.0.0.1")
        value = re.sub(r"(?<=127\.0\.0\.1:)\d{4}\b", lambda match: self._ports[match[0]], value)
        value = value.replace("/app/deploy/workspace.yaml", f"{self.deployment.home}/workspace.yaml")
        return re.sub(r"^/app(?=/)", str(CHECKOUT), re.sub(r"^/buckets", f"{self.deployment.home}/buckets", value))

    def environ(self, service: str) -> dict[str, str]:
        """All that the service gets, and the ports of programs that are given none."""
        folders = [str(PROGRAMS), *filter(None, [str(postgres_programs() or "")]), "/usr/bin", "/bin"]
        return {
            "PATH": ":".join(folders),
            "HOME": str(self.deployment.home),
            "PGPORT": self._ports["5432"],
            # The test's machine, which is busy with other tests, and no network.
            **{name: value for name, value in self.deployment.environ.items() if name.startswith(("HF_", "OMP_"))},
            **{name: str(value) for name, value in self.services[service].get("environment", {}).items()},
        }

    def start(self, service: str) -> subprocess.Popen[bytes]:
        definition = self.services[service]
        entrypoint = definition.get("entrypoint") or self.here(json.loads(instruction("ENTRYPOINT")[0]))
        command = (*entrypoint, *definition["command"])
        process = self.deployment.start(*command, log=f"{service}.log", environ=self.environ(service))
        self.wait_healthy(service, process)
        return process

    def wait_healthy(self, service: str, process: subprocess.Popen[bytes] | None = None) -> None:
        kind, *check = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"

        def healthy() -> bool:
            assert not process or process.poll() is None, self.deployment.log(f"{service}.log")
            return self.call(service, *check).returncode == 0

        wait_for(healthy, f"the health check of {service}", every=1)

    def call(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """As `docker compose exec SERVICE COMMAND`."""
        return subprocess.run(
            command, env=self.environ(service), cwd=self.deployment.home, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def containers(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """All services, started in the order that their `depends_on` asks for."""
    with Deployment(tmp_path_factory.mktemp("containers")) as deployment:
        containers = Containers(deployment, postgres)
        (volume,) = containers.services["s3"]["volumes"]
        Path(volume.partition(":")[2].replace("/buckets", f"{deployment.home}/buckets")).mkdir(parents=True)
        made = containers.services["postgres"]["environment"]
        with create_engine(with_driver(postgres.url), isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(
                text(f"create role {made['POSTGRES_USER']} login password '{made['POSTGRES_PASSWORD']}'")
            )
            connection.execute(text(f"create database {made['POSTGRES_DB']} owner {made['POSTGRES_USER']}"))
        waiting, started = {*containers.services}, set()
        while waiting:
            service = next(
                name for name in sorted(waiting) if started >= {*containers.services[name].get("depends_on", {})}
            )
            containers.wait_healthy(service) if service == "postgres" else containers.start(service)
            waiting.remove(service)
            started.add(service)
        environ = containers.environ("code")
        for name in ("SBP_POSTGRES_URL", "SBP_DEPLOYMENT__DATA_DIR"):
            deployment.overrides[name] = environ[name]
        deployment.overrides["SBP_DEPLOYMENT__INSTANCE_DIR"] = str(deployment.home / ".sbp/tiny/instance")
        yield containers


@pytest.mark.parametrize(
    "command",
    [["hadolint", str(DOCKERFILE)], ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]],
    ids=lambda command: command[0],
)
def test_the_linters_pass(command: list[str]):
    program = shutil.which(command[0], path=str(PROGRAMS))
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_webserver_is_published_and_on_loopback_alone():
    services = read(COMPOSE, SECRETS)["services"]
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "webserver": ["127.0.0.1:3000:3000"]
    }
    assert not any("network_mode" in service for service in services.values())
    assert instruction("USER")[-1] != "0" and int(instruction("USER")[-1])


def test_the_files_hold_no_secret_and_each_has_to_be_given():
    for name in SECRETS:
        with pytest.raises(AssertionError, match=rf"{name}: set it in deploy/\.env"):
            read(COMPOSE, {**SECRETS, name: ""})
    one, other = (read(COMPOSE, {name: f"{value}{i}" for name, value in SECRETS.items()}) for i in range(2))
    for name, service in one["services"].items():
        for variable, value in service["environment"].items():
            if re.search("PASSWORD|KEY|SECRET|URL", variable) and "ENDPOINT" not in variable:
                assert value != other["services"][name]["environment"][variable], f"{variable} of {name}"


def test_the_servers_are_those_of_the_tests():
    services = read(COMPOSE, SECRETS)["services"]
    version = subprocess.run([PROGRAMS / "rclone", "version"], capture_output=True, text=True, check=True).stdout
    assert services["s3"]["image"] == f"rclone/rclone:{version.split()[1].removeprefix('v')}"
    # What finds dead runs looks for their processes, which the code's server has started.
    assert services["daemon"]["pid"] == "service:code" and "hostname" not in services["code"]
    for name in OWN:
        assert services[name]["volumes"] == services["code"]["volumes"], "logs of runs are files"
        assert services[name]["environment"] == services["code"]["environment"]


def test_the_image_is_given_what_its_installation_needs(tmp_path: Path):
    """With what .dockerignore leaves of a checkout, `make install` finds its files, and the project builds."""
    ignored = pathspec.GitIgnoreSpec.from_lines((CHECKOUT / ".dockerignore").read_text().splitlines())
    kept = [path for path in CHECKOUT.iterdir() if not ignored.match_file(path.name)]
    assert not {".git", ".venv", ".sbp"} & {path.name for path in kept} and ignored.match_file("deploy/.env")
    for path in kept:
        if path.is_dir():
            shutil.copytree(path, tmp_path / "app" / path.name, ignore=shutil.ignore_patterns("__pycache__", ".env"))
        elif path.is_file():
            (tmp_path / "app").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "app")
    (install,) = (run for run in instruction("RUN") if "make install" in run)
    command = re.sub(r"--mount=\S+", "", install).split()
    subprocess.run([*command, "--dry-run"], cwd=tmp_path / "app", check=True, stdout=subprocess.DEVNULL)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), "app"]
    subprocess.run(build, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert os.access(CHECKOUT / "deploy/entrypoint.sh", os.X_OK)


def test_the_images_first_command_runs(containers: Containers):
    entrypoint, command = (json.loads(instruction(name)[0]) for name in ("ENTRYPOINT", "CMD"))
    done = containers.call("code", *containers.here(entrypoint), *command)
    assert done.returncode == 0 and "corpus/source_manifest" in done.stdout, done.stderr


def test_a_run_in_the_containers_keeps_artifacts_and_events_where_they_belong(
    containers: Containers, postgres: PostgresServer
):
    done = containers.call("code", "sbp", "run", "--until", "manifest")
    assert "[   done] Find source files" in done.stderr, done.stderr
    environ = containers.environ("code")
    store = s3fs.S3FileSystem(
        key=environ["AWS_ACCESS_KEY_ID"],
        secret=environ["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environ["AWS_ENDPOINT_URL"],
    )
    assert store.exists("sbp/tiny/corpus/source_manifest.parquet")
    name = schema_name(load_settings(environ=containers.deployment.environ))
    with create_engine(with_driver(environ["SBP_POSTGRES_URL"])).connect() as connection:
        assert connection.scalar(text(f"select count(*) from {name}.runs")) > 0


def test_a_run_launched_in_the_webserver_is_executed_by_the_code_server(containers: Containers):
    deployment = containers.deployment
    run_id = deployment.launch("ingest", "00000")
    assert deployment.wait_run(run_id) == "SUCCESS"
    with deployment.instance() as instance:
        run = instance.get_run_by_id(run_id)
    assert run
    # An address that the webserver reaches, too: it cancels there.
    (server,) = yaml.safe_load((deployment.home / "workspace.yaml").read_text())["load_from"]
    found = json.loads(run.tags[".dagster/grpc_info"])
    assert found == {key: server["grpc_server"][key] for key in ("host", "port")}
    # Its log is a file, which the webserver shows.
    assert list((deployment.home / ".sbp/tiny/instance").glob(f"**/{run_id}/compute_logs/*"))
