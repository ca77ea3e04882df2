"""The commands of the command line, by what they are for. Each imports what it needs when it runs, so that `layalign --help` is instant."""
