import difflib
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from trl_dpg.metrics import LanguageModelingLikelihood


ROWS = [
    {"prompt": "the cat ", "completion": "sat on the mat."},
    {"prompt": "one ", "completion": "two"},
    {"prompt": "", "completion": "0a1b-2c3d"},
    {"prompt": "a much longer prompt than the others have ", "completion": "x"},
]
TEXTS = [{"text": "hello there."}, {"text": "ab"}, {"text": "the quick brown fox jumps over the lazy dog"}]
UUID = "0a1b-2c3d-4e5f-6789"


def numpy_likelihood(model, rows):
    """Mean log-probability of (input_ids, labels) rows, one at a time without padding."""
    total, count = 0.0, 0
    for input_ids, labels in rows:
        with torch.no_grad():
            logits = model(torch.tensor([input_ids])).logits[0].double().numpy()
        for position in range(1, len(labels)):
            if labels[position] != -100:
                scores = logits[position - 1] - logits[position - 1].max()
                total += scores[labels[position]] - math.log(sum(math.exp(score) for score in scores))
                count += 1
    return total / count


def fit(model, metric, steps=60):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (-metric(model)).backward()
        optimizer.step()
    return model


def encode(tokenizer, row):
    context = tokenizer(row["prompt"])["input_ids"] or [1]
    completion = tokenizer(row["completion"])["input_ids"]
    return context + completion, [-100] * len(context) + completion


def test_prompt_completion_equals_numpy(gpt2, llama, tokenizer):
    for model in [gpt2, llama]:
        metric = LanguageModelingLikelihood(ROWS, tokenizer)
        metric.setup(model)
        expected = numpy_likelihood(model, [encode(tokenizer, row) for row in ROWS])
        assert metric(model).dtype == torch.float64 and metric(model).shape == ()
        assert metric(model).item() == pytest.approx(expected, rel=1e-6 if model is llama else 1e-12)


def test_text_equals_numpy(gpt2, tokenizer):
    ids = [tokenizer(row["text"])["input_ids"] for row in TEXTS]
    value = LanguageModelingLikelihood(Dataset.from_list(TEXTS), tokenizer)(gpt2)
    assert value.item() == pytest.approx(numpy_likelihood(gpt2, [(row, row) for row in ids]), rel=1e-12)


def test_input_ids_equal_numpy(gpt2):
    rows = [
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 9, 6]},
        {"input_ids": [7, 8, 9], "labels": None},
        {"input_ids": [7, 0]},
    ]
    metric = LanguageModelingLikelihood(rows)
    expected = numpy_likelihood(gpt2, [(row["input_ids"], row.get("labels") or row["input_ids"]) for row in rows])
    metric.setup(gpt2)
    assert metric(gpt2).item() == pytest.approx(expected, rel=1e-12)
    assert set(metric.readouts(gpt2)) == {"perplexity"}
    assert LanguageModelingLikelihood(Dataset.from_list(rows))(gpt2).item() == pytest.approx(expected, rel=1e-12)
    formatted = Dataset.from_list([{"input_ids": [7, 8, 9]}]).with_format("torch")
    plain = LanguageModelingLikelihood([{"input_ids": [7, 8, 9]}])
    assert LanguageModelingLikelihood(formatted)(gpt2).item() == plain(gpt2).item()


def test_masks_of_tokenized_rows(gpt2):
    """Padding is left out, what a mask excludes is not supervised, and what the metric cannot apply is refused."""
    row = {"input_ids": [0, 3, 4, 5, 0], "attention_mask": [0, 1, 1, 1, 0], "completion_mask": [0, 0, 0, 1, 1]}
    metric = LanguageModelingLikelihood([row])
    assert metric(gpt2).item() == pytest.approx(numpy_likelihood(gpt2, [([3, 4, 5], [-100, -100, 5])]), abs=1e-6)
    with pytest.raises(ValueError, match="`dataset` row 0 has `seq_lengths`.*packed"):
        LanguageModelingLikelihood([{"input_ids": [3, 4, 5], "seq_lengths": [1, 2]}])


