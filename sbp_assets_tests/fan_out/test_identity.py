from pathlib import Path

from sbp_assets.fan_out import identity
from sbp_assets.fan_out.identity import Identity, versions
from sbp_assets_tests.tiny import tiny_settings

SHARDS = "SBP_EXPERIMENT__CORPUS__SHARDS"


def test_the_same_process_does_not_differ(tmp_path: Path):
    token = tmp_path / "token"
    token.touch()
    assert Identity(versions(), tiny_settings(tmp_path), token).differences({}) == []


def test_another_version_is_named_with_both(tmp_path: Path):
    driver = {**versions(), "numpy": "0.1", "torch": "0.2"}
    found = Identity(driver, tiny_settings(tmp_path), None).differences({})
    assert found == [
        f"numpy is {versions()['numpy']} there, and 0.1 here",
        f"torch is {versions()['torch']} there, and 0.2 here",
    ]


def test_a_changed_source_file_is_another_version(tmp_path: Path, monkeypatch):
    package = tmp_path / "sbp_assets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(identity.sbp_assets, "__file__", str(package / "__init__.py"))
    first = identity._source_version()
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("bytes of one machine")
    assert identity._source_version() == first
    (package / "prompt.txt").write_text("Write a document.")
    assert identity._source_version() != first


def test_a_node_whose_environment_sets_another_experiment_differs_and_its_value_is_not_told(tmp_path: Path):
    settings = tiny_settings(tmp_path, {"experiment.corpus.shards": 3})
    check = Identity(versions(), settings, None).differences
    assert check({SHARDS: "3"}) == []
    assert check({"SBP_DEPLOYMENT__DEVICE": "cpu", "SBP_PROFILE": "tiny"}) == []
    for value in ("7", "many"):
        (found,) = check({SHARDS: value})
        assert SHARDS in found and value not in found


def test_a_node_that_does_not_see_the_store_differs(tmp_path: Path):
    (found,) = Identity(versions(), tiny_settings(tmp_path), tmp_path / "token").differences({})
    assert f"does not see {tmp_path}" in found
