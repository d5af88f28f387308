"""cwt_mae's model: properties, and every upstream defect that is mended by default (the accidents that legacy
keeps are pinned by the golden files)."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from cwt_mae.model import (
    CWT_MAE_RoPE,
    RotaryEmbedding,
    TensorizedLinear,
    apply_rotary_pos_emb,
    create_ricker_wavelets,
    cwt_ricker,
    cwt_wrap,
)
from cwt_mae.model_finetune import TF_MAE_Classifier, interpolate_pos_embed, load_model, save_model
from cwt_mae.test import read_card
from tests import tiny_cwt
from tests.golden import ROOT

SMALL = tiny_cwt.SIZES | dict(cwt_scales=16, patch_size_freq=4, embed_dim=32, depth=2, num_heads=4)
SMALL |= dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=3)


def signals(batch, length, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / 100
    return (torch.sin(8 * t) + 0.3 * torch.randn(batch, length, generator=generator)).to(dtype)


def small(seed=0, **options):
    torch.manual_seed(seed)
    model = CWT_MAE_RoPE(**{**SMALL, **options}).eval()
    with torch.no_grad():  # biases and norms that matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def padded(x, lead, length, garbage=7.0):
    """x (B, n) with `lead` samples of garbage before it and more after it -> (B, length) and its mask."""
    out, real = torch.full((len(x), length), garbage), torch.zeros(len(x), length, dtype=torch.bool)
    out[:, lead : lead + x.shape[1]], real[:, lead : lead + x.shape[1]] = x, True
    return out, real


def direct(x, num_scales, padding, lowest=0.1, step=1.0):
    """The default transform by its definition: float64, one explicit sum for each output, numpy's own
    padding."""
    scales = lowest + step * np.arange(num_scales)
    half = int(5 * scales[-1] + 1e-3)
    modes = {"reflect": {"mode": "reflect"}, "replicate": {"mode": "edge"}, "zero": {"mode": "constant"}}
    x = x.double().numpy()
    x = np.pad(x - x.mean(1, keepdims=True), ((0, 0), (half + 1, half + 1)), **modes[padding])
    rows = np.stack([x[:, 1:-1], (x[:, 2:] - x[:, :-2]) / 2, x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]], 1)
    t = np.arange(-half, half + 1) / scales[:, None]
    kernels = 2 / (np.sqrt(3 * scales[:, None]) * np.pi**0.25 + 1e-6) * (1 - t**2) * np.exp(-(t**2) / 2)
    windows = np.lib.stride_tricks.sliding_window_view(rows, 2 * half + 1, axis=2)
    return torch.from_numpy(windows @ kernels.T).transpose(2, 3)


# ---- front end ----


@pytest.mark.parametrize("padding", ["reflect", "replicate", "zero"])
@pytest.mark.parametrize(
    "length, num_scales, lowest, step",
    [(300, 16, 0.1, 1.0), (90, 7, 0.5, 0.7), (3, 3, 0.1, 1.0), (700, 64, 0.1, 1.0)],
)
def test_transform_equals_its_definition(length, num_scales, lowest, step, padding):
    x = signals(3, length) + 5
    expected = direct(x, num_scales, padding, lowest, step)
    peak = expected.abs().amax((0, 2, 3), keepdim=True)
    for dtype in (torch.float32, torch.float64):  # the scales are float32 in both
        found = cwt_wrap(x.to(dtype), num_scales, lowest, step, padding=padding)
        assert found.dtype == dtype and ((found - expected).abs() / peak).max() < 1e-6


@pytest.mark.parametrize("legacy", [False, True])
def test_cached_and_plain_path_agree_and_normalise(legacy):
    x, real = padded(signals(5, 150), 20, 240)
    for mask in (None, real):
        fast = cwt_wrap(x, 16, legacy=legacy, real=mask, normalize=True)
        plain = cwt_wrap(x.clone().requires_grad_(), 16, legacy=legacy, real=mask, normalize=True)
        assert (fast - plain).abs().max() < 2e-6 * plain.abs().max()
        inside = fast if mask is None else fast[..., 20:170]
        assert inside.mean((2, 3)).abs().max() < 1e-5 and (inside.std((2, 3)) - 1).abs().max() < 1e-5
        assert mask is None or not fast[..., :20].any() and not fast[..., 170:].any()


def test_long_signals_are_filtered_in_groups_of_scales():
    x = signals(1, 90000)
    whole, part = cwt_wrap(x, 8), cwt_wrap(x[:, 40000:41000], 8)
    beside = whole[..., 40100:40900] - part[..., 100:900]
    assert beside[:, 1:].abs().max() < 1e-5  # channel 0 has another mean
    assert torch.equal(whole, cwt_wrap(x, 8))


def test_thread_count_changes_nothing_and_stays():
    x, before = signals(12, 1000), torch.get_num_threads()
    expected = cwt_wrap(x, 64, normalize=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cwt_wrap(x, 64, normalize=True), expected)
            with torch.inference_mode():
                assert torch.equal(cwt_wrap(x, 64, normalize=True), expected)
            with ThreadPoolExecutor(1) as later:  # a thread that starts afterwards, such as autograd's
                assert torch.get_num_threads() == later.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)


def test_inference_mode_and_training_share_one_bank():
    x = signals(2, 123)
    outside = x.new_empty(2, 3, 5, 123)
    with torch.inference_mode():
        inside = cwt_wrap(x, 5, normalize=True)
        for out in (x.new_empty(2, 3, 5, 123), outside):  # in the mode or not, it is written
            assert torch.equal(cwt_wrap(x, 5, normalize=True, out=out), inside)
    assert torch.equal(cwt_wrap(x, 5, normalize=True, out=out), inside)
    y = cwt_wrap(x.clone().requires_grad_(), 5, normalize=True)
    y.sum().backward()
    assert (inside - y).abs().max() < 1e-5


@pytest.mark.parametrize("legacy", [False, True])
def test_other_devices_get_plain_operations_on_one_device(legacy):
    """The meta device computes nothing, but refuses to mix with the CPU and to be asked for values, as CUDA
    graphs do."""
    x, real = torch.empty(5, 1000, device="meta"), torch.empty(5, 1000, dtype=torch.bool, device="meta")
    for mask in (None, real):
        assert cwt_wrap(x, 64, legacy=legacy, real=mask, normalize=True).shape == (5, 3, 64, 1000)
        with torch.device("meta"):
            model = CWT_MAE_RoPE(**{**SMALL, "signal_len": 1000, "legacy": legacy})
        model(x, real=mask)[0].backward()
        assert model.pos_embed.grad.shape == model.pos_embed.shape


def test_impulse_gives_images_centred_on_it():
    """Upstream's 630 taps are half a sample late at 64 scales and its first difference is half a sample off
    the second."""
    x = torch.zeros(1, 1401)
    x[0, 700] = 1
    image = cwt_wrap(x, 64)[0]
    mirrored = image.flip(-1)
    assert (image[0] - mirrored[0]).abs().max() < 1e-6 and (image[2] - mirrored[2]).abs().max() < 1e-6
    assert (image[1] + mirrored[1]).abs().max() < 1e-6
    late = cwt_wrap(x, 64, legacy=True)[0, 0]
    assert (late - late.flip(-1)).abs().max() > 0.1


def test_kernels_do_not_depend_on_the_length_of_the_signal():
    """Upstream's row of scale 0.1 is dead at 3000 samples and dominant at 600, and short signals cut the
    kernels."""
    x = signals(1, 3000)
    x = x - x.mean()
    whole, part = cwt_wrap(x, 64)[0, 1:], cwt_wrap(x[:, 1000:1700], 64)[0, 1:]
    assert (whole[..., 1320:1380] - part[..., 320:380]).abs().max() < 1e-4 * whole.abs().max()
    ratio = cwt_wrap(x, 64)[0, 0, 0].std() / cwt_wrap(x[:, :600], 64)[0, 0, 0].std()
    old = cwt_wrap(x, 64, legacy=True)[0, 0, 0].std() / cwt_wrap(x[:, :600], 64, legacy=True)[0, 0, 0].std()
    assert 0.8 < ratio < 1.25 and old < 0.01


def test_short_signals_see_wavelets_not_cut_kernels():
    x = torch.ones(1, 200)
    x[0, 0] += 1e-3
    assert cwt_ricker(x, torch.arange(64) + 0.1)[0, 1:].abs().max() < 0.2  # a constant has no waves
    assert cwt_ricker(x, torch.arange(64) + 0.1, legacy=True)[0, -1].abs().max() > 0.4


def test_offset_of_the_signal_does_not_matter():
    x = signals(2, 500)
    for legacy, low, high in ((False, 0, 1e-3), (True, 1, 1e3)):
        images, moved = (cwt_wrap(z, 16, legacy=legacy, normalize=True) for z in (x, x + 100))
        assert low <= (images - moved).abs().max() < high


def test_autocast_leaves_the_transform_in_float32():
    x = signals(2, 300)
    expected = cwt_wrap(x, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cwt_wrap(x, 16), expected) and cwt_wrap(x.bfloat16(), 16).dtype == torch.float32
        plain = cwt_wrap(x.clone().requires_grad_(), 16)
        graded = torch.func.grad(lambda z: cwt_wrap(z, 16).square().sum())(x)
    assert plain.dtype == torch.float32 and (plain - expected).abs().max() < 1e-5
    wanted = torch.func.grad(lambda z: cwt_wrap(z, 16).square().sum())(x)
    assert (graded - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("legacy", [False, True])
def test_padding_is_not_seen_by_the_transform(legacy):
    x = signals(3, 160)
    expected = cwt_wrap(x, 16, normalize=True, legacy=legacy)  # 151 taps, also in legacy
    for lead, garbage in ((0, 3.0), (20, -50.0), (40, 0.0)):
        row, real = padded(x, lead, 200, garbage)
        images = cwt_wrap(row, 16, real=real, normalize=True, legacy=legacy)
        assert (images[..., lead : lead + 160] - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_forked_workers_can_use_the_transform_after_threads_ran():
    code = """
