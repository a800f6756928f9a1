"""The passes that come with vlmopt: one per file, in one folder per family."""

PASSES = {
    "v2drop": "vlmopt.passes.tokens.v2drop:V2Drop",
    "random-drop": "vlmopt.passes.tokens.random_drop:RandomDrop",
    "fastv": "vlmopt.passes.tokens.fastv:FastV",
    "pyramid-drop": "vlmopt.passes.tokens.pyramid_drop:PyramidDrop",
    "duet-vlm": "vlmopt.passes.tokens.duet_vlm:DuetVlm",
    "transprune": "vlmopt.passes.tokens.transprune:TransPrune",
    "hawk": "vlmopt.passes.tokens.hawk:Hawk",
    "divprune": "vlmopt.passes.tokens.divprune:DivPrune",
    "prune2drive": "vlmopt.passes.tokens.prune2drive:Prune2Drive",
    "coin": "vlmopt.passes.tokens.coin:CoIn",
    "information-horizon": "vlmopt.passes.tokens.information_horizon:InformationHorizon",
    "alvts": "vlmopt.passes.tokens.alvts:Alvts",
    "apet": "vlmopt.passes.tokens.apet:ApET",
    "vlm-pruner": "vlmopt.passes.tokens.vlm_pruner:VlmPruner",
    "stride-drop": "vlmopt.passes.tokens.stride_drop:StrideDrop",
    "tome": "vlmopt.passes.tokens.tome:ToMe",
    "sad-tm": "vlmopt.passes.tokens.sad_tm:SadTM",
    "blink": "vlmopt.passes.tokens.blink:Blink",
    "embedlens": "vlmopt.passes.tokens.embedlens:EmbedLens",
    "sublayer-skip": "vlmopt.passes.tokens.sublayer_skip:SublayerSkip",
    "vision-entry": "vlmopt.passes.tokens.vision_entry:VisionEntry",
    "fold-constants": "vlmopt.passes.cleanup.fold_constants:FoldConstants",
}
"""Name of each pass -> ``module:Class``; a module is imported when its pass is first used."""
