"""Parallel layout: launcher discovery, process groups, tensor-parallel layers, pipeline partition, schedule and messages."""
