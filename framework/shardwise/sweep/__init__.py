"""Many runs of one recipe: a search space, trials in slots, one table and one page.

A trial is an ordinary run (`python -m shardwise train`) in ``SWEEP/trials/NAME``. Those folders are
the only state: ``trial.json``, written before its start, says what it is; ``exit.json`` how it
ended; ``pruned.json`` that it was told to stop. Whoever starts the sweep again reads them.
"""

from shardwise.lazy import callable_room

callable_room(__name__, "shardwise.sweep.api:sweep")
