"""The DeepSpeed engine: ZeRO 0 to 3 and offload by the library, our loss contract around it.

- `config`: the keys of ``engine.kind: deepspeed``; `user_config` reads a user's own DeepSpeed JSON
  and finds what contradicts the recipe. Neither imports torch.
- `library`: the one place that imports deepspeed, and refuses releases that are not to be trusted.
- `fragments`: where DeepSpeed keeps a rank's part of each master weight, moment and gradient.
- `engine`: the engine itself.
"""
