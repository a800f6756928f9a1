"""Denoising loops: plans that say what each step computes, and the loop that follows them."""
