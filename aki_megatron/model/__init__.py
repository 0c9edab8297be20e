"""From a batch to a loss or logits: vision encoder, resampler, decoder, the stage that joins them. Knows no rank."""
