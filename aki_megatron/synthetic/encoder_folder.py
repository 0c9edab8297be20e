"""The demo's encoder as a Hugging Face SigLIP folder, with a record of how it was trained."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aki_megatron.checkpoint.hf_folders import save_vision
from aki_megatron.errors import DataError, UserError
from aki_megatron.synthetic.dataset import MANIFEST
from aki_megatron.synthetic.encoder import (
    DEMO_ENCODER,
    CellAccuracy,
    EncoderRecipe,
    cell_accuracy,
    load_labeled_images,
    train_encoder,
)

RECORD = "training.json"
"""Origin and val accuracy of the folder's encoder; with it the folder is complete."""

_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": DEMO_ENCODER.image_size, "width": DEMO_ENCODER.image_size},
}


def completed_accuracy(data: Path, out: Path, recipe: EncoderRecipe) -> CellAccuracy | None:
    """Return the val accuracy of the encoder in ``out`` if it is that of ``data`` and ``recipe``, else None.

    Raises DataError if ``data`` is not a complete dataset, UserError if ``out`` holds other files.
    """
    origin, record = _origin(data, recipe), _read_record(out)
    if record is None or {key: record.get(key) for key in origin} != origin:
        return None
    return CellAccuracy(**record["val"])


def write_encoder_folder(
    data: Path, out: Path, recipe: EncoderRecipe, *, min_accuracy: float, progress: Callable[[int, float], None]
) -> CellAccuracy:
    """Train on the captions of ``data`` and write ``out``; return the val accuracy.

    ``progress`` gets the number of steps done and the loss of the last. Raises UserError, and writes nothing, if fewer
    than ``min_accuracy`` of the val cells are correct.
    """
    origin = _origin(data, recipe)
    train, val = load_labeled_images(data, "captions"), load_labeled_images(data, "captions_val")
    encoder, classifier = train_encoder(train, DEMO_ENCODER, recipe, progress)
    accuracy = cell_accuracy(encoder, classifier, val)
    if accuracy.cell < min_accuracy:
        raise UserError(
            f"{accuracy.cell:.2%} of the val cells are correct (kind {accuracy.kind:.2%}, colour {accuracy.color:.2%} "
            f"of the occupied ones), {min_accuracy:.0%} are required; train longer (--steps), write more scenes, or "
            "lower --min_accuracy."
        )
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    save_vision(encoder, DEMO_ENCODER, staging)
    (staging / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR, indent=2) + "\n")
    (staging / RECORD).write_text(json.dumps({**origin, "val": asdict(accuracy)}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return accuracy


def _origin(data: Path, recipe: EncoderRecipe) -> dict[str, Any]:
    """Return what determines the encoder: the recipe and the caption shards, not the other annotations."""
    manifest = data / MANIFEST
    if not manifest.is_file():
        raise DataError(
            f"{data} holds no complete dataset (no {MANIFEST}); run: python tools/make_data.py --out {data}"
        )
    digests = json.loads(manifest.read_text())["sha256"]
    shards = [f"{name} {digest}" for name, digest in sorted(digests.items()) if name.startswith("captions")]
    return {"captions": hashlib.sha256("\n".join(shards).encode()).hexdigest(), "recipe": asdict(recipe)}


def _read_record(out: Path) -> dict[str, Any] | None:
    """Return the record of an encoder folder; None if there is no folder. Raises UserError if it is something else."""
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        if record.keys() >= {"captions", "recipe"}:
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{out} holds files, but no encoder of this tool; choose another folder.")
