"""What one partition of an asset is: up to date, or why not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import dagster as dg


class Status(Enum):
    """Whether a partition is up to date; every status but FRESH is called pending."""

    FRESH = "fresh"
    MISSING = "missing"
    CODE_CHANGED = "code changed"
    INPUT_CHANGED = "input changed"
    CHECK_FAILED = "check failed"
    UNCHECKED = "unchecked"


@dataclass(frozen=True)
class PartitionStatus:
    """The status of a partition with what it names: the inputs that have changed, or the check that matters most."""

    status: Status
    inputs: tuple[dg.AssetKey, ...] = ()
    check: dg.AssetCheckKey | None = None

    @property
    def is_pending(self) -> bool:
        """Return whether anything is to be done, be it only to run a check."""
        return self.status is not Status.FRESH

    @property
    def needs_materialisation(self) -> bool:
        """Return whether the partition is to be materialised; what is only unchecked needs its checks run, no more."""
        return self.status not in (Status.FRESH, Status.UNCHECKED)

    @property
    def is_stale(self) -> bool:
        """Return whether the partition was materialised by other code or settings, or from other inputs."""
        return self.status in (Status.CODE_CHANGED, Status.INPUT_CHANGED)

    def describe(self) -> str:
        """Return the status as text for people, as in 'input corpus/documents changed'."""
        names = ", ".join(key.to_user_string() for key in self.inputs)
        check = self.check.name if self.check else ""
        return {
            Status.FRESH: "up to date",
            Status.MISSING: "never materialised",
            Status.CODE_CHANGED: "code or settings changed",
            Status.INPUT_CHANGED: f"input {names} changed",
            Status.CHECK_FAILED: f"check {check} failed",
            Status.UNCHECKED: f"check {check} has not been run",
        }[self.status]


FRESH = PartitionStatus(Status.FRESH)
