"""Torch's own archives (``.pt``), read and written without pickle: it is an old format, not a need.

A pickle is a program. `program` interprets the part of it that builds data, in a process that can
neither open a file nor a socket, and answers with JSON; no class is looked up, nothing is called.
Tensors are read by `archive`, where the archive has them as plain bytes, with their checksums.
"""
