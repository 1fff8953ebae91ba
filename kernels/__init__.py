"""Kernels of the model's sparse parts: each room a public function, a reference in plain torch, and Triton kernels for GPUs.

    grove_route   scores, selection, and the sort of tokens by grove
    grove_gemm    products grouped by grove, and the gated grove as one pipeline
    edge_spline   learnable functions on edges and on units
    ada_scan      chunkwise and recurrent linear attention over convolved keys

A room needs torch, triton and numpy alone, and triton only where a kernel runs: elsewhere the same operators run the reference.
Every operator is `torch.ops.kan_train.<name>`, with shapes for meta tensors and with gradients that are operators too.
"""
