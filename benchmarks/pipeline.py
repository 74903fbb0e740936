"""Wall time of a whole experiment from nothing, per step, and its comparison: python -m benchmarks.pipeline [PROFILE].

Runs in fresh directories under a temporary folder. The last line printed is one JSON object: seconds per step, the
share of the wall time that was the assets' own work (their wall_seconds metadata), and the comparison's rows.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import parser_with_profile


def main(profile: str) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as folder:
        os.environ["SBP_PROFILE"] = profile
        for name in ("data_dir", "work_dir", "instance_dir"):
            os.environ[f"SBP_DEPLOYMENT__{name.upper()}"] = f"{folder}/{name}"
        from sbp_assets.instance.home import dagster_environment
        from sbp_assets.settings import load_settings

        settings = load_settings()
        os.environ.update(dagster_environment(settings))
        Path(settings.deployment.instance_dir).mkdir(parents=True)
        import dagster as dg
        import polars as pl

        from sbp_assets.definitions import build_definitions
        from sbp_assets.orchestration.runner import run_pipeline
        from sbp_assets.pairing.embed import Embedder
        from sbp_assets.synthesis.engine import Generator

        embedder, generator = Embedder(), Generator()
        defs = build_definitions(settings, {"embedder": embedder, "generator": generator})

        with dg.DagsterInstance.get() as instance:
            states = run_pipeline(defs, instance, {"embed": embedder.close, "synthesise": generator.close})
        wall = time.monotonic() - started
        comparison = pl.read_parquet(f"{settings.deployment.data_dir}/evaluation/comparison.parquet")
        print(
            json.dumps(
                {
                    "profile": profile,
                    "cores": os.cpu_count(),
                    "wall_seconds": round(wall, 1),
                    "own_work_share": round(sum(state.own_seconds for state in states) / wall, 3),
                    "step_seconds": {state.step.name: round(state.seconds, 1) for state in states},
                    "comparison": comparison.to_dicts(),
                }
            )
        )


if __name__ == "__main__":
    main(parser_with_profile(__doc__, "demo").parse_args().profile)
