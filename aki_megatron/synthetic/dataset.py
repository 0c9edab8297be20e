"""A whole embedded data set on disk: who gets which scene, and a manifest that is written last.

Layout under one root, as the papers' release expects it:

    captions/00000.tar ...              every training scene; captions_val/00000.tar holds the held-out ones
    VQA/train2014/, VQA/val2014/        COCO_train2014_000000000001.jpg ... and the VQAv2 files beside them
    A-OKVQA/train2017/, A-OKVQA/val2017/, vsr/val2017/    000000000001.jpg ...
    ref/annotations/                    RefCOCO, + and g; their pictures lie in VQA/train2014, held-out ones as well
    GQA/, OCRVQA/, ScienceQA/, VisualGenome/    questions, problems and regions with pictures of their own
    llava/                              dialogues about pictures in A-OKVQA/train2017
    ocr/00000.tar ..., ocr_val/         twelve captions each of what can be read
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.synthetic import extra_datasets, writers
from aki_megatron.synthetic import questions as ask
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.synthetic.scene_pools import FIRST_HELD_OUT_ID, image_id, is_png, serves_2017
from aki_megatron.synthetic.scenes import Scene, SceneObject, draw_scene, paint, scene_rng

VERSION = 5
"""Raised when the same seed would give other bytes."""
MANIFEST = "manifest.json"
_PARTIAL = ".partial"
_PICTURES = ("VQA/train2014", "VQA/val2014", "A-OKVQA/train2017", "A-OKVQA/val2017", "vsr/val2017")
"""Of the captions' scenes; the added sets have their own."""
_SHARD_SCENES = 2500
_QUESTIONS_PER_SCENE = 2
_ATTEMPTS = 4
"""Draws of a task's question from a scene before the scene is taken not to carry one."""
_OTHERS_PER_SCENE = 2
"""Statements, choices and regions of a scene: two of each."""


@dataclass(frozen=True)
class DatasetSize:
    """Scenes to draw and the seed they follow from."""

    scenes: int = 20_000
    held_out: int = 2_000
    seed: int = 1

    def __post_init__(self) -> None:
        if not 5 <= self.scenes < FIRST_HELD_OUT_ID or self.held_out < 5 or self.seed < 0:
            raise DataError(
                f"scenes={self.scenes}, held_out={self.held_out}, seed={self.seed}: scenes must lie in "
                f"[5, {FIRST_HELD_OUT_ID - 1}], held_out must be at least 5 and seed at least 0"
            )

    @property
    def total(self) -> int:
        """Scenes to draw for the captions, and to draw or ask about for the sets beside them."""
        return self.scenes + self.held_out + extra_datasets.scenes_of_additions(self.scenes, self.held_out)


@dataclass
class _Rows:
    """What one split has gathered for each format."""

    vqav2: list[tuple[int, list[ask.Question]]] = field(default_factory=list)
    vsr: list[list[tuple[int, list[ask.Statement]]]] = field(default_factory=lambda: [[], []])
    aokvqa: list[tuple[int, list[ask.Choice]]] = field(default_factory=list)
    refcoco: list[tuple[int, str, list[tuple[SceneObject, str]]]] = field(default_factory=list)
    captions: list[tuple[str, str, bytes, str]] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)


def is_complete(root: Path, size: DatasetSize) -> bool:
    """Whether ``root`` holds this very data set, every annotation file intact and every picture there.

    Raises DataError when it holds a complete one of another size or seed: that is the user's to delete.
    """
    manifest = _read_manifest(root)
    if manifest is None or manifest["version"] != VERSION:
        return False
    found = DatasetSize(**manifest["size"])
    if found != size:
        raise DataError(
            f"{root} holds another data set: {found}, asked for {size}. Delete it or choose another folder."
        )
    files = manifest["sha256"].items()
    intact = all((root / name).is_file() and _sha256(root / name) == digest for name, digest in files)
    return intact and all(_count_pictures(root / name) == number for name, number in manifest["pictures"].items())


def was_interrupted(root: Path) -> bool:
    """Whether an earlier drawing into ``root`` did not finish."""
    return (root / _PARTIAL).exists()


def make_dataset(root: Path, size: DatasetSize, progress: Callable[[int], None]) -> dict[str, int]:
    """Draw the data set into ``root`` and return how many samples each part has.

    ``progress`` is called with the number of scenes done so far, of ``size.total``. Everything is written aside
    and moved into place at the end, the manifest last; what an interrupted call left behind is removed first.
    Raises DataError when ``root`` holds files that this function did not write.
    """
    _refuse_foreign(root)
    partial = root / _PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    for entry in partial.iterdir():  # the folder itself stays: it says that what lies beside it is ours
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in _PICTURES:
        (partial / name).mkdir(parents=True)
    counts: dict[str, int] = {}
    for split, number, before in (("train", size.scenes, 0), ("val", size.held_out, size.scenes)):
        rows = _Rows()
        for index in range(number):
            _draw(partial, size.seed, split, index, rows)
            progress(before + index + 1)
        counts |= _write_annotations(partial, split, rows)
    before = size.scenes + size.held_out
    counts |= extra_datasets.write_additions(
        partial, size.seed, size.scenes, size.held_out, lambda done: progress(before + done)
    )
    write_tokenizer(partial / "tokenizer")
    _write_manifest(partial, size, counts)
    (root / MANIFEST).unlink(missing_ok=True)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == MANIFEST):
        target = root / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.rename(target)
    partial.rmdir()
    return counts


