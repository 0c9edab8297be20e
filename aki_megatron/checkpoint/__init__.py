"""State at rest: weights and training state on disk."""