import os, signal, torch
from cwt_mae.model import cwt_wrap
torch.set_num_threads(2)
x = torch.randn(8, 1000)
first = cwt_wrap(x)
for _ in range(60):                                       # a lock that a dying thread holds is seldom caught
    cwt_wrap(x)
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(cwt_wrap(x), first) else 1)
    assert os.waitpid(pid, 0)[1] == 0
assert torch.get_num_threads() == 2
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_have_unit_norm_and_no_mean():
    kernels = create_ricker_wavelets(631, torch.arange(64) + 0.1)[:, 0]
    assert kernels.shape == (64, 631) and (kernels[3:].norm(dim=1) - 1).abs().max() < 1e-3
    assert kernels[3:].sum(1).abs().max() < 1e-3


def test_log_scales_share_the_ends():
    x = signals(1, 400)
    linear, log = cwt_wrap(x, 16, 1.0), cwt_wrap(x, 16, 1.0, log_scales=True)
    assert (linear[:, :, [0, -1]] - log[:, :, [0, -1]]).abs().max() < 1e-4
    assert (linear[:, :, 8] - log[:, :, 8]).abs().max() > 0.1


# ---- transformer ----


def test_default_sizes_are_the_published_ones():
    with torch.device("meta"):
        model, classifier = CWT_MAE_RoPE(), TF_MAE_Classifier(None, 5)
    assert sum(p.numel() for p in model.parameters()) == 95_618_954 and len(model.state_dict()) == 266
    assert sum(p.numel() for p in classifier.parameters()) == 74_458_373
    assert model.blocks[0].mlp[0].rank == 384 and TensorizedLinear(24, 96).rank == 32
    decoders = ("decoder", "mask_token", "time_")
    assert not [key for key in classifier.state_dict() if any(word in key for word in decoders)]


