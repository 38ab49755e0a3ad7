"""Tokens: tokenizers, readers, indexed stores, packing, mixtures, the sampler, chat."""
