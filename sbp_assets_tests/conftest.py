"""The environment of the tests, and of processes that they start: profile tiny, with directories of this session."""

import gc
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

ENVIRONMENT = {
    "SBP_PROFILE": "tiny",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# How long an example takes says nothing on a machine that is busy.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# What tests import stays. To look through it for garbage again and again was 8 of the 21 seconds of the processor that
# collecting all tests took in each worker.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="A test that is skipped has failed: for the gate.")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before test modules are imported, and restore it when the session ends."""
    environment = pytest.MonkeyPatch()
    config.add_cleanup(environment.undo)
    root = tempfile.TemporaryDirectory(prefix="sbp-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(root.cleanup)
    for name, value in ENVIRONMENT.items():
        environment.setenv(name, value)
    for name in ("data_dir", "work_dir", "instance_dir"):
        environment.setenv(f"SBP_DEPLOYMENT__{name.upper()}", f"{root.name}/{name}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that take long come first, so that none is left to run alone at the end.

    For pytest-xdist, which gives out files in this order with --no-loadscope-reorder.
    """
    long = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    return _without_skips(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    return _without_skips(collector.config, (yield))


def _without_skips(config: pytest.Config, report):
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("--fail-on-skip"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome, report.longrepr = "failed", f"--fail-on-skip: {reason}"
    return report
