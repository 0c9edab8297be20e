"""Decode recordings: WAV files of integer samples to Whisper's log-mel spectrograms.

WAV with 8, 16, 24 or 32 bits a sample is read; the channels are averaged. Other formats and other sample rates are
refused with the command that converts them: there is no resampling here that could differ from another program's.
Recordings longer than the encoder's input are refused too, since what is beyond it could not be learnt from.
"""

import shlex
import wave
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from aki_megatron.config.model import AudioConfig
from aki_megatron.data.bad_samples import sample_errors
from aki_megatron.data.decode_cache import DecodeCache
from aki_megatron.data.file_kind import HEAD_BYTES, file_kind
from aki_megatron.data.log_mel import LogMel
from aki_megatron.errors import DataError
from aki_megatron.types import DecodedAudio

MAX_FILE_BYTES = 2**28
"""Largest file that is read (256 MiB: more than half an hour of stereo at 32 bits)."""

_EXTENSIBLE, _INTEGERS = b"\xfe\xff", b"\x01\x00"
"""Format tags of a WAV header. Extensible: the true tag follows further on; many programs write 24 bits so."""


class UnreadableAudio(DataError):  # noqa: N818 (the field's name for it)
    """A recording that is missing, malformed, cut off, too long, or of another format; the message names the file."""


class AudioDecoder:
    """Decode the recordings of one model, and keep short ones: datasets ask several questions about one recording."""

    def __init__(self, config: AudioConfig) -> None:
        self.config = config
        self._log_mel = LogMel(config)
        self._cache: DecodeCache[DecodedAudio] = DecodeCache(4 * config.num_mel_bins * config.num_frames)

    def decode(self, content: Path | bytes, *, key: str, augment_seed: int | None = None) -> DecodedAudio:
        """Decode a WAV file; ``key`` names the sample in errors. Recordings are not augmented, whatever the seed.

        Raises UnreadableAudio.
        """
        return self._cache.get(content, lambda: self._decode(content, key))

    def _decode(self, content: Path | bytes, key: str) -> DecodedAudio:
        name = f"recording {content}" if isinstance(content, Path) else "recording"
        name = f"{name} of sample {key}" if key else name
        data = _read(content, name)
        try:
            with sample_errors(name):
                waveform = read_wav(data, self.config, _conversion(content, self.config))
                log_mel = self._log_mel(waveform)
        except UnreadableAudio as error:
            raise UnreadableAudio(f"{name} {error}") from error.__cause__
        except DataError as error:
            raise UnreadableAudio(f"{name} cannot be decoded ({error.__cause__}).") from error.__cause__
        num_mel_bins, num_frames = log_mel.shape
        return DecodedAudio(log_mel.tobytes(), num_mel_bins, num_frames, zlib.crc32(data))


def read_wav(data: bytes, config: AudioConfig, conversion: str) -> NDArray[np.float32]:
    """Return the samples of a WAV file in [-1, 1], its channels averaged.

    conversion  the command that makes such a file, for messages

    Raises UnreadableAudio without the name of the file, and whatever the standard library raises.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UnreadableAudio(f"is not a WAV file but {file_kind(data[:HEAD_BYTES])}. Convert it: {conversion}")
    try:
        opened = wave.Wave_read(BytesIO(_plain_header(data)))
    except wave.Error as error:
        raise UnreadableAudio(f"is a WAV file that is not read ({error}). Convert it: {conversion}") from error
    except EOFError as error:
        raise UnreadableAudio("is a WAV file that is cut off in its header.") from error
    with opened:
        rate, channels, width, num_samples = (
            opened.getframerate(), opened.getnchannels(), opened.getsampwidth(), opened.getnframes(),
        )  # fmt: skip
        if rate != config.sample_rate:
            raise UnreadableAudio(
                f"has {rate} samples per second, model.audio.sample_rate={config.sample_rate}. Convert it: {conversion}"
            )
        if num_samples > config.seconds * rate:
            raise UnreadableAudio(
                f"is {num_samples / rate:.1f} seconds long, more than model.audio.seconds={config.seconds}; cut it, or "
                "raise that."
            )
        raw = opened.readframes(num_samples)
    if not num_samples or len(raw) != num_samples * channels * width:
        found = len(raw) // (channels * width)
        raise UnreadableAudio(f"holds {found:,} samples, its header says {num_samples:,}; it is empty or cut off.")
    averaged: NDArray[np.float32] = _as_float(raw, width).reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return averaged


def _as_float(raw: bytes, width: int) -> NDArray[np.float32]:
    """Return integers of ``width`` bytes, little-endian, as fractions of their range; one byte is unsigned in WAV."""
    if width == 1:
        raw, width = (np.frombuffer(raw, np.uint8) ^ 128).tobytes(), 1  # the same integers with a sign
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        raw, width = padded.tobytes(), 4  # the lowest byte of 32 bits is 0
    assert width in (1, 2, 4), width
    signed = np.frombuffer(raw, f"<i{width}").astype(np.float32)
    signed *= np.float32(2.0 ** (1 - 8 * width))
    return signed


def _plain_header(data: bytes) -> bytes:
    """Return a file whose extensible header says integers with a plain header; Python before 3.12 reads no other."""
    at = data.find(b"fmt ", 12, 4096)
    if at < 0 or data[at + 8 : at + 10] != _EXTENSIBLE or data[at + 32 : at + 34] != _INTEGERS:
        return data
    return data[: at + 8] + _INTEGERS + data[at + 10 :]


def _read(content: Path | bytes, name: str) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        size = content.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableAudio(f"{name} has {size:,} bytes, more than {MAX_FILE_BYTES:,}; cut it.")
        return content.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte or half a surrogate pair
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableAudio(f"{name} cannot be read: {reason or error}") from error


def _conversion(content: Path | bytes, config: AudioConfig) -> str:
    source = shlex.quote(str(content)) if isinstance(content, Path) else "IN"
    return f"ffmpeg -i {source} -ar {config.sample_rate} -ac 1 -c:a pcm_s16le OUT.wav"


def stack_audio(recordings: Sequence[DecodedAudio]) -> Tensor:
    """Return float32 [N, num_mel_bins, num_frames]; N is 1 or more."""
    # in a worker process torch stacks straight into the memory it shares with the process that trains
    return default_collate([_log_mel_tensor(recording) for recording in recordings])


def _log_mel_tensor(recording: DecodedAudio) -> Tensor:
    values = np.frombuffer(recording.log_mel, np.float32).reshape(recording.num_mel_bins, recording.num_frames)
    return torch.from_numpy(values.copy())
