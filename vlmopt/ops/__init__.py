"""Operators of vlmopt that compute: scores and selections that no ATen operator gives."""
