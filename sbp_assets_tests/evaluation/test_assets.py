"""The evaluation assets' versions; materialised together with the report, they are in report/test_assets.py."""

from pathlib import Path

from sbp_assets.evaluation import assets
from sbp_assets.evaluation.benchmarks import data_version
from sbp_assets_tests.tiny import tiny_settings


def test_the_tasks_version_holds_that_of_the_benchmark_data(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    (version,) = assets.tasks(settings).code_versions_by_key.values()
    assert version and version.endswith(f"-{data_version(settings.experiment.evaluation.benchmarks, None)}")
