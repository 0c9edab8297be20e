"""Say what a folder or file is that a person took for a model: missing, a hub cache, an adapter, a git-lfs pointer."""

import json
from collections.abc import Iterable
from pathlib import Path

from aki_megatron.data.file_kind import HEAD_BYTES, file_kind
from aki_megatron.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the text that stands in for a large file where git-lfs has not fetched it."""

ADAPTER_CONFIG = "adapter_config.json"
_MERGE = (
    "Merge it into its base model first, with peft: AutoPeftModelForCausalLM.from_pretrained(ADAPTER)"
    ".merge_and_unload().save_pretrained(FOLDER); then give FOLDER, with the base model's tokenizer."
)


def kind_of(file: Path) -> str:
    """Return what a file is by its first bytes."""
    with file.open("rb") as handle:
        return file_kind(handle.read(HEAD_BYTES))


def refuse_pointer(file: Path) -> None:
    """Raise CheckpointError where a file is a git-lfs pointer instead of the file that it names."""
    with file.open("rb") as handle:
        if handle.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{file} is a git-lfs pointer of {file.stat().st_size} bytes, not the file that it names: its folder "
                "was cloned without git-lfs. Fetch the file with git lfs pull, or download the folder again."
            )


def refuse_other_folder(folder: Path) -> None:
    """Raise CheckpointError where a path without config.json or weights is known to be something else."""
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist. Give a local folder that holds config.json and model.safetensors; download a "
            "model of the hub first."
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and model.safetensors.")
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        raise CheckpointError(f"{folder} is a cache of the hub; the model is in it: give {snapshots[-1].parent}.")
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is a LoRA adapter of PEFT ({ADAPTER_CONFIG}) of the base model {_base_model(folder)}: it holds "
            f"changes to a model, and no model. {_MERGE}"
        )


def refuse_adapter_names(file: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError where tensors are those of a LoRA adapter, alone or beside those of its base model."""
    if name := next((name for name in names if ".lora_A." in name or ".lora_embedding_A" in name), None):
        raise CheckpointError(f"{file} holds a LoRA adapter of PEFT (its first matrix is {name}). {_MERGE}")


def _base_model(folder: Path) -> str:
    try:
        return str(json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "(not named)"
