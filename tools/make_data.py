"""Make data: write the demo's synthetic dataset, pack your own images and captions into tars, index tars, check data.

    python tools/make_data.py --out data/demo
        the demo's data: scenes, captions, questions in the formats of 13 public datasets, and a tokenizer

    python tools/make_data.py tones --out data/tones
        recordings of beeps, images of squares and questions about both: the data of configs/demo/audio.yaml

    python tools/make_data.py shards --out data/mine --folder images
    python tools/make_data.py shards --out data/mine --table list.parquet --image_column image --caption_column text
        webdataset tars for pretraining from images with captions; prints the lines for the run's configuration

    python tools/make_data.py index 'data/kale/{00000..31000}.tar'
        the index beside every tar, so that a run need not write it when it starts

    python tools/make_data.py check --config configs/aki4b/sft.yaml --data.root /datasets/sft
        decode everything that a run would read, and count what is good, bad, missing and too long

Options of a command: python tools/make_data.py shards --help
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from aki_megatron.console import progress_bar
from aki_megatron.data.shard_writer import pairs_from_folder, pairs_from_table, run_configuration, write_shards
from aki_megatron.data.shards import expand_shards, missing_shards, wildcard_hint
from aki_megatron.data.tar_damage import tar_damages
from aki_megatron.data.tar_index import index_matches, index_path, read_header, write_index
from aki_megatron.errors import DataError, UserError
from aki_megatron.supervise.exit_codes import INTERRUPTED
from aki_megatron.synthetic.dataset import DatasetSize, is_complete, was_interrupted, write_dataset
from aki_megatron.synthetic.tones import write_tones

RAW = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, ``demo_command`` if none is named; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(arguments)(arguments)
    except UserError as error:
        print(f"make_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_data: interrupted", file=sys.stderr)
        return INTERRUPTED


def _command(arguments: list[str]) -> Callable[[Sequence[str]], int]:
    """Take the command from the arguments; ``demo_command`` where there are options only."""
    if not arguments or arguments[0].startswith("-"):
        return demo_command
    if arguments[0] not in COMMANDS:
        raise DataError(
            f"There is no command {arguments[0]!r}; the commands are {', '.join(COMMANDS)}, and without one --out "
            "draws the demo's data. See --help."
        )
    return COMMANDS[arguments.pop(0)]


def demo_command(argv: Sequence[str]) -> int:
    """Write the demo's synthetic dataset, or report that it exists."""
    default = DatasetSize()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write")
    add("--train_scenes", type=int, default=default.train_scenes, help="training scenes (default %(default)s)")
    add("--val_scenes", type=int, default=default.val_scenes, help="validation scenes (default %(default)s)")
    add("--seed", type=int, default=default.seed, help="of the scenes (default %(default)s)")
    arguments = parser.parse_args(argv)
    write_demo_data(arguments.out, DatasetSize(arguments.train_scenes, arguments.val_scenes, arguments.seed))
    return 0


def write_demo_data(root: Path, size: DatasetSize) -> None:
    """Write the dataset into ``root`` unless it is complete, with a progress bar."""
    if is_complete(root, size):
        print(f"{root}: complete, nothing to do.")
        return
    if was_interrupted(root):
        print(f"{root}: an earlier write did not finish; starting again.")
    start = time.monotonic()
    with progress_bar("writing scenes") as bar:
        task = bar.add_task("scenes", total=size.total)

        def progress(done: int) -> None:
            if done % 200 == 0 or done == size.total:
                bar.update(task, completed=done)

        counts = write_dataset(root, size, progress)
    for name, number in counts.items():
        print(f"  {name:22} {number:7}")
    print(f"{root}: {size.total} scenes in {time.monotonic() - start:.0f} s.")


TONES_HELP = """Write recordings of beeps (WAV), images of squares, questions about both, and the demo's tokenizer.

The questions are LLaVA's JSON with <audio> and <image> where the recording and the image stand (docs/modalities.md).
Half a minute and 250 MB with the default number of recordings. The same arguments give the same bytes.

Example: python tools/make_data.py tones --out data/tones
"""


