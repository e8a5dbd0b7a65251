"""Is the slider honest? Trainings on the shapes world, and what the true score says of them."""
