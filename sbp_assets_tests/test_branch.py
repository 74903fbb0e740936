"""Branches of a finished store."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.branch import make_branch, override, parse_changes
from sbp_assets.experiment import Settings, SettingsError, load_settings
from sbp_assets.storage.artifacts import atomic_path, exclusive


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    names = ("data_dir", "work_dir", "instance_dir")
    directories = {f"SBP_DEPLOYMENT__{name.upper()}": str(tmp_path / "own" / name) for name in names}
    settings = load_settings("tiny", directories)
    for folder in (tmp_path / "own/data_dir/stage", tmp_path / "own/instance_dir/history"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("first")
    return settings


def test_a_branch_shares_artifacts_until_one_is_replaced(settings: Settings) -> None:
    made = make_branch(settings, "placebo")
    own = Path(settings.deployment.data_dir) / "stage/file"
    branched = Path(made["SBP_DEPLOYMENT__DATA_DIR"]) / "stage/file"
    assert branched.samefile(own)
    with atomic_path(branched) as temporary:
        temporary.write_text("second")
    assert own.read_text() == "first" and branched.read_text() == "second"
    # Made once: what a branch has made stays.
    assert make_branch(settings, "placebo") == made and branched.read_text() == "second"
    assert load_settings("tiny", made).deployment.data_dir == made["SBP_DEPLOYMENT__DATA_DIR"]


def test_records_are_copied_not_shared(settings: Settings) -> None:
    instance = Path(make_branch(settings, "placebo")["SBP_DEPLOYMENT__INSTANCE_DIR"])
    assert not (instance / "history/file").samefile(Path(settings.deployment.instance_dir) / "history/file")
    assert not (instance / "lock").exists()


def test_what_cannot_be_branched(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="letters"):
        make_branch(settings, "../up")
    with exclusive(Path(settings.deployment.instance_dir), "running"), pytest.raises(RuntimeError, match="branching"):
        make_branch(settings, "placebo")
    remote = load_settings("tiny", {"SBP_DEPLOYMENT__DATA_DIR": "s3://bucket/x"})
    with pytest.raises(SettingsError, match="local"):
        make_branch(remote, "placebo")
    empty = load_settings("tiny", {"SBP_DEPLOYMENT__DATA_DIR": os.devnull})
    with pytest.raises(SettingsError, match="sbp run"):
        make_branch(empty, "placebo")


@given(
    st.one_of(st.floats(0.01, 0.9), st.integers(), st.sampled_from(["none", "random", "null"]), st.lists(st.integers()))
)
def test_overrides_read_back_as_given(value: object) -> None:
    name, text = override("synthesis.top_p", value)
    assert name == "SBP_EXPERIMENT__SYNTHESIS__TOP_P" and yaml.safe_load(text) == value


def test_changes_are_key_value_pairs() -> None:
    assert parse_changes(["synthesizer.epochs=2", "pretraining.seeds=[0, 1]", "synthesis.salt=a=b"]) == {
        "synthesizer.epochs": 2, "pretraining.seeds": [0, 1], "synthesis.salt": "a=b",
    }  # fmt: skip
    for wrong in ("synthesizer.epochs", "=2", "synthesis.salt={"):
        with pytest.raises(SettingsError):
            parse_changes([wrong])
