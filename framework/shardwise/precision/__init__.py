"""Precision policies and loss scaling."""
