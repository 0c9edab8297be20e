"""Convert weights between Hugging Face folders, the official AKI release and checkpoints, and verify the result.

    python tools/convert.py from-hf --lm Phi-3.5-mini-instruct --vision siglip-so400m-patch14-384 --out start
        a checkpoint to train from: --init.weights start, --data.tokenizer start/step_000000/tokenizer, and the model
        section of start/step_000000/config.yaml (Phi-3.5, LLaMA 3.2, Qwen2.5, Qwen3; folders as they are downloaded);
        with --audio whisper-small the model hears too
    python tools/convert.py to-hf runs/sft --dtype bf16 --out aki-hf
        a folder that plain transformers loads (a run's checkpoint holds fp32 masters, twice as large); its README.md
        says how
    python tools/convert.py from-official model.safetensors --out aki
    python tools/convert.py from-official checkpoint_9.pt --vision siglip-so400m-patch14-384 --out aki
        the release, or one of its training checkpoints, which leave the vision encoder out
    python tools/convert.py to-official runs/sft --out release
    python tools/convert.py reshard runs/sft --out packed --files 8 --weights-only
        the same tensors in other files (a checkpoint resumes under any TP, PP, DP and ZeRO stage as it is)
    python tools/convert.py to-hf runs/lora --base /models/pretrain --out aki-hf
        where the checkpoint leaves frozen weights out, and their run or folder (init.*) has moved
    python tools/convert.py upgrade runs/old --out runs/new
        a checkpoint or run of an earlier version, in the current format: --init.weights runs/new to start from it, or
        --config runs/new/config.yaml to resume the run
    python tools/convert.py inspect PATH
        names, shapes, dtypes, sizes and numbers of parameters of anything above
    python tools/convert.py verify PATH
        compare every file with the sha256 that was recorded when it was written
    python tools/convert.py verify --golden tests/golden/official_aki
        load official weights and reproduce what the official code computed with them

Weights are streamed: one tensor is in memory at a time. Every tensor must be present, of the right shape, and no other;
each conversion ends with the logits of both sides compared with the MMA mask active (to-hf also with the tokens that
both generate) and with a report: short here, whole in conversion.json, with the sha256 of every file. Exit codes: 0
done, 1 a verification failed, 2 a mistake that the message explains.
Help on a command: python tools/convert.py from-hf --help
"""

import os
import signal
import sys

if __name__ == "__main__":  # the imports below take seconds

    def _interrupted(*_: object) -> None:
        os.write(2, b"convert: interrupted; nothing is left of the output.\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)

import argparse
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from aki_megatron.argument_types import as_path, gigabytes, whole_number
from aki_megatron.checkpoint import conversions
from aki_megatron.checkpoint.base_weights import BASE_HELP, read_base_paths
from aki_megatron.checkpoint.conversion_report import AllowedMismatches, ConversionReport
from aki_megatron.checkpoint.conversion_steps import ConversionSettings, ConvertedModel
from aki_megatron.checkpoint.files import find_checkpoint
from aki_megatron.checkpoint.listing import left_out_lines, list_tensors, verify_files
from aki_megatron.checkpoint.run_text import run_tokenizer
from aki_megatron.checkpoint.upgrade import upgrade as upgrade_checkpoint
from aki_megatron.checkpoint.writers import SHARD_BYTES, staging_dir
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.save import load_model
from aki_megatron.errors import CheckpointError, UserError
from aki_megatron.evaluate.generation_check import check_generation
from aki_megatron.evaluate.golden import verify_golden

DTYPES = {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}

MAX_FILES = 100_000

PROGRESS_SECONDS = 10
"""Between two progress lines."""


STOPPING = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "the terminal closed"}
"""Signals that end a conversion, and what its last line calls them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = build_parser().parse_args(argv)
    with stopping_signals():
        try:
            return int(arguments.run(arguments))
        except UserError as error:
            print(f"convert: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader of the output has ended: inspect PATH | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            print(f"convert: {error.filename or 'a file'} cannot be read: {error.strerror}.", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stopped:
            number = stopped.args[0] if stopped.args else signal.SIGINT
            print(f"convert: {STOPPING[number]}; nothing is left of the output.", file=sys.stderr)
            return 128 + number


@contextmanager
def stopping_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt(number) at the first signal of STOPPING; ignore others, which would stop the cleaning."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    is_main = threading.current_thread() is threading.main_thread()
    # what nohup or a shell without job control ignores stays ignored
    before = {each: signal.getsignal(each) for each in STOPPING if is_main and signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def from_hf(arguments: argparse.Namespace) -> int:
    """Convert stock Hugging Face folders, or one that to-hf wrote, to a checkpoint."""
    stock = arguments.lm is not None and arguments.vision is not None
    if stock == (arguments.aki is not None) or (not stock and (arguments.lm or arguments.vision or arguments.audio)):
        raise CheckpointError("Give --lm and --vision together (with --audio for a model that hears), or --aki alone.")
    if arguments.aki:
        if arguments.model:
            raise CheckpointError("Leave --model out with --aki: the folder's config.json describes the model.")
        return write(
            arguments,
            lambda folder: conversions.from_export(
                arguments.aki, folder, settings(arguments), tokenizer=arguments.tokenizer
            ),
        )
    return write(
        arguments,
        lambda folder: conversions.from_hf(
            arguments.lm,
            arguments.vision,
            folder,
            settings(arguments),
            model=read_model(arguments.model),
            tokenizer=arguments.tokenizer or arguments.lm,
            audio=arguments.audio,
        ),
    )


def to_hf(arguments: argparse.Namespace) -> int:
    """Convert a checkpoint to a folder for transformers."""

    def convert(folder: Path) -> ConversionReport:
        checkpoint = find_checkpoint(arguments.checkpoint)
        report = conversions.to_hf(
            checkpoint,
            folder,
            settings(arguments),
            tokenizer=arguments.tokenizer,
            shard_bytes=round(arguments.shard_gigabytes * 1e9),
            adapter=arguments.adapter,
        )
        if not (arguments.skip_logits_check or arguments.adapter):
            tokenizer = arguments.tokenizer or run_tokenizer(checkpoint)
            report.notes["generation"] = check_generation(folder, checkpoint, tokenizer)
        return report

    return write(arguments, convert)


def from_official(arguments: argparse.Namespace) -> int:
    """Convert the official release to a checkpoint."""
    model = read_model(arguments.model) or ConvertedModel(ModelConfig(), AttentionConfig(rule="mma"))
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
    """Convert a checkpoint to the official release's format."""
    return write(
        arguments,
        lambda folder: conversions.to_official(
            arguments.checkpoint, folder, settings(arguments), training=arguments.training
        ),
    )


