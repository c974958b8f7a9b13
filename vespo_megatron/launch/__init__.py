"""Starting a run: checks before it, torchrun, the worker that each rank is, and the commands that need one."""
