"""flmm: every family reads what its model really attended, and the check of a base sees what is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from flmm import check_base
from flmm.build import FAMILIES
from flmm.data.samples import SampleBuilder
from flmm.models import attention_rows
from flmm.models.attention_rows import AttentionRows, attended, rows_attention
from flmm.models.frozen_base import CHAT
from flmm.models.tiny_bases import tiny_base
from flmm.scripts.visual_cot import visual_cot
from tests.flmm_world import paligemma


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_of_a_base(family):
    base = tiny_base(family)
    wrong = [line for line in check_base.check_base(base) if not line[2]]
    assert not wrong
    prompt = torch.tensor(base.encode_prompt())
    one = check_base.sample(base, (90, 96))
    assert len(base.generate({**one, "input_ids": prompt}, 3)) <= 3

    # what a preprocessor_config.json gives as null is as good as nothing
    names = ("image_mean", "image_std", "size", "min_size", "min_pixels", "max_patches", "do_image_splitting")
    published, null = (
        base.make_processor(base.model.config, stated)(one["image"]) for stated in ({}, dict.fromkeys(names))
    )
    assert torch.equal(published["pixel_values"], null["pixel_values"])


@pytest.mark.parametrize("family", ["llava", "mistral3"])
def test_resampling_gets_the_tokens_of_the_grid_and_none_of_its_separators(family, monkeypatch):
    base, got = tiny_base(family), {}
    one = check_base.sample(base, (64, 64))

    def ground(image, phrases):
        base([one])
        return {"masks": np.ones((1, 64, 64), bool)}

    def resample(base, sample, embeds, positions, box, text):
        got.update(embeds=embeds, positions=positions)

    monkeypatch.setattr(visual_cot, "visual_cot_resample", resample)
    grounder = SimpleNamespace(base=base, ground=ground)
    visual_cot.chain_of_thought(grounder, one["image"], "what?", version="v2", resample=True)
    assert torch.equal(got["embeds"], check_base.embedded(base, one))
    assert got["positions"].shape[-1] == base.image_tokens(one)


@pytest.mark.parametrize("pad", [-1, None, "<image>"])
def test_what_a_configuration_pads_with_changes_nothing(pad):
    base = tiny_base("llava")
    samples = [check_base.sample(base, (64, 64), phrases) for phrases in (["a red car", "sky"], ["sky"])]
    before = base(samples)
    text = base.model.config.get_text_config()
    text.pad_token_id = base.image_token_id if pad == "<image>" else pad
    assert check_base.distance(base(samples), before, "mask_attentions") == 0


@pytest.mark.slow
def test_the_check_sees_a_turned_grid_a_wrong_mask_and_lost_separators(monkeypatch):
    def wrong(base):
        return {
            name.split(" of ")[0].split(" against")[0]
            for name, _, right in check_base.check_base(base)
            if not right
        }

    turned = tiny_base("internvl")
    turned.to_grid = lambda maps, grid: FAMILIES["internvl"].to_grid(
        turned,
        [
            torch.cat(
                [m[..., :-16].unflatten(-1, (-1, 4, 4)).transpose(-1, -2).flatten(-3), m[..., -16:]], -1
            )
            for m in maps
        ],
        grid,
    )
    assert wrong(turned) == {"places"}

    base = tiny_base("llava")
    monkeypatch.setattr(
        attention_rows,
        "attended",
        lambda module, q, k, mask, causal=None: (
            k,
            torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool),
        ),
    )
    assert "rows" in wrong(base)


def test_the_check_is_a_command_that_ends_with_status_one_where_something_is_wrong(monkeypatch, capsys):
    check_base.main(check_base.parse_args(["--tiny", "llava"]))
    assert "14 of 14 checks passed" in capsys.readouterr().out
    monkeypatch.setattr(FAMILIES["llava"], "channels", 3, raising=False)
    monkeypatch.setattr(check_base, "places_found", lambda base, size: 3)
    with pytest.raises(SystemExit) as left:
        check_base.main(check_base.parse_args(["--tiny", "llava"]))
    assert left.value.code == 1 and "FAIL" in capsys.readouterr().out
    with pytest.raises(UserError, match="--config, or --tiny"):
        check_base.main(check_base.parse_args([]))
    monkeypatch.setitem(FAMILIES, "new", FAMILIES["internvl"])
    with pytest.raises(UserError, match="no tiny configuration; write one .*tiny_bases.py"):
        check_base.main(check_base.parse_args(["--tiny", "new"]))


# ---- what SDPA attended


def record(query, key, mask, causal=None, module=None):
    """Merged rows of one phrase over all columns, beside those of SDPA itself (read off with unit values)."""
    module = module or torch.nn.Module()
    columns = torch.arange(query.shape[2])  # keys behind the queries hold nothing where it is causal
    kept = AttentionRows([torch.tensor([1, 3])], [torch.tensor([0, 0])], [columns])
    units = torch.eye(key.shape[2]).expand(1, key.shape[1], -1, -1)
    options = {} if causal is None else {"is_causal": causal}
    output, _ = rows_attention(module, query, key, units, mask, attention_rows=kept, **options)
    return kept.maps[0][0][:, 0], output[0, [1, 3]].mean(0)[:, columns]  # (H, Q) both


@pytest.mark.parametrize("keys", [6, 9])
@pytest.mark.parametrize(
    "case", ["causal", "module says no", "call says no", "mask", "bias", "bias per head"]
)
def test_recorded_rows_are_those_that_sdpa_attended(case, keys):
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, keys, 8)
    module, mask, causal = torch.nn.Module(), None, None
    if case == "module says no":
        module.is_causal = False
    if case == "call says no":
        module.is_causal, causal = True, False
    if case == "mask":
        mask = torch.rand(1, 1, 6, keys) < 0.7
        mask[..., 0] = True
    if case == "bias":
        mask = torch.randn(1, 1, 6, keys)
    if case == "bias per head":
        mask = torch.randn(1, 2, 6, keys)
    ours, theirs = record(query, key, mask, causal, module)
    if (
        ours.shape != theirs.shape or keys > 6 and case == "causal"
    ):  # keys behind the queries hold nothing yet
        theirs = theirs[:, : ours.shape[1]]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("merge", ["mean", "max"])
@pytest.mark.parametrize("masked", [False, True])
def test_no_layer_waits_for_the_device(merge, masked):
    class Refuse(TorchDispatchMode):
        """Operations whose result the CPU has to know."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
            if function.overloadpacket is torch.ops.aten.index:  # by yes and no it counts them first
                assert all(index is None or index.dtype != torch.bool for index in args[1])
            return function(*args, **(kwargs or {}))

    phrases = torch.tensor([1, 0, 1, 2])
    kept = AttentionRows([torch.tensor([1, 3, 4, 5])], [phrases], [torch.arange(4)], merge)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool) if masked else None
    with Refuse():
        kept.record(query, key, mask, None)
    assert kept.maps[0][0].shape == (4, 3, 4)
    with pytest.raises(ValueError, match="phrase 1 has no token"):
        AttentionRows([torch.tensor([1, 3])], [torch.tensor([0, 2])], [torch.arange(4)])


