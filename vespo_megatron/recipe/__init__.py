"""Recipes: what they may say, how they are read, and what they may not ask for."""
