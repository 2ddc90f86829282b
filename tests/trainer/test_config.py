import dataclasses
import json

import pytest
import torch
from trl import GRPOConfig, ModelConfig, TrlParser

from trl_dpg import DatasetPolicyGradientConfig
from trl_dpg.metagradients import TargetTrainingArguments


# `target_` fields of the configuration and the recipe's fields behind them
RECIPE = {
    f"target_{field.name}": field.name
    for field in dataclasses.fields(TargetTrainingArguments)
    if field.name != "disable_tqdm"
}

OUT_OF_RANGE = [
    ("target_optim", "adam"),
    ("target_learning_rate", 0.0),
    ("target_learning_rate", -1e-5),
    ("target_learning_rate", float("inf")),
    ("target_learning_rate", float("nan")),
    ("target_learning_rate", "1e-5"),
    ("target_weight_decay", -0.1),
    ("target_weight_decay_on_norm_and_bias", "no"),
    ("target_momentum", 1.0),
    ("target_nesterov", "yes"),
    ("target_adam_beta1", 1.0),
    ("target_adam_beta1", -0.1),
    ("target_adam_beta2", 1.5),
    ("target_adam_epsilon", -1e-8),
    ("target_adam_epsilon_root", -1e-9),
    ("target_adam_epsilon_root", "-1e-9"),
    ("target_adam_epsilon_root", "automatic"),
    ("target_adam_epsilon_root", None),
    ("target_lr_scheduler_type", "polynomial"),
    ("target_warmup_steps", -1),
    ("target_max_grad_norm", -1.0),
    ("target_num_train_epochs", 0),
    ("target_num_train_epochs", 1.5),
    ("target_batch_size", 0),
    ("target_batch_size", 2.5),
    ("target_micro_batch_size", 0),
    ("target_micro_batch_tokens", 0),
    ("target_max_length", 1),
    ("target_shuffle", "yes"),
    ("target_seed", -1),
    ("target_loss_normalization", "tokens"),
    ("target_curvature", "approximate"),
    ("target_curvature_tolerance", -1.0),
    ("target_bf16", "yes"),
    ("target_gradient_checkpointing", 1),
    ("target_tape", "cloud"),
    ("target_tape_dir", "no/such/directory"),
]


def parse(*flags, config=None, tmp_path=None):
    """What TRL's parser makes of a YAML file and flags."""
    args = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", *flags]
    if config is not None:
        path = tmp_path / "config.yaml"
        path.write_text(config)
        args += ["--config", str(path)]
    (parsed,) = TrlParser((DatasetPolicyGradientConfig,)).parse_args_and_config(args)
    return parsed


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"target_optim": "muon"}, "target_optim='muon'"),
        ({"target_variants": [{}, {"optim": "muon"}]}, "target_optim='muon'"),
        ({"target_variants": [{"head_seed": 1}]}, "`head_seed` in `target_variants`"),
    ],
)
def test_what_shards_do_not_go_with(make_config, fields, name):
    make_config(**fields)
    with pytest.raises(ValueError, match=f"`target_fsdp=True` does not go with .*{name}"):
        make_config(**fields, target_fsdp=True)


