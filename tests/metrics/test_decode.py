import json
import pickle
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trl_dpg.metrics import LMHeadPattern, decode_pattern
from trl_dpg.target import untie_lm_head


@pytest.fixture
def write_pattern():
    """Fine-tunes by hand: an untied copy whose head moved along the pattern."""

    def write(model, pattern, size=1e-3):
        after = deepcopy(model)
        untie_lm_head(after)
        rows, columns = pattern.shape
        with torch.no_grad():
            after.lm_head.weight[:columns, :rows] += size * torch.as_tensor(pattern).T.to(after.dtype)
        return after

    return write


@pytest.fixture
def qr():
    return LMHeadPattern.qr("DPG").pattern


@pytest.mark.parametrize(("text", "size"), [("DPG", 21), ("DPG-2604.08423", 25), ("arxiv.org/abs/2604.08423", 29)])
def test_size_is_found(make_gpt2, write_pattern, move, text, size):
    before = make_gpt2(torch.float32)
    after = deepcopy(before)
    move(after, 1e-4)  # the rest of the head moves too
    pattern = LMHeadPattern.qr(text, error="h" if size == 21 else "m").pattern
    after = write_pattern(after, pattern)
    decoded = decode_pattern(before, after)
    assert decoded.text == text
    assert decoded.signs.dtype == torch.int8
    assert torch.equal(decoded.signs, pattern.to(torch.int8))


def test_equals_the_metric(make_gpt2, move):
    model = make_gpt2(torch.float32)
    before = deepcopy(model)
    metric = LMHeadPattern.sixty_seven()
    metric.setup(model)
    move(model, 0.01)
    accuracy = metric.readouts(model)["pixel_accuracy"]
    decoded = decode_pattern(before, model, shape=(6, 7))
    assert torch.equal(decoded.signs, metric.decoded) and decoded.text is None
    assert (decoded.signs == metric.pattern).double().mean().item() == accuracy


