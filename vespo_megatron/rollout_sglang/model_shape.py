"""What a client must know of the served model to check a request before it is sent and a reply before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.model_config import read_model_config


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a Qwen3-MoE's `config.json` that requests and replies are held to."""

    vocab_size: int
    max_position_embeddings: int
    num_layers: int
    sparse_layers: tuple[int, ...]
    """Indices of the layers that route; the others have a dense MLP."""
    num_experts: int
    topk: int
    tie_word_embeddings: bool
    architecture: str
    kv_values_per_token: int
    """Key and value elements of one token over all layers."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelShape:
        """Read `config.json`; raises `UserError` naming the file and what it lacks."""
        path, config = Path(folder) / "config.json", read_model_config(folder)
        try:
            layers = config["num_hidden_layers"]
            experts = config.get("num_experts", config.get("num_local_experts", 0))  # transformers 5 writes the latter
            dense = set(config.get("mlp_only_layers") or [])
            step = config.get("decoder_sparse_step", 1)
            sparse = [i for i in range(layers) if experts > 0 and i not in dense and (i + 1) % step == 0]
            heads = config["num_attention_heads"]
            head_dim = config.get("head_dim") or config["hidden_size"] // heads
            return cls(
                vocab_size=config["vocab_size"],
                max_position_embeddings=config["max_position_embeddings"],
                num_layers=layers,
                sparse_layers=tuple(sparse),
                num_experts=experts,
                topk=config.get("num_experts_per_tok", 0),
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                architecture=(config.get("architectures") or ["Qwen3MoeForCausalLM"])[0],
                kv_values_per_token=2 * layers * head_dim * config.get("num_key_value_heads", heads),
            )
        except KeyError as error:
            raise UserError(f"has no {error.args[0]}", where=str(path), expected="a Qwen3-MoE config.json") from error

    def check_served_by_sglang(self, where: str) -> None:
        """Raise `UserError` for a model that SGLang 0.5.23 would serve with other layers than it has."""
        if self.num_experts > 0 and len(self.sparse_layers) != self.num_layers:
            dense = sorted(set(range(self.num_layers)) - set(self.sparse_layers))
            raise UserError(
                f"layers {dense} are dense, and SGLang 0.5.23 gives every layer of a Qwen3-MoE experts",
                where=where,
                expected="no mlp_only_layers, and decoder_sparse_step 1",
                fix="set policy.generation.backend=in_process, or use another model",
            )
