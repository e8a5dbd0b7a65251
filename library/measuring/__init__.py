"""What a slider does: pictures at several multipliers, scored, compared, judged."""
