"""Decoder families: one file each, and the registry. Plain data without torch, read by every layer above."""
