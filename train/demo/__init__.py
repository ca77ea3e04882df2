"""The demonstration: generated problems, two pairs of bases, and the systems that are compared on them.

tiny/ trains and compares in minutes on bases made here; real/ does it on pretrained models, and holds the trained part that
comes with the package.
"""
