"""Which rows are worth training on: rules over rows of data, and a report of what they dropped.

Everything here is a function of plain data, without tensors. The order is fixed, whatever a recipe
lists first:

1. rules of a row by itself (`row_rules`): format, length, language, verifier, threshold. Each says
   why a row goes or nothing, so they commute: their order decides the reason that is told, and
   nothing else;
2. contamination (`held_out`): rows that overlap what is kept for measuring. Also of a row alone;
3. rules of the set (`set_rules`): duplicates, diversity, quota. In this order, for a duplicate
   must not take a place of the quota. They look at rows from the best to the worst, ties broken by
   a seeded hash of the content, so the order of the input does not count.

Every rule holds for any part of what it kept: filtering twice is filtering once.
"""

from shardwise.curation.config import FilterRules
from shardwise.curation.filtering import Filtered, filter_rows
from shardwise.curation.held_out import HeldOut, HeldOutText
from shardwise.curation.rows import Row, read_source

__all__ = ["FilterRules", "Filtered", "HeldOut", "HeldOutText", "Row", "filter_rows", "read_source"]