class TestDefaults:
    def test_recipe(self, make_config):
        config = make_config()
        assert config.reward == "metagradient"
        assert config.scale_rewards == "none"
        assert config.target_adam_epsilon_root == "auto"
        assert config.target_batch_size is None
        recipe = TargetTrainingArguments(adam_epsilon_root="auto", batch_size=8, max_length=7, disable_tqdm=True)
        assert config.target_training_arguments() == recipe

    def test_every_field_of_the_recipe_is_there(self, make_config):
        fields = {field.name for field in dataclasses.fields(DatasetPolicyGradientConfig)}
        ours = fields - {field.name for field in dataclasses.fields(GRPOConfig)}
        others = {
            "reward",
            "nonfinite",
            "cross_group_batching",
            "credit_assignment",
            "credit_candidates",
            "credit_discount",
            "reward_language",
            "replay_ratio",
            "save_generated",
            "target_model_init_kwargs",
            "target_fsdp",
            "target_untie_lm_head",
            "target_variants",
            "target_completion_only_loss",  # of the texts, not of the recipe
            "target_assistant_only_loss",
        }
        assert ours == {*others, *RECIPE}
        values = {
            "target_optim": "sgd",
            "target_learning_rate": 0.1,
            "target_weight_decay": 0.2,
            "target_weight_decay_on_norm_and_bias": False,
            "target_momentum": 0.6,
            "target_nesterov": True,
            "target_adam_beta1": 0.3,
            "target_adam_beta2": 0.4,
            "target_adam_epsilon": 1e-3,
            "target_adam_epsilon_root": 1e-4,
            "target_lr_scheduler_type": "cosine",
            "target_warmup_steps": 0.5,
            "target_max_grad_norm": 0.5,
            "target_num_train_epochs": 3,
            "target_batch_size": 4,
            "target_micro_batch_size": 5,
            "target_micro_batch_tokens": 500,
            "target_max_length": 6,
            "target_shuffle": False,
            "target_seed": 7,
            "target_loss_normalization": "example",
            "target_gradient_checkpointing": True,
            "target_curvature": "central_difference",
            "target_curvature_tolerance": 0.5,
            "target_tape": "disk",
            "target_tape_dir": "tests",
        }
        recipe = make_config(**values).target_training_arguments()
        for name, value in values.items():
            assert getattr(recipe, RECIPE[name]) == value
        assert set(RECIPE) - set(values) == {"target_bf16"}  # not with central differences
        assert make_config(target_bf16=True).target_training_arguments().bf16

    @pytest.mark.parametrize(
        ("config", "size"),
        [
            ({}, 8),
            ({"gradient_accumulation_steps": 3}, 24),
            ({"steps_per_generation": 2}, 16),
            ({"generation_batch_size": 32}, 32),
            ({"steps_per_generation": 2, "target_batch_size": 5}, 5),
        ],
    )
    def test_batch_size_is_the_generation_batch(self, make_config, config, size):
        assert make_config(**config).target_training_arguments().batch_size == size

    def test_progress_bar_follows_the_trainer(self, make_config):
        assert make_config(disable_tqdm=True).target_training_arguments().disable_tqdm is True
        assert make_config(disable_tqdm=False).target_training_arguments().disable_tqdm is None

    @pytest.mark.parametrize("scale", ["group", "none", False])
    def test_scale_rewards_can_be_changed(self, make_config, scale):
        assert make_config(scale_rewards=scale).scale_rewards == (scale or "none")


class TestBestModel:
    def test_defaults(self, make_config):
        config = make_config(
            load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
        )
        assert config.metric_for_best_model == "eval_metric"
        assert config.greater_is_better is True

    def test_another_metric_is_kept(self, make_config):
        config = make_config(
            load_best_model_at_end=True,
            metric_for_best_model="eval_target_loss",
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
        )
        assert config.metric_for_best_model == "eval_target_loss"
        assert config.greater_is_better is False

    def test_saving_the_best(self, make_config):
        config = make_config(eval_strategy="steps", eval_steps=1, save_strategy="best")
        assert (config.metric_for_best_model, config.greater_is_better) == ("eval_metric", True)

    @pytest.mark.parametrize(
        "fields", [{"metric_for_best_model": "loss"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}]
    )
    def test_a_loss_that_does_not_exist(self, make_config, fields):
        with pytest.raises(ValueError, match="`metric_for_best_model` is 'loss', but validation has no such loss"):
            make_config(eval_strategy="steps", eval_steps=1, **fields)

    def test_unset_without_it(self, make_config):
        config = make_config()
        assert config.metric_for_best_model is None
        assert config.greater_is_better is None


