"""Run exported folders with whichever transformers comes first on PYTHONPATH; a subprocess of test_releases.py.

    python run_exported.py FOLDER ...   prints JSON: the release, and per folder logits, tokens and the chat template

The package is not imported: a folder must run with transformers and torch alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor


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
