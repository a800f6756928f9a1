"""Values of the vision encoder, for passes that choose tokens in the language model.

The encoder stage gives one more output, the language model takes one more input; between them
:func:`vlmopt.encoding.mean_by_token` brings rows of the encoder into the order of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::attention_mass
from vlmopt.analysis.encoder import special_tokens
from vlmopt.analysis.layers import find_layers
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_arguments
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Program, Role, Stage
from vlmopt.rewrite.emit import Emitter

aten = torch.ops.aten

NEEDS_ROUTES = (
    "it has to know which token of the prompt each patch becomes, and encoder and language model "
    "are graphs of their own there"
)
"""Why a pass needs ``vlmopt.capture``."""

FEATURES = "features"
"""What enters the projector: no output of the encoder, the runtime takes it from there."""

ROWS = "rows"
"""What makes one token each, where it lies inside a stage; see :func:`give_rows`."""

PIXELS = "pixels"
"""Pixels of the patches that a token is made of: of the encoder's input."""

KEPT = "kept"
"""Whether patches stayed in the encoder: 1, or -1 where they were dropped; 0 for tokens of none."""


def encoding_of(program: Program) -> dict[str, Any]:
    """What capture found between encoder and prompt: :func:`~vlmopt.encoding.describe_encoding`.

    Raises:
        PreconditionError: nothing, and why.
    """
    if "vision_encoder" not in program:
        raise PreconditionError(
            f"this {program.model_type} program has no stage for the vision encoder whose values "
            "could be read",
            hint="use vlmopt.optimize or vlmopt.capture on the whole model; torch.compile sees "
            "encoder and language model as one graph",
        )
    facts = program["vision_encoder"].facts.get("encoding")
    if facts is None:
        raise PreconditionError(
            "which token each patch becomes is not known: capture needs weights to find out, and "
            "an encoder that runs once",
            hint="load the weights; prompts with images and videos need a pass that reads the "
            "language model only",
        )
    if "unknown" in facts:
        raise PreconditionError(f"which token each patch becomes is not known: {facts['unknown']}")
    return facts  # type: ignore[no-any-return]


def encoded_input(program: Program, stage: Stage, name: str, ctx: PassContext) -> fx.Node:
    """The input of the language model that holds a value of the encoder, made if need be.

    Args:
        name: ``attention``, ``keys``, ``features``, ``rows`` (once given) or ``pixels``; or
            ``kept``, where a pass has dropped patches in the encoder.

    Returns:
        Its placeholder: float32 ``[batch, tokens]`` or ``[batch, tokens, width]`` over the whole
        prompt, 0 for tokens that no patch is part of.

    Raises:
        PreconditionError: the model has no such value.
    """
    port = f"encoded_{name}"
    if any(known.name == port for known in stage.inputs):
        return stage.placeholder(port)
    facts = encoding_of(program)
    if name == FEATURES:
        if facts["projector"] is None:
            raise PreconditionError(
                "this model has no projector that makes one token of each of its rows",
            )
        entering = program["projector"].inputs[0]
        width = tuple(program["projector"].placeholder(entering).meta["val"].shape[-1:])
    elif name == ROWS:
        source = program[facts["tokens"]["stage"]]
        width = tuple(source.output_node(port).meta["val"].shape[-1:])
    elif name == PIXELS:
        width = (_pixels_of_token(facts),)
    else:
        width = _encoder_output(program["vision_encoder"], facts, name, ctx)
    whole = stage.facts["batch"], stage.facts["tokens"], *width
    node = stage.add_input(Port(port, Role.ENCODED), *whole)
    ctx.stamp(node, 1)
    return node


def give_rows(stage: Stage, rows: fx.Node, order: fx.Node | None, ctx: PassContext) -> None:
    """Let a stage give ``rows`` as ``encoded_rows`` too: ``[..., width]``, one for each token.

    Args:
        order: an operator that brings rows such as these into another order, if they are to be.
    """
    port = f"encoded_{ROWS}"
    if any(known.name == port for known in stage.outputs):
        return
    if order is not None:
        emit = Emitter.of_pass(ctx, stage, order, "encoded")
        with stage.graph.inserting_before(stage.graph.output_node()):
            rows = emit.call(order.target, rows, *order.args[1:], name="rows")
    stage.add_output(Port(port, Role.ENCODED), rows)


