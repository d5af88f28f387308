"""A bank of Ricker wavelets as one operator: batched, differentiable, for any device.

    from cwt_mae.wavelet import cwt_wrap
    imgs = cwt_wrap(x)                                   # x (B, L) -> (B, 3, 64, L)

`torch.ops.cwt_mae.ricker_bank` has a backward, a forward-mode derivative, a rule for vmap and one for shapes
alone, so that `torch.func`, `torch.compile(fullgraph=True)` and `torch.export` go through it. This file
imports torch alone and needs nothing else from here.

The wavelet front end follows Mobile-Sensing-and-UbiComp-Laboratory/NormWear, with the accidents of
Dryilv/Wearable-Foundation-Model (model.py) under `legacy`.
"""

import contextlib
import functools
import math
import os
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl

# ---- kernels


def create_ricker_wavelets(points: int, scales: Tensor) -> Tensor:
    """Ricker ("Mexican hat") kernels of unit L2 norm: scales (S,), in samples -> (S, 1, points), dtype of
    `scales`.

    psi_a(t) = 2 / (sqrt(3 a) pi^(1/4) + 1e-6) * (1 - t^2/a^2) * exp(-t^2 / 2a^2), t = 0 in the middle of the
    kernel: between two samples if `points` is even.
    """
    t = torch.arange(points, dtype=torch.float64, device=scales.device) - (points - 1) / 2
    a = scales.double()[:, None]
    kernels = (
        2 / (torch.sqrt(3 * a) * math.pi**0.25 + 1e-6) * (1 - (t / a) ** 2) * torch.exp(-((t / a) ** 2) / 2)
    )
    return kernels[:, None].to(scales.dtype)


def kernel_points(largest: float, length: int, legacy: bool) -> int:
    """Taps of every kernel of a bank: five widths of the largest scale to each side of the centre.

    Legacy: upstream's rule in Python floats. 10 * 63.1 in float32 is just below 631, so it gives 630 taps,
    and all images are half a sample late; other scale counts are not, and a short signal cuts the kernels to
    its own length.
    """
    if not legacy:
        return 2 * int(5 * largest + 1e-3) + 1
    if length < math.ceil(10 * largest):
        return length + 1 - length % 2
    return int(10 * largest + (10 * largest % 2 == 0))


def scales_of(num_scales: int, lowest: float, step: float, log_scales: bool) -> list[float]:
    """Scales in samples: lowest + step * (0 .. num_scales - 1), or as many in equal ratios between the same
    ends, rounded to float32 as upstream's tensors are. Plain arithmetic, so that compilers follow it."""
    if torch.compiler.is_compiling():  # one that does not fix the numbers simplifies the rounding away
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        lowest, step = guard_scalar(lowest), guard_scalar(step)
    scales = [float32(float32(i * float32(step)) + float32(lowest)) for i in range(num_scales)]
    if log_scales and num_scales > 1 and lowest > 0:
        low, high = math.log10(lowest), math.log10(scales[-1])
        scales = [float32(10 ** (low + (high - low) * i / (num_scales - 1))) for i in range(num_scales)]
    return scales


def float32(x: float) -> float:
    """x rounded to the 24 bits of float32 (Veltkamp's splitting)."""
    c = 536870913.0 * x
    return c - (c - x)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # a bank made for inference serves training too