def reshard(arguments: argparse.Namespace) -> int:
    """Rewrite a checkpoint in another number of files."""
    return write(
        arguments,
        lambda folder: conversions.reshard(
            arguments.checkpoint, folder, settings(arguments), weights_only=arguments.weights_only
        ),
    )


def upgrade(arguments: argparse.Namespace) -> int:
    """Convert a checkpoint or run of an earlier version to the current format, bit for bit."""
    return write(
        arguments,
        lambda folder: upgrade_checkpoint(arguments.checkpoint, folder, settings(arguments), out=arguments.out),
    )


def inspect(arguments: argparse.Namespace) -> int:
    """Print the tensors that a path holds."""
    base_paths, listing = read_base_paths(arguments.base), list_tensors(arguments.path)
    print(f"{listing.path}: {listing.format}, {len(listing.specs)} tensors, {listing.num_parameters:,} parameters")
    for component, specs in listing.by_component().items():
        dtypes = ", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs}))
        numel, size = sum(spec.numel for spec in specs), sum(spec.nbytes for spec in specs)
        print(f"  {component:16} {len(specs):5} tensors {numel:15,} elements {size / 1e6:11,.1f} MB  {dtypes}")
    every_name = [(name, spec, 1) for name, spec in listing.specs.items()]
    lines = every_name if arguments.all else list(listing.by_layer_pattern())
    width = max(len(name) for name, *_ in lines)
    for name, spec, count in lines:
        shape, dtype = "x".join(map(str, spec.shape)) or "scalar", str(spec.dtype).removeprefix("torch.")
        times = f"{count:4} x " if not arguments.all else ""
        print(f"{name:{width}}  {times}{shape:>16}  {dtype:8} {count * spec.nbytes / 1e6:11,.3f} MB")
    for line in left_out_lines(listing.path, base_paths):
        print(line)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare files with their sha256, or our model with golden values."""
    if (arguments.path is None) == (arguments.golden is None):
        raise CheckpointError("Give a folder to compare with its sha256, or --golden FOLDER.")
    if arguments.golden:
        return 0 if verify_golden(arguments.golden, print) else 1
    return 0 if verify_files(arguments.path, print) else 1


def write(arguments: argparse.Namespace, convert: Callable[[Path], ConversionReport]) -> int:
    """Convert into a folder that becomes --out if all goes well; write and print the report."""
    start = time.monotonic()
    with staging_dir(arguments.out, lambda line: print(f"convert: {line}", file=sys.stderr)) as folder:
        report = convert(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report.notes["took"] = f"{time.monotonic() - start:.0f} s, at most {peak / 1e9:.2f} GB of memory"
        report.write(folder)
    print(report.text())
    print(f"{arguments.out}: done")
    return 0


def read_model(path: Path | None) -> ConvertedModel | None:
    """The model that --model describes."""
    return None if path is None else ConvertedModel(*load_model(path))


def settings(arguments: argparse.Namespace) -> ConversionSettings:
    """The settings that all conversions share, from the flags that a command has."""
    return ConversionSettings(
        dtype=DTYPES[getattr(arguments, "dtype", "stored")],
        seed=getattr(arguments, "seed", 0),
        num_files=getattr(arguments, "files", None),
        allowed=AllowedMismatches(
            missing=getattr(arguments, "allow_missing", ()),
            unexpected=getattr(arguments, "allow_unexpected", ()),
            mismatched=getattr(arguments, "allow_mismatched", ()),
        ),
        check_logits=not getattr(arguments, "skip_logits_check", True),
        base_paths=read_base_paths(getattr(arguments, "base", ())),
        start_progress=start_progress,
    )


def start_progress(title: str, total: int) -> Callable[[int], None]:
    """Return a function that takes the bytes that were read, and prints a line every PROGRESS_SECONDS."""
    start = last = time.monotonic()
    done = 0

    def on_read(size: int) -> None:
        nonlocal done, last
        done += size
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            text = f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {now - start:.0f} s"
            print(text, file=sys.stderr, flush=True)

    return on_read


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

    to_checkpoint = ("--model", "--tokenizer", "--files", "--seed", *EXCEPTIONS)
    added = command(from_hf)
    added.add_argument("--lm", type=as_path, help="folder of the language model")
    added.add_argument("--audio", type=as_path, help="folder of Whisper: its encoder, for a model that hears")
    added.add_argument("--aki", type=as_path, help="instead of --lm and --vision: a folder that to-hf wrote")
    add(added, "--vision", *to_checkpoint, *COMMON)
    added = command(to_hf)
    add(added, "checkpoint", "--base", "--tokenizer", "--shard-gigabytes", "--adapter", *COMMON)
    added = command(from_official)
    added.add_argument("release", type=as_path, help="the release's safetensors, a folder with it, or a .pt")
    add(added, "--vision", *to_checkpoint, *COMMON)
    added = command(to_official)
    add(added, "checkpoint", "--base", "--training", *COMMON)
    added = command(reshard)
    add(added, "checkpoint", "--base", "--files", "--weights-only", "--out")
    added = command(upgrade)
    add(added, "checkpoint", "--files", "--out")
    added = command(inspect)
    added.add_argument("path", type=as_path, help="a checkpoint, a run, a folder, a safetensors file or a .pt")
    added.add_argument("--all", action="store_true", help="every tensor, instead of one line for all layers")
    add(added, "--base")
    added = command(verify)
    added.add_argument("path", type=as_path, nargs="?", help="an output of these commands, or any checkpoint")
    added.add_argument("--golden", type=as_path, help="a folder of golden values, as tests/golden/official_aki")
    return parser


_NAMES = "%s (a name, or a prefix and *); may be given several times"
_REPEATED = {"action": "append", "default": [], "metavar": "NAME"}

FLAGS: dict[str, dict[str, Any]] = {
    "checkpoint": {"type": as_path, "help": "a checkpoint, a folder of them, or a run (its newest is taken)"},
    "--base": {"action": "append", "default": [], "metavar": "[KEY=]PATH", "help": BASE_HELP},
    "--out": {"type": as_path, "required": True, "help": "folder to write; must not exist, or be empty"},
    "--vision": {"type": as_path, "help": "folder of SigLIP"},
    "--model": {
        "type": as_path,
        "help": "YAML with sections model and attention, as any run's config.yaml (default: the sizes in the folders "
        "and AKI's resampler; AKI-4B for from-official)",
    },
    "--tokenizer": {"type": as_path, "help": "folder of the tokenizer (default: beside the weights, or the run's)"},
    "--files": {"type": whole_number(1, MAX_FILES), "help": "how many files to write (default: about 5 GB each)"},
    "--seed": {
        "type": whole_number(0, 2**63 - 1),
        "default": 42,
        "help": "of randomly initialized weights (default %(default)s, as a run's)",
    },
    "--dtype": {
        "choices": list(DTYPES),
        "default": "stored",
        "help": "precision to write (default: each tensor's own). A run's checkpoints hold fp32 masters: --dtype bf16 "
        "writes half as much",
    },
    "--shard-gigabytes": {
        "type": gigabytes,
        "default": SHARD_BYTES / 1e9,
        "help": "largest file (default %(default)g)",
    },
    "--adapter": {
        "action": "store_true",
        "help": "do not merge low-rank adapters; write them as the folder adapter inside, which peft loads",
    },
    "--training": {"action": "store_true", "help": "a .pt as the release's training writes it, without vision encoder"},
    "--weights-only": {"action": "store_true", "help": "leave the optimizer state out"},
    "--allow-missing": {**_REPEATED, "help": _NAMES % "initialize this tensor where the source has none"},
    "--allow-unexpected": {**_REPEATED, "help": _NAMES % "skip this tensor of the source"},
    "--allow-mismatched": {**_REPEATED, "help": _NAMES % "initialize this tensor where the source's has another shape"},
    "--skip-logits-check": {"action": "store_true", "help": "do not compute anything with the result"},
}
EXCEPTIONS = ("--allow-missing", "--allow-unexpected", "--allow-mismatched")
COMMON = ("--dtype", "--skip-logits-check", "--out")

if __name__ == "__main__":
    sys.exit(main())
