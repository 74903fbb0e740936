"""Files that tasks publish for one another: each whole or absent, and found again under the same inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sbp_assets.settings import Deployment
from sbp_assets.storage.artifacts import atomic_path, content_version
from sbp_assets.storage.paths import as_pattern
from sbp_assets.storage.remote import RemoteStore, is_local, root


@dataclass(frozen=True)
class PublishedFiles:
    """Files below the folder or fsspec URL `location`, by name: it may hold slashes. An argument of a task.

    What a file is made from is part of its name (`under`), so a file that exists is one that need not be made again,
    and one of other inputs is never taken for it. Of two tasks that publish a file at the same time, both of which
    write the same bytes, either's is found, whole. `cache` is the node's own folder for copies from a remote store;
    `cache_gb` and `patience` are the settings of the deployment.
    """

    location: str
    cache: str
    cache_gb: float = 50
    patience: float = 60

    @classmethod
    def of(cls, deployment: Deployment, name: str) -> PublishedFiles:
        """Return those in the folder `name` of the artifact store."""
        location = f"{deployment.data_dir.rstrip('/')}/{name}"
        return cls(location, f"{deployment.work_dir}/cache", deployment.cache_gb, deployment.storage_patience)

    def under(self, **inputs: str) -> PublishedFiles:
        """Return those that were made from `inputs`: {what they are: content or code version}."""
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return PublishedFiles(f"{self.location.rstrip('/')}/{digest}", self.cache, self.cache_gb, self.patience)

    def exists(self, name: str) -> bool:
        """Return whether the file `name` is published. Raises StorageError where the store cannot be asked."""
        remote = self._remote
        return remote.etag(self._path(name), directory=False) is not None if remote else self._local(name).is_file()

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Yield the path of a temporary file, published as `name` when the block succeeds, replacing what is there."""
        if remote := self._remote:
            with remote.cache.temporary() as folder:
                yield (local := folder / name.rpartition("/")[2])
                remote.put(local, self._path(name), content_version(local))
        else:
            with atomic_path(self._local(name)) as temporary:
                yield temporary

    def fetch(self, name: str) -> Path:
        """Return the local path of the file `name` or of a copy; raise FileNotFoundError where it is not published."""
        if remote := self._remote:
            return remote.get(self._path(name), directory=False)
        if not (path := self._local(name)).is_file():
            raise FileNotFoundError(path)
        return path

    def remove(self) -> None:
        """Remove all of them, those of any inputs included."""
        if remote := self._remote:
            if remote.fs.exists(folder := root(self.location).path):
                remote.fs.rm(as_pattern(folder), recursive=True)
        else:
            shutil.rmtree(root(self.location).path, ignore_errors=True)

    @property
    def _remote(self) -> RemoteStore | None:
        return _store(self.location, self.cache, self.cache_gb, self.patience)

    def _local(self, name: str) -> Path:
        return Path(root(self.location).path, name)

    def _path(self, name: str) -> str:
        return f"{root(self.location).path.rstrip('/')}/{name}"


@functools.lru_cache(maxsize=64)  # a store keeps a connection and the claims of this process on its cache
def _store(location: str, cache: str, cache_gb: float, patience: float) -> RemoteStore | None:
    base = root(location)
    return None if is_local(base) else RemoteStore(base, Path(cache), cache_gb * 1e9, patience)
