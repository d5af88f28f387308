"""Faults of flmm; see the package's docstring."""

from tests.mutants import Mutant

EFFECTS = "tests/test_flmm_effects.py"
TRAIN_FLAGS = f"{EFFECTS}::test_every_option_of_train_has_its_effect"
SELECTOR_FLAGS = f"{EFFECTS}::test_every_option_of_the_keyword_selectors_training_has_its_effect"
DATA, MODEL, GOLDEN = "tests/test_flmm_data.py", "tests/test_flmm.py", "tests/test_golden_flmm.py"
STUDY = "tests/test_flmm_study.py"

PUBLISHED = "tests/test_flmm_published.py"
MUTANTS = [
    # options
    Mutant(
        "flmm/train.py",
        '"weight_decay": args.weight_decay}',
        '"weight_decay": 0.01}',
        f"{EFFECTS}::test_the_weight_decay_holds_for_every_trained_tensor",
        "--weight-decay is ignored",
    ),
    Mutant(
        "flmm/train.py",
        'ramp="mmengine"',
        'ramp="next"',
        f"{EFFECTS}::test_the_learning_rate_rises_and_falls_as_mmengine_lets_it",
        "the warm-up is not upstream's",
    ),
    Mutant(
        "flmm/train.py",
        "    return int(warmup if warmup >= 1 else warmup * steps)",
        "    return round(warmup if warmup >= 1 else warmup * steps)",
        f"{EFFECTS}::test_a_warm_up_rounds_down_as_mmengines_does",
        "the warm-up is rounded to the nearest step",
    ),
    Mutant(
        "flmm/train.py",
        "if name in optim and name not in args._given:",
        "if name in optim:",
        f"{EFFECTS}::test_what_the_configuration_says_about_training_holds_until_the_command_line_says_otherwise",
        "the configuration overrules the command line",
    ),
    Mutant(
        "flmm/train.py",
        'mask_name = "gt_masks" if args.targets == "original" else "masks"',
        'mask_name = "masks"',
        TRAIN_FLAGS,
        "--targets is ignored",
    ),
    Mutant(
        "flmm/train.py",
        'refine=training.state["step"] >= coarse_first',
        "refine=True",
        TRAIN_FLAGS,
        "optim.coarse_first is ignored",
    ),
    Mutant(
        "flmm/train.py",
        "base = build_base(config, random_seed=args.random_base, attention=args.attention)",
        "base = build_base(config, attention=args.attention)",
        TRAIN_FLAGS,
        "the control of a random base has the trained one",
    ),
    Mutant(
        "flmm/train.py",
        'if not config["data"].get("val"):',
        'if config["data"].get("val") is False:',
        TRAIN_FLAGS,
        "--eval-every without validation data is not refused",
    ),
    Mutant(
        "flmm/scripts/train_keyword_selector.py",
        "for i in range(min(limit, len(sets[split])))",
        "for i in range(len(sets[split]))",
        SELECTOR_FLAGS,
        "--records is ignored",
    ),
    # the loop
    Mutant(
        "flmm/train.py",
        "{key: value * share for key, value in head.compute_loss(outputs, targets).items()}",
        "head.compute_loss(outputs, targets)",
        f"{EFFECTS}::test_accumulated_pictures_weigh_every_phrase_as_one_batch_does",
        "accumulated batches weigh alike, however many phrases they have",
    ),
    Mutant(
        "flmm/train.py",
        'lambda batch: sum(len(s["masks"]) for s in batch)',
        "len",
        f"{EFFECTS}::test_accumulated_pictures_weigh_every_phrase_as_one_batch_does",
        "shares are counted in pictures instead of phrases",
    ),
    Mutant(
        "flmm/models/flmm.py",
        'share = len(output["pred_masks"]) / count',
        "share = 1 / len(outputs)",
        f"{MODEL}::test_every_phrase_weighs_the_same_however_many_its_picture_has",
        "phrases of pictures with many phrases weigh less",
    ),
    Mutant(
        "flmm/train.py",
        '            check_finite(training, [sample["file_name"] for sample in samples], **parts)\n',
        '            check_finite(training, ["batch"], **parts)\n',
        f"{EFFECTS}::test_a_loss_that_is_not_finite_is_refused_by_name_and_never_saved",
        "a loss that is not finite names no picture",
    ),
    # splits
    Mutant(
        "flmm/train.py",
        'loader = make_loader(sets["train"], args, collate_fn=list)',
        'loader = make_loader(sets["val"], args, collate_fn=list)',
        f"{EFFECTS}::test_training_sees_training_pictures_alone_and_validation_the_others",
        "training on the validation pictures",
    ),
    Mutant(
        "flmm/train.py",
        'validation_loader(sets["val"], args, accelerator)',
        'validation_loader(sets["train"], args, accelerator)',
        f"{EFFECTS}::test_training_sees_training_pictures_alone_and_validation_the_others",
        "validation on the training pictures",
    ),
    Mutant(
        "flmm/train.py",
        "write_cache(cache / split, base, sam_encoder, dataset, origin[split], accelerator)",
        'write_cache(cache / split, base, sam_encoder, sets["train"], origin[split], accelerator)',
        f"{EFFECTS}::test_a_cache_holds_each_split_apart",
        "the cached validation features are those of the training pictures",
    ),
    Mutant(
        "flmm/test.py",
        'fitting = build_dataset(config, "train", args.data, **options) if args.controls else None',
        "fitting = dataset if args.controls else None",
        f"{EFFECTS}::test_scores_are_of_the_asked_split_and_the_raw_map_is_chosen_without_it",
        "the raw-map control is chosen on the test pictures",
    ),
    Mutant(
        "flmm/scripts/train_keyword_selector.py",
        'loader = make_loader(captions["train"], args, collate_fn=list)',
        'loader = make_loader(captions["train"] + captions["val"], args, collate_fn=list)',
        f"{EFFECTS}::test_the_keyword_selector_learns_from_training_captions_and_is_scored_on_others",
        "the selector learns from validation captions, too",
    ),
    Mutant(
        "flmm/make_data.py",
        '"test": 30_000_000,',
        '"test": 10_000_000,',
        f"{EFFECTS}::test_no_picture_of_one_split_is_in_another_by_name_or_by_content",
        "test scenes are training scenes",
    ),
    Mutant(
        "studies/flmm/pretrain_base.py",
        "500_000_000 + index",
        "30_000_000 + index",
        f"{EFFECTS}::test_the_scenes_of_pre_training_are_in_no_split",
        "the base is pre-trained on test scenes",
    ),
    # data
    Mutant(
        "flmm/data/refcoco.py",
        "np.random.default_rng((self.seed, self.epoch, index))",
        "np.random.default_rng((self.seed, index))",
        f"{DATA}::test_expressions_are_drawn_anew_each_epoch_and_never_in_evaluation",
        "expressions are drawn once",
    ),
    Mutant(
        "flmm/data/samples.py",
        '("before_width", "after_width", "before_height", "after_height")',
        '("before_height", "after_height", "before_width", "after_width")',
        GOLDEN,
        "padding of the masks with swapped axes",
    ),
    Mutant(
        "flmm/data/phrases.py",
        "for at in np.argsort([int(mask.sum()) for mask in drawn])[::-1]:",
        "for at in np.argsort([int(mask.sum()) for mask in drawn]):",
        f"{PUBLISHED}::test_reasonseg_takes_the_first_wording_and_the_smaller_polygon_wins",
        "the larger polygon of ReasonSeg wins",
    ),
    Mutant(
        "flmm/data/samples.py",
        "if sum(runs) != height * width:",
        "if sum(runs) > height * width:",
        f"{PUBLISHED}::test_a_segmentation_that_cannot_be_right_is_refused_and_never_memory",
        "an RLE that is too short decodes to memory that nothing has written",
    ),
    Mutant(
        "flmm/models/attention_rows.py",
        "if queries == 1 or not causal:",
        "if queries == 1:",
        "tests/test_flmm_bases.py::test_recorded_rows_are_those_that_sdpa_attended",
        "rows of a base that is not causal are taken for causal ones",
    ),
    Mutant(
        "flmm/scripts/demo/page.py",
        "len(named) != 1 or named[0].lower() not in hosts",
        "len(named) != 1",
        "tests/test_flmm.py::test_the_page_answers_to_itself_alone",
        "the page answers under any name that leads to this machine",
    ),
    # model
    Mutant(
        "flmm/models/attention_rows.py",
        "<= rows[:, None]",
        "< rows[:, None]",
        f"{MODEL}::test_rows_equal_full_matrices_alone_and_in_a_left_padded_batch",
        "a token does not attend to itself",
    ),
    Mutant(
        "flmm/models/attention_rows.py",
        'part.mean(1) if merge == "mean"',
        'part.sum(1) if merge == "mean"',
        GOLDEN,
        "long phrases have larger maps",
    ),
    Mutant(
        "flmm/conversation.py",
        "caption_of_phrases(phrases, self.base.lead)",
        "caption_of_phrases(phrases)",
        "tests/test_flmm_presence.py::test_a_phrase_asked_alone_stands_behind_the_words_that_captions_begin_with",
        "a phrase is asked where no caption has one",
    ),
    Mutant(
        "flmm/models/mask_head/mask_refiner.py",
        "maps = [maps[0], maps[1][0]]",
        "maps = [maps[0], maps[1][-1]]",
        "tests/test_flmm_refiners.py",
        "SAM-HQ decodes with the features of its last layer",
    ),
    Mutant(
        "flmm/models/mask_head/mask_refiner.py",
        '"intermediate_embeddings": maps[1:]}',
        '"intermediate_embeddings": None}',
        "tests/test_flmm_refiners.py",
        "SAM-HQ decodes without its early features",
    ),
    Mutant(
        "flmm/models/mask_head/mask_refiner.py",
        "return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]",
        "return [xs.min().item(), ys.min().item(), xs.max().item(), ys.max().item()]",
        GOLDEN,
        "boxes are a pixel short",
    ),
    Mutant(
        "flmm/models/flmm.py",
        "weights = self.text_layer_weights.softmax(0)",
        "weights = self.text_layer_weights / len(self.text_layer_weights)",
        GOLDEN,
        "layers are weighed without softmax",
    ),
    # scores
    Mutant(
        "flmm/metrics.py",
        "float((iou > threshold).mean())",
        "float((iou >= threshold).mean())",
        f"{DATA}::test_scores_of_referring_segmentation_follow_their_definitions",
        "precision counts an equal threshold",
    ),
    Mutant(
        "flmm/metrics.py",
        '"cIoU": float(inter.sum() / max(union.sum(), 1)),',
        '"cIoU": float((inter / np.maximum(union, 1)).mean()),',
        f"{DATA}::test_scores_of_referring_segmentation_follow_their_definitions",
        "cIoU is the mean IoU",
    ),
    Mutant(
        "flmm/evaluation.py",
        "else masks & ~torch.as_tensor(ignore)",
        "else masks | torch.as_tensor(ignore)",
        f"{PUBLISHED}::test_reasonseg_leaves_ignored_pixels_out",
        "ignored pixels count as predicted",
    ),
    Mutant(
        "flmm/evaluation.py",
        "centre[h // 4 : h - h // 4, w // 4 : w - w // 4] = True",
        "centre[w // 4 : w - w // 4, h // 4 : h - h // 4] = True",
        f"{DATA}::test_a_centred_box_has_half_the_sides_and_the_row_of_a_phrase_its_own_numbers",
        "the centred box with swapped axes",
    ),
    Mutant(
        "flmm/scripts/train_keyword_selector.py",
        "precision, recall = hit / max(1, predicted.sum().item()), hit / max(1, wanted.sum().item())",
        "precision, recall = hit / max(1, wanted.sum().item()), hit / max(1, predicted.sum().item())",
        f"{EFFECTS}::test_f1_equals_that_of_scikit_learn",
        "precision and recall are swapped",
    ),
    Mutant(
        "studies/flmm/report.py",
        '    return bootstrap(np.mean, values, groups=[row["file"] for row in table])',
        "    return bootstrap(np.mean, values)",
        f"{STUDY}::test_the_interval_covers_other_pictures_and_keeps_their_phrases_together",
        "the interval takes phrases of one picture as independent",
    ),
    Mutant(
        "studies/flmm/report.py",
        'kept = np.array([float(row["score"]) > 0.5 for row in table])',
        'kept = np.array([float(row["score"]) >= 0.5 for row in table])',
        f"{STUDY}::test_words_and_confident_masks_are_averaged_over_their_phrases",
        "a predicted IoU of one half counts as confident",
    ),
]
