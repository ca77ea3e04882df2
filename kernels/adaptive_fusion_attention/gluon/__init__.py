"""The forward in Triton's Gluon, for Hopper alone: schedule.py says what happens when, kernel.py does it, forward.py launches it.

Imported by nobody unless LAYALIGN_GLUON=1 asks for it: no GPU has run it yet.
"""
