# ruff: noqa: E501 - golden text
import json
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from tests.toys import Decoder, decoder
from vlmopt.graph.diff import Matching, ProgramDiff, diff, ranges_text
from vlmopt.graph.diff_text import Display, Heading, PassLine, diff_json, render
from vlmopt.graph.snapshot import snapshot
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Cut, Port, Program, Role, Stage
from vlmopt.rewrite.emit import Emitter, propagate
from vlmopt.tracing import capture

aten = torch.ops.aten


@pytest.fixture(scope="module")
def before() -> Program:
    return decoder(layers=4)


def node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(n for n in program["model"].graph.nodes if n.name == name)
    return found


def emitter(program: Program, ctx: PassContext, place: fx.Node, match: int = 1) -> Emitter:
    stage = program["model"]
    return Emitter(
        stage.graph,
        stamp=lambda made: ctx.stamp(made, match),
        place=place,
        prefix=ctx.spec.split("{")[0].replace("-", "_"),
        fake_mode=stage.fake_mode(),
    )


def drop_tokens(program: Program, at: str, keep: int, *, match: int = 1) -> None:
    """A token cut without any method: the first ``keep`` tokens stay from ``at`` on."""
    stage = program["model"]
    ctx = PassContext("drop{keep=4}")
    hidden = node(program, at)
    before = hidden.meta["val"].shape[1]
    emit = emitter(program, ctx, hidden, match)
    users = list(hidden.users)
    with stage.graph.inserting_after(hidden):
        anchor = stage.graph.call_function(aten.alias.default, (hidden,))
    with stage.graph.inserting_before(anchor):
        kept = emit.call(aten.arange.default, keep, name="keep")
        out = emit.call(aten.index_select.default, hidden, 1, kept, name="out")
    stage.graph.erase_node(anchor)
    for user in users:
        user.replace_input_with(hidden, out)
    after = list(stage.graph.nodes)
    region = set(after[after.index(out) + 1 :])
    for member in region:
        if member.target is aten.view.default:
            sizes = [keep if size == before else size for size in member.args[1]]
            member.update_arg(1, sizes)
    propagate(stage.graph, region, stage.fake_mode())
    name = f"kept_{match}"
    output = stage.graph.output_node()
    output.args = ((*output.args[0], kept),)  # type: ignore[misc]
    stage.outputs = (*stage.outputs, Port(name, Role.KEPT))
    cut = Cut(1, (before, keep), ((before - 2, keep - 2),), name, ctx.spec)
    stage.cuts = (*stage.cuts, cut)
    stage.graph_module.recompile()


def hunks(text: str) -> str:
    """The part of a diff between the summary and the figures."""
    return "\n\n".join(block for block in text.split("\n\n") if block.startswith("@@"))


def show(before: Program, after: Program) -> str:
    return hunks(render(diff(before, after)))


def test_no_change(before: Program) -> None:
    result = diff(before, before.clone())
    assert not result.changed
    assert render(result) == "nodes matched by name\n\nno change"


