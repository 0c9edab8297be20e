"""DeepSpeed 0.19's settings: those that the run decides, those that are proven, and why every other is refused.

A setting is accepted only with proof: it is in OWNED (the run decides it), in PROVEN (an equality test runs it), or it
has the one value that every test runs (ONLY). Everything else is refused, so that no name of a newer release passes
unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aki_megatron.config.run import RunConfig

RunValue = Callable[[RunConfig], Any]

OWNED: dict[str, tuple[str, RunValue]] = {
    "train_batch_size": ("train.global_batch_size", lambda run: run.train.global_batch_size),
    "train_micro_batch_size_per_gpu": ("train.micro_batch_size", lambda run: run.train.micro_batch_size),
    "gradient_clipping": ("optimizer.max_grad_norm", lambda run: run.optimizer.max_grad_norm),
    "steps_per_print": ("log.interval", lambda run: run.log.interval),
    "zero_optimization.stage": ("parallel.zero_stage", lambda run: run.parallel.zero_stage),
    "optimizer.params.lr": ("optimizer.lr", lambda run: run.optimizer.lr),
    "optimizer.params.eps": ("optimizer.eps", lambda run: run.optimizer.eps),
    "optimizer.params.weight_decay": ("optimizer.weight_decay", lambda run: run.optimizer.weight_decay),
}
"""DeepSpeed's name -> (our key, our value): "auto" or the same value, else an error that names both."""


@dataclass(frozen=True)
class Values:
    """Values that a setting may have."""

    text: str
    """To follow "must be"."""
    contains: Callable[[Any], bool]


