"""The inputs of a checkpoint's run that an export takes along: tokenizer, system message, treatment of images."""

import json
from pathlib import Path

from aki_megatron.checkpoint import files
from aki_megatron.config.data import SYSTEM_MESSAGE, ImagesConfig, SourceConfig
from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.data.fingerprint import TOKENIZER_FILES, Fingerprint, tokenizer_fingerprint
from aki_megatron.errors import CheckpointError

KEPT_FILES = (*TOKENIZER_FILES, "tokenizer.model", "vocab.json", "merges.txt")
"""Files of a tokenizer's folder that a checkpoint keeps."""


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a tokenizer's files by name. Raises CheckpointError where one cannot be read."""
    try:
        return {name: (folder / name).read_bytes() for name in KEPT_FILES if (folder / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"The tokenizer {folder} cannot be read: {error}.") from None


def run_tokenizer(checkpoint: Path) -> Path:
    """Return the tokenizer's folder: the one in the checkpoint, or the one of its run.

    Checkpoints of earlier versions name only a path. It is taken where it is absolute, or where its files have the
    fingerprint that the checkpoint holds: a relative path may mean another folder from here.

    Raises CheckpointError where there is none.
    """
    if (checkpoint / files.TOKENIZER).is_dir():
        return checkpoint / files.TOKENIZER
    name = _data_section(checkpoint).get("tokenizer")
    expected = _saved_fingerprint(checkpoint)
    reason = "it holds none and names none"
    if name:
        folder = Path(str(name))
        reason = f"it holds none, and data.tokenizer={folder} is no folder here"
        if folder.is_dir() and expected is not None:
            if tokenizer_fingerprint(folder, expected.num_records) == expected:
                return folder
            reason = f"it holds none, and {folder} has other files than the tokenizer that it was trained with"
        elif folder.is_dir() and folder.is_absolute():
            return folder
        elif folder.is_dir():
            reason = f"it holds none, and the relative path data.tokenizer={folder} may be another one from here"
    raise CheckpointError(
        f"No tokenizer for {checkpoint}: {reason}. Give the tokenizer of its training: --tokenizer FOLDER."
    )


def run_system_message(checkpoint: Path) -> str:
    """Return the system message of the run that wrote a checkpoint; AKI's where a conversion wrote it."""
    return str(_data_section(checkpoint).get("system_message", SYSTEM_MESSAGE))


def run_images(checkpoint: Path) -> ImagesConfig:
    """Return how the run that wrote a checkpoint made pixels of images; AKI's way where a conversion wrote it."""
    return ImagesConfig.model_validate(_data_section(checkpoint).get("images", {}))


def run_sources(checkpoint: Path) -> tuple[SourceConfig, ...]:
    """Return the fine-tuning sources of the run that wrote a checkpoint; none for captions and conversions."""
    sources = _data_section(checkpoint).get("sources")
    return tuple(SourceConfig.model_validate(source) for source in sources) if isinstance(sources, list) else ()


def _data_section(checkpoint: Path) -> dict[str, object]:
    section = read_yaml(checkpoint / files.CONFIG).values.get("data")
    return section if isinstance(section, dict) else {}


def _saved_fingerprint(checkpoint: Path) -> Fingerprint | None:
    """The fingerprint of the tokenizer that the checkpoint was trained with; None where it holds none."""
    try:
        saved = json.loads((checkpoint / files.EXTRA).read_text(encoding="utf-8"))["extra"]["fingerprints"]
        return Fingerprint.from_json(saved["of"][files.TOKENIZER])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
