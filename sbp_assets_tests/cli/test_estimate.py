"""The plan's figures against what the code would do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from sbp_assets.cli.estimate import Plan, plan, render, tokens_per_word
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.tokenizer import train_tokenizer
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import ConceptsSource, Model, Settings
from sbp_assets_tests.profiles import PROFILES, load_profile

ASSETS = {"corpus/documents": 4, "pretraining/token_budget": 1}


def settings_of(profile: str, **overrides: str) -> Settings:
    return load_profile(profile, {f"SBP_EXPERIMENT__{key.upper()}": value for key, value in overrides.items()})


def plan_of(profile: str, **overrides: str) -> Plan:
    return plan(settings_of(profile, **overrides), ASSETS)


def built_parameters(model: Model, vocab_size: int) -> int:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        tie_word_embeddings=model.tie_embeddings,
        attention_bias=False,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())


@pytest.mark.parametrize("profile", PROFILES)
def test_parameters_are_those_of_the_built_model(profile: str) -> None:
    made = plan_of(profile)
    assert made.parameters == built_parameters(settings_of(profile).experiment.model, made.vocab_size)


def test_parameters_without_tied_embeddings() -> None:
    model = settings_of("tiny").experiment.model.model_copy(update={"tie_embeddings": False})
    assert model.parameters(512) == built_parameters(model, 512)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_arm_reads_the_same_whole_steps(profile: str) -> None:
    made = plan_of(profile)
    settings = settings_of(profile).experiment.pretraining
    assert "corpus/documents" in render(made)
    estimate = made.estimate
    if estimate is None:
        assert "set corpus.expected_unique_tokens" in render(made)
        return
    step = settings.tokens_per_step
    assert estimate.budget == int(settings.repetitions * estimate.unique_tokens // step) * step == estimate.steps * step
    assert {sum(sources.values()) for sources in estimate.arms.values()} == {estimate.budget}
    synthetic = estimate.arms["sbp"]["synthetic"]
    assert synthetic == pytest.approx(settings.synthetic_share * estimate.budget, rel=0.05)
    assert estimate.epochs["sbp"]["synthetic"] == 1
    assert all(size > 0 for size in estimate.bytes.values())


def test_the_paper_at_its_three_scales() -> None:
    for profile, parameters, budget, synthetic, oracle_passes in (
        ("paper_200b", 3.2e9, 200e9, 75e9, 1.0),
        ("paper_1t", 3.2e9, 1000e9, 125e9, 1000 / 482),
        ("paper_1t_6b", 6e9, 1000e9, 250e9, 1000 / 482),
    ):
        made = plan_of(profile)
        assert made.estimate is not None
        assert made.parameters == pytest.approx(parameters, rel=0.05)
        assert made.estimate.budget == pytest.approx(budget, rel=1e-3)
        assert made.estimate.arms["sbp"]["synthetic"] == pytest.approx(synthetic, rel=1e-3)
        assert made.estimate.epochs["oracle"]["oracle"] == pytest.approx(oracle_passes, rel=0.02)
        baseline = next(work for work in made.estimate.work if work.name == "baseline")
        # 6 N D without attention is a floor, and attention at 4,096 tokens adds less than a third to it.
        assert 6 * made.parameters * budget < baseline.flops * 1.001 < 8 * made.parameters * budget


def test_expected_tokens_set_the_scale() -> None:
    small = plan_of("tiny", corpus__expected_unique_tokens="100000").estimate
    large = plan_of("tiny", corpus__expected_unique_tokens="200000").estimate
    assert small is not None and large is not None
    assert large.budget == pytest.approx(2 * small.budget, rel=0.01)
    assert large.work[1].flops == pytest.approx(2 * small.work[1].flops, rel=0.01)


def test_expected_tokens_and_documents_enter_no_code_version_but_the_reports() -> None:
    def code_versions(**expected: str) -> dict[str, str | None]:
        graph = build_definitions(settings_of("tiny", **expected)).resolve_asset_graph()
        return {key.to_user_string(): graph.get(key).code_version for key in graph.get_all_asset_keys()}

    small = code_versions(corpus__expected_unique_tokens="100000", corpus__expected_unique_documents="1000")
    large = code_versions(corpus__expected_unique_tokens="200000", corpus__expected_unique_documents="2000")
    assert {key for key in small | large if small[key] != large[key]} == {"evaluation/report"}


def test_more_seeds_cost_more_training() -> None:
    one, three = plan_of("tiny").estimate, plan_of("tiny", pretraining__seeds="[0, 1, 2]").estimate
    assert one is not None and three is not None
    assert [w.flops for w in three.work][1:4] == [3 * w.flops for w in one.work][1:4]
    assert three.work[0] == one.work[0]


def test_small_models_are_priced_in_cpu_seconds_and_large_ones_are_not() -> None:
    assert "CPU seconds" in render(plan_of("tiny"))
    text = render(plan_of("paper_1t"))
    assert "CPU seconds" not in text and "GPU hours" in text and "989 TFLOP/s" in text


def test_a_files_source_is_measured_on_its_first_file(tmp_path: Path):
    for name in ("a", "b"):
        rows = [f'{{"id": "{name}{number}", "text": "{"word " * 66}"}}' for number in range(1000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    made = plan_of("text", corpus__source__path=str(tmp_path), corpus__split__unique="0.1")
    assert made.estimate is not None
    assert made.estimate.unique_documents == pytest.approx(200, rel=0.05)
    assert made.estimate.unique_tokens == pytest.approx(200 * 100, rel=0.05)


@pytest.mark.parametrize("path", ["http://127.0.0.1:1/x", "github://a/b", "/nowhere/x"])
def test_a_corpus_that_cannot_be_opened_has_no_estimate(path: str):
    assert plan_of("text", corpus__source__path=path).estimate is None


@pytest.mark.parametrize("profile", ["tiny", "demo"])
def test_tokens_per_word_are_about_those_of_the_trained_tokenizer(profile: str):
    corpus, estimate = settings_of(profile).experiment.corpus, plan_of(profile).estimate
    assert isinstance(corpus.source, ConceptsSource) and estimate is not None
    world = ConceptWorld(corpus.source)
    texts = [world.document(number)["text"] for number in range(estimate.unique_documents)]
    tokenizer = train_tokenizer(texts, corpus.tokenizer.vocab_size)
    tokens = sum(len(ids) + 2 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert estimate.unique_tokens == pytest.approx(tokens, rel=0.1)
    assert "tokens each with this vocabulary" in render(plan_of(profile))


def test_tokens_per_word_are_interpolated_between_vocabularies():
    assert tokens_per_word(512) == pytest.approx(2.4)
    assert tokens_per_word(724) == pytest.approx(2.0, rel=0.01), "half-way from 512 to 1,024 in logarithms"
    assert (tokens_per_word(8), tokens_per_word(100_000)) == (5.2, 1.3)


def test_counts_and_units_are_one_space_apart():
    text = render(plan_of("tiny"))
    assert " in 80 documents (" in text and "kFLOP per training token" in text
    assert re.search(r"corpus/tokens +\d+(\.\d+)? kB$", text, re.MULTILINE)
