"""What the compilers make of every Triton kernel and every launch; needs no GPU."""
