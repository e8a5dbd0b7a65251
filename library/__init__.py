"""LECO score: train a slider LoRA from a score. See docs/architecture.md for the parts and which way they depend on each other."""
