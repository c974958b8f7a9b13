"""From prompts to scored samples with advantages: rank 0's other half. It knows the rollout engine and no Megatron."""