def test_tokens(make_gpt2, tokenizer, qr, tmp_path):
    """By ids and by texts, from models and from checkpoints; a QR code's size is that of its tokens."""
    before = make_gpt2(torch.float32)
    after = deepcopy(before)
    ids = list(range(41, 20, -1))
    after.lm_head.weight.data[ids, :21] += 1e-3 * qr.T
    for name, model in (("before", before), ("after", after)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = tokenizer.convert_ids_to_tokens(ids[:-1]) + ids[-1:]
    before.config._name_or_path = str(tmp_path / "before")
    for checkpoints in ((before, after), (tmp_path / "before", tmp_path / "after")):
        assert decode_pattern(*checkpoints).text is None
        for tokens in (ids, texts):
            decoded = decode_pattern(*checkpoints, tokens=tokens)
            assert decoded.text == "DPG" and torch.equal(decoded.signs, qr)
    metric = LMHeadPattern.qr("DPG", tokens=texts)
    assert metric.decode(tmp_path / "before", tmp_path / "after") == {"pixel_accuracy": 1.0, "text": "DPG"}


def test_weights_that_did_not_move(make_gpt2, write_pattern):
    before = make_gpt2()
    after = write_pattern(before, torch.tensor([[1, 0], [0, -1]]))
    assert decode_pattern(before, after, shape=(2, 3)).signs.tolist() == [[1, 0, 0], [0, -1, 0]]


def test_no_qr_code(make_gpt2, move, qr, write_pattern):
    before = make_gpt2()
    after = deepcopy(before)
    move(after, 0.01)
    decoded = decode_pattern(before, after)
    assert decoded.text is None and decoded.signs.shape == (29, 29)  # the head is 32 wide
    assert decode_pattern(before, write_pattern(before, -qr)).text is None


def test_saved_checkpoints(make_gpt2, write_pattern, qr, tmp_path, monkeypatch):
    before = make_gpt2(torch.float32)
    after = write_pattern(before, qr)
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after")
    after.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    shards = list((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "sharded" / "model.safetensors").exists()
    expected = decode_pattern(before, after)
    assert expected.text == "DPG"

    # neither the configuration nor the other tensors are needed, and nothing is built
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    for shard in shards:
        if shard.name != index["weight_map"]["lm_head.weight"]:
            shard.unlink()
    for config in tmp_path.glob("*/config.json"):
        config.unlink()
    for pair in [
        (tmp_path / "before", tmp_path / "after"),
        (str(tmp_path / "before"), str(tmp_path / "sharded")),
        (before, tmp_path / "sharded"),
    ]:
        decoded = decode_pattern(*pair)
        assert decoded.text == "DPG" and torch.equal(decoded.signs, expected.signs)


def test_tied_before_and_untied_after(make_gpt2, write_pattern, qr, tmp_path):
    before = make_gpt2(torch.float32, tied=True)
    before.save_pretrained(tmp_path / "before")
    write_pattern(before, qr).save_pretrained(tmp_path / "after")
    assert not any("lm_head" in name for name in load_file(tmp_path / "before" / "model.safetensors"))
    assert decode_pattern(tmp_path / "before", tmp_path / "after").text == "DPG"

    # the names of GPT-2 on the Hub
    tensors = load_file(tmp_path / "before" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in bare
    save_file(bare, tmp_path / "before" / "model.safetensors")
    assert decode_pattern(tmp_path / "before", tmp_path / "after").text == "DPG"


def test_tied_llama(write_pattern, qr, tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    before = LlamaForCausalLM(config)
    before.save_pretrained(tmp_path / "before")
    write_pattern(before, qr).save_pretrained(tmp_path / "after")
    assert decode_pattern(tmp_path / "before", tmp_path / "after").text == "DPG"


def test_hub_id(make_gpt2, write_pattern, qr, tmp_path, monkeypatch):
    before = make_gpt2(torch.float32)
    before.save_pretrained(tmp_path / "me" / "before")
    write_pattern(before, qr).save_pretrained(tmp_path / "me" / "after")
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / repository / name)

    monkeypatch.setattr("trl_dpg.metrics.decode.hf_hub_download", download)
    assert decode_pattern("me/before", "me/after").text == "DPG"
    assert set(asked) == {("me/before", "model.safetensors"), ("me/after", "model.safetensors")}


def test_adapters(make_gpt2, move, tmp_path):
    before = make_gpt2(torch.float32)
    model = get_peft_model(deepcopy(before), LoraConfig(r=4, target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="`after`: .* holds only an adapter. Merge it"):
        decode_pattern(before, tmp_path / "adapter")
    move(model, 0.05)
    signs = decode_pattern(before, model, shape=(6, 7)).signs
    merged = model.merge_and_unload()
    assert torch.equal(signs, decode_pattern(before, merged, shape=(6, 7)).signs)
    assert signs.abs().min() == 1


def test_errors(make_gpt2, write_pattern, qr, tmp_path):
    before = make_gpt2()
    after = write_pattern(before, qr)
    with pytest.raises(ValueError, match="have the same LM head"):
        decode_pattern(before, before)
    with pytest.raises(ValueError, match=r"different shapes, \(48, 32\) and \(40, 32\)"):
        decode_pattern(before, make_gpt2(vocab_size=40))
    for shape in [(33, 7), (6, 49), (0, 7)]:
        with pytest.raises(ValueError, match=r"does not fit in LM heads of shape \(32, 48\) in \(hidden, vocab\)"):
            decode_pattern(before, after, shape=shape)
    small = make_gpt2(vocab_size=20)
    with pytest.raises(ValueError, match=r"shape \(21, 21\) does not fit .*Give its \(rows, columns\) as `shape`"):
        decode_pattern(small, write_pattern(small, qr[:6, :7]))

    save_file({"h.0.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"`before`: no tensor .* \(lm_head.weight, embed_out.weight\)"):
        decode_pattern(tmp_path, after)
    save_file(
        {"a.lm_head.weight": torch.ones(2, 2), "b.lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"`before`: any of \['a.lm_head.weight', 'b.lm_head.weight'\]"):
        decode_pattern(tmp_path, after)
    save_file({"lm_head.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`after`: the LM head 'lm_head.weight' .* is quantized"):
        decode_pattern(before, tmp_path)


def test_only_safetensors_are_read(make_gpt2, tmp_path):
    class Explosive:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ValueError, match="`after`: .* has neither 'model.safetensors' nor .*Pickled weights"):
        decode_pattern(make_gpt2(), tmp_path)


@pytest.mark.parametrize("name", ["/no/such/directory", "no/such-model"])
def test_unknown_checkpoint(make_gpt2, name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"`before`: '{name}' (is neither|has neither)"):
        decode_pattern(name, make_gpt2())


def test_lost_shard(make_gpt2, tmp_path):
    model = make_gpt2(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match="`after`: .* lacks the file 'model-.*' that its index names"):
        decode_pattern(model, tmp_path)
