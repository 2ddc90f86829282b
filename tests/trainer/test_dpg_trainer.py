import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from trl_dpg import DatasetPolicyGradientConfig, DatasetPolicyGradientTrainer
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern, Metric
from trl_dpg.testing import save_tiny_models, tiny_prompts
from trl_dpg.validation import validate


TEXTS = ["the red sun", "six seven", "old boat on the sea", "walk to the moon", "cold snow", "you see the blue sky"]
LORA = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def rows(trainer, key):
    """The logged values of a key, in order."""
    return [row[key] for row in trainer.state.log_history if key in row]


WITHOUT_END = {"suppress_tokens": [60, 61, 62, 63]}


def raw_and_metagradients(trainer, args):
    """Metagradients of the last generation batch in the table, and by the engine."""
    target, tokenizer = trainer.target_training.target_model, trainer.processing_class
    examples = [{"input_ids": ids} for ids in tokenizer(list(trainer._logs["completion"]))["input_ids"]]
    return list(trainer._logs["extra"]["metagradient_raw"]), compute_metagradients(
        target, examples, LMHeadNorm(), args
    )


class TestConstruction:
    def test_positional(self, causal_lm, tokenizer, make_config):
        prompts = tiny_prompts(16, 3)
        target, metric, config = causal_lm(seed=1), LMHeadNorm(), make_config()
        trainer = DatasetPolicyGradientTrainer(
            causal_lm(), target, metric, config, prompts["train"], prompts["test"], tokenizer, tokenizer
        )
        assert trainer.target_training.target_model is target
        assert trainer.metric is trainer.target_training.metric is metric
        assert trainer.args is config
        assert trainer.eval_dataset is prompts["test"]
        assert trainer.target_training.args == config.target_training_arguments()

    def test_names(self, make_trainer, tmp_path):
        generator, target = save_tiny_models(tmp_path)
        kwargs = {"model": generator, "target_model": target, "processing_class": None}
        trainer = make_trainer(**kwargs, target_processing_class=None, max_steps=1)
        trainer.train()
        model = trainer.target_training.target_model
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert same(model.state_dict(), AutoModelForCausalLM.from_pretrained(target).state_dict())
        assert len(trainer.target_training.processing_class) == 64
        assert len(rows(trainer, "rewards/metagradient/mean")) == 1

    def test_target_init_kwargs(self, make_trainer, tmp_path):
        _, target = save_tiny_models(tmp_path)
        kwargs = {"dtype": "float64", "attn_implementation": "eager"}
        trainer = make_trainer(target_model=target, target_processing_class=None, target_model_init_kwargs=kwargs)
        model = trainer.target_training.target_model
        assert next(model.parameters()).dtype == torch.float64
        assert model.config._attn_implementation == "eager"
        assert trainer.args.target_model_init_kwargs == kwargs

    def test_same_name_twice(self, make_trainer, tmp_path):
        name, _ = save_tiny_models(tmp_path)
        trainer = make_trainer(model=name, target_model=name)
        assert trainer.target_training.target_model is not trainer.model

    def test_default_arguments(self, monkeypatch, causal_lm, tokenizer, tmp_path):
        class OnCPU(DatasetPolicyGradientConfig):
            def __init__(self, output_dir):
                super().__init__(output_dir, use_cpu=True, bf16=False)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("trl_dpg.trainer.DatasetPolicyGradientConfig", OnCPU)
        model = causal_lm()
        model.config._name_or_path = "somewhere/gpt-tiny"
        trainer = DatasetPolicyGradientTrainer(
            model,
            causal_lm(seed=1),
            LMHeadNorm(),
            train_dataset=tiny_prompts(16, 1)["train"],
            processing_class=tokenizer,
            target_processing_class=tokenizer,
        )
        assert isinstance(trainer.args, OnCPU)
        assert trainer.args.output_dir == "gpt-tiny-DPG"

    def test_untie(self, make_trainer, causal_lm):
        target = causal_lm(seed=1, tie_word_embeddings=True)
        assert target.lm_head.weight is target.transformer.wte.weight
        trainer = make_trainer(target_model=target, target_untie_lm_head=True)
        assert target.lm_head.weight is not target.transformer.wte.weight
        trainer.train()
        assert torch.equal(target.lm_head.weight, target.transformer.wte.weight)

    def test_iterable_datasets(self, make_trainer):
        prompts = [{"prompt": prompt} for prompt in tiny_prompts(16, 1)["train"]["prompt"]]

        def stream():
            yield from prompts

        dataset = IterableDataset.from_generator(stream)
        trainer = make_trainer(train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        assert trainer.state.global_step == 2
        metrics = trainer.evaluate()
        assert round(metrics["eval_samples_per_second"] * metrics["eval_runtime"]) == pytest.approx(64, abs=1)


class TestTraining:
    def test_policy_moves_and_target_does_not(self, make_trainer, weights):
        trainer = make_trainer(learning_rate=1e-2, lr_scheduler_type="constant")
        policy, target = weights(trainer.model), weights(trainer.target_training.target_model)
        trainer.train()
        assert not same(policy, weights(trainer.model))
        assert same(target, weights(trainer.target_training.target_model))
        assert len(rows(trainer, "metagradient/pixel_accuracy")) == 2

    def test_policy_learns(self, make_trainer):
        """The metric likes one of sixteen words: the generator comes to write it."""
        frequencies = []

        def frequency(completion_ids, **kwargs):
            words = [token for ids in completion_ids for token in ids]
            frequencies.append(words.count(3) / len(words))
            return [0.0] * len(completion_ids)

        def metric(model):
            return model(input_ids=torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)[3]

        make_trainer(
            metric=metric,
            reward_funcs=frequency,
            train_dataset=tiny_prompts(64, 1)["train"],
            max_steps=15,
            per_device_train_batch_size=64,
            num_generations=16,
            eval_dataset=None,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            target_optim="sgd",
            target_learning_rate=1e-2,
            generation_kwargs={"suppress_tokens": list(range(16, 64))},
        ).train()
        assert max(frequencies[:2]) < 0.15
        assert min(frequencies[-2:]) > 0.5

    @pytest.mark.parametrize("steps", [1, 2])
    def test_inner_run_of_several_steps(self, make_trainer, steps):
        """By the recipe in the configuration, shuffled anew at every step of the trainer."""
        recipe = {"batch_size": 2, "seed": 5, "optim": "sgd", "learning_rate": 1e-2}
        fields = {f"target_{name}": value for name, value in recipe.items()}
        trainer = make_trainer(**fields, metric=LMHeadNorm(), generation_kwargs=WITHOUT_END, max_steps=steps)
        trainer.train()
        recipe["seed"] += steps - 1
        raw, out = raw_and_metagradients(trainer, TargetTrainingArguments(**recipe))
        assert raw == pytest.approx(out.metagradients.tolist(), rel=1e-4)
        assert len(out.losses) == 4

    def test_whole_generation_batch_is_one_step(self, make_trainer):
        fields = {"gradient_accumulation_steps": 2, "generation_kwargs": WITHOUT_END, "max_steps": 1}
        trainer = make_trainer(**fields, metric=LMHeadNorm())
        trainer.train()
        raw, out = raw_and_metagradients(trainer, TargetTrainingArguments(batch_size=16))
        assert raw == pytest.approx(out.metagradients.tolist(), rel=1e-4) and len(raw) == 16
        assert len(out.losses) == 1

    def test_default_precision_and_checkpointing(self, make_trainer):
        trainer = make_trainer(bf16=True, gradient_checkpointing=True, max_steps=1)
        values = []
        metric = trainer.target_training.metric

        def recording(model):
            values.append((metric(model).dtype, torch.is_autocast_enabled("cpu"), model.lm_head.weight.dtype))
            return metric(model)

        recording.setup = metric.setup
        trainer.target_training.metric = recording
        trainer.train()
        assert set(values) == {(torch.float64, False, torch.float32)}
        assert not trainer.target_training.target_model.is_gradient_checkpointing

    def test_conversational_prompts(self, make_trainer, chat_tokenizer):
        prompts = [[{"role": "user", "content": text}] for text in TEXTS]
        seen = []

        def formatting_func(row):
            seen.append(row)
            return row["completion"][0]["content"]

        trainer = make_trainer(
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            eval_dataset=Dataset.from_dict({"prompt": prompts[:2]}),
            processing_class=chat_tokenizer,
            formatting_func=formatting_func,
        )
        trainer.train()
        assert len(seen) == 16
        assert all(row["prompt"] in prompts and row["completion"][0]["role"] == "assistant" for row in seen)
        assert trainer.evaluate()["eval_metric_gain"] != 0

    def test_generator_of_another_vocabulary(self, make_trainer, causal_lm, bos_tokenizer):
        target = causal_lm(seed=1, vocab_size=63)
        trainer = make_trainer(target_model=target, target_processing_class=bos_tokenizer)
        trainer.train()
        assert trainer.target_training.eos_token_ids == [62, 60]
        assert len(rows(trainer, "metagradient/std")) == 2


class TestAdapters:
    def test_of_the_generator(self, make_trainer, weights):
        trainer = make_trainer(peft_config=LoraConfig(**LORA), learning_rate=1e-2, lr_scheduler_type="constant")
        before = weights(trainer.model)
        trainer.train()
        moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(before[name], tensor)}
        assert moved and all("lora" in name for name in moved)

    def test_of_the_target(self, make_trainer, weights):
        config = LoraConfig(**{**LORA, "target_modules": ["lm_head"], "fan_in_fan_out": False})
        trainer = make_trainer(target_peft_config=config, target_learning_rate=1e-2)
        target = trainer.target_training.target_model
        assert isinstance(target, PeftModel)
        names = [name for name, p in target.named_parameters() if p.requires_grad]
        assert len(names) == 2 and all("lora" in name for name in names)
        before = weights(target)
        trainer.train()
        assert same(before, weights(target))
        assert all(std > 0 for std in rows(trainer, "metagradient/std"))
        assert trainer.evaluate()["eval_metric_gain"] != 0

    def test_of_both(self, make_trainer):
        config = LoraConfig(**{**LORA, "target_modules": ["lm_head"], "fan_in_fan_out": False})
        trainer = make_trainer(peft_config=LoraConfig(**LORA), target_peft_config=config)
        trainer.train()
        assert trainer.state.global_step == 2

    def test_of_the_target_follow_the_seed(self, make_trainer):
        config = LoraConfig(**{**LORA, "target_modules": ["lm_head"], "fan_in_fan_out": False})
        adapters = []
        for seed in (1, 1, 2):
            torch.randn(len(adapters) + 1)
            target = make_trainer(target_peft_config=config, seed=seed).target_training.target_model
            adapters.append({name: tensor for name, tensor in target.state_dict().items() if "lora_A" in name})
        assert same(adapters[0], adapters[1])
        assert not same(adapters[0], adapters[2])


