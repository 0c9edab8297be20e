"""Small recordings for tests."""

import struct

from aki_megatron.config.model import AudioConfig, ResamplerConfig

AUDIO = AudioConfig(
    seconds=1, num_mel_bins=12, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8,
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=1, head_dim=4),
)  # fmt: skip


def wav(values: list[int], *, width: int = 2, channels: int = 1, rate: int = 16000, extensible: bool = False) -> bytes:
    """A WAV file, its header written by hand; ``values`` are the samples of all channels in turn."""
    data = b"".join((value + 128 if width == 1 else value).to_bytes(width, "little", signed=width > 1)
                    for value in values)  # fmt: skip
    tag = 0xFFFE if extensible else 1
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * width * channels, width * channels, 8 * width)
    if extensible:
        header += struct.pack("<HHIH", 22, 8 * width, 0, 1) + bytes.fromhex("000000001000800000aa00389b71")
    chunks = b"fmt " + struct.pack("<I", len(header)) + header + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def tone(period: int = 40, length: int = 8000) -> bytes:
    """A square wave of 16 bits."""
    return wav([12000 if (i // (period // 2)) % 2 else -12000 for i in range(length)])
