"""What may import what (docs/design.md), read off the imports."""

import ast
from pathlib import Path

import pytest

import sbp_assets

ROOT = Path(sbp_assets.__file__).parent
# A package imports itself and those before it. `training` is beside the corpus: it reads token arrays alone.
LAYERS = [
    "settings",
    "dagster_support",
    "storage",
    "fan_out",
    "corpus",
    "training",
    "pairing",
    "pretraining",
    "synthesizer",
    "synthesis",
    "evaluation",
    "report",
    "pilot",
    "instance",
    "orchestration",
    "provenance",
    "definitions",
    "cli",
]
STAGES = {"corpus", "pairing", "pretraining", "synthesizer", "synthesis", "evaluation", "report"}
# Of the stages these alone import dagster; the other modules do the work and know nothing of it.
THIN = ("assets.py", "checks.py")  # What the names end with, as in quality_assets.py.
PLAIN = {
    *(f"settings/{path.name}" for path in (ROOT / "settings").glob("*.py")),
    *(
        f"storage/{name}.py"
        for name in (
            "artifacts",
            "cache",
            "columns",
            "progress",
            "prune",
            "remote",
            "paths",
            "row_versions",
            "token_arrays",
        )
    ),
    *(f"fan_out/{path.name}" for path in (ROOT / "fan_out").glob("*.py")),
    # Of training only the launching of processes knows dagster.
    *(
        f"training/{path.name}"
        for path in (ROOT / "training").glob("*.py")
        if path.name not in ("pipes.py", "trainer.py")
    ),
    "dagster_support/preview.py",
    *(f"provenance/{name}.py" for name in ("lookup", "scores", "store", "training_reads", "view", "walk")),
    *(f"pilot/{path.name}" for path in (ROOT / "pilot").glob("*.py")),
    "instance/home.py",
    "instance/open_files.py",
    "instance/storage.py",
    "instance/branch.py",
    "orchestration/prune_work.py",
    "orchestration/webhook.py",
}
INTERNALS = ROOT / "dagster_support" / "internals.py"
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return the dotted names that a module imports: modules, and names from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path} has a relative import"
            # `from sbp_assets import cli` imports a module, too.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_modules_do_not_import_dagster(path: Path):
    relative = path.relative_to(ROOT)
    in_a_stage = relative.parts[0] in STAGES and not path.name.endswith(THIN)
    if in_a_stage or relative.as_posix() in PLAIN:
        assert not {name for name in imports(path) if name.split(".")[0] == "dagster"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upwards(path: Path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    above = set(LAYERS[LAYERS.index(room) + 1 :])
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("sbp_assets.")}
    assert not imported & above


def test_dagsters_private_modules_are_reached_through_one_module():
    reaching = {path for path in MODULES if any(name.startswith("dagster._") for name in imports(path))}
    assert reaching == {INTERNALS}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Return every call in a module, with the text of what is called."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_table_is_read_by_its_path_and_never_by_a_pattern(path: Path):
    if path.name != "paths.py":
        assert not {name for name, _ in calls(path) if name in ("pl.read_parquet", "pl.scan_parquet")}
        for line in path.read_text().splitlines():
            assert "read_parquet(" not in line or "read_parquet(?, {options})" in line, "see storage/paths.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf8_whatever_the_locale(path: Path):
    for name, call in calls(path):
        if not any(keyword.arg == "encoding" for keyword in call.keywords):
            assert not name.endswith((".read_text", ".write_text")), ast.unparse(call)
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            text = not call.args or any(set(mode) <= set("rwax+t") for mode in modes)
            assert not (name.split(".")[-1] == "open" and text), ast.unparse(call)
            assert "text" not in {keyword.arg for keyword in call.keywords} or "subprocess" not in name


def test_what_dagster_reads_is_ascii():
    for name in ("dagster.yaml", "deploy/postgres/dagster.yaml", "workspace.yaml"):
        assert (ROOT.parent / name).read_bytes().isascii(), f"Dagster reads {name} in the encoding of the locale"
