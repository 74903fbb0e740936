"""`sbp pilot`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.cli.profile import Profile, activate
from sbp_assets.cli.run import materialise
from sbp_assets.instance.home import activate_instance, require_writable
from sbp_assets.instance.storage import POSTGRES_URL, prepare_instance
from sbp_assets.settings import Settings

SYNTHETIC_DOCUMENTS = 300


def pilot(
    profile: Profile = None,
    documents: Annotated[int, typer.Option(help="Documents of the sample.", min=100, max=20_000)] = 3000,
    tune: Annotated[
        bool, typer.Option("--tune", help="Also train a baseline, tune a synthesizer, and look at what it writes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all figures.")] = False,
) -> None:
    """Say from a sample of the corpus whether SBP is worth it there, and what would have to change.

    Everything is kept in a store of its own beside deployment.work_dir, and called again it resumes; --tune takes as
    long as the steps pretrain_baseline and tune_synthesizer of `sbp run`.
    """
    settings = activate(profile, instance=False)
    require_writable(settings, ["work_dir"])
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars would tear the display
    os.environ.pop(POSTGRES_URL, None)  # that database is the user's own
    from sbp_assets.corpus.errors import CorpusError
    from sbp_assets.pilot.figures import pairing_figures, tuning_figures
    from sbp_assets.pilot.sample import HELDOUT, HELDOUT_OF_TUNING, draw, pilot_settings, write
    from sbp_assets.pilot.table import as_json as to_json
    from sbp_assets.pilot.table import render
    from sbp_assets.pilot.verdict import judge
    from sbp_assets.synthesis.engine import head_size_problem

    deployment, experiment = settings.deployment, settings.experiment
    if tune and (
        problem := head_size_problem(experiment.model.head_dim, deployment.generation_engine, deployment.device)
    ):
        raise CommandError(problem)
    home = Path(f"{deployment.work_dir}.pilot")
    try:
        sample = draw(experiment.corpus, documents)
        expected = expected_documents(settings, sample.read if sample.whole else None)
    except CorpusError as error:
        raise CommandError(str(error)) from None
    write(sample, home)
    own = pilot_settings(settings, home / "pairing", home, 1 - HELDOUT, HELDOUT)
    _materialise(own, "pair", [])
    figures = {"profile": settings.profile, **pairing_figures(settings, own, sample, expected)}
    if tune:
        if not figures["pairs"]["pairs"]:
            raise CommandError(
                f"no two documents are as similar as pairing.min_similarity {experiment.pairing.min_similarity:g}, so "
                "that there is nothing to tune on: without --tune, the pilot shows what other thresholds give"
            )
        unique = min(1 - HELDOUT_OF_TUNING, figures["documents"]["measured"] / len(sample.documents))
        tokens = unique * len(sample.documents) * figures["documents"]["tokens_per_document"]
        wanted = SYNTHETIC_DOCUMENTS * figures["documents"]["tokens_per_document"]
        share = min(wanted / (tokens * experiment.pretraining.repetitions), experiment.pretraining.synthetic_share)
        own = pilot_settings(
            settings, home / "tuning", home, unique, HELDOUT_OF_TUNING, pretraining={"synthetic_share": share}
        )
        _materialise(own, "synthesise", ["pretrain_oracle"])
        figures["tuning"] = tuning_figures(settings, own)
    verdict = judge(figures)
    typer.echo(json.dumps(to_json(figures, verdict), indent=2) if as_json else render(figures, verdict))


def expected_documents(settings: Settings, corpus: int | None) -> int | None:
    """Return the documents of D in a corpus of so many, duplicates among them; None where nothing says how many."""
    from sbp_assets.cli.estimate import corpus_size

    if corpus is not None:
        return max(1, round(corpus * settings.experiment.corpus.split.unique))
    size = corpus_size(settings.experiment)
    return size[1] if size else None


def _materialise(own: Settings, until: str, without: list[str]) -> None:
    from sbp_assets.orchestration.pipeline import pipeline_of

    activate_instance(own)
    prepare_instance(own)
    steps = [step for step in pipeline_of(own) if step.name not in without]
    # Nothing that Dagster knows shows that the sample is another one.
    materialise(own, "running `sbp pilot`", steps, until, {"manifest": {}})
