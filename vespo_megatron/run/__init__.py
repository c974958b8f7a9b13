"""A run as processes and files: directory, heartbeats, watchdog, stopping, records, checkpoints. Knows no engine."""
