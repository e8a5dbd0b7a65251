"""Rated pictures as batches of latents: `manifest` -> `pictures`, `buckets` -> `latent_cache` -> `batches`."""
