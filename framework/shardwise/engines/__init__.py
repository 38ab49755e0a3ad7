"""Engines: one contract, `base.Engine`; `native` implements it."""
