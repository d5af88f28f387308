"""Every file of GOLDEN_DIR/pruning: reference logits under masks and dropped layers, distances, scores, prune
maps."""

import csv
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from pruning.layers import decoder_layers, head_counts, without_layers
from pruning.pruning_tools.prune_llm import make_tag, parse_drop_layers
from pruning.pruning_tools.shards import open_checkpoint
from pruning.sensitivity_analyse.eval_metric import logprob_distance
from pruning.sensitivity_analyse.layer_mask import ProjHeadMaskWrapper, masked
from pruning.sensitivity_analyse.layer_sensitivity_scan import layer_scores, summarise
from pruning.sensitivity_analyse.scan_methods import METHODS, list_variants, scan_batch
from tests.golden import golden_files
from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]


def read(path):
    """(config, tolerance, {"in"|"out"|"param": {name: tensor}}) of a golden file."""
    parts = {"in": {}, "out": {}, "param": {}}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for key in file.keys():
            part, name = key.split(".", 1)
            parts[part][name] = file.get_tensor(key)
    return json.loads(metadata["config"]), float(metadata["tolerance"]), parts


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    worst = (ours.double() - theirs.double()).abs().max().item()
    assert worst <= tolerance * max(1, theirs.abs().max().item()), worst


def make_llama(config, **changes):
    return LlamaForCausalLM(
        LlamaConfig(
            **{**config["llama"], **changes},
            rope_theta=config.get("rope_theta", 10000.0),
            rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
            attn_implementation="eager",
        )
    ).eval()


def partner(path, prefix, suffix):
    """The file of another kind that belongs to `path`: same ending of the name, or the only one there is."""
    tail = path.stem.removeprefix(next(p for p in KINDS if path.name.startswith(p)))
    named = path.parent / f"{prefix}{tail}{suffix}"
    others = sorted(path.parent.glob(f"{prefix}*{suffix}"))
    found = named if named.exists() else others[0] if len(others) == 1 else None
    assert found, f"{path.name}: no {prefix}{tail}{suffix} beside it"
    return found


@torch.no_grad()
def sensitivity_scan(path, tmp_path):
    config, tolerance, data = read(path)
    model = make_llama(config)
    model.load_state_dict(data["param"], strict=True)
    prompts = [
        {"name": name, "input_ids": ids.reshape(1, -1)}
        for name, ids in sorted(data["in"].items(), key=lambda kv: int(kv[0][6:]))
    ]
    checked = 0
    for key, wanted in data["out"].items():
        if match := re.fullmatch(r"base(\d+)", key):
            close(model(**ids(prompts[int(match[1])])).logits[0], wanted, tolerance)
        elif match := re.fullmatch(r"masked\.(\w+)\.layer(\d+)\.prompt(\d+)", key):
            mode, layer, prompt = match[1], int(match[2]), prompts[int(match[3])]
            if "head" in mode:
                assert partial_head_masks(model, config, layer, prompt, wanted, tolerance) == 1, (
                    "exactly one head mask should give these logits"
                )
            else:
                with masked(model, layer, mode):
                    close(model(**ids(prompt)).logits[0], wanted, tolerance)
        elif match := re.fullmatch(r"qv_minus_vonly_maxabs\.layer(\d+)\.prompt(\d+)", key):
            logits = []
            for mode in ("qv", "v_only"):
                with masked(model, int(match[1]), mode):
                    logits.append(model(**ids(prompts[int(match[2])])).logits)
            assert (logits[0] - logits[1]).abs().max() == wanted.max() == 0
        elif match := re.fullmatch(r"block_influence\.prompt(\d+)", key):
            for method in METHODS:
                record = scan_batch(model, [prompts[int(match[1])]], [("layer", 0, None)], ["kl"], method)[0]
                close(torch.tensor(record["block_influence"], dtype=torch.float64), wanted, tolerance)
        elif match := re.fullmatch(r"dropped\.([\d_]+)\.prompt(\d+)", key):
            with without_layers(model, map(int, match[1].split("_"))):
                close(model(**ids(prompts[int(match[2])])).logits[0], wanted, tolerance)
        else:
            pytest.fail(f"{path.name}: unknown output {key}")
        checked += 1
    assert checked == len(data["out"]) > 0


def ids(prompt):
    return {"input_ids": prompt["input_ids"]}


