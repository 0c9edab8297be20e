"""Log-mel spectrograms as Whisper computes them: the only adapter of transformers' audio preprocessing.

A spectrogram of 30 seconds takes about 50 ms of one core, one of a second 2 ms.
"""

import numpy as np
from numpy.typing import NDArray

from aki_megatron.config.model import AudioConfig


class LogMel:
    """Waveform to spectrogram: windows of 25 ms every 10 ms, mel bands, log10, the loudest 8 orders of magnitude."""

    def __init__(self, config: AudioConfig) -> None:
        from transformers import WhisperFeatureExtractor  # 0.2 s that runs without audio need not wait for

        self.config = config
        self._extractor = WhisperFeatureExtractor(
            feature_size=config.num_mel_bins, sampling_rate=config.sample_rate, chunk_length=config.seconds
        )

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples in [-1, 1], at most config.seconds of them; silence follows -> float32 [num_mel_bins, num_frames]."""
        assert len(waveform) <= self.config.seconds * self.config.sample_rate, len(waveform)
        features = self._extractor(waveform, sampling_rate=self.config.sample_rate, return_tensors="np")
        log_mel: NDArray[np.float32] = features["input_features"][0].astype(np.float32)
        assert log_mel.shape == (self.config.num_mel_bins, self.config.num_frames), log_mel.shape
        return log_mel
