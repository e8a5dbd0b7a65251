"""What several tests use: tiny models, runs that take seconds, scorers with known answers."""
