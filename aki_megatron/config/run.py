"""The root of a run configuration and the relations between its parts."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aki_megatron.config.check import ContradictionError, problems
from aki_megatron.config.data import DataConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.section import FilePath, Section


class RunSection(Section):
    """Where the run lives: config.yaml, metrics.jsonl, checkpoints/, logs/, report.html, DONE."""

    dir: FilePath


class InitConfig(Section):
    """Weights to start from. An empty path leaves that part at its random initialization."""

    vision: FilePath | None = None
    """Hugging Face folder of a SigLIP model. The encoder stays frozen."""
    language: FilePath | None = None
    """Hugging Face folder of a Phi-3 model."""
    weights: FilePath | None = None
    """Run folder or checkpoint folder of an earlier run: every weight, no optimizer state. Excludes the two above."""


class AttentionConfig(Section):
    """Who may attend to whom."""

    rule: Literal["causal", "mma"]


class TrainConfig(Section):
    """Length, batch and precision of a run."""

    steps: PositiveInt
    global_batch: PositiveInt
    """Samples per optimizer step over all ranks."""
    micro_batch: PositiveInt
    """Samples per forward pass of one rank."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights, fp32 gradient accumulation."""
    seed: NonNegativeInt = 42


class OptimizerConfig(Section):
    """AdamW and its learning-rate curve: linear from min_lr to lr, then cosine back to min_lr (papers, Table 3)."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat
    warmup_steps: NonNegativeInt
    weight_decay: NonNegativeFloat
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat = 1.0


class ParallelConfig(Section):
    """How the model and its optimizer state are spread over ranks."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    zero_stage: Literal[1, 2, 3] = 3


class CheckpointConfig(Section):
    """When the state is saved and how many checkpoints stay."""

    every: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2


class LogConfig(Section):
    """Where progress goes besides metrics.jsonl and the per-rank logs."""

    every: PositiveInt = 10
    """Steps between console lines and TensorBoard or wandb points."""
    tensorboard: bool = True
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "aki-megatron"


class RunConfig(Section):
    """A complete run. A run that contradicts itself cannot be built: it raises ConfigError."""

    run: RunSection
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig
    attention: AttentionConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's settings besides those the run decides, in DeepSpeed's format; --ds_config fills it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = problems(self)
        if found:
            raise ContradictionError(found)
        return self
