"""What a run will take, before anything runs.

run/work.py     FLOP by stage          run/memory.py   memory by phase and item
run/disk.py     disk likewise
traffic.py      bytes that stages read and write, and kernels that they launch
rates.py        what this machine does in a second, measured
devices.py      what machines that are not here do, as published
narrow.py       products that are not of float32, by stage
predict.py      seconds, from all of these
plan.py         the plan of a config
table.py        the plan as text
"""
