"""Reading documents, preparing a corpus from them, and reading the prepared corpus."""
