"""What processes that tests start find in their environment: profile tiny, with directories of this test session."""

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ["SBP_PROFILE"] = "tiny"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_root = tempfile.mkdtemp(prefix="sbp-tests-")
for _name in ("data_dir", "work_dir", "instance_dir"):
    os.environ[f"SBP_DEPLOYMENT__{_name.upper()}"] = f"{_root}/{_name}"


# How long an example takes says nothing on a machine that is busy.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="A test that is skipped has failed: for the gate.")


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
