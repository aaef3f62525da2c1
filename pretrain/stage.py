"""What the pretraining stages share: their batch maker."""

from pretrain.data import BatchMaker
from realm.run.folder import Run


def batch_maker(run: Run) -> BatchMaker:
    """Batches as the run's config says."""
    retriever, reader = run.config.retriever, run.config.reader
    return BatchMaker(
        run.contexts,
        run.wordpieces,
        retriever.max_query_tokens,
        retriever.max_passage_tokens,
        reader.max_tokens,
        run.config.pretrain.reader_buckets,
    )
