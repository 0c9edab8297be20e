"""Greedy generation, accuracies, public benchmarks, judges, reports, attention masks as images, golden numbers."""
