"""What `sbp run` refuses at once and what it prints at the end; the runs themselves are in orchestration/."""

from pathlib import Path

import dagster as dg
import polars as pl
import pytest

from sbp_assets.cli.run import how_to_open, results, step_table
from sbp_assets.evaluation.comparison import compare
from sbp_assets.instance.branch import branch_environment, make_branch
from sbp_assets.instance.storage import InstanceInUseError, exclusive_instance
from sbp_assets.orchestration.display import StepState, StepStatus
from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets.orchestration.runner import PipelineError
from sbp_assets.pairing.embed import Embedder
from sbp_assets.settings import load_settings
from sbp_assets.synthesis.engine import Generator
from sbp_assets_tests.cli.conftest import Sbp
from sbp_assets_tests.evaluation.test_comparison import models, scores
from sbp_assets_tests.tiny import tiny_settings

VLLM_ON_CPU = {
    "SBP_EXPERIMENT__MODEL__HEAD_DIM": "48",
    "SBP_DEPLOYMENT__GENERATION_ENGINE": "vllm",
    "SBP_DEPLOYMENT__DEVICE": "cpu",
}


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_assets.orchestration.runner.run_pipeline", lambda *_: [])


@pytest.mark.parametrize("until", [[], ["--until", "synthesise"], ["--until", "compare"]])
def test_a_head_size_that_the_engine_lacks_is_refused_before_anything_is_trained(sbp: Sbp, until: list[str]) -> None:
    result = sbp("run", "-p", "tiny", *until, **VLLM_ON_CPU)
    assert result.exit_code == 2
    assert "no CPU attention for model.head_dim 48; choose one of 32, 64," in result.stderr


def test_a_head_size_matters_from_the_step_that_samples(sbp: Sbp, nothing_runs: None) -> None:
    result = sbp("run", "-p", "tiny", "--until", "pretrain_oracle", **VLLM_ON_CPU)
    assert result.exit_code == 0, result.output
    other_engine = VLLM_ON_CPU | {"SBP_DEPLOYMENT__GENERATION_ENGINE": "transformers"}
    assert sbp("run", "-p", "tiny", "--until", "synthesise", **other_engine).exit_code == 0


def test_a_store_that_the_instance_does_not_know_is_not_created_before_it_is_refused(
    sbp: Sbp, nothing_runs: None, tmp_path: Path
) -> None:
    result = sbp("run", "-p", "tiny", "--until", "ingest", SBP_DEPLOYMENT__DATA_DIR=str(tmp_path / "typo/artifacts"))
    assert result.exit_code == 0 and (tmp_path / ".sbp").exists() and not (tmp_path / "typo").exists(), result.output


