"""cwt_mae: the wavelet bank as an operator: derivatives, transforms, threads, holes; numerics that travel
with weights."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.autograd import forward_ad

from cwt_mae.model import CWT_Encoder, CWT_MAE_RoPE, numerics_of
from cwt_mae.model_finetune import TF_MAE_Classifier, load_model, read_model
from cwt_mae.wavelet import create_ricker_wavelets, cwt_ricker, cwt_wrap, ricker_bank, scales_of
from tests import tiny_cwt
from tests.tiny_cwt import DECODER

SIZES = tiny_cwt.SIZES | {"patch_size_freq": 4}


def signals(batch=3, length=120, dtype=torch.float64, seed=0):
    return torch.randn(batch, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(batch=3, length=120):
    real = torch.ones(batch, length, dtype=torch.bool)
    real[0, 100:] = False
    real[1, 40:60] = False
    return real


SOME = torch.zeros(2, 9)
FORMS = {
    "plain": {},
    "normalised": {"normalize": True},
    "masked": {"normalize": True, "real": mask_of()},
    "legacy": {"legacy": True, "normalize": True},
    "log": {"log_scales": True, "lowest_scale": 0.7},
    "zero": {"padding": "zero"},
}


@pytest.mark.parametrize("form", FORMS)
def test_forward_derivatives_are_the_limit_of_differences_and_reverse_ones_agree(form):
    x, v = signals(), signals(seed=1)
    call = lambda x: cwt_wrap(x, 6, **FORMS[form])
    value, tangent = torch.func.jvp(call, (x,), (v,))
    step = 1e-6
    wanted = (call(x + step * v) - call(x - step * v)) / (2 * step)
    assert torch.equal(value, call(x)) and tangent.norm() > 1
    assert (tangent - wanted).norm() < 1e-7 * wanted.norm()
    value, pull = torch.func.vjp(call, x)
    g = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=value.dtype)
    assert float((pull(g)[0] * v).sum()) == pytest.approx(float((g * tangent).sum()), rel=1e-9)


@pytest.mark.slow
def test_second_derivatives_pass_gradgradcheck():
    x = signals(1, 14).requires_grad_()
    for form in ({}, {"normalize": True}, {"normalize": True, "real": torch.arange(14)[None] < 11}):
        assert torch.autograd.gradgradcheck(lambda x, form=form: cwt_wrap(x, 3, **form), x)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_gives_what_a_batch_gives(form):
    options = dict(FORMS[form])
    x, real = signals(dtype=torch.float32), options.pop("real", None)
    wanted = cwt_wrap(x, 6, real=real, **options)
    if real is None:
        found = torch.func.vmap(lambda z: cwt_wrap(z[None], 6, **options)[0])(x)
    else:
        found = torch.func.vmap(lambda z, r: cwt_wrap(z[None], 6, real=r[None], **options)[0])(x, real)
    assert (found - wanted).abs().max() < 1e-6
    per_sample = torch.func.vmap(torch.func.grad(lambda z: cwt_wrap(z[None], 6).square().sum()))(x)
    x.requires_grad_()
    cwt_wrap(x, 6).square().sum().backward()
    assert (per_sample - x.grad).abs().max() < 1e-4 * x.grad.abs().max()


@pytest.mark.slow
def test_compilers_see_one_graph_with_its_gradient():
    x = signals(dtype=torch.float32)
    call = lambda z: cwt_wrap(z * 2, 6, normalize=True) * 2
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x))
    grads = []
    for function in (call, compiled):
        z = x.clone().requires_grad_()
        function(z).pow(3).sum().backward()
        grads.append(z.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-4 * grads[0].abs().max()


def dual(call, x, v):
    """Derivative of `call` at x along v by dual numbers, without torch.func."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, v))).tangent


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "masked", "legacy"])
def test_a_compiled_forward_derivative_is_the_derivative(form):
    x, v = signals(), signals(seed=1)
    call = lambda x: cwt_wrap(x, 4, **FORMS[form])
    derive = lambda x: torch.func.jvp(call, (x,), (v,))[1]
    wanted = derive(x)
    torch.compiler.reset()
    inside = torch.compile(derive, backend="aot_eager")(x)
    assert wanted.norm() > 1 and (inside - wanted).norm() < 1e-12 * wanted.norm()
    assert (dual(call, x, v) - wanted).norm() < 1e-12 * wanted.norm()
    # Of what was compiled before, with numbers that carried no tangent
    compiled = torch.compile(call, backend="eager")
    compiled(x)
    assert (torch.func.jvp(compiled, (x,), (v,))[1] - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.slow
def test_compiled_derivatives_of_torch_func_are_those_without_a_compiler():
    x = signals(1, 16)
    call = lambda z: cwt_wrap(z, 2, normalize=True, real=torch.arange(16)[None] < 13)
    total = lambda z: call(z).pow(3).sum()
    one = torch.func.grad(lambda z: cwt_wrap(z[None], 2).pow(3).sum())
    for derive in (torch.func.hessian(total), torch.func.vmap(one)):
        torch.compiler.reset()
        wanted, found = derive(x), torch.compile(derive, backend="aot_eager")(x)
        assert wanted.abs().max() > 0.1 and (found - wanted).abs().max() < 1e-11 * wanted.abs().max()


def test_second_derivatives_by_any_two_modes_are_the_same():
    x = signals(1, 16)
    total = lambda z: cwt_wrap(z, 2, normalize=True).pow(3).sum()
    wanted = torch.autograd.functional.hessian(total, x)
    twice = (torch.func.jacrev, torch.func.jacfwd)
    for outer in twice:
        for inner in twice:
            assert (outer(inner(total))(x) - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_the_operator_itself_has_both_derivatives_and_vmap():
    rows, scales = signals(2, 60)[:, None].repeat(1, 3, 1), scales_of(4, 0.1, 1.0, False)
    bank = lambda r: torch.ops.cwt_mae.ricker_bank(r, None, scales, 31, False)[0]
    back = lambda g: torch.ops.cwt_mae.ricker_bank_transposed(g, scales, 31)
    images = bank(rows)
    for call, at in ((bank, rows), (back, images)):
        # Both are linear: the derivative along a direction is the value there
        assert (torch.func.jvp(call, (at,), (at,))[1] - call(at)).abs().max() < 1e-12
        mapped = torch.func.vmap(lambda one, call=call: call(one[None])[0])(at)
        assert (mapped - call(at)).abs().max() < 1e-12
    # and each is the other's transposed.
    assert torch.allclose(torch.func.vjp(bank, rows)[1](images)[0], back(images), rtol=1e-12)
    assert torch.allclose(torch.func.vjp(back, images)[1](rows)[0], images, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_one_graph_serves_every_length(legacy):
    call = lambda x: cwt_wrap(x, 8, legacy=legacy)
    torch.compiler.reset()
    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend="eager")
    for batch, length in ((2, 50), (3, 77), (1, 600)):
        x = signals(batch, length, torch.float32)
        assert torch.equal(compiled(x), call(x))


def test_the_operator_passes_torchs_own_checks():
    rows = signals(2, 60)[:, None].repeat(1, 3, 1).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        ricker_bank, (rows, None, scales_of(4, 0.1, 1.0, False), 31, True), test_utils=tests
    )


def test_model_and_transform_can_be_exported():
    class Front(torch.nn.Module):
        def forward(self, x):
            return cwt_wrap(x, 8)

    x = signals(2, 200, torch.float32)
    assert torch.equal(torch.export.export(Front(), (x,)).module()(x), cwt_wrap(x, 8))
    model = TF_MAE_Classifier(None, num_classes=3, **SIZES).eval()
    exported = torch.export.export(model, (x,)).module()
    assert (exported(x) - model(x)).abs().max() < 1e-5


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", ["plain", "normalised", "legacy"])
def test_an_empty_batch_gives_empty_images(form, grad):
    x = signals(2, 100, torch.float32)[:0].clone().requires_grad_(grad)
    imgs = cwt_wrap(x, 6, **FORMS[form])
    assert imgs.shape == (0, 3, 6, 100) and cwt_ricker(x, torch.arange(1, 5)).shape == (0, 4, 100)
    if grad:
        imgs.sum().backward()
        assert x.grad.shape == x.shape


def test_out_is_written_and_returned_and_refused_where_it_does_not_fit():
    x = signals(4, 300, torch.float32)
    out = torch.full((4, 3, 16, 300), 7.0)
    assert cwt_wrap(x, 16, normalize=True, out=out) is out
    assert torch.equal(out, cwt_wrap(x, 16, normalize=True))
    for wrong in (out[:3], out.double(), out.transpose(2, 3).contiguous().transpose(2, 3)):
        with pytest.raises(ValueError, match="expected contiguous"):
            cwt_wrap(x, 16, out=wrong)
    with pytest.raises(ValueError, match="no derivative"):
        cwt_wrap(x.clone().requires_grad_(), 16, out=out)
    for transform in (
        lambda: torch.func.vmap(lambda z: cwt_wrap(z[None], 16, out=out[:1])[0])(x),
        lambda: torch.func.vmap(lambda z, o: cwt_wrap(z[None], 16, out=o[None])[0])(x, out),
        lambda: torch.func.jvp(lambda z: cwt_wrap(z, 16, out=out), (x,), (x,)),
        lambda: torch.func.grad(lambda z: cwt_wrap(z, 16, out=out).sum())(x),
        lambda: dual(lambda z: cwt_wrap(z, 16, out=out), x, x),
    ):
        with pytest.raises(ValueError, match="out= has no place in vmap"):
            transform()


@pytest.mark.parametrize(
    "wrong, wanted",
    [
        (lambda: cwt_wrap(torch.zeros(2, 0)), "at least one sample"),
        (lambda: cwt_wrap([]), "at least one sample"),
        (lambda: cwt_wrap(torch.zeros(5)), "expected .batch, samples."),
        (lambda: cwt_ricker(torch.zeros(2, 0), torch.arange(1, 4)), "at least one sample"),
        (lambda: cwt_ricker(torch.zeros(2, 3, 4), torch.arange(1, 4)), "expected .batch, samples."),
        (lambda: cwt_wrap(torch.zeros(2, 9, dtype=torch.complex64)), "complex"),
        (lambda: cwt_wrap(np.array([["a", "b"]])), "no tensor of numbers"),
        (lambda: cwt_wrap(np.zeros((2, 9), ">f4")), "byte order"),
        (lambda: cwt_wrap([[1.0, 2.0], [3.0]]), "no tensor of numbers"),
        (lambda: cwt_wrap(torch.zeros(2, 9), 0), "scales are none"),
        (lambda: cwt_wrap(torch.zeros(2, 9), lowest_scale=0.0), "above 0"),
        (lambda: cwt_wrap(torch.zeros(2, 9), 4, lowest_scale=-1.0, log_scales=True), "above 0"),
        (lambda: cwt_wrap(torch.zeros(2, 9), 4, lowest_scale=float("nan")), "above 0"),
        (lambda: cwt_wrap(torch.zeros(2, 9), 4, lowest_scale=9.0, step=-1.0), "rising"),
        (lambda: cwt_ricker(torch.zeros(2, 9), torch.tensor([4.0, 2.0])), "rising"),
        (lambda: cwt_ricker(torch.zeros(2, 9), torch.ones(2, 2)), "expected real numbers .S,."),
        (lambda: cwt_ricker(torch.zeros(2, 9), torch.ones(1, requires_grad=True)), "no derivative"),
        (lambda: torch.func.grad(lambda a: cwt_ricker(SOME, a).sum())(torch.ones(1)), "no derivative"),
        (lambda: torch.func.jvp(lambda a: cwt_ricker(SOME, a), *[(torch.ones(1),)] * 2), "no derivative"),
        (lambda: torch.func.vmap(lambda a: cwt_ricker(SOME, a[None]))(torch.ones(2)), "cannot map"),
        (lambda: cwt_wrap(torch.zeros(2, 9), real=torch.ones(2, 8)), "real has shape"),
        (lambda: cwt_wrap(torch.zeros(2, 9), padding="wrap"), "use zero, reflect or replicate"),
    ],
)
def test_what_cannot_be_transformed_is_said(wrong, wanted):
    with pytest.raises(ValueError, match=wanted):
        wrong()


def test_arrays_lists_and_whole_numbers_are_signals_too():
    x = signals(2, 40)
    wanted = cwt_wrap(x, 4, real=mask_of(2, 40))
    assert torch.equal(cwt_wrap(x.numpy(), 4, real=mask_of(2, 40).numpy()), wanted)
    assert torch.equal(cwt_wrap(x.numpy()[:, ::2].copy(), 4), cwt_wrap(x[:, ::2], 4))
    assert torch.equal(cwt_ricker(x, [1, 2, 4]), cwt_ricker(x, torch.tensor([1.0, 2, 4])))
    whole = (10 * x).round()
    assert torch.equal(cwt_wrap(whole.int().tolist(), 4), cwt_wrap(whole.float(), 4))
    assert torch.equal(cwt_wrap(whole.short(), 4), cwt_wrap(whole.float(), 4))
    model = CWT_MAE_RoPE(**SIZES, **DECODER).eval()
    x, noise = signals(2, 200, torch.float32), torch.rand(2, 20)
    assert torch.equal(model(x.numpy(), noise)[0], model(x, noise)[0])


def test_a_row_without_a_real_sample_is_zero_and_leaves_the_others_alone():
    x, real = signals(), mask_of()
    real[2] = False
    for form in ({}, {"normalize": True}, {"normalize": True, "legacy": True}):
        z = x.clone().requires_grad_()
        imgs = cwt_wrap(z, 5, real=real, **form)
        imgs.pow(3).sum().backward()
        assert not imgs[2].any() and not z.grad[2].any() and torch.isfinite(z.grad).all()
        assert torch.equal(imgs[:2], cwt_wrap(x[:2], 5, real=real[:2], **form))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_through_the_model():
    model = TF_MAE_Classifier(None, num_classes=3, **SIZES).eval()
    x = signals(3, 200, torch.float32)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda z: model(z[None])[0])(x)
        assert (mapped - model(x)).abs().max() < 1e-5


