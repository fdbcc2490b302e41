"""Speed, memory traffic and tiles of the kernels, beside what people would use instead."""
