"""Tasks of lm_eval (the Language Model Evaluation Harness), run on our model.

The prompts, metrics and standard errors are lm_eval's. Log-likelihoods are those of packed rows, and answers those of
`sampling`, cut at the first stop string.
"""

import importlib
import logging
import math
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from dpo_jax.data.table import Table
from dpo_jax.data.template import chat_template
from dpo_jax.errors import UserError, closest
from dpo_jax.evaluation import greedy_per_example
from dpo_jax.intervals import Z95, wilson
from dpo_jax.records import Tokens
from dpo_jax.runs.suites.examples import HARNESS
from dpo_jax.runs.suites.registry import Subject, SuiteResult, SuiteTask, register_suite
from dpo_jax.sampling import generate
from dpo_jax.training.tables import decode_texts, template_file_text

BOOTSTRAP = 1000  # resamples for metrics without a closed standard error
SEED = 1234  # of few-shot examples, lm_eval's default
MEANINGS = {
    "acc": "Share of questions whose right answer has the highest log-likelihood of those to choose from.",
    "acc_norm": "The same by log-likelihood per character of the answer.",
    "exact_match": "Share of answers that equal the wanted text.",
    "word_perplexity": "exp(-log p(text) / words). Lower is better.",
    "byte_perplexity": "exp(-log p(text) / bytes). Lower is better.",
    "bits_per_byte": "-log2 p(text) / bytes. Lower is better.",
    "": "As lm_eval's task defines it.",
}
SAMPLING = {"temperature", "top_k", "top_p", "do_sample", "until", "max_gen_toks"}
log = logging.getLogger(__name__)


@register_suite(HARNESS, keys=("suite_num_fewshot",), meanings=MEANINGS)
def measure_harness(task: SuiteTask) -> SuiteResult:
    """Returns the metrics of tasks of lm_eval, with its standard errors as 95% intervals."""
    evaluator = _harness_module("evaluator")
    manager = _task_manager(task)
    settings, chat = task.settings, task.settings.raw is False
    model = harness_lm(task.subject())
    try:
        loaded = manager.load(list(task.tasks))
        for one in loaded["tasks"].values():
            _set_fewshot(one, settings.suite_num_fewshot)
        options = {"limit": settings.suite_limit, "bootstrap_iters": BOOTSTRAP, "apply_chat_template": chat}
        found = evaluator.evaluate(lm=model, task_dict=loaded, log_samples=True, **options)
    except (OSError, ValueError, ImportError, KeyError, jinja2.TemplateError) as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"lm_eval: {', '.join(task.tasks)}: {why}; give tasks whose data are at hand") from e
    version = importlib.import_module("importlib.metadata").version("lm_eval")
    notes = (f"lm_eval {version}, prompts {'by the chat template' if chat else 'as texts'}",)
    return SuiteResult(_metrics(found), _examples(found), notes, tuple(_rows(found)))


def _harness_module(name: str) -> Any:
    try:
        return importlib.import_module(f"lm_eval.{name}")
    except ImportError as e:
        raise UserError(f"lm_eval: needs a package that is missing ({e}); pip install 'dpo_jax[evals]'") from e


def _task_manager(task: SuiteTask) -> Any:
    """Returns lm_eval's index of tasks; of the folders in `suite_data` alone if they have all, which is much faster."""
    make, folders = _harness_module("tasks").TaskManager, list(task.data.names)
    if folders and set(task.tasks) <= set((own := make(include_path=folders, include_defaults=False)).all_tasks):
        return own
    manager = make(include_path=folders or None)
    for name in task.tasks:
        if name not in manager.all_tasks:
            raise UserError(f"lm_eval: unknown task {name!r}; {_hint(name, manager.all_tasks)}")
    return manager


def _hint(name: str, names: list[str]) -> str:
    hint = closest(name, names)
    return hint if hint.startswith("did you mean") else "lm-eval ls tasks lists them"


def _set_fewshot(task: Any, number: int | None) -> None:
    """Sets the examples in a prompt as lm_eval does: a task that is defined without any keeps its 0."""
    default = task.get_config("num_fewshot")
    if number is not None and default == 0 != number:
        log.info(f"lm_eval: {task.config.task} is defined without examples in its prompts and keeps it so")
    elif number is not None or default is None:
        task.set_config(key="num_fewshot", value=number or 0)
    task.set_fewshot_seed(seed=SEED)


def _examples(found: Any) -> int:
    return sum(counts["effective"] for counts in found["n-samples"].values())


def _metrics(found: Any) -> dict[str, dict[str, float]]:
    """Returns `TASK/METRIC` -> mean, n, and low and high where lm_eval has a standard error."""
    metrics: dict[str, dict[str, float]] = {}
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        size = found["n-samples"].get(task, {}).get("effective", values.get("sample_len"))
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            entry = {"mean": float(value)} | ({"n": size} if size is not None else {})
            if isinstance(error, int | float):
                low, high = share_or_normal_interval(float(value), error, size or 0)
                entry |= {"low": low, "high": high}
            metrics[f"{task}/{metric}" + ("" if rule == "none" else f",{rule}")] = entry
    return metrics


def share_or_normal_interval(value: float, error: float, n: float) -> tuple[float, float]:
    """Returns Wilson's 95% interval of a share of n examples, else the normal one from lm_eval's standard error.

    The standard error of a share p is sqrt(p (1 - p) / (n - 1)); that of 0 or n of n is 0, and would be its interval.
    """
    if n > 1 and 0 <= value <= 1 and math.isclose(error, math.sqrt(value * (1 - value) / (n - 1)), abs_tol=1e-9):
        return wilson(value * n, n)
    return value - Z95 * error, value + Z95 * error


