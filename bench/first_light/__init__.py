"""`make gpu`: what a GPU says of this library, in stages whose most valuable figures come first.

stages.py names the steps, supervise.py runs their processes and replaces those that hang or die, record.py keeps what came of them,
smoke.py and candidates.py are two of the suites they run, rehearsal.py a pretended GPU whose kernels fail in every way. No file but
the suites imports torch: the time is the GPU's.
"""
