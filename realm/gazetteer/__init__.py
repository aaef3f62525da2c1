"""The built-in corpus: real facts in tables, written out as passages, statements to pretrain on,
and questions."""

from realm.gazetteer.write import GAZETTEER_VERSION, GazetteerSummary, write_gazetteer

__all__ = ["GAZETTEER_VERSION", "GazetteerSummary", "write_gazetteer"]
