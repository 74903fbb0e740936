"""Store artifacts: tables as Parquet files, everything else as directories, under any fsspec URL.

Both managers write atomically, give each artifact a content-based data version, and hand an input annotated `dict`
to the asset as {partition key: artifact} even when there is exactly one partition. An input annotated `Path`, or
`dict[str, Path]`, is the local path of the artifact, or of a copy of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args, get_origin

import dagster as dg
import polars as pl
from upath import UPath

from sbp_assets.settings import Deployment
from sbp_assets.storage.artifacts import atomic_path, bytes_on_disk, content_version, release_staging
from sbp_assets.storage.column_metadata import LINEAGE
from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.remote import RemoteStore, is_local, root


def takes_paths(annotation: Any) -> bool:
    """Return whether an input of this type, `Path` or `dict[str, Path]`, is the local path of each artifact."""
    return annotation is Path or (get_origin(annotation) is dict and get_args(annotation)[1] is Path)


class ArtifactIOManager(dg.UPathIOManager):
    """What both managers share: local staging, atomic publication, data versions and dict inputs."""

    def __init__(self, base: str, cache: str, cache_gb: float = 50, patience: float = 60) -> None:
        super().__init__(base_path=root(base))
        self._cache = Path(cache)
        self._remote = None if self.is_local else RemoteStore(self._base_path, self._cache, cache_gb * 1e9, patience)
        self._run_id = ""
        self._metadata: dict[str, Any] = {}

    @property
    def is_local(self) -> bool:
        """Return whether the store is on a file system of this machine."""
        return is_local(self._base_path)

    @property
    def storage_options(self) -> dict[str, Any]:
        # dg.UPathIOManager's own reads a private attribute that universal-pathlib 0.3.10 no longer has.
        return dict(self._base_path.storage_options)

    def write(self, obj: Any, path: Path) -> None:
        """Write `obj` to the local `path`, which does not exist yet."""
        raise NotImplementedError

    def read(self, path: Path) -> Any:
        """Return the artifact at the local `path` as an asset receives it."""
        raise NotImplementedError

    def make_directory(self, path: UPath) -> None:
        """Create a local directory. Object stores have none, and s3fs would create a bucket for a mistyped name."""
        if self.is_local:
            super().make_directory(path)

    def dump_to_path(self, context: dg.OutputContext, obj: Any, path: UPath) -> None:
        version, self._metadata = self._publish(obj, path, context.definition_metadata)
        # Recorded only once all of it is in the store.
        if context.has_asset_key:
            context.step_context.set_data_version(context.asset_key, dg.DataVersion(version))

    def get_metadata(self, context: dg.OutputContext, obj: Any) -> dict[str, Any]:
        return self._metadata  # called right after dump_to_path

    def save(
        self, key: dg.AssetKey, partition: str | None, obj: Any, definition_metadata: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """Write `obj`, as an asset returns it, to the store; return its content version and metadata to record.

        `definition_metadata` is that of the asset.
        """
        path = self._path_of(key, partition)
        self.make_directory(path.parent)
        return self._publish(obj, path, definition_metadata)

    def _publish(self, obj: Any, path: UPath, definition_metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        with ExitStack() as stack:
            if self._remote is None:
                local, published = Path(path.path), str(path)
                with atomic_path(local) as temporary:
                    self.write(obj, temporary)
            else:
                local = stack.enter_context(self._remote.cache.temporary()) / path.name
                self.write(obj, local)
            version, size = content_version(local), bytes_on_disk(local)
            if self._remote:
                published = self._remote.put(local, path.path, version)
        # Dagster looks for column lineage on materialisations alone, never on the asset's definition.
        lineage = {key: value for key, value in definition_metadata.items() if key == LINEAGE}
        return version, {"bytes": size, "path": dg.MetadataValue.path(published), **lineage}

    def load_from_path(self, context: dg.InputContext, path: UPath) -> Any:
        if self._remote and context.step_context.run_id != self._run_id:
            # One process may do many runs; what an earlier one read may leave the cache.
            self._run_id = context.step_context.run_id
            self._remote.release()
        local = self._fetch(context.asset_key, path)
        return local if takes_paths(context.dagster_type.typing_type) else self.read(local)

    def load(self, key: dg.AssetKey, partition: str | None = None) -> Any:
        """Return the artifact of `key` as an asset's input: Dagster gives a partitioned check its own shard alone."""
        return self.read(self.fetch(key, partition))

    def stored_version(self, key: dg.AssetKey, partition: str | None = None) -> str:
        """Return the content version of what the store holds now; raise FileNotFoundError when it holds nothing."""
        return content_version(self.fetch(key, partition))

    def fetch(self, key: dg.AssetKey, partition: str | None = None) -> Path:
        """Return the local path of the artifact or of a copy; raise FileNotFoundError when the store has none."""
        return self._fetch(key, self._path_of(key, partition))

    def put(self, key: dg.AssetKey, partition: str | None, artifact: Path, version: str) -> None:
        """Put the file or directory `artifact` in the store unchanged; `version` is its content version.

        A reader sees either all of it or what was there before.
        """
        path = self._path_of(key, partition)
        if self._remote:
            self._remote.put(artifact, path.path, version)
        else:
            self.make_directory(path.parent)
            with atomic_path(Path(path.path)) as temporary:
                if artifact.is_dir():
                    shutil.copytree(artifact, temporary)
                else:
                    shutil.copyfile(artifact, temporary)

    def etag(self, key: dg.AssetKey, partition: str | None = None) -> str | None:
        """Return a tag that changes when the artifact is replaced, found without reading it; None when it is absent.

        Locally it is made of inode and modification time.
        """
        path = self._path_of(key, partition)
        if self._remote:
            return self._remote.etag(path.path, directory=self.extension is None)
        try:
            status = Path(path.path).stat()
        except FileNotFoundError:
            return None
        return f"{status.st_ino} {status.st_mtime_ns}"

    def release(self) -> None:
        """Allow copies of what was fetched to be removed from the cache."""
        if self._remote:
            self._remote.release()

    def _path_of(self, key: dg.AssetKey, partition: str | None) -> UPath:
        """Return the artifact's path, the one that dg.UPathIOManager derives from a run's context.

        It is derived from key and partition alone: `build_input_context` creates an ephemeral instance with two
        databases, 48 ms of processor time for each shard that a check or an index reads.
        """
        path = self._base_path.joinpath(*key.path)
        return self._with_extension(self.make_safe_partition_path(path, partition) if partition else path)

    def _fetch(self, key: dg.AssetKey, path: UPath) -> Path:
        """Return the local path of an artifact: its own, or that of a fresh copy in the cache."""
        local = Path(path.path)
        try:
            if self._remote:
                return self._remote.get(path.path, directory=self.extension is None)
            local.stat()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"artifact {path} does not exist: materialise {key.to_user_string()} first"
            ) from None
        return local

    def load_partitions(self, context: dg.InputContext) -> Any:
        loaded = super().load_partitions(context)
        wants_dict = get_origin(context.dagster_type.typing_type) is dict
        if wants_dict and len(context.asset_partition_keys) == 1:
            return {context.asset_partition_keys[0]: loaded}
        return loaded

    def load_input(self, context: dg.InputContext) -> Any:
        # dg.UPathIOManager type-checks multi-partition inputs by its own rules and takes another path for exactly one.
        if context.has_asset_key and context.has_asset_partitions:
            return self.load_partitions(context)
        return super().load_input(context)


