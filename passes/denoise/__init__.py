"""Diffusion transformers: steps of the denoising loop that reuse what earlier steps computed."""
