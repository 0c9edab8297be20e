"""Recordings of beeps, alone and beside an image of squares, and questions about them.

A recording is one second of one to four beeps of a tenth of a second, each of its own pitch, in noise. Tasks:

    count   How many beeps are there?                                     1 to 4
    order   Is the first tone higher than the second?                     yes or no; recordings of two beeps
    total   How many beeps and squares are there together? (with image)   2 to 8

The last needs both: beeps and squares are drawn apart, so that whoever misses one modality guesses one in four.

Files are WAV and PNG, and LLaVA's JSON with an ``audio`` field (data/sources/tones.py). Every byte follows from the
arguments.
"""

import io
import json
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.sources.tones import FILES, FOLDER
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.synthetic.files import encode_image
from aki_megatron.synthetic.scenes import COLORS, GRID_SIZE, Pixels, Scene, SceneObject, render_scene

SAMPLE_RATE = 16000
SECONDS = 1
BEEP_SECONDS, GAP_SECONDS = 0.1, 0.06
"""Length of a beep; shortest silence between two."""
MAX_BEEPS = 4
LOWEST_HERTZ, HIGHEST_HERTZ = 300.0, 3000.0
LOW_HERTZ, HIGH_HERTZ = (300.0, 600.0), (1500.0, 3000.0)
"""Ranges of the two tones of an order question; either may come first."""

SPLITS, TASKS = ("train", "val"), ("count", "order", "total")


@dataclass(frozen=True)
class Beep:
    """A tone that starts at ``start`` seconds."""

    start: float
    hertz: float


def sample_starts(rng: np.random.Generator, count: int) -> list[float]:
    """Sample when ``count`` beeps start, so that they do not overlap; the spare time is divided at random."""
    spare = SECONDS - count * BEEP_SECONDS - (count + 1) * GAP_SECONDS
    waits = np.diff(np.sort(rng.uniform(0, spare, count)), prepend=0.0) + GAP_SECONDS
    starts: list[float] = (np.cumsum(waits + BEEP_SECONDS) - BEEP_SECONDS).tolist()
    return starts


def sample_hertz(rng: np.random.Generator, low: float, high: float) -> float:
    """Sample a pitch, uniform by octaves."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def sample_beeps(rng: np.random.Generator, count: int) -> tuple[Beep, ...]:
    """Sample ``count`` beeps of any pitch."""
    return tuple(Beep(start, sample_hertz(rng, LOWEST_HERTZ, HIGHEST_HERTZ)) for start in sample_starts(rng, count))


def sample_two_tones(rng: np.random.Generator) -> tuple[Beep, ...]:
    """Sample a low and a high beep in either order."""
    ranges = (LOW_HERTZ, HIGH_HERTZ) if rng.integers(2) else (HIGH_HERTZ, LOW_HERTZ)
    starts = sample_starts(rng, 2)
    return tuple(Beep(start, sample_hertz(rng, *hertz)) for start, hertz in zip(starts, ranges, strict=True))


def render_wave(beeps: tuple[Beep, ...], rng: np.random.Generator) -> NDArray[np.int16]:
    """Render a recording as 16-bit samples: sines with soft edges, 0.3 to 0.6 of the range, over faint noise."""
    waveform = 0.003 * rng.standard_normal(SECONDS * SAMPLE_RATE)
    times = np.arange(round(BEEP_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    envelope = np.sin(np.pi * times / BEEP_SECONDS) ** 0.5
    for beep in beeps:
        first = round(beep.start * SAMPLE_RATE)
        waveform[first : first + len(times)] += (
            rng.uniform(0.3, 0.6) * envelope * np.sin(2 * np.pi * beep.hertz * times)
        )
    return np.rint(waveform.clip(-1, 1) * 32767).astype(np.int16)


def wav_bytes(samples: NDArray[np.int16]) -> bytes:
    """Return a mono WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def render_squares(count: int, rng: np.random.Generator) -> Pixels:
    """Render ``count`` squares of different colours in cells of the grid."""
    cells = sorted(rng.permutation(GRID_SIZE**2)[:count].tolist())
    colors = rng.permutation(len(COLORS))[:count].tolist()
    squares = [SceneObject("square", COLORS[c], cell // GRID_SIZE, cell % GRID_SIZE)
               for c, cell in zip(colors, cells, strict=True)]  # fmt: skip
    return render_scene(Scene(tuple(squares)), rng)


def write_tones(
    root: Path, *, train: int, val: int, seed: int, progress: Callable[[int], None] = lambda done: None
) -> dict[str, int]:
    """Write ``train`` and ``val`` pairs of recordings, and a tokenizer; return the number of samples by split/task.

    Recording 2n has beeps to count, and an image beside it; recording 2n + 1 has two tones to compare.
    ``progress`` gets the number of pairs done.
    """
    counts: dict[str, int] = {}
    done = 0
    for split, pairs in zip(SPLITS, (train, val), strict=True):
        for folder in ("recordings", "images"):
            (root / FOLDER / folder / split).mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = []
        for index in range(pairs):
            rng = np.random.default_rng([seed, SPLITS.index(split), index])
            entries += _pair(root / FOLDER, split, index, rng)
            done += 1
            progress(done)
        (root / FILES[split][0]).write_text(json.dumps(entries, separators=(",", ":")))
        for task in TASKS:
            counts[f"{split}/{task}"] = sum(entry["id"].startswith(f"{task}/") for entry in entries)
    write_tokenizer(root / "tokenizer")
    return counts


def _pair(folder: Path, split: str, index: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Write two recordings and an image; yield the entries about them."""
    count, squares = (int(number) for number in rng.integers(1, MAX_BEEPS + 1, size=2))
    beeps, tones = sample_beeps(rng, count), sample_two_tones(rng)
    counted, compared = f"recordings/{split}/{2 * index}.wav", f"recordings/{split}/{2 * index + 1}.wav"
    image = f"images/{split}/{index}.png"
    (folder / counted).write_bytes(wav_bytes(render_wave(beeps, rng)))
    (folder / compared).write_bytes(wav_bytes(render_wave(tones, rng)))
    (folder / image).write_bytes(encode_image(render_squares(squares, rng), "png"))
    yield _entry(f"count/{index}", "<audio>\nHow many beeps are there?", str(count), audio=counted)
    higher = "yes" if tones[0].hertz > tones[1].hertz else "no"
    yield _entry(f"order/{index}", "<audio>\nIs the first tone higher than the second?", higher, audio=compared)
    prompt = "<image>\n<audio>\nHow many beeps and squares are there together?"
    yield _entry(f"total/{index}", prompt, str(count + squares), audio=counted, image=image)


def _entry(name: str, prompt: str, answer: str, **files: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": name, **files, "conversations": turns}
