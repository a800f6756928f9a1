"""The halves of a layer, in turn or side by side: each value is the one that the layer computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import vlmopt
from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.sublayers import middle_of, sublayers
from vlmopt.errors import PreconditionError

WIDTH = 8


class Block(nn.Module):
    """Notes what it computes, by the names that the analysis gives to it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        norms = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        for norm in norms:
            nn.init.normal_(norm.weight)
        self.norms = nn.ModuleList(norms)
        self.query, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        if self.kind == "ffn first":
            seen |= self.ffn(x)
        seen["attention_in"] = self.norms[0](x)
        rows = self.query(seen["attention_in"])[:, None]
        seen["attention_out"] = F.scaled_dot_product_attention(rows, rows, rows)[:, 0]
        if self.kind == "in turn":
            seen["middle"] = x + seen["attention_out"]
            seen |= self.ffn(seen["middle"])
            out = seen["middle"] + seen["ffn_out"]
        elif self.kind == "one by one":
            seen |= self.ffn(x)
            out = x + seen["attention_out"] + seen["ffn_out"]
        elif self.kind == "without a sum":
            out = x + seen["attention_out"] * self.ffn(x)["ffn_out"]
        else:
            seen = {**self.ffn(x), **seen}
            out = seen["ffn_out"] + seen["attention_out"] + x
        seen["out"] = out
        if not torch.compiler.is_exporting():
            self.seen = seen
        return out

    def ffn(self, x: Tensor) -> dict[str, Tensor]:
        given = self.norms[1](x)
        return {"ffn_in": given, "ffn_out": self.down(F.gelu(self.up(given)))}


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(kind), Block(kind)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Values(fx.Interpreter):
    """Runs a graph and keeps all values."""

    def run_node(self, n: fx.Node) -> Any:
        self.kept = getattr(self, "kept", {})
        self.kept[n] = super().run_node(n)
        return self.kept[n]


@pytest.mark.parametrize("kind", ["in turn", "one by one", "summed first", "ffn first"])
def test_each_value_is_the_one_that_the_layer_computes(kind: str) -> None:
    model, x = Model(kind).eval(), torch.randn(2, 5, WIDTH)
    stage = vlmopt.capture(model, (x,))["model"]
    layers = find_layers(stage)
    values = Values(stage.graph_module)
    with torch.no_grad():
        values.run(x)
        model(x)
    for index, layer in enumerate(model.layers):
        parts = sublayers(layers, index)
        assert (parts.middle is None) == (kind != "in turn")
        for name, wanted in layer.seen.items():  # type: ignore[union-attr, operator]
            torch.testing.assert_close(values.kept[getattr(parts, name)], wanted)
    if kind != "in turn":
        with pytest.raises(PreconditionError, match=r"layer 1 of layers are parallel"):
            middle_of(layers, 1)


def test_a_layer_that_is_built_otherwise() -> None:
    stage = vlmopt.capture(Model("without a sum").eval(), (torch.randn(2, 5, WIDTH),))["model"]
    with pytest.raises(PreconditionError, match="does not add its parts to the residual stream"):
        sublayers(find_layers(stage), 0)