def test_a_single_query_sees_every_key():
    key, mask = attended(torch.nn.Module(), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 7, 4), None)
    assert key.shape[2] == 7 and mask.shape == (1, 1, 1, 7) and mask.all()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "alibi", "block_indices", "new_term"])
def test_attention_that_is_more_than_a_masked_softmax_is_refused(name):
    query = torch.zeros(1, 1, 4, 4)
    with pytest.raises(
        UserError, match=f"attends with {name}, which SDPA does not know; .*--attention eager"
    ):
        rows_attention(torch.nn.Module(), query, query, query, None, **{name: torch.ones(1)})
    rows_attention(torch.nn.Module(), query, query, query, None, sliding_window=4, dropout=0.0)


def test_a_base_with_a_layer_without_attention_is_refused():
    base = tiny_base("llava")
    base.num_layers += 1
    with pytest.raises(UserError, match="3 of 4 layers gave attention"):
        base([check_base.sample(base, (64, 64))])


def test_a_model_that_caps_its_attention_is_refused_by_its_own_call():
    base = paligemma("gemma2", attn_logit_softcapping=5.0)
    with pytest.raises(UserError, match="Gemma2Attention attends with softcap"):
        base([check_base.sample(base, (90, 96))])


def test_a_base_that_is_not_causal_gives_the_rows_that_it_attended(monkeypatch):
    """PaliGemma without token types: no mask is given and its modules are not causal."""
    base = paligemma()
    gaps, own = [], AttentionRows.record

    def record(self, query, key, mask, scaling):
        own(self, query, key, mask, scaling)
        [rows], [columns], [parts] = self.rows, self.columns, self.parts
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        full = (query[0][:, rows] @ keys.transpose(1, 2) * scaling).softmax(-1)[..., columns]
        gaps.append((attention_rows.merge_rows(full, parts) - self.maps[-1][0]).abs().max().item())

    monkeypatch.setattr(AttentionRows, "record", record)
    base([check_base.sample(base, (90, 96))])
    assert len(gaps) == 3 and max(gaps) < 1e-6


