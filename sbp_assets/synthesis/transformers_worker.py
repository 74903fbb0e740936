"""Sampling with transformers, for machines without vLLM. It runs in an engine's process.

Model, attention, prompts' caches and the shaping of the distribution are the library's. The loop over tokens is not:
both of the library's (`generate`, and `generate_batch` with continuous batching) draw a whole batch from one random
stream, so what a request samples would depend on its neighbours. Here every request has random numbers of its own, and
a token is where the cumulative probability exceeds the next of them.

Every running sequence has a slot, in which token and cache column i belong to position i, and a slot whose sequence
has ended goes to the next request: nothing is padded on the left, and no batch waits for its longest sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from sbp_assets.synthesis.engine import MIN_BATCHED_TOKENS, EngineSpec, Request, Sampling

ATTENTION = "sbp_grouped_sdpa"
# Share of the slots that is free before requests start in them: starting and closing up cost a pass of their own.
TURNOVER = 1 / 8
# Logits, scores, probabilities and their sums, in up to 8 bytes each, and what sorting them takes.
BYTES_OF_A_PROBABILITY = 48


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to sample, and how many sequences it samples at a time."""

    model: Any
    tokenizer: Any
    context: int
    slots: int


_loaded: Loaded


def start(spec: EngineSpec, device: Literal["cpu", "cuda"]) -> None:
    """Load the model; it stays loaded."""
    global _loaded
    logging.disable_progress_bar()
    _loaded = load(spec, device)


def load(spec: EngineSpec, device: Literal["cpu", "cuda"]) -> Loaded:
    """Return the model of `spec` on `device`, with as many slots as its memory has room for."""
    AttentionInterface.register(ATTENTION, _attend)
    model: Any = AutoModelForCausalLM.from_pretrained(
        spec.checkpoint,
        use_safetensors=True,  # never a pickle
        trust_remote_code=False,
        dtype=getattr(torch, spec.dtype),
        attn_implementation=ATTENTION,
    )
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(spec.checkpoint, trust_remote_code=False)
    room = _memory(spec, device) // _bytes_of_a_sequence(model.config, model.dtype, spec.context_length)
    return Loaded(model, tokenizer, spec.context_length, max(1, min(spec.max_sequences, room)))


def generate(requests: list[Request], sampling: Sampling) -> Iterator[tuple[Request, str, str]]:
    """Yield each request with its text and finish reason, the moment it finishes."""
    for request, ids, finish_reason in sample(_loaded, requests, sampling):
        text = _loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield request, text, finish_reason


@torch.inference_mode()
def sample(loaded: Loaded, requests: list[Request], sampling: Sampling) -> Iterator[tuple[Request, list[int], str]]:
    """Yield each request with its token ids and why it ended, in the order in which they end."""
    # Prompts of like length start together; the longest first, so that memory runs out at once or not at all.
    queue = sorted(requests, key=lambda request: len(request.prompt))
    batch = _Batch(loaded, min(loaded.slots, len(requests)), sampling)
    while queue or batch.running:
        size = batch.slots if queue else batch.used
        if size - batch.running >= TURNOVER * size:
            batch.refill(queue)
        yield from batch.step()


