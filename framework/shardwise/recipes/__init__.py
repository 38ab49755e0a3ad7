"""Recipes written for a model, data and a machine: what `shardwise init` does.

`machine` says what there is, `lengths` what the data are, `rates` what the field would take,
`sizes` what fits, `writing` how it is told; `api` puts them together and checks the result.
"""
