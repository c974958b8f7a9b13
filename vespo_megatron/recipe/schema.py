"""Every recipe key, typed, with its default and meaning: the one documentation of a recipe.

The shape and the key names are NeMo-RL's (https://github.com/NVIDIA-NeMo/RL, `examples/configs`); what has no
counterpart there is marked "(ours)". Lengths are in tokens, times in seconds, batch sizes in responses
unless a name says prompts.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any


def key(default: Any = MISSING, doc: str = "") -> Any:
    """A recipe key with its meaning; mutable defaults are copied. `MISSING` makes it mandatory (`???`)."""
    if default is MISSING:
        return field(default="???", metadata={"doc": doc})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class RewardShapingConfig:
    """`grpo.reward_shaping`: DAPO's soft punishment of overlong responses (arXiv 2503.14476, equation 13)."""

    enabled: bool = key(False, "")
    overlong_buffer_length: int = key(128, "The last so many tokens of max_response_length cost ever more.")
    overlong_buffer_penalty: float = key(1.0, "The cost at max_response_length and beyond.")
    max_response_length: int | None = key(None, "None: policy.generation.max_new_tokens.")


@dataclass
class AsyncGRPOConfig:
    """`grpo.async_grpo`: rollout beside training. A step is one batch of num_prompts_per_step groups."""

    enabled: bool = key(False, "")
    max_staleness: float | None = key(None, "(ours) Weight versions a token may be behind, or a fraction; None: 1.")
    staleness_threshold: float | None = key(None, "(ours) veRL's name of the same number; give one of the two.")
    sync_every: int = key(1, "(ours) Steps between weight updates.")
    on_weight_update: str = key(
        "abort_and_continue", "(ours) What runs meanwhile: abort_and_continue, in_place, or drain."
    )

    @property
    def staleness(self) -> float:
        """Whichever of the two names was used; rounded up it bounds every token's lag."""
        given = self.max_staleness if self.staleness_threshold is None else self.staleness_threshold
        return 1.0 if given is None else given


@dataclass
class GRPOConfig:
    """`grpo`: the rollout batch and the loop, whatever the loss is called."""

    num_prompts_per_step: int = key(32, "Prompts in one rollout batch.")
    num_generations_per_prompt: int = key(8, "Responses per prompt: the size of one advantage group.")
    max_num_steps: int = key(100, "Rollout batches to train on.")
    max_num_epochs: int = key(1_000_000, "Passes over the prompts at most.")
    normalize_rewards: bool = key(True, "Divide group advantages by the group's standard deviation.")
    use_leave_one_out_baseline: bool = key(False, "Baseline from the other responses of the group.")
    reward_shaping: RewardShapingConfig = key(RewardShapingConfig)
    use_dynamic_sampling: bool = key(False, "Drop groups whose rewards are all equal (DAPO).")
    advantage_estimator: str = key("auto", "(ours) auto: as the two switches above; else a name of losses.advantages.")
    val_period: int = key(10, "Evaluate every so many steps; 0 never.")
    val_at_start: bool = key(True, "Evaluate before the first step.")
    val_at_end: bool = key(True, "Evaluate after the last step.")
    max_val_samples: int = key(256, "Prompts of the validation set to use at most.")
    val_num_generations: int = key(1, "(ours) Responses per validation prompt: avg@k.")
    async_grpo: AsyncGRPOConfig = key(AsyncGRPOConfig)
    seed: int = key(42, "Seed of initialisation, prompt order and the in-process sampler.")


@dataclass
class LossConfig:
    """`loss_fn`: one objective φ, its correction and its aggregation."""

    name: str = key("vespo", "(ours) An objective of `losses.objectives`, or package.module:function.")
    hyperparameters: dict[str, Any] = key({}, "(ours) Arguments of that objective; unknown ones are an error.")
    aggregation: str = key("token-mean", "(ours) token-mean, seq-mean-token-sum, seq-mean-token-mean, token-sum-norm.")
    aggregation_length: int | None = key(None, "(ours) The constant length of token-sum-norm.")
    behavior: str = key("rollout", "(ours) rollout: μ is the engine's log-probs; recompute: π_old by the trainer.")
    correction: dict[str, Any] = key({}, "(ours) Train-inference correction: {name: tis|icepop|mis|…}; empty is none.")
    reference_policy_kl_penalty: float = key(0.0, "Weight of the KL to the initial policy; 0 skips its pass.")
    reference_policy_kl_type: str = key("k3", "k1, k2 or k3.")
    entropy_coefficient: float = key(0.0, "(ours) Weight of the entropy bonus.")
    ess_learning_rate: str = key("none", "(ours) Scale the learning rate by the ESS of W (VCPO): none, sqrt or linear.")
    ess_base: float = key(1.0, "(ours) The ESS, as a share of the mini-batch, at which the scale is 1.")
    on_bad_sample: str = key("error", "(ours) error or drop, for samples whose numbers are not finite.")


