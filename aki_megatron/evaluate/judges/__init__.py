"""Judges of free-form replies: an OpenAI-compatible endpoint, a replay cache, an offline heuristic."""
