"""tools/demo_page.py: serves the page until a signal, opens a browser where there is a screen, says what is missing."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_models import tiny_model

from aki_megatron.evaluate import model_loading
from tools import demo_page


@pytest.mark.parametrize("compare", [False, True])
def test_the_page_is_served_until_a_signal(
    compare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
    opened: list[str] = []
    seen: list[Any] = []
    monkeypatch.setattr(model_loading, "load_saved_model", lambda path, **settings: tiny_model(path))
    monkeypatch.setattr(demo_page.webbrowser, "open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    announce = demo_page.announce

    def announced(address: str, **settings: Any) -> None:
        announce(address, **settings)

        def visit() -> None:
            try:
                seen.extend(httpx.get(f"{address}{path}", timeout=300) for path in ("", "page/setup"))
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=visit).start()

    monkeypatch.setattr(demo_page, "announce", announced)
    arguments = [str(runs[0]), "--device", "cpu", *(["--compare", str(runs[1])] if compare else ["--no_browser"])]
    assert demo_page.main(arguments) == 0
    page, setup = seen
    assert page.status_code == 200 and "<title>Ask about a picture</title>" in page.text
    names = [model["id"] for model in setup.json()["models"]]
    assert names == [str(runs[0]), str(runs[1]) if compare else f"{runs[0]} (causal)"]
    assert len(setup.json()["examples"]) == demo_page.NUM_EXAMPLES
    printed = capsys.readouterr().out
    assert printed.startswith("The page is at http://127.0.0.1:")
    assert opened == ([printed.split()[4]] if compare else [])


def test_a_missing_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo_page.main(["runs/demo/sft"]) == 2
    assert capsys.readouterr().err == "demo_page: runs/demo/sft does not exist; make demo trains it.\n"
    assert demo_page.main([str(tmp_path), "--compare", "other"]) == 2
    assert "other does not exist; give a run folder" in capsys.readouterr().err
    assert demo_page.main([str(tmp_path), "--device", "cpu", "--no_browser"]) == 2
    assert capsys.readouterr().err.startswith("demo_page: ")
