"""flmm: presence and score, and the cheap order of the mask head."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import flmm.test
from common.errors import UserError
from flmm.build import FAMILIES, read_config
from flmm.conversation import Grounder
from flmm.data.absent import KINDS, absent_phrases, exchanged, holds, nonsense
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.models.calibration import FEATURES, Calibration, auc, phrase_features
from flmm.models.flmm import FLMM, extract
from flmm.models.mask_head import mask_decoder
from flmm.models.mask_head.mask_decoder import UNetHead
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, sureness
from flmm.models.tiny import tiny_sam
from flmm.models.tiny_bases import tiny_base
from flmm.scripts import calibrate
from tests.flmm_world import make_world, paligemma

SMALL = {"base_channels": 4, "upsample_input": 16}
world = pytest.fixture(make_world, scope="module", name="world")


def one_sample(base, pieces, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
    return SampleBuilder.of(base)({"image": Image.fromarray(pixels), "pieces": pieces})


# ---- the base's own probability


@pytest.mark.parametrize("family", [*FAMILIES, "paligemma2"])
@pytest.mark.parametrize("attention", ["rows", "eager"])
def test_log_probs_are_those_of_the_whole_model(family, attention):
    if family == "paligemma2":  # which caps its logits
        base = paligemma(
            "gemma2",
            attn_logit_softcapping=None,
            final_logit_softcapping=0.5,
            use_bidirectional_attention=False,
        )
    else:
        base = tiny_base(family)
    base.read_attention(attention)
    samples = [
        one_sample(base, [("a", -1), ("red car", 0), ("and", -1), ("the sky", 1)]),
        one_sample(base, [("sky", 0)], 1),  # shorter: left-padded in the batch
    ]
    for sample, together in zip(samples, base(samples, likelihood=True)):
        inputs, _ = base.batch([sample])
        ids = inputs["input_ids"][0]
        rows = (
            (base.expand(sample["input_ids"], sample, sample["mask_ids"], fill=-1) >= 0).nonzero().flatten()
        )
        with torch.no_grad():
            wanted = base.model(**inputs).logits[0].float().log_softmax(-1)[rows - 1, ids[rows]]
        torch.testing.assert_close(together["log_probs"], wanted, atol=1e-4, rtol=0)
    assert "log_probs" not in base(samples)[0]  # only where it is asked for


def test_a_phrase_asked_alone_stands_behind_the_words_that_captions_begin_with():
    base = tiny_base("llava", lead="a")
    grounder = Grounder(base, FLMM(*base.dims, unet=SMALL), None)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    found = grounder.ground(image, ["red car", "sky"])["presence"]
    pieces = [("a", -1), ("red car", 0), (".", -1), ("a", -1), ("sky", 1), (".", -1)]
    [wanted] = base([one_sample(base, pieces)], likelihood=True)
    for k in (0, 1):
        of_phrase = wanted["log_probs"][wanted["mask_ids"] == k]
        assert found[k] == pytest.approx(of_phrase.mean().exp().item(), rel=1e-4)
    assert grounder.ground(image, "red car")["phrases"] == ["red car"]  # one phrase, not seven letters


# ---- calibration


def made_up(count, seed=0):
    """Features of phrases, of which the first number decides presence and the sixth the IoU."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(count, len(FEATURES), generator=rng)
    present = (x[:, 0] + 0.3 * torch.randn(count, generator=rng)) > 0
    return x, present, present * (x[:, 5] * 2).sigmoid()


