"""The whole synthetic dataset on disk, and a manifest that is written last.

Layout under one folder, as the papers' release expects it:

    captions/00000.tar ...              every training scene; captions_val/00000.tar holds those of val
    VQA/train2014/, VQA/val2014/        COCO_train2014_000000000001.jpg ... and the VQAv2 files beside them
    A-OKVQA/train2017/, A-OKVQA/val2017/, vsr/val2017/    000000000001.jpg ...
    ref/annotations/                    RefCOCO, + and g; their images are in VQA/train2014, those of val as well
    GQA/, OCRVQA/, ScienceQA/, VisualGenome/    questions, problems and regions with images of their own
    llava/                              conversations about images in A-OKVQA/train2017
    ocr/00000.tar ..., ocr_val/         twelve captions each of the text in an image
    tokenizer/                          Hugging Face folder
    manifest.json                       sizes, seed and a sha256 of every annotation file, shard and tokenizer file
"""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.synthetic.extra_datasets import IMAGE_FOLDERS, num_extra_scenes, write_extra_datasets
from aki_megatron.synthetic.files import encode_image, write_tar
from aki_megatron.synthetic.formats import aokvqa, refcoco, vqav2, vsr
from aki_megatron.synthetic.formats.refcoco import Region
from aki_megatron.synthetic.questions import (
    TASK_WEIGHTS,
    TASKS,
    MultipleChoice,
    Question,
    Statement,
    sample_multiple_choice,
    sample_objects,
    sample_statement,
    scene_caption,
)
from aki_megatron.synthetic.scene_pools import FIRST_VAL_ID, image_extension, image_id, is_in_coco_2017
from aki_megatron.synthetic.scenes import Scene, render_scene, sample_scene, scene_rng

VERSION = 6
"""Raise it when the same seed gives other bytes or the manifest has other keys: older folders are then rewritten."""
MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_COCO_FOLDERS = ("VQA/train2014", "VQA/val2014", "A-OKVQA/train2017", "A-OKVQA/val2017", "vsr/val2017")
"""Folders with images of the captions' scenes; the extra datasets have their own."""
_IMAGE_SUFFIXES = (".jpg", ".png")
_SCENES_PER_SHARD = 2500
_QUESTIONS_PER_SCENE = 2
_ATTEMPTS = 4
"""How often a task's question is sampled from a scene before the scene is taken to have none."""
_OTHERS_PER_SCENE = 2
"""Statements, multiple-choice questions and regions of a scene: two of each."""


@dataclass(frozen=True)
class DatasetSize:
    """Scenes of the captions per split, and the seed that everything follows from."""

    train_scenes: int = 20_000
    val_scenes: int = 2_000
    seed: int = 1

    def __post_init__(self) -> None:
        if not 5 <= self.train_scenes < FIRST_VAL_ID or self.val_scenes < 5 or self.seed < 0:
            raise DataError(
                f"train_scenes={self.train_scenes}, val_scenes={self.val_scenes}, seed={self.seed}: train_scenes must "
                f"lie in [5, {FIRST_VAL_ID - 1}], val_scenes must be at least 5 and seed at least 0"
            )

    @property
    def total(self) -> int:
        """Scenes of the captions and of the extra datasets."""
        return self.train_scenes + self.val_scenes + num_extra_scenes(self.train_scenes, self.val_scenes)


@dataclass
class _Annotations:
    """What one split has collected for each format, by image id or file name."""

    vqav2: list[tuple[int, list[Question]]] = field(default_factory=list)
    vsr: list[list[tuple[int, list[Statement]]]] = field(default_factory=lambda: [[], []])
    """Two parts: val is split into VSR's dev and test."""
    aokvqa: list[tuple[int, list[MultipleChoice]]] = field(default_factory=list)
    refcoco: list[tuple[int, str, list[Region]]] = field(default_factory=list)
    captions: list[tuple[str, str, bytes, str]] = field(default_factory=list)
    task_counts: Counter[str] = field(default_factory=Counter)


