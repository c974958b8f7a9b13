"""Keys of a run: `checkpointing`, `guard`, `logger`, `cluster`, `slurm`, `exp_manager`."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator

from vespo_megatron.recipe.schema.base import Section, key


def _within_its_folder(name: str) -> str:
    path = PurePosixPath(name)
    if not name.isprintable() or path.is_absolute() or not path.parts or ".." in path.parts:
        raise ValueError(f"is {name!r}, which is no folder within another")
    return name


FolderName = Annotated[str, AfterValidator(_within_its_folder)]


class CheckpointingConfig(Section):
    """`checkpointing`."""

    enabled: bool = key(True, "Save and resume; off: nothing is saved, a stopped run is lost.")
    save_period: int = key(
        0, "Steps between checkpoints, the last step besides; 0: only when the run is stopped.", ge=0
    )
    keep_top_k: int | None = key(None, "Checkpoints to keep: the best by metric_name; None: all.", ge=1)
    metric_name: str | None = key(
        None, "Metric that tells the best, as in metrics.jsonl: eval/average, …; None: the newest are."
    )
    higher_is_better: bool = key(True, "Of that metric.")
    keep_last: int = key(1, "Newest checkpoints to keep whatever their metric.", ge=1, ours=True)
    async_save: bool = key(True, "Write beside training; the state is copied first.", ours=True)
    timeout: float = key(1800.0, "Deadline of writing a checkpoint, in seconds.", gt=0, ours=True)
    save_hf: bool = key(True, "Export the final policy as a Hugging Face folder.", ours=True)
    save_hf_with_each: bool = key(False, "Put such an export into every checkpoint as well.", ours=True)


class GuardConfig(Section):
    """`guard` (ours): numbers that are not finite, and signs of collapse. Windows are in steps."""

    max_skipped_updates: int = key(
        3, "Updates in a row skipped for numbers that are not finite before the run stops.", ge=1
    )
    max_bundles: int = key(3, "Skipped updates to keep under bundles/ for vespo-megatron replay-step; 0 none.", ge=0)
    save_weights: bool = key(True, "Keep the weights with a bundle; without them the step is replayed on model_name.")
    on_collapse: Literal["warn", "stop"] = key("warn", "stop: save and end the run, as SIGTERM does.")
    window: int = key(10, "Steps of a mean that is compared; nothing is said before two windows.", ge=1)
    reward_drop: float | None = key(0.5, "Fall of the mean reward below its best window, in units of reward.", gt=0)
    length_drop: float | None = key(0.2, "Mean response length below this share of the first window's.", gt=0, le=1)
    truncated_share: float | None = key(0.9, "Share of responses cut off at their limit.", gt=0, le=1)
    entropy_drop: float | None = key(0.02, "Mean policy entropy below this share of the first window's.", gt=0, le=1)
    loss_spike: float | None = key(100.0, "Gradient norm of one step above this multiple of the window's median.", gt=0)


class LoggerConfig(Section):
    """`logger`."""

    tensorboard_enabled: bool = key(True, "Write TensorBoard events besides metrics.jsonl.")
    profile_step: int = key(
        0, "Trace this step into <run>/profile; 0: none. `train --profile` says 2.", ge=0, ours=True
    )
    num_val_samples_to_print: int = key(3, "Samples written to samples/ per evaluation.", ge=0)
    progress: bool = key(True, "A progress bar where the output is a terminal.", ours=True)


class ClusterConfig(Section):
    """`cluster`: how many trainer processes. On a CPU a 'GPU' is one gloo process."""

    gpus_per_node: int = key(1, "Trainer processes per node.", ge=1)
    num_nodes: int = key(1, "Trainer nodes.", ge=1)
    device: Literal["auto", "cuda", "cpu"] = key(
        "auto", "What the trainer runs on; auto: CUDA where there is one.", ours=True
    )
    network_interface: str | None = key(
        None, "Interface that gloo and NCCL use, as in ib0; None: what they find.", ours=True
    )
    watchdog_timeout: float | None = key(
        None,
        "Seconds without progress after which a hanging rank ends the run; 0 never; None: nine tenths of "
        "policy.megatron_cfg.distributed_timeout. Phases that wait for servers have those deadlines besides.",
        ge=0,
        ours=True,
    )
    stop_timeout: float = key(
        300.0,
        "Seconds for SIGTERM, SIGUSR1 or SIGHUP to end the step and save; 0: at once, unsaved.",
        ge=0,
        ours=True,
    )


class SlurmConfig(Section):
    """`slurm`: (ours) how `vespo-megatron slurm` asks for nodes. GPUs and trainer nodes are in `cluster`."""

    layout: Literal["colocated", "disaggregated", "heterogeneous"] = key(
        "disaggregated", "Servers on the trainer's nodes, on nodes of the same allocation, or of a hetjob."
    )
    rollout_nodes: int = key(0, "Nodes for SGLang, each with sglang_cfg.num_servers servers; not in colocated.", ge=0)
    account: str | None = key(None, "sbatch --account.")
    partition: str | None = key(None, "sbatch --partition.")
    rollout_partition: str | None = key(None, "That of the rollout nodes in a hetjob; None: the same.")
    qos: str | None = key(None, "sbatch --qos.")
    time: str | None = key(None, "sbatch --time, as in 04:00:00.")
    checkpoint_lead: int = key(600, "Seconds before the time limit at which a checkpoint is asked for.", ge=0)
    cpus_per_node: int | None = key(
        None, "Cores of each node, for its servers or trainer processes; None: --exclusive, all of them.", ge=1
    )
    requeue: bool = key(True, "Back into the queue after the time limit or a lost node, to resume.")
    setup: list[str] = key([], "Shell lines before anything else: modules, environment.")
    container_image: str | None = key(None, "Pyxis: image of every step.")
    rollout_container_image: str | None = key(None, "Pyxis: image of the servers' steps; None: the same.")
    container_mounts: list[str] = key([], "Pyxis: host:container.")
    sbatch_options: list[str] = key([], "Further options, as in --exclusive.")
    logs: str = key("slurm_logs", "Folder of <job>/attempt_<n>/*.log, reached from every node.")


class ExpManagerConfig(Section):
    """`exp_manager`: NeMo's run directory keys."""

    exp_dir: str = key("runs", "Runs are kept in <exp_dir>/<name>/<version>.")
    name: FolderName = key("vespo", "Of the run, and its folder within exp_dir.")
    version: FolderName | None = key(None, "None: the next free version_<n>.")
    resume_if_exists: bool = key(False, "Go on from the version's newest whole checkpoint; without one, begin.")
