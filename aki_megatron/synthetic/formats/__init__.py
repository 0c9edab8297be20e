"""One writer per public format. The readers of the same names are in data/sources (blip3_ocr: data/captions)."""
