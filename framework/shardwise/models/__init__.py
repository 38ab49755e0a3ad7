"""Plain single-device models, one folder a family."""
