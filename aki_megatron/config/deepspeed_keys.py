"""DeepSpeed 0.19's settings: known names, those that the run decides, those that are not supported."""

from collections.abc import Callable
from typing import Any

from aki_megatron.config.run import RunConfig

TOP_LEVEL = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Top-level names that DeepSpeed 0.19 reads."""

REMOVED = frozenset(
    {
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    }
)
"""Names of older releases that DeepSpeed 0.19 refuses."""

ZERO = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    }
)
"""Names inside zero_optimization; deprecated spellings left out."""

OFFLOAD: dict[str, frozenset[str]] = {
    "zero_optimization.offload_optimizer": frozenset(
        {
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        }
    ),
    "zero_optimization.offload_param": frozenset(
        {"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"}
    ),
}
"""Offload block of zero_optimization -> the names inside."""

DEVICES = ("none", "cpu", "nvme")
"""Devices that DeepSpeed can offload to; config/combinations.py says which are supported."""

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

PERSISTENCE = "the engine gathers every parameter once per step, small ones too"

FIXED: dict[str, tuple[Any, str]] = {
    "optimizer.type": ("AdamW", "the optimizer is AdamW with the optimizer.* keys of the run"),
    "fp16.enabled": (False, "train.precision is bf16 or fp32; fp16 is not supported"),
    "torch_autocast.enabled": (False, "train.precision decides the arithmetic"),
    "bf16.bf16_master_weights_and_grads": (False, "train.precision=bf16 keeps fp32 master weights"),
    "bf16.bf16_optimizer_states": (False, "train.precision=bf16 keeps fp32 optimizer states"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
    "bf16.check_grad_overflow": (False, "the engine checks the global norm itself, on all ranks together"),
    "zero_optimization.memory_efficient_linear": (False, "its linear layer rounds differently from torch's"),
    "zero_optimization.stage3_param_persistence_threshold": (0, PERSISTENCE),
    "zero_optimization.param_persistence_threshold": (0, PERSISTENCE),
    "zero_optimization.compute_grad_norm": (False, "the engine computes the global norm itself"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "the whole optimizer state is offloaded or none of it"),
    "zero_optimization.offload_optimizer.super_offload": (False, "it is not supported here"),
    "zero_optimization.offload_optimizer.fast_init": (False, "it serves NVMe, which is not supported"),
    "zero_optimization.offload_optimizer.pipeline_read": (False, "it serves NVMe, which is not supported"),
    "zero_optimization.offload_optimizer.pipeline_write": (False, "it serves NVMe, which is not supported"),
    "gradient_allreduce_op": ("mean", "the loss is normalized over all ranks before the backward pass"),
    "tensorboard.enabled": (False, "log.tensorboard writes TensorBoard's files"),
    "wandb.enabled": (False, "log.wandb logs to Weights & Biases"),
    "csv_monitor.enabled": (False, "metrics.jsonl holds the metrics of every step"),
    "comet.enabled": (False, "metrics.jsonl holds the metrics of every step"),
    "autotuning.enabled": (False, "batch sizes are the run's"),
    "hybrid_engine.enabled": (False, "it serves reinforcement learning"),
    "data_efficiency.enabled": (False, "batches come from the run's data section"),
    "compile.deepcompile": (False, "it is not supported here"),
    "tensor_parallel.autotp_size": (1, "parallel.tensor splits layers"),
    "sequence_parallel_size": (1, "sequences are not split over ranks"),
    "managed_gradient_accumulation": (True, "the engine sets the accumulation boundaries itself"),
}
"""DeepSpeed's name -> (the only value besides "auto", why)."""

WITHOUT_USE: dict[str, str] = {
    "zero_optimization.offload_optimizer.nvme_path": "it serves NVMe, which is not supported",
    "zero_optimization.offload_optimizer.buffer_count": "it serves NVMe, which is not supported",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it serves super_offload, which is not supported",
}
"""DeepSpeed's name -> why no value of it is supported."""

REFUSED: dict[str, str] = {
    "scheduler": "the learning-rate curve is the run's: optimizer.lr, min_lr, warmup_steps and train.steps",
    "pipeline": "stages are the run's: parallel.pipeline",
    "expert_parallel": "the model has no experts",
    "checkpoint": "checkpoints are the run's: checkpoint.interval, checkpoint.keep_last",
    "datastates_ckpt": "checkpoints are the run's: checkpoint.interval, checkpoint.keep_last",
    "activation_checkpointing": "DeepSpeed's activation checkpointing is not used here",
    "weight_quantization": "weights are trained unquantized",
    "dataloader_drop_last": "batches come from the run's own loader",
    "vocabulary_size": "the vocabulary is model.decoder.padded_vocab_size",
    "bfloat16": "the block is called bf16",
}
"""Block that is not supported unless all its settings are "auto" -> why."""
