"""The keys of DeepSpeed's JSON: which a job's TOML decides, which a user's file may hold, and which mean something else here."""

from __future__ import annotations

OURS = {
    "train_micro_batch_size_per_gpu": "training.batch_size over the ranks",
    "train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "gradient_clipping": "training.clip",
    "optimizer": "training.optimizer, lr and weight_decay",
    "scheduler": "training.schedule and warmup",
    "fp16": "training.precision",
    "bf16": "training.precision",
}
"""Keys that the job's TOML decides, and where: a user's file may repeat them, or say ``auto``, but not contradict."""

KNOWN = frozenset(
    """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown dump_state
    communication_data_type prescale_gradients gradient_predivide_factor sparse_gradients activation_checkpointing aio
    flops_profiler comms_logger tensorboard wandb csv_monitor memory_breakdown amp elasticity checkpoint data_types
    seq_parallel_communication_data_type disable_allgather hybrid_engine compression_training data_efficiency
    curriculum_learning autotuning sparse_attention timers torch_autocast compile
    """.split()  # noqa: SIM905 - a list of words reads better
)
REFUSED = {
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "checkpoint": "our own checkpoints, which any number of ranks resumes",
    "elasticity": "resuming on another number of ranks",
    "activation_checkpointing": "training.checkpoint_activations",
    "hybrid_engine": "nothing: it generates text",
    "compression_training": "base.quantization",
    "data_efficiency": "mixing and the tasks' sources",
    "curriculum_learning": "mixing and the tasks' sources",
    "autotuning": "fedpeft central estimate",
    "sparse_attention": "the base's own attention",
}
"""Keys that are decided elsewhere, and where."""

STAGE = frozenset(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size
    overlap_comm offload_param offload_optimizer sub_group_size round_robin_gradients memory_efficient_linear ignore_unused_parameters
    stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_model_persistence_threshold stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params
    stage3_allgather_sequential zero_hpz_partition_size log_trace_cache_warnings enable_sanity_checks
    """.split()  # noqa: SIM905 - a list of words reads better
)
"""Keys of ``zero_optimization`` that change nothing of what is computed, and nothing that a checkpoint of ours needs."""

OFFLOAD = {
    "offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
    "offload_optimizer": frozenset({"device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"}),
}
"""Keys of both tables of offloading. A part of the optimizer alone (``ratio``) has no moments where ours are looked for."""
