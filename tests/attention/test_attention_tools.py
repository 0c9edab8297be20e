"""The attention tools do what their help says."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aki_megatron.config.attention import ATTENTION_RULES

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a tool by its path below tools/, as Python does when it runs it."""

    def load(name: str) -> ModuleType:
        path = TOOLS / name
        monkeypatch.syspath_prepend(str(path.parent))
        for module in ("attention", "attention_cases"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_show_mask_draws_every_rule(load: object, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tool, out = load("show_mask.py"), tmp_path / "mask.png"
    text = "<image> Why ? <|assistant|> => So ."
    assert tool.parse_text(text, 1)[1] == [3, 1, 1, 1, 2, 2]
    assert tool.main(["--text", text, "--latents", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert f"6 tokens, rules {', '.join(ATTENTION_RULES)}" in capsys.readouterr().out
    assert tool.main(["--text", text, "--latents", "5", "--rules", "cca", "--out", str(out)]) == 2
    assert "square" in capsys.readouterr().err


def test_the_benchmark_writes_what_it_measured(
    load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tool = load("bench/attention.py")
    small = tool.Case("small", ((300,),), 600, 1)
    monkeypatch.setattr(tool, "cases", lambda: [small])
    out = tmp_path / "rows.json"
    assert tool.main(["--repeats", "1", "--dtypes", "float32", "--device", "cpu", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["variant"] for row in rows] == ["causal", "mma", "dense bool"]
    assert all({"case", "variant", "dtype", "ratio_to_causal", "peak_mib"} <= row.keys() for row in rows)
    assert rows[0]["ratio_to_causal"] == 1.0
    assert 0 < rows[1]["outside_kernels"] < 1
    assert "small" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_gate_says_that_there_is_no_gpu(load: object, capsys: pytest.CaptureFixture) -> None:
    assert load("bench/gpu_gate.py").main([]) == 0
    assert "No CUDA GPU here" in capsys.readouterr().out
