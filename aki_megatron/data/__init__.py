"""From files to batches: read annotation files, tars and images, mix, render, pack, collate and prefetch samples."""
