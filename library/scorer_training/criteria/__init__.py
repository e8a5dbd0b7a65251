"""What a scorer can learn (`base`): one file for each family of criteria, all of them in `CRITERIA`."""
