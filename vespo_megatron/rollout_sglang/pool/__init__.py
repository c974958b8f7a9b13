"""Many SGLang servers as one: who serves, who gets which request, what becomes of a failed one's."""
