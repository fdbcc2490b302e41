"""Training. `loop.pretrain` runs a recipe; every other file holds one idea."""
