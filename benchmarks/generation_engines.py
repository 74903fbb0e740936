"""Speed of the generation engines on one CPU thread or GPU: python -m benchmarks.generation_engines [PROFILE].

Reads a finished run: its synthesizer and the prompts of its first shard's documents of D. Both engines sample the same
requests with the profile's settings, by turns, after a round that does not count. Prints every round and, as its last
line, one JSON object: the median tokens per second of each engine, and how many times faster vLLM is.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from benchmarks.arguments import parser_with_profile
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.settings import load_settings
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis.engine import ENGINES, Engines, EngineSpec, Request, Sampling, named_with_version
from sbp_assets.synthesis.generate import request_order, sampling_seed
from sbp_assets.synthesizer.examples import format_prompt

REQUESTS = 512
ROUNDS = 5


def main(profile: str | None) -> None:
    settings = load_settings(profile)
    experiment, data = settings.experiment, Path(settings.deployment.data_dir)
    tokenizer = load_tokenizer(data / "corpus/tokenizer")
    arrays = TokenArrays.load(data / "corpus/tokens" / experiment.shard_keys[0])
    documents, related = arrays.documents, related_id(tokenizer)
    prompts = {
        documents["id"][int(i)]: format_prompt(
            arrays.tokens[arrays.offsets[i] : arrays.offsets[i + 1]], related, experiment.max_document_tokens
        )
        for i in np.flatnonzero(documents["split"].to_numpy() == UNIQUE)
    }
    salt = experiment.synthesis.salt
    keys = list(islice(request_order(prompts), REQUESTS))
    requests = [Request(seed, rollout, sampling_seed(salt, seed, rollout), prompts[seed]) for seed, rollout in keys]
    sampling = Sampling(experiment.synthesis.temperature, experiment.synthesis.top_p, tokenizer.eos_token_id)
    running = []
    speeds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    try:
        for engine in ENGINES:
            spec = EngineSpec(
                engine=engine,
                checkpoint=data / "synthesizer/checkpoint",
                version="",
                context_length=experiment.model.context_length,
                dtype=experiment.synthesis.dtype,
                device=settings.deployment.device,
                processes=1,
                max_sequences=settings.deployment.engine_max_sequences,
                gpu_memory_utilization=settings.deployment.gpu_memory_utilization / len(ENGINES),
            )
            running.append(Engines(spec))
        for number in range(ROUNDS + 1):
            for engines in running:
                with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as folder:
                    ledger = Path(folder, "ledger.jsonl")
                    began = time.monotonic()
                    engines.generate(requests, sampling, [ledger], lambda: None)
                    seconds = time.monotonic() - began
                    texts = [json.loads(line)["text"] for line in ledger.read_text().splitlines()]
                tokens = sum(map(len, encode_documents(tokenizer, texts)))
                print(f"round {number} {engines.spec.engine}: {tokens / seconds:,.0f} tokens/s", flush=True)
                if number:
                    speeds[engines.spec.engine].append(tokens / seconds)
    finally:
        for engines in running:
            engines.stop()
    medians = {engine: statistics.median(values) for engine, values in speeds.items()}
    print(json.dumps({
        "profile": settings.profile, "requests": len(requests), "rounds": ROUNDS,
        "engines": [named_with_version(engine) for engine in ENGINES],
        "tokens_per_second": {engine: round(value) for engine, value in medians.items()},
        "vllm_times_transformers": round(medians["vllm"] / medians["transformers"], 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main(parser_with_profile(__doc__, None).parse_args().profile)