# ---- prompts


PART = "{% if p['type'] == 'image' %}<image>{{ '\n' }}{% else %}{{ p['text'] }}{% endif %}"
PARTS = "{% for p in m['content'] %}INNER{% endfor %}"
TURN = "{% for m in messages %}U: INNER{{ '\n' }}{% endfor %}A:"
TEMPLATES = {
    "of parts with pictures": TURN.replace("INNER", PARTS.replace("INNER", PART)),
    "of parts of text": TURN.replace("INNER", PARTS.replace("INNER", "{{ p['text'] }}")),
    "of text": TURN.replace("INNER", "{{ m['content'] + '' }}"),
    "of text that joins": TURN.replace("INNER", "{{ '' ~ m['content'] }}"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokenizers_own_template_is_followed_whatever_form_it_takes(name):
    base = tiny_base("llava")
    base.tokenizer.chat_template = TEMPLATES[name]
    base.template = CHAT
    ids = base.encode_prompt("Where?")
    assert ids == base.tokenizer("U: <image>\nWhere?\nA:", add_special_tokens=False).input_ids
    asked = base.encode_prompt("<image> A:")  # the user's words are letters, those of the template are not
    assert asked.count(base.image_token_id) == 1
    assert SampleBuilder.of(base).prompt_ids == base.encode_prompt()


def test_without_a_chat_template_the_configuration_has_to_name_one():
    base = tiny_base("llava")
    base.tokenizer.chat_template, base.template = None, CHAT
    with pytest.raises(UserError, match="has no chat template; choose one of vicuna"):
        base.encode_prompt()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "smolvlm"])
def test_rows_of_one_of_several_pictures_after_earlier_turns_equal_full_matrices(family):
    base = tiny_base(family)
    prompt = base.encode_prompt(["", "And now?"], [("What <image> is it?", "A red <|im_end|> cat.")])
    assert prompt.count(base.image_token_id) == 2  # those of the words are letters
    words = base.tokenizer(" the blue ring", add_special_tokens=False).input_ids
    pictures = [
        {"image": i, **base.image_processor(i)} for i in map(check_base.picture, ((90, 60), (64, 96)))
    ]
    ids = torch.tensor(prompt + words)
    mask_ids = torch.tensor([-1] * len(prompt) + [0] * len(words))
    for look in (0, 1):
        one = {"input_ids": ids, "mask_ids": mask_ids, **pictures[look], "pictures": pictures, "look": look}
        [rows], [full] = base([one]), check_base.reread(base, [one], "eager")
        assert rows["mask_attentions"].shape[1:] == (base.channels, *grid_of(base, one))
        assert check_base.distance([rows], [full], "mask_attentions") < 1e-5
    wide = base.expand(ids, one)
    assert torch.equal(base.expand(wide, one), wide)  # what is expanded stays as it is


def grid_of(base, one):
    """Shape of the finest map of a picture."""
    grid = base.grid(one)
    maps = torch.zeros(1, 1, base.image_tokens(one))
    return base.to_grid([maps], grid).shape[-2:]
