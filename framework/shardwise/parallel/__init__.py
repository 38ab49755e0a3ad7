"""Meshes, ZeRO over FSDP2, recompute, compile."""
