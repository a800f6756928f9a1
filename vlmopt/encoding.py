"""From the vision encoder to the prompt: which token each patch becomes.

Between both lies code of the model that is no stage: it selects features, projects them, packs
tiles, inserts line ends. Where it puts a patch is read off gradients, so nothing is known of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from vlmopt.analysis.layers import exit_of, find_layers
from vlmopt.errors import PreconditionError
from vlmopt.graph.reach import reached, sources
from vlmopt.program import Modality, Stage


@dataclass(frozen=True)
class Route:
    """Where rows of one value go.

    Attributes:
        shape: of the value, without its last dimension.
        tokens: number of the visual token, counted over the whole batch, that each row becomes
            part of; -1 for rows that none is made of.
    """

    shape: tuple[int, ...]
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, list[int]]:
        """For :attr:`vlmopt.program.Stage.facts`."""
        return {"shape": [*self.shape], "tokens": [*self.tokens]}


@dataclass(frozen=True)
class Encoding:
    """What lies between the vision encoder and the prompt.

    Attributes:
        read: outputs of the encoder that the language model depends on in any way.
        outputs: route of each output of the encoder that tokens are made of, by name; ``None`` for
            one whose rows become part of several tokens.
        projector: route of the rows that enter the projector, where there is one and each becomes
            one token of the prompt as it leaves it.
        tokens: stage and output whose rows are tokens of the prompt as they are, and their route.
    """

    read: tuple[str, ...]
    outputs: dict[str, Route | None]
    projector: Route | None
    tokens: tuple[str, str, Route] | None = None


def find_encoding(
    model: nn.Module,
    inputs: dict[str, Any],
    encoder: nn.Module,
    projector: nn.Module | None,
    decoder: nn.Module,
    vision: Tensor,
    encoded: Sequence[Any] = (),
) -> Encoding | None:
    """Follow the patches of ``inputs`` to the prompt.

    Args:
        vision: bool ``[batch, tokens]``, the tokens that come from vision.
        encoded: what the encoder returned for these inputs, call by call, if that is known: it does
            not run again then.

    Returns:
        ``None`` where the encoder runs more than once, or not before the decoder.
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        run = _Run(encoder, projector, decoder, encoded)
        return _find_encoding(model, inputs, run, vision)


def _find_encoding(
    model: nn.Module, inputs: dict[str, Any], run: _Run, vision: Tensor
) -> Encoding | None:
    with run.watching(), contextlib.suppress(_DecoderReachedError):
        model(**inputs)
    if run.embeddings is None or len(run.leaves) != 1:
        return None
    rows = run.embeddings[vision]
    (leaves,) = run.leaves
    read = _depended_on(run.given, leaves)
    direction = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0))
    value = rows.float() @ direction.to(rows.device)
    if not value.requires_grad:
        return Encoding(read, {}, None)
    # a projector that runs several times has several places for the rows of each token
    entry, left = run.projected[0] if len(run.projected) == 1 else (None, {})
    entries = [] if entry is None else [entry]
    routes = iter(_routes(value, [*leaves.values(), *entries, *left.values()]))
    found = dict(zip(leaves, routes, strict=False))
    outputs = {
        name: route
        for name, route in found.items()
        if route is None or any(token >= 0 for token in route.tokens)
    }
    whole = next(routes) if entries else None
    ends = [("vision_encoder", name, leaf, found[name]) for name, leaf in leaves.items()]
    if run.projected:
        ends = [("projector", *item, next(routes)) for item in left.items()]
    copied = (
        (stage, name, route)
        for stage, name, value, route in ends
        if route is not None and _is_copied(rows, value, route)
    )
    tokens = next(copied, None)
    if tokens is None or whole != tokens[2]:
        whole = None
    return Encoding(read, outputs, whole, tokens)


