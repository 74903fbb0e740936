"""Files that a run loads (models, tokenizers, checkpoints, arrays, data sets) may be of others: none may run code."""

import ast
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import sbp_assets
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.ingest import read_shard, source_manifest
from sbp_assets.corpus.tokenizer import named_tokenizer, train_tokenizer
from sbp_assets.definitions import build_definitions
from sbp_assets.evaluation import suite
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.pairing import embed
from sbp_assets.pretraining.model_files import model_problems
from sbp_assets.settings import HubSource, Model, load_settings
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.training.checkpoint import CheckpointMismatch, load_best, load_checkpoint
from sbp_assets.training.model import build_model, load_model, save_model

MODULES = sorted(Path(sbp_assets.__file__).parent.rglob("*.py"))


class Payload:
    """Unpickled, it writes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture
def mark(tmp_path: Path):
    """The file that planted code writes; it must not be there when the test ends."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


def evil_module(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model directory, as the project saves it."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["a text of few words"] * 20, 300)
    settings = Model(
        hidden_size=32, layers=1, heads=1, kv_heads=1, head_dim=32, intermediate_size=32, context_length=64
    )
    model = build_model(settings, tokenizer, 0)
    save_model(directory, model.config, model.state_dict(), tokenizer)
    return directory


@pytest.fixture
def model_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_payload_is_armed(tmp_path: Path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def pickled_weights(model_dir: Path, mark: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(mark)}, model_dir / "pytorch_model.bin")


def test_weights_that_are_pickles_are_refused(model_dir: Path, mark: Path):
    pickled_weights(model_dir, mark)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model(model_dir)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        suite.load_model(model_dir, "cpu", 1, lambda _: None, add_bos_token=True)
    assert any("missing" in problem for problem in model_problems(model_dir, model_dir))


def test_weights_beside_the_safetensors_are_not_looked_at(model_dir: Path, mark: Path):
    torch.save({"model.embed_tokens.weight": Payload(mark)}, model_dir / "pytorch_model.bin")
    assert load_model(model_dir).num_parameters() > 0


def test_code_that_comes_with_a_model_or_a_tokenizer_does_not_run(model_dir: Path, mark: Path):
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (model_dir / f"{name}.py").write_text(evil_module(mark))
    change(
        model_dir / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"},
    )
    change(
        model_dir / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]},
    )
    with pytest.raises(CorpusError, match=r"corpus\.tokenizer\.name"):
        named_tokenizer(str(model_dir))
    with pytest.raises(ValueError, match="custom code"):
        suite.load_model(model_dir, "cpu", 1, lambda _: None, add_bos_token=True)
    assert "does not load" in model_problems(model_dir, model_dir)[0]


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embed.model_path(embed.BUNDLED_MODEL), tmp_path / "embedder"))


def test_an_embedding_model_of_pickled_weights_is_refused(embedder: Path, mark: Path):
    (embedder / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": Payload(mark)}, embedder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pairing\.embedding_model .*embedder"):
        embed.Embedder().load(str(embedder), "float32", "cpu")


def test_an_embedding_model_with_code_of_its_own_is_refused(embedder: Path, mark: Path):
    (embedder / "evil.py").write_text(evil_module(mark))
    modules = json.loads((embedder / "modules.json").read_text())
    modules[1]["type"] = "evil.Pooling"
    (embedder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"pairing\.embedding_model .*embedder"):
        embed.Embedder().load(str(embedder), "float32", "cpu")


def test_a_training_checkpoint_that_is_more_than_data_is_refused(tmp_path: Path, mark: Path):
    torch.save({"fingerprint": {}, "step": Payload(mark)}, tmp_path / "checkpoint.pt")
    torch.save({"weight": Payload(mark)}, tmp_path / "best-3.pt")
    for load in (lambda: load_checkpoint(tmp_path, {}), lambda: load_best(tmp_path, 3)):
        with pytest.raises(CheckpointMismatch, match="more than tensors, numbers and strings") as refused:
            load()
        # torch itself recommends to load it all the same.
        assert "weights_only" not in str(refused.value)


def test_a_token_array_of_objects_is_refused(tmp_path: Path, mark: Path):
    write_token_arrays(tmp_path, pl.DataFrame({"id": ["a"]}), [np.arange(3)], 300)
    np.save(tmp_path / "tokens.npy", np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="does not hold token arrays"):
        TokenArrays.load(tmp_path)


def test_a_data_set_of_pickles_or_with_a_script_is_refused(tmp_path: Path, mark: Path):
    for name, write in {
        "pickles": lambda folder: (folder / "train.pkl").write_bytes(pickle.dumps(Payload(mark))),
        "script": lambda folder: (folder / "script.py").write_text(evil_module(mark)),
    }.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        source = HubSource(kind="hub", name=str(tmp_path / name))
        with Progress("test", "rows") as progress:
            manifest, _ = source_manifest(source, 1, progress)
            with pytest.raises(CorpusError, match="cannot be read"):
                read_shard(source, manifest, 0, 1, None, progress, 2**24)


@pytest.mark.parametrize(
    "name", ["local_data.py", "sbp_heldout.yaml", "evil.py", "data/evil.yaml", "__pycache__/x.pyc"]
)
def test_evaluation_tasks_that_others_wrote_are_not_run(model_dir: Path, tmp_path: Path, mark: Path, name: str):
    directory = tmp_path / "tasks"
    directory.mkdir()
    write_tasks(directory, pl.DataFrame({"id": ["a"], "text": ["a text of few words"]}))
    assert suite.evaluate(model_dir, directory, device="cpu").table["task"].unique().to_list() == ["heldout"]
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(before + (evil_module(mark) if name.endswith(".py") else "\nprocess_docs: !function evil.docs\n"))
    with pytest.raises(ValueError, match=f"{re.escape(name)} did not come from this project"):
        suite.evaluate(model_dir, directory, device="cpu")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(MODULES[0].parent)))
def test_no_module_reads_pickles_or_runs_what_it_reads(path: Path):
    tree = ast.parse(path.read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    # Tasks go to the processes of a run, and their results come back, pickled; no file is read so.
    if path.parent.name != "fan_out":
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("eval", "exec", "compile", "pd.read_pickle", "yaml.load", "yaml.unsafe_load"), name
        if name == "torch.load":
            assert given.get("weights_only") == "True"
        if name in ("np.load", "np.lib.format.read_array"):
            assert given.get("allow_pickle") == "False"
        if name == "LLM":
            assert given.get("load_format") == "'safetensors'"
        if name.endswith(".from_pretrained") and name.startswith("Auto"):
            assert given.get("trust_remote_code") == "False"
        elif name.endswith(".from_pretrained"):
            assert given.get("use_safetensors") == "True"
        assert given.get("trust_remote_code", "False") == "False"


def test_no_asset_goes_through_dagsters_pickling_io_manager():
    defs = build_definitions(load_settings("tiny", {}))
    graph = defs.resolve_asset_graph()
    for key in graph.materializable_asset_keys:
        output = defs.resolve_assets_def(key)
        assert output.get_io_manager_key_for_asset_key(key) in ("parquet", "directory"), key.to_user_string()