def tones_command(argv: Sequence[str]) -> int:
    """Write the drawn recordings and their questions."""
    parser = argparse.ArgumentParser(prog="make_data.py tones", description=TONES_HELP, formatter_class=RAW)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; new or empty")
    add("--train", type=int, default=4000, help="pairs of training recordings (default %(default)s)")
    add("--val", type=int, default=300, help="pairs of validation recordings (default %(default)s)")
    add("--seed", type=int, default=1, help="of the recordings (default %(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.train, arguments.val) < 1 or arguments.seed < 0:
        raise DataError("--train and --val must be at least 1, --seed at least 0.")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise DataError(f"{arguments.out} exists and is not an empty folder; give a new one.")
    with progress_bar("writing recordings") as bar:
        task = bar.add_task("pairs", total=arguments.train + arguments.val)
        counts = write_tones(
            arguments.out,
            train=arguments.train,
            val=arguments.val,
            seed=arguments.seed,
            progress=lambda done: bar.update(task, completed=done),
        )
    for name, number in counts.items():
        print(f"  {name:22} {number:7}")
    return 0


SHARDS_HELP = """Write webdataset tars (key.jpg, .png, .webp ..., key.txt) with their indexes, for pretraining.

From a folder: every image goes with the text of the same name, a/7.jpg with a/7.txt; subfolders are searched.
From a table (.csv with a header line, or .parquet): one column holds the image - a path, or in parquet its bytes, or
the struct of the datasets library - and another its caption. For BLIP3-OCR-200M give --caption_column captions and
choose the granularity in the run's configuration.

Images are copied unchanged and decoded once to check them. A bad row, one in a format that cannot be read included, is
named and left out; too many bad rows are an
error, and nothing is written. The same rows give the same tars, byte for byte.

Example: python tools/make_data.py shards --out data/mine --folder images
"""


def shards_command(argv: Sequence[str]) -> int:
    """Pack images and captions into tars."""
    parser = argparse.ArgumentParser(prog="make_data.py shards", description=SHARDS_HELP, formatter_class=RAW)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for 00000.tar ...")
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--folder", type=Path, help="images and texts of the same name")
    origin.add_argument("--table", type=Path, help="a .csv or .parquet file")
    add("--image-column", "--image_column", default="image", help="of the table (default %(default)s)")
    add("--caption-column", "--caption_column", default="caption", help="of the table (default %(default)s)")
    add("--image-root", "--image_root", type=Path, help="base of the table's paths (default: the table's folder)")
    add("--per-shard", "--per_shard", type=int, default=5000, help="samples per tar (default %(default)s)")
    add(
        "--max-bad-fraction", "--max_bad_fraction", type=float, default=0.001,
        help="stop when more than this fraction of the rows (and more than 8) is bad; 0: stop at the first "
        "(default %(default)s)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace tars that are in --out already")
    add("--workers", type=int, default=os.cpu_count() or 1, help="decoding threads (default: one per core)")
    arguments = parser.parse_args(argv)
    if arguments.folder:
        rows = pairs_from_folder(arguments.folder)
    else:
        columns = arguments.image_column, arguments.caption_column
        rows = pairs_from_table(arguments.table, *columns, arguments.image_root)
    start = time.monotonic()
    with progress_bar("packing") as bar:
        task = bar.add_task("rows", total=rows.total)

        def report(done: int, trouble: str) -> None:
            bar.update(task, completed=done)
            if trouble:
                bar.console.print(f"left out: {trouble}")

        written = write_shards(
            rows,
            arguments.out,
            per_shard=arguments.per_shard,
            max_bad_fraction=arguments.max_bad_fraction,
            overwrite=arguments.overwrite,
            num_workers=arguments.workers,
            progress=report,
        )
    seconds = time.monotonic() - start
    counts = f"{written.num_samples} samples in {len(written.tars)} tars"
    print(f"{counts} in {seconds:.0f} s, {len(written.skipped)} left out.")
    print(f"For the run's configuration:\n\n{run_configuration(arguments.out, written)}")
    return 0


INDEX_HELP = """Write the index beside every tar (00000.tar.index): the byte ranges of each sample.

A run writes the indexes it lacks, but a dataset of 31,000 tars is better indexed once, on many cores, beforehand. An
index that belongs to its tar already is left alone. SHARDS are paths or brace patterns, quoted to keep the shell from
expanding them.

Every tar with unreadable samples is named, with its readable samples, all its samples and the reasons; the exit code is
then 1. A tar that is cut off counts the samples that it lacks, as far as img2dataset's 00000_stats.json beside it or
the other tars tell.

Example: python tools/make_data.py index 'data/kale/{00000..31000}.tar'
"""


def index_command(argv: Sequence[str]) -> int:
    """Index tars; a tar that cannot be read is named, and the others are indexed nevertheless."""
    parser = argparse.ArgumentParser(prog="make_data.py index", description=INDEX_HELP, formatter_class=RAW)
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="for example 'data/kale/{00000..31000}.tar'")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--skip-missing", "--skip_missing", action="store_true", help="leave out tars that do not exist"
    )
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise DataError(f"--workers {arguments.workers} must be at least 1.")
    tars = expand_shards(arguments.shards, Path())
    if missing := missing_shards(arguments.shards, Path()):
        if not arguments.skip_missing:
            listing, hint = "\n  ".join(missing), wildcard_hint(arguments.shards)
            raise DataError(f"These tars do not exist (--skip_missing leaves them out){hint}:\n  {listing}")
        existing = [tar for tar in tars if tar.is_file()]
        print(f"{len(tars) - len(existing)} of {len(tars)} tars do not exist and are left out: {', '.join(missing)}")
        tars = existing
    stale = [tar for tar in tars if not _is_indexed(tar)]
    samples, failed = _index_all(stale, arguments.workers)
    print(f"{len(stale) - len(failed)} tars indexed ({samples} samples), {len(tars) - len(stale)} were up to date.")
    damages = tar_damages(tars)
    for damage in damages:
        print(damage)
    if damages:
        readable = sum(damage.num_readable for damage in damages)
        total = sum(damage.num_samples + damage.num_absent for damage in damages)
        print(f"{len(damages)} of {len(tars)} tars hold unreadable samples; {readable} of their {total} are readable.")
    if failed:
        raise DataError(f"{len(failed)} tars could not be indexed:\n  " + "\n  ".join(failed))
    return 1 if damages else 0


