"""Rated pictures as batches of latents: `readers` -> `pictures`, `buckets` -> `latent_cache` -> `batches`."""