def describe_encoding(stage: Stage, given: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    """Facts of the stage that encodes: JSON values.

    Args:
        given: the inputs of its module in the run that was followed, by name.

    Returns:
        ``block``: the last block that tokens of the prompt are made of; ``rows``: route of the rows
        that leave it; ``projector``: route of the rows that enter the projector, or ``None``;
        ``tokens``: route of the rows that are tokens as they are, with the ``stage`` that they
        leave and its ``output``, or ``None``;
        ``pixels``: where the pixels of each row stand, see :func:`_pixels_of_rows`, or ``None``. Or
        ``unknown``: why not.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            block, route = _route_of_block(stage, given, encoding)
            pixels = _pixels_of_rows(stage, given, route.shape)
    except PreconditionError as error:
        return {"unknown": str(error)}
    projector, tokens = encoding.projector, encoding.tokens
    return {
        "block": block,
        "rows": route.to_json(),
        "projector": None if projector is None else projector.to_json(),
        "tokens": None
        if tokens is None
        else {"stage": tokens[0], "output": tokens[1], **tokens[2].to_json()},
        "pixels": pixels,
    }


def _route_of_block(
    stage: Stage, given: Mapping[str, Any], encoding: Encoding
) -> tuple[int, Route]:
    layers = find_layers(stage)
    found: list[tuple[int, str, Route]] = []
    for name, route in encoding.outputs.items():
        above = reached([stage.output_node(name)], sources)
        depth = max((layers.of[node] for node in above if node in layers.of), default=-1)
        if route is None:
            raise PreconditionError("each row that leaves the encoder becomes part of many tokens")
        found.append((depth, name, route))
    if not found or max(found)[0] < 0:
        raise PreconditionError("no token of the prompt depends on the blocks of the encoder")
    block, name, outer = max(found)
    out = exit_of(layers, block)
    result = stage.output_node(name)
    run = _FromNode(stage, out, result)
    leaf, rows = run.run_from(given)
    if leaf is rows:
        return block, outer
    direction = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0))
    (inner,) = _routes(rows.flatten(0, -2).float() @ direction.to(rows.device), [leaf])
    if inner is None:
        raise PreconditionError("each row that leaves the last block becomes part of many tokens")
    tokens = tuple(outer.tokens[row] if row >= 0 else -1 for row in inner.tokens)
    return block, Route(inner.shape, tokens)


def _pixels_of_rows(
    stage: Stage, given: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, Any] | None:
    """Which values of the images each row that enters the blocks is made of.

    Args:
        shape: of these rows.

    Returns:
        ``input``: name of the images' port; ``first``: per row, the place of its first value when
        they are laid out flat, -1 for rows that no pixel is part of; ``offsets`` of all its values
        from there. ``None`` where patches overlap, or differ in form.
    """
    entry = find_layers(stage).entries[0]
    ports = [p for p in stage.inputs if stage.placeholder(p).meta["val"].is_floating_point()]
    if not ports or tuple(entry.meta["val"].shape[:-1]) != shape:
        return None
    images = max((stage.placeholder(port) for port in ports), key=lambda n: n.meta["val"].numel())
    leaf, rows = _FromNode(stage, images, entry).run_from(given)
    direction = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0))
    value = rows.flatten(0, -2).float() @ direction.to(rows.device)
    (route,) = _routes(value, [leaf], by_element=True)
    if route is None:
        return None
    row = torch.tensor(route.tokens)
    order = torch.sort(row, stable=True).indices[int((row < 0).sum()) :]
    filled, counts = torch.unique(row[order], return_counts=True)
    if len(set(counts.tolist())) != 1:
        return None
    places = order.view(len(filled), -1)
    offsets = places - places[:, :1]
    if bool((offsets != offsets[0]).any()):
        return None
    first = torch.full((len(value),), -1).scatter(0, filled, places[:, 0])
    return {"input": images.name, "first": first.tolist(), "offsets": offsets[0].tolist()}


class _FromNode(fx.Interpreter):
    """Runs a part of a stage, from one of its values, made a leaf of the gradient, to another.

    What a value inside is does not matter, only where it goes: nothing before it is run.
    """

    def __init__(self, stage: Stage, start: fx.Node, end: fx.Node) -> None:
        super().__init__(stage.graph_module)
        self.stage, self.start, self.end = stage, start, end
        self.needed = reached([end], lambda node: [] if node is start else sources(node))
        self.found: dict[fx.Node, Tensor] = {}

    def run_from(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The values of ``start`` and ``end``."""
        values = dict(named_tensors(given))
        self.run(*(values[port.name] for port in self.stage.inputs))
        return self.found[self.start], self.found[self.end]

    def run_node(self, node: fx.Node) -> Any:
        value: Any = None
        if node.op == "placeholder" or (node in self.needed and node is not self.start):
            value = super().run_node(node)
        if node is self.start:
            value = _like(node.meta["val"]) if value is None else value.detach()
            value = value.requires_grad_()
        if node in (self.start, self.end):
            self.found[node] = value
        return value


def _like(val: Tensor) -> Tensor:
    """Random numbers of the shape, type and device of a value."""
    numbers = torch.randn(val.shape, generator=torch.Generator().manual_seed(1))
    return numbers.to(val.device, val.dtype)


def mean_by_token(rows: Tensor, tokens: Tensor, modality: Tensor) -> Tensor:
    """Rows of the encoder in the order of a prompt.

    Args:
        rows: ``[rows, ...]``.
        tokens: int64 ``[rows]``, see :class:`Route`.
        modality: int64 ``[batch, tokens]`` of the prompt.

    Returns:
        float32 ``[batch, tokens, ...]``: the mean of the rows that a visual token is made of, 0
        where there are none.
    """
    vision = modality == Modality.VISION
    there = tokens >= 0
    count = int(vision.sum())
    total = torch.zeros(count, *rows.shape[1:], device=rows.device)
    total.index_add_(0, tokens[there], rows[there].float())
    number = torch.bincount(tokens[there], minlength=count).clamp(min=1)
    result = torch.zeros(*modality.shape, *rows.shape[1:], device=rows.device)
    result[vision] = total / number.view(-1, *[1] * (rows.ndim - 1))
    return result


def pixels_by_token(
    images: Tensor, first: Tensor, offsets: Tensor, tokens: Tensor, modality: Tensor
) -> Tensor:
    """Pixels of the patches that each visual token is made of, one behind the other.

    Args:
        images: as the encoder takes them.
        first: int64 ``[rows]``, and offsets int64 ``[pixels]``: see :func:`_pixels_of_rows`.
        tokens: int64 ``[rows]``, see :class:`Route`.
        modality: int64 ``[batch, tokens]`` of the prompt.

    Returns:
        float32 ``[batch, tokens, pixels of a token]``, 0 for tokens that no patch is part of.
    """
    there = (tokens >= 0) & (first >= 0)
    rows, token = torch.nonzero(there)[:, 0], tokens[there]
    order = torch.sort(token, stable=True).indices
    filled, counts = torch.unique(token, return_counts=True)
    places = (first[rows[order], None] + offsets).view(len(filled), -1)
    assert len(set(counts.tolist())) == 1
    vision = modality == Modality.VISION
    values = images.new_zeros(int(vision.sum()), places.shape[1], dtype=torch.float32)
    values[filled] = images.flatten()[places].float()
    result = images.new_zeros(*modality.shape, places.shape[1], dtype=torch.float32)
    result[vision] = values
    return result


def named_tensors(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors among keyword arguments, named as the tracer names its inputs."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from named_tensors(value, f"{name}_")
        elif isinstance(value, (list, tuple)):
            yield from named_tensors({str(i): item for i, item in enumerate(value)}, f"{name}_")


class _DecoderReachedError(Exception):
    """Everything before the decoder has run."""


class _Run:
    """One run up to the decoder, patches made leaves of the gradient."""

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module | None,
        decoder: nn.Module,
        encoded: Sequence[Any],
    ) -> None:
        self.encoder, self.projector, self.decoder = encoder, projector, decoder
        self.known = encoded
        self.leaves: list[dict[str, Tensor]] = []
        self.projected: list[tuple[Tensor, dict[str, Tensor]]] = []
        self.embeddings: Tensor | None = None
        self.given: list[Tensor] = []  # what the decoder gets, as far as it has a gradient

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [
            self.encoder.register_forward_hook(self._encoded),
            self.decoder.register_forward_pre_hook(self._decoding, with_kwargs=True),
        ]
        if self.projector is not None:
            hooks.append(self.projector.register_forward_hook(self._projected, with_kwargs=True))
        try:
            with self._replaying():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _replaying(self) -> Iterator[None]:
        """Let the encoder return what it has returned before, as long as that lasts."""
        own = vars(self.encoder).get("forward")
        original, known = self.encoder.forward, list(self.known)
        self.encoder.forward = lambda *args, **kwargs: (
            known.pop(0) if known else original(*args, **kwargs)
        )
        try:
            yield
        finally:
            del self.encoder.forward
            if own is not None:
                self.encoder.forward = own

    def _encoded(self, _: nn.Module, args: Any, output: Any) -> Any:
        leaves: dict[str, Tensor] = {}

        def leaf(path: Any, value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            # of inference mode, there is no gradient
            fresh = value.clone() if value.is_inference() else value.detach()
            fresh.requires_grad_()
            leaves[name_of(path)] = fresh
            return fresh

        self.leaves.append(leaves)
        return pytree.tree_map_with_path(leaf, output)

    def _projected(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        left = {
            name_of(path): value
            for path, value in pytree.tree_leaves_with_path(output)
            if isinstance(value, Tensor) and value.requires_grad
        }
        if given and given[0].is_floating_point() and given[0].requires_grad:
            self.projected.append((given[0], left))

    def _decoding(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.embeddings = kwargs.get("inputs_embeds")
        leaves = pytree.tree_leaves(kwargs)
        self.given = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
        raise _DecoderReachedError


def name_of(path: Any) -> str:
    """A place in an output, named as the ports of stages are: ``hidden_states_3``."""
    parts = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))) for key in path]
    return "_".join(map(str, parts)) or "output"


