"""The root of a run configuration and the relations between its parts."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aki_megatron.config.cross_checks import ContradictionError, problems
from aki_megatron.config.data import DataConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.section import Counts, FilePath, Section


class RunSection(Section):
    """Where the run lives: config.yaml, metrics.jsonl, checkpoints/, logs/, report.html, DONE."""

    dir: FilePath
    """The folder; a run that is started again in the same folder goes on from its newest checkpoint."""


class InitConfig(Section):
    """Weights to start from. An empty path leaves that part at its random initialization."""

    vision: FilePath | None = None
    """Hugging Face folder of a SigLIP model. The encoder stays frozen."""
    language: FilePath | None = None
    """Hugging Face folder of a language model of model.decoder.family: Phi-3, LLaMA 3, Qwen2.5 or Qwen3."""
    weights: FilePath | None = None
    """Run folder or checkpoint folder of an earlier run: every weight, no optimizer state. Excludes the two above."""


class AttentionConfig(Section):
    """Who may attend to whom."""

    rule: Literal["causal", "mma"]
    """causal: each place sees what stands before it. mma: image places see the prompt of their turn as well."""


class TrainConfig(Section):
    """Length, batch and precision of a run."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    global_batch_size: PositiveInt
    """Samples per optimizer step over all ranks; rows with data.packing.enabled."""
    micro_batch_size: PositiveInt
    """Most samples (or rows) per forward pass of one rank. A rank's share of the global batch is cut into the largest
    equal parts that this allows; results do not depend on it, memory and speed do."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights, fp32 gradient accumulation."""
    seed: NonNegativeInt = 42
    """Decides the initial weights and the order of samples."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate curve: linear from min_lr to lr, then cosine back to min_lr (papers, Table 3)."""

    lr: PositiveFloat
    """Peak learning rate, reached after the warm-up."""
    min_lr: NonNegativeFloat
    """Learning rate of the first and of the last step."""
    warmup_steps: NonNegativeInt
    """Optimizer steps from min_lr to lr; fewer than train.steps."""
    weight_decay: NonNegativeFloat
    """AdamW's decoupled weight decay; embeddings are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's decay rate of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's term for numerical stability."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global L2 norm."""


class ParallelConfig(Section):
    """How the model and its optimizer state are spread over ranks; docs/combinations.md says what goes together."""

    tensor: PositiveInt = 1
    """Ranks that share every layer (tensor parallelism); inside one machine, where links are fast."""
    pipeline: PositiveInt = 1
    """Stages the layers are dealt into (pipeline parallelism, 1F1B)."""
    virtual_stages: PositiveInt = 1
    """Separate runs of layers on each pipeline rank: 2 or more is interleaved 1F1B, a smaller bubble for more
    traffic."""
    layers_per_stage: Counts = ()
    """Decoder layers of each of the pipeline x virtual_stages stages, in model order; empty: cut by cost."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO over the data-parallel ranks: 1 splits optimizer state, 2 gradients too, 3 weights too. 0 splits
    nothing and does without DeepSpeed; fp32 only."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only the input of each decoder layer and run the layer again for the backward pass; a third more
    arithmetic, a fraction of the memory."""
    mask_check_interval: PositiveInt = 100
    """Steps between comparisons of the attention layouts that the ranks of a replica have built; the first step always
    compares."""


class CheckpointConfig(Section):
    """When the state is saved and how many checkpoints stay."""

    interval: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that are multiples of this stay for ever; 0: none does."""
    async_save: bool = True
    """Training goes on while a background thread writes a copy in the host's memory (12 bytes per parameter, shared by
    the ranks); false: training waits for the disk and needs no copy."""


class WatchConfig(Section):
    """What is watched while a run trains, and what happens then; everything is written to <run.dir>/events.jsonl."""

    step_timeout_factor: float = Field(default=20.0, gt=1)
    """A step that takes longer than this many times the median of the last steps (and than step_timeout) is a hang: the
    stacks of all ranks are written, the rank that lags is named, and the run ends, to be started again."""
    step_timeout: PositiveFloat = 600.0
    """No shorter step is ever a hang; nor is the first step, a checkpoint or start-up before init_timeout."""
    init_timeout: PositiveFloat = 3600.0
    """Longest time for start-up, the first step, a checkpoint, or anything else."""
    on_non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """A step whose loss or gradient is not finite. skip: the optimizer does not move. rollback: back to the newest
    checkpoint, and the data of the steps since are left out. stop: the run ends with an error."""
    on_loss_spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """The same for a loss or a gradient norm above loss_spike_factor times the median of the last loss_spike_window steps."""
    loss_spike_factor: float = Field(default=4.0, gt=1)
    """Loss or gradient norm relative to the median."""
    loss_spike_window: PositiveInt = 128
    """Steps in the median; before that many are done nothing is a spike."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks to one and the same checkpoint after which the run ends with an error."""


class LogConfig(Section):
    """Where progress goes besides metrics.jsonl and the per-rank logs."""

    interval: PositiveInt = 10
    """Steps between console lines and TensorBoard or wandb points."""
    tensorboard: bool = True
    """Write TensorBoard event files under the run folder."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline writes under the run folder, online uploads."""
    wandb_project: str = "aki-megatron"
    """Project the run is logged to."""


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
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's settings besides those the run decides, in DeepSpeed's format; --ds_config fills it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = problems(self)
        if found:
            raise ContradictionError(found)
        return self
