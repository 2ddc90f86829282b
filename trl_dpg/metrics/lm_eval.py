"""The benchmark metric, for tasks of EleutherAI's lm-evaluation-harness."""

from collections import defaultdict
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..metagradients.metric import Metric
from .likelihood import Row, check_vocabulary, load_processing_class, score_rows


class LMEvalLikelihood(Metric):
    r"""
    Mean log-likelihood of the right answers to a benchmark of lm-evaluation-harness, in nats per question.

    For multiple choice, Φ is the mean log-probability of the right answers *among the choices*, the log-softmax of the choices'
    log-likelihoods. Like accuracy, it does not rise if all choices become equally more likely. For tasks that score one
    continuation, such as `lambada_openai`, Φ is the mean log-likelihood of this continuation.

    The harness itself makes requests, few-shot examples, tokens, truncation and read-outs.

    Memory holds the activations of all requests until the gradient of Φ is computed. A question with four choices makes four requests.
    Use `limit` to save memory.

    Args:
        task (`str`, `PathLike` or `dict`):
            Name of a task, path of a task's YAML file, or the content of such a file. `{"task": "arc_easy", "num_fewshot": 5}` changes
            a setting. The task's data is loaded, from the Hub if the task says so.
        limit (`int`, *optional*):
            Number of questions, from the first on. `None` means all questions.
        margin (`bool`, *optional*, defaults to `True`):
            Whether right answers of multiple choice are compared with the other choices. With `False`, Φ is the log-likelihood of the
            right answers alone, which also rises if the target learns the form of an answer.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the target. If `None`, `setup` loads it.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests per forward pass.

    Raises:
        [`ImportError`]: If lm-evaluation-harness is not installed: `pip install trl-dpg[lm-eval]`.
        [`ValueError`]: If there is no such task, if it generates text, or if it is a group of tasks. Also if the right answer of a
            question is not among its choices.
    """

    def __init__(
        self,
        task: str | PathLike[str] | dict[str, Any],
        limit: int | None = None,
        margin: bool = True,
        processing_class: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
    ):
        for name, number in (("limit", limit), ("batch_size", batch_size)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.margin, self.processing_class, self.batch_size = margin, processing_class, batch_size
        self.task = _load_task(task)
        self.task.build_all_requests(limit=limit, rank=0, world_size=1)
        documents = defaultdict(list)
        for request in self.task.instances:
            documents[request.doc_id].append(request)
        self._documents = [sorted(requests, key=lambda request: request.idx) for requests in documents.values()]
        self._answers = [self._right_answers(requests[0].doc) for requests in self._documents]
        self._rows: list[Row] = []

    def setup(self, model: nn.Module) -> None:
        """
        Tokenizes the requests at the first call, with the target's tokenizer if none was given.

        Raises:
            [`ValueError`]: If the tokenizer cannot be loaded, or if a token is not in the vocabulary. Also if an answer has no token, or
                more tokens than the model has positions.
        """
        if not self._rows:
            self.processing_class = self.processing_class or load_processing_class(model, self)
            requests = [request for requests in self._documents for request in requests]
            self._rows = _encode(requests, model, self.processing_class)
        for index, (input_ids, _) in enumerate(self._rows):
            check_vocabulary(model, input_ids, f"Request {index} of `task` {self.task.task_name!r}")

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Φ of a model in eval mode, shape `()`, in float64. Raises a [`ValueError`] if `setup` was not called before."""
        values = []
        for scores, (choices, right) in zip(self._scores(model)[0], self._answers, strict=True):
            value = scores[right].logsumexp(0)  # any of several right answers counts
            if self.margin and choices > 1:
                value = value - scores[:choices].logsumexp(0)
            values.append(value)
        return torch.stack(values).mean()

    @torch.no_grad()
    def readouts(self, model: nn.Module) -> dict[str, float]:
        """The metrics of the task, as the harness computes them: for example `acc` and `acc_norm`."""
        values: dict[str, list[Any]] = defaultdict(list)
        for requests, scores, greedy in zip(self._documents, *self._scores(model), strict=True):
            results = list(zip(scores.tolist(), greedy.tolist(), strict=True))
            for name, value in self.task.process_results(requests[0].doc, results).items():
                values[name].append(value)
        return {name: float(self.task.aggregation()[name](each)) for name, each in values.items()}

    def _scores(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each question, the log-likelihoods of its requests, and whether greedy decoding would write them."""
        if not self._rows:
            raise ValueError("`LMEvalLikelihood.setup(model)` must be called first.")
        counts = [len(requests) for requests in self._documents]
        log_likelihoods, greedy = score_rows(model, self._rows, self.batch_size)
        return list(log_likelihoods.split(counts)), list(greedy.split(counts))

    def _right_answers(self, document: Any) -> tuple[int, list[int]]:
        """Number of choices, and indices of the right ones."""
        if self.task.OUTPUT_TYPE == "loglikelihood":
            return 1, [0]
        choices = self.task.doc_to_choice(document)
        right = self.task.doc_to_text(document) if self.task.multiple_input else self.task.doc_to_target(document)
        right = right if isinstance(right, list) else [right]
        try:
            indices = [choices.index(answer) if isinstance(answer, str) else int(answer) for answer in right]
        except ValueError:
            indices = []
        if not indices or not all(0 <= index < len(choices) for index in indices):
            raise ValueError(
                f"`task` {self.task.task_name!r} has a question whose right answer, {right}, is not among its {len(choices)} choices. "
                "Correct its 'doc_to_target', or leave the question out with 'process_docs'."
            )
        return len(choices), indices

    def describe(self) -> dict[str, Any]:
        name, among = self.task.task_name, " among its choices" if self.margin else ""
        return {
            **super().describe(),
            "effect": f"it answers the benchmark `{name}` better",
            "description": f"Mean log-probability of the right answer{among}, of {len(self._documents)} questions of `{name}`.",
        }


def _load_task(task: str | PathLike[str] | dict[str, Any]) -> Any:
    """Loads a task of the harness, which must ask for log-likelihoods."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("`LMEvalLikelihood` needs lm-evaluation-harness: `pip install trl-dpg[lm-eval]`.") from error
    spec = task if isinstance(task, dict) else fspath(task)
    own = "output_type" in spec if isinstance(spec, dict) else Path(spec).suffix in (".yaml", ".yml")
    try:
        found = list(TaskManager(include_defaults=not own).load(spec)["tasks"].values())  # the index takes seconds
    except (LookupError, ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"`task` {task!r:.200} cannot be loaded: {error}. `lm-eval ls tasks` lists the names."
        ) from error
    if len(found) != 1:
        names = [each.task_name for each in found]
        raise ValueError(
            f"`task` {task!r:.200} is a group of {len(found)} tasks: {names!s:.400}. Name one, or add a metric for each."
        )
    if found[0].OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise ValueError(
            f"`task` {task!r:.200} has the output type {found[0].OUTPUT_TYPE!r}, which has no right answer to score. Take one of "
            "'multiple_choice' or 'loglikelihood', or `LanguageModelingLikelihood` for whole texts."
        )
    found[0].set_fewshot_seed(1234)  # the default of `lm-eval run`
    return found[0]


def _encode(requests: list[Any], model: Any, tokenizer: Any) -> list[Row]:
    """Encodes and cuts contexts and continuations as the harness's own model class for Transformers does."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import resolve_max_length

    class Encoder(TemplateLM):
        """Returns the tokens that the harness would score, instead of scoring them."""

        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            begun = self.prefix_token_id is not None and string.startswith(tokenizer.decode(self.prefix_token_id))
            add = not begun if add_special_tokens is None else add_special_tokens
            return tokenizer.encode(string, add_special_tokens=add)

        def _loglikelihood_tokens(self, requests, **kwargs):
            return requests

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise ValueError(
                "`task` asks for generated or rolling texts, which have no differentiable score. Use a multiple-choice or "
                "loglikelihood task."
            )

        generate_until = loglikelihood_rolling

    longest = resolve_max_length(model.config, tokenizer)
    rows = []
    for texts, context, continuation in Encoder().loglikelihood(requests, disable_tqdm=True):
        if not 0 < len(continuation) <= longest:
            raise ValueError(
                f"The answer {texts[1]!r:.80} of `task` has {len(continuation)} tokens, but must have 1 to {longest}, the positions of "
                "`target_model`. Leave the question out with 'process_docs'."
            )
        # The model does not read the last token, so a row may have one token more than the model has positions.
        tokens, labels = context + continuation, [-100] * len(context) + continuation
        rows.append((tokens[-longest - 1 :], labels[-longest - 1 :]))
    return rows