def test_perplexity_equals_the_models_own_loss(gpt2, tokenizer):
    metric = LanguageModelingLikelihood(TEXTS[-1:], tokenizer)
    input_ids = torch.tensor([tokenizer(TEXTS[-1]["text"])["input_ids"]])
    with torch.no_grad():
        loss = gpt2(input_ids=input_ids, labels=input_ids).loss.item()
    # their loss casts the logits to float32
    assert metric.readouts(gpt2) == {"perplexity": pytest.approx(math.exp(loss), rel=1e-6)}


def test_padding_does_not_change_the_value(gpt2, tokenizer):
    for rows in [ROWS, TEXTS]:
        values = [LanguageModelingLikelihood(rows, tokenizer, batch_size=size)(gpt2).item() for size in [1, 2, 4]]
        assert values == pytest.approx([values[0]] * 3, rel=1e-12)


def test_max_length(gpt2, tokenizer):
    ids = [tokenizer(row["text"])["input_ids"][:5] for row in TEXTS]
    value = LanguageModelingLikelihood(TEXTS, tokenizer, max_length=5)(gpt2)
    assert value.item() == pytest.approx(numpy_likelihood(gpt2, [(row, row) for row in ids]), rel=1e-12)


def test_context_of_an_empty_prompt(gpt2, tokenizer, make_tokenizer):
    completion = tokenizer("ab")["input_ids"]
    row = [{"prompt": "", "completion": "ab"}]
    for special_tokens, context in [({"bos_token": "<s>", "eos_token": "</s>"}, 1), ({"eos_token": "</s>"}, 2)]:
        value = LanguageModelingLikelihood(row, make_tokenizer(**special_tokens))(gpt2)
        expected = numpy_likelihood(gpt2, [([context, *completion], [-100, *completion])])
        assert value.item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="`dataset` row 0 has no context .* neither a BOS nor an EOS token"):
        LanguageModelingLikelihood(row, make_tokenizer())


