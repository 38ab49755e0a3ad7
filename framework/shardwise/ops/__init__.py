"""One file an op: PyTorch reference and dispatch by capability."""
