"""Parallel layout: launchers, process groups, tensor-parallel layers, pipeline partition, schedule, communication."""