def partial_head_masks(model, config, layer, prompt, wanted, tolerance):
    """How many masks of the V heads (the file does not say which was used) reproduce the logits."""
    attention = decoder_layers(model)[layer].self_attn
    original, (_, kv_heads, head_dim) = attention.v_proj, head_counts(model)
    given = config.get("head_mask") or config.get("v_head_mask")
    candidates = (
        [given]
        if given
        else [m for m in itertools.product((0.0, 1.0), repeat=kv_heads) if 0 < sum(m) < kv_heads]
    )
    attention.v_proj = ProjHeadMaskWrapper(original, head_dim)
    matches = 0
    for mask in candidates:
        attention.v_proj.set_mask(mask)
        logits = model(**ids(prompt)).logits[0]
        matches += (logits - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())
    attention.v_proj = original
    return matches


def distances(path, tmp_path):
    config, tolerance, data = read(path)
    a, b, shifted = data["in"]["a"], data["in"]["b"], data["in"]["a_plus_const"]
    for name, wanted in data["out"].items():
        kind, _, invariant = name.partition("_shift_invariant")
        ours = logprob_distance(a, shifted if name.endswith("_shift_invariant") else b, kind)
        if name.endswith("_shift_invariant"):
            assert ours < tolerance and wanted.item() < tolerance
        else:
            close(torch.tensor([ours]), wanted, tolerance)
    assert {k for k in data["out"] if "_shift" not in k} >= set(config["kinds"])


@torch.no_grad()
def scores(path, tmp_path):
    config, _, data = read(partner(path, "sensitivity_scan", ".safetensors"))
    model = make_llama(config)
    model.load_state_dict(data["param"], strict=True)
    prompts = [{"name": str(i), "input_ids": torch.tensor([p])} for i, p in enumerate(config["prompts"])]
    with open(path) as file:
        wanted = list(csv.DictReader(file))
    assert wanted
    modes, kinds = {r["mode"] for r in wanted}, sorted({r["distance"] for r in wanted})
    for method in METHODS:
        records = [scan_batch(model, [p], list_variants(model, modes), kinds, method)[0] for p in prompts]
        rows = {(r["mode"], r["layer"], r["distance"]): r for r in summarise(records)}
        for row in wanted:
            mode = row["mode"].removesuffix("_only")
            ours = rows[mode, int(row["layer"]), row["distance"]]
            each = [
                v[row["distance"]]
                for r in records
                for v in r["variants"]
                if (v["mode"], v["layer"]) == (mode, int(row["layer"]))
            ]
            assert each == pytest.approx(json.loads(row["per_prompt"]), rel=1e-5, abs=1e-7)
            assert ours["score_mean"] == pytest.approx(float(row["score_mean"]), rel=1e-5, abs=1e-7)
            assert ours["score_std"] == pytest.approx(float(row["score_std"]), rel=1e-5, abs=1e-7)
            assert ours["prompt_count"] == int(row["prompt_count"])
        assert (
            len(layer_scores(summarise(records), "layer", kinds[0])) == config["llama"]["num_hidden_layers"]
        )


