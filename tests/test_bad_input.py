"""Good inputs broken systematically: every project refuses each with status 2 and one line that names the
file, writing nothing.
"""

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import inside
from common.weights import read_weights
from cwt_mae.dataset import read_csv, read_edf, read_hdf5, read_npy, read_npz, read_ts
from dia_pangu.src.Dataset.CTRG_dataset import read_annotation
from dia_pangu.src.Dataset.preprocess import load_volume
from dia_pangu.src.Model.build import TINY, make_grid
from em_mllm.dataset import SignalFile, read_questions
from em_mllm.em_foundation.utils.utils import read_config as read_encoder_config
from em_mllm.iq_io import read_iq
from flmm.data.phrases import PhraseDataset
from flmm.data.refcoco import read_refs
from flmm.data.samples import decode_segmentation
from flmm.data.transforms import load_image, load_segments
from pruning.pruning_tools.prune_llm import parse_drop_layers
from pruning.pruning_tools.shards import open_checkpoint
from pruning.report_model import read_map
from pruning.sensitivity_analyse.load_model import read_prompts
from tests import forked
from tests.broken_inputs import broken, csv_fields, fresh, h5_fields, json_fields, npz_fields, tensors, tree
from tests.worlds import *  # noqa: F403  the fixtures cwt, em, grounding, ct, llm


def refuse_all(world, target, command, mutators, harmless=(), names=(), lazy=False):
    """Each mutant of one file, in a fresh copy of the folder: refused, or listed in one failure with what
    happened instead.

    world: folder of good inputs and {command: (script, function of the copy that gives the command line)};
    the command writes to copy/run over an earlier run. harmless: mutants ("field=kind", or "field" for all
    kinds) that need not be refused. names: what the error line may name beside the file. lazy: read in
    mid-run, so that the run folder may have been opened, but no result may be in it.
    """
    copy, (script, arguments), failures, count = (
        world.folder.parent / "mutant",
        world.commands[command],
        [],
        0,
    )
    for what, damage in (mutant for mutator in mutators for mutant in mutator(world.folder / target)):
        if what in harmless or what.split("=")[0] in harmless:
            continue
        fresh(world.folder, copy)
        damage(copy / target)
        (copy / "run").mkdir()
        (copy / "run" / "config.json").write_text('{"arguments": {}}')
        (copy / "run" / "model.safetensors").write_text("an earlier run's weights")
        before = tree(copy)
        done = forked.call(script, arguments(copy), world.folder.parent / "log.txt")
        errors = [line for line in done.text.splitlines() if line.startswith("error: ")]
        wrote = [name for name, content in tree(copy).items() if before.get(name) != content]
        if lazy:
            wrote = [
                name
                for name in wrote
                if name.endswith((".safetensors", ".csv", "results.json", "metrics.json"))
            ]
        if done.returncode != 2 or len(errors) != 1 or "Traceback" in done.text:
            failures.append(f"{what}: status {done.returncode}: {done.text.strip().splitlines()[-1][-200:]}")
        elif not any(name in errors[0] for name in (Path(target).name, Path(target).stem, *names)):
            failures.append(f"{what}: does not name the file: {errors[0]}")
        elif wrote:
            failures.append(f"{what}: wrote {wrote}")
        count += 1
    assert not failures, f"{target}: {len(failures)} of {count} mutants\n" + "\n".join(failures)
    assert count >= 5
    print(f"{target}: {count} refused")  # pytest -rP shows it


# cwt_mae

ONE_NUMBER = ("fs=an axis more", "gain=an axis more", "gain=dropped")
FREE_TEXT = ("lead", "subject=dropped", "subject=text", "subject=an axis more", "subject=no elements")
NO_LABELS = (
    "ann_sample=dropped",
    "ann_symbol=text",
    "ann_aux=dropped",
    "ann_aux=text",
)  # a record without labels, or with others
NOT_READ = ("missing", "a folder", "a link to itself")  # a folder of files is searched for them


@pytest.mark.parametrize(
    "target,command,mutators,options",
    [
        (
            "labelled/s000.npz",
            "finetune",
            [broken, npz_fields],
            {
                "harmless": (
                    *ONE_NUMBER,
                    *FREE_TEXT,
                    *NO_LABELS,
                    "ann_aami",
                    "sig=far below",
                    "ann_symbol=dropped",  # the rhythms of ann_aux are enough
                )
            },
        ),
        ("labelled/split.json", "finetune", [broken, json_fields], {}),
        (
            "ppg/p000.csv",
            "train",
            [broken, csv_fields],
            {"harmless": (*NOT_READ, "cut at 2%", "cut at 40%", "cut at 80%", "PPG=renamed", "no header")},
        ),
        (
            "base.safetensors",
            "finetune",
            [broken, partial(tensors, names=["pos_embed", "blocks.0.attn.qkv.weight"])],
            {"harmless": ("pos_embed=dropped", "blocks.0.attn.qkv.weight=dropped")},
        ),  # said in the report of what was loaded
        ("tuned.safetensors", "test", [broken, partial(tensors, names=["encoder_model.pos_embed"])], {}),
    ],
)
@pytest.mark.slow
def test_cwt_mae(cwt, target, command, mutators, options):
    refuse_all(cwt, target, command, mutators, **options)


