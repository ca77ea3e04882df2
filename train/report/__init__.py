"""One HTML page of a training run."""
