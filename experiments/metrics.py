"""Metrics that configurations name as `experiments.metrics:NAME`: likelihoods of texts in a language."""

import torch
from datasets import load_dataset

from experiments.corpora import likelihood_texts
from trl_dpg.metrics import LanguageModelingLikelihood


class Texts(LanguageModelingLikelihood):
    """The likelihood of 32 texts in a language. Reads out the perplexity of 32 others, which are not part of Φ."""

    language: str

    def __init__(self):
        texts = likelihood_texts(self.language, 32, 32)
        super().__init__(texts["metric"])
        self.held_out = LanguageModelingLikelihood(texts["test"])

    def setup(self, model):
        super().setup(model)
        self.held_out.setup(model)

    @torch.no_grad()
    def readouts(self, model):
        return {**super().readouts(model), "held_out_perplexity": (-self.held_out(model)).exp().item()}


class English(Texts):
    language = "en"


class Spanish(Texts):
    language = "es"


class French(Texts):
    language = "fr"


class German(Texts):
    language = "de"


class Italian(Texts):
    language = "it"


class Lambada(LanguageModelingLikelihood):
    """The likelihood of the last words of 512 passages in Spanish, from the Hub. Subclasses take another language."""

    language = "es"

    def __init__(self):
        passages = load_dataset("EleutherAI/lambada_openai", self.language, split="test[:512]")["text"]
        pairs = (text.rsplit(" ", 1) for text in passages)
        super().__init__([{"prompt": start, "completion": f" {word}"} for start, word in pairs])
