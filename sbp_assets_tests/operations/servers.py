"""Real servers for the tests: PostgreSQL from the system's packages, and rclone's S3 server from PyPI.

Both listen on loopback, on a free port, with credentials of their own, and are gone with the test.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import s3fs

from sbp_assets_tests.operations.deployment import free_port, wait_for


def postgres_programs() -> Path | None:
    """Folder of initdb and pg_ctl, of the newest version there is; None without a server."""
    # Debian keeps them off the PATH.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("pg_ctl")
    return next(
        (path for path in reversed(folders) if (path / "pg_ctl").is_file()), Path(found).parent if found else None
    )


class PostgresServer:
    """A cluster of its own in a temporary folder; a context manager. It refuses to run as root: then as `postgres`."""

    PASSWORD = "tests-database-password"

    def __init__(self) -> None:
        programs = postgres_programs()
        assert programs is not None
        self._programs, self.port = programs, free_port()
        self._user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        # Not below pytest's folders: those are closed to other users.
        self._folder = Path(tempfile.mkdtemp(prefix="sbp-postgres-"))
        if os.geteuid() == 0:
            owner = pwd.getpwnam(self._user)
            os.chown(self._folder, owner.pw_uid, owner.pw_gid)

    def __enter__(self) -> PostgresServer:
        with tempfile.NamedTemporaryFile("w", suffix=".password") as password:
            password.write(self.PASSWORD)
            password.flush()
            if os.geteuid() == 0:
                os.chown(password.name, pwd.getpwnam(self._user).pw_uid, -1)
            self._call(
                "initdb", "-U", "tests", "-A", "scram-sha-256", "--pwfile", password.name, "--no-sync", "-E", "UTF8"
            )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"postgresql://tests:{self.PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self._folder} -c fsync=off"
        self._call("pg_ctl", "start", "-w", "-t", "120", "-l", str(self._folder / "log"), "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """`fast` ends connections in order, `immediate` is a crash."""
        self._call("pg_ctl", "stop", "-w", "-m", mode)

    def _call(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), "-D", str(self._folder / "data"), *arguments],
            user=self._user if os.geteuid() == 0 else None,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            check=True,
        )


class S3Server:
    """`rclone serve s3` on a folder, whose folders are its buckets; a context manager.

    As on S3, an object is replaced in one step, and a multipart upload is seen when it is completed.
    """

    ACCESS_KEY, SECRET_KEY = "tests-access-key", "tests-secret-key"

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "buckets").mkdir(parents=True)

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def bucket(self, name: str) -> Path:
        """Make a bucket; returns the folder that its objects appear in."""
        self._client().mkdir(name)
        return self.folder / "buckets" / name

    def remove(self, path: str) -> None:
        """Remove an object, "bucket/key": the server would not notice at once that its file is gone."""
        self._client().rm(path)

    def _client(self) -> s3fs.S3FileSystem:
        keys = {"key": self.ACCESS_KEY, "secret": self.SECRET_KEY}
        return s3fs.S3FileSystem(**keys, endpoint_url=self.environ["AWS_ENDPOINT_URL"], skip_instance_cache=True)

    @property
    def environ(self) -> dict[str, str]:
        """What its clients need, as for any S3."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self.SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Checksums of multipart uploads are computed otherwise here than on AWS.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    def start(self) -> None:
        environ = {
            **os.environ,
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_AUTH_KEY": f'"{self.ACCESS_KEY},{self.SECRET_KEY}"',
        }
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("rclone")),
                    *("serve", "s3", "--addr", f"127.0.0.1:{self.port}"),
                    str(self.folder / "buckets"),
                ],
                env=environ,
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, "the S3 server")

    def kill(self) -> None:
        """As a machine that loses its power."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False
