"""Names that only somebody else's code says: who does. `make lint` finds whatever else is never named."""

from types import SimpleNamespace as _

# torch.cuda's own, which megatron-core calls where there is no CUDA (megatron/cpu_runtime.py).
_().wait_stream, _().wait_event, _().record_event, _().Stream, _().default_stream, _().record_stream
_()._get_cuda_rng_state, _()._set_cuda_rng_state
# megatron-core: of a GPTModel, a router, a module spec, a parameter, packed sequences, a save strategy, configs, DDP.
(
    _()._postprocess,
    _().gating,
    _().backward_dw,
    _().pre_mlp_layernorm,
    _().core_attention,
    _().k_layernorm,
    _().q_layernorm,
    _().allreduce,
)
(
    _().moe_router_enable_expert_bias,
    _().pad_between_seqs,
    _().cu_seqlens_q,
    _().cu_seqlens_kv,
    _().cu_seqlens_q_padded,
    _().cu_seqlens_kv_padded,
)
_().can_handle_sharded_objects, _().grad_scale_func, _().get_replay_topk
_().use_precision_aware_optimizer_no_fp8_or_ds_fp8, _().force_all_reduce
_().dispatch_preprocess, _().combine_postprocess, _()._apply_expert_bias, _().grad_scaler
# SGLang: of a platform plugin, found by its entry point, and of what it patches (plugin/cpu_platform.py).
_().activate, _().get_default_attention_backend, _().get_dispatch_key_name, _().is_pin_memory_available
_().init_backend, _().adjust_config_with_unaligned_cpu_tp, _().load_config, _().tp_size
# torch.distributed: of broadcast options and of a process group that is made by hand; pickle; http.client; io.
_().rootRank, _().rootTensor, _()._devices, _().reducer_override, _().sock, _().makefile
_().readable, _().readinto, _().redirect_request, _().writable
# By its path (test_how_to_add.py); Jinja templates; every `…_size` of RankInfo; all of the staleness buffer's counts.
(
    _().drawn_again,
    _().length_reward,
    _().Guess,
    _().ToolOutput,
    _().Earns,
    _().Fails,
    _().AsyncEcho,
    _().Ids,
    _().Hostile,
    _().Pids,
    _().Calculator,
    _().PythonTool,
)
_().colour, _().setup, _().virtual_pipeline_size
# Python's HTTP server, tokenizers and TRL, in tests and benchmarks.
_().allow_tf32, _().do_GET, _().do_POST, _().log_message, _().handle_error, _().daemon_threads, _().request_queue_size
_().RuntimeModule, _().protocol_version, _().pre_tokenizer, _().on_step_end, _().reduction, _()._tensors
