"""How pictures come about: sampling them, and the batches of trajectories that training moves along."""
