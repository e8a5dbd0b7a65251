"""Measurements: what a training step costs, and what only a GPU can show. See README.md in this folder."""