def test_rotary_scores_depend_on_the_distance_alone():
    """Tables rounded to bfloat16 make the score of one distance vary along the sequence by half a percent."""
    torch.manual_seed(0)
    q = torch.randn(1, 1, 1, 64).expand(1, 2000, 1, 64)
    for legacy, low, high in ((False, 0, 1e-4), (True, 1e-3, 1)):
        q2, k2 = apply_rotary_pos_emb(q, q, *RotaryEmbedding(64, legacy)(torch.arange(2000)[None]))
        scores = (q2[0, 5:, 0] * k2[0, :-5, 0]).sum(-1)
        assert low <= (scores.max() - scores.min()) / scores.abs().mean() <= high


def test_casting_the_model_leaves_the_positions_alone():
    ids = torch.tensor([[0, 1, 777, 123456]])
    exact = RotaryEmbedding(8)(ids)
    for dtype in (torch.bfloat16, torch.float16):
        assert all(torch.equal(a, b) for a, b in zip(RotaryEmbedding(8).to(dtype)(ids), exact))


def test_default_positions_are_times_whatever_the_length():
    short, long = (small(signal_len=length).rope_ids("cpu")[0, 1:].view(4, -1) for length in (200, 400))
    assert torch.equal(short[0], short[3]) and torch.equal(short, long[:, :10])
    old = small(legacy=True).rope_ids("cpu")
    kept = small(legacy=True, signal_len=400, rope_stride=10).rope_ids("cpu")
    assert torch.equal(old[0], torch.arange(41)) and kept[0, 1:].view(4, 20)[3, 0] == 31


