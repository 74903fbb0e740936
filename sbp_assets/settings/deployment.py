"""Settings that say where and how an experiment runs. They are never part of an artifact's identity."""

from __future__ import annotations

import re
import zoneinfo
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from sbp_assets.settings.section import Fraction, PositiveFloat, Section


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
