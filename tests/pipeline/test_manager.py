"""The manager: what it checks, restores, records and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.toys import decoder
from vlmopt.errors import (
    NoMatchError,
    OptionError,
    PassFailed,
    PreconditionError,
    UnknownPassError,
    VerifyError,
)
from vlmopt.graph.text import stage_text
from vlmopt.pipeline import registry
from vlmopt.pipeline.manager import PassRecord, pipeline_uuid, run_pipeline
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Remark, Semantics
from vlmopt.pipeline.registry import register_pass
from vlmopt.program import Program
from vlmopt.storage import load

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ToSilu(Pass):
    """Replace every gelu by silu, then misbehave as told."""

    name = "to-silu"
    family = "tests"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    lie: bool = option(False, "whether to deny the change")
    stamped: bool = option(True, "whether to stamp new nodes")
    stale: bool = option(False, "whether to record a wrong shape")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        graph = program["model"].graph
        found = graph.find_nodes(op="call_function", target=aten.gelu.default)
        for match, node in enumerate(found, start=1):
            with graph.inserting_before(node):
                new = graph.call_function(aten.silu.default, node.args[:1])
            new.meta = {"val": node.meta["val"][..., :1] if self.stale else node.meta["val"]}
            if self.stamped:
                ctx.stamp(new, match)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            ctx.remark("replaced", node=new, stage="model")
        return PassResult(changed=bool(found) and not self.lie, matches=len(found))


@dataclass(frozen=True, kw_only=True)
class Act(Pass):
    """Do what the class variable says."""

    name = "act"
    family = "tests"
    phase = Phase.CLEANUP
    semantics = Semantics.EXACT
    zero_matches_ok = True
    action: ClassVar[Callable[[Program], Any]]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result: PassResult = type(self).action(program)
        return result


@dataclass(frozen=True, kw_only=True)
class Annotate(Act):
    """A pass of the first phase."""

    name = "note"
    phase = Phase.ANNOTATE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    register_pass("to-silu", ToSilu)
    register_pass("act", Act)
    register_pass("note", Annotate)
    monkeypatch.setattr(Act, "action", lambda program: PassResult(False, 0), raising=False)
    for name in ("VLMOPT_VERIFY", "VLMOPT_DISABLE", "VLMOPT_DEBUG_DIR", "VLMOPT_PRINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def captured() -> Program:
    return decoder(layers=2)


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.clone()


def text(program: Program) -> str:
    return "\n".join(map(stage_text, program))


def act(monkeypatch: pytest.MonkeyPatch, action: Callable[[Program], Any]) -> None:
    monkeypatch.setattr(Act, "action", action, raising=False)


def test_a_run_is_recorded(program: Program) -> None:
    report = run_pipeline(program, "to-silu | act", verify="full")
    assert program.passes == ("to-silu", "act")
    assert report.pipeline == "to-silu | act"
    first, second = report.records
    assert (first.spec, first.result.matches, first.nodes_added, first.nodes_removed) == (
        "to-silu",
        2,
        2,
        2,
    )
    assert first.result.remarks == (
        Remark("replaced", "silu_default", "model"),
        Remark("replaced", "silu_default_1", "model"),
    )
    assert (second.result.changed, second.nodes_added, second.nodes_removed) == (False, 0, 0)
    assert min(first.seconds, first.verify_seconds) > 0
    document = json.loads(json.dumps(report.to_json()))
    assert document["schema"] == 1
    assert document["uuid"] == report.uuid
    assert document["passes"][0]["remarks"][0]["node"] == "silu_default"


def test_passes_may_be_given_as_objects(program: Program) -> None:
    report = run_pipeline(program, [ToSilu(stamped=False)])
    assert report.records[0].spec == "to-silu{stamped=false}"


def test_a_foreign_exception_is_wrapped_and_undone(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Program) -> None:
        graph = program["model"].graph
        graph.erase_node(graph.output_node())
        program.metadata["half"] = True
        raise KeyError("lost")

    act(monkeypatch, fail)
    run_pipeline(program, "to-silu")
    before = text(program)
    with pytest.raises(PassFailed) as caught:
        run_pipeline(program, "note | act | act")
    assert str(caught.value) == "note raised KeyError: 'lost'\n  in:  pass 1 of 3, note"
    assert isinstance(caught.value.__cause__, KeyError)
    assert text(program) == before
    assert (program.passes, program.metadata.get("half")) == (("to-silu",), None)


def test_own_errors_pass_through_and_say_where(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PreconditionError("no layers", hint="more layers")

    def fail(program: Program) -> None:
        raise error

    act(monkeypatch, fail)
    with pytest.raises(PreconditionError) as caught:
        run_pipeline(program, "to-silu{stamped=false} | act")
    assert caught.value is error
    assert str(error) == (
        "no layers\n  try: more layers\n  in:  pass 2 of 2, act, after to-silu{stamped=false}"
    )
    assert error.what == "no layers"
    assert program.passes == ("to-silu{stamped=false}",)  # what succeeded stays


def test_an_interrupt_undoes_the_pass_and_stays_an_interrupt(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(program: Program) -> None:
        program.metadata["half"] = True
        raise KeyboardInterrupt

    act(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(program, "act")
    assert "half" not in program.metadata


def test_a_denied_change_is_found(program: Program) -> None:
    before = text(program)
    with pytest.raises(PassFailed) as caught:
        run_pipeline(program, "to-silu{lie}", verify="off")
    assert str(caught.value) == (
        "to-silu{lie} reported that it changed nothing, but the graph of model differs\n"
        "  in:  pass 1 of 1, to-silu{lie}"
    )
    assert text(program) == before


def test_a_claimed_change_is_checked(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    act(monkeypatch, lambda program: PassResult(changed=True, matches=1))
    with pytest.raises(PassFailed) as caught:
        run_pipeline(program, "act")
    assert str(caught.value) == (
        "act reported a change, but every graph is as before\n  in:  pass 1 of 1, act"
    )


def test_a_replaced_weight_is_a_change(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(program: Program) -> PassResult:
        head = program["model"].graph_module.get_submodule("head")
        head.register_parameter("weight", torch.nn.Parameter(torch.zeros(4, 16)))
        return PassResult(changed=False, matches=1)

    act(monkeypatch, scale)
    with pytest.raises(PassFailed, match="the graph of model differs"):
        run_pipeline(program, "act")


def test_the_result_must_be_one(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    act(monkeypatch, lambda program: None)
    with pytest.raises(PassFailed) as caught:
        run_pipeline(program, "act")
    assert str(caught.value) == "act returned None, not a PassResult\n  in:  pass 1 of 1, act"


def test_finding_nothing_is_an_error(program: Program) -> None:
    with pytest.raises(NoMatchError) as caught:
        run_pipeline(program, "to-silu | to-silu")
    assert str(caught.value) == (
        "to-silu found nothing to rewrite\n"
        "  try: take it out of the pipeline, or allow this with allow_no_match (--allow-no-match)\n"
        "  in:  pass 2 of 2, to-silu, after to-silu"
    )
    (record,) = run_pipeline(program, "to-silu", allow_no_match=True).records
    assert (record.result.matches, record.result.remarks) == (
        0,
        (Remark("warning: found nothing to rewrite"),),
    )
    # a clean-up that finds nothing is nothing to remark on
    assert run_pipeline(program, "act", allow_no_match=True).records[0].result.remarks == ()


def test_order_violations_are_collected_before_anything_runs(program: Program) -> None:
    before = text(program)
    with pytest.raises(PreconditionError) as caught:
        run_pipeline(program, "act | to-silu | note | act")
    assert str(caught.value) == (
        "the pipeline goes back to an earlier phase: to-silu (reduce) comes after act (cleanup); "
        "note (annotate) comes after act (cleanup)\n"
        "  try: put the passes in the order annotate, reduce, cleanup, lower"
    )
    assert text(program) == before


def test_level_full_wants_stamps(program: Program) -> None:
    with pytest.raises(VerifyError) as caught:
        run_pipeline(program, "to-silu{stamped=false}", verify="full")
    assert str(caught.value) == (
        "provenance: %silu_default was added by to-silu but does not say so\n"
        "  at:  %silu_default\n  try: call ctx.stamp for every new node\n"
        "  in:  pass 1 of 1, to-silu{stamped=false}"
    )


def test_the_level_decides_what_is_seen(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    run_pipeline(captured.clone(), "to-silu{stale}")
    monkeypatch.setenv("VLMOPT_VERIFY", "full")
    with pytest.raises(VerifyError, match="%silu_default is recorded as"):
        run_pipeline(captured.clone(), "to-silu{stale}")
    run_pipeline(captured.clone(), "to-silu{stale}", verify="lint")
    monkeypatch.setenv("VLMOPT_VERIFY", "some")
    with pytest.raises(OptionError) as caught:
        run_pipeline(captured.clone(), "to-silu")
    assert str(caught.value) == "VLMOPT_VERIFY is 'some', not one of off, lint, full"


def test_a_broken_input_is_blamed_on_no_pass(program: Program) -> None:
    del next(iter(program["model"].graph.nodes)).meta["val"]
    with pytest.raises(VerifyError) as caught:
        run_pipeline(program, "to-silu")
    assert str(caught.value).endswith("\n  in:  the program before any pass of this pipeline")


def test_passes_can_be_disabled(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMOPT_DISABLE", "to-silu, note")
    report = run_pipeline(program, "to-silu | act")
    assert (report.pipeline, program.passes) == ("act", ("act",))
    monkeypatch.setenv("VLMOPT_DISABLE", "to-sil")
    with pytest.raises(UnknownPassError) as caught:
        run_pipeline(program, "act")
    assert str(caught.value) == (
        "VLMOPT_DISABLE names to-sil, which no pass is called\n"
        "  try: to-silu; vlmopt passes lists them"
    )


def test_observers_are_told(program: Program) -> None:
    seen: list[tuple[Any, ...]] = []

    class Watch:
        def before_pass(self, program: Program, one: Pass, index: int) -> None:
            seen.append(("before", one.name, index, len(program.passes)))

        def after_pass(self, program: Program, one: Pass, index: int, record: PassRecord) -> None:
            seen.append(("after", record.spec, index, len(program.passes)))

        def failed(self, program: Program, one: Pass, index: int, error: BaseException) -> None:
            seen.append(("failed", type(error).__name__, index, len(program.passes)))

    with pytest.raises(NoMatchError):
        run_pipeline(program, "to-silu | to-silu", observer=Watch())
    assert seen == [
        ("before", "to-silu", 0, 0),
        ("after", "to-silu", 0, 1),
        ("before", "to-silu", 1, 1),
        ("failed", "NoMatchError", 1, 1),
    ]


def test_the_debug_folder_holds_every_state(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new" / "debug"
    monkeypatch.setenv("VLMOPT_DEBUG_DIR", str(root))
    report = run_pipeline(program, "to-silu{stamped=false} | act")
    folder = root / "000"
    assert sorted(path.name for path in folder.iterdir()) == [
        "000-input.txt",
        "001-to-silu.diff",
        "001-to-silu.txt",
        "002-act.txt",
        "pipeline.txt",
        "report.json",
    ]
    assert (folder / "pipeline.txt").read_text() == "to-silu{stamped=false} | act\n"
    assert "gelu" in (folder / "000-input.txt").read_text()
    assert (folder / "001-to-silu.txt").read_text() == (
        f"# to-silu{{stamped=false}}\n\n{text(program)}\n"
    )
    assert (folder / "002-act.txt").read_text() == "# act: unchanged\n"
    assert json.loads((folder / "report.json").read_text()) == report.to_json()

    assert "+ %silu" in (folder / "001-to-silu.diff").read_text()


def test_a_failure_can_be_reproduced_from_the_debug_folder(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMOPT_DEBUG_DIR", str(tmp_path))
    with pytest.raises(NoMatchError) as raised:
        run_pipeline(program, "to-silu | to-silu")
    folder = tmp_path / "000"
    failed = (folder / "002-to-silu.txt").read_text()
    assert failed.startswith("# to-silu: failed\nNoMatchError: to-silu found nothing to rewrite\n")
    command = (folder / "reproduce.txt").read_text().strip()
    assert command == f"vlmopt run {folder / '002-to-silu-input'} -p to-silu"
    assert str(raised.value).endswith(f"\n  reproduce: {command}")
    with pytest.raises(NoMatchError):
        run_pipeline(load(folder / "002-to-silu-input"), "to-silu")


def test_states_are_printed_on_request(
    captured: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(what: str) -> list[str]:
        monkeypatch.setenv("VLMOPT_PRINT", what)
        with pytest.raises(NoMatchError):
            run_pipeline(captured.clone(), "note | to-silu | to-silu{lie}")
        out, err = capsys.readouterr()
        assert out == ""
        return [line for line in err.splitlines() if line.startswith("#")]

    start = "# input; passes so far: none"
    changed, failed = ["# to-silu"], ["# to-silu{lie}: failed"]
    assert printed("changed") == [start, *changed]
    assert printed("all") == [start, "# note: unchanged", *changed, *failed]
    assert printed("note") == [start, "# note: unchanged"]
    assert printed("to-silu") == [
        "# input; passes so far: note",
        *changed,
        "# input; passes so far: note | to-silu",
        *failed,
    ]
    monkeypatch.setenv("VLMOPT_PRINT", "change")
    with pytest.raises(
        UnknownPassError, match="VLMOPT_PRINT names change, which no pass is called"
    ):
        run_pipeline(captured.clone(), "note")


def test_the_uuid_follows_options_and_source(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pipeline_uuid([ToSilu()])
    assert one == pipeline_uuid([ToSilu()])
    assert one != pipeline_uuid([ToSilu(stale=True)])
    monkeypatch.setattr("inspect.getsource", lambda module: "changed")
    assert one != pipeline_uuid([ToSilu()])
