"""Training: parallel set-up, the Qwen3-MoE policy on megatron-core, HF weights, log-probs, the train step."""
