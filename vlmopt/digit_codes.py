"""Bundled models that draw handwritten digits code by code, for speculative decoding of images.

A small autoencoder turns an image into a grid of codes of a learnt codebook (VQ-VAE,
arXiv 1711.00937, with codes of unit length as in arXiv 2110.04627); a ``LlamaForCausalLM`` that is
told the digit predicts the codes one after the other, row by row (LlamaGen, arXiv 2406.06525); a
draft head guesses its features (EAGLE, arXiv 2401.15077). All three come out of
``tools/train_digit_codes.py``. The judge of what is drawn is that of ``vlmopt.digit_diffusion``.

transformers is imported only by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt.digit_diffusion import CLASSES
from vlmopt.digits import CELL_PIXELS
from vlmopt.errors import OptionError
from vlmopt.speculative.distribution import Sampling, guided

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from vlmopt.speculative.decoders import TokenDecoder
    from vlmopt.speculative.eagle import EagleHead

CODES = 256
"""Entries of the codebook; a code is the token of the same number."""
CODE_WIDTH = 8
"""Values of an entry."""
SIDE = CELL_PIXELS // 2
"""Rows, and columns, of the grid of codes."""
TOKENS = SIDE**2
"""Codes of an image."""
NO_CLASS = CODES + CLASSES
"""Token in the place of the digit in the unconditional half of classifier-free guidance."""
VOCABULARY = NO_CLASS + 1
"""Tokens: the codes, the ten digits, and the one for none."""
DRAFT_LAYERS = 1
"""Decoder layers of the draft head."""
SAMPLING = Sampling(top_k=20, guidance=2.0)
"""How images are drawn unless told otherwise."""

AUTOENCODER_FILE = "autoencoder.safetensors"
DRAFT_FILE = "draft_head.safetensors"


class Autoencoder(nn.Module):
    """Images to codes, and back.

    Attributes:
        codebook: float ``[CODES, CODE_WIDTH]``, of unit length: codes that look alike are near.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, CODE_WIDTH, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_WIDTH, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels // 2, 1, 3, padding=1),
        )
        self.codebook = nn.Parameter(F.normalize(torch.randn(CODES, CODE_WIDTH), dim=-1))

    def features(self, images: Tensor) -> Tensor:
        """What codes stand for, of unit length: ``[N, TOKENS, CODE_WIDTH]``.

        Args:
            images: ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 (black) to 1.
        """
        return F.normalize(self.encoder(images).flatten(2).transpose(1, 2), dim=-1)

    def nearest(self, features: Tensor) -> Tensor:
        """The codes nearest to ``[..., CODE_WIDTH]``: int64 ``[...]``, of equal ones the lower."""
        return (
            torch.cdist(features.flatten(0, -2), self.codebook)
            .argmin(-1)
            .view(*features.shape[:-1])
        )

    def draw(self, features: Tensor) -> Tensor:
        """Images of ``[N, TOKENS, CODE_WIDTH]``, which may lie a little beyond -1 to 1."""
        grid = features.transpose(1, 2).reshape(-1, CODE_WIDTH, SIDE, SIDE)
        return cast(Tensor, self.decoder(grid))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of images, row by row.

        Args:
            images: ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 (black) to 1.

        Returns:
            int64 ``[N, TOKENS]``.
        """
        return self.nearest(self.features(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes: int64 ``[N, TOKENS]``.

        Returns:
            ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 (black) to 1.

        Raises:
            OptionError: there are more or fewer tokens to an image, or some are no codes.
        """
        if codes.ndim != 2 or codes.shape[1] != TOKENS:
            raise OptionError(
                f"codes have the shape {list(codes.shape)}",
                hint=f"an image has {TOKENS} codes: [images, {TOKENS}], prompts cut off",
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < CODES:
            raise OptionError(
                f"tokens from {int(codes.min())} to {int(codes.max())} are not all codes",
                hint=f"codes are 0 to {CODES - 1}; behind them come the digits of prompts",
            )
        return self.draw(self.codebook[codes]).clamp(-1, 1)


def asset_dir() -> Path:
    """Folder of the bundled models: weights, configuration, model card."""
    return Path(str(resources.files("vlmopt") / "assets" / "digit_codes"))


def load_vq(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> Autoencoder:
    """The bundled autoencoder in evaluation mode on the CPU.

    Args:
        dtype: of the weights; they are stored in float16.
        folder: to load from; that of the bundled models by default.
    """
    return cast(Autoencoder, _filled(Autoencoder(), AUTOENCODER_FILE, dtype, folder))


def load_model(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> LlamaForCausalLM:
    """The bundled next-code model in evaluation mode on the CPU, without network access.

    Its prompt is one token, see :func:`prompts`; ``TOKENS`` codes follow. No token ends an image:
    ``generate`` stops there of itself, and gives no other tokens than codes, since the generation
    configuration says so.

    Args:
        dtype: of the weights; they are stored in float16.
        folder: to load from; that of the bundled models by default.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(
        asset_dir() if folder is None else folder,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
    )
    return cast("LlamaForCausalLM", model.eval())


def code_decoder(model: LlamaForCausalLM) -> TokenDecoder:
    """The next-code model with logits of the codes alone: no digit is drawn in the place of a code.

    Weights are shared with ``model``.
    """
    from vlmopt.speculative.decoders import text_decoder

    decoder = text_decoder(model)
    head = nn.Linear(model.config.hidden_size, CODES, bias=False)
    weight = cast(Tensor, decoder.head.weight)
    head.weight = nn.Parameter(weight[:CODES], requires_grad=False)
    decoder.head = head
    return decoder.eval()


def load_draft_head(dtype: torch.dtype = torch.float32, folder: Path | None = None) -> EagleHead:
    """The draft head of the next-code model, in evaluation mode on the CPU.

    Args:
        dtype: of the weights; they are stored in float16.
        folder: to load from; that of the bundled models by default.
    """
    from transformers import LlamaConfig

    from vlmopt.speculative.eagle import EagleHead

    config = LlamaConfig.from_pretrained(
        asset_dir() if folder is None else folder, local_files_only=True
    )
    config._attn_implementation = "sdpa"
    head = EagleHead(config, DRAFT_LAYERS)
    return cast("EagleHead", _filled(head, DRAFT_FILE, dtype, folder))


def _filled(module: nn.Module, name: str, dtype: torch.dtype, folder: Path | None) -> nn.Module:
    from safetensors.torch import load_file

    module.load_state_dict(load_file((asset_dir() if folder is None else folder) / name))
    return module.to(dtype).eval()


def prompts(labels: Sequence[int] | Tensor) -> Tensor:
    """Prompts for classifier-free guidance: the digits, then as many times none.

    Args:
        labels: ``B`` digits, 0 to 9.

    Returns:
        int64 ``[2 * B, 1]``; the first half alone serves without guidance.

    Raises:
        OptionError: a label is no digit.
    """
    told = torch.as_tensor(labels, dtype=torch.int64).reshape(-1, 1)
    if told.numel() and not 0 <= int(told.min()) <= int(told.max()) < CLASSES:
        raise OptionError(
            f"labels from {int(told.min())} to {int(told.max())} are not all digits",
            hint=f"labels are 0 to {CLASSES - 1}; the half without a class is added here",
        )
    return torch.cat([CODES + told, torch.full_like(told, NO_CLASS)])


@torch.no_grad()
def sample(
    model: Any, labels: Sequence[int] | Tensor, sampling: Sampling = SAMPLING, *, seed: int = 0
) -> Tensor:
    """Draws the codes of one image for each label, one code at a time; never another token.

    Args:
        model: the next-code model, or what is called like it.
        labels: ``B`` digits.
        sampling: how codes are drawn; guidance doubles the batch.
        seed: of the draw.

    Returns:
        int64 ``[B, TOKENS]``.
    """
    generator = torch.Generator().manual_seed(seed)
    given = prompts(labels)
    number = len(given) // 2
    halves = 1 if sampling.guidance is None else 2
    given, cache, drawn = given[: halves * number], None, []
    for _ in range(TOKENS):
        found = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        logits = found.logits[:, -1, :CODES]
        if sampling.guidance is not None:
            logits = guided(logits, sampling.guidance)
        chances = sampling.distribution(logits)
        if sampling.greedy:
            code = chances.argmax(-1, keepdim=True)
        else:
            code = torch.multinomial(chances, 1, generator=generator)
        drawn.append(code)
        given = code.repeat(halves, 1)
    return torch.cat(drawn, 1)


def decode(codes: Tensor, vq: Autoencoder | None = None) -> Tensor:
    """Images of codes, by the bundled autoencoder or ``vq``; see :meth:`Autoencoder.decode`."""
    return (load_vq() if vq is None else vq).decode(codes)
