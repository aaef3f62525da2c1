"""`realm ask`: answer one question, and show the answer in its passage."""

from finetune.answer import Answer, Answerer
from finetune.questions import Question, is_truncated
from finetune.train_reader import Finetuning
from realm.corpus.collate import filled
from realm.errors import UserError
from realm.run.folder import Run
from realm.runtime.telemetry import console, log_line, styled
from realm.text.tokenizer import tokenize

_ANSWER = "bold green"
"""Style of the answer."""


def ask(run: Run, text: str, passages: int, stage: str = Finetuning.name) -> None:
    """Print the answer of a stage's models to the question `text`, reading `passages` passages.

    Also prints the passage with the answer marked, its p(z|x), and the titles of the other passages
    read. Raises UserError if the question has no wordpieces or the stage has no reader.
    """
    if not text.strip():
        raise UserError(
            'the question is empty; write it in quotes, as in realm ask --run runs/demo "Who discovered radium?".'
        )
    ids, _ = tokenize(run.tokenizer, [text])[0]
    if not len(ids):
        raise UserError("the tokenizer drops all characters of the question; ask with letters or digits.")
    limit = run.config.retriever.max_query_tokens
    if is_truncated(ids, limit):
        log_line(
            f"warning: only the beginning of the question is read: it has {len(ids):,} wordpieces, and "
            f"retriever.max_query_tokens is {limit}"
        )
    answerer = Answerer(run, stage)
    if answerer.model is None:
        raise UserError(
            f"stage {stage} of run {run.folder} has no reader; train one, or choose a later stage with --stage."
        )
    print_answer(answerer, text, passages)


def print_answer(answerer: Answerer, text: str, passages: int) -> None:
    """Answer a question with a loaded answerer; see `ask`."""
    ids, _ = tokenize(answerer.run.tokenizer, [text])[0]
    question = Question("", text, (), ids)
    rows = answerer.retrieve([question], min(passages, len(answerer.index)))
    answer = answerer.read([question], rows)[0]
    corpus = answerer.run.passages
    console.print(text, style="bold")
    if answer.passage is None:
        console.print(
            "  no passage was found; search more of the index, for example with --refresh.search_parameters nprobe=64"
        )
        return
    console.print(styled("  ", (answer.text, _ANSWER), f"   (p(z|x) = {answer.probability:.2f})"))
    source = f"  from {corpus.title(answer.passage)} [{corpus.ids[answer.passage]}]: "
    console.print(styled(source, *_marked(corpus.text(answer.passage), answer)))
    others = [row for row in filled(rows[0]) if row != answer.passage]
    if others:
        console.print(f"  also read: {'; '.join(corpus.title(row) for row in others)}")


def _marked(body: str, answer: Answer) -> list[str | tuple[str, str]]:
    """The passage in parts, the answer marked if its place is known."""
    if answer.start < 0:
        return [body.strip()]
    end = answer.start + len(answer.text)
    return [body[: answer.start].lstrip(), (f"»{body[answer.start : end]}«", _ANSWER), body[end:].rstrip()]
