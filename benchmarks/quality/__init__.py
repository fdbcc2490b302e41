"""How good a model becomes in a given time, and what fine-tuning gains from it."""