def _whole(least: int, most: int = 2**63 - 1, *, multiple_of: int = 1) -> Values:
    """Whole numbers; DeepSpeed's files also write them as 5e8, which JSON reads as a float."""

    def contains(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return value == value // 1 and least <= value <= most and value % multiple_of == 0

    kind = "an even whole number" if multiple_of == 2 else "a whole number"
    limit = f" and <= {most:,}" if most < 2**63 - 1 else ""
    return Values(f"{kind} >= {least}{limit}", contains)


SWITCH = Values("true or false", lambda value: isinstance(value, bool))
OFFLOAD_DEVICE = Values('"cpu" or "none"', lambda value: value in ("cpu", "none", "nvme"))
"""config/combinations.py refuses nvme, and says which runs may offload to cpu."""
BOTH = (False, True)

PROOF = "tests/distributed/test_deepspeed_equality.py"
OFFLOAD_PROOF = "tests/distributed/test_offload.py"


@dataclass(frozen=True)
class Proven:
    """A setting that reaches DeepSpeed, and how it is proven.

    The proof of every tested value: losses, gradient norms and weights equal those with DeepSpeed's default, also after
    saving and resuming on another layout, and in the exported model.
    """

    values: Values
    tested: tuple[Any, ...]
    """Values with which ``proof`` trains: for numbers, the extremes."""
    zero_stages: tuple[int, ...]
    """Stages that read the setting and are tested with it; in others it does not reach DeepSpeed."""
    effect: str
    proof: str = PROOF


UNUSED_BY_STAGE_3 = "none: every parameter is gathered once per step and kept until the step ends"

PROVEN: dict[str, Proven] = {
    "zero_optimization.reduce_bucket_size": Proven(
        _whole(1, 10**10), (1, 1000, 10**7), (1, 2, 3), "elements of gradients reduced at a time"
    ),
    "zero_optimization.allgather_bucket_size": Proven(
        _whole(2, multiple_of=2), (2, 1000), (1, 2), "elements of updated weights gathered at a time"
    ),
    "zero_optimization.contiguous_gradients": Proven(
        SWITCH, BOTH, (1, 2, 3), "gradients are copied to one buffer as they are produced"
    ),
    "zero_optimization.reduce_scatter": Proven(
        SWITCH, BOTH, (1, 2, 3), "gradients are reduced to their owner instead of to all data ranks"
    ),
    "zero_optimization.use_multi_rank_bucket_allreduce": Proven(
        SWITCH, BOTH, (1, 2), "one reduction for the buckets of several data ranks"
    ),
    "zero_optimization.allgather_partitions": Proven(SWITCH, BOTH, (1, 2), "none: DeepSpeed 0.19 does not read it"),
    "zero_optimization.overlap_comm": Proven(
        SWITCH, BOTH, (1, 2, 3), "gradients are reduced during the backward pass, on a stream of their own"
    ),
    "zero_optimization.sub_group_size": Proven(
        _whole(1), (1, 1000, 10**12), (3,), "elements of weights that the optimizer updates at a time"
    ),
    **{
        f"zero_optimization.{prefix}{name}": Proven(_whole(0), (0, 10**9), (3,), UNUSED_BY_STAGE_3)
        for name in (
            "prefetch_bucket_size",
            "max_live_parameters",
            "max_reuse_distance",
            "model_persistence_threshold",
        )
        for prefix in ("stage3_", "")
    },
    **{
        f"zero_optimization.{prefix}gather_16bit_weights_on_model_save": Proven(
            SWITCH, BOTH, (3,), "none: checkpoints and exports are the run's"
        )
        for prefix in ("stage3_", "")
    },
    "zero_optimization.offload_optimizer.device": Proven(
        OFFLOAD_DEVICE, ("cpu",), (2, 3), "optimizer state and master weights in host memory", OFFLOAD_PROOF
    ),
    "zero_optimization.offload_optimizer.pin_memory": Proven(
        SWITCH, BOTH, (2, 3), "page-locked host memory for offloaded state", OFFLOAD_PROOF
    ),
    "wall_clock_breakdown": Proven(SWITCH, BOTH, (1, 2, 3), "DeepSpeed logs the time of its parts"),
    "zero_allow_untested_optimizer": Proven(SWITCH, BOTH, (1, 2, 3), "none: AdamW is tested"),
}
"""DeepSpeed's name -> the values that are accepted, and their proof."""

ALIASES: dict[str, str] = {
    f"zero_optimization.{name}": f"zero_optimization.stage3_{name}"
    for name in (
        "prefetch_bucket_size",
        "max_live_parameters",
        "max_reuse_distance",
        "model_persistence_threshold",
        "param_persistence_threshold",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
    )
}
"""Name -> the other spelling of the same setting."""

GATHERED = "the engine gathers every parameter once per step, before any module runs"
NO_DEEPSPEED_CHECKPOINT = "checkpoints are the run's, and resume on any layout"
QUANTIZED = "quantized communication changes the result and is not proven"
NVME = "it serves NVMe, which is not supported"
NOT_PROVEN = "no test proves it with this engine"

ONLY: dict[str, tuple[Any, str]] = {
    "optimizer.type": ("AdamW", "the optimizer is AdamW with the optimizer.* keys of the run"),
    "fp16.enabled": (False, "train.precision is bf16 or fp32; fp16 is not supported"),
    "torch_autocast.enabled": (False, "train.precision decides the arithmetic"),
    "bf16.bf16_master_weights_and_grads": (False, "train.precision=bf16 keeps fp32 master weights"),
    "bf16.bf16_optimizer_states": (False, "train.precision=bf16 keeps fp32 optimizer states"),
    "bf16.check_grad_overflow": (False, "the engine checks the global norm itself, on all ranks together"),
    "bf16.immediate_grad_update": (False, NOT_PROVEN),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
    "communication_data_type": ("fp32", "gradients reduced in bf16 have three times the error of one process"),
    "gradient_allreduce_op": ("mean", "the loss is normalized over all ranks before the backward pass"),
    "gradient_predivide_factor": (1.0, "ZeRO 2 and 3 do not support another factor, and fp32 gradients need none"),
    "prescale_gradients": (False, "ZeRO 2 and 3 do not support it, and fp32 gradients need no scaling"),
    "managed_gradient_accumulation": (True, "the engine sets the accumulation boundaries itself"),
    "disable_allgather": (False, NOT_PROVEN),
    "disable_python_gc": (False, NOT_PROVEN),
    "dump_state": (False, "config.yaml in the run folder holds the settings"),
    "memory_breakdown": (False, NOT_PROVEN),
    "zero_force_ds_cpu_optimizer": (False, "torch's AdamW updates offloaded state, which needs no compilation"),
    "use_data_before_expert_parallelism": (False, "the model has no experts"),
    "sequence_parallel_size": (1, "sequences are not split over ranks"),
    "tensor_parallel.autotp_size": (1, "parallel.tensor splits layers"),
    "compile.deepcompile": (False, NOT_PROVEN),
    "tensorboard.enabled": (False, "log.tensorboard writes TensorBoard's files"),
    "wandb.enabled": (False, "log.wandb logs to Weights & Biases"),
    "csv_monitor.enabled": (False, "metrics.jsonl holds the metrics of every step"),
    "comet.enabled": (False, "metrics.jsonl holds the metrics of every step"),
    "comms_logger.enabled": (False, NOT_PROVEN),
    "flops_profiler.enabled": (False, NOT_PROVEN),
    "autotuning.enabled": (False, "batch sizes are the run's"),
    "hybrid_engine.enabled": (False, "it serves reinforcement learning"),
    "data_efficiency.enabled": (False, "batches come from the run's data section"),
    "zero_optimization.round_robin_gradients": (
        False,
        "DeepSpeed then lays the weights out in another order than the one in which it links them to parameters, so "
        "that ZeRO 1 and 2 save and load scrambled weights",
    ),
    "zero_optimization.zero_hpz_partition_size": (1, "a second partition of the weights is not proven"),
    "zero_optimization.zero_quantized_weights": (False, QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, QUANTIZED),
    "zero_optimization.zero_quantized_gradients": (False, QUANTIZED),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.elastic_checkpoint": (False, NO_DEEPSPEED_CHECKPOINT),
    "zero_optimization.load_from_fp32_weights": (True, NO_DEEPSPEED_CHECKPOINT),
    "zero_optimization.pipeline_loading_checkpoint": (False, NO_DEEPSPEED_CHECKPOINT),
    "zero_optimization.ignore_unused_parameters": (True, "a batch without images leaves the resampler unused"),
    "zero_optimization.parameter_alignment": (False, NOT_PROVEN),
    "zero_optimization.compute_grad_norm": (False, "the engine computes the global norm itself"),
    "zero_optimization.memory_efficient_linear": (False, "its linear layer rounds differently from torch's"),
    "zero_optimization.override_module_apply": (True, NOT_PROVEN),
    "zero_optimization.log_trace_cache_warnings": (False, f"there is no trace to warn of: {GATHERED}"),
    "zero_optimization.enable_sanity_checks": (
        False,
        "its checks compare all ranks of the world, and those of other pipeline stages differ",
    ),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, "the optimizer is AdamW"),
    **{
        f"zero_optimization.{prefix}{name}": (only, GATHERED)
        for name, only in (
            ("param_persistence_threshold", 0),
            ("module_granularity_threshold", 0),
            ("use_all_reduce_for_fetch_params", False),
            ("allgather_sequential", False),
        )
        for prefix in ("stage3_", "")
    },
    "zero_optimization.cpu_offload": (False, 'DeepSpeed has replaced it by "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": (False, "weights are not offloaded"),
    "zero_optimization.cpu_offload_use_pin_memory": (
        False,
        'DeepSpeed has replaced it by "offload_optimizer": {"device": "cpu", "pin_memory": true}',
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        False,
        "DeepSpeed has renamed it to stage3_gather_16bit_weights_on_model_save",
    ),
    "zero_optimization.offload_optimizer.ratio": (1.0, "the whole optimizer state is offloaded or none of it"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it needs an optimizer that is compiled at start-up"),
    "zero_optimization.offload_optimizer.fast_init": (False, NVME),
    "zero_optimization.offload_optimizer.pipeline_read": (False, NVME),
    "zero_optimization.offload_optimizer.pipeline_write": (False, NVME),
}
"""DeepSpeed's name -> (the only value besides "auto", why)."""

OFFLOAD_PARAM = "zero_optimization.offload_param"

REFUSED: dict[str, str] = {
    "optimizer": "the optimizer is the run's (optimizer.*)",
    "scheduler": "the learning-rate curve is the run's: optimizer.lr, min_lr, warmup_steps and train.steps",
    "pipeline": "stages are the run's: parallel.pipeline",
    "expert_parallel": "the model has no experts",
    "checkpoint": "checkpoints are the run's: checkpoint.interval, checkpoint.keep_last",
    "datastates_ckpt": "checkpoints are the run's: checkpoint.interval, checkpoint.keep_last",
    "activation_checkpointing": "parallel.recompute=full is activation checkpointing here",
    "weight_quantization": "weights are trained unquantized",
    "dataloader_drop_last": "batches come from the run's own loader",
    "vocabulary_size": "the vocabulary is model.decoder.padded_vocab_size",
    "seq_parallel_communication_data_type": "sequences are not split over ranks",
    "bfloat16": "the block is called bf16",
    "aio": NVME,
    "timers": NOT_PROVEN,
    "log_level": "the engine sets what DeepSpeed logs",
    "zero_optimization.zenflow": "it updates some of the weights later, which changes the result and is not proven",
    "zero_optimization.leaf_module": GATHERED,
    "zero_optimization.offload_optimizer.nvme_path": NVME,
    "zero_optimization.offload_optimizer.buffer_count": NVME,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it serves super_offload, which is not supported",
    **dict.fromkeys(
        (f"{OFFLOAD_PARAM}.{name}" for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")), NVME
    ),
}
"""Setting or block of which no value but "auto" is accepted -> why, and what to write instead."""

REMOVED = frozenset(
    {
        *("amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting"),
        *("nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
        *(f"zero_optimization.{name}" for name in ("mics_shard_size", "mics_hierarchical_params_gather")),
        "zero_optimization.zeropp_loco_param",
    }
)
"""Names of older releases that DeepSpeed 0.19 refuses."""

SPECIAL = frozenset(
    {
        "gradient_accumulation_steps",
        "bf16.enabled",
        "optimizer.params.betas",
        f"{OFFLOAD_PARAM}.device",
        f"{OFFLOAD_PARAM}.pin_memory",
    }
)
"""Names with a rule of their own in config/deepspeed.py."""

KNOWN = frozenset({*OWNED, *PROVEN, *ONLY, *REFUSED, *SPECIAL})
"""Every name that is accepted with some value, or refused with a reason of its own."""

BLOCKS = frozenset(name.rpartition(".")[0] for name in KNOWN if "." in name)
"""Names that hold a mapping of further names."""

SWITCHABLE = frozenset(name.partition(".")[0] for name in ONLY if name.endswith(".enabled"))
"""Blocks that have no effect unless ``enabled`` is true."""
