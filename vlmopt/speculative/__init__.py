"""Speculative decoding: drafts, what of them is accepted, and when that is not even asked."""
