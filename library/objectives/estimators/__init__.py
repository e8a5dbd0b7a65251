"""What can be scored at a step, a file each (`library.objectives.estimator.ESTIMATORS`)."""
