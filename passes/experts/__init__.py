"""Methods that compute fewer pairs of token and expert in mixtures of experts."""
