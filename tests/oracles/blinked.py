"""The oracle for copies of a region: the eager model, one sample at a time, on longer sequences.

Copies really stand between the visual tokens and the text; where there are none, nothing does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class BlinkOracle:
    """Runs ``model`` on one sample without padding.

    Args:
        visual: bool ``[1, prompt]``, a square grid of one image.
        layers: those that may see copies.
        side: rows of a patch; each token has ``up * up`` copies.
        modules: of each layer, what it adds to the interpolated grid; none: nothing.

    Attributes:
        history: ``(share of the best patch, whether there are copies)`` at each layer.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        visual: torch.Tensor,
        layers: tuple[int, ...],
        *,
        expand: float,
        drop: float,
        side: int = 2,
        up: int = 2,
        modules: Mapping[int, torch.nn.Module] | None = None,
    ) -> None:
        self.modules = modules or {}
        self.model, self.inputs, self.layers = model, inputs, layers
        self.expand, self.drop, self.side, self.up = expand, drop, side, up
        self.slots = torch.nonzero(visual[0])[:, 0].tolist()
        self.grid = torch.tensor(self.slots).view(int(len(self.slots) ** 0.5), -1)
        self.history: list[tuple[float, bool]] = []
        self.logits = self.run()

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        with self.active():
            logits: torch.Tensor = self.model(**self.inputs).logits
        return logits

    @torch.no_grad()
    def generate(self, tokens: int) -> torch.Tensor:
        with self.active():
            out: torch.Tensor = self.model.generate(
                **self.inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
            )
        return out

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.parents: list[int] = []  # of the copies there are
        self.cached: dict[int, list[int]] = {}
        self.history = []
        blocks = self.model.get_decoder().layers
        hooks = [
            blocks[index].register_forward_pre_hook(self._enter, with_kwargs=True)
            for index in self.layers
        ]
        hooks.append(blocks[self.layers[-1]].register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, layer: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        index = layer.self_attn.layer_idx
        if hidden.shape[1] == 1:
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = self._mask_of_step(index, kwargs["attention_mask"])
            return (hidden,), kwargs
        tokens = hidden.shape[1] - len(self.parents)
        base, table = kwargs.get("attention_mask"), kwargs["position_embeddings"]
        given = self._wide(tokens, base, table)
        shares = self._attention(layer, hidden, *given)
        sums, patches = [], []
        for top in range(0, self.grid.shape[0], self.side):
            for left in range(0, self.grid.shape[1], self.side):
                patch = self.grid[top : top + self.side, left : left + self.side]
                sums.append(float(shares[patch.flatten()].sum()))
                patches.append(patch)
        best = sums.index(max(sums))
        ratio = max(sums) / sum(sums)
        last = self.slots[-1] + 1
        if self.parents and ratio < self.drop:
            hidden = torch.cat([hidden[:, :last], hidden[:, last + len(self.parents) :]], 1)
            self.parents = []
        elif not self.parents and ratio > self.expand:
            patch = patches[best]
            finer = torch.nn.functional.interpolate(
                hidden[0, patch].permute(2, 0, 1)[None],
                scale_factor=self.up,
                mode="bilinear",
                align_corners=False,
            )
            if index in self.modules:
                finer = finer + self.modules[index](finer)
            copies = finer[0].flatten(1).T[None]
            hidden = torch.cat([hidden[:, :last], copies, hidden[:, last:]], 1)
            repeated = patch.repeat_interleave(self.up, 0).repeat_interleave(self.up, 1)
            self.parents = repeated.flatten().tolist()
        self.history.append((ratio, bool(self.parents)))
        self.cached[index] = list(self.parents)
        mask, table = self._wide(tokens, base, table)
        return (hidden,), {**kwargs, "attention_mask": mask, "position_embeddings": table}

    def _leave(self, layer: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] == 1 or not self.parents:
            return output
        last = self.slots[-1] + 1
        hidden = torch.cat([hidden[:, :last], hidden[:, last + len(self.parents) :]], 1)
        self.parents = []
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _wide(self, tokens: int, base: Any, table: Any) -> tuple[Any, Any]:
        """Mask and rotary table for the sequence with its copies."""
        if not self.parents:
            return base, table
        before = torch.ones(tokens, tokens).tril().bool() if base is None else base[0, 0]
        if before.dtype != torch.bool:
            before = before > -1e30
        last = self.slots[-1]
        items = [(slot, False) for slot in range(last + 1)]
        items += [(parent, True) for parent in self.parents]
        items += [(slot, False) for slot in range(last + 1, tokens)]
        mask = torch.zeros(len(items), len(items), dtype=torch.bool)
        for row, (own, copied) in enumerate(items):
            for column, (other, other_copied) in enumerate(items):
                seen = bool(before[last if copied else own, other])
                mask[row, column] = seen and (not other_copied or column <= row)
        index = torch.tensor([slot for slot, _ in items])
        return mask[None, None], tuple(part[..., index, :] for part in table)

    def _mask_of_step(self, index: int, mask: torch.Tensor) -> torch.Tensor:
        last = self.slots[-1] + 1
        more = mask[..., self.cached[index]]
        return torch.cat([mask[..., :last], more, mask[..., last:]], -1)

    def _attention(self, layer: Any, hidden: Any, mask: Any, table: Any) -> torch.Tensor:
        """Of the last token, mean over heads, without the copies: ``[tokens]``."""
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found: list[Any] = []

        def look(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
            found.append((query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5))
            return original(module, query, key, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = look
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden),
                position_embeddings=table,
                attention_mask=mask,
                past_key_values=None,
            )
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
        query, key, scale = found[0]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query[:, :, -1:] @ key.transpose(-1, -2) * scale
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > -1e30
            logits = logits.masked_fill(~seen[:, :, -1:], float("-inf"))
        shares = logits.softmax(-1).mean(1)[0, 0]
        last = self.slots[-1] + 1
        return torch.cat([shares[:last], shares[last + len(self.parents) :]])
