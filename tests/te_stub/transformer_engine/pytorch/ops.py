"""Stand-in for pytorch/ops: names in megatron-core's annotations; it builds none of them as configured here."""


class FusibleOperation:
    pass


class Sequential:
    pass
