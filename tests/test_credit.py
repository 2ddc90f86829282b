"""Which of the generator's tokens wrote a token of the target: through the characters that they share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from trl_dpg.credit import aligned_candidates, token_advantages, written_by
from trl_dpg.credit.alignment import NOT_WRITTEN
from trl_dpg.credit.candidates import changed_words
from trl_dpg.data import repeated_places
from trl_dpg.testing import tiny_tokenizer


TEXTS = ["the cat saw the sea and the sky", "le café déjà vu, à la mer", "日本の空と海", "naïve – “quoted” 🙂 end"]


def byte_level(vocab_size):
    """A byte-level BPE tokenizer with `<eos>`, trained on a few texts: characters beyond ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


SMALL, LARGE = byte_level(262), byte_level(400)


def example_of(parts, ids, text, input_ids, ended=False, mask=None, **fields):
    """A training example, as far as its alignment goes."""
    fields |= {"parts": parts, "completion_ids": ids, "text": text, "input_ids": input_ids, "ended": ended}
    return {**fields, "generated": mask or [1] * len(ids)}


def owners(ids, generator=SMALL, target=LARGE, ended=False, formatting=None):
    text = generator.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
    whole = formatting(text) if formatting else text
    input_ids = target(whole)["input_ids"] + [target.eos_token_id] * ended
    example = example_of([text], ids, whole, input_ids, ended)
    return written_by(example, generator, target), text, whole, input_ids


def complete(ids, text, generator=SMALL):
    """How many characters are there after each token, by decoding every prefix."""
    counts = []
    for j in range(len(ids)):
        prefix = generator.decode(ids[: j + 1], skip_special_tokens=True)
        counts.append(
            next(
                (k for k, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), min(len(prefix), len(text))
            )
        )
    return counts


def test_the_same_tokens_are_themselves():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("the cat the sea")["input_ids"]
    eos = tokenizer.eos_token_id
    text = "the cat the sea"
    assert written_by(example_of([text], ids, text, ids), tokenizer, tokenizer) == [0, 1, 2, 3]
    ids.append(eos)
    assert written_by(example_of([text], ids, text, ids, ended=True), tokenizer, tokenizer) == [0, 1, 2, 3, 4]


def test_bos_was_not_written(bos_tokenizer):
    generator = tiny_tokenizer()
    ids = generator("the cat")["input_ids"] + [generator.eos_token_id]
    input_ids = bos_tokenizer("the cat")["input_ids"] + [bos_tokenizer.eos_token_id]
    example = example_of(["the cat"], ids, "the cat", input_ids, ended=True)
    assert written_by(example, generator, bos_tokenizer) == [NOT_WRITTEN, 0, 1, 2]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("generator", "target"), [(SMALL, LARGE), (LARGE, SMALL)], ids=["merged", "split"])
def test_last_character(text, generator, target):
    """A token belongs to the first token of the generator after which its last character is there."""
    ids = generator(text)["input_ids"]
    found, text, whole, input_ids = owners(ids, generator, target, ended=False)
    there = complete(ids, text, generator)
    spans = target(whole, return_offsets_mapping=True)["offset_mapping"]
    assert found == [next(j for j, n in enumerate(there) if n >= end) for _, end in spans]
    assert found[-1] == len(ids) - 1


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(ids=st.lists(st.integers(1, len(SMALL) - 1), min_size=1, max_size=12), ended=st.booleans())
def test_drawn_tokens(ids, ended):
    """Bytes in any order, which need not be text at all: nothing is lost, and nothing comes before it was written."""
    found, text, whole, input_ids = owners([*ids, SMALL.eos_token_id] if ended else ids, ended=ended)
    if not text.strip():
        return
    assert len(found) == len(input_ids) and all(0 <= owner < len(ids) + ended for owner in found)
    assert found == sorted(found)
    if ended:
        assert found[-1] == len(ids)
    credits = torch.randn(len(input_ids), generator=torch.Generator().manual_seed(len(ids)))
    result = token_advantages([credits, torch.zeros(1)], [found, [0]], [[1] * (len(ids) + ended)] * 2, 1.0)
    total = result.advantages[0, 0] - result.advantages[1, 0]  # the baseline falls out
    assert total.item() * result.unit == pytest.approx(credits.double().sum().item(), abs=1e-5)


