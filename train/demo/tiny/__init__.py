"""The tiny pair: two bases trained from nothing on generated text, and `layalign demo`."""
