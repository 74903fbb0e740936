"""List what lies in a local folder, so that everything there is either a file to read or named with a reason.

fsspec's own listing takes a link to a folder for a file, enters no linked folder in a glob, leaves out a folder that
may not be listed, and says nothing of any of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from fsspec.utils import glob_translate

from sbp_assets.corpus.errors import CorpusError

Listing = tuple[list[str], dict[str, str]]
"""Files, and {what is left out: why}, both relative to the folder. A name that ends in "/" is a folder."""

HIDDEN = "hidden: its name begins with . or _"
NOT_UTF8 = "its name is not UTF-8"
NO_TARGET = "a link to nothing"
SPECIAL = "neither a file nor a folder"


def hidden(name: str) -> bool:
    """Whether the name of a file or folder marks it as none of the content (_SUCCESS, .git)."""
    return name.startswith((".", "_"))


def list_tree(base: str, is_readable: Callable[[str], bool]) -> Listing:
    """Return the files below `base`, through links, each once.

    Of several names that lead to one file the one without a link counts, else the first; only a name that `is_readable`
    makes the others superfluous. Raises CorpusError where `base` itself cannot be listed.
    """
    walk = _Walk(base, is_readable)
    walk.run()
    return walk.files, walk.left_out


def list_glob(base: str, pattern: str, is_readable: Callable[[str], bool]) -> Listing:
    """Return what of `list_tree` has a path below `base` that matches the glob `pattern`.

    A folder that matches, of which nothing else does, is left out by name: its files are not meant, or forgotten.
    Raises CorpusError where `**` is a part of a name in the pattern, or `base` cannot be listed.
    """
    try:
        matches = re.compile(glob_translate(pattern)).match
    except ValueError as error:
        raise CorpusError(f"{base}/{pattern}: {error}") from error
    depth = None if "**" in pattern else pattern.count("/") + 1
    walk = _Walk(base, is_readable, depth, lambda path: bool(matches(path)))
    walk.run()
    used = {"/".join(parts[:end]) for file in walk.files for parts in [file.split("/")] for end in range(1, len(parts))}
    unused = {f"{path}/": "a folder: end the glob in /** to read what is in it" for path in walk.matched - used}
    return walk.files, walk.left_out | unused


class _Walk:
    """Lists a tree: real folders first, then links to folders, then links to files, so that real names win."""

    def __init__(
        self,
        base: str,
        is_readable: Callable[[str], bool],
        depth: int | None = None,
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._base, self._is_readable, self._depth, self._wanted = base, is_readable, depth, wanted
        self.files: list[str] = []
        self.left_out: dict[str, str] = {}
        self.matched: set[str] = set()  # folders
        self._seen: dict[str, str] = {}  # real path of a folder: its relative one
        self._folder_links: list[str] = []
        self._file_links: list[str] = []

    def run(self) -> None:
        """Fill `files` and `left_out`."""
        self._enter("", required=True)
        while self._folder_links:
            self._folder_links.sort(reverse=True)
            path = self._folder_links.pop()
            self._enter(path)
        found, targets = set(self.files), dict[str, str]()
        for path in sorted(self._file_links):
            target = os.path.realpath(self._full(path))
            folder, _, name = target.rpartition("/")
            known = f"{self._seen[folder]}/{name}".lstrip("/") if folder in self._seen else ""
            if known not in found or not self._is_readable(known):
                known = targets.get(target, "")
            if known:
                self._leave_out(path, f"a link: it leads to {known}, which is read")
            elif self._wanted(path):
                self.files.append(path)
                if self._is_readable(path):
                    targets[target] = path

    def _full(self, path: str) -> str:
        return os.path.join(self._base, path)

    def _leave_out(self, path: str, reason: str) -> None:
        if self._wanted(path.rstrip("/")):
            self.left_out[os.fsencode(path).decode(errors="backslashreplace")] = reason

    def _enter(self, path: str, required: bool = False) -> None:
        """List a folder and the real ones below it."""
        waiting = [path]
        while waiting:
            path = waiting.pop()
            real = os.path.realpath(self._full(path))
            if real in self._seen:  # A link led to a folder above this one.
                self._leave_out(
                    f"{path}/", f"a link: it leads to {self._seen[real] or 'the folder itself'}, which is read"
                )
                continue
            self._seen[real] = path
            try:
                with os.scandir(self._full(path)) as entries:
                    for entry in entries:
                        self._take(f"{path}/{entry.name}".lstrip("/"), entry, waiting)
            except OSError as error:
                if required and not path:
                    raise CorpusError(f"{self._base} cannot be listed: {error.strerror}") from error
                self._leave_out(f"{path}/", f"it cannot be listed: {error.strerror}")

    def _take(self, path: str, entry: os.DirEntry[str], waiting: list[str]) -> None:
        """Sort an entry of a folder into what is there."""
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link in a circle
            is_folder = is_file = False
        shown = f"{path}/" if is_folder else path
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            self._leave_out(shown, NOT_UTF8)
            return
        if hidden(entry.name):
            self._leave_out(shown, HIDDEN)
        elif is_folder:
            if self._wanted(path):
                self.matched.add(path)
            if self._depth is None or path.count("/") + 1 < self._depth:
                (self._folder_links if entry.is_symlink() else waiting).append(path)
        elif not is_file:
            self._leave_out(path, SPECIAL if os.path.exists(entry.path) else NO_TARGET)
        elif entry.is_symlink():
            self._file_links.append(path)
        elif self._wanted(path):
            self.files.append(path)
