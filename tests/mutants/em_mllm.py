"""Faults of em_mllm and its study."""

from tests.mutants import Mutant

SPLITS = "tests/test_em_mllm_splits.py"
DATA = "tests/test_em_mllm_data.py"
MODEL = "tests/test_em_mllm_model.py"
ENCODER = "tests/test_em_mllm_encoder.py"
GOLDEN = "tests/test_golden_em_mllm.py"
TRAIN = "tests/test_em_mllm_train.py"
ACCUM = f"{TRAIN}::test_gradient_accumulation_equals_the_larger_batch"
EFFECTS = "tests/test_em_mllm_effects.py::test_every_option_of"
CONTRACT, READERS = "tests/test_em_mllm_contract.py", "tests/test_em_mllm_readers.py"
OPTIONS, BENCH = "tests/test_em_mllm_options.py", "tests/test_em_mllm_bench.py"

MUTANTS = [
    # --- splits
    Mutant(
        "em_mllm/train.py",
        "kept = [i for i in order[len(held) :] if shown.isdisjoint(source.signals_of(i))]",
        "kept = order[len(held) :]",
        SPLITS,
        "signals of held-out questions are trained on with their other questions",
    ),
    Mutant(
        "em_mllm/train.py",
        "plain.augmentation = Augmentation()",
        "plain.augmentation = source.augmentation",
        SPLITS,
        "validation signals are augmented",
    ),
    Mutant(
        "em_mllm/train.py",
        "val = QuestionDataset(task_pairs(args.val_dir), signal=source.signal, **common)",
        "val = QuestionDataset(task_pairs(args.task_dir), signal=source.signal, **common)",
        SPLITS,
        "--val-dir ignored: validation on the training questions",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "loader = make_loader(train, args, ",
        "loader = make_loader(test, args, ",
        SPLITS,
        "training on test records",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "predicted, values = predict(model, test, scales)",
        "predicted, values = predict(plain, train, scales)",
        SPLITS,
        "the test accuracy is measured on training signals",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "predicted, _ = predict(plain, val, scales)",
        "predicted, _ = predict(plain, test, scales)",
        SPLITS,
        "test signals are looked at during training",
    ),
    Mutant(
        "em_mllm/make_data.py",
        "rng = np.random.default_rng((args.seed, number, t))",
        "rng = np.random.default_rng((args.seed, t))",
        SPLITS,
        "test signals are those of training",
    ),
    Mutant(
        "em_mllm/convert.py",
        "parts = np.split(rows, [int(0.6 * len(rows)), int(0.8 * len(rows))])",
        "parts = [rows, *np.split(rows, [int(0.6 * len(rows)), int(0.8 * len(rows))])[1:]]",
        SPLITS,
        "RadioML parts overlap",
    ),
    Mutant(
        "em_mllm/convert.py",
        "test = read_rtl433(paths[1], train) if len(paths) > 1 else train",
        "test = train",
        SPLITS,
        "training captures are asked about",
    ),
    Mutant(
        "studies/em_mllm/fewshot.py",
        "shown = Subset(train, rows.tolist())",
        "shown = Subset(test, range(len(rows)))",
        SPLITS,
        "a probe fitted on its own test part",
    ),
    Mutant(
        "studies/em_mllm/rtl433.py",
        "probe(x[shown], target[shown], x[~shown])",
        "probe(x, target, x[~shown])",
        SPLITS,
        "a probe of unseen devices sees their test captures",
    ),
    Mutant(
        "em_mllm/test.py",
        "others = rows[elsewhere & (data.task_of == data.task_of[row]) & (label != label[row])]",
        "others = rows[elsewhere & (data.task_of == data.task_of[row])]",
        SPLITS,
        "the wrong-signal control may show the right class",
    ),
    # --- scores
    Mutant(
        "em_mllm/scores.py", "hits / count, 1.959964", "hits / count, 1.644854", SPLITS, "a 90 % interval"
    ),
    Mutant(
        "em_mllm/scores.py",
        'a["snr_db"] >= HIGH_SNR_DB]',
        'a["snr_db"] > HIGH_SNR_DB]',
        SPLITS,
        "10 dB is not high SNR",
    ),
    Mutant(
        "em_mllm/scores.py",
        "np.linspace(np.log(0.2), np.log(10), 60)",
        "np.linspace(np.log(0.2), np.log(2), 60)",
        SPLITS,
        "the temperature cannot exceed 2",
    ),
    Mutant(
        "em_mllm/scores.py",
        'matrix[names.index(a["class"]), names.index(a["options"][a["pred"]])] += 1',
        'matrix[names.index(a["options"][a["pred"]]), names.index(a["class"])] += 1',
        SPLITS,
        "confusion matrix transposed",
    ),
    Mutant(
        "em_mllm/scores.py",
        'np.array([a["likeliest"] == a["truth"] for a in answers])',
        'np.array([a["pred"] == a["truth"] for a in answers])',
        f"{DATA} {SPLITS}",
        "calibration of the generated answer, not of the likeliest",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "truth, median = test.columns[name][known], float(np.median(train.columns[name][learned]))",
        "truth, median = test.columns[name][known], float(np.median(test.columns[name][known]))",
        SPLITS,
        "the median baseline knows the test set",
    ),
    Mutant(
        "em_mllm/pretrain.py",
        "closest = seen[(where[:, None] - seen).abs().argmin(1)]",
        "closest = seen[(where[:, None] - seen).abs().argmax(1)]",
        SPLITS,
        "the nearest-patch baseline copies the farthest",
    ),
    # --- training
    Mutant(
        "em_mllm/train.py",
        '    return (batch["labels"] != -100).sum()',
        '    return (batch["labels"] != -100).any(1).sum()',
        ACCUM,
        "micro-batches are weighed by questions, not by answer tokens",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "parts = {t: result.loss_details[t] * share[k] for k, t in enumerate(tasks)}",
        "parts = {t: result.loss_details[t] * share[0] for k, t in enumerate(tasks)}",
        ACCUM,
        "unknown regression values count in the share of a micro-batch",
    ),
    Mutant(
        "em_mllm/train.py",
        'factor = lr_at(training.state["step"], steps, args.warmup, args.schedule)',
        'factor = lr_at(training.state["step"], steps, args.warmup)',
        f"{EFFECTS}_train_has_its_effect",
        "--schedule ignored",
    ),
    Mutant(
        "em_mllm/train.py",
        "set_trainable(model, args.freeze_llm, args.freeze_signal_encoder, args.use_lora, lora)",
        "set_trainable(model, args.freeze_llm, False, args.use_lora, lora)",
        f"{EFFECTS}_train_has_its_effect",
        "--freeze-signal-encoder ignored",
    ),
    Mutant(
        "em_mllm/train.py",
        "dropout=args.lora_dropout,",
        "dropout=0.1,",
        f"{EFFECTS}_train_has_its_effect",
        "--lora-dropout ignored",
    ),
    Mutant(
        "em_mllm/pretrain.py",
        'lr_at(state["step"], steps, args.warmup)',
        'lr_at(state["step"], steps, 0.05)',
        f"{EFFECTS}_pretrain_has_its_effect",
        "--warmup ignored",
    ),
    Mutant(
        "em_mllm/finetune.py",
        "model.sit.requires_grad_(not args.linear_probe)",
        "model.sit.requires_grad_(True)",
        f"{EFFECTS}_finetune_has_its_effect",
        "--linear-probe ignored",
    ),
    Mutant(
        "em_mllm/dataset.py",
        "iq = np.roll(iq, int(rng.integers(len(iq))), 0)",
        "iq = np.roll(iq, int(rng.integers(len(iq))), 1)",
        DATA,
        "the circular shift exchanges I and Q instead of moving time",
    ),
    Mutant(
        "em_mllm/dataset.py",
        "if noisy and self.noise_db is not None:",
        "if self.noise_db is not None:",
        DATA,
        "the target without noise is noisy",
    ),
    Mutant(
        "em_mllm/dataset.py",
        'self.teacher([{**item, "iq": item["clean"]} for item in items])',
        "self.teacher(items)",
        DATA,
        "the teacher sees what the student sees",
    ),
    Mutant(
        "em_mllm/signal_file.py",
        'np.iinfo(x.dtype).max / 2 if x.dtype.kind == "u" else 0',
        "0",
        READERS,
        "unsigned samples keep a mean of half their range",
    ),
    Mutant(
        "em_mllm/torchsig.py",
        "if len(parts) > 1:",
        "if len(parts) > 9:",
        READERS,
        "a sample of several signals has the class of the first",
    ),
    Mutant(
        "em_mllm/dataset.py",
        "rng = np.random.default_rng((self.seed, self.epoch, i))\n        if self.questions_per_signal",
        "rng = np.random.default_rng((self.seed, i))\n        if self.questions_per_signal",
        DATA,
        "augmentation is the same in every epoch",
    ),
    Mutant(
        "em_mllm/pretrain.py",
        "    if args.gradient_checkpointing:",
        "    if args.gradient_checkpointing and not args.data:",
        "tests/test_em_mllm_effects.py::test_checkpointing_and_attention_reach_the_model",
        "--gradient-checkpointing ignored",
    ),
    Mutant(
        "em_mllm/dataset.py",
        '        r["question"] = asked(r)\n',
        "",
        OPTIONS,
        "options of a field of their own are not shown to the model",
    ),
    # --- data and model
    Mutant(
        "em_mllm/dataset.py",
        "labels[i, n : len(t)] = torch.tensor(t[n:])",
        "labels[i, n - 1 : len(t)] = torch.tensor(t[n - 1 :])",
        DATA,
        "the last token of the question is learned, too",
    ),
    Mutant(
        "em_mllm/model.py",
        "target = labels[:, where + 1]",
        "target = labels[:, where]",
        MODEL,
        "labels are not shifted",
    ),
    Mutant(
        "em_mllm/em_foundation/utils/utils.py",
        "held = -(-lengths[:, None] // config.patch_size[0])",
        "held = lengths[:, None] // config.patch_size[0]",
        f"{MODEL} {GOLDEN}",
        "a signal's last, incomplete patch is not shown",
    ),
    Mutant(
        "em_mllm/model.py",
        "return 1.0, 1.0 / config.embedding_multiplier",
        "return 1.0, 1.0",
        MODEL,
        "signal vectors are scaled by Granite's multiplier",
    ),
    Mutant(
        "em_mllm/signals.py",
        "np.abs(x) ** 2) / 2 * 10 ** (-snr_db / 10)",
        "np.abs(x) ** 2) * 10 ** (-snr_db / 10)",
        ENCODER,
        "noise is 3 dB too strong",
    ),
    Mutant(
        "em_mllm/optim.py", 'plain=("embed",)', 'plain=("nothing",)', SPLITS, "embedding tables are decayed"
    ),
    # --- the contract of a model folder, readers, wordings
    Mutant(
        "em_mllm/prepare.py",
        "    if recorded and spec.remove_dc:",
        "    if recorded:",
        CONTRACT,
        "the mean is taken off whatever training did",
    ),
    Mutant(
        "em_mllm/recordings.py",
        "            iq, rate = prepare(window, fs, spec, recording.done)",
        "            iq, rate = prepare(window - window.mean(0), fs, spec, recording.done)",
        CONTRACT,
        "the mean is taken off the windows of a recording alone",
    ),
    Mutant(
        "em_mllm/model.py",
        "    own_base = trained or llm_changed or model.llm_changed",
        "    own_base = trained or llm_changed",
        CONTRACT,
        "the language model that an earlier run trained is lost under adapters",
    ),
    Mutant(
        "em_mllm/model.py",
        'parameter.requires_grad_(use_lora and "lora_" in name)',
        'parameter.requires_grad_("lora_" in name)',
        CONTRACT,
        "--freeze-llm trains the adapters of an earlier run",
    ),
    Mutant(
        "em_mllm/train.py",
        '    better = state["best_loss"] is None or loss < state["best_loss"]',
        '    better = state["best_loss"] is None or loss > state["best_loss"]',
        CONTRACT,
        "the worst weights are kept",
    ),
    Mutant(
        "em_mllm/iq_io.py",
        '    headers = np.cumsum([c.get("core:header_bytes", 0) for c in captures])',
        '    headers = [c.get("core:header_bytes", 0) for c in captures]',
        READERS,
        "the header bytes of earlier SigMF captures are not counted",
    ),
    Mutant(
        "em_mllm/iq_io.py",
        "by_column = first >= 16 if is_complex else last < first",
        "by_column = False",
        READERS,
        "of a MATLAB matrix a row is taken for a capture",
    ),
    Mutant(
        "em_mllm/dataset.py",
        "        if isinstance(pair, Chosen) and len(named - {None}) <= 1:",
        "        if isinstance(pair, Chosen) and not named - {None}:",
        READERS,
        "what questions name wins over the pair that the user put together",
    ),
    Mutant(
        "em_mllm/options.py",
        "        found = chain if len(chain) >= len(found) else found",
        "        found = chain if len(chain) > len(found) else found",
        OPTIONS,
        "letters in the instruction before the options are taken for them",
    ),
    Mutant(
        "em_mllm/em_bench.py",
        '        pairs = [(i["answer"], i.get("model_response") or "") for i in items if i.get("answer")]',
        '        pairs = [(i["answer"], i["model_response"]) for i in items if i.get("model_response")]',
        BENCH,
        "empty answers are left out of the mended scores",
    ),
    Mutant(
        "em_mllm/prepare.py",
        "    return replace(found, view=wanted.view, factor=wanted.factor, points=points, rates=rates)",
        "    return found",
        CONTRACT,
        "an encoder of magnitude and frequency is shown I and Q",
    ),
    Mutant(
        "em_mllm/recordings.py",
        "            return None",
        "            return recording.length // 2",
        CONTRACT,
        "a row of a .h5 at a lower rate is cut into windows",
    ),
    Mutant(
        "em_mllm/em_foundation/models/modeling_em.py",
        "torch.where(is_iq, 1 - noise, noise)",
        "noise",
        ENCODER,
        "both views of a signal show the same patches",
    ),
    Mutant(
        "em_mllm/options.py",
        "        style = styles[marks[-1].group()]",
        '        style = "letter"',
        OPTIONS,
        "a letter in a circle is scored as a plain one",
    ),
]