def _index_all(tars: Sequence[Path], workers: int) -> tuple[int, list[str]]:
    """Index in worker processes; return the number of samples and the error messages."""
    samples, failed = 0, []
    with progress_bar("indexing") as bar, ProcessPoolExecutor(min(workers, max(1, len(tars)))) as pool:
        task = bar.add_task("tars", total=len(tars))
        for future in as_completed([pool.submit(write_index, tar) for tar in tars]):
            try:
                samples += future.result()
            except DataError as error:
                failed.append(str(error))
            except BrokenProcessPool as error:
                raise DataError("An indexing process was killed (out of memory?); give fewer --workers.") from error
            bar.advance(task)
    return samples, sorted(failed)


def _is_indexed(tar: Path) -> bool:
    header, state = read_header(index_path(tar)), tar.stat()
    return header is not None and index_matches(header, tar, state.st_size, state.st_mtime_ns)


CHECK_HELP = """Read everything that a run would read, once: every text is tokenized, every image decoded.

Prints for each source its records beside those of the public release, how many are readable, the faults by kind with
the first of each, missing images, and the lengths in tokens. Nothing is written. The exit code is 1 where a run would
stop because of its data. Overrides are written as for the launchers.

    python tools/make_data.py check --config configs/aki4b/sft.yaml --data.root /datasets/sft
    python tools/make_data.py check --config configs/aki4b/pretrain.yaml --samples 100000
"""


def check_command(argv: Sequence[str]) -> int:
    """Check the data of a run; return 1 where the run would stop because of it."""
    parser = argparse.ArgumentParser(
        prog="make_data.py check", description=CHECK_HELP, formatter_class=RAW, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="a complete run as YAML; dotted overrides follow")
    parser.add_argument("--samples", type=int, default=0,
                        help="most samples of each source, evenly spaced; default 0: all")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.samples < 0 or arguments.workers < 1:
        raise DataError(
            f"--samples {arguments.samples} must be at least 0 and --workers {arguments.workers} at least 1."
        )
    # transformers takes seconds to import, and the other commands do not need it
    from aki_megatron.config.load import load_run
    from aki_megatron.data.check import check_run_data
    from aki_megatron.data.check_report import report_lines

    config = load_run(overrides, default_config=arguments.config, prog="make_data.py check", description="")
    refused = []
    with progress_bar("checking", "{task.fields[what]}") as bar:
        task = bar.add_task("sources", what="")

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, what=what, completed=done, total=total)

        for found in check_run_data(
            config, max_samples=arguments.samples, num_workers=arguments.workers, progress=progress
        ):
            for line in report_lines(found, config.data):
                bar.console.print(line, soft_wrap=True)
            refused += [found.name] * found.is_refused(config.data.max_bad_fraction)
    print(f"A run would stop because of {', '.join(refused)}." if refused else "A run can read all of it.")
    return int(bool(refused))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "tones": tones_command,
    "shards": shards_command,
    "index": index_command,
    "check": check_command,
}


if __name__ == "__main__":
    sys.exit(main())
