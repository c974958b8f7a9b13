"""Keys of training: `policy.megatron_cfg`, `policy.sequence_packing` and `policy.router_replay`."""

from __future__ import annotations

from typing import Literal

from vespo_megatron.recipe.schema.base import Section, key, section


class OptimizerConfig(Section):
    """`policy.megatron_cfg.optimizer`: megatron-core's OptimizerConfig."""

    optimizer: Literal["adam", "sgd"] = key("adam", "")
    lr: float = key(1e-06, "Peak learning rate.", gt=0)
    min_lr: float = key(0.0, "Learning rate at the end of decay.", ge=0)
    weight_decay: float = key(0.0, "Decoupled weight decay.", ge=0)
    adam_beta1: float = key(0.9, "Decay of Adam's mean of gradients.", ge=0, lt=1)
    adam_beta2: float = key(0.999, "Decay of Adam's mean of squares.", ge=0, lt=1)
    adam_eps: float = key(1e-08, "Added to Adam's denominator.", gt=0)
    clip_grad: float = key(1.0, "Global gradient norm to clip at; 0 never.", ge=0)
    use_distributed_optimizer: bool = key(True, "Shard optimizer state over data parallel ranks.")
    use_precision_aware_optimizer: bool = key(False, "Optimizer state in lower precision (needs Transformer Engine).")
    optimizer_cpu_offload: bool = key(
        False, "Keep float32 weights and Adam's moments in host memory, and update them there (bfloat16 alone)."
    )
    optimizer_offload_fraction: float = key(0.0, "Share of it to offload.", ge=0, le=1)
    initial_loss_scale: float = key(
        2.0**16, "With float16: what the loss is multiplied with before the first backward.", gt=0, le=2.0**32
    )
    min_loss_scale: float = key(1.0, "With float16: the smallest that overflows halve it to.", gt=0)
    loss_scale_window: int = key(1000, "With float16: updates in a row without an overflow that double it.", ge=1)
    hysteresis: int = key(2, "With float16: the overflow since it was doubled last from which on they halve it.", ge=1)


class SchedulerConfig(Section):
    """`policy.megatron_cfg.scheduler`: counted in optimizer updates."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = key(
        "constant", "Course of the learning rate after warm-up."
    )
    lr_decay_iters: int | None = key(None, "Updates until min_lr; None: the whole run.", ge=1)
    lr_warmup_iters: int = key(0, "Updates of linear warm-up.", ge=0)
    lr_warmup_init: float = key(0.0, "Learning rate before the first update of warm-up.", ge=0)


class DDPConfig(Section):
    """`policy.megatron_cfg.distributed_data_parallel_config`."""

    grad_reduce_in_fp32: bool = key(True, "Accumulate and reduce gradients in float32.")
    overlap_grad_reduce: bool = key(False, "Reduce gradients while the backward runs.")
    overlap_param_gather: bool = key(False, "Gather parameters while the next forward runs.")


class MegatronConfig(Section):
    """`policy.megatron_cfg`: parallel layout, model numerics, optimizer."""

    tensor_model_parallel_size: int = key(1, "TP.", ge=1)
    pipeline_model_parallel_size: int = key(1, "PP.", ge=1)
    virtual_pipeline_model_parallel_size: int | None = key(
        None, "Model chunks per pipeline rank (VPP).", ge=1, ours=True
    )
    num_layers_in_first_pipeline_stage: int | None = key(None, "Layers of the first stage; None: an equal share.", ge=1)
    num_layers_in_last_pipeline_stage: int | None = key(None, "Layers of the last stage; None: an equal share.", ge=1)
    context_parallel_size: int = key(1, "CP.", ge=1)
    expert_model_parallel_size: int = key(1, "EP.", ge=1)
    expert_tensor_parallel_size: int = key(1, "ETP: tensor parallel size inside one expert.", ge=1)
    sequence_parallel: bool = key(False, "Shard the sequence where TP replicates it; TP > 1 needs it with MoE.")
    layer_spec: Literal["auto", "te", "native"] = key(
        "auto",
        "Transformer layers: Transformer Engine (te), plain PyTorch (native), or te where it is there.",
        ours=True,
    )
    activation_checkpointing: bool = key(False, "Full recompute, one layer at a time (uniform).")
    recompute_granularity: Literal["full", "selective"] | None = key(
        None, "What the backward computes again; overrides activation_checkpointing.", ours=True
    )
    freeze_moe_router: bool = key(False, "Do not train the routers' weights.")
    moe_router_dtype: Literal["fp32", "fp64"] | None = key("fp32", "Router numerics; null: as the model.")
    moe_router_load_balancing_type: Literal["none", "aux_loss", "global_aux_loss"] = key(
        "none",
        "Load balancing loss of the routers, with the experts' shares of each micro-batch (aux_loss) or of the whole "
        "update, by a forward pass before it (global_aux_loss).",
    )
    moe_aux_loss_coeff: float = key(0.0, "What the load balancing loss is multiplied with.", ge=0)
    moe_z_loss_coeff: float | None = key(None, "What the routers' z-loss is multiplied with; null: none.", gt=0)
    moe_router_bias_update_rate: float = key(
        0.0,
        "How far an update moves the correction bias of an expert with fewer tokens than the mean up, of one with more "
        "down (arXiv 2408.15664); 0: it stays as the checkpoint has it, NVIDIA's setting for RL.",
        ge=0,
        le=1,
    )
    track_moe_metrics: bool = key(True, "Count each expert's tokens in training: routes/max_violation and its kin.")
    moe_per_layer_logging: bool = key(True, "Log them of every layer besides their mean and the worst layer.")
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = key(
        "alltoall", "How tokens travel to their experts."
    )
    moe_permute_fusion: bool = key(False, "Fused permutation (needs Transformer Engine).")
    apply_rope_fusion: bool = key(False, "Fused rotary embedding (needs Transformer Engine).")
    moe_grouped_gemm: bool = key(True, "Experts by grouped matmul, where the layer spec has it.", ours=True)
    logprob_memory_mb: int = key(64, "MiB of logits that exist at one time; on a GPU more, say 512.", ge=1, ours=True)
    distributed_timeout: float = key(600.0, "Deadline of a collective, in seconds.", gt=0, ours=True)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    scheduler: SchedulerConfig = section(SchedulerConfig)
    distributed_data_parallel_config: DDPConfig = section(DDPConfig)

    @property
    def recompute(self) -> str | None:
        """What the backward computes again: "full", "selective" or nothing."""
        return self.recompute_granularity or ("full" if self.activation_checkpointing else None)


class SequencePackingConfig(Section):
    """`policy.sequence_packing`."""

    enabled: bool = key(True, "Pack micro-batches up to a token budget; off: train_micro_batch_size sequences each.")
    train_mb_tokens: int = key(
        16384, "Token budget of a training micro-batch, for the whole context-parallel group.", ge=1
    )


class RouterReplayConfig(Section):
    """`policy.router_replay`."""

    mode: Literal["none", "R2", "R3"] = key("none", "R2: the trainer's own routes at θ_old; R3: the rollout engine's.")
    on_stale_routes: Literal["live", "drop", "error"] = key(
        "error",
        "The engine's routes of a token, of other weights than drew it: the router decides (live), the response is not "
        "trained on (drop), or the run ends.",
    )
    measure_agreement: bool = key(
        True, "Compare the trainer's routes with the engine's, where it returns them.", ours=True
    )
