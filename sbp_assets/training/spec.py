"""What one training run is, as a JSON file that a worker process reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from sbp_assets.settings import Model, Optimizer
from sbp_assets.training.device import Device


class SpecPart(BaseModel):
    """Immutable, and unknown keys are refused."""

    # protected_namespaces=(): `model` is the field's own word for the thing trained here.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Source(SpecPart):
    """Documents of a token-array directory."""

    directory: Path
    split: str | None = Field(None, description="Only documents whose `split` column has this value; null: all.")


class StreamData(SpecPart):
    """Documents concatenated and cut into rows of the context length, for pretraining.

    Epoch k reads a fresh permutation of all `repeated` documents mixed with the k-th of `passes` equal slices of one
    permutation of the `once` documents. Further epochs read `repeated` alone. Reading stops after the run's steps.
    """

    kind: Literal["stream"] = "stream"
    repeated: list[Source] = []
    once: list[Source] = []
    # Epochs that share the `once` documents. The name stays: run.json, in every trained model's directory, has it.
    passes: PositiveInt = 1


class ExamplesData(SpecPart):
    """Whole examples, as many as fit in a row, the rest of the row padded: for synthesizer-tuning.

    The token arrays' documents have a `prompt_tokens` column: so many leading tokens are read without loss.
    """

    kind: Literal["examples"] = "examples"
    source: Source
    epochs: PositiveFloat = 1.0


class TrainingSpec(SpecPart):
    """One training run. The fields under "execution" never change what the model is meant to be."""

    name: str = Field(description="Shown in progress lines.")
    model: Model
    optimizer: Optimizer
    tokenizer_dir: Path
    initial_model: Path | None = Field(None, description="Model directory to start from; null: random weights.")
    data: Annotated[StreamData | ExamplesData, Field(discriminator="kind")]
    steps: PositiveInt | None = Field(None, description="Optimizer steps; null: as many as the examples' epochs take.")
    seed: NonNegativeInt = 0
    heldout: list[Source] = []
    heldout_tokens: PositiveInt = Field(50_000, description="Held-out tokens per measurement, at most.")
    evaluations: PositiveInt = Field(20, description="Measurements after step 0, spread evenly; the last at the end.")
    keep_best: bool = Field(
        False,
        description="Also write the model of the lowest held-out loss, as output_dir/best, where not the last.",
    )

    # Execution.
    device: Device = "auto"
    sharding: Literal["none", "full"] = Field("none", description="full: FSDP2 shards weights and optimizer over GPUs.")
    threads: PositiveInt = Field(1, description="CPU threads per process.")
    microbatch_tokens: PositiveInt = Field(4096, description="Tokens per forward pass of one process.")
    activation_checkpointing: bool = Field(False, description="Compute activations again in the backward pass.")
    compile: bool = Field(False, description="Compile each layer by torch.compile.")
    checkpoint_minutes: PositiveFloat = 5
    checkpoint_every_steps: PositiveInt | None = Field(None, description="Checkpoint by steps instead of by minutes.")
    tensorboard_dir: str | None = Field(None, description="Folder of this model's TensorBoard files; null: none.")
    wandb_project: str | None = Field(None, description="Weights & Biases project of the run; null: none.")
    work_dir: Path = Field(description="Local directory of this run alone, for its checkpoints.")
    output_dir: Path = Field(description="Local directory of the finished model; appears whole or not at all.")

    @model_validator(mode="after")
    def _possible(self) -> TrainingSpec:
        context = self.model.context_length
        if self.optimizer.tokens_per_step % context:
            raise ValueError(
                f"optimizer.tokens_per_step ({self.optimizer.tokens_per_step}) must be a multiple of "
                f"model.context_length ({context})"
            )
        if isinstance(self.data, StreamData):
            if self.steps is None:
                raise ValueError("steps must be given for stream data: a stream has no natural end")
            if not self.data.repeated and not self.data.once:
                raise ValueError("data names neither repeated nor once sources: there is nothing to read")
        return self

    @property
    def rows_per_step(self) -> int:
        """Return the rows of context_length tokens in one optimizer step, over all processes."""
        return self.optimizer.tokens_per_step // self.model.context_length

    @classmethod
    def read(cls, path: Path) -> TrainingSpec:
        """Return the spec of a JSON file; raise ValidationError, which names every key that is wrong."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def write(self, path: Path) -> Path:
        """Write the spec as JSON, creating parent directories, and return `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        return path
