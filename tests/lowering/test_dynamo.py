"""The door ``torch.compile(backend="vlmopt")``, against the masked eager model."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.experts import ExpertOracle, Rule
from oracles.masked import MaskOracle
from torch._dynamo.exc import BackendCompilerFailed

import vlmopt
from tests.mixtures import mixtral, prompt_of_text, spread
from vlmopt.errors import NoVisualTokensError, OptionError, PreconditionError
from vlmopt.lowering.dynamo import vlmopt_backend

TEXT = "v2drop{layers=1,3 keep=0.5}"
CUTS = {1: 0.5, 3: 0.5}
SHOWN = ("llava", "llava_onevision", "internvl", "smolvlm", "gemma3")
"""Families whose graph in Dynamo shows the visual tokens."""
HIDDEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, passes: str = TEXT, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(
        model,
        backend=vlmopt_backend,
        dynamic=dynamic,
        options={"passes": passes, "lowering": "eager", **options},
    )


def masked(model: Any, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the tokens that stay, which of them are no padding, and their slots."""
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, CUTS)
    with oracle.active():
        logits = model(**inputs).logits
    kept = torch.stack([torch.nonzero(row)[:, 0] for row in oracle.present])
    rows = logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[-1]))
    return rows, inputs["attention_mask"].gather(1, kept).bool(), kept


def check(got: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", SHOWN)
@torch.no_grad()
def test_compiling_drops_what_masking_hides(family: str, batch: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=batch)
    wanted, real, _ = masked(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(compiled(model)(**inputs).logits, wanted, real)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", HIDDEN)
@torch.no_grad()
def test_annotating_shows_the_tokens_of_models_that_break(family: str, batch: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=batch)
    wanted, real, kept = masked(model, inputs)
    with vlmopt.annotate(model) as annotation:
        check(compiled(model)(**inputs).logits, wanted, real)
        assert annotation.kept is not None
        assert torch.equal(annotation.kept, kept)


@torch.no_grad()
def test_a_model_that_breaks_says_so_once_and_runs_untouched() -> None:
    model, inputs = zoo.build("qwen2_vl"), zoo.inputs("qwen2_vl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = compiled(model)
        first, second = run(**inputs).logits, run(**inputs).logits
    ours = [str(one.message) for one in caught if "vlmopt" in str(one.message)]
    assert len(ours) == 1
    assert "vlmopt.annotate(model)" in ours[0]
    assert "vlmopt.optimize(model, inputs, passes)" in ours[0]
    wanted = model(**inputs).logits
    assert (first - wanted).abs().max() <= 1e-5
    assert torch.equal(first, second)


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_new_lengths_of_prompts(dynamic: bool | None) -> None:
    model = zoo.build("llava")
    run = compiled(model, dynamic=dynamic)
    for words in (6, 9, 13, 20):
        inputs = zoo.inputs("llava", text=(words,), seed=words)
        wanted, real, _ = masked(model, inputs)
        check(run(**inputs).logits, wanted, real)


@torch.no_grad()
def test_a_memory_from_prompt_to_prompt_is_refused() -> None:
    model, inputs = zoo.build("llava", layers=1), zoo.inputs("llava")
    with pytest.raises(BackendCompilerFailed, match="remembers from prompt to prompt"):
        compiled(model, "evs{carry=true}")(**inputs)


def test_a_prompt_without_image_is_untouched() -> None:
    model, prompt = zoo.build("llava"), torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        got = compiled(model)(input_ids=prompt).logits
        assert (got - model(input_ids=prompt).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_are_those_of_the_masked_model(lowering: str) -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    weight = model.get_input_embeddings().weight
    wanted, real, _ = masked(model, inputs)
    (reference,) = torch.autograd.grad(wanted[real].sin().sum(), weight)
    out = compiled(model, lowering=lowering)(**inputs).logits
    check(out, wanted, real)
    (gradient,) = torch.autograd.grad(out[real].sin().sum(), weight)
    assert reference.abs().max() > 0.1
    assert (gradient - reference).abs().max() <= 1e-4


def test_an_annotated_model_takes_its_loss_over_the_tokens_left() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=3)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == zoo.IMAGE, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    wanted, _, kept = masked(model, inputs)
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].gather(1, kept)
    reference = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), following.flatten())
    with vlmopt.annotate(model):
        loss = compiled(model)(**inputs, labels=labels).loss
    assert (loss - reference).abs() <= 1e-5


