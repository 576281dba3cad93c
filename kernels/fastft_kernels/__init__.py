"""The kernels of fastft: HOW each op is computed. Knows torch and triton, nothing else.

The same op has the same file name in each room:

    reference/<op>.py   plain differentiable PyTorch: the specification, the test oracle and the fallback
    triton/<op>.py      Triton kernels and their launchers: tensors in, tensors out
    cpp/<op>.py         Python face of the compiled extension `fastft_kernels._C` (sources in csrc/)

A reference is one function named like the op. The kernels of an op are `forward`, which takes the same arguments and
also returns what is saved, and `backward`; their signatures are the same in every room.

Importing this package imports none of them.
"""
