"""What a scorer can learn: a file for each family of criteria, which registers them in `base.CRITERIA`."""
