"""The experiment's settings and the versions that are made from them."""

import pytest
import yaml

import sbp_assets.settings
from sbp_assets.settings import PROFILES_DIR, Experiment, Section, Settings, load_settings
from sbp_assets_tests.profiles import PROFILES, load_profile

TINY = yaml.safe_load((PROFILES_DIR / "tiny.yaml").read_text())
SECTIONS = [kind for kind in vars(sbp_assets.settings).values() if isinstance(kind, type) and issubclass(kind, Section)]
VERSIONS = {
    "tiny": "1-87160428119d",
    "demo": "1-756dd992513a",
    "headline": "1-523819439a26",
    "five_tokens": "1-7769b60d6902",
    "paper_200b": "1-ab9360c03844",
    "paper_1t": "1-782338fcc513",
    "paper_1t_6b": "1-15c24eb72114",
    "text": "1-030ae524adb6",
}
"""Digests of all settings of the profiles' experiments: they change only with what a profile computes."""


def load(profile: str = "tiny", **environ: str) -> Settings:
    return load_settings(profile, environ)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_loads_to_the_same_experiment_as_ever(profile: str):
    settings = load_profile(profile)
    assert settings.profile == settings.experiment.name == profile
    version = settings.experiment.version("1", *Experiment.model_fields)
    assert version == VERSIONS.get(profile), f'if this is intended, put "{profile}": "{version}" into VERSIONS'


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_a_description(section: type[Section]):
    assert [key for key, field in section.model_fields.items() if not field.description] == []


def test_environment_overrides_single_values_and_feed_versions():
    plain, changed = load(), load(SBP_EXPERIMENT__PAIRING__NEIGHBORS="9")
    assert changed.experiment.pairing.neighbors == 9
    assert plain.experiment.version("1", "pairing") != changed.experiment.version("1", "pairing")
    assert plain.experiment.version("1", "corpus") == changed.experiment.version("1", "corpus")


def test_deployment_never_reaches_a_version():
    versions = [
        load(SBP_DEPLOYMENT__ENGINE_PROCESSES=processes).experiment.version("1", "synthesis", "model")
        for processes in ("1", "2")
    ]
    assert versions[0] == versions[1]


def test_version_of_an_unknown_key_is_an_error():
    with pytest.raises(AttributeError):
        Experiment.model_validate(TINY["experiment"]).version("1", "pairing.nothing")


def test_a_judge_is_identity_and_where_it_answers_is_not_nor_holds_it_a_key():
    environ = {"SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL": "m", "SBP_DEPLOYMENT__JUDGE_URL": "http://127.0.0.1:1/v1"}
    versions = [
        load(**environ | changed).experiment.version("1", "synthesis.judge")
        for changed in (
            {},
            {"SBP_DEPLOYMENT__JUDGE_URL": "https://judge.example/v1", "SBP_DEPLOYMENT__JUDGE_CONCURRENCY": "2"},
            {"SBP_EXPERIMENT__SYNTHESIS__JUDGE__MODEL": "other"},
        )
    ]
    assert versions[0] == versions[1] != versions[2]


def test_headline_is_the_demos_world_at_a_larger_budget():
    demo, headline = (load_settings(name, {}).experiment for name in ("demo", "headline"))
    # Rate and decay are chosen at each budget.
    own = ("seeds", "repetitions", "synthetic_share", "learning_rate", "weight_decay")
    pretraining = headline.pretraining.model_copy(update={key: getattr(demo.pretraining, key) for key in own})
    changed = {"name": demo.name, "pretraining": pretraining}
    assert headline.model_copy(update=changed) == demo
    assert len(headline.seed_keys) >= 3 and headline.pretraining.repetitions > demo.pretraining.repetitions


def test_the_tuning_seed_is_the_first_training_seed_unless_set():
    seeds = {"SBP_EXPERIMENT__PRETRAINING__SEEDS": "[3, 4]"}
    assert load(**seeds).experiment.tuning_seed == 3
    assert load(**seeds, SBP_EXPERIMENT__SYNTHESIZER__SEED="0").experiment.tuning_seed == 0
