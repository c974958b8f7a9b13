"""Prompts, samples, batches, packing, and the one owner of every slice (`SequenceLayout`)."""
