"""The vision encoder of an optimized model, where passes have rewritten it or read its values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.exporters.utils import precompute_export_inputs

from vlmopt.encoding import mean_by_token, name_of, named_tensors, pixels_by_token
from vlmopt.errors import PreconditionError
from vlmopt.program import Program, Role, Stage
from vlmopt.rewrite.encoded import FEATURES, PIXELS, ROWS

RETRIEVED = (Role.RETRIEVED_QUESTION, Role.RETRIEVED_PAGE)

Compile = Callable[[Stage], Callable[..., tuple[Tensor, ...]]]
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class EncoderStage:
    """The rewritten stage in place of the module's own forward pass; the projector's too.

    Args:
        run: outputs by name of the encoder, from its inputs by name, where it is not enough to
            call the stage.
    """

    def __init__(self, program: Program, compile_stage: Compile, run: Run | None = None) -> None:
        self.stage = program["vision_encoder"]
        self._run = run or partial(_run_stage, self.stage, compile_stage(self.stage))
        self._project: Callable[..., tuple[Tensor, ...]] | None = None
        if "projector" in program and program["projector"].find_outputs(Role.ENCODED):
            self.projector = program["projector"]
            self._project = compile_stage(self.projector)
        self.retrieved = {
            port.name: tuple(self.stage.placeholder(port).meta["val"].shape)
            for port in self.stage.inputs
            if port.role in RETRIEVED
        }
        self.wanted = [
            port.name.removeprefix("encoded_")
            for port in program["language_model"].find_inputs(Role.ENCODED)
        ]
        routes = self.stage.facts.get("encoding", {})
        self._tokens = {
            name: torch.tensor(routes[name]["tokens"])
            for name in ("rows", "projector", "tokens")
            if routes.get(name)
        }
        self._pixels = routes.get("pixels")
        if self._pixels is not None:
            self._first = torch.tensor(self._pixels["first"])
            self._offsets = torch.tensor(self._pixels["offsets"])

    def encode(
        self, module: nn.Module, given: dict[str, Any], retrieved: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Outputs of the stage by name.

        Args:
            module: the encoder; what its inputs leave to be computed is computed by its own code.
            given: keyword arguments of its forward.
            retrieved: embeddings of a retriever, where a pass reads them.

        Raises:
            PreconditionError: other shapes than those captured.
        """
        inputs = dict(given)
        with torch.no_grad():
            precompute_export_inputs(module, inputs)
        values = dict(named_tensors(inputs))
        values |= {name: self._retrieved(name, retrieved.get(name)) for name in self.retrieved}
        outputs = self._run(values)
        if PIXELS in self.wanted:
            outputs[PIXELS] = values[self._pixels["input"]]
        return outputs

    @property
    def projects(self) -> bool:
        """Whether the projector gives more than its module would."""
        return self._project is not None

    def project(self, given: dict[str, Any]) -> dict[str, Tensor]:
        """Outputs of the projector's stage by name.

        Args:
            given: keyword arguments of its module's forward.

        Raises:
            PreconditionError: other shapes than those captured.
        """
        assert self._project is not None
        return _run_stage(self.projector, self._project, dict(named_tensors(given)))

    def _retrieved(self, name: str, value: Tensor | None) -> Tensor:
        """Embeddings of a retriever; a shorter question gets zeros behind it."""
        wanted = self.retrieved[name]
        if value is None:
            raise PreconditionError(
                f"this model drops patches by the question, and there is no {name} {list(wanted)}",
                hint=f"give forward or generate {name}=..., the embeddings of a retriever",
            )
        value = value.float()
        missing = wanted[1] - value.shape[1] if value.ndim == 3 else 0
        if name == Role.RETRIEVED_QUESTION and missing > 0:
            value = torch.nn.functional.pad(value, (0, 0, 0, missing))
        if tuple(value.shape) != wanted:
            raise PreconditionError(
                f"{name} is {list(value.shape)}, and the pass was told of {list(wanted)}",
                hint="see its options retriever and question",
            )
        return value

    def tokens(
        self, outputs: Mapping[str, Tensor], features: Tensor | None, modality: Tensor
    ) -> dict[str, Tensor]:
        """What the language model takes from the encoder, in the order of the prompt."""
        found = {}
        for name in self.wanted:
            if name == PIXELS:
                images = outputs[PIXELS]
                first, offsets, tokens = (
                    route.to(images.device)
                    for route in (self._first, self._offsets, self._tokens["rows"])
                )
                found["encoded_pixels"] = pixels_by_token(images, first, offsets, tokens, modality)
                continue
            rows = features if name == FEATURES else outputs[f"encoded_{name}"]
            if rows is None:
                raise PreconditionError(
                    "the projector did not run before the language model",
                    hint="give pixel values, not embeddings",
                )
            if name in (FEATURES, ROWS):
                rows = rows.flatten(0, -2)
            tokens = self._tokens[_ROUTES.get(name, "rows")]
            found[f"encoded_{name}"] = mean_by_token(rows, tokens.to(rows.device), modality)
        return found


