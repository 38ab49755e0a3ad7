"""Signals, hangs and ends: a run that is told to stop saves first, and what went wrong is named.

gate.py      where a rank's main thread stands, and between which updates it may be cut
stop.py      SIGTERM, SIGUSR1 and SIGHUP: all ranks agree on one step, save it, and end
sequence.py  which collective each rank is in, and who left one out
hang.py      a stopped or stuck rank is noticed and named, with the stacks of all
process.py   what the kernel says of a process
ending.py    how a run ended, for whoever starts it again (``exit.json``)
attempts.py  every attempt at a run, and how each ended (``attempts.jsonl``)
"""
