"""Commands in folders whose names are patterns, quotes or comments elsewhere; the whole run is that of `finished`."""

import subprocess
import sys
from pathlib import Path

from sbp_assets_tests.operations.conftest import FINISHED
from sbp_assets_tests.operations.deployment import Deployment


def test_every_command_works_below_a_folder_of_any_name(finished: Path, tmp_path: Path):
    deployment = Deployment(tmp_path / FINISHED, finished=finished)
    assert "nothing to do" in deployment.sbp("run").stdout
    assert "deduplicate" not in deployment.sbp("verify", "deduplicate").stdout
    assert "sbp_model" in deployment.sbp("trace", "heldout/perplexity/sbp/0").stdout
    copied = deployment.sbp("copy-artifacts", str(tmp_path / "copy [1]?")).stdout
    # The instance keeps its folder: a question mark ends the URL of an SQLite database, and is refused there.
    deployment.overrides |= {
        "SBP_DEPLOYMENT__DATA_DIR": str(tmp_path / "copy [1]?"), "SBP_DEPLOYMENT__WORK_DIR": str(tmp_path / "work?*"),
        "SBP_EXPERIMENT__CORPUS__DEDUP__THRESHOLD": "0.79",
    }  # fmt: skip
    assert "copied" in copied and "Find duplicates" in deployment.sbp("run", "--until", "deduplicate").stdout
    assert deployment.versions("corpus/duplicates") == Deployment(finished).versions("corpus/duplicates")


def test_a_folder_that_sqlite_cannot_have_is_refused_with_the_reason(tmp_path: Path):
    (folder := tmp_path / "exp?1").mkdir()
    deployment = Deployment(tmp_path / "home")
    environ = {name: text for name, text in deployment.environ.items() if not name.startswith("SBP_DEPLOYMENT__")}
    command = [sys.executable, "-m", "sbp_assets.cli", "run", "-p", "tiny"]
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "deployment.instance_dir" in done.stderr and "SQLite" in done.stderr
    assert not list(folder.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp?1", "home"]
