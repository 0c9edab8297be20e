"""Bytes to batch: annotation files, tars and pictures on disk become samples, mixed, padded and prefetched."""
