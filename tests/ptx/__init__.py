"""A machine that executes PTX for sm_80 on numpy arrays, and the Triton driver that launches kernels on it.

What each file has:

    program.py       the text of a kernel, as instructions in basic blocks
    formats.py       number formats: TF32, bfloat16, flushed subnormals, fused multiply-add, approximate results
    elementwise.py   arithmetic, comparisons, conversions: each lane by itself
    memory.py        global memory with the bounds of every argument; shared memory, poisoned, with a check for races
    transfers.py     loads, stores, asynchronous copies, atomic addition
    collectives.py   what the lanes of a warp do together: shuffles, reductions, ldmatrix, mma
    machine.py       warps, branches, barriers, the order of execution
    device.py        a Triton driver whose device is the machine
    compiled.py      a process in which Triton compiles, for tests in one where it interprets
    launches.py      launches of every kernel by its own launcher, in that process
    snippets.py      single instructions on given values, for tests

An instruction that is not here is refused with its line. A new one is a row in a table of ``elementwise.py``, or a
function in the file of its kind, and has a test in ``test_instructions.py`` or beside it.
"""
