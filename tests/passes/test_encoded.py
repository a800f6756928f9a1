"""Methods that read the vision encoder, against eager references on the user's own model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import encoded, methods
from oracles.agreement import check
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.encoding import Encoding, find_encoding
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens.zoo_prune import unit_vectors
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Role

Plan = list[tuple[int, methods.Choose]]


def half(original: int, present: int) -> int:
    return present // 2


def quarter(original: int, present: int) -> int:
    return original // 4


CASES: dict[str, tuple[str, Callable[[Any], Plan]]] = {
    "visionzip": (
        "visionzip{keep=0.5 context=0.25 positions=keep}",
        lambda found: [(0, encoded.visionzip(found, half, 0.25))],
    ),
    "visionzip-few": (
        "visionzip{keep=0.25 context=0.5 positions=keep}",
        lambda found: [(0, encoded.visionzip(found, quarter, 0.5))],
    ),
    "duet-vlm": (
        "duet-vlm{dominant=6 context=2 width=3 layers=2 keep=0.5 positions=keep}",
        lambda found: [
            (0, encoded.duet_encoder(found, 6, 2, 3)),
            (2, methods.duet(lambda original, present: 4)),
        ],
    ),
    "score": (
        "score{keep=0.5 positions=keep}",
        lambda found: [(0, encoded.score(found, half, 0.8))],
    ),
    "composed": (
        "visionzip{keep=0.5 context=0.25 positions=keep} | fastv{layers=2 keep=0.5}",
        lambda found: [(0, encoded.visionzip(found, half, 0.25)), (2, methods.fastv(half))],
    ),
}
FAMILIES = dict.fromkeys(CASES, ("llava", "qwen2_5_vl")) | {
    "visionzip": ("llava", "gemma3", "smolvlm", "qwen2_5_vl"),
    "score": ("llava", "gemma3", "smolvlm", "qwen2_5_vl"),
}
ZOO_PRUNE = "zoo-prune{keep=0.5 directions=6 positions=keep}"


@pytest.mark.parametrize(
    ("method", "family"), [(name, family) for name in CASES for family in FAMILIES[name]]
)
def test_a_method_equals_its_eager_reference(method: str, family: str) -> None:
    text, plan = CASES[method]
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    found = encoded.Encoded(model, inputs, family)
    visual = inputs["input_ids"] == zoo.IMAGE
    check(model, inputs, text, ReducedOracle(model, inputs, visual, plan(found)))


@pytest.mark.parametrize("family", encoded.TAILS)
def test_zoo_prune_equals_finite_differences(family: str) -> None:
    """The projector bends or is linear, is a stage or the end of the encoder."""
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    entering = encoded.Entering(model, inputs, family)
    directions = unit_vectors(6, entering.rows[0].shape[-1], 0)
    plan: Plan = [(0, encoded.zoo_prune(entering, half, directions, 1e-4))]
    visual = inputs["input_ids"] == zoo.IMAGE
    check(model, inputs, ZOO_PRUNE, ReducedOracle(model, inputs, visual, plan), tokens=8)


@pytest.mark.parametrize(
    "text", [*(CASES[name][0] for name in ("visionzip", "duet-vlm", "score")), ZOO_PRUNE]
)
def test_a_batch_equals_its_samples(text: str) -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2, text=(6, 6))
    with torch.no_grad():
        together = vlmopt.optimize(model, inputs, text, backend="eager")(**inputs).logits
    for sample in range(2):
        one = {key: value[sample : sample + 1] for key, value in inputs.items()}
        with torch.no_grad():
            alone = vlmopt.optimize(model, one, text, backend="eager")(**one).logits
        torch.testing.assert_close(together[sample], alone[0], atol=1e-5, rtol=1e-5)


def test_samples_with_more_images_share_budgets_of_their_own() -> None:
    """A sample of two images keeps half of 32, one of one image half of 16."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2, images=(1, 2))
    optimized = vlmopt.optimize(model, inputs, "score{keep=0.5}", backend="eager")
    with torch.no_grad():
        kept = optimized(**inputs).past_key_values.kept["kept_1_slots"]
    visual = inputs["input_ids"] == zoo.IMAGE
    for sample, wanted in enumerate((8, 16)):
        slots = kept[sample][kept[sample] >= 0]
        assert int(visual[sample, slots].sum()) == wanted


def test_prompts_of_other_shapes_are_followed_anew() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=1)
    optimized = vlmopt.optimize(model, inputs, "score{keep=0.5}", backend="eager")
    other = zoo.inputs("llava", batch=1, text=(9,), images=(2,), seed=3)
    direct = vlmopt.optimize(model, other, "score{keep=0.5}", backend="eager")
    arguments = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    found = optimized.generate(**other, **arguments)
    assert found.tolist() == direct.generate(**other, **arguments).tolist()
    assert len(optimized.vlmopt.specialisations) == 2


