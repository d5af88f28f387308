"""Faults of dia_pangu and of its study."""

from tests.mutants import Mutant

SPLITS = "tests/test_dia_pangu_splits.py"
MODEL = "tests/test_dia_pangu_model.py"
PROMPT = "tests/test_dia_pangu_prompt.py"
DATA = "tests/test_dia_pangu_data.py"
SCORES = "tests/test_dia_pangu_evaluation.py"
WEIGHTS = "tests/test_dia_pangu_weights.py"
TRAIN = "tests/test_dia_pangu_train.py"
GOLDEN = "tests/test_golden_dia_pangu.py"
SCANS = "tests/test_dia_pangu_scans.py"
LABELER = "tests/test_dia_pangu_labeler.py"
SEED = "tests/test_dia_pangu_seed.py"
FLAGS = "tests/test_dia_pangu_effects.py::test_every_option_of_"

MUTANTS = [
    # --- splits
    Mutant(
        "dia_pangu/src/train.py",
        'val_set = CTRGDataset(args.data, "val", **options)',
        'val_set = CTRGDataset(args.data, "train", **options)',
        SPLITS,
        "thresholds calibrated on training volumes",
    ),
    Mutant(
        "dia_pangu/src/train.py",
        'train_set = CTRGDataset(args.data, "train", flip',
        'train_set = CTRGDataset(args.data, "test", flip',
        SPLITS,
        "training on test volumes",
    ),
    Mutant(
        "dia_pangu/src/test.py",
        "data = CTRGDataset(args.data, args.split, grid",
        'data = CTRGDataset(args.data, "train", grid',
        SPLITS,
        "reports written for training volumes, --split ignored",
    ),
    Mutant(
        "studies/dia_pangu/pretrain_vit.py",
        "places, inputs, labels = look_at_all(layer, train_set, device)",
        "places, inputs, labels = look_at_all(layer, val_set, device)",
        SPLITS,
        "the vote fitted on validation volumes",
    ),
    Mutant(
        "studies/dia_pangu/pretrain_vit.py",
        "frequency, counted = patch_statistics(train_set, layer.n_tok)",
        "frequency, counted = patch_statistics(val_set, layer.n_tok)",
        SPLITS,
        "prototypes start from validation masks",
    ),
    Mutant(
        "studies/dia_pangu/warm_llm.py",
        'sets = CTRGDataset(args.data, "train", **options), CTRGDataset(args.data, "val", **options)',
        'sets = CTRGDataset(args.data, "train", **options), CTRGDataset(args.data, "train", **options)',
        SPLITS,
        "perplexity of the reports that were trained on",
    ),
    Mutant(
        "studies/dia_pangu/baselines.py",
        'svd_solver="randomized").fit(x)',
        'svd_solver="randomized").fit(test_voxels)',
        SPLITS,
        "the linear control's PCA fitted on its test volumes",
    ),
    Mutant(
        "studies/dia_pangu/real_reports.py",
        "answers[name] = learned_labeler(train_texts, train_labels, texts)",
        "answers[name] = learned_labeler(texts, truth, texts)",
        SPLITS,
        "the learned labeler fitted on its own test reports",
    ),
    Mutant(
        "dia_pangu/src/Dataset/CTRG_dataset.py",
        'if home.setdefault(item["id"], split) != split:',
        'if home.setdefault(item["id"], split) == "":',
        SPLITS,
        "a volume in two partitions is taken",
    ),
    # --- preparation
    Mutant(
        "dia_pangu/src/Dataset/preprocess.py",
        "- (field + off) / 2",
        "- field / 2",
        DATA,
        "a volume is shifted where its slices do not divide by the averaging",
    ),
    Mutant(
        "dia_pangu/src/Dataset/preprocess.py",
        "np.where((nearest >= 0) & (nearest < size), nearest, size)",
        "np.clip(nearest, 0, size - 1)",
        DATA,
        "patches outside of the scan carry the findings of its edge",
    ),
    Mutant(
        "dia_pangu/src/Dataset/preprocess.py",
        'scan.verdict.side = "unknown"',
        'scan.verdict.side = "known"',
        SCANS,
        "sides are named of axes that run the other way",
    ),
    # --- training
    Mutant(
        "dia_pangu/src/train.py",
        "groups += parameter_groups(model.lang_model, args.lr * args.llm_lr_scale,",
        "groups += parameter_groups(model.lang_model, args.lr,",
        FLAGS + "train_has_its_effect",
        "--llm-lr-scale ignored",
    ),
    Mutant(
        "dia_pangu/src/train.py",
        "betas=(0.9, args.adam_beta2)",
        "betas=(0.9, 0.999)",
        FLAGS + "train_has_its_effect",
        "--adam-beta2 ignored",
    ),
    Mutant(
        "dia_pangu/src/train.py",
        "    text.key_weight = args.key_weight\n",
        "",
        FLAGS + "train_has_its_effect",
        "--key-weight ignored",
    ),
    Mutant(
        "dia_pangu/src/train.py",
        'lm_loss, ctr_loss = out["lm_loss"] * label_share, out["ctr_loss"] * sample_share',
        'lm_loss, ctr_loss = out["lm_loss"], out["ctr_loss"]',
        TRAIN + "::test_accumulation_and_processes_give_the_same_first_step",
        "every batch weighs alike, whatever it holds",
    ),
    Mutant(
        "dia_pangu/src/train.py",
        'return torch.stack([labels, labels.new_tensor(len(batch["id"]))])',
        'return torch.stack([labels.new_tensor(len(batch["id"])), labels])',
        f"{MODEL} {TRAIN}::test_accumulation_and_processes_give_the_same_first_step",
        "the shares of tokens and samples swapped",
    ),
    Mutant(
        "dia_pangu/src/Model/multimodality_model.py",
        'if mode and getattr(module, "gradient_checkpointing", False):',
        'if not mode and getattr(module, "gradient_checkpointing", False):',
        TRAIN + "::test_gradient_checkpointing_keeps_the_gradient_and_recomputes",
        "--gradient-checkpointing without effect on a frozen language model",
    ),
    Mutant(
        "dia_pangu/src/Model/multimodality_model.py",
        "                module.eval()\n",
        "                module.train()\n",
        MODEL + "::test_frozen_parts_run_without_dropout",
        "frozen parts run with dropout",
    ),
    Mutant(
        "dia_pangu/src/Model/multimodality_model.py",
        "return (labels[:, 1:] != -100).sum()",
        "return (labels != -100).sum() + len(labels)",
        GOLDEN,
        "the mean loss is over one token more per sample",
    ),
    Mutant(
        "studies/dia_pangu/pretrain_vit.py",
        "rate = args.lr * args.prototype_lr_scale",
        "rate = args.lr * 5",
        FLAGS + "pretrain_vit_has_its_effect",
        "--prototype-lr-scale ignored",
    ),
    Mutant(
        "studies/dia_pangu/warm_llm.py",
        "key_weight=args.key_weight",
        "key_weight=1.0",
        FLAGS + "warm_llm_has_its_effect",
        "--key-weight of the language model ignored",
    ),
    # --- data and prompts
    Mutant(
        "dia_pangu/src/Dataset/CTRG_dataset.py",
        'return (np.array(self.codes(self.items[index]["id"])) == 1)',
        'return (np.array(self.codes(self.items[index]["id"])) >= 1)',
        f"{SPLITS} {DATA}",
        "absent and uncertain findings labelled present",
    ),
    Mutant(
        "dia_pangu/src/Dataset/CTRG_dataset.py",
        "rng = np.random.default_rng([self.seed, self.epoch, index])",
        "rng = np.random.default_rng([self.seed, index])",
        DATA,
        "the same flips in every epoch",
    ),
    Mutant(
        "dia_pangu/src/Dataset/CTRG_dataset.py",
        "if rng.random() >= self.hide_places",
        "if rng.random() < self.hide_places",
        PROMPT,
        "--hide-places hides the other part",
    ),
    Mutant(
        "dia_pangu/src/Dataset/scan.py",
        'orientations.axcodes2ornt(("L", "P", "S"))',
        'orientations.axcodes2ornt(("R", "P", "S"))',
        f"{DATA} {SCORES}::test_organs_lie_on_their_side_after_reading",
        "left and right of every volume swapped",
    ),
    Mutant(
        "dia_pangu/src/Dataset/scan.py",
        "return out, (float(spacing_mm[1]), float(spacing_mm[0]), float(spacing_mm[2]))",
        "return hu, (float(spacing_mm[2]), float(spacing_mm[1]), float(spacing_mm[0]))",
        DATA,
        "the spacing along the wrong axes",
    ),
    Mutant(
        "dia_pangu/src/Dataset/prompt.py",
        "-100 if i < len(question) or token",
        "-100 if i <= len(question) or token",
        f"{PROMPT} {GOLDEN}",
        "the first token of the report leaves the loss",
    ),
    Mutant(
        "dia_pangu/src/Dataset/prompt.py",
        "            mask = [1] * len(ids) + [0]\n",
        "            mask = [1] * (len(ids) + 1)\n",
        f"{PROMPT} {GOLDEN}",
        "eos is attended to, unlike upstream",
    ),
    # --- model
    Mutant(
        "dia_pangu/src/Model/my_embedding_layer.py",
        "return sim[..., 0] - sim[..., 1]",
        "return sim[..., 1] - sim[..., 0]",
        PROMPT,
        "the vote hears absent for present",
    ),
    Mutant(
        "dia_pangu/src/Model/my_embedding_layer.py",
        "return self.evidence_head(tokens).amax((1, 2))",
        "return self.evidence_head(tokens).mean((1, 2))",
        PROMPT,
        "the vote takes the mean over the patches instead of the clearest",
    ),
    Mutant(
        "dia_pangu/src/test.py",
        'seen = tokens.roll(1, 0) if control == "swap-visual" else tokens',
        "seen = tokens",
        MODEL,
        "the control with another patient's image tokens shows the patient's own",
    ),
    Mutant(
        "dia_pangu/src/test.py",
        "statuses = (probability >= torch.tensor(thresholds)).long()",
        "statuses = (probability >= 0.5).long()",
        f"{MODEL} {PROMPT}",
        "calibrated thresholds ignored",
    ),
    Mutant(
        "dia_pangu/src/Model/build.py",
        'if key != "embedding_layer.weight" or take == "all":',
        'if key or take == "all":',
        WEIGHTS,
        "Llama's word table overwrites Pangu's",
    ),
    # --- scores
    Mutant(
        "dia_pangu/evaluate/findings.py",
        "tp / (tp + 0.5 * (fp + fn) + EPSILON)",
        "tp / (tp + (fp + fn) + EPSILON)",
        SCORES,
        "the Jaccard index called F1",
    ),
    Mutant(
        "dia_pangu/evaluate/findings.py",
        "hit, extra, missed = truth & predicted, ~truth & predicted, truth & ~predicted",
        "hit, extra, missed = truth & predicted, truth & ~predicted, ~truth & predicted",
        SCORES,
        "precision and recall swapped",
    ),
    Mutant(
        "dia_pangu/evaluate/findings.py",
        "if score > best + least:",
        "if score > best:",
        SCORES,
        "a threshold moves for one case",
    ),
    Mutant(
        "dia_pangu/evaluate/evidence.py",
        'return {"side": SIDES[0] if right > mass / 2 else SIDES[1]',
        'return {"side": SIDES[1] if right > mass / 2 else SIDES[0]',
        DATA,
        "the evidence map's sides swapped",
    ),
    Mutant(
        "dia_pangu/evaluate/labeler.py",
        "    return bool(DENIED_AFTER.search(masked[match.end() :]))",
        "    return False",
        LABELER,
        "a negation behind the finding is not read",
    ),
    Mutant(
        "studies/dia_pangu/locations.py",
        "if truth.get(what) and finding in found.get(name, {})",
        "if truth.get(what) and finding in found.get(name, {}) and found[name][finding].get(what)",
        SCORES,
        "findings without a stated place leave the accuracy",
    ),
    Mutant(
        "dia_pangu/evaluate/nlg_eval.py",
        'samples["ROUGE_L"] = rouge_l(*spaced)',
        'samples["ROUGE_L"] = rouge_l(*spaced[::-1])',
        f"{SCORES} {GOLDEN}",
        "ROUGE-L with prediction and truth swapped",
    ),
    # --- scans
    Mutant(
        "dia_pangu/src/Dataset/verdict.py",
        "    if offset:\n        verdict.offset, verdict.why",
        "    if False:\n        verdict.offset, verdict.why",
        SCANS,
        "HU with an offset is read as it is stored",
    ),
    Mutant(
        "dia_pangu/src/Dataset/verdict.py",
        "    out[:3] *= UNITS[taken]",
        "    out[:3] *= UNITS['mm']",
        SCANS,
        "microns and metres are read as mm",
    ),
    Mutant(
        "dia_pangu/src/Dataset/dicom.py",
        "    return (normal + usual) * step, height",
        "    return normal * step, height",
        SCANS,
        "the shear of a gantry tilt is dropped",
    ),
    Mutant(
        "dia_pangu/src/Dataset/dicom.py",
        '    if named != "CT":',
        "    if False:",
        SCANS,
        "MR and PET are read as CT",
    ),
    Mutant(
        "dia_pangu/src/Dataset/verdict.py",
        "low = low[near & other] if (near & other).any() else low[near]",
        "low = low[near]",
        SCANS + "::test_what_fills_the_corners_is_air_and_no_sign_of_an_offset",
        "a filling of the corners is taken for the peak of air",
    ),
    Mutant(
        "dia_pangu/src/Dataset/dicom.py",
        "            if not np.array_equal(read_pixels(other, frames)[0], first):",
        "            if False:",
        SCANS,
        "of two reconstructions at one place the first counts without a word",
    ),
    Mutant(
        "dia_pangu/src/Dataset/scan.py",
        "    np.maximum(hu, np.float32(AIR_HU), out=hu)",
        "    np.maximum(hu, np.float32(-9999), out=hu)",
        SCANS,
        "padding of -3024 stays",
    ),
    Mutant(
        "dia_pangu/src/Dataset/preprocess.py",
        "{s.st_mtime_ns} {s.st_ctime_ns}",
        "{s.st_mtime_ns}",
        SCANS,
        "a rewritten file with its old time is taken from the cache",
    ),
    Mutant(
        "dia_pangu/src/Model/build.py",
        'return {} if (home / "vision.safetensors").is_file() else {"preprocess": "upstream"}',
        "return {}",
        WEIGHTS,
        "published start weights get HU windows",
    ),
    Mutant(
        "dia_pangu/src/test.py",
        '    if hide and verdict.side != "known":',
        "    if False:",
        SCANS,
        "a report names sides that nobody knows",
    ),
    # --- the seed's path
    Mutant(
        "dia_pangu/src/Dataset/prompt.py",
        "                thinking = token == begin",
        "                thinking = False",
        SEED,
        "openPangu's thinking stands in the report",
    ),
    Mutant(
        "common/sharding.py",
        "                state.pop(key, None)",
        "                pass",
        SEED,
        "checkpoints hold the frozen weights",
    ),
    Mutant(
        "dia_pangu/evaluate/labeler.py",
        "                if organs and organs <= not_of.get(name, set()):",
        "                if False:",
        LABELER,
        "a thyroid nodule is a lung lesion",
    ),
    Mutant(
        "dia_pangu/evaluate/labeler.py",
        "    masked = blank(CHANGE, blank(NOT_DENIED, clause))",
        "    masked = blank(NOT_DENIED, clause)",
        LABELER,
        '"no change in the nodule" denies the nodule',
    ),
]
