"""Where the target's loss stands: token for token, and step for step, as in TRL's own `SFTTrainer`."""

import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

from tests.metagradients.cases import metric, relative_error
from tests.metagradients.test_finite_differences import finite_differences
from tests.test_credit import SMALL
from trl_dpg import MetagradientReward
from trl_dpg.credit import aligned_candidates, token_advantages, written_by
from trl_dpg.credit.alignment import NOT_WRITTEN
from trl_dpg.data import dataset_examples, indices_to_train_on, to_target_examples
from trl_dpg.fine_tuning import TargetFineTuning
from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("s", "e"), ("se", "a"), ("Ġ", "sea")]


def byte_tokenizer(eos="<|im_end|>", bos=False, template=CHATML):
    """Bytes with a few merges, also across the space before a word."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[(special[0], 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token="<|endoftext|>", additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer


PROMPTS = [
    "the sky",
    "a",
    "the sea is",
    "walk to",
    "fill " * 14,
    "o",
    "say the",
    "go",
]
WRITTEN = [" is blue", " sea", " the sea", " the old boat on the sea", " cut off", " the", " end", " far  "]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def turns(prompt):
    """What was said before: of every other prompt more than one turn."""
    return [user("the"), said("sea"), user(prompt)] if len(prompt) % 2 else [user(prompt)]


PAIRS = list(zip(PROMPTS, WRITTEN, strict=True))
FORMATS = {
    "text": lambda row: row["prompt"] + row["completion"],
    "plain": lambda row: row,
    "chat": lambda row: {"prompt": turns(row["prompt"]), "completion": [said(row["completion"])]},
}
TEXTS, PLAIN, CHATS = (
    [FORMATS[kind]({"prompt": p, "completion": c}) for p, c in PAIRS] for kind in ("text", "plain", "chat")
)
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "plain": PLAIN,
    "chat": CHATS,
    "messages": [{"messages": row["prompt"] + row["completion"]} for row in CHATS],
}
CASES = {
    "text": ("text", {}),
    "plain": ("plain", {}),
    "plain-completion-only": ("plain", {"completion_only_loss": True}),
    "plain-everything": ("plain", {"completion_only_loss": False}),
    "chat": ("chat", {}),
    "chat-everything": ("chat", {"completion_only_loss": False}),
    "chat-assistant-only": ("chat", {"completion_only_loss": False, "assistant_only_loss": True}),
    "chat-both": ("chat", {"assistant_only_loss": True}),
    "messages": ("messages", {}),
    "messages-assistant-only": ("messages", {"assistant_only_loss": True}),
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sft(model, rows, tokenizer, directory, **fields):
    config = SFTConfig(
        output_dir=str(directory), learning_rate=1e-2, lr_scheduler_type="constant", adam_epsilon=1e-4, max_grad_norm=0.0,
        per_device_train_batch_size=3, train_sampling_strategy="sequential", bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, num_train_epochs=2, **fields,
    )  # fmt: skip
    model = copy.deepcopy(model)
    return SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def prepared(trainer):
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def labelled(examples):
    return [(example["input_ids"], example.get("labels", example["input_ids"])) for example in examples]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_a_data_set(case, bos, tmp_path):
    """Tokens and labels of stock preparation, uncut."""
    kind, loss = CASES[case]
    rows, tokenizer = ROWS[kind], byte_tokenizer("<|endoftext|>", bos)
    expected = prepared(sft(llama(), rows, tokenizer, tmp_path, max_length=256, **loss))
    examples = dataset_examples(rows, tokenizer, **loss)
    assert labelled(examples) == expected
    assert any("labels" in example for example in examples) == any(ids != labels for ids, labels in expected)


class Recorder:
    """A metric that keeps a copy of the parameters it last saw."""

    def __call__(self, model):
        self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
        return sum(p.double().square().sum() for p in model.parameters())


def completion_ids(tokenizer, texts, ended=True):
    """What a generator with this tokenizer would have written."""
    end = [tokenizer.eos_token_id] if ended else []
    return [ids + end for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@pytest.mark.filterwarnings("ignore:`adam_epsilon_root` is 0")
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("messages")])
def test_trains_as_sft_trainer_does(case, tmp_path):
    """Of completions that ended: same tokens and labels, batches, losses of steps and final weights."""
    kind, loss = CASES[case]
    model, tokenizer, recorder = llama(), byte_tokenizer(), Recorder()
    trainer = sft(model, ROWS[kind], tokenizer, tmp_path, max_length=64, **loss)
    overrides = dict.fromkeys(loss)  # the texts follow them
    args = TargetTrainingArguments.from_sft_config(trainer.args, **overrides)
    target = TargetFineTuning(model, recorder, args, tokenizer, FORMATS[kind], **loss)
    examples = target.target_examples(PROMPTS, WRITTEN, completion_ids(tokenizer, WRITTEN))
    trained = [examples[i] for i in indices_to_train_on(examples, args.max_length)]
    assert [(ids[:64], labels[:64]) for ids, labels in labelled(trained)] == prepared(trainer)
    assert len(trained) == (8 if case in ("text", "plain-everything", "chat-everything") else 7)  # a prompt fills one

    trainer.train()
    expected = {name: p.detach() for name, p in trainer.model.named_parameters()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert compute_metagradients(model, trained, recorder, args).losses == pytest.approx(losses, rel=1e-6)
    assert_same(recorder.params, expected)
    mean = target.validate(examples, torch.device("cpu"))["target_loss"]
    assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert_same(recorder.params, expected)


def assert_same(params, expected):
    for name, param in params.items():
        assert (param - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(byte_tokenizer()), n_positions=128, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().eval()


def call(reward, prompts=PROMPTS, written=WRITTEN):
    """Raw metagradients and logged figures."""
    columns, figures = {}, {}
    reward(
        prompts=prompts, completions=written, completion_ids=completion_ids(byte_tokenizer(), written),
        log_extra=columns.__setitem__, log_metric=figures.__setitem__,
    )  # fmt: skip
    return torch.tensor(columns["metagradient_raw"], dtype=torch.float64), figures


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_reward_against_finite_differences(gpt2, kind):
    """Of texts with masked prompts; a prompt that fills `max_length` leaves nothing, so its completion is worth exactly 0."""
    args = TargetTrainingArguments(
        learning_rate=1e-2, adam_epsilon_root=1e-4, batch_size=3, max_length=64, shuffle=False
    )
    raw, figures = call(MetagradientReward(gpt2, metric, args, byte_tokenizer(), FORMATS[kind]))
    kept = [i for i in range(8) if i != 4]
    examples = [{**example, "weight": 1.0} for example in dataset_examples(ROWS[kind], byte_tokenizer())]
    expected = finite_differences(gpt2, [examples[i] for i in kept], args)
    assert raw[4] == 0 and figures["metagradient/empty"] == 1
    assert relative_error(raw[kept], expected) < 1e-5


def test_nothing_but_prompts(gpt2):
    args = TargetTrainingArguments(max_length=8)
    reward = MetagradientReward(gpt2, metric, args, byte_tokenizer(), FORMATS["plain"])
    with pytest.raises(ValueError, match="`max_length` 8 .`target_max_length` in the trainer"):
        call(reward, ["a prompt of more tokens"] * 2, [" the sea", " the sky"])


# Ends: one where the completion ended, none where it did not


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("ended", [True, False])
def test_end(eos, kind, ended):
    """Of messages it is the chat template's; what is cut off has a loss on its last word, and none behind it."""
    tokenizer = byte_tokenizer(eos)
    (example,) = to_target_examples(["the sky"], [" is blue"], [ended], tokenizer, FORMATS[kind])
    supervised = [i for i, label in enumerate(example["labels"]) if label != -100]
    end = {"plain": eos, "chat": "<|im_end|>\n"}[kind] if ended else ""
    assert tokenizer.decode([example["input_ids"][i] for i in supervised]) == " is blue" + end
    assert supervised == list(range(supervised[0], len(example["input_ids"])))


