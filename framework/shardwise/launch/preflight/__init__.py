"""Before step 1: what makes a cluster's run fail late is found early, on every node, and named.

`api` runs under whatever starts the ranks; `board` carries questions and answers over the
rendezvous store, each with a deadline; `node`, `gpus` and `folder` look at one machine, `links` at
the wires between them; `judge` turns what was seen into problems, and knows no process.
"""
