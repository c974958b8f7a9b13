"""Weight sync: a stream of Hugging Face tensors to the servers, in buckets, by one of three transports, and checked.

- `session`: one update from pause to resume, the checksum that ends it, and what happens when it differs;
- `weights_checker`, `manifest`: what of every tensor the servers hold;
- `buckets`: flat buffers that are filled while others travel;
- `distributed`, `tensor`, `disk`: how a bucket gets into a server; `transport` is what they share;
- `servers`: control calls to all servers at once; `memory`: device memory that trainer and servers take turns to use;
- `factory`: the one that a recipe asks for.
"""

from vespo_megatron.rollout_sglang.weight_sync.factory import make_sync
from vespo_megatron.rollout_sglang.weight_sync.session import WeightSync

__all__ = ["WeightSync", "make_sync"]
