"""Settings: the engine that fills them, the command line and TOML file, and the dataclasses that several scripts share."""
