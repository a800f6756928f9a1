"""The methods' pure functions on inputs and outputs of their official code.

The folder is taken from ``VLMOPT_VECTORS``; one folder per method, any number of cases in each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.streams import Layer, StreamedLayer
from safetensors.torch import load_file

import vlmopt
from tests import mixtures
from vlmopt.ops.selection import farthest_point
from vlmopt.passes.experts import frontier
from vlmopt.passes.experts.bypass import Bypass
from vlmopt.passes.experts.modes import MoDES
from vlmopt.passes.frames import novelty, reuse
from vlmopt.passes.tokens import classes, select
from vlmopt.passes.tokens.apet import ApET, approximation_error
from vlmopt.passes.tokens.duet_vlm import DuetEncoder, DuetVlm
from vlmopt.passes.tokens.embedlens import EmbedLens
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.prune2drive import Prune2Drive
from vlmopt.passes.tokens.sublayer_skip import SublayerSkip
from vlmopt.passes.tokens.transprune import TransPrune
from vlmopt.passes.tokens.vlm_pruner import VlmPruner
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality, Role
from vlmopt.rewrite.classes import SPECIAL
from vlmopt.speculative.acceptance import Accepted, accept_greedy, accept_sampled
from vlmopt.speculative.features import stale_features
from vlmopt.speculative.lantern import Neighbourhood, nearest_codes
from vlmopt.speculative.similarity import path_similarity
from vlmopt.speculative.skipping import Draft, Dynamic, Uniform
from vlmopt.speculative.tree import tree_of
from vlmopt.speculative.truncation import taken_length

VECTORS = Path(os.environ.get("VLMOPT_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))


def cases(method: str, kind: str = "") -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Parameters and tensors of each case of a method: files ``case3`` or ``case3_kind``."""
    folder = VECTORS / method
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}")
    found = False
    for path in sorted(folder.glob("*.json")):
        if path.stem.partition("_")[2] == kind:
            found = True
            yield json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    assert found


