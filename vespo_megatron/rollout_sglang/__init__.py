"""Rollouts: the SGLang client, server launch, weight sync, CPU platform plugin; and the in-process engine."""
