"""The drawn recordings: read as they are written, answers that hold, the same bytes every time."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from aki_megatron.config.load import load_run
from aki_megatron.config.model import AudioConfig
from aki_megatron.data.audio import read_wav
from aki_megatron.data.check import check_run_data
from aki_megatron.data.image import decode_image
from aki_megatron.data.sources import open_sources, task_of
from aki_megatron.errors import DataError
from aki_megatron.synthetic.tones import write_tones
from aki_megatron.types import Conversation, Modality, Placeholder

ROOT = Path(__file__).parents[2]
CONFIG = AudioConfig(seconds=1)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tones")
    assert write_tones(root, train=12, val=30, seed=3) == {
        **{f"train/{task}": 12 for task in ("count", "order", "total")},
        **{f"val/{task}": 30 for task in ("count", "order", "total")},
    }
    return root


def loud_parts(samples: np.ndarray) -> list[np.ndarray]:
    """The beeps of a recording, by the loudness of windows of 10 ms alone."""
    windows = samples.reshape(-1, 160)
    loud = np.sqrt((windows**2).mean(axis=1)) > 0.05
    edges = np.flatnonzero(np.diff(np.concatenate([[False], loud, [False]]).astype(int)))
    return [windows[start:end].ravel() for start, end in edges.reshape(-1, 2)]


def pitch(beep: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(beep)).argmax() * 16000 / len(beep))


def num_squares(path: Path) -> int:
    """Cells of the grid that are brighter than the background."""
    image = decode_image(path, 36, key="")
    pixels = np.frombuffer(image.rgb, np.uint8).reshape(3, 12, 3, 12, 3).astype(float)
    inner = pixels.transpose(0, 2, 1, 3, 4)[:, :, 4:8, 4:8].mean(axis=(2, 3)).max(axis=-1)
    return int((inner > 130).sum())


def answer(sample: Conversation) -> str:
    recordings = [item.content for item in sample.media if item.modality == Modality.AUDIO]
    assert len(recordings) == 1 and isinstance(recordings[0], Path)
    beeps = loud_parts(read_wav(recordings[0].read_bytes(), CONFIG, ""))
    if task_of(sample.key) == "tones/order":
        first, second = map(pitch, beeps)
        return "yes" if first > second else "no"
    images = sample.images
    return str(len(beeps) + sum(num_squares(image) for image in images if isinstance(image, Path)))


def test_the_answers_hold(tones: Path) -> None:
    samples = open_sources(tones, ["tones"], "val")["tones"]
    assert len(samples) == 90 and not samples.faults.total
    for index in range(90):
        assert samples[index].turns[0].response == answer(samples[index]), samples[index].key


def test_a_sample_with_both_modalities(tones: Path) -> None:
    sample = open_sources(tones, ["tones"], "train")["tones"][2]
    assert sample.key == "tones/total/0" and [item.modality for item in sample.media] == [
        Modality.IMAGE,
        Modality.AUDIO,
    ]
    assert sample.turns[0].prompt == "\n\nHow many beeps and squares are there together?"
    assert sample.turns[0].placeholders == (Placeholder(0, Modality.IMAGE), Placeholder(1, Modality.AUDIO))
    assert all(isinstance(item.content, Path) and item.content.is_file() for item in sample.media)


def test_the_same_arguments_give_the_same_bytes(tones: Path, tmp_path: Path) -> None:
    write_tones(tmp_path, train=12, val=30, seed=3)
    write_tones(tmp_path / "other", train=1, val=1, seed=4)

    def digests(root: Path) -> dict[str, str]:
        files = [path for path in sorted((root / "tones").rglob("*")) if path.is_file()]
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(tones) == digests(tmp_path) and len(digests(tones)) == 2 + 3 * 42
    name = "tones/recordings/train/0.wav"
    assert digests(tmp_path / "other")[name] != digests(tones)[name]


FAULTS = {
    "a tag without a file": ({"audio": []}, "the prompts have 1 <audio>, the field audio has 0 files"),
    "a file without a tag": ({"image": "a.png"}, "the prompts have 0 <image>, the field image has 1 files"),
    "turns": ({"conversations": []}, "do not alternate"),
    "no id": ({"id": None}, "id must be text"),
    "a number for a file": ({"audio": [None]}, "audio must be text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_entry_that_cannot_be_used_is_named(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    turns = [{"from": "human", "value": "<audio>\nHow many?"}, {"from": "gpt", "value": "1"}]
    good = {"id": "count/1", "audio": "a.wav", "conversations": turns}
    (tmp_path / "tones").mkdir()
    file = tmp_path / "tones/tones_train.json"
    file.write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(DataError, match=message) as caught:
        open_sources(tmp_path, ["tones"], "train")
    assert f"{file}, entry 1" in str(caught.value)
    found = open_sources(tmp_path, ["tones"], "train", max_bad_fraction=1.0)["tones"]
    assert len(found) == 1 and found[0].key == "tones/count/1"


def test_a_file_outside_the_root_is_refused(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "1"}]
    (tmp_path / "tones").mkdir()
    entry = {"id": "count/1", "audio": "../../a.wav", "conversations": turns}
    (tmp_path / "tones/tones_train.json").write_text(json.dumps([entry]))
    with pytest.raises(DataError, match="leads out of the data root"):
        open_sources(tmp_path, ["tones"], "train")["tones"][0]


def test_the_check_of_a_run_decodes_recordings(tmp_path: Path) -> None:
    write_tones(tmp_path, train=4, val=1, seed=5)
    damaged = tmp_path / "tones/recordings/train/0.wav"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    flags = ["--data.root", str(tmp_path), "--data.tokenizer", str(tmp_path / "tokenizer")]
    config = load_run(flags, default_config=ROOT / "configs/demo/audio.yaml", prog="", description="")
    (found,) = check_run_data(config, max_samples=0, num_workers=0, progress=lambda *_: None)
    assert (found.num_checked, found.num_readable) == (12, 10)  # a count and a total are about this recording
    assert f"recording {damaged} of sample tones/count/0 holds 15,995 samples" in str(found.faults.lines())
