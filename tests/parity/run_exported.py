"""Run exported folders with whichever transformers comes first on PYTHONPATH; a subprocess of test_releases.py.

    python run_exported.py FOLDER ...   prints JSON: the release, and per folder logits, tokens and the chat template

The package is not imported: a folder must run with transformers and torch alone.
"""

import io
import json
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available


def run_model_card(folder: Path) -> list[str]:
    """What the examples of the folder's README.md print, in their order, with its names kept between them."""
    examples = re.findall("```python\\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    printed = []
    os.chdir(folder)
    for example in examples:
        with redirect_stdout(io.StringIO()) as output:
            exec(example, names)
        printed.append(output.getvalue().removesuffix("\n"))
    return printed


def check_images(folder: Path, path: str) -> None:
    """An image comes as a path, a PIL image, an array or a tensor, through either processor."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image_processor = processor.image_processor
    # some releases refuse to load any image processor by itself where torchvision is missing
    if is_torchvision_available() or "torchvision" not in getattr(AutoImageProcessor, "_backends", ()):
        image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(image_processor).__name__ == "AkiImageProcessor"
    array = np.asarray(Image.open(path))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = image_processor(path)["pixel_values"]
    for image in (Image.open(path), array, tensor):
        assert np.array_equal(image_processor(image)["pixel_values"], expected)
        assert np.array_equal(processor(text="<image>", images=image)["pixel_values"], expected)
    assert torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], torch.from_numpy(expected))


def check_base_model(folder: Path, model: Any, batch: dict[str, Any]) -> None:
    """AutoModel gives the hidden states that the LM head takes."""
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    states = base(**batch).last_hidden_state
    assert torch.equal(model.lm_head(states)[..., :2], model(**batch).logits[..., :2])


@torch.no_grad()
def outputs(folder: Path) -> dict[str, Any]:
    """Logits at valid positions, greedy tokens with everything and of text alone, chat template of the folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    given = torch.load(folder / "inputs.pt")
    batch, alone = given["batch"], given["alone"]
    settings = {"do_sample": False, "pad_token_id": 39, "eos_token_id": 41, "max_new_tokens": 10}
    ids = batch["input_ids"]
    found = {
        "logits": model(**batch).logits[batch["attention_mask"] == 1].tolist(),
        "tokens": model.generate(**batch, **settings)[:, ids.shape[1] :].tolist(),
        "alone": model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :].tolist(),
        "embedding": len(model.get_input_embeddings().weight),
    }
    if (folder / "processor_config.json").exists():
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        text = processor.apply_chat_template(given["messages"], add_generation_prompt=True)
        inputs = processor(text=[text], images=given["image"], truncation=False)
        assert processor.model_input_names == list(inputs)
        check_images(folder, given["image"])
        check_base_model(folder, model, batch)
        found["card"] = run_model_card(folder)
        found["chat"] = [
            text,
            inputs["input_ids"],
            inputs["modality_ids"],
            torch.tensor(inputs["pixel_values"]).tolist(),
        ]
    try:
        model(alone["input_ids"], past_keys=object())
        found["refused"] = "nothing"
    except ValueError as error:
        found["refused"] = str(error)
    return found


if __name__ == "__main__":
    by_folder = {folder: outputs(Path(folder)) for folder in sys.argv[1:]}
    print(json.dumps({"release": transformers.__version__, "outputs": by_folder}))