def test_a_template_without_an_end():
    tokenizer = byte_tokenizer(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for ended in (True, False):
        (example,) = to_target_examples(["the sky"], [" is blue"], [ended], tokenizer, FORMATS["chat"])
        assert tokenizer.decode(example["input_ids"][-3:]) == ("ue<|im_end|>" if ended else "lue")


# Credit


@pytest.fixture(scope="module")
def targets():
    kwargs = {"processing_class": byte_tokenizer(), "eos_token_ids": [SMALL.eos_token_id]}
    return {kind: TargetFineTuning(llama(), Recorder(), formatting_func=FORMATS[kind], **kwargs) for kind in FORMATS}


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    ids=st.lists(st.integers(1, len(SMALL) - 1), min_size=1, max_size=12),
    ended=st.booleans(),
    kind=st.sampled_from(["plain", "chat"]),
    prompt=st.sampled_from([*PROMPTS, ""]),
)
def test_credit_behind_a_prompt(targets, ids, ended, kind, prompt):
    """Whatever was written has its credit, also where a token holds the prompt's end, too; and nothing else does."""
    text = SMALL.decode(ids, skip_special_tokens=True)
    if not text.strip():
        return
    target = targets[kind]
    (example,) = target.target_examples([prompt], [text], [[*ids, SMALL.eos_token_id] if ended else ids])
    owners, input_ids = written_by(example, SMALL, target.processing_class), example["input_ids"]
    labels = example.get("labels", input_ids)
    written = [owner for owner in owners if owner != NOT_WRITTEN]
    assert len(owners) == len(labels) == len(input_ids)
    assert written == sorted(written) and set(written) <= set(range(len(ids) + ended))
    nobodys = [
        t for t, label, owner in zip(input_ids, labels, owners, strict=True) if label != -100 and owner == NOT_WRITTEN
    ]
    assert target.processing_class.decode(nobodys) == ("\n" if kind == "chat" and ended else "")
    assert all(label != -100 for label, owner in zip(labels, owners, strict=True) if owner != NOT_WRITTEN)
    if ended:
        assert input_ids[owners.index(len(ids))] == target.processing_class.eos_token_id

    credits = torch.randn(len(input_ids), generator=torch.Generator().manual_seed(len(ids)))
    credits[torch.tensor(labels) == -100] = 0.0
    masks = [[1] * (len(ids) + ended)] * 2
    result = token_advantages([credits, torch.zeros(1)], [owners, [0]], masks, 1.0)
    total = (result.advantages[0, 0] - result.advantages[1, 0]).item() * result.unit  # the baseline falls out
    of_template = credits[-1].item() if nobodys else 0.0
    assert total == pytest.approx(credits.double().sum().item() - of_template, abs=1e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_candidates_stand_where_there_is_a_loss(targets, kind):
    """At each of the completion's tokens, the first and the end among them; nowhere else."""
    tokenizer = byte_tokenizer()
    ids = completion_ids(tokenizer, [" the sea"])[0]
    target = targets[kind]
    (example,) = target.target_examples(["go to"], [" the sea"], [[*ids[:-1], SMALL.eos_token_id]])
    example["completion_ids"] = ids
    example["written_by"] = written_by({**example, "ended": True}, tokenizer, tokenizer)
    candidates = torch.arange(2 * len(ids)).view(-1, 2) + 3
    found = aligned_candidates(
        candidates, example, [tokenizer.eos_token_id], example.get("closing", tokenizer.eos_token_id)
    )
    rows = found[(found >= 0).any(dim=1)]
    assert torch.equal(rows, candidates)


# What is refused


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"prompt": "the"}, "`formatting_func` must return the text .*both `prompt` and `completion`"),
        ({"completion": "the"}, "`formatting_func` must return the text .*both `prompt` and `completion`"),
        (("the", "sea"), "`formatting_func` must return the text .*of type tuple"),
        ({"prompt": "the", "completion": [said("sea")]}, "two texts or two lists of messages.*`formatting_func`"),
        ({"prompt": [user("the")], "completion": "sea"}, "two texts or two lists of messages.*`formatting_func`"),
        ({"prompt": [], "completion": [said("sea")]}, "two texts or two lists of messages.*`formatting_func`"),
        ({"prompt": ["the"], "completion": ["sea"]}, "two lists of messages with a `role`"),
        ({"prompt": "the", "completion": " "}, "`formatting_func` returned the empty `completion`"),
        ({"prompt": [user("the")], "completion": [said(None)]}, "`formatting_func` returned the empty `completion`"),
    ],
)
def test_what_formatting_func_must_return(returned, message):
    with pytest.raises(ValueError, match=message):
        to_target_examples(["the"], ["sea"], [True], byte_tokenizer(), lambda row: returned)


