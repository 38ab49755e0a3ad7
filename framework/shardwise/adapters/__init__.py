"""Small trained parts beside a model that stands still, applied from outside like all else.

config     kinds as a recipe names them (no torch)
targets    which modules of a model an adapter is for, and which parameters a stage trains
lora       LoRA and DoRA: modules that take part in a linear layer's product, cut as it is
bottleneck small networks behind attention and the MLP, or beside the MLP
start      their initial values: functions of (seed, name) and of the weights that they adapt
served     what cannot be merged, on its way to a sampler
merge      an adapted model's weights as those of a plain one
quantise   the base in few bits, quantised whole and cut behind
peft       an adapter as PEFT stores it, our names and theirs; `peft_read`, `peft_write`: its files
peft_own   the same, and an adapter's parameters in our engines

Parameters of an adapter stand beside those of the module that they adapt, below ``adapter``:
``layers.0.attn.q.adapter.A`` (rank x inputs), ``.B`` (outputs x rank), ``.magnitude`` (outputs);
``layers.0.mlp.adapter.down`` (size x width), ``.down_bias``, ``.up`` (width x size), ``.up_bias``.
"""
