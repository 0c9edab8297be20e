"""Embedded data: scenes drawn by rule, written in the public formats the readers of this package take in."""
