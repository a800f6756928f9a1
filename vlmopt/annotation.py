"""``vlmopt.annotate``: visual tokens for ``torch.compile`` in models that break into many graphs.

Where the code before a model's decoder breaks, Dynamo's graph of the decoder does not show which
tokens come from vision. An annotated model reads that off the ids of its prompt, in plain Python,
and its decoder hands it to Dynamo as an operator at the head of a graph of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip

from vlmopt import families
from vlmopt.errors import NoVisualTokensError, PreconditionError
from vlmopt.graph.operators import kept_tokens, mark_tokens


def annotate(model: nn.Module) -> Annotation:
    """Let ``torch.compile(model, backend="vlmopt", options={"passes": ...})`` see visual tokens.

    Needed where the backend warns that a graph break hides them; also lets samples of a batch hold
    different numbers of visual tokens, and a model compute its loss from ``labels`` after tokens
    were dropped. Call it before ``torch.compile``. A model that is not compiled runs as before.

    Args:
        model: a Hugging Face vision-language model (with ``get_decoder()`` and the ids of its
            image and video placeholders in its config). Its ``forward``, that of its decoder and
            its ``loss_function`` are replaced until :meth:`Annotation.remove`.

    Returns:
        The annotation: undo it with ``remove()``, or use it as a context manager. Annotating a
        model again returns the one it has.

    Raises:
        NoVisualTokensError: the model's config names no placeholder of images or videos.
        PreconditionError: the model has no decoder.
    """
    existing = vars(model).get("forward")
    if isinstance(existing, _ModelForward):
        return existing.annotation
    name = type(model).__name__
    find_decoder = getattr(model, "get_decoder", None)
    decoder = find_decoder() if find_decoder is not None else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise PreconditionError(
            f"{name} has no decoder to annotate (get_decoder() of Hugging Face models)",
            hint="annotate the whole vision-language model, not a part of it",
        )
    visual_ids = families.visual_token_ids(getattr(model, "config", None))
    if not visual_ids:
        raise NoVisualTokensError(
            f"the config of {name} has none of "
            f"{', '.join(families.VISUAL_TOKEN_ATTRIBUTES)}: none of its tokens comes from vision",
            hint="a model without images needs no annotation",
        )
    return Annotation(model, decoder, visual_ids)


@dataclass(frozen=True)
class _Prompt:
    """Which tokens of the running prompt come from vision: bool ``[batch, tokens]``."""

    mask: Tensor
    counts: tuple[int, ...]


_running: list[Annotation] = []


def annotated_model_runs() -> bool:
    """Whether the code that is being compiled belongs to an annotated model."""
    return bool(_running)


class Annotation:
    """What :func:`annotate` did to a model, and how to undo it.

    Attributes:
        kept: after a forward through compiled code in which passes dropped tokens: int64
            ``[batch, tokens left]``, the slot in the prompt of each row of the logits; -1 marks a
            filler, whose logits mean nothing. ``None`` after any other forward.
    """

    def __init__(self, model: Any, decoder: Any, visual_ids: tuple[int, ...]) -> None:
        self.kept: Tensor | None = None
        self._visual_ids = visual_ids
        self._prompt: _Prompt | None = None
        self._model, self._decoder = model, decoder
        self._restore: list[tuple[nn.Module, str, Any]] = []
        self._replace(model, "forward", _ModelForward(self, model.forward))
        self._replace(decoder, "forward", _DecoderForward(self, decoder.forward))
        if hasattr(model, "loss_function"):
            self._loss_of_all: Callable[..., Tensor] = model.loss_function
            self._replace(model, "_loss_function", self._loss)

    def remove(self) -> None:
        """Make the model what it was. Compiled code that is left runs without passes."""
        while self._restore:
            module, name, value = self._restore.pop()
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        self._restore.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    def _read(self, ids: Tensor | None) -> _Prompt | None:
        if ids is None:
            warnings.warn(
                "vlmopt: an annotated model finds visual tokens by input_ids, but was called "
                "without: its passes do not apply",
                stacklevel=2,
            )
            return None
        mask = torch.isin(ids, torch.tensor(self._visual_ids, device=ids.device))
        counts = tuple(mask.sum(1).tolist())
        return _Prompt(mask, counts) if any(counts) else None

    def _loss(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The model's loss; each token that is left keeps the label it had."""
        kept = self.kept
        if kept is not None and kept.shape == logits.shape[:2]:
            ignored = kwargs.get("ignore_index", -100)
            following = kwargs.pop("shift_labels", None)
            if following is None:
                following = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
            left = following.gather(1, kept.clamp(min=0))
            kwargs["shift_labels"] = left.masked_fill(kept < 0, ignored)
        return self._loss_of_all(logits, labels, *args, **kwargs)


class _Forward:
    """Stands where a module's ``forward`` was. An object, so that it is copied with the module."""

    def __init__(self, annotation: Annotation, original: Callable[..., Any]) -> None:
        self.annotation = annotation
        self.original = self.__wrapped__ = original  # whoever asks gets the original's signature


class _ModelForward(_Forward):
    @skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        annotation = self.annotation
        annotation.kept = None
        if torch.compiler.is_exporting():
            return self.original(*args, **kwargs)
        annotation._prompt = annotation._read(args[0] if args else kwargs.get("input_ids"))
        _running.append(annotation)
        try:
            return self.original(*args, **kwargs)
        finally:
            _running.pop()
            annotation._prompt = None


class _DecoderForward(_Forward):
    @skip
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompt = self.annotation._prompt
        embeds = kwargs.get("inputs_embeds")
        if prompt is None or torch.compiler.is_exporting():
            return self.original(*args, **kwargs)
        if embeds is None or embeds.shape[:2] != prompt.mask.shape:
            shape = "no inputs_embeds" if embeds is None else f"embeddings {list(embeds.shape)}"
            warnings.warn(
                f"vlmopt: the decoder of an annotated model got {shape} for a prompt of "
                f"{list(prompt.mask.shape)} tokens: its passes do not apply",
                stacklevel=2,
            )
            return self.original(*args, **kwargs)
        # a decoder may add visual features to chosen rows: their number is known, but not to Dynamo
        with torch._dynamo.config.patch(
            capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
        ):
            result, self.annotation.kept = _run_marked(
                self.original, prompt.mask, prompt.counts, args, kwargs
            )
        return result


def _run_marked(
    forward: Callable[..., Any],
    mask: Tensor,
    counts: tuple[int, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor | None]:
    """The decoder, in the frame that Dynamo makes one graph of."""
    if not torch.compiler.is_dynamo_compiling():
        return forward(*args, **kwargs), None
    marked = mark_tokens(kwargs["inputs_embeds"], mask, counts)
    result = forward(*args, **{**kwargs, "inputs_embeds": marked})
    return result, kept_tokens(result[0])
