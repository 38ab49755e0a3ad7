"""Tree search over reasoning steps: methods that say what to draw, and a driver that draws it."""
