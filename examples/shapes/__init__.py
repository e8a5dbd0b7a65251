"""The shapes world: a toy universe of pictures whose true scores are known, and a Stable Diffusion trained on it."""
