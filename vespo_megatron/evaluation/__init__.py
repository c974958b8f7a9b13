"""What sampled answers say of a model: scores with intervals, a table, and every problem on a line."""