# em_mllm

IQ = partial(h5_fields, fields=["IQ_data"])
SIZES = partial(
    json_fields,
    fields=[
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "patch_size",
        "max_seq_len",
    ],
)
SIGMF = partial(json_fields, fields=["global", "global.core:datatype", "global.core:sample_rate", "captures"])


@pytest.mark.parametrize(
    "target,command,mutators,options",
    [
        ("data/train/modulation.h5", "pretrain", [broken, IQ], {"harmless": NOT_READ}),
        ("data/train/modulation.h5", "train", [broken, IQ], {"harmless": NOT_READ}),
        (
            "data/train/modulation.json",
            "train",
            [broken, json_fields],
            {
                "harmless": ("id", "iq_index_in_h5=list", "h5_path=dropped", "h5_path=null"),
                "names": ["modulation"],
            },
        ),
        ("sizes.json", "pretrain", [broken, SIZES], {}),
        (
            "encoder/config.json",
            "train",
            [broken, SIZES],
            {"harmless": ("missing", "a link to itself"), "names": ["encoder"]},
        ),
        (
            "encoder/model.safetensors",
            "train",
            [broken, partial(tensors, names=["sit.embeddings.cls_token"])],
            {"harmless": ("sit.embeddings.cls_token=dropped",), "names": ["encoder"]},
        ),
        ("llm/config.json", "train", [broken], {"names": ["llm"]}),
        ("llm/model.safetensors", "train", [broken], {"names": ["llm"]}),
        ("llm/tokenizer.json", "train", [broken], {"names": ["llm"]}),
        ("a.npy", "npy", [broken], {}),
        (
            "b.sigmf-data",
            "sigmf",
            [broken],
            {"harmless": ("cut at 2%", "cut at 40%", "cut at 80%")},
        ),  # whole samples remain
        (
            "b.sigmf-meta",
            "sigmf",
            [broken, SIGMF],
            {
                "harmless": (
                    "captures=dropped",
                    "global.core:sample_rate=dropped",
                    "global.core:sample_rate=null",
                    "global.core:sample_rate=huge",
                )
            },
        ),
    ],
)
@pytest.mark.slow
def test_em_mllm(em, target, command, mutators, options):
    refuse_all(em, target, command, mutators, **options)


# flmm

NOT_USED = (
    "images.height",
    "images.width",
    "annotations.area",
    "annotations.iscrowd",
    "annotations.segments_info.area",
    "annotations.segments_info.iscrowd",
    "categories.name",
)


@pytest.mark.parametrize(
    "target,command,mutators,options",
    [
        ("data/png/png_coco_train.json", "train", [broken, json_fields], {"names": ["panoptic_train.json"]}),
        (
            "data/png/panoptic_train.json",
            "train",
            [broken, json_fields],
            {
                "harmless": (
                    *NOT_USED,
                    "categories.isthing=negative",
                    "categories.isthing=huge",
                    "images.id=text",
                    "images.id=negative",
                    "images.id=huge",
                )
            },
        ),
        ("data/png/images/000010000000.png", "train", [broken], {"lazy": True}),
        ("data/png/panoptic_train/000010000000.png", "train", [broken], {"lazy": True}),
        (
            "data/refcoco/instances.json",
            "refcoco",
            [broken, json_fields],
            {
                "harmless": (
                    "annotations.image_id",
                    "annotations.category_id",
                    "annotations.area",
                    "annotations.iscrowd",
                    "categories",
                    "categories.id",
                    "categories.name",
                    "annotations.segmentation.counts=list",
                ),
                "lazy": True,
            },
        ),
        ("data/refcoco/refs(unc).p", "refcoco", [broken], {}),
        ("head.safetensors", "test", [broken, partial(tensors, names=["mask_head.conv_seg.weight"])], {}),
        ("scenes.yaml", "train", [broken], {}),
        ("sam/model.safetensors", "train", [broken], {"names": ["sam"]}),
        ("base/config.json", "train", [broken], {"names": ["base"]}),
        ("base/model.safetensors", "train", [broken], {"names": ["base"]}),
        ("base/tokenizer.json", "train", [broken], {"names": ["base"]}),
    ],
)
@pytest.mark.slow
def test_flmm(grounding, target, command, mutators, options):
    refuse_all(grounding, target, command, mutators, **options)


# dia_pangu

OTHER_FIELDS = tuple(
    f"{split}.{field}" for split in ("train", "val", "test") for field in ("split", "impression")
)


