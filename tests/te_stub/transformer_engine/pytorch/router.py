"""Stand-in for pytorch/router.py: the fused routers, which pass routing replay by and are refused there."""


def _refuse(*_args: object, **_kwargs: object):
    raise AssertionError("a fused router was called")


fused_topk_with_score_function = fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = _refuse
