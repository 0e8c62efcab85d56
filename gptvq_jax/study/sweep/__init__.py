"""Sweeps: many runs that differ in a few fields, and what they share made once.

axes.py        what a config of a sweep is made of
cells.py       the runs it means, and those that cannot be
commands.py    the command that makes one of them alone
directory.py   the directory of a sweep, and whose it is
claims.py      which process makes what
passes.py      what runs share
lending.py     how it is made, and how they get it
sources.py     their float models
models.py      a cell that is a run over a whole model
layers.py      a cell that is a setting on some layers
results.py     results.jsonl and results.csv
estimate.py    time and disk, before anything runs
table.py       what is shown meanwhile
drive.py       the cells, one after another, until none is left
start.py       the sweep from its config to its results, and its plan
"""
