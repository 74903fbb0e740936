"""Typed settings: what is computed (`Experiment`) and where and how it runs (`Deployment`).

`Experiment` values change what an artifact *is*, so they feed asset code versions. `Deployment` values never do.
`load_settings` reads a profile and applies environment overrides such as `SBP_EXPERIMENT__CORPUS__SHARDS=8`.
"""

from sbp_assets.settings.corpus import (
    ConceptsSource,
    Corpus,
    Dedup,
    FilesSource,
    FiveTokensSource,
    HubSource,
    Split,
    Tokenizer,
)
from sbp_assets.settings.deployment import Deployment
from sbp_assets.settings.environment import OTHER_VARIABLES, as_text, variable
from sbp_assets.settings.experiment import (
    Contamination,
    Evaluation,
    Experiment,
    Filter,
    Judge,
    Model,
    Optimizer,
    Pairing,
    Pretraining,
    Synthesis,
    Synthesizer,
)
from sbp_assets.settings.loading import (
    DEFAULT_PROFILE,
    PROFILES_DIR,
    Settings,
    load_settings,
    profile_path,
)
from sbp_assets.settings.section import (
    Fraction,
    Section,
    SettingsError,
)

__all__ = [
    "DEFAULT_PROFILE",
    "OTHER_VARIABLES",
    "PROFILES_DIR",
    "ConceptsSource",
    "Contamination",
    "Corpus",
    "Dedup",
    "Deployment",
    "Evaluation",
    "Experiment",
    "FilesSource",
    "Filter",
    "FiveTokensSource",
    "Fraction",
    "HubSource",
    "Judge",
    "Model",
    "Optimizer",
    "Pairing",
    "Pretraining",
    "Section",
    "Settings",
    "SettingsError",
    "Split",
    "Synthesis",
    "Synthesizer",
    "Tokenizer",
    "as_text",
    "load_settings",
    "profile_path",
    "variable",
]
