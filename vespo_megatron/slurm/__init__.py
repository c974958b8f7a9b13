"""`vespo-megatron slurm`: a recipe as batch scripts, with servers first, clean ends and resumption."""
