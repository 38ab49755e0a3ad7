"""Pure formulas of what a model, its optimizer and its activations occupy on one rank."""

from shardwise.memory.formulas import Occupancy, occupancy
from shardwise.memory.shapes import Adapted, ModelShape, Part, Place, Work

__all__ = ["Adapted", "ModelShape", "Occupancy", "Part", "Place", "Work", "occupancy"]
