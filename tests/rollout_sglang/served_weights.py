"""A `FaultServer` that holds weights: the plugin's answers, and updates that bring what it already has."""

from __future__ import annotations

import torch
from fault_server import FaultServer

from vespo_megatron.rollout_sglang.checksum import tensor_checksum
from vespo_megatron.rollout_sglang.plugin.actions import MANIFEST, SEES

WEIGHTS = {f"layer.{index}.weight": torch.arange(6.0).reshape(2, 3) + index for index in range(3)}


class WeightServer(FaultServer):
    """Says of each of `WEIGHTS` that it has it."""

    def answer(self, handler, body):
        if handler.path != "/weights_checker":
            return super().answer(handler, body)
        self.calls["/weights_checker"] = self.calls.get("/weights_checker", 0) + 1
        action = body["action"].partition(" ")[0]
        if action == SEES:
            values = {"sees": "yes"}
        elif action == MANIFEST:
            values = dict.fromkeys(WEIGHTS, "float32 0:2,0:3")
        else:
            values = {name: f"{tensor_checksum(name, tensor):016x}" for name, tensor in WEIGHTS.items()}
        return self._send(handler, 200, {"ranks": [{"checksums": values, "parallelism_info": [{"tp_rank": 0}]}]})


def held():
    """All of it, as an update streams it."""
    return iter(WEIGHTS.items())
