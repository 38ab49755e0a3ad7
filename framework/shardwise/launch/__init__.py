"""Starting the ranks of a run: on this machine, and by torchrun on a cluster's nodes.

local.py, rank.py, train.py   the ranks of this machine
profile.py, cluster.py        a cluster's profile, and the one description of a job on it
slurm.py, templates/          what a scheduler is given, and giving it
decide.py                     what comes after an attempt: once more, or stop
"""
