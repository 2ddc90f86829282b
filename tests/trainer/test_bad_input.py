"""What the trainer refuses, when, and in which words."""

from unittest import mock

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl import GRPOConfig

from trl_dpg.metrics import LMHeadNorm, LMHeadPattern
from trl_dpg.testing import save_tiny_models, tiny_prompts


class ModelLoadedError(Exception):
    """Raised in place of loading a model."""


@pytest.fixture
def no_loading():
    """Makes loading a model by name an error."""
    with mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=ModelLoadedError) as patched:
        yield patched


@pytest.fixture
def names(tmp_path):
    generator, target = save_tiny_models(tmp_path)
    return {"model": generator, "target_model": target, "processing_class": None, "target_processing_class": None}


class TestBeforeAnyModelIsLoaded:
    def test_good_input_loads(self, make_trainer, names, no_loading):
        with pytest.raises(ModelLoadedError):
            make_trainer(**names)
        assert no_loading.called

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"target_completion_only_loss": True}, "`target_completion_only_loss` in the trainer. needs a prompt"),
            ({"target_assistant_only_loss": True}, "`target_assistant_only_loss` in the trainer. needs messages"),
            (
                {"train_dataset": Dataset.from_dict({"prompt": []})},
                "`train_dataset` is empty. Pass at least one prompt",
            ),
            (
                {"train_dataset": tiny_prompts(1, 1)["train"]},
                r"`train_dataset` has 1 prompts, but one generation batch needs 2 \(`generation_batch_size` 8 / "
                r"`num_generations` 4\).*Add prompts or lower `per_device_train_batch_size`",
            ),
            (
                {"train_dataset": tiny_prompts(7, 1)["train"], "gradient_accumulation_steps": 4},
                "has 7 prompts, but one generation batch needs 8",
            ),
            (
                {"train_dataset": Dataset.from_dict({"text": ["the red sun"] * 9})},
                r"`train_dataset` has the columns \['text'\] but no `prompt`",
            ),
            (
                {"train_dataset": Dataset.from_dict({"prompt": ["the red sun"] * 9, "completions": [1] * 9})},
                r"`train_dataset` has the columns \['completions'\].*Rename them",
            ),
            ({"train_dataset": None}, "`train_dataset` must be a `datasets.Dataset`.*got NoneType.*`reset` writes"),
            (
                {"train_dataset": Dataset.from_dict({"environment": ["game"] * 16})},
                "no `prompt`.*`reset` writes the prompts, give each row the prompt",
            ),
            ({"train_dataset": ["the red sun"] * 9}, "`train_dataset` must be a `datasets.Dataset`.*got list"),
            ({"eval_dataset": Dataset.from_dict({"prompt": []})}, "`eval_dataset` is empty"),
            (
                {"eval_dataset": Dataset.from_dict({"text": ["a"]})},
                "`eval_dataset` has the columns .* but no `prompt`",
            ),
            (
                {"eval_dataset": {"near": tiny_prompts(1, 1)["test"], "far": Dataset.from_dict({"prompt": []})}},
                "`far` is empty",
            ),
            (
                {"target_model": None},
                "`target_model` is missing. Pass the model that the generated data is to fine-tune",
            ),
            ({"metric": "lm_head_norm"}, "`metric` must be a function.*got 'lm_head_norm'"),
            ({"metric": None}, "`metric` must be a function.*got None"),
        ],
    )
    def test_refused(self, make_trainer, names, no_loading, kwargs, message):
        with pytest.raises(ValueError, match=message):
            make_trainer(**{**names, **kwargs})
        assert not no_loading.called

    @pytest.mark.parametrize("args", [GRPOConfig("out", use_cpu=True, bf16=False), {"target_optim": "sgd"}])
    def test_arguments_of_another_class(self, make_trainer, names, no_loading, args):
        with pytest.raises(
            ValueError, match=f"`args` must be a `DatasetPolicyGradientConfig`, got {type(args).__name__}"
        ):
            make_trainer(**names, args=args)
        assert not no_loading.called

    def test_field_changed_after_the_configuration_was_made(self, make_trainer, make_config, names, no_loading):
        config = make_config()
        config.target_learning_rate = -1.0
        with pytest.raises(ValueError, match="`target_learning_rate` must be a finite number above 0, got -1.0"):
            make_trainer(**names, args=config)
        assert not no_loading.called

    def test_reward_that_does_not_exist(self, make_trainer, names, no_loading):
        with pytest.raises(ValueError, match="`reward` must be 'metagradient'.*got 'nonsense'"):
            make_trainer(**names, reward="nonsense")
        assert not no_loading.called

    def test_target_without_a_tokenizer(self, make_trainer, names, no_loading, causal_lm, tmp_path):
        causal_lm().save_pretrained(tmp_path / "bare")
        with pytest.raises(
            ValueError, match="no tokenizer could be loaded from the target's name .*`target_processing_"
        ):
            make_trainer(**{**names, "target_model": str(tmp_path / "bare")})
        assert not no_loading.called

    def test_target_that_does_not_exist(self, make_trainer, names, no_loading, tmp_path):
        missing = str(tmp_path / "missing")
        with pytest.raises(ValueError, match=f"no tokenizer could be loaded from the target's name '{missing}'"):
            make_trainer(**{**names, "target_model": missing})
        assert not no_loading.called


