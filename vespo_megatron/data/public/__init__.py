"""Public problem sets in veRL's schema: where each is, and how one of its rows becomes a prompt."""