@dataclass
class OptimizerConfig:
    """`policy.megatron_cfg.optimizer`: megatron-core's OptimizerConfig."""

    optimizer: str = key("adam", "adam or sgd.")
    lr: float = key(1e-6, "Peak learning rate.")
    min_lr: float = key(0.0, "Learning rate at the end of decay.")
    weight_decay: float = key(0.0, "Decoupled weight decay.")
    adam_beta1: float = key(0.9, "")
    adam_beta2: float = key(0.999, "")
    adam_eps: float = key(1e-8, "")
    clip_grad: float = key(1.0, "Global gradient norm to clip at; 0 never.")
    use_distributed_optimizer: bool = key(True, "Shard optimizer state over data parallel ranks.")
    use_precision_aware_optimizer: bool = key(False, "Optimizer state in lower precision (needs Transformer Engine).")
    optimizer_cpu_offload: bool = key(False, "Keep optimizer state in host memory.")
    optimizer_offload_fraction: float = key(0.0, "Share of it to offload.")


@dataclass
class SchedulerConfig:
    """`policy.megatron_cfg.scheduler`: counted in optimizer updates."""

    lr_decay_style: str = key("constant", "constant, linear, cosine.")
    lr_decay_iters: int | None = key(None, "Updates until min_lr; None: the whole run.")
    lr_warmup_iters: int = key(0, "Updates of linear warm-up.")
    lr_warmup_init: float = key(0.0, "Learning rate before the first update of warm-up.")


@dataclass
class DDPConfig:
    """`policy.megatron_cfg.distributed_data_parallel_config`."""

    grad_reduce_in_fp32: bool = key(True, "Accumulate and reduce gradients in float32.")
    overlap_grad_reduce: bool = key(False, "Reduce gradients while the backward runs.")
    overlap_param_gather: bool = key(False, "Gather parameters while the next forward runs.")


@dataclass
class MegatronConfig:
    """`policy.megatron_cfg`: parallel layout, model numerics, optimizer."""

    tensor_model_parallel_size: int = key(1, "TP.")
    pipeline_model_parallel_size: int = key(1, "PP.")
    virtual_pipeline_model_parallel_size: int | None = key(None, "(ours) Model chunks per pipeline rank (VPP).")
    num_layers_in_first_pipeline_stage: int | None = key(None, "Layers of the first stage; None: an equal share.")
    num_layers_in_last_pipeline_stage: int | None = key(None, "Layers of the last stage; None: an equal share.")
    context_parallel_size: int = key(1, "CP.")
    expert_model_parallel_size: int = key(1, "EP.")
    expert_tensor_parallel_size: int = key(1, "ETP: tensor parallel size inside one expert.")
    sequence_parallel: bool = key(False, "Shard the sequence where TP replicates it; TP > 1 needs it with MoE.")
    layer_spec: str = key("auto", "(ours) auto, te (Transformer Engine) or native (plain PyTorch).")
    activation_checkpointing: bool = key(False, "Full recompute, one layer at a time (uniform).")
    recompute_granularity: str | None = key(None, "(ours) full or selective; overrides activation_checkpointing.")
    freeze_moe_router: bool = key(False, "Do not train the routers' weights.")
    moe_router_dtype: str | None = key("fp32", "Router numerics: fp32 or fp64.")
    moe_token_dispatcher_type: str = key("alltoall", "alltoall, allgather, flex.")
    moe_permute_fusion: bool = key(False, "Fused permutation (needs Transformer Engine).")
    apply_rope_fusion: bool = key(False, "Fused rotary embedding (needs Transformer Engine).")
    moe_grouped_gemm: bool = key(True, "(ours) Experts by grouped matmul, where the layer spec has it.")
    logprob_memory_mb: int = key(64, "(ours) MiB of logits that exist at one time; on a GPU more, say 512.")
    distributed_timeout: float = key(600.0, "(ours) Deadline of a collective, in seconds.")
    optimizer: OptimizerConfig = key(OptimizerConfig)
    scheduler: SchedulerConfig = key(SchedulerConfig)
    distributed_data_parallel_config: DDPConfig = key(DDPConfig)

    @property
    def recompute(self) -> str | None:
        """What the backward computes again: "full", "selective" or nothing."""
        return self.recompute_granularity or ("full" if self.activation_checkpointing else None)


