"""Train the small vision encoder of the embedded data and write it as a Hugging Face SigLIP folder.

Example: python tools/train_encoder.py --data data/demo --out data/demo/encoder
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aki_megatron.checkpoint.hf_folders import save_vision
from aki_megatron.errors import DataError, UserError
from aki_megatron.synthetic.dataset import MANIFEST
from aki_megatron.synthetic.encoder import (
    DEMO_ENCODER,
    CellAccuracy,
    EncoderRecipe,
    cell_accuracy,
    load_cells,
    train_encoder,
)

RECORD = "training.json"
"""How the folder's encoder was trained and how good it is; with it the folder is complete."""

PREPROCESSOR = {
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


def main() -> int:
    """Train, or say that it is done; returns the exit code."""
    default = EncoderRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that tools/make_data.py filled")
    parser.add_argument("--out", type=Path, required=True, help="folder for the encoder")
    parser.add_argument("--steps", type=int, default=default.steps, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default %(default)s")
    parser.add_argument(
        "--least_accuracy", type=float, default=0.97, help="held-out cell accuracy to demand (default %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        if arguments.steps <= default.warmup_steps:
            raise UserError(f"--steps {arguments.steps} must be more than the warm-up of {default.warmup_steps} steps.")
        recipe = EncoderRecipe(steps=arguments.steps, seed=arguments.seed)
        run(arguments.data, arguments.out, recipe, least_accuracy=arguments.least_accuracy)
    except UserError as error:
        print(f"train_encoder: {error}", file=sys.stderr)
        return 2
    return 0


def run(data: Path, out: Path, recipe: EncoderRecipe, *, least_accuracy: float) -> None:
    """Train on ``data`` and write ``out``, unless ``out`` already holds this encoder.

    Raises UserError if the data are missing, if ``out`` is not ours, or if the encoder learned too little.
    """
    manifest = data / MANIFEST
    if not manifest.is_file():
        raise DataError(
            f"{data} holds no complete data set (no {MANIFEST}); run: python tools/make_data.py --out {data}"
        )
    origin = {"captions": _caption_digest(manifest), "recipe": asdict(recipe)}
    if (record := _read_record(out)) and {key: record.get(key) for key in origin} == origin:
        print(f"{out}: complete, nothing to do (held-out cells right: {record['held_out']['cell']:.2%}).")
        return
    start = time.monotonic()
    print("reading pictures and captions ...")
    cells, held_out = load_cells(data, "captions"), load_cells(data, "captions_val")
    columns = (TextColumn("training the encoder"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        task = bar.add_task("steps", total=recipe.steps, loss=float("nan"))

        def report(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=loss)
            if step % 100 == 0:
                bar.console.print(f"  step {step:4}  loss {loss:.4f}")

        encoder, head = train_encoder(cells, DEMO_ENCODER, recipe, report)
    accuracy = cell_accuracy(encoder, head, held_out)
    print(_sentence(accuracy))
    if accuracy.cell < least_accuracy:
        raise UserError(
            f"the encoder names {accuracy.cell:.2%} of the held-out cells right, {least_accuracy:.0%} are demanded; "
            "train longer (--steps), draw more scenes, or lower --least_accuracy."
        )
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    save_vision(encoder, DEMO_ENCODER, aside)
    (aside / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    (aside / RECORD).write_text(json.dumps({**origin, "held_out": asdict(accuracy)}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    print(f"{out}: written after {time.monotonic() - start:.0f} s.")


def _caption_digest(manifest: Path) -> str:
    """A digest of the caption shards, all that the encoder learns from: other questions need no other encoder."""
    digests = json.loads(manifest.read_text())["sha256"]
    shards = [f"{name} {digest}" for name, digest in sorted(digests.items()) if name.startswith("captions")]
    return hashlib.sha256("\n".join(shards).encode()).hexdigest()


def _sentence(accuracy: CellAccuracy) -> str:
    return (
        f"held-out pictures: kind {accuracy.kind:.2%}, colour {accuracy.color:.2%} of the occupied cells; "
        f"{accuracy.cell:.2%} of all cells right"
    )


def _read_record(out: Path) -> dict[str, Any] | None:
    """The record of an encoder folder; None if there is no folder; UserError if it is not one of this tool."""
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_text())
        if record.keys() >= {"recipe", "held_out"}:
            return record
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{out} holds files, but no encoder of this tool; choose another folder.")


if __name__ == "__main__":
    sys.exit(main())
