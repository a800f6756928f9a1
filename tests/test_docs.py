"""The pages of docs/: generated ones are fresh, links lead somewhere."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

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


def _python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
