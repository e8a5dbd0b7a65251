"""Measurements: what a training costs, what comes of it, and what only a GPU can show. See README.md in this folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
