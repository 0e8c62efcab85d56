"""A short English text that needs no file and no network, to compare two runs of a model."""

SAMPLE = """\
The harbour of a small northern town is never quite silent. In winter the ropes creak against \
the bollards, and in summer the gulls argue over whatever the fishing boats leave behind. Anna \
Berg had lived above the chandler's shop for eleven years, and she could tell the hour by the \
engines that she heard through the floor: the ferry at six, the mail boat at half past seven, \
and the last trawler some time after dark, depending on the weather and on how much its owner \
had spent the night before.

She repaired clocks. There was less work than there had been, because most people now read the \
time from their telephones, but a clock that has been in a family for a century is seldom thrown \
away. "It stopped when my father died," a customer would say, and Anna would nod, open the case, \
and usually find that the oil had turned to glue. She cleaned the wheels, put a new spring in if \
the old one was broken, and asked between 40 and 90 euros, which was too little.

Clocks keep time by counting. A pendulum one metre long takes about two seconds to swing out and \
back, whatever its weight, as long as the swing is small; a quartz crystal in a watch vibrates \
32,768 times in a second, and a circuit divides that number by two, fifteen times in a row. What \
limits both is temperature. Metal expands when it is warm, so that a pendulum becomes longer and \
the clock loses a few seconds a day in July. In the eighteenth century, makers answered with \
rods of brass and steel whose changes cancel each other. The same idea, that two errors may be \
made to cancel, appears again and again in the history of engineering.

One morning in March a man came in with a box under his arm. He did not give his name. Inside, \
wrapped in newspaper from 1962, lay a ship's chronometer, its glass cracked from edge to edge. \
"Can you make it run?" he asked. "I can try," she said. "Where does it come from?" He looked out \
of the window at the water for so long that she thought he had not heard the question. Then he \
said that it had belonged to his grandfather, who was the navigator of a ship that had sailed \
from this harbour and had not come back, and that nobody had ever explained how the chronometer \
had.
"""
