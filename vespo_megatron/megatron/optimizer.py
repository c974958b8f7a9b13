"""megatron-core's optimizer and learning-rate schedule from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vespo_megatron.errors import UserError
from vespo_megatron.megatron.native.spec import have_transformer_engine
from vespo_megatron.megatron.optimizer_state import parts_of
from vespo_megatron.recipe.schema import MegatronConfig

# isort: split
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def build_optimizer(
    megatron: MegatronConfig, chunks: Sequence[torch.nn.Module], *, dtype: torch.dtype, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer over this rank's chunks, and a schedule counted in updates.

    Raises:
        UserError: it needs Transformer Engine's Adam, which is not there.
    """
    settings, schedule = megatron.optimizer, megatron.scheduler
    if settings.use_precision_aware_optimizer and not have_transformer_engine():
        raise UserError(
            "is true, but there is no Transformer Engine, whose Adam does it",
            where="policy.megatron_cfg.optimizer.use_precision_aware_optimizer",
            expected="transformer-engine[pytorch,core_cu12]",
            fix="set it to false, or install it",
        )
    config = OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        use_precision_aware_optimizer=settings.use_precision_aware_optimizer,
        optimizer_cpu_offload=settings.optimizer_cpu_offload,
        optimizer_offload_fraction=settings.optimizer_offload_fraction,
        overlap_param_gather=megatron.distributed_data_parallel_config.overlap_param_gather,
    )
    if settings.optimizer_cpu_offload:
        # megatron-core's name, too, for leaving float32 weights to the optimizer, which one on the host has to have
        # (hybrid_optimizer.py:373). Set here, since optimizer_config.py:383 asks for Transformer Engine's version.
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    optimizer = get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)
    for part in parts_of(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):  # where Apex and Transformer Engine are missing
            for group in part.optimizer.param_groups:
                group["fused"] = True  # one pass over memory instead of about ten; the default is a loop
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        lr_decay_steps=max(schedule.lr_decay_iters or total_updates, schedule.lr_warmup_iters + 1),
        lr_decay_style=schedule.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
