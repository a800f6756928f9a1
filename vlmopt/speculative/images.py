"""What generates images token by token: codes of a vector quantiser, and the tokens around them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt import families
from vlmopt.errors import PreconditionError
from vlmopt.speculative.decoders import TokenDecoder, text_decoder


@dataclass(frozen=True)
class ImageLayout:
    """Where the tokens of an image stand: rows of codes, and tokens whose places are fixed.

    Ids below ``codes`` are codes.

    Attributes:
        codes: how many the codebook has.
        rows: of codes.
        columns: codes in each row.
        row_end: id of the token behind each row, if there is one.
        endings: ids of the tokens behind the last row.
    """

    codes: int
    rows: int
    columns: int
    row_end: int | None = None
    endings: tuple[int, ...] = ()

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.codes + (self.row_end is not None) + len(self.endings)

    @property
    def tokens(self) -> int:
        """How many tokens one image has."""
        return self.rows * self._stride + len(self.endings)

    @property
    def _stride(self) -> int:
        return self.columns + (self.row_end is not None)

    def forced(self, index: int) -> int | None:
        """The only id that may stand at a place, or ``None`` where any code may.

        Raises:
            PreconditionError: an image has no such place.
        """
        if not 0 <= index < self.tokens:
            raise PreconditionError(
                f"an image has {self.tokens} tokens, and none at place {index}",
                hint="places count from 0, from the first token of the image on",
            )
        row, column = divmod(index, self._stride)
        if row == self.rows:
            return self.endings[column]
        return self.row_end if column == self.columns else None

    def codes_of(self, ids: Tensor) -> Tensor:
        """The codes of whole images, int64 ``[batch, rows, columns]``.

        Args:
            ids: int64 ``[batch, tokens]``.

        Raises:
            PreconditionError: so many tokens are no image, or another token stands for a code.
        """
        if ids.ndim != 2 or ids.shape[1] != self.tokens:
            raise PreconditionError(
                f"an image has {self.tokens} tokens, and these are {list(ids.shape)}",
                hint="pass one row of ids for each image",
            )
        body = ids[:, : self.rows * self._stride]
        found = body.unflatten(1, (self.rows, self._stride))[..., : self.columns]
        if bool(((found < 0) | (found >= self.codes)).any()):
            raise PreconditionError(
                "another token stands where a code of the image must",
                hint="draw each token from what ImageDecoder.allowed() allows there",
            )
        return found


class ImageDecoder(TokenDecoder):
    """The part of a model that generates images, over a vocabulary of its own.

    Ids are the codes of the codebook in their order, then the other tokens that an image is written
    with. Weights are those of the model, but for the rows of a head over a larger vocabulary, which
    are a copy.

    Args:
        embed: as of :class:`TokenDecoder`.
        decoder: likewise.
        head: likewise.
        autoencoder: a vector-quantised one, with its codebook in ``quantize.embedding``; to give
            pixels it needs ``decode``.
        layout: of one image.
        ids: int64 ``[vocabulary]``, the token of the whole model that each id is; ``None`` where
            codes are no tokens of that.

    Attributes:
        autoencoder: see above.
        layout: see above.
        ids: see above.
    """

    ids: Tensor | None

    def __init__(
        self,
        embed: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        *,
        autoencoder: nn.Module,
        layout: ImageLayout,
        ids: Tensor | None,
    ) -> None:
        super().__init__(embed, decoder, head)
        self.autoencoder: Any = autoencoder
        self.layout = layout
        self.register_buffer("ids", ids, persistent=False)

    @property
    def codebook(self) -> Tensor:
        """What codes look like: ``[codes, width]``, as stored, in the type of the model.

        An autoencoder may bring them to unit length when it decodes.
        """
        return _codebook(self.autoencoder).detach()

    @property
    def codes(self) -> int:
        """How many ids are codes."""
        return self.layout.codes

    @property
    def tokens(self) -> int:
        """How many tokens one image has."""
        return self.layout.tokens

    def allowed(self, index: int) -> Tensor | None:
        """Which ids may stand at a place, bool ``[vocabulary]``; ``None`` for all.

        Args:
            index: from 0, the first token of the image, on. Behind the last one, where drafts may
                reach, anything may stand.
        """
        layout = self.layout
        if index >= layout.tokens or layout.vocabulary == layout.codes:
            return None
        forced = layout.forced(index)
        places = torch.arange(layout.vocabulary, device=next(self.head.parameters()).device)
        return places < layout.codes if forced is None else places == forced

    def decode(self, ids: Tensor) -> Tensor:
        """Pixels of whole images, as the autoencoder gives them.

        Args:
            ids: int64 ``[batch, tokens]``.

        Returns:
            float ``[batch, channels, height, width]``, not scaled or clamped: the processor of the
            model does that.

        Raises:
            PreconditionError: the autoencoder only encodes, or the ids are no images.
        """
        if not hasattr(self.autoencoder, "decode"):
            raise PreconditionError(
                f"{type(self.autoencoder).__name__} makes codes of pixels, but no pixels of codes",
                hint="pass one that decodes: image_decoder(model, autoencoder=...)",
            )
        codes = self.layout.codes_of(ids)
        with torch.no_grad():
            pixels: Tensor = self.autoencoder.decode(
                codes if families.reads_rows(self.autoencoder) else codes.flatten(1)
            )
        return pixels


def image_decoder(
    model: Any, *, grid: tuple[int, int] | None = None, autoencoder: nn.Module | None = None
) -> ImageDecoder:
    """The part of a Hugging Face model that generates images.

    A model has an embedding and a head for codes, or a table of the tokens that these are among
    those of text. One that has neither writes the codes of ``autoencoder``, which are its first
    tokens: "Autoregressive Model Beats Diffusion", arXiv 2406.06525.

    Args:
        model: one whose decoder reads what it has written of an image, token by token.
        grid: rows and columns of codes, for a model whose images have many sizes.
        autoencoder: in place of that of the model, or for one that has none.

    Raises:
        PreconditionError: the model generates no images, some part that this takes is missing, or
            ``grid`` is missing or another than the autoencoder's.
    """
    own = _part(model, families.IMAGE_AUTOENCODERS)
    found = own if autoencoder is None else autoencoder
    if found is None:
        raise PreconditionError(
            f"{type(model).__name__} has no vector-quantised autoencoder, and so no codes to write "
            "images with",
            hint="pass the one whose codes it writes: image_decoder(model, autoencoder=...)",
        )
    layout = ImageLayout(len(_codebook(found)), *_grid(found, grid))
    parts = _code_vocabulary(model, layout.codes)
    if parts is not None:
        embed, head = parts
        decoder = model.get_decoder()
        return ImageDecoder(embed, decoder, head, autoencoder=found, layout=layout, ids=None).eval()
    table = _part(model, families.CODE_TABLES)
    if table is None and own is not None:
        raise PreconditionError(
            f"{type(model).__name__} has codes of images, but neither a head over them nor a table "
            "of the tokens that they are",
            hint="choose a model that generates images by itself",
        )
    text = text_decoder(model)
    layout, ids = _among_text(model, table, layout)
    head = _rows_of(text.head, ids, type(model).__name__)
    first = ids.equal(torch.arange(len(ids)))
    ids = ids.to(next(text.embed.parameters()).device)
    embed = text.embed if first else _SomeEmbeddings(text.embed, ids)
    return ImageDecoder(embed, text.decoder, head, autoencoder=found, layout=layout, ids=ids).eval()


def _code_vocabulary(model: Any, codes: int) -> tuple[nn.Module, nn.Module] | None:
    """The embedding and the head of codes that are no tokens of the text."""
    for names in families.IMAGE_VOCABULARIES:
        parts = {name: _part(model, (name,)) for name in names}
        missing = [name for name, part in parts.items() if part is None]
        if missing and len(missing) < len(names):
            raise PreconditionError(
                f"{type(model).__name__} has a vocabulary of images, but no {_some(missing)}",
                hint="load the class that generates images, such as ...ForConditionalGeneration",
            )
        if not missing:
            embed, aligner, head = parts.values()
            if embed.num_embeddings != codes:
                raise PreconditionError(
                    f"{type(model).__name__} writes images with {embed.num_embeddings} codes, and "
                    f"the autoencoder has {codes}",
                    hint="pass the autoencoder whose codes the model writes",
                )
            return nn.Sequential(embed, aligner), head
    return None


def _among_text(model: Any, table: Any, layout: ImageLayout) -> tuple[ImageLayout, Tensor]:
    """The layout with the tokens around codes, and which token of the text each id is."""
    if table is None:
        return layout, torch.arange(layout.codes)
    known = families.tokens_of_codes(table)
    row_end, endings = families.tokens_around_codes(table, model.config.get_text_config())
    missing = [f"code {code}" for code in range(layout.codes) if code not in known]
    missing += [name for name, token in endings.items() if token is None]
    if missing:
        raise PreconditionError(
            f"the vocabulary of {type(model).__name__} has no token for {_some(missing)}",
            hint="load the model with the vocabulary that it was trained with",
        )
    around = [*([] if row_end is None else [row_end]), *endings.values()]
    ids = torch.tensor([*(known[code] for code in range(layout.codes)), *around])
    if row_end is not None:
        layout = replace(
            layout, row_end=layout.codes, endings=tuple(range(layout.codes + 1, len(ids)))
        )
    return layout, ids


class _SomeEmbeddings(nn.Module):
    """The embedding of a larger vocabulary, under other ids."""

    ids: Tensor

    def __init__(self, embed: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.embed = embed
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embed(self.ids[input_ids])
        return embeds


def _rows_of(head: nn.Module, ids: Tensor, name: str) -> nn.Module:
    """A head over some tokens of its vocabulary; a copy of these rows, unless they are all."""
    if not isinstance(head, nn.Linear):
        raise PreconditionError(
            f"the head of {name} is a {type(head).__name__}, of which no rows can be taken",
            hint="load the model with a linear head: without quantisation of that layer",
        )
    if int(ids.max()) >= head.out_features:
        raise PreconditionError(
            f"an image is written with token {int(ids.max())}, and the head of {name} has "
            f"{head.out_features}",
            hint="pass the autoencoder whose codes the model writes",
        )
    if ids.equal(torch.arange(head.out_features)):
        return head
    ids = ids.to(head.weight.device)
    # no initial values: they would be drawn, and change what else is drawn
    with torch.device("meta"):
        rows = nn.Linear(head.in_features, len(ids), bias=head.bias is not None)
    rows.weight = nn.Parameter(head.weight.detach()[ids], requires_grad=False)
    if head.bias is not None:
        rows.bias = nn.Parameter(head.bias.detach()[ids], requires_grad=False)
    return rows


def _codebook(autoencoder: Any) -> Tensor:
    embedding = getattr(getattr(autoencoder, "quantize", None), "embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise PreconditionError(
            f"{type(autoencoder).__name__} has no codebook in quantize.embedding",
            hint="pass a vector-quantised autoencoder as those of transformers are",
        )
    return embedding.weight


def _grid(autoencoder: Any, grid: tuple[int, int] | None) -> tuple[int, int]:
    fixed, name = families.image_grid(autoencoder), type(autoencoder).__name__
    if grid is None and fixed is None:
        raise PreconditionError(
            f"images of {name} have many sizes, and none was said",
            hint="pass the rows and columns that the prompt asks for: grid=(rows, columns)",
        )
    if grid is not None and (min(grid) < 1 or fixed not in (None, grid)):
        told = (
            "a size is at least 1 x 1" if fixed is None else f"{name} has {fixed[0]} x {fixed[1]}"
        )
        raise PreconditionError(
            f"a grid of {grid[0]} x {grid[1]} codes was asked for, and {told}",
            hint="leave grid out where the model says it, and else pass that of the prompt",
        )
    found = fixed if grid is None else grid
    assert found is not None
    return found


def _part(model: Any, names: tuple[str, ...]) -> Any:
    """What a model, or the one that it wraps, calls by one of these names."""
    for holder in (model, model.base_model):
        for name in names:
            if (found := getattr(holder, name, None)) is not None:
                return found
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
