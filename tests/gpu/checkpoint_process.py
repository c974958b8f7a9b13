"""`python checkpoint_process.py FOLDER FROM TO PRECISION`: loads a checkpoint on the host and saves it again.

Prints the log-probs of the tests' samples under it, as JSON. Run it with CUDA_VISIBLE_DEVICES="" for a machine without.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(folder: str, source: str, target: str, precision: str) -> None:
    import torch
    from gpu_policy import by_sample, make_batch, make_policy, micro_batches

    from vespo_megatron.megatron import checkpoint, parallel
    from vespo_megatron.recipe.schema import MegatronConfig

    assert not torch.cuda.is_available()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.makedirs(target)
    rank_info = parallel.initialize(
        MegatronConfig(), seed=1, device=torch.device("cpu"), init_method=f"file://{target}.store"
    )
    policy = make_policy(Path(folder), rank_info, precision)
    checkpoint.load(policy, Path(source), same_layout=True)
    batches = micro_batches(policy, make_batch())
    scores = by_sample(batches, policy.log_probs(batches))
    checkpoint.save(policy, Path(target))()
    print(json.dumps({name: each[0].tolist() for name, each in scores.items()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
