"""Kinds of scorer, a file each."""
