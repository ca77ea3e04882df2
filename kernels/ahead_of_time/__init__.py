"""`layalign kernels`: every kernel compiled without a GPU. report.py compiles and judges, worker.py is its process, calls.py names
what is compiled."""
