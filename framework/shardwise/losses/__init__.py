"""Losses and advantages: pure functions with their papers; `config` holds their settings."""