def _rows(found: Any) -> list[dict[str, Any]]:
    rows = []
    for task, samples in (found.get("samples") or {}).items():
        for one in samples:
            kept = {name: one[name] for name in ("doc_id", "filter", "filtered_resps", *one["metrics"])}
            rows.append({"task": task, **kept})
    return rows


def harness_lm(subject: Subject) -> Any:
    """Returns a policy as lm_eval's class of models, `TemplateLM`."""
    base = _harness_module("api.model").TemplateLM

    class Policy(base):
        """Delegates to the functions of this file; text is split into tokens as lm_eval's HFLM does it."""

        tokenizer = subject.tokenizer
        max_gen_toks = 256

        @property
        def eot_token_id(self) -> int:
            return subject.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            bos = subject.tokenizer.bos_token_id
            return self.eot_token_id if bos is None else bos

        @property
        def tokenizer_name(self) -> str:
            return subject.path.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return harness_ids(subject.tokenizer, string, self.prefix_token_id, add_special_tokens)

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(subject, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            ids = [self.tok_encode(one.args[0]) for one in requests]
            return rolling_loglikelihoods(subject, ids, self.prefix_token_id)

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            return generations(subject, [one.args for one in requests], self.tok_encode, self.max_gen_toks)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return templated(subject, chat_history, add_generation_prompt)

    return Policy()


def harness_ids(tokenizer: Any, text: str, prefix: int, special: bool | None) -> list[int]:
    """Returns the token ids of a text; a text that begins with BOS gets no other one."""
    if special is None and text.startswith(tokenizer.decode(prefix)):
        special = False
    return tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special}))


def loglikelihoods(subject: Subject, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Returns log p(continuation | context), and whether greedy decoding writes it, of (context, continuation) ids.

    The start of a context that exceeds the model's positions is cut off.

    Raises:
      UserError: a continuation without a token, or with more than the model's positions.
    """
    positions = subject.judge.model.architecture.max_positions
    table = Table.of(_tokens(*pair, positions) for pair in pairs)
    found = greedy_per_example(subject.judge._replace(max_length=int(table.lengths().max()) + 1), table)
    return [(float(logps.sum(dtype=np.float64)), bool(greedy.all())) for logps, greedy in found]


def _tokens(context: list[int], continuation: list[int], positions: int) -> Tokens:
    # The last token is not in the row, so that one token more than the positions fits.
    room = positions + 1 - len(continuation)
    if not continuation:
        raise UserError("lm_eval: the tokenizer leaves no token of a text to score after its context; use another task")
    if room < 1:
        what = f"a text of {len(continuation)} tokens exceeds the model's {positions} positions"
        raise UserError(f"lm_eval: {what}; use another task")
    return Tokens(np.array(context[-room:], np.int32), (np.array(continuation, np.int32),))


def rolling_loglikelihoods(subject: Subject, texts: Sequence[list[int]], prefix: int) -> list[float]:
    """Returns log p(text) of texts as ids, in windows of the model's positions; the first begins after `prefix`."""
    utils, positions = _harness_module("utils"), subject.judge.model.architecture.max_positions
    windows = [
        [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(ids, prefix, positions, 1)]
        for ids in texts
    ]
    pairs = [pair for one in windows for pair in one]
    scored = iter(loglikelihoods(subject, pairs) if pairs else ())
    return [sum(next(scored)[0] for _ in one) for one in windows]


def generations(subject: Subject, requests: Sequence[Any], encode: Any, max_tokens: int) -> list[str]:
    """Returns the answers to (context, options), cut at the first stop string; equal options are sampled together."""
    utils, found = _harness_module("models.utils"), [""] * len(requests)
    groups: dict[str, list[int]] = {}
    for i, (_, options) in enumerate(requests):
        groups.setdefault(repr(options), []).append(i)
    for members in groups.values():
        options = dict(utils.normalize_gen_kwargs(requests[members[0]][1], max_tokens))
        if unknown := sorted(options.keys() - SAMPLING):
            raise UserError(f"lm_eval: option {unknown[0]!r} of a task's generation is not supported; use another task")
        texts = _generated_texts(subject, [encode(requests[i][0]) for i in members], options)
        eos = subject.tokenizer.decode([subject.tokenizer.eos_token_id])
        stops = utils.handle_stop_sequences(options["until"], eos=eos)
        for i, text in zip(members, texts, strict=True):
            found[i] = utils.postprocess_generated_text(text, stop=stops, think_end_token=None)
    return found


def _generated_texts(subject: Subject, contexts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
    new, positions = options["max_gen_toks"], subject.judge.model.architecture.max_positions
    if new >= positions:
        raise UserError(
            f"lm_eval: answers of {new} tokens leave no room for a prompt in the model's {positions} positions; use "
            "another task"
        )
    judge, prompts = subject.judge, [np.array(ids[new - positions :], np.int32) for ids in contexts]
    ids = generate(
        judge.model,
        judge.params["policy"],
        prompts,
        max_new_tokens=new,
        temperature=options["temperature"] if options["do_sample"] else 0.0,
        top_k=options.get("top_k") or None,
        top_p=options.get("top_p") or None,
        eos_id=subject.ends,
        seed=subject.settings.seed,
        batch_size=judge.batch_size,
    )
    return decode_texts(subject.tokenizer, ids, subject.ends)


def templated(subject: Subject, messages: list[dict[str, str]], begins: bool) -> str:
    """Returns a conversation by the run's chat template, or the tokenizer's; `begins` an assistant's turn or not."""
    template = chat_template(template_file_text(subject.settings.data), subject.settings.data.chat_template_kwargs)
    return subject.tokenizer.apply_chat_template(
        messages,
        chat_template=template.source or None,
        tokenize=False,
        add_generation_prompt=begins,
        continue_final_message=not begins,
        **dict(template.options),
    )
