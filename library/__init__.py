"""LECO score: train a slider LoRA from a score. See docs/architecture.md for the parts and which way they depend on each other."""

import logging

# On a CPU, importing diffusers makes bitsandbytes warn that a 4-bit kernel is missing; nothing here is 4-bit.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
