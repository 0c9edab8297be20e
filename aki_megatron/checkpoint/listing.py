"""What lies in a folder: our checkpoints, Hugging Face folders, the official release; and whether it is whole."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import REPORT, pattern
from aki_megatron.checkpoint.dcp_io import WEIGHT, CheckpointSource
from aki_megatron.checkpoint.official import PREFIXES as OFFICIAL
from aki_megatron.checkpoint.official import open_official
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.tensors import TensorFact
from aki_megatron.errors import CheckpointError

STATE = "optimizer state"
"""Part of a checkpoint that is no parameter."""

FORMS: dict[str, dict[str, str]] = {
    "checkpoint of aki_megatron": {
        f"{WEIGHT}front.vision.": "vision encoder",
        f"{WEIGHT}front.resampler.": "resampler",
        WEIGHT: "decoder",
        "": STATE,
    },
    "official AKI release": dict(zip(OFFICIAL, ("vision encoder", "resampler", "decoder"), strict=True)),
    "AKI for transformers": {"model.vision_tower.": "vision encoder", "model.resampler.": "resampler", "": "decoder"},
    "SigLIP": {"text_model.": "text tower", "logit_": "text tower", "": "vision encoder"},
    "language model": {"": "decoder"},
}
"""Form -> beginnings of names and the part of the model they belong to; the first that fits."""

_SIGNS = {
    "official AKI release": OFFICIAL,
    "AKI for transformers": ("model.vision_tower.",),
    "SigLIP": ("vision_model.", "embeddings.patch_embedding."),
    "language model": ("model.embed_tokens.",),
}
"""Form -> beginnings of names that only it has."""


@dataclass(frozen=True)
class Listing:
    """Names, shapes and dtypes of everything in one place."""

    form: str
    path: Path
    facts: Mapping[str, TensorFact]

    def part(self, name: str) -> str:
        """Which part of a model a tensor belongs to."""
        table = FORMS[self.form]
        return next((part for start, part in table.items() if name.startswith(start)), "of no part")

    def by_part(self) -> dict[str, list[TensorFact]]:
        """The tensors of each part."""
        found: dict[str, list[TensorFact]] = {}
        for name, fact in self.facts.items():
            found.setdefault(self.part(name), []).append(fact)
        return found

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(fact.elements for name, fact in self.facts.items() if self.part(name) != STATE)

    def by_pattern(self) -> Iterator[tuple[str, TensorFact, int]]:
        """Names with ``{i}`` for the layer, what is known of each, and how many layers have it."""
        counts: dict[tuple[str, TensorFact], int] = {}
        for name, fact in self.facts.items():
            key = (pattern(name), fact)
            counts[key] = counts.get(key, 0) + 1
        yield from ((name, fact, count) for (name, fact), count in counts.items())


def look(path: Path) -> Listing:
    """List our checkpoint (or a folder of them, or a run), a Hugging Face folder, or the official release.

    Errors: CheckpointError for anything else, and for files that cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_dir() and not list(path.glob("*.safetensors")):
        source = CheckpointSource(path, moments=True, checked=False)
        return Listing("checkpoint of aki_megatron", source.path, source.facts)
    facts = (open_safetensors(path) if path.is_dir() or path.suffix == ".safetensors" else open_official(path)).facts
    for form, starts in _SIGNS.items():
        if any(name.startswith(starts) for name in facts):
            return Listing(form, path, facts)
    raise CheckpointError(f"{path} holds tensors of no form known here; the first is {next(iter(facts), 'none')}.")


def check_files(path: Path, report: Callable[[str], None]) -> bool:
    """Compare every file with the sha256 in the folder's conversion.json or manifest; a line each, whether all agree.

    Errors: CheckpointError where there is neither.
    """
    if path.is_dir() and (path / REPORT).is_file():
        folder = path
        try:
            listed = dict(json.loads((path / REPORT).read_text(encoding="utf-8"))["outputs"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path / REPORT} is corrupt; give the checkpoint inside the folder.") from None
    else:
        folder = files.find(path)
        listed = files.read_manifest(folder)
    good = 0
    for name in sorted(listed):
        wrong = files.first_wrong(folder, [name], listed)
        report(wrong or f"{listed[name]['sha256']}  {name}")
        good += wrong is None
    report(f"{good} of {len(listed)} files are as they were written")
    return good == len(listed)
