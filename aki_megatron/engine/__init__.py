"""One optimizer step, however the model is spread."""
