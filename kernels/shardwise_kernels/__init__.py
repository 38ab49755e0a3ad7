"""Triton kernels of shardwise; imports torch and triton only."""
