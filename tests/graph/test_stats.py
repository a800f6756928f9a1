import json

import pytest
from expecttest import assert_expected_inline

from tests.toys import decoder
from vlmopt.graph.stats import percent, program_stats, si, stats_json, stats_text


def test_one_program() -> None:
    assert_expected_inline(
        stats_text([program_stats(decoder(layers=1), "toy")]),
        """\
model                               toy
  FLOPs                             25 k
  bytes moved, unfused              18 kB
  weights                           7.9 kB
  nodes                             17
    linear                          4
    getitem                         3
    add                             2
    view                            2
    gelu                            1
    layer_norm                      1
    permute                         1
    scaled_dot_product_attention    1
    transpose                       1
    unbind                          1

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.""",
    )


def test_programs_side_by_side_with_changes() -> None:
    one, two = (program_stats(decoder(layers=n), f"{n} layers") for n in (1, 2))
    assert_expected_inline(
        "\n".join(stats_text([one, two]).splitlines()[:8]),
        """\
model                               1 layers    2 layers
  FLOPs                             25 k        48 k (+97 %)
  bytes moved, unfused              18 kB       36 kB (+96 %)
  weights                           7.9 kB      16 kB (+97 %)
  nodes                             17          33 (+94 %)
    linear                          4           7 (+3)
    getitem                         3           6 (+3)
    add                             2           4 (+2)""",
    )


def test_program_with_symbolic_sizes_says_so() -> None:
    program = decoder(layers=1)
    assert "symbolic" not in stats_text([program_stats(program, "toy")])
    env = program["model"].fake_mode().shape_env
    assert env is not None
    node = next(iter(program["model"].graph.find_nodes(op="placeholder")))
    size = env.create_unbacked_symint()
    with program["model"].fake_mode():
        node.meta["val"] = node.meta["val"].new_empty(1, size, 16)
    assert "sizes: symbolic sizes count as the size seen at capture." in stats_text(
        [program_stats(program, "toy")]
    )


def test_json() -> None:
    document = json.loads(json.dumps(stats_json([program_stats(decoder(layers=1), "toy")])))
    assert document["schema"] == 1
    (program,) = document["programs"]
    (stage,) = program["stages"]
    assert stage["operators"]["linear"] == 4
    assert stage["cost"]["layers"]["0"]["flops"] == 23808


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 "),
        (999, "999 "),
        (1000, "1.0 k"),
        (9960, "10 k"),
        (336e6, "336 M"),
        (8.5e12, "8.5 T"),
    ],
)
def test_decimal_prefix(number: float, text: str) -> None:
    assert si(number) == text


@pytest.mark.parametrize(
    ("before", "after", "text"), [(4, 4, "0 %"), (0, 3, "new"), (4, 1, "-75 %"), (4, 5, "+25 %")]
)
def test_change_in_percent(before: float, after: float, text: str) -> None:
    assert percent(before, after) == text
