"""Lowering: compiling and exporting rewritten programs."""
