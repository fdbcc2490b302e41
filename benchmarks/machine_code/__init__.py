"""What the machine code of a kernel says about its speed, without a GPU.

A kernel is compiled for sm_90 and disassembled (`decode.py`). Its main loop is counted (`counts.py`), and its instructions are run on a model of one
multiprocessor of an H100 (`multiprocessor.py`, with the numbers of `h100.py`). `ours.py` and `peers.py` list the kernels, `duration.py` turns cycles into
the time of a launch, `search.py` looks for better tiles, `report.py` makes the page docs/kernels.md. All of it is prediction, not measurement.
"""
