"""The engine's inner training, and `validate`, against TRL's own `SFTTrainer`."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients, train_and_measure
from trl_dpg.metagradients.method.loss import TokenLosses
from trl_dpg.metagradients.runtime.examples import micro_batches, prepare_examples
from trl_dpg.metagradients.runtime.processes import Processes
from trl_dpg.validation import validate


VOCAB = 17


def randomized(model):
    """Trained weights of one scale everywhere, so that no bias, norm or adapter starts at 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(0.3 * torch.randn(param.shape, generator=generator) + 0.1)
    return model


def gpt2(tied=False):
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomized(GPT2LMHeadModel(config))


def llama():
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomized(LlamaForCausalLM(config))


def lora():
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
    return randomized(get_peft_model(gpt2(tied=True), config))


MODELS = {"gpt2": gpt2, "gpt2-tied": lambda: gpt2(tied=True), "llama": llama, "gpt2-lora": lora}

RECIPES = {
    "linear-warmup-clipping": {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.05},
    "cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 0.3},
    "constant-weight-decay": {"lr_scheduler_type": "constant", "weight_decay": 0.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.1},
    "warmup-longer-than-training": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9},
    "sgd-constant-weight-decay": {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.5},
    "sgd-linear-clipping": {"optim": "sgd", "max_grad_norm": 0.05},
    "sgd-accumulation": {"optim": "sgd", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def sft_config(tmp_path, **fields):
    # adam_epsilon: attention scores do not depend on the key's bias, so its gradient is rounding noise around 0, which a
    # much smaller value would blow up to whole steps
    defaults = {
        "optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-4, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "max_length": 8, "shuffle_dataset": False,
        "train_sampling_strategy": "sequential", "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return SFTConfig(output_dir=str(tmp_path), **{**defaults, **fields})


def make_examples():
    """Ten, so that the last batch of four is uneven; ragged, partly supervised, some longer than `max_length`."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for i in range(10):
        ids = torch.randint(VOCAB, (4 + 2 * (i % 4),), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]] if i % 2 else ids})
    return examples


def sft(model, config):
    """Final parameters, and loss and gradient norm of every step, by TRL."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), eos_token="w0", pad_token="w0"
    )
    examples = make_examples()
    if model.loss_type != "ForCausalLM":
        # Transformers counts a supervised first token, which nothing predicts, in the loss's denominator unless a model's
        # class is named so. The engine never does.
        examples = [{**e, "labels": [-100, *e["labels"][1:]]} for e in examples]
    trainer = SFTTrainer(
        model=copy.deepcopy(model), args=config, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    params = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return params, [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]


class Recorder:
    """A metric that keeps a copy of the parameters it last saw."""

    def __call__(self, model):
        self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
        return sum(p.double().square().sum() for p in model.parameters() if p.requires_grad)


def assert_same_training(model, actual, expected):
    """Final parameters alike to 1e-6 of their norm, and what training did to them alike to 1e-4 of its norm."""
    initial = dict(model.named_parameters())
    assert actual.keys() == expected.keys() == initial.keys()
    for name, start in initial.items():
        error, moved = (actual[name] - expected[name]).norm(), (expected[name] - start).norm()
        assert error <= 1e-6 * expected[name].norm(), name
        assert error <= 1e-4 * moved, name
        assert (moved > 0) == start.requires_grad, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_trains_as_sft_trainer_does(model, recipe, tmp_path):
    """Same examples, order and recipe: same parameters and same losses, by the engine and by `validate`."""
    model, config = MODELS[model](), sft_config(tmp_path, **RECIPES[recipe])
    expected, losses, grad_norms = sft(model, config)
    assert len(losses) == 6
    if config.max_grad_norm:
        assert max(grad_norms) > min(grad_norms) > config.max_grad_norm  # clipping is at work, in every step
    args = TargetTrainingArguments.from_sft_config(config)

    metric = Recorder()
    with pytest.warns(UserWarning, match="adam_epsilon_root") if args.optim == "adamw" else contextlib.nullcontext():
        out = compute_metagradients(model, make_examples(), metric, args)
    assert_same_training(model, metric.params, expected)
    assert out.losses == pytest.approx(losses, rel=1e-5)

    metric = Recorder()
    result = validate(model, make_examples(), metric, args)
    assert_same_training(model, metric.params, expected)
    assert result["target_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize("model", [gpt2, llama])
def test_trains_under_autocast_as_sft_trainer_does(model, tmp_path):
    """Every step reads the weights that the step before has written, not copies that autocast made of older ones."""
    model = model()
    recipe = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    expected, losses, _ = sft(model, sft_config(tmp_path, **recipe, bf16=True))
    args = dataclasses.replace(TargetTrainingArguments.from_sft_config(sft_config(tmp_path, **recipe)), bf16=True)
    metric = Recorder()
    assert compute_metagradients(model, make_examples(), metric, args).losses == pytest.approx(losses, rel=1e-3)
    rewarded, metric = metric.params, Recorder()
    with torch.autocast("cpu", torch.bfloat16):  # of the caller
        validate(model, make_examples(), metric, args)
    for params in (rewarded, metric.params):
        for name, start in model.named_parameters():
            assert (params[name] - expected[name]).norm() <= 2e-2 * (expected[name] - start).norm(), name


def test_metric_under_autocast():
    """A metric with autocast of its own reads the fine-tuned weights, and not copies from before."""

    def metric(model):
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        return -torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])

    model = gpt2()
    args = TargetTrainingArguments(optim="sgd", learning_rate=1.0)
    out = compute_metagradients(model, make_examples(), metric, args)
    assert abs(out.metric_after - out.metric_before) > 0.1
    assert out.metric_after == validate(model, make_examples(), metric, args)["metric"]

    def in_float32(model):
        ids = torch.tensor([[1, 2, 3, 4]])
        return -torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])

    expected = compute_metagradients(model, make_examples(), in_float32, args)
    assert out.metric_after == pytest.approx(expected.metric_after, rel=2e-2)
    assert (out.metagradients - expected.metagradients).norm() < 5e-2 * expected.metagradients.norm()


