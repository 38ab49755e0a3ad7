"""Engines behind one contract.

`base` is the contract; stages, checkpoint, rollout and verify know nothing else of an engine.
`registry` has the kinds (``engine.kind``): a config class with the keys that are this kind's alone,
which imports no torch, and what builds an engine from a `base.Setup`. Other packages add theirs by
the entry-point group ``shardwise.engines``. `placed` is any engine on some ranks of the world.

- `native`: every layout, over FSDP2 and the tables of `parallel`.
- `plain`: the model, autograd and `torch.optim` in one process, FP8 from the papers
  (`plain_fp8`, `plain_domains`). Verify's oracle: it shares nothing with `native` but the model,
  its initial weights and the losses, which a test holds.
"""
