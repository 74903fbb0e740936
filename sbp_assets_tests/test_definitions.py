"""What the definitions cost every process that loads them: each run, the webserver's and the daemon's code servers."""

import subprocess
import sys

# Seconds each, and used by a few of the assets.
ENGINES = ("torch", "transformers", "lm_eval", "datasets", "sentence_transformers", "vllm", "sklearn", "scipy.stats")


def test_definitions_load_without_the_engines() -> None:
    code = f"import sys, sbp_assets.definitions; print([name for name in {ENGINES} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
