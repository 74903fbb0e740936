"""Queries rows of artifacts in place: DuckDB over Parquet under any fsspec URL, columns and filters pushed down."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb

from sbp_assets.storage.paths import as_pattern
from sbp_assets.storage.remote import RemoteStore, is_local, root, url


@dataclass(frozen=True)
class Asset:
    """An asset of the graph: `parents` are asset keys, `partitions` is None where it has none."""

    key: str
    partitions: tuple[str, ...] | None
    parents: tuple[str, ...]
    job: str
    """The job (and step of `sbp run --until`) that materialises it."""
    directory: bool
    """Whether an artifact is a directory rather than one Parquet file."""


class NotMaterialisedError(LookupError):
    """An artifact that is needed is not in the store; the message names the asset and the job that materialises it."""


# The table of an artifact that is a directory of token arrays.
DOCUMENTS = "documents.parquet"


class Store:
    """The artifact store of a deployment, read only. `assets` says what should be in it.

    `profile` is the name or path of the profile that it belongs to, for the commands in messages.
    """

    def __init__(
        self,
        base: str,
        cache: str,
        assets: Mapping[str, Asset],
        memory_limit: str,
        cache_gb: float = 50,
        patience: float = 60,
        profile: str = "",
    ) -> None:
        self.base, self.assets, self._profile = root(base), assets, profile
        self.scratch = Path(cache)
        """The folder of this machine for copies of a remote store's artifacts, and for temporary files."""
        self.looked_in: dict[str, str] = {}
        """What was searched so far, by asset: '3 of 4 partitions'."""
        self._remote = None
        if not is_local(self.base):
            self._remote = RemoteStore(self.base, Path(cache), cache_gb * 1e9, patience)
        self._present: dict[str, list[str | None]] = {}
        self._db = duckdb.connect(config={"memory_limit": memory_limit})
        if self._remote:
            self._db.register_filesystem(self.base.fs)

    def close(self) -> None:
        """Close the database connection."""
        self._db.close()

    def present(self, asset: str) -> list[str | None]:
        """Return the partitions of `asset` that are in the store, in order; [None] for an unpartitioned one."""
        if asset not in self._present:
            partitions = self.assets[asset].partitions
            # A directory of a remote store is there when its listing is.
            suffix = ".parquet" if not self.assets[asset].directory else ".json" if self._remote else ""
            folder = self.base / asset
            if partitions is None:
                self._present[asset] = [None] if (self.base / f"{asset}{suffix}").exists() else []
            else:
                # One listing: a store may be far away and hold thousands of shards. Only partitions that exist count.
                names = {path.name for path in folder.iterdir()} if folder.exists() else set()
                self._present[asset] = [key for key in partitions if f"{key}{suffix}" in names]
            total = len(partitions or [None])
            self.looked_in[asset] = f"{len(self._present[asset])} of {total} partition{'s' if total > 1 else ''}"
        return self._present[asset]

    def missing(self, asset: str) -> str | None:
        """Return what of `asset` is missing in the store, and the job that materialises it; None where nothing is."""
        found, total = len(self.present(asset)), len(self.assets[asset].partitions or [None])
        if found == total:
            return None
        of = "" if total == 1 else f" for {total - found} of {total} partitions"
        job = self.assets[asset].job
        command = shlex.join(["sbp", "run", *(["-p", self._profile] if self._profile else []), "--until", job])
        return f"{asset} is not materialised{of}: job {job} ({command})"

    def rows(
        self, asset: str, query: str, parameters: Sequence[object] = (), partition: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of `query` over the table of `asset` (or of one partition), which the query calls `rows`.

        `rows` has a column `partition` beside the asset's own. The result is empty where nothing is materialised.
        """
        partitions = [key for key in self.present(asset) if partition is None or key == partition]
        if not partitions:
            return []
        urls = [as_pattern(self._path(asset, key)) for key in partitions]
        # The directory's name for a table inside a directory, else the file's; less what a remote store adds to it.
        named = "parse_dirpath(filename)" if self.assets[asset].directory else "filename, true"
        key = f"split_part(parse_filename({named}), '.', 1) as partition"
        # By name: shards of an older version may lack a column that others have.
        options = "filename = true, union_by_name = true, hive_partitioning = false"
        table = f"(select * exclude (filename), {key} from read_parquet(?, {options}))"
        cursor = self._db.execute(f"with rows as {table} {query}", [urls, *parameters])
        names = [column[0] for column in cursor.description or []]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def directory(self, asset: str, partition: str | None) -> Path:
        """Return the local directory of a directory artifact; one of a remote store is copied to the cache first.

        Raises NotMaterialisedError when it is not in the store.
        """
        if partition not in self.present(asset):
            raise NotMaterialisedError(self.missing(asset))
        path = self.base / asset / partition if partition else self.base / asset
        return self._remote.get(path.path, directory=True) if self._remote else Path(path.path)

    def _path(self, asset: str, partition: str | None) -> str:
        path = self.base / str(PurePosixPath(asset, partition or ""))
        if not self.assets[asset].directory:
            return f"{path}.parquet"
        return f"{url(path)}/{DOCUMENTS}"