class TestOnceTheTargetIsThere:
    def test_same_object(self, make_trainer, causal_lm):
        model = causal_lm()
        with pytest.raises(ValueError, match="`target_model` and `model` are the same object"):
            make_trainer(model=model, target_model=model)

    def test_no_name_to_load_a_tokenizer_from(self, make_trainer):
        with pytest.raises(ValueError, match="no tokenizer could be loaded from the target's name ''"):
            make_trainer(target_processing_class=None)

    def test_tokenizer_of_another_model(self, make_trainer, causal_lm):
        with pytest.raises(
            ValueError, match="64 tokens, but the target model only 32 rows.*`target_processing_class`"
        ):
            make_trainer(target_model=causal_lm(vocab_size=32))

    def test_it_is_refused_before_the_generator_is_loaded(self, make_trainer, causal_lm, names, no_loading):
        kwargs = {"model": names["model"], "target_model": causal_lm(vocab_size=32)}
        with pytest.raises(ValueError, match="only 32 rows"):
            make_trainer(**kwargs)
        assert not no_loading.called

    def test_target_without_a_head(self, make_trainer, causal_lm):
        with pytest.raises(ValueError, match="GPT2Model, which has no language-modeling head"):
            make_trainer(target_model=causal_lm().transformer)

    def test_tied_head(self, make_trainer, causal_lm):
        target = causal_lm(seed=1, tie_word_embeddings=True)
        with pytest.raises(ValueError, match="tied to its input embedding.*`target_untie_lm_head=True`"):
            make_trainer(target_model=target, metric=LMHeadPattern([[1, -1]]))

    def test_nothing_to_train(self, make_trainer, causal_lm):
        """As in a quantized model without adapters."""
        target = causal_lm(seed=1).requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameter.*quantized.*`target_peft_config=LoraConfig"):
            make_trainer(target_model=target, metric=LMHeadNorm())

    def test_half_precision_target(self, make_trainer, causal_lm):
        with pytest.raises(ValueError, match="bfloat16.* too coarse.*`dtype=torch.float32`"):
            make_trainer(target_model=causal_lm(seed=1).bfloat16())

    def test_metric_that_does_not_depend_on_the_target(self, make_trainer):
        with pytest.raises(ValueError, match="`metric` returned a tensor that is cut off from the model"):
            make_trainer(metric=lambda model: model.lm_head.weight.detach().norm()).train()

    def test_metric_that_is_no_scalar(self, make_trainer):
        with pytest.raises(ValueError, match=r"`metric` must return a scalar tensor, got one of shape \(64, 16\)"):
            make_trainer(metric=lambda model: model.lm_head.weight).train()

    def test_pattern_larger_than_the_head(self, make_trainer):
        metric = LMHeadPattern([[1] * 3] * 17)
        with pytest.raises(ValueError, match=r"`pattern` of shape \(17, 3\) does not fit"):
            make_trainer(metric=metric)

    def test_completions_longer_than_the_target(self, make_trainer, causal_lm):
        target = causal_lm(seed=1, max_position_embeddings=4)
        with pytest.raises(ValueError, match="but `model` has 4 positions.*`max_length` to 4"):
            make_trainer(target_model=target).train()

    def test_empty_completions(self, make_trainer):
        suppressed = [token for token in range(64) if token != 62]
        with pytest.raises(ValueError, match="All 8 completions are empty or one token long"):
            make_trainer(generation_kwargs={"suppress_tokens": suppressed}).train()

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("", "The prompt '' has no tokens"),
            (None, "Column `prompt` holds None, which is neither a text nor a list of messages"),
            ("air " * 27, "prompt of 27 tokens and `max_completion_length` 6 do not fit into the 32 positions"),
        ],
    )
    def test_prompt_of_no_use(self, make_trainer, prompt, message):
        prompts = Dataset.from_dict({"prompt": ["air", prompt] * 8})
        with pytest.raises(ValueError, match=message):
            make_trainer(train_dataset=prompts, per_device_train_batch_size=16, num_generations=4).train()


def stream(rows):
    def read():
        yield from rows

    return IterableDataset.from_generator(read)


class TestEvaluationSets:
    """Those that are passed to a method are held to the same as the trainer's own."""

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (Dataset.from_dict({"prompt": []}), "is empty"),
            (Dataset.from_dict({"text": ["a"]}), r"has the columns \['text'\] but no `prompt`"),
            (stream([]), "is empty"),
            (stream([{"text": "a"}]), "but no `prompt`"),
        ],
    )
    def test_passed_to_a_method(self, make_trainer, dataset, message):
        for method in ("evaluate", "predict"):
            with pytest.raises(ValueError, match=f"_dataset`.* {message}"):
                getattr(make_trainer(), method)(dataset)

    def test_stream_whose_columns_are_known(self, make_trainer, names, no_loading):
        dataset = Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
        for name in ("train_dataset", "eval_dataset"):
            with pytest.raises(ValueError, match=f"`{name}` has the columns .* but no `prompt`"):
                make_trainer(**names, **{name: dataset})
        assert not no_loading.called

    def test_no_set(self, make_trainer, names, no_loading):
        with pytest.raises(ValueError, match="`eval_dataset` is a dict without data sets"):
            make_trainer(**names, eval_dataset={})
        assert not no_loading.called

    def test_workers_that_persist_read_the_set_that_is_passed(self, make_trainer):
        trainer = make_trainer(dataloader_num_workers=1, dataloader_persistent_workers=True)
        own = len(trainer.eval_dataset)
        for number, passed in ((own, None), (1, tiny_prompts(1, 1)["test"]), (own, None)):
            assert trainer.evaluate(passed) and len(trainer.get_eval_dataloader(passed).dataset) == number
        assert len(trainer.predict(tiny_prompts(1, 1)["test"]).predictions) == trainer.num_generations_eval
