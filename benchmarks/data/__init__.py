"""Speed and memory of preparing text and of the loader."""
