"""The instance's settings and its environment; the real servers are in operations/."""

from pathlib import Path

import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config

from sbp_assets.definitions import build_definitions
from sbp_assets.instance.home import dagster_environment, project_file, require_writable
from sbp_assets.instance.storage import POSTGRES_URL, schema_name
from sbp_assets.settings import SettingsError, load_settings

FILES = [project_file("dagster.yaml"), project_file("deploy/postgres/dagster.yaml")]


def test_both_instances_differ_in_their_storage_alone():
    sqlite, postgres = (yaml.safe_load(path.read_text()) for path in FILES)
    assert list(sqlite.pop("storage")) == ["custom"] and list(postgres.pop("storage")) == ["postgres"]
    assert sqlite == postgres


@pytest.mark.parametrize("path", FILES, ids=str)
def test_dagster_takes_every_key(path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("SBP_INSTANCE_DIR", POSTGRES_URL):
        monkeypatch.setenv(name, "postgresql://user@127.0.0.1/none")
    settings, _ = dagster_instance_config(str(path.parent))  # raises where a key is unknown
    assert settings["run_retries"]["retry_on_asset_or_op_failure"] is False


def test_everything_of_the_device_and_of_memory_is_in_a_pool():
    graph = build_definitions(load_settings("tiny", {})).resolve_asset_graph()
    pools: dict[str | None, set[str]] = {}
    for key in graph.materializable_asset_keys:
        for pool in graph.get(key).pools or {None}:
            pools.setdefault(pool, set()).add(key.to_user_string())
    assert set(pools) == {None, "device", "memory"}
    # Whatever loads a model does so on the device; a tokenizer is none.
    loads = {"huggingface", "vllm", "torch", "pytorch"}
    models = {
        key.to_user_string()
        for key in graph.materializable_asset_keys
        if graph.get(key).kinds & loads and not key.path[1].endswith(("tokens", "tokenizer"))
    }
    # A step of many shards is in the pool of its assets that need one.
    step = {key.to_user_string(): graph.get(key).assets_def.op.name for key in graph.materializable_asset_keys}
    assert pools["device"] == {name for name, op in step.items() if op in {step[model] for model in models}}
    assert "corpus/duplicates" in pools["memory"]


def test_profiles_and_stores_have_schemas_of_their_own(monkeypatch: pytest.MonkeyPatch):
    url = "postgresql://someone:planted-password@127.0.0.1:1/records"
    shown = [
        dagster_environment(load_settings(profile, {"SBP_DEPLOYMENT__DATA_DIR": store}), {POSTGRES_URL: url})
        for profile in ("tiny", "demo")
        for store in ("s3://bucket/one", "s3://bucket/two")
    ]
    assert len({variables["PGOPTIONS"] for variables in shown}) == 4
    assert "planted-password" not in str(shown)
    for variables in shown:
        assert (Path(variables["DAGSTER_HOME"]) / "dagster.yaml").samefile(FILES[1])
    settings = load_settings("tiny", {})
    assert "PGOPTIONS" not in dagster_environment(settings, {})
    # Other options stay; an earlier profile's schema, left in the environment by `sbp env`, does not.
    again = dagster_environment(settings, {POSTGRES_URL: url, "PGOPTIONS": "-c work_mem=8MB -c search_path=sbp_old_1"})
    assert again["PGOPTIONS"] == f"-c work_mem=8MB -c search_path={schema_name(settings)}"


def test_a_folder_that_is_not_there_is_tried_where_it_would_be_and_not_created(tmp_path: Path):
    keys = ("data_dir", "work_dir", "instance_dir", "tensorboard_dir")
    folders = {f"SBP_DEPLOYMENT__{key.upper()}": f"{tmp_path}/a/{key}" for key in keys}
    require_writable(load_settings("tiny", folders))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    with pytest.raises(SettingsError, match=r"deployment\.data_dir .*/a/data_dir cannot be written: Not a directory"):
        require_writable(load_settings("tiny", folders))
