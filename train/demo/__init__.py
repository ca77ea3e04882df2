"""The embedded demo: generated problems, two tiny bases trained on them, and the run that shows what LayAlign does."""
