"""Training: the loop and what it needs. `loop.pretrain` runs a recipe; everything else is one idea a file."""