_ROUTES = {FEATURES: "projector", ROWS: "tokens"}


def _run_stage(
    stage: Stage, run: Callable[..., tuple[Tensor, ...]], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs by name.

    Raises:
        PreconditionError: other shapes than those captured.
    """
    given = inputs_of(
        stage,
        values,
        stage.name.replace("_", " "),
        hint="prompts with images and videos, or with images encoded one by one, need passes that "
        "leave the encoder alone",
    )
    results = run(*given)
    return dict(zip((port.name for port in stage.outputs), results, strict=True))


def inputs_of(stage: Stage, values: Mapping[str, Tensor], what: str, *, hint: str) -> list[Tensor]:
    """The inputs of a stage in order, by the names of its ports.

    Args:
        what: the stage, in messages; ``hint``: what to try where shapes are others.

    Raises:
        PreconditionError: other shapes than those captured.
    """
    for port in stage.inputs:
        wanted = tuple(stage.placeholder(port).meta["val"].shape)
        found = values.get(port.name)
        if found is None or tuple(found.shape) != wanted:
            raise PreconditionError(
                f"the {what} was captured with {port.name} {list(wanted)}, and is called with "
                f"{None if found is None else list(found.shape)}",
                hint=hint,
            )
    return [values[port.name] for port in stage.inputs]


@dataclass(kw_only=True)
class Encoded:
    """What a prompt has become on its way to the language model.

    Attributes:
        encoded: what the encoder stage gave, and that of the projector where it runs.
        features: what entered the projector.
    """

    encoded: dict[str, Tensor] | None = None
    features: Tensor | None = None

    def tokens(self, stage: EncoderStage, modality: Tensor) -> dict[str, Tensor]:
        """What the language model takes; see :meth:`EncoderStage.tokens`.

        Raises:
            PreconditionError: the encoder did not run.
        """
        if self.encoded is None:
            raise PreconditionError(
                "the vision encoder did not run before the language model",
                hint="give pixel values, not embeddings",
            )
        return stage.tokens(self.encoded, self.features, modality)


class EncoderModules:
    """The modules of a model in whose place stages run; they give what the modules would."""

    def __init__(self, encoder: nn.Module | None, projector: nn.Module | None) -> None:
        self.encoder, self.projector = encoder, projector
        self._encoded: OutputForm | None = None
        self._projected: OutputForm | None = None

    def encode(
        self,
        stage: EncoderStage,
        prompt: Encoded,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        retrieved: Mapping[str, Tensor],
    ) -> Any:
        """The output of the encoder's module, by its stage."""
        assert self.encoder is not None
        if self._encoded is None:
            self._encoded = OutputForm(original(*args, **kwargs))
        prompt.encoded = stage.encode(self.encoder, bind(self.encoder, args, kwargs), retrieved)
        return self._encoded.fill(prompt.encoded)

    def project(
        self,
        stage: EncoderStage | None,
        prompt: Encoded,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The output of the projector's module, by its stage where there is need for that."""
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        prompt.features = given[0] if given else None
        if stage is None or not stage.projects:
            return original(*args, **kwargs)
        assert self.projector is not None
        assert prompt.encoded is not None, "the encoder runs before the projector"
        if self._projected is None:
            self._projected = OutputForm(original(*args, **kwargs))
        found = stage.project(bind(self.projector, args, kwargs))
        prompt.encoded |= found
        return self._projected.fill(found)


class OutputForm:
    """How a module's results are arranged, to be filled with others."""

    def __init__(self, example: Any) -> None:
        leaves, self._spec = pytree.tree_flatten_with_path(example)
        self._names = [name_of(path) for path, _ in leaves]

    def fill(self, values: Mapping[str, Tensor]) -> Any:
        """The module's output; what is not among ``values``, which nobody reads, is ``None``."""
        return pytree.tree_unflatten([values.get(name) for name in self._names], self._spec)


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def runs_encoder(program: Program) -> bool:
    """Whether a pass has rewritten the encoder, or the language model takes values of it."""
    if "vision_encoder" not in program:
        return False
    nodes = program["vision_encoder"].graph.nodes
    made = any("vlmopt" in (node.meta.get("custom") or {}) for node in nodes)
    return made or bool(program["language_model"].find_inputs(Role.ENCODED))
