"""From a model to scores: generation, answers, reports."""
