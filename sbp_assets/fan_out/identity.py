"""What all nodes of a cluster have to have in common, and how one of them differs."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

import sbp_assets
from sbp_assets.settings import Settings
from sbp_assets.settings.environment import ENV_PREFIX, ENV_SEPARATOR, apply_environment

# The packages that decide bits of what tasks write.
_LIBRARIES = (
    "duckdb", "faiss-cpu", "numpy", "polars", "rensa", "scipy", "sentence-transformers", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
_EXPERIMENT = f"{ENV_PREFIX}EXPERIMENT{ENV_SEPARATOR}"


@dataclass(frozen=True)
class Identity:
    """What the nodes are compared with: versions by name, settings, and a file that all nodes see."""

    versions: Mapping[str, str]
    settings: Settings
    token: Path | None

    def differences(self, environ: Mapping[str, str] | None = None) -> list[str]:
        """Return how this process differs, one sentence each; none where it may execute tasks.

        `environ` is the environment of the process unless another is given.
        """
        own = versions()
        found = [
            f"{name} is {own.get(name, 'absent')} there, and {version} here"
            for name, version in self.versions.items()
            if own.get(name) != version
        ]
        found += _other_settings(self.settings, os.environ if environ is None else environ)
        if self.token and not self.token.exists():
            found.append(f"it does not see {self.token.parent}: mount the same folder on every node")
        return found


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that decide what a task writes: of Python, this package's source files, and the libraries."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "sbp_assets": _source_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _source_version() -> str:
    """Return the package's version and a digest of its files: a checkout changes without a new version."""
    root = Path(sbp_assets.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        place = file.relative_to(root)
        # _project: what a wheel holds beside the package.
        if file.is_file() and "__pycache__" not in place.parts and place.parts[0] != "_project":
            digest.update(place.as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    try:
        version = importlib.metadata.version("sbp-assets")
    except importlib.metadata.PackageNotFoundError:
        version = "uninstalled"
    return f"{version} ({digest.hexdigest()[:12]})"


def _other_settings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Return what `environ` sets in the experiment to another value than `settings` has; never a value itself."""
    names = sorted(name for name in environ if name.startswith(_EXPERIMENT))
    if not names:
        return []
    values = settings.model_dump(mode="json")
    try:
        wrong = apply_environment(values, {name: environ[name] for name in names}, Settings)
        same = not wrong and Settings.model_validate(values).experiment == settings.experiment
    except ValidationError:
        same = False
    return [] if same else [f"its environment sets another experiment ({', '.join(names)}): start it without"]