def attention(
    tensors: dict[str, Any], stage: str, positions: torch.Tensor, heads: int, base: float
) -> torch.Tensor:
    """Causal attention of the layer after a cut, mean over heads: ``[tokens, tokens]``."""
    hidden = tensors[f"{stage}.features"].float()
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    normed = normed * tensors[f"{stage}.norm_w"]
    query, key = (
        (normed @ tensors[f"{stage}.{name}"].T).view(len(hidden), heads, -1).transpose(0, 1)
        for name in ("q_w", "k_w")
    )
    size = query.shape[-1]
    angle = positions[:, None].float() / base ** (torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def turn(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    logits = turn(query) @ turn(key).transpose(1, 2) / size**0.5
    hidden_from = torch.ones(len(hidden), len(hidden)).triu(1).bool()
    return logits.masked_fill(hidden_from, float("-inf")).softmax(-1).mean(0)


def kept(score: torch.Tensor, first: int, present: int, count: int, tokens: int) -> list[int]:
    visual = torch.zeros(1, tokens, dtype=torch.bool)
    visual[0, first : first + present] = True
    spread = torch.zeros(1, tokens)
    spread[0, first : first + present] = score
    return select.keep_best(spread, visual, tokens - present + count)[0].tolist()


def test_transprune() -> None:
    for description, tensors in cases("51-transprune"):
        given = description["parameters"]
        method = TransPrune(keep=tuple(given["ratios"]))
        inside = [
            tensors[f"ttv.{name}"][None] for name in ("attn_in", "attn_out", "ffn_in", "ffn_out")
        ]
        real = torch.ones(inside[0].shape[:2], dtype=torch.bool)
        own = method.layer_score(real, *inside)
        torch.testing.assert_close(own[0], tensors["ttv.layer_score"], atol=1e-6, rtol=1e-5)
        first, original, present = (
            given["image_start"],
            given["image_tokens"],
            given["image_tokens"],
        )
        for stage, ratio in enumerate(given["ratios"]):
            name = f"s{stage}"
            rows = attention(
                tensors,
                name,
                tensors[f"{name}.pos_before"],
                given["heads"],
                given["rope_theta"],
            )
            span = slice(first, first + present)
            score = method.score(
                tensors[f"{name}.acc_scores"].sum(0)[None, span],
                rows[first + present :, span].mean(0)[None],
                torch.ones(1, present, dtype=torch.bool),
            )
            count = method.quota(original, ratio)
            wanted = tensors[f"{name}.kept_global"].tolist()
            assert kept(score[0], first, present, count, len(rows)) == wanted
            present = count


def test_duet_second_stage() -> None:
    for description, tensors in cases("14-duet-vlm"):
        given = description["parameters"]
        first, original, present = (
            given["image_start"],
            given["image_tokens"],
            given["image_tokens"],
        )
        for stage, ratio in enumerate(given["ratios_of_N0"]):
            name = f"B{stage}"
            rows = attention(
                tensors,
                name,
                tensors[f"{name}.pos_before"],
                given["heads_B"],
                given["rope_theta"],
            )
            score = DuetVlm.score(rows[first + present :, first : first + present].mean(0))
            count = DuetVlm().quota(original, ratio)
            wanted = tensors[f"{name}.kept_global"].tolist()
            assert kept(score, first, present, count, len(rows)) == wanted
            present = count


def duet_encoder(
    attention: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, given: dict[str, Any], own: int
) -> tuple[torch.Tensor, Any]:
    """Rows after the first stage, ``[batch, tokens, width]``, and who is what."""
    method = DuetEncoder(keep=(own, given["contextual"]), width=given["cluster_width"])
    valid = torch.ones_like(attention, dtype=torch.bool)
    present = torch.full((len(attention), 1), attention.shape[1])
    score = method.score(attention, keys, valid, present)
    groups = method.groups(attention, valid, present)
    merged = method.merge(rows, score, score > 0, attention, keys, valid, present)
    return merged, groups


def test_duet_first_stage() -> None:
    for description, tensors in cases("14-duet-vlm"):
        given = description["parameters"]
        # the class token counts among the dominant ones there, and comes first
        attention = tensors["A.cls_attn"].sum(1)[:, 1:]
        merged, groups = duet_encoder(
            attention,
            tensors["A.metric"][:, 1:],
            tensors["A.hidden"][:, 1:],
            given,
            given["dominant_incl_cls"] - 1,
        )
        for sample, wanted in enumerate(tensors["A.out"]):
            first = torch.nonzero(groups.dominant[sample])[:, 0]
            anchors = torch.nonzero(groups.anchors[sample])[:, 0]
            official = tensors["A.dominant_idx"][sample]
            assert first.tolist() == sorted(int(one) - 1 for one in official if one > 0)
            by_rank = anchors[attention[sample, anchors].argsort(descending=True)]
            found = merged[sample, torch.cat([first, by_rank])]
            torch.testing.assert_close(found, wanted[1:], atol=1e-5, rtol=1e-5)


def test_duet_first_stage_of_qwen() -> None:
    for description, tensors in cases("14-duet-vlm", "qwen"):
        given = description["parameters"]
        start, count = given["image_start"], given["patches"]
        embeds = tensors["inputs_embeds"]
        merged, groups = duet_encoder(
            tensors["attn_received"][None],
            tensors["keys"][None],
            embeds[None, start : start + count],
            given,
            given["dominant"],
        )
        stays = torch.nonzero((groups.dominant | groups.anchors)[0])[:, 0]
        found = torch.cat([embeds[:start], merged[0, stays], embeds[start + count :]])
        torch.testing.assert_close(found, tensors["out_embeds"], atol=1e-5, rtol=1e-5)
        rows = torch.cat(
            [torch.arange(start), start + stays, torch.arange(start + count, len(embeds))]
        )
        assert tensors["position_ids"][:, rows].equal(tensors["out_position_ids"])


def test_hawk() -> None:
    for description, tensors in cases("21-hawk"):
        given = description["parameters"]
        hidden = tensors["embeds"].float()
        normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        normed = normed * tensors["norm_weight"]
        size = given["head_dim"]
        query, key = (
            (normed @ tensors[f"{name}_weight"].T + tensors[f"{name}_bias"]).unflatten(
                -1, (-1, size)
            )[0]
            for name in ("q", "k")
        )
        first, last = given["text_query_positions"]
        start, count = given["vision_start"], given["vision_len"]
        mean = query[first : last + 1].mean(0)
        keys = key[start : start + count].repeat_interleave(len(mean) // key.shape[1], dim=1)
        logits = torch.einsum("hd,vhd->vh", mean, keys) / size**0.5
        method = Weighted(tensors["head_weights"])
        score = method.score(logits[None], torch.ones(1, count, dtype=torch.bool))
        torch.testing.assert_close(score[0], tensors["scores"], atol=1e-5, rtol=0)
        quota = method.quota(count, given["keep_ratio"])
        assert (
            kept(score[0], start, count, quota, hidden.shape[1]) == tensors["keep_indices"].tolist()
        )


class Weighted(Hawk):
    """HAWK with weights given as a tensor."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "given", weights)

    def _weights(self, heads: int) -> torch.Tensor:
        weights: torch.Tensor = self.given  # type: ignore[attr-defined]
        assert len(weights) == heads
        return weights


def test_prune2drive() -> None:
    for description, tensors in cases("39-prune2drive"):
        tokens = tensors["tokens"][None].float()
        there = torch.ones(tokens.shape[:2], dtype=torch.bool)
        count = description["parameters"]["k"]
        picks = farthest_point(tokens, there, None, None, count, "cosine")
        assert picks[0].tolist() == tensors["picks"].tolist()
        method = Prune2Drive(keep=(count,))
        score = method.score(tokens, there)
        best = score[0].topk(count).indices.sort().values
        assert best.tolist() == sorted(tensors["picks"].tolist())


def test_apet() -> None:
    for description, tensors in cases("04-apet"):
        given = description["parameters"]
        first, count = given["vision_start"], given["vision_len"]
        tokens = tensors["hidden"][:, first : first + count].float()
        there = torch.ones(1, count, dtype=torch.bool)
        picks = tensors["basis"].long()[None]
        walked = farthest_point(tokens, there, None, picks[:, 0], given["basis"], "squared")
        assert walked.tolist() == picks.tolist()
        error = approximation_error(tokens, picks, given["eps"])
        torch.testing.assert_close(error[0], tensors["err"].float(), atol=1e-4, rtol=1e-4)
        rank = error.sort(descending=True, stable=True).indices[0, : given["keep"]]
        assert rank.tolist() == tensors["rank"].tolist()
        pairing = "error" if "rank order" in given["mode"] else "index"
        mode = given["mode"].split(",")[0]
        method = ApET(basis=given["basis"], ridge=given["eps"], mode=mode, pairing=pairing)
        stays = torch.zeros_like(there)
        stays[0, rank] = True
        merged = method.merged(tokens, error, stays, there, picks)[stays]
        wanted = tensors["hidden_out"][0, first : first + given["keep"]].float()
        torch.testing.assert_close(merged, wanted, atol=2e-3, rtol=2e-3)  # stored as float16


def test_vlm_pruner() -> None:
    for description, tensors in cases("56-vlm-pruner"):
        given = description["parameters"]
        rows, columns = given["grid_h"], given["grid_w"]
        method = VlmPruner(
            keep=(given["target"],),
            grid=(rows, columns),
            pivots=given["pivots"],
            channels=given["channels"],
            spatial=given["lam"],
            threshold=given["tau0"],
            step=given["tau_step"],
            batch=given["batch"],
            own=given["beta"],
            fill=False,
            clamp=False,
        )
        hidden = tensors["hidden"][None].float()
        keys = tensors["keys"].float().transpose(0, 1).flatten(1)[None]
        there = torch.ones(hidden.shape[:2], dtype=torch.bool)
        quota = torch.tensor([[given["target"]]])
        score = method.score(hidden, keys, there, quota, given["target"])
        stays = score > 0
        assert torch.nonzero(stays[0])[:, 0].tolist() == tensors["kept_local"].tolist()
        merged = method.merge(hidden, score, stays, hidden, keys, there, quota, given["target"])
        wanted = tensors["hidden_kept_after"].float()
        torch.testing.assert_close(merged[stays], wanted, atol=1e-5, rtol=1e-5)


class LlamaLayer(torch.nn.Module):
    """A decoder layer of LLaVA's language model, with given weights."""

    def __init__(self, weights: dict[str, torch.Tensor], given: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.base, self.eps = given["heads"], given["rope_theta"], given["rms_eps"]
        for name, value in weights.items():
            self.register_buffer(name.removeprefix("w.").replace(".", "_"), value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        size = width // self.heads
        inverse = 1 / self.base ** (torch.arange(0, size, 2) / size)
        angle = torch.arange(tokens)[:, None] * inverse
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

        def heads(x: torch.Tensor, name: str) -> torch.Tensor:
            weight = self.get_buffer(f"self_attn_{name}_proj_weight")
            return linear(x, weight).view(batch, tokens, self.heads, size).transpose(1, 2)

        def turn(x: torch.Tensor) -> torch.Tensor:
            return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

        linear = torch.nn.functional.linear
        normed = norm(x, self.get_buffer("input_layernorm_weight"))
        query, key, value = (heads(normed, name) for name in "qkv")
        mixed = torch.nn.functional.scaled_dot_product_attention(
            turn(query), turn(key), value, is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        x = x + linear(mixed, self.get_buffer("self_attn_o_proj_weight"))
        normed = norm(x, self.get_buffer("post_attention_layernorm_weight"))
        gate = torch.nn.functional.silu(linear(normed, self.get_buffer("mlp_gate_proj_weight")))
        return x + linear(
            gate * linear(normed, self.get_buffer("mlp_up_proj_weight")),
            self.get_buffer("mlp_down_proj_weight"),
        )


class LlamaLayers(torch.nn.Module):
    def __init__(self, layer: LlamaLayer) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("case", ["skip_mlp", "skip_vt_layer0"])
def test_embedlens_skips(case: str) -> None:
    """The official layer, alone: what is skipped is counted from it."""
    for description, tensors in cases("60-embedlens", case):
        given = description["parameters"]
        weights = {name: value for name, value in tensors.items() if name.startswith("w.")}
        module = LlamaLayers(LlamaLayer(weights, given))
        span = torch.arange(given["vision_start"], given["vision_end"])
        modality = torch.full((1, given["seq_len"]), Modality.TEXT)
        modality[0, tensors.get("skip_idx_abs", span).long()] = Modality.VISION
        x = tensors["x"][None]
        torch.testing.assert_close(
            module(x, modality)[0], tensors["out_without_skip"], atol=1e-5, rtol=1e-5
        )
        program = vlmopt.capture(module, (x, modality), roles={"modality": Role.MODALITY})
        skip = tuple(place - given["layer_idx"] for place in given["skipping_sublayers"])
        attention = ("zero", *(given["attn_skipping_method"] or ()))
        run_pipeline(program, [SublayerSkip(skip=skip, attention=attention)])
        out = program["model"].graph_module(x, modality)[0]
        torch.testing.assert_close(out[0], tensors["out"], atol=1e-5, rtol=1e-5)


def test_embedlens_classes() -> None:
    for description, tensors in cases("60-embedlens"):
        given = description["parameters"]
        first, last = given["vision_start"], given["vision_end"]
        hidden, table = tensors["inputs_embeds"][None], tensors["vocab"]
        group = classes.in_group(hidden, table, given["target_ids"], given["top_k"])[0, first:last]
        slots = torch.arange(first, last)
        assert slots[group].tolist() == tensors["group_idx_abs"].tolist()
        assert slots[~group].tolist() == tensors["complement_idx_abs"].tolist()
        margin = classes.class_margin(
            hidden, table, anchors=given["target_ids"], top_k=given["top_k"]
        )
        assert torch.equal(margin[0, first:last] >= 0, group)
        score = EmbedLens().score(margin, torch.zeros_like(margin).long())
        stays = kept(score[0, first:last], first, len(slots), int((~group).sum()), given["seq_len"])
        assert stays == tensors["pos_after"].tolist()


NAMES = ("alpha", "tau")


def official_mixture(tensors: dict[str, torch.Tensor], k: int) -> mixtures.Mixture:
    return mixtures.Mixture(tensors["gate_weight"], tensors["gate_up"], tensors["down"], k)


def test_modes_at_run_time() -> None:
    for description, tensors in cases("34-modes"):
        given = description["parameters"]
        kinds = tensors["token_class"].reshape(-1, 1)
        classes_of = torch.tensor([Modality.TEXT, Modality.VISION, SPECIAL])[kinds]
        full = tensors["router_weights_full"].gather(1, tensors["topk_ids"])
        alpha, tau = ([given[f"{what}_{kind}"] for kind in ("text", "vision")] for what in NAMES)
        stays = MoDES.stays(full, classes_of, *alpha, *tau) | (classes_of == SPECIAL)
        wanted = tensors["router_weights_skipped"].gather(1, tensors["topk_ids"])
        assert torch.equal(torch.where(stays, full, 0.0), wanted)
        assert int((~stays).sum()) == description["results"]["skipped_pairs"]
        layer, x = official_mixture(tensors, given["k"]), tensors["x"]
        torch.testing.assert_close(layer(x), tensors["out_full"], atol=1e-6, rtol=1e-6)
        # with no ids in the graph, special tokens are told by their modality
        modality = classes_of.reshape(x.shape[:2])
        program = mixtures.mixtures(layer, x, modality)
        one = MoDES(
            text=tau[0], vision=tau[1], text_weights=(alpha[0],), vision_weights=(alpha[1],)
        )
        run_pipeline(program, [one])
        (out,) = program["model"].graph_module(x, modality)
        torch.testing.assert_close(out, tensors["out_skipped"], atol=1e-6, rtol=1e-6)


def test_modes_bypasses_experts() -> None:
    for description, tensors in cases("34-modes"):
        layer, x = official_mixture(tensors, description["parameters"]["k"]), tensors["x"]
        modality = torch.tensor([Modality.TEXT, Modality.VISION, SPECIAL])[tensors["token_class"]]
        captured = mixtures.mixtures(layer, x, modality)
        for kind, value in (("text", Modality.TEXT), ("vision", Modality.VISION)):
            for result in ("normed_input", "zero"):
                program = captured.clone()
                run_pipeline(program, [Bypass(kind=kind, result=result)], verify="full")
                (out,) = program["model"].graph_module(x, modality)
                wanted = tensors[f"bypass_{kind}"].clone()
                if result == "zero":
                    wanted[modality == value] = 0
                torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)


def test_modes_frontier() -> None:
    for description, tensors in cases("34-modes"):
        given, wanted = description["parameters"], description["results"]
        share, harm = tensors["g_table"].tolist(), tensors["f_table"].tolist()
        size = range(given["grid"])
        table = {(i, j): (share[i][j], harm[i][j]) for i in size for j in size}
        found = frontier.search_frontier(
            given["grid"], given["rho"], partial(lambda known, *pair: known[pair], table)
        )
        assert found.text == wanted["frontier_text_index"]
        assert found.vision == wanted["frontier_vision_index"]
        assert found.harm == wanted["frontier_f"]
        assert len(found.evaluated) <= wanted["pairs_evaluated"]


def streamed_layers(tensors: dict[str, Any], given: dict[str, Any]) -> list[Layer]:
    layers = []
    for layer in range(given["layers"]):
        start = f"w.{layer}."
        weights = {k.removeprefix(start): v.float() for k, v in tensors.items() if start in k}
        layers.append(Layer.of_weights(weights, heads=given["heads"], eps=given["ln_eps"]))
    return layers


def test_stc_cacher() -> None:
    """The eager reference of the other tests, and that the product chooses the same rows."""
    for description, tensors in cases("01-stc", "cacher"):
        given = description["parameters"]
        layers = [StreamedLayer(layer) for layer in streamed_layers(tensors, given)]
        count = reuse.rows_to_update(given["tokens"], given["update_token_ratio"])
        for frame in range(given["frames"]):
            x = tensors[f"frame{frame}.x"].float()[None]
            for layer in layers:
                if reuse.is_reference(frame, given["cache_interval"]):
                    x = layer.reference(x)
                else:
                    x = layer.selective(x, count)
                    chosen = reuse.choose(
                        layer.keys, layer.state[0], given["update_token_ratio"], "cosine"
                    )
                    assert chosen.tolist() == layer.chosen
            torch.testing.assert_close(x[0], tensors[f"frame{frame}.out"], atol=1e-4, rtol=1e-4)


def test_stc_pruner() -> None:
    for description, tensors in cases("01-stc"):
        given = description["parameters"]
        frames, tokens = given["frames_per_chunk"], given["tokens_per_frame"]
        width = tensors["chunk0.features"].shape[-1]
        memory = novelty.Memory.empty(width, ratio=given["channel_keep_ratio"])
        for chunk in range(given["chunks"]):
            features = tensors[f"chunk{chunk}.features"].float().unflatten(0, (frames, tokens))
            memory = novelty.remember(memory, features, strict_original=True)
            mean = features[..., memory.channels].mean((0, 1))
            torch.testing.assert_close(mean, tensors[f"chunk{chunk}.chunk_mean"])
            count = given["token_per_frame_kept"]
            kept = novelty.newest(features, memory, count, strategy="gaussian")
            offset = torch.arange(frames)[:, None] * tokens
            assert (kept + offset).flatten().tolist() == tensors[
                f"chunk{chunk}.kept_index"
            ].tolist()


def test_vvs_acceptance() -> None:
    for description, tensors in cases("59-vvs"):
        given, wanted = description["parameters"], description["results"]
        assert nearest_codes(tensors["codebook"], given["lantern_k"]).equal(tensors["nearest"])
        near = Neighbourhood(tensors["nearest"], given["lantern_delta"])
        tokens, parents, paths = tree_of(tensors["candidates"])
        probabilities = torch.zeros(len(tokens), given["V"])
        probabilities[paths[paths >= 0]] = tensors["target_logits"][paths >= 0].softmax(-1)

        def is_row(found: Accepted, result: dict[str, Any], paths: torch.Tensor = paths) -> bool:
            """Whether a path, the first of those that begin so, and its length are the same."""
            length = len(found.nodes)
            begins = (paths[:, :length] == found.nodes).all(-1)
            row = int(begins.nonzero()[0]) if length > 1 else 0
            return (row, length - 1) == (result["best_row"], result["accepted_after_root"])

        assert is_row(accept_greedy(tokens, parents, probabilities), wanted["greedy"])
        relaxed = accept_greedy(tokens, parents, probabilities, near)
        assert is_row(relaxed, wanted["greedy_relaxed"])
        for run, following in zip(
            wanted["sampling_runs"], tensors["sampling_next_dist"], strict=True
        ):
            drawn = torch.tensor(run["u"])
            help_by = near if run["lantern"] else None
            found = accept_sampled(tokens, parents, probabilities, drawn, help_by)
            assert is_row(found, run) and found.following.equal(following)


def test_vvs_skips() -> None:
    for description, tensors in cases("59-vvs"):
        given, wanted = description["parameters"], description["results"]
        rows, codebook = tensors["candidates"], tensors["codebook"]
        halved = rows[:: given["stride"]]
        for found, name in [
            (path_similarity(halved, codebook), "exp_decay"),
            (path_similarity(halved, codebook, decay=1.0), "uniform"),
        ]:
            assert float(found) == pytest.approx(wanted["similarity_stride2"][name], abs=1e-6)
        every = path_similarity(rows, codebook, decay=given["decay"])
        assert float(every) == pytest.approx(wanted["similarity_all_rows_exp_decay"], abs=1e-6)
        uniform, schedule = Uniform(interval=given["interval"]), wanted["uniform_decisions"]
        steps = zip(schedule["iteration"], schedule["new_tokens"], strict=True)
        decided = [uniform.skips(Draft(at, new, False, rows)) for at, new in steps]
        assert decided == schedule["skip"]
        for case in wanted["dynamic_decisions"]:
            draft = Draft(2, case["new_tokens"], case["last_skip"], rows, codebook)
            assert Dynamic(threshold=case["threshold"]).skips(draft) == case["skip"]
        selected = wanted["skip_select"]
        lengths = [taken_length(rows, row) for row in selected["row"]]
        assert lengths == selected["accept_length"]
        features = tensors["features"]
        assert stale_features(features, 3).equal(tensors["features_take3"])
        more = stale_features(features, features.shape[1] + 2)
        assert more.equal(tensors["features_take_more"])
