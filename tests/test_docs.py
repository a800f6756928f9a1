"""The pages of docs/: generated ones are fresh, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_pages_parses(page: Path) -> None:
    for block in _python_blocks(page):
        compile(block, page.name, "exec")


def test_the_pass_of_the_guide_works(tmp_path: Path) -> None:
    script = tmp_path / "guide.py"
    script.write_text("\n".join(_python_blocks(ROOT / "docs" / "adding-a-method.md")))
    given = {"model": zoo.build("llava"), "inputs": zoo.inputs("llava")}
    scope = runpy.run_path(str(script), init_globals=given)
    hidden = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    assert scope["NormDrop"].score(hidden).tolist() == [[5.0, 1.0]]
    assert [cut.visual for cut in scope["program"]["language_model"].cuts] == [((16, 8),)]


def test_the_program_of_the_guide_to_denoising_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two blocks of the bundled model, and without a compiler."""
    pytest.importorskip("diffusers")
    from vlmopt import digit_diffusion

    load = digit_diffusion.load_model

    def load_some() -> Any:
        model: Any = load()
        model.transformer_blocks = model.transformer_blocks[:2]
        return model

    monkeypatch.setattr(digit_diffusion, "load_model", load_some)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(_python_blocks(ROOT / "docs" / "denoising.md")))
    scope = runpy.run_path(str(script))
    full, fast, again = (scope[name] for name in ("full", "fast", "again"))
    assert 0 < (fast - full).abs().mean() < 0.2
    torch.testing.assert_close(again, fast, rtol=0, atol=1e-4)
    assert scope["plan"].anchors[0] == 0 and len(scope["plan"].anchors) == 6
    assert scope["video"].shape == (1, 3, 2, 4, 4)


def test_the_page_on_speculative_decoding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(_python_blocks(ROOT / "docs" / "speculative.md")))
    scope = runpy.run_path(str(script))
    assert scope["drawn"].tokens.shape == (64,)
    assert scope["image"].shape == (1, 1, 16, 16)
    per_forward, skipped = (float(text) for text in capsys.readouterr().out.split())
    assert per_forward > 1 and 0 < skipped < 0.5


def _python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
