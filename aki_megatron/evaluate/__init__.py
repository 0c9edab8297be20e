"""Greedy generation, accuracies, reports, attention masks as images, golden numbers."""
