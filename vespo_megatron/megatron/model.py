"""A decoder as a megatron-core `GPTModel` whose output is token log-probs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vespo_megatron.megatron.parallel import RankInfo

# isort: split
# parallel has installed the CPU runtime before megatron-core is imported
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe import moe_utils

from vespo_megatron.families.shape import ModelShape
from vespo_megatron.losses.sequence import has_triton
from vespo_megatron.megatron.logprobs import LogProbRequest, vocab_parallel_log_probs
from vespo_megatron.megatron.moe_layer import keep_biases_in_float32
from vespo_megatron.megatron.native.attention import NativePackedSeqParams
from vespo_megatron.megatron.native.spec import block_spec, layers_of
from vespo_megatron.megatron.rotary import stretched
from vespo_megatron.megatron.te.packed import TEPackedSeqParams
from vespo_megatron.recipe.schema import MegatronConfig

if not hasattr(moe_utils, "te_general_gemm"):
    # moe_utils.py:34 imports it with Transformer Engine and moe_utils.py:1192 reads it without.
    moe_utils.te_general_gemm = None


class PolicyModel(GPTModel):
    """A `GPTModel` that ends in log-probs of wanted tokens instead of logits.

    `forward(..., labels=LogProbRequest)` returns float32 [2, R] (log-probs, entropies) on the last pipeline stage,
    hidden states [T, 1, H] on the others. `padding_mask` is bool [1, T / TP], this rank's routers' rows; True: padding.
    """

    def __init__(self, *args: Any, real_vocab_size: int, native: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size, self.native = real_vocab_size, native
        self.rotates_per_token = native or not self.config.apply_rope_fusion
        if self.post_process:
            # Called as a module, so that DDP's hooks on the output layer (parameter gathering) keep their place.
            self.output_layer.forward = self._log_probs

    def forward(self, *args: Any, packed_seq_params: NativePackedSeqParams, **kwargs: Any) -> torch.Tensor:
        """See the class."""
        seen_by_layers: PackedSeqParams
        if self.native:
            seen_by_layers = packed_seq_params.without_offsets()
        else:
            seen_by_layers = TEPackedSeqParams.of(packed_seq_params, rotates_per_token=self.rotates_per_token)
        return super().forward(*args, packed_seq_params=seen_by_layers, **kwargs)

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        packed_seq_params: NativePackedSeqParams,
        padding_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        embedded, rotary, cos, sin, offset, _, *rest = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.rotates_per_token:
            rotary = rotary.squeeze(1).index_select(0, position_ids[0])  # of every token: [T, 1, head_dim]
            if self.native and self._turns_in_attention(rotary):
                angles = rotary[:, 0, : rotary.shape[-1] // 2].float()
                packed_seq_params.rotation = angles.cos().contiguous(), angles.sin().contiguous()
                rotary = None
        # Upstream slices the mask for sequence parallelism, on the first stage alone; ours is of a router's rows.
        return embedded, rotary, cos, sin, offset, padding_mask, *rest

    def _turns_in_attention(self, rotary: torch.Tensor) -> bool:
        """Whether `native.triton_rotary` has a kernel for these angles [T, 1, head_dim] and their queries."""
        half = rotary.shape[-1] // 2
        return (
            has_triton(rotary.device.type)
            and self.config.params_dtype is not torch.float64
            and rotary.shape[-1] == self.config.kv_channels
            and half & (half - 1) == 0
        )

    def _postprocess(
        self, hidden_states: torch.Tensor, *_args: Any, labels: LogProbRequest, **_kwargs: Any
    ) -> torch.Tensor:
        if not self.post_process:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, labels, weight)

    def _log_probs(self, hidden: torch.Tensor, wanted: LogProbRequest, weight: torch.Tensor | None) -> torch.Tensor:
        weight = self.output_layer.weight if weight is None else weight
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        first_id = group.rank() * weight.shape[0]
        real_rows = min(max(self.real_vocab_size - first_id, 0), weight.shape[0])
        return vocab_parallel_log_probs(
            hidden.flatten(0, 1).index_select(0, wanted.rows),
            weight,
            wanted.targets,
            first_id=first_id,
            group=group,
            temperature=wanted.temperature,
            vocab_size=real_rows,
            memory_bytes=wanted.memory_bytes,
            logit_mask=wanted.logit_mask,
            fuse_gradient_accumulation=hasattr(weight, "main_grad") and not self.share_embeddings_and_output_weights,
        )


def transformer_config(shape: ModelShape, megatron: MegatronConfig, *, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's configuration of this model in this layout.

    NVIDIA's settings for RL throughout: router in fp32 (or fp64). megatron-core's own load balancing and moving of
    biases are off whatever the recipe says: `router_losses` and `correction_bias` have them.
    """
    config = TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.intermediate_size,
        moe_ffn_hidden_size=shape.moe_intermediate_size or None,
        num_moe_experts=shape.num_experts if shape.num_moe_layers else None,
        moe_router_topk=shape.num_experts_per_tok,
        moe_router_score_function=shape.router_scores,
        moe_router_enable_expert_bias=shape.correction_bias,
        moe_router_topk_scaling_factor=shape.routed_scaling_factor if shape.routed_scaling_factor != 1 else None,
        moe_shared_expert_intermediate_size=shape.shared_intermediate_size or None,
        moe_layer_freq=[int(is_moe) for is_moe in shape.is_moe_layer],
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,
        moe_router_dtype=megatron.moe_router_dtype,
        moe_token_dispatcher_type=megatron.moe_token_dispatcher_type,
        moe_grouped_gemm=megatron.moe_grouped_gemm,
        moe_permute_fusion=megatron.moe_permute_fusion,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        # A norm over the width is sharded; megatron-core would sum its gradients (finalize_model_grads.py:355).
        qk_layernorm=shape.qk_norm == "head",
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_activation_fusion=False,
        apply_rope_fusion=megatron.apply_rope_fusion,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=megatron.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=megatron.num_layers_in_last_pipeline_stage,
        virtual_pipeline_model_parallel_size=megatron.virtual_pipeline_model_parallel_size,
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        batch_p2p_comm=False,
        recompute_granularity=megatron.recompute,
        recompute_method="uniform" if megatron.recompute == "full" else None,
        recompute_num_layers=1 if megatron.recompute == "full" else None,
        distribute_saved_activations=False,
    )
    # Set here, since transformer_config.py:1641 refuses it for one expert per token: its gate is then always 1, as the
    # model has it, and the router's gradient 0.
    config.moe_router_pre_softmax = not shape.norm_topk_prob
    return config


