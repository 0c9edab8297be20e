"""Recordings: every width of WAV, every fault named; decoding, hashing, stacking, replacing, checking."""

import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_files import AUDIO, tone, wav
from data_files import IMAGE_DECODERS, image_bytes

from aki_megatron.config.model import ModelConfig, VisionConfig
from aki_megatron.data.audio import MAX_FILE_BYTES, AudioDecoder, UnreadableAudio, read_wav
from aki_megatron.data.collate import collate
from aki_megatron.data.image import decode_image
from aki_megatron.data.media import media_decoders, num_media_tokens
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_hash import sample_hash
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.errors import DataError
from aki_megatron.types import (
    IGNORE,
    Conversation,
    DecodedAudio,
    MediaItem,
    Modality,
    Placeholder,
    Sample,
    Turn,
)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_read(width: int, extensible: bool) -> None:
    top = 2 ** (8 * width - 1)
    values = [0, top // 2, -top // 2, top - 1, -top, 1]
    found = read_wav(wav(values, width=width, extensible=extensible), AUDIO, "")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.array(values) / top, rtol=0, atol=1e-7)


def test_channels_are_averaged() -> None:
    found = read_wav(wav([1000, 3000, -500, 500, 7, 7], channels=2), AUDIO, "")
    np.testing.assert_allclose(found * 32768, [2000, 0, 7], atol=1e-4)


