import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trl_dpg import MetagradientReward
from trl_dpg.data import to_target_examples
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadNorm, LMHeadPattern


ARGS = TargetTrainingArguments(learning_rate=1e-3, batch_size=8, adam_epsilon_root=1e-6)
TEXTS = ["the red sun", "six seven", "old boat on the sea", "walk to the moon", "cold snow", "you see the blue sky"]


def ids_of(tokenizer, texts, ended=False):
    """What a generator with this tokenizer would have written."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in ids] if ended else ids


class Recording(MetagradientReward):
    """Keeps what the engine is given, and changes the metagradients that it gives."""

    def __init__(self, *args, seen, change=lambda metagradients: None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.change = seen, change

    def run_each(self, run, *args):
        def recorded(model, examples, metric, args, accelerator):
            self.seen.append(SimpleNamespace(input_ids=[e["input_ids"] for e in examples], args=args))
            out = run(model, examples, metric, args, accelerator=accelerator)
            self.change(out.metagradients)
            return out

        return super().run_each(recorded, *args)


@pytest.fixture
def seen():
    """What the engine is given: the examples and the recipe of each call."""
    return []


@pytest.fixture
def make_reward(causal_lm, tokenizer, seen):
    def make(**kwargs):
        defaults = {"target_model": causal_lm(seed=1), "metric": LMHeadNorm(), "args": ARGS, "seen": seen}
        return Recording(**{**defaults, "processing_class": tokenizer, **kwargs})

    return make


class TestStockTrainer:
    def test_two_steps(self, make_reward, make_grpo_trainer, weights):
        recipe = {"learning_rate": 1e-3, "batch_size": 4, "adam_epsilon_root": 1e-9}
        reward = make_reward(args=TargetTrainingArguments(**recipe))
        before = weights(reward.target_model)
        trainer = make_grpo_trainer(reward, learning_rate=1e-2, lr_scheduler_type="constant", log_completions=True)
        policy = weights(trainer.model)
        trainer.train()
        first, second = trainer.state.log_history[:2]
        for row in (first, second):
            assert row["rewards/metagradient/mean"] == pytest.approx(0, abs=1e-6)
            assert row["rewards/metagradient/std"] == pytest.approx((8 / 7) ** 0.5, rel=1e-5)
            assert row["metagradient/std"] > 0
            assert row["metagradient/min"] < row["metagradient/mean"] < row["metagradient/max"]
            assert row["metagradient/metric_after"] - row["metagradient/metric_before"] == pytest.approx(
                row["metagradient/metric_gain"], abs=1e-5
            )
            assert row["metagradient/lm_head_norm"] == pytest.approx(-row["metagradient/metric_after"])
            assert row["metagradient/adam_epsilon_root"] == pytest.approx(1e-9)
            assert row["metagradient/target_loss"] == pytest.approx(np.log(64), rel=0.05)
            assert row["metagradient/seconds"] > 0
            assert (row["metagradient/nonfinite"], row["metagradient/empty"]) == (0, 0)
        assert first["metagradient/metric_before"] == second["metagradient/metric_before"]
        assert any(not torch.equal(policy[name], tensor) for name, tensor in weights(trainer.model).items())
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(reward.target_model).items())

    def test_raw_values_are_in_the_completions_table(self, make_reward, make_grpo_trainer, tokenizer, tmp_path):
        reward = make_reward()
        make_grpo_trainer(reward, max_steps=1, log_completions=True).train()
        table = pd.read_parquet(tmp_path / "grpo" / "completions" / "completions_00001.parquet")
        examples = [{"input_ids": tokenizer(text)["input_ids"]} for text in table["completion"]]
        raw = compute_metagradients(reward.target_model, examples, LMHeadNorm(), ARGS).metagradients.tolist()
        assert list(table["metagradient_raw"]) == pytest.approx(raw, rel=1e-5)
        assert table["metagradient"].corr(table["metagradient_raw"]) == pytest.approx(1.0)


class TestValues:
    @pytest.mark.parametrize("batch_size", [6, 2])
    def test_equal_the_engine_standardized(self, make_reward, call, log, tokenizer, batch_size):
        args = TargetTrainingArguments(learning_rate=1e-3, batch_size=batch_size, adam_epsilon_root=1e-6)
        reward = make_reward(args=args)
        rewards = call(reward, TEXTS, **log.hooks)
        examples = [{"input_ids": ids} for ids in tokenizer(TEXTS)["input_ids"]]
        out = compute_metagradients(reward.target_model, examples, LMHeadNorm(), args)
        raw = out.metagradients.double()
        assert log.columns == {"metagradient_raw": raw.tolist()}
        assert rewards == pytest.approx(((raw - raw.mean()) / raw.std(correction=0)).tolist())
        assert all(type(value) is float for value in rewards)
        assert np.mean(rewards) == pytest.approx(0) and np.std(rewards) == pytest.approx(1)

        expected = {
            "mean": raw.mean().item(),
            "std": raw.std(correction=0).item(),
            "min": raw.min().item(),
            "max": raw.max().item(),
            "metric_before": out.metric_before,
            "metric_after": out.metric_after,
            "metric_gain": out.metric_after - out.metric_before,
            "adam_epsilon_root": 1e-6,
            "target_loss": sum(out.losses) / len(out.losses),
            "nonfinite": 0,
            "empty": 0,
            "truncated": 6,
            "cut": 0,
            **out.readouts,
        }
        assert log.metrics.pop("seconds") > 0
        assert log.metrics == expected

    def test_hooks_are_optional(self, make_reward, call):
        assert len(call(make_reward(), TEXTS)) == 6

    def test_other_columns_are_ignored(self, make_reward, call):
        reward = make_reward()
        assert call(reward, TEXTS, topic=["a"] * 6, environments=None) == call(reward, TEXTS)

    def test_readouts_are_logged(self, make_reward, call, log):
        call(make_reward(metric=LMHeadPattern([[1, -1]])), TEXTS, **log.hooks)
        assert 0 <= log.metrics["pixel_accuracy"] <= 1

    def test_small_deviations_are_not_blown_up(self, make_reward, call):
        """Below 5 % of the largest deviation so far, rewards shrink with it."""
        stds = [1.0, 0.1, 1e-3]
        values = iter(torch.tensor([1.0, -1.0, 3.0, -3.0]) * s for s in stds)
        reward = make_reward(change=lambda metagradients: metagradients.copy_(next(values)))
        spreads = [np.std(call(reward, ["cat dog"] * 4, ended=True)) for _ in stds]
        assert spreads == pytest.approx([1, 1, 1e-3 / 0.05])

    def test_equal_metagradients(self, make_reward, call, log):
        with pytest.warns(UserWarning, match="All completions of this generation batch have the same value"):
            rewards = call(make_reward(), ["the red sun"] * 6, **log.hooks)
        assert rewards == [0.0] * 6
        assert log.metrics["std"] == 0 and log.metrics["max"] != 0

    def test_seed_follows_the_step(self, make_reward, call, seen):
        args = TargetTrainingArguments(batch_size=2, seed=5, adam_epsilon_root=1e-6)
        reward = make_reward(args=args)
        for step in (0, 3):
            call(reward, TEXTS, trainer_state=SimpleNamespace(global_step=step))
        call(reward, TEXTS)
        assert [c.args.seed for c in seen] == [5, 8, 5]
        assert reward.args == args

    def test_auto_epsilon_root_is_measured_once(self, make_reward, call, log, tokenizer):
        args = TargetTrainingArguments(learning_rate=1e-3, adam_epsilon_root="auto")
        reward = make_reward(args=args)

        def measured(texts):
            examples = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
            return compute_metagradients(reward.target_model, examples, LMHeadNorm(), args).adam_epsilon_root

        first, second = TEXTS[:3], ["the the the the"] * 2 + TEXTS[3:]
        assert measured(first) != pytest.approx(measured(second), rel=1e-2)
        call(reward, first, **log.hooks)
        assert log.metrics["adam_epsilon_root"] == pytest.approx(measured(first))
        assert reward.args.adam_epsilon_root == log.metrics["adam_epsilon_root"]
        call(reward, second, **log.hooks)
        assert log.metrics["adam_epsilon_root"] == pytest.approx(measured(first))

    def test_random_state_and_target_are_as_before(self, make_reward, call, causal_lm, weights):
        target = causal_lm(seed=1).train()
        reward = make_reward(target_model=target, args=TargetTrainingArguments(learning_rate=1e-2, batch_size=2))
        before = weights(target)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        call(reward, TEXTS)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(target).items())
        assert target.training and all(p.requires_grad and p.grad is None for p in target.parameters())


class TestWhatTheTargetSees:
    def test_tokens_of_the_target(self, make_reward, call, causal_lm, bos_tokenizer, seen):
        reward = make_reward(target_model=causal_lm(seed=1, vocab_size=63), processing_class=bos_tokenizer)
        call(reward, TEXTS)
        assert seen[0].input_ids == bos_tokenizer(TEXTS)["input_ids"]
        assert all(ids[0] == bos_tokenizer.bos_token_id for ids in seen[0].input_ids)
        assert [bos_tokenizer.decode(ids[1:]) for ids in seen[0].input_ids] == TEXTS

    def test_eos_only_where_ended(self, make_reward, tokenizer, causal_lm, bos_tokenizer, seen, log):
        eos = tokenizer.eos_token_id
        reward = make_reward(
            target_model=causal_lm(seed=1, vocab_size=63), processing_class=bos_tokenizer, eos_token_ids=[eos, 5]
        )
        ids = ids_of(tokenizer, TEXTS[:4])
        ids[1].append(eos)
        ids[2].append(5)
        reward(prompts=[""] * 4, completions=TEXTS[:4], completion_ids=ids, **log.hooks)
        plain = bos_tokenizer(TEXTS[:4])["input_ids"]
        end = bos_tokenizer.eos_token_id
        assert end != eos
        assert seen[0].input_ids == [plain[0], [*plain[1], end], [*plain[2], end], plain[3]]
        assert log.metrics["truncated"] == 2

    def test_eos_defaults_to_that_of_the_target(self, make_reward, call, tokenizer, seen):
        call(make_reward(), TEXTS[:3], ended=True)
        assert seen[0].input_ids == ids_of(tokenizer, TEXTS[:3], ended=True)

    def test_eos_that_the_tokenizer_adds_is_taken_off(self, make_reward, call, bos_tokenizer, causal_lm, seen):
        from tokenizers.processors import TemplateProcessing

        bos_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        reward = make_reward(target_model=causal_lm(seed=1, vocab_size=63), processing_class=bos_tokenizer)
        call(reward, TEXTS[:2])
        assert seen[0].input_ids == [ids[:-1] for ids in bos_tokenizer(TEXTS[:2])["input_ids"]]

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("eos_token", ["<|im_end|>", "<|endoftext|>"])
    def test_eos_of_a_chat_template(self, eos_token, named):
        """ChatML ends each message and puts a line break behind: one EOS where the completion ended, none where it did not."""
        names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
        backend = Tokenizer(BPE({token: i for i, token in enumerate([*names, *sorted(ByteLevel.alphabet())])}, []))
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        backend.decoder = ByteLevelDecoder()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=eos_token, additional_special_tokens=names
        )
        tokenizer.chat_template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"

        def formatting_func(row):
            return tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)

        def text(ended, content="it is 42\n"):
            completion = [{"role": "assistant", "content": content}]
            prompt = [{"role": "user", "content": "ask"}]
            ids = to_target_examples([prompt], [completion], [ended], tokenizer, formatting_func)[0]["input_ids"]
            return tokenizer.decode(ids)

        if not named:  # special, but not by a name in the tokenizer
            tokenizer.extra_special_tokens = []
            assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in tokenizer.all_special_ids
        whole = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\nit is 42\n"
        assert text(ended=False) == whole
        end = eos_token if eos_token == "<|im_end|>" else f"<|im_end|>\n{eos_token}"
        assert text(ended=True) == whole + end
        # without a template, a completion's own line break stays unless an end is before it
        for ended, end in ((False, ""), (True, eos_token)):
            for body, written in (("a \n", "a \n"), ("a", f"a{eos_token}\n{eos_token}")):
                ids = to_target_examples([""], [written], [ended], tokenizer)[0]["input_ids"]
                assert tokenizer.decode(ids) == body + end

    def test_formatting_func(self, make_reward, call, tokenizer, seen):
        rows = []

        def formatting_func(row):
            rows.append(row)
            return f"{row['prompt']} and {row['completion']}"

        prompts = [f"{word} tree" for word in ("big", "small", "old")]
        call(make_reward(formatting_func=formatting_func), TEXTS[:3], prompts=prompts)
        texts = [f"{prompt} and {text}" for prompt, text in zip(prompts, TEXTS[:3], strict=True)]
        assert [tokenizer.decode(ids) for ids in seen[0].input_ids] == texts
        assert rows == [{"prompt": p, "completion": c} for p, c in zip(prompts, TEXTS[:3], strict=True)]

    def test_formatting_func_must_return_text(self, make_reward, call):
        with pytest.raises(ValueError, match="`formatting_func` must return the text to train on, got 3"):
            call(make_reward(formatting_func=lambda row: 3), TEXTS)

    def test_conversation(self, make_reward, tokenizer, seen):
        prompts = [[{"role": "user", "content": "ask"}]] * 3
        completions = [[{"role": "assistant", "content": text}] for text in TEXTS[:2]]
        completions.append([{"role": "assistant", "content": "go "}, {"role": "assistant", "content": None}])
        completions[-1].append({"role": "assistant", "content": "to sea"})
        texts = [*TEXTS[:2], "go to sea"]
        rewards = make_reward()(prompts=prompts, completions=completions, completion_ids=ids_of(tokenizer, texts))
        assert seen[0].input_ids == tokenizer(texts)["input_ids"]
        assert len(rewards) == 3

    def test_prompt_is_not_seen(self, make_reward, call):
        reward = make_reward()
        assert call(reward, TEXTS, prompts=["bad dog"] * 6) == call(reward, TEXTS)


class TestUnscorable:
    def test_empty_and_one_token(self, make_reward, call, log, tokenizer, seen):
        texts = ["", *TEXTS[:2], "  ", "sun", *TEXTS[2:4]]
        reward = make_reward()
        rewards = call(reward, texts, **log.hooks)
        assert seen[0].input_ids == tokenizer(TEXTS[:4])["input_ids"]
        raw = torch.zeros(7, dtype=torch.float64)
        scored = [1, 2, 5, 6]
        examples = [{"input_ids": ids} for ids in seen[0].input_ids]
        raw[scored] = compute_metagradients(reward.target_model, examples, LMHeadNorm(), ARGS).metagradients.double()
        assert log.columns["metagradient_raw"] == raw.tolist()
        assert [log.columns["metagradient_raw"][i] for i in (0, 3, 4)] == [0.0, 0.0, 0.0]
        assert rewards == pytest.approx(((raw - raw.mean()) / raw.std(correction=0)).tolist())
        assert log.metrics["empty"] == 3 and log.metrics["nonfinite"] == 0

    def test_one_word_is_scored_where_a_bos_precedes_it(self, make_reward, call, log, causal_lm, bos_tokenizer):
        reward = make_reward(target_model=causal_lm(seed=1, vocab_size=63), processing_class=bos_tokenizer)
        call(reward, ["", "sun", *TEXTS[:2]], **log.hooks)
        assert log.metrics["empty"] == 1
        assert [value == 0 for value in log.columns["metagradient_raw"]] == [True, False, False, False]

    def test_no_completion_ids(self, make_reward, tokenizer, log):
        ids = [[], *ids_of(tokenizer, TEXTS[:2])]
        make_reward()(prompts=[""] * 3, completions=["", *TEXTS[:2]], completion_ids=ids, **log.hooks)
        assert (log.metrics["empty"], log.metrics["truncated"]) == (1, 3)

    @pytest.mark.parametrize("texts", [["", "", ""], ["sun", "", "sky"]])
    def test_nothing_to_train_on(self, make_reward, call, texts):
        with pytest.raises(ValueError, match="All 3 completions are empty or one token long"):
            call(make_reward(), texts)

    def test_truncated_are_counted(self, make_reward, tokenizer, log):
        ids = [*ids_of(tokenizer, TEXTS[:2], ended=True), *ids_of(tokenizer, TEXTS[2:])]
        make_reward()(prompts=[""] * 6, completions=TEXTS, completion_ids=ids, **log.hooks)
        assert log.metrics["truncated"] == 4

    def test_cut_are_counted(self, make_reward, call, log):
        args = TargetTrainingArguments(batch_size=4, max_length=3)
        call(make_reward(args=args), ["cat dog sun red", "cat dog sun", "cat dog", "red sun"], **log.hooks)
        assert log.metrics["cut"] == 1

    def test_most_are_cut(self, make_reward, call):
        """As with a prompt before the completion: what is behind it may be all that the generator wrote."""
        args = TargetTrainingArguments(batch_size=4, max_length=2)
        with pytest.warns(UserWarning, match="Most texts have more than 2 .*`target_max_length`"):
            call(make_reward(args=args), ["cat dog sun red", "cat dog sun", "cat dog hat", "red sun"])

    def test_unknown_eos_is_noticed(self, make_reward, call):
        """Completions of different lengths of which none ended: the generator's EOS must be another."""
        with pytest.warns(UserWarning, match="`eos_token_ids`"):
            call(make_reward(), ["cat dog", "cat dog sun"])

    def test_one_nonfinite_metagradient(self, make_reward, call, log):
        def broken(metagradients):
            metagradients[[1, 4]] = torch.tensor([float("nan"), float("inf")])

        reward = make_reward()
        call(reward, TEXTS, **log.hooks)
        raw = np.array(log.columns["metagradient_raw"])[[0, 2, 3, 5]]
        rewards = call(make_reward(change=broken), TEXTS, **log.hooks)
        assert rewards[1] is None and rewards[4] is None
        finite = [rewards[i] for i in (0, 2, 3, 5)]
        assert finite == pytest.approx(((raw - raw.mean()) / raw.std()).tolist())
        assert log.metrics["nonfinite"] == 2
        assert log.metrics["mean"] == pytest.approx(raw.mean()) and log.metrics["max"] == raw.max()

    def test_no_finite_metagradient(self, make_reward, call):
        reward = make_reward(change=lambda metagradients: metagradients.fill_(float("nan")))
        with pytest.raises(FloatingPointError, match="No metagradient of this generation batch is finite"):
            call(reward, TEXTS)

    def test_none_reaches_the_advantages(self, make_reward, make_grpo_trainer):
        reward = make_reward(change=lambda metagradients: metagradients[2].fill_(float("nan")))
        trainer = make_grpo_trainer(reward, max_steps=1)
        trainer.train()
        advantages = list(trainer._logs["advantages"])
        assert advantages[2] == 0.0
        assert all(advantage != 0.0 for i, advantage in enumerate(advantages) if i != 2)
        assert sum(advantages[:4]) == pytest.approx(0, abs=1e-5)
        assert trainer.state.log_history[0]["metagradient/nonfinite"] == 1

    def test_nonfinite_metric_is_an_error(self, make_reward, call):
        reward = make_reward(metric=lambda model: model.lm_head.weight.sum() * float("nan"))
        with pytest.raises(FloatingPointError, match="`metric` returned nan"):
            call(reward, TEXTS)

    def test_target_is_restored_after_an_error(self, make_reward, call, weights):
        def metric(model):
            if torch.is_grad_enabled():  # of the fine-tuned model
                raise RuntimeError("broken metric")
            return model.lm_head.weight.norm()

        reward = make_reward(metric=metric)
        before = weights(reward.target_model)
        with pytest.raises(RuntimeError, match="broken metric"):
            call(reward, TEXTS)
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(reward.target_model).items())


