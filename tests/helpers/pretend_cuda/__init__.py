"""A CUDA device that is simulated on the CPU by CUDA's rules, so that CUDA behavior can be tested without a GPU.

    with pretend_cuda() as record:
        train(config(device="0"))
    assert record.total(record.waits) <= 10

Real: the dispatcher's CUDA and AutocastCUDA keys (autocast casts what it casts on a GPU), fused and foreach optimizers,
GradScaler, a separate random generator, errors where CPU and CUDA tensors meet, uninitialized memory (`dirty=True`).
Counted, with file and line: operators, estimated kernel launches, host waits, copies, float16 results that are not
finite. Not covered: kernels, streams, time, memory, nccl, torch.compile.

float16 is computed as cuDNN and cuBLAS do it: products and sums in float32, one rounding of the result.
"""

from tests.helpers.pretend_cuda.device import pretend_cuda, unavailable
from tests.helpers.pretend_cuda.record import Record

__all__ = ["Record", "pretend_cuda", "unavailable"]