@dataclass
class SequencePackingConfig:
    """`policy.sequence_packing`."""

    enabled: bool = key(True, "Pack micro-batches up to a token budget; off: train_micro_batch_size sequences each.")
    train_mb_tokens: int = key(16384, "Token budget of a training micro-batch, for the whole context-parallel group.")
    logprob_mb_tokens: int = key(
        16384, "No effect: passes without gradient go over the training micro-batches, whose routes they share."
    )


@dataclass
class RouterReplayConfig:
    """`policy.router_replay`."""

    mode: str = key("none", "none, R2 (the trainer's own routes at θ_old) or R3 (the rollout engine's).")
    on_stale_routes: str = key("error", "live, drop or error: routes of another weight version than the log-probs.")
    measure_agreement: bool = key(True, "(ours) Compare the trainer's routes with the engine's, where it returns them.")


@dataclass
class SGLangConfig:
    """`policy.generation.sglang_cfg`: the servers. Unknown keys under `server_args` go to the server's flags."""

    num_servers: int = key(1, "(ours) Servers to start; ignored when `urls` is set.")
    urls: list[str] = key([], "(ours) Servers that already run; nothing is started.")
    python: str | None = key(None, "(ours) Interpreter of the servers' environment; None: this one.")
    host: str = key("127.0.0.1", "(ours) Address the servers listen on.")
    port: int = key(0, "(ours) First port; 0 picks free ones.")
    tensor_parallel_size: int = key(1, "TP of one server.")
    dtype: str = key("auto", "Server numerics: auto is policy.precision.")
    context_length: int | None = key(None, "None: policy.max_total_sequence_length.")
    mem_fraction_static: float | None = key(None, "Share of device memory for weights and KV cache.")
    max_total_tokens: int | None = key(None, "(ours) Size of the KV cache in tokens (CPU).")
    enable_return_routed_experts: bool = key(False, "Return the experts chosen per token (R3 and route agreement).")
    startup_timeout: float = key(300.0, "(ours) Deadline for a server to be ready, in seconds.")
    request_timeout: float = key(600.0, "(ours) Deadline of one generation request, in seconds.")
    health_timeout: float = key(60.0, "(ours) A working server silent for so long is given up; 0: never.")
    max_restarts: int = key(3, "(ours) Times that a server started here is started again after it died.")
    recovery_timeout: float = key(300.0, "(ours) How long to wait for a server to come back when none is left.")
    api_key: str | None = key(None, "(ours) The servers' key; better in $VESPO_SGLANG_API_KEY. Never saved nor logged.")
    max_concurrent_requests: int = key(1024, "(ours) Requests in flight per server.")
    weight_transport: str = key("distributed", "(ours) distributed, tensor or disk.")
    weight_folder: str | None = key(None, "(ours) Folder of transport disk, shared; None: in the run directory.")
    weight_bucket_bytes: int = key(268435456, "(ours) Half of the memory that a weight update takes on the trainer.")
    weight_sync_only_changed: bool = key(False, "(ours) Send only tensors whose hash changed since the last update.")
    colocated: bool = key(False, "(ours) Servers on the trainer's devices give their memory back while it trains.")
    server_args: dict[str, Any] = key({}, "(ours) Further server flags, without the dashes.")

    @property
    def weight_piece_bytes(self) -> int:
        """What is gathered from the ranks at a time; it and a tensor joined from it fit beside two smaller buckets."""
        return self.weight_bucket_bytes // 8


MAX_SAMPLING_MASK_TOKENS = 4096
"""Tokens of a truncated distribution that SGLang 0.5.23 reports at most (`--sampling-mask-max-tokens`)."""


@dataclass
class GenerationConfig:
    """`policy.generation`."""

    backend: str = key("sglang", "sglang or in_process.")
    max_new_tokens: int = key(512, "Response tokens at most.")
    temperature: float = key(1.0, "")
    top_p: float = key(1.0, "Below 1 π, too, is taken over the tokens that μ could draw.")
    top_k: int | None = key(None, "None: all. SGLang wants one, of at most 4096, beside a top_p below 1.")
    stop_token_ids: list[int] = key([], "Empty: the tokenizer's end-of-sequence token.")
    val_temperature: float | None = key(None, "(ours) Evaluation; None: as in training. 0 is greedy.")
    val_top_p: float | None = key(None, "(ours) Evaluation; None: as in training.")
    sglang_cfg: SGLangConfig = key(SGLangConfig)


