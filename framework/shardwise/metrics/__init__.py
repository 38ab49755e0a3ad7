"""Meters and writers: FLOPs, the machine's GEMM rate, throughput, memory, logs, progress."""
