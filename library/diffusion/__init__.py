"""Noise levels and sampler steps: mathematics without a model."""
