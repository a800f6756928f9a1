"""Reference implementations that only tests use; they share no code with vlmopt."""