class ParquetIOManager(ArtifactIOManager):
    """Tables. Output: pl.DataFrame, pl.LazyFrame (streamed to disk), or Path of a Parquet file, which is copied.

    Input: pl.LazyFrame, or a dict of them.
    """

    extension = ".parquet"

    def write(self, obj: pl.DataFrame | pl.LazyFrame | Path, path: Path) -> None:
        if isinstance(obj, Path):
            shutil.copyfile(obj, path)
        elif isinstance(obj, pl.LazyFrame):
            obj.sink_parquet(path, compression="zstd")
        else:
            obj.write_parquet(path, compression="zstd")

    def read(self, path: Path) -> pl.LazyFrame:
        return scan_table(path)


class DirectoryIOManager(ArtifactIOManager):
    """Models, indexes, token arrays, pages. Output: Path of a finished local directory. Input: Path, or a dict."""

    def write(self, obj: Path, path: Path) -> None:
        shutil.copytree(obj, path)

    def _publish(self, obj: Path, path: UPath, definition_metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        published = super()._publish(obj, path, definition_metadata)
        release_staging(obj)
        return published

    def read(self, path: Path) -> Path:
        return path


class ArtifactStore:
    """An artifact store: its IO managers, which share one place and one cache."""

    def __init__(self, deployment: Deployment) -> None:
        """Open the store of `deployment`, whose data_dir is a path or fsspec URL."""
        settings = deployment.data_dir, f"{deployment.work_dir}/cache", deployment.cache_gb, deployment.storage_patience
        self.parquet, self.directory = ParquetIOManager(*settings), DirectoryIOManager(*settings)

    @property
    def resources(self) -> dict[str, ArtifactIOManager]:
        """Return the IO managers by resource key."""
        return {"parquet": self.parquet, "directory": self.directory}

    def managers(self, io_manager_keys: Mapping[dg.AssetKey, str]) -> dict[dg.AssetKey, ArtifactIOManager]:
        """Return what reads and writes each asset's artifacts in this store, given the keys of their IO managers."""
        return {key: self.resources[name] for key, name in io_manager_keys.items()}