@dataclass
class TokenizerConfig:
    """`policy.tokenizer`."""

    name: str | None = key(None, "Folder or hub name; None: policy.model_name.")
    chat_template: bool = key(True, "(ours) Apply the tokenizer's chat template to prompts that are messages.")


@dataclass
class PolicyConfig:
    """`policy`: the model, how it is trained, how it generates."""

    model_name: str = key(MISSING, "Hugging Face folder with config.json and safetensors.")
    tokenizer: TokenizerConfig = key(TokenizerConfig)
    train_global_batch_size: int = key(256, "Responses per optimizer update: N is the rollout batch over this.")
    train_micro_batch_size: int = key(4, "Sequences per micro-batch when sequence packing is off.")
    logprob_batch_size: int = key(4, "No effect; see sequence_packing.logprob_mb_tokens.")
    max_total_sequence_length: int = key(1024, "Prompt and response together.")
    precision: str = key("bfloat16", "float32 or bfloat16.")
    megatron_cfg: MegatronConfig = key(MegatronConfig)
    sequence_packing: SequencePackingConfig = key(SequencePackingConfig)
    router_replay: RouterReplayConfig = key(RouterReplayConfig)
    generation: GenerationConfig = key(GenerationConfig)


@dataclass
class DatasetConfig:
    """One split of `data`."""

    path: str | None = key(None, "Parquet or JSONL file in veRL's schema.")
    max_samples: int | None = key(None, "Use the first so many rows.")


@dataclass
class DataConfig:
    """`data`: prompts."""

    train: DatasetConfig = key(DatasetConfig)
    validation: DatasetConfig = key(DatasetConfig)
    prompt_key: str = key("prompt", "Column of the prompt: chat messages or text.")
    max_input_seq_length: int = key(512, "Prompt tokens at most.")
    on_long_prompt: str = key("error", "(ours) error or drop.")
    shuffle: bool = key(True, "Shuffle each epoch with grpo.seed.")


@dataclass
class EnvConfig:
    """`env`: rewards."""

    reward: str = key("math", "(ours) math, exact_match, code, format, remote, or package.module:function.")
    rewards: dict[str, float] = key({}, "(ours) Reward → weight: a weighted sum, each part logged; in place of reward.")
    reward_kwargs: dict[str, Any] = key({}, "(ours) Arguments of the reward; with `rewards`, reward → arguments.")
    num_workers: int = key(1, "Reward worker processes.")
    timeout: float = key(10.0, "(ours) Deadline of one score, in seconds; late ones score 0 and are counted.")


@dataclass
class CheckpointingConfig:
    """`checkpointing`."""

    enabled: bool = key(True, "")
    save_period: int = key(0, "Steps between checkpoints, the last step besides; 0: only when the run is stopped.")
    keep_top_k: int | None = key(None, "Checkpoints to keep: the best by metric_name; None: all.")
    metric_name: str | None = key(None, "Metric that tells the best, as in metrics.jsonl; None: the newest are.")
    higher_is_better: bool = key(True, "Of that metric.")
    keep_last: int = key(1, "(ours) Newest checkpoints to keep whatever their metric.")
    async_save: bool = key(True, "(ours) Write beside training; the state is copied first.")
    timeout: float = key(1800.0, "(ours) Deadline of writing a checkpoint, in seconds.")
    save_hf: bool = key(True, "(ours) Export the final policy as a Hugging Face folder.")
    save_hf_with_each: bool = key(False, "(ours) Put such an export into every checkpoint as well.")


@dataclass
class GuardConfig:
    """`guard` (ours): numbers that are not finite, and signs of collapse. Windows are in steps."""

    max_skipped_updates: int = key(3, "Updates in a row skipped for numbers that are not finite before the run stops.")
    max_bundles: int = key(3, "Skipped updates to keep under bundles/ for vespo-megatron replay-step; 0 none.")
    save_weights: bool = key(True, "Keep the weights with a bundle; without them the step is replayed on model_name.")
    on_collapse: str = key("warn", "warn, or stop: save and end the run, as SIGTERM does.")
    window: int = key(10, "Steps of a mean that is compared; nothing is said before two windows.")
    reward_drop: float | None = key(0.5, "Fall of the mean reward below its best window, in units of reward.")
    length_drop: float | None = key(0.2, "Mean response length below this share of the first window's.")
    truncated_share: float | None = key(0.9, "Share of responses cut off at their limit.")
    entropy_drop: float | None = key(0.02, "Mean policy entropy below this share of the first window's.")
    loss_spike: float | None = key(100.0, "Gradient norm of one step above this multiple of the window's median.")


