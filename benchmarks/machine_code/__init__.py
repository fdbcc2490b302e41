"""Predict the speed of a kernel from its machine code, without a GPU.

A kernel is compiled for sm_90 and disassembled (`decode.py`). The instructions of its main loop are
counted (`counts.py`) and run on a model of one multiprocessor of an H100 (`multiprocessor.py`, with
the numbers of `h100.py`). `ours.py` and `peers.py` list the kernels, `duration.py` converts cycles
to the time of a launch, `search.py` searches for better tiles, and `report.py` writes the page
docs/kernels.md. All results are predictions, not measurements.
"""
