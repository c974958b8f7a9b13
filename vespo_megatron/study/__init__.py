"""Studies: grids of runs with paired seeds, what they came to, and reports of them."""