class TestFurtherRewards:
    def test_weights(self, make_trainer):
        def length(completion_ids, **kwargs):
            return [float(len(set(ids))) for ids in completion_ids]

        trainer = make_trainer(
            reward_funcs=length, reward_weights=[1.0, 0.5], max_steps=1, credit_assignment="sequence"
        )
        trainer.train()
        assert trainer.reward_func_names == ["metagradient", "length"]
        logs = {name: torch.tensor(list(values)) for name, values in trainer._logs["rewards"].items()}
        reward = logs["metagradient"] + 0.5 * logs["length"]
        expected = reward.view(2, 4) - reward.view(2, 4).mean(dim=1, keepdim=True)
        torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected.flatten())
        assert logs["length"].std() > 0

    def test_list(self, make_trainer):
        def zero(completions, **kwargs):
            return [0.0] * len(completions)

        def one(completions, **kwargs):
            return [1.0] * len(completions)

        rewards = [zero, one]
        trainer = make_trainer(reward_funcs=rewards, reward_processing_classes=[None, None], max_steps=1)
        trainer.train()
        assert trainer.reward_func_names == ["metagradient", "zero", "one"]
        assert trainer.reward_processing_classes == [None, None, None]
        assert rows(trainer, "rewards/one/mean") == [1.0]
        assert rewards == [zero, one]

    def test_one_weight_too_few(self, make_trainer):
        with pytest.raises(ValueError, match=r"reward weights \(1\) must match number of reward functions \(2\)"):
            make_trainer(reward_funcs=lambda completions, **kwargs: [0.0] * len(completions), reward_weights=[1.0])