@pytest.mark.parametrize("ratio, kept, legacy_kept", [(0.75, 10, 10), (0.8, 8, 7), (0.9, 4, 3), (0.99, 1, 0)])
def test_count_of_hidden_patches(ratio, kept, legacy_kept):
    noise = torch.rand(2, 40)
    for legacy, expected in ((False, kept), (True, legacy_kept)):
        mask, ids_restore, ids_keep, slots = small(mask_ratio=ratio, legacy=legacy).random_masking(noise)
        assert ids_keep.shape == (2, expected) and slots is None and (mask.sum(1) == 40 - expected).all()
        assert not mask.gather(1, ids_keep).any()
        assert torch.equal(ids_restore.sort(1)[0], torch.arange(40).expand(2, -1))


def test_column_masking_hides_whole_columns():
    out = small(column_masking=True).forward_losses(signals(3, 200), torch.rand(3, 40))
    mask = out["mask"].view(3, 4, 10)
    assert torch.equal(mask.amin(1), mask.amax(1)) and (mask.sum((1, 2)) == 32).all()


def test_masked_time_loss_ignores_the_visible_columns():
    model = small(column_masking=True, masked_time_loss=True)
    out = model.forward_losses(signals(2, 200), torch.rand(2, 40))
    hidden = out["mask"].view(2, 4, 10)[:, 0].repeat_interleave(20, 1)
    loss = lambda wrong: model.forward_loss_time(out["signal"], out["pred_time"] + 5 * wrong, out["mask"])
    assert loss(1 - hidden).item() == pytest.approx(out["loss_time"].item(), rel=1e-5)
    assert loss(hidden) > 2 * out["loss_time"]


def test_channel_weights_weigh_the_image_loss():
    noise, x = torch.rand(2, 40), signals(2, 200)

    def loss(*weights):
        return small(channel_weights=weights).forward_losses(x, noise)["loss_spec"].item()

    assert loss(2, 1, 1) == pytest.approx((2 * loss(1, 0, 0) + loss(0, 1, 0) + loss(0, 0, 1)) / 4, rel=1e-4)
    assert loss(1, 0, 0) != pytest.approx(loss(0, 0, 1), rel=1e-3)


def test_raw_patches_reach_the_encoder_and_their_gain_learns():
    model, x = small(raw_patches=True, patch_norm=False), signals(2, 200)
    model(x)[0].backward()
    assert model.raw_gain.grad.abs() > 0 and "patch_embed.norm.weight" not in model.state_dict()
    assert "raw_gain" not in small().state_dict()


def test_noise_fixes_the_masks_and_its_absence_draws_them():
    model, x, noise = small(), signals(2, 200), torch.rand(2, 40)
    assert torch.equal(model(x, noise)[0], model(x, noise)[0])
    assert not torch.equal(model.forward_losses(x)["mask"], model.forward_losses(x)["mask"])
    details = model(x, noise, details=True)
    assert torch.equal(details["loss"], details["loss_spec"] + model.time_loss_weight * details["loss_time"])
    assert torch.equal(model.unpatchify(model.patchify(details["imgs"])), details["imgs"])


# ---- padding ----


