"""A family of models a file, which registers itself; its bundled configs stand beside it."""
