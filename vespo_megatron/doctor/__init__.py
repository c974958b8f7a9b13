"""`vespo-megatron doctor`: what of a run would fail here, before it is asked for."""
