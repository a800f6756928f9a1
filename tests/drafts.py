"""Tiny causal language models, and drafts that they read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import vlmopt
from vlmopt.program import Role, Stage
from vlmopt.rewrite.drafted import drafted_stage
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.block import Block, block_of

VOCAB, PLACES, CAPACITY = 40, 9, 40
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
BRANCHING = [-1, 0, 0, 1, 1, 2, 4]


@functools.cache
def model(kind: str = "llama", **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(kind, **shape, **heads, **special, **options)
    return AutoModelForCausalLM.from_config(config).eval()


def captured(language_model: Any, batch: int, places: int = PLACES) -> Stage:
    ids = torch.full((batch, places), 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return vlmopt.capture(language_model, inputs)["language_model"]


@functools.cache
def target(kind: str = "llama", batch: int = 1) -> BufferedStage:
    return BufferedStage(drafted_stage(captured(model(kind), batch), CAPACITY, "verify"), "eager")


def ids(count: int, seed: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (batch, count), generator=generator)


def read(cache: DraftCache, stage: BufferedStage, tokens: Tensor, block: Block) -> Tensor:
    (port,) = stage.stage.find_outputs(Role.HIDDEN_STATES)
    return cache.run(stage, {"input_ids": block.fill(tokens)}, block)[port.name][:, : block.size]


def read_text(cache: DraftCache, stage: BufferedStage, tokens: Tensor) -> Tensor:
    """Hidden states of text, of which all stays."""
    found = []
    for part in tokens.split(PLACES, 1):
        block = block_of(tree.chain(part.shape[1]), PLACES)
        found.append(read(cache, stage, part, block))
        cache.commit(range(part.shape[1]))
    return torch.cat(found, 1)


def plain(language_model: Any, tokens: Tensor) -> Any:
    with torch.no_grad():
        return language_model(tokens, output_hidden_states=True, use_cache=True)
