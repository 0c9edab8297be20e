"""Convert weights between Hugging Face folders, the official AKI release and our checkpoints, and prove it.

    python tools/convert.py from-hf --lm Phi-3.5-mini-instruct --vision siglip-so400m-patch14-384 --out start
        a checkpoint to train from: --init.weights start, --data.tokenizer start/step_000000/tokenizer, and the model
        section of start/step_000000/config.yaml (Phi-3.5, LLaMA 3.2, Qwen2.5, Qwen3; folders as they are downloaded)
    python tools/convert.py to-hf runs/sft --out aki-hf
        a folder that plain transformers loads: AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)
    python tools/convert.py from-official model.safetensors --out aki
    python tools/convert.py from-official checkpoint_9.pt --vision siglip-so400m-patch14-384 --out aki
        the release, or one of its training checkpoints, which leave the encoder out
    python tools/convert.py to-official runs/sft --out release
    python tools/convert.py reshard runs/sft --out packed --files 8 --weights-only
        other files, the same numbers (a checkpoint resumes under any TP, PP, DP and ZeRO as it is)
    python tools/convert.py inspect PATH
        names, shapes, dtypes, sizes and parameters of anything above
    python tools/convert.py verify PATH
        compare every file with the sha256 that was written down
    python tools/convert.py verify --golden tests/golden/official_aki
        load official weights and reproduce what the official code computed with them

Weights are streamed: one tensor is in memory at a time. Every tensor must be there, of the right shape, and no other;
each conversion ends with a report (conversion.json), the logits of both sides compared with the MMA mask active, and
the sha256 of what was written. Exit codes: 0 done, 1 a verification failed, 2 a mistake that the message explains.
Each command explains itself: python tools/convert.py from-hf --help
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aki_megatron.checkpoint import conversions
from aki_megatron.checkpoint.conversion_report import Allowed, Report
from aki_megatron.checkpoint.conversion_steps import Model, Settings
from aki_megatron.checkpoint.listing import check_files, look
from aki_megatron.checkpoint.writers import SHARD_BYTES, aside
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import AttentionConfig
from aki_megatron.config.save import load_model
from aki_megatron.errors import CheckpointError, UserError
from aki_megatron.evaluate.golden import verify_golden

DTYPES = {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}

PROGRESS_SECONDS = 10
"""Between lines about long work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2


def from_hf(arguments: argparse.Namespace) -> int:
    """Stock folders, or one that to-hf wrote, to a checkpoint."""
    stock = arguments.lm is not None and arguments.vision is not None
    if stock == (arguments.aki is not None) or (not stock and (arguments.lm or arguments.vision)):
        raise CheckpointError("Give --lm and --vision together, or --aki alone.")
    if arguments.aki:
        return write(arguments, lambda folder: conversions.from_export(arguments.aki, folder, settings(arguments)))
    return write(
        arguments,
        lambda folder: conversions.from_hf(
            arguments.lm,
            arguments.vision,
            folder,
            settings(arguments),
            model=read_model(arguments.model),
            tokenizer=arguments.tokenizer or arguments.lm,
        ),
    )


def to_hf(arguments: argparse.Namespace) -> int:
    """A checkpoint to a folder for transformers."""
    return write(
        arguments,
        lambda folder: conversions.to_hf(
            arguments.checkpoint,
            folder,
            settings(arguments),
            tokenizer=arguments.tokenizer,
            shard_bytes=round(arguments.shard_gigabytes * 1e9),
        ),
    )


def from_official(arguments: argparse.Namespace) -> int:
    """The release to a checkpoint."""
    model = read_model(arguments.model) or Model(ModelConfig(), AttentionConfig(rule="mma"))
    return write(
        arguments,
        lambda folder: conversions.from_official(
            arguments.release,
            folder,
            model,
            settings(arguments),
            vision=arguments.vision,
            tokenizer=arguments.tokenizer,
        ),
    )


def to_official(arguments: argparse.Namespace) -> int:
    """A checkpoint to the release's format."""
    return write(
        arguments,
        lambda folder: conversions.to_official(
            arguments.checkpoint, folder, settings(arguments), training=arguments.training
        ),
    )


def reshard(arguments: argparse.Namespace) -> int:
    """A checkpoint to one of other files."""
    return write(
        arguments,
        lambda folder: conversions.reshard(
            arguments.checkpoint, folder, settings(arguments), weights_only=arguments.weights_only
        ),
    )


