"""
Metagradients by bergson's MAGIC. Runs in bergson's own environment, see `environment.py`.

    .venv-bergson/bin/python -m benchmarks.peers.bergson_magic JOB.json

The job holds `model` (directory of a saved causal language model, untied), `examples` and `queries` (lists of token
ids; examples in the order of training), and the fields of [`~trl_dpg.metagradients.TargetTrainingArguments`] that are
read below. The metric is minus the language-modeling loss of the queries. One line of JSON is printed:

- `seconds`, `peak_bytes`: of each call of train, query gradient and backward, the model loaded already;
- `train_seconds`: of each plain training by the same trainer, without checkpoints or a metric;
- `scores`: metagradients, in the order of the examples; `losses`: of each step; `metric_after`.
"""

import json
import sys
import tempfile
from typing import Any

import torch
from bergson.config.config import LRScheduleConfig
from bergson.magic.cli import MagicConfig, compute_query_gradients
from bergson.magic.data_stream import DataStream
from bergson.magic.trainer import BackwardState, TrainerState, prepare_trainer
from datasets import Dataset
from torchopt.pytree import tree_iter

from benchmarks.peers.measure import measured


def main(job: dict[str, Any]) -> dict[str, Any]:
    batch_size, examples, queries = job["batch_size"], job["examples"], job["queries"]
    if len(examples) % batch_size:
        raise ValueError(
            f"`examples` has {len(examples)} rows, which batches of {batch_size} do not divide. bergson's stream drops the rest."
        )
    config = MagicConfig(
        run_path="",  # only the command line of bergson writes there
        model=job["model"],
        precision=job["precision"],
        lr_schedule=LRScheduleConfig(lr=job["learning_rate"], lr_scheduler_type="constant"),
        adam_beta1=job["adam_beta1"],
        adam_beta2=job["adam_beta2"],
        adam_eps=job["adam_epsilon"],
        eps_root=job["adam_epsilon_root"],
        weight_decay=job["weight_decay"],
    )
    schedule = config.lr_schedule.get_schedule(len(examples) // batch_size)
    trainer, start, model = prepare_trainer(config, 0, schedule)
    stream = DataStream(Dataset.from_dict({"input_ids": examples}), batch_size)
    query_stream = DataStream(Dataset.from_dict({"input_ids": queries}), len(queries))

    def train() -> TrainerState:
        return trainer.train(start.to("cpu"), stream, inplace=True)

    def metagradients() -> tuple[BackwardState, float, list[float]]:
        losses: list[float] = []
        with tempfile.TemporaryDirectory() as directory:
            state = trainer.train(
                start.to("cpu"),
                stream,
                inplace=True,
                save_dir=directory,
                save_mode=job["save_mode"],
                log_fn=lambda step, loss: losses.append(loss),
            )
            query_gradients, query_loss = compute_query_gradients(state, model, query_stream)
            moments = [t for t in tree_iter(state.opt_state) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            cotangents = BackwardState(
                query_gradients, [torch.zeros_like(t) for t in moments], torch.zeros_like(stream.weights)
            )
            cotangents = trainer.backward(
                directory, stream, cotangents, state, inplace=True, save_mode=job["save_mode"]
            )
        return cotangents, query_loss, losses

    _, train_seconds, _ = measured(train, job["repeats"])
    (cotangents, query_loss, losses), seconds, peak_bytes = measured(metagradients, job["repeats"])
    return {
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "train_seconds": train_seconds,
        "scores": (-cotangents.weight_grads).tolist(),  # bergson's are of the loss of the queries, not of minus it
        "losses": losses,
        "metric_after": -query_loss,
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(main(json.load(file))))
