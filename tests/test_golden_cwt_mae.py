"""Every file of GOLDEN_DIR/cwt_mae: tensors that upstream's own modules produced. The kind is the start of
the file name, sizes come from the metadata, tolerances from the golden README. A file of unknown kind, or an
output that is not compared, fails.

All of it is legacy numerics: float32 rotary tables or a centred kernel would fail here by a factor of ten and
more."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from common.train import lr_at
from cwt_mae.model import (
    Block,
    CWT_MAE_RoPE,
    DecomposedPatchEmbed,
    RoPEAttention,
    RotaryEmbedding,
    TensorizedBlock,
    TensorizedLinear,
    apply_rotary_pos_emb,
    create_ricker_wavelets,
    cwt_ricker,
    cwt_wrap,
)
from cwt_mae.model_finetune import TF_MAE_Classifier, interpolate_pos_embed
from tests.golden import golden_files
from tests.upstream_cwt_mae import band_pass, finetune_window, pretrain_window

MODEL_ARGS = (
    "signal_len cwt_scales patch_size_time patch_size_freq embed_dim depth num_heads decoder_embed_dim "
    "decoder_depth decoder_num_heads mask_ratio mlp_rank_ratio time_loss_weight"
).split()


class Golden:
    """Tensors of one file by prefix; `check` compares one output and remembers that it did."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.config = json.loads(file.metadata()["config"])
        self.left = {key for key in self.tensors if key.startswith("out.")}

    def cases(self):
        return [(case["case"], case) for case in self.config]

    def get(self, key):
        return self.tensors[key]

    def under(self, prefix):
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def check(self, key, value, tolerance):
        expected = self.tensors["out." + key]
        self.left.discard("out." + key)
        value = torch.as_tensor(value.copy() if hasattr(value, "strides") else value).detach()
        assert value.shape == expected.shape, (
            f"{key}: {tuple(value.shape)} instead of {tuple(expected.shape)}"
        )
        assert torch.isfinite(value.float()).all(), f"{key} is not finite"
        error = (
            (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
        ).item()
        assert error <= tolerance, f"{key} is off by {error:.1e} of its peak, allowed {tolerance:.0e}"


def rate_at(step, steps, config):
    """The learning rate at `step` as train.py sets it, with the numbers of a golden file."""
    base = config["base_lr"]
    floor = config["min_lr"] / base
    return base * lr_at(step, steps, config["warmup_steps"], floor=floor, ramp="zero")


def model_of(config):
    return {key: config[key] for key in MODEL_ARGS}


def ricker_kernels(g, tmp_path):
    for i, case in g.cases():
        g.check(f"{i}.kernels", create_ricker_wavelets(case["points"], g.get(f"in.{i}.scales")), 2e-6)


def cwt_ricker_(g, tmp_path):
    for i, _ in g.cases():
        g.check(f"{i}.cwt", cwt_ricker(g.get(f"in.{i}.x"), g.get(f"in.{i}.scales"), legacy=True), 5e-6)


def cwt_wrap_(g, tmp_path):
    for i, case in g.cases():
        x, args = g.get(f"in.{i}.x"), (case["num_scales"], case["lowest"], case["step"])
        imgs = cwt_wrap(x, *args, legacy=True)
        g.check(f"{i}.imgs", imgs, 5e-6)
        g.check(f"{i}.mean", imgs.mean((2, 3), keepdim=True), 5e-6)
        g.check(f"{i}.std", imgs.std((2, 3), keepdim=True).clamp(min=1e-5), 5e-6)
        expected = (g.get(f"out.{i}.imgs") - g.get(f"out.{i}.mean")) / g.get(f"out.{i}.std")
        for graded in (False, True):
            found = cwt_wrap(x.clone().requires_grad_(graded), *args, legacy=True, normalize=True)
            off = (found - expected).abs().max() / expected.abs().max()
            assert off <= 5e-6, f"normalisation of case {i}, with a gradient: {graded}"


def rope(g, tmp_path):
    for i, case in g.cases():
        table = RotaryEmbedding(case["dim"], legacy=True)
        cos, sin = table(g.get(f"in.{i}.pos_ids"))
        q, k = apply_rotary_pos_emb(g.get(f"in.{i}.q"), g.get(f"in.{i}.k"), cos, sin)
        found = {"cos": cos, "sin": sin, "q_rot": q, "k_rot": k, "inv_freq": table.inv_freq}
        for name, value in found.items():
            g.check(f"{i}.{name}", value, 1e-6)


def tensorized_linear(g, tmp_path):
    for i, case in g.cases():
        layer = TensorizedLinear(case["in_features"], case["out_features"], case["rank_ratio"], case["bias"])
        assert layer.rank == case["rank"]
        layer.load_state_dict(g.under(f"param.{i}."))
        g.check(f"{i}.y", layer(g.get(f"in.{i}.x")), 5e-6)


def modules(g, tmp_path):
    c, x = g.config, g.get("in.x")
    patch_embed = DecomposedPatchEmbed(c["img"], c["patch_size"], 3, c["dim"], norm_layer=torch.nn.LayerNorm)
    patch_embed.load_state_dict(g.under("param.patch_embed."))
    g.check("patch_embed", patch_embed(g.get("in.imgs")), 5e-6)
    tables = RotaryEmbedding(c["dim"] // c["heads"], legacy=True)(g.get("in.pos_ids"))
    for name, module in (
        ("attn", RoPEAttention(c["dim"], c["heads"])),
        ("attn_bias", RoPEAttention(c["dim"], c["heads"], qkv_bias=True)),
        ("tblock", TensorizedBlock(c["dim"], c["heads"], c["mlp_ratio"], rank_ratio=c["rank_ratio"])),
        ("block", Block(c["dim"], c["heads"], c["mlp_ratio"])),
    ):
        module.load_state_dict(g.under(f"param.{name}."))
        module.eval()
        g.check(name, module(x, *tables), 5e-6)
        g.check(f"{name}_norope", module(x), 5e-6)


def mae(g, tmp_path):
    model = CWT_MAE_RoPE(legacy=True, **model_of(g.config)).eval()
    model.load_state_dict(g.under("param."))
    x, noise = g.get("in.x"), g.get("in.noise")
    torch.manual_seed(g.config["noise_seed"])
    assert torch.equal(torch.rand(noise.shape), noise)  # so a seeded model of ours draws upstream's masks
    torch.manual_seed(g.config["noise_seed"])
    drawn = model(x)[0]
    out = model.forward_losses(x, noise)
    assert torch.equal(drawn, out["loss"])
    mask, ids_restore, ids_keep, _ = model.random_masking(noise)
    imgs, signal, _ = model.images(x)
    latent = model.forward_encoder(imgs, signal, ids_keep=ids_keep)
    names = "loss_spec loss_time pred_spec pred_time imgs".split()
    found = {"total_loss": out["loss"], **{name: out[name] for name in names}, "latent": latent}
    found["decoder_features"] = model.forward_decoder(latent, ids_restore)
    exact = {"mask": mask, "ids_keep": ids_keep, "ids_restore": ids_restore}
    assert torch.equal(out["mask"], mask)
    out["loss"].backward()
    model.mask_ratio = 0.0
    whole = model.forward_losses(x[:, None])
    imgs, signal, _ = model.images(x)
    found |= {"r0.total_loss": whole["loss"], **{f"r0.{name}": whole[name] for name in names}}
    found["r0.latent"] = model.forward_encoder(imgs, signal)
    for name in g.under("out."):
        if name.startswith("grad."):
            g.check(name, model.get_parameter(name[5:]).grad, 1e-4)
        else:
            g.check(name, exact[name] if name in exact else found[name], 0 if name in exact else 2e-5)


def train_steps(g, tmp_path):
    c = g.config
    model = CWT_MAE_RoPE(legacy=True, **model_of(c)).train()
    model.load_state_dict(g.under("param."))
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=c["betas"], eps=c["eps"], weight_decay=c["weight_decay"]
    )
    losses, norms = [], []
    for step, (x, noise, lr) in enumerate(zip(g.get("in.x"), g.get("in.noise"), g.get("in.lr").tolist())):
        assert rate_at(step, c["steps"], c) == pytest.approx(lr, rel=1e-6, abs=1e-12)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = model(x, noise)[0]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip_grad"]))
        optimizer.step()
        losses.append(loss.detach())
    g.check("loss", torch.stack(losses), 1e-4)
    g.check("grad_norm", torch.stack(norms), 1e-4)
    for name in g.under("out.final."):
        g.check(f"final.{name}", model.get_parameter(name), 5e-4)


def classifier(g, tmp_path):
    c, path = g.config, tmp_path / "upstream.pth"
    weights = {c["key_prefix"] + key: value for key, value in g.under("pretrained.").items()}
    torch.save({"model": weights, "epoch": 3}, path)
    head = {key: c[key] for key in ("num_reasoning_tokens", "hidden_dim", "num_res_blocks") if key in c}
    sizes = model_of(c["pretrain"]) | {"signal_len": c["new_signal_len"]}
    model = TF_MAE_Classifier(path, c["num_classes"], use_cot=c["use_cot"], **head, **sizes).eval()
    state = model.state_dict()
    assert set(state) == set(c["state_dict_keys"])
    for key, value in g.under("pretrained.").items():
        if f"encoder_model.{key}" in state and key != "pos_embed":
            assert torch.equal(state[f"encoder_model.{key}"], value), f"{key} was not loaded"
    expected = g.get("param.encoder_model.pos_embed")
    assert (state["encoder_model.pos_embed"] - expected).abs().max() <= 5e-6 * expected.abs().max()
    loaded = model.load_state_dict(g.under("param."), strict=False)
    assert not loaded.unexpected_keys and not any(key.startswith("head.") for key in loaded.missing_keys)
    x = g.get("in.x")
    imgs, signal, _ = model.encoder_model.images(x)
    g.check("latent", model.encoder_model.forward_encoder(imgs, signal), 2e-5)
    logits = model(x[:, None])
    g.check("logits", logits, 2e-5)
    loss = F.cross_entropy(logits, g.get("in.y"), label_smoothing=0.1)
    g.check("ce_ls01", loss, 2e-5)
    loss.backward()
    for name in g.under("out.grad."):
        g.check(f"grad.{name}", model.get_parameter(name).grad, 1e-4)


def pos_embed_interp(g, tmp_path):
    for i, case in g.cases():
        old, new = (case["grid_h"], case["grid_w_old"]), (case["grid_h"], case["grid_w_new"])
        g.check(f"{i}.pos_embed", interpolate_pos_embed(g.get(f"in.{i}.pos_embed"), old, new), 5e-6)


def preprocess_and_schedule(g, tmp_path):
    c = g.config
    assert c["mode"] == "test"  # a random crop would need the generator's state
    for i in g.under("in.pretrain."):
        row = g.get(f"in.pretrain.{i}")[c["pretrain_row"]].numpy()
        g.check(f"pretrain.{i}", pretrain_window(row, c["pretrain_signal_len"]), 1e-6)
    for i in g.under("in.cls."):
        x = g.get(f"in.cls.{i}").numpy()
        g.check(f"cls_filtered.{i}", band_pass(x, c["cls_fs"]), 1e-6)
        g.check(f"cls.{i}", finetune_window(x, c["cls_signal_len"], c["cls_fs"]), 1e-6)
        g.left.discard(f"out.cls_label.{i}")  # the label stored beside the record, not computed
    lr = c["lr"]
    rates = [rate_at(step, lr["total_steps"], lr) for step in range(lr["total_steps"])]
    g.check("lr", torch.tensor(rates, dtype=torch.float64), 1e-6)


COMPARED = (ricker_kernels, cwt_ricker_, cwt_wrap_, rope, tensorized_linear, modules, mae, train_steps)
COMPARED += (classifier, pos_embed_interp, preprocess_and_schedule)
KINDS = {function.__name__.rstrip("_"): function for function in COMPARED}


@pytest.mark.parametrize("path", golden_files("cwt_mae"))
def test_golden(path, tmp_path):
    kind = next((compare for name, compare in KINDS.items() if path.name.startswith(name)), None)
    assert kind, f"{path.name}: no kind of this name is known; kinds: {', '.join(KINDS)}"
    golden = Golden(path)
    kind(golden, tmp_path)
    assert not golden.left, f"outputs that were not compared: {sorted(golden.left)}"
