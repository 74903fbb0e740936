"""Definitions are built from settings: importing reads none, and several live in one process."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import dagster as dg

import sbp_assets
from sbp_assets.definitions import build_definitions, build_resources
from sbp_assets.pairing.embed import Embedder, Engine
from sbp_assets.settings import FiveTokensSource
from sbp_assets_tests.tiny import tiny_settings

# Seconds each, and used by a few of the assets.
ENGINES = ("torch", "transformers", "lm_eval", "datasets", "sentence_transformers", "vllm", "sklearn", "scipy.stats")
# Twice: what libraries do to the process when they are imported the first time is not this project's. The second time
# settings of this project cannot be read, nor anything be set. vLLM, which is optional, is replaced.
IMPORT_EVERYTHING = """
import importlib, logging, os, sys, warnings
from unittest import mock

def import_all():
    for name in sys.argv[1:]:
        importlib.import_module(name)

def refuse(*arguments, **options):
    raise AssertionError(f"set while a module was imported: {arguments} {options}")

def read(environment, name, of=type(os.environ).__getitem__):
    assert not name.startswith("SBP_"), f"read while a module was imported: {name}"
    return of(environment, name)

sys.modules |= dict.fromkeys(("vllm", "vllm.inputs", "vllm.sampling_params"), mock.MagicMock())
environment = dict(os.environ)
import_all()
os.environ.clear()
os.environ.update(environment)
for name in [name for name in sys.modules if name.split(".")[0] == "sbp_assets"]:
    del sys.modules[name]
type(os.environ).__getitem__ = read
type(os.environ).__setitem__ = type(os.environ).__delitem__ = type(os.environ).setdefault = refuse
os.putenv = os.unsetenv = refuse
logging.Logger.setLevel = logging.disable = logging.basicConfig = refuse
warnings.filterwarnings = warnings.simplefilter = refuse
filters = list(warnings.filters)
import_all()
assert list(warnings.filters) == filters, "a filter of warnings was set"
"""


def modules() -> list[str]:
    """Return the names of all modules of the package but those that are programs."""
    found = [info.name for info in pkgutil.walk_packages(sbp_assets.__path__, "sbp_assets.")]
    return [name for name in found if not name.endswith("__main__")]


def test_importing_a_module_reads_no_settings_and_changes_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"SBP_PROFILE": "nope"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *modules()],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_definitions_load_without_the_engines() -> None:
    code = f"import sys, sbp_assets.definitions; print([name for name in {ENGINES} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_definitions_of_other_settings_live_in_one_process(tmp_path: Path) -> None:
    tiny = build_definitions(tiny_settings(tmp_path / "one"))
    source = FiveTokensSource(documents=100)
    other = build_definitions(
        tiny_settings(tmp_path / "other", {"experiment.corpus.source": source, "experiment.corpus.shards": 3})
    )
    documents = dg.AssetKey(["corpus", "documents"])
    shards = [
        len(defs.resolve_asset_graph().get(documents).partitions_def.get_partition_keys()) for defs in (tiny, other)
    ]
    assert shards == [2, 3]
    names = [{key.name for key in defs.resolve_asset_graph().asset_check_keys} for defs in (tiny, other)]
    assert names[1] - names[0] == {"negative_control_shows_no_gain"}, (
        "what can only be checked where nothing can be learned"
    )
    manifest = dg.AssetKey(["corpus", "source_manifest"])
    for defs, folder, rows in ((tiny, "one", 2), (other, "other", 3)):
        result = defs.resolve_job_def("manifest").execute_in_process(instance=dg.DagsterInstance.ephemeral())
        [event] = result.asset_materializations_for_node("corpus__source_manifest")
        assert event.metadata["dagster/row_count"].value == rows and event.asset_key == manifest
        assert (tmp_path / folder / "data_dir/corpus/source_manifest.parquet").is_file()


class CountingEmbedder(Embedder):
    """An embedder that counts how often its model is loaded, whatever run asks for it."""

    starts = 0

    def load(self, *wanted) -> Engine:
        engine = super().load(*wanted)
        self.starts += not engine.reused
        return engine


def test_an_engine_that_the_caller_owns_serves_every_run(tmp_path: Path) -> None:
    settings, embedder = tiny_settings(tmp_path), CountingEmbedder()
    defs = build_definitions(settings, {"embedder": embedder})
    with dg.DagsterInstance.ephemeral() as instance:
        for name in ("manifest", "ingest", "deduplicate", "split", "embed"):
            job = defs.resolve_job_def(name)
            for partition in settings.experiment.shard_keys if job.partitions_def else [None]:
                assert job.execute_in_process(instance=instance, partition_key=partition).success
        assert len(instance.get_runs(dg.RunsFilter(job_name="embed"))) == len(settings.experiment.shard_keys) > 1
    assert embedder.starts == 1
    assert build_resources(settings)["embedder"] is not embedder


def test_a_code_server_can_load_them(tmp_path: Path) -> None:
    """It looks at all jobs together, which a run of one does not: their ops, say, must not have a job's name."""
    build_definitions(tiny_settings(tmp_path)).get_repository_def().load_all_definitions()
