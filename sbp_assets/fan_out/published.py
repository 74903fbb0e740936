"""Files that tasks read and publish: each whole or absent, and found again under the same inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sbp_assets.settings import Deployment
from sbp_assets.storage.artifacts import atomic_path, content_version
from sbp_assets.storage.paths import as_pattern
from sbp_assets.storage.remote import RemoteStore, is_local, root

Value = TypeVar("Value")


class LazyMapping(Mapping[str, Value]):
    """What `make` makes of each of `keys`, made when it is asked for, and every time: a corpus is not kept at once."""

    def __init__(self, keys: Iterable[str], make: Callable[[str], Value]) -> None:
        self._keys, self._make = dict.fromkeys(keys), make

    def __getitem__(self, key: str) -> Value:
        if key not in self._keys:
            raise KeyError(key)
        return self._make(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


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
    def of(cls, deployment: Deployment, name: str = "") -> PublishedFiles:
        """Return those in the folder `name` of the artifact store, or all: its artifacts, which tasks read."""
        location = f"{deployment.data_dir.rstrip('/')}/{name}".rstrip("/")
        return cls(location, f"{deployment.work_dir}/cache", deployment.cache_gb, deployment.storage_patience)

    def under(self, **inputs: str) -> PublishedFiles:
        """Return those that were made from `inputs`: {what they are: content or code version}."""
        return self._at(_digest(inputs)[:16])

    def staged_for(self, artifact: str, **inputs: str) -> PublishedFiles:
        """Return those that tasks publish of an artifact's content before it is whole, made from `inputs`.

        `artifact` is the name of one, an asset's partition, in a folder of the artifact store. They are named as an
        unfinished write of it, so that `sbp prune` removes what is left of them.
        """
        digest = _digest(inputs)
        if self._remote:
            return self._at(f"{artifact}.{digest[:16]}-{digest[16:24]}")
        return self._at(f".{artifact}.{digest[:32]}.partial")

    def _at(self, place: str) -> PublishedFiles:
        return PublishedFiles(f"{self.location.rstrip('/')}/{place}", self.cache, self.cache_gb, self.patience)

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

    def fetch(self, name: str, directory: bool = False) -> Path:
        """Return the local path of the file, or directory artifact, `name`, or of a copy, which stays until `release`.

        Raises FileNotFoundError where it is not published.
        """
        if remote := self._remote:
            return remote.get(self._path(name), directory)
        path = self._local(name)
        if not (path.is_dir() if directory else path.is_file()):
            raise FileNotFoundError(path)
        return path

    def read(self, directory: str, name: str) -> bytes:
        """Return the file `name` of a directory artifact, of which nothing else is read; raise FileNotFoundError."""
        if remote := self._remote:
            return remote.read_file(self._path(directory), name)
        return self._local(f"{directory}/{name}").read_bytes()

    def discard(self, name: str) -> None:
        """Remove the file `name`, where it is published."""
        if remote := self._remote:
            if remote.fs.exists(path := self._path(name)):
                remote.fs.rm(path)
        else:
            self._local(name).unlink(missing_ok=True)

    def release(self) -> None:
        """Allow this node's cache to evict the copies that this process has fetched."""
        if remote := self._remote:
            remote.release()

    def remove(self) -> None:
        """Remove all that are at this place: with `under` and `staged_for`, those of these inputs."""
        if remote := self._remote:
            remote.release()
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


def _digest(inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@functools.lru_cache(maxsize=64)  # a store keeps a connection and the claims of this process on its cache
def _store(location: str, cache: str, cache_gb: float, patience: float) -> RemoteStore | None:
    base = root(location)
    return None if is_local(base) else RemoteStore(base, Path(cache), cache_gb * 1e9, patience)
