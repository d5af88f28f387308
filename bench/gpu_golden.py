"""A pytest plugin that puts the golden tests on the GPU.

    python -m pytest -p bench.gpu_golden tests/test_golden_cwt_mae.py

New tensors are made there, reference tensors are read to there, and what leaves for NumPy comes back first.
A test that insists on the CPU (its own generator, a file reader) fails for that reason alone; the bench
counts what passes.
"""

import functools

import safetensors
import safetensors.torch
import torch


def pytest_configure(config):
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    safetensors.safe_open = on_gpu(safetensors.safe_open)
    safetensors.torch.load_file = on_gpu(safetensors.torch.load_file)
    from_numpy, to_numpy = torch.from_numpy, torch.Tensor.numpy
    torch.from_numpy = lambda array: from_numpy(array).cuda()
    torch.Tensor.numpy = lambda self, **options: to_numpy(self.detach().cpu(), **options)


def on_gpu(read):
    """The reader with device="cuda" where the caller names none."""

    @functools.wraps(read)
    def wrapped(*arguments, **options):
        return read(*arguments, **{"device": "cuda", **options})

    return wrapped
