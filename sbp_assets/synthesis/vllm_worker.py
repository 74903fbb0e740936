"""Sampling with vLLM's offline engine. It runs in an engine's process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from sbp_assets.storage.paths import plain_path
from sbp_assets.synthesis.engine import MIN_BATCHED_TOKENS, EngineSpec, Request, Sampling

_llm: Any


def start(spec: EngineSpec, device: Literal["cpu", "cuda"]) -> None:
    """Load the model; it stays loaded."""
    global _llm
    memory: dict[str, Any] = {} if device == "cpu" else {"gpu_memory_utilization": spec.gpu_memory_utilization}
    with plain_path(spec.checkpoint) as checkpoint:
        _llm = LLM(
            str(checkpoint),
            load_format="safetensors",  # never a pickle
            trust_remote_code=False,
            dtype=spec.dtype,
            seed=0,
            max_model_len=spec.context_length,
            max_num_seqs=spec.max_sequences,
            # A prompt prefilled in chunks breaks per-request seeds on CPU, so prompts are prefilled whole.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(spec.context_length, MIN_BATCHED_TOKENS),
            enforce_eager=device == "cpu",
            **memory,
        )


def generate(requests: list[Request], sampling: Sampling) -> Iterator[tuple[Request, str, str]]:
    """Yield each request with its text and finish reason, the moment it finishes."""
    engine, tokenizer = _llm.llm_engine, _llm.get_tokenizer()
    context = engine.model_config.max_model_len
    for number, request in enumerate(requests):
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.sampling_seed,
            max_tokens=context - len(request.prompt),
            stop_token_ids=[sampling.eos_id],
            detokenize=False,  # decoded whole at the end, which is exact where a character spans tokens
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), tokens_input(request.prompt), params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            request, completion = requests[int(output.request_id)], output.outputs[0]
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended {request.seed_id}-{request.rollout} with {completion.finish_reason!r}")
            text = tokenizer.decode(
                list(completion.token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            yield request, text, completion.finish_reason