def inspect(arguments: argparse.Namespace) -> int:
    """Print what lies in a place."""
    listing = look(arguments.path)
    print(f"{listing.path}: {listing.form}, {len(listing.facts)} tensors, {listing.parameters:,} parameters")
    for part, facts in listing.by_part().items():
        dtypes = ", ".join(sorted({str(fact.dtype).removeprefix("torch.") for fact in facts}))
        elements, size = sum(fact.elements for fact in facts), sum(fact.bytes for fact in facts)
        print(f"  {part:16} {len(facts):5} tensors {elements:15,} elements {size / 1e6:11,.1f} MB  {dtypes}")
    rows = [(name, fact, 1) for name, fact in listing.facts.items()] if arguments.all else list(listing.by_pattern())
    width = max(len(name) for name, *_ in rows)
    for name, fact, count in rows:
        shape, dtype = "x".join(map(str, fact.shape)) or "scalar", str(fact.dtype).removeprefix("torch.")
        times = f"{count:4} x " if not arguments.all else ""
        print(f"{name:{width}}  {times}{shape:>16}  {dtype:8} {count * fact.bytes / 1e6:11,.3f} MB")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare files with their sha256, or our model with golden numbers."""
    if (arguments.path is None) == (arguments.golden is None):
        raise CheckpointError("Give a folder to compare with its sha256, or --golden FOLDER.")
    if arguments.golden:
        return 0 if verify_golden(arguments.golden, print) else 1
    return 0 if check_files(arguments.path, print) else 1


def write(arguments: argparse.Namespace, conversion: Callable[[Path], Report]) -> int:
    """Convert into a folder that becomes --out when all went well; print the report."""
    start = time.monotonic()
    with aside(arguments.out) as folder:
        report = conversion(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report.facts["took"] = f"{time.monotonic() - start:.0f} s, at most {peak / 1e9:.2f} GB of memory"
        report.write(folder)
    print(report.text())
    print(f"{arguments.out}: done")
    return 0


def read_model(path: Path | None) -> Model | None:
    """The model that --model describes."""
    return None if path is None else Model(*load_model(path))


def settings(arguments: argparse.Namespace) -> Settings:
    """What the flags say that all conversions share."""
    return Settings(
        dtype=DTYPES[getattr(arguments, "dtype", "stored")],
        seed=getattr(arguments, "seed", 0),
        files=getattr(arguments, "files", None),
        allowed=Allowed(
            missing=getattr(arguments, "allow_missing", ()),
            extra=getattr(arguments, "allow_extra", ()),
            changed=getattr(arguments, "allow_changed", ()),
        ),
        check=not getattr(arguments, "skip_logits_check", True),
        watch=watch,
    )


def watch(title: str, total: int) -> Callable[[int], None]:
    """Print a line about long work now and then."""
    start = said = time.monotonic()
    done = 0

    def saw(size: int) -> None:
        nonlocal done, said
        done += size
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            text = f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {now - start:.0f} s"
            print(text, file=sys.stderr, flush=True)

    return saw


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.replace("_", "-"), help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    def add(to: argparse.ArgumentParser, *flags: str) -> None:
        for flag in flags:
            to.add_argument(flag, **FLAGS[flag])

    reading = ("--model", "--tokenizer", "--files", "--seed", *EXCEPTIONS)
    added = command(from_hf)
    added.add_argument("--lm", type=Path, help="folder of the language model")
    added.add_argument("--aki", type=Path, help="instead of --lm and --vision: a folder that to-hf wrote")
    add(added, "--vision", *reading, *ALWAYS)
    added = command(to_hf)
    add(added, "checkpoint", "--tokenizer", "--shard-gigabytes", *ALWAYS)
    added = command(from_official)
    added.add_argument("release", type=Path, help="the release's safetensors, a folder with it, or a .pt")
    add(added, "--vision", *reading, *ALWAYS)
    added = command(to_official)
    add(added, "checkpoint", "--training", *ALWAYS)
    added = command(reshard)
    add(added, "checkpoint", "--files", "--weights-only", "--out")
    added = command(inspect)
    added.add_argument("path", type=Path, help="a checkpoint, a run, a folder, a safetensors file or a .pt")
    added.add_argument("--all", action="store_true", help="every tensor, not one line for all layers")
    added = command(verify)
    added.add_argument("path", type=Path, nargs="?", help="what a command here wrote, or any checkpoint")
    added.add_argument("--golden", type=Path, help="a folder of golden numbers, as tests/golden/official_aki")
    return parser


_NAMES = "%s (a name, or its beginning and *); may be given several times"
_REPEATED = {"action": "append", "default": [], "metavar": "NAME"}

FLAGS: dict[str, dict[str, Any]] = {
    "checkpoint": {"type": Path, "help": "a checkpoint, a folder of them, or a run (its newest is taken)"},
    "--out": {"type": Path, "required": True, "help": "folder to write; must not exist, or be empty"},
    "--vision": {"type": Path, "help": "folder of SigLIP"},
    "--model": {
        "type": Path,
        "help": "YAML with sections model and attention, as any run's config.yaml (default: what the folders say and "
        "AKI's resampler; AKI-4B for from-official)",
    },
    "--tokenizer": {"type": Path, "help": "folder of the tokenizer (default: beside the weights, or the run's)"},
    "--files": {"type": int, "help": "how many files to write (default: about 5 GB each)"},
    "--seed": {"type": int, "default": 42, "help": "of what has to be drawn (default %(default)s, as a run's)"},
    "--dtype": {"choices": list(DTYPES), "default": "stored", "help": "what to write (default: each tensor's own)"},
    "--shard-gigabytes": {"type": float, "default": SHARD_BYTES / 1e9, "help": "largest file (default %(default)g)"},
    "--training": {"action": "store_true", "help": "a .pt as the release's training writes it, without the encoder"},
    "--weights-only": {"action": "store_true", "help": "leave the optimizer's moments out"},
    "--allow-missing": {**_REPEATED, "help": _NAMES % "draw this tensor where the source has none"},
    "--allow-extra": {**_REPEATED, "help": _NAMES % "leave out this tensor of the source"},
    "--allow-changed": {**_REPEATED, "help": _NAMES % "draw this tensor where the source's has another shape"},
    "--skip-logits-check": {"action": "store_true", "help": "do not compute anything with the result"},
}
EXCEPTIONS = ("--allow-missing", "--allow-extra", "--allow-changed")
ALWAYS = ("--dtype", "--skip-logits-check", "--out")

if __name__ == "__main__":
    sys.exit(main())
