"""SGLang servers as processes: their flags and environment, start, restart and end."""
