"""Faults of pruning/ and studies/pruning/."""

from tests.mutants import Mutant

TRAIN = "tests/test_pruning_train.py"
LANGUAGE = f"{TRAIN}::test_every_option_of_healing_a_language_model_has_its_effect"
REPORTS = f"{TRAIN}::test_every_option_of_healing_a_report_model_has_its_effect"
REPORT = "tests/test_pruning_report.py"
SCAN = "tests/test_pruning_scan.py"
TOOLS = "tests/test_pruning_tools.py"
STUDY = "tests/test_pruning_study.py"
METRICS = "pruning/sensitivity_analyse/eval_metric.py"
METHODS = "pruning/sensitivity_analyse/scan_methods.py"
CHOOSE = "pruning/sensitivity_analyse/choose_layers.py"
PRUNE = "pruning/pruning_tools/prune_llm.py"

MUTANTS = [
    # --- healing
    Mutant(
        "pruning/report_model.py",
        '        args.data,\n        "train",',
        '        args.data,\n        "test",',
        f"{TRAIN}::test_the_training_set_is_the_training_partition_alone",
        "healing on test records",
    ),
    Mutant(
        "pruning/train.py",
        "count=scored):",
        "count=None):",
        f"{TRAIN}::test_two_processes_heal_as_one_and_resume_is_exact",
        "batches weigh alike instead of tokens, so that two processes differ from one",
    ),
    Mutant(
        "pruning/train.py",
        "loss = (1 - self.distill) * lm_loss + self.distill * distance",
        "loss = lm_loss + self.distill * distance",
        f"{TRAIN}::test_distillation_from_itself_starts_at_distance_zero_and_mixes",
        "the mixed loss keeps the whole cross entropy",
    ),
    Mutant(
        "pruning/train.py",
        'F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)',
        'F.kl_div(target, logits.log_softmax(-1), reduction="sum", log_target=True)',
        f"{TRAIN}::test_the_distance_is_that_of_the_teachers_distribution_to_the_students",
        "KL in the wrong direction",
    ),
    Mutant(
        "pruning/train.py",
        "wanted = labels[:, 1:] != -100",
        "wanted = labels[:, :-1] != -100",
        f"{TRAIN}::test_the_distance_is_that_of_the_teachers_distribution_to_the_students",
        "the scored positions are one off",
    ),
    Mutant(
        "pruning/train.py",
        'lora = "lora_" in name and not (full or last)',
        'lora = "lora_" in name and full',
        f"{TRAIN}::test_healing_lowers_the_loss_and_touches_lora_alone",
        "all decoder layers train beside LoRA",
    ),
    Mutant(
        "pruning/train.py",
        "parameter.data = parameter.data.float()",
        "parameter.data = parameter.data",
        f"{TRAIN}::test_full_healing_trains_the_layers_and_nothing_else",
        "half-precision weights train in half precision",
    ),
    Mutant(
        "pruning/train.py",
        "betas=(0.9, args.adam_beta2)",
        "betas=(0.9, 0.999)",
        LANGUAGE,
        "--adam-beta2 ignored",
    ),
    Mutant(
        "pruning/train.py",
        "groups = parameter_groups(healing, args.lr, args.weight_decay)",
        "groups = parameter_groups(healing, args.lr, 0.0)",
        LANGUAGE,
        "--weight-decay ignored",
    ),
    Mutant(
        "pruning/train.py",
        'factor = lr_at(training.state["step"], steps, warmup, schedule)',
        'factor = lr_at(training.state["step"], steps, warmup)',
        f"{TRAIN}::test_the_learning_rate_follows_upstreams_schedules",
        "every schedule is a cosine",
    ),
    Mutant(
        "pruning/train.py",
        "ids = (tokenizer(text).input_ids + [tokenizer.eos_token_id])[:max_length]",
        "ids = tokenizer(text).input_ids[:max_length]",
        f"{TRAIN}::test_a_text_is_cut_ends_with_the_end_token_and_padding_is_not_scored",
        "no end-of-text token is learnt",
    ),
    Mutant(
        "pruning/train.py",
        '"labels": padded(ids, -100),',
        '"labels": padded(ids),',
        f"{TRAIN}::test_a_text_is_cut_ends_with_the_end_token_and_padding_is_not_scored",
        "padding is scored",
    ),
    Mutant(
        "pruning/train.py",
        '"alpha": 4 * r if alpha is None else alpha,',
        '"alpha": 4 * r,',
        LANGUAGE,
        "--lora-alpha ignored for a new LoRA",
    ),
    Mutant("pruning/report_model.py", "        args.flip,\n", "        0.0,\n", REPORTS, "--flip ignored"),
    Mutant(
        "pruning/report_model.py",
        '"dropout": dropout, "targets": lora.target_modules}',
        '"dropout": 0.0, "targets": lora.target_modules}',
        REPORTS,
        "--lora-dropout reaches no report model's settings",
    ),
    # --- loading and scoring report models
    Mutant(
        "pruning/report_model.py",
        'ours = "parameters_after" in prune_map',
        "ours = True",
        f"{REPORT}::test_alpha_that_upstream_guessed_is_not_believed",
        "upstream's guessed alpha halves LoRA's strength",
    ),
    Mutant(
        "pruning/report_model.py",
        'wrong = [f"{k} is missing" for k in wanted if k not in tensors]',
        "wrong = []",
        f"{REPORT}::test_what_does_not_fit_is_named",
        "missing tensors stay random",
    ),
    Mutant(
        "pruning/report_model.py",
        "bootstrap(micro_f1, labels, reported),",
        "bootstrap(micro_f1, labels, reported, draws=2),",
        f"{REPORT}::test_scores_of_reports_are_those_of_scikit_learn_and_their_interval_is_of_95_percent",
        "an interval of two draws",
    ),
    Mutant(
        "pruning/report_model.py",
        "(labels != -100).double().sum(1)], 1",
        "(labels != -101).double().sum(1)], 1",
        f"{REPORT}::test_task_prompts_hold_the_volume_and_score_the_report",
        "the prompt's tokens count as scored",
    ),
    Mutant(
        "pruning/test.py",
        "return sorted(values)[round((len(values) - 1) * fraction)]",
        "return sorted(values)[round(len(values) * fraction) - 1]",
        f"{REPORT}::test_percentiles_are_nearest_rank",
        "percentiles one rank too low",
    ),
    Mutant(
        "pruning/test.py",
        "[some.sum().item(), len(some)] for some in losses]",
        "[some.sum().item(), len(some) + 1] for some in losses]",
        f"{TRAIN}::test_plain_language_models_heal_and_test_on_texts",
        "perplexity of a loss summed over one token too many",
    ),
    Mutant(
        "pruning/test.py",
        "model, text, config, args.data, args.split, args.limit",
        'model, text, config, args.data, "train", args.limit',
        f"{REPORT}::test_testing_writes_upstreams_files",
        "training records are tested",
    ),
    # --- scanning
    Mutant(
        METRICS,
        "return values[..., -1]",
        "return values[..., 0]",
        f"{SCAN}::test_distances_are_those_of_their_formulas",
        "l1_last takes the first position",
    ),
    Mutant(
        METRICS,
        "return (base_logprobs.exp() * (difference + torch.expm1(-difference))).sum(-1)",
        "return (base_logprobs.exp() * difference).sum(-1)",
        f"{SCAN}::test_kl_of_a_tiny_change_keeps_its_digits",
        "kl loses its small values in float32",
    ),
    Mutant(
        METHODS,
        "labels[1:], labels.new_full((1,), -100)",
        "labels[:-1], labels.new_full((1,), -100)",
        f"{SCAN}::test_leave_one_out_is_the_model_without_that_layer",
        "each position is scored on its own token",
    ),
    Mutant(
        METHODS,
        "1 - torch.cosine_similarity(x[p, :n].double(), y[p, :n].double(), dim=-1)",
        "1 - torch.cosine_similarity(x[p].double(), y[p].double(), dim=-1)",
        f"{SCAN}::test_a_batch_of_unequal_prompts_gives_each_its_own_scores",
        "padding counts for block influence",
    ),
    Mutant(
        METHODS,
        "self.last_token[p].append(y[p, n - 1].clone())",
        "self.last_token[p].append(y[p, -1].clone())",
        f"{SCAN}::test_angles_are_those_of_the_last_token_in_half_turns",
        "the angle of a padding position",
    ),
    Mutant(
        "pruning/sensitivity_analyse/layer_mask.py",
        "keep = torch.arange(heads * head_dim) // head_dim != head",
        "keep = torch.arange(heads * head_dim) % heads != head",
        f"{SCAN}::test_a_head_that_is_off_takes_no_part_in_the_output_projection",
        "a head's features taken across all heads",
    ),
    Mutant(
        "pruning/sensitivity_analyse/layer_sensitivity_scan.py",
        'kind, value = "nll_change", value - record["nll"]',
        'kind, value = "nll_change", value',
        f"{STUDY}::test_changes_of_the_loss_are_against_the_whole_model",
        "the loss itself is called its change",
    ),
    # --- choosing
    Mutant(
        CHOOSE,
        "sorted(range(len(scores)), key=scores.__getitem__)[:count]",
        "sorted(range(len(scores)), key=scores.__getitem__)[-count:]",
        f"{SCAN}::test_single_shot_criteria_take_the_lowest_scores",
        "the layers that matter most are removed",
    ),
    Mutant(
        CHOOSE,
        "range(layers - count + 1)]",
        "range(layers - count)]",
        f"{SCAN}::test_single_shot_criteria_take_the_lowest_scores {SCAN}::test_window_is_the_best_window",
        "the last window is never looked at",
    ),
    Mutant(
        CHOOSE,
        "        order.remove(0)\n",
        "        order.remove(layers - 1)\n",
        f"{SCAN}::test_single_shot_criteria_take_the_lowest_scores",
        "random_keep0 keeps the last layer",
    ),
    Mutant(
        CHOOSE,
        "order = random.Random(seed).sample(range(layers), layers)",
        "order = random.sample(range(layers), layers)",
        f"{SCAN}::test_single_shot_criteria_take_the_lowest_scores",
        "random sets are not those of their seed",
    ),
    Mutant(
        CHOOSE,
        "math.ceil((total - target) / each)",
        "round((total - target) / each)",
        f"{SCAN}::test_budget_is_met_with_as_few_layers_as_possible",
        "the parameter budget is passed by",
    ),
    # --- pruning on disk
    Mutant(
        PRUNE,
        "scale = lora.alpha / lora.r",
        "scale = 2.0",
        f"{TOOLS}::test_lora_keeps_its_strength_in_all_three_results",
        "LoRA merged with upstream's guess of alpha",
    ),
    Mutant(
        PRUNE,
        "layer_id_map = dict(enumerate(i for i in range(llm.layers) if i not in drop))",
        "layer_id_map = {i: i for i in range(llm.layers) if i not in drop}",
        f"{TOOLS}::test_dtype_and_tying_are_kept",
        "kept layers keep their old numbers",
    ),
    Mutant(
        "pruning/layers.py",
        "contiguous = last - first + 1 == len(drop_layers)",
        "contiguous = last - first == len(drop_layers)",
        "tests/test_golden_pruning.py",
        "upstream's names of contiguous sets are lost",
    ),
    Mutant(
        "pruning/layers.py",
        "        setattr(module, field, new)\n",
        "        setattr(module, field, new + 1)\n",
        f"{SCAN}::test_generation_without_layers_equals_a_model_built_smaller",
        "the KV cache of kept layers is addressed one off",
    ),
    Mutant(
        "pruning/pruning_tools/count_params.py",
        "2 * heads * head_dim, 2 * kv_heads * head_dim",
        "2 * heads * head_dim, kv_heads * head_dim",
        f"{TOOLS}::test_counting_pangu_and_its_published_drops",
        "the KV-cache without its values",
    ),
    # --- the study
    Mutant(
        "studies/pruning/tables.py",
        "np.percentile(draws, (2.5, 97.5))",
        "np.percentile(draws, (5, 95))",
        f"{STUDY}::test_quality_is_micro_f1_and_perplexity_and_its_interval_is_of_95_percent",
        "a 90 % interval called one of 95 %",
    ),
    Mutant(
        "studies/pruning/tables.py",
        'return "better" if (difference > 0) == (metric == "f1") else "worse"',
        'return "better" if difference > 0 else "worse"',
        f"{STUDY}::test_a_verdict_needs_an_interval_without_zero_and_knows_which_way_is_good",
        "a high perplexity counts as better",
    ),
    Mutant(
        "studies/pruning/tables.py",
        "draws = np.stack([score(resampled(r)) for r in rows])",
        "draws = np.stack([score(resampled(r, i)) for i, r in enumerate(rows)])",
        f"{STUDY}::test_the_bootstrap_draws_the_same_reports_for_every_set",
        "differences are not paired",
    ),
    Mutant(
        "studies/pruning/tables.py",
        "return value, np.take_along_axis(draws, sets, 0).mean(0)",
        "return value, draws.mean(0)",
        f"{STUDY}::test_the_interval_of_a_random_control_covers_its_sets",
        "the interval of random controls leaves out the draw of sets",
    ),
    Mutant(
        "studies/pruning/study.py",
        'self.test_set = self.encoded(args, "test", args.test_samples)',
        'self.test_set = self.encoded(args, "train", args.test_samples)',
        f"{STUDY}::test_what_is_chosen_on_and_healed_on_is_no_test_sample",
        "the study scores training records",
    ),
    Mutant(
        "studies/pruning/study.py",
        "report_model.task_prompts(self.model, self.text, self.train_set)",
        "report_model.task_prompts(self.model, self.text, self.test_set)",
        f"{STUDY}::test_what_is_chosen_on_and_healed_on_is_no_test_sample",
        "layers are chosen on test records",
    ),
    Mutant(
        "studies/pruning/study.py",
        "                parameter.copy_(lora[name])",
        "                pass",
        f"{STUDY}::test_the_study_leaves_the_model_as_it_was_and_reuses_equal_sets",
        "each set starts from the healing of the one before",
    ),
    # --- one contract for every architecture
    Mutant(
        "pruning/shorter.py",
        "return sum(old < value for old in keep)",
        "return sum(old <= value for old in keep)",
        "tests/test_pruning_zoo.py",
        "one dense layer too many",
    ),
    Mutant(
        "pruning/shorter.py",
        "base = int(name in ONE_BASED)",
        "base = 0",
        "tests/test_pruning_zoo.py",
        "lists that count layers from 1 are read as if from 0",
    ),
    Mutant(
        "pruning/shorter.py",
        "dense |= {i for i in range(count) if (i + 1) % step}",
        "dense |= {i for i in range(count) if i % step}",
        "tests/test_pruning_zoo.py",
        "the rhythm of experts is one off",
    ),
    Mutant(
        "pruning/pruning_tools/read_back.py",
        'wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]',
        "wrong = []",
        "tests/test_pruning_zoo.py::test_what_is_written_is_read_back_before_it_is_there",
        "a folder with missing tensors is called done",
    ),
    Mutant(
        "pruning/repair.py",
        'if loss < row["loss_after"]:\n                row |= {"ridge": ridge',
        'if True:\n                row |= {"ridge": ridge',
        "tests/test_pruning_repair.py",
        "a map is kept whatever the held-out texts say",
    ),
    Mutant(
        "pruning/pruning_tools/prune_width.py",
        "score = score * norm.sqrt().to(score)",
        "score = score * norm.to(score)",
        f"{TOOLS}::test_wanda_weighs_by_the_inputs_of_the_pruned_layers_before",
        "Wanda weighs by squared norms",
    ),
]
