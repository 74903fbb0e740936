"""Settings that decide what the artifacts are, and so feed the code versions of the assets."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from sbp_assets.settings.corpus import ConceptsSource, Corpus
from sbp_assets.settings.formats import Folder
from sbp_assets.settings.section import Count, Fraction, Integer, Name, Real, Section, Seed

PROMPTS = Path(__file__).parent.parent / "synthesis/prompts"


class Pairing(Section):
    """Nearest-neighbour pairing (paper section 2.1)."""

    embedding_model: Name = Field("all-MiniLM-L6-v2", description="Name or path of the sentence-transformers model.")
    embedding_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Precision of the embedding model.")
    embedding_prompt: str | None = Field(
        None,
        description="Text that stands before each document when it is embedded, such as an instruction; null: the "
        "model's own default prompt, if it has one. Its tokens count towards max_tokens.",
    )
    max_tokens: Count = Field(256, description="Tokens of a document that are embedded, from its beginning.")
    index: Literal["flat", "ivf"] = Field(
        "flat", description="Kind of the faiss index; both kinds store 8-bit scalar-quantised vectors."
    )
    nprobe: Count = Field(32, description="Cells of an ivf index that a query searches.")
    centring: Annotated[Integer, Field(ge=0, le=1024)] | None = Field(
        None,
        description="Leading principal components of D's vectors that are removed, with their mean, before the search: "
        "of templated texts they tell the template. 0: the mean alone; null: nothing.",
    )
    key_blocks: Count = Field(
        1,
        description="Blocks that the keys of all shards are divided into, each searched by one task, which holds it in "
        "memory. Pairs do not depend on it.",
    )
    neighbors: Count = Field(20, description="k: nearest neighbours that are kept for each document before the filter.")
    min_similarity: Fraction = Field(0.7, description="Cosine similarity from which two documents count as related.")
    max_similarity: Fraction = Field(
        1.0, description="Cosine similarity above which a pair is dropped as near-duplicates."
    )
    shingle_tokens: Integer = Field(13, ge=1, le=1000, description="Words in a shingle of the near-duplicate filter.")
    max_shared_shingles: Fraction = Field(
        0.1, description="Share of d2's shingles, found in d1, above which a pair is dropped."
    )
    max_pairs_per_document: Count | None = Field(
        8, description="Pairs in which a document may be d1, and as many in which it may be d2; null: all pairs."
    )
    both_directions: bool = Field(True, description="Whether the pair (a, b) also gives the pair (b, a).")

    @model_validator(mode="after")
    def _bounds(self) -> Pairing:
        if self.min_similarity >= self.max_similarity:
            raise ValueError(
                f"min_similarity ({self.min_similarity}) must be below max_similarity ({self.max_similarity})"
            )
        return self


class Model(Section):
    """A Llama-3-style decoder with QK-norm (transformers' Qwen3ForCausalLM built from a config)."""

    hidden_size: Integer = Field(ge=1, le=2**20, description="Width of the residual stream.")
    layers: Integer = Field(ge=1, le=10_000, description="Number of decoder layers.")
    heads: Integer = Field(ge=1, le=10_000, description="Attention heads of a layer.")
    kv_heads: Integer = Field(
        ge=1, le=10_000, description="Key and value heads of a layer, each shared by equally many heads."
    )
    head_dim: Integer = Field(ge=1, le=10_000, description="Width of an attention head.")
    intermediate_size: Integer = Field(ge=1, le=2**24, description="Width of the feed-forward layers.")
    context_length: Integer = Field(ge=32, le=2**27, description="Context in tokens.")
    rope_theta: Real = Field(500_000.0, ge=1, le=1e15, description="Base of the rotary position embeddings.")
    tie_embeddings: bool = Field(True, description="Whether input and output embeddings are one matrix.")

    @model_validator(mode="after")
    def _geometry(self) -> Model:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs")
        return self

    def parameters(self, vocab_size: int) -> int:
        """Return the number of trainable parameters of the built model with a vocabulary of `vocab_size` tokens."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, vocab_size: int) -> float:
        """Return the training FLOPs per token: 6 per matmul parameter plus attention (PaLM, appendix B)."""
        matmul = self.parameters(vocab_size) - (0 if self.tie_embeddings else vocab_size * self.hidden_size)
        return 6 * matmul + 12 * self.layers * self.heads * self.head_dim * self.context_length


class Optimizer(Section):
    """AdamW, or Muon beside it, with linear warm-up and cosine decay."""

    method: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the matrices of the layers, AdamW for embeddings and norms."
    )
    learning_rate: Real = Field(gt=0, le=10, description="Peak learning rate.")
    tokens_per_step: Count = Field(description="Tokens of a step over all processes; a multiple of the context length.")
    warmup: Fraction = Field(0.02, description="Share of the steps in which the learning rate rises.")
    final_learning_rate: Fraction = Field(0.1, description="Learning rate of the last step, as a share of the peak.")
    weight_decay: Real = Field(0.1, ge=0, le=10, description="Decoupled weight decay.")
    beta1: Real = Field(0.9, ge=0, lt=1, description="Decay of the mean of the gradients.")
    beta2: Real = Field(0.95, ge=0, lt=1, description="Decay of the mean of the squared gradients.")
    momentum: Real = Field(0.95, ge=0, lt=1, description="Muon's decay of the mean of the gradients.")
    gradient_clip: Real = Field(1.0, gt=0, le=1e6, description="Norm to which larger gradients are scaled down.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of training; bfloat16: by autocast, with weights in float32."
    )


class Pretraining(Optimizer):
    """The compute-matched comparison: every arm reads exactly the baseline's number of tokens."""

    repetitions: Real = Field(
        20,
        gt=0,
        le=1e6,
        description="Epochs over D that the baseline trains for; they give the token budget of every arm.",
    )
    synthetic_share: Real = Field(0.5, gt=0, lt=1, description="Share of the SBP arm's token budget that is synthetic.")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = Field(
        (0,), description="Training seeds, each a partition; the synthesizer starts from the first one's baseline."
    )
    evaluations: Integer = Field(
        20, ge=1, le=1_000_000, description="Measurements of the held-out loss along a training run."
    )
    heldout_tokens: Count = Field(50_000, description="Held-out tokens of such a measurement, at most.")

    @model_validator(mode="after")
    def _budget(self) -> Pretraining:
        if self.repetitions < 1:
            raise ValueError(f"repetitions is {self.repetitions:g}: a budget below one epoch leaves part of D unread")
        if self.repetitions * (1 - self.synthetic_share) < 1:
            raise ValueError(
                f"synthetic_share {self.synthetic_share:g} of {self.repetitions:g} repetitions leaves the SBP arm "
                "less than one epoch over D; lower synthetic_share or raise repetitions"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds repeat: {list(self.seeds)}")
        return self


class Synthesizer(Optimizer):
    """Synthesizer-tuning (paper section 2.2): loss on d2 alone, from the first seed's baseline checkpoint."""

    epochs: Real = Field(1, gt=0, le=1e6, description="Epochs over the tuning examples.")
    max_document_tokens: Count | None = Field(
        None, description="Tokens at which d1 and d2 are cut; null: half the context."
    )
    start: Literal["final", "early_stopped", "scratch"] = Field(
        "final",
        description="Weights to tune from. final: the baseline's last; early_stopped: those of its lowest held-out "
        "loss, which have memorised less of D; scratch: random ones, an ablation.",
    )
    partners: Literal["nearest", "random"] = Field(
        "nearest",
        description="What a d1 is paired with. nearest: its own d2; random: the d2 of another pair, a placebo without "
        "relations between documents.",
    )
    seed: Seed | None = Field(
        None,
        description="Seed of the order of the tuning examples, of random initial weights and of partners dealt at "
        "random; null: the first training seed.",
    )
    earlier_round: Folder | None = Field(
        None,
        description="The local data_dir of a finished run on the same corpus and shards, whose synthesizer wrote from "
        "seed documents (synthesis.condition seed): for one more round of bootstrapping, as many pairs as there are "
        "neighbour pairs, of its synthetic documents and their seed documents, are tuned on beside these; null: "
        "neighbour pairs alone.",
    )


class Judge(Section):
    """The model that judges factuality and relevance on a fixed sample; its endpoint is a deployment setting."""

    model: Name = Field(description="Name of the model at the endpoint.")
    prompts: str = Field(
        "v1", pattern=r"^\w[\w.-]*$", description="Revision of the prompts: a folder in sbp_assets/synthesis/prompts/."
    )
    documents: Count = Field(
        500, description="Synthetic documents that are judged over all shards, and as many real ones."
    )
    max_chars: Count = Field(8000, description="Characters of a document that the judge is shown, at most.")
    max_tokens: Count = Field(512, description="Tokens of an answer, at most.")
    temperature: Annotated[Real, Field(ge=0, le=10)] | None = Field(
        0.0, description="Sampling temperature; null: the endpoint's own."
    )

    @field_validator("prompts")
    @classmethod
    def _is_a_revision(cls, value: str) -> str:
        known = sorted(path.name for path in PROMPTS.iterdir() if path.is_dir())
        if value not in known:
            raise ValueError(f"is no revision of the prompts; revisions are: {', '.join(known)}")
        return value


class Filter(Section):
    """Which synthetic documents are kept out of training; what is null drops nothing, as in the paper."""

    max_repetition: Fraction | None = Field(
        None, description="Share of its 4-word sequences that repeat an earlier one, above which a document is dropped."
    )
    max_copying: Fraction | None = Field(
        None,
        description="Share of its shingles (of pairing.shingle_tokens words) that stand anywhere in D, above which a "
        "document is dropped.",
    )
    contamination_words: Integer | None = Field(
        None,
        ge=2,
        le=1000,
        description="Words in a run that a document may not share with an item of the evaluation, or it is dropped.",
    )
    min_seed_similarity: Fraction | None = Field(
        None, description="Cosine similarity to its seed document, below which a document is dropped as off-subject."
    )

    @property
    def drops(self) -> bool:
        """Return whether any criterion is set."""
        return any(value is not None for value in self.model_dump().values())


class Synthesis(Section):
    """Synthesis at scale (paper section 2.3)."""

    temperature: Real = Field(
        1.0, ge=0.01, le=100, description="Sampling temperature; below 0.01, vLLM would sample at 0.01."
    )
    top_p: Real = Field(1.0, gt=0, le=1, description="Probability mass that tokens are drawn from.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Precision of the sampled model.")
    salt: str = Field(
        "sbp", description="Text that every sampling seed is derived from; another salt gives other samples."
    )
    condition: Literal["seed", "none", "pairs"] = Field(
        "seed",
        description="What a document is conditioned on. seed: a seed document, by the synthesizer; none: `<bos>` "
        "alone, by the baseline, a placebo without a synthesizer; pairs: nothing is sampled, and d1 and d2 of a real "
        "pair stand in one document, a control with relations and without a synthesizer.",
    )
    seed_order: Literal["in_turn", "random"] = Field(
        "in_turn",
        description="How seed documents are chosen. in_turn: each once, in order of id, then each once more; random: "
        "uniformly at random with replacement, as in the paper.",
    )
    quality_sample: Count = Field(1000, description="Documents of each shard that the quality metrics read.")
    duplicate_sample: Count = Field(
        1_000_000,
        description="N of duplicates@N: documents of all shards that are compared with each other (1M in the paper).",
    )
    judge: Judge | None = Field(
        None, description="The judge; null: factuality and relevance, which only a model can judge, are not measured."
    )
    filter: Filter = Field(Filter(), description="Which synthetic documents are kept out of training.")

    @model_validator(mode="after")
    def _seeds_mean_something(self) -> Synthesis:
        if self.condition == "none" and self.filter.min_seed_similarity is not None:
            raise ValueError(
                "filter.min_seed_similarity needs condition seed: with condition none no document is written from a "
                "seed document"
            )
        return self


class Evaluation(Section):
    """What every model is scored on."""

    heldout_documents: Count = Field(500, description="Held-out documents that perplexity is measured on, at most.")
    concept_questions: Integer = Field(
        500,
        ge=0,
        le=2**53,
        description="Multiple-choice questions about the concepts, from name to value, and as many reversed; 0 for all "
        "other sources.",
    )
    benchmarks: tuple[
        Literal[
            "openwebtext2", "lambada", "mmlu", "arc_challenge", "arc_easy", "sciq", "winogrande", "triviaqa", "webqs"
        ],
        ...,
    ] = Field((), description="Names of the stock benchmarks (paper section 4); empty: none.")
    benchmark_limit: Count | None = Field(None, description="Examples of each stock benchmark, at most; null: all.")


class Contamination(Section):
    """Comparison of the evaluation's items with the training documents, by shared runs of words."""

    words: Integer = Field(13, ge=2, le=1000, description="n of the n-grams (GPT-3, appendix C).")
    min_words: Integer = Field(
        8,
        ge=1,
        le=1000,
        description="Words below which an item is not compared; from here up to n, an item is one n-gram.",
    )
    max_share: Fraction = Field(
        0.01, description="Share of contaminated items of an evaluation set, above which the check fails."
    )


class Experiment(Section):
    """Everything that decides what the artifacts are: equal experiments have equal artifacts."""

    name: str = Field(
        pattern=r"^[a-z0-9_]+$", max_length=100, description="Name, in lower-case letters, digits and underscores."
    )
    corpus: Corpus = Field(description="The real documents.")
    pairing: Pairing = Field(Pairing(), description="Which documents are related.")
    model: Model = Field(description="The geometry of all models.")
    pretraining: Pretraining = Field(description="Training of the arms.")
    synthesizer: Synthesizer = Field(description="Tuning of the synthesizer.")
    synthesis: Synthesis = Field(Synthesis(), description="Sampling and quality of the synthetic documents.")
    evaluation: Evaluation = Field(Evaluation(), description="Scores of the models.")
    contamination: Contamination = Field(Contamination(), description="Leaks from the evaluation into training.")

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
        if self.synthesizer.earlier_round and not self.conditional:
            raise ValueError(
                f"synthesizer.earlier_round is set and synthesis.condition is {self.synthesis.condition}: the "
                "synthesizer that it tunes would write nothing. Unset one of them"
            )
        if self.evaluation.concept_questions and self.corpus.source.kind != "concepts":
            # Questions exist only where the ground truth is known.
            object.__setattr__(self, "evaluation", self.evaluation.model_copy(update={"concept_questions": 0}))
        return self

    @property
    def max_document_tokens(self) -> int:
        """Return the tokens of d1 and of d2 that a tuning example or a prompt may hold, without special tokens."""
        return self.synthesizer.max_document_tokens or (self.model.context_length - 3) // 2

    @property
    def pair_tokens(self) -> int:
        """Return the tokens of the longest tuning example: <bos> d1 <related> d2 <eos>."""
        return 2 * self.max_document_tokens + 3

    @cached_property
    def shard_keys(self) -> list[str]:
        """Return the partition keys of the corpus shards: '00000', '00001', …"""
        return [f"{shard:05d}" for shard in range(self.corpus.shards)]

    @property
    def block_keys(self) -> list[str]:
        """Return the partition keys of the blocks of keys: '00000', …"""
        return [f"{block:05d}" for block in range(self.pairing.key_blocks)]

    @property
    def ground_truth(self) -> ConceptsSource | None:
        """Return the source where it comes with the ground truth of every sentence; None for all other sources."""
        return self.corpus.source if isinstance(self.corpus.source, ConceptsSource) else None

    @property
    def truth(self) -> ConceptsSource | None:
        """Return `ground_truth`, under the key by which code versions name it."""
        # A code version is a digest of keys and values. With another key, tasks, pair_truth, quality and
        # posterior_predictive would be stale in every finished store.
        return self.ground_truth

    @property
    def conditional(self) -> bool:
        """Return whether synthetic documents are written by the synthesizer from a seed document, as in SBP."""
        return self.synthesis.condition == "seed"

    @property
    def sampled(self) -> bool:
        """Return whether a model samples synthetic documents; False where they are real pairs in one document."""
        return self.synthesis.condition != "pairs"

    @property
    def tuning_seed(self) -> int:
        """Return the seed of synthesizer-tuning."""
        return self.first_seed if self.synthesizer.seed is None else self.synthesizer.seed

    @property
    def first_seed(self) -> int:
        """Return the training seed whose baseline the synthesizer starts from."""
        return self.pretraining.seeds[0]

    @cached_property
    def seed_keys(self) -> list[str]:
        """Return the partition keys of the training seeds: '0', …"""
        return [str(seed) for seed in self.pretraining.seeds]

    def version(self, code: str, *keys: str) -> str:
        """Return an asset's code version: its own `code` revision and a digest of the settings `keys` it depends on.

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
