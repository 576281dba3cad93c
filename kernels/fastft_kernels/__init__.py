"""The kernels of fastft: HOW each op is computed. Knows torch and triton, nothing else.

The same op has the same file name and the same signature in each room:

    reference/<op>.py   plain differentiable PyTorch: the specification, the test oracle and the fallback
    triton/<op>.py      Triton kernels and their launchers: tensors in, tensors out
    cpp/<op>.py         Python face of the compiled extension `fastft_kernels._C` (sources in csrc/)

Importing this package imports none of them.
"""