def test_special_tokens_in_between_write_nothing():
    ids = SMALL("the sea")["input_ids"]
    with_special = [*ids[:3], SMALL.eos_token_id, *ids[3:]]
    found, *_ = owners(with_special, target=SMALL)
    assert found == [0, 1, 2, *range(4, len(with_special))]


def test_a_prompt_was_not_written():
    """What stands before and behind the completion is nobody's."""
    ids = SMALL("the sea")["input_ids"]
    found, _, whole, input_ids = owners(ids, formatting=lambda text: f"Q: sky? A: {text} END")
    pieces = [LARGE.decode([token]) for token in input_ids]
    end = 0
    for owner, piece in zip(found, pieces, strict=True):
        end += len(piece)
        inside = whole.index("the sea") < end <= whole.index("the sea") + len("the sea")
        assert (owner != NOT_WRITTEN) == inside


def test_a_prompt_with_the_same_words():
    """The completion is what stands last."""
    ids = SMALL("the sea")["input_ids"]
    found, _, whole, input_ids = owners(ids, formatting=lambda text: f"Q: the sea? A: {text} END")
    before = len(LARGE("Q: the sea? A:")["input_ids"])
    assert set(found[:before]) == {NOT_WRITTEN} and found[before:].count(NOT_WRITTEN) < len(found) - before


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("Q: the sea? A: {} END", 1),
        ("{} END of the sea", 1),  # the ending holds the same words
        ("{} and again {}.", 2),  # every copy is the generator's
        ("the sea {} the sea", 1),
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_the_same_words_elsewhere_in_the_text(frame, expected, chat):
    """Written are the places that another completion would have had."""
    written = " the sea "  # which the frame strips
    completion = [{"role": "assistant", "content": written}] if chat else written

    def formatting_func(row):
        text = row["completion"][0]["content"] if chat else row["completion"]
        return frame.format(*[text.strip()] * expected)

    text = formatting_func({"completion": completion})
    places = repeated_places(text, "sky", completion, formatting_func)
    assert [index for index, _ in places] == [0] * expected
    ids = SMALL(written)["input_ids"]
    input_ids = LARGE(text)["input_ids"]
    found = written_by(example_of([written], ids, text, input_ids, places=places), SMALL, LARGE)
    starts = [frame.format(*"\0" * expected).split("\0")]
    end, inside = 0, set()
    for piece in starts[0][:-1]:
        inside |= set(range(end + len(piece), end + len(piece) + len("the sea")))
        end += len(piece) + len("the sea")
    last = [end - 1 for _, end in LARGE(text, return_offsets_mapping=True)["offset_mapping"]]
    assert [owner != NOT_WRITTEN for owner in found] == [character in inside for character in last]


def test_words_that_occur_once_need_no_second_text():
    calls = []

    def formatting_func(row):
        calls.append(row)
        return f"A: {row['completion']}"

    assert repeated_places("A: the sea", "sky", "the sea", formatting_func) == [] and calls == []


def test_a_frame_that_depends_on_the_completion_is_noticed(caplog):
    def formatting_func(row):
        return f"{row['completion']} has {len(row['completion'])} letters. {row['completion']}"

    text = formatting_func({"completion": "the sea"})
    with caplog.at_level("WARNING", logger="trl_dpg"):
        assert repeated_places(text, "sky", "the sea", formatting_func) == []
    assert "`formatting_func`" in caplog.text


def test_unknown_tokens_were_written():
    """Each belongs to what it stands for, and those behind it are where they were."""
    words = tiny_tokenizer()
    text = "the 🙂 cat saw the sea"  # of which the tokenizer knows neither "🙂" nor "saw"
    ids = SMALL(text)["input_ids"]
    input_ids = words(text)["input_ids"]
    assert input_ids.count(words.unk_token_id) == 2
    found = written_by(example_of([text], ids, text, input_ids), SMALL, words)
    there = complete(ids, text)
    ends = words(text, return_offsets_mapping=True)["offset_mapping"]
    assert found == [next(j for j, n in enumerate(there) if n >= end) for _, end in ends]


