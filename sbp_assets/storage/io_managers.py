"""How artifacts are kept: tables as Parquet files, everything else as directories, under any fsspec URL.

Both managers write atomically, give each artifact a content-based data version, and hand an input annotated `dict`
to the asset as {partition key: artifact} even when there is exactly one partition.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, get_origin

import dagster as dg
import polars as pl
from dagster._core.storage.upath_io_manager import UPathIOManager
from upath import UPath

from sbp_assets.storage.artifacts import atomic_path, bytes_on_disk, content_version
from sbp_assets.storage.columns import LINEAGE


class ArtifactIOManager(UPathIOManager):
    """Common part: local staging, atomic publication, data version, dict inputs."""

    def __init__(self, base: str, cache: str) -> None:
        super().__init__(base_path=UPath(base))
        self._cache = Path(cache)
        self._bytes = 0

    @property
    def is_local(self) -> bool:
        return self._base_path.protocol in ("", "file", "local")

    @property
    def storage_options(self) -> dict[str, Any]:
        # UPathIOManager's own reads a private attribute that universal-pathlib 0.3.10 no longer has.
        return dict(self._base_path.storage_options)

    def write(self, obj: Any, path: Path) -> None:
        """Write `obj` to the local `path`, which does not exist yet."""
        raise NotImplementedError

    def read(self, path: Path) -> Any:
        """Artifact at the local `path`, as the asset receives it."""
        raise NotImplementedError

    def dump_to_path(self, context: dg.OutputContext, obj: Any, path: UPath) -> None:
        local = Path(path.path) if self.is_local else Path(tempfile.mkdtemp()) / path.name
        with atomic_path(local) as temporary:
            self.write(obj, temporary)
        version = dg.DataVersion(content_version(local))
        if context.has_asset_key:
            context.step_context.set_data_version(context.asset_key, version)
        self._bytes = bytes_on_disk(local)
        if not self.is_local:
            # A put of one object is atomic on object stores; a directory's version is recorded only after all of it.
            # Put into a directory that exists, fsspec would nest the new one inside the old.
            if self.fs.exists(path.path):
                self.fs.rm(path.path, recursive=True)
            self.fs.put(str(local), path.path, recursive=local.is_dir())
            shutil.rmtree(local.parent)

    def get_metadata(self, context: dg.OutputContext, obj: Any) -> dict[str, Any]:
        # Dagster looks for column lineage on materialisations alone, never on the asset's definition.
        lineage = {key: value for key, value in context.definition_metadata.items() if key == LINEAGE}
        return {"bytes": self._bytes, **lineage}  # called right after dump_to_path, which adds `path` itself

    def load_from_path(self, context: dg.InputContext, path: UPath) -> Any:
        if self.is_local:
            local = Path(path.path)
            if not local.exists():
                raise FileNotFoundError(
                    f"artifact {path} does not exist: materialise {context.asset_key.to_user_string()} first"
                )
            return self.read(local)
        local = self._cache / path.path.lstrip("/")
        with atomic_path(local) as temporary:
            self.fs.get(path.path, str(temporary), recursive=True)
        return self.read(local)

    def load_partitions(self, context: dg.InputContext) -> Any:
        loaded = super().load_partitions(context)
        wants_dict = get_origin(context.dagster_type.typing_type) is dict
        if wants_dict and len(context.asset_partition_keys) == 1:
            return {context.asset_partition_keys[0]: loaded}
        return loaded

    def load_input(self, context: dg.InputContext) -> Any:
        # UPathIOManager type-checks multi-partition inputs by its own rules and takes another path for exactly one.
        if context.has_asset_key and context.has_asset_partitions:
            return self.load_partitions(context)
        return super().load_input(context)


class ParquetIOManager(ArtifactIOManager):
    """Tables. Output: pl.DataFrame or pl.LazyFrame (streamed to disk). Input: pl.LazyFrame, or a dict of them."""

    extension = ".parquet"

    def write(self, obj: pl.DataFrame | pl.LazyFrame, path: Path) -> None:
        if isinstance(obj, pl.LazyFrame):
            obj.sink_parquet(path, compression="zstd")
        else:
            obj.write_parquet(path, compression="zstd")

    def read(self, path: Path) -> pl.LazyFrame:
        return pl.scan_parquet(path, glob=False)


class DirectoryIOManager(ArtifactIOManager):
    """Models, indexes, token arrays, pages. Output: Path of a finished local directory. Input: Path, or a dict."""

    def write(self, obj: Path, path: Path) -> None:
        shutil.copytree(obj, path)

    def read(self, path: Path) -> Path:
        return path