class TestConstruction:
    def test_by_name(self, causal_lm, tokenizer, tmp_path, call):
        causal_lm(seed=1).to(torch.bfloat16).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        reward = MetagradientReward(str(tmp_path), LMHeadNorm(), ARGS)
        assert all(p.dtype == torch.float32 for p in reward.target_model.parameters())
        assert reward.processing_class.get_vocab() == tokenizer.get_vocab()
        assert reward.eos_token_ids == [tokenizer.eos_token_id]
        assert len(call(reward, TEXTS)) == 6

    def test_tokenizer_from_the_name_of_a_model(self, causal_lm, tokenizer, tmp_path):
        causal_lm(seed=1).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        model = causal_lm(seed=1)
        model.config._name_or_path = str(tmp_path)
        assert MetagradientReward(model, LMHeadNorm()).processing_class.get_vocab() == tokenizer.get_vocab()

    def test_no_tokenizer(self, causal_lm):
        with pytest.raises(ValueError, match="no tokenizer could be loaded from the target's name ''"):
            MetagradientReward(causal_lm(), LMHeadNorm())

    def test_no_tokenizer_files(self, causal_lm, tmp_path):
        causal_lm().save_pretrained(tmp_path)
        assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1  # which is no tokenizer
        with pytest.raises(ValueError, match="no tokenizer could be loaded from the target's name"):
            MetagradientReward(str(tmp_path), LMHeadNorm())

    def test_token_without_a_row(self, make_reward, call, causal_lm, tokenizer):
        """As that of images in a text model's tokenizer: it matters only where it occurs, and is refused there."""
        expected = call(make_reward(), TEXTS)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
        reward = make_reward(processing_class=tokenizer)
        assert len(tokenizer) == reward.target_model.config.vocab_size + 1
        assert call(reward, TEXTS) == expected
        with pytest.raises(
            ValueError, match=r"`examples\[1\]` holds token 64 in `input_ids`.*`target_processing_class`"
        ):
            call(reward, [TEXTS[0], "six <image_soft_token> seven"])

    def test_tokenizer_of_another_model(self, causal_lm, tokenizer):
        """No text of its has an end that the model knows."""
        with pytest.raises(
            ValueError, match="has 64 tokens, but the target model only 62 rows.*none for EOS .62.*own"
        ):
            MetagradientReward(causal_lm(vocab_size=62), LMHeadNorm(), processing_class=tokenizer)

    def test_frozen_target(self, causal_lm, make_reward):
        """Refused at once, not after the first generation."""
        with pytest.raises(ValueError, match="no trainable parameter"):
            make_reward(target_model=causal_lm().requires_grad_(False))

    def test_metric_class_instead_of_instance(self, make_reward):
        with pytest.raises(ValueError, match="`metric` must be .*instance"):
            make_reward(metric=LMHeadNorm)

    def test_metric_must_be_callable(self, causal_lm, tokenizer):
        with pytest.raises(ValueError, match="`metric` must be a function.*got 'lm_head_norm'"):
            MetagradientReward(causal_lm(), "lm_head_norm", processing_class=tokenizer)