def test_what_the_standard_library_writes_is_read(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        file.writeframes(np.array([5, -5], "<i2").tobytes())
    assert (read_wav((tmp_path / "a.wav").read_bytes(), AUDIO, "") * 32768).tolist() == [5.0, -5.0]


FLOAT = wav([0] * 4, width=4).replace(b"fmt \x10\0\0\0\x01", b"fmt \x10\0\0\0\x03")
FAULTS = {
    "rate": (wav([0] * 9, rate=44100), r"has 44100 samples per second.*=16000\. Convert it: ffmpeg -i .*a\.wav -ar"),
    "long": (wav([0] * 16001), r"is 1\.0 seconds long, more than model\.audio\.seconds=1"),
    "empty": (wav([]), "holds 0 samples, its header says 0"),
    "cut off": (wav([1] * 99)[:-10], "holds 94 samples, its header says 99; it is empty or cut off"),
    "cut in the header": (wav([1])[:30], "cut off in its header|not read"),
    "floating point": (FLOAT, r"is a WAV file that is not read \(unknown format: 3\)\. Convert it: ffmpeg"),
    "another format": (b"ID3\x04" + bytes(600), r"is not a WAV file but of no known format .* ffmpeg -i"),
    "image": (image_bytes(), r"is not a WAV file but a JPEG image\."),
    "nothing": (b"", r"is not a WAV file but empty \(0 bytes\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_names_the_file_and_what_to_do(fault: str, tmp_path: Path) -> None:
    data, message = FAULTS[fault]
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    with pytest.raises(UnreadableAudio, match=message) as caught:
        AudioDecoder(AUDIO).decode(path, key="tones/count/1")
    assert str(caught.value).startswith(f"recording {path} of sample tones/count/1 ")


def test_missing_and_huge_files(tmp_path: Path) -> None:
    decoder = AudioDecoder(AUDIO)
    with pytest.raises(UnreadableAudio, match=r"away\.wav of sample k cannot be read: No such file"):
        decoder.decode(tmp_path / "away.wav", key="k")
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UnreadableAudio, match=r"huge\.wav of sample k has 268,435,457 bytes, more than"):
        decoder.decode(tmp_path / "huge.wav", key="k")


def test_decoding_is_of_the_content() -> None:
    decoder = AudioDecoder(AUDIO)
    one, other = decoder.decode(tone(40), key="a"), decoder.decode(tone(20), key="a")
    assert one == decoder.decode(tone(40), key="b") == AudioDecoder(AUDIO).decode(tone(40), key="c", augment_seed=5)
    assert one.log_mel != other.log_mel and one.checksum != other.checksum
    assert (one.num_mel_bins, one.num_frames, len(one.log_mel)) == (12, 100, 4 * 12 * 100)
    values = np.frombuffer(one.log_mel, np.float32).reshape(12, 100)
    assert values[:, :50].max() > values[:, 55:].max() + 0.5  # half a second of tone, then silence


def sample_of(*media: MediaItem) -> Sample:
    return Sample("s", [5, 7], [1, 2], [7, IGNORE], media)


def audio_item(period: int) -> MediaItem:
    return MediaItem(Modality.AUDIO, AudioDecoder(AUDIO).decode(tone(period), key="s"))


def test_the_hash_tells_recordings_apart_and_leaves_images_alone() -> None:
    one, other = audio_item(40), audio_item(20)
    assert isinstance(one.content, DecodedAudio)
    image = MediaItem(Modality.IMAGE, decode_image(image_bytes(1), 8, key="s"))
    wider = replace(one, content=replace(one.content, num_frames=50))
    samples = [(), (one,), (other,), (one, other), (other, one), (image,), (image, one), (one, image), (wider,)]
    assert len({sample_hash(0, 0, sample_of(*media)) for media in samples}) == len(samples)
    with pytest.raises(AssertionError):
        sample_hash(0, 0, sample_of(MediaItem(Modality.AUDIO, tone())))  # never of what is not decoded


def test_media_are_stacked_by_modality_in_the_order_of_their_samples() -> None:
    image = MediaItem(Modality.IMAGE, decode_image(image_bytes(1), 8, key="s"))
    one, other, third = audio_item(40), audio_item(20), audio_item(10)
    batch = collate([[sample_of(one, image), sample_of(other)], [sample_of(third)]], pad_id=0, image_size=8)
    assert batch.media[Modality.IMAGE].shape == (1, 3, 8, 8)
    recordings = batch.media[Modality.AUDIO]
    assert recordings.shape == (3, 12, 100) and recordings.dtype == torch.float32
    for row, item in zip(recordings, (one, other, third), strict=True):
        assert isinstance(item.content, DecodedAudio) and row.numpy().tobytes() == item.content.log_mel
    without = collate([[sample_of(image)]], pad_id=0, image_size=8)
    assert Modality.AUDIO not in without.media and without.num_items(Modality.AUDIO) == 0


MODEL = ModelConfig(vision=VisionConfig(image_size=24, patch_size=12), audio=AUDIO)


def conversation(number: int, folder: Path) -> Conversation:
    media = (
        MediaItem(Modality.IMAGE, folder / f"{number}.jpg"),
        MediaItem(Modality.AUDIO, folder / f"{number}.wav"),
    )
    turn = Turn("and \nHow many?", "4", (Placeholder(0, Modality.IMAGE), Placeholder(4, Modality.AUDIO)))
    return Conversation(f"mixed/{number}", (turn,), media)


def test_a_sample_with_an_unreadable_recording_is_replaced_and_counted(tmp_path: Path, make_template) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
        (tmp_path / f"{number}.wav").write_bytes(b"no sound" if number == 2 else tone(20 + 10 * number))
    items = [conversation(number, tmp_path) for number in range(4)]
    template = replace(make_template(), num_media_tokens=num_media_tokens(MODEL))
    stream = MixtureStream({"mixed": Source(items)}, Mixture({"mixed": 1.0}, seed=0), template.render_conversation,
                           decoders=media_decoders(MODEL))  # fmt: skip
    loaded = [stream.sample(n) for n in range(8)]
    reasons = [bad.reason for each in loaded for bad in each.bad_samples]
    assert len(reasons) >= 2 and all("2.wav of sample mixed/2 is not a WAV file but text" in text for text in reasons)
    for each in loaded:
        assert each.sample is not None and each.sample.key != "mixed/2"
        image, recording = each.sample.media
        assert isinstance(recording.content, DecodedAudio) and image.modality == Modality.IMAGE
        kinds = each.sample.modality_ids
        assert kinds.count(Modality.IMAGE) == 144 and kinds.count(Modality.AUDIO) == 2
    assert stream.length(0)[1] == 2  # packing counts both


def test_a_model_without_audio_refuses_recordings(tmp_path: Path, make_template) -> None:
    items = [conversation(0, tmp_path)]
    stream = MixtureStream({"mixed": Source(items)}, Mixture({"mixed": 1.0}, seed=0),
                           make_template().render_conversation, decoders=IMAGE_DECODERS)  # fmt: skip
    with pytest.raises(DataError, match="holds media of modality audio, which this model has no encoder for"):
        stream.sample(0)
