"""Tiny diffusion transformers of diffusers, with random weights, and inputs for one step of each.

Their outputs and gates start at zero in diffusers: here all weights are random, so that whatever a
branch computes can be seen in the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Denoiser:
    """A family.

    Attributes:
        build: the model, before its weights are made random.
        inputs: keyword inputs of a step, for a batch of so many samples; without the sample.
        sample: shape of the latent of one sample, or of its tokens.
        integer: timesteps are int64.
    """

    build: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    sample: tuple[int, ...]
    integer: bool = False


def _dit() -> Any:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )


def _pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=2,
        norm_num_groups=1,
        use_additional_conditions=False,
    )


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )


def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(1,),
        qk_norm="rms_norm",
    )


def _wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=16,
    )


def _text(batch: int, tokens: int = 6, width: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def _pooled(batch: int) -> Tensor:
    return _text(batch, width=20, seed=2)[:, 0]


def _class_labels(batch: int) -> dict[str, Any]:
    return {"class_labels": torch.arange(batch) % 10}


def _pixart_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 6)
    mask[:, 5] = 0
    return {
        "encoder_hidden_states": _text(batch),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _flux_inputs(batch: int) -> dict[str, Any]:
    rows = torch.arange(16)
    return {
        "encoder_hidden_states": _text(batch),
        "pooled_projections": _pooled(batch),
        "img_ids": torch.stack([torch.zeros(16), rows // 4, rows % 4], -1),
        "txt_ids": torch.zeros(6, 3),
    }


def _sd3_inputs(batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(batch), "pooled_projections": _pooled(batch)}


def _wan_inputs(batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": _text(batch)}


DENOISERS = {
    "dit": Denoiser(_dit, _class_labels, (4, 8, 8), integer=True),
    "pixart": Denoiser(_pixart, _pixart_inputs, (4, 8, 8), integer=True),
    "flux": Denoiser(_flux, _flux_inputs, (16, 16)),
    "sd3": Denoiser(_sd3, _sd3_inputs, (4, 8, 8)),
    "wan": Denoiser(_wan, _wan_inputs, (4, 2, 4, 4)),
}


@functools.cache
def build(name: str) -> Any:
    """The model in eval mode, the same at each call."""
    torch.manual_seed(0)
    model = DENOISERS[name].build().eval()
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        spread = 1.2 / weight.shape[-1] ** 0.5 if weight.ndim > 1 else 0.3
        weight.data = torch.randn(weight.shape, generator=generator) * spread
    return model


def inputs(name: str, batch: int = 2, *, seed: int = 0) -> dict[str, Any]:
    """Keyword inputs of ``forward`` for one step."""
    family = DENOISERS[name]
    generator = torch.Generator().manual_seed(seed)
    step = torch.full((batch,), 500) if family.integer else torch.full((batch,), 0.5)
    return {
        "hidden_states": torch.randn(batch, *family.sample, generator=generator),
        "timestep": step,
        **family.inputs(batch),
        "return_dict": False,
    }


# -- pipelines ---------------------------------------------------------------------------------


class _NoDecoder(nn.Module):
    """Stands for the decoder of a pipeline that must have one, and remembers the latents."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1, 1, 1, 1))
    dtype = torch.float32
    device = torch.device("cpu")

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return SimpleNamespace(sample=latents)


def pipeline(name: str, model: Any) -> Any:
    """A diffusers pipeline around a denoiser, without encoders and decoders."""
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    texts: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
    pipe: Any
    if name == "dit":
        pipe = diffusers.DiTPipeline(model, _NoDecoder(), diffusers.DDIMScheduler())
    elif name == "pixart":
        solver = diffusers.DPMSolverMultistepScheduler()
        pipe = diffusers.PixArtAlphaPipeline(**texts, vae=None, transformer=model, scheduler=solver)
    elif name == "flux":
        texts |= {"tokenizer_2": None, "text_encoder_2": None}
        pipe = diffusers.FluxPipeline(flow, None, transformer=model, **texts)
    elif name == "sd3":
        texts |= {f"{part}_{at}": None for part in list(texts) for at in (2, 3)}
        pipe = diffusers.StableDiffusion3Pipeline(model, flow, None, **texts)
    else:
        pipe = diffusers.WanPipeline(**texts, vae=None, scheduler=flow, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(name: str, *, guided: bool, steps: int = 6, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a call of :func:`pipeline` for one sample."""
    generator = torch.Generator().manual_seed(seed)
    common = {"num_inference_steps": steps, "generator": generator}
    if name == "dit":
        # the class that stands for none is the last of the model's
        return {**common, "class_labels": [3], "guidance_scale": 4.0 if guided else 1.0}
    text, none = _text(1, seed=4), _text(1, seed=5)
    common |= {"prompt_embeds": text, "output_type": "latent"}
    common |= {"negative_prompt_embeds": none} if guided else {}
    if name == "pixart":
        mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
        common |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        common |= {"height": 64, "width": 64, "use_resolution_binning": False}
        common |= {"negative_prompt": None}
    if name in ("flux", "sd3"):
        common |= {"pooled_prompt_embeds": _pooled(1), "height": 64, "width": 64}
        if guided:
            common |= {"negative_pooled_prompt_embeds": -_pooled(1)}
    if name == "wan":
        common |= {"height": 32, "width": 32, "num_frames": 5}
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    return {**common, scale: 4.0 if guided else 1.0}


def sample(pipe: Any, name: str, *, guided: bool, steps: int = 6, seed: int = 0) -> Tensor:
    """The latents that a pipeline makes."""
    result = pipe(**call(name, guided=guided, steps=steps, seed=seed))[0]
    latents: Tensor = pipe.vae.latents if name == "dit" else result
    return latents
