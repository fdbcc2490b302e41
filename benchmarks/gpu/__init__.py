"""Everything that needs a GPU, in one run of ten minutes: results, speed, steps, tiles."""
