"""Drafts of diffusion transformers, and the loop of two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.denoising import draft as drafts
from vlmopt.denoising.frequency import fuse
from vlmopt.denoising.refinement import (
    PS_SR,
    Call,
    clean_estimates,
    fuse_estimates,
    moved,
    table_sigma,
)
from vlmopt.errors import OptionError, PreconditionError

diffusers = pytest.importorskip("diffusers")


def wan(layers: int = 6) -> Any:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def inputs(channels: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(1, channels, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([599.0]),
        "encoder_hidden_states": torch.randn(1, 3, 16, generator=generator),
    }


def test_blocks_of_the_card_are_kept() -> None:
    assert drafts.kept_blocks(30, 3) == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
    with pytest.raises(OptionError, match="one in 7"):
        drafts.kept_blocks(6, 7)


@torch.no_grad()
def test_taps_are_what_enters_the_blocks() -> None:
    base = wan()
    seen = []
    for at in (2, 5):
        base.blocks[at].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wanted = base(**inputs(), return_dict=False)[0]
    seen.clear()
    result, features = drafts.Tapped(base, (2, 5))(**inputs())
    assert result.equal(wanted)
    assert [one.equal(other) for one, other in zip(features, seen, strict=True)] == [True, True]
    assert features[0].shape == (1, 8, 24)
    # nothing stays behind
    assert all(len(block._forward_pre_hooks) <= 1 for block in base.blocks)


@torch.no_grad()
def test_an_untrained_draft_runs_kept_blocks_on_features_of_the_base() -> None:
    base = wan()
    draft: Any = drafts.make_draft(base, 3)
    assert draft.kept == (2, 5)
    assert len(base.blocks) == 6
    assert draft.transformer.config.num_layers == 2
    features = [torch.randn(1, 8, 24) for _ in draft.kept]
    for fusion, feature in zip(draft.fusions, features, strict=True):
        state = 100 * torch.randn(1, 8, 24)
        assert fusion(torch.cat([feature, state], -1)).equal(feature)
    entered = []
    last = draft.transformer.blocks[-1]
    last.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    draft(**inputs(), features=features)
    assert entered[0].equal(features[-1])
    # the draft's last block is the base's: with the same features, they say the same
    result, taps = drafts.Tapped(base, draft.kept)(**inputs())
    torch.testing.assert_close(draft(**inputs(), features=taps), result)
    assert draft.recipe()["kept"] == [2, 5]


def test_a_draft_learns() -> None:
    draft: Any = drafts.make_draft(wan(), 3)
    features = [torch.randn(1, 8, 24) for _ in draft.kept]
    draft(**inputs(), features=features).square().mean().backward()
    # the last map sees the state that the first block left
    assert draft.fusions[-1].weight.grad[:, 24:].abs().sum() > 0
    assert draft.transformer.blocks[0].attn1.to_q.weight.grad is not None


def test_a_draft_says_what_it_misses() -> None:
    draft = drafts.make_draft(wan(), 3)
    with pytest.raises(OptionError, match="tap the base at blocks 2, 5"):
        draft(**inputs(), features=[torch.zeros(1, 8, 24)])
    with pytest.raises(PreconditionError, match="features="):
        draft.transformer(**inputs())
    with pytest.raises(PreconditionError, match="no list of blocks"):
        drafts.make_draft(torch.nn.Linear(2, 2), 2)


@torch.no_grad()
def test_new_channels_count_nothing() -> None:
    base, wide = wan(), wan()
    drafts.widen_input(wide)
    one = inputs()
    two = {**one, "hidden_states": torch.cat([one["hidden_states"], torch.randn(1, 4, 2, 4, 4)], 1)}
    assert wide.config.in_channels == 8
    torch.testing.assert_close(
        wide(**two, return_dict=False)[0], base(**one, return_dict=False)[0], atol=1e-6, rtol=1e-5
    )


def test_sigmas() -> None:
    sigma = table_sigma()
    assert [sigma(call.at) for call in PS_SR] == pytest.approx([0.699, 0.599, 0.499, 0.399])
    assert sigma(0) == 0
    assert sigma(698.6) == pytest.approx(0.699)
    assert table_sigma(shift=3.0)(750) == pytest.approx(0.75, abs=1e-3)


def exact(clean: Tensor, start: Tensor) -> tuple[Any, Any, list[Tensor]]:
    """Models that know the velocity, and the latents they are given."""
    given: list[Tensor] = []
    velocity = (start - clean) / table_sigma()(PS_SR[0].at)

    def base(latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        given.append(latents)
        return velocity, [timesteps]

    def draft(latents: Tensor, timesteps: Tensor, features: Sequence[Tensor]) -> Tensor:
        given.append(latents)
        assert features[0].tolist() == [699.0] * len(latents)
        return velocity

    return base, draft, given


def test_an_exact_velocity_finds_the_clean_latents_at_every_call() -> None:
    clean, start = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    base, draft, given = exact(clean, start)
    found = clean_estimates(base, draft, start)
    assert len(found) == 4
    for estimate in found:
        torch.testing.assert_close(estimate, clean, atol=1e-6, rtol=1e-5)
    after = clean + 0.599 / 0.699 * (start - clean)
    torch.testing.assert_close(given[1], torch.cat([after, start], 1), atol=1e-6, rtol=1e-5)
    velocity = (start - clean) / 0.699
    torch.testing.assert_close(moved(start, velocity, 0.699, 0), clean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([], "begins with the base"),
        ([Call("draft", 699, 0)], "begins with the base"),
        ([Call("base", 699, 599), Call("draft", 499, 0)], "ends at timestep 599"),
    ],
)
def test_bad_schedules(schedule: list[Call], message: str) -> None:
    clean, start = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3)
    base, draft, _ = exact(clean, start)
    with pytest.raises(OptionError, match=message):
        clean_estimates(base, draft, start, schedule=schedule)


def test_images_are_fused_once_or_after_each_draft() -> None:
    estimates = [torch.rand(2, 3, 9, 11) for _ in PS_SR]
    decoded: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        decoded.append(latents)
        return latents

    once = fuse_estimates(PS_SR, estimates, decode)
    assert len(decoded) == 2
    assert once.equal(fuse(estimates[0], estimates[3]))
    each = fuse_estimates(PS_SR, estimates, decode, fdu="each", alpha=0.8)
    wanted = estimates[0]
    for sharp in estimates[1:]:
        wanted = fuse(wanted, sharp, alpha=0.8)
    assert each.equal(wanted)
    with pytest.raises(OptionError, match="once or each"):
        fuse_estimates(PS_SR, estimates, decode, fdu="twice")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nothing can be fused"):
        fuse_estimates(PS_SR[:1], estimates[:1], decode)


def test_frames_of_videos_are_fused_one_by_one() -> None:
    estimates = [torch.rand(2, 3, 4, 9, 11) for _ in PS_SR]
    out = fuse_estimates(PS_SR, estimates, lambda latents: latents)
    assert out.shape == (2, 3, 4, 9, 11)
    assert out[:, :, 1].equal(fuse(estimates[0][:, :, 1], estimates[3][:, :, 1]))


@torch.no_grad()
def test_base_and_draft_of_a_transformer_in_the_loop() -> None:
    transformer = wan()
    drafts.widen_input(transformer)
    draft = drafts.make_draft(transformer, 3)
    base = drafts.Tapped(transformer, draft.kept)
    text = inputs()["encoder_hidden_states"]
    start = inputs()["hidden_states"]
    found = clean_estimates(
        lambda latents, at: base(latents, timestep=at, encoder_hidden_states=text),
        lambda latents, at, features: draft(
            latents, timestep=at, encoder_hidden_states=text, features=features
        ),
        start,
    )
    assert [estimate.shape for estimate in found] == [start.shape] * 4
    velocity, _ = base(
        torch.cat([start, start], 1), timestep=torch.tensor([699.0]), encoder_hidden_states=text
    )
    torch.testing.assert_close(found[0], start - 0.699 * velocity)
