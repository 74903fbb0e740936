"""The extra installs Ray, and the lock holds all that it needs."""

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from sbp_assets_tests.test_install import dependencies, pins


def test_the_lock_holds_all_that_the_extra_needs():
    pytest.importorskip("ray")
    locked = pins("cpu") | pins("ray")
    assert dependencies(["ray[default]", "dagster-ray"]) <= locked.keys()
    for name in pins("ray"):
        assert locked[name].specifier.contains(importlib.metadata.version(name)), name


def test_nothing_that_ray_needs_is_refused_by_the_version_that_is_locked():
    pytest.importorskip("ray")
    locked = pins("cpu") | pins("ray")
    for name in dependencies(["ray[default]"]):
        for line in importlib.metadata.distribution(name).requires or []:
            needed = Requirement(line)
            if (needed.marker is None or needed.marker.evaluate({"extra": ""})) and needed.name.lower() in locked:
                (specifier,) = locked[needed.name.lower()].specifier
                assert needed.specifier.contains(specifier.version, prereleases=True), (name, line)


def test_the_run_launcher_of_dagster_ray_loads_beside_it():
    pytest.importorskip("ray")
    from dagster_ray import RayRunLauncher
    from ray.job_submission import JobSubmissionClient

    assert RayRunLauncher.config_type() and JobSubmissionClient
