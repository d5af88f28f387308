"""A tiny report model, pruned and unpruned, on eight phantoms; shared by the tests of pruning."""

import json
from argparse import Namespace

import torch

from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu import make_data
from dia_pangu.src.Dataset.prompt import LATERAL
from dia_pangu.src.Model.build import TINY, build_model, save_model
from pruning.pruning_tools import prune_llm
from studies.recipe import options
from tests.once import once


@once
def world(tmp_path_factory):
    """data/, llm/ (4 layers), base/ (without LoRA), lora/ (with, alpha 16, and prompts that name places),
    pruned/ (lora without layer 2), places.json."""
    root = tmp_path_factory.mktemp("world")
    make_data.main(Namespace(out=str(root / "data"), train=8, val=2, test=4, seed=0))
    everywhere = {name: ("left", "upper") for name in LATERAL}
    (root / "places.json").write_text(json.dumps({str(i): everywhere for i in range(1, 11)}))
    annotation = json.loads((root / "data" / "annotation_en.json").read_text())
    tokenizer = make_tokenizer([item["finding"] for item in annotation["train"]], 300)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "bias": True}
    make_llm(root / "llm", tokenizer, "PanguEmbedded", **sizes)
    lora = {"r": 2, "alpha": 16, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    for name, settings in (("base", None), ("lora", lora)):
        torch.manual_seed(0)
        embedding = {**TINY["embedding"], "evidence_head": settings is not None}
        config = {**TINY, "lora": settings, "embedding": embedding}
        model, _ = build_model(config, root / "llm")
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        save_model(model.state_dict(), root / name, config)
    command = {"ckpt": root / "lora", "lang_model_path": root / "llm", "out_dir": root / "pruned"}
    prune_llm.main(prune_llm.parse_args(options({**command, "drop_layers": 2, "hf": "merged"})))
    return root


def merged(root):
    return root / "pruned" / "pytorch_model_pruned_drop2_2_merged_clean_v0112_en_cpu.bin"


def prune_map(root):
    return root / "pruned" / "prune_layer_map_drop2_2_v0112_en_cpu.json"


def heal_args(world, out, **flags):
    """The command line of pruning/train.py for the pruned report model; `flags` come on top."""
    own = {"pruned_model_path": merged(world), "prune_map_path": prune_map(world), "out": out}
    own |= {"lang_model_path": world / "llm", "data": world / "data", "places": world / "places.json"}
    own |= {"batch_size": 2, "accum": 1, "lr": 0.01, "warmup": 1, "log_every": 1}
    return options({**own, **flags})
