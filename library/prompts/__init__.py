"""From prompt files to prompt records."""