def _draw(root: Path, seed: int, split: str, index: int, rows: _Rows) -> None:
    """Draw, encode and save one scene, and add everything that is asked about it to ``rows``.

    The remainder of the index by five says what the scene is for: 0 and 1 also serve VSR, A-OKVQA and LLaVA, 4 is a
    PNG (and so cannot serve VQAv2, whose file names end in .jpg); all serve captions and the three RefCOCOs.
    """
    rng = scene_rng(seed, split, index)
    scene = draw_scene(rng)
    pixels = paint(scene, rng)
    text_rng = random.Random(f"{seed}/{split}/{index}")
    number = image_id(split, index)
    extension = "png" if is_png(index) else "jpg"
    image = writers.encode_png(pixels) if is_png(index) else writers.encode_jpeg(pixels)
    rows.captions.append((f"{index:09}", extension, image, ask.caption(scene)))
    coco_name = f"COCO_train2014_{number:012}.{extension}"
    things = ask.regions(scene, text_rng, most=_OTHERS_PER_SCENE)
    rows.refcoco.append((number, coco_name, [(thing, thing.name) for thing in things]))
    files = [f"VQA/train2014/{coco_name}"]
    if not is_png(index):
        rows.vqav2.append((number, _open_questions(scene, text_rng, rows.tasks)))
        files += [f"VQA/val2014/COCO_val2014_{number:012}.jpg"] if split == "val" else []
    if serves_2017(index):
        rows.vsr[index % 5].append((number, [ask.statement(scene, text_rng) for _ in range(_OTHERS_PER_SCENE)]))
        rows.aokvqa.append((number, [ask.choice(scene, text_rng) for _ in range(_OTHERS_PER_SCENE)]))
        folders = ("A-OKVQA/train2017",) if split == "train" else ("A-OKVQA/val2017", "vsr/val2017")
        files += [f"{folder}/{number:012}.jpg" for folder in folders]
    for name in files:
        (root / name).write_bytes(image)


def _open_questions(scene: Scene, rng: random.Random, asked: Counter[str]) -> list[ask.Question]:
    """Up to two questions of different tasks, those first that lag most behind their share."""
    found: list[ask.Question] = []
    for task in sorted(ask.TASKS, key=lambda name: asked[name] / ask.SHARES[name]):
        if len(found) == _QUESTIONS_PER_SCENE:
            break
        drawn = (ask.TASKS[task](scene, rng) for _ in range(_ATTEMPTS))
        if question := next((one for one in drawn if one), None):
            found.append(question)
            asked[task] += 1
    return found


def _write_annotations(root: Path, split: str, rows: _Rows) -> dict[str, int]:
    """Write every annotation file and shard of one split; returns the number of samples of each."""
    captions = root / ("captions" if split == "train" else "captions_val")
    for shard, start in enumerate(range(0, len(rows.captions), _SHARD_SCENES)):
        writers.write_tar(captions / f"{shard:05}.tar", rows.captions[start : start + _SHARD_SCENES])
    writers.write_vqav2(root / "VQA", f"{split}2014", rows.vqav2)
    writers.write_aokvqa(root / f"A-OKVQA/aokvqa_v1p0_{split}.json", split, rows.aokvqa)
    writers.write_refcoco(root / f"ref/annotations/finetune_refcoco_{split}.json", rows.refcoco)
    if split == "train":
        writers.write_vsr(root / "vsr/train-random.jsonl", "train2017", sorted(rows.vsr[0] + rows.vsr[1]))
    else:
        for name, part in (("dev", rows.vsr[0]), ("test", rows.vsr[1])):
            writers.write_vsr(root / f"vsr/{name}-random.jsonl", "val2017", part)
    return {
        f"{split}/captions": len(rows.captions),
        **{f"{split}/vqav2/{task}": rows.tasks[task] for task in ask.TASKS},
        f"{split}/vsr": sum(len(made) for part in rows.vsr for _, made in part),
        f"{split}/aokvqa": sum(len(made) for _, made in rows.aokvqa),
        f"{split}/refcoco": sum(len(things) for _, _, things in rows.refcoco),
    }


def _write_manifest(root: Path, size: DatasetSize, counts: dict[str, int]) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".png"))
    manifest = {
        "version": VERSION,
        "size": {"scenes": size.scenes, "held_out": size.held_out, "seed": size.seed},
        "counts": counts,
        "pictures": {name: _count_pictures(root / name) for name in (*_PICTURES, *extra_datasets.PICTURES)},
        "sha256": {path.relative_to(root).as_posix(): _sha256(path) for path in files},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _read_manifest(root: Path) -> dict[str, Any] | None:
    """The manifest of a data set; None where there is none; DataError where a file of that name is something else."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if manifest.keys() >= {"version", "size", "counts", "pictures", "sha256"}:
            return manifest
    except (ValueError, AttributeError):
        pass
    raise DataError(f"{path} is not a manifest of make_data; delete the folder or choose another one.")


def _refuse_foreign(root: Path) -> None:
    """A folder with other things in it is not ours to fill: a mistyped --out must not cost anybody a file."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; give a folder.")
    if not root.exists() or was_interrupted(root) or _read_manifest(root) is not None:
        return
    foreign = sorted(entry.name for entry in root.iterdir())
    if foreign:
        raise DataError(f"{root} holds other files ({', '.join(foreign[:3])} ...); choose an empty or a new folder.")


def _count_pictures(folder: Path) -> int:
    return sum(name.endswith((".jpg", ".png")) for _, _, names in os.walk(folder) for name in names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
