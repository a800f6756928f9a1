"""The passes that come with vlmopt: one per file, in one folder per family."""

PASSES = {
    "v2drop": "vlmopt.passes.tokens.v2drop:V2Drop",
    "random-drop": "vlmopt.passes.tokens.random_drop:RandomDrop",
    "fold-constants": "vlmopt.passes.cleanup.fold_constants:FoldConstants",
}
"""Name of each pass -> ``module:Class``; a module is imported when its pass is first used."""
