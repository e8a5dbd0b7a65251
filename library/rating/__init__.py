"""A person's opinion while it is given: what was answered, what a small scorer makes of it, what to ask next."""
