"""Typed settings: what is computed (`Experiment`) and where and how it runs (`Deployment`).

`Experiment` values change what an artifact *is*, so they feed asset code versions. `Deployment` values never do.
A profile is a YAML file holding both; `load_settings` reads the one named by `SBP_PROFILE` (a name in
`sbp_assets/profiles/` or a path) and applies environment overrides such as `SBP_EXPERIMENT__CORPUS__SHARDS=8`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zoneinfo
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

PROFILES_DIR = Path(__file__).parent / "profiles"
ENV_PREFIX = "SBP_"
ENV_SEPARATOR = "__"
DEFAULT_PROFILE = "demo"

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


class SettingsError(ValueError):
    """A profile or an environment override that cannot be used; the message names the key and the reason."""


# A user with a password (a colon before digits alone is a port); over HTTP also a bare user, or a query, which is where
# tokens and signatures stand.
_CREDENTIALS = re.compile(r"://[^/\s]*:(?!\d+(?:/|$))\S*@|\bhttps?://(?:[^/\s]*@|\S*\?)", re.IGNORECASE)


class Section(BaseModel):
    """A settings section: immutable; unknown keys are refused, and so are credentials in a URL.

    Settings are digested, printed and kept beside what they made, so no key may be in them. Errors never repeat a
    value: what is wrong may be just that it is a secret.
    """

    # protected_namespaces=(): `model` is the field's own word for the thing pretrained here.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    @field_validator("*")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        texts = [text for text in (value if isinstance(value, tuple) else (value,)) if isinstance(text, str)]
        # fsspec chains URLs with '::'.
        if any(_CREDENTIALS.search(url) for text in texts for url in text.split("::")):
            raise ValueError(
                "holds a URL with a user, password or query: settings are printed and kept, so credentials are given "
                "to the file system in the environment alone; see docs/security.md"
            )
        return value


class ConceptsSource(Section):
    """The embedded corpus: seeded documents about invented concepts, the truth of every sentence known."""

    kind: Literal["concepts"] = "concepts"
    documents: PositiveInt = Field(description="Documents generated over all shards.")
    concepts: PositiveInt = Field(150, description="Invented concepts the documents are about.")
    attributes: Annotated[int, Field(ge=2, le=8)] = Field(6, description="Facts that exist per concept.")
    facts_per_document: Annotated[int, Field(ge=1, le=8)] = Field(3, description="Facts one document states.")
    restatements: Annotated[int, Field(ge=0, le=8)] = Field(
        0, description="Of those facts, how many the document states once more, in another wording, near its end."
    )
    zipf_exponent: Annotated[float, Field(ge=0)] = Field(0.8, description="Popularity of concept r is r**-exponent.")
    seed: NonNegativeInt = 0


class FiveTokensSource(Section):
    """The negative control: documents of letters drawn uniformly from five, which nothing can be learned from."""

    kind: Literal["five_tokens"] = "five_tokens"
    documents: PositiveInt = Field(description="Documents generated over all shards.")
    tokens_per_document: Annotated[int, Field(ge=16)] = Field(96, description="Letters of a document, on average.")
    seed: NonNegativeInt = 0


class FilesSource(Section):
    """Files under a path or fsspec URL: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or .txt (one document a file)."""

    kind: Literal["files"] = "files"
    path: str = Field(min_length=1, description="A file, a directory (read recursively), a glob, or an fsspec URL.")
    text_field: str = "text"
    id_field: str | None = Field("id", description="Null, or absent from a row: the id is made from file and line.")
    url_field: str = "url"
    files_per_shard: PositiveInt | None = Field(
        None, description="Null: files are dealt over the shards. A number keeps assignments as files are added."
    )


class HubSource(Section):
    """A Hugging Face data set, streamed."""

    kind: Literal["hub"] = "hub"
    name: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, description="Pin a commit for a reproducible corpus.")
    text_field: str = "text"
    id_field: str | None = "id"
    url_field: str = "url"
    max_documents: PositiveInt | None = None


class Dedup(Section):
    """MinHash-LSH proposes duplicate candidates; the exact Jaccard similarity of word shingles decides."""

    shingle_words: PositiveInt = 5
    permutations: PositiveInt = 128
    bands: PositiveInt = 32
    threshold: Fraction = Field(0.8, description="Exact Jaccard similarity at or above which a document is dropped.")
    seed: NonNegativeInt = 42

    @model_validator(mode="after")
    def _bands_divide(self) -> Dedup:
        if self.permutations % self.bands:
            raise ValueError(f"permutations ({self.permutations}) must be a multiple of bands ({self.bands})")
        return self


class Split(Section):
    """Shares of the de-duplicated documents, by salted hash of the id; what is left over is not used."""

    unique: Fraction = Field(
        description="D: the fixed corpus that the baseline repeats and the synthesizer learns from."
    )
    oracle: Fraction = Field(description="Further real documents that only the oracle arm reads.")
    heldout: Fraction = Field(description="Documents no arm trains on.")
    salt: str = "sbp"

    @model_validator(mode="after")
    def _possible(self) -> Split:
        if self.heldout <= 0:
            raise ValueError("heldout must be above 0: without held-out documents no arm can be compared")
        if self.unique <= 0:
            raise ValueError("unique must be above 0: it is the corpus to learn from")
        if self.unique + self.oracle + self.heldout > 1 + 1e-9:
            raise ValueError(f"unique + oracle + heldout is {self.unique + self.oracle + self.heldout:g}, above 1")
        return self


class Tokenizer(Section):
    """A byte-level BPE trained on D, or a named Hugging Face tokenizer (name or path)."""

    name: str | None = None
    vocab_size: Annotated[int, Field(ge=300)] = Field(4096, description="Of the trained tokenizer, specials included.")


class Corpus(Section):
    source: Annotated[ConceptsSource | FiveTokensSource | FilesSource | HubSource, Field(discriminator="kind")]
    shards: Annotated[int, Field(ge=1, le=100_000)]
    max_chars: PositiveInt | None = Field(None, description="Longer documents are cut here, at a word boundary.")
    dedup: Dedup = Dedup()
    split: Split
    tokenizer: Tokenizer = Tokenizer()
    expected_unique_tokens: PositiveInt | None = Field(
        None, description="Tokens that D is expected to hold: for `sbp plan` alone, never part of an asset's version."
    )
    expected_unique_documents: PositiveInt | None = Field(
        None, description="Documents that D is expected to hold; null: expected_unique_tokens at a mean length."
    )


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


class Deployment(Section):
    """Where and how the experiment runs. Never part of an artifact's identity.

    What the artifacts are does not depend on it, but for the samples that a shard gets from its `generation_engine`.
    """

    data_dir: str = Field(".sbp/{profile}/artifacts", description="Artifact store; {profile} is filled in.")
    work_dir: str = Field(".sbp/{profile}/work", description="Local scratch: training checkpoints, generation ledgers.")
    instance_dir: str = Field(
        ".sbp/{profile}/instance",
        description="Dagster's own records and logs; where $SBP_POSTGRES_URL is set, logs alone.",
    )
    postgres_schema: str | None = Field(
        None,
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="Of the records, where $SBP_POSTGRES_URL is set; null: named after the profile and data_dir.",
    )
    cache_gb: PositiveFloat = Field(50, description="Copies of a remote data_dir's artifacts kept in work_dir, in GB.")
    storage_patience: PositiveFloat = Field(
        60, description="Seconds that a remote data_dir may be out of reach before a transfer fails."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    training_processes: PositiveInt = Field(1, description="torchrun processes: GPUs, or CPU processes.")
    training_sharding: Literal["none", "full"] = Field("none", description="full: FSDP2 over the processes.")
    microbatch_tokens: PositiveInt = Field(4096, description="Tokens per forward pass of one process.")
    checkpoint_minutes: PositiveFloat = 5
    generation_engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="What samples the syntheses; auto: vllm where it is installed. The one value of these that can "
        "change an artifact, because two engines draw other samples. What is finished stays as it is, and with auto a "
        "shard is finished by the engine that began it.",
    )
    engine_processes: PositiveInt = Field(1, description="Generation engines, each a process: GPUs, or CPU processes.")
    engine_max_sequences: PositiveInt = 256
    gpu_memory_utilization: Fraction = 0.9
    embedding_batch_size: PositiveInt = 16
    evaluation_batch_size: PositiveInt = 32
    memory_limit: str = Field("4GB", description="DuckDB's, before it spills to work_dir.")
    benchmarks_dir: str | None = Field(None, description="Local parquet files of the stock benchmarks; null: the hub.")
    judge_url: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="OpenAI-compatible endpoint, '/v1' included; its key only ever from $SBP_JUDGE_API_KEY.",
    )
    judge_concurrency: PositiveInt = Field(8, description="Requests to the judge at a time.")
    judge_timeout: PositiveFloat = Field(60, description="Seconds the judge may take to answer one request.")
    judge_retries: NonNegativeInt = Field(5, description="Of a failed request, with exponential backoff.")
    automation: bool = Field(False, description="Schedules and sensors run from the start; false: once switched on.")
    nightly: str = Field("0 2 * * *", description="When the nightly automation begins to fill in shards.")
    nightly_until: str | None = Field(
        "0 8 * * *", description="When it begins nothing more until the next night; null: it goes on all day."
    )
    timezone: str = Field("UTC", description="Of both, by its IANA name.")
    source_poll_seconds: PositiveInt = Field(300, description="Between two looks at the listing of the corpus.")
    take_in_new_files: bool = Field(
        False, description="What has changed at the source goes into the manifest by itself, not only into a report."
    )
    overdue_days: PositiveInt | None = Field(
        30, description="Age at which an asset made from all shards is called overdue; null: never."
    )
    webserver_url: str = Field("http://127.0.0.1:3000", description="Where people open Dagster, for links to runs.")
    owners: tuple[str, ...] = ("team:pretraining",)

    @field_validator("nightly", "nightly_until")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\s*([\w*/,-]+\s+){4}[\w*/,-]+\s*", value):
            raise ValueError("is not a cron expression: give minute, hour, day, month and weekday, as in '0 2 * * *'")
        return value

    @field_validator("timezone")
    @classmethod
    def _known_timezone(cls, value: str) -> str:
        if value not in zoneinfo.available_timezones():
            raise ValueError("is not a time zone: give an IANA name, as in Europe/Berlin")
        return value


class Settings(Section):
    """A loaded profile. `profile` is its file stem; relative deployment paths are resolved at the load."""

    profile: str
    experiment: Experiment
    deployment: Deployment = Deployment()

    @model_validator(mode="after")
    def _judge_answers_somewhere(self) -> Settings:
        if self.experiment.synthesis.judge and not self.deployment.judge_url:
            raise ValueError(
                "experiment.synthesis.judge is set and deployment.judge_url is not: name the OpenAI-compatible "
                "endpoint that serves the judge, or set experiment.synthesis.judge to null"
            )
        return self


def profile_path(profile: str) -> Path:
    """File of a profile given by name or path; SettingsError names the known ones."""
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES_DIR / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES_DIR.glob("*.yaml")))
        raise SettingsError(
            f"profile {profile!r}: no file {path}. Known profiles: {known}; or give a path ending in .yaml"
        )
    return path


def _where(location: tuple[int | str, ...], environ: dict[str, str]) -> str:
    """Dotted key of a validation error, and the environment variable that set it or could."""
    # The source's kind stands in the location as pydantic's tag of the union; it is no key of the profile.
    keys = [str(part) for index, part in enumerate(location) if not (index and location[index - 1] == "source")]
    if len(location) == 3 and location[-1] == "source":
        keys = [str(part) for part in location]
    name = ENV_PREFIX + ENV_SEPARATOR.join(keys).upper()
    return f"{'.'.join(keys) or '(profile)'} ({'from' if name in environ else 'environment variable'} {name})"


def fault(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the text that is: PyYAML's own message quotes it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def load_settings(profile: str | None = None, environ: dict[str, str] | None = None) -> Settings:
    """Settings of `profile` (default: $SBP_PROFILE, then 'demo') with environment overrides applied.

    An override is `SBP_` + the path with `__` between levels, its value read as YAML:
    `SBP_EXPERIMENT__PRETRAINING__REPETITIONS=4`. Raises SettingsError naming every key that is wrong and why.
    """
    environ = dict(os.environ) if environ is None else environ
    profile = profile or environ.get("SBP_PROFILE") or DEFAULT_PROFILE
    path = profile_path(profile)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {fault(error)}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: expected a mapping with `experiment` and `deployment`, got {type(values).__name__}"
        )
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or ENV_SEPARATOR not in name:
            continue
        *parents, key = name.removeprefix(ENV_PREFIX).lower().split(ENV_SEPARATOR)
        section = values
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict):
            raise SettingsError(f"environment variable {name}: {'.'.join(parents)} is a value, not a section")
        try:
            section[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"environment variable {name}: not YAML: {fault(error)}") from None
    values.setdefault("profile", path.stem)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_where(e['loc'], environ)}: {e['msg']}" for e in error.errors()]
        raise SettingsError(f"profile {profile} ({path}) cannot be used:\n" + "\n".join(lines)) from error
    directories = {}
    for key in ("data_dir", "work_dir", "instance_dir"):
        filled = getattr(settings.deployment, key).format(profile=settings.profile)
        directories[key] = filled if "://" in filled else str(Path(filled).resolve())
    return settings.model_copy(update={"deployment": settings.deployment.model_copy(update=directories)})
