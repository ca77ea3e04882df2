"""Training data: records from their sources, tokenised once, in the order and the batches of a stage."""