def prune_by_command(folder, config, params, form, *options):
    """Write `params` as a checkpoint, prune it with the command line, return (merged tensors, map, output
    folder)."""
    source, out = folder / f"source_{form}", folder / f"out_{form}"
    source.mkdir()
    if form == "bin":
        torch.save(params, source / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(params, source / "model.safetensors")
    (source / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                **config["llama"],
                "rope_theta": config.get("rope_theta", 10000.0),
            }
        )
    )
    lora = ["--lora-alpha", str(config["lora"]["lora_alpha"])] if config.get("lora") else []
    command = [
        python(),
        ROOT / "pruning/pruning_tools/prune_llm.py",
        "--ckpt",
        source,
        "--out-dir",
        out,
        "--drop-layers",
        config["drop_spec"],
        "--hf",
        "both",
        *lora,
        *options,
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    merged = next(out.glob("pytorch_model_pruned_*"))
    tensors = {k: e.read() for k, e in open_checkpoint(merged).entries.items()}
    return tensors, json.loads(next(out.glob("prune_layer_map_*.json")).read_text()), out


def pruned_llama(config, tensors, alpha):
    """The reference's class for the pruned state: Llama with fewer layers, LoRA of the given alpha."""
    layers = config["llama"]["num_hidden_layers"] - len(parse_drop_layers(config["drop_spec"]))
    model = make_llama(config, num_hidden_layers=layers)
    if config.get("lora"):
        model = get_peft_model(model, LoraConfig(**{**config["lora"], "lora_alpha": alpha})).eval()
    tensors = {k.removeprefix("lang_model."): v for k, v in tensors.items() if k.startswith("lang_model.")}
    model.load_state_dict(tensors, strict=True)
    return model


@torch.no_grad()
def layer_drop(path, tmp_path):
    config, tolerance, data = read(path)
    wanted, out = (
        {k.removeprefix("merged."): v for k, v in data["out"].items() if k.startswith("merged.")},
        data["out"],
    )
    prompt = data["in"]["prompt0"].reshape(1, -1)
    old = config["llama"]["num_hidden_layers"]
    for form in ("bin", "safetensors"):
        tensors, report, folder = prune_by_command(tmp_path, config, data["param"], form)
        for key, value in wanted.items():
            assert torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype, key
        assert {k for k in tensors if ".layers." in k and k.startswith("lang_model")} == {
            k for k in wanted if ".layers." in k
        }
        for key, value in data["param"].items():
            if not key.startswith("lang_model."):
                assert torch.equal(tensors[key], value), f"{key} is no part of the decoder and must stay"
        assert report["new_layers"] == old - len(parse_drop_layers(config["drop_spec"]))
    true_alpha = report["lora_alpha"]
    merged_logits = pruned_llama(config, tensors, true_alpha)(prompt).logits[0]
    close(merged_logits, out["logits_true_alpha_fp32"], tolerance)
    loaded = LlamaForCausalLM.from_pretrained(
        next(p for p in folder.glob("hf_*") if not p.name.endswith("adapter")), attn_implementation="eager"
    ).eval()
    close(loaded(prompt).logits[0], out["logits_true_alpha_fp32"], tolerance)
    for key in out:
        assert key.startswith("merged.") or key in (
            "logits_true_alpha_fp32",
            "logits_inferred_alpha_fp32",
            "logits_upstream_merged",
        ), f"unknown output {key}"
    if "logits_inferred_alpha_fp32" in out:  # upstream's guess, by naming it
        close(
            pruned_llama(config, tensors, 2 * config["lora"]["r"])(prompt).logits[0],
            out["logits_inferred_alpha_fp32"],
            tolerance,
        )
    if "logits_upstream_merged" in out:  # upstream's rounding, by asking for it
        (tmp_path / "half").mkdir()
        rounded, _, _ = prune_by_command(
            tmp_path / "half", config, data["param"], "bin", "--llm-dtype", "float16"
        )
        close(
            pruned_llama(config, rounded, true_alpha)(prompt).logits[0],
            out["logits_upstream_merged"],
            tolerance,
        )


def layer_drop_map(path, tmp_path):
    wanted = json.loads(path.read_text())
    for case in wanted["spec_cases"]:
        if case.get("error") or case.get("layers") is None:
            with pytest.raises(UserError):
                parse_drop_layers(case["spec"])
            continue
        layers = parse_drop_layers(case["spec"])
        assert layers == case["layers"] and make_tag(layers) == case["tag"]
    config, _, data = read(partner(path, "layer_drop", ".safetensors"))
    version = wanted["prune_map"]["script_version"]
    tensors, report, folder = prune_by_command(
        tmp_path, {**config, "drop_spec": wanted["spec"]}, data["param"], "bin", "--script-version", version
    )
    assert {p.name for p in folder.iterdir()} >= set(wanted["outputs"])
    assert sorted(tensors) == sorted(wanted["merged_keys"])
    llm_only = torch.load(next(folder.glob("llm_only_pruned_state_*.bin")), weights_only=True)
    assert sorted(llm_only) == sorted(wanted["llm_only_keys"])
    for key, value in wanted["prune_map"].items():
        if key == "lora_alpha":  # upstream guesses 2r; ours is the one it was trained with
            assert report[key] == config["lora"]["lora_alpha"]
        elif key not in ("note", "ckpt", "lang_model_path"):
            assert report[key] == value, key
    old_of = {int(new): old for new, old in report["layer_id_map"].items()}
    for key, value in tensors.items():  # dtype kept, where upstream rounded to float16
        old = re.sub(
            wanted["prune_map"]["llm_layer_pattern"],
            lambda m: m[0].replace(f".{m[1]}.", f".{old_of[int(m[1])]}."),
            key,
        )
        assert str(value.dtype) == wanted["source_dtypes"][old]


KINDS = {
    "sensitivity_scan": (".safetensors", sensitivity_scan),
    "logprob_distance": (".safetensors", distances),
    "sensitivity_scores": (".csv", scores),
    "layer_drop_map": (".json", layer_drop_map),
    "layer_drop": (".safetensors", layer_drop),
}


@pytest.mark.parametrize("path", golden_files("pruning"))
def test_equals_the_reference(path, tmp_path):
    for prefix, (suffix, check) in KINDS.items():
        if path.name.startswith(prefix) and path.suffix == suffix:
            return check(path, tmp_path)
    pytest.fail(f"{path.name}: no check for this kind of file")
