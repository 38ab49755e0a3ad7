"""Optimizers and schedules.

`registry` has the kinds (``optimizer.kind``), their configs in `shardwise.config.optimizers`; other
packages add theirs by the entry-point group ``shardwise.optimizers``. `build` makes the groups of
parameters with a rate and a decay of their own, and names states for checkpoints. `torch_kinds` are
those of `torch.optim`, whose updates `local` runs past DTensor's dispatch. `schedules`: rates and
batch sizes by step.
"""
