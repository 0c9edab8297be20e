"""Distributed training of vision-language models with modality-mutual attention (AKI)."""

__version__ = "0.1.0"