@pytest.mark.parametrize(
    "options",
    [{}, {"column_masking": True}, {"legacy": True}, {"raw_patches": True, "masked_time_loss": True}],
)
def test_padding_changes_no_loss_and_no_prediction(options):
    model, noise, x = small(**options), torch.rand(3, 40), signals(3, 110)
    clean, real = padded(x, 30, 200, 0.0)
    out, other = (model.forward_losses(z, noise, real) for z in (clean, padded(x, 30, 200, 99.0)[0]))
    patches = model.real_patches(real)
    assert patches.view(3, 4, 10)[:, :, 1:7].all() and patches.sum() == 3 * 4 * 6
    for name in ("loss", "loss_spec", "loss_time", "pred_spec", "pred_time"):
        assert torch.equal(out[name], other[name]), name
    wrong = out["pred_spec"] + 9 * model.patchify((~real)[:, None, None].float().expand(3, 3, 16, 200))
    assert torch.equal(model.forward_loss_spec(out["imgs"], wrong, out["mask"], real), out["loss_spec"])
    wrong = out["pred_time"] + 9 * ~real
    assert torch.equal(model.forward_loss_time(out["signal"], wrong, out["mask"], real), out["loss_time"])
    hidden = (out["mask"] * patches).sum(1)  # the ratio holds on the real patches
    assert (hidden == 24 - (8 if "column_masking" in options else 6)).all()


def test_decoder_does_not_see_what_a_short_record_hides():
    """A record with few real patches keeps fewer of them than its batch has room for; the rest of the room
    holds hidden ones."""
    model, real = small(), padded(signals(2, 60), 40, 200)[1]
    patches = model.real_patches(real)
    mask, ids_restore, ids_keep, slots = model.random_masking(torch.rand(2, 40), patches)
    assert slots.shape == (2, 10) and (slots.sum(1) == 3).all()
    assert torch.equal(mask.gather(1, ids_keep) == 0, slots)
    latent = torch.randn(2, 11, 32)
    other = torch.cat([latent[:, :1], torch.where(slots[..., None], latent[:, 1:], 9.0)], 1)
    features, same = (
        model.forward_decoder(tokens, ids_restore, patches, slots) for tokens in (latent, other)
    )
    assert torch.equal(features, same)


def test_padded_tokens_are_as_if_the_rest_was_not_there():
    """A longer window of padding must not change what the encoder says about the real patches."""
    x = signals(2, 200)
    model = small(signal_len=400)
    same = TF_MAE_Classifier(None, 3, use_cot=False, hidden_dim=16, **SMALL | {"signal_len": 400}).eval()
    own = same.encoder_model.state_dict()
    same.encoder_model.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    tokens, patches = same.forward_features(x)
    short = TF_MAE_Classifier(None, 3, use_cot=False, hidden_dim=16, **SMALL).eval()
    table = same.encoder_model.pos_embed
    table = torch.cat([table[:, :1], table[:, 1:].unflatten(1, (4, 20))[:, :, :10].flatten(1, 2)], 1)
    short.encoder_model.load_state_dict(same.encoder_model.state_dict() | {"pos_embed": table})
    expected, none = short.forward_features(x)
    found = tokens.unflatten(1, (4, 20))[:, :, :10].flatten(1, 2)
    assert none is None and (found - expected).abs().max() < 1e-5


def test_loss_of_a_padded_batch_is_the_mean_of_its_records():
    """Two processes that share a batch then have the loss of one."""
    model, noise = small(), torch.rand(4, 40)
    x, real = signals(4, 200), torch.arange(200) < torch.tensor([200, 150, 90, 31])[:, None]
    whole = model(x, noise, real)[0]
    halves = [model(x[i : i + 2], noise[i : i + 2], real[i : i + 2])[0] for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_short_input_counts_as_padded():
    model, noise, x = small(), torch.rand(2, 40), signals(2, 150)
    assert torch.equal(model(x, noise)[0], model(*[padded(x, 0, 200)[0], noise, padded(x, 0, 200)[1]])[0])


@pytest.mark.parametrize("use_cot", [True, False])
def test_padding_changes_no_logits(use_cot):
    torch.manual_seed(0)
    model = TF_MAE_Classifier(None, 3, use_cot=use_cot, hidden_dim=16, **SMALL).eval()
    x, real = padded(signals(2, 90), 25, 200)
    assert torch.equal(model(x, real), model(x + 50 * ~real, real))
    assert not torch.equal(model(x, real), model(x))


# ---- bad input ----


@pytest.mark.parametrize(
    "x, text",
    [
        (torch.zeros(200), r"shape \(200,\)"),
        (torch.zeros(2, 3, 200), r"\(2, 3, 200\), expected \(batch"),
        (torch.zeros(2, 201), "201 samples, the model takes 2 .. 200"),
        (torch.zeros(2, 1), "1 samples"),
        (torch.tensor([0.0, float("nan")]).repeat(2, 100), r"NaN.*rows \[0, 1\]"),
    ],
)
def test_bad_signals_are_named(x, text):
    for model in (small(), TF_MAE_Classifier(None, 2, **SMALL)):
        with pytest.raises(ValueError, match=text):
            model(x)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"signal_len": 210}, "210 is not a multiple of patch_size_time 20; use 200"),
        ({"cwt_scales": 18}, "18 is not a multiple of patch_size_freq"),
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"num_heads": 5}, "32 does not give 5 heads"),
    ],
)
def test_impossible_sizes_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        CWT_MAE_RoPE(**{**SMALL, **options})