def test_threads_that_start_during_a_transform_see_all_of_torchs_threads():
    before, seen, stop = torch.get_num_threads(), [], threading.Event()
    x = signals(16, 3000, torch.float32)

    def watch():
        while not stop.is_set():
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()

    try:
        torch.set_num_threads(2)
        expected = cwt_wrap(x)
        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in range(5):
            assert torch.equal(cwt_wrap(x), expected)
        stop.set()
        watcher.join()
        assert seen and set(seen) == {2} and torch.get_num_threads() == 2
    finally:
        stop.set()
        torch.set_num_threads(before)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_what_stands_in_a_hole_of_the_mask_reaches_nothing(legacy, garbage):
    model = TF_MAE_Classifier(None, num_classes=3, legacy=legacy, raw_patches=True, **SIZES).eval()
    x, real = signals(3, 200, torch.float32), mask_of(3, 200)
    real[2, 3:77] = False
    clean, dirty = torch.where(real, x, 0.0), torch.where(real, x, garbage)
    with torch.no_grad():
        imgs = cwt_wrap(clean, 8, real=real)
        assert torch.equal(model(dirty, real), model(clean, real))
        assert torch.equal(cwt_wrap(dirty, 8, real=real), imgs)
    assert not imgs[2, :, :, 3:77].any() and imgs[2, :, :, 77:].any()


