"""The terms that a training can be made of, a file each (`library.objectives.base.TERMS`)."""