def test_losses_are_sums_in_float64():
    """Of float32 losses of tokens: a sum in float32 would be off by 1e-8 and more."""
    model = llama().eval()
    generator = torch.Generator().manual_seed(0)
    examples = [{"input_ids": torch.randint(VOCAB, (16,), generator=generator).tolist()} for _ in range(64)]
    args = TargetTrainingArguments(batch_size=64, learning_rate=1e-3, adam_epsilon_root=1e-9)
    prepared = prepare_examples(examples, args.max_length, VOCAB)
    (batch,) = micro_batches(prepared, next(args.batches(64)), args, None, torch.zeros(1), Processes(None))
    expected = TokenLosses(model, bf16=False)(batch).double().sum().item()
    assert validate(model, examples, Recorder(), args)["target_loss"] == pytest.approx(expected, rel=1e-10)
    assert compute_metagradients(model, examples, Recorder(), args).losses == pytest.approx([expected], rel=1e-10)


UNSUPPORTED = {
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "max_steps": {"max_steps": 3},
    "num_train_epochs": {"num_train_epochs": 1.5},
    "packing": {"packing": True},
    "padding_free": {"padding_free": True},
    "assistant_only_loss": {"assistant_only_loss": True},
    "completion_only_loss": {"completion_only_loss": False},
    "loss_type": {"loss_type": "dft"},
    "truncation_mode": {"truncation_mode": "keep_end"},
    "max_length": {"max_length": None},
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "lr_scheduler_type": {"lr_scheduler_type": "polynomial"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.01},
    "accelerator_config": {"accelerator_config": {"split_batches": True}},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("field", UNSUPPORTED)
def test_from_sft_config_refuses_what_it_cannot_express(field, tmp_path):
    config = sft_config(tmp_path, **UNSUPPORTED[field])
    with pytest.raises(ValueError, match=rf"`{field}"):
        TargetTrainingArguments.from_sft_config(config)


@pytest.mark.parametrize(
    ("fields", "overrides"),
    [
        ({"optim": "adafactor"}, {"optim": "sgd"}),
        ({"num_train_epochs": 1.5}, {"num_train_epochs": 2}),
        ({"max_length": None}, {"max_length": 64}),
        ({"lr_scheduler_type": "polynomial"}, {"lr_scheduler_type": "linear"}),
        ({"train_sampling_strategy": "group_by_length"}, {"shuffle": True}),
        ({}, {"adam_epsilon_root": 1e-6, "batch_size": 3, "micro_batch_size": None, "loss_normalization": "example"}),
    ],
    ids=lambda fields: "-".join(fields) or "supported",
)
def test_from_sft_config_overrides(fields, overrides, tmp_path):
    """An override replaces a field, also one that could not be expressed, and nothing else."""
    args = TargetTrainingArguments.from_sft_config(sft_config(tmp_path, **fields), **overrides)
    stock = TargetTrainingArguments.from_sft_config(sft_config(tmp_path))
    assert args == dataclasses.replace(stock, **overrides)


def test_from_sft_config_leaves_the_loss_to_the_texts(tmp_path):
    """Named among the overrides, which tokens have a loss is known to be settled elsewhere."""
    config = sft_config(tmp_path, assistant_only_loss=True, completion_only_loss=False)
    named = TargetTrainingArguments.from_sft_config(config, assistant_only_loss=None, completion_only_loss=None)
    assert named == TargetTrainingArguments.from_sft_config(sft_config(tmp_path, completion_only_loss=True))


def test_from_sft_config_reads_every_field(tmp_path):
    config = sft_config(
        tmp_path, optim="adamw_torch_fused", learning_rate=3e-4, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.97,
        adam_epsilon=1e-7, lr_scheduler_type="cosine", warmup_steps=0.1, max_grad_norm=2.0, num_train_epochs=3,
        per_device_train_batch_size=5, gradient_accumulation_steps=4, max_length=77,
        train_sampling_strategy="random", seed=9,
    )  # fmt: skip
    assert TargetTrainingArguments.from_sft_config(config) == TargetTrainingArguments(
        optim="adamw", learning_rate=3e-4, weight_decay=0.2, weight_decay_on_norm_and_bias=False, adam_beta1=0.8,
        adam_beta2=0.97, adam_epsilon=1e-7, adam_epsilon_root=0.0, lr_scheduler_type="cosine", warmup_steps=0.1,
        max_grad_norm=2.0, num_train_epochs=3, batch_size=20, micro_batch_size=5, max_length=77, shuffle=True, seed=9,
    )  # fmt: skip


def test_from_sft_config_with_a_warm_up_that_its_schedule_ignores(tmp_path):
    config = sft_config(tmp_path, lr_scheduler_type="constant", warmup_steps=3)
    assert TargetTrainingArguments.from_sft_config(config).learning_rates(99)[0] == config.learning_rate
    assert TargetTrainingArguments.from_sft_config(config, lr_scheduler_type="linear").warmup_steps == 3


@pytest.mark.parametrize(
    "fields",
    [{"train_sampling_strategy": "random"}, {"shuffle_dataset": True}, {"max_grad_norm": None}],
    ids=lambda fields: "-".join(fields),
)
def test_from_sft_config_variants(fields, tmp_path):
    """Either way of shuffling counts; no clipping has two spellings."""
    args = TargetTrainingArguments.from_sft_config(sft_config(tmp_path, **fields))
    assert args.shuffle == ("max_grad_norm" not in fields)
    assert args.max_grad_norm == 0.0


@pytest.mark.parametrize(("run", "sweeps"), [(train_and_measure, 1), (compute_metagradients, 2)])
def test_the_bar_ends_where_the_run_does(monkeypatch, run, sweeps):
    """One step of it for each of the run, and one for each of the way back, if there is one."""
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("trl_dpg.metagradients.run.tqdm", Bar)
    examples = [{"input_ids": [1, 2, 3 + i]} for i in range(6)]
    args = TargetTrainingArguments(batch_size=2, adam_epsilon_root=1e-6, disable_tqdm=False)
    run(gpt2(), examples, lambda model: -model.lm_head.weight.norm(), args)
    assert set(bars) == {(3 * sweeps, 3 * sweeps)}