@pytest.mark.parametrize(
    "num, lowest, step, log", [(64, 0.1, 1.0, False), (16, 0.7, 1.25, True), (33, 0.3, 0.7, False)]
)
def test_scales_are_those_of_float32_tensors(num, lowest, step, log):
    wanted = torch.arange(num) * step + lowest
    if log:
        wanted = torch.logspace(torch.tensor(lowest).log10(), wanted[-1].log10(), num)
    found = torch.tensor(scales_of(num, lowest, step, log), dtype=torch.float64)
    assert found.equal(wanted.double()) or log and (found / wanted - 1).abs().max() < 3e-7


@pytest.mark.parametrize("points", [30, 31])
def test_the_plain_forms_of_accelerators_give_the_same_numbers(points):
    from cwt_mae import wavelet

    rows, scales = signals(2, 200)[:, None].repeat(1, 3, 1), tuple(scales_of(4, 0.1, 1.0, False))
    wanted = ricker_bank(rows, None, scales, points, False)[0]
    kernels = create_ricker_wavelets(points, torch.tensor(scales, dtype=torch.float64))
    direct = torch.nn.functional.conv1d(rows.flatten(0, 1)[:, None], kernels)[..., : wanted.shape[3]]
    assert (direct.view_as(wanted) - wanted).abs().max() < 1e-12
    for form in (wavelet.by_fft, wavelet.by_convolution):
        out = torch.empty_like(wanted)
        form(out, rows, scales, points)
        assert (out - wanted).abs().max() < 1e-12
    for real in (None, mask_of(2, out.shape[3])):
        wanted, spread = ricker_bank(rows, real, scales, points, True)
        out = ricker_bank(rows, real, scales, points, False)[0]
        wavelet.normalise_into(out, deviation := torch.empty_like(spread), real)
        assert (out - wanted).abs().max() < 1e-12 and (deviation - spread).abs().max() < 1e-12


