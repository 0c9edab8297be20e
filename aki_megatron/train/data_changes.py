"""Whether a run that goes on reads the data that its checkpoint was trained on, wherever the data is now.

Every checkpoint holds the fingerprints of the sources, the tokenizer and the initial weights (data/fingerprint.py).
They decide, not the paths: the keys that name paths may change while the content stays.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from aki_megatron.checkpoint import files
from aki_megatron.config.changes import is_allowed
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import load_saved
from aki_megatron.data.fingerprint import VERSION, Fingerprint, Part, fingerprint_differences
from aki_megatron.data.pipeline import TOKENIZER_NAME, data_fingerprints
from aki_megatron.data.sample_stream import Source
from aki_megatron.data.tar_index import tar_digest
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError, ConfigError, DataError
from aki_megatron.supervise.run_paths import RunPaths

logger = logging.getLogger("aki_megatron.train")

EXTRA_KEY = "fingerprints"
"""Name of the fingerprints in the ``extra`` of a checkpoint."""

SOURCE_KEYS = ("data.root", "data.captions.shards", "data.sources.path", "data.sources.images")
TOKENIZER_KEY = "data.tokenizer"
INIT_KEYS = ("init.vision", "init.audio", "init.language", "init.weights")

MAX_LISTED = 8
"""Differences that an error lists."""


def fingerprints_to_json(fingerprints: Mapping[str, Fingerprint]) -> dict[str, Any]:
    """Return fingerprints as a checkpoint holds them."""
    return {"version": VERSION, "of": {name: found.to_json() for name, found in fingerprints.items()}}


def saved_fingerprints(checkpoint: Path | None) -> dict[str, Fingerprint]:
    """Return the fingerprints in a checkpoint; empty where it has none, as those of earlier releases.

    A damaged file counts as none: loading the checkpoint verifies it and names it.
    """
    if checkpoint is None:
        return {}
    try:
        saved = json.loads((checkpoint / files.EXTRA).read_text())["extra"][EXTRA_KEY]
        if saved["version"] != VERSION:
            return {}
        return {str(name): Fingerprint.from_json(values) for name, values in saved["of"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def movable_keys(paths: RunPaths, config: RunConfig) -> tuple[str, ...]:
    """Return the keys whose change the comparison of configurations leaves to the fingerprints.

    Paths of data are compared once it is open (check_same_data), initial weights now.
    """
    checkpoint = files.latest_checkpoint(paths.checkpoints)
    saved = saved_fingerprints(checkpoint)
    if checkpoint is None or not saved:
        return ()
    try:
        before = load_saved(paths.config if paths.config.exists() else checkpoint / files.CONFIG)
    except ConfigError:  # reported where the two are compared
        return ()
    moved = [key for key in INIT_KEYS if key in saved and _init_path(before, key) != _init_path(config, key)]
    same = [key for key in moved if _is_same_init(saved[key], _init_path(config, key))]
    return (*SOURCE_KEYS, TOKENIZER_KEY, *same)


def init_fingerprints(config: RunConfig) -> dict[str, Fingerprint]:
    """Return the fingerprints of the initial weights by their keys, but of what cannot be read: loading reports it."""
    found = {}
    for key in INIT_KEYS:
        if (path := _init_path(config, key)) is not None:
            with suppress(DataError):
                found[key] = weights_fingerprint(path)
    return found


def weights_fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a run, a checkpoint, or a Hugging Face folder: of all files in it, by few reads each.

    Raises DataError where a file cannot be read.
    """
    try:
        checkpoint = files.find_checkpoint(path)
    except CheckpointError:
        checkpoint = path
    # the manifest of a checkpoint holds the digests of its other files
    manifest = checkpoint / files.MANIFEST
    try:
        found = [manifest] if manifest.is_file() else sorted(file for file in checkpoint.iterdir() if file.is_file())
        return Fingerprint(len(found), {f"file {file.name}": _weights_part(file) for file in found})
    except OSError as error:
        raise DataError(f"The initial weights {checkpoint} cannot be read: {error}") from error


