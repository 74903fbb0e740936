"""What an artifact store holds that no current artifact needs, and its removal. Plain code: no dagster.

Nothing is taken for superfluous by its name alone. A superseded artifact is removed where its content is what was
recorded of it, an unfinished write where it has the name that this project gives one and nothing has changed in it for
a day. Everything else is named and left.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from upath import UPath

from sbp_assets.storage.artifacts import content_version, is_abandoned
from sbp_assets.storage.remote import CorruptedArtifactError, RemoteStore, Upload, uploads_of

ARTIFACTS = "superseded artifacts"
UNFINISHED = "unfinished writes"

_PARTIAL = re.compile(r"\.(?P<name>.+?)\.[0-9a-f]{32}(?P<replaced>\.replaced)?\.partial")


class Recorded(NamedTuple):
    """What was recorded of an artifact as it was materialised: its content version, and its bytes."""

    version: str
    bytes: int


@dataclass(frozen=True)
class Leftover:
    """Something that is needed no more: its kind, its path for people, its bytes, and how it is removed.

    `artifact` names the superseded artifact that it is, or is a part of, or is ''.
    """

    kind: str
    path: str
    bytes: int
    remove: Callable[[], None] = field(compare=False)
    artifact: str = ""


@dataclass
class Found:
    """The leftovers of a place, and the paths of what is there and is not this project's own.

    `changed` names superseded artifacts in whose place is something else than what was recorded; they are unknown, too.
    """

    leftovers: list[Leftover] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)


def bytes_to_free(path: Path) -> int:
    """Return the bytes of a file, or of all files of a directory, without those that have another hard link."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(s.st_size for file in files if not file.is_dir() and (s := file.lstat()).st_nlink == 1)


def is_unfinished(path: Path) -> bool:
    """Return whether `path` is an unfinished write, or removal, of a process that died."""
    return _PARTIAL.fullmatch(path.name) is not None and is_abandoned(path)