def spectra_of(scales: tuple, points: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fourier transforms (S, 2F) of the kernels centred on sample 0, F = n // 2 + 1.

    A symmetric kernel has a real transform. Each value stands there twice, for the real and the imaginary
    part of the signal's transform seen as 2F floats: a product of floats costs a quarter of a complex one.
    """
    kernels = create_ricker_wavelets(points, torch.tensor(scales, dtype=torch.float64))[:, 0]
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (math.pi * (points - 1) / n)
    spectra = torch.fft.rfft(kernels, n) * torch.polar(torch.ones_like(angle), angle)
    return spectra.real.repeat_interleave(2, dim=1).to(device, dtype)


def fft_length(points: int) -> int:
    """The smallest fast transform length (2^k, 3 2^k or 5 2^k) that holds `points` samples."""
    return min(m << max(0, math.ceil(math.log2(points / m))) for m in (1, 3, 5))


# ---- the operator


# Schemas stand here in words: how annotations become schemas differs between versions of torch.
BANK = "(Tensor rows, Tensor? mask, float[] scales, int points, bool normalize) -> (Tensor, Tensor)"
TRANSPOSED = "(Tensor images, float[] scales, int points) -> Tensor"


@torch.library.custom_op("cwt_mae::ricker_bank", mutates_args=(), schema=BANK)
def ricker_bank(
    rows: Tensor, mask: Tensor | None, scales: Sequence[float], points: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Filter rows (B, C, L + 2 (points // 2)) with a kernel of `points` taps for each of S scales -> images
    (B, C, S, L), and their deviation (B, C).

    mask (B, L): 1 where a sample is real; images are 0 elsewhere. normalize: each image to mean 0 and
    (unbiased) deviation 1 over its scales and real samples; the deviation is 1 where it is not asked for.
    """
    b, c, length = len(rows), rows.shape[1], rows.shape[2] - 2 * (points // 2)
    # Worker threads write to it, so it must not belong to this thread's inference mode.
    with torch.inference_mode(False):
        images = rows.new_empty(b, c, len(scales), length)
        deviation = rows.new_ones(b, c)
    filter_into(images, deviation, rows, mask, scales, points, normalize)
    return images, deviation


@ricker_bank.register_fake
def _(rows, mask, scales, points, normalize):
    b, c, length = rows.shape[0], rows.shape[1], rows.shape[2] - 2 * (points // 2)
    return rows.new_empty(b, c, len(scales), length), rows.new_empty(b, c)


@torch.library.custom_op("cwt_mae::ricker_bank_transposed", mutates_args=(), schema=TRANSPOSED)
def ricker_bank_transposed(images: Tensor, scales: Sequence[float], points: int) -> Tensor:
    """The transposed filter: images (B, C, S, L) -> rows (B, C, L + 2 (points // 2))."""
    length, half = images.shape[3], points // 2
    n = fft_length(length + 2 * half)
    rows = images.new_empty(*images.shape[:2], length + 2 * half)
    bank = spectra_of(tuple(scales), points, n, images.dtype, images.device)[:, ::2]
    for i in range(len(images)):
        spectra = torch.fft.rfft(torch.nn.functional.pad(images[i], (half, n - half - length)), n)
        total = (spectra * bank).sum(1)
        if points % 2 == 0:
            total = total * half_sample(n, total).conj()
        rows[i] = torch.fft.irfft(total, n)[:, : length + 2 * half]
    return rows


@ricker_bank_transposed.register_fake
def _(images, scales, points):
    return images.new_empty(images.shape[0], images.shape[1], images.shape[3] + 2 * (points // 2))


def centred(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x (B, C, S, L) less its mean over scales and real samples and 0 elsewhere, their number less 1)."""
    if mask is None:
        return x - x.mean((2, 3), keepdim=True), max(1, x.shape[2] * x.shape[3] - 1)
    real = mask[:, None, None].to(x.dtype)
    count = real.sum(3, keepdim=True).clamp(min=1) * x.shape[2]
    x = x * real
    return (x - x.sum((2, 3), keepdim=True) / count) * real, (count - 1).clamp(min=1)


def tangents(moved, images, deviation, mask):
    """Derivatives of normalised images and their deviation along `moved`, that of the plain ones."""
    moved, degrees = centred(moved, mask)
    along = (moved * images).sum((2, 3), keepdim=True) / degrees
    wide = deviation[:, :, None, None]
    # A deviation at its lower bound does not change.
    free = (wide > LEAST).to(moved.dtype)
    return moved / wide - free * images * along / wide, (free * along)[:, :, 0, 0]


def pull_back(grad, grad_deviation, images, deviation, mask, scales, points, normalize):
    """Gradient of the rows from those of images and deviation."""
    if normalize:
        wide = deviation[:, :, None, None]
        free = (wide > LEAST).to(grad.dtype)
        rest, degrees = centred(grad, mask)
        along = (grad * images).sum((2, 3), keepdim=True) / degrees
        grad = (rest - free * images * along) / wide
        grad = grad + free * grad_deviation[:, :, None, None] * images / degrees
    elif mask is not None:
        grad = grad * mask[:, None, None]
    return ricker_bank_transposed(grad.contiguous(), scales, points)


def _setup(ctx, inputs, output):
    ctx.settings = inputs[2:]
    ctx.save_for_backward(*output, inputs[1])


def _backward(ctx, grad, grad_deviation):
    images, deviation, mask = ctx.saved_tensors
    grad_deviation = torch.zeros_like(deviation) if grad_deviation is None else grad_deviation
    return pull_back(grad, grad_deviation, images, deviation, mask, *ctx.settings), None, None, None, None


def _setup_transposed(ctx, inputs, output):
    ctx.settings = inputs[1:]


def _backward_transposed(ctx, grad):
    return ricker_bank(grad, None, *ctx.settings, False)[0], None, None


ricker_bank.register_autograd(_backward, setup_context=_setup)
ricker_bank_transposed.register_autograd(_backward_transposed, setup_context=_setup_transposed)


def complete(operator, derive, plain):
    """Give an operator what torch's own kernel for derivatives lacks: it drops tangents without a word, and
    knows nothing of `torch.func.grad`.

    derive: (tangent of the first argument, outputs, *other arguments) -> tangents of the outputs. plain: the
    operator in differentiable operations, for `torch.func`, which may ask for derivatives of any order.
    """
    reverse = make_autograd_impl(operator._opoverload, operator)

    def kernel(keys, x, *settings):
        # In C++, because a compiled graph enters levels of dual numbers there
        primal, tangent = torch._VF._unpack_dual(x, level=0)
        if tangent is None and x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
            with torch.autocast(x.device.type, enabled=False):
                return plain(x, *settings)
        if tangent is None:
            return reverse(keys, x, *settings)
        found = operator(primal, *settings)
        several = found if isinstance(found, tuple) else (found,)
        pairs = zip(several, derive(tangent, several, *settings))
        found = tuple(y if t is None else torch._VF._make_dual(y, t, level=0) for y, t in pairs)
        return found if len(found) > 1 else found[0]

    with warnings.catch_warnings():  # that it stands in the place of torch's own
        warnings.simplefilter("ignore", UserWarning)
        operator._lib.impl(operator._name, kernel, "Autograd", with_keyset=True, allow_override=True)


def _derive(tangent, outputs, mask, scales, points, normalize):
    moved = ricker_bank(tangent, mask, scales, points, False)[0]
    return tangents(moved, *outputs, mask) if normalize else (moved, None)


def _derive_transposed(tangent, outputs, scales, points):
    return (ricker_bank_transposed(tangent, scales, points),)


def kernels_like(x, scales, points: int) -> Tensor:
    """Kernels (S, 1, points) of the type and on the device of x; not kept, for compilers trace them."""
    return create_ricker_wavelets(points, torch.tensor(scales, dtype=torch.float64)).to(x.device, x.dtype)


def plain_bank(rows, mask, scales, points: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """`ricker_bank` as one convolution and a normalisation in differentiable operations of fixed shapes."""
    kernels = kernels_like(rows, scales, points)
    images = torch.nn.functional.conv1d(rows.flatten(0, 1)[:, None], kernels)
    images = images[..., : rows.shape[2] - 2 * (points // 2)].unflatten(0, rows.shape[:2])
    if mask is not None:
        images = images * mask[:, None, None]
    if not normalize:
        return images, rows.new_ones(rows.shape[:2])
    rest, degrees = centred(images, mask)
    variance = rest.square().sum((2, 3), keepdim=True) / degrees
    # The bound lies within the root, whose derivative at 0 is infinite.
    wide = variance.clamp(min=LEAST**2).sqrt()
    return rest / wide, wide[:, :, 0, 0]


def plain_transposed(images, scales, points: int) -> Tensor:
    """`ricker_bank_transposed` in differentiable operations."""
    kernels = kernels_like(images, scales, points)
    rows = torch.nn.functional.conv_transpose1d(images.flatten(0, 1), kernels)[:, 0]
    # The last column of an even kernel was cut off.
    return torch.nn.functional.pad(rows, (0, 1 - points % 2)).unflatten(0, images.shape[:2])


complete(ricker_bank, _derive, plain_bank)
complete(ricker_bank_transposed, _derive_transposed, plain_transposed)


@ricker_bank.register_vmap
def _(info, in_dims, rows, mask, scales, points, normalize):
    """The mapped dimension joins the batch."""
    size = info.batch_size
    rows = rows.expand(size, *rows.shape) if in_dims[0] is None else rows.movedim(in_dims[0], 0)
    if mask is not None:
        mask = mask.expand(size, *mask.shape) if in_dims[1] is None else mask.movedim(in_dims[1], 0)
        mask = mask.flatten(0, 1)
    found = ricker_bank(rows.flatten(0, 1), mask, scales, points, normalize)
    return tuple(part.unflatten(0, rows.shape[:2]) for part in found), (0, 0)


@ricker_bank_transposed.register_vmap
def _(info, in_dims, images, scales, points):
    images = images.movedim(in_dims[0], 0)
    return ricker_bank_transposed(images.flatten(0, 1), scales, points).unflatten(0, images.shape[:2]), 0


# ---- how it is computed

LEAST = 1e-5  # lower bound of the deviation that an image is divided by


def half_sample(n: int, like: Tensor) -> Tensor:
    """Factors (F,) on the transform of a signal that move it by half a sample: the centre of an even
    kernel."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (-math.pi / n)
    return torch.polar(torch.ones_like(angle), angle).to(like)


def filter_into(images, deviation, rows, mask, scales, points: int, normalize: bool):
    """Write `ricker_bank` into images (B, C, S, L) and deviation (B, C)."""
    if not images.numel():
        return
    scales = tuple(scales)
    if rows.device.type == "cpu":
        return fill_by_threads(images, deviation, rows.detach(), mask, scales, points, normalize)
    # As many signals at a time as make a product of 2^28 floats
    block = max(1, 2**28 // (rows.shape[1] * len(scales) * fft_length(rows.shape[2])))
    masks = [None] * len(rows) if mask is None else mask.split(block)
    for out, spread, part, real in zip(images.split(block), deviation.split(block), rows.split(block), masks):
        faster_form(out, part, scales, points)(out, part, scales, points)
        if real is not None:
            out.mul_(real[:, None, None])
        if normalize:
            normalise_into(out, spread, real)


def normalise_into(images, deviation, mask):
    """Normalise images (B, C, S, L) where they stand, in two passes over the memory where there is no
    mask."""
    if mask is None:
        variance, mean = torch.var_mean(images, (2, 3), keepdim=True)
        wide = variance.sqrt().clamp(min=LEAST)
        torch.addcmul(-mean / wide, images, 1 / wide, out=images)
    else:
        rest, degrees = centred(images, mask)
        wide = (rest.square().sum((2, 3), keepdim=True) / degrees).sqrt().clamp(min=LEAST)
        torch.div(rest, wide, out=images)
    deviation.copy_(wide[:, :, 0, 0])


_FASTER = {}  # (device, sizes) -> by_fft or by_convolution


def faster_form(out, rows, scales: tuple, points: int):
    """The form that computes these sizes faster on this device: timed once, where there is a clock for it.

    Which one it is differs between accelerators; their numbers differ by rounding alone.
    """
    capturing = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    if not rows.is_cuda or capturing:
        return by_fft
    key = (rows.device, rows.dtype, len(scales), points, rows.shape[2], rows.shape[:2].numel().bit_length())
    if key not in _FASTER:
        _FASTER[key] = min(
            (by_fft, by_convolution), key=lambda form: seconds_of(form, out, rows, scales, points)
        )
    return _FASTER[key]


def seconds_of(form, *arguments) -> float:
    """Seconds on the clock of the device of three calls, after one that warms up."""
    form(*arguments)
    torch.cuda.synchronize(arguments[0].device)
    start = time.perf_counter()
    for _ in range(3):
        form(*arguments)
    torch.cuda.synchronize(arguments[0].device)
    return time.perf_counter() - start


def by_fft(out, rows, scales, points: int):
    """The filter through Fourier transforms in plain operations."""
    n, half = fft_length(rows.shape[2]), points // 2
    bank = spectra_of(scales, points, n, rows.dtype, rows.device)
    spectra = row_spectra(rows, points, n)
    products = torch.view_as_complex((spectra[:, :, None] * bank).unflatten(3, (-1, 2)))
    out.copy_(torch.fft.irfft(products, n)[..., half : half + out.shape[3]])


def by_convolution(out, rows, scales, points: int):
    """The filter by direct convolution in full precision."""
    kernels = kernels_of(scales, points, rows.dtype, rows.device)
    with torch.autocast(rows.device.type, enabled=False), torch.backends.cudnn.flags(allow_tf32=False):
        found = torch.nn.functional.conv1d(rows.flatten(0, 1)[:, None], kernels)
    out.copy_(found[..., : out.shape[3]].view_as(out))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def kernels_of(scales: tuple, points: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kernels (S, 1, points) on a device."""
    return create_ricker_wavelets(points, torch.tensor(scales, dtype=torch.float64)).to(device, dtype)


def row_spectra(rows, points: int, n: int):
    """rows (B, C, T) -> transforms (B, C, 2F), real and imaginary parts in turn."""
    spectra = torch.fft.rfft(rows, n)
    if points % 2 == 0:
        spectra = spectra * half_sample(n, spectra)
    return torch.view_as_real(spectra).flatten(2)


@functools.lru_cache(1)
def worker_threads(process: int) -> ThreadPoolExecutor:
    """Threads of this process, each of which computes alone.

    They stay: MKL holds a lock while a thread of its ends, and a process forked just then would wait for it
    for ever. torch's own number of threads is set to 1 in them once, when they start: a thread keeps the
    number that it was given, and the number that later threads get is given back at once.
    """
    count, threads = os.cpu_count() or 1, torch.get_num_threads()
    meet = threading.Barrier(count + 1)

    def alone():
        torch.get_num_threads()  # a thread takes over the common number when it first asks
        torch.set_num_threads(1)
        meet.wait()

    pool = ThreadPoolExecutor(count)
    for _ in range(count):
        pool.submit(alone)
    meet.wait()
    torch.set_num_threads(threads)
    return pool


def fill_by_threads(images, deviation, rows, mask, scales: tuple, points: int, normalize: bool):
    """On a CPU every thread takes a part of the signals and works alone on it: threads inside an image would
    wait for each other more than they work."""
    n = fft_length(rows.shape[2])
    bank = spectra_of(scales, points, n, rows.dtype, rows.device)
    # Handing over costs like 2^18 samples.
    workers = max(1, min(torch.get_num_threads(), len(rows), images.numel() >> 19))
    if workers == 1:
        return fill(images, deviation, rows, mask, bank, points, n, normalize)
    masks = [None] * workers if mask is None else mask.tensor_split(workers)
    parts = (t.tensor_split(workers) for t in (images, deviation, rows))
    settings = dict(bank=bank, points=points, n=n, normalize=normalize)
    list(worker_threads(os.getpid()).map(functools.partial(fill, **settings), *parts, masks))


def fill(images, deviation, rows, mask, bank, points: int, n: int, normalize: bool):
    """Fill images, few at a time (of long signals: few scales), in buffers that stay in the cache."""
    # What was made in inference mode is written in it; a thread does not know the mode of another.
    inference = images.is_inference() or deviation.is_inference()
    with torch.inference_mode(inference), torch.no_grad():
        half, channels, length = points // 2, rows.shape[1], images.shape[3]
        spectra = row_spectra(rows, points, n).flatten(0, 1)  # (R, 2F)
        images, deviation = images.flatten(0, 1), deviation.flatten(0, 1)  # (R, S, L), (R,)
        mask = None if mask is None else mask.to(rows.dtype).repeat_interleave(channels, 0)[:, None]
        count = length if mask is None else mask.sum(2, keepdim=True).clamp(min=1)  # real samples
        step, scales = max(1, 2**18 // (len(bank) * n)), min(len(bank), max(1, 2**18 // n))
        product, waves = rows.new_empty(step, scales, bank.shape[1]), rows.new_empty(step, scales, n)
        for r in range(0, len(images), step):
            some, here = images[r : r + step], slice(r, r + step)
            for s in range(0, len(bank), scales):
                kernels = bank[s : s + scales]
                part, wave = product[: len(some), : len(kernels)], waves[: len(some), : len(kernels)]
                torch.mul(spectra[here, None], kernels, out=part)
                torch.fft.irfft(torch.view_as_complex(part.unflatten(2, (-1, 2))), n, out=wave)
                some[:, s : s + scales] = wave[..., half : half + length]
            if mask is not None:
                some *= mask[here]
            if normalize:
                pixels = (count if mask is None else count[here]) * len(bank)
                some -= some.sum((1, 2), keepdim=True) / pixels
                if mask is not None:
                    some *= mask[here]
                # In two steps: in one it loses two digits.
                norm = torch.linalg.vector_norm(some, dim=2).norm(dim=1)
                degrees = max(1, pixels - 1) if mask is None else (pixels - 1).clamp(min=1)
                spread = (norm[:, None, None] / degrees**0.5).clamp(min=LEAST)
                some /= spread
                deviation[here] = spread[:, 0, 0]


# ---- what people call


def floats(x) -> Tensor:
    """x, a tensor, an array or a list, as float32, or float64 where it is that."""
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"x is a {type(x).__name__} that is no tensor of numbers: {error}") from None
    if x.is_complex():
        raise ValueError("x is complex, expected real numbers; give its real and imaginary part one by one")
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def signals(x) -> Tensor:
    """x as floats (B, L) with at least one sample."""
    x = floats(x)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, samples) with at least one sample")
    return x


def fixed_scales(scales) -> list[float]:
    """Scales (S,), a tensor or a list, as numbers; ValueError where a derivative is asked for."""
    scales = torch.as_tensor(scales)
    if not torch.compiler.is_compiling():
        inside = torch._C._functorch.is_functorch_wrapped_tensor(scales)
        if inside or scales.requires_grad or torch._VF._unpack_dual(scales, level=0)[1] is not None:
            raise ValueError("scales have no derivative, and vmap cannot map over them; give them as numbers")
    if scales.ndim != 1 or scales.is_complex():
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, expected real numbers (S,)")
    scales = scales.tolist()
    check_scales(scales)
    return scales


def check_scales(scales: list):
    """ValueError unless the scales are above 0 and rise: the last one says how long the kernels are."""
    rising = all(a < b for a, b in zip(scales, scales[1:]))
    if not scales or not 0 < scales[0] or not rising or not scales[-1] < math.inf:
        few = ", ".join(f"{a:g}" for a in scales[:4])
        raise ValueError(f"scales are {few or 'none'}; expected numbers above 0 in rising order, in samples")


_PLAIN = False


@contextlib.contextmanager
def plain_operations():
    """Within it the transform is `plain_bank`, whose operations exporters to other formats know."""
    global _PLAIN
    before, _PLAIN = _PLAIN, True
    try:
        yield
    finally:
        _PLAIN = before


def _apply(rows, mask, scales, points: int, normalize: bool, out=None) -> Tensor:
    """`ricker_bank`, in plain operations for exporters, or written into `out`."""
    if out is not None:
        check_out(out, rows, (*rows.shape[:2], len(scales), rows.shape[2] - 2 * (points // 2)))
        if torch.compiler.is_compiling():  # a compiler follows no write into memory that it has not seen
            return out.copy_(ricker_bank(rows, mask, scales, points, normalize)[0])
        filter_into(out, rows.new_ones(rows.shape[:2]), rows, mask, scales, points, normalize)
        return out
    if _PLAIN:
        return plain_bank(rows, mask, scales, points, normalize)[0]
    return ricker_bank(rows, mask, scales, points, normalize)[0]


def check_out(out, rows, wanted: tuple):
    """ValueError unless images of `rows` can be written into `out`, and no derivative is asked for."""
    if not torch.compiler.is_compiling():
        inside = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (rows, out))
        if inside or torch._VF._unpack_dual(rows, level=0)[1] is not None:
            raise ValueError("out= has no place in vmap or under a derivative of torch.func; leave it out")
    if torch.is_grad_enabled() and (rows.requires_grad or out.requires_grad):
        raise ValueError("out= has no derivative; call it without out, or under torch.no_grad()")
    fits = out.shape == wanted and out.dtype == rows.dtype and out.device == rows.device
    if not fits or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, expected contiguous {rows.dtype} "
            f"{wanted} on {rows.device}"
        )


def cwt_ricker(x: Tensor, scales: Tensor, legacy: bool = False, padding: str = "reflect") -> Tensor:
    """Ricker wavelet transform: x (B, L), scales (S,) ascending, in samples -> (B, S, L) float32 (float64 for
    float64).

    Kernels are odd and of fixed length, the signal continues by `padding`. Legacy: zeros, and upstream's
    kernel length.
    """
    x, scales = signals(x), fixed_scales(scales)
    points = kernel_points(scales[-1], x.shape[1], legacy)
    rows = extend(x, points // 2, "zero" if legacy else padding, None)[:, None]
    return _apply(rows, None, scales, points, False)[:, 0]


def cwt_wrap(
    x: Tensor,
    num_scales: int = 64,
    lowest_scale: float = 0.1,
    step: float = 1.0,
    legacy: bool = False,
    *,
    padding: str | None = None,
    log_scales: bool = False,
    real: Tensor | None = None,
    normalize: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Wavelet images of a signal, its first and its second difference: x (B, L) -> (B, 3, num_scales, L).

    Scales, in samples: lowest_scale + step * (0 .. num_scales - 1), or as many between the same ends in equal
    ratios (`log_scales`). Float32, also under autocast (float64 for float64 x). Differentiable in x.

    padding: how the signal, less its mean, continues beyond its ends: "reflect" (default), "replicate" or
        "zero".
    real: (B, L) bool, the samples of each row that are signal. What the others hold is ignored, and the
    images
        are 0 there; filters see straight lines over holes.
    normalize: each image to mean 0 and (unbiased) standard deviation 1 over scale and real time.
    out: a tensor of the result's shape to write to; memory that is used again costs no page faults. No
        derivative.
    legacy: upstream's numbers: a transform with an even or cut kernel (`kernel_points`), zeros beyond the
        ends of a signal whose mean was left in, and a backward difference, half a sample off the second one
        (default: a central one).
    """
    x = signals(x)
    padding = padding or ("zero" if legacy else "reflect")
    scales = scales_of(num_scales, lowest_scale, step, log_scales)
    check_scales(scales)
    points = kernel_points(scales[-1], x.shape[1], legacy)
    if real is not None:
        real = torch.as_tensor(real).to(x.device, torch.bool)
        if real.shape != x.shape:
            raise ValueError(f"real has shape {tuple(real.shape)}, expected {tuple(x.shape)} as x")
        x = bridged(x, real)
    rows = differences(x, real, points // 2, legacy, padding)
    return _apply(rows, real, scales, points, normalize, out)


def differences(x, real, half: int, legacy: bool, padding: str):
    """x (B, L) -> signal, first and second difference, continued by `half` samples: (B, 3, L + 2 half)."""
    if legacy:
        edge = extend(x, 1, "replicate", real)
        now, before, after = edge[:, 1:-1], edge[:, 1:-1] - edge[:, :-2], edge[:, 2:] - edge[:, 1:-1]
        rows = torch.stack([now, before, after - before], 1).flatten(0, 1)
        real = None if real is None else real.repeat_interleave(3, 0)
        return extend(rows, half, padding, real).unflatten(0, (x.shape[0], 3))
    weights = torch.ones_like(x) if real is None else real.to(x.dtype)
    count = weights.sum(1, keepdim=True).clamp(min=1)
    mean = (x * weights).sum(1, keepdim=True) / count
    rest = ((x - mean) * weights).sum(1, keepdim=True) / count  # lost in float32 by a large mean
    edge = extend(x, half + 1, padding, real, zero=mean)
    now, before, after = edge[:, 1:-1], edge[:, 1:-1] - edge[:, :-2], edge[:, 2:] - edge[:, 1:-1]
    return torch.stack([now - mean - rest, (before + after) / 2, after - before], 1)


def bridged(x: Tensor, real: Tensor) -> Tensor:
    """x (B, L) with straight lines between the real samples around each hole, and 0 outside of all of them:
    whatever stood there, nan too, is gone."""
    length = x.shape[1]
    t = torch.arange(length, device=x.device).expand_as(real)
    before = torch.where(real, t, -1).cummax(1).values
    after = torch.where(real, t, length).flip(1).cummin(1).values.flip(1)
    clean = torch.where(real, x, 0.0)
    left, right = clean.gather(1, before.clamp(min=0)), clean.gather(1, after.clamp(max=length - 1))
    share = (t - before) / (after - before).clamp(min=1)
    line = left + share.to(x.dtype) * (right - left)
    return torch.where(real, clean, torch.where((before >= 0) & (after < length), line, 0.0))


def extend(x: Tensor, margin: int, padding: str, real: Tensor | None, zero=0.0) -> Tensor:
    """x (B, L) -> (B, L + 2 margin), continued on both sides of its real part (B, L), all of it by
    default."""
    length = x.shape[1]
    t = torch.arange(length, device=x.device)
    if real is None:
        first, last = torch.zeros_like(t[:1])[None], torch.full_like(t[:1], length - 1)[None]
    else:
        first = torch.where(real, t, length).amin(1, keepdim=True)
        last = torch.where(real, t, 0).amax(1, keepdim=True)
        first = first.minimum(last)  # where nothing is real
    t = torch.arange(-margin, length + margin, device=x.device)[None]
    inside = t.maximum(first).minimum(last).expand(x.shape[0], -1)
    if padding == "zero":
        return torch.where((t >= first) & (t <= last), x.gather(1, inside), zero)
    if padding == "replicate":
        return x.gather(1, inside)
    if padding != "reflect":
        raise ValueError(f"padding={padding!r}: use zero, reflect or replicate")
    period = (2 * (last - first)).clamp(min=1)  # the signal forth and back, as often as needed
    t = (t - first) % period
    return x.gather(1, (first + t.minimum(period - t)).expand(x.shape[0], -1))
