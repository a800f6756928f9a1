"""The tool that trains the bundled models that draw digits code by code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import train_digit_codes as tool
from digit_training import training_digits
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digit_codes
from vlmopt.digit_codes import CODE_WIDTH, CODES, NO_CLASS, TOKENS, Autoencoder
from vlmopt.digit_diffusion import labels_in_turn, pixels_of

pytest.importorskip("sklearn")


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LAYERS", 2), ("HIDDEN", 32), ("HEADS", 2), ("INNER", 48)):
        monkeypatch.setattr(tool, name, value)


def options(*more: str) -> Any:
    return tool.parse_arguments(["--out", "x", "--batch", "8", *more])


def test_everything_is_trained_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch)
    steps = ["--autoencoder-steps", "4", "--steps", "3", "--draft-steps", "2"]
    size = ["--batch", "8", "--sequences", "8", "--samples", "10", "--log-every", "2"]
    threads = ["--threads", str(torch.get_num_threads())]
    arguments = ["--out", str(tmp_path / "out"), *steps, *size, *threads]
    assert tool.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}     2" in printed for name in ("autoencoder", "model", "draft head"))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "README.md",
        "autoencoder.safetensors",
        "config.json",
        "draft_head.safetensors",
        "generation_config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "--autoencoder-steps 4 --steps 3 --draft-steps 2 --sequences 8 --minutes 36" in card
    assert "run is repeatable" in card
    for row in ("| held-out images | 99.", "| held-out images, coded", "| sampled, guidance 4 | "):
        assert row in card
    model = digit_codes.load_model(folder=tmp_path / "out")
    codes = digit_codes.sample(model, [1, 2])
    vq = digit_codes.load_vq(folder=tmp_path / "out")
    assert vq.decode(codes).shape == (2, 1, 16, 16)
    assert tool.main(arguments) == 2
    assert "--force" in capsys.readouterr().err


def test_codes_follow_features_and_come_back_to_use() -> None:
    start = F.normalize(torch.randn(CODES, CODE_WIDTH), dim=-1)
    book = tool.Book(start.clone(), 64, torch.Generator().manual_seed(0))
    features = F.normalize(torch.randn(2000, CODE_WIDTH), dim=-1)
    codes = torch.arange(2000) % 2 + 5  # all but 5 and 6 are out of use
    for _ in range(400):
        book.learn(features, codes, revive=False)
    centre = F.normalize(features[codes == 5].mean(0), dim=0)
    torch.testing.assert_close(book.codebook[5], centre, atol=1e-2, rtol=0)
    torch.testing.assert_close(book.codebook[7:], start[7:])
    book.learn(features, codes, revive=True)
    alike = book.codebook[7:] @ features.T
    torch.testing.assert_close(alike.max(1).values, torch.ones(CODES - 7))
    assert (alike.max(1).indices.unique()).numel() > 200


def test_the_autoencoder_learns() -> None:
    images = pixels_of(training_digits()[0])
    vq, outcome = tool.train_autoencoder(images, options("--autoencoder-steps", "150"))
    assert outcome.steps == 150
    error = (vq.decode(vq.encode(images)) - images).square().mean()
    assert error < 0.4 * images.var()
    assert len(vq.encode(images).unique()) > 40


def test_the_model_learns_and_labels_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    images, labels = training_digits()
    torch.manual_seed(0)
    model, vq = tool.build_model(), Autoencoder()
    told: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, given: told.append(given["input_ids"][:, 0]), with_kwargs=True
    )
    before = tool.heldout_loss(model, vq)
    told.clear()
    outcome = tool.train_model(model, vq, pixels_of(images), labels, options("--steps", "40"))
    assert outcome.steps == 40
    dropped = float((torch.cat(told) == NO_CLASS).float().mean())
    assert 0.04 < dropped < 0.18
    assert tool.heldout_loss(model, vq) < before - 0.3


def test_the_draft_head_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    images, labels = training_digits()
    torch.manual_seed(0)
    model, vq = tool.build_model().requires_grad_(False), Autoencoder()
    data = tool.draft_data(model, vq, pixels_of(images), labels, options("--sequences", "40"))
    assert data.codes.shape == (50, TOKENS)
    assert data.features.shape == (2, 50, TOKENS, 32)
    features = data.features.float()

    def error(steps: int) -> float:
        torch.manual_seed(0)
        chosen = options("--draft-steps", str(steps), "--lr", "0.01")
        head, outcome = tool.train_draft_head(model, data, chosen)
        assert outcome.steps == steps
        with torch.no_grad():
            found = tool.guess(head, model, data.codes[:, :-1], features[:, :, :-1])
        return float((found - features[:, :, 1:]).square().mean())

    assert error(150) < 0.6 * error(1)


def test_agreement_counts_places_and_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that knows the features agrees everywhere; one that knows some of them, there."""
    small(monkeypatch)
    torch.manual_seed(0)
    model = tool.build_model().eval().requires_grad_(False)
    labels = labels_in_turn(6)
    codes = torch.randint(CODES, (6, TOKENS))
    features = tool.Sequences.of(model, codes, labels).features.float()

    class Known(nn.Module):
        """Knows the features up to a place, and gives the first after it."""

        def __init__(self, up_to: int) -> None:
            super().__init__()
            self.up_to = up_to

        def forward(self, embeds: Tensor, given: Tensor, **options: Any) -> Any:
            known = features[:, :, 1 : 1 + embeds.shape[1]].clone()
            known[:, :, self.up_to :] = 0
            known[:, :, self.up_to :, 0] = 50.0
            return type("Found", (), {"last_hidden_state": known.flatten(0, 1)})

    whole = tool.agreement(model, Known(TOKENS), codes, labels, 2.0)
    assert whole.top == (1.0, 1.0, 1.0)
    assert whole.depths == (1.0,) * 4
    assert 0 < whole.mass[0] < whole.mass[1] < whole.mass[2] < 1
    part = tool.agreement(model, Known(21), codes, labels, 2.0)
    assert part.top[0] == pytest.approx(21 / 63, abs=0.1)
    # places 1 to 60 shift by the depth
    assert part.depths[1] == pytest.approx(20 / 60, abs=0.1)
    assert part.depths[3] == pytest.approx(18 / 60, abs=0.1)
