"""How a latent scorer is trained."""
