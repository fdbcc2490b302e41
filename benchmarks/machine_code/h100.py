"""The numbers of an H100 SXM that the model uses, and their sources.

Figures published by NVIDIA are named below. Latencies are not published; those here are rounded
from microbenchmarks of this generation (Luo et al., 2024, "Benchmarking and Dissecting the Nvidia
Hopper GPU Architecture", sections 4 and 5) and from the stall counts that ptxas writes into the
code.
"""

# Hz under matrix load, an assumption. The data sheet's peak rates are at 1.83e9; the boost clock is
# 1.98e9.
CLOCK = 1.70e9
MULTIPROCESSORS = 132  # H100 SXM data sheet
SCHEDULERS = 4  # per multiprocessor

TENSOR_FLOPS = 1024  # per cycle and scheduler, 16 bits, dense: the data sheet's 989 TFLOP/s
# Bytes per cycle and multiprocessor from and to shared memory (CUDA C++ Programming Guide: 32 banks
# of 4 bytes).
SHARED_BYTES = 128
# Bytes per cycle and multiprocessor while all of them read: 8 TB/s. Real devices give 25 to 36, so
# the model favours small tiles.
L2_BYTES = 36.0
DRAM_RATE = 3.0e12  # bytes/s that a copy reaches, of the data sheet's 3.35e12
DRAM_BYTES = DRAM_RATE / MULTIPROCESSORS / CLOCK  # per cycle and multiprocessor

# Pipes of a scheduler, and the cycles for which one instruction of a warp occupies them: 32 lanes
# over the lanes of the pipe (CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions", column 9.0). There are two pipes for fp32; only one of them multiplies integers.
FMA, HEAVY, ALU, XU, FP64 = "fma", "heavy", "alu", "xu", "fp64"
PIPES: dict[str, tuple[str, int]] = {
    name: (pipe, cycles)
    for names, pipe, cycles in (
        ("FFMA FMUL FADD HFMA2 HADD2 HMUL2 FFMA32I FADD32I FMUL32I", FMA, 2),
        ("IMAD IDP IMUL", HEAVY, 2),
        ("FMNMX FSEL SEL FSETP ISETP LOP3 LOP SHF SHL SHR IADD3 IADD LEA PRMT F2FP IABS", ALU, 2),
        ("IMNMX VIMNMX PLOP3 BMSK SGXT FSET HSETP2 HMNMX2", ALU, 2),
        ("FCHK LOP32I I2FP VIADD VOTE P2R R2P FLO BREV MOV HSET2 VABSDIFF IADD32I ISCADD", ALU, 2),
        ("MUFU F2I I2F F2F FRND POPC I2I", XU, 8),
        ("DADD DMUL DFMA DSETP DMNMX", FP64, 2),
    )
    for name in names.split()
}  # fmt: skip

# Cycles from issue to result, for instructions that the code awaits by a scoreboard.
ARITHMETIC = 5  # in addition to the cycles on the pipe; the same holds for MUFU below
FP32 = 4
MUFU = 16
SHARED = 30
SHUFFLE = 25
L1 = 38
L2 = 280
DRAM = 650
UNIFORM = 12
WGMMA = 34  # of the last one, in addition to its time on the tensor cores
BARRIER = 16
FENCE = 24  # MEMBAR.CTA and FENCE.VIEW.ASYNC without outstanding accesses
LAUNCH = 200  # between the end of a program and the first instruction of the next in its slot
