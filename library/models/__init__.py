"""Models behind one class, `base.DiffusionModel`, loaded by `config.ModelConfig`; a family is one file in families/ and its configs."""
