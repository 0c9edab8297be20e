"""The configuration of a run: plain data, one section per part; cross_checks.py checks them against each other."""

import bisect
import itertools
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import DataConfig
from aki_megatron.config.evaluate_section import EvaluateConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.section import (
    AtMost,
    Counts,
    FilePath,
    NonNegativeInt,
    PositiveInt,
    Seconds,
    Section,
    Seed,
    no_stand_in,
)
from aki_megatron.config.trainable import PhaseTrainable, TrainableConfig, TrainingPlan, training_plans
from aki_megatron.config.validation_section import ValidationConfig

MAX_BATCH_SIZE = 2**20
"""Samples per optimizer step; every step plans all of them."""


class RunSection(Section):
    """Where the run writes: config.yaml, metrics.jsonl, checkpoints/, logs/, report.html, DONE."""

    dir: FilePath
    """Run folder. A run started again in the same folder resumes from its newest checkpoint."""


class InitConfig(Section):
    """Pretrained weights to start from. Parts without a path are initialized at random."""

    vision: FilePath | None = None
    """Hugging Face folder of a SigLIP model. The encoder stays frozen unless trainable.vision says otherwise."""
    audio: FilePath | None = None
    """Hugging Face folder of a Whisper model, of which the encoder is taken. It stays frozen."""
    language: FilePath | None = None
    """Hugging Face folder of a language model of the family model.decoder.family."""
    weights: FilePath | None = None
    """Run folder or checkpoint folder of an earlier run: loads all weights, no optimizer state. Excludes init.vision,
    init.audio and init.language."""


class TrainConfig(Section):
    """Length, batch size and precision."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    global_batch_size: Annotated[PositiveInt, AtMost(MAX_BATCH_SIZE)]
    """Samples per optimizer step over all ranks; packed sequences where data.packing.enabled."""
    micro_batch_size: Annotated[PositiveInt, AtMost(MAX_BATCH_SIZE)]
    """Largest number of samples (or packed sequences) per forward pass of one data-parallel rank. The rank's batch is
    divided into equal micro-batches of at most this size. Changes memory and speed, not results."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights and gradient accumulation. fp32: everything in fp32."""
    seed: Seed = 42
    """Seed of the random initialization and of the order of samples."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule: linear from min_lr to lr, then cosine back to min_lr (papers, Table 3)."""

    lr: PositiveFloat
    """Peak learning rate, reached after the warm-up."""
    min_lr: NonNegativeFloat
    """Learning rate at which the warm-up begins and the cosine ends, at train.steps."""
    warmup_steps: NonNegativeInt
    """Optimizer steps of the warm-up from min_lr to lr; less than train.steps. 0: the first step has lr."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay; embeddings are not decayed."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of AdamW's second moment."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon, added to the denominator."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this global L2 norm."""


class ParallelConfig(Section):
    """How model and optimizer state are distributed over ranks; docs/combinations.md lists what works together."""

    tensor: PositiveInt = 1
    """Tensor-parallel size: ranks that share every layer. Keep it within one node."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel size: ranks that the layers are distributed over, scheduled 1F1B."""
    virtual_stages: PositiveInt = 1
    """Pipeline stages per pipeline rank. 2 or more is interleaved 1F1B: a smaller bubble for more communication."""
    layers_per_stage: Counts = ()
    """Decoder layers of each of the pipeline x virtual_stages stages, in model order; empty: balanced by cost."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_stand_in)] = 3
    """DeepSpeed ZeRO over the data-parallel ranks: 1 partitions optimizer state, 2 gradients too, 3 weights too. 0
    partitions nothing and does not use DeepSpeed; fp32 only."""
    recompute: Literal["none", "full"] = "none"
    """full: activation checkpointing. Keep only the input of each decoder layer and recompute the layer in the backward
    pass; about a third more compute for a fraction of the memory."""
    mask_check_interval: PositiveInt = 100
    """Optimizer steps between checks that all ranks of a replica built the same attention mask; the first step is
    always checked."""


class CheckpointConfig(Section):
    """When the state is saved and which checkpoints are kept."""

    interval: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep; older ones are deleted once a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Keep checkpoints of steps that are multiples of this forever; 0: none."""
    async_save: bool = True
    """Write checkpoints in a background thread from a copy in host memory (12 bytes per parameter, divided among the
    ranks); false: training waits until a checkpoint is on disk and no copy is made."""
    exclude_frozen_parameters: bool = False
    """true: leave out of checkpoints the weights that no phase of the run trains and that came from init.*, and know
    them by their sha256. They are read from there again, so what init.* names must stay; docs/training_parts.md."""


class WatchConfig(Section):
    """Detection of hangs, non-finite values and loss spikes, and the reaction; recorded in <run.dir>/events.jsonl."""

    step_timeout_factor: float = Field(default=20.0, gt=1)
    """A step that takes longer than this many times the median of recent steps, and longer than step_timeout, is a
    hang: the stacks of all ranks are written, the straggler is named, and the run ends to be started again."""
    step_timeout: Seconds = 600.0
    """Seconds. Shorter steps are never a hang. Start-up, the first step and checkpoints may take up to init_timeout."""
    init_timeout: Seconds = 3600.0
    """Seconds. Longest time for start-up, the first step, a checkpoint, or any other phase."""
    on_non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """Reaction to a non-finite loss or gradient. skip: no optimizer update. rollback: return to the newest checkpoint
    and leave out the data of the steps since. stop: end the run with an error."""
    on_loss_spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """Reaction, as in on_non_finite, to a loss or gradient norm above loss_spike_factor times the median of the last
    loss_spike_window steps."""
    loss_spike_factor: float = Field(default=4.0, gt=1)
    """Threshold of a spike: loss or gradient norm relative to the median."""
    loss_spike_window: Annotated[PositiveInt, AtMost(2**20)] = 128
    """Optimizer steps in the median; no spike is detected before that many steps are done."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks to one checkpoint after which the run ends with an error."""


class LogConfig(Section):
    """Progress outputs besides metrics.jsonl and the log file of each rank."""

    interval: PositiveInt = 10
    """Optimizer steps between console lines and TensorBoard or Weights & Biases points."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: offline writes to the run folder, online uploads."""
    wandb_project: str = "aki-megatron"
    """Weights & Biases project of the run."""


class RunConfig(Section):
    """A complete run. Each section is valid in itself; check_run (cross_checks.py) checks them against each other."""

    run: RunSection
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig
    attention: AttentionConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    trainable: TrainableConfig = TrainableConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    validation: ValidationConfig = ValidationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] = {}
    """DeepSpeed settings that the run does not decide, in DeepSpeed's format; --ds_config fills it."""

    def training_plans(self) -> tuple[TrainingPlan, ...]:
        """Return what each phase of data.phases trains; one plan where there are none."""
        phases = [phase.trainable for phase in self.data.phases]
        return training_plans(self.trainable, phases or [PhaseTrainable()])

    def training_phase(self, data_step: int) -> int:
        """Return the phase of the data step with this number, counted from 0; the last phase goes on without end."""
        ends = list(itertools.accumulate(phase.steps for phase in self.data.phases[:-1]))
        return bisect.bisect_right(ends, data_step)