def test_token_cut(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    assert_expected_inline(
        render(diff(before, after)),
        """\
nodes matched by name

@@ model  layers.1  [drop #1]  toys.py:29
  %add_1        = add(%add, %linear_2)                 f32[1,6,16]
+ %drop_keep    = arange(4)                            i64[4]      2 text + 2 visual
+ %drop_out     = index_select(%add_1, 1, %drop_keep)  f32[1,4,16]
! %layer_norm_1   arg 0: %add_1 -> %drop_out
! %add_2          arg 0: %add_1 -> %drop_out
~ 47 nodes change 6 -> 4 tokens, nothing else          (layers 1-3, head)
= layers 2-3 are equal to layer 1 up to names

roles         outputs output: 6 -> 4; + kept_1 i64[4]
model      before    after    change
  FLOPs    96 k      70 k     -27 %     by layer: 1.00 x1, 0.65 x3
  nodes    65        67       +2

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.""",
    )


def test_second_cut_is_told_as_a_repetition_of_the_first(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    drop_tokens(after, "add_5", 3, match=2)
    assert_expected_inline(
        render(diff(before, after)),
        """\
nodes matched by name

@@ model  layers.1  [drop #1]  toys.py:29
  %add_1        = add(%add, %linear_2)                 f32[1,6,16]
+ %drop_keep    = arange(4)                            i64[4]      2 text + 2 visual
+ %drop_out     = index_select(%add_1, 1, %drop_keep)  f32[1,4,16]
! %layer_norm_1   arg 0: %add_1 -> %drop_out
! %add_2          arg 0: %add_1 -> %drop_out
~ 30 nodes change 6 -> 4 tokens, nothing else          (layers 1-2)
= layer 2 is equal to layer 1 up to names

@@ model  layers.3  [drop #2]  same rewrite as #1, 2 -> 1
~ 15 nodes change 6 -> 4 -> 3 tokens, nothing else          (layer 3, head)

roles         outputs output: 6 -> 4 -> 3; + kept_1 i64[4]; + kept_2 i64[3]
model      before    after    change
  FLOPs    96 k      66 k     -31 %     by layer: 1.00 x1, 0.65 x2, 0.48 x1
  nodes    65        69       +4

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.""",
    )


def test_unfolded_hunk_lists_every_node(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_5", 4)
    folded, unfolded = (render(diff(before, after), fold=fold) for fold in (True, False))
    assert "    %linear_9  f32[1,6,48] -> f32[1,4,48]" in unfolded.splitlines()
    assert "    %linear_9  f32[1,6,48] -> f32[1,4,48]" not in folded.splitlines()


def test_hunk_side_by_side(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    text = hunks(render(diff(before, after), display=Display.SPLIT))
    assert_expected_inline(
        "\n".join(text.splitlines()[1:5]),
        """\
  %add_1 = add(%add, %linear_2)  f32[1,6,16] |   %add_1 = add(%add, %linear_2)  f32[1,6,16]
                                             | + %drop_keep = arange(4)  i64[4]
                                             | + %drop_out = index_select(%add_1, 1, %drop_keep)  f32[1,4,16]
! %layer_norm_1  arg 0: %add_1               | ! %layer_norm_1  arg 0: %drop_out""",
    )


def test_replaced_node_is_removed_added_and_rewired(before: Program) -> None:
    after = before.clone()
    old = node(after, "gelu")
    ctx = PassContext("fuse-act")
    with after["model"].graph.inserting_before(old):
        new = emitter(after, ctx, old).call(aten.silu.default, old.args[0], name="silu")
    old.replace_all_uses_with(new)
    after["model"].graph.erase_node(old)
    assert_expected_inline(
        show(before, after),
        """\
@@ model  layers.0  [fuse-act #1]  toys.py:28
  %linear_1      = linear(%add, %p_layers_0_up_weight, %p_layers_0_up_bias)  f32[1,6,32]
- %gelu          = gelu(%linear_1)  f32[1,6,32]
+ %fuse_act_silu = silu(%linear_1)  f32[1,6,32]
! %linear_2        arg 0: %gelu -> %fuse_act_silu""",
    )


def test_equal_rewrites_in_every_layer_are_folded(before: Program) -> None:
    after = before.clone()
    ctx = PassContext("fuse-act")
    for match, name in enumerate(("gelu", "gelu_1", "gelu_2"), start=1):
        old = node(after, name)
        with after["model"].graph.inserting_before(old):
            new = emitter(after, ctx, old, match).call(aten.silu.default, old.args[0])
        old.replace_all_uses_with(new)
        after["model"].graph.erase_node(old)
    assert_expected_inline(
        show(before, after).splitlines()[-1],
        """@@ model  layers.1-2  [fuse-act #2-3]  same rewrite as #1""",
    )


def test_changed_argument(before: Program) -> None:
    after = before.clone()
    node(after, "layer_norm").update_arg(4, 1e-6)
    assert_expected_inline(
        show(before, after),
        """\
@@ model  layers.0  toys.py:24
! %layer_norm   arg 4: 1e-05 -> 1e-06""",
    )


def test_changed_operator(before: Program) -> None:
    after = before.clone()
    node(after, "gelu").target = aten.silu.default
    assert_expected_inline(
        show(before, after),
        """\
@@ model  layers.0  toys.py:28
! %gelu   op: gelu -> silu""",
    )


def test_changed_dtype(before: Program) -> None:
    after = before.clone()
    with after["model"].fake_mode():
        node(after, "gelu").meta["val"] = torch.empty(1, 6, 32, dtype=torch.bfloat16)
    assert_expected_inline(
        show(before, after),
        """\
@@ model  (top)
~ %gelu  f32[1,6,32] -> bf16[1,6,32]""",
    )


def test_many_changed_dtypes_are_counted(before: Program) -> None:
    after = before.clone()
    with after["model"].fake_mode():
        for changed in after["model"].graph.find_nodes(
            op="call_function", target=aten.linear.default
        ):
            val = changed.meta["val"]
            changed.meta["val"] = torch.empty(val.shape, dtype=torch.bfloat16)
    assert "~ 13 nodes change type f32 -> bf16" in show(before, after).splitlines()


def test_size_that_is_a_factor_is_part_of_the_ripple() -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu().flatten(0, 1) * 2

    long, short = (capture(Flat(), (torch.randn(3, n, 5),)) for n in (8, 6))
    assert_expected_inline(
        show(long, short),
        """\
@@ model  (top)
~ 4 nodes change 8 -> 6 (2 as a factor), nothing else""",
    )


def test_matching_by_structure_where_names_differ(before: Program) -> None:
    class Shifted(Decoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.nn.functional.linear(x, torch.eye(16)))

    torch.manual_seed(0)
    after = capture(Shifted(4, 16), (torch.randn(1, 6, 16),))
    result = diff(before, after)
    assert result.matching is Matching.STRUCTURE
    added = {n.op for hunk in result.hunks() for n in hunk.added}
    removed = [n.name for hunk in result.hunks() for n in hunk.removed]
    assert {"eye", "linear", "add"} <= added
    assert removed == []
    assert render(result).startswith(
        "nodes matched by module path, operator and order (the names differ)\n"
    )


def test_both_ways_of_matching_agree_on_one_capture(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    by_name, by_structure = (
        render(diff(before, after, matching=how)).split("\n\n", 1)[1] for how in Matching
    )
    assert by_name == by_structure


def test_snapshot_outlives_a_rewrite_in_place(before: Program) -> None:
    program = before.clone()
    taken = snapshot(program)
    drop_tokens(program, "add_1", 4)
    assert render(diff(taken, program)) == render(diff(before, program))


def test_stage_that_only_one_program_has(before: Program) -> None:
    after = before.clone()
    after.stages["head"] = Stage(**{**vars(after.stages["model"]), "name": "head"})
    assert "stage head added: 65 nodes, 96 k FLOPs" in render(diff(before, after))
    assert "stage head removed: 65 nodes, 96 k FLOPs" in render(diff(after, before))


HEADING = Heading(
    before="toy.vlm",
    after="drop{keep=4} | fold",
    verified="full, 0.1 s",
    passes=(
        PassLine("drop", 1, True, "lossy", 2, 0, 55),
        PassLine("fold", 0, False, "exact", note="clean-up: zero allowed"),
    ),
    reproduce="vlmopt diff toy.vlm -p 'drop{keep=4} | fold'",
)


def test_heading_and_summary(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    assert_expected_inline(
        render(diff(before, after), HEADING, display=Display.SUMMARY),
        """\
toy.vlm  ->  drop{keep=4} | fold    verified: full, 0.1 s

drop    1 match      +2 -0 ~55 nodes    visual tokens 4 -> 2        lossy
fold    0 matches    no change          (clean-up: zero allowed)

roles         outputs output: 6 -> 4; + kept_1 i64[4]
model      before    after    change
  FLOPs    96 k      70 k     -27 %     by layer: 1.00 x1, 0.65 x3
  nodes    65        67       +2

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.  Reproduce: vlmopt diff toy.vlm -p 'drop{keep=4} | fold'""",
    )


@pytest.mark.parametrize(
    ("select", "shown"),
    [
        ({"only": "drop"}, True),
        ({"only": "fold"}, False),
        ({"module": "layers.*"}, True),
        ({"module": "vision*"}, False),
    ],
)
def test_selection_of_hunks(before: Program, select: dict[str, str], shown: bool) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    text = render(diff(before, after), **select)  # type: ignore[arg-type]
    assert ("@@ model" in text) is shown


def changes_of(result: ProgramDiff) -> tuple[int, int]:
    return sum(len(h.added) for h in result.hunks()), sum(len(h.removed) for h in result.hunks())


@pytest.mark.parametrize("swap", [lambda a, b: (a, b), lambda a, b: (b, a)])
def test_added_one_way_is_removed_the_other(
    before: Program, swap: Callable[[Program, Program], tuple[Program, Program]]
) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    added, removed = changes_of(diff(*swap(before, after)))
    assert {added, removed} == {0, 2}


def test_json(before: Program) -> None:
    after = before.clone()
    drop_tokens(after, "add_1", 4)
    document = json.loads(json.dumps(diff_json(diff(before, after), HEADING)))
    assert document["schema"] == 1
    assert document["changed"] is True
    assert document["matching"] == "name"
    assert [line["name"] for line in document["passes"]] == ["drop", "fold"]
    (stage,) = document["stages"]
    (hunk,) = stage["hunks"]
    assert [made["name"] for made in hunk["added"]] == ["drop_keep", "drop_out"]
    assert hunk["cut"] == {"layer": 1, "tokens": [6, 4], "visual": [[4, 2]]}
    assert hunk["ripples"][0]["sizes"] == [6, 4]
    assert hunk["equal_layers"] == [[1, 2, 3]]
    assert stage["cost"]["before"]["flops"] > stage["cost"]["after"]["flops"]
    assert {port["name"] for port in stage["ports"]} == {"output", "kept_1"}


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([3, 1, 2], "1-3"), ([1, 2, 4, 7, 8], "1-2, 4, 7-8")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges_text(numbers) == text


def test_equal_changes_in_several_layers_are_shown_once() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            return x + self.inner(x) * position.sin()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Shared() for _ in range(4))

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, position)
            return x

    program = capture(Model(), (torch.ones(2, 4), torch.ones(2, 1)))
    old = snapshot(program)
    run_pipeline(program, "fold-constants")
    assert_expected_inline(
        "\n".join(
            line.split("  test_diff.py")[0]
            for line in render(diff(old, program)).splitlines()
            if line[:1] in {"@", "-", "!"}
        ),
        """\
@@ model  layers.1
- %sin_1 = sin(%position)  f32[2,1]
! %mul_1   arg 1: %sin_1 -> %sin
@@ model  layers.2-3  same change as in layers.1""",
    )
