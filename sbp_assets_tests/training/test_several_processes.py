"""Two processes draw the curve of one.

They start once, for all that they train: each of torchrun's three processes takes seven seconds to import torch and
transformers, and the training one.
"""

import os
import subprocess
from pathlib import Path

import polars as pl
import pytest
import torch

from sbp_assets.training.launch import training_command, training_environment
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import TrainingSpec
from sbp_assets_tests.training.conftest import make_spec, with_optimizer

pytestmark = pytest.mark.processes

# How each is trained in two processes: data parallel, and with weights and optimizers sharded.
WAYS = {
    "data": {},
    "shards": {"sharding": "full"},
    "shards of checkpointed and compiled layers": {
        "sharding": "full", "activation_checkpointing": True, "compile": True,
    },
}  # fmt: skip
# Muon computes its updates in bfloat16.
CASES = [
    ("adamw", "data", 1e-4), ("adamw", "shards", 1e-4), ("adamw", "shards of checkpointed and compiled layers", 1e-4),
    ("muon", "data", 2e-2), ("muon", "shards", 2e-2),
]  # fmt: skip

TRAIN_ALL = """
import sys
from pathlib import Path
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import open_world
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.worker import write_output
specs = [TrainingSpec.read(Path(name)) for name in sys.argv[1:]]
with open_world(specs[0]) as world:
    for spec in specs:
        trained = train(spec, world)
        if world.leads:
            write_output(spec, world, trained)
        world.barrier()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def alone(root: Path, corpus: Path, tokenizer_dir: Path) -> dict[str, TrainingSpec]:
    """What is trained, by the optimizer's method."""
    spec = make_spec(root, corpus, tokenizer_dir)
    return {method: with_optimizer(spec, method=method) for method in ("adamw", "muon")}


@pytest.fixture(scope="module")
def curves(root: Path, alone: dict[str, TrainingSpec]) -> dict[tuple[str, str], pl.DataFrame]:
    """The curve of each case, of one start of torchrun."""
    specs = {}
    for method, way, _ in CASES:
        folder = root / f"{method} {way}"
        folders = {"work_dir": folder / "work", "output_dir": folder / "model"}
        specs[method, way] = alone[method].model_copy(update=WAYS[way] | folders)
    files = [spec.write(root / f"{number}.json") for number, spec in enumerate(specs.values())]
    (root / "train_all.py").write_text(TRAIN_ALL)
    *torchrun, _, _, _ = training_command(files[0], processes=2)
    command = [*torchrun, str(root / "train_all.py"), *map(str, files)]
    done = subprocess.run(
        command, env={**os.environ, **training_environment()}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {case: pl.read_parquet(spec.output_dir / "metrics.parquet") for case, spec in specs.items()}


@pytest.mark.parametrize(("method", "way", "tolerance"), CASES)
def test_two_processes_draw_the_curve_of_one(
    curves: dict[tuple[str, str], pl.DataFrame], alone: dict[str, TrainingSpec], method: str, way: str, tolerance: float
):
    usual = train(alone[method], World(torch.device("cpu")))
    assert usual is not None
    for column in ("train_loss", "heldout_loss", "gradient_norm"):
        difference = (usual.metrics[column] - curves[method, way][column]).drop_nulls().abs()
        assert len(difference) and difference.max() < tolerance, column