def test_engines_are_closed_after_a_run_and_before_another_process_may_begin_one(
    sbp: Sbp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings("tiny", {"SBP_DEPLOYMENT__INSTANCE_DIR": str(tmp_path / ".sbp/tiny/instance")})
    given: list[object] = []
    closed: list[object] = []

    def close(engine: object) -> None:
        with pytest.raises(InstanceInUseError, match="running `sbp run`"), exclusive_instance(settings, "looking"):
            pass
        closed.append(engine)

    def fail(defs: dg.Definitions, *_: object) -> None:
        given.extend(defs.resources[name] for name in ("embedder", "generator"))
        raise PipelineError("Embed failed")

    monkeypatch.setattr(Embedder, "close", close)
    monkeypatch.setattr(Generator, "close", close)
    monkeypatch.setattr("sbp_assets.orchestration.runner.run_pipeline", fail)
    assert sbp("run", "-p", "tiny").exit_code == 1
    assert [type(engine) for engine in given] == [Embedder, Generator] and closed == given[::-1]


@pytest.mark.parametrize(
    "command", [["run"], ["verify"], ["branch", "b", "synthesis.top_p=0.5"], ["copy-artifacts", "elsewhere"]]
)
def test_an_instance_that_another_process_holds_refuses_every_command(
    sbp: Sbp, tmp_path: Path, command: list[str]
) -> None:
    folders = {name: tmp_path / ".sbp/tiny" / name for name in ("artifacts", "instance")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    settings = load_settings("tiny", {"SBP_DEPLOYMENT__INSTANCE_DIR": str(folders["instance"])})
    with exclusive_instance(settings, "running `sbp run`"):
        result = sbp(*command, "-p", "tiny")
    assert result.exit_code == 2 and "another process is running `sbp run`" in result.stderr, result.output


def test_the_plan_says_what_a_run_will_refuse(sbp: Sbp) -> None:
    assert "`sbp run` will refuse this profile: vLLM" in sbp("plan", "-p", "tiny", **VLLM_ON_CPU).stdout
    assert "refuse" not in sbp("plan", "-p", "tiny").stdout


def test_a_corpus_that_no_run_could_use_is_a_line_of_the_plan(sbp: Sbp, tmp_path: Path) -> None:
    source = {"SBP_EXPERIMENT__CORPUS__SOURCE": '{"kind": "files", "path": "corpus"}'}
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_text('{"id": "a", "text": "too little"}\n' * 2)
    small = sbp("plan", "-p", "tiny", **source)
    assert small.exit_code == 2 and "less than one step" in small.stderr, small.output


def test_an_unknown_step_is_refused_with_those_there_are(sbp: Sbp) -> None:
    result = sbp("run", "-p", "tiny", "--until", "scoring")
    assert result.exit_code == 2 and "score_sbp" in result.stderr
    result = sbp("run", "-p", "tiny", "--only", "scoring")
    assert result.exit_code == 2 and "score_sbp" in result.stderr
    assert sbp("run", "-p", "tiny", "--only", "score_sbp", "--refresh").exit_code == 2


def test_every_title_fits_into_the_step_table() -> None:
    states = [StepState(step, [None], StepStatus.DONE, seconds=2, own_seconds=1) for step in PIPELINE]
    header, *rows, explanation = step_table(states, 100).splitlines()
    assert len(rows) == len(PIPELINE) + 1 and {len(row) for row in rows} == {len(header)}
    assert all(row.startswith(f"{step.title} ") for row, step in zip(rows, PIPELINE, strict=False))
    assert explanation.startswith("own work: ")


def test_a_run_that_did_nothing_says_so() -> None:
    states = [StepState(step, [None], StepStatus.FRESH) for step in PIPELINE]
    assert step_table(states, 1) == "nothing to do: everything is up to date"


def test_results_end_with_what_they_are_worth_and_how_to_see_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBP_PROFILE", "tiny")
    settings = tiny_settings(tmp_path)
    comparison = compare(models(**{arm: [scores([1.0, 2.0])] for arm in ("baseline", "sbp", "oracle")}))
    path = tmp_path / "data_dir/evaluation/comparison.parquet"
    path.parent.mkdir(parents=True)
    comparison.write_parquet(path)
    assert pl.read_parquet(path)["share_of_oracle_gain"].null_count()
    printed = results(settings)
    assert "There is no share where the oracle's gain cannot be told from zero" in printed
    assert "\nnote: the scores of profile tiny mean nothing" in printed
    assert printed.endswith("\nruns: `sbp ui -p tiny`, with the same environment, opens this instance in Dagster's UI")
    assert "note:" not in results(settings.model_copy(update={"note": None}))


def test_the_runs_of_a_branch_are_seen_in_the_environment_of_the_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBP_PROFILE", "tiny")
    settings = tiny_settings(tmp_path)
    for folder in (settings.deployment.data_dir, settings.deployment.instance_dir):
        Path(folder).mkdir()
    make_branch(settings, "narrow", {"synthesis.top_p": 0.5})
    branch = load_settings("tiny", branch_environment(settings, "narrow"))
    assert 'eval "$(sbp env --branch narrow -p tiny)", `sbp ui`' in how_to_open(branch)


def test_run_and_verify_end_with_the_files_that_were_not_read(sbp: Sbp, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("a.jsonl", "_hidden.jsonl", "notes.md"):
        (corpus / name).write_text('{"text": "some words"}\n')
    given = {"SBP_EXPERIMENT__CORPUS__SOURCE": f'{{"kind": "files", "path": "{corpus}"}}'}
    expected = "every_file_is_read: _hidden.jsonl: hidden: its name begins with . or _; notes.md: unknown ending"
    for again in (False, True):
        result = sbp("run", "-p", "tiny", "--until", "manifest", **given)
        assert result.exit_code == 0, result.output
        assert ("up to date" in result.stdout) == again
        assert result.stdout.endswith(f"checks: 1 with a warning\n  warning: corpus/source_manifest:{expected}\n")
    result = sbp("verify", "-p", "tiny", **given)
    assert result.exit_code == 0
    assert f"  warning: corpus/source_manifest:{expected}\n1 partitions checked, 0 corrupted" in result.stdout
    (corpus / "b.jsonl.gz").touch()
    result = sbp("run", "-p", "tiny", "--until", "ingest", "--refresh", **given)
    assert result.exit_code == 1
    assert "file b.jsonl.gz cannot be read" in result.stderr, "an error comes after the checks"
    assert result.stdout.endswith(f"checks: 1 with a warning\n  warning: corpus/source_manifest:{expected}\n")