def is_complete(root: Path, size: DatasetSize) -> bool:
    """Return whether ``root`` holds this very dataset, every annotation file intact and every image there.

    Raises DataError when it holds a complete one of another size or seed, which is the user's to delete.
    """
    manifest = _read_manifest(root)
    if manifest is None or manifest["version"] != VERSION:
        return False
    found = DatasetSize(**manifest["size"])
    if found != size:
        raise DataError(f"{root} holds another dataset: {found}, asked for {size}. Delete it or choose another folder.")
    files = manifest["sha256"].items()
    intact = all((root / name).is_file() and _sha256(root / name) == digest for name, digest in files)
    return intact and all(_count_images(root / name) == number for name, number in manifest["images"].items())


def was_interrupted(root: Path) -> bool:
    """Return whether an earlier write into ``root`` did not finish."""
    return (root / _PARTIAL).exists()


def write_dataset(root: Path, size: DatasetSize, progress: Callable[[int], None]) -> dict[str, int]:
    """Write the dataset into ``root`` and return the number of samples of each part.

    ``progress`` is called with the number of scenes done so far, of ``size.total``. Everything is written into a
    staging folder and moved at the end, the manifest last; what an interrupted call left behind is removed first.
    Raises DataError when ``root`` holds files that this function did not write.
    """
    _refuse_foreign_files(root)
    staging = root / _PARTIAL
    staging.mkdir(parents=True, exist_ok=True)
    for entry in staging.iterdir():  # the folder itself stays: it marks the files beside it as ours
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in _COCO_FOLDERS:
        (staging / name).mkdir(parents=True)
    counts: dict[str, int] = {}
    done = 0
    for split, num_scenes in (("train", size.train_scenes), ("val", size.val_scenes)):
        annotations = _Annotations()
        for index in range(num_scenes):
            _add_scene(staging, size.seed, split, index, annotations)
            progress(done + index + 1)
        done += num_scenes
        counts |= _write_annotations(staging, split, annotations)
    counts |= write_extra_datasets(
        staging, size.seed, size.train_scenes, size.val_scenes, lambda extra: progress(done + extra)
    )
    write_tokenizer(staging / "tokenizer")
    _write_manifest(staging, size, counts)
    (root / MANIFEST).unlink(missing_ok=True)
    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == MANIFEST):
        target = root / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.rename(target)
    staging.rmdir()
    return counts


def _add_scene(root: Path, seed: int, split: str, index: int, annotations: _Annotations) -> None:
    """Sample, render and save one scene, and collect everything that is asked about it.

    The remainder of the index by five tells what the scene is for: 0 and 1 also serve VSR, A-OKVQA and LLaVA, 4 is a
    PNG (and so cannot serve VQAv2, whose file names end in .jpg); all serve captions and the three RefCOCOs.
    """
    rng = scene_rng(seed, split, index)
    scene = sample_scene(rng)
    extension = image_extension(index)
    image = encode_image(render_scene(scene, rng), extension)
    text_rng = random.Random(f"{seed}/{split}/{index}")
    number = image_id(split, index)
    annotations.captions.append((f"{index:09}", extension, image, scene_caption(scene)))
    coco_name = refcoco.coco_file_name(split, index, extension)
    objects = sample_objects(scene, text_rng, max_objects=_OTHERS_PER_SCENE)
    annotations.refcoco.append((number, coco_name, [(item, item.name) for item in objects]))
    files = [f"VQA/train2014/{coco_name}"]
    if extension == "jpg":
        annotations.vqav2.append((number, _sample_questions(scene, text_rng, annotations.task_counts)))
        files += [f"VQA/val2014/COCO_val2014_{number:012}.jpg"] if split == "val" else []
    if is_in_coco_2017(index):
        statements = [sample_statement(scene, text_rng) for _ in range(_OTHERS_PER_SCENE)]
        annotations.vsr[index % 5].append((number, statements))
        annotations.aokvqa.append((number, [sample_multiple_choice(scene, text_rng) for _ in range(_OTHERS_PER_SCENE)]))
        folders = ("A-OKVQA/train2017",) if split == "train" else ("A-OKVQA/val2017", "vsr/val2017")
        files += [f"{folder}/{number:012}.jpg" for folder in folders]
    for name in files:
        (root / name).write_bytes(image)


