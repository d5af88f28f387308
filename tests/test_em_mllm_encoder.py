"""em_mllm: encoder, packing, weight loading, signal generator."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.errors import UserError
from em_mllm.em_foundation.models import (
    SiTForMultiTask,
    SiTMAEConfig,
    SiTMAEForClassification,
    SiTMAEForPreTraining,
    SiTMAEModelWithoutMask,
    block,
    modeling_em,
)
from em_mllm.em_foundation.models.embedder import mae_scores, sample_id_matrix
from em_mllm.em_foundation.models.modeling_cnn import cnn_config
from em_mllm.em_foundation.utils.utils import (
    convert_checkpoint,
    first_fit,
    load_encoder,
    log_spectra,
    pack_sequence,
    read_config,
    with_special_patches,
)
from em_mllm.signals import (
    JAMMING,
    MAKERS,
    MODULATIONS,
    RADAR,
    add_noise,
    channel,
    constellation,
    make_signal,
    pulse_train,
    root_raised_cosine,
    shaped,
)

SMALL = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_seq_len=(256, 1),
    patch_size=(8, 1),
    decoder_hidden_size=24,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=40,
    initializer_range=0.2,
)


def packed(groups=((64, 40, 24), (128,), (16, 56)), fs=2.5, seed=0):
    rng = np.random.default_rng(seed)
    rows = [[with_special_patches(rng.standard_normal((n, 2)), 8, fs) for n in group] for group in groups]
    return pack_sequence(rows, 8, 192), rows


def make(cls=SiTMAEModelWithoutMask, **options):
    torch.manual_seed(0)
    return cls(SiTMAEConfig(**{**SMALL, **options})).eval()


def test_three_attentions_agree_and_a_packed_signal_equals_the_signal_alone():
    (patches, positions, ids), rows = packed()
    eager = make()
    valid = sample_id_matrix(ids, patches.shape[1]) >= 0
    expected = eager(patches, positions, ids).last_hidden_state
    for kind in ("sdpa", "fa2"):
        model = make(attention_type=kind)
        model.load_state_dict(convert_checkpoint(eager.state_dict(), model.state_dict()))
        torch.testing.assert_close(
            model(patches, positions, ids).last_hidden_state[valid], expected[valid], atol=1e-5, rtol=1e-4
        )
    alone_patches, alone_positions, alone_ids = pack_sequence([[rows[0][1]]], 8, (40 + 16))
    alone = eager(alone_patches, alone_positions, alone_ids).last_hidden_state
    torch.testing.assert_close(expected[0, 10:17], alone[0], atol=1e-5, rtol=1e-4)


def test_variable_length_path_gives_the_same_rows(monkeypatch):
    """The kernel itself needs CUDA; a plain softmax per sample stands in for it here, in bf16 as the kernel
    computes."""

    def stand_in(q, k, v, cu_q, cu_k, longest_q, longest_k):
        assert q.dtype == torch.bfloat16 and longest_q == int((cu_q[1:] - cu_q[:-1]).max())
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            )[0].transpose(0, 1)
            for a, b in zip(cu_q[:-1], cu_q[1:])
        ]
        return torch.cat(parts)

    (patches, positions, ids), _ = packed()
    model = make(attention_type="fa2")
    plain = model(patches, positions, ids).last_hidden_state
    monkeypatch.setattr(block, "varlen_attn", stand_in)
    monkeypatch.setattr(block, "has_varlen_kernel", lambda h: True)
    monkeypatch.setattr(modeling_em, "gen_attn_mask", None)  # nobody needs the (B, M, M) mask then
    valid = sample_id_matrix(ids, patches.shape[1]) >= 0
    flat = model(patches, positions, ids).last_hidden_state
    assert flat.shape == plain.shape
    torch.testing.assert_close(flat[valid], plain[valid], atol=5e-2, rtol=0)


def test_mask_hides_the_stated_share_of_every_sample_and_never_padding():
    (patches, positions, ids), _ = packed()
    model = make(SiTMAEForPreTraining, mask_ratio=0.5)
    matrix = sample_id_matrix(ids, patches.shape[1])
    out = model(patches, positions, ids, noise=mae_scores(matrix, 2, torch.Generator().manual_seed(1)))
    assert not out.mae_mask[matrix < 0].any() and not out.mae_mask[(positions < 2) & (matrix >= 0)].any()
    # 8, 5 and 3 IQ patches, half hidden
    row0 = [int(out.mae_mask[0][matrix[0] == s].sum()) for s in range(3)]
    assert all(abs(h - n / 2) <= 1 for h, n in zip(row0, (8, 5, 3)))
    again = model(patches, positions, ids, noise=mae_scores(matrix, 2, torch.Generator().manual_seed(1)))
    assert torch.equal(out.mae_mask, again.mae_mask)


def test_an_overlapping_stem_sees_the_patches_beside_and_nothing_else():
    """It begins as upstream's stem, with one key more; then a token knows its neighbours, but those of its
    own signal alone, and of the hidden ones none."""
    (patches, positions, ids), _ = packed()
    plain, model = make(SiTMAEForPreTraining), make(SiTMAEForPreTraining, stem="overlap")
    more = set(model.state_dict()) - set(plain.state_dict())
    assert more == {"sit.embeddings.overlap.weight"} and not set(plain.state_dict()) - set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    embeddings = model.sit.embeddings
    assert torch.equal(embeddings.embed(patches, positions), plain.sit.embeddings.embed(patches, positions))
    torch.nn.init.normal_(embeddings.overlap.weight)

    def reached(**options):
        """The tokens of row 0 that change with patch 5, an inner one of the first signal of 8."""
        changed = patches.clone()
        changed[0, 5] += 1
        before, after = (embeddings.embed(x, positions, **options)[0] for x in (patches, changed))
        return torch.nonzero((before != after).any(1)).flatten().tolist()

    assert reached() == [4, 5, 6]
    hidden = torch.ones(positions.shape, dtype=torch.bool)
    hidden[0, 5] = False
    assert reached(visible=hidden) == [5]
    special = model.config.num_special
    outer = embeddings.neighbours(patches, positions)
    size = patches.shape[-1]
    assert not outer[:, :special].any() and not outer[0, special, :size].any()
    assert not outer[0, 9, size:].any() and outer[0, 9, :size].any()  # the last patch of the first signal
    noise = mae_scores(sample_id_matrix(ids, patches.shape[1]), 2, torch.Generator().manual_seed(1))
    assert torch.isfinite(model(patches, positions, ids, noise=noise).loss)


def test_mask_ratio_zero_gives_loss_zero_not_nan():
    (patches, positions, ids), _ = packed()
    assert make(SiTMAEForPreTraining, mask_ratio=0.0)(patches, positions, ids).loss == 0


def test_rows_of_unequal_length_do_not_change_each_other():
    (patches, positions, ids), rows = packed()
    model, matrix = make(SiTMAEForPreTraining), sample_id_matrix(ids, patches.shape[1])
    noise = mae_scores(matrix, 2, torch.Generator().manual_seed(1))
    together = model(patches, positions, ids, noise=noise).logits
    alone = model(patches[2:], positions[2:], ids[2:], noise=noise[2:]).logits
    torch.testing.assert_close(together[2, : len(ids[2])], alone[0, : len(ids[2])], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_keeps_loss_and_gradients():
    (patches, positions, ids), _ = packed()
    noise = mae_scores(sample_id_matrix(ids, patches.shape[1]), 2, torch.Generator().manual_seed(1))
    results = []
    for on in (False, True):
        model = make(SiTMAEForPreTraining).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(patches, positions, ids, noise=noise).loss
        loss.backward()
        results.append((loss.item(), model.sit.encoder.layer[0].w_1.weight.grad.clone()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_with_sampling_rate_token(dtype):
    (patches, positions, ids), _ = packed()
    assert torch.isfinite(make().to(dtype)(patches, positions, ids).last_hidden_state[0, :5]).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_label_per_packed_signal_equals_each_signal_alone(pooling):
    (patches, positions, ids), rows = packed()
    model = make(SiTMAEForClassification, num_labels=4, pooling=pooling)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    losses = []
    for row, label in zip([r for group in rows for r in group], labels):
        one = pack_sequence([[row]], 8, row.shape[1])
        losses.append(model(*one, labels=label[None]).loss)
        logits = model(*one).logits[0]
        # behind the cls and the sampling-rate token
        read = logits[0] if pooling == "cls" else logits[2:].mean(0)
        torch.testing.assert_close(losses[-1], F.cross_entropy(read, label), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model(patches, positions, ids, labels=labels).loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-4
    )


def test_log_spectra_show_the_lines_of_psk_and_ignore_gain_and_phase():
    rng = np.random.default_rng(0)
    # the bands beside frequency zero: z, z^2, z^4, envelope
    middle = lambda iq: log_spectra(iq).reshape(4, 32)[:, 15:17].max(1)
    bpsk, qpsk = (
        np.repeat(constellation(name)[rng.integers(size, size=128)], 8)
        for name, size in (("BPSK", 2), ("QPSK", 4))
    )
    two, four = (np.stack([z.real, z.imag], 1) for z in (bpsk, qpsk))
    # a line holds the power of 1024 points: log 1024 = 6.9
    assert middle(two)[1] > 5 and middle(four)[1] < 4 and middle(four)[2] > 5
    turned = 0.3 * np.stack([bpsk.imag, -bpsk.real], 1)
    np.testing.assert_allclose(log_spectra(turned), log_spectra(two), atol=1e-4)
    assert log_spectra(two[:50]).shape == (128,) and np.isfinite(log_spectra(0 * two)).all()


def test_spectra_of_packed_signals_are_read_at_their_own_cls_token():
    (patches, positions, ids), rows = packed()
    model = make(SiTMAEForPreTraining, mask_ratio=0.0, spectrum_weight=0.5)
    sample_ids = sample_id_matrix(ids, patches.shape[1])
    signals = [r for group in rows for r in group]
    truth = torch.stack([torch.from_numpy(log_spectra(r[:, 16:, 0].T.numpy())) for r in signals])
    spectrum = torch.zeros(*positions.shape, 128)
    spectrum[(positions == 0) & (sample_ids >= 0)] = truth
    out = model(patches, positions, ids, spectrum=spectrum)
    alone = []
    for signal, target in zip(signals, truth):
        one = pack_sequence([[signal]], 8, signal.shape[1])
        at_cls = torch.cat([target[None], torch.zeros(len(one[1][0]) - 1, 128)])[None]
        alone.append(model(*one, spectrum=at_cls).spectrum_loss)
    torch.testing.assert_close(out.spectrum_loss, torch.stack(alone).mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.loss, out.hidden_loss + 0.5 * out.spectrum_loss)
    # published files have no such head
    assert not any("spectrum" in k for k in make(SiTMAEForPreTraining).state_dict())


def test_two_views_of_a_signal_find_each_other_among_those_of_the_batch():
    (patches, positions, ids), rows = packed()
    model = make(SiTMAEForPreTraining, contrast_weight=0.5, mask_ratio=0.0)
    both = [[row, row + 0.3 * torch.randn(row.shape)] for group in rows for row in group]
    for _, view in both:
        view[:, :16] = both[0][0][:, :16]  # the places of cls and rate
    lengths = iter([view for _, view in both])
    second = pack_sequence([[next(lengths) for _ in group] for group in rows], 8, 192)[0]
    out = model(patches, positions, ids, second=second)
    torch.testing.assert_close(out.loss, out.hidden_loss + 0.5 * out.contrast_loss)

    # each signal alone: both ways, the first finds the second among all
    def cls(signal):
        return model.sit(*pack_sequence([[signal]], 8, signal.shape[1])).last_hidden_state[0, 0]

    one, two = (torch.stack([cls(pair[k]) for pair in both]) for k in (0, 1))
    one, two = (F.normalize(model.decoder.contrast_pred(x), dim=1) for x in (one, two))
    right = torch.arange(len(one))
    expected = [F.cross_entropy(x @ y.T / 0.2, right) for x, y in ((one, two), (two, one))]
    torch.testing.assert_close(out.contrast_loss, sum(expected) / 2, atol=1e-5, rtol=1e-4)
    assert not any("contrast" in k for k in make(SiTMAEForPreTraining).state_dict())  # nor in published files


def test_the_second_view_shows_patches_that_the_first_hides():
    (patches, positions, ids), _ = packed()
    model, masks = make(SiTMAEForPreTraining, contrast_weight=0.5), []
    model.sit.register_forward_hook(lambda module, inputs, output: masks.append(output.mae_mask))
    model(patches, positions, ids, second=patches)
    is_iq = (positions > 1) & (sample_id_matrix(ids, patches.shape[1]) >= 0)
    shown = [(mask == 0) & is_iq for mask in masks]
    assert all(view.any() for view in shown) and not (shown[0] & shown[1]).any()


def test_unknown_regression_values_are_left_out_of_the_loss():
    (patches, positions, ids), _ = packed()
    model = make(SiTForMultiTask, num_labels=4, label_weights={"classification": 2.0})
    labels = {
        "classification": torch.zeros(6, dtype=torch.long),
        "pri": torch.tensor([1.0, float("nan"), 2.0, 1.0, float("nan"), 0.0]),
    }
    out = model(patches, positions, ids, labels=labels)
    cls = out.logits["pri"][(positions == 0) & (sample_id_matrix(ids, patches.shape[1]) >= 0)].flatten()
    expected = (cls - labels["pri"])[torch.tensor([0, 2, 3, 5])].abs().mean()
    torch.testing.assert_close(out.loss_details["pri"].detach(), expected.detach())
    torch.testing.assert_close(
        out.loss.detach(), 2 / 3 * out.loss_details["classification"] + 1 / 3 * out.loss_details["pri"]
    )


def test_patch_four_keeps_upstreams_table_length_and_json_round_trip(tmp_path):
    kinds = (dict(patch_size=(4, 1)), {}, dict(use_fs=False))
    assert [SiTMAEConfig(**kind).num_positions for kind in kinds] == [1028, 514, 513]
    SiTMAEConfig(**SMALL, fs=20e6).save_pretrained(tmp_path)
    again = SiTMAEConfig.from_pretrained(tmp_path)
    assert again.patch_size == [8, 1] and again.fs == 20e6 and again.num_positions == 34


def test_published_sizes():
    with torch.device("meta"):
        assert sum(p.numel() for p in SiTMAEModelWithoutMask(SiTMAEConfig()).parameters()) == 86_252_544
        model = SiTMAEForPreTraining(SiTMAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 112_138_256 and len(model.state_dict()) == 338


def test_weights_load_with_and_without_prefix_and_fused(tmp_path, capsys):
    source = make(SiTMAEForPreTraining)
    for name, target in (("prefixed", {}), ("fused", {"attention_type": "fa2"})):
        save_file(source.state_dict(), tmp_path / f"{name}.safetensors")
        model = make(**target)
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        report = load_encoder(model, tmp_path / f"{name}.safetensors")
        assert not report.missing and len(report.loaded) == len(model.state_dict())
        assert torch.equal(model.embeddings.projection.weight, source.sit.embeddings.projection.weight)
    assert "loaded" in capsys.readouterr().out
    plain = {k.removeprefix("sit."): v for k, v in source.state_dict().items() if k.startswith("sit.")}
    save_file(plain, tmp_path / "plain.safetensors")
    into = make(SiTMAEForPreTraining)
    assert len(load_encoder(into, tmp_path / "plain.safetensors").loaded) == len(make().state_dict())


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: {"encoder.blocks.0.weight": torch.zeros(3)}, "holds only 0 of the encoder's"),
        (
            lambda s: {**s, "embeddings.position_embeddings": s["embeddings.position_embeddings"][:10]},
            "has 10 rows, the model needs 34",
        ),
        (
            lambda s: {**s, "embeddings.projection.weight": torch.zeros(32, 8)},
            "embeddings.projection.weight is (32, 8), the model needs (32, 16)",
        ),
    ],
)
def test_wrong_weight_files_are_refused_by_name(tmp_path, change, words):
    state = {k: v.contiguous() for k, v in change(make().state_dict()).items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load_encoder(make(), tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_sizes_are_read_from_weights_without_config(tmp_path):
    model = SiTMAEModelWithoutMask(SiTMAEConfig(**{**SMALL, "hidden_size": 64, "num_attention_heads": 1}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = read_config(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    assert (config.patch_size, config.num_positions) == ([8, 1], 34)


def test_too_long_rows_and_signals_are_errors_not_cut():
    row = with_special_patches(np.ones((400, 2)), 8, 1.0)
    with pytest.raises(ValueError, match="holds 52 patches, room is for 24"):
        pack_sequence([[row]], 8, 192)
    long = pack_sequence([[row]], 8, 416)
    with pytest.raises(ValueError, match="beyond the table of 34"):
        make()(*long)


def test_first_fit_keeps_every_signal_once_within_the_room():
    lengths = np.random.default_rng(0).integers(3, 60, 200).tolist()
    rows = first_fit(lengths, 66)
    assert sorted(i for row in rows for i in row) == list(range(200)) and all(
        sum(lengths[i] for i in row) <= 66 for row in rows
    )
    assert sum(lengths) / (66 * len(rows)) > 0.93


# ---- the generator against theory


@pytest.mark.parametrize("name", MODULATIONS + RADAR + JAMMING)
def test_signal_is_reproducible_unit_power_and_finite(name):
    a, info = make_signal(name, 1024, 10.0, np.random.default_rng(3))
    b, _ = make_signal(name, 1024, 10.0, np.random.default_rng(3))
    assert np.array_equal(a, b) and a.shape == (1024, 2) and a.dtype == np.float32
    assert np.isfinite(a).all() and np.mean(a**2) * 2 == pytest.approx(1, rel=1e-4) and info["bandwidth"] >= 0


def test_measured_snr_is_the_stated_one():
    """A cyclic shift changes neither a tone nor its power; what is left after the tone's bin is removed is
    the noise."""
    n = 1 << 16
    tone = np.exp(2j * np.pi * 0.125 * np.arange(n))
    for snr_db in (-10, 0, 15):
        spectrum = np.abs(np.fft.fft(add_noise(tone, snr_db, np.random.default_rng(0)))) ** 2
        signal = spectrum[n // 8]
        assert 10 * np.log10(signal / (spectrum.sum() - signal)) == pytest.approx(snr_db, abs=0.15)


@pytest.mark.parametrize("name", ["BPSK", "QPSK", "16QAM", "OFDM", "MSK", "4FSK", "GFSK"])
def test_nearly_all_power_lies_in_the_stated_bandwidth(name):
    rng, inside = np.random.default_rng(0), []
    for _ in range(8):
        x, info = MAKERS[name](name, 4096, rng)
        spectrum = np.abs(np.fft.fft(x * np.hanning(len(x)))) ** 2
        frequency = np.abs(np.fft.fftfreq(len(x)))
        inside.append(spectrum[frequency <= info["bandwidth"] / 2 + 2 / 4096].sum() / spectrum.sum())
        if name in ("BPSK", "QPSK", "16QAM"):  # and not much less: the band edge is where theory puts it
            assert spectrum[frequency <= info["bandwidth"] / 4].sum() / spectrum.sum() < 0.95
    assert np.mean(inside) > 0.95


@pytest.mark.parametrize("name", ["BPSK", "QPSK", "8PSK", "16APSK", "16QAM", "64QAM", "OOK", "4ASK"])
def test_matched_filter_recovers_the_constellation(name):
    points = constellation(name)
    assert np.mean(np.abs(points) ** 2) == pytest.approx(1)
    rng, sps, rolloff, n = np.random.default_rng(0), 8, 0.35, 4096
    sent = rng.choice(points, n // sps + 20)
    x = shaped(sent, n, sps, rolloff, 0.0, span=8)
    taps = root_raised_cosine(np.arange(-8 * sps, 8 * sps + 1) / sps, rolloff)
    received = np.convolve(x, taps, "same")[::sps] / sps
    middle = slice(20, n // sps - 20)
    assert np.abs(received[middle] - sent[8:][: n // sps][middle]).max() < 0.05


def test_radar_parameters_are_those_of_the_signal():
    x, info = pulse_train("PULSE", 4096, np.random.default_rng(1))
    edges = np.nonzero(np.diff(np.abs(x), prepend=0) > 0.5)[0]
    assert len(edges) == info["num_pulses"] and edges[0] == pytest.approx(info["pulse_time_delay"], abs=1)
    assert np.diff(edges).mean() == pytest.approx(info["pri"], abs=0.5)
    assert (np.abs(x) > 0.5).sum() / len(edges) == pytest.approx(info["pulse_width"], rel=0.08)


def test_rayleigh_fading_changes_power_from_draw_to_draw():
    x = np.ones(256, complex)
    faded = [channel(x, np.random.default_rng(s), fading="rayleigh")[0][4:] for s in range(200)]
    powers = [np.mean(np.abs(z) ** 2) for z in faded]
    assert 0.7 < np.mean(powers) < 1.3 and np.std(powers) > 0.5


# ---- the convolutional encoder


def test_a_padded_signal_reads_as_alone_by_the_convolutional_encoder_and_a_frozen_one_stays():
    torch.manual_seed(0)
    model = SiTMAEForClassification(cnn_config(256, num_labels=3))
    iq = torch.randn(4, 2, 256)

    def patches(x):
        cut = x.reshape(len(x), 2, -1, 32).transpose(1, 2).flatten(2)
        return torch.cat([torch.zeros(len(x), 1, 64), cut], 1)

    places = torch.arange(9).expand(4, -1)
    ids = torch.zeros(4, 9, dtype=torch.long)
    model.train()
    model(patches(iq), places, ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()  # moves the statistics
    assert all(p.grad is not None for n, p in model.named_parameters() if "layernorm" not in n)
    model.eval()
    alone = model.sit(patches(iq[:1, :, :128]), places[:1, :5], ids[:1, :5]).last_hidden_state
    padded = torch.cat([iq[:1, :, :128], torch.zeros(1, 2, 128)], 2)
    mask = torch.where(torch.arange(9) < 5, 0, -1)[None]
    together = model.sit(patches(padded), places[:1], mask).last_hidden_state
    torch.testing.assert_close(together[:, :5], alone)
    before = {k: v.clone() for k, v in model.sit.state_dict().items()}
    model.sit.requires_grad_(False)
    model.train()
    model.sit(patches(iq), places, ids)
    assert all(torch.equal(v, before[k]) for k, v in model.sit.state_dict().items())