def test_a_slow_tokenizer_that_changes_the_text_is_refused():
    slow = ByT5Tokenizer()
    for text, known in (("the sea", True), ("the <pad> sea", False)):
        ids, input_ids = SMALL(text)["input_ids"], slow(text, add_special_tokens=False)["input_ids"]
        if known:
            assert written_by(example_of([text], ids, text, input_ids), SMALL, slow)[-1] == len(ids) - 1
        else:
            with pytest.raises(ValueError, match="`target_processing_class` .ByT5Tokenizer.*fast tokenizer"):
                written_by(example_of([text], ids, text, input_ids), SMALL, slow)


def test_text_that_is_not_there_is_refused():
    ids = SMALL("the sea")["input_ids"]
    with pytest.raises(ValueError, match="`formatting_func`.*credit_assignment"):
        owners(ids, formatting=str.upper)


def test_messages():
    """Two parts with a tool's answer between them: what it said was not written, even where it said the same."""
    parts = [SMALL(part)["input_ids"] for part in ("the cat", "the sea", "the sea")]
    first, tool, last = (len(part) for part in parts)
    text = "the cat the sea"
    input_ids = LARGE(text)["input_ids"]
    mask = [1] * first + [0] * tool + [1] * last
    found = written_by(example_of(["the cat", "the sea"], sum(parts, []), text, input_ids, mask=mask), SMALL, LARGE)
    assert not set(found) & set(range(first, first + tool))
    assert set(found) & set(range(first)) and set(found) & set(range(first + tool, len(mask)))
    assert found[-1] == len(mask) - 1


def candidates_of(candidates, owners, ids, input_ids, ends, eos):
    return aligned_candidates(candidates, {**example_of([], ids, "", input_ids), "written_by": owners}, ends, eos)


def test_candidates_stand_where_tokenizers_agree():
    eos = SMALL.eos_token_id
    ids = [*SMALL("the sea")["input_ids"], eos]
    candidates = torch.arange(2 * len(ids)).view(len(ids), 2) + 100
    same = candidates_of(candidates, list(range(len(ids))), ids, ids, [eos], eos)
    assert same[0].tolist() == [-1, -1] and torch.equal(same[1:], candidates[1:])  # nothing predicts the first
    # The target has one token where the generator wrote its second and third.
    found = candidates_of(candidates, [0, 2, *range(3, len(ids))], ids, [ids[0], 399, *ids[3:]], [eos], eos)
    assert found[1].tolist() == [-1, -1] and torch.equal(found[2:], candidates[3:])


def test_every_end_is_the_targets_end():
    ids, candidates = [5, 6, 9], torch.tensor([[1, 2], [8, 3], [9, 4]])
    found = candidates_of(candidates, [0, 1, 2], ids, [5, 6, 7], [8, 9], 7)
    assert found.tolist() == [[-1, -1], [7, 3], [7, 4]]


def test_a_target_without_an_end():
    found = candidates_of(torch.tensor([[1, 2], [8, 3]]), [0, 1], [5, 6], [5, 6], [8], None)
    assert found.tolist() == [[-1, -1], [-1, 3]]


def test_words_that_a_tokenizer_reads_as_others():
    """A lower-casing one knows "Cat", but never reads it; spaces and parts of characters are no change."""
    backend = Tokenizer(models.WordLevel({"cat": 0, "Cat": 1, "\u2581dog": 2, "[UNK]": 3}, unk_token="[UNK]"))
    assert changed_words(PreTrainedTokenizerFast(tokenizer_object=backend)) == set()
    backend.normalizer = normalizers.Lowercase()
    assert changed_words(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")) == {1, 3}
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    assert changed_words(PreTrainedTokenizerFast(tokenizer_object=backend)) == set()