def test_flat_signal_has_a_finite_loss_and_gradient():
    model = small()
    loss = model(torch.full((2, 200), 3.0))[0]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_empty_and_wrong_masks_are_named():
    with pytest.raises(ValueError, match=r"fewer than 2 samples in rows \[1\]"):
        small()(signals(2, 200), real=torch.tensor([[True], [False]]).expand(2, 200))
    with pytest.raises(ValueError, match=r"real has shape \(2, 100\)"):
        small()(signals(2, 200), real=torch.ones(2, 100, dtype=torch.bool))


# ---- classifier ----


def test_with_a_hierarchy_the_first_features_alone_tell_the_first_two_classes_apart():
    torch.manual_seed(0)
    model = TF_MAE_Classifier(None, 4, num_features=5, hierarchy=2, **SMALL).eval()
    x, features = torch.randn(6, SMALL["signal_len"]), torch.randn(6, 5)
    with torch.no_grad():
        logits = model(x, features=features)
        other = model(x.flip(0), features=torch.cat([features[:, :2], torch.randn(6, 3)], 1))
        rhythm = model(x, features=torch.cat([torch.randn(6, 2), features[:, 2:]], 1))
    assert torch.allclose(logits.exp().sum(1), torch.ones(6), atol=1e-5)
    first = [found[:, 1] - found[:, 0] for found in (logits, other, rhythm)]
    assert torch.allclose(first[0], first[1], atol=1e-5) and (first[0] - first[2]).abs().min() > 1e-4
    assert (logits - other)[:, 2:].abs().min() > 1e-4


@pytest.mark.parametrize(
    "key, wanted",
    [("blocks.0.time_attn.qkv.weight", "CWT_MAE_v3"), ("module.patch_embed.proj.6.bias", "use_conv_stem")],
)
def test_weights_of_upstreams_later_models_are_refused_by_name(key, wanted, tmp_path):
    torch.save({"model": {"pos_embed": torch.zeros(1, 8, 4), key: torch.zeros(4)}}, tmp_path / "v.pth")
    with pytest.raises(UserError, match=wanted):
        TF_MAE_Classifier(str(tmp_path / "v.pth"), 2)


def test_centre_columns_and_features_reach_the_head():
    torch.manual_seed(0)
    head = dict(use_cot=False, hidden_dim=16, center_columns=3)
    model = TF_MAE_Classifier(None, 3, **head, num_features=2, **SMALL).eval()
    x, features = signals(2, 200), torch.randn(2, 2)
    assert model.head[0].normalized_shape == (3 * 32,)
    assert not torch.equal(model(x, features=features), model(x, features=features + 1))
    with pytest.raises(ValueError, match="features holds 0 numbers"):
        model(x)
    cot = TF_MAE_Classifier(None, 3, num_features=2, **SMALL).eval()
    assert cot(x, features=features).shape == (2, 3)
    with pytest.raises(ValueError, match="center_columns 3"):
        TF_MAE_Classifier(None, 3, center_columns=3, **SMALL)


def test_the_head_sees_the_difference_from_the_median_beat():
    torch.manual_seed(0)
    head = dict(use_cot=False, hidden_dim=16, center_columns=3, compare=True)
    model = TF_MAE_Classifier(None, 3, **head, **SMALL).eval()
    x = signals(4, 200)
    own = model.middle(x)
    assert own.shape == (4, 3 * 32)
    same = model(x, median_beat=own)  # no difference is no difference
    assert torch.allclose(same, same[:1].expand(4, -1), atol=1e-5)
    assert torch.allclose(model(x, median_beat=own + 1)[2:], model(x[2:], median_beat=own[2:] + 1), atol=1e-5)
    with pytest.raises(ValueError, match="median_beat is missing"):
        model(x)
    with pytest.raises(ValueError, match="compare needs center_columns"):
        TF_MAE_Classifier(None, 3, use_cot=False, compare=True, **SMALL)