class TestParser:
    def test_command_line(self):
        config = parse(
            *("--target_optim", "sgd", "--target_learning_rate", "1e-3", "--target_adam_epsilon_root", "1e-6"),
            *("--target_batch_size", "4", "--target_micro_batch_size", "2", "--target_shuffle", "false"),
            *(
                "--target_untie_lm_head",
                "--target_warmup_steps",
                "0.25",
                "--target_lr_scheduler_type",
                "linear",
                "--scale_rewards",
                "none",
            ),
            *("--target_model_init_kwargs", '{"dtype": "float64", "attn_implementation": "eager"}'),
        )
        assert config.target_optim == "sgd"
        assert config.target_learning_rate == 1e-3
        assert config.target_adam_epsilon_root == 1e-6
        assert (config.target_batch_size, config.target_micro_batch_size) == (4, 2)
        assert config.target_shuffle is False
        assert config.target_untie_lm_head is True
        assert config.target_warmup_steps == 0.25
        assert config.scale_rewards == "none"
        assert config.target_model_init_kwargs == {"dtype": "float64", "attn_implementation": "eager"}

    @pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0.0), ("1e-9", 1e-9), ("0.5", 0.5)])
    def test_epsilon_root_on_the_command_line(self, text, value):
        config = parse("--target_adam_epsilon_root", text)
        assert config.target_adam_epsilon_root == value
        assert type(config.target_adam_epsilon_root) is type(value)

    @pytest.mark.parametrize(
        ("text", "value"), [("auto", "auto"), ("0", 0.0), ("1.0e-9", 1e-9), ("1e-9", 1e-9), ("0.5", 0.5)]
    )
    def test_epsilon_root_in_yaml(self, text, value, tmp_path):
        config = parse(config=f"target_adam_epsilon_root: {text}", tmp_path=tmp_path)
        assert config.target_adam_epsilon_root == value
        assert config.target_training_arguments().adam_epsilon_root == value

    def test_booleans_on_the_command_line(self):
        config = parse()
        assert (config.target_shuffle, config.target_weight_decay_on_norm_and_bias) == (True, True)
        assert config.target_untie_lm_head is False
        config = parse("--no_target_shuffle", "--target_weight_decay_on_norm_and_bias", "no")
        assert (config.target_shuffle, config.target_weight_decay_on_norm_and_bias) == (False, False)
        assert parse("--target_untie_lm_head", "false").target_untie_lm_head is False

    def test_yaml(self, tmp_path):
        text = """
            target_learning_rate: 1.0e-3
            target_adam_epsilon: 1e-7
            target_batch_size: 4
            target_shuffle: false
            target_untie_lm_head: true
            target_model_init_kwargs: {dtype: float64}
            per_device_train_batch_size: 16
            num_generations: 4
        """
        config = parse(config=text, tmp_path=tmp_path)
        assert config.target_learning_rate == 1e-3
        assert config.target_adam_epsilon == 1e-7  # text in YAML, but the parser knows better
        assert config.target_batch_size == 4
        assert config.target_shuffle is False
        assert config.target_untie_lm_head is True
        assert config.target_model_init_kwargs == {"dtype": "float64"}
        assert config.generation_batch_size == 16

    def test_flags_win_over_yaml(self, tmp_path):
        config = parse("--target_batch_size", "2", config="target_batch_size: 4", tmp_path=tmp_path)
        assert config.target_batch_size == 2

    def test_batch_size_is_none_unless_given(self, tmp_path):
        assert parse().target_batch_size is None
        assert parse(config="target_batch_size: null", tmp_path=tmp_path).target_batch_size is None

    def test_beside_model_config(self):
        flags = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--target_batch_size", "2"]
        flags += ["--model_name_or_path", "generator"]
        config, model_config = TrlParser((DatasetPolicyGradientConfig, ModelConfig)).parse_args_and_config(flags)
        assert config.target_batch_size == 2
        assert model_config.model_name_or_path == "generator"

    def test_reward(self):
        config = parse("--reward", "language_identification", "--reward_language", "es")
        assert (config.reward, config.reward_language) == ("language_identification", "es")
        assert config.cross_group_batching is True
        assert parse("--cross_group_batching", "false").cross_group_batching is False
        assert parse("--no_cross_group_batching").cross_group_batching is False

    def test_reward_in_yaml(self, tmp_path):
        config = parse(config="reward: naive\ncross_group_batching: false\n", tmp_path=tmp_path)
        assert (config.reward, config.cross_group_batching) == ("naive", False)

    def test_reward_is_a_choice(self, capsys):
        with pytest.raises(SystemExit):
            parse("--reward", "nonsense")
        assert "invalid choice: 'nonsense'" in capsys.readouterr().err


