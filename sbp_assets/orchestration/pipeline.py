"""The pipeline as an ordered list of jobs: the shard-wise parts, each unpartitioned step, each model.

A job holds assets of one partitioning only: an unpartitioned asset inside a shard job would run again for each shard.
Steps are in the order of the data flow, so running them one after another materialises everything.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, lru_cache

import dagster as dg

from sbp_assets.settings import Settings

# `sbp run` configures its runs to log here, and shows what arrives.
DISPLAY_LOGGER = "sbp_display"


@dg.logger(None, description="Feeds the progress display of `sbp run`.")
def display_logger(_: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger that the display of `sbp run` listens to."""
    logger = logging.getLogger(DISPLAY_LOGGER)
    if not logger.handlers:  # then Python would print errors itself, with Dagster's stack traces
        logger.addHandler(logging.NullHandler())
    return logger


class NightlyPolicy(Enum):
    """Which partitions of a step's assets the nightly automation materialises."""

    NEVER = "never"
    IF_MISSING = "if missing"
    IF_NEEDED = "if needed"  # those that are missing, stale or have a failed check


@dataclass(frozen=True)
class Step:
    """One job of the pipeline: assets that are materialised together, once or once per partition."""

    name: str
    title: str
    assets: tuple[str, ...]
    nightly: NightlyPolicy = NightlyPolicy.NEVER

    @property
    def keys(self) -> list[dg.AssetKey]:
        """Return the keys of the step's assets."""
        return [dg.AssetKey(name.split("/")) for name in self.assets]

    @cached_property
    def job(self) -> dg.UnresolvedAssetJobDefinition:
        """Return the Dagster job, which runs in one process: an engine loaded for one asset serves the next."""
        return dg.define_asset_job(
            self.name,
            selection=dg.AssetSelection.assets(*self.keys),
            description=f"{self.title}: {', '.join(self.assets)}",
            executor_def=dg.in_process_executor,
        )


PIPELINE = (
    Step("manifest", "Find source files", ("corpus/source_manifest",), NightlyPolicy.IF_NEEDED),
    Step(
        "ingest",
        "Read and sign documents",
        ("corpus/raw_documents", "corpus/rejected_rows", "corpus/minhash_signatures"),
        NightlyPolicy.IF_NEEDED,
    ),
    Step("deduplicate", "Find duplicates", ("corpus/duplicates",), NightlyPolicy.IF_NEEDED),
    Step("split", "Split documents", ("corpus/documents",), NightlyPolicy.IF_NEEDED),
    # Another tokenizer re-materialises everything after it, the models included: a person decides that.
    Step("train_tokenizer", "Train the tokenizer", ("corpus/tokenizer",), NightlyPolicy.IF_MISSING),
    Step("tokenise", "Tokenise", ("corpus/tokens",), NightlyPolicy.IF_NEEDED),
    Step("embed", "Embed documents", ("pairing/embeddings",), NightlyPolicy.IF_NEEDED),
    # Once fitted to a large corpus it stays as it is; see its asset.
    Step("fit_quantizer", "Fit the quantisers", ("pairing/quantizer",), NightlyPolicy.IF_NEEDED),
    Step("index", "Index vectors", ("pairing/ann_index",), NightlyPolicy.IF_NEEDED),
    Step("search", "Search blocks of keys", ("pairing/partial_candidates",), NightlyPolicy.IF_NEEDED),
    Step("merge", "Merge neighbours", ("pairing/neighbor_candidates",), NightlyPolicy.IF_NEEDED),
    Step("filter", "Filter to edges", ("pairing/neighbor_edges",), NightlyPolicy.IF_NEEDED),
    Step("pair", "Choose pairs", ("pairing/neighbor_pairs",), NightlyPolicy.IF_NEEDED),
    Step("compare_pairs", "Compare pairs with the ground truth", ("pairing/pair_truth",), NightlyPolicy.IF_NEEDED),
    Step("format_examples", "Format tuning examples", ("synthesizer/tuning_examples",), NightlyPolicy.IF_NEEDED),
    # Models, and what measures them, are materialised when somebody asks for it.
    Step("pretrain_baseline", "Pretrain the baseline", ("pretraining/baseline_model",)),
    Step("pretrain_oracle", "Pretrain the oracle", ("pretraining/oracle_model",)),
    Step("tune_synthesizer", "Tune the synthesizer", ("synthesizer/checkpoint",)),
    Step(
        "synthesise",
        "Synthesise documents",
        ("synthesis/synthetic_documents", "synthesis/synthetic_tokens", "synthesis/quality"),
        NightlyPolicy.IF_NEEDED,
    ),
    Step("judge", "Judge a sample", ("synthesis/judgements",), NightlyPolicy.IF_NEEDED),
    Step(
        "measure_quality",
        "Measure quality and budget",
        ("synthesis/quality_table", "synthesis/novelty", "synthesis/posterior_predictive", "pretraining/token_budget"),
        NightlyPolicy.IF_NEEDED,
    ),
    Step("pretrain_sbp", "Pretrain SBP", ("pretraining/sbp_model",)),
    Step("prepare_tasks", "Prepare the evaluation", ("evaluation/tasks",)),
    Step(
        "compare_texts",
        "Look for contamination",
        ("evaluation/contamination", "evaluation/contaminated_items"),
    ),
    # A step each: what changes one arm does not score the others again.
    Step("score_baseline", "Score the baseline", ("evaluation/baseline_scores",)),
    Step("score_early_stopped", "Score the early-stopped baseline", ("evaluation/early_stopped_scores",)),
    Step("score_sbp", "Score SBP", ("evaluation/sbp_scores",)),
    Step("score_oracle", "Score the oracle", ("evaluation/oracle_scores",)),
    Step(
        "compare",
        "Compare and report",
        ("evaluation/comparison", "evaluation/training_dynamics", "evaluation/report"),
    ),
)


