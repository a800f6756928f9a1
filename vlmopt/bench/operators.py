"""Attention scores by vlmopt's operators against the whole matrix in eager mode, in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt.bench.prefill import markdown, milliseconds
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.errors import OptionError, VerifyError
from vlmopt.ops.attention import (
    attention_mass,
    attention_mass_blocks,
    attention_mass_reference,
    attention_rows,
    attention_rows_reference,
    uses_kernels,
)

TOLERANCE = 1e-4
"""Largest difference from the reference, as a share of its largest value."""


@dataclass(frozen=True)
class Scores:
    """Heads and tokens of one attention layer, batch 1.

    Attributes:
        key_heads: at most ``heads``, which they divide.
        size: elements of a head.

    Raises:
        OptionError: a number is not positive, or the heads cannot share the key heads.
    """

    tokens: int
    heads: int = 8
    key_heads: int = 2
    size: int = 64

    def __post_init__(self) -> None:
        if min(self.tokens, self.heads, self.key_heads, self.size) < 1:
            raise OptionError("tokens, heads, key heads and size of a head are positive")
        if self.heads % self.key_heads:
            raise OptionError(
                f"{self.heads} heads cannot share {self.key_heads} key heads",
                hint="give a number of heads that the key heads divide",
            )

    @property
    def matrix_bytes(self) -> int:
        """Of the attention matrix in float32."""
        return 4 * self.heads * self.tokens**2


@dataclass(frozen=True)
class Measured:
    """Times of one score.

    Attributes:
        name: what is computed.
        seconds: by implementation (``eager``, ``operator`` and on CUDA ``blocks``, what the
            operator falls back to without Triton), one time per round.
    """

    name: str
    scores: Scores
    dtype: str
    kernels: bool
    seconds: Mapping[str, Sequence[float]]

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.name,
            "scores": asdict(self.scores),
            "dtype": self.dtype,
            "kernels": self.kernels,
            "speedup": asdict(Ratio.of(self.seconds["eager"], self.seconds["operator"])),
            "noisy": self.noisy,
            "seconds": {name: list(times) for name, times in self.seconds.items()},
        }


def measure(
    scores: Scores,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 11,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Check each operator against its reference, then time it against eager attention.

    Eager attention is what models do that hand out their attention matrix: keys repeated for the
    query heads, products in the type of the model, the causal mask added, softmax in float32.

    Raises:
        VerifyError: an operator is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, scores.heads, scores.tokens, scores.size, generator=generator)
    key = torch.randn(1, scores.key_heads, scores.tokens, scores.size, generator=generator)
    query, key = (value.to(device, dtype) for value in (query, key))
    every = torch.full((1, 1, scores.tokens), 1 / scores.tokens, device=device)
    last = query[:, :, -1:]
    hidden = torch.full((scores.tokens,) * 2, float("-inf"), device=device, dtype=dtype).triu(1)

    def matrix() -> Tensor:
        repeated = key.repeat_interleave(scores.heads // scores.key_heads, dim=1)
        products = query @ repeated.transpose(2, 3) * scores.size**-0.5 + hidden
        return torch.softmax(products, -1, dtype=torch.float32)

    mass = (query, key, every, None, True, None)
    names: dict[str, dict[str, Callable[[], Tensor]]] = {
        "last row": {
            "eager": lambda: matrix()[:, :, -1:],
            "operator": lambda: attention_rows(last, key),
            "blocks": lambda: attention_rows_reference(last, key),
        },
        "column means": {
            "eager": lambda: matrix().mean(2)[:, :, None],
            "operator": lambda: attention_mass(*mass, "queries"),
            "blocks": lambda: attention_mass_blocks(*mass, "queries"),
        },
        "row means": {
            "eager": lambda: matrix().mean(3)[:, :, None],
            "operator": lambda: attention_mass(*mass, "keys"),
            "blocks": lambda: attention_mass_blocks(*mass, "keys"),
        },
    }
    references = {
        "last row": lambda: attention_rows_reference(last, key),
        "column means": lambda: attention_mass_reference(*mass, "queries"),
        "row means": lambda: attention_mass_reference(*mass, "keys"),
    }
    kernels = uses_kernels(query)
    results = []
    for name, functions in names.items():
        text = f"{name} of {scores.tokens} tokens, {str(dtype).removeprefix('torch.')}"
        progress(f"{text}: checking")
        with torch.no_grad():
            _check(text, functions["operator"](), references[name]())
            if not kernels:  # the operator is the blocks
                del functions["blocks"]
            seconds = interleave(
                functions,
                rounds,
                wait=finishing(device),
                progress=_round(progress, text, rounds),
            )
        kind = str(dtype).removeprefix("torch.")
        results.append(Measured(name, scores, kind, kernels, seconds))
    return results


def _round(progress: Callable[[str], None], text: str, rounds: int) -> Callable[[int], None]:
    return lambda done: progress(f"{text}: round {done} of {rounds}")


def _check(what: str, found: Tensor, wanted: Tensor) -> None:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if not error <= TOLERANCE:
        raise VerifyError(
            "parity",
            f"{what}: the operator differs from its reference by {error:.1e} of the largest value, "
            f"more than {TOLERANCE:g}",
        )


def table(results: Sequence[Measured]) -> str:
    """The results as a Markdown table; times are medians."""
    head = ["scores", "dtype", "tokens", "heads", "matrix", "eager", "operator", "speed-up (90 %)"]
    blocks = any("blocks" in result.seconds for result in results)
    if blocks:
        head.insert(7, "without Triton")
    rows = []
    for result in results:
        ratio = Ratio.of(result.seconds["eager"], result.seconds["operator"])
        scores = result.scores
        row = [
            result.name,
            result.dtype,
            str(scores.tokens),
            f"{scores.heads} on {scores.key_heads} x {scores.size}",
            f"{scores.matrix_bytes / 2**20:.0f} MiB",
            milliseconds(result.seconds["eager"]),
            milliseconds(result.seconds["operator"]),
            ratio.text(noisy=result.noisy),
        ]
        if blocks:
            row.insert(7, milliseconds(result.seconds.get("blocks", result.seconds["operator"])))
        rows.append(row)
    return markdown(head, rows)
