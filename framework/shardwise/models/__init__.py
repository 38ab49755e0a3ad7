"""Plain single-device models: one class for all dense families, which differ by their `ModelSpec`.

To add a dense family, say `foo`:

1. `dense/foo.py`: ``FooConfig(DenseConfig)``, with the keys in which its releases differ, and a
   ``spec`` that gives `make_spec` what all of them do alike; ``RELEASES``, a table of how each
   class of transformers says these keys (`dense.release.Release`); and `dense.names.Names`, where
   its tensors are called otherwise. `dense/llama.py` has switches, `dense/gpt2.py` its own names.
2. A row in `configs.TABLES`.
3. A tiny model of transformers in `tests/models/families.py`. The tests there ask of every family:
   the same tensors, config and logits in both directions, packing, caching, and parameter counts.

A switch that no block computes yet is a field of `common.spec.LayerSpec` or `ModelSpec` whose
default does nothing, the code in `common/blocks.py` or `common/decoder.py`, and a row in
`dense/sharding.py` if it has weights. Nobody above needs a change to stay right: the compiled
decoder and the megatron engine list the switches that they compute and refuse the others
(`common.spec.beyond`); memory, FLOPs, init, pipeline split and verify read the spec.
"""
