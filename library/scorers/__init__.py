"""Scorers: learned opinions about latents (`base`, `registry`, `io`), and judges of pixels (`pixel`)."""
