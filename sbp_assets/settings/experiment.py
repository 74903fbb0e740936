"""Settings that decide what the artifacts are, and so feed the code versions of the assets."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from sbp_assets.settings.corpus import ConceptsSource, Corpus
from sbp_assets.settings.section import Fraction, PositiveFloat, Section


class Pairing(Section):
    """Nearest-neighbour pairing (paper section 2.1)."""

    embedding_model: str = Field("all-MiniLM-L6-v2", description="sentence-transformers name or path.")
    embedding_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_tokens: PositiveInt = Field(256, description="Tokens of a document that are embedded.")
    index: Literal["flat", "ivf"] = Field("flat", description="Both store 8-bit scalar-quantised vectors.")
    nprobe: PositiveInt = Field(16, description="Cells searched per query, for ivf.")
    neighbors: PositiveInt = Field(20, description="k: nearest neighbours kept per document before filtering.")
    min_similarity: Fraction = Field(0.7, description="Cosine at or above which documents count as related.")
    max_similarity: Fraction = Field(1.0, description="Cosine above which a pair is dropped as a near-duplicate.")
    shingle_tokens: PositiveInt = Field(13, description="Words per shingle of the near-duplicate filter.")
    max_shared_shingles: Fraction = Field(
        0.1, description="Share of d2's shingles found in d1 above which a pair goes."
    )
    max_pairs_per_document: PositiveInt = Field(8, description="Pairs in which one document may be d1; and, apart, d2.")
    both_directions: bool = Field(True, description="(a, b) also gives (b, a).")

    @model_validator(mode="after")
    def _bounds(self) -> Pairing:
        if self.min_similarity >= self.max_similarity:
            raise ValueError(
                f"min_similarity ({self.min_similarity}) must be below max_similarity ({self.max_similarity})"
            )
        return self


class Model(Section):
    """A Llama-3-style decoder with QK-norm (transformers' Qwen3ForCausalLM built from a config)."""

    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    context_length: Annotated[int, Field(ge=32)]
    rope_theta: PositiveFloat = 500_000.0
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _geometry(self) -> Model:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs")
        return self

    def parameters(self, vocab_size: int) -> int:
        """Trainable parameters of the model with this vocabulary; equals the built model's count (tested)."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, vocab_size: int) -> float:
        """Training FLOPs per token: 6 per matmul parameter plus attention (PaLM, appendix B)."""
        matmul = self.parameters(vocab_size) - (0 if self.tie_embeddings else vocab_size * self.hidden_size)
        return 6 * matmul + 12 * self.layers * self.heads * self.head_dim * self.context_length


class Optimizer(Section):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: PositiveFloat
    tokens_per_step: PositiveInt = Field(description="Global batch in tokens; a multiple of the context length.")
    warmup: Fraction = Field(0.02, description="Share of the steps.")
    final_learning_rate: Fraction = Field(0.1, description="As a share of the peak.")
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    gradient_clip: PositiveFloat = 1.0
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: autocast; weights stay float32.")


class Pretraining(Optimizer):
    """The compute-matched comparison: every arm reads exactly the baseline's number of tokens."""

    repetitions: PositiveFloat = Field(20, description="Times the baseline reads D: the token budget of every arm.")
    synthetic_share: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="Of the SBP arm's token budget.")
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    evaluations: PositiveInt = Field(20, description="Held-out loss measurements along a run.")
    heldout_tokens: PositiveInt = Field(50_000, description="At most so many held-out tokens per measurement.")

    @model_validator(mode="after")
    def _budget(self) -> Pretraining:
        if self.repetitions < 1:
            raise ValueError(f"repetitions is {self.repetitions:g}: a budget below one pass leaves part of D unread")
        if self.repetitions * (1 - self.synthetic_share) < 1:
            raise ValueError(
                f"synthetic_share {self.synthetic_share:g} of {self.repetitions:g} repetitions leaves the SBP arm "
                "less than one pass over D; lower synthetic_share or raise repetitions"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        return self


class Synthesizer(Optimizer):
    """Synthesizer-tuning (paper section 2.2): loss on d2 alone, from the first seed's baseline checkpoint."""

    epochs: PositiveFloat = 1
    max_document_tokens: PositiveInt | None = Field(None, description="d1 and d2 are cut here; null: half the context.")
    start: Literal["final", "early_stopped", "scratch"] = Field(
        "final",
        description="Weights to tune from: the baseline's last, or those of its lowest held-out loss, which know less "
        "of D by heart; scratch, random ones, is an ablation.",
    )
    partners: Literal["nearest", "random"] = Field(
        "nearest", description="random: every d1 gets other pairs' d2, a placebo without relations between documents."
    )


class Judge(Section):
    """The model that judges non-factual and pair-irrelevance on a fixed sample; where it answers is deployment."""

    model: str = Field(min_length=1, description="As the endpoint calls it.")
    prompts: str = Field("v1", description="Revision: the folder in sbp_assets/synthesis/prompts/.")
    documents: PositiveInt = Field(500, description="Synthetic, and again real documents judged, over all shards.")
    max_chars: PositiveInt = Field(8000, description="Characters of a document that the judge is shown.")
    max_tokens: PositiveInt = Field(512, description="Of an answer.")
    temperature: Annotated[float, Field(ge=0)] | None = Field(0.0, description="Null: the endpoint's own.")


class Synthesis(Section):
    """Synthesis at scale (paper section 2.3)."""

    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    salt: str = Field("sbp", description="Changes every per-request sampling seed.")
    condition: Literal["seed", "none"] = Field(
        "seed", description="none: sampled from the baseline after `<bos>` alone, a placebo without a synthesizer."
    )
    quality_sample: PositiveInt = Field(1000, description="Documents per shard that the quality metrics read.")
    duplicate_sample: PositiveInt = Field(
        1_000_000, description="N of duplicates@N: documents of all shards compared with each other (the paper's 1M)."
    )
    judge: Judge | None = Field(None, description="Null: what only a model can judge stays unjudged.")


class Evaluation(Section):
    heldout_documents: PositiveInt = Field(500, description="Held-out documents scored for perplexity, at most.")
    concept_questions: NonNegativeInt = Field(500, description="Multiple-choice questions, for the concepts source.")
    benchmarks: tuple[
        Literal[
            "openwebtext2", "lambada", "mmlu", "arc_challenge", "arc_easy", "sciq", "winogrande", "triviaqa", "webqs"
        ],
        ...,
    ] = Field((), description="Stock benchmarks (paper section 4); empty for none.")
    benchmark_limit: PositiveInt | None = Field(None, description="Examples per stock benchmark; null for all.")


class Contamination(Section):
    """Comparison of the evaluation's items with the training documents, by shared runs of words."""

    words: Annotated[int, Field(ge=2)] = Field(13, description="n of the n-grams (GPT-3, appendix C).")
    min_words: PositiveInt = Field(
        8, description="Shorter items are not judged; from here to n, an item is one n-gram."
    )
    max_share: Fraction = Field(0.01, description="Of an evaluation set's items, above which the check goes red.")


class Experiment(Section):
    """Everything that decides what the artifacts are. Two equal experiments make the same artifacts."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    corpus: Corpus
    pairing: Pairing = Pairing()
    model: Model
    pretraining: Pretraining
    synthesizer: Synthesizer
    synthesis: Synthesis = Synthesis()
    evaluation: Evaluation = Evaluation()
    contamination: Contamination = Contamination()

    @model_validator(mode="after")
    def _possible(self) -> Experiment:
        context = self.model.context_length
        if self.pair_tokens > context:
            raise ValueError(
                f"model.context_length ({context}) is shorter than a pair: two documents of "
                f"synthesizer.max_document_tokens and three special tokens take {self.pair_tokens}"
            )
        for key in ("pretraining", "synthesizer"):
            if (step := getattr(self, key).tokens_per_step) % context:
                raise ValueError(
                    f"{key}.tokens_per_step ({step}) must be a multiple of model.context_length ({context})"
                )
        if self.evaluation.concept_questions and self.corpus.source.kind != "concepts":
            # Questions exist only where the truth is known.
            object.__setattr__(self, "evaluation", self.evaluation.model_copy(update={"concept_questions": 0}))
        return self

    @property
    def max_document_tokens(self) -> int:
        """Tokens of d1 and of d2 that a tuning example or a prompt may hold, without special tokens."""
        return self.synthesizer.max_document_tokens or (self.model.context_length - 3) // 2

    @property
    def pair_tokens(self) -> int:
        """Tokens of the longest tuning example: <bos> d1 <related> d2 <eos>."""
        return 2 * self.max_document_tokens + 3

    @cached_property
    def shard_keys(self) -> list[str]:
        """Partition keys of the corpus shards: '00000', '00001', …"""
        return [f"{shard:05d}" for shard in range(self.corpus.shards)]

    @property
    def truth(self) -> ConceptsSource | None:
        """The source, where the truth of every sentence is known; None elsewhere."""
        return self.corpus.source if isinstance(self.corpus.source, ConceptsSource) else None

    @property
    def conditional(self) -> bool:
        """Whether syntheses are conditioned on a seed document, as SBP's are; False for the unconditional placebo."""
        return self.synthesis.condition == "seed"

    @property
    def first_seed(self) -> int:
        """The training seed whose baseline the synthesizer starts from."""
        return self.pretraining.seeds[0]

    @cached_property
    def seed_keys(self) -> list[str]:
        """Partition keys of the training seeds: '0', …"""
        return [str(seed) for seed in self.pretraining.seeds]

    def version(self, code: str, *keys: str) -> str:
        """Code version of an asset: its own `code` revision and a digest of the settings `keys` it depends on.

        Keys are dotted ('corpus.dedup'); a key that does not exist raises AttributeError.
        """
        values = {}
        for key in keys:
            value: Any = self
            for part in key.split("."):
                value = getattr(value, part)
            values[key] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:12]
        return f"{code}-{digest}"
