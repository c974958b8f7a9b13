"""What a run will need before a GPU is booked: memory, time, and how trainer and rollouts keep pace."""