# ---- numerics travel with the weights


def images_of(model, x):
    encoder = getattr(model, "encoder_model", model)
    with torch.no_grad():
        return encoder.images(x)[0]


def each(model, change=torch.clone, prefix="") -> dict:
    """A plain dictionary of changed tensors: the state dict's metadata are lost."""
    return {prefix + key: change(value) for key, value in model.state_dict().items()}


SAVES = {
    "state dict": lambda model, path: torch.save(model.state_dict(), path),
    "nested": lambda model, path: torch.save({"model": model.state_dict(), "epoch": 3}, path),
    "state_dict": lambda model, path: torch.save({"state_dict": model.state_dict()}, path),
    "plain dictionary": lambda model, path: torch.save(dict(model.state_dict()), path),
    "half": lambda model, path: torch.save(each(model, torch.Tensor.half), path),
    "bfloat16": lambda model, path: torch.save(each(model, torch.Tensor.bfloat16), path),
    "wrapped": lambda model, path: torch.save(each(model, prefix="module._orig_mod."), path),
    "parallel": lambda model, path: torch.save(torch.nn.DataParallel(model).state_dict(), path),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("how", [*SAVES, "safetensors"])
def test_a_saved_state_dict_runs_with_the_numerics_it_was_trained_with(how, legacy, tmp_path):
    torch.manual_seed(0)
    model = CWT_MAE_RoPE(**SIZES, **DECODER, legacy=legacy).eval()
    path = tmp_path / ("m.safetensors" if how == "safetensors" else "m.pth")
    if how == "safetensors":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    else:
        SAVES[how](model, path)
    tuned, x = TF_MAE_Classifier(str(path), num_classes=2, **SIZES).eval(), signals(2, 200, torch.float32)
    assert tuned.encoder_model.legacy == legacy and torch.equal(images_of(model, x), images_of(tuned, x))
    if how not in ("half", "bfloat16"):
        with torch.no_grad():
            tokens = model.forward_encoder(*model.images(x)[:2])[:, 1:]
            assert (tuned.forward_features(x)[0] - tokens).abs().max() < 1e-6


def test_a_state_dict_keeps_scales_sizes_and_preparation_too(tmp_path):
    other = dict(log_scales=True, lowest_scale=0.7, padding="replicate", preprocess={"fs": 50.0})
    model = CWT_MAE_RoPE(**SIZES, **DECODER, **other).eval()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    same, x = load_model(tmp_path / "m.pth"), signals(2, 200, torch.float32)
    assert same.config == model.config and torch.equal(images_of(model, x), images_of(same, x))
    classifier = TF_MAE_Classifier(str(tmp_path / "m.pth"), num_classes=3, use_cot=False).eval()
    torch.save(classifier.state_dict(), tmp_path / "c.pth")
    again = load_model(tmp_path / "c.pth")
    with torch.no_grad():
        assert again.config == classifier.config and torch.equal(again(x), classifier(x))


def test_upstreams_files_stay_legacy_and_state_dicts_keep_upstreams_keys(tmp_path, capsys):
    model = CWT_MAE_RoPE(**SIZES, **DECODER)
    upstream = {k: v for k, v in model.state_dict().items()}
    for name in ("rope_encoder.inv_freq", "rope_decoder.inv_freq"):
        upstream[name] = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    torch.save({"model": upstream}, tmp_path / "up.pth")
    assert (
        read_model(tmp_path / "up.pth")[1]["legacy"] and "an upstream checkpoint" in capsys.readouterr().out
    )
    assert numerics_of(model.state_dict()) is False and numerics_of({}) is None
    assert set(model.state_dict()) == {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    encoder = CWT_Encoder(**SIZES)
    report = encoder.load_state_dict({k: v for k, v in upstream.items() if k in encoder.state_dict()})
    assert not report.missing_keys and not report.unexpected_keys
