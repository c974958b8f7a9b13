"""Metrics as data: `table` says what each means and how its values merge; nothing that is not in it can be logged."""