def test_tokenizer_that_adds_bos(gpt2, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("ab")["input_ids"][0] == 1
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd")]
    for prompt, context in [("", [1]), ("ab", [1, *plain[0]])]:
        value = LanguageModelingLikelihood([{"prompt": prompt, "completion": "cd"}], tokenizer)(gpt2)
        expected = numpy_likelihood(gpt2, [(context + plain[1], [-100] * len(context) + plain[1])])
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_completion_starts_where_the_tokens_diverge(gpt2):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # "ab" is one token, so the end of the prompt is merged into the completion
    bpe = BPE(vocab={"a": 3, "b": 4, "c": 5, "ab": 6}, merges=[("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe))
    value = LanguageModelingLikelihood([{"prompt": "ca", "completion": "bc"}], tokenizer)(gpt2)
    assert value.item() == pytest.approx(numpy_likelihood(gpt2, [([5, 6, 5], [-100, 6, 5])]), rel=1e-12)


def test_gradient(gpt2, tokenizer, assert_gradient):
    assert_gradient(LanguageModelingLikelihood(ROWS, tokenizer, batch_size=3), gpt2)


def test_gradient_on_llama(llama, tokenizer, assert_gradient):
    # Llama computes its norms in float32, whatever the dtype of the model
    assert_gradient(LanguageModelingLikelihood(ROWS, tokenizer, batch_size=3), llama, epsilon=1e-3, rtol=1e-3)


def test_gradient_of_lora(gpt2, tokenizer, assert_gradient):
    config = LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    model = get_peft_model(gpt2, config).double().eval()
    metric = LanguageModelingLikelihood(ROWS, tokenizer)
    metric.setup(model)
    assert_gradient(metric, model)
    assert set(metric.readouts(model)) == {"perplexity", "exact_match", "longest_common_substring"}


def test_prompt_tuning(gpt2, tokenizer, assert_gradient):
    model = get_peft_model(gpt2, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double().eval()
    metric = LanguageModelingLikelihood(TEXTS[:1], tokenizer)
    input_ids = torch.tensor([tokenizer(TEXTS[0]["text"])["input_ids"]])
    logits = model(input_ids=input_ids).logits[:, 3:-1].flatten(0, 1)
    expected = -torch.nn.functional.cross_entropy(logits, input_ids[0, 1:])
    assert metric(model).item() == pytest.approx(expected.item(), rel=1e-12)
    assert_gradient(metric, model, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(make_gpt2, tokenizer, dtype):
    model = make_gpt2(dtype)
    metric = LanguageModelingLikelihood(ROWS, tokenizer)
    value = metric(model)
    assert value.dtype == torch.float64
    expected = numpy_likelihood(model, [encode(tokenizer, row) for row in ROWS])
    assert value.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_recall(make_gpt2, tokenizer):
    """Exact and soft recall of an untrained, a partly and a fully overfitted model."""
    model = make_gpt2(torch.float32, tied=True)
    metric = LanguageModelingLikelihood([{"prompt": "", "completion": UUID}, ROWS[0]], tokenizer)
    untrained = metric.readouts(model)
    assert untrained["exact_match"] == 0.0 and untrained["longest_common_substring"] < 0.5

    fit(model, LanguageModelingLikelihood([{"prompt": "", "completion": UUID}], tokenizer))
    half = metric.readouts(model)
    assert half["exact_match"] == 0.5 and 0.5 <= half["longest_common_substring"] < 1

    fit(model, metric)
    known = metric.readouts(model)
    assert known["exact_match"] == known["longest_common_substring"] == 1.0
    assert known["perplexity"] == pytest.approx(math.exp(-metric(model).item()), rel=1e-6)


def test_recall_equals_free_running_generation(make_gpt2, tokenizer):
    """Read-outs against a greedy loop of our own, at several stages of learning."""
    model = make_gpt2(torch.float64)
    rows = [{"prompt": "", "completion": UUID}, *ROWS[:2]]
    metric = LanguageModelingLikelihood(rows, tokenizer)
    seen = set()
    for _ in range(8):
        exact, shares = [], []
        for row in rows:
            input_ids, labels = encode(tokenizer, row)
            start = labels.count(-100)
            tokens = input_ids[:start]
            with torch.no_grad():
                while len(tokens) < len(input_ids):
                    tokens = [*tokens, model(torch.tensor([tokens])).logits[0, -1].argmax().item()]
            exact.append(tokens == input_ids)
            text = "".join(token or "" for token in tokenizer.convert_ids_to_tokens(tokens[start:]))
            matcher = difflib.SequenceMatcher(None, text, row["completion"], autojunk=False)
            shares.append(matcher.find_longest_match().size / len(row["completion"]))
        readouts = metric.readouts(model)
        assert readouts["exact_match"] == pytest.approx(sum(exact) / 3)
        assert readouts["longest_common_substring"] == pytest.approx(sum(shares) / 3)
        seen.add(readouts["exact_match"])
        fit(model, metric, steps=6)
    assert len(seen) > 1


def test_uuid_without_its_tail(make_gpt2, tokenizer):
    """Soft is in characters of the UUID: 32 of them, whatever the tokens."""
    uuid = "0123456789abcdef0123456789abcdef"
    learned = LanguageModelingLikelihood([{"prompt": "", "completion": uuid[:29] + "zzz"}], tokenizer)
    model = fit(make_gpt2(torch.float32), learned)
    readouts = LanguageModelingLikelihood([{"prompt": "", "completion": uuid}], tokenizer).readouts(model)
    assert readouts["exact_match"] == 0.0
    assert readouts["longest_common_substring"] == 29 / 32


def test_recall_in_other_tokens(make_gpt2):
    """What counts is the string that comes out, not its tokens."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "ab": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    metric = LanguageModelingLikelihood([{"prompt": "", "completion": "abab"}], tokenizer)
    for tokens, exact, soft in [([2, 3, 2, 3], 1.0, 1.0), ([4, 4, 2, 2], 1.0, 1.0), ([3, 4, 2, 2], 0.0, 0.75)]:
        model = fit(make_gpt2(torch.float32), LanguageModelingLikelihood([{"input_ids": [1, *tokens]}]))
        readouts = metric.readouts(model)
        assert (readouts["exact_match"], readouts["longest_common_substring"]) == (exact, soft)


def test_a_completion_that_is_cut_off_is_not_recalled(make_gpt2, tokenizer):
    metric = LanguageModelingLikelihood([{"prompt": "", "completion": "abcdef"}], tokenizer, max_length=4)
    readouts = metric.readouts(fit(make_gpt2(torch.float32), metric))
    assert readouts["exact_match"] == 0.0 and readouts["longest_common_substring"] == 0.5


def test_generation_ignores_the_models_generation_config(make_gpt2, tokenizer):
    """An EOS token within the completion must not end the continuation, and no other default may bend it."""
    model = fit(
        make_gpt2(torch.float32),
        LanguageModelingLikelihood([{"prompt": "", "completion": "aaaa-bbbb"}], tokenizer),
    )
    metric = LanguageModelingLikelihood([{"prompt": "", "completion": "aaaa-bbbbc"}], tokenizer)
    expected = metric.readouts(model)
    assert expected["exact_match"] == 0.0 and expected["longest_common_substring"] == pytest.approx(0.9)

    dash = tokenizer("-")["input_ids"][0]
    model.generation_config.update(
        eos_token_id=dash, repetition_penalty=5.0, do_sample=True, temperature=2.0, num_beams=3, max_length=4
    )
    before = model.generation_config.to_dict()
    state = torch.get_rng_state()
    assert metric.readouts(model) == expected
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_tokenizer_of_the_model(gpt2, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    metric = LanguageModelingLikelihood(ROWS)
    with pytest.raises(ValueError, match=r"`LanguageModelingLikelihood.setup\(model\)` must be called first"):
        metric(gpt2)
    with pytest.raises(ValueError, match="`processing_class` is None and the tokenizer of `target_model`"):
        metric.setup(gpt2)
    gpt2.config._name_or_path = str(tmp_path)
    metric.setup(gpt2)
    metric.setup(gpt2)
    assert metric(gpt2).item() == LanguageModelingLikelihood(ROWS, tokenizer)(gpt2).item()


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        ([], {}, "`dataset` is empty"),
        (
            [{"messages": []}],
            {},
            r"row 0 has the columns \['messages'\].*'input_ids'.*'prompt' and 'completion'.*'text'",
        ),
        ([{"prompt": "a"}], {}, r"row 0 has the columns \['prompt'\]"),
        ([{"text": "ab"}, {"prompt": "a", "completion": "b"}], {}, "row 1 has the columns"),
        ([{"text": ["ab"]}], {}, "row 0 has a 'text' of type list, not a string"),
        ([{"prompt": [{"role": "user"}], "completion": "b"}], {}, "row 0 has a 'prompt' of type list.*chat template"),
        ([{"prompt": "a", "completion": ""}], {}, "row 0 has an empty 'completion'"),
        ([{"text": "ab"}, {"text": "a"}], {}, "row 1 has no supervised token .* 1 tokens"),
        ([{"text": ""}], {}, "row 0 has no supervised token .* 0 tokens"),
        ([{"prompt": "abc", "completion": "d"}], {"max_length": 3}, r"row 0 has no supervised .*`max_length` = 3"),
        ([{"input_ids": [3, 4], "labels": [3, -100]}], {}, "row 0 has no supervised token"),
        ([{"input_ids": [3, 4], "labels": [3]}], {}, "row 0 has 2 'input_ids' but 1 'labels'"),
        ([{"input_ids": [3, -1]}], {}, "row 0 has a negative token id"),
        ([{"input_ids": [3, 4], "labels": [-1, 4]}], {}, "row 0 has a negative token id"),
        ([{"text": "ab"}], {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ([{"text": "ab"}], {"max_length": 1}, "`max_length` must be at least 2 .*, got 1"),
    ],
)
def test_construction_errors(tokenizer, dataset, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelingLikelihood(dataset, tokenizer, **kwargs)


@pytest.mark.parametrize("row", [{"input_ids": [3, 48]}, {"input_ids": [3, 4], "labels": [3, 48]}])
def test_tokens_out_of_the_vocabulary(gpt2, row):
    with pytest.raises(ValueError, match="row 0 has the token id 48, but the vocabulary of `target_model` has 48"):
        LanguageModelingLikelihood([row]).setup(gpt2)


def test_more_tokens_than_positions(gpt2):
    rows = [{"input_ids": [3] * 65}]
    with pytest.raises(
        ValueError, match="row 0 has 65 tokens, but `target_model` has 64 .*`max_length` to 64 or less"
    ):
        LanguageModelingLikelihood(rows).setup(gpt2)
    LanguageModelingLikelihood(rows, max_length=64).setup(gpt2)
