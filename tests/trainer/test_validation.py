import pytest
import torch
import torch.nn.functional as F

from trl_dpg.metagradients import TargetTrainingArguments, compute_metagradients
from trl_dpg.metrics import LMHeadPattern
from trl_dpg.validation import validate


EXAMPLES = [{"input_ids": ids} for ids in ([1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11, 3, 2, 1], [5, 4], [9, 9, 8])]


def metric(model):
    return model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)[4]


def sum_of_losses(model, example, max_length):
    """Cross-entropy of one example alone, without padding."""
    ids = torch.tensor(example["input_ids"][:max_length])
    return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum")


def by_hand(model, examples, args):
    """An ordinary PyTorch training loop."""
    if args.weight_decay_on_norm_and_bias:
        groups = [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
    else:
        matrices = [p for name, p in model.named_parameters() if not name.endswith("bias") and "ln_" not in name]
        others = [p for name, p in model.named_parameters() if name.endswith("bias") or "ln_" in name]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.learning_rate)
    else:
        betas = (args.adam_beta1, args.adam_beta2)
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
    batches = list(args.batches(len(examples)))
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            decay = 1 - step / len(batches) if args.lr_scheduler_type == "linear" else 1.0
            group["lr"] = args.learning_rate * decay
        rows = [examples[i] for i in batch]
        tokens = [min(len(row["input_ids"]), args.max_length) - 1 for row in rows]
        loss = 0.0
        for row, n in zip(rows, tokens, strict=True):
            scale = {"batch_tokens": sum(tokens), "example": n * len(rows), "max_length": args.max_length * len(rows)}
            loss = loss + sum_of_losses(model, row, args.max_length) / scale[args.loss_normalization]
        optimizer.zero_grad()
        loss.backward()
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


RECIPES = {
    "adamw": {},
    "sgd": {"optim": "sgd", "learning_rate": 0.1},
    "weight decay": {"weight_decay": 0.5},
    "weight decay of matrices": {"weight_decay": 0.5, "weight_decay_on_norm_and_bias": False},
    "sgd with weight decay": {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.5},
    "clipping": {"max_grad_norm": 0.1, "optim": "sgd", "learning_rate": 0.1},
    "linear": {"lr_scheduler_type": "linear"},
    "epochs": {"num_train_epochs": 2, "seed": 3},
    "one step": {"batch_size": 6},
    "micro-batches": {"batch_size": 6, "micro_batch_size": 4},
    "max_length": {"max_length": 3},
    "mean of examples": {"loss_normalization": "example"},
    "fixed length": {"loss_normalization": "max_length", "max_length": 16},
    "betas and epsilon": {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3},
}


@pytest.fixture
def model(causal_lm):
    return causal_lm(seed=1).double()


class TestValidate:
    @pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
    def test_is_an_ordinary_training_loop(self, model, causal_lm, recipe):
        args = TargetTrainingArguments(**{"batch_size": 4, "learning_rate": 1e-2, **recipe})
        results = validate(model, EXAMPLES, metric, args)
        other = causal_lm(seed=1).double()
        before = metric(other).item()
        loss = by_hand(other, EXAMPLES, args)
        after = metric(other).item()
        assert results["metric_before"] == pytest.approx(before, rel=1e-12)
        assert results["metric"] == pytest.approx(after, rel=1e-9)
        assert results["metric_gain"] == pytest.approx(after - before, rel=1e-6)
        assert results["target_loss"] == pytest.approx(loss, rel=1e-9)
        assert abs(after - before) > 1e-4

    @pytest.mark.parametrize("optim", ["adamw", "sgd"])
    def test_agrees_with_the_reward_without_epsilon_root(self, model, optim):
        args = TargetTrainingArguments(batch_size=4, learning_rate=1e-2, adam_epsilon_root=0.0, optim=optim)
        out = compute_metagradients(model, EXAMPLES, metric, args)
        results = validate(model, EXAMPLES, metric, args)
        assert results["metric"] == pytest.approx(out.metric_after, rel=1e-9)
        assert results["metric_before"] == out.metric_before
        assert results["target_loss"] == pytest.approx(sum(out.losses) / len(out.losses), rel=1e-9)

    def test_epsilon_root_plays_no_part(self, model):
        results = [
            validate(model, EXAMPLES, metric, TargetTrainingArguments(adam_epsilon_root=root, learning_rate=1e-2))
            for root in (0.0, 1.0, "auto")
        ]
        assert results[0] == results[1] == results[2]

    def test_readouts(self, model):
        pattern = LMHeadPattern([[1, -1], [-1, 1]])
        results = validate(model, EXAMPLES, pattern, TargetTrainingArguments(learning_rate=1e-2))
        assert set(results) == {
            "metric",
            "metric_before",
            "metric_gain",
            "target_loss",
            "target_steps",
            "pixel_accuracy",
        }
        assert results["pixel_accuracy"] == (pattern.decoded == pattern.pattern).double().mean().item()

    @pytest.mark.parametrize("fails", [False, True])
    def test_model_is_as_before(self, model, weights, fails):
        calls = []

        def failing(model):
            calls.append(None)
            if fails and len(calls) == 2:
                raise RuntimeError("broken metric")
            return metric(model)

        model.train()
        before, state = weights(model), torch.get_rng_state()
        if fails:
            with pytest.raises(RuntimeError, match="broken metric"):
                validate(model, EXAMPLES, failing, TargetTrainingArguments(learning_rate=1e-2))
        else:
            validate(model, EXAMPLES, failing, TargetTrainingArguments(learning_rate=1e-2))
        assert len(calls) == 2
        after = weights(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(state, torch.get_rng_state())

    def test_no_dropout(self, causal_lm):
        plain, dropping = causal_lm(seed=1), causal_lm(seed=1).train()
        dropping.transformer.drop.p = 0.5
        args = TargetTrainingArguments(learning_rate=1e-2)
        assert validate(dropping, EXAMPLES, metric, args) == validate(plain, EXAMPLES, metric, args)
