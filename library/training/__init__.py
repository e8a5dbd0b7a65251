"""What both trainings use: optimizers, devices, logs, files."""
