"""What processes that tests start find in their environment: profile tiny, with directories of this test session."""

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ["SBP_PROFILE"] = "tiny"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_root = tempfile.mkdtemp(prefix="sbp-tests-")
for _name in ("data_dir", "work_dir", "instance_dir"):
    os.environ[f"SBP_DEPLOYMENT__{_name.upper()}"] = f"{_root}/{_name}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="A test that is skipped has failed: for the gate.")


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