@dataclass
class LoggerConfig:
    """`logger`."""

    tensorboard_enabled: bool = key(True, "")
    profile_step: int = key(0, "(ours) Trace this step into <run>/profile; 0: none. `train --profile` says 2.")
    num_val_samples_to_print: int = key(3, "Samples written to samples/ per evaluation.")
    progress: bool = key(True, "(ours) A progress bar where the output is a terminal.")


@dataclass
class ClusterConfig:
    """`cluster`: how many trainer processes. On a CPU a 'GPU' is one gloo process."""

    gpus_per_node: int = key(1, "Trainer processes per node.")
    num_nodes: int = key(1, "Trainer nodes.")
    device: str = key("auto", "(ours) auto, cuda or cpu.")
    watchdog_timeout: float | None = key(
        None,
        "(ours) Seconds without progress after which a hanging rank ends the run; 0 never; None: nine tenths of "
        "policy.megatron_cfg.distributed_timeout. Phases that wait for servers have those deadlines besides.",
    )
    stop_timeout: float = key(
        300.0, "(ours) Seconds for SIGTERM or SIGUSR1 to finish the step and save; 0 stops at once, unsaved."
    )


@dataclass
class SlurmConfig:
    """`slurm`: (ours) how `vespo-megatron slurm` asks for nodes. GPUs and trainer nodes are in `cluster`."""

    layout: str = key("disaggregated", "colocated, disaggregated (one allocation) or heterogeneous (a hetjob).")
    rollout_nodes: int = key(0, "Nodes for SGLang, each with sglang_cfg.num_servers servers; not in colocated.")
    account: str | None = key(None, "sbatch --account.")
    partition: str | None = key(None, "sbatch --partition.")
    rollout_partition: str | None = key(None, "That of the rollout nodes in a hetjob; None: the same.")
    qos: str | None = key(None, "sbatch --qos.")
    time: str | None = key(None, "sbatch --time, as in 04:00:00.")
    checkpoint_lead: int = key(600, "Seconds before the time limit at which a checkpoint is asked for.")
    requeue: bool = key(True, "Back into the queue after the time limit or a lost node, to resume.")
    setup: list[str] = key([], "Shell lines before anything else: modules, environment.")
    container_image: str | None = key(None, "Pyxis: image of every step.")
    container_mounts: list[str] = key([], "Pyxis: host:container.")
    sbatch_options: list[str] = key([], "Further options, as in --exclusive.")
    logs: str = key("slurm_logs", "Folder of <job>/attempt_<n>/*.log, reached from every node.")


@dataclass
class ExpManagerConfig:
    """`exp_manager`: NeMo's run directory keys."""

    exp_dir: str = key("runs", "Runs are kept in <exp_dir>/<name>/<version>.")
    name: str = key("vespo", "")
    version: str | None = key(None, "None: the next free version_<n>.")
    resume_if_exists: bool = key(False, "Go on from the version's newest whole checkpoint; without one, begin.")


@dataclass
class Recipe:
    """A whole recipe."""

    grpo: GRPOConfig = key(GRPOConfig)
    loss_fn: LossConfig = key(LossConfig)
    policy: PolicyConfig = key(PolicyConfig)
    data: DataConfig = key(DataConfig)
    env: EnvConfig = key(EnvConfig)
    checkpointing: CheckpointingConfig = key(CheckpointingConfig)
    guard: GuardConfig = key(GuardConfig)
    logger: LoggerConfig = key(LoggerConfig)
    cluster: ClusterConfig = key(ClusterConfig)
    slurm: SlurmConfig = key(SlurmConfig)
    exp_manager: ExpManagerConfig = key(ExpManagerConfig)

    @property
    def world_size(self) -> int:
        """Trainer processes in all."""
        return self.cluster.gpus_per_node * self.cluster.num_nodes

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the dense model: TP·PP·CP."""
        megatron = self.policy.megatron_cfg
        return (
            megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """Copies of the dense model."""
        return self.world_size // self.model_parallel_size

    @property
    def rollout_batch_size(self) -> int:
        """Responses per rollout batch."""
        return self.grpo.num_prompts_per_step * self.grpo.num_generations_per_prompt

    @property
    def num_mini_batches(self) -> int:
        """N: optimizer updates per rollout batch."""
        return self.rollout_batch_size // self.policy.train_global_batch_size
