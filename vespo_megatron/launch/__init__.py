"""Starting a run: checks before it, the agent, the worker that each rank is, and the commands that need one."""
