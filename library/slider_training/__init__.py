"""How a slider is trained: what is put together before the loop, and what watches it."""