def test_a_fit_tells_presence_apart_and_its_score_goes_with_the_iou(tmp_path):
    fitted = Calibration.fit(*made_up(400))
    x, present, ious = made_up(400, seed=1)
    presence, score = fitted(x)
    assert auc(presence[present], presence[~present]) > 0.95
    assert np.corrcoef(score[present], ious[present])[0, 1] > 0.8
    assert score[~present].mean() < 0.2 < score[present].mean()
    # calibrated: of equally many phrases of both kinds, half are said to be there
    assert abs(presence.mean() - present.float().mean()) < 0.05
    fitted.save(tmp_path / "calibration.json")
    again = Calibration.beside(tmp_path / "head.safetensors")
    torch.testing.assert_close(again(x)[0], presence)
    torch.testing.assert_close(again(x)[1], score)
    assert Calibration.beside(tmp_path / "elsewhere/head.safetensors") is None
    content = json.loads((tmp_path / "calibration.json").read_text())
    short = {**content["presence"], "weights": content["presence"]["weights"][1:]}
    for change in ({"features": ["another", *FEATURES[1:]]}, {"presence": short}):
        (tmp_path / "calibration.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match="calibration.json: made for other numbers"):
            Calibration.load(tmp_path / "calibration.json")

    # files of one mean for both models, whose score was fitted on what is not there, too
    models = {name: content[name]["weights"] for name in ("presence", "score")}
    before = {"features": list(FEATURES), "fitted": {}, "mean": x.mean(0).tolist(), "std": x.std(0).tolist()}
    (tmp_path / "calibration.json").write_text(json.dumps({**before, **models}))
    old = Calibration.load(tmp_path / "calibration.json")
    torch.testing.assert_close(old(x)[1], old.score(x))
    torch.testing.assert_close(score, fitted.score(x) * (2 * presence).clamp(max=1))


def test_the_area_under_the_curve_counts_ties_half():
    assert auc([1.0, 2.0], [0.0]) == 1 and auc([0.0], [1.0]) == 0 and auc([1.0], [1.0, 0.0]) == 0.75


def test_sureness_follows_its_definition():
    logits = torch.full((2, 4, 4), -3.0)
    logits[0, :2] = 3.0
    logits[0, 0, 0] = 0.5  # inside, and lost when the threshold rises to 1
    numbers, inside = sureness(logits, (2, 2))
    expected = (7 * torch.tensor(3.0).sigmoid() + torch.tensor(0.5).sigmoid()) / 8
    torch.testing.assert_close(numbers[0], torch.tensor([expected, 7 / 8]))
    assert numbers[1].tolist() == [0, 0] and inside[0].tolist() == [[True, True], [False, False]]


def test_features_of_a_phrase_are_its_own():
    torch.manual_seed(0)
    base, encoder = tiny_base("llava"), SAMImageEncoder(sam := tiny_sam())
    head = FLMM(*base.dims, sam=sam, unet=SMALL).eval()
    pieces = [("a", -1), ("red car", 0), ("and", -1), ("the blue sky", 1)]
    [feature] = extract(base, encoder, [one_sample(base, pieces)], likelihood=True)
    with torch.no_grad():
        [output] = head([feature])
    x = phrase_features(feature, output)
    assert x.shape == (2, len(FEATURES)) and not torch.equal(x[0], x[1])
    of_second = feature["log_probs"][feature["mask_ids"] == 1]
    torch.testing.assert_close(x[1, :2], torch.stack([of_second.mean(), of_second.min()]))
    torch.testing.assert_close(x[:, -1], output["scores"])


# ---- phrases that are not there


def test_absent_phrases_are_absent_and_of_every_kind():
    rng = np.random.default_rng(0)
    here = ["a red circle", "the large blue cross"]
    others = ["a green square", "a red circle", "yellow dotted triangle", "small blue cross"]
    for _ in range(20):
        made = absent_phrases("a red circle", here, others, rng)
        assert set(made) == set(KINDS)
        assert made[KINDS[0]] in ("a green square", "yellow dotted triangle")  # another cross may be the same
        assert len(made[KINDS[1]].split()) == 3 and not holds(made[KINDS[1]], here)
        assert not set(made[KINDS[2]].split()) & set(" ".join(here + others).split())
    assert exchanged("red", ["red"], rng) is None and len(nonsense(rng).split()) == 2
    assert holds("red circle", here) and not holds("blue circle", here)
    # neither a full stop nor the characters before a Chinese noun make another thing of it
    for other in ("a red car", "汽车", "“Dog”", "..."):
        assert list(absent_phrases("x", ["the car.", "红色的汽车", "A DOG!"], [other], rng)) == [KINDS[2]]


# ---- the whole way


@pytest.mark.slow
def test_a_head_is_calibrated_and_the_calibration_is_used_everywhere(world, capsys, tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(FLMM(12, 3, 128, unet=SMALL).upstream_state(), head := tmp_path / "head.safetensors")
    changes = ["sam.path=null", "unet.upsample_input=16"]
    config, device = read_config(world.folder / "config.yaml", changes), "cpu"
    words = [str(word) for word in [*world.options, "--set", *changes, "--head", head]]
    scene = sorted((world.folder / "data/png/images").glob("*.png"))[0]
    found = Grounder.load(config, head, device=device).ground(scene, ["red circle"])
    assert not found["calibrated"] and 0 < found["presence"][0] < 1
    calibrate.main(calibrate.parse_args(words))
    assert "presence_auc" in capsys.readouterr().out and (tmp_path / "reliability.png").is_file()
    result = Grounder.load(config, head, device=device).ground(scene, ["red circle", "zzz"])
    assert result["calibrated"] and len(result["presence"]) == 2
    assert all(0 <= value <= 1 for value in [*result["presence"], *result["scores"]])
    flmm.test.main(flmm.test.parse_args([*words, "--out", str(tmp_path / "test")]))
    scores = json.loads((tmp_path / "test/results.json").read_text())
    assert 0 <= scores["presence"] <= 1
    # an expression counts as found only if the thing is believed to be there
    assert "presence" in (tmp_path / "test/phrases.csv").read_text().splitlines()[0]

    with monkeypatch.context() as patch, pytest.raises(UserError, match="is calibrated by one process"):
        patch.setattr(calibrate, "Accelerator", lambda: SimpleNamespace(num_processes=2))
        calibrate.main(calibrate.parse_args(words))

    # a selector of another base is refused
    save_file({"linear.weight": torch.zeros(1, 8)}, tmp_path / "selector.safetensors")
    with pytest.raises(UserError, match="selector.safetensors: is no selector of this base"):
        Grounder.load(config, head, tmp_path / "selector.safetensors", device)


def test_an_expression_of_nothing_is_absent_where_a_head_is_calibrated():
    infos = [{"text": "red car"}, {"text": "green dog", "no_target": True}]
    record = {"pieces": caption_of_phrases(["red car", "green dog"]), "mask_infos": infos}
    asked = calibrate.questions(record, ["a blue boat"], np.random.default_rng(0))
    kinds = {kind for pieces, _, true, kind in asked if true is None and ("green dog", 0) in pieces}
    assert kinds == {"no target"} and [true for *_, true, kind in asked if kind == "present"] == [0, 0]


def test_a_picture_with_several_captions_lies_in_one_half_of_a_calibration(tmp_path, monkeypatch):
    infos = [{"text": "red car"}, {"text": "green dog"}]
    records = [{"file_name": f"{k // 3}.jpg", "pieces": [], "mask_infos": infos} for k in range(15)]
    halves = []

    class Records(list):
        record = list.__getitem__

    def ask(base, head, sam_encoder, record, asked):
        number = float(record["file_name"][0])
        return [(torch.tensor([number]), there, 0.5, "present") for there in (True, False)]

    def fit(features, present, ious, about):
        halves.append(set(features[:, 0].tolist()))
        return SimpleNamespace(save=lambda path: None)

    loaded = SimpleNamespace(lead=""), None, None, "loaded"
    for name, value in (
        ("read_config", lambda *_: {}),
        ("family_of", lambda _: None),
        ("build_dataset", lambda *_: Records(records)),
        ("load_trained", lambda *_: loaded),
        ("ask", ask),
        ("tell", lambda rows, _: halves.append({float(r[0]) for r in rows}) or {}),
        ("draw_reliability", lambda *_: None),
    ):
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate.Calibration, "fit", fit)
    words = ["--config", "c", "--data", "d", "--head", str(tmp_path / "head.safetensors")]
    calibrate.main(calibrate.parse_args(words))
    fitted, held_out, whole = halves
    assert not fitted & held_out and fitted | held_out == whole == {0.0, 1.0, 2.0, 3.0, 4.0}


# ---- the mask head


@pytest.mark.parametrize("size", [(24, 24), (10, 17), (9, 31), (5, 3), (63, 64)])
def test_mixing_channels_before_enlarging_them_gives_the_same_masks_and_gradients(monkeypatch, size):
    torch.manual_seed(0)
    head, x = UNetHead(80, base_channels=8), torch.rand(2, 80, *size)
    assert head.mixes_first and not UNetHead(64, base_channels=8).mixes_first
    found = {}
    for cheap in (True, False):
        monkeypatch.setattr(UNetHead, "mixes_first", cheap)
        head.zero_grad()
        logits = head(x)
        logits.square().mean().backward()
        found[cheap] = logits.detach(), [p.grad.clone() for p in head.parameters()]
    torch.testing.assert_close(found[True][0], found[False][0], atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(found[True][1], found[False][1]):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item() + 1e-7, rtol=1e-3)


def test_logarithms_of_maps_show_what_lies_beside_a_place_that_gets_nearly_all():
    maps = 1e-4 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    maps[..., 0, 0] = 0.9
    moved = {}
    for log_maps in (True, False):
        torch.manual_seed(0)
        head = UNetHead(3, base_channels=4, upsample_input=8, log_maps=log_maps)
        logits = head(maps)
        moved[log_maps] = (logits[0] - logits[1]).abs().mean() / logits.std()
        torch.testing.assert_close(head(0.5 * maps), logits, atol=1e-3, rtol=1e-3)
    assert moved[True] > 10 * moved[False]
    with pytest.raises(UserError, match="log_maps has no effect with normalize_input: false"):
        UNetHead(3, normalize_input=False, log_maps=True)


def test_the_cheap_order_is_taken_where_it_is_cheap(monkeypatch):
    taken = []
    monkeypatch.setattr(UNetHead, "first_layer", lambda self, x, scale: taken.append(scale) or 1 / 0)
    for channels, size, cheap in ((80, 24, True), (64, 24, False), (80, 64, False)):
        taken.clear()
        try:
            UNetHead(channels, base_channels=8)(torch.rand(1, channels, size, size))
        except ZeroDivisionError:
            pass
        assert bool(taken) == cheap


def test_many_phrases_equal_few_and_never_pass_the_head_together(monkeypatch):
    torch.manual_seed(0)
    base, encoder = tiny_base("llava"), SAMImageEncoder(sam := tiny_sam())
    head = FLMM(*base.dims, sam=sam, unet=SMALL).eval()
    words = ["red", "a blue car", "the sky", "one", "two", "small", "large", "white", "black", "green cross"]
    [feature] = extract(base, encoder, [one_sample(base, caption_of_phrases(words))])
    most, own = [], mask_decoder.UNetHead.forward
    monkeypatch.setattr(UNetHead, "forward", lambda self, x: most.append(len(x)) or own(self, x))
    with torch.no_grad():
        [grouped] = head([feature])
    assert max(most) <= 8
    [whole] = head([feature])  # with gradients all at once
    assert most[-1] == len(words)
    for name in ("pred_masks", "sam_pred_masks", "scores"):
        torch.testing.assert_close(grouped[name], whole[name], atol=2e-4, rtol=1e-4)


def test_sams_encoder_works_in_bfloat16_and_gives_nearly_the_same(bfloat16):
    encoder = SAMImageEncoder(tiny_sam())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    wanted = encoder([image])
    half = encoder.to(torch.bfloat16)([image])
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