def _depended_on(values: list[Tensor], leaves: dict[str, Tensor]) -> tuple[str, ...]:
    if not values:
        return ()
    total = torch.stack([value.float().sum() for value in values]).sum()
    found: Any = torch.autograd.grad(
        total, [*leaves.values()], retain_graph=True, allow_unused=True
    )
    return tuple(name for name, gradient in zip(leaves, found, strict=True) if gradient is not None)


def _routes(
    value: Tensor, sources: list[Tensor], *, by_element: bool = False
) -> list[Route | None]:
    """Route of each row of each source, or of each element, to ``value`` ``[visual tokens]``.

    The number of the token is read bit by bit: a gradient of the tokens in whose number a bit is
    set either is the gradient of all, or nothing.
    """
    everything = _gradients(value, sources, by_element)
    number = torch.arange(len(value), device=value.device)
    found = [torch.zeros(g.shape[:-1], dtype=torch.int64, device=g.device) for g in everything]
    clear = [torch.ones_like(f, dtype=torch.bool) for f in found]
    for bit in range(max(1, (len(value) - 1).bit_length())):
        some = _gradients(value * (number >> bit & 1), sources, by_element)
        for at, (part, whole) in enumerate(zip(some, everything, strict=True)):
            share = (part * whole).sum(-1) / whole.square().sum(-1).clamp(min=1e-30)
            found[at] += (share > 0.5).long() << bit
            clear[at] &= (share.abs() < 0.02) | ((share - 1).abs() < 0.02)
    routes: list[Route | None] = []
    for tokens, one, whole in zip(found, clear, everything, strict=True):
        read = whole.abs().amax(-1) > 0
        if bool((read & ~one).any()):
            routes.append(None)
            continue
        tokens = torch.where(read, tokens, -1)
        routes.append(Route(tuple(tokens.shape), tuple(tokens.flatten().tolist())))
    return routes


def _gradients(value: Tensor, sources: list[Tensor], by_element: bool) -> list[Tensor]:
    found: Any = torch.autograd.grad(value.sum(), sources, retain_graph=True, allow_unused=True)
    gradients = [
        torch.zeros_like(source) if gradient is None else gradient.float()
        for source, gradient in zip(sources, found, strict=True)
    ]
    return [gradient[..., None] for gradient in gradients] if by_element else gradients


def _is_copied(rows: Tensor, left: Tensor, route: Route) -> bool:
    """Whether rows that left the projector are tokens as they are, one each."""
    tokens = torch.tensor(route.tokens, device=rows.device)
    there = tokens >= 0
    if left.shape != (*route.shape, rows.shape[-1]) or not bool(there.any()):
        return False
    if len(tokens[there].unique()) != int(there.sum()):
        return False
    return bool((rows[tokens[there]] == left.flatten(0, -2)[there].to(rows.dtype)).all())
