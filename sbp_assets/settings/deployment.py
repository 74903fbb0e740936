"""Settings that say where and how an experiment runs. They are never part of an artifact's identity."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sbp_assets.settings.formats import Cron, Folder, Location, MemorySize, Owner, RayAddress, TimeZone, WebAddress
from sbp_assets.settings.section import AtATime, Count, Integer, Real, Seconds, Section


class Deployment(Section):
    """Where and how the experiment runs. Never part of an artifact's identity.

    Artifacts do not depend on it, except for the samples that a shard gets from its `generation_engine`.
    """

    data_dir: Location = Field(
        ".sbp/{profile}/artifacts",
        description="Artifact store: a local folder or an fsspec URL; {profile} stands for the profile's name.",
    )
    work_dir: Folder = Field(
        ".sbp/{profile}/work", description="Local folder for training checkpoints, ledgers and temporary files."
    )
    instance_dir: Folder = Field(
        ".sbp/{profile}/instance",
        description="Local folder for Dagster's run and event storage and its logs; for the logs alone where "
        "$SBP_POSTGRES_URL is set.",
    )
    postgres_schema: str | None = Field(
        None,
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="Schema of the run and event storage where $SBP_POSTGRES_URL is set; null: a name made from the "
        "profile and data_dir.",
    )
    cache_gb: Real = Field(
        50, gt=0, le=1e9, description="Size in GB of the cache in work_dir for artifacts of a remote data_dir."
    )
    storage_patience: Seconds = Field(
        60, description="Seconds for which a remote data_dir may be unreachable before a transfer fails."
    )
    shards_per_run: AtATime = Field(
        50,
        description="Corpus shards that a backfill and `sbp run` put into one run of the first step, at most; each "
        "later step takes one more, since Dagster puts assets of equal numbers into one run.",
    )
    checked_shards: AtATime = Field(
        8,
        description="Other corpus shards that the checks of one shard read, at most: a sample, of which docs/checks.md "
        "says what it finds. `sbp verify --full` reads all.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of all models; auto: CUDA where there is a GPU, else the CPU."
    )
    training_processes: AtATime = Field(1, description="Processes of a training run: one per GPU, or on the CPU.")
    training_sharding: Literal["none", "full"] = Field(
        "none", description="full: FSDP2 shards the model over the training processes."
    )
    microbatch_tokens: Count = Field(4096, description="Tokens of one forward pass in one training process.")
    activation_checkpointing: bool = Field(
        False,
        description="Whether training keeps only the input of each layer and computes it again in the backward pass: "
        "less memory for a third more computation. On a CPU rows are then computed under a mask, which is slower.",
    )
    compile: bool = Field(
        False,
        description="Whether training compiles each layer by torch.compile, which needs a C++ compiler. On a CPU rows "
        "are then computed under a mask.",
    )
    checkpoint_minutes: Real = Field(5, gt=0, le=1e6, description="Minutes between two checkpoints of a training run.")
    tensorboard_dir: Folder | None = Field(
        None,
        description="Local folder for TensorBoard event files of training runs; {profile} stands for the profile's "
        "name; null: none are written.",
    )
    wandb_project: str | None = Field(
        None,
        pattern=r"^[^/\\#?%:[:cntrl:]]{1,128}$",
        description="Weights & Biases project that shows training runs, where the package wandb is installed; null: "
        "none. Its key is read from $WANDB_API_KEY alone.",
    )
    generation_engine: Literal["auto", "vllm", "transformers"] = Field(
        "auto",
        description="Engine that samples the synthetic documents; auto: vLLM where it is installed, and for a shard "
        "that has been started the engine that started it. This is the one deployment setting that can change an "
        "artifact, because two engines draw different samples; finished shards stay as they are.",
    )
    engine_processes: AtATime = Field(1, description="Generation engines, each a process: one per GPU, or CPU.")
    engine_max_sequences: AtATime = Field(256, description="Sequences that one engine samples at a time, at most.")
    gpu_memory_utilization: Real = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory that a generation engine takes."
    )
    embedding_batch_size: AtATime = Field(
        16,
        description="Documents of pairing.max_tokens tokens that are embedded at a time, or more that are shorter; on "
        "a CPU a core takes 2,048 tokens at most.",
    )
    evaluation_batch_size: AtATime = Field(32, description="Requests that are scored at a time.")
    memory_limit: MemorySize = Field(
        "4GB", description="Memory that DuckDB may take, with its unit; above it DuckDB spills to work_dir."
    )
    memory_per_worker: MemorySize = Field(
        "8GB",
        description="Memory that a block of keys may take; a larger one is refused, with the number that fits. On a "
        "cluster it is kept free for each search of a block.",
    )
    ray_address: RayAddress | None = Field(
        None,
        description="Ray cluster whose nodes execute the tasks of a run: host:port, auto (the one that this machine is "
        "a node of), or local (one that is started here for the run); null: they are executed in the run's process. "
        "pairing/embeddings and pairing/partial_candidates have tasks.",
    )
    benchmarks_dir: Folder | None = Field(
        None,
        description="Folder with the stock benchmarks as Parquet files; null: they come from the Hugging Face hub.",
    )
    judge_url: WebAddress | None = Field(
        None,
        description="OpenAI-compatible endpoint that serves the judge, '/v1' included; null: none. Its key is read "
        "from $SBP_JUDGE_API_KEY alone.",
    )
    judge_concurrency: AtATime = Field(8, description="Requests to the judge at a time.")
    judge_timeout: Seconds = Field(60, description="Seconds that the judge may take to answer one request.")
    judge_retries: Integer = Field(
        5, ge=0, le=100, description="How often a failed request to the judge is retried, with exponential backoff."
    )
    automation: bool = Field(
        False, description="Whether schedules and sensors run from the start; false: once switched on in the UI."
    )
    nightly: Cron = Field("0 2 * * *", description="Start of the nightly window, as a cron expression.")
    nightly_until: Cron | None = Field(
        "0 8 * * *",
        description="End of the nightly window, as a cron expression: after it nothing more is started until the next "
        "one; null: the window does not end.",
    )
    timezone: TimeZone = Field("UTC", description="Time zone of the nightly window, by its IANA name.")
    source_poll_seconds: AtATime = Field(
        300, description="Seconds between two listings of the corpus source by the sensor."
    )
    ingest_new_files: bool = Field(
        False, description="Whether the sensor ingests new and changed source files; false: it reports them."
    )
    overdue_days: Annotated[Integer, Field(ge=1, le=36_500)] | None = Field(
        30, description="Age in days from which a fan-in asset is overdue; null: it never is."
    )
    webserver_url: WebAddress = Field("http://127.0.0.1:3000", description="URL of the webserver, for links to runs.")
    owners: tuple[Owner, ...] = Field(
        ("team:pretraining",),
        description="Owners of all assets, as Dagster shows them: team:NAME or an e-mail address.",
    )


# The settings that name a folder. The first three hold the experiment, each below the profile's folder, and below that
# of a branch, under this name.
EXPERIMENT_FOLDERS = {"data_dir": "artifacts", "work_dir": "work", "instance_dir": "instance"}
WRITTEN_FOLDERS = (*EXPERIMENT_FOLDERS, "tensorboard_dir")
FOLDERS = (*WRITTEN_FOLDERS, "benchmarks_dir")