@pytest.mark.parametrize(
    "target,command,mutators,options",
    [
        (
            "data/annotation_en.json",
            "train",
            [broken, json_fields],
            {
                "harmless": (
                    "missing",
                    "test=dropped",
                    "test=null",
                    "test.finding=dropped",
                    "test.finding=null",
                    "test.id=number",
                    "test.id=text",
                    *OTHER_FIELDS,
                ),
                "names": ["volumes/7", "CTRG_finding_labels.csv"],
            },
        ),
        ("data/CTRG_finding_labels.csv", "train", [broken, csv_fields], {}),
        ("data/volumes/4.nii.gz", "test", [broken], {"lazy": True}),
        (
            "model/dia_config.json",
            "test",
            [broken],
            {"harmless": ("missing", "a link to itself"), "names": ["model"]},
        ),
        ("model/pytorch_model.bin", "test", [broken], {"names": ["model"]}),
        ("llm/config.json", "train", [broken], {"names": ["llm"]}),
        ("llm/model.safetensors", "train", [broken], {"names": ["llm"]}),
        ("llm/tokenizer.json", "train", [broken], {"names": ["llm"]}),
    ],
)
@pytest.mark.slow
def test_dia_pangu(ct, target, command, mutators, options):
    refuse_all(ct, target, command, mutators, **options)


# pruning


@pytest.mark.parametrize(
    "target,command,mutators,options",
    [
        ("llm/model.safetensors", "prune", [broken], {"names": ["llm"]}),
        (
            "llm/config.json",
            "prune",
            [broken, partial(json_fields, fields=["num_hidden_layers"])],
            {
                "harmless": (
                    "missing",
                    "a link to itself",
                    "num_hidden_layers=dropped",
                    "num_hidden_layers=null",
                ),
                "names": ["llm"],
            },
        ),
        ("llm/model.safetensors", "scan", [broken], {"names": ["llm"]}),
        ("llm/tokenizer.json", "scan", [broken], {"names": ["llm"]}),
        ("prompts.jsonl", "scan", [broken], {}),
        ("prompts.jsonl", "heal", [broken], {}),
    ],
)
@pytest.mark.slow
def test_pruning(llm, target, command, mutators, options):
    refuse_all(llm, target, command, mutators, **options)


# Any content at all

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLAIN = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def only_user_errors(read, *arguments):
    """`read` may succeed or raise a UserError of one line; everything else is a defect."""
    try:
        read(*arguments)
    except UserError as error:
        assert str(error).strip()


def file_readers():
    return {
        "a.h5": SignalFile,
        "a.npy": read_iq,
        "a.wav": read_iq,
        "a.mat": read_iq,
        "a.cf32": read_iq,
        "a.cs16": read_iq,
        "b.npz": read_npz,
        "b.csv": read_csv,
        "b.npy": read_npy,
        "b.edf": read_edf,
        "b.hdf5": read_hdf5,
        "b.ts": read_ts,
        "c.safetensors": read_weights,
        "c.pth": read_weights,
        "d.safetensors": open_checkpoint,
        "d.bin": open_checkpoint,
        "e.p": read_refs,
        "e.png": load_image,
        "e2.png": load_segments,
        "f.jsonl": read_prompts,
        "g.json": read_map,
        "h.nii.gz": partial(load_volume, grid=make_grid(TINY)),
        "h.nii": partial(load_volume, grid=make_grid(TINY)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", file_readers())
def test_any_bytes_are_read_or_refused(name, tmp_path):
    @PLAIN
    @given(st.binary(max_size=300))
    def check(content):
        (tmp_path / name).write_bytes(content)
        only_user_errors(file_readers()[name], tmp_path / name)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,read",
    [
        ("q.json", read_questions),
        ("m.json", read_map),
        ("s.json", lambda p: read_annotation(p.parent, "en")),
        ("annotations.json", lambda p: PhraseDataset(p.parent)),
        ("config.json", read_encoder_config),
    ],
)
def test_any_json_is_read_or_refused(name, read, tmp_path):
    @PLAIN
    @given(ANYTHING)
    def check(content):
        (tmp_path / name).write_text(json.dumps(content))
        only_user_errors(read, tmp_path / name)

    check()


@PLAIN
@given(ANYTHING)
def test_any_segmentation_decodes_or_is_refused(content):
    only_user_errors(decode_segmentation, content, 4, 5, "x")


@PLAIN
@given(st.text(max_size=20) | st.from_regex(r"[0-9 ,-]{0,12}", fullmatch=True))
def test_any_layer_list_is_parsed_or_refused(spec):
    only_user_errors(parse_drop_layers, spec)


@PLAIN
@given(st.text(max_size=12))
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    if not (tmp_path / "out").is_symlink():
        (tmp_path / "out").symlink_to("/")
    for candidate in (name, f"../{name}", f"/{name}", f"out/{name}"):
        try:
            found = inside(tmp_path / "in", candidate)
        except UserError:
            continue
        assert found.resolve().is_relative_to((tmp_path / "in").resolve())
