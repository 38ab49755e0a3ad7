"""Pure formulas of what a model occupies."""
