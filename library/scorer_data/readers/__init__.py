"""Where rated pictures come from: one module a format, listed in `registry`."""