def test_beams_find_their_images() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=1)
    arguments = {"do_sample": False, "max_new_tokens": 4, "num_beams": 2, "eos_token_id": None}
    whole = vlmopt.optimize(model, inputs, "score{keep=16}", backend="eager")
    assert whole.generate(**inputs, **arguments).tolist() == (
        model.generate(**inputs, **arguments).tolist()
    )
    few = vlmopt.optimize(model, inputs, "score{keep=8}", backend="eager")
    assert few.generate(**inputs, **arguments).shape[1] == inputs["input_ids"].shape[1] + 4


def test_the_encoder_gives_what_the_model_reads() -> None:
    """LLaVA reads the second last hidden state: the last block is not even captured."""
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    model.config.vision_feature_layer = -2
    program = vlmopt.capture(model, inputs)
    stage = program["vision_encoder"]
    (port,) = stage.outputs
    with torch.no_grad():
        wanted = model.get_encoder("image")(inputs["pixel_values"], output_hidden_states=True)
        (found,) = stage.graph_module(inputs["pixel_values"])
    torch.testing.assert_close(found, wanted.hidden_states[-2])
    assert port.name == f"hidden_states_{len(wanted.hidden_states) - 2}"


def test_ports_of_both_stages() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    run_pipeline(program, "visionzip{keep=0.5}")
    gives = [port.name for port in program["vision_encoder"].find_outputs(Role.ENCODED)]
    assert gives == ["encoded_attention", "encoded_keys"]
    takes = [port.name for port in program["language_model"].find_inputs(Role.ENCODED)]
    assert takes == [*gives, "encoded_features"]


def test_without_weights_nothing_is_followed() -> None:
    with torch.device("meta"):
        model = zoo.build("llava")
    program = vlmopt.capture(model, zoo.inputs("llava"))
    with pytest.raises(PreconditionError, match="capture needs weights to find out"):
        run_pipeline(program, "visionzip{keep=0.5}")


def test_both_stages_at_one_layer_are_refused() -> None:
    with pytest.raises(OptionError, match="both stages would cut at layer 0"):
        run_pipeline(
            vlmopt.capture(zoo.build("llava"), zoo.inputs("llava")),
            "duet-vlm{dominant=0.5 layers=0 keep=0.5}",
        )


def test_rows_that_feed_several_tokens_have_no_route() -> None:
    """A resampler mixes all patches into each token."""
    from vlmopt.encoding import _routes

    rows = torch.randn(6, 4, requires_grad=True)
    mixed = torch.randn(3, 6) @ rows
    copied = rows[[4, 2, 0]]
    assert _routes(mixed.sum(-1), [rows]) == [None]
    (route,) = _routes(copied.sum(-1), [rows])
    assert route is not None
    assert route.tokens == (2, -1, 1, -1, 0, -1)
    assert Encoding((), {}, None).projector is None


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("tome{r=2} | visionzip{keep=0.5}", "tome.* has merged or dropped patches in the encoder"),
        ("visionzip{keep=0.5} | tome{r=2}", "a pass before reads what each patch"),
    ],
)
def test_patches_are_merged_or_read(pipeline: str, why: str) -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    with pytest.raises(PreconditionError, match=why):
        run_pipeline(program, pipeline)


def test_what_the_encoder_returned_is_not_computed_again() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
    tower, decoder = model.get_encoder("image"), model.get_decoder()
    projector = model.model.multi_modal_projector
    visual = inputs["input_ids"] == zoo.IMAGE

    def follow(*encoded: Any) -> Encoding | None:
        return find_encoding(model, inputs, tower, projector, decoder, visual, encoded)

    computed = follow()
    with torch.inference_mode():
        returned = tower(inputs["pixel_values"], output_hidden_states=True)

    def refuse(*args: Any) -> None:
        raise AssertionError("the encoder runs again")

    tower.encoder.layers[0].register_forward_hook(refuse)
    assert follow(returned) == computed
    assert computed is not None
    assert computed.tokens == ("projector", "output", computed.projector)
    assert "forward" not in vars(tower)
    with pytest.raises(AssertionError, match="runs again"):
        follow()


def test_two_cuts_share_the_rows_of_a_merger() -> None:
    model, inputs = zoo.build("qwen2_vl"), zoo.inputs("qwen2_vl", batch=2)
    text = "zoo-prune{keep=0.5 directions=4} | zoo-prune{layers=2 keep=0.5 directions=4}"
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        kept = optimized(**inputs).past_key_values.kept["kept_2_slots"]
    visual = inputs["input_ids"] == zoo.IMAGE
    assert [int(visual[b, slots[slots >= 0]].sum()) for b, slots in enumerate(kept)] == [4, 4]
    gives = optimized.vlmopt.program["vision_encoder"].find_outputs(Role.ENCODED)
    assert [port.name for port in gives] == ["encoded_rows"]


def test_a_linear_projector_is_remarked_on() -> None:
    program = vlmopt.capture(zoo.build("smolvlm"), zoo.inputs("smolvlm"))
    report = run_pipeline(program, "zoo-prune{keep=0.5}")
    (remark,) = report.records[0].result.remarks
    assert "chosen by distance alone" in remark.text
