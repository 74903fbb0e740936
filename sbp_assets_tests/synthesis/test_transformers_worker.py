"""The transformers engine in this process, on the model of random weights: what it samples, and from what."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sbp_assets.synthesis.engine import EngineSpec, Request, Sampling
from sbp_assets.synthesis.transformers_worker import Loaded, draw, load, sample
from sbp_assets_tests.synthesis.conftest import BOS, CONTEXT, EOS, RELATED

WARM = Sampling(1.0, 0.95, EOS)
REQUESTS = [
    Request(f"d{n}", n % 3, 2**62 + n, [BOS, *range(10 + n % 7, 12 + n % 7 + (11 * n) % 60), RELATED][: CONTEXT - 1])
    for n in range(40)
] + [Request("bos", 0, 7, [BOS]), Request("full", 0, 7, [BOS] + [50] * (CONTEXT - 2))]


@pytest.fixture(scope="module")
def loaded(transformers_spec: EngineSpec) -> Iterator[Loaded]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield load(transformers_spec, "cpu")


def sampled(loaded: Loaded, requests: list[Request], sampling: Sampling = WARM) -> dict[tuple, tuple[list[int], str]]:
    found = {(r.seed_id, r.rollout): (ids, reason) for r, ids, reason in sample(loaded, requests, sampling)}
    assert len(found) == len(requests)
    return found


def test_what_a_request_samples_depends_on_itself_alone(loaded: Loaded) -> None:
    """Not on the others, their order, how many slots there are, or which ones are given on or closed up."""
    together = sampled(loaded, REQUESTS)
    assert loaded.slots == 8
    assert together == sampled(loaded, REQUESTS), "reproducible"
    for slots in (3, len(REQUESTS)):
        shuffled = random.Random(slots).sample(REQUESTS, len(REQUESTS))
        assert sampled(dataclasses.replace(loaded, slots=slots), shuffled) == together
    for request in (REQUESTS[0], REQUESTS[17], REQUESTS[-1]):
        key = (request.seed_id, request.rollout)
        assert sampled(loaded, [request]) == {key: together[key]}
    other = dataclasses.replace(REQUESTS[0], sampling_seed=REQUESTS[0].sampling_seed ^ 2**40)
    assert sampled(loaded, [other]) != sampled(loaded, REQUESTS[:1]), "all of the seed's 63 bits count"


def test_it_is_the_models_own_distribution_token_by_token(loaded: Loaded, transformers_spec: EngineSpec) -> None:
    """Against the plain definition: whole sequences through the library's model, without cache, batch or padding."""
    model = AutoModelForCausalLM.from_pretrained(transformers_spec.checkpoint, dtype=torch.float32).eval()
    found = sampled(loaded, REQUESTS, Sampling(0.8, 1.0, EOS))
    for request in [*REQUESTS[:6], *REQUESTS[-2:]]:
        ids = list(request.prompt)
        numbers = np.random.Generator(np.random.Philox(key=request.sampling_seed)).random(CONTEXT)
        while len(ids) < CONTEXT and (len(ids) == len(request.prompt) or ids[-1] != EOS):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1].double() / 0.8
            ids.append(int((logits.softmax(0).cumsum(0) <= numbers[len(ids) - len(request.prompt)]).sum()))
        assert found[request.seed_id, request.rollout] == (
            ids[len(request.prompt) :],
            "stop" if ids[-1] == EOS else "length",
        )


def test_a_text_ends_by_eos_or_where_the_context_is_full(loaded: Loaded) -> None:
    found = sampled(loaded, REQUESTS)
    assert {reason for _, reason in found.values()} == {"stop", "length"}
    for request in REQUESTS:
        ids, reason = found[request.seed_id, request.rollout]
        assert EOS not in ids[:-1]
        assert reason == ("stop" if ids[-1] == EOS else "length")
        assert len(ids) + len(request.prompt) == CONTEXT if reason == "length" else len(ids) <= CONTEXT
    assert len(found["full", 0][0]) == 1, "one token of room is left"


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_first_tokens_are_as_frequent_as_their_probabilities(loaded: Loaded, top_p: float) -> None:
    """Ten thousand requests with one prompt, each with room for one token; a chi-square test with fixed seeds."""
    prompt, count, temperature = [BOS, 20, 21, RELATED], 10_000, 0.5
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([prompt])).logits[0, -1].double() / temperature
    exact = logits.softmax(0).numpy()
    order = np.argsort(-exact)
    nucleus = order[: int(np.searchsorted(np.cumsum(exact[order]), top_p)) + 1]
    expected = np.zeros_like(exact)
    expected[nucleus] = exact[nucleus] / exact[nucleus].sum()
    short = dataclasses.replace(loaded, context=len(prompt) + 1, slots=1000)
    requests = [Request("d", rollout, 2**55 + 997 * rollout, prompt) for rollout in range(count)]
    drawn = Counter(ids[0] for ids, _ in sampled(short, requests, Sampling(temperature, top_p, EOS)).values())
    assert set(drawn) <= set(nucleus.tolist())
    often = np.flatnonzero(expected * count >= 5)
    seen = np.array([drawn[int(token)] for token in often])
    statistic = float(((seen - expected[often] * count) ** 2 / (expected[often] * count)).sum())
    # Mean n - 1, variance 2 (n - 1): five standard deviations.
    assert abs(statistic - (len(often) - 1)) < 5 * np.sqrt(2 * (len(often) - 1))
    assert len(often) > 50


def test_no_number_draws_a_token_without_probability() -> None:
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 1.0, 0.3
    numbers = torch.tensor([0.0, 0.5, np.nextafter(1, 0), 1.0], dtype=torch.float64)
    assert draw(logits, numbers, []).tolist() == [2, 2, 4, 4]


def test_the_memory_of_keys_and_values_bounds_the_batch(
    transformers_spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = dataclasses.replace(transformers_spec, max_sequences=10_000)
    slots = {}
    for gib in (1e-6, 0.01, 0.02):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", str(gib))
        slots[gib] = load(wide, "cpu").slots
    assert slots[1e-6] == 1, "one at a time rather than none"
    assert 1 < slots[0.01] < slots[0.02] < 10_000 and slots[0.02] == pytest.approx(2 * slots[0.01], abs=1)
    # Float32: keys and values of two layers with one head of 32, at every place.
    assert slots[0.01] * 2 * 2 * 32 * 4 * CONTEXT < 0.01 * 2**30