def _pixels_of_token(facts: dict[str, Any]) -> int:
    pixels = facts["pixels"]
    counts = set(Counter(token for token in facts["rows"]["tokens"] if token >= 0).values())
    if pixels is None or len(counts) != 1:
        raise PreconditionError(
            "the encoder does not cut images into patches that lie side by side, as many for each "
            "token",
            hint="use a pass that needs no pixels",
        )
    return counts.pop() * len(pixels["offsets"])


def _encoder_output(
    encoder: Stage, facts: dict[str, Any], name: str, ctx: PassContext
) -> tuple[int, ...]:
    """Add an output to the encoder; the shape of one of its rows."""
    port = f"encoded_{name}"
    known = [one for one in encoder.outputs if one.name == port]
    if not known and encoder.facts.get("merges"):
        raise PreconditionError(
            f"{encoder.facts['merges'][0]['by']} has merged or dropped patches in the encoder: "
            "what a patch of its own would get there is not known any more",
            hint="leave out one of the two",
        )
    if not known:
        layers = find_layers(encoder)
        attentions = [
            node
            for node, block in layers.of.items()
            if block == facts["block"] and node.target is aten.scaled_dot_product_attention.default
        ]
        rows = sum(_rows_of(node) for node in attentions)
        if rows != len(facts["rows"]["tokens"]):
            raise PreconditionError(
                f"block {facts['block']} of the vision encoder attends with {rows} rows, and "
                f"{len(facts['rows']['tokens'])} leave it",
                hint="capture the model with attn_implementation='sdpa'",
            )
        special = special_tokens(encoder, layers)
        emitter = partial(Emitter.of_pass, ctx, encoder, prefix="encoded")
        results = []
        for node in attentions:
            with encoder.graph.inserting_after(node):
                anchor = encoder.graph.call_function(aten.alias.default, (node,))
            with encoder.graph.inserting_before(anchor):
                results.append(_COMPUTE[name](emitter(node), node, special))
            encoder.graph.erase_node(anchor)
        with encoder.graph.inserting_before(encoder.graph.output_node()):
            emit = emitter(attentions[-1])
            whole = emit.trace(lambda *parts: torch.cat(parts), *results, names=(name,))
        encoder.add_output(Port(port, Role.ENCODED), whole)
    return tuple(encoder.output_node(port).meta["val"].shape[1:])


def _rows_of(attention: fx.Node) -> int:
    query: Any = attention.args[0]
    shape = query.meta["val"].shape
    return int(shape[0] * shape[-2]) if len(shape) == 4 else int(shape[-2])


def _attention(emit: Emitter, attention: fx.Node, special: int) -> fx.Node:
    """Attention that each row gets: from the class token, or without one from all rows alike."""
    given = attention_arguments(attention)
    scale = given.get("scale")

    def received(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        query, key = _with_batch(query), _with_batch(key)
        if special:
            if mask is not None and mask.shape[-2] > 1:
                mask = mask[..., :1, :]
            rows = torch.ops.vlmopt.attention_rows(query[:, :, :1], key, mask, None, scale)
        else:
            share = 1 / query.shape[2]
            weights = torch.full_like(query[:, :1, :, 0], share, dtype=torch.float32)
            rows = torch.ops.vlmopt.attention_mass(query, key, weights, mask, False, scale)
        return rows.mean(1)[:, 0].flatten()

    return emit.trace(received, given["query"], given["key"], given.get("attn_mask"))  # type: ignore[no-any-return]


def _keys(emit: Emitter, attention: fx.Node, special: int) -> fx.Node:
    """Keys, mean over heads."""

    def mean(key: Tensor) -> Tensor:
        return _with_batch(key).float().mean(1).flatten(0, 1)

    return emit.trace(mean, attention_arguments(attention)["key"])  # type: ignore[no-any-return]


def _with_batch(value: Tensor) -> Tensor:
    return value if value.ndim == 4 else value[None]


_COMPUTE: dict[str, Callable[[Emitter, fx.Node, int], fx.Node]] = {
    "attention": _attention,
    "keys": _keys,
}
