"""Programs that only streams can run."""

from __future__ import annotations

from vlmopt.errors import PreconditionError
from vlmopt.program import Program, Role
from vlmopt.rewrite.reuse import REUSE


def require_no_streams(program: Program) -> None:
    """Refuse programs that go from prompt to prompt, or from frame to frame.

    Raises:
        PreconditionError: a pass has made it one.
    """
    facts = next((stage.facts[REUSE] for stage in program if REUSE in stage.facts), None)
    if facts is not None:
        raise PreconditionError(
            f"{facts['by']} makes an encoder for streams of frames: which of its stages runs "
            "depends on what came before, and a model's forward does not know",
            hint="make a vlmopt.StreamingModel; or capture the encoder, run the pipeline on the "
            "program, and give that to vlmopt.streaming.FrameEncoder",
        )
    if any(stage.find_inputs(Role.STREAM_MEMORY) for stage in program):
        raise PreconditionError(
            "a pass of this pipeline remembers from prompt to prompt, and a model's forward does "
            "not",
            hint="make a vlmopt.StreamingModel, or leave out carry",
        )
