"""Routing Replay: the experts of each token are recorded, or taken from the engine, and chosen again in training.

R2 (vanilla routing replay, arXiv 2507.18071, 2512.01374) replays what the training engine chose at θ_old;
R3 (rollout routing replay, arXiv 2510.11370) what the inference engine chose. Only the choice is fixed: gates are
computed from the current router's logits, and the gradient reaches the router.
"""
