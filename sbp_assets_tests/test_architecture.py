"""The rules of the house, read off the imports."""

import ast
from pathlib import Path

import pytest

import sbp_assets

ROOT = Path(sbp_assets.__file__).parent
STAGES = ["corpus", "pairing", "pretraining", "synthesizer", "synthesis", "evaluation"]
THIN = {"assets.py", "checks.py"}
DAGSTER = {
    "definitions.py",
    "automation.py",
    "partitions.py",
    "pipes.py",
    "run.py",
    "launcher.py",
    "cli.py",
    "copy_artifacts.py",
    "storage/io_managers.py",
    "storage/columns.py",
    "provenance/records.py",
    "staleness.py",
    "nightly.py",
    "sensors.py",
    "to_postgres.py",
}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_modules_do_not_import_dagster(path: Path):
    if path.name in THIN or str(path.relative_to(ROOT)) in DAGSTER:
        return
    bad = {name for name in imports(path) if name.split(".")[0] == "dagster" or name == "sbp_assets.partitions"}
    assert not bad


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_stage_imports_a_later_one(path: Path):
    stage = path.relative_to(ROOT).parts[0]
    if stage in ("storage", "training"):
        later = STAGES if stage == "storage" else STAGES[1:]
    elif stage in STAGES:
        later = STAGES[STAGES.index(stage) + 1 :]
    else:
        return
    bad = {name for name in imports(path) for other in later if name.startswith(f"sbp_assets.{other}")}
    assert not bad