def _weights_part(path: Path) -> Part:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return Part(tar_digest(file.fileno(), size).hex(), {"bytes": size}, str(path))


def _init_path(config: RunConfig, key: str) -> Path | None:
    path: Path | None = getattr(config.init, key.removeprefix("init."))
    return path


def _is_same_init(saved: Fingerprint, path: Path | None) -> bool:
    try:
        return path is not None and weights_fingerprint(path) == saved
    except DataError:
        return False


def fingerprint_run(
    config: RunConfig,
    tokenizer: Tokenizer,
    sources: Mapping[str, Source[Any]],
    checkpoint: Path | None,
    allow_change: Sequence[str] = (),
) -> tuple[dict[str, Fingerprint], list[str]]:
    """Return the fingerprints that this run's checkpoints hold, and what differs, as allowed, from ``checkpoint``.

    checkpoint    from which the run goes on; None at its first start
    allow_change  see check_same_data

    Raises DataError where the data is not what the checkpoint was trained on.
    """
    found = data_fingerprints(config.data, tokenizer, sources)
    if checkpoint is not None:
        return check_same_data(checkpoint, found, allow_change)
    return {**init_fingerprints(config), **found}, []


def check_same_data(
    checkpoint: Path, now: Mapping[str, Fingerprint], allow_change: Sequence[str] = ()
) -> tuple[dict[str, Fingerprint], list[str]]:
    """Compare what is read with what a checkpoint was trained on.

    now           fingerprints of the sources and of the tokenizer
    allow_change  keys that the user allows to differ: data.root and the other SOURCE_KEYS accept other sources,
                  data.tokenizer another tokenizer

    Returns the fingerprints that the next checkpoints hold, and a line for each difference that was allowed. Raises
    DataError that names what differs and is not allowed.
    """
    saved = saved_fingerprints(checkpoint)
    if not saved:
        logger.warning("%s holds no fingerprint of its data: whether the data is the same cannot be told", checkpoint)
        return dict(now), []
    kept = {key: saved[key] for key in INIT_KEYS if key in saved}
    differences = {
        name: fingerprint_differences(name, saved[name], now[name])
        if name in saved and name in now
        else [f"{name}: {'was not there before' if name in now else 'is gone'}"]
        for name in dict.fromkeys([*saved, *now])
        if name not in INIT_KEYS and saved.get(name) != now.get(name)
    }
    refused = {name: lines for name, lines in differences.items() if not _is_change_allowed(name, allow_change)}
    if refused:
        raise DataError(_refusal(checkpoint, refused))
    return {**kept, **now}, [line for lines in differences.values() for line in lines]


def _is_change_allowed(name: str, allow_change: Sequence[str]) -> bool:
    keys = (TOKENIZER_KEY,) if name == TOKENIZER_NAME else SOURCE_KEYS
    return any(is_allowed(key, allow_change) for key in keys)


def _refusal(checkpoint: Path, refused: Mapping[str, Sequence[str]]) -> str:
    lines = [line for lines in refused.values() for line in lines]
    rest = [f"... and {len(lines) - MAX_LISTED:,} more"] if len(lines) > MAX_LISTED else []
    listing = "\n  ".join(lines[:MAX_LISTED] + rest)
    keys = dict.fromkeys(TOKENIZER_KEY if name == TOKENIZER_NAME else SOURCE_KEYS[0] for name in refused)
    return (
        f"The data is not what {checkpoint} was trained on:\n  {listing}\n"
        "Samples are drawn by number and tokens are learned by id, so the run would go on with others than it would "
        "have had. Bring the content back (it may be at another path), start another run (--run.dir) from this run's "
        f"weights (--init.weights), or go on with what is there now: --allow_change {','.join(keys)}."
    )
