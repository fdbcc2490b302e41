"""What this stack is worth, measured on your machine."""