class TestEvaluation:
    KEYS = {"metric", "metric_before", "metric_gain", "target_loss", "pixel_accuracy", "empty", "runtime"}

    def test_figures(self, make_trainer, weights):
        trainer = make_trainer(target_learning_rate=1e-2)
        policy, target = weights(trainer.model), weights(trainer.target_training.target_model)
        metrics = trainer.evaluate()
        assert {f"eval_{key}" for key in self.KEYS} <= set(metrics)
        assert metrics["eval_metric_gain"] == metrics["eval_metric"] - metrics["eval_metric_before"]
        assert metrics["eval_metric_gain"] != 0
        assert metrics["eval_metric_before"] == pytest.approx(-0.6931, abs=1e-4)
        assert metrics["eval_empty"] == 0
        assert (
            trainer.state.log_history[-1].items()
            >= {key: value for key, value in metrics.items() if key != "epoch"}.items()
        )
        assert rows(trainer, "eval_completions/mean_length") == [pytest.approx(6, abs=1)]
        assert same(policy, weights(trainer.model))
        assert same(target, weights(trainer.target_training.target_model))

    def test_is_an_ordinary_run_on_the_completions(self, make_trainer, tokenizer):
        trainer = make_trainer(metric=LMHeadNorm(), generation_kwargs=WITHOUT_END)
        output = trainer.predict(trainer.eval_dataset)
        examples = [{"input_ids": ids} for ids in tokenizer(output.predictions)["input_ids"]]
        target, args = trainer.target_training.target_model, trainer.args.target_training_arguments()
        again = validate(target, examples, LMHeadNorm(), args)
        assert {f"test_{name}": value for name, value in again.items()}.items() <= output.metrics.items()

    def test_several_datasets(self, make_trainer):
        datasets = {"near": tiny_prompts(1, 2)["test"], "far": tiny_prompts(1, 3, seed=1)["test"]}
        trainer = make_trainer(eval_dataset=datasets)
        metrics = trainer.evaluate()
        assert {f"eval_{name}_{key}" for name in datasets for key in self.KEYS} <= set(metrics)
        assert len(rows(trainer, "eval_near_metric")) == len(rows(trainer, "eval_far_metric")) == 1
        metrics = trainer.evaluate(datasets["near"], metric_key_prefix="test")
        assert {f"test_{key}" for key in self.KEYS} <= set(metrics)

    @pytest.mark.parametrize("num_generations_eval", [None, 2])
    @pytest.mark.parametrize("num_prompts", [1, 2, 3, 4, 5])
    def test_every_prompt_counts(self, make_trainer, tokenizer, num_prompts, num_generations_eval):
        def repeat(prompts, trainer):
            ids = tokenizer(prompts)["input_ids"]
            return {"prompt_ids": ids, "completion_ids": ids, "logprobs": None}

        prompts = tiny_prompts(1, num_prompts)["test"]
        trainer = make_trainer(rollout_func=repeat, num_generations_eval=num_generations_eval)
        output = trainer.predict(prompts)
        number = num_generations_eval or 4
        assert output.predictions == [prompt for prompt in prompts["prompt"] for _ in range(number)]
        assert output.metrics["test_empty"] == 0

    def test_empty_completions_are_counted(self, make_trainer):
        suppressed = [token for token in range(64) if token not in (5, 62)]
        trainer = make_trainer(generation_kwargs={"suppress_tokens": suppressed}, num_generations_eval=8)
        metrics = trainer.evaluate()
        assert 0 < metrics["eval_empty"] < 24

    def test_all_empty_is_an_error(self, make_trainer):
        suppressed = [token for token in range(64) if token != 62]
        trainer = make_trainer(generation_kwargs={"suppress_tokens": suppressed})
        with pytest.raises(ValueError, match="All 12 completions are empty or one token long"):
            trainer.evaluate()

    def test_evaluation_of_texts(self, make_trainer):
        assert make_trainer(text_evaluation=lambda texts: {"count": len(texts)}).evaluate()["eval_count"] == 12
        for taken in ("metric", "pixel_accuracy", "distinct"):
            trainer = make_trainer(text_evaluation=lambda texts, name=taken: {name: 42.0})
            with pytest.raises(ValueError, match=rf"`text_evaluation` returned \['{taken}'\].*Choose other names"):
                trainer.evaluate()
        with pytest.raises(ValueError, match="`text_evaluation` must return a dict of numbers, got None"):
            make_trainer(text_evaluation=lambda texts: None).evaluate()

    def test_during_training(self, make_trainer):
        trainer = make_trainer(eval_strategy="steps", eval_steps=1, max_steps=3)
        trainer.train()
        assert len(rows(trainer, "eval_metric")) == 3
        assert len(rows(trainer, "metagradient/metric_after")) == 3  # training goes on in train mode
        assert len(set(rows(trainer, "eval_metric"))) == 3  # each time on fresh samples

    def test_without_a_dataset(self, make_trainer):
        with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
            make_trainer(eval_dataset=None).evaluate()


