"""Model families: what differs from one kind of decoder to the next. Standard library alone.

A family is a module here named after its `model_type`, or a package's own, which it registers as an entry point of
the group `vespo_megatron.families`. It has one constant, `FAMILY`, a `family.Family`. Everything else in the project
goes by the `ModelShape` that a family reads and asks nobody which family that was.
"""
