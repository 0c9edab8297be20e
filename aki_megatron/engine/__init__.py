"""Optimizer steps and training state under any parallel layout."""