def _with_filter(pipeline: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the pipeline in which decisions on all synthetic documents come before the tokens of any shard."""
    steps = {step.name: step for step in pipeline}
    sampled, tasks = steps["synthesise"], steps["prepare_tasks"]
    tokens = "synthesis/synthetic_tokens"
    filtered = (
        tasks,
        replace(sampled, assets=tuple(name for name in sampled.assets if name != tokens)),
        Step("filter_synthetic", "Filter synthetic documents", ("synthesis/filter_decisions",), sampled.nightly),
        Step("tokenise_synthetic", "Tokenise synthetic documents", (tokens,), sampled.nightly),
    )
    place = pipeline.index(sampled)
    return (*pipeline[:place], *filtered, *(step for step in pipeline[place + 1 :] if step != tasks))


def _with_earlier_round(pipeline: tuple[Step, ...]) -> tuple[Step, ...]:
    """Return the pipeline in which tuning examples are made of an earlier round's pairs, too."""
    paired = Step("pair_earlier", "Pair the earlier round", ("synthesizer/earlier_pairs",), NightlyPolicy.IF_NEEDED)
    place = [step.name for step in pipeline].index("format_examples")
    return (*pipeline[:place], paired, *pipeline[place:])


@lru_cache
def _pipeline(filtered: bool, earlier_round: bool) -> tuple[Step, ...]:
    """Return the one pipeline of these options, so that there is one job of each step."""
    pipeline = _with_filter(PIPELINE) if filtered else PIPELINE
    return _with_earlier_round(pipeline) if earlier_round else pipeline


def pipeline_of(settings: Settings) -> tuple[Step, ...]:
    """Return the steps under `settings`: PIPELINE, and what a filter or an earlier round changes of it."""
    experiment = settings.experiment
    return _pipeline(experiment.synthesis.filter.drops, experiment.synthesizer.earlier_round is not None)


def pipeline_among(keys: Container[dg.AssetKey]) -> tuple[Step, ...]:
    """Return the steps of a graph that has assets of these `keys`."""
    return _pipeline(
        dg.AssetKey(["synthesis", "filter_decisions"]) in keys, dg.AssetKey(["synthesizer", "earlier_pairs"]) in keys
    )