class Given(Metric):
    """Has one value after the other: of the fine-tuned target in each validation."""

    def __init__(self, values):
        self.values = iter(values)
        self.value = 0.0

    def __call__(self, model):
        if not torch.equal(model.lm_head.weight, self.weight):
            self.value = next(self.values)
        return torch.tensor(self.value, dtype=torch.float64)

    def setup(self, model):
        self.weight = model.lm_head.weight.detach().clone()

    def readouts(self, model):
        return {"readout": self.value}


BASELINE = {"reward": "edit_distance", "reference_texts": ["the red sun"]}  # which calls no metric in training


class TestSaving:
    def test_best_model_is_loaded(self, make_trainer, tmp_path, weights):
        trainer = make_trainer(
            metric=Given([0.1, 0.9, 0.5]),
            **BASELINE,
            max_steps=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            load_best_model_at_end=True,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        )
        trainer.train()
        assert trainer.state.best_metric == 0.9
        checkpoints = [tmp_path / "dpg" / f"checkpoint-{step}" for step in (1, 2, 3)]
        assert trainer.state.best_model_checkpoint == str(checkpoints[1])
        saved = [weights(AutoModelForCausalLM.from_pretrained(checkpoint)) for checkpoint in checkpoints]
        assert [same(weights(trainer.model), other) for other in saved] == [False, True, False]

    @pytest.mark.parametrize(
        ("metric", "taken", "best"),
        [
            (None, "eval_one_metric", 2),
            ("eval_metric", "eval_one_metric", 2),
            ("readout", "eval_one_readout", 2),
            ("eval_two_metric", "eval_two_metric", 1),
        ],
    )
    def test_best_of_several_datasets(self, make_trainer, make_config, caplog, metric, taken, best):
        """The first set's figures count, unless another's are named."""
        given = Given([0.1, 0.8, 0.9, 0.2])  # of sets one and two, at steps 1 and 2
        texts = {"reference_texts": BASELINE["reference_texts"]}
        args = make_config(
            reward=BASELINE["reward"],
            load_best_model_at_end=True,
            metric_for_best_model=metric,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        )
        named = args.metric_for_best_model
        prompts = tiny_prompts(4, 2)
        datasets = {"one": prompts["train"], "two": prompts["test"]}
        with caplog.at_level("WARNING", logger="trl_dpg"):
            trainer = make_trainer(args=args, metric=given, eval_dataset=datasets, **texts)
        assert trainer.args.metric_for_best_model == taken and args.metric_for_best_model == named
        assert (f"`metric_for_best_model` is '{taken}'" in caplog.text) == (metric != taken)
        trainer.train()
        assert trainer.state.best_global_step == best

    def test_resume(self, make_trainer, tmp_path, weights):
        config = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        first = make_trainer(**config, max_steps=2)
        first.train()
        resumed = make_trainer(**config, max_steps=3)
        assert not same(weights(first.model), weights(resumed.model))
        calls = []
        reward = resumed.target_training.target_examples

        def counting(*args):
            calls.append(resumed.state.global_step)
            return reward(*args)

        resumed.target_training.target_examples = counting
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3
        assert calls == [2]
        assert rows(resumed, "metagradient/std")[:2] == rows(first, "metagradient/std")
        assert len(rows(resumed, "metagradient/std")) == 3
        assert (tmp_path / "dpg" / "checkpoint-3" / "model.safetensors").is_file()

    def test_resume_keeps_what_auto_measured(self, make_trainer):
        """Measured anew on the resumed run's first batch, the objective would change on the way."""
        config = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        first = make_trainer(**config, max_steps=2, metric=LMHeadPattern([[1, -1]], scale="auto"))
        first.train()
        resumed = make_trainer(**config, max_steps=3, metric=LMHeadPattern([[1, -1]], scale="auto"))
        resumed.train(resume_from_checkpoint=True)
        assert resumed.metric.scale_value == first.metric.scale_value is not None
        roots = rows(resumed, "metagradient/adam_epsilon_root")
        assert len(roots) == 3 and len(set(roots)) == 1

    def test_checkpoint_has_a_card(self, make_trainer, tmp_path):
        make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
        card = (tmp_path / "dpg" / "README.md").read_text()
        assert "# Model Card for dpg" in card and "trained with DPG" in card

    def test_generator_can_be_loaded_alone(self, make_trainer, tmp_path, weights):
        trainer = make_trainer(max_steps=1)
        trainer.train()
        trainer.save_model()
        assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "dpg")), weights(trainer.model))

    def test_decoded_pattern_is_of_the_last_run(self, make_trainer):
        metric = LMHeadPattern([[1, -1], [-1, 1]])
        trainer = make_trainer(metric=metric, target_learning_rate=1e-2)
        metrics = trainer.evaluate()
        accuracy = (metric.decoded == metric.pattern).double().mean().item()
        assert accuracy == metrics["eval_pixel_accuracy"]
