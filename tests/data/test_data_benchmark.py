"""The data benchmark measures all parts and writes the results."""

import importlib.util
import json
from pathlib import Path

import pytest
from chat_folders import PHI3_LIKE

BENCH = Path(__file__).parents[2] / "tools/bench"


def test_the_benchmark_writes_what_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_data", BENCH / "data.py")
    tool, out = importlib.util.module_from_spec(spec), tmp_path / "rows.json"
    spec.loader.exec_module(tool)
    for name, value in {"SIZE": 16, "NUM_IMAGES": 32, "NUM_TARS": 4, "BATCH_SIZE": 2, "NUM_MICROBATCHES": 2}.items():
        monkeypatch.setattr(tool, name, value)
    small = ["--seconds", "0", "--workers", "0", "1", "--tars", "6", "--per_tar", "30", "--tokenizer", str(PHI3_LIKE)]
    assert tool.main([*small, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    loading = [row for row in rows if row["part"] == "loading"]
    assert [(row["what"], row["workers"]) for row in loading] == [
        (what, workers) for workers in (0, 1) for what in ("ours", "webdataset", "torch files")
    ]
    assert all(row["images_per_core_second"] > 0 and row["repeats"] == 2 for row in loading)
    assert loading[0]["ours_over_this"] == 1.0
    assert all(row["real_fraction"] > 0.95 for row in rows if row["part"] == "packing")
    assert "resume at sample 90 of 180" in rows[-1]["what"] and 0 < rows[-1]["seconds"] < 5
    assert "cores, load" in capsys.readouterr().out