def test_unknown_arguments_are_refused_and_the_decoders_accepted():
    with pytest.raises(TypeError, match="signal_length"):
        TF_MAE_Classifier(None, 3, signal_length=200)
    assert TF_MAE_Classifier(None, 3, mask_ratio=0.5, **SMALL).config["signal_len"] == 200


def test_encode_takes_any_length_and_rate_and_leaves_the_model_as_it_was():
    model = TF_MAE_Classifier(None, 3, **SMALL, preprocess={"fs": 50.0, "low_hz": 0.0}).train()
    x = signals(1, 2300)[0].numpy()  # 23 s at 100 Hz: 5 windows of 4 s and one of 3 s
    tokens, pooled = model.encode(x, fs=100)
    assert tokens.shape == (6, 40, 32) and pooled.shape == (32,)
    assert model.training and not tokens.requires_grad
    assert not tokens[-1].view(4, 10, 32)[:, 8:].any() and tokens[-1].view(4, 10, 32)[:, :7].any(-1).all()
    assert torch.equal(pooled, model.encode(x, fs=100)[1])
    with pytest.raises(UserError, match="NaN"):
        model.encode(np.full(500, np.nan), fs=100)


# ---- files ----


def test_decoder_is_never_allocated(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the decoder was built")

    monkeypatch.setattr(CWT_MAE_RoPE, "__init__", refuse)
    TF_MAE_Classifier(None, 2, **SMALL)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saved_models_come_back_whole_with_their_configuration(tmp_path, suffix, capsys):
    path, x, noise = tmp_path / f"model{suffix}", signals(2, 200), torch.rand(2, 40)
    other = dict(log_scales=True, lowest_scale=1.0, channel_weights=(1, 0.5, 0.1), padding="replicate")
    model = small(**other, mask_ratio=0.6)
    save_model(path, model)
    assert torch.equal(load_model(path)(x, noise)[0], model(x, noise)[0])
    classifier = TF_MAE_Classifier(path, 3, use_cot=False, hidden_dim=16).eval()  # sizes from the file
    assert classifier.config["log_scales"] and classifier.config["padding"] == "replicate"
    assert not classifier.encoder_model.legacy
    assert "upstream" not in capsys.readouterr().out
    assert torch.equal(classifier.encoder_model.blocks[1].mlp[3].u.weight, model.blocks[1].mlp[3].u.weight)
    save_model(path, classifier)
    assert torch.equal(load_model(path)(x), classifier(x)) and load_model(path).config == classifier.config
    if suffix == ".safetensors":  # a run folder serves as well, with the configuration in its file
        assert load_model(tmp_path).config == classifier.config


def test_upstream_checkpoint_runs_legacy_and_says_so(tmp_path, capsys):
    path, source = tmp_path / "checkpoint_last.pth", small(legacy=True)
    yaml = {"train": {"epochs": 3}, "data": {"signal_len": 200, "index_path": "x"}}
    yaml["model"] = {k: v for k, v in SMALL.items() if k != "signal_len"}
    weights = {f"_orig_mod.module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"model": weights, "config": yaml, "epoch": 2}, path)
    classifier = TF_MAE_Classifier(path, 2)
    text = capsys.readouterr().out
    assert classifier.encoder_model.legacy
    assert "upstream's numerics (legacy)" in text and "loaded 35 of 35" in text
    x, noise = signals(2, 200), torch.rand(2, 40)
    assert torch.equal(load_model(path)(x, noise)[0], source(x, noise)[0])
    assert not TF_MAE_Classifier(path, 2, legacy=False).encoder_model.legacy


def test_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    path = tmp_path / "other.pth"
    for content in (
        {"a.weight": torch.zeros(3)},
        {"model": {f"net.{k}": v for k, v in small().state_dict().items()}},
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match="other.pth fits this model in only 0 of"):
            TF_MAE_Classifier(path, 2, **SMALL)
    torch.save({"state_dict": small().state_dict()}, path)
    TF_MAE_Classifier(path, 2, **SMALL)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight has shape \(32, 3, 4, 20\) in the file"):
        TF_MAE_Classifier(path, 2, **{**SMALL, "patch_size_time": 10})
    with pytest.raises(UserError, match="fits this model in only 35 of 61"):
        TF_MAE_Classifier(path, 2, **{**SMALL, "depth": 4})  # half of it would stay random
    deep = {k: v for k, v in small(depth=12).state_dict().items() if not k.startswith("blocks.7.")}
    torch.save(deep, path)
    with pytest.raises(UserError, match="other.pth: lacks blocks.7.norm1.weight, which would stay random"):
        TF_MAE_Classifier(path, 2, **{**SMALL, "depth": 12})
    with pytest.raises(UserError, match="no such weight file"):
        TF_MAE_Classifier(tmp_path / "none.pth", 2, **SMALL)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="other.pth"):
        TF_MAE_Classifier(path, 2, **SMALL)


@pytest.mark.parametrize("scales, length", [(8, 200), (32, 100), (24, 400)])
def test_positions_are_interpolated_on_both_axes(tmp_path, scales, length):
    """The old grid comes from the file: with (32, 100) the table has as many patches as before, in other
    rows."""
    path, source = tmp_path / "model.pth", small()
    table = torch.arange(4.0)[:, None].expand(4, 10)  # a table that says its row
    source.pos_embed.data[0, 1:] = table.reshape(-1, 1)
    for config in (source.config, None):  # ours, and an upstream file, whose time_reducer spans the grid
        torch.save({"model": source.state_dict()} | ({"config": config} if config else {}), path)
        sizes = {**SMALL, "cwt_scales": scales, "signal_len": length}
        table = TF_MAE_Classifier(path, 2, **sizes).encoder_model.pos_embed[0, 1:]
        positions = table.view(scales // 4, length // 20, 32)
        assert (positions - positions[:, :1, :1]).abs().max() < 1e-5
        assert (positions[:, 0, 0].diff() > 0).all() and abs(positions.mean() - 1.5) < 1e-5
    assert interpolate_pos_embed(source.pos_embed, (4, 10), (4, 10)) is source.pos_embed


# ---- use ----


@pytest.mark.slow
def test_compiled_model_gives_the_same_loss():
    model, x, noise = small(), signals(2, 200), torch.rand(2, 40)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(x, noise)[0]
    loss.backward()
    assert loss.item() == pytest.approx(model(x, noise)[0].item(), rel=1e-5)
    assert model.pos_embed.grad.abs().sum() > 0


def test_autocast_trains_in_bfloat16():
    model, x, noise = small(), signals(2, 200), torch.rand(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.forward_losses(x, noise)
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and out["pred_spec"].dtype == torch.bfloat16
    assert out["loss"].item() == pytest.approx(model(x, noise)[0].item(), rel=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_weights_may_have_another_dtype_than_the_signal(dtype, tolerance):
    x, noise = signals(2, 200), torch.rand(2, 40)
    expected = small(raw_patches=True)(x, noise)[0].item()
    assert small(raw_patches=True).to(dtype)(x, noise)[0].item() == pytest.approx(expected, rel=tolerance)
    assert TF_MAE_Classifier(None, 2, **SMALL).to(dtype)(x).dtype == dtype


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model, x = CWT_MAE_RoPE(**SMALL), signals(16, 200)
    optimizer, noise = torch.optim.AdamW(model.parameters(), 3e-3), torch.rand(16, 40)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(x, noise)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_example_of_the_guide_runs():
    sizes = dict(signal_len=3000, cwt_scales=64, mask_ratio=0.75)
    model = CWT_MAE_RoPE(**sizes, depth=1, decoder_depth=1)
    loss, _, _, _ = model(torch.randn(2, 3000))
    assert 0.5 < loss.item() < 20


def test_head_ignores_padding_tokens_as_if_absent():
    model = TF_MAE_Classifier(None, 3, **SMALL).eval()
    tokens = torch.randn(2, 40, 32)
    real = torch.arange(40).expand(2, -1) < 25
    assert (model.head(tokens, real) - model.head(tokens[:, :25])).abs().max() < 1e-5
    assert (model.head(tokens, real) - model.head(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("stored", [{"format": "pt"}, {"note": "hello"}, None])
def test_weights_of_another_kind_are_named_as_such_when_scored(stored, tmp_path):
    """A checkpoint on the way has the file's name and no task."""
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata=stored)
    with pytest.raises(UserError, match="expected the model.safetensors of a finetune.py run"):
        read_card(tmp_path / "model.safetensors")