@torch.no_grad()
def test_without_passes_it_is_inductor() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).softmax(-1)

    torch.manual_seed(0)
    model, x = Small(), torch.randn(4, 8)
    wanted = torch.compile(model)(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend=vlmopt_backend)(x), wanted)
    torch._dynamo.reset()
    tuned = torch.compile(model, backend=vlmopt_backend, options={"epilogue_fusion": False})
    assert (tuned(x) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"passes": TEXT, "max_autotun": True}, "'max_autotun' is neither vlmopt's nor Inductor's"),
        ({"passes": 3}, "option passes is 3, not the text of a pipeline"),
        ({"passes": TEXT, "lowering": "tvm"}, "lowering is 'tvm', not one of inductor, eager"),
        ({"passes": "v2drop{layer=1}"}, "v2drop has no option layer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(OptionError, match=text):
        vlmopt_backend(gm, [torch.ones(1, 2)], options=options)


EXPERTS: list[tuple[str, Rule]] = [
    (
        "modes{text=0.45 vision=0.55}",
        lambda layer, weights, kind: [w >= {"text": 0.45, "vision": 0.55}[kind] for w in weights],
    ),
    ("naee{beta=0.7}", lambda layer, weights, kind: [w >= 0.7 * max(weights) for w in weights]),
    ("expert-topk{k=1}", lambda layer, weights, kind: [w == max(weights) for w in weights]),
]


@pytest.mark.parametrize(("text", "rule"), EXPERTS[:1])
@torch.no_grad()
def test_experts_are_skipped_by_modality(text: str, rule: Rule) -> None:
    def made() -> Any:
        return spread(zoo.build("qwen3_vl_moe", layers=2))

    inputs = zoo.inputs("qwen3_vl_moe", batch=2)
    oracle = ExpertOracle(made(), zoo.visual(inputs), rule)
    wanted = oracle.logits(inputs)
    assert 0 < oracle.skipped < oracle.total
    model = made()
    with vlmopt.annotate(model):
        found = compiled(model, text)(**inputs).logits
    check(found, wanted, inputs["attention_mask"].bool())
    optimized = vlmopt.optimize(made(), inputs, text, backend="eager")
    check(found, optimized(**inputs).logits, inputs["attention_mask"].bool())


@pytest.mark.parametrize(("text", "rule"), EXPERTS[1:])
@torch.no_grad()
def test_experts_are_skipped_where_all_is_text(text: str, rule: Rule) -> None:
    """In prompts of any length, and in decoding; passes for vision find nothing to do."""
    run = compiled(mixtral(), f"v2drop{{layers=1 keep=0.5}} | {text}", dynamic=True)
    for length in (9, 12):
        inputs = prompt_of_text(length)
        visual = torch.zeros_like(inputs["input_ids"]).bool()
        oracle = ExpertOracle(mixtral(), visual, rule)
        wanted = oracle.logits(inputs)
        assert 0 < oracle.skipped < oracle.total
        out = run(**inputs)
        check(out.logits, wanted, inputs["attention_mask"].bool())
    more = {
        "input_ids": torch.tensor([[5], [6]]),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    found = run(**more, past_key_values=out.past_key_values).logits
    whole = {**more, "input_ids": torch.cat([inputs["input_ids"], more["input_ids"]], 1)}
    oracle = ExpertOracle(mixtral(), torch.zeros_like(whole["input_ids"]).bool(), rule)
    check(found, oracle.logits(whole)[:, -1:], torch.ones(2, 1).bool())


@torch.no_grad()
def test_a_fixed_number_of_pairs_needs_prompts_of_one_length() -> None:
    text, rule = "expert-topk{k=1 static}", EXPERTS[2][1]
    inputs = prompt_of_text(9)
    with pytest.raises(Exception, match="is to be fixed, and its graph is for prompts of any len"):
        compiled(mixtral(), text, dynamic=True)(**inputs)
    torch._dynamo.reset()
    wanted = ExpertOracle(mixtral(), torch.zeros(2, 9).bool(), rule).logits(inputs)
    found = compiled(mixtral(), text, dynamic=False)(**inputs).logits
    check(found, wanted, inputs["attention_mask"].bool())


@torch.no_grad()
def test_embeddings_do_not_show_what_is_text() -> None:
    model, inputs = mixtral(), prompt_of_text(9)
    given = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    with pytest.warns(UserWarning, match="does not show which of them come from vision"):
        found = compiled(model, "expert-topk{k=1}")(**given).logits
    check(found, mixtral()(**inputs).logits, inputs["attention_mask"].bool())


def test_annotations_can_be_undone() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    before = set(vars(model)), set(vars(model.get_decoder()))
    with torch.no_grad():
        wanted = model(**inputs).logits
        annotation = vlmopt.annotate(model)
        assert vlmopt.annotate(model) is annotation
        assert torch.equal(model(**inputs).logits, wanted)
        annotation.remove()
        assert (set(vars(model)), set(vars(model.get_decoder()))) == before
        assert torch.equal(model(**inputs).logits, wanted)


def test_what_cannot_be_annotated() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(PreconditionError, match="Linear has no decoder to annotate"):
        vlmopt.annotate(torch.nn.Linear(2, 2))
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )
    with pytest.raises(NoVisualTokensError, match="none of its tokens comes from vision"):
        vlmopt.annotate(LlamaForCausalLM(config))


BY_NAME = """
import sys, torch, zoo
model, inputs = zoo.build("llava"), zoo.inputs("llava")
run = torch.compile(
    model, backend="vlmopt", options={"passes": "v2drop{layers=2 keep=0.5}", "lowering": "eager"}
)
with torch.no_grad():
    print(run(**inputs).logits.shape[1], inputs["input_ids"].shape[1])
"""


def test_by_name_without_importing_vlmopt() -> None:
    if not entry_points(group="torch_dynamo_backends", name="vlmopt"):
        pytest.skip("vlmopt is not installed in this interpreter")
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", BY_NAME], capture_output=True, text=True, cwd=tests, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["19", "27"]
