"""Publishing on the Hub: facts about a run, cards made of them, and pushes of generators and data sets."""

from .cards import dataset_card, generator_card
from .facts import read_facts, training_facts
from .push import push_dataset, push_generator


__all__ = ["dataset_card", "generator_card", "push_dataset", "push_generator", "read_facts", "training_facts"]
