"""Train the demo's small vision encoder and write it as a Hugging Face SigLIP folder.

Example: python tools/train_encoder.py --data data/demo --out data/demo/encoder
"""

import argparse
import sys
import time
from pathlib import Path

from aki_megatron.console import progress_bar
from aki_megatron.errors import UserError
from aki_megatron.synthetic.encoder import EncoderRecipe
from aki_megatron.synthetic.encoder_folder import completed_accuracy, write_encoder_folder


def main() -> int:
    """Train, or report that the encoder exists; return the exit code."""
    default = EncoderRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by tools/make_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the encoder")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights and batches (default %(default)s)")
    parser.add_argument(
        "--min_accuracy", type=float, default=0.97, help="fraction of val cells to require (default %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        if arguments.steps <= default.warmup_steps:
            raise UserError(f"--steps {arguments.steps} must be more than the warm-up of {default.warmup_steps} steps.")
        recipe = EncoderRecipe(steps=arguments.steps, seed=arguments.seed)
        run(arguments.data, arguments.out, recipe, min_accuracy=arguments.min_accuracy)
    except UserError as error:
        print(f"train_encoder: {error}", file=sys.stderr)
        return 2
    return 0


def run(data: Path, out: Path, recipe: EncoderRecipe, *, min_accuracy: float) -> None:
    """Train on ``data`` and write ``out`` with a progress bar, unless ``out`` already holds this encoder."""
    if accuracy := completed_accuracy(data, out, recipe):
        print(f"{out}: complete, nothing to do (val cells correct: {accuracy.cell:.2%}).")
        return
    start = time.monotonic()
    print("reading images and captions ...")
    with progress_bar("training the encoder", "loss {task.fields[loss]:.3f}") as bar:
        task = bar.add_task("steps", total=recipe.steps, loss=float("nan"))

        def progress(step: int, loss: float) -> None:
            bar.update(task, completed=step, loss=loss)
            if step % 100 == 0:
                bar.console.print(f"  step {step:4}  loss {loss:.4f}")

        accuracy = write_encoder_folder(data, out, recipe, min_accuracy=min_accuracy, progress=progress)
    print(
        f"val accuracy: kind {accuracy.kind:.2%}, colour {accuracy.color:.2%} of the occupied cells; "
        f"{accuracy.cell:.2%} of all cells"
    )
    print(f"{out}: written after {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    sys.exit(main())
