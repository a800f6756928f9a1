"""Speculative decoding against plain decoding of the same compiled model, image by image.

Plain decoding is the same loop without drafts: a stage of one token on the same buffers. All
settings draw the same images in turns, each from the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmopt import digit_codes
from vlmopt.bench.models import layers_and_width
from vlmopt.bench.prefill import markdown, milliseconds
from vlmopt.bench.timing import Ratio, interleave, is_noisy
from vlmopt.digit_diffusion import labels_in_turn, load_judge
from vlmopt.errors import OptionError
from vlmopt.speculative.capture import DraftTree, capture_draft, capture_target
from vlmopt.speculative.decoders import TokenDecoder, text_decoder
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.eagle import EagleDecoder, EagleHead
from vlmopt.speculative.loop import Statistics
from vlmopt.speculative.session import SpeculativeSession

PLAIN = "plain decoding"

DIGITS_TREE = DraftTree(depth=4, width=4, nodes=12)
"""Of drafts for the bundled model: on a processor each node costs as much as a token."""


def parse_tree(text: str) -> DraftTree:
    """``4x10x59``: depth, width and nodes of drafts.

    Raises:
        OptionError: the text is none of these, or there is no such tree.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise OptionError(f"{text} is no size of drafts", hint="such as 4x10x59")
    return DraftTree(*(int(part) for part in parts))


@dataclass(frozen=True)
class Setting:
    """How drafts are treated; without a policy none are made."""

    policy: str | None
    acceptance: str = "exact"

    @property
    def name(self) -> str:
        return PLAIN if self.policy is None else f"{self.policy}, {self.acceptance}"


LANTERN = "lantern{delta=0.05 k=3}"

SETTINGS = (
    Setting(None),
    Setting("never"),
    Setting("uniform{interval=4}"),
    Setting("uniform{interval=2}"),
    Setting("dynamic{threshold=0.65}"),
    Setting("never", LANTERN),
    Setting("uniform{interval=4}", LANTERN),
)


@dataclass(frozen=True)
class Spoken:
    """One setting.

    Attributes:
        seconds: of each image.
        statistics: of all images together.
        accuracy: share of images in which the judge sees the digit asked for, if there is a judge.
        distance: Frechet distance of the judge's features from those of training images.
    """

    name: str
    seconds: Sequence[float]
    statistics: Statistics
    accuracy: float | None = None
    distance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """What draws: a decoder, its draft head, and what they are told.

    Attributes:
        prompts: for each image, int64 ``[2, tokens]``, the condition first.
        tokens: of an image.
        codebook: ``[codes, width]``.
    """

    decoder: TokenDecoder
    head: EagleHead
    prompts: Sequence[Tensor]
    tokens: int
    codebook: Tensor
    sampling: Sampling
    tree: DraftTree


def digits(images: int) -> Model:
    """The bundled model that draws digits, all digits in turn."""
    labels = labels_in_turn(images)
    return Model(
        digit_codes.code_decoder(digit_codes.load_model()),
        digit_codes.load_draft_head(),
        [digit_codes.prompts([label]) for label in labels.tolist()],
        digit_codes.TOKENS,
        digit_codes.load_vq().codebook.detach(),
        digit_codes.SAMPLING,
        DIGITS_TREE,
    )