def build_model(
    shape: ModelShape,
    megatron: MegatronConfig,
    rank_info: RankInfo,
    *,
    dtype: torch.dtype,
    with_gradients: bool = True,
) -> list[MegatronModule]:
    """This rank's model chunks (one, or VPP many), uninitialised, wrapped in megatron-core's DDP.

    The weights are random until `hf_weights.load` has filled every one of them. (megatron-core marks parameters as
    tensor parallel only while it initialises them: layers.py:230, so initialisation is not skipped.)
    """
    layer_spec = layers_of(megatron, rank_info.device.type, dtype)
    config = transformer_config(shape, megatron, dtype=dtype)
    padded_vocab = -(-shape.vocab_size // rank_info.tensor_size) * rank_info.tensor_size
    chunks: list[MegatronModule] = []
    virtual = megatron.virtual_pipeline_model_parallel_size
    for stage in range(virtual or 1):
        model = PolicyModel(
            config,
            block_spec(config, shape, layer_spec, stage if virtual else None),
            vocab_size=padded_vocab,
            real_vocab_size=shape.vocab_size,
            native=layer_spec == "native",
            max_sequence_length=shape.max_position_embeddings,
            pre_process=rank_info.pipeline_rank == 0 and stage == 0,
            post_process=rank_info.is_last_stage and stage == (virtual or 1) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rotary_percent=shape.rotary_fraction,
            vp_stage=stage if virtual else None,
        )
        if shape.rope_scaling is not None:
            model.rotary_pos_emb.inv_freq = stretched(model.rotary_pos_emb.inv_freq, shape.rope_scaling)
        model.to(rank_info.device)
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if megatron.freeze_moe_router:
            for name, parameter in model.named_parameters():
                if ".router." in name:
                    parameter.requires_grad_(False)  # before DDP and the optimizer, which pass it over
        chunks.append(Float16Module(config, model) if config.bf16 or config.fp16 else model)
        keep_biases_in_float32(model)
    config.moe_router_enable_expert_bias = False  # routers have theirs; what moves it is `correction_bias`
    if not with_gradients:
        return chunks
    ddp = megatron.distributed_data_parallel_config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        use_distributed_optimizer=megatron.optimizer.use_distributed_optimizer,
        average_in_collective=False,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = config.no_sync_func[0] if len(wrapped) == 1 else config.no_sync_func
    return wrapped
