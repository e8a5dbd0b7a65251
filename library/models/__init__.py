"""Models behind one class, `base.DiffusionModel`, loaded by `loading.load_model`; a family is one file and a row in `registry`."""
