"""Networks that look at pictures: one file for each family, and a registry of the families."""
