"""Exact clean-ups: what other passes leave behind, and what capture could not simplify."""