def random(size: str, images: int) -> Model:
    """A Llama of ``LAYERSxWIDTH`` with random weights over 4096 codes, 96 of them to an image.

    Its draft head is as ignorant: what it is good for is the time that the loop takes itself.

    Raises:
        OptionError: ``size`` is none.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = layers_and_width(size, "a language model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=4096,
        max_position_embeddings=256,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    decoder = text_decoder(LlamaForCausalLM(config).eval())
    head = EagleHead(decoder.config).eval()
    prompts = [torch.tensor([[image % 4096], [0]]) for image in range(images)]
    codebook = torch.randn(4096, 8)
    how = Sampling(guidance=3.0, top_k=1000)
    return Model(decoder, head, prompts, 96, codebook, how, DraftTree())


def measure(
    model: Model,
    settings: Sequence[Setting] = SETTINGS,
    *,
    backend: str = "inductor",
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[list[Spoken], dict[str, Tensor]]:
    """Draw all images by each setting.

    Returns:
        Times and counts; and by name of the setting, tokens int64 ``[images, tokens]``.
    """
    capacity = model.prompts[0].shape[1] + model.tokens + model.tree.room
    sizes = {"capacity": capacity, "branches": 2}
    drafter = EagleDecoder(model.decoder, model.head).eval()
    progress("capturing")
    drafting = SpeculativeSession(
        capture_target(model.decoder, model.tree, **sizes),
        capture_draft(drafter, model.tree, **sizes),
        codebook=model.codebook,
        backend=backend,
    )
    one = DraftTree(depth=1, width=1, nodes=1)
    plain = SpeculativeSession(
        capture_target(model.decoder, one, **sizes), None, codebook=model.codebook, backend=backend
    )
    sessions = {
        each.name: plain
        if each.policy is None
        else drafting.with_rules(each.policy, each.acceptance)
        for each in settings
    }
    drawn: dict[str, list[Tensor]] = {name: [] for name in sessions}
    found: dict[str, list[Statistics]] = {name: [] for name in sessions}

    def draw(name: str) -> Callable[[], None]:
        def image() -> None:
            number = len(drawn[name]) % len(model.prompts)
            result = sessions[name].generate(
                model.prompts[number],
                max_new_tokens=model.tokens,
                sampling=model.sampling,
                generator=torch.Generator().manual_seed(number),
            )
            drawn[name].append(result.tokens)
            found[name].append(result.statistics)

        return image

    count = len(model.prompts)
    progress("compiling")
    seconds = interleave(
        {name: draw(name) for name in sessions},
        count - 1,
        progress=lambda done: progress(f"image {done + 1} of {count}"),
    )
    results = [Spoken(name, seconds[name], _together(found[name][1:])) for name in sessions]
    return results, {name: torch.stack(tokens) for name, tokens in drawn.items()}


def judged(spoken: Spoken, tokens: Tensor) -> tuple[Spoken, Tensor]:
    """What the judge says of the digits that a setting drew; the images, -1 to 1."""
    images, judge = digit_codes.decode(tokens), load_judge()
    accuracy = judge.accuracy(images, labels_in_turn(len(images)))
    return replace(spoken, accuracy=accuracy, distance=judge.distance(images)), images


def _together(each: Sequence[Statistics]) -> Statistics:
    """Of several generations."""
    total = Statistics()
    for one in each:
        total.tokens += one.tokens
        total.drafts += one.drafts
        total.skipped += one.skipped
        total.accepted += one.accepted
        total.seconds += one.seconds
        total.stage_seconds += one.stage_seconds
    return total


def table(results: Sequence[Spoken]) -> str:
    """The results as a Markdown table; times are medians over images."""
    seconds: Mapping[str, Sequence[float]] = {one.name: one.seconds for one in results}
    plain, exact = seconds.get(PLAIN), seconds.get(Setting("never").name)
    head = (
        "drafts, acceptance",
        "tokens per forward",
        "skipped",
        "time",
        "over plain (90 %)",
        "over never, exact",
        "outside of stages",
        "right",
        "Frechet distance",
    )
    rows = [
        (
            f"`{one.name}`" if one.name != PLAIN else one.name,
            f"{one.statistics.tokens_per_forward:.2f}",
            f"{one.statistics.skip_share:.0%}",
            milliseconds(one.seconds),
            _over(plain, one),
            _over(exact, one),
            f"{one.statistics.overhead:.1%}",
            "" if one.accuracy is None else f"{one.accuracy:.1%}",
            "" if one.distance is None else f"{one.distance:.2f}",
        )
        for one in results
    ]
    return markdown(head, rows)


def _over(slow: Sequence[float] | None, one: Spoken) -> str:
    if slow is None or slow is one.seconds:
        return ""
    noisy = is_noisy(slow) or is_noisy(one.seconds)
    return Ratio.of(slow, one.seconds).text(noisy=noisy)
