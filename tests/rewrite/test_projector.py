"""Derivatives of projectors by row, against literal finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import encoded
from torch import Tensor, nn
from torch.nn import functional

import vlmopt
from vlmopt.analysis.row_axes import last_rows, part_behind
from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens.zoo_prune import unit_vectors
from vlmopt.program import fetch_attr
from vlmopt.rewrite.projector import Projector, find_projector


class Toy(nn.Module):
    """``then`` behind a linear layer, and in front of another."""

    def __init__(self, then: Callable[[Tensor], Tensor], wide: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.then = then
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(wide, 5)

    def forward(self, rows: Tensor) -> Tensor:
        tokens: Tensor = self.last(self.then(self.first(rows)))
        return tokens


def projector_of(module: nn.Module, rows: Tensor) -> Projector:
    stage = vlmopt.capture(module.eval(), (rows,))["model"]
    entry = stage.placeholder(stage.inputs[0])
    graph = part_behind(entry, stage.output_node(stage.outputs[0]))
    assert graph is not None
    return in_double(Projector(stage, entry, graph))


def in_double(projector: Projector, dtype: torch.dtype = torch.float64) -> Projector:
    stage = projector.stage.graph_module
    return projector.with_weights([fetch_attr(stage, p).to(dtype) for p in projector.weights])


def differences(project: Callable[[Tensor], Tensor], rows: Tensor, units: Tensor) -> Tensor:
    """Mean norm of central differences."""
    step = 1e-4
    with torch.no_grad():
        moved = [
            (project(rows + step * one) - project(rows - step * one)) / (2 * step)
            for one in units.double()
        ]
    return torch.stack([each.norm(dim=-1) for each in moved]).mean(0)


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _gate(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _aside(x: Tensor) -> Tensor:
    first, rest = x.split([4, 8], dim=-1)
    first = first.transpose(1, 2).relu().transpose(1, 2)
    return torch.cat([first, torch.tanh(rest[..., 2:])], dim=2) - 0.5 * x[..., :10]


def _turned(x: Tensor) -> Tensor:
    x = x.permute(1, 0, 2).unsqueeze(1)
    return (-x / (1 + x * x)).squeeze(1).reshape(x.shape[0], x.shape[2], 3, 4)


def _back(x: Tensor) -> Tensor:
    return _turned(x).flatten(2).permute(1, 0, 2).sigmoid()


BENDS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "gelu": (functional.gelu, 12),
    "gelu-tanh": (lambda x: functional.gelu(x, approximate="tanh"), 12),
    "quick-gelu": (lambda x: x * torch.sigmoid(1.702 * x), 12),
    "layer-norm": (lambda x: functional.layer_norm(x, [12]), 12),
    "rms-norm": (_rms, 12),
    "rms-norm-whole": (lambda x: functional.rms_norm(x, [12], eps=1e-6), 12),
    "softmax": (lambda x: x.softmax(-1), 12),
    "gate": (_gate, 6),
    "parts": (_aside, 10),
    "turned": (_back, 12),
    "pooled": (lambda x: x.pow(3).unflatten(-1, (6, 2)).sum(-1), 6),
}


@pytest.mark.parametrize("name", BENDS)
def test_a_derivative_equals_finite_differences(name: str) -> None:
    module = Toy(*BENDS[name])
    projector = projector_of(module, torch.randn(2, 7, 6))
    rows, units = torch.randn(3, 4, 6).double(), unit_vectors(5, 6, 0)  # other sizes
    found = projector.derivatives(rows, units)
    wanted = differences(module.double(), rows, units)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(projector(rows), module(rows))
    assert not projector.is_linear


def test_sides_of_a_relu() -> None:
    """Along ``u`` a row moves by ``u`` on one side, and not at all on the other."""
    module = Toy(functional.relu, 6)
    for layer in (module.first, module.last):
        layer.weight = nn.Parameter(torch.eye(6))
        layer.bias = nn.Parameter(torch.zeros(6))
    rows = torch.tensor([[5.0] * 6, [-5.0] * 6])[None]
    found = projector_of(module, rows).derivatives(rows.double(), unit_vectors(8, 6, 0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]))


def test_a_linear_projector_is_equally_sensitive_everywhere() -> None:
    projector = projector_of(Toy(lambda x: 2 * x - x[..., :1], 12), torch.randn(1, 7, 6))
    found = projector.derivatives(torch.randn(1, 9, 6).double(), unit_vectors(5, 6, 0))
    assert projector.is_linear
    assert len(found.unique()) == 1
    assert found[0, 0] > 0


def test_sensitivity_scales_with_the_last_layer() -> None:
    module = Toy(functional.gelu)
    rows, units = torch.randn(1, 7, 6), unit_vectors(5, 6, 0)
    once = projector_of(module, rows).derivatives(rows.double(), units)
    module.last.weight.data *= 3
    thrice = projector_of(module, rows).derivatives(rows.double(), units)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x + x.mean(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: (x @ x.transpose(1, 2)) @ x,
        lambda x: x + torch.arange(7.0)[:, None],
        lambda x: x.flip(1),
        lambda x: x.transpose(0, 1).reshape(2, 7, 12),
        lambda x: functional.scaled_dot_product_attention(x, x, x),
    ],
    ids=["mean", "softmax", "products", "places", "order", "regrouped", "attention"],
)
def test_what_mixes_rows_is_no_part_of_a_projector(mixing: Callable[[Tensor], Tensor]) -> None:
    """Only the last layer is left, behind what mixes."""
    stage = vlmopt.capture(Toy(mixing), (torch.randn(2, 7, 6),))["model"]
    out = stage.output_node(stage.outputs[0])
    linear = [n for n in stage.graph.nodes if n.target is torch.ops.aten.linear.default]
    entries = [entry for entry, _ in last_rows(stage, out, ())]
    assert entries
    assert all(entry > linear[0] for entry in entries)


def test_an_unknown_derivative_is_named() -> None:
    projector = projector_of(Toy(torch.atan), torch.randn(1, 7, 6))
    with pytest.raises(PreconditionError, match=r"derivative of aten\.atan"):
        projector.derivatives(torch.randn(1, 9, 6).double(), unit_vectors(5, 6, 0))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "aya_vision", "gemma3", "smolvlm"])
def test_projectors_of_models(family: str) -> None:
    """A merger in the encoder that cuts images into windows, pixel shuffle, and pooling."""
    model, inputs = zoo.build(family, layers=2), zoo.inputs(family, batch=2)
    program = vlmopt.capture(model, inputs)
    projector = find_projector(program)
    entering = encoded.Entering(model, inputs, family)
    units = unit_vectors(5, projector.width, 0)
    rows = torch.stack(entering.rows)
    if projector.moving.op != "placeholder":  # a norm, or a view, comes first
        rows = entering_before(model, inputs, family)
    # some models ask for a type on the way
    dtype = torch.float32 if family == "gemma3" else torch.float64
    found = in_double(projector, dtype).derivatives(rows, units)
    assert projector.is_linear == (family in ("gemma3", "smolvlm"))
    for sample in range(2):
        wanted = differences(entering.project, entering.rows[sample], units).to(found.dtype)
        torch.testing.assert_close(found[sample], wanted, rtol=1e-6, atol=1e-9)


def entering_before(model: Any, inputs: dict[str, Tensor], family: str) -> Tensor:
    """Merged rows in front of the norm that comes first: ``[samples, visual tokens, width]``."""
    given: list[Tensor] = []
    path = {"aya_vision": ".layernorm", "gemma3": ".mm_soft_emb_norm"}.get(family, "")
    watched = model.get_submodule(encoded.TAILS[family].module + path)
    handle = watched.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return given[0].double().reshape(2, -1, given[0].shape[-1])
