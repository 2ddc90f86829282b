"""Calling a reward as TRL does."""

import pytest


class Log:
    """TRL's `log_extra` and `log_metric`."""

    def __init__(self):
        self.columns, self.metrics = {}, {}

    def log_extra(self, name, values):
        self.columns[name] = values

    def log_metric(self, name, value):
        self.metrics[name.split("/", 1)[1]] = value

    @property
    def hooks(self):
        return {"log_extra": self.log_extra, "log_metric": self.log_metric}


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def call(tokenizer):
    def call(reward, texts, ended=False, prompts=None, **kwargs):
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if ended:
            ids = [[*row, tokenizer.eos_token_id] for row in ids]
        prompts = prompts or [""] * len(texts)
        return reward(prompts=prompts, completions=texts, completion_ids=ids, **kwargs)

    return call
