"""The built-in corpus: passages, statements for pretraining, and questions from tables of facts."""

from realm.gazetteer.write import GAZETTEER_VERSION, GazetteerSummary, write_gazetteer

__all__ = ["GAZETTEER_VERSION", "GazetteerSummary", "write_gazetteer"]