def remove(path: Path) -> None:
    """Remove a file or a directory; killed meanwhile, it leaves a directory under the name of an unfinished write."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not _PARTIAL.fullmatch(path.name):
        path = path.rename(path.parent / f".{path.name}.{uuid.uuid4().hex}.partial")
    shutil.rmtree(path)


def find_in_store(
    base: UPath,
    remote: RemoteStore | None,
    current: Mapping[str, bool],
    superseded: Mapping[str, Recorded],
    elsewhere: Collection[Path] = (),
) -> Found:
    """Return what the store at `base` (through `remote`, unless it is local) holds beside the `current` artifacts.

    Artifacts are named by their path below `base` without an ending, as in corpus/documents/00000. `current` says of
    each whether it is a directory. One of `superseded` that is none of the current ones is a leftover where it is what
    was recorded. Local folders of `elsewhere`, which belong to something else, are left out. Removes nothing. Raises
    StorageError where the store cannot be used.
    """
    superseded = {name: recorded for name, recorded in superseded.items() if name not in current}
    if remote:
        return _find_remote(remote, current, superseded)
    return _LocalSearch(Path(base.path), current, superseded, elsewhere).found


class _LocalSearch:
    def __init__(
        self,
        base: Path,
        current: Mapping[str, bool],
        superseded: Mapping[str, Recorded],
        elsewhere: Collection[Path],
    ) -> None:
        self.found = Found()
        self._base, self._recorded = base, superseded
        self._elsewhere = {path.resolve() for path in elsewhere}
        self._current = {name if directory else f"{name}.parquet" for name, directory in current.items()}
        self._superseded = {place: name for name in superseded for place in (name, f"{name}.parquet")}
        self._kept_folders = _folders(self._current)
        self._folders = self._kept_folders | _folders(self._superseded)
        if base.is_dir():
            self._visit(base)

    def _visit(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            place = path.relative_to(self._base).as_posix()
            if place in self._current or path.resolve() in self._elsewhere:
                continue
            if place in self._folders and path.is_dir():
                self._visit(path)
            elif place in self._superseded and self._is_as_recorded(path, place):
                act = partial(self._remove_artifact, path)
                name = self._superseded[place]
                self.found.leftovers.append(Leftover(ARTIFACTS, place, bytes_to_free(path), act, name))
            elif match := _PARTIAL.fullmatch(path.name):
                # Killed between two renames, a write has left the only copy of what it was to replace.
                only_copy = match["replaced"] and not (folder / match["name"]).exists()
                if is_abandoned(path) and not only_copy:
                    act = partial(remove, path)
                    self.found.leftovers.append(Leftover(UNFINISHED, place, bytes_to_free(path), act))
            else:
                self.found.unknown.append(f"{path}/" if path.is_dir() else str(path))
                self.found.changed |= {self._superseded[place]} if place in self._superseded else set()

    def _is_as_recorded(self, path: Path, place: str) -> bool:
        return not path.is_symlink() and content_version(path) == self._recorded[self._superseded[place]].version

    def _remove_artifact(self, path: Path) -> None:
        remove(path)
        for folder in path.relative_to(self._base).parents:
            if folder.as_posix() in self._kept_folders:
                break
            with suppress(OSError):  # it holds something else
                (self._base / folder).rmdir()


def _folders(places: Collection[str]) -> set[str]:
    return {folder.as_posix() for place in places for folder in PurePosixPath(place).parents}


def _find_remote(store: RemoteStore, current: Mapping[str, bool], superseded: Mapping[str, Recorded]) -> Found:
    found, objects = Found(), store.objects()
    # Tables, too: what tasks stage for one is named as the files of a directory.
    uploaded = current.keys() | superseded.keys()
    kept = {f"{name}.json" if directory else f"{name}.parquet" for name, directory in current.items()}
    tables = {f"{name}.parquet": name for name in superseded}
    listings = {f"{name}.json": name for name in superseded}
    uploads: defaultdict[str, defaultdict[Upload, list[str]]] = defaultdict(lambda: defaultdict(list))

    def leftover(kind: str, place: str, places: list[str], artifact: str = "") -> None:
        act = partial(_remove_objects, store, places)
        found.leftovers.append(Leftover(kind, place, sum(objects[one] for one in places), act, artifact))

    def unknown(place: str) -> None:
        found.unknown.append(str(store.base / place))

    for place, size in objects.items():
        if place in kept or place in listings:
            continue
        upload = next((upload for upload in uploads_of(place) if upload.name in uploaded), None)
        if upload:
            uploads[upload.name][upload].append(place)
        elif place in tables and superseded[tables[place]].bytes == size:
            leftover(ARTIFACTS, place, [place], tables[place])
        else:
            unknown(place)
            found.changed |= {tables[place]} if place in tables else set()
    for name, files in uploads.items():
        listing = [f"{name}.json"] if f"{name}.json" in objects else []
        needed = _listed(store, name, files.keys()) if listing else set()
        if name in superseded:
            as_recorded = {upload for upload in files if upload.version == superseded[name].version}
            if as_recorded and needed <= as_recorded:
                needed = needed or as_recorded
                # First what readers follow.
                leftover(ARTIFACTS, name, listing + [file for upload in needed for file in files[upload]], name)
        for upload in files.keys() - needed:
            if store.abandoned(store.path_of(upload.prefix)):
                leftover(UNFINISHED, upload.prefix, files[upload])
    removed = {one.artifact for one in found.leftovers}
    for place, name in listings.items():
        if place in objects and name not in removed:
            unknown(place)
            found.changed.add(name)
    return found


def _listed(store: RemoteStore, name: str, uploads: Collection[Upload]) -> set[Upload]:
    """Return the upload that the listing of the artifact `name` names; all of them where that cannot be said."""
    if len(uploads) > 1:
        with suppress(CorruptedArtifactError):
            prefix = store.etag(store.path_of(name), directory=True)
            return {upload for upload in uploads if store.path_of(upload.prefix) == prefix} or set(uploads)
    return set(uploads)


def _remove_objects(store: RemoteStore, places: Sequence[str]) -> None:
    for place in places:
        store.remove(store.path_of(place))