class TestInitKwargs:
    def test_json_is_parsed(self, make_config):
        assert make_config(target_model_init_kwargs='{"dtype": "float64"}').target_model_init_kwargs == {
            "dtype": "float64"
        }

    def test_fields_of_grpo_config_are_still_parsed(self, make_config):
        config = make_config(model_init_kwargs='{"dtype": "float64"}', generation_kwargs={"top_k": 3})
        assert config.model_init_kwargs == {"dtype": "float64"}
        assert config.generation_kwargs == {"top_k": 3}


class TestRoundTrip:
    VALUES = {
        "target_adam_epsilon_root": 1e-6,
        "target_batch_size": 4,
        "target_shuffle": False,
        "target_untie_lm_head": True,
        "target_model_init_kwargs": {"dtype": "float64"},
        "target_learning_rate": 1e-3,
        "scale_rewards": "group",
    }

    def test_dict(self, make_config):
        values = make_config(**self.VALUES).to_dict()
        assert {name: values[name] for name in self.VALUES} == self.VALUES

    @pytest.mark.parametrize("epsilon_root", ["auto", 1e-6])
    def test_json(self, make_config, epsilon_root):
        config = make_config(**{**self.VALUES, "target_adam_epsilon_root": epsilon_root})
        values = json.loads(config.to_json_string())
        del values["steps_per_generation"]  # derived, and refused by `GRPOConfig` beside `generation_batch_size`
        again = DatasetPolicyGradientConfig(**values)
        assert again.target_training_arguments() == config.target_training_arguments()
        assert {name: getattr(again, name) for name in self.VALUES} == {
            name: getattr(config, name) for name in self.VALUES
        }

    def test_saved_arguments(self, make_config, tmp_path):
        config = make_config(**self.VALUES)
        torch.save(config, tmp_path / "training_args.bin")
        again = torch.load(tmp_path / "training_args.bin", weights_only=False)
        assert again.target_training_arguments() == config.target_training_arguments()


class TestErrors:
    @pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
    def test_out_of_range(self, make_config, name, value):
        with pytest.raises(ValueError, match=f"`{name}` must be .*{'' if value is None else str(value)[:3]}"):
            make_config(**{name: value})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target_lr_scheduler_type": "constant"}, "has no effect, as `target_lr_scheduler_type` is 'constant'"),
            ({}, "leaves nothing to train.*lower `target_batch_size`"),
            ({"target_batch_size": 2, "cross_group_batching": False}, "leaves nothing to train"),
            ({"target_batch_size": 2, "reward": "naive"}, "leaves nothing to train"),
        ],
    )
    def test_warm_up_of_the_target(self, make_config, fields, message):
        schedule = {"target_lr_scheduler_type": "linear", "target_warmup_steps": 0.1}
        with pytest.raises(ValueError, match=f"`target_warmup_steps` 0.1 {message}"):
            make_config(**{**schedule, **fields})
        make_config(**schedule, target_batch_size=4)

    def test_every_field_is_tried(self):
        assert {name for name, _ in OUT_OF_RANGE} == set(RECIPE)

    def test_both_epsilons_zero(self, make_config):
        with pytest.raises(ValueError, match="`target_adam_epsilon` and `target_adam_epsilon_root` are both 0"):
            make_config(target_adam_epsilon=0.0, target_adam_epsilon_root=0.0)

    def test_reward(self, make_config):
        with pytest.raises(ValueError, match="`reward` must be 'metagradient'.*got 'nonsense'"):
            make_config(reward="nonsense")

    def test_language_identification_without_a_language(self, make_config):
        with pytest.raises(ValueError, match="`reward='language_identification'` needs `reward_language`"):
            make_config(reward="language_identification")

    def test_stock_errors_come_through(self, make_config):
        with pytest.raises(ValueError, match="must be divisible by num_generations"):
            make_config(per_device_train_batch_size=6)