def test_rows_of_different_kinds():
    kinds = iter(["text", "plain"])
    with pytest.raises(ValueError, match="of different kinds.*`formatting_func`"):
        to_target_examples(
            ["the"] * 2, ["sea"] * 2, [True] * 2, byte_tokenizer(), lambda row: FORMATS[next(kinds)](row)
        )


@pytest.mark.parametrize(
    "row", [{"label": 1}, {"text": None}, {"prompt": "the"}, {"messages": []}, {"messages": "the"}]
)
def test_rows_with_nothing_to_train_on(row):
    with pytest.raises(ValueError, match="nothing to train on.*`text`, `messages`, or `prompt` and `completion`"):
        dataset_examples([row], byte_tokenizer())


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_loss_on_completions_needs_prompts(kind):
    with pytest.raises(ValueError, match="`completion_only_loss=True` .`target_completion_only_loss`.*needs a prompt"):
        dataset_examples(ROWS[kind], byte_tokenizer(), completion_only_loss=True)


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("plain", CHATML, "needs messages"),
        ("text", CHATML, "needs messages"),
        ("chat", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "generation.*without marks"),
        ("chat", None, "generation.*no template"),
        ("chat", CHATML.replace("== 'assistant'", "== 'critic'"), "the assistant says nothing"),
    ],
)
def test_loss_on_the_assistant_needs_marks(kind, template, message):
    with pytest.raises(ValueError, match=f"`assistant_only_loss=True` .`target_assistant_only_loss`.*{message}"):
        dataset_examples(ROWS[kind], byte_tokenizer(template=template), assistant_only_loss=True)


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="chat template.*`target_processing_class`"):
        dataset_examples(CHATS, byte_tokenizer(template=None))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"completion_only_loss": True}, "`target_completion_only_loss`"),
        ({"assistant_only_loss": True}, "`target_assistant_only_loss`"),
        ({"completion_only_loss": "no"}, "`completion_only_loss`.*must be None or True or False, got 'no'"),
        ({"assistant_only_loss": None}, "`assistant_only_loss`.*must be True or False, got None"),
    ],
)
def test_refused_before_a_model_is_loaded(loss, message):
    with pytest.raises(ValueError, match=message):
        TargetFineTuning("no/such-model", Recorder(), **loss)


def test_a_known_template_gets_its_marks():
    """As in `SFTTrainer`: TRL has a marked template of its own for some."""
    tokenizer = byte_tokenizer(template=qwen3_chat_template)
    rows = [{"messages": [user("the"), said("sea")]}]
    (example,) = dataset_examples(rows, tokenizer, assistant_only_loss=True)
    supervised = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != -100]
    assert "sea<|im_end|>" in tokenizer.decode(supervised) and "the" not in tokenizer.decode(supervised)