def _sample_questions(scene: Scene, rng: random.Random, task_counts: Counter[str]) -> list[Question]:
    """Return up to two questions of different tasks, trying those first that are furthest below their weight."""
    questions: list[Question] = []
    for task in sorted(TASKS, key=lambda name: task_counts[name] / TASK_WEIGHTS[name]):
        if len(questions) == _QUESTIONS_PER_SCENE:
            break
        attempts = (TASKS[task](scene, rng) for _ in range(_ATTEMPTS))
        if question := next(filter(None, attempts), None):
            questions.append(question)
            task_counts[task] += 1
    return questions


def _write_annotations(root: Path, split: str, annotations: _Annotations) -> dict[str, int]:
    """Write every annotation file and shard of one split; return the number of samples of each."""
    captions, folder = annotations.captions, root / ("captions" if split == "train" else "captions_val")
    for shard, start in enumerate(range(0, len(captions), _SCENES_PER_SHARD)):
        write_tar(folder / f"{shard:05}.tar", captions[start : start + _SCENES_PER_SHARD])
    vqav2.write(root / "VQA", f"{split}2014", annotations.vqav2)
    aokvqa.write(root / f"A-OKVQA/aokvqa_v1p0_{split}.json", split, annotations.aokvqa)
    refcoco.write(root / f"ref/annotations/finetune_refcoco_{split}.json", annotations.refcoco)
    first, second = annotations.vsr
    if split == "train":
        vsr.write(root / "vsr/train-random.jsonl", "train2017", sorted(first + second))
    else:
        vsr.write(root / "vsr/dev-random.jsonl", "val2017", first)
        vsr.write(root / "vsr/test-random.jsonl", "val2017", second)
    return {
        f"{split}/captions": len(captions),
        **{f"{split}/vqav2/{task}": annotations.task_counts[task] for task in TASKS},
        f"{split}/vsr": sum(len(statements) for _, statements in first + second),
        f"{split}/aokvqa": sum(len(questions) for _, questions in annotations.aokvqa),
        f"{split}/refcoco": sum(len(regions) for _, _, regions in annotations.refcoco),
    }


def _write_manifest(root: Path, size: DatasetSize, counts: dict[str, int]) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in _IMAGE_SUFFIXES)
    manifest = {
        "version": VERSION,
        "size": asdict(size),
        "counts": counts,
        "images": {name: _count_images(root / name) for name in (*_COCO_FOLDERS, *IMAGE_FOLDERS)},
        "sha256": {path.relative_to(root).as_posix(): _sha256(path) for path in files},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """Return the manifest, of any version; None if there is none. Raises DataError if the file is something else."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest.keys() >= {"version", "size", "counts", "sha256"}:
            return manifest
    except (ValueError, AttributeError):
        pass
    raise DataError(f"{path} is not a manifest of make_data; delete the folder or choose another one.")


def _refuse_foreign_files(root: Path) -> None:
    """Raise DataError if ``root`` holds anything else: a mistyped --out must not cost anybody a file."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; give a folder.")
    if not root.exists() or was_interrupted(root) or _read_manifest(root) is not None:
        return
    foreign = sorted(entry.name for entry in root.iterdir())
    if foreign:
        raise DataError(f"{root} holds other files ({', '.join(foreign[:3])} ...); choose an empty or a new folder.")


def _count_images(folder: Path) -> int:
    return sum(name.endswith(_IMAGE_SUFFIXES) for _, _, names in os.walk(folder) for name in names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
