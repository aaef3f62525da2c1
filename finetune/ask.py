"""`realm ask`: answer one question, and show the answer in its passage."""

from rich.markup import escape

from finetune.answer import Answerer
from finetune.questions import Question
from finetune.train_reader import Finetuning
from realm.corpus.collate import filled
from realm.errors import UserError
from realm.run.folder import Run
from realm.runtime.telemetry import console
from realm.text.tokenizer import tokenize


def ask(run: Run, text: str, passages: int, stage: str = Finetuning.name) -> None:
    """Print the answer of a stage's models to the question `text`, reading `passages` passages.

    Also prints the passage with the answer marked, its p(z|x), and the titles of the other passages
    read. Raises UserError if the question is empty or the stage has no reader.
    """
    if not text.strip():
        raise UserError(
            'the question is empty; write it in quotes, as in realm ask --run runs/demo "Who discovered radium?".'
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
    if answer.passage is None:
        console.print(
            f"[bold]{escape(text)}[/bold]\n  no passage was found; search more of the index, "
            "for example with --refresh.search_parameters nprobe=64"
        )
        return
    console.print(f"[bold]{escape(text)}[/bold]")
    console.print(f"  [bold green]{escape(answer.text)}[/bold green]   (p(z|x) = {answer.probability:.2f})")
    body = corpus.text(answer.passage)
    if answer.start >= 0:
        end = answer.start + len(answer.text)
        inside = escape(body[answer.start : end])
        marked = f"{escape(body[: answer.start])}[bold green]»{inside}«[/bold green]{escape(body[end:])}"
    else:
        marked = escape(body)
    console.print(
        f"  from {escape(corpus.title(answer.passage))} \\[{escape(corpus.ids[answer.passage])}]: {marked.strip()}"
    )
    others = [row for row in filled(rows[0]) if row != answer.passage]
    if others:
        console.print(f"  also read: {'; '.join(escape(corpus.title(row)) for row in others)}")