class _Batch:
    """Sequences by slot. All but the model's own lies on the host, which hears from the device once a step."""

    def __init__(self, loaded: Loaded, slots: int, sampling: Sampling) -> None:
        self.model, self.context, self.slots, self.eos = loaded.model, loaded.context, slots, sampling.eos_id
        self.requests: list[Request | None] = [None] * slots
        self.running = 0  # requests in slots
        self.used = 0  # slots that a step computes, running or ended
        self.tokens = np.zeros((slots, loaded.context), dtype=np.int64)
        self.last = np.zeros(slots, dtype=np.int64)  # place of the newest token, which the model has yet to see
        self.uniforms = np.zeros((slots, loaded.context))  # by the place of the token that they sample
        self.cache = _Cache(loaded.model, slots, loaded.context)
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def refill(self, queue: list[Request]) -> None:
        """Give free slots to requests from the end of `queue`, and close what is free after that."""
        free = [slot for slot, request in enumerate(self.requests) if request is None]
        taken = free[: len(queue)]
        for slot in taken:
            self._place(slot, queue.pop())
        self._prefill(taken)
        self.running += len(taken)
        gaps = [slot for slot in free[len(taken) :] if slot < self.running]
        ends = [slot for slot in range(self.running, self.slots) if self.requests[slot] is not None]
        for gap, end in zip(gaps, ends, strict=True):
            self.requests[gap], self.requests[end] = self.requests[end], None
        if gaps:
            for array in (self.tokens, self.last, self.uniforms):
                array[gaps] = array[ends]
            self.cache.copy(ends, gaps)
        self.used = self.running

    def step(self) -> Iterator[tuple[Request, list[int], str]]:
        """Sample one token of every sequence; yields those that ended by it."""
        rows, last = np.arange(self.used), self.last[: self.used]
        device = self.model.device
        places = torch.from_numpy(last).to(device)[:, None]
        self.cache.places, self.cache.width = places[:, 0], int(last.max()) + 1
        # Beyond its newest token a slot holds what was there before. Added to the scores, as attention on a CPU takes
        # nearly twice as long where it has to turn a boolean mask into such a one, layer by layer.
        mask = torch.zeros((self.used, self.cache.width), dtype=self.model.dtype, device=device)
        mask.masked_fill_(torch.arange(self.cache.width, device=device) > places, -torch.inf)
        logits = self.model(
            input_ids=torch.from_numpy(self.tokens[rows, last]).to(device)[:, None],
            position_ids=places,
            attention_mask=mask[:, None, None],  # of four dimensions: taken as it is
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        uniforms = torch.from_numpy(self.uniforms[rows, last + 1]).to(device)
        self.tokens[rows, last + 1] = sampled = draw(logits, uniforms, self.warpers).cpu().numpy()
        stopped = sampled == self.eos
        for slot in np.flatnonzero(stopped | (last + 2 == self.context)).tolist():
            if request := self.requests[slot]:
                self.requests[slot] = None
                self.running -= 1
                ids = self.tokens[slot, len(request.prompt) : last[slot] + 2].tolist()
                yield request, ids, "stop" if stopped[slot] else "length"
        # An ended sequence stays where it is, and is computed again until its slot is given away.
        last += [request is not None for request in self.requests[: self.used]]

    def _place(self, slot: int, request: Request) -> None:
        length = len(request.prompt)
        self.requests[slot] = request
        self.tokens[slot, :length] = request.prompt
        self.last[slot] = length - 1
        # Philox takes the whole seed. Torch's generator on a CPU looks at 32 bits of it: of a hundred thousand requests
        # some would share their numbers.
        numbers = np.random.Generator(np.random.Philox(key=request.sampling_seed))
        self.uniforms[slot, length:] = numbers.random(self.context - length)

    def _prefill(self, slots: list[int]) -> None:
        """Keys and values of the prompts, but for the last token: a step takes that and samples what follows it.

        Padding is on the right, where causal attention needs no mask against it.
        """
        while slots and (width := int(self.last[slots].max())):
            rows = max(1, MIN_BATCHED_TOKENS // width)
            some, slots = slots[:rows], slots[rows:]
            ids = torch.from_numpy(self.tokens[some, :width]).to(self.model.device)
            filled = DynamicCache()
            self.model.base_model(input_ids=ids, past_key_values=filled, use_cache=True)
            self.cache.fill(some, filled)


def draw(logits: torch.Tensor, uniforms: torch.Tensor, warpers: list[Any]) -> torch.Tensor:
    """Return a token per row: where the cumulative probability exceeds that row's number of [0, 1)."""
    scores = logits.float()
    for warper in warpers:
        scores = warper(None, scores)
    # In float32 a sum over a vocabulary would cut off rare tokens at its end.
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Rounding may lift the product to the total, and then nothing exceeds it.
    points = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]


class _Cache(Cache):
    """Keys and values by slot, in memory that is taken once; the library's caches write one column for all rows."""

    def __init__(self, model: Any, slots: int, context: int) -> None:
        super().__init__(layers=[])
        config = model.config
        shape = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, context, _head_dim(config))
        # Zeros, because a column that is not yet written is multiplied by an attention of 0: NaN would come through.
        self.held = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.rows = torch.arange(slots, device=model.device)
        # Of each row's token in this step, and one more than the largest of them.
        self.places, self.width = self.rows, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token per row and return all that the rows attend to; the attention layers call this."""
        used = len(self.places)
        keys, values = self.held[layer_idx]
        keys[self.rows[:used], :, self.places] = key_states[:, :, 0]
        values[self.rows[:used], :, self.places] = value_states[:, :, 0]
        return keys[:used, :, : self.width], values[:used, :, : self.width]

    def fill(self, slots: list[int], filled: DynamicCache) -> None:
        """Write the beginnings of the sequences in `slots`, one row of `filled` each."""
        for held, layer in zip(self.held, filled.layers, strict=True):
            states: Any = layer
            for mine, new in zip(held, (states.keys, states.values), strict=True):
                mine[slots, :, : new.shape[2]] = new

    def copy(self, sources: list[int], targets: list[int]) -> None:
        for held in self.held:
            held[:, targets] = held[:, sources]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the library's attention, except that the one query of a head joins those that share its keys.

    Where there is a mask, the library copies all keys and values for each of these heads at every token: attention
    takes three to six times as long with two heads to a key.
    """
    batch, heads, length, size = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], size)
    attended = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(batch, 1, heads, size), None


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _bytes_of_a_sequence(config: Any, dtype: torch.dtype, context: int) -> int:
    """Of its keys and values, the context being full, and of the distribution that it is sampled from."""
    columns = 2 * config.num_hidden_layers * config.num_key_value_heads * context * _head_dim(config)
    return columns * dtype.itemsize + config.vocab_size * BYTES_OF_A_PROBABILITY


def _memory(spec: EngineSpec, device: Literal["cpu", "cuda"]) -> int:
    """Bytes that the sequences may take, of what is free once the model is loaded."""
    if device == "cpu":
        return int(float(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30)
    free, total = torch.cuda.mem_get_info()
    return free - int((1 - spec.gpu_memory_utilization) * total)
