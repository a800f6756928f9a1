"""Measuring: what ``tools/bench`` and the speed part of ``vlmopt demo`` share."""
