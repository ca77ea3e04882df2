"""Results of `pytest bench/`: tables, plots and the comparison of two runs. No torch here: results are read anywhere."""
