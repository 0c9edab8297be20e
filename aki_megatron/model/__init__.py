"""Model of one pipeline stage: vision encoder, resampler, decoder layers, LM head. Independent of ranks and groups."""
